//! Containers with a user namespace that root started, served by the unit as it is installed.

use crate::Case;
use crate::agent::{grants_of, status};
use crate::container::{Container, node};
use crate::install::Installed;
use crate::plug::{ASKS_FOR_STICKS, plug_stick};
use crate::vm::{SOON, Vm};

pub(crate) const CASES: &[Case] = &[("mapped::sticks_reach_containers_with_a_user_namespace", sticks_reach_them)];

/// How one is started, with `{n}` for its name and `{root}` for its root directory, which is its own root's.
const LXC: &str = "mkdir -p /var/lib/lxc/{n} && printf '%s\\n' \
    'lxc.include = /usr/share/lxc/config/common.conf' 'lxc.include = /usr/share/lxc/config/userns.conf' \
    'lxc.idmap = u 0 100000 65536' 'lxc.idmap = g 0 100000 65536' 'lxc.uts.name = {n}' 'lxc.net.0.type = empty' \
    'lxc.rootfs.path = dir:{root}' 'lxc.init.cmd = /bin/sleep 100000' 'lxc.apparmor.profile = unconfined' \
    >/var/lib/lxc/{n}/config && lxc-start -n {n}";
const PODMAN: &str = "podman --runtime {runtime} run -d --name {n} --network=none --uidmap 0:100000:65536 \
    --gidmap 0:100000:65536 {asks} --rootfs {root} sleep 100000 >/dev/null";

/// The configuration for LXC, which has no annotations, and the ids that root may give away; on drop all is as before.
struct Prepared<'vm>(&'vm Vm);

impl<'vm> Prepared<'vm> {
    #[track_caller]
    fn new(vm: &'vm Vm) -> Self {
        let prepared = Self(vm);
        vm.ok("cp /etc/subuid /run/subuid; cp /etc/subgid /run/subgid; \
               echo root:100000:65536 | tee -a /etc/subuid >>/etc/subgid; mkdir -p /etc/qm-hotplug/config.d && \
               printf \"[[container]]\\nmatch = 'lxc:mapped-*'\\ndevices = ['ttyUSB']\\n\" \
               >/etc/qm-hotplug/config.d/50-lab.toml");
        prepared
    }
}

impl Drop for Prepared<'_> {
    fn drop(&mut self) {
        self.0.sh("rm -rf /etc/qm-hotplug; mv /run/subuid /etc/subuid; mv /run/subgid /etc/subgid");
    }
}

#[track_caller]
fn start<'vm>(vm: &'vm Vm, name: &str, script: &str, pid: &str, remove: &str) -> Container<'vm> {
    let root = format!("/var/tmp/{name}");
    let fill = |text: &str| text.replace("{n}", name).replace("{root}", &root).replace("{asks}", ASKS_FOR_STICKS);
    let mut container = Container::of_other_engine(vm, name, format!("{{ {}; }} 2>&1; rm -rf {root}", fill(remove)));
    vm.ok(&format!("lab-rootfs {root} && chown -hR 100000:100000 {root} && {}", fill(script)));
    let look = format!("pid=$({}) && test \"$(readlink /proc/$pid/exe)\" = /bin/busybox && echo $pid", fill(pid));
    let printed = vm.wait_ok(&format!("{name} to run"), SOON * 3, &look);
    container.pid = printed.parse().expect("a number");
    container
}

/// As root of the container opens it, in its cgroup.
#[track_caller]
pub(crate) fn open(vm: &Vm, container: &Container<'_>, path: &str) -> String {
    let pid = container.pid;
    vm.ok(&format!(
        "( echo $BASHPID >/sys/fs/cgroup$(sed -n s/^0:://p /proc/{pid}/cgroup)/cgroup.procs && exec nsenter \
         --target {pid} --mount --user --setuid 0 --setgid 0 sh -c '(exec 3<>{path}) 2>&1 && echo opens; true' )"
    ))
}

