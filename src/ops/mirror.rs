//! What libudev in containers is shown and told of: the devices that they have grants of, after their nodes are there.
//!
//! What is shown follows the ledger, and is compared with it wherever that changed. Nothing of it is a right, so a failure
//! is logged and stops nothing.

use std::collections::{BTreeSet, HashMap, HashSet};

use crate::core::ledger::{Entry, Granted, Holder, Node};
use crate::core::mirror::{Description, Profile, Shown, Told, Wish, record_name};
use crate::core::udev_message::{of_kernel, of_udev};
use crate::error::{Error, Result};
use crate::ops::live::still;
use crate::ops::mirrors::Audience;
use crate::ops::rebuild::directories;
use crate::ops::view::View;
use crate::ops::{Executor, node_error};
use crate::sys::namespace::inside;
use crate::sys::network::{self, Message};
use crate::sys::node;
use crate::sys::udev;

/// A device of a container, of which something may have changed.
pub type Concern = (Holder, Granted);

impl Executor {
    /// Makes what containers are shown of these devices follow the ledger. `told` is what udevd has just told of them. Where
    /// a container's wish is not known, nothing is shown that was not before.
    pub fn mirror(&mut self, concerns: &[Concern], told: &[Told], wish: impl Fn(&Holder) -> Option<Wish>) {
        // A number that changes hands is gone before it is there.
        for (holder, device) in concerns {
            let name = record_name(device.number);
            let is_it = |shown: &Shown| shown.device.identity == device.identity;
            let is_shown = self.shown(holder, &name).is_some_and(is_it);
            if is_shown && self.node_of(holder, device).is_none() {
                self.hide(holder, &name);
                self.close_unless_asked(holder);
            }
        }
        let (mut descriptions, mut done) = (HashMap::new(), HashSet::new());
        let mut relayed = BTreeSet::new();
        for (holder, device) in concerns {
            if !done.insert((&holder.id, &device.identity)) {
                continue;
            }
            let Some(node) = self.node_of(holder, device) else { continue };
            let describe = || udev::describe(device);
            let known: &Option<Description> = descriptions.entry(&device.identity).or_insert_with(describe);
            let Some(description) = known.clone() else { continue };
            let shown = Shown { device: device.clone(), node, description, is_done: true };
            let is_known = self.mirrors.has(holder);
            if is_known || self.ensure(holder, wish(holder), false) {
                self.reveal(holder, shown, told, &mut relayed);
            }
        }
    }

    /// The same for all that is in the ledger or shown, after a start or lost events. Those who run no more are forgotten.
    pub fn mirror_all(&mut self, wish: impl Fn(&Holder) -> Option<Wish>) {
        let ended = self.mirrors.all.iter().filter(|(_, mirror)| mirror.has_ended()).map(|(id, _)| id.clone());
        let ended: Vec<String> = ended.collect();
        ended.iter().for_each(|id| self.unmirror(id));
        let shown =
            self.mirrors.all.values().flat_map(|mirror| {
                mirror.shown.values().map(|shown| (mirror.whose.holder.clone(), shown.device.clone()))
            });
        let granted = self.ledger.entries().map(|entry| (entry.grant.holder.clone(), entry.grant.device.clone()));
        let concerns: Vec<Concern> = shown.chain(granted).collect();
        self.mirror(&concerns, &[], wish);
        // Of what was interrupted, nothing may be shown.
        let holders: Vec<Holder> = self.mirrors.all.values().map(|mirror| mirror.whose.holder.clone()).collect();
        holders.iter().for_each(|holder| self.close_unless_asked(holder));
        View::sweep();
    }

    /// Takes back all that is shown.
    pub(super) fn hide_all(&mut self) {
        let ids: Vec<String> = self.mirrors.all.keys().cloned().collect();
        for id in ids {
            let mirror = &self.mirrors.all[&id];
            let (holder, names) = (mirror.whose.holder.clone(), mirror.shown.keys().cloned().collect::<Vec<_>>());
            names.iter().for_each(|name| self.hide(&holder, name));
            self.close(&holder);
        }
        View::leave_nothing();
    }

    fn shown(&self, holder: &Holder, name: &str) -> Option<&Shown> {
        let mirror = self.mirrors.all.get(&holder.id).filter(|mirror| mirror.whose.holder.is_same_run(holder));
        mirror.and_then(|mirror| mirror.shown.get(name))
    }

