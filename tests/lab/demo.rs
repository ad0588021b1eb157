//! The demonstration for a person, on a machine with systemd and with a virtual keyboard that its container asks for.

use std::time::Duration;

use crate::Case;
use crate::vm::Vm;

pub(crate) const CASES: &[Case] = &[("demo::keyboard", keyboard)];

fn keyboard(vm: &Vm) {
    let said = vm.sh_within(
        Duration::from_secs(180),
        "bash /mnt/repo/scripts/demo.sh --binary /usr/local/bin/qm-hotplug --device keyboard 2>&1",
    );
    assert!(said.success(), "{}", said.stdout);
    assert!(said.stdout.contains("nothing is left behind"), "{}", said.stdout);
    assert_eq!(vm.sh("bpftool cgroup tree /sys/fs/cgroup | grep qmhp").stdout, "", "programs of ours");
    eprintln!("{}", said.stdout.trim_end());
}
