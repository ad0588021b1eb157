//! The hook for test rigs without hardware: the same, with discovery replaced by what the environment names. It is
//! built with `--features mock-devices` only, and installed by nothing.
//!
//! | variable | meaning |
//! |---|---|
//! | `TEST_MOCK_AUDIO_DEVICES`, `…VIDEO…`, `…INPUT…`, `…TTYS…`, `…TTYUSB…`, `…DVB…`, `…RADIO…`, `…GPU…` | paths of the category's devices, with commas between them; where it is not set, the host's are taken |
//! | `FORCE_MOCK_DEVICES=true` | regular files among them count as character devices with numbers made up from their path |
//! | `TEST_LOGFILE` | where the log goes |

use std::env;
use std::fs;
use std::io;
use std::process::ExitCode;

use qm_hotplug::core::device::{Access, Kind, Number};
use qm_hotplug::core::rule::Rule;
use qm_hotplug::core::spec::SpecDevice;
use qm_hotplug::core::text::printable;
use qm_hotplug::precreate::discovery::{Discovery, Found, Host, Request};
use qm_hotplug::precreate::{Hook, Surroundings, run};
use qm_hotplug::sys::devfs;

fn main() -> ExitCode {
    let mut arguments = env::args();
    let hook = Hook::called_as(&arguments.next().unwrap_or_default());
    if hook.is_none() && !arguments.eq(["precreate".to_owned()]) {
        eprintln!("qm-hotplug-mock: call it with the argument precreate, or under the name of a hook of containers/qm");
        return ExitCode::from(2);
    }
    let log = env::var_os("TEST_LOGFILE").map(Into::into);
    let around = Surroundings { discovery: &Environment, log, has_udev: false };
    match run(hook, &around, &mut io::stdin().lock(), &mut io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("qm-hotplug-mock: {}", printable(&error.chain()));
            ExitCode::from(error.exit_code())
        }
    }
}

/// Devices that the environment names.
struct Environment;

impl Discovery for Environment {
    fn devices(&self, rule: &Rule, request: &Request<'_>) -> io::Result<Found> {
        let names: &[&str] = match rule {
            Rule::Seat(_) => &["INPUT", "GPU"],
            Rule::Category(category) if category.name == "wayland-client.gpu" => &["GPU"],
            Rule::Category(category) => &[&category.name.to_ascii_uppercase()],
            Rule::Selection(_) => &[],
        };
        let lists: Vec<String> =
            names.iter().filter_map(|name| env::var(format!("TEST_MOCK_{name}_DEVICES")).ok()).collect();
        if lists.is_empty() {
            return Host::default().devices(rule, request);
        }
        let mut found = Found::default();
        for path in lists.iter().flat_map(|list| list.split(',')).filter(|path| !path.is_empty()) {
            match devfs::read(path).filter(|device| device.number.kind == Kind::Char).or_else(|| made_up(path)) {
                Some(device) => found.devices.push(device),
                None => found.withheld.push((path.to_owned(), "it is no character device".into())),
            }
        }
        Ok(found)
    }
}

/// A device in the place of a regular file. Its numbers are of the range that the kernel keeps for local use.
fn made_up(path: &str) -> Option<SpecDevice> {
    let is_file = fs::symlink_metadata(path).is_ok_and(|found| found.is_file());
    if env::var("FORCE_MOCK_DEVICES").ok()? != "true" || !is_file {
        return None;
    }
    let minor = path.bytes().fold(0, |hash: u32, byte| hash.wrapping_mul(31).wrapping_add(byte.into())) & 0xf_ffff;
    let number = Number { kind: Kind::Char, major: 240, minor };
    Some(SpecDevice { path: path.to_owned(), number, mode: 0o660, uid: 0, gid: 0, access: Access::ALL })
}
