//! The footer of a fixed virtual hard disk, after Microsoft's "Virtual Hard Disk Image Format Specification" 1.0. All numbers are
//! big-endian.
//!
//! | at | bytes | field | here |
//! | --- | --- | --- | --- |
//! | 0 | 8 | cookie | `conectix` |
//! | 8 | 4 | features | 2: a bit that is always set |
//! | 12 | 4 | version of the format | 1.0 |
//! | 16 | 8 | where more headers are | all ones: a fixed disk has none |
//! | 24 | 4 | time, in seconds since 2000 | when the restore point was made |
//! | 28 | 4 | creator application | see `CREATOR` |
//! | 32 | 4 | its version | 10.0 |
//! | 36 | 4 | creator's system | `Wi2k` |
//! | 40 | 8 | original size | bytes of the disk |
//! | 48 | 8 | current size | the same |
//! | 56 | 4 | geometry | 2 bytes of cylinders, heads, sectors a track |
//! | 60 | 4 | kind | 2: fixed |
//! | 64 | 4 | checksum | complement of the sum of all other bytes |
//! | 68 | 16 | unique id | of the restore point and its disk |
//! | 84 | 1 | saved state | 0 |
//! | 85 | 427 | reserved | 0 |

use reseal_format::ids::Digest;
use reseal_format::time::Timestamp;

use super::sectors;

/// Bytes of a footer.
pub const FOOTER: usize = 512;
/// The same, as lengths of disks are counted.
pub const FOOTER_U64: u64 = FOOTER as u64;
/// Most that the format holds: 2040 GiB.
pub const MOST: u64 = 2040 << 30;

/// Readers take the size of a disk from its geometry, which is rounded, but where the creator is one that they know to mean the
/// current size. This is the one that all of them know.
const CREATOR: &[u8; 4] = b"win ";
const CREATOR_SYSTEM: &[u8; 4] = b"Wi2k";
const CREATOR_VERSION: u32 = 0x000a_0000;
const COOKIE: &[u8; 8] = b"conectix";
const FEATURES: u32 = 2;
const VERSION: u32 = 0x0001_0000;
const FIXED: u32 = 2;
/// Seconds from 1970 to 2000.
const EPOCH: i64 = 946_684_800;

const AT_CHECKSUM: usize = 64;
const AT_ID: usize = 68;

/// The footer of a disk of `length` bytes. `identity` tells it from other disks. `None` for a disk that the format can't hold: one that
/// ends within a sector, or is longer than [`MOST`].
pub fn footer(length: u64, created: Timestamp, identity: &[u8]) -> Option<[u8; FOOTER]> {
    let sectors = sectors(length).filter(|_| length <= MOST)?;
    let (cylinders, heads, sectors_per_track) = geometry(sectors);
    let seconds = u32::try_from((created.0.div_euclid(1000) - EPOCH).max(0)).unwrap_or(u32::MAX);
    let fields: [&[u8]; 12] = [
        COOKIE,
        &FEATURES.to_be_bytes(),
        &VERSION.to_be_bytes(),
        &u64::MAX.to_be_bytes(),
        &seconds.to_be_bytes(),
        CREATOR,
        &CREATOR_VERSION.to_be_bytes(),
        CREATOR_SYSTEM,
        &length.to_be_bytes(),
        &length.to_be_bytes(),
        &[cylinders.to_be_bytes().as_slice(), &[heads, sectors_per_track]].concat(),
        &FIXED.to_be_bytes(),
    ];
    let mut footer = [0; FOOTER];
    footer[..AT_CHECKSUM].copy_from_slice(&fields.concat());
    footer[AT_ID..AT_ID + 16].copy_from_slice(&unique_id(identity));
    let sum = footer.iter().map(|&byte| u32::from(byte)).sum::<u32>();
    footer[AT_CHECKSUM..AT_ID].copy_from_slice(&(!sum).to_be_bytes());
    Some(footer)
}

