//! Which block devices the host uses: loop devices, free and in use in every way.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use qm_hotplug::core::device::Number;
use qm_hotplug::sys::block::in_use;

use crate::support::run;

pub const TESTS: &[(&str, fn())] = &[
    ("block::a_free_disk_is_free_and_one_in_use_is_not", a_free_disk_is_free_and_one_in_use_is_not),
    ("block::a_disk_whose_partition_is_in_use_is_in_use", a_disk_whose_partition_is_in_use_is_in_use),
];

/// A loop device over a file of its own, detached on drop.
struct Disk {
    node: String,
    _file: tempfile::NamedTempFile,
}

impl Disk {
    fn new() -> Disk {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(16 << 20).unwrap();
        let path = file.path().to_str().unwrap();
        let node = run("losetup", &["--find", "--show", "--partscan", path]).ok().trim().to_owned();
        Disk { node, _file: file }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        run("losetup", &["--detach", &self.node]);
    }
}

fn number(node: &str) -> Number {
    qm_hotplug::sys::node::number_of(&rustix::fs::stat(node).unwrap()).unwrap()
}

fn why(node: &str) -> String {
    in_use(node, number(node)).unwrap_or_default()
}

fn a_free_disk_is_free_and_one_in_use_is_not() {
    let disk = Disk::new();
    assert_eq!(why(&disk.node), "");
    let held = File::options().read(true).custom_flags(libc::O_EXCL).open(&disk.node).unwrap();
    assert_eq!(why(&disk.node), "another program holds it");
    drop(held);

    run("mkfs.ext4", &["-q", &disk.node]).ok();
    let place = tempfile::tempdir().unwrap();
    let place = place.path().to_str().unwrap();
    run("mount", &[&disk.node, place]).ok();
    assert!(why(&disk.node).starts_with(&format!("it is mounted at {place}")), "{}", why(&disk.node));
    run("umount", &[place]).ok();
    assert_eq!(why(&disk.node), "");

    run("mkswap", &[&disk.node]).ok();
    // Where it is not allowed, the kernel's answer to mkswap alone is tested: nobody uses it.
    if run("swapon", &[&disk.node]).code == 0 {
        let reason = why(&disk.node);
        run("swapoff", &[&disk.node]).ok();
        assert!(reason.starts_with("it is swap space"), "{reason}");
    }
    assert_eq!(why(&disk.node), "");
}

fn a_disk_whose_partition_is_in_use_is_in_use() {
    let disk = Disk::new();
    // A DOS table with two partitions of 4 MiB: type, first sector and number of sectors, little-endian.
    let mut table = [0u8; 512];
    for (at, start) in [(446, 2048u32), (462, 12_288)] {
        table[at + 4] = 0x83;
        table[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
        table[at + 12..at + 16].copy_from_slice(&8192u32.to_le_bytes());
    }
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    File::options().write(true).open(&disk.node).unwrap().write_all(&table).unwrap();
    run("partx", &["--update", &disk.node]).ok();
    let (first, second) = (format!("{}p1", disk.node), format!("{}p2", disk.node));
    // Where no devtmpfs makes the nodes.
    for partition in [&first, &second] {
        if !Path::new(partition).exists() {
            let sysfs = format!("/sys/class/block/{}/dev", partition.trim_start_matches("/dev/"));
            let numbers = std::fs::read_to_string(sysfs).unwrap();
            let (major, minor) = numbers.trim().split_once(':').unwrap();
            run("mknod", &[partition, "b", major, minor]).ok();
        }
    }
    assert_eq!([&disk.node, &first, &second].map(|node| why(node)), ["", "", ""]);
    run("mkfs.ext4", &["-q", &first]).ok();
    let place = tempfile::tempdir().unwrap();
    let place = place.path().to_str().unwrap();
    run("mount", &[&first, place]).ok();
    let reasons = [&disk.node, &first, &second].map(|node| why(node));
    run("umount", &[place]).ok();
    for node in [&first, &second] {
        let _ = std::fs::remove_file(node);
    }
    assert!(reasons[0].starts_with("it is mounted") && reasons[1].starts_with("it is mounted"), "{reasons:?}");
    assert_eq!(reasons[2], "", "its neighbour is free");
}
