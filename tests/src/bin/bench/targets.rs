//! What reseal must reach, and whether it does.

use crate::samples::{Quantity, Samples};

/// What a mount may keep in memory by default, on top of what it needs.
const MOUNT_CACHE_MIB: f64 = 256.0;

pub(crate) enum Against {
    /// This many times better than another tool.
    Tool(&'static str, f64),
    /// At most this, whatever others do.
    Most(f64),
}

pub(crate) struct Target {
    pub(crate) quantity: Quantity,
    pub(crate) against: Against,
}

pub(crate) struct Verdict {
    /// The bound and what was measured, as the document prints them; nothing is measured where a tool is missing.
    pub(crate) bound: String,
    pub(crate) measured: Option<String>,
    pub(crate) met: bool,
}

impl Verdict {
    pub(crate) fn state(&self) -> &'static str {
        match (&self.measured, self.met) {
            (None, _) => "not measured",
            (_, true) => "met",
            (_, false) => "**not met**",
        }
    }
}

pub(crate) fn all() -> Vec<Target> {
    let mut targets = Vec::new();
    let mut beat = |quantity, tool, factor| targets.push(Target { quantity, against: Against::Tool(tool, factor) });
    beat(Quantity::BackupBase, "borg", 3.0);
    beat(Quantity::BackupBase, "restic", 4.0);
    beat(Quantity::BackupDay1, "borg", 4.0);
    beat(Quantity::BackupDay2, "borg", 4.0);
    beat(Quantity::StoredDay2, "restic", 1.0 / 1.08);
    beat(Quantity::Sequential, "null", 0.8);
    beat(Quantity::Sequential, "rustic", 1.3);
    beat(Quantity::Sequential, "restic", 3.0);
    beat(Quantity::Sequential, "borg", 3.0);
    beat(Quantity::RandomOne, "qemu-luks", 1.3);
    beat(Quantity::RandomOne, "borg", 10.0);
    beat(Quantity::Restore, "restic", 2.0);
    for (quantity, most) in
        [(Quantity::FirstByte, 100.0), (Quantity::BackupPeak, 300.0), (Quantity::MountPeak, 200.0 + MOUNT_CACHE_MIB)]
    {
        targets.push(Target { quantity, against: Against::Most(most) });
    }
    targets
}

impl Target {
    pub(crate) fn judge(&self, samples: &Samples) -> Verdict {
        let reseal = samples.median("reseal", self.quantity);
        match self.against {
            Against::Tool(tool, factor) => {
                let better = reseal
                    .zip(samples.median(tool, self.quantity))
                    .map(|(own, other)| advantage(self.quantity, own, other));
                let met = better.is_some_and(|better| better >= factor);
                // Less stored is a bound from above, which a reciprocal would hide.
                let (bound, measured) = if factor < 1.0 && !self.quantity.more_is_better() {
                    (
                        format!("at most {:.2} × {tool}", 1.0 / factor),
                        better.map(|better| format!("{:.2} ×", 1.0 / better)),
                    )
                } else {
                    (format!("{factor} × {tool}"), better.map(|better| format!("{better:.2} ×")))
                };
                Verdict { bound, measured, met }
            }
            Against::Most(most) => Verdict {
                bound: format!("at most {most} {}", self.quantity.unit()),
                measured: reseal.map(|own| format!("{own:.1} {}", self.quantity.unit())),
                met: reseal.is_some_and(|own| own <= most),
            },
        }
    }
}

/// How many times better the first figure is than the second.
pub(crate) fn advantage(quantity: Quantity, own: f64, other: f64) -> f64 {
    if quantity.more_is_better() { own / other } else { other / own }
}
