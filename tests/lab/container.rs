//! Podman containers in the guest, without images and without a network.

use crate::everything::{Node, nodes_seen};
use crate::plug::FIRST_PLUG;
use crate::vm::Vm;

/// The runtimes that both Debian releases have under Podman.
pub(crate) const RUNTIMES: [&str; 2] = ["crun", "runc"];

/// A running container with busybox, Podman's if nothing else is said; removed on drop.
#[derive(Debug)]
pub(crate) struct Container<'vm> {
    vm: &'vm Vm,
    /// Its name, unique among those that run.
    pub(crate) name: String,
    /// 64 hexadecimal digits.
    pub(crate) id: String,
    /// Its first process, in the guest's numbers; another one after a restart.
    pub(crate) pid: u32,
    /// A script that removes it.
    remove: String,
}

impl<'vm> Container<'vm> {
    /// Starts a container that sleeps, with further arguments for `podman run` (`--annotation a=b` and so on).
    ///
    /// # Panics
    /// With Podman's output when it does not start.
    #[track_caller]
    pub(crate) fn run(vm: &'vm Vm, runtime: &str, name: &str, arguments: &str) -> Self {
        Self::run_all(vm, &[(runtime, name, arguments)]).remove(0)
    }

    /// Starts several at once, each with its runtime, name and arguments: that takes half as long.
    ///
    /// # Panics
    /// With Podman's output when one does not start.
    #[track_caller]
    pub(crate) fn run_all(vm: &'vm Vm, wanted: &[(&str, &str, &str)]) -> Vec<Self> {
        // Made first, so that those that did start are removed when another one does not.
        // --ignore: one of several may not have started.
        let remove = |name: &str| format!("podman rm --force --ignore --time 0 {name} && rm -rf /var/tmp/{name}");
        let not_yet = |name: &str| Self::of_other_engine(vm, name, remove(name));
        let mut containers: Vec<Self> = wanted.iter().map(|(_, name, _)| not_yet(name)).collect();
        let mut script = String::from("pids=()\n");
        for (runtime, name, arguments) in wanted {
            script += &format!(
                "(lab-rootfs /var/tmp/{name} && \
                 podman --runtime {runtime} run -d --name {name} --network=none {arguments} \
                 --rootfs /var/tmp/{name} sleep 100000 >/dev/null) &\npids+=($!)\n",
            );
        }
        vm.ok(&format!("{script}for pid in ${{pids[@]}}; do wait $pid || exit; done"));
        Self::look_up(vm, &mut containers);
        containers
    }

    /// A container that somebody else starts, and a script that removes it. Its `pid` has to be set before it is used.
    pub(crate) fn of_other_engine(vm: &'vm Vm, name: &str, remove: String) -> Self {
        Self { vm, name: name.to_owned(), id: String::new(), pid: 0, remove }
    }

    /// Starts containers anew; their first processes are others then.
    #[track_caller]
    pub(crate) fn restart_all(vm: &Vm, containers: &mut [Self]) {
        vm.ok(&format!("podman restart --time 0 {}", names(containers)));
        Self::look_up(vm, containers);
    }

    /// After somebody restarted it: its first process is another one.
    #[track_caller]
    pub(crate) fn look_again(&mut self) {
        let vm = self.vm;
        Self::look_up(vm, std::slice::from_mut(self));
    }

    #[track_caller]
    fn look_up(vm: &Vm, containers: &mut [Self]) {
        let format = "{{.Id}} {{.State.Pid}}";
        let shown = vm.ok(&format!("podman inspect --format '{format}' {}", names(containers)));
        assert_eq!(shown.lines().count(), containers.len(), "{shown}");
        for (container, line) in containers.iter_mut().zip(shown.lines()) {
            let (id, pid) = line.split_once(' ').expect("an id and a pid");
            (container.id, container.pid) = (id.to_owned(), pid.parse().expect("a number"));
        }
    }

    /// A script line that runs `command` inside the container, with no help from Podman (which takes seconds here).
    /// It joins the mount namespace and the cgroup of the container, so that the device filter counts.
    pub(crate) fn inside(&self, command: &str) -> String {
        let pid = self.pid;
        format!(
            "( echo $BASHPID >/sys/fs/cgroup$(sed -n s/^0:://p /proc/{pid}/cgroup)/cgroup.procs && \
             exec nsenter --target {pid} --mount {command} )",
        )
    }

    /// A script line that runs `command` in the container's mount namespace, but in the agent's own cgroup: as the
    /// host's root does, whom the container's device filter does not concern.
    pub(crate) fn outside(&self, command: &str) -> String {
        format!("nsenter --target {} --mount {command}", self.pid)
    }

    /// What is at that path inside: kind, numbers, owner and mode; see [`node`].
    #[track_caller]
    pub(crate) fn node(&self, path: &str) -> String {
        self.vm.ok(&self.outside(&stat(path)))
    }

