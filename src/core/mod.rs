//! The pure part: words, formats and decisions. No system call, no clock, no import from the rest of this crate.

pub mod annotation;
pub mod category;
pub mod container;
pub mod destination;
pub mod device;
pub mod filter_program;
pub mod ledger;
pub mod matcher;
pub mod plan;
pub mod protocol;
pub mod spec;
pub mod text;
pub mod uevent;
