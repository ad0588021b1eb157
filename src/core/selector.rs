//! Selectors: which device is meant.
//!
//! ```text
//! request  = item *( ( "," / ";" ) item )      ; at least one term without "!="; an option once, but for link
//! item     = term / option                     ; options: see core::selection
//! term     = simple / "parent" ( "=" / "!=" ) ( simple / "(" simple *( ( "," / ";" ) simple ) ")" )
//! simple   = CATEGORY                          ; a category's name
//!          / key ( "=" / "!=" ) value
//! key      = "subsystem" / "devname" / "driver" / "usb" / "serial" / "model" / "vendor" / "id_path" / "port" / "pci"
//!          / "seat" / "tag" / "category" / "env." NAME / "attr." NAME / "attrs." NAME
//! value    = 1*( any character but , ; ( ) " \ / "\" ANY ) / DQUOTE *( any character but DQUOTE and \ / "\" ANY ) DQUOTE
//! ```
//!
//! A value is a glob ([`crate::core::glob`]). White space around an item and behind `=` does not count. All terms must match. A key
//! stands for any number of values of a device: `=` is true if one of them fits, `!=` if none does.

use std::fmt;
use std::sync::Arc;

use crate::core::category::{Category, is_forbidden};
use crate::core::facts::Facts;
use crate::core::glob::Glob;
use crate::core::grammar::FLAGS;
use crate::core::seat;

/// Which devices are meant: those that all terms match.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Selector {
    /// At least one, where it was read.
    pub terms: Vec<Term>,
    /// Categories of devices that it does not mean: of those that have to be enabled, the ones that are not or that it does
    /// not ask for in so many words. `usb=` means a stick's tty, and not the stick's raw node.
    pub withheld: Vec<Arc<Category>>,
}

/// One condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Term {
    /// Whether it is `!=`.
    pub negated: bool,
    /// What is looked at, and what is wanted of it.
    pub test: Test,
}

/// What is looked at, and what is wanted of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Test {
    /// One of the device's values of that key fits the glob.
    Value(Key, Glob),
    /// The USB device that it is or belongs to: vendor, product, serial number, interface, as far as they are given.
    Usb(Vec<Glob>),
    /// It is in the category.
    Category(Arc<Category>),
    /// It is below a USB hub that these terms match, or that a USB device is plugged into that they match.
    Parent(Vec<Term>),
}

/// A kind of values that a device has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key {
    /// The kernel's subsystem.
    Subsystem,
    /// The node's path, with and without `/dev/`, and udev's links to it.
    Devname,
    /// The drivers of it and of all above it, like udev's `DRIVERS`.
    Driver,
    /// udev's `ID_SERIAL_SHORT`, and the USB device's own `serial`.
    Serial,
    /// udev's `ID_MODEL`, and the USB device's own `product`.
    Model,
    /// udev's `ID_VENDOR`, and the USB device's own `manufacturer`.
    Vendor,
    /// udev's `ID_PATH`.
    IdPath,
    /// Where its USB device is plugged in, `1-1.2`.
    Port,
    /// The PCI devices that it is or is behind.
    Pci,
    /// The seat that it belongs to.
    Seat,
    /// udev's current tags.
    Tag,
    /// A property of udev's.
    Env(String),
    /// An attribute of its directory in `/sys`.
    Attr(String),
    /// An attribute of its directory in `/sys` or of one above it, like udev's `ATTRS`.
    Attrs(String),
}

/// The keys without a name behind them.
pub static KEYS: [(&str, Key); 11] = [
    ("subsystem", Key::Subsystem),
    ("devname", Key::Devname),
    ("driver", Key::Driver),
    ("serial", Key::Serial),
    ("model", Key::Model),
    ("vendor", Key::Vendor),
    ("id_path", Key::IdPath),
    ("port", Key::Port),
    ("pci", Key::Pci),
    ("seat", Key::Seat),
    ("tag", Key::Tag),
];

/// The keys whose values are more than a glob: USB ids, a hub's terms, a category.
pub const SPECIAL_KEYS: [&str; 3] = ["usb", "parent", "category"];

