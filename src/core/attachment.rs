//! What a person attached for good: devices of a container, in a file of their own, which outlive its restarts and the
//! machine's.

use serde::{Deserialize, Serialize};

use crate::core::category::Categories;
use crate::core::container::{Container, Runtime};
use crate::core::destination;
use crate::core::device::{Access, Number};
use crate::core::facts::Facts;
use crate::core::grammar::{Author, selection};
use crate::core::ledger::{Holder, Node};
use crate::core::page::escaped;
use crate::core::page::of_version;
use crate::core::rule::Rule;
use crate::core::selection::Options;
use crate::core::selector::quoted;
use crate::core::text::excerpt;

/// Version of the format of these files.
pub const VERSION: u32 = 1;

/// A container as it is known over its restarts: by its name, or by its id where it has none or where the name is not
/// unique in its engine (`containerd:NAMESPACE/NAME`). One that another user, or
/// another runtime, gives the same name is another one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lasting {
    /// Its name.
    pub name: String,
    /// Which runtime's state it is found in.
    pub runtime: Runtime,
    /// The user who runs it.
    pub owner: u32,
}

impl Lasting {
    /// `None` for one that is only a process.
    pub fn of(container: &Container) -> Option<Lasting> {
        let Container { name, id, runtime, owner, .. } = container;
        // An id that names the engine is unique on the host, which a name in one of its namespaces is not.
        let name =
            if id.starts_with(&format!("{}:", runtime.engine())) { id } else { name.as_ref().unwrap_or(id) }.clone();
        (*runtime != Runtime::Pid).then_some(Lasting { name, runtime: *runtime, owner: *owner })
    }
}

/// The file of one container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// [`VERSION`].
    pub version: u32,
    /// Whose.
    pub container: Lasting,
    /// What it has, one a path.
    pub devices: Vec<Attachment>,
}

/// One device for good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    /// `DEV` as typed.
    pub typed: String,
    /// The selector with options that means it.
    pub selection: String,
    /// The device's node on the host when it was attached.
    pub device: String,
    /// Its number then.
    pub number: Number,
    /// The node inside.
    pub node: Node,
    /// The rights.
    pub access: Access,
}

impl Attachment {
    /// For a device that was named so, by a path or by the selector that is given. The error says in words why that
    /// cannot be kept. Of `options`, what was asked for counts; the node is as it is now.
    pub fn new(
        device: &Facts<'_>,
        typed: &str,
        selector: Option<&str>,
        options: &Options,
        node: &Node,
        categories: &Categories,
    ) -> Result<Attachment, String> {
        let terms = match selector {
            Some(terms) => terms.to_owned(),
            None => terms_of(device, typed)?,
        };
        let attachment = Attachment {
            typed: typed.to_owned(),
            selection: format!("{terms},{options}"),
            device: device.device.node.clone(),
            number: device.device.number,
            node: node.clone(),
            access: options.access.unwrap_or(Access::ALL),
        };
        match attachment.rule(categories)?.matches(device) {
            Some(_) => Ok(attachment),
            None => Err(format!("'{}' does not mean {}", excerpt(&attachment.selection), attachment.device)),
        }
    }

    /// The rule that the container has by it.
    pub fn rule(&self, categories: &Categories) -> Result<Rule, String> {
        let read = selection(&excerpt(&self.typed), &self.selection, categories, Author::Root);
        let mut read = read.map_err(|error| format!("'{}': {error}", excerpt(&self.selection)))?;
        if read.options.path.as_deref() != Some(&self.node.path) {
            return Err(format!("'{}' has no as={}", excerpt(&self.selection), excerpt(&self.node.path)));
        }
        read.persist = true;
        Ok(Rule::Selection(read.into()))
    }

    /// Whether a person means it by that: the path inside, `DEV` as typed, or the device's node.
    pub fn is_named(&self, text: &str) -> bool {
        [&self.node.path, &self.typed, &self.device].into_iter().any(|its| its == text)
    }
}

