//! Containers of other engines than Podman: found by name from what the engines leave on the host, and served like
//! Podman's.

use crate::Case;
use crate::agent::{Agent, grants_of, status};
use crate::container::Container;
use crate::plug::plug_stick;
use crate::vm::{SOON, Vm};

pub(crate) const CASES: &[Case] = &[("runtimes::sticks_reach_containers_of_all_engines", sticks_reach_all_engines)];

/// An engine: scripts in which `{n}` stands for a container's name and `{root}` for its root file system.
struct Engine {
    /// What stands before a name.
    name: &'static str,
    start: &'static str,
    /// What `start` gets for `{asks}` where the container itself asks for sticks; otherwise the configuration does.
    asks: &'static str,
    pid: &'static str,
    restart: &'static str,
    remove: &'static str,
}

const ENGINES: [Engine; 4] = [
    Engine {
        name: "docker",
        start: "docker run -d --name {n} --network=none --security-opt apparmor=unconfined {asks} lab:1 sleep 100000",
        asks: "--label org.containers.qm.device.ttyUSB=true",
        pid: "docker inspect --format '{{.State.Pid}}' {n}",
        restart: "docker restart --time 0 {n}",
        remove: "docker rm --force {n}",
    },
    Engine {
        name: "containerd",
        start: "ctr -n lab run -d --null-io {asks} --rootfs {root} {n} /bin/sleep 100000",
        asks: "--annotation org.containers.qm.device.ttyUSB=true",
        pid: "ctr -n lab task ls | awk '$1 == \"{n}\" { print $2 }'",
        restart: "ctr -n lab task rm -f {n}; ctr -n lab task start -d --null-io {n}",
        remove: "ctr -n lab task rm -f {n}; ctr -n lab container rm {n}",
    },
    Engine {
        name: "lxc",
        start: "mkdir -p /var/lib/lxc/{n} && printf '%s\\n' \
                'lxc.include = /usr/share/lxc/config/common.conf' 'lxc.uts.name = {n}' 'lxc.net.0.type = empty' \
                'lxc.rootfs.path = dir:{root}' 'lxc.init.cmd = /bin/sleep 100000' \
                'lxc.apparmor.profile = unconfined' >/var/lib/lxc/{n}/config && lxc-start -n {n}",
        asks: "",
        pid: "lxc-info -n {n} -pH",
        restart: "lxc-stop -k -n {n} && lxc-start -n {n}",
        remove: "lxc-stop -k -n {n}; rm -rf /var/lib/lxc/{n}",
    },
    Engine {
        name: "nspawn",
        start: "systemd-run --quiet --unit=nspawn-{n} systemd-nspawn -q -D {root} --machine={n} --private-network \
                --register=yes /bin/sleep 100000",
        asks: "",
        pid: "machinectl show -p Leader --value {n}",
        restart: "systemctl restart nspawn-{n}",
        remove: "systemctl stop nspawn-{n}",
    },
];

/// Of each engine the containers with these names. LXC and nspawn have no way to ask.
const RULES: &str = "[[container]]\nmatch = 'lxc:asks-*'\ndevices = ['ttyUSB']\n\
                     [[container]]\nmatch = 'nspawn:asks-*'\ndevices = ['ttyUSB']\n";

/// A container, and its engine.
type One<'vm> = (&'static Engine, Container<'vm>);

impl Engine {
    fn script(script: &str, container: &Container<'_>, root: &str, asks: &str) -> String {
        script.replace("{n}", &container.name).replace("{root}", root).replace("{asks}", asks)
    }
}

/// Starts a container of each name with each engine, all at once.
#[track_caller]
fn start<'vm>(vm: &'vm Vm, names: &[&str]) -> Vec<One<'vm>> {
    let (mut all, mut lines) = (Vec::new(), Vec::new());
    for (engine, name) in ENGINES.iter().flat_map(|engine| names.iter().map(move |name| (engine, name))) {
        let root = format!("/var/tmp/{}-{name}", engine.name);
        let remove = format!("{{ {}; }} 2>&1; rm -rf {root}", engine.remove.replace("{n}", name));
        let container = Container::of_other_engine(vm, name, remove);
        let asks = if name.starts_with("asks") { engine.asks } else { "" };
        let start = Engine::script(engine.start, &container, &root, asks);
        // nspawn wants to see a /usr.
        lines.push(format!("lab-rootfs {root} && mkdir -p {root}/usr && {start}"));
        all.push((engine, container));
    }
    at_once(vm, &lines);
    all.iter_mut().for_each(|one| look_up(vm, one));
    all
}

#[track_caller]
fn at_once(vm: &Vm, lines: &[String]) {
    let started: String = lines.iter().map(|line| format!("({line}) >/dev/null &\npids+=($!)\n")).collect();
    vm.ok(&format!("pids=()\n{started}for pid in ${{pids[@]}}; do wait $pid || exit; done"));
}

