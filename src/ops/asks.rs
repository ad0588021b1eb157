//! What a container asks for: by its annotations, by the host's configuration, and by what a person attached for good.

use crate::core::annotation::{AT_START, Ignored, rules};
use crate::core::attachment::Attached;
use crate::core::container::Container;
use crate::core::rule::Rule;
use crate::core::settings::Settings;
use crate::ops::live::subject;

/// The nodes that it has from its start, by the hook's own annotation, which a container can have from anybody: then it may
/// lose what it names there.
pub(crate) fn nodes_at_start(container: &Container) -> Vec<String> {
    let text = container.annotations.get(AT_START);
    text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

/// What the container asks for by annotations, and what it gets without asking; first of all what a person attached.
pub(crate) fn rules_of(settings: &Settings, attached: &[Attached], container: &Container) -> (Vec<Rule>, Vec<Ignored>) {
    let (mut all, mut ignored) = Default::default();
    if is_heard(settings, container) {
        (all, ignored) = rules(container.annotations(), &settings.categories);
    }
    all.splice(0..0, settings.rules_for(&subject(container, None, false)));
    let mut kept = Vec::new();
    for device in attached.iter().filter(|attached| attached.is_for(container)).flat_map(|attached| &attached.devices) {
        match device.rule(&settings.categories) {
            Ok(rule) => kept.push(rule),
            Err(reason) => ignored.push(Ignored { key: "attach --persist".into(), reason, required: false }),
        }
    }
    all.splice(0..0, kept);
    (all, ignored)
}

/// Whether its own word counts: root's, and that of users whom the configuration names.
pub(crate) fn is_heard(settings: &Settings, container: &Container) -> bool {
    container.owner == 0 || settings.users.contains(&container.owner)
}
