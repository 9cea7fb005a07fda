//! `--changes FILE`: areas that changed, as VMware's QueryChangedDiskAreas answers.
//!
//! ```json
//! {"changeId": "52 de … /4", "newChangeId": "52 de … /7",
//!  "startOffset": 0, "length": 8589934592, "changedArea": [{"start": 65536, "length": 131072}]}
//! ```
//!
//! or a list of such windows, for a disk that was asked about in parts. What no window covers counts as changed.

use std::io::Read;
use std::ops::Range;
use std::path::Path;

use serde::Deserialize;

use crate::BackupError;

/// Longest file that is read, in bytes: some million areas.
const MAX_FILE: u64 = 256 << 20;

/// A list of changed areas, parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changes {
    /// Since when they tell, if the file says so.
    pub since: Option<String>,
    /// Names the moment that they lead to, so that the next list can start there.
    pub now: Option<String>,
    windows: Vec<Range<u64>>,
    areas: Vec<Range<u64>>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Document {
    One(Window),
    Many(Vec<Window>),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Window {
    #[serde(default)]
    change_id: Option<String>,
    #[serde(default)]
    new_change_id: Option<String>,
    start_offset: u64,
    length: u64,
    #[serde(default)]
    changed_area: Vec<Area>,
}

#[derive(Deserialize)]
struct Area {
    start: u64,
    length: u64,
}

impl Changes {
    /// Those of a disk of that length, ascending and disjoint, that somebody has found.
    pub fn of_areas(length: u64, areas: Vec<Range<u64>>) -> Changes {
        let windows = Some(0..length).filter(|whole| !whole.is_empty()).into_iter().collect();
        Changes { since: None, now: None, windows, areas }
    }

    /// Bytes that they have.
    pub fn bytes(&self) -> u64 {
        self.areas.iter().map(|area| area.end - area.start).sum()
    }

    /// Reads and checks such a file.
    pub fn read(path: &Path) -> Result<Changes, BackupError> {
        let wrong = |what: String| BackupError::Usage(format!("--changes {}: {what}", path.display()));
        let file = std::fs::File::open(path).map_err(|e| wrong(e.to_string()))?;
        let mut text = Vec::new();
        file.take(MAX_FILE + 1).read_to_end(&mut text).map_err(|e| wrong(e.to_string()))?;
        if text.len() as u64 > MAX_FILE {
            return Err(wrong(format!("longer than {MAX_FILE} bytes")));
        }
        Changes::parse(&text).map_err(wrong)
    }

    fn parse(text: &[u8]) -> Result<Changes, String> {
        let document = serde_json::from_slice(text).map_err(|e| {
            format!(
                "{e}; expected is what QueryChangedDiskAreas answers, as JSON: \
                 {{\"startOffset\", \"length\", \"changedArea\": [{{\"start\", \"length\"}}]}} or a list of these"
            )
        })?;
        let given = match document {
            Document::One(window) => vec![window],
            Document::Many(windows) => windows,
        };
        let mut changes = Changes { since: None, now: None, windows: Vec::new(), areas: Vec::new() };
        let range = |start: u64, length: u64| {
            start.checked_add(length).map(|end| start..end).ok_or(format!("the area at {start} is too long"))
        };
        let same = |have: &mut Option<String>, found: Option<String>, name: &str| match (&have, found) {
            (Some(one), Some(other)) if *one != other => Err(format!("its windows have different {name}s")),
            (_, None) => Ok(()),
            (_, found) => {
                *have = found;
                Ok(())
            }
        };
        for window in given {
            same(&mut changes.since, window.change_id, "changeId")?;
            same(&mut changes.now, window.new_change_id, "newChangeId")?;
            let whole = range(window.start_offset, window.length)?;
            for area in window.changed_area {
                let area = range(area.start, area.length)?;
                if area.start < whole.start || area.end > whole.end {
                    return Err(format!("the area {} to {} is outside of its window", area.start, area.end));
                }
                changes.areas.push(area);
            }
            changes.windows.push(whole);
        }
        changes.windows = merged(changes.windows);
        changes.areas = merged(changes.areas);
        Ok(changes)
    }

    /// All of a disk of that length that may have changed, ascending and disjoint; or why the list can't be about it.
    pub fn of_disk(&self, length: u64) -> Result<Vec<Range<u64>>, String> {
        if let Some(area) = self.areas.last().filter(|area| area.end > length) {
            return Err(format!("it has an area that ends at byte {}, past the disk's end at {length}", area.end));
        }
        let mut areas = self.areas.clone();
        let mut known = 0;
        for window in &self.windows {
            if window.start > known {
                areas.push(known..window.start.min(length));
            }
            known = known.max(window.end);
        }
        if known < length {
            areas.push(known..length);
        }
        Ok(merged(areas))
    }
}

/// The same bytes as ascending, disjoint areas, none of them empty.
pub(crate) fn merged(mut areas: Vec<Range<u64>>) -> Vec<Range<u64>> {
    areas.retain(|area| area.start < area.end);
    areas.sort_by_key(|area| area.start);
    let mut merged: Vec<Range<u64>> = Vec::with_capacity(areas.len());
    for area in areas {
        match merged.last_mut() {
            Some(last) if area.start <= last.end => last.end = last.end.max(area.end),
            _ => merged.push(area),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_and_areas_are_taken_as_they_are_told() {
        let changes = Changes::parse(
            br#"[{"changeId": "a/1", "newChangeId": "a/2", "startOffset": 0, "length": 1000,
                  "changedArea": [{"start": 500, "length": 10}, {"start": 505, "length": 100}, {"start": 3, "length": 0}]},
                 {"startOffset": 2000, "length": 1000, "changedArea": [{"start": 2100, "length": 1}]}]"#,
        )
        .unwrap();
        assert_eq!((changes.since.as_deref(), changes.now.as_deref()), (Some("a/1"), Some("a/2")));
        // Between the windows, and after them, nothing is known.
        assert_eq!(changes.of_disk(4000).unwrap(), [500..605, 1000..2000, 2100..2101, 3000..4000]);
        assert!(changes.of_disk(2050).unwrap_err().contains("past the disk's end"));
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        for (text, said) in [
            (&b"[1"[..], "expected is"),
            (br#"{"startOffset": -1, "length": 5}"#, "expected is"),
            (
                br#"{"startOffset": 10, "length": 5, "changedArea": [{"start": 9, "length": 2}]}"#,
                "outside of its window",
            ),
            (br#"{"startOffset": 18446744073709551615, "length": 5}"#, "too long"),
            (
                br#"[{"changeId":"a","startOffset":0,"length":1},{"changeId":"b","startOffset":1,"length":1}]"#,
                "different",
            ),
        ] {
            let error = Changes::parse(text).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
    }
}
