//! The recipes of the README: quadlets, a compose file and LXC, started as they are, but for images and for the stick.

use crate::Case;
use crate::container::Container;
use crate::install::Installed;
use crate::plug::{FIRST_PLUG, plug_stick};
use crate::vm::{SOON, Vm};

pub(crate) const CASES: &[Case] = &[("recipes::get_their_devices", get_their_devices)];

const FILES: &str = "/mnt/repo/tests/fixtures/recipes";
const QUADLETS: [&str; 2] = ["home-assistant", "rear-camera"];

/// What has to be another one here: there is no network to pull images from, none that a bridge of Podman's or Docker's could
/// be on, and the stick is one of qemu's.
const STAND_INS: &str = "\
    -e 's/usb=10c4:ea60/usb=0403:6001/' \
    -e 's#^Image=localhost.*#Network=none\\nRootfs=/var/tmp/recipes\\nExec=sleep 100000#' \
    -e 's#^Image=.*#Rootfs=/var/tmp/recipes\\nExec=sleep 100000#' \
    -e 's#^\\( *\\)image: .*#\\1image: lab:1\\n\\1command: sleep 100000\\n\\1network_mode: none\\n\\1security_opt: [apparmor=unconfined]#'";

/// What the recipes put on the machine; removed on drop.
struct Recipes<'vm>(&'vm Vm);

impl<'vm> Recipes<'vm> {
    #[track_caller]
    fn put(vm: &'vm Vm) -> Self {
        let recipes = Self(vm);
        vm.ok("lab-rootfs /var/tmp/recipes && mkdir -p /etc/containers/systemd /run/compose");
        vm.ok("mkdir -p /etc/qm-hotplug/config.d");
        for (file, to) in [
            ("home-assistant.container", "/etc/containers/systemd/home-assistant.container"),
            ("rear-camera.container", "/etc/containers/systemd/rear-camera.container"),
            ("compose.yaml", "/run/compose/compose.yaml"),
        ] {
            recipes.put_file(file, to);
        }
        recipes
    }

    #[track_caller]
    fn put_file(&self, file: &str, to: &str) {
        self.0.ok(&format!("sed {STAND_INS} {FILES}/{file} >{to}"));
    }
}

impl Drop for Recipes<'_> {
    fn drop(&mut self) {
        self.0.sh("systemctl stop home-assistant rear-camera; rm -rf /etc/containers/systemd /etc/qm-hotplug; \
                   systemctl daemon-reload; podman volume rm home-assistant; \
                   cd /run/compose && docker compose down --timeout 0; rm -rf /run/compose /var/tmp/recipes; \
                   systemctl stop docker.socket docker containerd");
    }
}

fn get_their_devices(vm: &Vm) {
    let _installed = Installed::new(vm);
    let recipes = Recipes::put(vm);
    vm.ok("systemctl start qm-hotplug");
    vm.ok("sudo() { \"$@\"; }; sudo systemctl daemon-reload && sudo systemctl start home-assistant rear-camera");
    vm.ok("systemctl start docker && tar -C /var/tmp/recipes -c . | docker import - lab:1");
    vm.ok("cd /run/compose && docker compose up -d");
    let lxc = "mkdir -p /var/lib/lxc/zigbee && printf '%s\\n' \
               'lxc.include = /usr/share/lxc/config/common.conf' 'lxc.uts.name = zigbee' 'lxc.net.0.type = empty' \
               'lxc.rootfs.path = dir:/var/tmp/recipes' 'lxc.init.cmd = /bin/sleep 100000' \
               'lxc.apparmor.profile = unconfined' >/var/lib/lxc/zigbee/config && lxc-start -n zigbee";
    vm.ok(lxc);
    let running = |name: &str, pid: &str, remove: &str| {
        let mut container = Container::of_other_engine(vm, name, remove.to_owned());
        let look = format!("pid=$({pid}) && test \"$(readlink /proc/$pid/exe)\" = /bin/busybox && echo $pid");
        container.pid = vm.wait_ok(name, SOON, &look).parse().expect("a number");
        container
    };
    let [home_assistant, rear_camera] = QUADLETS.map(|name| {
        let pid = format!("podman inspect --format '{{{{.State.Pid}}}}' {name}");
        running(name, &pid, &format!("systemctl stop {name}"))
    });
    let zigbee2mqtt =
        running("zigbee2mqtt", "docker inspect --format '{{.State.Pid}}' zigbee2mqtt", "docker rm -f zigbee2mqtt");
    let lxc = running("zigbee", "lxc-info -n zigbee -pH", "lxc-stop -k -n zigbee; rm -rf /var/lib/lxc/zigbee");
    recipes.put_file("lxc.toml", "/etc/qm-hotplug/config.d/50-zigbee.toml");
    vm.ok("qm-hotplug reload");

    let with_stick = [&home_assistant, &zigbee2mqtt, &lxc];
    for _ in 0..2 {
        let stick = plug_stick(vm, "LAB1", "/dev/ttyUSB0");
        for container in with_stick {
            container.wait_for("/dev/zigbee");
            assert_eq!(container.open("/dev/zigbee"), "opens", "{}", container.name);
        }
        assert_eq!(rear_camera.open_by_hand("c 188 0"), "Operation not permitted");
        stick.unplug();
        for container in with_stick {
            container.wait_for_no("/dev/zigbee");
            assert_eq!(container.open_by_hand("c 188 0"), "Operation not permitted", "{}", container.name);
        }
    }
    vm.sh_within(FIRST_PLUG, "modprobe vivid n_devs=1");
    rear_camera.wait_for("/dev/video0");
    assert_eq!(rear_camera.open("/dev/video0"), "opens");
    for container in with_stick {
        assert_eq!(container.node("/dev/video0"), "nothing", "{}", container.name);
    }
    vm.wait_ok("all to let go of the camera", FIRST_PLUG, "modprobe -r vivid");
    rear_camera.wait_for_no("/dev/video0");
}
