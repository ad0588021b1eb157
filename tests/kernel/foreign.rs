//! What others send or mount to harm us: forged udev events, and a file system that never answers.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::time::{Duration, Instant};

use nix::mount::{MsFlags, mount};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, sendto, socket};
use qm_hotplug::core::category::Categories;
use qm_hotplug::sys::udev::UdevEvents;

use crate::stage::{Container, Nodes, bind};
use crate::support::{qm, wait_for};

pub const TESTS: &[(&str, fn())] = &[
    ("foreign::a_forged_udev_event_makes_no_device_another_one", forged_event),
    ("foreign::a_dev_that_never_answers_is_given_up", a_dev_that_never_answers),
];

/// udev's group of the uevent socket.
const UDEV_GROUP: u32 = 2;

/// A message as libudev sends it (libudev-monitor.c), about a real device but with somebody else's numbers.
fn forged(devpath: &str, node: &str, major: u32, minor: u32) -> Vec<u8> {
    let properties = [
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

fn forged_event() {
    // libudev listens to udev only where udevd has its socket; it takes messages of any uid 0 in the network namespace.
    let place = Nodes::new();
    File::create(place.path().join("control")).unwrap();
    std::fs::create_dir_all("/run/udev").unwrap();
    bind(place.path().to_str().unwrap(), "/run/udev".as_ref());
    let events = UdevEvents::listen().unwrap();
    let sender =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkKObjectUEvent)
            .unwrap();
    for (node, major, minor) in [("/dev/input/../kvm", 10, 232), ("/dev/input/event0", 1, 1), ("/dev/snd/x", 1, 3)] {
        let message = forged("/devices/virtual/mem/null", node, major, minor);
        sendto(sender.as_raw_fd(), &message, &NetlinkAddr::new(0, UDEV_GROUP), MsgFlags::empty()).unwrap();
        let mut received = Vec::new();
        wait_for("the forged event", || {
            received.extend(events.receive().0);
            !received.is_empty()
        });
        for (_, device) in received {
            let Some(device) = device else { continue };
            assert_eq!((device.node.as_str(), device.number.major, device.number.minor), ("/dev/null", 1, 3));
            assert!(!Categories::default().iter().any(|category| category.contains(&device)), "{device:?}");
        }
    }
    nix::mount::umount2("/run/udev", nix::mount::MntFlags::MNT_DETACH).unwrap();
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
