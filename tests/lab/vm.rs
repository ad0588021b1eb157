//! The emulated machine of the lab: boot it, run commands in it, plug devices into it.
//!
//! ```ignore
//! let vm = Vm::boot(&Image::from_environment().unwrap());
//! let stick = vm.plug("stick", "usb-serial", json!({ "always-plugged": true, "serial": "A1" }));
//! vm.wait_ok("the stick's node", SOON, "test -c /dev/ttyUSB0");
//! assert_eq!(vm.ok("stat -c %t:%T /dev/ttyUSB0"), "bc:0");
//! drop(stick); // unplugs
//! vm.wait_ok("the node to go", SOON, "! test -e /dev/ttyUSB0");
//! ```
//!
//! What to know when writing cases:
//! - Commands are bash scripts, run one at a time as root by an agent that is a systemd service; one costs about
//!   50 ms. Their standard input is empty. To leave something running, start it with `&` and its output in a file,
//!   or better with `systemd-run --unit=NAME`, and wait for its effect.
//! - The machine is emulated: everything takes 10 to 50 times as long as on hardware, and its clock goes with its
//!   instructions, so that its own time limits hold however busy the host is. Never sleep for a fixed time; wait for a fact,
//!   with [`SOON`] as the deadline for anything that udev, systemd or Podman has to do.
//! - In the guest, `/usr/local/bin/qm-hotplug` is a copy of the build under test (as it was at boot),
//!   `/mnt/bin` its directory and `/mnt/repo` this repository, both read-only.
//! - There is no network but the loopback. Containers have `--network=none` or `host` and a root file system made by
//!   `lab-rootfs DIR`; [`crate::container::Container`] does both.
//! - What is written in the guest is thrown away with it.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::channel::{Channel, Output};
use crate::qmp::Qmp;

/// How long one command may take unless [`Vm::sh_within`] says otherwise: Podman starts a container in 3 to 10 s here,
/// and in a minute when the host has much else to do.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(180);
/// Until the agent in the guest answers; 25 s are usual on two free cores.
const BOOT_TIMEOUT: Duration = Duration::from_secs(240);
/// Between two looks at a fact that is awaited.
const POLL: Duration = Duration::from_millis(50);
/// A deadline that fits most waits: for what takes a second on hardware, when the host has much else to do.
pub(crate) const SOON: Duration = Duration::from_secs(40);

/// What to boot, as `scripts/lab.sh` names it in the environment.
#[derive(Debug)]
pub(crate) struct Image {
    /// The Debian release in the image: `bookworm` or `trixie`.
    pub(crate) release: String,
    /// The directory with `root.ext4`, `vmlinuz` and `initrd`.
    directory: PathBuf,
    /// The directory with the built `qm-hotplug`.
    binaries: PathBuf,
}

impl Image {
    /// Reads `QMH_LAB_IMAGE`, `QMH_LAB_RELEASE` and `QMH_BIN`; `None` when one is not set.
    pub(crate) fn from_environment() -> Option<Self> {
        let binary = PathBuf::from(std::env::var_os("QMH_BIN")?);
        Some(Self {
            release: std::env::var("QMH_LAB_RELEASE").ok()?,
            directory: std::env::var_os("QMH_LAB_IMAGE")?.into(),
            binaries: binary.parent()?.to_owned(),
        })
    }
}

/// A running machine. It ends when this is dropped, and also when the test process dies.
#[derive(Debug)]
pub(crate) struct Vm {
    release: String,
    boot_time: Duration,
    console: PathBuf,
    channel: Mutex<Channel>,
    qmp: Mutex<Qmp>,
    process: Qemu,
    _sockets: TempDir,
}

impl Vm {
    /// Boots the image and waits until systemd has started everything.
    ///
    /// # Panics
    /// With the end of the console log when the machine does not come up.
    pub(crate) fn boot(image: &Image) -> Self {
        Self::boot_with(image, &image.release, "")
    }

    /// Boots another machine of that name beside it, with further arguments for its kernel.
    pub(crate) fn boot_with(image: &Image, name: &str, arguments: &str) -> Self {
        let started = Instant::now();
        let sockets = TempDir::new().expect("a directory for qemu's sockets");
        let console = console_log(name);
        let mut process = Qemu::spawn(image, sockets.path(), &console, arguments);

        let connected = process.connect(&sockets.path().join("agent")).and_then(|agent| {
            let qmp = Qmp::open(process.connect(&sockets.path().join("qmp"))?)?;
            Ok((Channel::open(agent, BOOT_TIMEOUT)?, qmp))
        });
        let (channel, qmp) = connected.unwrap_or_else(|error| {
            panic!("the machine did not come up: {error}\n{}", console_tail(&console));
        });
        let mut vm = Self {
            release: image.release.clone(),
            boot_time: Duration::ZERO,
            console,
            channel: Mutex::new(channel),
            qmp: Mutex::new(qmp),
            process,
            _sockets: sockets,
        };
        // Not `ok`: "degraded" is for a case to judge, which can name the units.
        vm.sh_within(BOOT_TIMEOUT, "systemctl is-system-running --wait");
        vm.boot_time = started.elapsed();
        vm
    }

