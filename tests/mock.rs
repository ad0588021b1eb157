//! The hook of test rigs without hardware: what containers/qm's own tests count on, and that the real hook knows none
//! of it. Built with `--features mock-devices` only.

use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

const MOCK: &str = env!("CARGO_BIN_EXE_qm-hotplug-mock");
const REAL: &str = env!("CARGO_BIN_EXE_qm-hotplug");

/// Annotations that stand for one variable each.
const VARIABLES: [(&str, &str); 8] = [
    ("org.containers.qm.device.audio", "TEST_MOCK_AUDIO_DEVICES"),
    ("org.containers.qm.device.video", "TEST_MOCK_VIDEO_DEVICES"),
    ("org.containers.qm.device.input", "TEST_MOCK_INPUT_DEVICES"),
    ("org.containers.qm.device.ttys", "TEST_MOCK_TTYS_DEVICES"),
    ("org.containers.qm.device.ttyUSB", "TEST_MOCK_TTYUSB_DEVICES"),
    ("org.containers.qm.device.dvb", "TEST_MOCK_DVB_DEVICES"),
    ("org.containers.qm.device.radio", "TEST_MOCK_RADIO_DEVICES"),
    ("org.containers.qm.wayland-client.gpu", "TEST_MOCK_GPU_DEVICES"),
];
const AUDIO: (&str, &str) = VARIABLES[0];
const GPU: (&str, &str) = VARIABLES[7];

/// A directory with regular files in the place of devices, and an environment for the hook.
struct Rig {
    directory: TempDir,
    environment: Vec<(&'static str, String)>,
}

impl Rig {
    fn new() -> Rig {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("hook.log").to_str().unwrap().to_owned();
        Rig { directory, environment: vec![("TEST_LOGFILE", log)] }
    }

    fn forced() -> Rig {
        Rig::new().with("FORCE_MOCK_DEVICES", "true")
    }

    fn with(mut self, name: &'static str, value: &str) -> Rig {
        self.environment.push((name, value.to_owned()));
        self
    }

    /// A regular file of that name.
    fn file(&self, name: &str) -> String {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, "").unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("hook.log")).unwrap_or_default()
    }

    /// The program under another name.
    fn link(&self, program: &str, name: &str) -> String {
        let path = self.path(name);
        symlink(program, &path).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn run(&self, command: &mut Command, input: &str) -> Output {
        let mut child = command
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A hook that ends before it has read all is judged by what it says.
        let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
        child.wait_with_output().unwrap()
    }

    /// What `qm-hotplug-mock precreate` makes of it.
    #[track_caller]
    fn edited(&self, spec: &Value) -> Value {
        edited(self.run(Command::new(MOCK).arg("precreate"), &spec.to_string()))
    }
}

