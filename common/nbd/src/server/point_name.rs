//! How an export names a disk: `VM@NUMBER/DISK`. As everywhere, `latest` or a time may stand for the number; the disk may be
//! left out where there is but one.

use std::fmt;

use reseal_format::ids::PointId;
use reseal_format::names::{DiskName, VmName};
use reseal_vault::{PointSpec, VaultError, Which};

/// A disk of a point, as a client names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PointDisk {
    pub point: PointSpec,
    pub disk: Option<DiskName>,
}

impl PointDisk {
    /// Parses; the last `/` ends the point, for no name holds one.
    pub fn parse(text: &str) -> Result<PointDisk, String> {
        let (point, disk) = match text.rsplit_once('/') {
            Some((point, disk)) => (point, Some(DiskName::new(disk).map_err(|e| e.to_string())?)),
            None => (text, None),
        };
        let point = PointSpec::parse(point).map_err(|e: VaultError| e.to_string())?;
        Ok(PointDisk { point, disk })
    }
}

/// The name that always means this disk.
pub fn export_name(vm: &VmName, number: u32, disk: &DiskName) -> String {
    format!("{vm}@{number}/{disk}")
}

/// A disk of a restore point, since which changes are told: `ID/VM@NUMBER/DISK`. The id is the point's, for a number alone could
/// be that of another vault's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SinceDisk {
    pub point: PointId,
    pub vm: VmName,
    pub number: u32,
    pub disk: DiskName,
}

impl SinceDisk {
    /// Parses what a server said; `None` if it is something else.
    pub fn parse(text: &str) -> Option<SinceDisk> {
        let (point, name) = text.split_once('/')?;
        let point = PointId::from_hex(point)?;
        match PointDisk::parse(name).ok()? {
            PointDisk { point: PointSpec { vm, which: Which::Number(number) }, disk: Some(disk) } => {
                Some(SinceDisk { point, vm, number, disk })
            }
            _ => None,
        }
    }
}

impl fmt::Display for SinceDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.point, export_name(&self.vm, self.number, &self.disk))
    }
}

#[cfg(test)]
mod tests {

    use super::*;

    #[test]
    fn names_split_at_the_last_slash_and_the_last_at_sign() {
        let parsed = PointDisk::parse("a@b@7/c@d").unwrap();
        assert_eq!(parsed.point, PointSpec { vm: VmName::new("a@b").unwrap(), which: Which::Number(7) });
        assert_eq!(parsed.disk, Some(DiskName::new("c@d").unwrap()));
        assert_eq!(PointDisk::parse("web@latest").unwrap().disk, None);
        let name = export_name(&parsed.point.vm, 7, parsed.disk.as_ref().unwrap());
        assert_eq!(PointDisk::parse(&name).unwrap(), parsed);
        for bad in ["", "/", "web", "web/disk-0", "web@7/", "web@7/a/b", "@7/a", "web@x/a", "web@7/.."] {
            assert!(PointDisk::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_moment_names_point_and_disk_and_nothing_less() {
        let since = SinceDisk {
            point: PointId::from_bytes([7; 16]),
            vm: VmName::new("a@b").unwrap(),
            number: 7,
            disk: DiskName::new("c").unwrap(),
        };
        assert_eq!(since.to_string(), format!("{}/a@b@7/c", "07".repeat(16)));
        assert_eq!(SinceDisk::parse(&since.to_string()), Some(since));
        let id = "07".repeat(16);
        for bad in
            ["", "/", "a@b@7/c", "07/a@7/c", &format!("{id}/a@7"), &format!("{id}/a@latest/c"), &format!("{id}//")]
        {
            assert_eq!(SinceDisk::parse(bad), None, "{bad}");
        }
    }
}
