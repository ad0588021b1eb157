use super::*;
use crate::core::host::{Agent, Found};

/// A host where all is well.
fn well() -> Facts {
    let hook = hook_file("/usr/share/containers/oci/hooks.d/qm-hotplug.json", "/usr/bin/qm-hotplug", "precreate");
    Facts {
        program: "/usr/bin/qm-hotplug".into(),
        rights: Ok(()),
        release: "6.12.1".into(),
        takes_filter: Some(Ok(())),
        cgroup: Ok(Cgroup { path: "/sys/fs/cgroup".into(), has_v1_devices: false }),
        filter: Some(Ok(Filter { attached: true, after: vec![], grants: 2 })),
        has_udev_socket: true,
        has_udevd: true,
        hook_directories: ["/usr/share/containers/oci/hooks.d", "/etc/containers/oci/hooks.d"]
            .map(str::to_owned)
            .to_vec(),
        hooks: vec![HookFile { program: HookProgram::Ours, ..hook }],
        service: Service { has_systemd: true, installed: true, enabled: true },
        agent: Some(Ok(Some(Agent { version: env!("CARGO_PKG_VERSION").into(), configuration: vec![] }))),
        configuration: Some(vec![]),
        engines: vec![Engine { name: "podman", state: vec!["/run/crun"] }],
        containers: Some(vec![Found { name: "web".into(), problem: None }]),
        rivals: vec![],
        security: vec![],
    }
}

fn hook_file(path: &str, program: &str, stage: &str) -> HookFile {
    let definition = Ok(Definition { program: program.into(), stages: vec![stage.into()] });
    HookFile { path: path.into(), definition, program: HookProgram::Other }
}

/// Asserts that but for these lines nothing is wrong: topic, state, a part of the finding, a part of the remedy.
#[track_caller]
fn assert_wrong(facts: &Facts, expected: &[(&str, State, &str, &str)]) {
    let lines = lines(facts);
    let wrong: Vec<_> = lines.iter().filter(|line| line.state != State::Ok).collect();
    assert_eq!(wrong.len(), expected.len(), "{wrong:#?}");
    for (line, (topic, state, finding, remedy)) in wrong.into_iter().zip(expected) {
        assert_eq!((line.topic, line.state), (*topic, *state), "{line:?}");
        assert!(line.finding.contains(finding), "{finding:?} in {line:?}");
        assert!(line.remedy.as_ref().is_some_and(|its| its.contains(remedy)), "{remedy:?} in {line:?}");
    }
    assert!(lines.iter().all(|line| line.remedy.is_some() == (line.state != State::Ok)), "{lines:#?}");
}

use State::{Problem, Warning};

#[test]
fn where_all_is_well_each_topic_has_one_line() {
    assert_wrong(&well(), &[]);
    let lines = lines(&well());
    let topics: Vec<&str> = lines.iter().map(|line| line.topic).collect();
    let all = [
        "rights",
        "kernel",
        "cgroup",
        "filter",
        "udev",
        "hook",
        "agent",
        "config",
        "engines",
        "containers",
        "security",
    ];
    assert_eq!(topics, all);
    let json = serde_json::to_string(&lines[0]).unwrap();
    assert_eq!(
        json,
        r#"{"topic":"rights","state":"ok","finding":"root, with all capabilities that are needed","remedy":null}"#
    );
}

#[test]
fn what_takes_root_is_not_guessed() {
    let facts = Facts {
        rights: Err("CAP_SYS_ADMIN is missing".into()),
        takes_filter: None,
        filter: None,
        agent: None,
        configuration: None,
        containers: None,
        ..well()
    };
    let unseen = |topic| (topic, Warning, "not looked at: that takes root's rights", "sudo qm-hotplug doctor");
    let missing = ("rights", Problem, "CAP_SYS_ADMIN is missing", "sudo");
    let topics = ["kernel", "filter", "agent", "config", "containers"];
    assert_wrong(&facts, &[&[missing], &topics.map(unseen)[..]].concat());
}

#[test]
fn kernel_and_cgroups() {
    let refused = "this kernel (5.10) cannot carry the device filter: load its program";
    assert_wrong(
        &Facts { takes_filter: Some(Err(refused.into())), ..well() },
        &[("kernel", Problem, refused, "Linux 6.1")],
    );
    let hybrid = Cgroup { path: "/sys/fs/cgroup/unified".into(), has_v1_devices: true };
    assert_wrong(
        &Facts { cgroup: Ok(hybrid), ..well() },
        &[("cgroup", Warning, "cgroup2 at /sys/fs/cgroup/unified; ", "systemd.unified_cgroup_hierarchy=1")],
    );
    let none = "no cgroup2 hierarchy is mounted: mount one with `mount -t cgroup2 none /sys/fs/cgroup/unified`";
    assert_wrong(
        &Facts { cgroup: Err(none.into()), filter: None, ..well() },
        &[
            ("cgroup", Problem, "no cgroup2 hierarchy is mounted", "mount one with `mount -t cgroup2"),
            ("filter", Warning, "there is no cgroup root", "cgroup"),
        ],
    );
}

