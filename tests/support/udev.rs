//! What stands for udevd on a host that has none: its database, and its messages. And those who listen with libudev, in
//! the namespaces of a container.

#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, sendto, socket};
use nix::unistd::{ForkResult, Pid, fork};
use qm_hotplug::core::udev_message::of_udev;
use qm_hotplug::sys::process::Process;
use qm_hotplug::sys::uevent::{Received, Uevents};

const RUN_UDEV: &str = "/run/udev";

/// A udevd that does what the test says. Its database is on a file system of its own, in this mount namespace.
pub struct Udevd {
    socket: OwnedFd,
}

impl Udevd {
    /// Starts it: from now on a device counts once this one has spoken of it.
    pub fn start() -> Udevd {
        let udevd = Udevd::ended();
        File::create(Path::new(RUN_UDEV).join("control")).unwrap();
        udevd
    }

    /// What one has left that runs no more: a database. Devices count at the kernel's events.
    pub fn ended() -> Udevd {
        fs::create_dir_all(RUN_UDEV).unwrap();
        mount(Some("none"), RUN_UDEV, Some("tmpfs"), MsFlags::empty(), Some("mode=0755")).unwrap();
        fs::create_dir(Path::new(RUN_UDEV).join("data")).unwrap();
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkKObjectUEvent);
        Udevd { socket: socket.unwrap() }
    }

    /// Writes down what it knows of a device, by the name of its entry, `c7:1`.
    pub fn record(&self, name: &str, text: &str) {
        fs::write(Path::new(RUN_UDEV).join("data").join(name), text).unwrap();
    }

    /// Strikes that.
    pub fn forget(&self, name: &str) {
        let _ = fs::remove_file(Path::new(RUN_UDEV).join("data").join(name));
    }

    /// Tells of a device, after one more event of the kernel's.
    pub fn tell(&self, action: &str, devpath: &str) {
        fs::write("/sys/class/mem/null/uevent", "change").unwrap();
        let sequence = fs::read_to_string("/sys/kernel/uevent_seqnum").unwrap();
        self.tell_as(action, devpath, sequence.trim());
    }

    /// The same with that number.
    pub fn tell_as(&self, action: &str, devpath: &str, sequence: &str) {
        // Who listens to one subsystem alone is asked for its name. Of a device that is gone it is not known here.
        let subsystem = fs::canonicalize(format!("/sys{devpath}/subsystem"));
        let subsystem = subsystem.as_ref().ok().and_then(|path| path.file_name()?.to_str()).unwrap_or("x");
        let properties = [("ACTION", action), ("DEVPATH", devpath), ("SUBSYSTEM", subsystem), ("SEQNUM", sequence)];
        let message = of_udev(properties.into_iter());
        sendto(self.socket.as_raw_fd(), &message, &NetlinkAddr::new(0, 2), MsgFlags::empty()).unwrap();
    }
}

impl Drop for Udevd {
    fn drop(&mut self) {
        let _ = umount2(RUN_UDEV, MntFlags::MNT_DETACH);
    }
}

/// The `DEVPATH` of the device with that node, which is there.
pub fn devpath(node: &str) -> String {
    let stat = rustix::fs::stat(node).unwrap();
    let kind = if qm_hotplug::sys::node::number_of(&stat).unwrap().kind.letter() == 'b' { "block" } else { "char" };
    let (major, minor) = (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
    let directory = fs::canonicalize(format!("/sys/dev/{kind}/{major}:{minor}")).unwrap();
    directory.to_str().unwrap().strip_prefix("/sys").unwrap().to_owned()
}

/// What a client of libudev heard: all properties of the device.
pub type Heard = BTreeMap<String, String>;

/// A client of libudev in a container's namespaces: an ordinary program, with libudev's own monitor.
pub struct Listener {
    child: Pid,
    heard: Receiver<Heard>,
}

/// What it listens to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// What udevd tells, of these subsystems (all, where there are none).
    Udev(&'static [&'static str]),
    /// What the kernel tells.
    Kernel,
}

