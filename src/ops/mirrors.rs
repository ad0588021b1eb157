//! The mirrors of containers: made when a container asks for devices or is given one, and taken away with the last.

use std::collections::{BTreeMap, HashMap};

use crate::core::device::Identity;
use crate::core::ledger::Holder;
use crate::core::mirror::{Profile, RUN_UDEV, Shown, Wish};
use crate::error::{Error, Result};
use crate::failpoint::reached;
use crate::ops::live::still;
use crate::ops::view::{View, Whose};
use crate::ops::{Executor, node_error};
use crate::runtime;
use crate::sys::group::own_descriptors;
use crate::sys::label;
use crate::sys::mount::{At, detached, hide, id_of, label_of_files, own, show};
use crate::sys::namespace::inside;
use crate::sys::network::{self, NetworkId};
use crate::sys::process::{Process, is_gone};
use crate::sys::udev;

/// Those who hear the same messages: whoever listens in a network namespace, but libudev takes only those of root of its own
/// user namespace, and where there is a udevd inside, udev's messages are that one's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Audience {
    network: NetworkId,
    root: Option<u32>,
    has_udevd: bool,
}

/// What one run of a container is shown.
pub(super) struct Mirror {
    pub(super) view: View,
    pub(super) whose: Whose,
    /// Root of its user namespace, as the host's numbers have it.
    pub(super) root: Option<u32>,
    /// By the names of the database's entries.
    pub(super) shown: BTreeMap<String, Shown>,
    /// The devices without a node that these are parts of, by the same.
    pub(super) wholes: BTreeMap<String, Profile>,
    /// The last event that those inside were told of each.
    pub(super) told: BTreeMap<String, u64>,
    /// Entries that the hook has made, of which it is not known yet whether they stand for a grant.
    pub(super) from_hook: Vec<String>,
}

impl Mirror {
    /// `None` in the host's network namespace.
    pub(super) fn audience(&self) -> Option<Audience> {
        let Whose { network, has_udevd, .. } = self.whose;
        network.map(|network| Audience { network, root: self.root, has_udevd })
    }

    pub(super) fn has_ended(&self) -> bool {
        is_gone(self.whose.holder.pid, self.whose.holder.start_time)
    }
}

/// What all containers are shown, by their ids.
#[derive(Default)]
pub(super) struct Mirrors {
    pub(super) all: HashMap<String, Mirror>,
}

impl Mirrors {
    /// As it was written down.
    pub(super) fn load() -> Mirrors {
        let mut all = HashMap::new();
        for (view, whose) in View::claimed() {
            if is_gone(whose.holder.pid, whose.holder.start_time) {
                view.remove();
            } else {
                let (shown, now) = (view.shown(), udev::sequence());
                let parts = shown.values().filter(|shown| shown.is_done);
                let wholes = parts.filter_map(|shown| shown.description.whole.clone());
                let wholes: BTreeMap<String, Profile> = wholes.map(|whole| (whole.name(), whole)).collect();
                let told = shown.keys().chain(wholes.keys()).map(|name| (name.clone(), now)).collect();
                let id = whose.holder.id.clone();
                all.insert(
                    id,
                    Mirror { view, root: root_of(&whose.holder), whose, shown, wholes, told, from_hook: Vec::new() },
                );
            }
        }
        Mirrors { all }
    }

    /// Whether it is known what this run of a container sees.
    pub(super) fn has(&self, holder: &Holder) -> bool {
        let is_its = |mirror: &Mirror| mirror.whose.holder.is_same_run(holder) && !mirror.whose.is_pending;
        self.all.get(&holder.id).is_some_and(is_its)
    }

    /// Whether anybody in this audience is shown that device.
    pub(super) fn are_told(&self, audience: Audience, name: &str, identity: &Identity) -> bool {
        let is_it = |shown: &Shown| shown.is_done && shown.device.identity == *identity;
        let is_shown = |mirror: &Mirror| mirror.shown.get(name).is_some_and(is_it);
        self.those_in(audience).any(is_shown)
    }

    /// What was last told of this device without a node, if anybody in this audience is shown it.
    pub(super) fn whole(&self, audience: Audience, whole: &Profile) -> Option<&Profile> {
        let all = self.those_in(audience).flat_map(|mirror| mirror.wholes.values());
        let all: Vec<&Profile> = all.filter(|its| its.is_same(whole)).collect();
        // One of several containers is the first to have what is new.
        all.iter().find(|its| **its == whole).or(all.first()).copied()
    }

    /// The last event of a device that this audience was told of.
    pub(super) fn last_told(&self, audience: Audience, name: &str) -> u64 {
        self.those_in(audience).filter_map(|mirror| mirror.told.get(name).copied()).max().unwrap_or(0)
    }

