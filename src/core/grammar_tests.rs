//! Selectors read, printed, and put to devices.

use proptest::prelude::*;

use super::*;
use crate::core::config::ConfigFile;
use crate::core::facts::Facts;
use crate::core::facts::tests::{bench, of_bench};
use crate::core::selection::Matched;

fn read(text: &str) -> Result<Selection, String> {
    selection("x", text, &Categories::default(), Author::Container).map_err(|error| error.to_string())
}

/// The nodes of the bench that a selector means.
fn meant(text: &str) -> Vec<String> {
    let (tree, selection) = (bench(), read(text).unwrap());
    let matches = |device: &&crate::core::device::Device| selection.matches(&Facts::new(device, &tree)).is_some();
    let mut nodes: Vec<String> = tree.devices.values().filter(matches).map(|device| device.node.clone()).collect();
    nodes.sort();
    nodes
}

#[test]
fn each_key_means_what_it_says() {
    let (one, ten, event, raw) = ("/dev/ttyUSB1", "/dev/ttyUSB10", "/dev/input/event3", "/dev/hidraw0");
    for (text, expected) in [
        ("ttyUSB", &[one, ten][..]),
        ("tty", &[one, ten]),
        ("category=hidraw", &[raw]),
        ("ttyUSB,devname!=ttyUSB1", &[ten]),
        ("subsystem=tty", &[one, ten]),
        ("subsystem=[ti]*", &[event, one, ten]),
        ("devname=/dev/ttyUSB1", &[one]),
        ("devname=ttyUSB1", &[one]),
        ("devname=ttyUSB?*", &[one, ten]),
        ("devname=input/*", &[event]),
        ("driver=cp210x", &[one, ten]),
        ("driver=hid-*", &[raw, event]),
        ("usb=10c4:ea60", &[one, ten]),
        ("usb=10C4:EA60:A1B2", &[one]),
        ("usb=10c4:*:C3*:0", &[ten]),
        ("usb=10c4:ea60:*:01", &[]),
        ("usb=*:*:0000:01:03.1", &[]),
        ("tty; usb=10c4:EA60:C3D4:00", &[ten]),
        ("usb=0627:0001", &[raw, event]),
        ("subsystem=*,usb!=10c4:*", &[raw, event]),
        ("serial=A1B2", &[one]),
        ("serial=0000:01:03.1", &[]),
        ("model=\"CP2102, USB\"", &[one, ten]),
        ("model=QEMU*", &[raw, event]),
        ("vendor=Silicon Labs , serial=C3D4", &[ten]),
        ("vendor=Silicon_Labs,model=CP2102__USB", &[one, ten]),
        ("port=1-1.1", &[one]),
        ("port=1-1", &[]),
        ("port=1-1.*", &[one, ten]),
        ("pci=01:03.1,tty", &[one, ten]),
        ("pci=0000:01:03.1,hidraw", &[raw]),
        ("pci=02/03.1,hidraw", &[raw]),
        ("pci=02,hidraw", &[raw]),
        ("pci=02/03,hidraw", &[]),
        ("subsystem=*,parent=usb=05e3:8608", &[one, ten]),
        ("subsystem=*,parent=(serial=A1B2)", &[one, ten]),
        ("tty,parent=(usb=0627:0001)", &[one, ten]),
        ("hidraw,parent=(usb=05e3:*,port=1-1)", &[]),
        ("hidraw,parent=usb=1d6b:*", &[raw]),
        ("hidraw,parent=port=1-2", &[raw]),
        ("subsystem=*,parent!=(serial=A1B2)", &[raw, event]),
        ("attr.dev=188:1", &[one]),
        ("attrs.product=*Keyboard", &[raw, event]),
        ("attrs.name=QEMU QEMU USB Keyboard", &[event]),
        ("env.ID_X=1", &[]),
        ("seat=seat0", &[event]),
        ("tag=uaccess", &[]),
        ("hidraw,usb=0627:*,children", &[raw, event]),
        ("attr.dev=188:1,children", &[one]),
        ("subsystem=usb", &[]),
    ] {
        assert_eq!(meant(text), expected, "{text}");
    }
}