/// Cylinders, heads and sectors a track, by the specification's own calculation.
fn geometry(sectors: u64) -> (u16, u8, u8) {
    let sectors = sectors.min(65_535 * 16 * 255);
    let (per_track, heads, all_tracks) = if sectors >= 65_535 * 16 * 63 {
        (255, 16, sectors / 255)
    } else {
        let mut per_track = 17;
        let mut all_tracks = sectors / per_track;
        let mut heads = all_tracks.div_ceil(1024).max(4);
        if all_tracks >= heads * 1024 || heads > 16 {
            (per_track, heads) = (31, 16);
            all_tracks = sectors / per_track;
        }
        if all_tracks >= heads * 1024 {
            (per_track, heads) = (63, 16);
            all_tracks = sectors / per_track;
        }
        (per_track, heads, all_tracks)
    };
    let byte = |number: u64| u8::try_from(number).unwrap_or(u8::MAX);
    (u16::try_from(all_tracks / heads).unwrap_or(u16::MAX), byte(heads), byte(per_track))
}

/// A UUID of the kind whose bits an application chooses.
fn unique_id(identity: &[u8]) -> [u8; 16] {
    let mut id = [0; 16];
    id.copy_from_slice(&Digest::of(identity).as_bytes()[16..]);
    id[6] = id[6] & 0x0f | 0x80;
    id[8] = id[8] & 0x3f | 0x80;
    id
}

#[cfg(test)]
mod tests {
    use super::*;

    const CREATED: Timestamp = Timestamp(1_795_501_907_123);

    #[test]
    fn its_bytes_are_these() {
        let footer = footer(2 << 30, CREATED, b"identity").unwrap();
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let wanted = [
            "636f6e6563746978 00000002 00010000 ffffffffffffffff 3297ebd3 77696e20 000a0000 5769326b",
            "0000000080000000 0000000080000000 1041103f 00000002 ffffe418",
            "f259d220b9d28987b1bf3a6c56d7d0a6",
        ]
        .concat()
        .replace(' ', "");
        assert_eq!(hex(&footer[..84]), wanted);
        assert!(footer[84..].iter().all(|&byte| byte == 0));
        let all: u32 = footer.iter().map(|&byte| u32::from(byte)).sum();
        let sum = u32::from_be_bytes(footer[64..68].try_into().unwrap());
        let of_itself: u32 = footer[64..68].iter().map(|&byte| u32::from(byte)).sum();
        assert_eq!(sum, !(all - of_itself));
    }

    #[test]
    fn geometries_are_those_of_the_specification() {
        for (mebibytes, wanted) in [
            (1, (30, 4, 17)),
            (40, (963, 5, 17)),
            (100, (1003, 12, 17)),
            (512, (1040, 16, 63)),
            (2048, (4161, 16, 63)),
            (130_000, (65_254, 16, 255)),
            (2040 << 10, (65_535, 16, 255)),
        ] {
            assert_eq!(geometry(mebibytes << 11), wanted, "{mebibytes} MiB");
        }
        // What a geometry holds is never more than the disk has.
        for sectors in (1..5_000_000_000u64).step_by(77_777_777) {
            let (cylinders, heads, per_track) = geometry(sectors);
            assert!(u64::from(cylinders) * u64::from(heads) * u64::from(per_track) <= sectors);
        }
    }

    #[test]
    fn what_the_format_cannot_hold_has_none_and_times_do_not_overflow() {
        assert!(footer(MOST, CREATED, b"").is_some());
        for length in [0, 1, 511, 513, MOST + 512] {
            assert_eq!(footer(length, CREATED, b""), None, "{length}");
        }
        for time in [i64::MIN, -1, i64::MAX] {
            assert!(footer(512, Timestamp(time), b"").is_some());
        }
        assert_ne!(footer(512, CREATED, b"one"), footer(512, CREATED, b"two"));
    }
}
