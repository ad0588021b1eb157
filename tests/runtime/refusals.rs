//! What cannot be done is refused in one line that names the thing, and nothing has changed: containers and devices that
//! are not there, and callers that may not.

use std::process::{Command, Stdio};

use crate::plug::block;
use crate::state::refused;
use crate::support::podman::{Container, RUNTIMES, podman};
use crate::support::{Agent, BINARY, Said, qm, run};
use crate::{Case, CaseOnce};

pub(crate) const CASES: &[Case] = &[
    ("refusals::container_that_is_not_there", container_that_is_not_there),
    ("refusals::ids_that_begin_alike", ids_that_begin_alike),
    ("refusals::what_is_no_device", what_is_no_device),
    ("refusals::processes_that_are_no_container", processes_that_are_no_container),
    ("refusals::callers_that_may_not", callers_that_may_not),
    ("refusals::from_inside_a_container", from_inside_a_container),
];

pub(crate) const ONCE: &[CaseOnce] = &[("refusals::two_names_alike_in_two_runtimes", two_names_alike_in_two_runtimes)];

/// A container with a grant in force, so that there is something to spoil; each test runs without and with an agent.
pub(crate) fn both_ways(runtime: &str, name: &str, options: &[&str], test: impl Fn(&Container, &[u32], &str)) {
    let (device, granted) = (block(48), block(49));
    let c = Container::start(runtime, name, options);
    let inits = [c.pid()];
    // First with nothing in force: also no program of ours may be left.
    test(&c, &inits, &device.path);
    qm(&["attach", &c.name, &granted.path]).ok();
    test(&c, &inits, &device.path);
    let _agent = Agent::start();
    test(&c, &inits, &device.path);
    assert!(c.opens("<>", &granted.path));
}

fn container_that_is_not_there(runtime: &str) {
    both_ways(runtime, "qmh-there", &[], |c, inits, device| {
        let no_id = "0123456789abcdef0123456789abcdef";
        for name in ["qmh-ther", "qmh-there-not", "podman:qmh-none", no_id, "../../etc", "qmh-there\u{1b}[2J"] {
            let shown = name.strip_prefix("podman:").unwrap_or(name).replace('\u{1b}', "\\u{1b}");
            refused(inits, || qm(&["attach", name, device]), 3, &shown);
            refused(inits, || qm(&["detach", name, device]), 3, &shown);
            refused(inits, || qm(&["list", name]), 3, &shown);
        }
        for name in ["", "pid:", "pid:0", "pid:x", "pid:-1", "podman:", "nothing:qmh-there"] {
            refused(inits, || qm(&["attach", name, device]), 2, name);
        }
        assert_eq!(c.node(device), None);
    });
}

fn ids_that_begin_alike(runtime: &str) {
    both_ways(runtime, "qmh-alike", &[], |c, inits, device| {
        // Ids are random: a second one that begins alike is a copy of the state under another id.
        let twin = Twin::of(c);
        let beginning = &c.id[..20];
        crate::support::wait_for("the twin to be seen", || qm(&["list", beginning]).code == 3);
        for command in [&["attach", beginning, device][..], &["detach", beginning, device], &["list", beginning]] {
            let line = refused(inits, || qm(command), 3, beginning);
            assert!(line.contains(&c.id) && line.contains(&twin.id), "names both: {line}");
        }
        assert_ne!(qm(&["list", &c.id[..22]]).code, 3, "more of the id tells them apart");
    });
}

/// A second container, as its state has it, whose id begins as the first one's.
struct Twin {
    id: String,
    directory: String,
}

impl Twin {
    fn of(c: &Container) -> Twin {
        let digit = if &c.id[20..21] == "0" { "1" } else { "0" };
        let id = format!("{}{digit}{}", &c.id[..20], &c.id[21..]);
        let directory = format!("/run/{}/{id}", c.runtime);
        let from = format!("/run/{}/{}", c.runtime, c.id);
        std::fs::create_dir(&directory).unwrap();
        let twin = Twin { id, directory };
        let mut files: Vec<_> = std::fs::read_dir(&from).unwrap().flatten().collect();
        // The state comes last, as with crun.
        files.sort_by_key(|file| file.file_name() == "status");
        for file in files {
            let name = file.file_name().into_string().unwrap();
            let text = std::fs::read_to_string(file.path()).unwrap();
            // As runtimes do: the state is renamed into place.
            let (part, whole) = (format!("{}/.{name}", twin.directory), format!("{}/{name}", twin.directory));
            std::fs::write(&part, text.replace(&c.id, &twin.id)).unwrap();
            std::fs::rename(part, whole).unwrap();
        }
        twin
    }
}

