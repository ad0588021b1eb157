//! Containers in the state directories of Docker and containerd, made there by the runtimes themselves: the directories
//! come with the first container and go. The lab tier has the engines.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::plug::trigger;
use crate::support::podman::{Container, place, runtime as call};
use crate::support::{Agent, configure, grants, qm, wait_for};
use crate::{Case, CaseOnce};

pub(crate) const CASES: &[Case] = &[
    ("engines::containers_are_found_where_docker_has_them", containers_are_found_where_docker_has_them),
    ("engines::containers_are_found_in_namespaces_of_containerd", containers_are_found_in_namespaces_of_containerd),
    ("engines::a_name_that_two_engines_know_is_ambiguous", a_name_that_two_engines_know_is_ambiguous),
];

pub(crate) const ONCE: &[CaseOnce] =
    &[("engines::a_cgroup_of_lxc_is_a_container_once_its_own_program_runs", a_cgroup_of_lxc_is_a_container)];

const DOCKER: &str = "/run/docker/runtime-lab/moby";
const CONTAINERD: &str = "/run/containerd/runc/qmh-lab";

/// A container that a runtime was called for by hand; its state directory and all above it that is empty go on drop.
struct Called {
    runtime: String,
    root: String,
    id: String,
    bundle: PathBuf,
}

impl Called {
    fn start(runtime: &str, root: &str, id: &str, annotations: &Value) -> Called {
        let bundle = place().join(format!("bundle-{id}"));
        fs::create_dir_all(&bundle).unwrap();
        call("runc", &["spec", "--bundle", bundle.to_str().unwrap()]).ok();
        let config = bundle.join("config.json");
        let mut spec: Value = serde_json::from_slice(&fs::read(&config).unwrap()).unwrap();
        spec["process"]["terminal"] = false.into();
        spec["process"]["args"] = json!(["sleep", "1000"]);
        spec["process"]["rlimits"] = json!([]);
        spec["root"] = json!({ "path": place().join("rootfs"), "readonly": true });
        spec["annotations"] = annotations.clone();
        spec["linux"]["cgroupsPath"] = format!("/qmh-engines/{id}").into();
        let etc = bundle.join("docker/containers").join(id);
        fs::create_dir_all(&etc).unwrap();
        fs::write(etc.join("hosts"), "").unwrap();
        let mount =
            json!({ "destination": "/etc/hosts", "type": "bind", "source": etc.join("hosts"), "options": ["bind"] });
        spec["mounts"].as_array_mut().unwrap().push(mount);
        fs::write(place().join("rootfs/etc/hosts"), "").unwrap();
        fs::write(&config, spec.to_string()).unwrap();
        fs::create_dir_all(root).unwrap();
        let called = Called { runtime: runtime.into(), root: root.into(), id: id.into(), bundle };
        // The container keeps the output open.
        let bundle = called.bundle.display();
        let line = format!("{runtime} --root {root} run --detach --bundle {bundle} {id} </dev/null >{bundle}/log 2>&1");
        let said = call("sh", &["-c", &line]);
        assert_eq!(said.code, 0, "{}", fs::read_to_string(called.bundle.join("log")).unwrap());
        called
    }

    /// What Docker writes of a container before it starts it: name, labels and the image's labels.
    fn describe(id: &str, name: &str, labels: &Value, of_image: &Value) {
        let root = place().join(format!("bundle-{id}/docker"));
        let (container, images) = (root.join("containers").join(id), root.join("image/vfs/imagedb/content/sha256"));
        fs::create_dir_all(&container).unwrap();
        fs::create_dir_all(&images).unwrap();
        let config = json!({
            "Name": format!("/{name}"), "Image": "sha256:beef", "Driver": "vfs",
            "Config": { "Image": "lab:1", "Labels": labels },
        });
        fs::write(container.join("config.v2.json"), config.to_string()).unwrap();
        fs::write(images.join("beef"), json!({ "config": { "Labels": of_image } }).to_string()).unwrap();
    }

    fn opens(&self, path: &str) -> bool {
        let line = format!("test -c {path} && exec 3<>{path}");
        call(&self.runtime, &["--root", &self.root, "exec", &self.id, "sh", "-c", &line]).code == 0
    }
}

