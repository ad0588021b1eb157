//! Devices without a node that granted ones are parts of: they are shown with the first part, and no more after the last.

use crate::core::ledger::Holder;
use crate::core::mirror::{Shown, Told};
use crate::ops::Executor;
use crate::sys::udev;

impl Executor {
    /// Shows the device that this one is a part of, or what is new about it, and tells of it. udevd takes a device and its
    /// parts in turn: at the event of the part with the number `latest`, it was done with all that came before.
    pub(super) fn reveal_whole(&mut self, holder: &Holder, part: &Shown, told: &[Told], latest: u64) {
        let Some(whole) = &part.description.whole else { return };
        let name = whole.name();
        let Some(network) = self.mirrors.all.get(&holder.id).map(|mirror| mirror.whose.network) else { return };
        let is_known = network.is_some_and(|network| self.mirrors.know_whole(network, &name));
        // Those who listen to the namespace of several containers hear each event once.
        let last = network.map_or(0, |network| self.mirrors.last_told(network, &name));
        let news: Vec<_> =
            told.iter().filter(|told| told.sequence > last).map(|told| (told.action, told.sequence)).collect();
        let Some(mirror) = self.mirrors.all.get_mut(&holder.id) else { return };
        let before = mirror.wholes.insert(name.clone(), whole.clone());
        if mirror.whose.sees_view
            && before.as_ref().is_none_or(|before| before.record != whole.record)
            && let Err(error) = mirror.view.write(&name, whole.record.as_deref())
        {
            tracing::warn!(container = holder.label(), "libudev inside is not shown {name}: {error}");
        }
        let actions = match before {
            None if !is_known => {
                [("add", latest)].into_iter().chain(news.into_iter().filter(|it| it.1 > latest)).collect()
            }
            Some(before) if news.is_empty() && before != *whole => vec![("change", udev::sequence())],
            _ => news,
        };
        let latest = actions.iter().map(|(_, sequence)| *sequence).max().unwrap_or(last);
        mirror.told.insert(name, latest);
        self.tell(holder, whole, &actions);
    }

    /// Shows the device that this one was a part of no more, where no other part of it is shown.
    pub(super) fn hide_whole(&mut self, holder: &Holder, part: &Shown) {
        let Some(whole) = &part.description.whole else { return };
        let name = whole.name();
        let Some(mirror) = self.mirrors.all.get_mut(&holder.id) else { return };
        let is_part = |other: &Shown| other.description.whole.as_ref().is_some_and(|its| its.devpath == whole.devpath);
        if mirror.shown.values().any(is_part) {
            return;
        }
        mirror.wholes.remove(&name);
        mirror.told.remove(&name);
        if mirror.whose.sees_view
            && let Err(error) = mirror.view.strike(&name)
        {
            tracing::warn!(container = holder.label(), "{name} is still shown: {error}");
        }
        if mirror.whose.network.is_some_and(|network| !self.mirrors.know_whole(network, &name)) {
            self.tell(holder, whole, &[("remove", udev::sequence())]);
        }
    }
}