#[test]
fn udevs_properties_count() {
    let tree = bench();
    let mut device = of_bench(&tree, "/dev/ttyUSB1").clone();
    for (name, value) in [
        ("ID_SERIAL_SHORT", "short"),
        ("ID_MODEL", "CP2102_USB"),
        ("ID_VENDOR", "Silicon_Labs"),
        ("ID_PATH", "pci-0000:01:03.1-usb-0:1.1:1.0"),
        ("DEVLINKS", "/dev/serial/by-id/usb-a /dev/serial/by-path/b"),
        ("CURRENT_TAGS", ":systemd:uaccess:"),
        ("ID_SEAT", "seat1"),
        ("EMPTY", ""),
    ] {
        device.properties.insert(name.into(), value.into());
    }
    let facts = Facts::new(&device, &tree);
    for text in [
        "serial=short",
        "serial=A1B2",
        "model=CP2102_USB",
        "vendor=Silicon?Labs",
        "id_path=*-usb-0:1.1:*",
        "devname=/dev/serial/by-id/*",
        "devname=serial/by-path/b",
        "tag=systemd",
        "seat=seat1",
        "env.ID_MODEL=CP*",
        "env.EMPTY=\"\"",
        "seat!=seat0,tty",
    ] {
        assert_eq!(read(text).unwrap().matches(&facts), Some(Matched::Itself), "{text}");
    }
    for (text, failing) in [
        ("tty,serial=x,model=y", "serial=x"),
        ("tty,seat=seat0", "seat=seat0"),
        ("tty,tag!=uaccess", "tag!=uaccess"),
        ("video,tty", "video"),
        ("tty,parent=port=1-7", "parent=(port=1-7)"),
    ] {
        assert_eq!(read(text).unwrap().selector.failing(&facts).as_deref(), Some(failing), "{text}");
    }
}

#[test]
fn what_has_to_be_enabled_is_not_meant() {
    assert_eq!(meant("devname=bus/usb/*"), [""; 0]);
    assert!(read("usb").unwrap_err().contains("enable = [\"usb\"]"));
    let mut enabled = Categories::default();
    enabled.apply(&ConfigFile::parse("enable = ['usb']").unwrap()).unwrap();
    let tree = bench();
    let facts = Facts::new(of_bench(&tree, "/dev/bus/usb/001/002"), &tree);
    let by = |categories: &Categories, author| selection("x", "subsystem=usb", categories, author).unwrap();
    assert!(by(&enabled, Author::Container).matches(&facts).is_some());
    assert!(by(&Categories::default(), Author::Container).matches(&facts).is_none());
    assert!(by(&Categories::default(), Author::Root).matches(&facts).is_some(), "root wrote it");
    for (text, is_meant) in [
        ("usb=10c4:ea60", false),
        ("subsystem=*", false),
        ("devname=*", false),
        ("serial=A1B2,tty", false),
        ("usb,serial=A1B2", true),
        ("devname=bus/usb/*", true),
    ] {
        for author in [Author::Container, Author::Root] {
            let selection = selection("x", text, &enabled, author).unwrap();
            assert_eq!(selection.matches(&facts).is_some(), is_meant, "{text}: the stick's raw node");
        }
        let selector = selector(text, &Categories::default()).unwrap();
        assert_eq!(selector.matches(&facts), text != "serial=A1B2,tty", "{text}: a policy means it");
    }
    let raw = [
        ("scsi_generic", "/dev/sg0", 21),
        ("nvme-generic", "/dev/ng0n1", 240),
        ("mtd", "/dev/mtd0", 90),
        ("usbmon", "/dev/usbmon0", 241),
        ("misc", "/dev/uhid", 10),
    ];
    for (subsystem, node, major) in raw {
        let tree = bench().device("/devices/virtual/x", subsystem, node, (major, 0));
        let facts = Facts::new(of_bench(&tree, node), &tree);
        assert_eq!(read("devname=*").unwrap().matches(&facts), None, "{node}");
        enabled.apply(&ConfigFile::parse("enable = ['usb', 'uinput', 'block']").unwrap()).unwrap();
        let text = format!("subsystem={subsystem}");
        let found = selection("x", &text, &enabled, Author::Container).unwrap();
        assert!(found.matches(&facts).is_some(), "{node}");
    }
}

#[test]
fn options_are_read_and_printed() {
    let text = "tty,usb=10c4:ea60,as=/dev/zigbee,link=/dev/serial/by-id/a,link=\"/dev/b c\",links=udev,access=rw,\
                mode=0660,uid=1000,gid=dialout,wait=5s,required,exclusive,children";
    let found = read(text).unwrap();
    assert_eq!(found.options.path.as_deref(), Some("/dev/zigbee"));
    assert_eq!(found.options.links, ["/dev/serial/by-id/a", "/dev/b c"]);
    assert_eq!((found.options.mode, found.options.wait), (Some(0o660), Some(Duration::from_secs(5))));
    assert_eq!(found.options.gid, Some(Group::Name("dialout".into())));
    assert_eq!(found.to_string(), text.replace("link=\"/dev/b c\"", "link=/dev/b c"));
    let spaced = read(" tty , serial = A1B2 ").map(|found| found.to_string());
    assert_eq!(spaced, Err("column 15: '=' where a ',' or the end is expected".into()));
    assert_eq!(read("tty,  wait=250ms ,gid=5").unwrap().to_string(), "tty,gid=5,wait=250ms");
}

