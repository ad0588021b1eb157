//! Filters below a granted container: a container inside a container keeps its own refusals.

use serde_json::{Value, json};

use crate::Case;
use crate::agent::Agent;
use crate::container::{Container, RUNTIMES, open_script, why};
use crate::plug::{ASKS_FOR_STICKS, plug_stick};
use crate::vm::Vm;

pub(crate) const CASES: &[Case] = &[
    ("nested::an_inner_container_keeps_its_own_refusals", an_inner_container_keeps_its_own_refusals),
    ("nested::a_grant_to_the_inner_one_alone", a_grant_to_the_inner_one_alone),
];

/// A container that runc makes in a cgroup below another container's, as a Podman in a container does.
struct Inner<'vm> {
    vm: &'vm Vm,
    id: String,
    directory: String,
    cgroup: String,
    pid: u32,
}

impl<'vm> Inner<'vm> {
    #[track_caller]
    fn run(vm: &'vm Vm, outer: &Container<'_>) -> Self {
        let id = format!("inner-{}", outer.name);
        let directory = format!("/var/tmp/{id}");
        let cgroup = format!("{}/inner", outer.cgroup());
        vm.ok(&format!("lab-rootfs {directory}/rootfs"));
        let mut spec: Value =
            serde_json::from_str(&vm.ok(&format!("cd {directory} && runc spec && cat config.json"))).unwrap();
        spec["process"]["terminal"] = false.into();
        spec["process"]["args"] = json!(["sleep", "100000"]);
        spec["root"]["readonly"] = false.into();
        spec["linux"]["cgroupsPath"] = cgroup.as_str().into();
        // Made before it starts, so that it is removed when it does not.
        let mut inner = Self { vm, id, directory, cgroup, pid: 0 };
        let (id, directory) = (&inner.id, &inner.directory);
        vm.ok(&format!("cat >{directory}/config.json <<'SPEC'\n{spec}\nSPEC"));
        vm.ok(&format!("cd {directory} && runc run --detach --pid-file pid {id} >log 2>&1 || {{ cat log; false; }}"));
        inner.pid = vm.ok(&format!("cat {directory}/pid")).parse().expect("a number");
        assert_eq!(vm.ok(&format!("cat /proc/{}/cgroup", inner.pid)), format!("0::{}", inner.cgroup));
        inner
    }

    /// See [`Container::open`].
    #[track_caller]
    fn open(&self, path: &str) -> String {
        open_in(self.vm, &self.cgroup, self.pid, path)
    }

    /// Makes a node in it, with the host's power.
    #[track_caller]
    fn make_node(&self, path: &str, numbers: &str) {
        self.vm.ok(&format!("nsenter --target {} --mount mknod {path} {numbers}", self.pid));
    }
}

impl Drop for Inner<'_> {
    fn drop(&mut self) {
        let output = self.vm.sh(&format!("runc delete --force {}; rm -rf {}", self.id, self.directory));
        if !output.success() {
            eprintln!("could not remove {}: {}", self.id, output.stderr);
        }
    }
}

/// Opens a device in that cgroup and in the mount namespace of that process.
#[track_caller]
fn open_in(vm: &Vm, cgroup: &str, pid: u32, path: &str) -> String {
    let open = open_script("<>", &[path]);
    why(&vm.ok(&format!(
        "( echo $BASHPID >/sys/fs/cgroup{cgroup}/cgroup.procs && exec nsenter --target {pid} --mount {open} )",
    )))
}

