//! What libudev inside is shown from the container's start on.

use std::time::SystemTime;

use serde_json::Value;

use crate::core::device::Number;
use crate::core::mirror::{RUN_UDEV, Wish};
use crate::core::spec;
use crate::ops::view::View;
use crate::sys::host::is_initial_user_namespace;
use crate::sys::{label, udev};

/// Adds a view of udev's database to the specification, with the devices that were granted. Says whether it did; where it
/// cannot be had, the container starts without, and the agent may still show one.
pub(super) fn show(spec: &mut Value, wish: Wish, granted: &[Number]) -> bool {
    let is_wanted = match wish {
        Wish::Never => false,
        Wish::Always => true,
        Wish::Usual => !spec::runs_systemd(spec),
    };
    // Root of a user namespace, the container's or an ordinary user's, may not come to the view; the agent brings it.
    let Some(id) = spec::container_id(spec).filter(|_| is_wanted && !spec::has_user_namespace(spec)) else {
        return false;
    };
    if !is_initial_user_namespace() || !rustix::process::geteuid().is_root() {
        return false;
    }
    let tag = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos() as u64;
    let mut view = match View::create(&id, tag) {
        Ok(view) => view,
        Err(error) => {
            tracing::warn!("{RUN_UDEV} is not shown: {}", error.chain());
            return false;
        }
    };
    if let Some(label) = spec.pointer("/linux/mountLabel").and_then(Value::as_str).filter(|_| label::is_on())
        && let Err(error) = view.set_label(label)
    {
        tracing::warn!("{RUN_UDEV} cannot be given the label {label}: {error}");
    }
    for number in granted {
        for (name, record) in udev::records(*number) {
            if let Err(error) = view.write(&name, record.as_deref()) {
                tracing::warn!(device = %number, "{RUN_UDEV} does not show it: {error}");
            }
        }
    }
    View::sweep();
    match spec::add_mount(spec, &view.path().to_string_lossy(), RUN_UDEV) {
        Ok(true) => true,
        Ok(false) => {
            view.remove();
            false
        }
        Err(reason) => {
            tracing::warn!("{RUN_UDEV} is not shown: {reason}");
            view.remove();
            false
        }
    }
}
