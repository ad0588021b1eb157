//! Callers of the agent's socket without manners, of an ordinary user.
#![allow(unsafe_code)]

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Gid, Pid, Uid, fork, setresgid, setresuid};

const LIST: &[u8] = b"{\"method\":\"io.qmhotplug.List\"}\0";
const MONITOR: &[u8] = b"{\"method\":\"io.qmhotplug.Monitor\",\"more\":true}\0";

/// A process with more connections than one user may have. Ends when dropped.
pub struct Rude {
    /// Its id.
    pub pid: Pid,
}

impl Rude {
    /// Lets that user in at the socket and starts it; waits until all are at it.
    pub fn start(uid: u32, socket: &Path) -> Rude {
        let set = |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
        set(socket.parent().unwrap(), 0o711);
        set(socket, 0o666);
        let (mut reader, writer) = UnixStream::pair().unwrap();
        // SAFETY: the child uses nothing that another thread may have locked but the allocator, which glibc makes usable.
        let pid = match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => child,
            ForkResult::Child => {
                drop(reader);
                let (user, group) = (Uid::from_raw(uid), Gid::from_raw(uid));
                let ids = setresgid(group, group, group).and_then(|()| setresuid(user, user, user));
                let _ = set_pdeathsig(Signal::SIGKILL);
                let result = ids.map_err(Into::into).and_then(|()| be_rude(socket, writer));
                eprintln!("callers without manners: {result:?}");
                // SAFETY: _exit(2) has no conditions.
                unsafe { libc::_exit(1) }
            }
        };
        drop(writer);
        reader.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
        reader.read_exact(&mut [0]).unwrap();
        Rude { pid }
    }
}

impl Drop for Rude {
    fn drop(&mut self) {
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
    }
}

/// Those who never read and ask for ever, half requests with nothing after them, a request of a hundred megabytes, and
/// callers who never say a word.
fn be_rude(socket: &Path, mut ready: UnixStream) -> std::io::Result<()> {
    let connect = || {
        let stream = UnixStream::connect(socket)?;
        stream.set_nonblocking(true).map(|()| stream)
    };
    let some = |count: usize| (0..count).map(|_| connect()).collect::<std::io::Result<Vec<_>>>();
    let (mut deaf, mut half) = (some(40)?, some(20)?);
    deaf[..20].iter_mut().try_for_each(|stream| stream.write_all(MONITOR))?;
    half.iter_mut().try_for_each(|stream| stream.write_all(b"{\"method\":"))?;
    let (_silent, mut long) = (some(50)?, connect()?);
    // More than there is room for: they are hung up on.
    let _others = some(100)?;
    ready.write_all(b".")?;
    loop {
        // Full, or hung up on.
        deaf[20..].iter_mut().for_each(|stream| drop(stream.write(LIST)));
        if long.write(&[b'x'; 65_536]).is_err() {
            std::thread::sleep(Duration::from_millis(1));
            long = connect()?;
        }
    }
}