impl Drop for Called {
    fn drop(&mut self) {
        call(&self.runtime, &["--root", &self.root, "delete", "--force", &self.id]);
        let _ = fs::remove_dir_all(&self.bundle);
        // As far as they are empty.
        for directory in Path::new(&self.root).ancestors().take_while(|path| *path != Path::new("/run")) {
            let _ = fs::remove_dir(directory);
        }
        let _ = fs::remove_dir("/sys/fs/cgroup/qmh-engines");
    }
}

fn id_of(digit: char) -> String {
    digit.to_string().repeat(64)
}

fn containers_are_found_where_docker_has_them(runtime: &str) {
    let consoles = json!({ "org.containers.qm.device.ttys": "true" });
    let (before, after, image) = (id_of('a'), id_of('b'), id_of('c'));
    Called::describe(&before, "qmh-before", &json!({}), &json!({}));
    Called::describe(&after, "qmh-after", &consoles, &json!({}));
    Called::describe(&image, "qmh-image", &consoles, &consoles);
    let before = Called::start(runtime, DOCKER, &before, &consoles);
    let agent = Agent::start();
    assert!(before.opens("/dev/tty5"), "{}", agent.log());
    // The last one takes the directories along.
    drop(before);
    let (after, image) =
        (Called::start(runtime, DOCKER, &after, &json!({})), Called::start(runtime, DOCKER, &image, &json!({})));
    wait_for("all consoles", || grants().len() == 8);
    assert!(after.opens("/dev/tty5") && !image.opens("/dev/tty5"), "labels of an image ask for nothing");
    trigger("remove", "tty5");
    wait_for("one to go", || grants().len() == 7);
    assert!(!after.opens("/dev/tty5"));
    trigger("add", "tty5");
    wait_for("it to be back", || after.opens("/dev/tty5"));
    for name in ["docker:qmh-image", "qmh-image", &image.id[..12]] {
        assert!(!image.opens("/dev/tty5"));
        qm(&["attach", name, "/dev/tty5"]).ok();
        assert!(image.opens("/dev/tty5"), "{name}");
        qm(&["detach", name, "/dev/tty5"]).ok();
    }
    qm(&["attach", "podman:qmh-image", "/dev/tty5"]).fails(3, "no running container 'podman:qmh-image'");
    let listed: Value = serde_json::from_str(&qm(&["ps", "--json"]).ok()).unwrap();
    assert!(listed.as_array().unwrap().iter().any(|one| one["name"] == "qmh-after" && one["runtime"] == "docker"));
}

fn containers_are_found_in_namespaces_of_containerd(runtime: &str) {
    configure("[[container]]\nmatch = 'containerd:qmh-lab/web-*'\ndevices = ['devname=/dev/tty5']");
    let _agent = Agent::start();
    let web = Called::start(runtime, CONTAINERD, "web-1", &json!({}));
    let other = Called::start(runtime, CONTAINERD, "db-1", &json!({}));
    wait_for("its console", || web.opens("/dev/tty5"));
    assert!(!other.opens("/dev/tty5"));
    let text = qm(&["list", "containerd:web-1", "--json"]).ok();
    assert!(text.contains("\"id\":\"containerd:qmh-lab/web-1\""), "{text}");
    // Ended and started anew under its name.
    drop(web);
    wait_for("the grant to go", || grants().is_empty());
    let web = Called::start(runtime, CONTAINERD, "web-1", &json!({}));
    wait_for("its console again", || web.opens("/dev/tty5"));
}

fn a_name_that_two_engines_know_is_ambiguous(runtime: &str) {
    let by_podman = Container::start(runtime, "qmh-same", &[]);
    let by_containerd = Called::start(runtime, CONTAINERD, "qmh-same", &json!({}));
    let line = qm(&["attach", "qmh-same", "/dev/tty5"]).fails(3, "'qmh-same' is ambiguous");
    assert!(line.contains("podman:qmh-same") && line.contains("containerd:qmh-same"), "{line}");
    qm(&["attach", "containerd:qmh-same", "/dev/tty5"]).ok();
    assert!(by_containerd.opens("/dev/tty5") && !by_podman.opens("<>", "/dev/tty5"));
    qm(&["attach", "podman:qmh-same", "/dev/tty5"]).ok();
    assert!(by_podman.opens("<>", "/dev/tty5"));
}

