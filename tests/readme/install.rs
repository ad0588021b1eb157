//! What `scripts/install.sh` puts in place, and takes away.

use std::path::Path;

use crate::support::podman::Container;
use crate::support::{self, Agent, BINARY, Said, assert_nothing_left, run};

/// `scripts/install.sh` of the README, with the binary under test.
pub(super) fn install(options: &[&str]) -> Said {
    run("bash", &[&["scripts/install.sh"], options].concat())
}

pub(crate) fn installed_files_carry_their_prefix() {
    let directory = tempfile::tempdir().unwrap();
    let at = |path: &str| directory.path().join(path);
    let destdir = directory.path().to_str().unwrap();
    for _ in 0..2 {
        assert_eq!(install(&["--destdir", destdir, "--binary", BINARY]).ok(), "", "nothing is said of this host");
    }
    assert_eq!(std::fs::read(at("usr/bin/qm-hotplug")).unwrap(), std::fs::read(BINARY).unwrap());
    let hook = at("usr/share/containers/oci/hooks.d/qm-hotplug.json");
    assert_eq!(std::fs::read(hook).unwrap(), std::fs::read("hooks/qm-hotplug.json").unwrap());
    let unit = std::fs::read_to_string(at("usr/lib/systemd/system/qm-hotplug.service")).unwrap();
    assert!(unit.contains("\nExecStart=/usr/bin/qm-hotplug agent\n"));
    let same =
        |installed: &str, ours: &str| assert_eq!(std::fs::read(at(installed)).unwrap(), std::fs::read(ours).unwrap());
    same("usr/lib/systemd/system/qm-hotplug.socket", "units/qm-hotplug.socket");
    same("usr/lib/sysusers.d/qm-hotplug.conf", "units/qm-hotplug.sysusers");
    for page in std::fs::read_dir("src/man").unwrap().map(|entry| entry.unwrap().path()) {
        let (name, section) = (page.file_name().unwrap(), page.extension().unwrap().to_str().unwrap());
        let installed = at(&format!("usr/share/man/man{section}")).join(name);
        assert_eq!(std::fs::read(installed).unwrap(), std::fs::read(&page).unwrap(), "{}", page.display());
    }
    // Where Debian's shells look for those of packages; with another prefix they are tried.
    for file in ["bash-completion/completions/qm-hotplug", "zsh/vendor-completions/_qm-hotplug"] {
        let text = std::fs::read_to_string(at("usr/share").join(file)).unwrap();
        assert!(text.contains(" /usr/bin/qm-hotplug 2>/dev/null)\n"), "{file}: {text}");
    }
    for _ in 0..2 {
        install(&["--destdir", destdir, "--uninstall"]).ok();
    }
    assert_eq!(files_below(directory.path()), [""; 0]);

    install(&["--destdir", destdir, "--prefix", "/opt/qm//", "--binary", BINARY]).ok();
    let hook = std::fs::read_to_string(at("opt/qm/share/containers/oci/hooks.d/qm-hotplug.json")).unwrap();
    assert!(hook.contains("\"/opt/qm/bin/qm-hotplug\""), "{hook}");
    let unit = std::fs::read_to_string(at("opt/qm/lib/systemd/system/qm-hotplug.service")).unwrap();
    assert!(unit.contains("\nExecStart=/opt/qm/bin/qm-hotplug agent\n"), "{unit}");
}

fn files_below(directory: &Path) -> Vec<String> {
    run("find", &[directory.to_str().unwrap(), "-type", "f"]).ok().lines().map(str::to_owned).collect()
}

/// Starts a container that asks for consoles, with the hooks of an installation.
fn start_with_hooks(prefix: &str) -> Container {
    let hooks = format!("{prefix}/share/containers/oci/hooks.d");
    let options = ["--annotation", "org.containers.qm.device.ttys=yes"];
    Container::start_under(&["--hooks-dir", &hooks], "runc", "hooked", &options, &["sleep", "1000"])
}

pub(crate) fn installed_hook_opens_devices_at_start() {
    let directory = tempfile::tempdir().unwrap();
    let prefix = directory.path().to_str().unwrap();
    let said = install(&["--prefix", prefix, "--binary", BINARY]).ok();
    assert!(said.contains("kernel      ok       Linux "), "it ends with what doctor finds: {said}");
    let container = start_with_hooks(prefix);
    assert!(container.opens("<>", "/dev/tty5"));
    drop(container);
    install(&["--prefix", prefix, "--uninstall"]).ok();
    assert_eq!(files_below(directory.path()), [""; 0]);
}

pub(crate) fn uninstall_takes_everything_out() {
    let directory = tempfile::tempdir().unwrap();
    let prefix = directory.path().to_str().unwrap();
    install(&["--prefix", prefix, "--binary", BINARY]).ok();
    let hooks = directory.path().join("libexec/oci/hooks.d");
    std::fs::create_dir_all(&hooks).unwrap();
    std::os::unix::fs::symlink(format!("{prefix}/bin/qm-hotplug"), hooks.join("oci-qm-device-manager")).unwrap();
    std::os::unix::fs::symlink("elsewhere", hooks.join("oci-qm-other")).unwrap();
    let container = Container::start("runc", "full", &[]);
    support::qm(&["attach", "full", "/dev/tty21"]).ok();
    let agent = Agent::start();
    let refused = install(&["--prefix", prefix, "--uninstall"]);
    assert!(refused.code == 1 && refused.stderr.contains("an agent is running"), "{refused:?}");
    assert!(directory.path().join("bin/qm-hotplug").exists(), "it is needed to try again");
    agent.stop();
    assert!(container.opens("<>", "/dev/tty21"), "stopping leaves grants in force");
    install(&["--prefix", prefix, "--uninstall"]).ok();
    assert!(container.sh("test -e /dev/tty21").code != 0);
    assert_nothing_left();
    assert!(!hooks.join("oci-qm-device-manager").is_symlink(), "a link to what is gone");
    assert!(hooks.join("oci-qm-other").is_symlink(), "somebody else's");
    std::fs::remove_file(hooks.join("oci-qm-other")).unwrap();
    assert_eq!(files_below(directory.path()), [""; 0]);
    assert_eq!(std::fs::read_dir("/run/qm-hotplug").map_or(0, Iterator::count), 0);
    install(&["--prefix", prefix, "--uninstall"]).ok();
}
