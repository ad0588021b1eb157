//! Containers of an ordinary user: the hook runs as that user, and grants what the user may open.

use serde_json::Value;

use crate::Case;
use crate::container::{open_script, why};
use crate::hook::{Packaged, journal};
use crate::install::Installed;
use crate::plug::{ASKS_FOR_STICKS, plug_stick};
use crate::vm::{SOON, Vm};

pub(crate) const CASES: &[Case] = &[
    ("rootless::a_user_gets_what_it_may_open", a_user_gets_what_it_may_open),
    ("rootless::the_unit_serves_a_user", the_unit_serves_a_user),
];

/// A member of dialout, with a runtime directory; gone on drop, with all that runs as this user.
struct User<'vm>(&'vm Vm);

impl<'vm> User<'vm> {
    /// What precedes a command of Podman. There is no systemd of the user, as PAM's module for it is not installed.
    const PODMAN: &'static str = "cd /home/lab && runuser -u lab -- env HOME=/home/lab XDG_RUNTIME_DIR=/run/user/1000 \
         podman --log-level=error --cgroup-manager=cgroupfs";

    #[track_caller]
    fn add(vm: &'vm Vm) -> Self {
        let user = Self(vm);
        // As systemd does at a login.
        vm.ok("useradd --create-home --uid 1000 --groups dialout lab && mkdir -m 700 /run/user/1000 && sleep 0.2 && \
               mount -t tmpfs -o nosuid,nodev,mode=0700,uid=1000,gid=1000,size=64m tmpfs /run/user/1000");
        user
    }

    /// Starts a container, with further arguments.
    #[track_caller]
    fn run(&self, runtime: &str, name: &str, arguments: &str) {
        self.0.ok(&format!(
            "lab-rootfs /home/lab/{name} && chown -R lab:lab /home/lab/{name} && \
             {} --runtime {runtime} run -d --name {name} --network=none {arguments} --rootfs /home/lab/{name} \
             sleep 100000",
            Self::PODMAN,
        ));
    }

    /// A script line that runs a command in a container.
    fn inside(name: &str, command: &str) -> String {
        format!("({} exec {name} {command})", Self::PODMAN)
    }

    #[track_caller]
    fn open_all(&self, name: &str, paths: &[&str]) -> Vec<String> {
        self.0.ok(&Self::inside(name, &open_script("<>", paths))).lines().map(why).collect()
    }
}

impl Drop for User<'_> {
    fn drop(&mut self) {
        let podman = Self::PODMAN;
        self.0.sh(&format!(
            "({podman} rm --force --all --time 0); runuser -u lab -- sh -c 'kill -KILL -1'; \
             umount --recursive /run/user/1000; rm -rf --one-file-system /run/user/1000"
        ));
        // It may take the kernel a moment to end what was killed.
        self.0.wait_ok(
            "the user to be gone",
            crate::vm::SOON,
            "userdel --remove lab 2>/dev/null; ! id lab 2>/dev/null",
        );
    }
}

fn a_user_gets_what_it_may_open(vm: &Vm) {
    let _installed = Packaged::install(vm);
    let _sticks = [("LAB1", "/dev/ttyUSB0"), ("LAB2", "/dev/ttyUSB1"), ("LAB3", "/dev/ttyUSB2")]
        .map(|(name, path)| plug_stick(vm, name, path));
    let user = User::add(vm);
    // The first is for the user's group, the second for root alone, the third is the user's own.
    vm.ok("udevadm settle; chown root:root /dev/ttyUSB1; chown lab /dev/ttyUSB2");

    let asks = format!("{ASKS_FOR_STICKS} --annotation org.containers.qm.device.fuse=true");
    user.run("crun", "own-crun", &format!("{asks} --group-add keep-groups"));
    // Without the groups of the user, which runc cannot keep.
    vm.ok("chown root:root /dev/ttyUSB0");
    user.run("runc", "own-runc", &format!("--annotation org.containers.qm.device.audio=true {asks}"));

    vm.ok("chown root:dialout /dev/ttyUSB0");
    for (name, withheld) in [("own-crun", &["/dev/ttyUSB1"][..]), ("own-runc", &["/dev/ttyUSB0", "/dev/ttyUSB1"])] {
        let paths = ["/dev/fuse", "/dev/ttyUSB0", "/dev/ttyUSB1", "/dev/ttyUSB2", "/dev/snd/seq"];
        let is_withheld = |path: &str| withheld.contains(&path) || path == "/dev/snd/seq";
        let expected = paths.map(|path| if is_withheld(path) { "nothing is there" } else { "opens" });
        assert_eq!(user.open_all(name, &paths), expected, "{name}: {paths:?}");

        let entries = of_user(vm, name);
        for path in withheld {
            let told =
                entries.iter().find(|entry| entry["F_DEVICE"] == *path).unwrap_or_else(|| panic!("{entries:#?}"));
            assert_eq!(told["MESSAGE"], format!("{path} not granted: this user may not open it"));
        }
        let sticks = entries.iter().find(|entry| entry["F_CATEGORY"] == "ttyUSB").expect("it is told");
        assert_eq!(sticks["F_COUNT"], (3 - withheld.len()).to_string(), "{name}");
    }
}

/// By the unit as it is installed, in its sandbox: what is plugged in while the container runs.
fn the_unit_serves_a_user(vm: &Vm) {
    let _installed = Installed::new(vm);
    let user = User::add(vm);
    vm.ok("mkdir -p /etc/qm-hotplug/config.d; echo \"users = [$(id -u lab)]\" >/etc/qm-hotplug/config.d/users.toml");
    vm.ok("systemctl start qm-hotplug");
    for runtime in ["crun", "runc"] {
        user.run(runtime, &format!("own-{runtime}"), ASKS_FOR_STICKS);
    }
    let has = |count: usize| {
        vm.wait_ok(
            &format!("{count} grants"),
            SOON * 2,
            &format!("test $(qm-hotplug list --json | grep -o '\"right\":\"node\"' | wc -l) = {count}"),
        );
    };
    for _ in 0..2 {
        let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
        has(2);
        for name in ["own-crun", "own-runc"] {
            assert_eq!(user.open_all(name, &["/dev/ttyUSB0"]), ["opens"], "{name}");
            vm.ok(&format!("qm-hotplug verify lab@{name}"));
        }
        stick.unplug();
        has(0);
        for name in ["own-crun", "own-runc"] {
            assert_eq!(user.open_all(name, &["/dev/ttyUSB0"]), ["nothing is there"], "{name}");
        }
    }
    vm.ok("gpasswd --delete lab dialout");
    let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
    let told =
        "journalctl --sync; journalctl -u qm-hotplug -o cat --since -1min | grep -c 'add lab to the group dialout'";
    vm.wait_ok("the reason to be told", SOON, &format!("test $({told}) = 2"));
    has(0);
    stick.unplug();
}

/// The hook's entries in the journal about a container of the user.
#[track_caller]
fn of_user(vm: &Vm, container: &str) -> Vec<Value> {
    let all = journal(vm, container);
    assert!(!all.is_empty(), "nothing tells of {container} by its name");
    assert!(all.iter().all(|entry| entry["_UID"] == "1000"), "{all:#?}");
    all
}