    /// The path of the container's node of a device, if it has one: the host's, or else the first.
    fn node_of(&self, holder: &Holder, device: &Granted) -> Option<String> {
        let is_its = |entry: &&Entry| {
            let grant = &entry.grant;
            let is_node = grant.node.link_to.is_none() && grant.device.identity == device.identity;
            is_node && grant.holder.is_same_run(holder) && entry.is_settled()
        };
        let paths: BTreeSet<&str> =
            self.ledger.of(&holder.id).filter(is_its).map(|entry| entry.grant.node.path.as_str()).collect();
        let of_host = paths.get(device.node.as_str());
        of_host.or(paths.first()).map(|path| (*path).to_owned())
    }

    /// Shows a device, or what is new about it, and tells of it.
    fn reveal(&mut self, holder: &Holder, new: Shown, told: &[Told], relayed: &mut BTreeSet<(Audience, String)>) {
        let name = record_name(new.device.number);
        if self.shown(holder, &name).is_some_and(|old| old.device.identity != new.device.identity) {
            self.hide(holder, &name);
        }
        let old = self.shown(holder, &name).cloned();
        let Some(mirror) = self.mirrors.all.get_mut(&holder.id).filter(|mirror| mirror.whose.wants) else { return };
        // What was on its way when the device was shown is known to those inside.
        let last = mirror.told.get(&name).copied().unwrap_or(0);
        let (of_whole, told): (Vec<Told>, Vec<Told>) = told.iter().partition(|told| told.of_whole);
        let told: Vec<Told> = told.into_iter().filter(|told| told.sequence > last).collect();
        if old.as_ref() == Some(&new) && told.is_empty() && of_whole.is_empty() {
            return;
        }
        let latest = told.iter().map(|told| told.sequence).max();
        let latest = latest.unwrap_or_else(|| if old.is_none() { udev::sequence() } else { last });
        mirror.told.insert(name.clone(), latest);
        let audience = mirror.audience();
        let is_new = old.as_ref().is_none_or(|old| !old.is_done);
        let is_first =
            is_new && audience.is_some_and(|audience| !self.mirrors.are_told(audience, &name, &new.device.identity));
        if old.as_ref() != Some(&new)
            && let Err(error) = self.write(holder, &name, old.as_ref(), &new)
        {
            tracing::warn!(
                container = holder.label(),
                "libudev inside is not shown {}: {}",
                new.device.node,
                error.chain()
            );
        }
        if self.shown(holder, &name).is_some() {
            self.reveal_whole(holder, &new, &of_whole, latest);
        }
        let Some(audience) = audience else { return self.complete(holder, &name) };
        // Those who listen to the namespace of several containers hear each event once.
        let is_relayed = !relayed.insert((audience, name.clone()));
        let current = || ("change", udev::sequence());
        let is_as_before = |old: &Description| old.profile == new.description.profile;
        // Where somebody was killed at it, those inside may know nothing.
        let old = old.filter(|old| old.is_done);
        // What they were told of is not added once more.
        let counts = |told: &&Told| old.is_none() || told.action != "add";
        let told: Vec<_> = told.iter().filter(counts).map(|told| (told.action, told.sequence)).collect();
        let actions = match (old.as_ref(), &*told) {
            (None, _) if is_first => {
                let add =
                    told.iter().find(|told| told.0 == "add").copied().unwrap_or_else(|| ("add", udev::sequence()));
                let others = told.iter().filter(|told| told.0 != "add").copied();
                [add].into_iter().chain(others).collect()
            }
            (None, _) => Vec::new(),
            _ if is_relayed => Vec::new(),
            (Some(old), []) if is_as_before(&old.description) => Vec::new(),
            (Some(_), []) => vec![current()],
            (Some(_), told) => told.to_vec(),
        };
        self.tell(holder, &new.description.profile, &actions);
        self.complete(holder, &name);
    }

    /// Writes down that all of it is done, if that is new.
    fn complete(&mut self, holder: &Holder, name: &str) {
        let Some(mirror) = self.mirrors.all.get_mut(&holder.id) else { return };
        let Some(shown) = mirror.shown.get_mut(name).filter(|shown| !shown.is_done) else { return };
        shown.is_done = true;
        if let Err(error) = mirror.view.note(name, shown) {
            tracing::warn!("cannot write to {}: {error}", mirror.view.path().display());
        }
    }

