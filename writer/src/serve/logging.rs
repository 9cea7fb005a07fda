//! The log of the server: text or JSON on standard error, where systemd takes it up.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use tracing::level_filters::LevelFilter;
use tracing::{Metadata, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::{Context, Filter, SubscriberExt};
use tracing_subscriber::registry;

use super::operation::{Format, Level, Log};

/// Lets through what is as loud as the level, which may change.
#[derive(Clone)]
pub struct Logging(Arc<AtomicU8>);

const fn number(level: Level) -> u8 {
    match level {
        Level::Error => 0,
        Level::Warn => 1,
        Level::Info => 2,
        Level::Debug => 3,
    }
}

impl Logging {
    /// Begins to log, for the whole process.
    pub fn start(log: Log) -> Logging {
        let logging = Logging(Arc::new(AtomicU8::new(number(log.level))));
        let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_target(false);
        let subscriber: Box<dyn Subscriber + Send + Sync> = match log.format {
            Format::Text => Box::new(registry().with(lines.with_ansi(false).with_filter(logging.clone()))),
            Format::Json => {
                let lines = lines.json().flatten_event(true).with_current_span(true).with_span_list(false);
                Box::new(registry().with(lines.with_filter(logging.clone())))
            }
        };
        // Where there is one already, that one goes on.
        let _ = tracing::subscriber::set_global_default(subscriber);
        logging
    }

    /// Changes how much is logged.
    pub(super) fn set_level(&self, level: Level) {
        self.0.store(number(level), Ordering::Relaxed);
        tracing::callsite::rebuild_interest_cache();
    }

    fn level(&self) -> LevelFilter {
        match self.0.load(Ordering::Relaxed) {
            0 => LevelFilter::ERROR,
            1 => LevelFilter::WARN,
            2 => LevelFilter::INFO,
            _ => LevelFilter::DEBUG,
        }
    }
}

impl<S> Filter<S> for Logging {
    fn enabled(&self, about: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        // Spans say whom a line is about, however loud it is.
        about.is_span() || *about.level() <= self.level()
    }
}

/// What others have a part in is shown without what could drive a terminal or begin a line.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
