use super::*;
use crate::core::device::Access;
use crate::core::ledger::{Granted, Node};
use crate::core::plan::tests::{device, holder};

fn entry(id: &str, path: &str) -> Entry {
    let mut holder = holder(7);
    holder.id = id.into();
    let node = Node { path: path.into(), uid: 0, gid: 20, mode: 0o660, link_to: None };
    let device = Granted::from(&device("/dev/ttyUSB0", 188, 0));
    let grant =
        Grant { holder, device, access: Access::ALL, node, origin: Origin::Manual, at_start: false, exclusive: false };
    Entry { grant, placement: Placement::Pending, left_over: None }
}

#[test]
fn what_is_recorded_is_there_after_reopening_and_what_is_forgotten_is_not() {
    let run = tempfile::tempdir().unwrap();
    let entries = [entry("a", "/dev/d/x"), entry("a", "/dev/y"), entry("pid:7", "/dev/x"), entry("pid_7", "/dev/x")];
    let mut store = Store::open(run.path()).unwrap().unwrap();
    entries.iter().for_each(|entry| store.record(entry.clone()).unwrap());
    assert!(Store::open(run.path()).unwrap().is_none(), "locked");
    store.settle(&entries[0].grant, Placement::Ours(vec!["/dev/d".into()])).unwrap();
    store.forget(&entries[1].grant).unwrap();
    drop(store);
    let store = Store::open(run.path()).unwrap().unwrap();
    assert_eq!(store.entries().count(), 3);
    assert!(store.entries().any(|entry| entry.placement == Placement::Ours(vec!["/dev/d".into()])));
    assert_eq!(Store::peek(run.path(), warn).unwrap().len(), 3);
}

#[test]
fn a_page_that_cannot_be_read_is_set_aside() {
    let run = tempfile::tempdir().unwrap();
    Store::open(run.path()).unwrap().unwrap().record(entry("good", "/dev/x")).unwrap();
    let ledger = run.path().join("ledger");
    fs::write(ledger.join("c-cut.json"), "{\"version\":1,\"entr").unwrap();
    fs::write(ledger.join("c-new.json"), "{\"version\":99,\"entries\":[]}").unwrap();
    assert_eq!(Store::peek(run.path(), warn).unwrap().len(), 1);
    assert!(ledger.join("c-cut.json").exists(), "a look changes nothing");
    assert_eq!(Store::open(run.path()).unwrap().unwrap().entries().count(), 1);
    assert!(!ledger.join("c-cut.json").exists() && !ledger.join("c-new.json").exists());
    // Until somebody has found out what they told of, also if that one was killed.
    let mut store = Store::open(run.path()).unwrap().unwrap();
    let mut lost = store.lost().to_vec();
    lost.sort();
    assert_eq!(lost, ["cut", "new"]);
    store.found();
    drop(store);
    assert!(ledger.join("c-cut.bad").exists() && ledger.join("c-new.bad").exists());
    assert!(Store::open(run.path()).unwrap().unwrap().lost().is_empty());
}

#[test]
fn of_bad_pages_the_newest_are_kept_and_of_interrupted_writes_nothing() {
    let run = tempfile::tempdir().unwrap();
    let ledger = run.path().join("ledger");
    drop(Store::open(run.path()).unwrap());
    fs::write(ledger.join("c-x.json.tmp"), "{").unwrap();
    for at in 0..KEPT + 3 {
        fs::write(ledger.join(format!("c-{at}.json")), "x").unwrap();
        let at_second = std::time::UNIX_EPOCH + std::time::Duration::from_secs(at as u64);
        File::options().write(true).open(ledger.join(format!("c-{at}.json"))).unwrap().set_modified(at_second).unwrap();
        Store::open(run.path()).unwrap().unwrap().found();
    }
    let left = fs::read_dir(&ledger).unwrap().flatten().map(|entry| entry.file_name().into_string().unwrap());
    let mut left: Vec<String> = left.collect();
    left.sort();
    let mut expected: Vec<String> = (3..KEPT + 3).map(|at| format!("c-{at}.bad")).collect();
    expected.sort();
    assert_eq!(left, expected);
}

#[test]
fn no_ledger_is_an_empty_one() {
    assert!(Store::peek(Path::new("/nonexistent/qm-hotplug"), warn).unwrap().is_empty());
}
