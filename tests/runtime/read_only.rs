//! Containers that are held tighter than usual: read-only root directories, security options, and directories of the host's
//! mounted below `/dev`.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::Case;
use crate::plug::{Plugged, block};
use crate::state::{entries, refused};
use crate::support::podman::{Container, MAPPED};
use crate::support::{grants, qm};

pub(crate) const CASES: &[Case] = &[
    ("read_only::a_read_only_root_has_a_dev_that_takes_nodes", a_read_only_root),
    ("read_only::security_options_change_nothing", security_options_change_nothing),
    ("read_only::a_directory_of_the_hosts_below_dev", a_directory_of_the_hosts),
];

/// How a container is started.
type Start = fn(&str, &str, &[&str]) -> Container;

/// With a user namespace and without.
const STARTS: [Start; 2] = [Container::start, Container::start_mapped];

/// Attached at that path it opens, and after `detach` nothing is left of it.
#[track_caller]
fn comes_and_goes(c: &Container, device: &Plugged, path: &str, whence: &str) {
    qm(&["attach", &c.name, &device.path, path, "--mode", "0666"]).ok();
    assert!(c.opens("<>", path), "{whence}: {:?}", c.open("<>", path));
    qm(&["verify", &c.name]).ok();
    qm(&["detach", &c.name, path]).ok();
    assert_eq!((c.node(path), grants().len(), entries().len()), (None, 0, 0), "{whence}");
}

fn a_read_only_root(runtime: &str) {
    let device = block(41);
    for (start, is_mapped) in STARTS.into_iter().zip([false, true]) {
        let c = start(runtime, "qmh-ro", &["--read-only"]);
        for path in [&*device.path, "/dev/a/b/mine"] {
            comes_and_goes(&c, &device, path, path);
        }
        // What is mounted there has no part in that.
        match is_mapped {
            true => comes_and_goes(&c, &device, "/tmp/mine", "in /tmp"),
            false => {
                let attach = || qm(&["attach", &c.name, &device.path, "/tmp/mine"]);
                refused(&[c.pid()], attach, 5, "/tmp is mounted nodev");
            }
        }
        for path in ["/opt/mine", "/mine", "/etc/a/mine"] {
            let line = refused(&[c.pid()], || qm(&["attach", &c.name, &device.path, path]), 5, "is mounted read-only");
            assert!(line.contains("name a destination on a writable file system"), "{line}");
        }
        drop(c);
    }
}

fn security_options_change_nothing(runtime: &str) {
    let device = block(42);
    let seccomp = "seccomp=/usr/share/containers/seccomp.json";
    for start in STARTS {
        for options in [
            &["--security-opt", "no-new-privileges"][..],
            &["--security-opt", "unmask=all"],
            &["--security-opt", "mask=/dev/shm", "--security-opt", "label=disable"],
            &["--cap-drop", "all"],
            &["--security-opt", seccomp],
        ] {
            if options[1] == seccomp && !std::path::Path::new("/usr/share/containers/seccomp.json").exists() {
                continue;
            }
            let c = start(runtime, "qmh-secure", options);
            comes_and_goes(&c, &device, "/dev/mine", &format!("{options:?}"));
        }
    }
}

/// A directory on a mount of the host's that is shared; gone when dropped.
struct Shared(PathBuf);

impl Shared {
    fn new() -> Shared {
        let path = tempfile::Builder::new().prefix("qmh-shared-").tempdir().unwrap().keep();
        let none = None::<&str>;
        mount(Some("none"), &path, Some("tmpfs"), MsFlags::empty(), Some("mode=0777")).unwrap();
        mount(none, &path, none, MsFlags::MS_SHARED, none).unwrap();
        Shared(path)
    }

    fn names(&self) -> Vec<String> {
        let names = std::fs::read_dir(&self.0).unwrap().flatten();
        names.map(|entry| entry.file_name().into_string().unwrap()).collect()
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
        let _ = std::fs::remove_dir(&self.0);
    }
}

fn a_directory_of_the_hosts(runtime: &str) {
    let device = block(43);
    let host_mounts = || std::fs::read_to_string("/proc/self/mountinfo").unwrap().lines().count();
    for (start, is_mapped) in STARTS.into_iter().zip([false, true]) {
        for how in ["private", "rprivate", "shared", "rshared", "slave", "rslave"] {
            let shared = Shared::new();
            let volume = format!("{}:/dev/volume:{how}", shared.0.display());
            let c = start(runtime, "qmh-volume", &["-v", &volume]);
            let before = host_mounts();
            // crun hands the host's own mount into a user namespace: what is mounted on it comes to the host.
            if is_mapped && runtime == "crun" && how.ends_with("shared") {
                let attach = || qm(&["attach", &c.name, &device.path, "/dev/volume/mine"]);
                let line = refused(&[c.pid()], attach, 5, "shared propagation");
                assert!(line.contains(shared.0.to_str().unwrap()) && line.contains("private or slave"), "{line}");
                assert_eq!((shared.names(), host_mounts()), (vec![], before));
                // So does what is mounted on a file of it, which the container has bound elsewhere.
                let file = shared.0.join("file");
                std::fs::write(&file, "").unwrap();
                std::os::unix::fs::chown(&file, Some(MAPPED), Some(MAPPED)).unwrap();
                std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o000)).unwrap();
                let pid = c.pid().to_string();
                let bind = "touch /dev/mine && mount --bind /dev/volume/file /dev/mine";
                let into = ["-t", &pid, "-m", "-U", "-S", "0", "-G", "0", "--", "/bin/sh", "-c", bind];
                crate::support::run("nsenter", &into).ok();
                let attach = || qm(&["attach", &c.name, &device.path, "/dev/mine"]);
                let line = refused(&[c.pid()], attach, 5, "shared propagation");
                assert!(line.contains(shared.0.to_str().unwrap()), "{line}");
                assert_eq!(host_mounts(), before);
                continue;
            }
            qm(&["attach", &c.name, &device.path, "/dev/volume/mine", "--mode", "0666"]).ok();
            assert!(c.opens("<>", "/dev/volume/mine"), "{how}");
            // On the host it is in that directory, too: the node, or the empty file below it.
            assert_eq!(shared.names(), ["mine"], "{how}");
            let found = std::fs::symlink_metadata(shared.0.join("mine")).unwrap();
            assert_eq!(found.is_file(), is_mapped, "{how}");
            assert_eq!(host_mounts(), before, "{how}: nothing is mounted on the host");
            qm(&["detach", &c.name, "/dev/volume/mine"]).ok();
            assert_eq!((shared.names(), c.node("/dev/volume/mine")), (vec![], None), "{how}");
            drop(c);
        }
        let shared = Shared::new();
        let c = start(runtime, "qmh-volume", &["-v", &format!("{}:/dev/volume:ro", shared.0.display())]);
        let path = "/dev/volume/mine";
        refused(&[c.pid()], || qm(&["attach", &c.name, &device.path, path]), 5, "is mounted read-only");
        comes_and_goes(&c, &device, "/dev/beside", "beside it");
    }
}
