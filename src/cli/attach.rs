//! `qm-hotplug attach`.

use std::path::Path;
use std::time::{Duration, Instant};

use clap_complete::ArgValueCompleter;

use crate::cli::complete::{containers, devices_or_selector};
use crate::cli::{Done, absolute, change, dry_run, output};
use crate::config;
use crate::core::container::Reference;
use crate::core::destination;
use crate::core::device::{Access, Device};
use crate::core::facts::Facts;
use crate::core::grammar::{Author, selection};
use crate::core::info::GrantInfo;
use crate::core::protocol::{Attach, OneGrant, Persist, Request};
use crate::core::selection::{Group, Options, Selection, duration};
use crate::error::{Error, Result};
use crate::ops::intention::steps_of_attach;
use crate::ops::live::lookup;
use crate::ops::persist::Persisted;
use crate::sys::arrival::Arrivals;
use crate::sys::cgroup::CgroupRoot;
use crate::sys::sysfs::KernelSysfs;
use crate::sys::udev;
use crate::{ops, runtime};

/// Arguments of `attach`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Container: name, id, ENGINE:NAME or pid:N
    #[arg(value_name = "CTR", add = ArgValueCompleter::new(containers))]
    container: String,
    /// Device on the host: a path such as /dev/video1 or /dev/serial/by-id/…, links are followed; or a selector such as
    /// usb=10c4:ea60
    #[arg(value_name = "DEV", add = ArgValueCompleter::new(devices_or_selector))]
    device: String,
    /// Path of the node in the container [default: DEV as typed, or the device's own]
    #[arg(value_name = "DEST")]
    destination: Option<String>,
    /// Rights: a subset of r (read), w (write) and m (mknod) [default: rwm]
    #[arg(long, value_parser = |text: &str| text.parse::<Access>())]
    access: Option<Access>,
    /// Permission bits of the node in octal [default: the host node's]
    #[arg(long, value_parser = octal)]
    mode: Option<u32>,
    /// Owner of the node, a number [default: the host node's]
    #[arg(long)]
    uid: Option<u32>,
    /// Group of the node, a number [default: the host node's]
    #[arg(long)]
    gid: Option<u32>,
    /// Wait for the device to be plugged in: 10s, 500ms, 1m
    #[arg(long, value_name = "TIME", value_parser = waiting_time)]
    wait: Option<Duration>,
    /// All devices that the selector means, not just one
    #[arg(long)]
    all: bool,
    /// Keep it: give it to the container again after its restart and after the machine's, whenever the device is plugged in
    #[arg(long, conflicts_with = "all")]
    persist: bool,
    /// Print what would be done, and do nothing
    #[arg(long, conflicts_with = "json")]
    dry_run: bool,
    /// Print the grant as JSON; with --all an array
    #[arg(long)]
    json: bool,
}

/// A day at most: whoever waits longer wants an annotation.
fn waiting_time(text: &str) -> std::result::Result<Duration, String> {
    let time = duration(text).filter(|time| *time <= Duration::from_secs(24 * 3600));
    time.ok_or_else(|| "a time of at most a day is expected, such as 10s".into())
}

fn octal(text: &str) -> std::result::Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("permission bits in octal are expected, such as 0660".into()),
    }
}

/// How many of the devices that a selector means are named when it means too many.
const SHOWN: usize = 10;

/// Runs it.
pub(super) fn run(args: Args) -> Result<()> {
    let (nodes, options, terms) = match selector(&args.device)? {
        Some(selection) => (find(&args, &selection)?, selection.options, Some(selection.selector.to_string())),
        None => (vec![path(&args)?], Options::default(), None),
    };
    let persist = |device: &str| {
        let typed = if terms.is_some() { args.device.clone() } else { device.to_owned() };
        args.persist.then(|| Persist { typed, selector: terms.clone() })
    };
    let destination = args.destination.clone().or(options.path.clone());
    if nodes.len() > 1 && destination.is_some() {
        return Err(Error::Usage(format!(
            "'{}' means {} devices, which cannot all be at one path: leave DEST and as= out",
            args.device,
            nodes.len()
        )));
    }
    let (mut grants, mut result) = (Vec::new(), Ok(()));
    for (device, typed) in nodes {
        let destination = destination.clone().unwrap_or(typed);
        let persist = persist(&device);
        if args.dry_run {
            let request = request(&args, &options, device, &destination, persist)?;
            dry_run(|entries, containers| {
                steps_of_attach(&CgroupRoot::find()?, entries, &Persisted::look(), containers, &request)
            })?;
            continue;
        }
        match attach(&args, &options, device, &destination, persist) {
            Ok((grant, by_agent)) => {
                if !by_agent && grants.is_empty() {
                    let again = if grant.persist { "; after a restart it is granted once an agent runs" } else { "" };
                    eprintln!("no agent: stays until detach; an unplug is not followed{again}");
                }
                grants.push(grant);
            }
            // Those before are in force, and are told of.
            Err(error) => result = result.and(Err(error)),
        }
    }
    match (&*grants, args.json, args.all) {
        (all, true, true) => output::json(&all),
        ([one], true, false) => output::json(one),
        (all, ..) => all.iter().try_for_each(|grant| {
            let GrantInfo { container, path, device, access, .. } = grant;
            output::line(&format!("{container}: {path} is {device} with access {access}"))
        }),
    }
    .and(result)
}

