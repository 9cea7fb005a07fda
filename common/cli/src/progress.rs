//! Progress with rate and remaining time, on a terminal only.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::Output;

/// A progress line; hidden where nobody would see it. Cheap to update from any thread.
pub struct Progress(ProgressBar);

impl Progress {
    /// Over so many bytes.
    pub fn bytes(output: Output, what: &str, total: u64) -> Progress {
        let shown = std::io::stderr().is_terminal() && !output.quiet && !output.json;
        let target = if shown { ProgressDrawTarget::stderr_with_hz(5) } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        let template = "{prefix} {bytes}/{total_bytes} {percent}% {binary_bytes_per_sec}, {eta} left";
        bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_prefix(what.to_owned());
        if shown {
            bar.enable_steady_tick(Duration::from_millis(500));
        }
        Progress(bar)
    }

    /// So many more bytes are done.
    pub fn add(&self, bytes: u64) {
        self.0.inc(bytes);
    }

    /// There are so many bytes more than was known before.
    pub fn expect(&self, bytes: u64) {
        self.0.inc_length(bytes);
    }

    /// Takes the line away.
    pub fn finish(self) {
        self.0.finish_and_clear();
    }
}