#[test]
fn a_category_that_is_called_like_an_option_is_printed_as_one() {
    let mut categories = Categories::default();
    categories.apply(&ConfigFile::parse("[category.required]\nnodes = ['/dev/robot#']").unwrap()).unwrap();
    let found = selection("x", "category=required,required", &categories, Author::Container).unwrap();
    assert_eq!(found.to_string(), "category=required,required");
    assert_eq!(selection("x", &found.to_string(), &categories, Author::Container), Ok(found));
}

#[test]
fn errors_point_at_their_column() {
    for (text, expected) in [
        ("", "column 1: a category or a term such as usb=10c4:ea60 is expected"),
        ("tty,,x", "column 5: a category or a term such as usb=10c4:ea60 is expected"),
        ("tty,", "column 5: a category or a term such as usb=10c4:ea60 is expected"),
        ("tape", "column 1: there is no category 'tape'"),
        ("tty,sreial=x", "column 5: there is no key 'sreial'"),
        ("tty,serial=", "column 12: a value is expected"),
        ("tty x", "column 5: 'x' where a ',' or the end is expected"),
        ("ttü", "column 1: there is no category 'ttü'"),
        ("serial=ü,x", "column 10: there is no category 'x'"),
        ("serial=\"x", "column 8: a '\"' without the second one"),
        ("serial=a\"x", "column 9: '\"' in a value: put the value in quotes"),
        ("serial=[x", "column 8: a '[' without its ']'"),
        ("serial=a)", "column 9: ')' where a ',' or the end is expected"),
        ("usb=10c4", "column 5: usb needs VID:PID, such as 10c4:ea60"),
        ("usb=10c4:ea6", "column 10: 'ea6' is no USB id of four hexadecimal digits"),
        ("tty,as=zigbee", "column 8: 'zigbee' is relative: give an absolute path such as /dev/zigbee"),
        ("tty,as=/etc/x", "column 8: '/etc/x' is no plain path below /dev"),
        ("tty,as=/dev/a,as=/dev/b", "column 15: 'as' is given twice"),
        ("tty,mode=999", "column 10: permission bits in octal are expected, such as 0660"),
        ("tty,wait=2m", "column 10: '2m' is no time up to 60s, such as 5s"),
        ("tty,gid=1x", "column 9: '1x' is neither a group's number nor a name"),
        ("tty,links=all", "column 11: 'all' where 'udev' is expected"),
        ("tty,parent=(port=1", "column 12: a '(' without its ')'"),
        ("tty,parent=(parent=port=1)", "column 13: a hub's selector has no parent of its own"),
        ("attr.=x", "column 6: '' is no name of a sysfs attribute"),
        ("attrs.../../x=1", "column 7: '../../x' is no name of a sysfs attribute"),
        ("pci=1/1/1/[", "column 11: a '[' without its ']'"),
        ("pci=1/1/[a/1", "column 9: a '[' without its ']'"),
        ("tty,gid=\"\"", "column 10: '' is neither a group's number nor a name"),
        ("tty,uid=4294967295", "column 9: '4294967295' is no user's number"),
        ("tty,gid=4294967295", "column 9: '4294967295' is neither a group's number nor a name"),
        ("env.ID-X=1", "column 5: 'ID-X' is no name of a udev property"),
        ("serial!=x", "column 1: it does not say which devices: give a category, or a term such as usb=10c4:ea60"),
        ("as=/dev/x", "column 1: it does not say which devices: give a category, or a term such as usb=10c4:ea60"),
    ] {
        assert_eq!(read(text).unwrap_err(), expected, "{text}");
    }
    for (text, expected) in [
        ("tty,".repeat(33), "column 129: there are more than 32 terms"),
        (format!("tty,parent=({}tty)", "tty,".repeat(31)), "column 133: there are more than 32 terms"),
        (format!("tty{}", ",link=/dev/x".repeat(9)), "column 101: there are more than 8 links"),
        (format!("tty,serial=\"{}\"", "ü".repeat(257)), "column 13: the value is longer than 256 characters"),
    ] {
        assert_eq!(read(&text).unwrap_err(), expected, "{text}");
    }
    assert!(read(&"x".repeat(5000)).unwrap_err().contains("longer than 4096"));
}