    /// Waits until there is something at that path inside.
    #[track_caller]
    pub(crate) fn wait_for(&self, path: &str) {
        let what = format!("{path} in {}", self.name);
        self.vm.wait_ok(&what, FIRST_PLUG, &self.outside(&format!("test -e {path}")));
    }

    /// Waits until there is nothing at that path inside.
    #[track_caller]
    pub(crate) fn wait_for_no(&self, path: &str) {
        let what = format!("{path} in {} to go", self.name);
        self.vm.wait_ok(&what, FIRST_PLUG, &format!("! {}", self.outside(&format!("test -e {path}"))));
    }

    /// Opens a device for reading and writing, as a program inside would: `opens`, or why it does not.
    #[track_caller]
    pub(crate) fn open(&self, path: &str) -> String {
        self.open_all(&[path]).remove(0)
    }

    /// [`Container::open`] for several in one go, which is much faster.
    #[track_caller]
    pub(crate) fn open_all(&self, paths: &[&str]) -> Vec<String> {
        let results = self.vm.ok(&self.inside(&open_script("<>", paths)));
        let results: Vec<String> = results.lines().map(why).collect();
        assert_eq!(results.len(), paths.len(), "{}: {results:?}", self.name);
        results
    }

    /// [`Container::open`] with a redirection of the shell: `<` for reading alone, `>` for writing alone.
    #[track_caller]
    pub(crate) fn open_as(&self, how: &str, path: &str) -> String {
        why(&self.vm.ok(&self.inside(&open_script(how, &[path]))))
    }

    /// Opens the device with these numbers (`c 188 0`) by a node that is made for this from outside.
    #[track_caller]
    pub(crate) fn open_by_hand(&self, numbers: &str) -> String {
        let path = "/dev/by-hand";
        self.vm.ok(&self.outside(&format!("mknod {path} {numbers}")));
        let opened = self.open(path);
        self.vm.ok(&self.outside(&format!("rm {path}")));
        opened
    }

    /// [`Container::open_by_hand`] for several numbers in one go.
    #[track_caller]
    pub(crate) fn open_all_by_hand(&self, numbers: &[&str]) -> Vec<String> {
        let paths: Vec<String> = (0..numbers.len()).map(|n| format!("/dev/by-hand{n}")).collect();
        let make: String =
            paths.iter().zip(numbers).map(|(path, numbers)| format!("mknod {path} {numbers}; ")).collect();
        self.vm.ok(&self.outside(&format!("sh -ec '{make}'")));
        let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
        let opened = self.open_all(&paths);
        self.vm.ok(&self.outside(&format!("rm {}", paths.join(" "))));
        opened
    }

    /// Opens devices as a program that the container's own user starts, by `podman exec`.
    #[track_caller]
    pub(crate) fn open_by_exec(&self, paths: &[&str]) -> Vec<String> {
        let results = self.vm.ok(&format!("podman exec {} {}", self.name, open_script("<>", paths)));
        let results: Vec<String> = results.lines().map(why).collect();
        assert_eq!(results.len(), paths.len(), "{}: {results:?}", self.name);
        results
    }

    /// The device nodes that it has beyond those that every container has, sorted by path.
    #[track_caller]
    pub(crate) fn nodes(&self) -> Vec<Node> {
        nodes_seen(self.vm, |command| self.outside(command))
    }

    /// The cgroup of its first process, below the root of cgroups. Its runtime's filter is there.
    #[track_caller]
    pub(crate) fn cgroup(&self) -> String {
        self.vm.ok(&format!("sed -n s/^0:://p /proc/{}/cgroup", self.pid))
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let output = self.vm.sh(&self.remove);
        if !output.success() {
            eprintln!("could not remove {}: {}", self.name, output.stderr);
        }
    }
}

fn names(containers: &[Container<'_>]) -> String {
    containers.iter().map(|container| &*container.name).collect::<Vec<_>>().join(" ")
}

/// What is at that path on the host: `character special file bc:0 0:20 660` (kind, numbers in hexadecimal, owner,
/// mode), or `nothing`.
#[track_caller]
pub(crate) fn node(vm: &Vm, path: &str) -> String {
    vm.ok(&stat(path))
}

fn stat(path: &str) -> String {
    format!("sh -c 'test -e {path} || {{ echo nothing; exit; }}; stat -c \"%F %t:%T %u:%g %a\" {path}'")
}

/// A command that opens devices and prints a line for each.
pub(crate) fn open_script(how: &str, paths: &[&str]) -> String {
    // Each is looked for before, because the shell would make a file.
    let paths = paths.join(" ");
    format!(
        "sh -c 'for path in {paths}; do test -e $path || {{ echo nothing is there; continue; }}; \
         (exec 3{how}$path) 2>&1 && echo opens; done; true'",
    )
}

/// From a line of that: "sh: can't open /dev/ttyUSB0: Operation not permitted".
pub(crate) fn why(line: &str) -> String {
    line.rsplit(": ").next().unwrap_or_default().to_owned()
}
