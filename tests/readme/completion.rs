//! What shells complete by once `scripts/install.sh` has run: each is asked in its own way.

use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::install::install;
use crate::support::podman::Container;
use crate::support::{self, BINARY, Said, qm, release};

/// An installation in a directory of its own, with a container that has a device.
struct Stage {
    directory: tempfile::TempDir,
    _container: Container,
}

impl Stage {
    fn new() -> Stage {
        let directory = tempfile::tempdir().unwrap();
        install(&["--prefix", directory.path().to_str().unwrap(), "--binary", BINARY]).ok();
        let container = Container::start("crun", "completed", &[]);
        qm(&["attach", "completed", "/dev/tty21", "/dev/inside"]).ok();
        Stage { directory, _container: container }
    }

    fn prefix(&self) -> &Path {
        self.directory.path()
    }

    /// A shell that finds the installation where it looks.
    fn shell(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let path = std::env::var("PATH").unwrap();
        command
            .env("PATH", format!("{}/bin:{path}", self.prefix().display()))
            .env("XDG_DATA_DIRS", format!("{}/share:/usr/share", self.prefix().display()))
            .env("HOME", self.prefix())
            .env("ZDOTDIR", self.prefix())
            .env("TERM", "dumb");
        command
    }

    /// Types at the prompt of an interactive shell, which `script` gives a terminal, and returns what stands there until
    /// `end` does.
    fn typed(&self, shell: &str, keys: &str, end: &str) -> String {
        let mut command = self.shell("timeout");
        command.args(["20", "script", "--quiet", "--flush", "--echo", "never", "--command", shell, "/dev/null"]);
        let mut terminal = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (mut input, mut output) = (terminal.stdin.take().unwrap(), terminal.stdout.take().unwrap());
        let mut shown = Vec::new();
        let mut until = |text: &str, shown: &mut Vec<u8>| {
            let mut block = [0; 4096];
            while !String::from_utf8_lossy(shown).contains(text) {
                let length = output.read(&mut block).unwrap();
                assert!(length > 0, "{shell} ended: {}", String::from_utf8_lossy(shown));
                shown.extend(&block[..length]);
            }
        };
        until("ready> ", &mut shown);
        shown.clear();
        input.write_all(keys.as_bytes()).unwrap();
        until(end, &mut shown);
        terminal.kill().unwrap();
        terminal.wait().unwrap();
        String::from_utf8(shown).unwrap()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        release();
    }
}

/// What Bash and zsh insert is run as it then stands there; with what the command prints where all is as it should be.
const COMPLETED: [(&str, &str); 5] = [
    ("qm-hotplug list comple\t", "/dev/tty21"),
    ("qm-hotplug list podman:comple\t", "/dev/tty21"),
    // As behind `sudo`, which is not everywhere.
    ("nice qm-hotplug list podman:comple\t", "/dev/tty21"),
    ("qm-hotplug verify completed /dev/in\t", "/dev/inside is accessible"),
    ("qm-hotplug devices devname=/dev/nul\t", "c 1:3"),
];

pub(crate) fn shells_complete_what_is_there() {
    let stage = Stage::new();
    let file = |name: &str, text: &str| std::fs::write(stage.prefix().join(name), text).unwrap();
    file("bashrc", "source /usr/share/bash-completion/bash_completion\nPS1='ready> '\n");
    let functions = stage.prefix().join("share/zsh/site-functions");
    let fpath = functions.display();
    file(".zshrc", &format!("PS1='ready> '\nfpath=({fpath} $fpath)\nautoload -Uz compinit\ncompinit -u -D\n"));
    let bash = format!("bash --noprofile --rcfile {} -i", stage.prefix().join("bashrc").display());
    for shell in [&bash, "zsh -i"] {
        for (keys, expected) in COMPLETED {
            let shown = stage.typed(shell, &format!("{keys}; echo code=$?\n"), "code=0");
            assert!(shown.contains(expected), "{shell}: {keys}: {shown}");
        }
    }
    for (line, expected) in [
        ("qm-hotplug list comple", "completed\tpodman "),
        ("qm-hotplug list podman:comple", "podman:completed\tpodman "),
        ("qm-hotplug detach completed /dev/in", "/dev/inside"),
        ("qm-hotplug attach completed /dev/tty2", "/dev/tty21"),
        ("qm-hotplug devices devname=/dev/nul", "devname=/dev/null"),
        ("env qm-hotplug list comple", "completed\tpodman "),
    ] {
        let said: Said =
            stage.shell("fish").args(["--command", "complete --do-complete $argv", line]).output().unwrap().into();
        assert!(said.stdout.lines().any(|offered| offered.starts_with(expected)), "{line}: {said:?}");
    }
}

/// Asks as a shell's function does.
fn asked(words: &[&str], as_nobody: bool) -> Said {
    let mut command = Command::new(BINARY);
    if as_nobody {
        command.uid(65534).gid(65534);
    }
    let index = (words.len() - 1).to_string();
    command.env("COMPLETE", "bash").env("_CLAP_IFS", "\n").env("_CLAP_COMPLETE_INDEX", index).arg("--").args(words);
    command.output().unwrap().into()
}

pub(crate) fn completion_is_silent_and_changes_nothing() {
    let stage = Stage::new();
    let before = support::grants();
    for as_nobody in [false, true] {
        for words in [
            &["qm-hotplug", ""][..],
            &["qm-hotplug", "list", ""],
            &["qm-hotplug", "attach", "completed", ""],
            &["qm-hotplug", "attach", "completed", "usb="],
            &["qm-hotplug", "detach", "completed", ""],
            &["qm-hotplug", "explain", "no such container", "/dev/x"],
            &["qm-hotplug", "devices", "parent=(("],
            &["qm-hotplug", "--nothing", "\u{1b}[2J"],
        ] {
            let said = asked(words, as_nobody);
            assert_eq!((said.code, said.stderr.as_str()), (0, ""), "{words:?}: {said:?}");
        }
    }
    let offered =
        |words: &[&str], as_nobody| asked(words, as_nobody).ok().lines().map(str::to_owned).collect::<Vec<_>>();
    let of_container = offered(&["qm-hotplug", "detach", "completed", "/"], false);
    assert_eq!(of_container, ["/dev/inside"]);
    assert!(offered(&["qm-hotplug", "attach", "completed", "/dev/tty2"], true).contains(&"/dev/tty21".into()));
    assert_eq!(offered(&["qm-hotplug", "list", "comple"], true), [""; 0], "root's containers are not a user's to know");
    // A container's start goes on whatever its engine has in its environment.
    let mut hook = Command::new(BINARY);
    let mut hook =
        hook.arg("precreate").env("COMPLETE", "bash").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    hook.stdin.take().unwrap().write_all(br#"{"linux":{}}"#).unwrap();
    let said: Said = hook.wait_with_output().unwrap().into();
    assert_eq!(said.ok().trim(), r#"{"linux":{}}"#);
    assert_eq!(support::grants(), before);
    assert!(qm(&["status", "--json"]).ok().contains("\"agent\":false"));
    drop(stage);
}