/// The device that was typed as a path, waited for if that is asked for; as an absolute path, and as typed.
fn path(args: &Args) -> Result<(String, String)> {
    let device = absolute(&args.device)?;
    if let Some(wait) = args.wait {
        wait_for(args, wait, || match udev::by_settled_path(&device) {
            Ok(_) => Ok(true),
            Err(Error::NoSuchDevice(_)) => Ok(false),
            Err(error) => Err(error),
        })?;
    }
    Ok((device, args.device.clone()))
}

/// Attaches one device. Says whether an agent did it.
fn attach(
    args: &Args,
    options: &Options,
    device: String,
    destination: &str,
    persist: Option<Persist>,
) -> Result<(GrantInfo, bool)> {
    let request = request(args, options, device, destination, persist)?;
    let done = change(&Request::Attach(request.clone()), |executor| {
        ops::request::attach(executor, &runtime::scan(), &request).map(|grant| OneGrant { grant })
    })?;
    Ok(match done {
        Done::ByAgent(OneGrant { grant }) => (grant, true),
        Done::Here(OneGrant { grant }) => (grant, false),
    })
}

/// What is asked for.
fn request(
    args: &Args,
    options: &Options,
    device: String,
    destination: &str,
    persist: Option<Persist>,
) -> Result<Attach> {
    let destination = destination::check(destination)
        .map_err(|reason| Error::BadDestination { path: destination.to_owned(), reason })?;
    let gid = options.gid.as_ref().and_then(|gid| if let Group::Number(gid) = gid { Some(*gid) } else { None });
    Ok(Attach {
        container: args.container.clone(),
        device,
        destination: Some(destination),
        access: args.access.or(options.access),
        mode: args.mode.or(options.mode),
        uid: args.uid.or(options.uid),
        gid: args.gid.or(gid),
        persist,
    })
}

/// What was typed as a selector; `None` for a path.
fn selector(typed: &str) -> Result<Option<Selection>> {
    let is_path = typed.starts_with(['/', '.']) || !typed.contains('=') && Path::new(typed).exists();
    if typed.is_empty() || is_path {
        return Ok(None);
    }
    let settings = config::settings_or_warn();
    let bad = |reason: String| Error::Usage(format!("'{typed}' is neither a path nor a selector: {reason}"));
    let found = selection("", typed, &settings.categories, Author::Root).map_err(|error| bad(error.to_string()))?;
    let Options { links, udev_links, gid, required, exclusive, children, .. } = &found.options;
    let is_of_rules = !links.is_empty() || *udev_links || *required || *exclusive || *children;
    if is_of_rules || matches!(gid, Some(Group::Name(_))) {
        return Err(bad("of the options, attach takes as, access, mode, uid, gid (a number) and wait".into()));
    }
    Ok(Some(found))
}

/// The nodes of the devices that the selector means: one, unless all are asked for.
fn find(args: &Args, selection: &Selection) -> Result<Vec<(String, String)>> {
    let look = || -> Result<Vec<Device>> {
        let sysfs = KernelSysfs::default();
        let mut devices = udev::scan().map_err(Error::host("list the devices of this host"))?;
        devices.retain(|device| selection.matches(&Facts::new(device, &sysfs)).is_some());
        devices.sort_by(|a, b| a.identity.devpath.cmp(&b.identity.devpath));
        Ok(devices)
    };
    let mut found = look()?;
    match args.wait.or(selection.options.wait) {
        None if found.is_empty() => return Err(Error::NoMatch(args.device.clone())),
        Some(wait) if found.is_empty() => wait_for(args, wait, || {
            found = look()?;
            Ok(!found.is_empty())
        })?,
        _ => {}
    }
    if found.len() > 1 && !args.all {
        let candidates = found.iter().map(|device| candidate(&Facts::new(device, &KernelSysfs::default())));
        let (selector, count) = (args.device.clone(), found.len());
        return Err(Error::AmbiguousDevice { selector, count, candidates: candidates.take(SHOWN).collect() });
    }
    Ok(found.into_iter().map(|device| (device.node.clone(), device.node)).collect())
}

/// Looks until it is found, or the time is up.
fn wait_for(args: &Args, wait: Duration, mut look: impl FnMut() -> Result<bool>) -> Result<()> {
    // A device is waited for only where there is a container for it; others than root cannot see all of them.
    if rustix::process::geteuid().is_root() {
        lookup(&runtime::scan(), &Reference::parse(&args.container).map_err(Error::Usage)?)?;
    }
    let (deadline, waiting) = (Instant::now() + wait, || Error::host::<std::io::Error>("wait for device events"));
    let mut arrivals = Arrivals::listen().map_err(waiting())?;
    while !look()? {
        if !arrivals.wait(deadline).map_err(waiting())? {
            let device = &args.device;
            return Err(Error::TimedOut(format!("no device that matches '{device}' was plugged in within {wait:?}")));
        }
    }
    Ok(())
}

/// A node, with what tells its device from others.
fn candidate(facts: &Facts<'_>) -> String {
    let node = &facts.device.node;
    match facts.usb() {
        Some(usb) => match facts.usb_text("serial") {
            Some(serial) => format!("{node} (serial={serial}, port={})", usb.port()),
            None => format!("{node} (port={})", usb.port()),
        },
        None => node.clone(),
    }
}
