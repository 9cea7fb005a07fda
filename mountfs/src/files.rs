//! What the folder of a restore point shows.

use reseal_format::manifest::{Disk, Manifest};
use reseal_vault::Point;
use reseal_vault::cache::Weigh;
use serde::Serialize;

use crate::faces::vhd::{self, FOOTER, FOOTER_U64};
use crate::faces::vmdk;
use crate::inodes::FileIndex;

/// Name of the facts file.
const FACTS: &str = "vm.json";
/// Name of the definition where its own can't be used. No disk has it, for the names of theirs end otherwise.
const DEFINITION: &str = "definition";
/// Longest name of a file, in bytes, that Linux takes.
const MAX_FILE_NAME: usize = 255;

/// What is in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// A disk of the manifest.
    Disk(usize),
    /// The text that makes a VMDK of its file.
    Vmdk(usize),
    /// A disk of the manifest, as a fixed VHD.
    Vhd(usize),
    /// The facts about the point.
    Facts,
    /// The captured definition.
    Definition,
}

/// A restore point, with the files that it shows.
pub struct OpenPoint {
    point: Point,
    files: Vec<(String, Content)>,
    /// By the places of the disks.
    faces: Vec<Faces>,
    facts: String,
}

/// How a disk is shown beside its raw file, where that can be.
struct Faces {
    vmdk: Option<String>,
    vhd: Option<Box<[u8; FOOTER]>>,
}

impl Faces {
    fn new(manifest: &Manifest, disk: &Disk) -> Faces {
        let identity = [manifest.point_id.as_bytes(), disk.name.as_str().as_bytes()].concat();
        Faces {
            vmdk: vmdk::descriptor(&disk_file(disk), disk.length, &identity),
            vhd: vhd::footer(disk.length, manifest.created, &identity).map(Box::new),
        }
    }

    fn weight(&self) -> usize {
        let text = self.vmdk.as_ref().map_or(0, String::len);
        size_of::<Faces>() + text + self.vhd.as_ref().map_or(0, |_| FOOTER)
    }
}

impl Weigh for OpenPoint {
    fn weight(&self) -> usize {
        let manifest = &self.point.manifest;
        let text: usize =
            manifest.warnings.iter().chain(manifest.disks.iter().map(|disk| &disk.source)).map(String::len).sum();
        let definition = manifest.definition.as_ref().map_or(0, |definition| definition.text.len());
        let faces: usize = self.faces.iter().map(Faces::weight).sum();
        let files = self.files.len() * 100 + manifest.disks.len() * (size_of::<Disk>() + 100);
        size_of::<OpenPoint>() + text + definition + self.facts.len() + faces + files
    }
}

impl OpenPoint {
    /// Lays out the files of a point.
    pub fn new(point: Point) -> OpenPoint {
        let manifest = &point.manifest;
        let faces: Vec<Faces> = manifest.disks.iter().map(|disk| Faces::new(manifest, disk)).collect();
        let mut files = Vec::with_capacity(3 * faces.len() + 2);
        for (nth, (disk, faces)) in manifest.disks.iter().zip(&faces).enumerate() {
            files.push((disk_file(disk), Content::Disk(nth)));
            files.extend(faces.vmdk.as_ref().map(|_| (vmdk_file(disk), Content::Vmdk(nth))));
            files.extend(faces.vhd.as_ref().map(|_| (vhd_file(disk), Content::Vhd(nth))));
        }
        files.push((FACTS.to_owned(), Content::Facts));
        if let Some(definition) = &manifest.definition {
            let name = &definition.file_name;
            let taken = files.iter().any(|(other, _)| other == name);
            let name = if is_file_name(name) && !taken { name } else { DEFINITION };
            files.push((name.to_owned(), Content::Definition));
        }
        let facts = facts(&point, &faces, files.last().filter(|(_, content)| *content == Content::Definition));
        OpenPoint { point, files, faces, facts }
    }