#[test]
fn the_filter_is_last_or_somebody_is_named() {
    let with = |filter: Filter| Facts { filter: Some(Ok(filter)), ..well() };
    assert_wrong(&with(Filter::default()), &[]);
    assert_wrong(
        &with(Filter { grants: 3, ..Filter::default() }),
        &[("filter", Problem, "so 3 grants do not hold", "systemctl restart qm-hotplug")],
    );
    let after = vec!["guard".into(), "(no name)".into()];
    assert_wrong(
        &with(Filter { attached: true, after, grants: 0 }),
        &[(
            "filter",
            Warning,
            "guard, (no name) at the cgroup root runs after ours",
            "bpftool cgroup list /sys/fs/cgroup",
        )],
    );
}

#[test]
fn udevd() {
    for (has_udev_socket, has_udevd, finding) in [
        (true, false, "no udevd runs"),
        (false, true, "without /run/udev/control"),
        (false, false, "devices come from the kernel"),
    ] {
        let facts = Facts { has_udev_socket, has_udevd, ..well() };
        assert_wrong(&facts, &[("udev", Warning, finding, "systemd-udevd")]);
    }
}

#[test]
fn the_hook_is_there_and_starts_this_program() {
    let with = |hooks: Vec<HookFile>| Facts { hooks, ..well() };
    let ours = |stage| HookFile { program: HookProgram::Ours, ..hook_file("/h/x.json", "/opt/oci-qm-x", stage) };
    let none = ("hook", Warning, "none of ours in /usr/share/containers/oci/hooks.d or /etc", "scripts/install.sh");
    assert_wrong(&with(vec![]), &[none]);
    // As one of containers/qm's hooks, by a link.
    assert_wrong(&with(vec![ours("precreate")]), &[]);
    assert_wrong(
        &with(vec![ours("poststop")]),
        &[none, ("hook", Problem, "but not at precreate", "scripts/install.sh")],
    );
    let named = hook_file("/h/qm-hotplug.json", "/opt/bin/qm-hotplug", "precreate");
    assert_wrong(
        &with(vec![named.clone()]),
        &[(
            "hook",
            Warning,
            "/h/qm-hotplug.json starts /opt/bin/qm-hotplug, and this is /usr/bin/qm-hotplug",
            "sudo /opt/bin/qm-hotplug doctor",
        )],
    );
    assert_wrong(
        &with(vec![HookFile { program: HookProgram::Missing, ..named }]),
        &[("hook", Problem, "starts /opt/bin/qm-hotplug, which is no program", "scripts/install.sh")],
    );
}

#[test]
fn hooks_of_others() {
    let with = |hook: HookFile| Facts { hooks: [well().hooks, vec![hook]].concat(), ..well() };
    let path = "/h/a.json";
    let bad = HookFile { definition: Err("not valid JSON: x".into()), ..hook_file(path, "", "") };
    assert_wrong(&with(bad), &[("hook", Problem, "/h/a.json: not valid JSON: x; ", "sudo mv /h/a.json")]);
    let gone = HookFile { program: HookProgram::Missing, ..hook_file(path, "/opt/gone", "prestart") };
    assert_wrong(&with(gone), &[("hook", Problem, "starts /opt/gone, which is no program", "sudo mv /h/a.json")]);
    let shells = hook_file(path, "/usr/libexec/oci/hooks.d/oci-qm-device-manager", "precreate");
    let link = "sudo ln -sf /usr/bin/qm-hotplug /usr/libexec/oci/hooks.d/oci-qm-device-manager";
    assert_wrong(&with(shells), &[("rivals", Warning, "starts containers/qm's /usr/libexec/oci/hooks.d/", link)]);
    for stage in ["precreate", "createRuntime", "prestart"] {
        let other = hook_file(path, "/opt/nvidia", stage);
        let finding = format!("starts /opt/nvidia at {stage}, where it may change");
        assert_wrong(&with(other), &[("rivals", Warning, &finding, "cat /h/a.json")]);
    }
    assert_wrong(&with(hook_file(path, "/opt/mail", "poststop")), &[]);
}