/// What the keys with a name behind them begin with.
pub const KEY_PREFIXES: [&str; 3] = ["env.", "attr.", "attrs."];

impl Selector {
    /// Whether the device is meant.
    pub fn matches(&self, facts: &Facts<'_>) -> bool {
        !self.is_withheld(facts) && self.terms.iter().all(|term| term.matches(facts))
    }

    /// Whether it is a device that no selector of this container means, whatever its terms.
    pub fn is_withheld(&self, facts: &Facts<'_>) -> bool {
        let device = facts.device;
        is_forbidden(device.number) || self.withheld.iter().any(|category| category.reaches(device))
    }

    /// The first term that does not match, or in words why none counts.
    pub fn failing(&self, facts: &Facts<'_>) -> Option<String> {
        if is_forbidden(facts.device.number) {
            return Some("it is the host itself, and no rule means it".into());
        }
        if self.is_withheld(facts) {
            return Some("devices of its kind have to be asked for by their category, and enabled on this host".into());
        }
        self.terms.iter().find(|term| !term.matches(facts)).map(ToString::to_string)
    }

    /// Whether udev's rules could still make it mean another device, or one less.
    pub fn needs_udev(&self) -> bool {
        self.terms.iter().any(|term| match &term.test {
            Test::Usb(_) | Test::Category(_) => false,
            Test::Value(Key::Subsystem | Key::Driver | Key::Port | Key::Pci | Key::Attr(_) | Key::Attrs(_), _) => false,
            Test::Value(Key::Seat | Key::IdPath, _) | Test::Parent(_) => true,
            // What fits one value fits when there are more.
            Test::Value(..) => term.negated,
        })
    }

    /// Whether other devices decide on it, too: then it has to be looked at again when one of them comes or goes.
    pub fn looks_around(&self) -> bool {
        self.terms.iter().any(|term| matches!(term.test, Test::Parent(_)))
    }
}

impl Term {
    /// Whether it asks for that kind of devices in so many words.
    pub(super) fn names(&self, category: &Category) -> bool {
        !self.negated
            && match &self.test {
                Test::Category(its) => its.name == category.name,
                Test::Value(Key::Subsystem, glob) => glob.literal().is_some(),
                Test::Value(Key::Devname, glob) => {
                    glob.to_string().starts_with(|one: char| one.is_alphanumeric() || one == '/')
                }
                _ => false,
            }
    }

    /// Whether the device is as the term wants it.
    pub fn matches(&self, facts: &Facts<'_>) -> bool {
        self.test.matches(facts) != self.negated
    }
}

impl Test {
    fn matches(&self, facts: &Facts<'_>) -> bool {
        match self {
            Test::Value(key, glob) => key.any(facts, &mut |value| glob.matches(value)),
            Test::Usb(globs) => facts.usb().is_some_and(|usb| {
                globs.iter().enumerate().all(|(at, glob)| match at {
                    0 => glob.matches(&usb.vendor_id),
                    1 => glob.matches(&usb.product_id),
                    2 => glob.matches(&facts.usb_text("serial").unwrap_or_default()),
                    _ => glob.matches(usb.interface.as_deref().unwrap_or_default()),
                })
            }),
            Test::Category(category) => category.contains(facts.device),
            Test::Parent(terms) => facts.hubs().iter().any(|plugged| {
                plugged.iter().any(|other| {
                    let its = facts.of(other);
                    terms.iter().all(|term| term.matches(&its))
                })
            }),
        }
    }
}

impl Key {
    /// All values that the device has of it.
    pub fn values(&self, facts: &Facts<'_>) -> Vec<String> {
        let mut all = Vec::new();
        self.any(facts, &mut |value| {
            all.push(value.to_owned());
            false
        });
        all
    }