#[track_caller]
fn edited(output: Output) -> Value {
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn asking(annotations: &[&str]) -> Value {
    let annotations: serde_json::Map<_, _> = annotations.iter().map(|key| ((*key).to_owned(), json!("true"))).collect();
    json!({"ociVersion": "1.0.2", "annotations": annotations, "linux": {}})
}

/// The paths of the specification's devices.
fn paths(spec: &Value) -> Vec<&str> {
    let devices = spec.pointer("/linux/devices").and_then(Value::as_array);
    devices.into_iter().flatten().map(|device| device["path"].as_str().unwrap()).collect()
}

#[test]
fn each_annotation_takes_the_devices_of_its_variable_and_no_others() {
    let mut rig = Rig::forced();
    for (key, variable) in VARIABLES {
        let files = [1, 2].map(|n| rig.file(&format!("{variable}/{n}")));
        rig = rig.with(variable, &files.join(","));
        let spec = rig.edited(&asking(&[key]));
        assert_eq!(paths(&spec), files, "{key}");
        assert_eq!(spec["linux"]["resources"]["devices"].as_array().unwrap().len(), 2, "{key}");
    }
    let all = rig.edited(&asking(&VARIABLES.map(|(key, _)| key)));
    assert_eq!(paths(&all).len(), 2 * VARIABLES.len());
}

#[test]
fn a_seat_has_the_input_devices_and_the_gpus() {
    let rig = Rig::forced();
    let (event, card) = (rig.file("input/event0"), rig.file("dri/card0"));
    let rig = rig.with("TEST_MOCK_INPUT_DEVICES", &event).with(GPU.1, &card);
    let mut spec = asking(&[]);
    spec["annotations"]["org.containers.qm.wayland.seat"] = json!("seat0");
    let mut expected = [event.as_str(), card.as_str()];
    let edited = rig.edited(&spec);
    let mut found = paths(&edited);
    expected.sort();
    found.sort();
    assert_eq!(found, expected);
}

#[test]
fn forced_files_are_character_devices_with_the_same_numbers_each_time() {
    let rig = Rig::forced();
    let files = ["snd/controlC0", "snd/pcmC0D0p", "snd/timer"].map(|name| rig.file(name));
    let rig = rig.with(AUDIO.1, &files.join(","));
    let spec = rig.edited(&asking(&[AUDIO.0]));
    assert_eq!(rig.edited(&asking(&[AUDIO.0])), spec);
    let devices = spec["linux"]["devices"].as_array().unwrap();
    let number = |entry: &Value| (entry["major"].as_u64().unwrap(), entry["minor"].as_u64().unwrap());
    let mut numbers: Vec<_> = devices.iter().map(number).collect();
    let rules: Vec<_> = spec["linux"]["resources"]["devices"].as_array().unwrap().iter().map(number).collect();
    assert_eq!(rules, numbers);
    assert!(devices.iter().all(|device| device["type"] == "c" && device["fileMode"].is_u64()), "{devices:?}");
    numbers.sort();
    numbers.dedup();
    assert_eq!(numbers.len(), files.len(), "each has numbers of its own");
}

#[test]
fn files_count_only_when_that_is_forced() {
    for force in [None, Some(""), Some("false"), Some("1")] {
        let mut rig = Rig::new();
        if let Some(value) = force {
            rig = rig.with("FORCE_MOCK_DEVICES", value);
        }
        let file = rig.file("snd/timer");
        let rig = rig.with(AUDIO.1, &file);
        assert_eq!(paths(&rig.edited(&asking(&[AUDIO.0]))), [""; 0], "{force:?}");
        assert!(rig.log().contains(&format!("{file}: it is no character device")), "{}", rig.log());
    }
}

#[test]
fn what_is_neither_a_file_nor_a_device_never_counts() {
    let rig = Rig::forced();
    let (file, absent) = (rig.file("snd/timer"), rig.path("absent"));
    let link = rig.link(&file, "link");
    let list = format!("{},,{},{link},{file}", absent.display(), rig.path("snd").display());
    let rig = rig.with(AUDIO.1, &list);
    assert_eq!(paths(&rig.edited(&asking(&[AUDIO.0]))), [file]);
}

#[test]
fn character_devices_have_their_own_numbers_forced_or_not() {
    for rig in [Rig::new(), Rig::forced()] {
        let spec = rig.with(AUDIO.1, "/dev/null,/dev/zero").edited(&asking(&[AUDIO.0]));
        assert_eq!(paths(&spec), ["/dev/null", "/dev/zero"]);
        let minors = [0, 1].map(|at| spec["linux"]["devices"][at]["minor"].as_u64().unwrap());
        assert_eq!(minors, [3, 5]);
    }
}

#[test]
fn the_log_has_the_words_that_tests_look_for() {
    let rig = Rig::forced();
    let file = rig.file("snd/timer");
    let rig = rig.with(AUDIO.1, &file);
    rig.edited(&asking(&[AUDIO.0]));
    let first = rig.log();
    for words in ["qm-device-manager", "QM Device Manager", "completed successfully", file.as_str()] {
        assert!(first.contains(words), "{words}: {first}");
    }
    assert!(!first.contains("wayland"), "{first}");
    rig.edited(&asking(&[AUDIO.0]));
    assert!(rig.log().starts_with(&first) && rig.log().len() > first.len(), "it is appended to: {}", rig.log());
}

#[test]
fn the_gpu_is_logged_by_its_own_hook() {
    let rig = Rig::forced();
    let (timer, render) = (rig.file("snd/timer"), rig.file("dri/renderD128"));
    let rig = rig.with(AUDIO.1, &timer).with(GPU.1, &render);
    rig.edited(&asking(&[GPU.0]));
    let log = rig.log();
    assert!(log.lines().all(|line| line.contains(" - qm-wayland-client-devices - ")), "{log}");
    assert!(log.contains("completed successfully") && log.contains(&render), "{log}");
    rig.edited(&asking(&[AUDIO.0, GPU.0]));
    assert!(rig.log()[log.len()..].contains(" - qm-device-manager - "), "{}", rig.log());
}

#[test]
fn a_log_that_cannot_be_written_keeps_no_container_from_starting() {
    let rig = Rig::forced();
    let file = rig.file("snd/timer");
    let nowhere = rig.path("absent/hook.log").to_str().unwrap().to_owned();
    let rig = rig.with(AUDIO.1, &file).with("TEST_LOGFILE", &nowhere);
    assert_eq!(paths(&rig.edited(&asking(&[AUDIO.0]))), [file]);
}

#[test]
fn its_name_or_the_argument_decides_what_it_does() {
    let rig = Rig::forced();
    let (timer, render) = (rig.file("snd/timer"), rig.file("dri/renderD128"));
    let rig = rig.with(AUDIO.1, &timer).with(GPU.1, &render);
    let both = asking(&[AUDIO.0, GPU.0]);
    let manager = rig.link(MOCK, "oci-qm-device-manager");
    let client = rig.link(MOCK, "oci-qm-wayland-client-devices");
    let under = |name: &str| edited(rig.run(&mut Command::new(name), &both.to_string()));
    assert_eq!(paths(&under(&manager)), [&*timer]);
    assert_eq!(paths(&under(&client)), [&*render]);
    assert_eq!(paths(&rig.edited(&both)), [&*timer, &*render]);
    for arguments in [&[][..], &["attach"], &["precreate", "precreate"]] {
        let output = rig.run(Command::new(MOCK).args(arguments), &both.to_string());
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{arguments:?}: {output:?}");
    }
}

#[test]
fn what_is_not_asked_for_stays_byte_for_byte() {
    let rig = Rig::forced();
    let file = rig.file("snd/timer");
    let rig = rig.with(AUDIO.1, &file);
    for text in [
        "{ \"annotations\": {\"a\":\"b\"} ,\"x\":1e3}\n",
        "{\"annotations\":{\"org.containers.qm.device.audio\":\"no\"}} ",
    ] {
        let output = rig.run(Command::new(MOCK).arg("precreate"), text);
        assert_eq!((output.status.code(), String::from_utf8(output.stdout).unwrap()), (Some(0), text.to_owned()));
    }
}

#[test]
fn what_is_no_specification_is_refused_and_nothing_written() {
    let rig = Rig::forced();
    for text in ["", "no JSON", "{\"annotations\":"] {
        let output = rig.run(Command::new(MOCK).arg("precreate"), text);
        assert!(!output.status.success() && output.stdout.is_empty(), "{text}: {output:?}");
        assert_eq!(String::from_utf8(output.stderr).unwrap().lines().count(), 1, "{text}");
        assert!(rig.log().lines().last().unwrap().contains(" - ERROR - "), "{text}: {}", rig.log());
    }
}

#[test]
fn the_real_hook_knows_none_of_these_variables() {
    let mut rig = Rig::forced();
    for (_, variable) in VARIABLES {
        let file = rig.file(variable);
        rig = rig.with(variable, &format!("{file},/dev/null"));
    }
    let spec = asking(&VARIABLES.map(|(key, _)| key));
    let names = ["oci-qm-device-manager", "oci-qm-wayland-client-devices"].map(|name| rig.link(REAL, name));
    for arguments in [&[REAL, "precreate"][..], &[&names[0]], &[&names[1]]] {
        let spec = edited(rig.run(&mut without_the_hosts_log(arguments), &spec.to_string()));
        let made_up = |path: &&str| *path == "/dev/null" || Path::new(path).starts_with(rig.directory.path());
        assert_eq!(paths(&spec).into_iter().find(made_up), None, "{arguments:?}");
        assert!(!rig.path("hook.log").exists(), "{arguments:?}: {}", rig.log());
    }
}

/// The command, where it is run by root with a /var/log of its own: the real hook has its log there, whatever it is told.
fn without_the_hosts_log(arguments: &[&str]) -> Command {
    let private = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs none /var/log && exec \"$0\" \"$@\""];
    let private = if rustix::process::geteuid().is_root() { &private[..] } else { &[] };
    let words: Vec<&str> = private.iter().chain(arguments).copied().collect();
    let mut command = Command::new(words[0]);
    command.args(&words[1..]);
    command
}
