//! A domain as libvirt describes it: what it is, and which of its disks can be backed up and tracked.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use reseal_format::manifest::{Definition, MAX_DEFINITION};
use reseal_format::names::{DiskName, VmName};
use roxmltree::Node;

use super::LibvirtError;
use super::command::Virsh;
use super::xml::{child, child_text, read};

/// The first major version of QEMU that serves NBD safely from other threads than the main one.
const THREADS_SAFE: u64 = 9;

/// How a qcow2 image starts.
const QCOW2: &[u8; 4] = b"QFI\xfb";

/// A domain.
#[derive(Debug)]
pub(super) struct Domain {
    pub name: String,
    /// By which every command names it: unlike a name it can't be taken for an id or an option.
    pub uuid: String,
    /// Of the run that goes on; `None` if it does not run.
    pub id: Option<u32>,
    /// User and group of its QEMU, where libvirt sets them.
    pub owner: Option<(u32, u32)>,
    pub disks: Vec<DomainDisk>,
    /// Whether a disk, or a controller of disks, runs in a thread of its own.
    pub threads: bool,
    pub(super) xml: String,
}

/// A disk of a domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DomainDisk {
    /// Its name within the domain, such as `vda`.
    pub target: String,
    /// Where its content is, for people.
    pub source: String,
    /// Why it is not backed up, if so.
    pub left_out: Option<String>,
    /// Why libvirt can't record its changes, if so.
    pub untracked: Option<String>,
}

impl DomainDisk {
    /// What is said of it if it is left out.
    pub(super) fn warning(&self) -> Option<String> {
        let why = self.left_out.as_ref()?;
        Some(format!("the disk {} ({}) is not backed up: {why}", self.target, self.source))
    }
}

impl Domain {
    /// Asks libvirt for it. Secrets, such as passwords of consoles, are left out by libvirt unless they are asked for.
    pub(super) fn find(virsh: &Virsh, given: &str) -> Result<Domain, LibvirtError> {
        // One word, so that a name is never taken for an option.
        let named = format!("--domain={given}");
        let xml = virsh.run(&["dumpxml", &named]).map_err(|e| match e.said() {
            Some(said) if said.contains("failed to get domain") => {
                LibvirtError::NoDomain { domain: given.into(), said: said.into() }
            }
            _ => e,
        })?;
        let domain = Domain::parse(xml)?;
        match given == domain.name || given.eq_ignore_ascii_case(&domain.uuid) {
            true => Ok(domain),
            false => Err(LibvirtError::Id { given: given.into(), name: domain.name }),
        }
    }

    fn parse(xml: String) -> Result<Domain, LibvirtError> {
        let domain = read(&xml, "virsh dumpxml", "domain", |root| {
            let uuid = child_text(root, "uuid").filter(|uuid| is_uuid(uuid))?;
            let id = match root.attribute("id") {
                Some(id) => Some(id.parse().ok()?),
                None => None,
            };
            let devices = child(root, "devices")?;
            let disks = devices.children().filter(|node| node.has_tag_name("disk"));
            let drivers = devices.children().filter_map(|device| child(device, "driver"));
            let mut threads = drivers.map(|d| d.attribute("iothread").is_some() || child(d, "iothreads").is_some());
            Some(Domain {
                name: child_text(root, "name")?.to_owned(),
                uuid: uuid.to_owned(),
                id,
                owner: owner(root),
                disks: disks.map(disk).collect::<Option<_>>()?,
                threads: threads.any(|threaded| threaded),
                xml: String::new(),
            })
        })?;
        Ok(Domain { xml, ..domain })
    }

    /// What is needed to start it again: the description of what runs, which is what the disks belong to. A stored
    /// definition may already say something else for the next start.
    pub(super) fn definition(&self) -> Option<Definition> {
        let stem = self.name.chars().map(|c| if c == '/' || c.is_control() { '_' } else { c });
        let file_name = format!("{}.xml", stem.collect::<String>());
        let short = self.xml.len() <= MAX_DEFINITION && VmName::new(&file_name).is_ok();
        short.then(|| Definition { file_name, text: self.xml.clone() })
    }

    /// Those that are backed up.
    pub(super) fn chosen(&self) -> impl Iterator<Item = &DomainDisk> {
        self.disks.iter().filter(|disk| disk.left_out.is_none())
    }

    /// Its disks as somebody would name them to back them up from their files.
    pub(super) fn as_files(&self) -> String {
        let disks: Vec<_> = self.chosen().map(|disk| format!("{}={}", disk.target, disk.source)).collect();
        if disks.is_empty() { "it has none that is writable".into() } else { disks.join(" ") }
    }