#[test]
fn the_agent_and_its_unit() {
    let with = |agent, service| Facts { agent: Some(agent), service, ..well() };
    let service = |has_systemd, installed, enabled| Service { has_systemd, installed, enabled };
    let agent = |version: &str| Ok(Some(Agent { version: version.into(), configuration: vec![] }));
    let ours = env!("CARGO_PKG_VERSION");
    for (said, service, state, finding, remedy) in [
        (Ok(None), service(true, true, true), Warning, "though it is enabled", "enable --now qm-hotplug"),
        (Ok(None), service(true, true, false), Warning, "not started at boot", "enable --now qm-hotplug"),
        (Ok(None), service(true, false, false), Warning, "unit is not installed", "scripts/install.sh"),
        (Ok(None), service(false, true, true), Warning, "are not followed", "sudo qm-hotplug agent"),
        (agent(ours), service(true, true, false), Warning, "not started at boot", "systemctl enable qm-hotplug"),
        (agent(ours), service(true, false, false), Warning, "not started at boot", "scripts/install.sh"),
        (agent("0.0.1"), service(true, true, true), Warning, "version 0.0.1 runs", "systemctl restart"),
        (Err("it hung up".into()), service(true, true, true), Problem, "it hung up", "systemctl restart"),
    ] {
        assert_wrong(&with(said, service), &[("agent", state, finding, remedy)]);
    }
    assert_wrong(&with(agent(ours), service(false, false, false)), &[]);
}

#[test]
fn each_mistake_in_the_configuration_has_its_line() {
    let wrong = ["/etc/a.toml:2:1: there is no category 'tape'".to_owned(), "/etc/b.toml: Is a directory".to_owned()];
    let mut facts = Facts { configuration: Some(wrong.to_vec()), ..well() };
    let expected = [
        ("config", Problem, &wrong[0][..], "mend /etc/a.toml, then"),
        ("config", Problem, &wrong[1][..], "mend /etc/b.toml, then"),
    ];
    assert_wrong(&facts, &expected);
    facts.configuration = Some(vec![]);
    facts.agent = Some(Ok(Some(Agent { version: env!("CARGO_PKG_VERSION").into(), configuration: wrong.to_vec() })));
    assert_wrong(&facts, &[("config", Warning, "found /etc/a.toml:2:1", "sudo qm-hotplug reload")]);
}

#[test]
fn engines_and_containers() {
    assert_wrong(&Facts { engines: vec![], ..well() }, &[("engines", Warning, "none is installed", "podman")]);
    let engine = |name, state| Engine { name, state };
    let facts =
        Facts { engines: vec![engine("podman", vec!["/run/crun", "/run/runc"]), engine("lxc", vec![])], ..well() };
    let listed = lines(&facts).into_iter().find(|line| line.topic == "engines").unwrap().finding;
    assert_eq!(listed, "podman (/run/crun, /run/runc), lxc");
    let found = |count: usize, bad: usize| {
        let problem = |n| (n < bad).then(|| format!("container 'c{n}': it has no cgroup of its own"));
        (0..count).map(|n| Found { name: format!("c{n}"), problem: problem(n) }).collect::<Vec<_>>()
    };
    let of = |count, bad| Facts { containers: Some(found(count, bad)), ..well() };
    let summary = |facts: &Facts| lines(facts).iter().find(|line| line.topic == "containers").unwrap().finding.clone();
    assert_eq!(summary(&of(0, 0)), "none runs");
    assert_eq!(summary(&of(3, 0)), "3 found, and all can be served");
    assert_eq!(summary(&of(3, 1)), "3 found, and 2 can be served");
    assert_wrong(&of(3, 1), &[("containers", Warning, "container 'c0': it has no cgroup", "start c0 in another way")]);
    let count = |bad| lines(&of(20, bad)).iter().filter(|line| line.topic == "containers").count();
    assert_eq!((count(10), count(11), count(20)), (11, 12, 12));
    assert_eq!(lines(&of(20, 13)).iter().rev().nth(1).unwrap().finding, "3 more cannot be served");
}

#[test]
fn container_hotplug_and_security_modules() {
    let rivals = vec![
        Rival::Process(17),
        Rival::Configuration("/etc/docker/daemon.json".into()),
        Rival::Program("/usr/local/bin/container-hotplug".into()),
    ];
    assert_wrong(
        &Facts { rivals, ..well() },
        &[
            ("rivals", Warning, "as process 17", "without it"),
            ("rivals", Warning, "/etc/docker/daemon.json has", "grep -n container-hotplug /etc/docker/daemon.json"),
            ("rivals", Warning, "is installed", "sudo rm /usr/local/bin/container-hotplug"),
        ],
    );
    let facts = Facts { security: vec!["SELinux is enforcing"], ..well() };
    assert!(lines(&facts).last().unwrap().finding.starts_with("SELinux is enforcing; "));
}