impl Listener {
    /// Starts one where the process with this id is, and waits until it listens.
    pub fn start(pid: u32, group: Group) -> Listener {
        let process = Process::open(pid).unwrap();
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/user")).unwrap();
        let mut namespaces = CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET;
        if of(&pid.to_string()) != of("self") {
            namespaces |= CloneFlags::CLONE_NEWUSER;
        }
        let (reader, writer) = UnixStream::pair().unwrap();
        // SAFETY: the child uses nothing that another thread may have locked but the allocator, which glibc makes usable.
        let child = match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => child,
            ForkResult::Child => {
                drop(reader);
                let _ = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
                let result =
                    setns(process.as_fd(), namespaces).map_err(Into::into).and_then(|()| listen(writer, group));
                eprintln!("a listener: {result:?}");
                // SAFETY: _exit(2) has no conditions.
                unsafe { libc::_exit(1) }
            }
        };
        drop(writer);
        let (sender, heard) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(reader).lines().map_while(Result::ok) {
                if sender.send(serde_json::from_str(&line).unwrap()).is_err() {
                    return;
                }
            }
        });
        let listener = Listener { child, heard };
        assert!(listener.next().is_some_and(|first| first.is_empty()), "it listens");
        listener
    }

    /// The next thing that it hears within two seconds.
    pub fn next(&self) -> Option<Heard> {
        match self.heard.recv_timeout(Duration::from_secs(2)) {
            Ok(heard) => Some(heard),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => panic!("the listener ended"),
        }
    }

    /// Action and `DEVNAME` of the next.
    pub fn event(&self) -> Option<(String, String)> {
        let mut heard = self.next()?;
        Some((heard.remove("ACTION")?, heard.remove("DEVNAME").unwrap_or_default()))
    }

    /// Stops its program, so that it reads no more.
    pub fn stop(&self) {
        nix::sys::signal::kill(self.child, nix::sys::signal::Signal::SIGSTOP).unwrap();
    }

    /// Whether nothing came until now, but for a while.
    pub fn is_silent(&self) -> bool {
        self.heard.recv_timeout(Duration::from_millis(300)).is_err()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = nix::sys::signal::kill(self.child, nix::sys::signal::Signal::SIGKILL);
        let _ = nix::sys::wait::waitpid(self.child, None);
    }
}

/// The child's life.
fn listen(mut writer: UnixStream, group: Group) -> std::io::Result<()> {
    let monitor = match group {
        Group::Udev(subsystems) => {
            subsystems.iter().try_fold(udev::MonitorBuilder::new()?, |monitor, name| monitor.match_subsystem(name))?
        }
        Group::Kernel => return listen_to_kernel(writer),
    };
    let socket = monitor.listen()?;
    writer.write_all(b"{}\n")?;
    loop {
        let mut polled = [rustix::event::PollFd::new(&socket, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut polled, None)?;
        for event in socket.iter() {
            let device = event.device();
            let properties = device.properties().map(|entry| {
                (entry.name().to_string_lossy().into_owned(), entry.value().to_string_lossy().into_owned())
            });
            writeln!(writer, "{}", serde_json::to_string(&properties.collect::<Heard>()).unwrap())?;
        }
    }
}

/// libudev takes nothing of the kernel's in a user namespace, where the host's root is nobody.
fn listen_to_kernel(mut writer: UnixStream) -> std::io::Result<()> {
    let mut events = Uevents::of_kernel()?;
    writer.write_all(b"{}\n")?;
    loop {
        rustix::event::poll(&mut [rustix::event::PollFd::new(&events, rustix::event::PollFlags::IN)], None)?;
        if let Received::Message(message) = events.receive()? {
            let text = String::from_utf8_lossy(message).into_owned();
            let pairs = text.split('\0').filter_map(|pair| pair.split_once('='));
            let heard: Heard = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
            writeln!(writer, "{}", serde_json::to_string(&heard).unwrap())?;
        }
    }
}