    /// The Debian release that runs: `bookworm` or `trixie`.
    pub(crate) fn release(&self) -> &str {
        &self.release
    }

    /// From the start of qemu until systemd had started everything.
    pub(crate) fn boot_time(&self) -> Duration {
        self.boot_time
    }

    /// The file with all that the machine wrote to its serial console; it is kept.
    pub(crate) fn console(&self) -> &Path {
        &self.console
    }

    /// Runs a bash script as root in the guest, for at most three minutes.
    pub(crate) fn sh(&self, script: &str) -> Output {
        self.sh_within(COMMAND_TIMEOUT, script)
    }

    /// Like [`Vm::sh`] with a time limit of its own; the script and what it started are killed when it is over.
    pub(crate) fn sh_within(&self, timeout: Duration, script: &str) -> Output {
        lock(&self.channel).run(script, timeout).unwrap_or_else(|error| {
            panic!(
                "no answer to {script:?}: {error}; qemu's pid: {}\n{}",
                self.process.0.id(),
                console_tail(&self.console)
            );
        })
    }

    /// Runs a script that has to succeed, and gives its standard output without the trailing white space.
    ///
    /// # Panics
    /// With the script and its output when the status is not 0.
    #[track_caller]
    pub(crate) fn ok(&self, script: &str) -> String {
        let output = self.sh(script);
        assert!(
            output.success(),
            "in the guest, {script:?} failed with status {}\n--- stdout\n{}\n--- stderr\n{}",
            output.status,
            output.stdout,
            output.stderr,
        );
        output.stdout.trim_end().to_owned()
    }

    /// Looks again and again until `look` gives a value.
    ///
    /// # Panics
    /// When that has not happened in time, naming `what` was awaited.
    #[track_caller]
    pub(crate) fn wait<T>(&self, what: &str, timeout: Duration, mut look: impl FnMut(&Self) -> Option<T>) -> T {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(value) = look(self) {
                return value;
            }
            assert!(Instant::now() < deadline, "waited {timeout:?} in vain for {what}");
            sleep(POLL);
        }
    }

    /// Waits until a script succeeds, and gives its standard output. The script should be quick and change nothing.
    ///
    /// # Panics
    /// With the last output when it has not succeeded in time.
    #[track_caller]
    pub(crate) fn wait_ok(&self, what: &str, timeout: Duration, script: &str) -> String {
        let deadline = Instant::now() + timeout;
        loop {
            let output = self.sh(script);
            if output.success() {
                return output.stdout.trim_end().to_owned();
            }
            assert!(
                Instant::now() < deadline,
                "waited {timeout:?} in vain for {what}: {script:?} gave {}\n{}{}",
                output.status,
                output.stdout,
                output.stderr,
            );
            sleep(POLL);
        }
    }

    /// Runs a QMP command.
    ///
    /// # Panics
    /// With qemu's description when it refuses.
    #[track_caller]
    pub(crate) fn qmp(&self, command: &str, arguments: Value) -> Value {
        lock(&self.qmp).execute(command, arguments).unwrap_or_else(|error| panic!("qmp: {error}"))
    }

    /// Cuts the machine's power and starts it again: what had not reached its disk is lost, and what is plugged in stays so.
    ///
    /// # Panics
    /// With the end of the console log when the machine does not come up.
    #[track_caller]
    pub(crate) fn cut_power(&self) {
        self.qmp("system_reset", json!({}));
        lock(&self.channel).wait_for_hello(BOOT_TIMEOUT).unwrap_or_else(|error| {
            panic!("the machine did not come up again: {error}\n{}", console_tail(&self.console));
        });
        self.sh_within(BOOT_TIMEOUT, "systemctl is-system-running --wait");
    }

    /// Plugs a device in: a qemu driver such as `usb-serial`, `usb-audio`, `usb-kbd`, with its properties.
    ///
    /// A serial device without a `chardev` gets one that swallows everything; to see the data, add a `ringbuf` chardev
    /// with [`Vm::qmp`] and name it. A `usb-serial` also needs `"always-plugged": true`, which is set here, and `"serial"`
    /// so that two of them have different links in `/dev/serial/by-id`. With `"port": "5"` the kernel names a USB device
    /// `1-5`; one at port `6.2` needs a `usb-hub` at port 6, which has to be dropped after it.
    /// Returns at once: the guest sees the device a moment later.
    #[track_caller]
    pub(crate) fn plug(&self, id: &str, driver: &str, properties: Value) -> Plugged<'_> {
        let mut arguments = properties;
        let mut chardev = None;
        if driver == "usb-serial" {
            arguments["always-plugged"] = true.into();
        }
        let backend = match driver {
            "usb-serial" | "pci-serial" => Some(json!({ "type": "null", "data": {} })),
            // This one is plugged in when something listens.
            "usb-braille" => Some(json!({ "type": "ringbuf", "data": { "size": 1024 } })),
            _ => None,
        };
        if let (Some(backend), None) = (backend, arguments.get("chardev")) {
            let name = format!("{id}-chardev");
            self.qmp("chardev-add", json!({ "id": name, "backend": backend }));
            arguments["chardev"] = name.as_str().into();
            chardev = Some(name);
        }
        arguments["driver"] = driver.into();
        arguments["id"] = id.into();
        // Made first, so that a refused device does not leave its chardev behind.
        let mut plugged = Plugged { vm: self, id: id.to_owned(), chardev, present: false };
        self.qmp("device_add", arguments);
        plugged.present = true;
        plugged
    }
}

