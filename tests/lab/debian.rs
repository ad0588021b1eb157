//! Containers with a whole Debian inside: the machine's own system, whose changes go to memory and are thrown away.

use crate::container::Container;
use crate::vm::Vm;

/// A root file system for `podman run --rootfs`; several containers may share it. Unmounted on drop, so that it has to
/// outlive its containers.
pub(crate) struct DebianRoot<'vm> {
    vm: &'vm Vm,
    name: String,
}

impl<'vm> DebianRoot<'vm> {
    /// Makes one. Podman's own `--rootfs DIR:O` will not do: the kernel refuses to keep the changes to a file system in
    /// itself.
    #[track_caller]
    pub(crate) fn make(vm: &'vm Vm, name: &str) -> Self {
        let root = Self { vm, name: name.to_owned() };
        let base = root.base();
        // Nothing of the machine's own is mounted or started inside.
        vm.ok(&format!(
            "mkdir -p {base}/changes {base}/work {base}/root && \
             mount -t overlay lab -o lowerdir=/,upperdir={base}/changes,workdir={base}/work {base}/root && \
             cd {base}/root && : >etc/fstab && rm -rf mnt/* run/* && mkdir -m 777 out && \
             rm -f etc/systemd/system/multi-user.target.wants/qmh-lab-*",
        ));
        root
    }

    fn base(&self) -> String {
        format!("/run/lab-{}", self.name)
    }

    /// Where it is on the host.
    pub(crate) fn path(&self) -> String {
        format!("{}/root", self.base())
    }

    /// Writes a file in it.
    #[track_caller]
    pub(crate) fn write(&self, path: &str, text: &str) {
        let path = format!("{}{path}", self.path());
        self.vm.ok(&format!("mkdir -p $(dirname {path}) && cat >{path} <<'END OF FILE'\n{text}\nEND OF FILE"));
    }

    /// Starts containers that share it, each with its runtime, name, and what follows `podman run`. They run `command`
    /// in a network namespace of their own, where nothing else is asked for.
    #[track_caller]
    pub(crate) fn run_all(&self, wanted: &[(&str, &str, &str)], command: &str) -> Vec<Container<'vm>> {
        // Made first, so that those that did start are removed when another one does not.
        // One may share the network of another one.
        let remove = |name: &str| format!("podman rm --force --depend --ignore --time 0 {name}");
        let not_yet = |name: &str| Container::of_other_engine(self.vm, name, remove(name));
        let mut containers: Vec<Container<'vm>> = wanted.iter().map(|(_, name, _)| not_yet(name)).collect();
        let mut script = String::from("pids=()\n");
        for (runtime, name, arguments) in wanted {
            let network = if arguments.contains("--network") { "" } else { "--network=none" };
            script += &format!(
                "podman --runtime {runtime} run -d --name {name} {network} {arguments} --rootfs {} {command} \
                 >/dev/null &\npids+=($!)\n",
                self.path(),
            );
        }
        self.vm.ok(&format!("{script}for pid in ${{pids[@]}}; do wait $pid || exit; done"));
        containers.iter_mut().for_each(Container::look_again);
        containers
    }
}

impl Drop for DebianRoot<'_> {
    fn drop(&mut self) {
        let base = self.base();
        let output = self.vm.sh(&format!("umount {base}/root && rm -rf --one-file-system {base}"));
        if !output.success() {
            eprintln!("could not remove {base}: {}", output.stderr);
        }
    }
}