impl Drop for Twin {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn two_names_alike_in_two_runtimes() {
    let [first, second] = RUNTIMES.map(|runtime| Container::start(runtime, &format!("qmh-{runtime}"), &[]));
    let device = block(47);
    // No such thing as a shared name in podman; but one is the beginning of the other.
    let third = Container::start("crun", "qmh-runc-2", &[]);
    for c in [&first, &second, &third] {
        qm(&["attach", &c.name, &device.path]).ok();
        assert!(c.opens("<>", &device.path));
        qm(&["detach", &c.name, &device.path]).ok();
    }
}

fn what_is_no_device(runtime: &str) {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (file, fifo, dangling, nodev) = (at("file"), at("fifo"), at("dangling"), at("null"));
    std::fs::write(&file, "x").unwrap();
    run("mkfifo", &[&fifo]).ok();
    std::os::unix::fs::symlink("/dev/ttyUSB77", &dangling).unwrap();
    // A node whose device does not exist.
    run("mknod", &[&nodev, "c", "188", "77"]).ok();
    both_ways(runtime, "qmh-nodev", &[], |c, inits, _| {
        for (path, what) in [
            (&file[..], "a regular file"),
            ("/dev/net", "a directory"),
            (&fifo, "a FIFO"),
            ("/dev/ttyUSB77", "no device"),
            ("/dev/null/x", "no device"),
            (&dangling, "no device"),
            (&nodev, "no device"),
        ] {
            let line = refused(inits, || qm(&["attach", &c.name, path, "/dev/x"]), 4, path);
            assert!(line.contains(what), "{line}");
        }
        refused(inits, || qm(&["attach", &c.name, "", "/dev/x"]), 2, "device");
    });
}

fn processes_that_are_no_container(runtime: &str) {
    let mut sleeper = Command::new("sleep").arg("1000").spawn().unwrap();
    let mut apart = Command::new("unshare").args(["-m", "sleep", "1000"]).spawn().unwrap();
    crate::support::wait_for("it to be apart", || {
        std::fs::read_to_string(format!("/proc/{}/comm", apart.id())).unwrap().trim() == "sleep"
    });
    let mut ended = Command::new("true").spawn().unwrap();
    ended.wait().unwrap();
    let pid = |child: &std::process::Child| format!("pid:{}", child.id());
    both_ways(runtime, "qmh-process", &[], |_, inits, device| {
        for (name, code) in [
            ("pid:1".to_owned(), 5),
            (format!("pid:{}", std::process::id()), 5),
            (pid(&sleeper), 5),
            (pid(&apart), 5),
            ("pid:2".to_owned(), 5),
            (pid(&ended), 3),
            ("pid:4194303".to_owned(), 3),
            ("pid:4294967295".to_owned(), 3),
        ] {
            refused(inits, || qm(&["attach", &name, device]), code, &name);
            assert!(std::path::Path::new(device).exists());
        }
    });
    for child in [&mut sleeper, &mut apart] {
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

fn callers_that_may_not(runtime: &str) {
    both_ways(runtime, "qmh-caller", &[], |c, inits, device| {
        let nobody = |args: &[&str]| {
            let user = ["--reuid", "65534", "--regid", "65534", "--clear-groups", BINARY];
            run("setpriv", &[&user[..], args].concat())
        };
        for args in [
            &["attach", &c.name, device][..],
            &["detach", &c.name, device],
            &["list"],
            &["explain", &c.name, device],
            &["verify", &c.name],
            &["status"],
            &["ps"],
            &["agent"],
            &["agent", "--release"],
        ] {
            let line = refused(inits, || nobody(args), 5, "root");
            assert!(line.contains("sudo"), "says what to do: {line}");
        }
    });
    // Root by name only, as in a service that is locked down too far.
    let c = Container::start(runtime, "qmh-caller-2", &[]);
    for (capability, purpose) in
        [("sys_admin", "device programs"), ("mknod", "device nodes"), ("sys_chroot", "mount namespaces")]
    {
        let without = format!("-{capability}");
        let attach = || {
            run(
                "setpriv",
                &["--bounding-set", &without, "--inh-caps", &without, BINARY, "attach", &c.name, "/dev/tty3"],
            )
        };
        let line = refused(&[c.pid()], attach, 5, &format!("CAP_{}", capability.to_uppercase()));
        assert!(line.contains(purpose), "{line}");
    }
}

fn from_inside_a_container(runtime: &str) {
    let device = block(47);
    for namespace in ["--map-root-user", "--pid", "--cgroup"] {
        for args in [
            &["agent"][..],
            &["attach", "qmh-x", &device.path],
            &["agent", "--release"],
            &["ps"],
            &["explain", "qmh-x", &device.path],
            &["verify", "qmh-x"],
        ] {
            // The test's own empty run directory is seen by these: with an agent they would be its clients.
            refused(
                &[],
                || run("unshare", &[&["--fork", namespace, BINARY], args].concat()),
                5,
                "namespace of its own",
            );
        }
    }
    let binary = format!("{BINARY}:/bin/qm-hotplug:ro");
    let mut options = vec!["--privileged", "-v", &binary, "-v", "/lib:/lib:ro", "-v", "/usr/lib:/usr/lib:ro"];
    if std::path::Path::new("/lib64").exists() {
        options.extend(["-v", "/lib64:/lib64:ro"]);
    }
    let c = Container::start(runtime, "qmh-inside", &options);
    for args in [&["agent"][..], &["attach", "pid:1", "/dev/loop47"], &["agent", "--release"], &["ps"], &["status"]] {
        let inside = || {
            let mut said = c.exec(&[&["/bin/qm-hotplug"], args].concat());
            // podman adds a line about the command's exit code.
            said.stderr = said
                .stderr
                .lines()
                .filter(|line| line.starts_with("qm-hotplug:"))
                .map(|line| format!("{line}\n"))
                .collect();
            said
        };
        refused(&[], inside, 5, "outside of containers");
    }
    podman(&["rm", "-f", "-t", "0", &c.name]);
    // The hook is the one part that may run anywhere: it reads and writes a document.
    let mut hook = Command::new("unshare");
    hook.args(["--fork", "--user", BINARY, "precreate"]).stdin(Stdio::null());
    let said: Said = hook.output().unwrap().into();
    said.fails(1, "it is empty");
}