fn any_glob() -> impl Strategy<Value = Glob> {
    prop_oneof![
        "[a-zA-Z0-9 .,:()\"*?_ü-]{0,8}".prop_map(|value| Glob::exactly(&value)),
        "[a-z.*?]{1,6}".prop_map(|text| Glob::parse(&text).unwrap()),
        Just(Glob::parse("[a-c]x[!0-9]").unwrap()),
    ]
}

fn any_simple_term() -> impl Strategy<Value = Term> {
    let keys = prop_oneof![
        (0..KEYS.len()).prop_map(|at| KEYS[at].1.clone()).prop_filter("pci is normalized", |key| *key != Key::Pci),
        "[A-Z_]{1,5}".prop_map(Key::Env),
        "[a-z]{1,3}(/[a-z]{1,3})?".prop_map(Key::Attr),
        "[a-zA-Z]{1,6}".prop_map(Key::Attrs),
    ];
    let categories = Categories::default();
    let all: Vec<_> = ["ttyUSB", "video", "hidraw"].map(|name| categories.named(name).unwrap().clone()).into();
    let usb = ["[0-9a-f]{4}", "[0-9a-f]{2}\\*", "[A-Za-z0-9]{1,4}(:[0-9]{3}\\.[0-9])?", "0[0-9]"];
    let usb = usb.map(|pattern| pattern.prop_map(|text| Glob::parse(&text).unwrap()));
    let test = prop_oneof![
        (keys, any_glob()).prop_map(|(key, glob)| Test::Value(key, glob)),
        (usb, 2usize..5).prop_map(|(globs, count)| Test::Usb(globs.into_iter().take(count).collect())),
        proptest::sample::select(all).prop_map(Test::Category),
    ];
    (any::<bool>(), test).prop_map(|(negated, test)| Term { negated, test })
}

fn any_selection() -> impl Strategy<Value = Selection> {
    let parent = (any::<bool>(), proptest::collection::vec(any_simple_term(), 1..3))
        .prop_map(|(negated, terms)| Term { negated, test: Test::Parent(terms) });
    let terms = proptest::collection::vec(prop_oneof![4 => any_simple_term(), 1 => parent], 0..4);
    let path = || "/dev/[a-z, ()]{0,5}[a-z]";
    let options = (
        (proptest::option::of(path()), proptest::collection::vec(path(), 0..3), any::<bool>()),
        (proptest::option::of(1u32..8), proptest::option::of(0u32..0o1000), proptest::option::of(any::<u32>())),
        proptest::option::of(prop_oneof![
            any::<u32>().prop_map(Group::Number),
            "[a-z_][a-z0-9._-]{0,6}".prop_map(Group::Name)
        ]),
        (proptest::option::of(0u64..60_000), any::<bool>(), any::<bool>(), any::<bool>()),
    );
    let options = options.prop_map(|((path, links, udev_links), (access, mode, uid), gid, rest)| Options {
        path,
        links,
        udev_links,
        access: access.map(Access::from_bits),
        mode,
        uid,
        gid,
        wait: rest.0.map(Duration::from_millis),
        required: rest.1,
        exclusive: rest.2,
        children: rest.3,
    });
    (terms, any_simple_term(), options).prop_map(|(mut terms, first, options)| {
        terms.insert(0, Term { negated: false, ..first });
        Selection {
            name: "x".into(),
            selector: Selector { terms, withheld: vec![] },
            options,
            trusted: true,
            persist: false,
        }
    })
}

proptest! {
    #[test]
    fn what_is_printed_is_read_as_the_same(selection in any_selection()) {
        let text = selection.to_string();
        let read = super::selection("x", &text, &Categories::default(), Author::Root).map(|mut read| {
            // Follows from the terms.
            read.selector.withheld.clear();
            read
        });
        prop_assert_eq!(read.map_err(|error| format!("{text}: {error}")), Ok(selection));
    }

    #[test]
    fn no_text_panics_and_errors_are_in_it(text in ".{0,30}") {
        if let Err(error) = selection("x", &text, &Categories::default(), Author::Root) {
            prop_assert!((1..=text.chars().count() + 1).contains(&error.column), "{error}");
            prop_assert!(!error.to_string().chars().any(char::is_control));
        }
    }

    #[test]
    fn no_text_of_the_language_panics(text in "(tty|usb=|parent=|serial!=|as=/dev/|wait=|mode=|attr\\.|[,()\"\\\\*?\\[\\]:0-9a-z=! ]){0,12}") {
        if let Ok(found) = read(&text) {
            let again = read(&found.to_string());
            prop_assert_eq!(again, Ok(found));
        }
    }
}
