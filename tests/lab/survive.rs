//! Grants stay in force, and what was not granted stays refused, whatever systemd, the runtimes and the agent do.

use crate::Case;
use crate::agent::{Agent, programs, status};
use crate::container::{Container, RUNTIMES};
use crate::plug::{ASKS_FOR_STICKS, plug_stick};
use crate::vm::{Plugged, SOON, Vm};

pub(crate) const CASES: &[Case] = &[
    ("survive::what_systemd_does", what_systemd_does),
    ("survive::what_runtimes_do", what_runtimes_do),
    ("survive::the_agents_own_end", the_agents_own_end),
];

/// A container of each runtime with a stick by rule and the machine's disk by hand.
struct Granted<'vm> {
    vm: &'vm Vm,
    agent: Agent<'vm>,
    containers: Vec<Container<'vm>>,
    _stick: Plugged<'vm>,
}

impl<'vm> Granted<'vm> {
    #[track_caller]
    fn new(vm: &'vm Vm, name: &str) -> Self {
        let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
        let agent = Agent::start(vm);
        let names = RUNTIMES.map(|runtime| (runtime, format!("{name}-{runtime}")));
        let wanted: Vec<_> = names.iter().map(|(runtime, name)| (*runtime, &**name, ASKS_FOR_STICKS)).collect();
        let containers = Container::run_all(vm, &wanted);
        for container in &containers {
            container.wait_for("/dev/ttyUSB0");
            vm.ok(&format!("qm-hotplug attach {} /dev/vda /dev/disk", container.name));
            // The kernel's log and a second stick, which nobody granted.
            vm.ok(&container.outside("sh -c 'mknod /dev/other c 1 11; mknod /dev/next-stick c 188 1'"));
            assert_eq!(programs(vm, &container.cgroup()).first().map(|name| &name[..9]), Some("qmhp_mark"));
        }
        let granted = Self { vm, agent, containers, _stick: stick };
        granted.holds("at first");
        granted
    }

    /// Both grants open, and what nobody granted does not.
    #[track_caller]
    fn holds(&self, after: &str) {
        for container in &self.containers {
            let opened = container.open_all(&["/dev/ttyUSB0", "/dev/disk", "/dev/other", "/dev/next-stick"]);
            let expected = ["opens", "opens", "Operation not permitted", "Operation not permitted"];
            assert_eq!(opened, expected, "{} after {after}", container.name);
        }
    }

    /// Does something to each container; `{id}`, `{name}` and `{scope}` stand for it.
    #[track_caller]
    fn do_to_each(&self, command: &str) {
        for (container, runtime) in self.containers.iter().zip(RUNTIMES) {
            let scope = format!("libpod-{}.scope", container.id);
            let fields =
                [("{id}", &*container.id), ("{name}", &container.name), ("{scope}", &scope), ("{runtime}", runtime)];
            let command = fields.iter().fold(command.to_owned(), |text, (field, value)| text.replace(field, value));
            self.vm.ok(&command);
        }
    }

    fn inodes(&self) -> Vec<String> {
        let inodes = |container: &Container<'_>| self.vm.ok(&container.outside("stat -c %i /dev/ttyUSB0 /dev/disk"));
        self.containers.iter().map(inodes).collect()
    }
}

fn what_systemd_does(vm: &Vm) {
    let granted = Granted::new(vm, "systemd");
    granted.do_to_each("systemctl set-property --runtime {scope} CPUWeight=50");
    granted.holds("set-property CPUWeight=50");
    granted.do_to_each("systemctl set-property --runtime {scope} 'DeviceAllow=/dev/zero r'");
    granted.holds("set-property DeviceAllow=/dev/zero");
    granted.do_to_each("systemctl set-property --runtime {scope} DeviceAllow=");
    granted.holds("set-property DeviceAllow=");
    vm.ok("systemctl daemon-reload");
    granted.holds("daemon-reload");
    let another = Container::run_all(vm, &[("crun", "another-crun", ""), ("runc", "another-runc", "")]);
    granted.holds("daemon-reload and the start of another container");
    for container in &another {
        assert_eq!(container.open_by_hand("c 188 0"), "Operation not permitted", "{}", container.name);
    }
    vm.ok("systemctl daemon-reexec");
    granted.holds("daemon-reexec");
}

