//! The descriptor of a `monolithicFlat` virtual disk, after VMware's technical note "Virtual Disk Format 5.0": a text beside the file
//! that has the bytes.

use reseal_format::ids::Digest;

use super::sectors;

/// Geometry of a disk behind a SCSI controller, as VMware gives it to those of more than 1 GiB.
const HEADS: u64 = 255;
const SECTORS_PER_TRACK: u64 = 63;
/// Content ids that mean none.
const NO_CONTENT_ID: [u32; 2] = [0xffff_ffff, 0xffff_fffe];

/// The text for a disk of `length` bytes whose bytes are in `raw`, a file beside it. `identity` tells it from other disks. `None` for a disk
/// that the format has no words for: one that ends within a sector, or whose name would end the quoted one or be read as that of a protocol.
pub fn descriptor(raw: &str, length: u64, identity: &[u8]) -> Option<String> {
    let sectors = sectors(length)?;
    if raw.contains(['"', ':']) || raw.chars().any(char::is_control) {
        return None;
    }
    let cylinders = (sectors / (HEADS * SECTORS_PER_TRACK)).max(1);
    let content_id = content_id(identity);
    Some(format!(
        "# Disk DescriptorFile\n\
         version=1\n\
         encoding=\"UTF-8\"\n\
         CID={content_id:08x}\n\
         parentCID=ffffffff\n\
         createType=\"monolithicFlat\"\n\
         \n\
         # Extent description\n\
         RW {sectors} FLAT \"{raw}\" 0\n\
         \n\
         # The Disk Data Base\n\
         #DDB\n\
         \n\
         ddb.virtualHWVersion = \"4\"\n\
         ddb.geometry.cylinders = \"{cylinders}\"\n\
         ddb.geometry.heads = \"{HEADS}\"\n\
         ddb.geometry.sectors = \"{SECTORS_PER_TRACK}\"\n\
         ddb.adapterType = \"lsilogic\"\n"
    ))
}

fn content_id(identity: &[u8]) -> u32 {
    let [a, b, c, d, ..] = *Digest::of(identity).as_bytes();
    let id = u32::from_be_bytes([a, b, c, d]);
    if NO_CONTENT_ID.contains(&id) { 1 } else { id }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_says_what_it_always_said() {
        let text = descriptor("disk-0.raw", 2 << 30, b"identity").unwrap();
        let wanted = "# Disk DescriptorFile\nversion=1\nencoding=\"UTF-8\"\nCID=78556dc9\nparentCID=ffffffff\n\
            createType=\"monolithicFlat\"\n\n# Extent description\nRW 4194304 FLAT \"disk-0.raw\" 0\n\n\
            # The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"4\"\nddb.geometry.cylinders = \"261\"\n\
            ddb.geometry.heads = \"255\"\nddb.geometry.sectors = \"63\"\nddb.adapterType = \"lsilogic\"\n";
        assert_eq!(text, wanted);
        assert_ne!(text, descriptor("disk-0.raw", 2 << 30, b"another").unwrap());
    }

    #[test]
    fn what_would_be_another_disk_has_none() {
        assert!(
            descriptor("a.raw", 512, b"")
                .is_some_and(|text| text.contains("RW 1 FLAT") && text.contains("cylinders = \"1\""))
        );
        assert_eq!(descriptor("a.raw", 513, b""), None);
        assert_eq!(descriptor("a.raw", 0, b""), None);
        for name in ["a\".raw", "nbd:10.0.0.1:1.raw", "a\nRW 1 FLAT.raw"] {
            assert_eq!(descriptor(name, 512, b""), None, "{name}");
        }
        assert!(descriptor("ä b\\c.raw", 512, b"").is_some());
    }
}
