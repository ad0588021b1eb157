//! `qm-hotplug attach`.

use crate::cli::{Done, absolute, change, output};
use crate::core::destination;
use crate::core::device::Access;
use crate::core::protocol::{Attach, GrantInfo, Request};
use crate::error::{Error, Result};
use crate::{ops, runtime};

/// Arguments of `attach`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Container: name, id, podman:NAME or pid:N
    #[arg(value_name = "CTR")]
    container: String,
    /// Device on the host, such as /dev/video1 or /dev/serial/by-id/…; links are followed
    #[arg(value_name = "DEV")]
    device: String,
    /// Path of the node in the container [default: DEV as typed]
    #[arg(value_name = "DEST")]
    destination: Option<String>,
    /// Rights: a subset of r (read), w (write) and m (mknod)
    #[arg(long, default_value = "rwm", value_parser = |text: &str| text.parse::<Access>())]
    access: Access,
    /// Permission bits of the node in octal [default: the host node's]
    #[arg(long, value_parser = octal)]
    mode: Option<u32>,
    /// Owner of the node, a number [default: the host node's]
    #[arg(long)]
    uid: Option<u32>,
    /// Group of the node, a number [default: the host node's]
    #[arg(long)]
    gid: Option<u32>,
    /// Print the grant as JSON
    #[arg(long)]
    json: bool,
}

fn octal(text: &str) -> std::result::Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("permission bits in octal are expected, such as 0660".into()),
    }
}

/// Runs it.
pub(super) fn run(args: Args) -> Result<()> {
    let destination = args.destination.unwrap_or_else(|| args.device.clone());
    let destination = destination::check(&destination)
        .map_err(|reason| Error::BadDestination { path: destination.clone(), reason })?;
    let request = Attach {
        container: args.container,
        device: absolute(&args.device)?,
        destination,
        access: args.access,
        mode: args.mode,
        uid: args.uid,
        gid: args.gid,
    };
    let done = change(&Request::Attach(request.clone()), |executor| {
        ops::request::attach(executor, &runtime::scan(), &request)
    })?;
    let (grant, by_agent): (GrantInfo, bool) = match done {
        Done::ByAgent(grant) => (grant, true),
        Done::Here(grant) => (grant, false),
    };
    if args.json {
        output::json(&grant)?;
    } else {
        output::line(&format!("{}: {} is {} with access {}", grant.container, grant.path, grant.device, grant.access))?;
    }
    if !by_agent {
        eprintln!("no agent: stays until detach; an unplug is not followed");
    }
    Ok(())
}
