//! Work inside a container's mount namespace.

use std::os::fd::{AsFd, BorrowedFd};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{Mode, OFlags, fstat, open};
use rustix::io::Errno;

use crate::error::{Error, Result};
use crate::sys::host::Host;
use crate::sys::process::Process;

/// A container's root directory, as seen by a thread that is in its mount namespace.
#[derive(Debug, Clone, Copy)]
pub struct Inside<'a> {
    /// Its root: all paths are resolved below this, with `RESOLVE_IN_ROOT`.
    pub root: BorrowedFd<'a>,
    /// The host that it is not.
    pub host: Host,
}

/// Runs `work` on a thread of its own that has joined the container's mount namespace. The thread ends with the work,
/// so no other code of this process ever finds itself inside; its umask is zero.
///
/// Refused while the root of the process is the host's: early in a container's start the namespace is new but its root
/// is not yet, and a node would be made on the host.
pub fn inside<T: Send>(
    label: &str,
    process: &Process,
    host: Host,
    work: impl FnOnce(Inside<'_>) -> T + Send,
) -> Result<T> {
    let in_container = |what: &str| {
        let (container, what) = (label.to_owned(), what.to_owned());
        move |source: std::io::Error| Error::InContainer { container, what, source }
    };
    let exited = || Error::ContainerExited(label.to_owned());
    let path = format!("/proc/{}/root", process.pid);
    let root = match open(&path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(root) => root,
        // A process that is ending has neither root nor namespaces any more, a moment before its end is reported.
        Err(Errno::NOENT | Errno::SRCH) => return Err(exited()),
        Err(_) if process.has_exited() => return Err(exited()),
        Err(error) => return Err(in_container(&format!("open its root {path}"))(error.into())),
    };
    let stat = fstat(&root).map_err(|error| in_container("stat its root")(error.into()))?;
    if (stat.st_dev, stat.st_ino) == host.root {
        return Err(Error::Refused {
            container: label.to_owned(),
            reason: "its root directory is the host's own: it is no container, or it is still starting".into(),
        });
    }
    std::thread::scope(|scope| {
        let joined = std::thread::Builder::new().name("inside".into()).spawn_scoped(scope, || {
            // A thread that shares its root and umask with others may not change mount namespaces (setns(2)).
            let entered = unshare(CloneFlags::CLONE_FS).and_then(|()| setns(process.as_fd(), CloneFlags::CLONE_NEWNS));
            match entered {
                Err(nix::errno::Errno::ESRCH) => Err(exited()),
                Err(_) if process.has_exited() => Err(exited()),
                Err(error) => Err(in_container("join its mount namespace")(error.into())),
                // The root was opened by number before: only now it is sure whose it is.
                Ok(()) if process.has_exited() => Err(exited()),
                Ok(()) => {
                    rustix::process::umask(Mode::empty());
                    Ok(work(Inside { root: root.as_fd(), host }))
                }
            }
        });
        match joined.map(|thread| thread.join()) {
            Ok(Ok(result)) => result,
            Ok(Err(panic)) => std::panic::resume_unwind(panic),
            Err(error) => Err(in_container("start a thread to enter it")(error)),
        }
    })
}