fn what_runtimes_do(vm: &Vm) {
    let granted = Granted::new(vm, "runtimes");
    granted.do_to_each("podman update --cpu-shares 512 {name}");
    granted.holds("podman update --cpu-shares");
    marks_are_first(&granted, "podman update --cpu-shares");
    // Podman 4 of bookworm cannot change this limit of a container that runs.
    if vm.release() != "bookworm" {
        granted.do_to_each("podman update --pids-limit 200 {name}");
        granted.holds("podman update --pids-limit");
        marks_are_first(&granted, "podman update --pids-limit");
    }
    granted.do_to_each("{runtime} update --pids-limit 100 {id}");
    granted.holds("RUNTIME update --pids-limit");
    marks_are_first(&granted, "RUNTIME update --pids-limit");
}

/// The agent puts its mark back where an update took it away.
#[track_caller]
fn marks_are_first(granted: &Granted<'_>, after: &str) {
    for container in &granted.containers {
        let cgroup = container.cgroup();
        let what = format!("the mark of {} to be first after {after}", container.name);
        granted.vm.wait(&what, SOON, |vm| programs(vm, &cgroup).first()?.starts_with("qmhp_mark").then_some(()));
    }
}

fn the_agents_own_end(vm: &Vm) {
    let granted = Granted::new(vm, "restart");
    let inodes = granted.inodes();
    let opening = OpenInALoop::start(vm, &granted.containers);
    granted.agent.restart();
    granted.holds("a restart of the agent");
    granted.agent.kill();
    granted.holds("a killed agent");
    let second = Agent::start(vm);
    granted.holds("a new start");
    assert_eq!(granted.inodes(), inodes, "nodes were made anew");
    assert_eq!(status(vm)["grants"], 4);
    assert_eq!(opening.failures(), [""; 0], "opening failed meanwhile");

    second.stop();
    assert_eq!(status(vm)["agent"], false);
    granted.holds("the agent was stopped");
    granted.do_to_each("podman update --cpu-shares 512 {name}");
    granted.do_to_each("{runtime} update --pids-limit 100 {id}");
    granted.do_to_each("systemctl set-property --runtime {scope} CPUWeight=50");
    granted.holds("updates without an agent");
    granted.do_to_each("qm-hotplug detach {name} /dev/disk");
    for container in &granted.containers {
        assert_eq!(container.node("/dev/disk"), "nothing", "{}", container.name);
        assert_eq!(container.open_by_hand("b 254 0"), "Operation not permitted", "{}", container.name);
    }
}

/// A program in each container that opens the stick again and again.
struct OpenInALoop<'a, 'vm> {
    vm: &'vm Vm,
    containers: &'a [Container<'vm>],
}

impl<'a, 'vm> OpenInALoop<'a, 'vm> {
    fn start(vm: &'vm Vm, containers: &'a [Container<'vm>]) -> Self {
        let body = "while test ! -e /tmp/enough; do (exec 3<>/dev/ttyUSB0); n=$((n + 1)); done; echo opened $n";
        for container in containers {
            let program = container.inside(&format!("sh -c '{body}'"));
            vm.ok(&format!("{program} >/run/opened-{} 2>&1 &", container.name));
        }
        Self { vm, containers }
    }

    /// Ends the programs and gives what they said beside how often they opened it: what failed.
    fn failures(self) -> Vec<String> {
        let mut failures = Vec::new();
        for container in self.containers {
            self.vm.ok(&container.outside("touch /tmp/enough"));
            let log = format!("/run/opened-{}", container.name);
            let said = self.vm.wait_ok("the program's end", SOON, &format!("grep -q ^opened {log} && cat {log}"));
            let count = said.lines().find_map(|line| line.strip_prefix("opened ")?.parse::<u32>().ok());
            assert!(count.is_some_and(|count| count > 10), "{}: {said}", container.name);
            failures.extend(said.lines().filter(|line| !line.starts_with("opened ")).map(str::to_owned));
        }
        failures
    }
}
