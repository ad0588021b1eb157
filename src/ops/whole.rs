//! Devices without a node that granted ones are parts of: they are shown with the first part, and no more after the last.

use crate::core::ledger::Holder;
use crate::core::mirror::{Profile, Shown, Told};
use crate::ops::Executor;
use crate::ops::mirrors::Mirror;
use crate::sys::udev;

impl Executor {
    /// Shows the device that this one is a part of, or what is new about it, and tells of it. udevd takes a device and its
    /// parts in turn: at the event of the part with the number `latest`, it was done with all that came before.
    pub(super) fn reveal_whole(&mut self, holder: &Holder, part: &Shown, told: &[Told], latest: u64) {
        let Some(whole) = &part.description.whole else { return };
        let name = whole.name();
        let Some(mirror) = self.mirrors.all.get(&holder.id) else { return };
        // Another device in its place.
        if let Some(before) = mirror.wholes.get(&name).filter(|before| !before.is_same(whole)).cloned() {
            self.strike_whole(holder, &before);
        }
        let Some(audience) = self.mirrors.all.get(&holder.id).map(Mirror::audience) else { return };
        // Those who listen to the namespace of several containers hear each event once.
        let known = audience.and_then(|audience| self.mirrors.whole(audience, whole)).cloned();
        let last = audience.map_or(0, |audience| self.mirrors.last_told(audience, &name));
        let is_news = |told: &&Told| told.sequence > last && (known.is_some() || told.sequence > latest);
        let news: Vec<_> = told.iter().filter(is_news).map(|told| (told.action, told.sequence)).collect();
        let Some(mirror) = self.mirrors.all.get_mut(&holder.id) else { return };
        let before = mirror.wholes.insert(name.clone(), whole.clone());
        if mirror.whose.sees_view
            && before.is_none_or(|before| before.record != whole.record)
            && let Err(error) = mirror.view.write(&name, whole.record.as_deref())
        {
            tracing::warn!(container = holder.label(), "libudev inside is not shown {name}: {error}");
        }
        let actions = match known {
            None => [("add", latest)].into_iter().chain(news).collect(),
            Some(known) if news.is_empty() && known != *whole => vec![("change", udev::sequence())],
            Some(_) => news,
        };
        let latest = actions.iter().map(|(_, sequence)| *sequence).max().unwrap_or(last);
        mirror.told.insert(name, latest);
        self.tell(holder, whole, &actions);
    }

    /// Shows the device that this one was a part of no more, where no other part of it is shown.
    pub(super) fn hide_whole(&mut self, holder: &Holder, part: &Shown) {
        let Some(whole) = &part.description.whole else { return };
        let Some(mirror) = self.mirrors.all.get(&holder.id) else { return };
        let is_part = |other: &Shown| other.description.whole.as_ref().is_some_and(|its| its.is_same(whole));
        if !mirror.shown.values().any(is_part) {
            self.strike_whole(holder, whole);
        }
    }

    fn strike_whole(&mut self, holder: &Holder, whole: &Profile) {
        let name = whole.name();
        let Some(mirror) = self.mirrors.all.get_mut(&holder.id) else { return };
        if !mirror.wholes.get(&name).is_some_and(|its| its.is_same(whole)) {
            return;
        }
        mirror.wholes.remove(&name);
        mirror.told.remove(&name);
        if mirror.whose.sees_view
            && let Err(error) = mirror.view.strike(&name)
        {
            tracing::warn!(container = holder.label(), "{name} is still shown: {error}");
        }
        if mirror.audience().is_some_and(|audience| self.mirrors.whole(audience, whole).is_none()) {
            self.tell(holder, whole, &[("remove", udev::sequence())]);
        }
    }
}
