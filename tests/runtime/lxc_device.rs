//! The program under the name of LXC's command, `lxc-device`.

use std::process::{Command, Stdio};

use crate::Case;
use crate::plug::{block, one_of_each};
use crate::state::{observe, refused};
use crate::support::podman::Container;
use crate::support::{Agent, BINARY, Said, grants};

pub(crate) const CASES: &[Case] = &[
    ("lxc_device::adds_a_device_and_deletes_it", adds_a_device_and_deletes_it),
    ("lxc_device::what_fails_has_exit_code_1", what_fails_has_exit_code_1),
];

/// Calls the program by a link of that name.
fn lxc_device(args: &[&str]) -> Said {
    let place = tempfile::tempdir().unwrap();
    let link = place.path().join("lxc-device");
    std::os::unix::fs::symlink(BINARY, &link).unwrap();
    Command::new(link).args(args).stdin(Stdio::null()).output().unwrap().into()
}

/// Asserts success without a word.
#[track_caller]
fn silent(said: Said) {
    assert_eq!((said.code, &*said.stdout, &*said.stderr), (0, "", ""));
}

fn adds_a_device_and_deletes_it(runtime: &str) {
    let c = Container::start(runtime, "qmh-lxc", &[]);
    let before = observe(&[c.pid()]);
    let round = || {
        for device in one_of_each(56) {
            let path = &device.path;
            silent(lxc_device(&["-n", &c.name, "add", path]));
            assert!(c.opens("<>", path));
            assert_eq!(c.node(path), Some(device.describe()));
            silent(lxc_device(&["-n", &c.name, "del", path]));
            assert_eq!(c.node(path), None);
        }
        let device = block(57);
        silent(lxc_device(&[&format!("--name={}", c.name), "add", &device.path, "/dev/one"]));
        silent(lxc_device(&["--name", &c.id[..12], "--", "add", &device.path, "/dev/two"]));
        assert!(c.opens("<>", "/dev/one") && c.opens("<>", "/dev/two"));
        silent(lxc_device(&["-n", &c.name, "del", &device.path, "/dev/one"]));
        assert_eq!((c.node("/dev/one"), c.opens("<>", "/dev/two")), (None, true));
        // As LXC's own has it: the container first.
        silent(lxc_device(&[&c.name, "del", "/dev/two"]));
        assert_eq!((c.node("/dev/two"), grants().len()), (None, 0));
    };
    round();
    assert_eq!(observe(&[c.pid()]), before, "everything is as it was");
    let agent = Agent::start();
    round();
    agent.stop();
}

fn what_fails_has_exit_code_1(runtime: &str) {
    let c = Container::start(runtime, "qmh-lxc-bad", &[]);
    let (device, inits) = (block(58), [c.pid()]);
    let path = &device.path;
    for (args, text) in [
        (&["-n", "qmh-none", "add", path][..], "no running container 'qmh-none'"),
        (&["-n", &c.name, "add", "/dev/qmh-none"], "no device '/dev/qmh-none' on this host"),
        (&["-n", &c.name, "add", "/etc/passwd"], "/etc/passwd"),
        (&["-n", &c.name, "add", "lo"], "network interfaces are not supported"),
        (&["-n", &c.name, "add", "lo", "eth0"], "network interfaces are not supported"),
        (&["-n", &c.name, "del", "eth0"], "network interfaces are not supported"),
        (&["-n", &c.name, "add", path, "video0"], "destination 'video0' is relative"),
        (&["-n", &c.name, "del", path], "has no grant for"),
        (&["-n", &c.name, "list"], "add DEV or del DEV"),
        (&["-n", &c.name, "add"], "add DEV or del DEV"),
        (&[], "add DEV or del DEV"),
    ] {
        let line = refused(&inits, || lxc_device(args), 1, text);
        assert!(line.starts_with("lxc-device: "), "{line}");
    }
    let said = lxc_device(&["--rcfile=x", "-n", &c.name, "add", path]);
    assert!(said.code == 1 && said.stderr.contains("--rcfile"), "{said:?}");
    let help = lxc_device(&["-h"]).ok();
    assert!(help.contains("lxc-device -n NAME add|del DEV [DEST]") && help.contains("network interfaces"), "{help}");
    assert_eq!(lxc_device(&["--version"]).ok(), concat!("lxc-device ", env!("CARGO_PKG_VERSION"), " (qm-hotplug)\n"));
}