/// Terms that mean a device by the path that was typed: never another device. A link of udev's means what udev gives that
/// name. The device's own name is given anew at each plug: with it, make, serial number and place have to be the same.
fn terms_of(device: &Facts<'_>, typed: &str) -> Result<String, String> {
    let node = &device.device.node;
    let mut links = device.property("DEVLINKS").unwrap_or_default().split_whitespace();
    if typed != node {
        return match links.any(|link| link == typed) {
            true => Ok(term("devname", typed)),
            false => Err(format!(
                "udev does not know {typed} as a link to {node}, so it may lead elsewhere after a restart: name {node} itself, one of udev's links, or a selector"
            )),
        };
    }
    let mut terms = vec![term("subsystem", &device.device.subsystem), term("devname", node)];
    match device.usb() {
        Some(usb) => {
            terms.push(format!("usb={}:{}", usb.vendor_id, usb.product_id));
            let serial = device.usb_text("serial").filter(|serial| !serial.is_empty());
            terms.extend(serial.map(|serial| term("serial", &serial)));
            terms.push(term("port", usb.port()));
            terms.extend(usb.interface.iter().map(|number| term("attrs.bInterfaceNumber", number)));
            terms.extend(device.attribute("index").map(|index| term("attr.index", &index)));
        }
        None => terms.push(term("env.DEVPATH", &device.device.identity.devpath)),
    }
    Ok(terms.join(","))
}

/// A term for exactly this value.
fn term(key: &str, value: &str) -> String {
    let escaped = value.chars().flat_map(|one| "*?[]\\\"".contains(one).then_some('\\').into_iter().chain([one]));
    format!("{key}={}", quoted(&escaped.collect::<String>()))
}

impl Attached {
    /// Nothing yet.
    pub fn new(container: Lasting) -> Attached {
        Attached { version: VERSION, container, devices: Vec::new() }
    }

    /// Reads the file with that name. Errors are in words.
    pub fn parse(name: &str, text: &[u8]) -> Result<Attached, String> {
        let read: Attached = of_version(text, VERSION)?;
        if file_name(&read.container) != name {
            return Err(format!("it tells of container '{}'", excerpt(&read.container.name)));
        }
        let paths = read.devices.iter().map(|device| &device.node.path);
        for (at, path) in paths.clone().enumerate() {
            if destination::check(path).as_ref() != Ok(path) || paths.clone().skip(at + 1).any(|other| other == path) {
                return Err(format!("'{}' is no path of a node, or is in it twice", excerpt(path)));
            }
        }
        Ok(read)
    }

    /// Whether it is of this container.
    pub fn is_for(&self, container: &Container) -> bool {
        Lasting::of(container).as_ref() == Some(&self.container)
    }

    /// Whether it may be of the container of a grant, of which less is known.
    pub fn may_be_of(&self, holder: &Holder) -> bool {
        holder.name.as_ref().unwrap_or(&holder.id) == &self.container.name
    }
}

