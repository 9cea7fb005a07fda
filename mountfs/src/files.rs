//! What the folder of a restore point shows.

use reseal_format::manifest::{Disk, Manifest};
use reseal_vault::Point;
use reseal_vault::cache::Weigh;
use serde::Serialize;

use crate::inodes::FileIndex;

/// Name of the facts file.
const FACTS: &str = "vm.json";
/// Name of the definition where its own can't be used. No disk has it, for theirs end in `.raw`.
const DEFINITION: &str = "definition";
/// Longest name of a file, in bytes, that Linux takes.
const MAX_FILE_NAME: usize = 255;

/// What is in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A disk of the manifest.
    Disk(usize),
    /// The facts about the point.
    Facts,
    /// The captured definition.
    Definition,
}

/// A restore point, with the files that it shows.
pub struct OpenPoint {
    point: Point,
    files: Vec<(String, Content)>,
    facts: String,
}

impl Weigh for OpenPoint {
    fn weight(&self) -> usize {
        let manifest = &self.point.manifest;
        let text: usize =
            manifest.warnings.iter().chain(manifest.disks.iter().map(|disk| &disk.source)).map(String::len).sum();
        let definition = manifest.definition.as_ref().map_or(0, |definition| definition.text.len());
        size_of::<OpenPoint>() + text + definition + self.facts.len() + self.files.len() * (size_of::<Disk>() + 200)
    }
}

impl OpenPoint {
    /// Lays out the files of a point.
    pub fn new(point: Point) -> OpenPoint {
        let manifest = &point.manifest;
        let disks = manifest.disks.iter().enumerate();
        let mut files: Vec<_> = disks.map(|(nth, disk)| (disk_file(disk), Content::Disk(nth))).collect();
        files.push((FACTS.to_owned(), Content::Facts));
        if let Some(definition) = &manifest.definition {
            let name = &definition.file_name;
            let taken = files.iter().any(|(other, _)| other == name);
            let name = if is_file_name(name) && !taken { name } else { DEFINITION };
            files.push((name.to_owned(), Content::Definition));
        }
        let facts = facts(&point, files.last().filter(|(_, content)| *content == Content::Definition));
        OpenPoint { point, files, facts }
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.point.manifest
    }

    /// The files, in the order of their indices.
    pub fn files(&self) -> impl Iterator<Item = (FileIndex, &str, Content)> {
        self.files.iter().enumerate().map(|(nth, (name, content))| {
            // A manifest has at most 256 disks.
            (FileIndex(u16::try_from(nth).unwrap_or(u16::MAX)), name.as_str(), *content)
        })
    }

    /// The file of that name.
    pub fn find(&self, name: &str) -> Option<FileIndex> {
        self.files().find(|(_, other, _)| *other == name).map(|(index, ..)| index)
    }

    /// A file's name and content.
    pub fn file(&self, index: FileIndex) -> Option<(&str, Content)> {
        self.files.get(usize::from(index.0)).map(|(name, content)| (name.as_str(), *content))
    }

    /// The text of a file that is not a disk.
    pub fn text(&self, content: Content) -> &str {
        match (content, &self.point.manifest.definition) {
            (Content::Facts, _) => &self.facts,
            (Content::Definition, Some(definition)) => &definition.text,
            (Content::Definition, None) | (Content::Disk(_), _) => "",
        }
    }

    /// Size of a file, and how many of its bytes are not holes.
    pub fn size(&self, content: Content) -> (u64, u64) {
        match content {
            Content::Disk(nth) => self.point.manifest.disks.get(nth).map_or((0, 0), |disk| (disk.length, disk.used())),
            Content::Facts | Content::Definition => {
                let length = self.text(content).len() as u64;
                (length, length)
            }
        }
    }
}

/// The name of a disk's file.
pub fn disk_file(disk: &Disk) -> String {
    format!("{}.raw", disk.name)
}

/// Whether a name that came from elsewhere can be that of a file.
fn is_file_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..")
        && name.len() <= MAX_FILE_NAME
        && !name.contains(|c: char| c == '/' || c.is_control())
}

