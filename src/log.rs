//! The log: to the journal or to stderr, one line an event, whatever a container has put into its names. The agent counts
//! warnings and errors that repeat.

use std::fmt::Debug;
use std::io::IsTerminal;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

use crate::core::flood::{Flood, Untold};
use crate::core::text::printable;

/// The target of lines that are written here: these are neither counted nor looked at again.
const OWN: &str = "qm_hotplug::log";

/// What was told and when, of an agent.
static FLOOD: LazyLock<(Mutex<Flood>, Instant)> = LazyLock::new(|| (Mutex::default(), Instant::now()));

/// Who logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// A command, for a person at a terminal.
    Command,
    /// The hook. An engine throws away what it writes to stderr.
    Hook,
    /// The agent.
    Agent,
}

/// Logs from now on: to the journal, where that is to be and it is there, else to stderr; says which. `QM_HOTPLUG_LOG`
/// sets the level.
pub fn start(who: Who) -> Result<bool, TryInitError> {
    let to_journal = who == Who::Hook || who == Who::Agent && stderr_is_the_journal();
    let journal = if to_journal { tracing_journald::layer().ok() } else { None };
    let is_heard = who != Who::Command && (journal.is_some() || !to_journal);
    let usual = || Targets::new().with_default(if is_heard { LevelFilter::INFO } else { LevelFilter::WARN });
    let set = std::env::var("QM_HOTPLUG_LOG").ok().and_then(|text| text.parse().ok());
    let tidy = Tidy { counts: who == Who::Agent };
    let registry = tracing_subscriber::registry().with(set.unwrap_or_else(usual)).with(tidy);
    if let Some(journal) = journal {
        registry.with(journal.with_syslog_identifier("qm-hotplug".into())).try_init()?;
        return Ok(true);
    }
    let plain = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false);
    registry.with(plain.with_ansi(std::io::stderr().is_terminal() && colours_are_welcome())).try_init()?;
    Ok(false)
}

/// Unless `NO_COLOR` is set (no-color.org).
pub(crate) fn colours_are_welcome() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Whether stderr is what systemd connected to the journal: the variable is inherited by children whose stderr is not.
fn stderr_is_the_journal() -> bool {
    let stream = std::env::var("JOURNAL_STREAM").unwrap_or_default();
    let stderr = rustix::fs::fstat(std::io::stderr());
    stderr.is_ok_and(|stat| stream == format!("{}:{}", stat.st_dev, stat.st_ino))
}

/// Tells how often lines were repeated that were told a minute ago. It costs nothing where there are none.
pub fn tell_repeats() {
    let untold = flood().due(now());
    untold.into_iter().for_each(tell);
}

/// The same for all lines, before the end or a new beginning: from then on all is told again.
pub fn tell_all_repeats() {
    let untold = flood().rest();
    untold.into_iter().for_each(tell);
}

fn tell(Untold { container, line, count }: Untold) {
    match line {
        Some(line) => tracing::warn!(target: OWN, container, repeated = count, "repeated {count} times: {line}"),
        None => tracing::warn!(target: OWN, container, repeated = count, "{count} other lines were not logged"),
    }
}

fn flood() -> MutexGuard<'static, Flood> {
    FLOOD.0.lock().unwrap_or_else(PoisonError::into_inner)
}

fn now() -> u64 {
    FLOOD.1.elapsed().as_millis() as u64
}

/// Holds back what only repeats, and has lines written anew that are not fit for a terminal and a log.
struct Tidy {
    counts: bool,
}

impl<S: Subscriber> Layer<S> for Tidy {
    fn event_enabled(&self, event: &Event<'_>, _: Context<'_, S>) -> bool {
        let (level, target) = (*event.metadata().level(), event.metadata().target());
        if target == OWN {
            return true;
        }
        let mut line = Line::default();
        event.record(&mut line);
        // In this order of theirs the graver levels are the lesser ones.
        if self.counts && level <= Level::WARN && !flood().tell(&line.container, &line.message, now()) {
            return false;
        }
        if line.is_printable {
            return true;
        }
        let Line { container, device, message, .. } = line;
        match level {
            Level::ERROR => tracing::error!(target: OWN, container, device, "{message}"),
            Level::WARN => tracing::warn!(target: OWN, container, device, "{message}"),
            Level::INFO => tracing::info!(target: OWN, container, device, "{message}"),
            _ => tracing::debug!(target: OWN, container, device, "{message}"),
        }
        false
    }
}

/// What is in an event, printable.
#[derive(Debug)]
struct Line {
    message: String,
    container: String,
    device: Option<String>,
    /// Whether all of it was so from the beginning.
    is_printable: bool,
}

impl Default for Line {
    fn default() -> Line {
        Line { message: String::new(), container: String::new(), device: None, is_printable: true }
    }
}

impl Line {
    fn take(&mut self, field: &Field, text: &str) {
        let clean = printable(text);
        self.is_printable &= clean == text;
        match field.name() {
            "message" => self.message = clean,
            "container" => self.container = clean,
            "device" => self.device = Some(clean),
            _ => {}
        }
    }
}

impl Visit for Line {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.take(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.take(field, &format!("{value:?}"));
    }
}
