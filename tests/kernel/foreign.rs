//! What others send or mount to harm us: forged udev events, and a file system that never answers.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, sendto};
use qm_hotplug::core::category::Categories;
use qm_hotplug::core::device::Device;
use qm_hotplug::core::mirror::Told;
use qm_hotplug::core::uevent::parse;
use qm_hotplug::sys::udev;
use qm_hotplug::sys::uevent::{Received, Uevents};

use crate::stage::{Container, Nodes};
use crate::support::{Agent, qm, wait_for};

pub const TESTS: &[(&str, fn())] = &[
    ("foreign::a_forged_udev_event_makes_no_device_another_one", forged_event),
    ("foreign::a_message_before_udevd_has_spoken_is_none", message_before_its_time),
    ("foreign::an_event_of_any_length_is_read", long_event),
    ("foreign::what_nobody_reads_is_told_as_lost", unread_events),
    ("foreign::what_the_kernel_did_not_send_is_no_event", forged_by_others),
    ("foreign::a_mount_of_any_name_stops_nobody", a_mount_of_any_name),
    ("foreign::a_dev_that_never_answers_is_given_up", a_dev_that_never_answers),
    ("foreign::a_dev_that_answers_slowly_gets_a_share_of_the_time", a_dev_that_answers_slowly),
];

/// udev's group of the uevent socket.
const UDEV_GROUP: u32 = 2;

/// A message as libudev sends it (libudev-monitor.c), about a real device but with somebody else's numbers, and a
/// property that makes it long.
fn forged(devpath: &str, node: &str, major: u32, minor: u32, filling: usize) -> Vec<u8> {
    let properties = [
        format!("ID_LONG={}", "x".repeat(filling)),
        "ACTION=add".to_owned(),
        format!("DEVPATH={devpath}"),
        "SUBSYSTEM=input".into(),
        "SEQNUM=1".into(),
        format!("DEVNAME={node}"),
        format!("MAJOR={major}"),
        format!("MINOR={minor}"),
        "USEC_INITIALIZED=1".into(),
    ];
    let payload: Vec<u8> = properties.iter().flat_map(|property| [property.as_bytes(), b"\0"].concat()).collect();
    let mut message = b"libudev\0".to_vec();
    message.extend(0xfeed_cafe_u32.to_be_bytes());
    for field in [40, 40, payload.len() as u32, 0, 0, 0, 0] {
        message.extend(field.to_ne_bytes());
    }
    message.extend(payload);
    message
}

fn by_message(message: &[u8]) -> Option<(Device, Told)> {
    udev::by_message(message).pop()
}

fn forged_event() {
    let mut events = Uevents::of_udev().unwrap();
    let sender = socket();
    for (node, major, minor) in [("/dev/input/../kvm", 10, 232), ("/dev/input/event0", 1, 1), ("/dev/snd/x", 1, 3)] {
        send(&sender, UDEV_GROUP, &forged("/devices/virtual/mem/null", node, major, minor, 0));
        let (device, _) = next(&mut events, by_message).expect("there is a device at that place");
        assert_eq!((device.node.as_str(), device.number.major, device.number.minor), ("/dev/null", 1, 3));
        assert!(!Categories::default().iter().any(|category| category.contains(&device)), "{device:?}");
    }
}

/// Where udevd runs, a device counts once udevd has spoken of it, whoever else speaks of it.
fn message_before_its_time() {
    let place = Nodes::new();
    File::create(place.path().join("control")).unwrap();
    std::fs::create_dir_all("/run/udev").unwrap();
    crate::stage::bind(place.path().to_str().unwrap(), "/run/udev".as_ref());
    let message = forged("/devices/virtual/mem/null", "/dev/null", 1, 3, 0);
    assert_eq!(by_message(&message), None);
    std::fs::create_dir(place.path().join("data")).unwrap();
    std::fs::write(place.path().join("data/c1:3"), "I:1\n").unwrap();
    assert_eq!(by_message(&message).expect("udevd has spoken").0.node, "/dev/null");
    nix::mount::umount2("/run/udev", nix::mount::MntFlags::MNT_DETACH).unwrap();
}

/// libudev's own reader takes no more than 8 KiB.
fn long_event() {
    let mut events = Uevents::of_udev().unwrap();
    let sender = socket();
    for length in [5_000, 9_000, 100_000, 200_000] {
        send(&sender, UDEV_GROUP, &forged("/devices/virtual/mem/null", "/dev/null", 1, 3, length));
        assert_eq!(next(&mut events, by_message).expect("the device").0.node, "/dev/null");
    }
    // A longer one cannot be sent.
    let message = forged("/devices/virtual/mem/null", "/dev/null", 1, 3, 300_000);
    let refused = sendto(sender.as_raw_fd(), &message, &NetlinkAddr::new(0, UDEV_GROUP), MsgFlags::empty());
    assert_eq!(refused, Err(nix::errno::Errno::EMSGSIZE));
}

fn unread_events() {
    let mut events = Uevents::of_kernel().unwrap();
    for _ in 0..300_000 {
        std::fs::write("/sys/class/mem/null/uevent", "change").unwrap();
    }
    let (mut read, mut lost) = (0, 0);
    loop {
        match events.receive().unwrap() {
            Received::Message(_) => read += 1,
            Received::Lost => lost += 1,
            Received::Nothing => {}
            Received::Empty => break,
        }
    }
    assert!(read > 10_000 && lost > 0, "{read} read, {lost} times lost");
    std::fs::write("/sys/class/mem/null/uevent", "change").unwrap();
    assert_eq!(next(&mut events, parse).expect("it goes on").node, "/dev/null");
}