/// The name of a container's file.
pub fn file_name(container: &Lasting) -> String {
    format!("{}-{}-{}.json", container.runtime, container.owner, escaped(&container.name))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::core::facts::tests::{Tree, bench, of_bench};
    use crate::core::plan::tests::device;

    #[test]
    fn a_name_that_is_not_unique_is_not_what_it_is_known_by() {
        let container = |id: &str, name: &str, runtime| Container {
            id: id.into(),
            name: Some(name.into()),
            runtime,
            pid: 1,
            start_time: 1,
            cgroup: None,
            annotations: Default::default(),
            devices: Vec::new(),
            bundle: None,
            image: None,
            owner: 0,
        };
        let name = |container: &Container| Lasting::of(container).unwrap().name;
        assert_eq!(name(&container("containerd:a/db", "db", Runtime::Containerd)), "containerd:a/db");
        assert_eq!(name(&container("lxc:/srv/lxc/web", "web", Runtime::Lxc)), "lxc:/srv/lxc/web");
        assert_eq!(name(&container(&"ab".repeat(32), "web", Runtime::Docker)), "web");
        assert_eq!(name(&container(&"ab".repeat(32), "web", Runtime::Crun)), "web");
    }

    fn options(path: &str) -> Options {
        Options { path: Some(path.into()), access: Some(Access::READ), ..Options::default() }
    }

    fn kept(tree: &Tree, node: &str, typed: &str) -> Result<Attachment, String> {
        let facts = Facts::new(of_bench(tree, node), tree);
        let categories = Categories::default();
        Attachment::new(&facts, typed, None, &options("/dev/stick"), &Node::at("/dev/stick"), &categories)
    }

    #[test]
    fn a_plain_path_means_that_device_in_that_place_and_no_other() {
        let mut tree = bench();
        let attachment = kept(&tree, "/dev/ttyUSB1", "/dev/ttyUSB1").unwrap();
        assert_eq!(
            attachment.selection,
            "subsystem=tty,devname=/dev/ttyUSB1,usb=10c4:ea60,serial=A1B2,port=1-1.1,attrs.bInterfaceNumber=00,as=/dev/stick,access=r"
        );
        let rule = attachment.rule(&Categories::default()).unwrap();
        for node in tree.devices.values() {
            let is_it = node.node == "/dev/ttyUSB1";
            assert_eq!(rule.matches(&Facts::new(node, &tree)).is_some(), is_it, "{}", node.node);
        }
        // Another stick of that make where it was.
        let serial = tree.files.iter().find(|(_, text)| *text == "A1B2").unwrap().0.clone();
        tree.files.insert(serial, "C3D4".into());
        assert!(rule.matches(&Facts::new(of_bench(&tree, "/dev/ttyUSB1"), &tree)).is_none());
    }

    #[test]
    fn a_link_means_what_udev_gives_that_name() {
        let mut tree = bench();
        let said = kept(&tree, "/dev/ttyUSB1", "/dev/mine").unwrap_err();
        assert!(said.contains("udev does not know /dev/mine") && said.contains("/dev/ttyUSB1 itself"), "{said}");
        let links = "/dev/serial/by-id/usb-a*b,c /dev/mine";
        let device = tree.devices.values_mut().find(|device| device.node == "/dev/ttyUSB1").unwrap();
        device.properties.insert("DEVLINKS".into(), links.into());
        let attachment = kept(&tree, "/dev/ttyUSB1", "/dev/serial/by-id/usb-a*b,c").unwrap();
        let rule = attachment.rule(&Categories::default()).unwrap();
        assert!(rule.matches(&Facts::new(of_bench(&tree, "/dev/ttyUSB1"), &tree)).is_some());
        let device = tree.devices.values_mut().find(|device| device.node == "/dev/ttyUSB1").unwrap();
        device.properties.insert("DEVLINKS".into(), "/dev/serial/by-id/usb-aXb,c".into());
        assert!(rule.matches(&Facts::new(of_bench(&tree, "/dev/ttyUSB1"), &tree)).is_none());
    }

    #[test]
    fn without_usb_the_place_is_the_directory() {
        let tree = Tree::default().device("/devices/virtual/misc/x", "misc", "/dev/x[1]", (10, 201));
        let mut odd = tree.devices.values().next().unwrap().clone();
        odd.properties.insert("DEVPATH".into(), odd.identity.devpath.clone());
        let facts = Facts::new(&odd, &tree);
        let (options, node) = (options("/dev/y"), Node::at("/dev/y"));
        let attachment = Attachment::new(&facts, "/dev/x[1]", None, &options, &node, &Categories::default()).unwrap();
        assert_eq!(
            attachment.selection,
            "subsystem=misc,devname=/dev/x\\[1\\],env.DEVPATH=/devices/virtual/misc/x,as=/dev/y,access=r"
        );
        let other = device("/dev/x1", 10, 202);
        assert!(attachment.rule(&Categories::default()).unwrap().matches(&Facts::new(&other, &tree)).is_none());
    }

    fn attached() -> Attached {
        let mut all = Attached::new(Lasting { name: "we/b".into(), runtime: Runtime::Crun, owner: 0 });
        all.devices.push(kept(&bench(), "/dev/ttyUSB1", "/dev/ttyUSB1").unwrap());
        all
    }

    #[test]
    fn a_file_that_is_not_of_its_name_or_version_is_none() {
        let mut all = attached();
        let parse = |name: &str, all: &Attached| Attached::parse(name, &serde_json::to_vec(all).unwrap());
        assert_eq!(parse("crun-0-we%2Fb.json", &all).as_ref(), Ok(&all));
        assert!(parse("runc-0-we%2Fb.json", &all).unwrap_err().contains("container 'we/b'"));
        all.devices.push(all.devices[0].clone());
        assert!(parse("crun-0-we%2Fb.json", &all).unwrap_err().contains("twice"));
        all.devices.truncate(1);
        all.devices[0].node.path = "etc".into();
        assert!(parse("crun-0-we%2Fb.json", &all).unwrap_err().contains("no path"));
        all.version = 2;
        assert_eq!(parse("x", &all).unwrap_err(), "it has version 2, this program reads version 1");
    }

    proptest! {
        #[test]
        fn damaged_files_are_errors_or_files(at in 0usize..2000, bytes in proptest::collection::vec(any::<u8>(), 0..6)) {
            let mut text = serde_json::to_vec(&attached()).unwrap();
            let at = at % text.len();
            text.splice(at..(at + bytes.len()).min(text.len()), bytes);
            if let Ok(read) = Attached::parse("crun-0-we%2Fb.json", &text) {
                read.devices.iter().for_each(|device| drop(device.rule(&Categories::default())));
            }
        }
    }
}