fn an_inner_container_keeps_its_own_refusals(vm: &Vm) {
    let names = RUNTIMES.map(|runtime| (runtime, format!("outer-{runtime}")));
    let wanted: Vec<_> = names.iter().map(|(runtime, name)| (*runtime, &**name, ASKS_FOR_STICKS)).collect();
    let outer = Container::run_all(vm, &wanted);
    let inner: Vec<Inner<'_>> = outer.iter().map(|outer| Inner::run(vm, outer)).collect();
    let _agent = Agent::start(vm);
    let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");

    for (outer, inner) in outer.iter().zip(&inner) {
        outer.wait_for("/dev/ttyUSB0");
        inner.make_node("/dev/ttyUSB0", "c 188 0");
        let name = &outer.name;
        assert_eq!(outer.open("/dev/ttyUSB0"), "opens", "{name} itself");
        assert_eq!(inner.open("/dev/ttyUSB0"), "Operation not permitted", "the container in {name}");
        assert_eq!(inner.open("/dev/null"), "opens", "the container in {name}");

        // A cgroup below without a filter of its own is the container's: systemd or a shell inside makes such ones.
        let child = format!("{}/child", outer.cgroup());
        // runc has made the outer cgroup a threaded domain, where others must be threaded as well.
        let kind = "grep -qx domain cgroup.type || echo threaded >cgroup.type";
        vm.ok(&format!("mkdir /sys/fs/cgroup{child} && cd /sys/fs/cgroup{child} && {{ {kind}; }}"));
        assert_eq!(open_in(vm, &child, outer.pid, "/dev/ttyUSB0"), "opens", "a cgroup without a filter in {name}");
        // The same cgroup with a refusing one: the inner container's, attached once more.
        let refusing = vm.ok(&format!(
            "bpftool cgroup show /sys/fs/cgroup{} | sed -nE 's/^ *([0-9]+) +(cgroup_)?device .*/\\1/p'",
            inner.cgroup
        ));
        vm.ok(&format!("bpftool cgroup attach /sys/fs/cgroup{child} device id {refusing} multi"));
        let opened = open_in(vm, &child, outer.pid, "/dev/ttyUSB0");
        assert_eq!(opened, "Operation not permitted", "a cgroup with a filter in {name}");
        // rmdir fails with EBUSY until the kernel has let go of the last process.
        vm.wait_ok("the cgroup to be empty", crate::vm::SOON, &format!("rmdir /sys/fs/cgroup{child}"));
    }

    // After an update of the runtime the mark is back or the grant is narrower; the refusal stands either way.
    for (outer, inner) in outer.iter().zip(&inner) {
        let runtime = outer.name.rsplit('-').next().unwrap_or_default();
        vm.ok(&format!("{runtime} update --pids-limit 100 {}", outer.id));
        assert_eq!(outer.open("/dev/ttyUSB0"), "opens", "{} itself, updated", outer.name);
        assert_eq!(inner.open("/dev/ttyUSB0"), "Operation not permitted", "the container in {}, updated", outer.name);
    }
    stick.unplug();
    outer.iter().for_each(|outer| outer.wait_for_no("/dev/ttyUSB0"));
}

fn a_grant_to_the_inner_one_alone(vm: &Vm) {
    let outer = Container::run_all(vm, &[("crun", "around-crun", ""), ("runc", "around-runc", "")]);
    let inner: Vec<Inner<'_>> = outer.iter().map(|outer| Inner::run(vm, outer)).collect();
    let agent = Agent::start(vm);
    let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
    for (outer, inner) in outer.iter().zip(&inner) {
        vm.ok(&format!("qm-hotplug attach {} /dev/ttyUSB0", inner.id));
        assert_eq!(inner.open("/dev/ttyUSB0"), "opens", "the container in {}", outer.name);
        assert_eq!(outer.node("/dev/ttyUSB0"), "nothing", "{}", outer.name);
        assert_eq!(outer.open_by_hand("c 188 0"), "Operation not permitted", "{} itself", outer.name);
        vm.ok(&format!("qm-hotplug detach {} /dev/ttyUSB0", inner.id));
        inner.make_node("/dev/ttyUSB0", "c 188 0");
        assert_eq!(inner.open("/dev/ttyUSB0"), "Operation not permitted", "detached");
    }
    drop(agent);
    drop(stick);
}
