//! Where the work cannot be done: one line that names what is missing, exit code 5, and nothing half done.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use caps::{CapSet, Capability};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use qm_hotplug::sys::caps::NEEDED;
use rustix::io::Errno;

use crate::kernel_bpf::refuse_bpf;
use crate::stage::{Container, TestCgroup};
use crate::support::{BINARY, Said, assert_nothing_left, grants};

pub const TESTS: &[(&str, fn())] = &[
    ("unfit::each_capability_that_is_missing_is_named", each_capability),
    ("unfit::an_ordinary_user_is_told_to_use_sudo", an_ordinary_user),
    ("unfit::namespaces_of_a_container_are_named", namespaces),
    ("unfit::without_cgroup2_it_says_how_to_mount_it", without_cgroup2),
    ("unfit::a_part_of_cgroup2_is_not_taken_for_its_root", a_part_of_cgroup2),
    ("unfit::where_bpf_is_refused_kernel_and_reason_are_named", where_bpf_is_refused),
    ("unfit::doctor_calls_each_a_problem_and_goes_on", doctor_goes_on),
];

/// Runs the binary, at most for ten seconds, after `prepare` in the new process.
fn qm_after(args: &[&str], prepare: impl Fn() -> io::Result<()> + Send + Sync + 'static) -> Said {
    let mut command = Command::new("timeout");
    command.arg("10").arg(BINARY).args(args).stdin(Stdio::null());
    // SAFETY: this program has one thread, so whatever the child does before exec finds no lock held.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(prepare)
    };
    command.output().unwrap().into()
}

/// Every command that works on the kernel refuses, with this in its one line, and nothing has changed.
#[track_caller]
fn all_refuse(
    container: &Container,
    texts: &[&str],
    prepare: impl Fn() -> io::Result<()> + Clone + Send + Sync + 'static,
) {
    let before = (container.snapshot(), container.cgroup.programs());
    let name = container.name();
    for args in [
        &["attach", &name, "/dev/zero"][..],
        &["explain", &name, "/dev/zero"],
        &["agent"],
        &["agent", "--release"],
        &["status"],
    ] {
        let line = qm_after(args, prepare.clone()).fails(5, texts[0]);
        for text in texts {
            assert!(line.contains(text), "{text:?} in what {args:?} says: {line}");
        }
    }
    assert_eq!((container.snapshot(), container.cgroup.programs()), before);
    assert_eq!(grants(), [serde_json::Value::Null; 0]);
    assert_nothing_left();
}

fn other<E: std::fmt::Display>(error: E) -> io::Error {
    io::Error::other(error.to_string())
}

fn each_capability() {
    let container = Container::new();
    for (capability, _) in NEEDED {
        // What is not in the bounding set, root does not get at exec.
        all_refuse(&container, &[&capability.to_string(), "missing", "run as root"], move || {
            caps::drop(None, CapSet::Bounding, capability).map_err(other)
        });
    }
    // And no other is needed.
    let said = qm_after(&["attach", &container.name(), "/dev/zero"], || {
        let needed: Vec<Capability> = NEEDED.iter().map(|(capability, _)| *capability).collect();
        let others = caps::all()
            .into_iter()
            .filter(|capability| !needed.contains(capability) && *capability != Capability::CAP_SETPCAP);
        others
            .chain([Capability::CAP_SETPCAP])
            .try_for_each(|capability| caps::drop(None, CapSet::Bounding, capability))
            .map_err(other)
    });
    said.ok();
    crate::support::qm(&["detach", &container.name(), "/dev/zero"]).ok();
}

fn an_ordinary_user() {
    let container = Container::new();
    let place = tempfile::tempdir().unwrap();
    fs::set_permissions(place.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    // Where the build is may be out of such a user's reach.
    let binary = place.path().join("qm-hotplug");
    fs::copy(BINARY, &binary).unwrap();
    for args in [&["attach", &container.name(), "/dev/zero"][..], &["agent"], &["status"]] {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
            .arg(&binary)
            .args(args)
            .stdin(Stdio::null());
        let said: Said = command.output().unwrap().into();
        said.fails(5, "sudo");
    }
}

fn namespaces() {
    let container = Container::new();
    for (flag, text) in [("--user", "user namespace"), ("--pid", "process namespace")] {
        let mut command = Command::new("unshare");
        // To be root in a user namespace is not to be root.
        command.args([flag, if flag == "--user" { "--map-root-user" } else { "--fork" }, BINARY]);
        let said: Said =
            command.args(["attach", &container.name(), "/dev/zero"]).stdin(Stdio::null()).output().unwrap().into();
        let line = said.fails(5, text);
        assert!(line.contains("run on the host itself"), "{line}");
    }
    let cgroup = TestCgroup::new("namespace");
    let procs = cgroup.directory().join("cgroup.procs");
    all_refuse(&container, &["cgroup namespace", "run on the host itself"], move || {
        fs::write(&procs, "0")?;
        Ok(unshare(CloneFlags::CLONE_NEWCGROUP)?)
    });
}

/// In a mount namespace of its own, takes every cgroup file system away.
fn unmount_cgroups() -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    while umount2("/sys/fs/cgroup", MntFlags::MNT_DETACH).is_ok() {}
    Ok(())
}