    fn those_in(&self, audience: Audience) -> impl Iterator<Item = &Mirror> {
        self.all.values().filter(move |mirror| mirror.audience() == Some(audience))
    }
}

fn root_of(holder: &Holder) -> Option<u32> {
    network::root_of(holder.pid, "uid_map")
}

impl Executor {
    /// Lets a container that asks for devices see a view of udev's database, empty at first, if it wants to.
    pub fn prepare(&mut self, holder: &Holder, wish: Wish) {
        self.ensure(holder, Some(wish), true);
    }

    /// What the hook has shown at the container's start and is no grant of it, now that its grants are known, is not shown
    /// any more: the device went before anybody looked, or another container has it alone.
    pub fn settle_start(&mut self, id: &str) {
        let Some(mirror) = self.mirrors.all.get_mut(id) else { return };
        for name in std::mem::take(&mut mirror.from_hook) {
            if !mirror.shown.contains_key(&name)
                && !mirror.wholes.contains_key(&name)
                && let Err(error) = mirror.view.strike(&name)
            {
                tracing::warn!("cannot write to {}: {error}", mirror.view.path().display());
            }
        }
    }

    /// Makes the container's mirror if there is none and its wish is known. Says whether there is one.
    pub(super) fn ensure(&mut self, holder: &Holder, wish: Option<Wish>, asks: bool) -> bool {
        if let Some(mirror) = self.mirrors.all.get_mut(&holder.id)
            && mirror.whose.holder.is_same_run(holder)
        {
            if asks
                && !std::mem::replace(&mut mirror.whose.asks, true)
                && let Err(error) = mirror.view.claim(&mirror.whose)
            {
                tracing::warn!(container = holder.label(), "{}", error.chain());
            }
            if !mirror.whose.is_pending {
                return true;
            }
        }
        let Some(wish) = wish else { return false };
        let before = self.mirrors.all.remove(&holder.id);
        // One that was interrupted has shown nothing.
        before.into_iter().filter(|it| !it.whose.is_pending).for_each(|mirror| mirror.view.remove());
        match self.make_mirror(holder, wish, asks) {
            Ok((view, whose)) => {
                let from_hook = view.entries();
                let (shown, wholes, told) = Default::default();
                self.mirrors.all.insert(
                    holder.id.clone(),
                    Mirror { view, root: root_of(holder), whose, shown, wholes, told, from_hook },
                );
                return true;
            }
            Err(Error::ContainerExited(_)) => {}
            Err(error) => {
                tracing::warn!(container = holder.label(), "libudev inside is told of nothing: {}", error.chain());
            }
        }
        false
    }

    fn make_mirror(&self, holder: &Holder, wish: Wish, asks: bool) -> Result<(View, Whose)> {
        let process = still(holder).ok_or_else(|| Error::ContainerExited(holder.label().to_owned()))?;
        let at_network = |error| Error::host::<std::io::Error>("look at a network namespace")(error);
        let (network, ours) = (network::of(&process).map_err(at_network)?, network::own().map_err(at_network)?);
        let mut views = View::unclaimed(&holder.id);
        let new = View::create(&holder.id, holder.start_time)?;
        let network = (network != ours).then_some(network);
        let wants = wish != Wish::Never;
        let mut whose = Whose {
            holder: holder.clone(),
            network,
            asks,
            wants,
            is_pending: wants,
            has_udevd: false,
            sees_view: false,
            made: Vec::new(),
            label: None,
        };
        // Before the act, so that it is found.
        new.claim(&whose)?;
        if !wants {
            return Ok((new, whose));
        }
        let at = match self.show_view(holder, &process, &new, &views, wish) {
            Ok((at, label, made)) => {
                (whose.label, whose.made) = (label, made);
                Some(at)
            }
            Err(Error::ContainerExited(label)) => {
                new.remove();
                return Err(Error::ContainerExited(label));
            }
            // It answers slowly, or is starting still: at the next occasion.
            Err(error @ Error::TimedOut(_)) => return Err(error),
            Err(error) => {
                tracing::warn!(container = holder.label(), "{RUN_UDEV} is not shown: {}", error.chain());
                None
            }
        };
        whose.is_pending = false;
        whose.has_udevd = at == Some(At::Own { has_udevd: true });
        whose.sees_view = matches!(at, Some(At::Ours(_)));
        // One that the hook has made is there from the start. What an interrupted one made is the new one itself.
        views.retain(|view| view.path() != new.path());
        let is_at = |view: &View| matches!(at, Some(At::Ours(id)) if view.id().is_ok_and(|its| its == id));
        let mut view = match views.iter().position(is_at) {
            Some(at) => {
                new.remove();
                views.swap_remove(at)
            }
            None => new,
        };
        if let Some(label) = &whose.label {
            view.set_label(label).map_err(Error::host(format!("label {}", view.path().display())))?;
        }
        view.claim(&whose)?;
        Ok((view, whose))
    }