    /// Refuses a domain that QEMU could abort when the backup's connection ends: an NBD export in another thread than the
    /// main one was not safe before QEMU 9.0. The version is that of what runs, which may be older than what is installed.
    pub(super) fn refuse_threads(&self, virsh: &Virsh) -> Result<(), LibvirtError> {
        if !self.threads {
            return Ok(());
        }
        let said = virsh.run(&["qemu-monitor-command", &self.uuid, r#"{"execute":"query-version"}"#])?;
        let said: serde_json::Value = serde_json::from_str(&said).unwrap_or_default();
        let major = said["return"]["qemu"]["major"].as_u64().unwrap_or(0);
        match major >= THREADS_SAFE {
            true => Ok(()),
            false => Err(LibvirtError::Threads { domain: self.name.clone(), major }),
        }
    }

    /// Bytes of each disk as the guest sees it, by target.
    pub(super) fn lengths(&self, virsh: &Virsh) -> Result<HashMap<String, u64>, LibvirtError> {
        lengths(&virsh.run(&["domstats", "--block", &self.uuid])?)
    }
}

/// Whether it is spelt as a UUID.
pub(super) fn is_uuid(text: &str) -> bool {
    let dash = |at| matches!(at, 8 | 13 | 18 | 23);
    text.len() == 36 && text.bytes().enumerate().all(|(at, b)| if dash(at) { b == b'-' } else { b.is_ascii_hexdigit() })
}

/// User and group of the DAC label, such as `+64055:+64055`.
fn owner(root: Node<'_, '_>) -> Option<(u32, u32)> {
    let label = root.children().find(|n| n.has_tag_name("seclabel") && n.attribute("model") == Some("dac"))?;
    let (user, group) = child_text(label, "label")?.split_once(':')?;
    let number = |text: &str| text.strip_prefix('+').unwrap_or(text).parse().ok();
    Some((number(user)?, number(group)?))
}

fn disk(node: Node<'_, '_>) -> Option<DomainDisk> {
    let target = child(node, "target")?.attribute("dev")?.to_owned();
    let format = child(node, "driver").and_then(|driver| driver.attribute("type")).unwrap_or("raw");
    let source = child(node, "source");
    let said = |name| source.and_then(|source| source.attribute(name));
    let file = said("file").or_else(|| said("dev"));
    let text = match (file, said("protocol"), said("pool")) {
        (Some(file), ..) => file.to_owned(),
        (_, Some(protocol), _) => format!("{protocol}:{}", said("name").unwrap_or_default()),
        (_, _, Some(pool)) => format!("pool {pool}, volume {}", said("volume").unwrap_or_default()),
        _ if source.is_none() => "no medium".to_owned(),
        _ => node.attribute("type").unwrap_or("unknown").to_owned(),
    };
    let has = |name| child(node, name).is_some();
    let device = node.attribute("device").unwrap_or("disk");
    let kind = node.attribute("type").unwrap_or("file");
    let left_out = match (device, kind) {
        ("cdrom", _) => Some("it is a CD-ROM drive"),
        ("floppy", _) => Some("it is a floppy drive"),
        ("lun", _) => Some("it passes a SCSI device through, which QEMU can't copy"),
        (_, "vhostuser" | "vhostvdpa") => Some("another process than QEMU serves it"),
        _ if source.is_none() => Some("it is empty"),
        _ if has("readonly") => Some("it is read-only"),
        _ if has("shareable") => Some("other domains may write to it, which QEMU does not see"),
        _ if has("transient") => Some("its changes are dropped when the domain stops"),
        _ if DiskName::new(&target).is_err() => Some("its name can't be used"),
        _ => None,
    };
    let untracked = match (format, file.map(Path::new).and_then(qcow2_version)) {
        ("qcow2", Some(0..=2)) => Some(
            "its image is qcow2 of version 2, which can't hold libvirt's checkpoints: when the domain does not run, \
                 `qemu-img amend -o compat=1.1` changes that"
                .to_owned(),
        ),
        ("qcow2", _) => None,
        (format, _) => Some(format!("its image is {format}, and only qcow2 can hold libvirt's checkpoints")),
    };
    Some(DomainDisk { target, source: text, left_out: left_out.map(String::from), untracked })
}

/// The version that a qcow2 image says it has; `None` if it can't be seen from here.
fn qcow2_version(path: &Path) -> Option<u32> {
    let data = std::fs::metadata(path).ok()?;
    if !data.is_file() {
        return None;
    }
    let mut start = [0; 8];
    File::open(path).ok()?.read_exact(&mut start).ok()?;
    let (magic, version) = start.split_first_chunk::<4>()?;
    let version = version.first_chunk::<4>()?;
    (magic == QCOW2).then(|| u32::from_be_bytes(*version))
}

/// Reads `block.N.name=` and `block.N.capacity=`.
fn lengths(stats: &str) -> Result<HashMap<String, u64>, LibvirtError> {
    let (mut names, mut capacities) = (HashMap::new(), HashMap::new());
    for line in stats.lines() {
        let Some((key, value)) = line.trim().split_once('=') else { continue };
        let Some((nth, field)) = key.strip_prefix("block.").and_then(|key| key.split_once('.')) else { continue };
        match field {
            "name" => drop(names.insert(nth, value)),
            "capacity" => drop(capacities.insert(nth, value)),
            _ => {}
        }
    }
    let length = |(nth, name): (&str, &str)| Some((name.to_owned(), capacities.get(nth)?.parse().ok()?));
    Ok(names.into_iter().filter_map(length).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const XML: &str = "<domain type='kvm' id='7'>
  <name>web01</name>
  <uuid>2b9fa4c4-5a09-4f0c-9bd5-6b6ac2d3c4a1</uuid>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='/nowhere/a&apos;b.qcow2' index='1'/>
      <backingStore type='file'><format type='raw'/><source file='/base'/></backingStore>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='block' device='disk'><driver type='raw'/><source dev='/dev/no'/><target dev='vdb'/></disk>
    <disk type='network' device='disk'>
      <driver type='raw'/><source protocol='rbd' name='pool/image'/><target dev='vdc'/>
    </disk>
    <disk type='file' device='cdrom'><driver type='raw'/><target dev='sda'/><readonly/></disk>
    <disk type='file' device='disk'><source file='/c'/><target dev='vdd'/><readonly/></disk>
    <disk type='file' device='disk'><source file='/d'/><target dev='vde'/><shareable/></disk>
    <disk type='vhostuser' device='disk'><source type='unix' path='/s'/><target dev='vdf'/></disk>
    <disk type='block' device='lun'><source dev='/dev/no'/><target dev='sdb'/></disk>
  </devices>
  <seclabel type='dynamic' model='apparmor' relabel='yes'><label>libvirt-x</label></seclabel>
  <seclabel type='dynamic' model='dac' relabel='yes'><label>+64055:+109</label></seclabel>
</domain>";

    #[test]
    fn a_domain_says_which_disks_can_be_read_and_tracked() {
        let domain = Domain::parse(XML.into()).unwrap();
        assert_eq!((domain.name.as_str(), domain.id, domain.owner), ("web01", Some(7), Some((64055, 109))));
        let chosen: Vec<_> = domain.chosen().map(|d| (&*d.target, &*d.source, d.untracked.is_none())).collect();
        let expected =
            [("vda", "/nowhere/a'b.qcow2", true), ("vdb", "/dev/no", false), ("vdc", "rbd:pool/image", false)];
        assert_eq!(chosen, expected);
        assert_eq!(domain.disks.len() - chosen.len(), 5);
        assert_eq!(domain.definition().unwrap().file_name, "web01.xml");
        let still = Domain::parse(XML.replace(" id='7'", "")).unwrap();
        assert_eq!(still.id, None);
        for (from, to) in [("id='7'", "id='x'"), ("2b9fa4c4", "2b9fa4c"), ("dev='vda'", "x='vda'")] {
            assert!(Domain::parse(XML.replace(from, to)).is_err(), "{from}");
        }
    }

    #[test]
    fn disks_in_threads_of_their_own_are_seen() {
        assert!(!Domain::parse(XML.into()).unwrap().threads);
        let threaded = XML.replace("type='qcow2'/>", "type='qcow2' iothread='1'/>");
        assert!(Domain::parse(threaded).unwrap().threads);
        let controller = "<devices><controller type='scsi'><driver iothread='1'/></controller>";
        assert!(Domain::parse(XML.replace("<devices>", controller)).unwrap().threads);
        let several = "type='qcow2'><iothreads><iothread id='1'/></iothreads></driver>";
        assert!(Domain::parse(XML.replace("type='qcow2'/>", several)).unwrap().threads);
    }

    #[test]
    fn an_image_of_version_two_is_not_tracked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("old");
        std::fs::write(&path, b"QFI\xfb\0\0\0\x02").unwrap();
        assert_eq!(qcow2_version(&path), Some(2));
        std::fs::write(&path, b"QFI\xfb\0\0\0\x03").unwrap();
        assert_eq!(qcow2_version(&path), Some(3));
        std::fs::write(&path, b"QFI\xfb").unwrap();
        assert_eq!(qcow2_version(&path), None);
        assert_eq!(qcow2_version(folder.path()), None);
    }

    #[test]
    fn lengths_are_taken_by_name() {
        let stats = "Domain: 'x'\n  block.count=2\n  block.0.name=vda\n  block.0.capacity=100\n  block.1.name=sda\n\
                     block.1.capacity=-5\n block.2.capacity=7\n";
        assert_eq!(lengths(stats).unwrap(), HashMap::from([("vda".to_owned(), 100)]));
    }
}