    /// Whether a value passes the test.
    fn any(&self, facts: &Facts<'_>, test: &mut dyn FnMut(&str) -> bool) -> bool {
        let device = facts.device;
        match self {
            Key::Subsystem => test(&device.subsystem),
            Key::Devname => {
                let links = facts.property("DEVLINKS").unwrap_or_default().split_whitespace();
                std::iter::once(device.node.as_str())
                    .chain(links)
                    .any(|path| test(path) || path.strip_prefix("/dev/").is_some_and(&mut *test))
            }
            Key::Driver => facts.drivers().iter().any(|driver| test(driver)),
            Key::Serial => either(facts.property("ID_SERIAL_SHORT"), || facts.usb_text("serial"), test),
            Key::Model => named(facts.property("ID_MODEL"), || facts.usb_text("product"), test),
            Key::Vendor => named(facts.property("ID_VENDOR"), || facts.usb_text("manufacturer"), test),
            Key::IdPath => facts.id_path().is_some_and(test),
            Key::Port => facts.usb().is_some_and(|usb| test(usb.port())),
            Key::Pci => facts.pci().iter().any(|place| test(place)),
            Key::Seat => seat::of(device).is_some_and(test),
            Key::Tag => seat::tags(device).any(test),
            Key::Env(name) => facts.property(name).is_some_and(test),
            Key::Attr(name) => facts.attribute(name).is_some_and(|value| test(&value)),
            Key::Attrs(name) => facts.attributes(name).iter().any(|value| test(value)),
        }
    }
}

fn either(first: Option<&str>, second: impl Fn() -> Option<String>, test: &mut dyn FnMut(&str) -> bool) -> bool {
    first.is_some_and(&mut *test) || second().is_some_and(|value| test(&value))
}

/// udev's form of a name, the name itself, and the name in udev's form: udev does not look at every node.
fn named(of_udev: Option<&str>, own: impl Fn() -> Option<String>, test: &mut dyn FnMut(&str) -> bool) -> bool {
    either(of_udev, &own, test) || own().is_some_and(|name| test(&in_udevs_form(&name)))
}

/// As udev writes names of makers and models (`udev_replace_whitespace` and `udev_replace_chars` in systemd).
fn in_udevs_form(name: &str) -> String {
    let plain = |one: char| one.is_ascii_alphanumeric() || "#+-.:=@_/".contains(one) || !one.is_ascii();
    let words = name.split_whitespace().collect::<Vec<_>>().join("_");
    words.chars().map(|one| if plain(one) { one } else { '_' }).collect()
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Key::Env(name) => write!(f, "env.{name}"),
            Key::Attr(name) => write!(f, "attr.{name}"),
            Key::Attrs(name) => write!(f, "attrs.{name}"),
            other => f.write_str(KEYS.iter().find(|(_, key)| key == other).expect("the table has it").0),
        }
    }
}

/// As it is written: reading it gives the same term.
impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let equals = if self.negated { "!=" } else { "=" };
        match &self.test {
            Test::Value(key, glob) => write!(f, "{key}{equals}{}", quoted(&glob.to_string())),
            Test::Usb(globs) => {
                let text = globs.iter().map(ToString::to_string).collect::<Vec<_>>().join(":");
                write!(f, "usb{equals}{}", quoted(&text))
            }
            // A bare word that is an option's would be that.
            Test::Category(category) if self.negated || FLAGS.contains(&&*category.name) => {
                write!(f, "category{equals}{}", category.name)
            }
            Test::Category(category) => f.write_str(&category.name),
            Test::Parent(terms) => write!(f, "parent{equals}({})", Listed(terms)),
        }
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Listed(&self.terms).fmt(f)
    }
}

struct Listed<'a>(&'a [Term]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().enumerate().try_for_each(|(at, term)| {
            let comma = if at == 0 { "" } else { "," };
            write!(f, "{comma}{term}")
        })
    }
}

/// The value in quotes, where it needs them. A quote in it has its `\` already.
pub(super) fn quoted(value: &str) -> String {
    let needs = value.is_empty() || value.trim() != value || value.contains([',', ';', '(', ')', '"']);
    if needs { format!("\"{value}\"") } else { value.to_owned() }
}