    fn write(&mut self, holder: &Holder, name: &str, old: Option<&Shown>, new: &Shown) -> Result<()> {
        let taken: HashSet<String> = self.ledger.of(&holder.id).map(|entry| entry.grant.node.path.clone()).collect();
        let Some(mirror) = self.mirrors.all.get_mut(&holder.id) else { return Ok(()) };
        let failed = |error| Error::host::<std::io::Error>(format!("write to {}", mirror.view.path().display()))(error);
        let noted = Shown { is_done: false, ..new.clone() };
        mirror.view.note(name, &noted).map_err(failed)?;
        mirror.shown.insert(name.to_owned(), noted);
        if mirror.whose.sees_view {
            mirror.view.write(name, new.description.profile.record.as_deref()).map_err(failed)?;
        }
        if mirror.whose.has_udevd {
            return Ok(());
        }
        let links = |shown: &Shown| shown.links().map(|(link, to)| (link.to_owned(), to)).collect::<BTreeSet<_>>();
        let (before, after) = (old.map(links).unwrap_or_default(), links(new));
        let gone = before.difference(&after).cloned().collect::<Vec<_>>();
        let is_there = |link| old.is_some_and(|old| old.is_done) && before.contains(link);
        let come = after.iter().filter(|link| !is_there(*link) && !taken.contains(&link.0)).cloned().collect();
        self.link(holder, new, gone, come)
    }

    /// Removes links to a device's node, and makes others.
    fn link(
        &self,
        holder: &Holder,
        shown: &Shown,
        gone: Vec<(String, String)>,
        come: Vec<(String, String)>,
    ) -> Result<()> {
        if gone.is_empty() && come.is_empty() {
            return Ok(());
        }
        let process = still(holder).ok_or_else(|| Error::ContainerExited(holder.label().to_owned()))?;
        let number = shown.device.number;
        let node = |(path, to): &(String, String)| Node { link_to: Some(to.clone()), ..Node::at(path) };
        inside(holder.label(), &process, self.host, move |inside| {
            let removed =
                gone.iter().map(|link| node::remove(inside, number, &node(link), &directories(&link.0)).map(drop));
            let removed = removed.fold(Ok(()), std::result::Result::and);
            let made = come.iter().map(|link| node::make(inside, number, &node(link), false).map(drop));
            made.fold(removed, std::result::Result::and)
        })?
        .map_err(|error| node_error(holder, error))
    }

    /// Shows a device no more.
    fn hide(&mut self, holder: &Holder, name: &str) {
        let Some(mirror) = self.mirrors.all.get_mut(&holder.id) else { return };
        let Some(shown) = mirror.shown.remove(name) else { return };
        mirror.told.remove(name);
        let (view, audience) = (&mirror.view, mirror.audience());
        let struck = if mirror.whose.sees_view { view.strike(name) } else { Ok(()) };
        let struck = struck.map_err(Error::host(format!("write to {}", view.path().display())));
        let links = match mirror.whose.has_udevd {
            true => Vec::new(),
            false => shown.links().map(|(link, to)| (link.to_owned(), to)).collect(),
        };
        match struck.and(self.link(holder, &shown, links, Vec::new())) {
            Ok(()) | Err(Error::ContainerExited(_)) => {}
            Err(error) => {
                tracing::warn!(container = holder.label(), "{} is still shown: {}", shown.device.node, error.chain())
            }
        }
        if audience.is_some_and(|audience| !self.mirrors.are_told(audience, name, &shown.device.identity)) {
            self.tell(holder, &shown.description.profile, &[("remove", udev::sequence())]);
        }
        self.hide_whole(holder, &shown);
        if let Some(mirror) = self.mirrors.all.get(&holder.id)
            && let Err(error) = mirror.view.forget(name)
        {
            tracing::warn!("cannot strike {name} from {}: {error}", mirror.view.path().display());
        }
    }

    /// Tells those who listen in the container's network namespace.
    pub(super) fn tell(&self, holder: &Holder, profile: &Profile, actions: &[(&str, u64)]) {
        let Some(mirror) = self.mirrors.all.get(&holder.id) else { return };
        let (Some(network), false) = (mirror.whose.network, actions.is_empty()) else { return };
        let Some(process) = still(holder) else { return };
        let has_udevd = mirror.whose.has_udevd;
        // Its udevd may have been done with the device before the node was there: it gives that an owner and a mode now.
        let has_new_node = has_udevd && actions.iter().any(|(action, _)| *action == "add");
        let kernels = |action: &str| of_kernel(action, &profile.devpath, profile.kernels());
        let again = has_new_node.then(|| Message::Again(kernels("change")));
        let messages = actions.iter().flat_map(|(action, sequence)| {
            let udevs = || of_udev(profile.message(action, &sequence.to_string()));
            [Some(Message::Kernel(kernels(action))), (!has_udevd).then(|| Message::Udev(udevs()))]
        });
        if let Err(error) = network::send(&process, network, messages.flatten().chain(again).collect()) {
            tracing::warn!(
                container = holder.label(),
                "those who listen inside are not told of {}: {error}",
                profile.devpath
            );
        }
    }
}