fn without_cgroup2() {
    let container = Container::new();
    let texts = ["no cgroup2 hierarchy is mounted", "mount -t cgroup2"];
    all_refuse(&container, &texts, unmount_cgroups);
    // Hidden below another file system, whose root has the same inode number.
    all_refuse(&container, &texts, || {
        unshare(CloneFlags::CLONE_NEWNS)?;
        Ok(mount(Some("none"), "/sys/fs/cgroup", Some("tmpfs"), MsFlags::empty(), None::<&str>)?)
    });
}

fn a_part_of_cgroup2() {
    let container = Container::new();
    let part = TestCgroup::new("part");
    let place = tempfile::tempdir().unwrap();
    let (directory, at) = (part.directory(), place.path().to_owned());
    all_refuse(&container, &["not the root of the cgroup2 hierarchy", place.path().to_str().unwrap()], move || {
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(Some(&directory), &at, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        while umount2("/sys/fs/cgroup", MntFlags::MNT_DETACH).is_ok() {}
        Ok(())
    });
}

fn where_bpf_is_refused() {
    let container = Container::new();
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    // A container's seccomp profile or a kernel without it (CONFIG_BPF_SYSCALL), lockdown, or a part only.
    for (errno, reason) in [(Errno::PERM, "Operation not permitted"), (Errno::NOSYS, "Function not implemented")] {
        all_refuse(&container, &[&release, "query programs", reason, "CONFIG_CGROUP_BPF"], move || {
            refuse_bpf(None, errno.raw_os_error())
        });
    }
    for (command, what) in [(0, "create its maps"), (5, "load its program"), (8, "attach its program")] {
        for args in [&["attach", &container.name(), "/dev/zero"][..], &["agent"]] {
            let before = container.snapshot();
            let line = qm_after(args, move || refuse_bpf(Some(command), libc::EINVAL)).fails(5, what);
            assert!(line.contains(&release) && line.contains("Invalid argument"), "{line}");
            assert_eq!(container.snapshot(), before);
            assert_eq!(grants(), [serde_json::Value::Null; 0]);
            assert_nothing_left();
        }
    }
}

/// `doctor` has a problem of that topic with this in it, and a line for each other topic; nothing is left.
#[track_caller]
fn doctor_finds(topic: &str, text: &str, prepare: impl Fn() -> io::Result<()> + Send + Sync + 'static) {
    let said = qm_after(&["doctor", "--json"], prepare);
    assert_eq!(said.code, 1, "{said:?}");
    assert!(said.stderr.contains("this host cannot do the work: ") && said.stderr.contains(topic), "{said:?}");
    let checks: Vec<serde_json::Value> = serde_json::from_str(&said.stdout).unwrap();
    let is_it = |check: &serde_json::Value| {
        (&check["topic"], &check["state"]) == (&topic.into(), &"problem".into())
            && check["finding"].as_str().unwrap().contains(text)
    };
    assert!(checks.iter().any(is_it), "{topic} {text:?} in {checks:#?}");
    for topic in ["rights", "kernel", "cgroup", "filter", "udev", "hook", "agent", "config", "engines", "containers"] {
        assert!(checks.iter().any(|check| check["topic"] == topic), "{topic} in {checks:#?}");
    }
    assert_nothing_left();
}

fn doctor_goes_on() {
    doctor_finds("rights", "CAP_MKNOD is missing", || {
        caps::drop(None, CapSet::Bounding, Capability::CAP_MKNOD).map_err(other)
    });
    doctor_finds("cgroup", "no cgroup2 hierarchy is mounted", unmount_cgroups);
    doctor_finds("kernel", "Operation not permitted", || refuse_bpf(None, libc::EPERM));
    doctor_finds("kernel", "load its program", || refuse_bpf(Some(5), libc::EINVAL));
}