/// A device that is plugged in; [`Plugged::unplug`] or dropping it takes it out again.
#[derive(Debug)]
pub(crate) struct Plugged<'vm> {
    vm: &'vm Vm,
    id: String,
    chardev: Option<String>,
    present: bool,
}

impl Plugged<'_> {
    /// Pulls the device out. When this returns, qemu has let go of it; the guest may still be cleaning up.
    pub(crate) fn unplug(self) {}
}

impl Drop for Plugged<'_> {
    fn drop(&mut self) {
        let mut qmp = lock(&self.vm.qmp);
        let mut removed = Ok(());
        if self.present {
            removed = qmp.execute("device_del", json!({ "id": self.id })).and_then(|_| qmp.wait_deleted(&self.id));
        }
        if let (Ok(()), Some(chardev)) = (&removed, &self.chardev) {
            removed = qmp.execute("chardev-remove", json!({ "id": chardev })).map(drop);
        }
        // Later cases need the port and the id; but a panic during a panic would end the whole run.
        if let Err(error) = removed {
            let message = format!("could not unplug {}: {error}", self.id);
            if std::thread::panicking() { eprintln!("{message}") } else { panic!("{message}") }
        }
    }
}

/// The emulator's process, killed on drop.
#[derive(Debug)]
struct Qemu(Child);

impl Qemu {
    fn spawn(image: &Image, sockets: &Path, console: &Path, arguments: &str) -> Self {
        let socket = |name: &str| format!("unix:{},server=on,wait=off", sockets.join(name).display());
        // setpriv: the kernel ends qemu when this process dies without having had a chance to (SIGKILL, abort).
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "bash"])
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/lab/qemu.sh"))
            .args([&image.directory, &image.binaries])
            .arg(format!("quiet qmh.lab=tests systemd.mask=serial-getty@ttyS0.service {arguments}"))
            .args(["-device", "virtio-serial-pci", "-device", "virtserialport,chardev=agent,name=qmh.lab"])
            .args(["-chardev", &format!("socket,id=agent,path={},server=on,wait=off", sockets.join("agent").display())])
            .args(["-qmp", &socket("qmp"), "-serial", &format!("file:{}", console.display())])
            .stdin(Stdio::null())
            .spawn()
            .expect("setpriv and bash are installed");
        Self(child)
    }

    /// Connects to a socket that qemu makes shortly after its start.
    fn connect(&mut self, path: &Path) -> io::Result<UnixStream> {
        let deadline = Instant::now() + SOON;
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => return Ok(stream),
                Err(error) if Instant::now() >= deadline => return Err(error),
                Err(_) => {}
            }
            if let Some(status) = self.0.try_wait()? {
                return Err(io::Error::other(format!("qemu ended: {status}")));
            }
            sleep(POLL);
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only when the process is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A case that panicked while it held a lock says nothing about the connection behind it.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One file a machine, below the target directory; the next run overwrites it.
fn console_log(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("lab-{name}-console.log"))
}

fn console_tail(console: &Path) -> String {
    let log = std::fs::read(console).unwrap_or_default();
    let text = String::from_utf8_lossy(&log);
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines[lines.len().saturating_sub(30)..].join("\n");
    format!("--- the end of {}\n{tail}", console.display())
}
