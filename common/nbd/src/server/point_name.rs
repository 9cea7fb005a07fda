//! How an export names a disk: `VM@NUMBER/DISK`. As everywhere, `latest` or a time may stand for the number; the disk may be
//! left out where there is but one.

use reseal_format::names::{DiskName, VmName};
use reseal_vault::{PointSpec, VaultError};

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

#[cfg(test)]
mod tests {
    use reseal_vault::Which;

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
}