/// Waits until its own program runs, and notes its pid.
#[track_caller]
fn look_up(vm: &Vm, (engine, container): &mut One<'_>) {
    let pid = Engine::script(engine.pid, container, "", "");
    let look = format!("pid=$({pid}) && test \"$(readlink /proc/$pid/exe)\" = /bin/busybox && echo $pid");
    let printed = vm.wait_ok(&format!("{}:{} to run", engine.name, container.name), SOON * 3, &look);
    container.pid = printed.parse().expect("a number");
}

fn reference((engine, container): &One<'_>) -> String {
    format!("{}:{}", engine.name, container.name)
}

fn sticks_reach_all_engines(vm: &Vm) {
    let _configuration = Configuration::new(vm);
    vm.ok("systemctl start docker && lab-rootfs /var/tmp/image && tar -C /var/tmp/image -c . | docker import - lab:1");
    let mut asking = start(vm, &["asks-before"]);
    let agent = Agent::start(vm);
    let (after, plain): (Vec<_>, Vec<_>) =
        start(vm, &["asks-after", "plain"]).into_iter().partition(|one| one.1.name == "asks-after");
    asking.extend(after);
    for one in asking.iter().chain(&plain) {
        assert_eq!(one.1.open_by_hand("c 188 0"), "Operation not permitted", "{} before", reference(one));
    }
    let found = vm.ok("qm-hotplug ps");
    for (engine, container) in asking.iter().chain(&plain) {
        let is_it = |line: &str| line.starts_with(&*container.name) && line.contains(engine.name);
        assert!(found.lines().any(is_it), "{} {}: {found}", engine.name, container.name);
    }

    let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
    for one in &asking {
        one.1.wait_for("/dev/ttyUSB0");
        assert_eq!(one.1.node("/dev/ttyUSB0"), "character special file bc:0 0:20 660", "{}", reference(one));
        assert_eq!(one.1.open("/dev/ttyUSB0"), "opens", "{}", reference(one));
    }
    for one in &plain {
        let reference = reference(one);
        assert_eq!(one.1.node("/dev/ttyUSB0"), "nothing", "{reference}");
        assert_eq!(one.1.open_by_hand("c 188 0"), "Operation not permitted", "{reference}");
        vm.ok(&format!("qm-hotplug attach {reference} /dev/ttyUSB0 /dev/by-person"));
        assert_eq!(one.1.open("/dev/by-person"), "opens", "{reference}");
        assert_eq!(grants_of(vm, &reference), [("/dev/by-person".into(), "manual".into())]);
        vm.ok(&format!("qm-hotplug detach {reference} /dev/ttyUSB0"));
        assert_eq!(one.1.node("/dev/by-person"), "nothing", "{reference}");
        assert_eq!(one.1.open_by_hand("c 188 0"), "Operation not permitted", "{reference} after detach");
    }
    let several = vm.sh("qm-hotplug attach plain /dev/ttyUSB0");
    assert_eq!(several.status, 3, "{}", several.stderr);
    for one in &plain {
        assert!(several.stderr.contains(&reference(one)), "{}", several.stderr);
    }

    stick.unplug();
    for one in &asking {
        one.1.wait_for_no("/dev/ttyUSB0");
        assert_eq!(one.1.open_by_hand("c 188 0"), "Operation not permitted", "{} after", reference(one));
    }
    assert_eq!(status(vm)["entries"], 0);

    let _stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
    // Those that came after the agent; half of the containers are enough.
    let anew: Vec<_> = asking.split_off(ENGINES.len());
    at_once(vm, &anew.iter().map(|one| Engine::script(one.0.restart, &one.1, "", "")).collect::<Vec<_>>());
    for mut one in anew {
        look_up(vm, &mut one);
        one.1.wait_for("/dev/ttyUSB0");
        assert_eq!(one.1.open("/dev/ttyUSB0"), "opens", "{} after its restart", reference(&one));
    }
    agent.print_times("engines other than Podman");
}

/// The rules; on drop they and Docker are gone.
struct Configuration<'vm>(&'vm Vm);

impl<'vm> Configuration<'vm> {
    fn new(vm: &'vm Vm) -> Self {
        let path = "/etc/qm-hotplug/config.d";
        vm.ok(&format!("mkdir -p {path} && cat >{path}/50-lab.toml <<'END'\n{RULES}END"));
        Self(vm)
    }
}

impl Drop for Configuration<'_> {
    fn drop(&mut self) {
        self.0.sh("rm -rf /etc/qm-hotplug /var/tmp/image; systemctl stop docker.socket docker containerd");
    }
}
