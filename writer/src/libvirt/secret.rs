//! The secret of one backup's scratch files: made here, known to libvirt until the backup ends, never on a disk.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use reseal_qemu::xml::escape;
use zeroize::Zeroizing;

use super::LibvirtError;
use super::command::Virsh;
use super::domain::is_uuid;
use super::scratch;

/// Random bytes of a passphrase: as many as the key has that it protects.
const LENGTH: usize = 32;
/// What kind of use is recorded with it. Its name is the scratch folder, by which it is found when it was left behind.
const USAGE: &str = "volume";

/// A passphrase.
pub(super) struct Secret {
    uuid: String,
    passphrase: Zeroizing<String>,
}

impl Secret {
    /// Makes a new one.
    pub(super) fn new(uuid: String) -> Result<Secret, LibvirtError> {
        let mut bytes = Zeroizing::new([0; LENGTH]);
        getrandom::fill(&mut *bytes).map_err(LibvirtError::Random)?;
        // Its final length at once: growing would leave copies behind.
        let mut passphrase = Zeroizing::new(String::with_capacity(2 * LENGTH));
        for byte in bytes.iter() {
            let _ = write!(passphrase, "{byte:02x}");
        }
        Ok(Secret { uuid, passphrase })
    }

    /// The passphrase, as it is handed to programs through a pipe.
    pub(super) fn passphrase(&self) -> &str {
        &self.passphrase
    }

    /// Tells libvirt, which keeps it in memory only and gives it to nobody but QEMU.
    pub(super) fn define(&self, virsh: &Virsh, folder: &str) -> Result<(), LibvirtError> {
        let uuid = escape(&self.uuid);
        let folder = escape(folder);
        let xml = format!(
            "<secret ephemeral='yes' private='yes'><uuid>{uuid}</uuid><description>scratch files of a backup by reseal\
             </description><usage type='{USAGE}'><volume>{folder}</volume></usage></secret>"
        );
        virsh.run_with(&["secret-define", "/dev/stdin"], Some(xml.as_bytes()))?;
        let set = ["secret-set-value", &self.uuid, "--file", "/dev/stdin", "--plain"];
        virsh.run_with(&set, Some(self.passphrase.as_bytes())).map(drop)
    }
}

/// Makes libvirt forget one. One that it does not know is forgotten.
pub(super) fn undefine(virsh: &Virsh, uuid: &str) -> Result<(), LibvirtError> {
    match virsh.run(&["secret-undefine", uuid]) {
        Err(e) if !e.said().is_some_and(|said| said.contains("no secret with matching uuid")) => Err(e),
        _ => Ok(()),
    }
}

/// Secrets of backups of a domain, with their scratch folders.
pub(super) fn find(virsh: &Virsh, domain: &str) -> Result<Vec<(String, PathBuf)>, LibvirtError> {
    let table = virsh.run(&["secret-list", "--ephemeral", "--private"])?;
    Ok(table.lines().filter_map(row).filter(|(_, folder)| scratch::is_own(folder, domain)).collect())
}

/// A row of the table: UUID, kind of use, name of use.
fn row(line: &str) -> Option<(String, PathBuf)> {
    let (uuid, usage) = line.trim().split_once(char::is_whitespace)?;
    let folder = usage.trim_start().strip_prefix(USAGE)?.trim();
    is_uuid(uuid).then(|| (uuid.to_owned(), Path::new(folder).to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_the_table_are_read_strictly() {
        let uuid = "2b9fa4c4-5a09-4f0c-9bd5-6b6ac2d3c4a1";
        let found = row(&format!(" {uuid}   volume /var/tmp/a b"));
        assert_eq!(found, Some((uuid.to_owned(), PathBuf::from("/var/tmp/a b"))));
        for line in ["", " UUID   Usage", "-----", &format!("{uuid} ceph x"), &format!("{uuid}x volume /x")] {
            assert_eq!(row(line), None, "{line}");
        }
    }

    #[test]
    fn every_secret_is_another() {
        let (one, two) = (Secret::new(String::new()).unwrap(), Secret::new(String::new()).unwrap());
        assert_ne!(one.passphrase(), two.passphrase());
        assert_eq!(one.passphrase().len(), 2 * LENGTH);
    }
}
