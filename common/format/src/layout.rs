//! Keys of the objects of a vault. See `docs/FORMAT.md`, "Objects".

use crate::ids::{CondemnedId, LeaseId, NoteId, PackId};
use crate::names::{TenantName, VmName};

/// Highest number of a restore point: eight digits, so that keys sort by number.
pub const MAX_NUMBER: u32 = 99_999_999;

/// The vault's own record, read before anything else.
pub const VAULT_FILE: &str = "reseal.json";

/// Folder of all tenants.
pub const TENANTS: &str = "tenants/";

/// Folder of all that is a tenant's.
pub fn tenant(tenant: &TenantName) -> String {
    format!("tenants/{}/", tenant.to_key())
}

/// The tenant record.
pub fn tenant_record(tenant: &TenantName) -> String {
    format!("tenants/{}/tenant.json", tenant.to_key())
}

/// Folder of a tenant's VMs.
pub fn vms(tenant: &TenantName) -> String {
    format!("tenants/{}/vms/", tenant.to_key())
}

/// Folder of a VM's manifests and tombstones.
pub fn vm(tenant: &TenantName, vm: &VmName) -> String {
    format!("{}{}/", vms(tenant), vm.to_key())
}

/// The manifest of a restore point.
pub fn manifest(tenant: &TenantName, vm_name: &VmName, number: u32) -> String {
    format!("{}{number:08}.manifest", vm(tenant, vm_name))
}

/// The tombstone of a restore point.
pub fn tombstone(tenant: &TenantName, vm_name: &VmName, number: u32) -> String {
    format!("{}{number:08}.forgotten", vm(tenant, vm_name))
}

/// Folder of a VM's notes.
pub fn notes(tenant: &TenantName, vm_name: &VmName) -> String {
    format!("{}notes/", vm(tenant, vm_name))
}

/// A note about a restore point.
pub fn note(tenant: &TenantName, vm_name: &VmName, number: u32, id: NoteId) -> String {
    format!("{}{number:08}-{id}.note", notes(tenant, vm_name))
}

/// Folder of what says who is at work.
pub fn leases(tenant: &TenantName) -> String {
    format!("tenants/{}/leases/", tenant.to_key())
}

/// What one process says of itself while it is at work.
pub fn lease(tenant: &TenantName, id: LeaseId) -> String {
    format!("{}{id}.lease", leases(tenant))
}

/// The same of a process that seals nothing, but has the tenant's keys.
pub fn reader_lease(tenant: &TenantName, id: LeaseId) -> String {
    format!("{}{id}.reader", leases(tenant))
}

/// What the one process says of itself that changes the data keys.
pub fn rekey_lease(tenant: &TenantName) -> String {
    format!("{}rekey.lease", leases(tenant))
}

/// What the one process says of itself that forgets restore points.
pub fn forget_lease(tenant: &TenantName) -> String {
    format!("{}forget.lease", leases(tenant))
}

/// What the one process says of itself that removes the tenant.
pub fn remove_lease(tenant: &TenantName) -> String {
    format!("{}remove.lease", leases(tenant))
}

/// Folder of what prunes are about to remove.
pub fn gc(tenant: &TenantName) -> String {
    format!("tenants/{}/gc/", tenant.to_key())
}

/// One list of what a prune is about to remove.
pub fn condemned(tenant: &TenantName, id: CondemnedId) -> String {
    format!("{}{id}.condemned", gc(tenant))
}

/// Folder of a tenant's packs.
pub fn packs(tenant: &TenantName) -> String {
    format!("tenants/{}/packs/", tenant.to_key())
}

/// Folder of the packs that share this one's first byte.
pub fn pack_shelf(tenant: &TenantName, id: PackId) -> String {
    format!("{}{:02x}/", packs(tenant), id.as_bytes()[0])
}

/// One generation of a pack.
pub fn pack(tenant: &TenantName, id: PackId, generation: u32) -> String {
    format!("{}{id}.{generation}", pack_shelf(tenant, id))
}

/// What the name of a file in a VM's folder says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PointFile {
    /// `NNNNNNNN.manifest`
    Manifest(u32),
    /// `NNNNNNNN.forgotten`
    Tombstone(u32),
}

/// Parses the eight digits of a number; numbers count from 1.
fn parse_number(digits: &str) -> Option<u32> {
    let number: u32 = digits.parse().ok().filter(|n| (1..=MAX_NUMBER).contains(n))?;
    (digits == format!("{number:08}")).then_some(number)
}

/// Parses the last part of a key in a VM's folder.
pub fn parse_point_file(name: &str) -> Option<PointFile> {
    let (digits, kind) = name.split_once('.')?;
    let number = parse_number(digits)?;
    match kind {
        "manifest" => Some(PointFile::Manifest(number)),
        "forgotten" => Some(PointFile::Tombstone(number)),
        _ => None,
    }
}

/// Parses the last part of a note's key: the number of its point, and its id.
pub fn parse_note_file(name: &str) -> Option<(u32, NoteId)> {
    let (digits, id) = name.strip_suffix(".note")?.split_once('-')?;
    Some((parse_number(digits)?, NoteId::from_hex(id)?))
}

/// Parses the last part of a lease's key.
pub fn parse_lease_file(name: &str) -> Option<LeaseId> {
    LeaseId::from_hex(name.strip_suffix(".lease")?)
}

/// Parses the last part of the key of a reader's lease.
pub fn parse_reader_file(name: &str) -> Option<LeaseId> {
    LeaseId::from_hex(name.strip_suffix(".reader")?)
}

/// Parses the last part of the key of such a list.
pub fn parse_condemned_file(name: &str) -> Option<CondemnedId> {
    CondemnedId::from_hex(name.strip_suffix(".condemned")?)
}

/// Parses the last part of a pack's key: its id and generation.
pub fn parse_pack_file(name: &str) -> Option<(PackId, u32)> {
    let (id, generation) = name.split_once('.')?;
    let number: u32 = generation.parse().ok()?;
    (generation == number.to_string()).then_some((PackId::from_hex(id)?, number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_parse_only_as_written() {
        assert_eq!(parse_point_file("00000012.manifest"), Some(PointFile::Manifest(12)));
        assert_eq!(parse_point_file("00000012.forgotten"), Some(PointFile::Tombstone(12)));
        for name in [
            "12.manifest",
            "00000000.manifest",
            "100000000.manifest",
            "+0000012.manifest",
            "00000012.manifest.x",
            "00000012",
            "",
        ] {
            assert_eq!(parse_point_file(name), None, "{name}");
        }
        let id = PackId::from_bytes([7; 16]);
        assert_eq!(parse_pack_file(&format!("{id}.3")), Some((id, 3)));
        assert_eq!(parse_pack_file(&format!("{id}.03")), None);
        let note = NoteId::from_bytes([8; 16]);
        assert_eq!(parse_note_file(&format!("00000012-{note}.note")), Some((12, note)));
        for name in [format!("+0000012-{note}.note"), format!("00000012-{note}"), "00000012-.note".to_owned()] {
            assert_eq!(parse_note_file(&name), None, "{name}");
        }
    }
}