    /// Takes the view from those of whom `asks` says that they ask for nothing any more, and that have nothing either.
    pub fn follow_asking(&mut self, asks: impl Fn(&str) -> Option<bool>) {
        let mut over = Vec::new();
        for (id, mirror) in &mut self.mirrors.all {
            if mirror.whose.asks && asks(id) == Some(false) {
                mirror.whose.asks = false;
                if let Err(error) = mirror.view.claim(&mirror.whose) {
                    tracing::warn!(container = mirror.whose.holder.label(), "{}", error.chain());
                }
                over.push(mirror.whose.holder.clone());
            }
        }
        over.iter().for_each(|holder| self.close_unless_asked(holder));
    }

    /// What was shown only for what was attached goes with it.
    pub(super) fn close_unless_asked(&mut self, holder: &Holder) {
        let is_over = |mirror: &Mirror| mirror.shown.is_empty() && !mirror.whose.asks;
        if self.mirrors.all.get(&holder.id).is_some_and(is_over) {
            self.close(holder);
        }
    }

    /// Takes the view from the container.
    pub(super) fn close(&mut self, holder: &Holder) {
        let is_its = |mirror: &&Mirror| mirror.whose.holder.is_same_run(holder);
        let Some(mirror) = self.mirrors.all.get(&holder.id).filter(is_its) else { return };
        let id = mirror.view.id().ok();
        let made = mirror.whose.made.clone();
        if let (Some(process), Some(id)) = (still(holder), id) {
            let removed =
                own_descriptors().map_err(Error::host("look at our own descriptors")).and_then(|descriptors| {
                    inside(holder.label(), &process, self.host, move |inside| {
                        hide(inside, &descriptors, RUN_UDEV, id, &made)
                    })?
                    .map_err(|error| node_error(holder, error))
                });
            match removed {
                Ok(()) | Err(Error::ContainerExited(_)) => reached("mirror: a view is unmounted"),
                Err(error) => tracing::warn!(container = holder.label(), "{RUN_UDEV} stays: {}", error.chain()),
            }
        }
        self.unmirror(&holder.id);
    }

    fn show_view(
        &self,
        holder: &Holder,
        process: &Process,
        new: &View,
        others: &[View],
        wish: Wish,
    ) -> Result<(At, Option<String>, Vec<String>)> {
        let is_now = || process.program().is_some_and(|name| name == "systemd");
        let runs_systemd = is_now() || holder.user == 0 && runtime::runs_systemd(&holder.id);
        let failed = |error| Error::host::<std::io::Error>(format!("clone {}", new.path().display()))(error);
        let ours =
            others.iter().filter_map(|view| view.id().ok()).chain([new.id().map_err(failed)?]).collect::<Vec<_>>();
        let hosts = id_of(RUN_UDEV.as_ref()).ok();
        let detached = detached(&new.path()).map_err(failed)?;
        let has_labels = label::is_on();
        inside(holder.label(), process, self.host, move |inside| {
            let keeps = || if wish == Wish::Always { Ok(None) } else { own(inside, RUN_UDEV, runs_systemd) };
            let mut made = Vec::new();
            let at = show(inside, &detached, RUN_UDEV, (&ours, hosts), keeps, &mut made)?;
            Ok((at, has_labels.then(|| label_of_files(inside)).flatten(), made))
        })?
        .map_err(|error| node_error(holder, error))
    }

    /// Whether the container has a udevd of its own: that gives nodes their owner and mode, makes links and tells those
    /// inside.
    pub fn has_udevd(&self, holder: &Holder) -> bool {
        let mirror = self.mirrors.all.get(&holder.id).filter(|mirror| mirror.whose.holder.is_same_run(holder));
        mirror.is_some_and(|mirror| mirror.whose.has_udevd)
    }

    /// A container ended: what it was shown went with it, unless it runs again already.
    pub fn unmirror_ended(&mut self, id: &str) {
        if self.mirrors.all.get(id).is_some_and(Mirror::has_ended) {
            self.unmirror(id);
        }
    }

    pub(super) fn unmirror(&mut self, id: &str) {
        if let Some(mirror) = self.mirrors.all.remove(id) {
            mirror.view.remove();
        }
    }
}