fn forged_by_others() {
    let mut events = Uevents::of_kernel().unwrap();
    let message = b"remove@/devices/virtual/mem/null\0ACTION=remove\0DEVPATH=/devices/virtual/mem/null\0\
        SUBSYSTEM=mem\0MAJOR=1\0MINOR=3\0DEVNAME=null\0SEQNUM=1\0";
    // The group needs CAP_NET_ADMIN, which root of a container on the host's network may have.
    send(&socket(), 1, message);
    wait_for("the forged message", || events.receive().unwrap() == Received::Nothing);
    let refused = std::thread::spawn(|| {
        // Of this thread alone, unlike setresuid(3).
        let nobody = rustix::thread::Uid::from_raw(65534);
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
        sendto(socket().as_raw_fd(), b"x@/y\0", &NetlinkAddr::new(0, 1), MsgFlags::empty())
    });
    assert_eq!(refused.join().unwrap(), Err(nix::errno::Errno::EPERM));
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(events.receive().unwrap(), Received::Empty);
}

fn a_mount_of_any_name() {
    let place = Nodes::new();
    let path = place.path().join(std::ffi::OsStr::from_bytes(b"\xff - cgroup2 x"));
    std::fs::create_dir(&path).unwrap();
    mount(Some("none"), &path, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
    assert!(String::from_utf8(std::fs::read("/proc/self/mountinfo").unwrap()).is_err());
    qm(&["status"]).ok();
    nix::mount::umount(&path).unwrap();
}

fn socket() -> OwnedFd {
    nix::sys::socket::socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkKObjectUEvent,
    )
    .unwrap()
}

fn send(socket: &OwnedFd, group: u32, message: &[u8]) {
    sendto(socket.as_raw_fd(), message, &NetlinkAddr::new(0, group), MsgFlags::empty()).unwrap();
}

/// What the next message says.
fn next<T>(events: &mut Uevents, read: impl Fn(&[u8]) -> Option<T>) -> Option<T> {
    let mut found = None;
    wait_for("a message", || match events.receive().unwrap() {
        Received::Message(message) => {
            found = Some(read(message));
            true
        }
        other => {
            assert!(matches!(other, Received::Empty | Received::Nothing), "{other:?}");
            false
        }
    });
    found.flatten()
}

/// Answers each request on a FUSE device after a second, and all but the first (linux/fuse.h: FUSE_INIT) with EIO.
fn answer_slowly(mut fuse: &File) {
    let mut request = vec![0; 1 << 17];
    while let Ok(length) = fuse.read(&mut request)
        && length >= 16
    {
        let is_first = request[4..8] == 26u32.to_ne_bytes();
        let body = if is_first { [7u32, 31, 0, 0, 0, 1 << 16].map(u32::to_ne_bytes).concat() } else { Vec::new() };
        let body = if is_first { [body, vec![0; 40]].concat() } else { body };
        let error = if is_first { 0 } else { -libc::EIO };
        let head = [(16 + body.len() as u32).to_ne_bytes(), error.to_ne_bytes()].concat();
        std::thread::sleep(Duration::from_secs(1));
        let _ = fuse.write(&[&head, &request[8..16], &body[..]].concat());
    }
}

fn a_dev_that_answers_slowly() {
    let fuse = File::options().read(true).write(true).open("/dev/fuse").unwrap();
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", fuse.as_fd().as_raw_fd());
    let container = Container::prepared(|root| {
        mount(Some("slow"), &root.join("dev"), Some("fuse"), MsFlags::empty(), Some(options.as_str())).unwrap();
    });
    let other = Container::new();
    std::thread::spawn(move || answer_slowly(&fuse));
    let (_agent, started) = (Agent::start(), Instant::now());
    let attach = |container: &Container| qm(&["attach", &container.name(), "/dev/null", "/dev/x"]);
    for _ in 0..20 {
        assert_ne!(attach(&container).code, 0);
    }
    assert!(started.elapsed() < Duration::from_secs(18), "the agent was held up for {:?}", started.elapsed());
    attach(&container).fails(6, "answers too slowly, and others wait meanwhile");
    let started = Instant::now();
    attach(&other).ok();
    assert!(started.elapsed() < Duration::from_secs(4), "{:?}", started.elapsed());
    assert_eq!(crate::support::grants().len(), 1);
    qm(&["detach", &other.name(), "/dev/x"]).ok();
}

fn a_dev_that_never_answers() {
    // FUSE, whose other end is held open and never read.
    let fuse = File::options().read(true).write(true).open("/dev/fuse").unwrap();
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", fuse.as_fd().as_raw_fd());
    let container = Container::prepared(|root| {
        let flags = MsFlags::empty();
        mount(Some("mute"), &root.join("dev"), Some("fuse"), flags, Some(options.as_str())).unwrap();
    });
    let other = Container::new();
    let started = Instant::now();
    qm(&["attach", &container.name(), "/dev/null", "/dev/x"]).fails(6, "has not answered for 3 seconds");
    assert!(started.elapsed() < Duration::from_secs(8), "it took {:?}", started.elapsed());
    // Others are served, and nothing is left of the failed one.
    qm(&["attach", &other.name(), "/dev/zero", "/dev/x"]).ok();
    assert_eq!(crate::support::grants().len(), 1);
    qm(&["detach", &other.name(), "/dev/x"]).ok();
    // Ends the file system, and with it whoever waits for it.
    drop(fuse);
}
