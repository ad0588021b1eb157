//! The settings of a host: what all its configuration files say together.

use std::sync::Arc;

use toml::Spanned;

use crate::core::category::Categories;
use crate::core::config::{ConfigFile, ContainerConfig, PolicyConfig, line_of};
use crate::core::glob::Glob;
use crate::core::grammar::{Author, SyntaxError, selection, selector};
use crate::core::policy::{NamePattern, Place, Policies, Policy, Subject};
use crate::core::rule::Rule;
use crate::core::selection::Selection;
use crate::core::text::excerpt;

/// What counts on this host.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// What annotations can name.
    pub categories: Categories,
    /// What they may ask for.
    pub policies: Policies,
    containers: Vec<ContainerTable>,
}

/// Rules for the containers of that name.
#[derive(Debug, Clone)]
struct ContainerTable {
    name: NamePattern,
    selections: Vec<Arc<Selection>>,
}

/// A file's path and its text, or in words why it cannot be read.
pub type File = (String, Result<String, String>);

/// A file that was taken apart.
struct Parsed<'a> {
    path: &'a str,
    text: &'a str,
    file: ConfigFile,
}

impl Settings {
    /// Reads all files, and says what is wrong with those that are passed over whole.
    pub fn read(files: &[File]) -> (Settings, Vec<String>) {
        let (mut parsed, mut problems) = (Vec::new(), Vec::new());
        for (path, text) in files {
            let file = text.as_ref().map_err(String::clone).and_then(|text| Ok((text, ConfigFile::parse(text)?)));
            match file {
                Ok((text, file)) => parsed.push(Parsed { path, text, file }),
                Err(reason) => problems.push((path, text.as_deref().unwrap_or_default(), reason)),
            }
        }
        // A selector may name a category of any other file, so the categories of all come first; and a file whose
        // selectors are wrong takes its categories along.
        let mut settings = loop {
            match Settings::of(&parsed) {
                Ok(settings) => break settings,
                Err((at, reason)) => {
                    let Parsed { path, text, .. } = parsed.remove(at);
                    let path = &files.iter().find(|(its, _)| its == path).expect("it is one of them").0;
                    problems.push((path, text, reason));
                }
            }
        };
        let mut said = Vec::new();
        for (path, text, reason) in problems {
            let problem = format!("{path}: {reason}");
            // What could not be read at all may have held one, too.
            if text.is_empty() || text.contains("policy") {
                settings.policies.unreadable.get_or_insert_with(|| problem.clone());
            }
            said.push(problem);
        }
        (settings, said)
    }

    /// The error names the file that cannot be taken, by its index.
    fn of(files: &[Parsed<'_>]) -> Result<Settings, (usize, String)> {
        let mut settings = Settings::default();
        for (at, parsed) in files.iter().enumerate() {
            settings.categories.apply(&parsed.file).map_err(|reason| (at, reason))?;
        }
        for (at, parsed) in files.iter().enumerate() {
            settings.take(parsed).map_err(|reason| (at, excerpt(&reason)))?;
        }
        Ok(settings)
    }

    fn take(&mut self, parsed: &Parsed<'_>) -> Result<(), String> {
        let file: Arc<str> = parsed.path.into();
        let place = |offset: usize| Place { file: file.clone(), line: line_of(parsed.text, offset) };
        if let Some(required) = parsed.file.require_policy.as_ref().filter(|required| *required.get_ref()) {
            self.policies.required = Some(place(required.span().start));
        }
        for config in &parsed.file.policy {
            let policy = policy(config, &self.categories, &place)?;
            self.policies.all.push(Arc::new(policy));
        }
        for config in &parsed.file.container {
            self.containers.push(container(config, &self.categories, &place)?);
        }
        Ok(())
    }

    /// What this container gets without asking.
    pub fn rules_for(&self, subject: &Subject) -> Vec<Rule> {
        let tables = self.containers.iter().filter(|table| table.name.matches(subject));
        tables.flat_map(|table| table.selections.iter().cloned().map(Rule::Selection)).collect()
    }

    /// Whether there is any container that gets something without asking.
    pub fn has_rules(&self) -> bool {
        !self.containers.is_empty()
    }
}

fn policy(
    config: &Spanned<PolicyConfig>,
    categories: &Categories,
    place: &impl Fn(usize) -> Place,
) -> Result<Policy, String> {
    let (start, config) = (config.span().start, config.get_ref());
    let glob = |text: &Option<Spanned<String>>| text.as_ref().map(|text| glob(text, place)).transpose();
    let read = |text: &Spanned<String>| {
        let at = place(text.span().start);
        selector(text.get_ref(), categories).map(|selector| (selector, at.clone())).map_err(at_line(at, text))
    };
    let allow =
        config.allow.as_ref().map(|all| all.iter().map(|text| Ok(read(text)?.0)).collect::<Result<_, String>>());
    Ok(Policy {
        place: place(start),
        container: config.container.as_ref().map(|text| name_pattern(text, place)).transpose()?,
        image: glob(&config.image)?,
        owner: config.owner,
        cgroup: glob(&config.cgroup)?,
        allow: allow.transpose()?,
        deny: config.deny.iter().map(read).collect::<Result<_, _>>()?,
    })
}

fn container(
    config: &ContainerConfig,
    categories: &Categories,
    place: &impl Fn(usize) -> Place,
) -> Result<ContainerTable, String> {
    let name = name_pattern(&config.matches, place)?;
    let read = |text: &Spanned<String>| {
        let name = excerpt(text.get_ref());
        let selection = selection(&name, text.get_ref(), categories, Author::Root);
        selection.map(Arc::new).map_err(at_line(place(text.span().start), text))
    };
    Ok(ContainerTable { name, selections: config.devices.iter().map(read).collect::<Result<_, _>>()? })
}

fn glob(text: &Spanned<String>, place: &impl Fn(usize) -> Place) -> Result<Glob, String> {
    let line = || place(text.span().start).line;
    Glob::parse(text.get_ref()).map_err(|(_, reason)| format!("line {}: '{}': {reason}", line(), text.get_ref()))
}

fn name_pattern(text: &Spanned<String>, place: &impl Fn(usize) -> Place) -> Result<NamePattern, String> {
    let line = || place(text.span().start).line;
    NamePattern::parse(text.get_ref()).map_err(|reason| format!("line {}: '{}': {reason}", line(), text.get_ref()))
}

fn at_line(place: Place, text: &Spanned<String>) -> impl FnOnce(SyntaxError) -> String {
    move |error| format!("line {}: in \"{}\", {error}", place.line, text.get_ref())
}

#[cfg(test)]
#[path = "settings_tests.rs"]
mod tests;
