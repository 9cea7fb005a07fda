//! The figures taken: kept in a file after each round, so that a run that is cut short is not lost.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::Result;
use crate::host::Disks;
use crate::live::Figure;
use crate::trace::Trace;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Quantity {
    BackupBase,
    BackupDay1,
    BackupDay2,
    StoredBase,
    StoredDay1,
    StoredDay2,
    FirstByte,
    Sequential,
    RandomOne,
    RandomOneP50,
    RandomOneP99,
    RandomFour,
    RandomFourP50,
    RandomFourP99,
    BootReads,
    Restore,
    BackupPeak,
    MountPeak,
}

impl Quantity {
    pub(crate) const BACKUP: [Self; 3] = [Self::BackupBase, Self::BackupDay1, Self::BackupDay2];
    pub(crate) const STORED: [Self; 3] = [Self::StoredBase, Self::StoredDay1, Self::StoredDay2];

    /// In the document's order: heading, unit, and digits after the point.
    pub(crate) const PRINTED: [(Self, &'static str, &'static str, usize); 18] = [
        (Self::BackupBase, "First backup", "s", 2),
        (Self::BackupDay1, "Second backup (day 1)", "s", 2),
        (Self::BackupDay2, "Third backup (day 2)", "s", 2),
        (Self::StoredBase, "Stored after the first backup", "MiB", 0),
        (Self::StoredDay1, "Stored after the second", "MiB", 0),
        (Self::StoredDay2, "Stored after the third", "MiB", 0),
        (Self::FirstByte, "Mount to first byte", "ms", 1),
        (Self::Sequential, "Mounted: sequential read", "MB/s", 0),
        (Self::RandomOne, "Mounted: 4 KiB random reads, cold, 1 reader", "reads/s", 0),
        (Self::RandomOneP50, "… half of them within (p50)", "µs", 0),
        (Self::RandomOneP99, "… 99 of 100 within (p99)", "µs", 0),
        (Self::RandomFour, "Mounted: 4 KiB random reads, cold, 4 readers", "reads/s", 0),
        (Self::RandomFourP50, "… half of them within (p50)", "µs", 0),
        (Self::RandomFourP99, "… 99 of 100 within (p99)", "µs", 0),
        (Self::BootReads, "Mounted: the reads of a boot, replayed cold", "s", 2),
        (Self::Restore, "Restore to a raw file", "s", 2),
        (Self::BackupPeak, "Peak memory of a backup", "MiB", 0),
        (Self::MountPeak, "Peak memory of a mount", "MiB", 0),
    ];

    pub(crate) fn unit(self) -> &'static str {
        Self::PRINTED.iter().find(|(printed, ..)| *printed == self).map_or("", |(.., unit, _)| unit)
    }

    pub(crate) fn more_is_better(self) -> bool {
        matches!(self, Self::Sequential | Self::RandomOne | Self::RandomFour)
    }
}

/// What reseal needed on a disk of unusual size.
#[derive(Serialize, Deserialize)]
pub(crate) struct Memory {
    pub(crate) disk: String,
    pub(crate) backup_mib: f64,
    pub(crate) second_backup_mib: f64,
    pub(crate) mount_mib: f64,
}

#[derive(Serialize, Deserialize)]
pub(crate) struct Samples {
    pub(crate) disks: String,
    pub(crate) trace: String,
    /// The least that the machine was idle before a tool's turn, in percent: others at work make figures worthless.
    pub(crate) idle_percent: f64,
    /// In the order in which they were presented.
    pub(crate) tools: Vec<Tool>,
    pub(crate) memory: Vec<Memory>,
    #[serde(default)]
    pub(crate) live: Vec<Figure>,
    #[serde(default)]
    pub(crate) rekey: Vec<Figure>,
    #[serde(default)]
    pub(crate) remote: Vec<Figure>,
    #[serde(default)]
    pub(crate) tenants: Vec<Figure>,
    #[serde(default)]
    pub(crate) recovery: Vec<Figure>,
    #[serde(default)]
    pub(crate) prune: Vec<Figure>,
    #[serde(default)]
    pub(crate) objects: Vec<Figure>,
}

#[derive(Serialize, Deserialize)]
pub(crate) struct Tool {
    pub(crate) name: String,
    pub(crate) about: String,
    /// Why it is not in the tables, or not in all rounds.
    pub(crate) left_out: Option<String>,
    figures: BTreeMap<Quantity, Vec<f64>>,
}

const FILE: &str = "samples.json";

impl Samples {
    pub(crate) fn begin(disks: &Disks, trace: &Trace) -> Self {
        Self {
            disks: disks.summary.clone(),
            trace: trace.summary(),
            idle_percent: 100.0,
            tools: Vec::new(),
            memory: Vec::new(),
            live: Vec::new(),
            rekey: Vec::new(),
            remote: Vec::new(),
            tenants: Vec::new(),
            recovery: Vec::new(),
            prune: Vec::new(),
            objects: Vec::new(),
        }
    }

    pub(crate) fn load(folder: &Path) -> Result<Self> {
        let text =
            std::fs::read(folder.join(FILE)).map_err(|error| format!("no samples of an earlier run: {error}"))?;
        Ok(serde_json::from_slice(&text)?)
    }

    pub(crate) fn save(&self, folder: &Path) -> Result<()> {
        Ok(std::fs::write(folder.join(FILE), serde_json::to_vec_pretty(self)?)?)
    }

    fn tool(&mut self, name: &str) -> &mut Tool {
        let index = self.tools.iter().position(|tool| tool.name == name).unwrap_or_else(|| {
            let (name, about) = (name.to_owned(), String::new());
            self.tools.push(Tool { name, about, left_out: None, figures: BTreeMap::new() });
            self.tools.len() - 1
        });
        &mut self.tools[index]
    }

    pub(crate) fn describe(&mut self, name: &str, about: &str) {
        self.tool(name).about = about.to_owned();
    }

    /// Whether a tool takes part and is there.
    pub(crate) fn describes(&self, name: &str) -> bool {
        self.tools.iter().any(|tool| tool.name == name && !tool.about.is_empty())
    }

    pub(crate) fn leave_out(&mut self, name: &str, reason: &str) {
        self.tool(name).left_out = Some(reason.to_owned());
    }

    pub(crate) fn failed(&self, name: &str) -> bool {
        self.tools.iter().any(|tool| tool.name == name && tool.left_out.is_some())
    }

    pub(crate) fn add(&mut self, name: &str, quantity: Quantity, value: f64) {
        self.tool(name).figures.entry(quantity).or_default().push(value);
    }

    /// How many rounds a tool has completed.
    pub(crate) fn rounds(&self, name: &str) -> usize {
        let tool = self.tools.iter().find(|tool| tool.name == name);
        tool.and_then(|tool| tool.spread(Quantity::Restore)).map_or(0, |spread| spread.count)
    }

    pub(crate) fn median(&self, name: &str, quantity: Quantity) -> Option<f64> {
        self.tools.iter().find(|tool| tool.name == name)?.spread(quantity).map(|spread| spread.median)
    }
}

pub(crate) struct Spread {
    pub(crate) least: f64,
    pub(crate) median: f64,
    pub(crate) most: f64,
    pub(crate) count: usize,
}

impl Tool {
    pub(crate) fn spread(&self, quantity: Quantity) -> Option<Spread> {
        let mut sorted = self.figures.get(&quantity)?.clone();
        sorted.sort_by(f64::total_cmp);
        let (least, most) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median =
            if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) };
        Some(Spread { least, median, most, count: sorted.len() })
    }
}
