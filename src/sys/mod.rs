//! The kernel's edge: every system call and all the `unsafe` of this crate.

pub mod arrival;
mod asker;
pub mod block;
pub mod bpf;
pub mod caps;
pub mod cgroup;
pub mod clock;
pub mod devfs;
pub mod device_filter;
mod directory;
pub mod group;
pub mod host;
mod mark;
pub mod mount;
pub mod namespace;
pub mod network;
pub mod node;
pub mod probe;
pub mod process;
pub mod ring;
pub mod scratch;
pub mod stray;
pub mod sysfs;
pub mod udev;
pub mod uevent;