/// What LXC makes of a container, made by hand: a cgroup with a process that is the first of its own namespace, and that
/// runs what its parent does until it starts another program.
struct Payload {
    cgroup: PathBuf,
    monitor: Child,
}

impl Payload {
    fn start(cgroup: &str, go: &Path) -> Payload {
        let cgroup = Path::new("/sys/fs/cgroup").join(cgroup);
        let root = place().join("rootfs");
        // Another file than what calls it.
        if fs::create_dir(root.join("own")).is_ok() {
            fs::copy("/bin/busybox", root.join("own/sleep")).unwrap();
        }
        fs::create_dir(&cgroup).unwrap();
        let (root, go, procs) = (root.display(), go.display(), cgroup.join("cgroup.procs"));
        let init = format!(
            "echo 0 >{}; mount -t tmpfs none {root}/dev; while ! test -e {go}; do sleep 0.05; done; \
             exec chroot {root} /own/sleep 1000",
            procs.display()
        );
        // As LXC's monitor does, before there is an init.
        let monitors =
            cgroup.with_file_name(cgroup.file_name().unwrap().to_str().unwrap().replace("payload", "monitor"));
        fs::create_dir(&monitors).unwrap();
        let enter = format!("echo 0 >{}/cgroup.procs; exec \"$@\"", monitors.display());
        let unshare = ["/bin/busybox", "unshare", "--mount", "--pid", "--fork", "/bin/busybox", "sh", "-c", &init];
        let arguments = [&["sh", "-c", &enter, "monitor"][..], &unshare].concat();
        let monitor = Command::new("/bin/busybox").args(arguments).stdin(Stdio::null()).spawn().unwrap();
        Payload { cgroup, monitor }
    }

    fn init(&self) -> Option<u32> {
        fs::read_to_string(self.cgroup.join("cgroup.procs")).unwrap().lines().next()?.parse().ok()
    }
}

impl Drop for Payload {
    fn drop(&mut self) {
        let _ = fs::write(self.cgroup.join("cgroup.kill"), "1");
        let _ = self.monitor.kill();
        let _ = self.monitor.wait();
        wait_for("its cgroup to be empty", || fs::remove_dir(&self.cgroup).is_ok());
        let monitors = self.cgroup.to_str().unwrap().replace("payload", "monitor");
        wait_for("its monitor's cgroup to be empty", || fs::remove_dir(&monitors).is_ok());
    }
}

fn a_cgroup_of_lxc_is_a_container() {
    configure("[[container]]\nmatch = 'lxc:qmh-*'\ndevices = ['devname=/dev/tty5']");
    let go = place().join("go");
    let agent = Agent::start();
    let starting = Payload::start("lxc.payload.qmh-web", &go);
    wait_for("its init", || starting.init().is_some());
    std::thread::sleep(Duration::from_millis(300));
    qm(&["attach", "lxc:qmh-web", "/dev/tty4"]).fails(3, "no running container 'lxc:qmh-web'");
    assert_eq!(grants().len(), 0);
    fs::write(&go, "").unwrap();
    wait_for("its console", || grants().len() == 1);
    let grant = &grants()[0];
    assert_eq!((&grant["id"], &grant["container"]), (&json!("lxc:qmh-web"), &json!("qmh-web")));
    let node = format!("/proc/{}/root/dev/tty5", starting.init().unwrap());
    assert!(Path::new(&node).exists());
    // Also of a container that is found starting.
    agent.stop();
    fs::remove_file(&go).unwrap();
    let second = Payload::start("lxc.payload.qmh-db", &go);
    wait_for("its init", || second.init().is_some());
    let _agent = Agent::start();
    assert_eq!(grants().len(), 1);
    fs::write(&go, "").unwrap();
    wait_for("the second's console", || grants().len() == 2);
    drop(starting);
    wait_for("the first's to go", || grants().len() == 1);
}
