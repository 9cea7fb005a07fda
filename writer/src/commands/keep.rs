//! Options that say which restore points stay.

use std::time::Duration;

use reseal_format::retention::Policy;
use reseal_writer::span;

/// The options that keep some, by the names that clap has for them.
pub(super) const KEEP_RULES: [&str; 7] =
    ["keep_last", "keep_hourly", "keep_daily", "keep_weekly", "keep_monthly", "keep_yearly", "keep_within"];

/// What stays. A restore point that one of these keeps, or that is held, is not forgotten.
#[derive(clap::Args)]
pub(super) struct KeepArgs {
    /// The newest N
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_last: u32,
    /// The newest of each of N hours (of UTC, as all these)
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_hourly: u32,
    /// The newest of each of N days
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_daily: u32,
    /// The newest of each of N weeks, from Monday on
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_weekly: u32,
    /// The newest of each of N months
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_monthly: u32,
    /// The newest of each of N years
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_yearly: u32,
    /// All that are no older than this, such as 48h or 2w, when the VM's newest is made
    #[arg(long, value_name = "SPAN", value_parser = span::parse)]
    keep_within: Option<Duration>,
}

impl KeepArgs {
    pub(super) fn policy(&self) -> Policy {
        Policy {
            last: self.keep_last,
            hourly: self.keep_hourly,
            daily: self.keep_daily,
            weekly: self.keep_weekly,
            monthly: self.keep_monthly,
            yearly: self.keep_yearly,
            within: self.keep_within.map(|span| span.as_secs()),
            ..Policy::default()
        }
    }
}

/// A policy as the options that make it.
pub(super) fn options(policy: &Policy) -> String {
    let counts = [
        ("last", policy.last),
        ("hourly", policy.hourly),
        ("daily", policy.daily),
        ("weekly", policy.weekly),
        ("monthly", policy.monthly),
        ("yearly", policy.yearly),
    ];
    let counts = counts.into_iter().filter(|(_, count)| *count > 0);
    let mut words: Vec<String> = counts.map(|(rule, count)| format!("--keep-{rule} {count}")).collect();
    words.extend(policy.within.map(|seconds| {
        // In the largest unit that says it exactly.
        let units = [(7 * 86_400, "w"), (86_400, "d"), (3600, "h"), (60, "m"), (1, "s")];
        let (unit, name) = units.into_iter().find(|(unit, _)| seconds % unit == 0).unwrap_or((1, "s"));
        format!("--keep-within {}{name}", seconds / unit)
    }));
    words.extend(policy.unknown().map(|rule| format!("{rule} (unknown to this version: nothing is forgotten by it)")));
    words.join(" ")
}