fn sticks_reach_them(vm: &Vm) {
    let _installed = Installed::new(vm);
    let _prepared = Prepared::new(vm);
    vm.ok("systemctl start qm-hotplug");
    let podman = |runtime: &str| PODMAN.replace("{runtime}", runtime);
    let (pid, remove) = ("podman inspect --format '{{.State.Pid}}' {n}", "podman rm --force --ignore --time 0 {n}");
    let containers = [
        start(vm, "mapped-lxc", LXC, "lxc-info -n {n} -pH", "lxc-stop -k -n {n}; rm -rf /var/lib/lxc/{n}"),
        start(vm, "mapped-crun", &podman("crun"), pid, remove),
        start(vm, "mapped-runc", &podman("runc"), pid, remove),
    ];
    for round in ["a plug", "another one, by an agent that was killed"] {
        let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
        let host = node(vm, "/dev/ttyUSB0");
        for container in &containers {
            container.wait_for("/dev/ttyUSB0");
            let expected = "character special file bc:0 100000:100020 660";
            assert_eq!(container.node("/dev/ttyUSB0"), expected, "{}, {round}", container.name);
            let opened = open(vm, container, "/dev/ttyUSB0");
            if opened != "opens" {
                // It was refused once by runc's filter, on a busy host, and nobody knows why: this is to tell.
                let name = &container.name;
                let look =
                    "journalctl --sync; journalctl -u qm-hotplug -o short-precise --no-pager | tail -n 40; date +%T.%N";
                let state = format!("qm-hotplug list; qm-hotplug explain {name} /dev/ttyUSB0; bpftool cgroup tree");
                eprintln!(
                    "{}\nand now: {}",
                    vm.sh(&format!("{look}; {state}")).stdout,
                    open(vm, container, "/dev/ttyUSB0")
                );
            }
            assert_eq!(opened, "opens", "{}, {round}", container.name);
            assert_eq!(grants_of(vm, &container.name).len(), 1);
        }
        assert_eq!(node(vm, "/dev/ttyUSB0"), host, "the host's node is as it was");
        vm.ok("qm-hotplug verify mapped-lxc && qm-hotplug attach mapped-lxc /dev/ttyUSB0 /dev/a/by-person --uid 7");
        assert_eq!(containers[0].node("/dev/a/by-person"), "character special file bc:0 100007:100020 660");
        vm.ok("qm-hotplug detach mapped-lxc /dev/a/by-person");
        let before = vm.ok("systemctl show qm-hotplug -p MainPID --value");
        vm.ok("systemctl kill --signal=KILL qm-hotplug");
        let again = format!(
            "pid=$(systemctl show qm-hotplug -p MainPID --value); test $pid != 0 -a $pid != {before} && \
             systemctl is-active --quiet qm-hotplug"
        );
        vm.wait_ok("the agent to be back", SOON * 3, &again);
        stick.unplug();
        for container in &containers {
            container.wait_for_no("/dev/ttyUSB0");
            assert_eq!(container.node("/dev/a"), "nothing");
        }
        assert_eq!(status(vm)["entries"], 0);
    }
    if vm.release() == "trixie" {
        a_read_only_dev_is_refused(vm);
    }
    let journal = vm.ok("journalctl --sync; journalctl -u qm-hotplug -p warning -o cat --since -5min");
    assert!(!journal.contains("cannot"), "{journal}");
}

/// Podman 5 has an option for it.
fn a_read_only_dev_is_refused(vm: &Vm) {
    let read_only = Container::run(vm, "crun", "read-only", "--read-only --read-only-tmpfs=false");
    let output = vm.sh("qm-hotplug attach read-only /dev/null /dev/mine");
    assert_eq!(output.status, 5, "{}", output.stderr);
    assert!(output.stderr.contains("/dev is mounted read-only"), "{}", output.stderr);
    assert_eq!(read_only.node("/dev/mine"), "nothing");
}
