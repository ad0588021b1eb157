//! The settings of a host: what all its configuration files say together.

use std::collections::BTreeSet;
use std::sync::Arc;

use toml::Spanned;

use crate::core::category::Categories;
use crate::core::config::{ConfigFile, ContainerConfig, IdConfig, OperatorConfig, PolicyConfig, Wrong, line_of};
use crate::core::glob::Glob;
use crate::core::grammar::{Author, SyntaxError, selection, selector};
use crate::core::operator::{Id, Operator, Who};
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
    /// Ordinary users whose containers are looked for.
    pub users: BTreeSet<u32>,
    /// Who beside root may attach and detach.
    pub operators: Vec<Operator>,
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
            match text {
                Ok(text) => match ConfigFile::parse(text) {
                    Ok(file) => parsed.push(Parsed { path, text, file }),
                    Err(wrong) => problems.push((wrong.at_place(path, text), text.as_str())),
                },
                Err(reason) => problems.push((format!("{path}: {reason}"), "")),
            }
        }
        // A selector may name a category of any other file, so the categories of all come first; and a file whose
        // selectors are wrong takes its categories along.
        let mut settings = loop {
            match Settings::of(&parsed) {
                Ok(settings) => break settings,
                Err((at, wrong)) => {
                    let Parsed { path, text, .. } = parsed.remove(at);
                    problems.push((wrong.at_place(path, text), text));
                }
            }
        };
        // What could not be read at all may have held a policy, too.
        let policy = problems.iter().find(|(_, text)| text.is_empty() || text.contains("policy"));
        settings.policies.unreadable = policy.map(|(problem, _)| problem.clone());
        (settings, problems.into_iter().map(|(problem, _)| problem).collect())
    }

    /// The error names the file that cannot be taken, by its index.
    fn of(files: &[Parsed<'_>]) -> Result<Settings, (usize, Wrong)> {
        let mut settings = Settings::default();
        for (at, parsed) in files.iter().enumerate() {
            settings.categories.apply(&parsed.file).map_err(|wrong| (at, wrong))?;
        }
        for (at, parsed) in files.iter().enumerate() {
            settings.take(parsed).map_err(|wrong| (at, wrong))?;
        }
        Ok(settings)
    }

    fn take(&mut self, parsed: &Parsed<'_>) -> Result<(), Wrong> {
        let file: Arc<str> = parsed.path.into();
        let place = |offset: usize| Place { file: file.clone(), line: line_of(parsed.text, offset) };
        if let Some(required) = parsed.file.require_policy.as_ref().filter(|required| *required.get_ref()) {
            self.policies.required = Some(place(required.span().start));
        }
        self.users.extend(&parsed.file.users);
        for config in &parsed.file.policy {
            let policy = policy(config, &self.categories, parsed.text, &place)?;
            self.policies.all.push(Arc::new(policy));
        }
        for config in &parsed.file.container {
            self.containers.push(container(config, &self.categories, parsed.text)?);
        }
        for config in &parsed.file.operator {
            self.operators.push(operator(config, &self.categories, parsed.text)?);
        }
        Ok(())
    }

    /// What this container gets without asking.
    pub fn rules_for(&self, subject: &Subject) -> Vec<Rule> {
        let tables = self.containers.iter().filter(|table| table.name.gives_to(subject));
        tables.flat_map(|table| table.selections.iter().cloned().map(Rule::Selection)).collect()
    }

    /// Whether there is any container that gets something without asking.
    pub fn has_rules(&self) -> bool {
        !self.containers.is_empty()
    }
}

fn operator(config: &Spanned<OperatorConfig>, categories: &Categories, text: &str) -> Result<Operator, Wrong> {
    let table = config.get_ref();
    let id = |config: &IdConfig| match config {
        IdConfig::Number(number) => Id::Number(*number),
        IdConfig::Name(name) => Id::Name(name.clone()),
    };
    let who = match (&table.user, &table.group) {
        (Some(user), None) => Who::User(id(user)),
        (None, Some(group)) => Who::Group(id(group)),
        _ => return Err(Wrong::of(config, "an operator is a user or a group: write one of them")),
    };
    let read = |string: &Spanned<String>| selector(string.get_ref(), categories).map_err(wrong_in(text, string));
    Ok(Operator {
        who,
        container: table.container.as_ref().map(|string| name_pattern(string, text)).transpose()?,
        allow: table.allow.iter().map(read).collect::<Result<_, _>>()?,
    })
}

fn policy(
    config: &Spanned<PolicyConfig>,
    categories: &Categories,
    text: &str,
    place: &impl Fn(usize) -> Place,
) -> Result<Policy, Wrong> {
    let (start, config) = (config.span().start, config.get_ref());
    let glob = |string: &Option<Spanned<String>>| string.as_ref().map(|string| glob(string, text)).transpose();
    let read = |string: &Spanned<String>| {
        let selector = selector(string.get_ref(), categories).map_err(wrong_in(text, string))?;
        Ok((selector, place(string.span().start)))
    };
    let allow = config.allow.as_ref().map(|all| all.iter().map(|string| Ok(read(string)?.0)).collect());
    Ok(Policy {
        place: place(start),
        container: config.container.as_ref().map(|string| name_pattern(string, text)).transpose()?,
        image: glob(&config.image)?,
        owner: config.owner,
        cgroup: glob(&config.cgroup)?,
        allow: allow.transpose()?,
        deny: config.deny.iter().map(read).collect::<Result<_, _>>()?,
    })
}

fn container(config: &ContainerConfig, categories: &Categories, text: &str) -> Result<ContainerTable, Wrong> {
    let name = name_pattern(&config.matches, text)?;
    let read = |string: &Spanned<String>| {
        let name = excerpt(string.get_ref());
        selection(&name, string.get_ref(), categories, Author::Root).map(Arc::new).map_err(wrong_in(text, string))
    };
    Ok(ContainerTable { name, selections: config.devices.iter().map(read).collect::<Result<_, _>>()? })
}

fn glob(string: &Spanned<String>, text: &str) -> Result<Glob, Wrong> {
    Glob::parse(string.get_ref()).map_err(|(column, reason)| Wrong::in_string(text, string, column + 1, reason))
}

fn name_pattern(string: &Spanned<String>, text: &str) -> Result<NamePattern, Wrong> {
    NamePattern::parse(string.get_ref()).map_err(|(column, reason)| Wrong::in_string(text, string, column + 1, &reason))
}

fn wrong_in(text: &str, string: &Spanned<String>) -> impl FnOnce(SyntaxError) -> Wrong {
    |error| Wrong::in_string(text, string, error.column, &error.reason)
}

#[cfg(test)]
#[path = "settings_tests.rs"]
mod tests;
