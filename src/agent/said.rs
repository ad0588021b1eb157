//! What was said of containers, so that the log does not have it again at each event.

use std::cell::RefCell;
use std::collections::BTreeSet;

/// How much of what was said is remembered.
const REMEMBERED: usize = 10_000;

/// What was said of containers, so that it is not said again at each event.
#[derive(Debug, Default)]
pub(super) struct Said(RefCell<BTreeSet<(String, String)>>);

impl Said {
    /// Warns, if that was not said before of the container with this id.
    pub(super) fn once(&self, id: &str, container: &str, text: String) {
        let mut said = self.0.borrow_mut();
        if said.len() >= REMEMBERED {
            said.clear();
        }
        if said.insert((id.to_owned(), text.clone())) {
            tracing::warn!(container, "{text}");
        }
    }

    /// Forgets what was said of the container with this id.
    pub(super) fn forget(&self, id: &str) {
        self.0.borrow_mut().retain(|(its, _)| its != id);
    }
}