    /// The manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.point.manifest
    }

    /// The files, in the order of their indices.
    pub fn files(&self) -> impl Iterator<Item = (FileIndex, &str, Content)> {
        self.files.iter().enumerate().map(|(nth, (name, content))| {
            // A manifest has at most 256 disks, and each at most three files.
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
            (Content::Vmdk(nth), _) => self.faces.get(nth).and_then(|faces| faces.vmdk.as_deref()).unwrap_or(""),
            (Content::Definition, None) | (Content::Disk(_) | Content::Vhd(_), _) => "",
        }
    }

    /// What follows the bytes of a disk where it is shown as a VHD.
    pub fn footer(&self, nth: usize) -> &[u8] {
        self.faces.get(nth).and_then(|faces| faces.vhd.as_deref()).map_or(&[], <[u8; FOOTER]>::as_slice)
    }

    /// Size of a file, and how many of its bytes are not holes.
    pub fn size(&self, content: Content) -> (u64, u64) {
        match content {
            Content::Disk(nth) => self.point.manifest.disks.get(nth).map_or((0, 0), |disk| (disk.length, disk.used())),
            Content::Vhd(nth) => {
                let (length, used) = self.size(Content::Disk(nth));
                (length.saturating_add(FOOTER_U64), used.saturating_add(FOOTER_U64))
            }
            Content::Facts | Content::Definition | Content::Vmdk(_) => {
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

fn vmdk_file(disk: &Disk) -> String {
    format!("{}.vmdk", disk.name)
}

fn vhd_file(disk: &Disk) -> String {
    format!("{}.vhd", disk.name)
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
    /// The same disk for other hypervisors; `null` where their formats can't hold it.
    vmdk: Option<String>,
    vhd: Option<String>,
    length: u64,
    used: u64,
    source: &'a str,
}

fn facts(point: &Point, faces: &[Faces], definition: Option<&(String, Content)>) -> String {
    let manifest = &point.manifest;
    let facts = Facts {
        vm: manifest.vm.as_str(),
        vm_id: manifest.vm_id.to_string(),
        number: manifest.number,
        point_id: manifest.point_id.to_string(),
        created: manifest.created.to_string(),
        parent: manifest.parent.map(|parent| ParentFacts { number: parent.number, digest: parent.digest.to_string() }),
        disks: manifest.disks.iter().zip(faces).map(|(disk, faces)| disk_facts(disk, faces)).collect(),
        definition_file: definition.map(|(name, _)| name.as_str()),
        warnings: &manifest.warnings,
        stats: manifest.stats,
    };
    let mut text = serde_json::to_string_pretty(&facts).expect("text, numbers and lists always serialize");
    text.push('\n');
    text
}

fn disk_facts<'a>(disk: &'a Disk, faces: &Faces) -> DiskFacts<'a> {
    DiskFacts {
        name: disk.name.as_str(),
        file: disk_file(disk),
        vmdk: faces.vmdk.as_ref().map(|_| vmdk_file(disk)),
        vhd: faces.vhd.as_ref().map(|_| vhd_file(disk)),
        length: disk.length,
        used: disk.used(),
        source: &disk.source,
    }
}

#[cfg(test)]
mod tests {
    use reseal_format::ids::{Digest, PointId, VmId};
    use reseal_format::manifest::{Definition, Stats};
    use reseal_format::names::{DiskName, VmName};
    use reseal_format::time::Timestamp;

    use super::*;

    fn point(definition: &str) -> OpenPoint {
        named_point("root", 100_000, definition)
    }

    fn named_point(disk: &str, length: u64, definition: &str) -> OpenPoint {
        let disk = Disk {
            name: DiskName::new(disk).unwrap(),
            length,
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
            locked: None,
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
    fn a_disk_of_whole_sectors_has_faces_which_the_facts_name() {
        let point = named_point("root", 131_072, "root.vhd");
        let names: Vec<_> = point.files().map(|(_, name, _)| name).collect();
        assert_eq!(names, ["root.raw", "root.vmdk", "root.vhd", "vm.json", "definition"], "no file hides another");
        let facts: serde_json::Value = serde_json::from_str(point.text(Content::Facts)).unwrap();
        assert_eq!((&facts["disks"][0]["vmdk"], &facts["disks"][0]["vhd"]), (&"root.vmdk".into(), &"root.vhd".into()));
        assert!(point.text(Content::Vmdk(0)).contains("RW 256 FLAT \"root.raw\" 0\n"));
        assert_eq!(point.size(Content::Vhd(0)), (131_584, 131_584));
        assert_eq!(&point.footer(0)[..8], b"conectix");
        // A name that the descriptor can't hold; a length that neither can.
        let names = |point: &OpenPoint| point.files().map(|(_, name, _)| name.to_owned()).collect::<Vec<_>>();
        assert_eq!(names(&named_point("nbd:x", 512, "x"))[..2], ["nbd:x.raw", "nbd:x.vhd"]);
        let odd = named_point("root", 131_073, "x");
        assert_eq!(names(&odd), ["root.raw", "vm.json", "x"]);
        let facts: serde_json::Value = serde_json::from_str(odd.text(Content::Facts)).unwrap();
        assert!(facts["disks"][0]["vmdk"].is_null() && facts["disks"][0]["vhd"].is_null());
        assert!(odd.footer(0).is_empty());
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