/// `vm.json`: facts for people and scripts; fields may be added, none goes.
#[derive(Serialize)]
struct Facts<'a> {
    vm: &'a str,
    vm_id: String,
    number: u32,
    point_id: String,
    created: String,
    parent: Option<ParentFacts>,
    disks: Vec<DiskFacts<'a>>,
    definition_file: Option<&'a str>,
    warnings: &'a [String],
    stats: reseal_format::manifest::Stats,
}

#[derive(Serialize)]
struct ParentFacts {
    number: u32,
    digest: String,
}

#[derive(Serialize)]
struct DiskFacts<'a> {
    name: &'a str,
    file: String,
    length: u64,
    used: u64,
    source: &'a str,
}

fn facts(point: &Point, definition: Option<&(String, Content)>) -> String {
    let manifest = &point.manifest;
    let disk = |disk| DiskFacts {
        name: disk_name(disk),
        file: disk_file(disk),
        length: disk.length,
        used: disk.used(),
        source: &disk.source,
    };
    let facts = Facts {
        vm: manifest.vm.as_str(),
        vm_id: manifest.vm_id.to_string(),
        number: manifest.number,
        point_id: manifest.point_id.to_string(),
        created: manifest.created.to_string(),
        parent: manifest.parent.map(|parent| ParentFacts { number: parent.number, digest: parent.digest.to_string() }),
        disks: manifest.disks.iter().map(disk).collect(),
        definition_file: definition.map(|(name, _)| name.as_str()),
        warnings: &manifest.warnings,
        stats: manifest.stats,
    };
    let mut text = serde_json::to_string_pretty(&facts).expect("text, numbers and lists always serialize");
    text.push('\n');
    text
}

fn disk_name(disk: &Disk) -> &str {
    disk.name.as_str()
}

#[cfg(test)]
mod tests {
    use reseal_format::ids::{Digest, PointId, VmId};
    use reseal_format::manifest::{Definition, Stats};
    use reseal_format::names::{DiskName, VmName};
    use reseal_format::time::Timestamp;

    use super::*;

    fn point(definition: &str) -> OpenPoint {
        let disk = Disk {
            name: DiskName::new("root").unwrap(),
            length: 100_000,
            root: None,
            used_clusters: 2,
            source: "/dev/vg/root".into(),
            tracking: None,
            claim: None,
        };
        let manifest = Manifest {
            vm: VmName::new("web 01").unwrap(),
            vm_id: VmId::from_bytes([1; 16]),
            number: 1,
            point_id: PointId::from_bytes([2; 16]),
            created: Timestamp(1_795_501_907_123),
            parent: None,
            disks: vec![disk],
            definition: Some(Definition { file_name: definition.into(), text: "<domain/>".into() }),
            stats: Stats { read: 1, changed: 2, new: 3, stored: 4, duration_ms: 5 },
            warnings: vec!["a \"quoted\" warning".into()],
        };
        OpenPoint::new(Point { manifest, digest: Digest::from_bytes([3; 32]) })
    }

    #[test]
    fn a_definition_keeps_its_name_unless_it_collides_or_is_illegal() {
        let long = "x".repeat(256);
        for (given, shown) in [
            ("web01.xml", "web01.xml"),
            ("vm.json", "definition"),
            ("root.raw", "definition"),
            ("..", "definition"),
            ("", "definition"),
            ("../../etc/passwd", "definition"),
            ("a\0b", "definition"),
            (&long, "definition"),
        ] {
            let point = point(given);
            let names: Vec<_> = point.files().map(|(_, name, _)| name.to_owned()).collect();
            assert_eq!(names, ["root.raw", "vm.json", shown]);
            assert_eq!(point.find(shown), Some(FileIndex(2)));
            assert_eq!(point.text(Content::Definition), "<domain/>");
        }
    }

    #[test]
    fn the_facts_are_json_and_name_the_files() {
        let point = point("web01.xml");
        let facts: serde_json::Value = serde_json::from_str(point.text(Content::Facts)).unwrap();
        assert_eq!(facts["created"], "2026-11-24T06-31-47.123Z");
        assert_eq!(facts["disks"][0]["file"], "root.raw");
        assert_eq!(facts["disks"][0]["used"], 100_000, "the last cluster ends with the disk");
        assert_eq!(facts["definition_file"], "web01.xml");
        assert_eq!(point.size(Content::Disk(0)), (100_000, 100_000));
    }
}
