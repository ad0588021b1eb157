//! Podman containers in the guest, without images and without a network.

use crate::vm::Vm;

/// The runtimes that both Debian releases have under Podman.
pub(crate) const RUNTIMES: [&str; 2] = ["crun", "runc"];

/// A running Podman container with busybox; removed on drop.
#[derive(Debug)]
pub(crate) struct Container<'vm> {
    vm: &'vm Vm,
    /// Its name, unique among those that run.
    pub(crate) name: String,
    /// 64 hexadecimal digits.
    pub(crate) id: String,
    /// Its first process, in the guest's numbers; another one after a restart.
    pub(crate) pid: u32,
}

impl<'vm> Container<'vm> {
    /// Starts a container that sleeps, with further arguments for `podman run` (`--annotation a=b` and so on).
    ///
    /// # Panics
    /// With Podman's output when it does not start.
    #[track_caller]
    pub(crate) fn run(vm: &'vm Vm, runtime: &str, name: &str, arguments: &str) -> Self {
        let started = vm.ok(&format!(
            "lab-rootfs /var/tmp/{name} && \
             podman --runtime {runtime} run -d --name {name} --network=none {arguments} \
             --rootfs /var/tmp/{name} sleep 100000 >/dev/null && \
             podman inspect --format '{{{{.Id}}}} {{{{.State.Pid}}}}' {name}",
        ));
        let (id, pid) = started.split_once(' ').expect("an id and a pid");
        Self { vm, name: name.to_owned(), id: id.to_owned(), pid: pid.parse().expect("a number") }
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
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let output = self.vm.sh(&format!("podman rm --force --time 0 {0} && rm -rf /var/tmp/{0}", self.name));
        if !output.success() {
            eprintln!("could not remove {}: {}", self.name, output.stderr);
        }
    }
}
