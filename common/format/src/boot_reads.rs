//! What a boot read, as a note about the restore point that was booted: the next boot of the VM has it fetched ahead.
//!
//! Clusters stand in the order in which they were read first, as runs of neighbours: how far the run begins from the end of the one before
//! it, and how many it has, each as a variable-length number of seven bits a byte.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::FormatError;
use crate::dated_note::DatedKind;
use crate::geometry::{MAX_DISK, cluster_count};
use crate::manifest::{MAX_DISKS, Note};
use crate::names::DiskName;

/// Most clusters of all disks together: 4 GiB of disk, several times what a boot reads.
pub const MAX_CLUSTERS: usize = 64 << 10;
/// Most bytes of all runs together, as encoded.
pub const MAX_ENCODED: usize = 128 << 10;
/// Longest encoding of one run: two numbers of at most ten bytes.
const MAX_RUN: usize = 20;

/// What was read of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskReads {
    pub disk: DiskName,
    /// Each once, in the order of first use.
    pub clusters: Vec<u64>,
}

/// What was read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BootReads {
    pub disks: Vec<DiskReads>,
}

/// The content of the note.
#[derive(Serialize, Deserialize)]
struct Content {
    disks: Vec<Runs>,
}

#[derive(Serialize, Deserialize)]
struct Runs {
    disk: DiskName,
    /// In hexadecimal.
    runs: String,
}

fn put_number(mut number: u64, out: &mut Vec<u8>) {
    while number >= 0x80 {
        out.push((number & 0x7f) as u8 | 0x80);
        number >>= 7;
    }
    out.push((number & 0x7f) as u8);
}

fn take_number(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        let part = u64::from(byte & 0x7f);
        if part << shift >> shift != part {
            return None;
        }
        number |= part << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

/// A distance in either direction as a number: small ones stay small.
fn zigzag(distance: i64) -> u64 {
    (distance.cast_unsigned() << 1) ^ (distance >> 63).cast_unsigned()
}

fn unzigzag(number: u64) -> i64 {
    (number >> 1).cast_signed() ^ -((number & 1).cast_signed())
}

/// Runs of neighbours: first cluster, and how many.
fn runs(clusters: &[u64]) -> impl Iterator<Item = (u64, u64)> + '_ {
    let follows = |a: &u64, b: &u64| a.checked_add(1) == Some(*b);
    clusters.chunk_by(follows).map(|run| (run[0], run.len() as u64))
}

/// Encodes clusters, as many of them as `most` bytes hold.
fn encode(clusters: &[u64], most: usize) -> Vec<u8> {
    let (mut out, mut end) = (Vec::new(), 0u64);
    for (first, count) in runs(clusters) {
        if out.len() + MAX_RUN > most {
            break;
        }
        put_number(zigzag(first.wrapping_sub(end).cast_signed()), &mut out);
        put_number(count, &mut out);
        end = first.wrapping_add(count);
    }
    out
}

/// Decodes at most `most` clusters, each of which a disk may have.
fn decode(mut bytes: &[u8], most: usize) -> Option<Vec<u64>> {
    let (mut clusters, mut seen, mut end) = (Vec::new(), HashSet::new(), 0u64);
    let last = cluster_count(MAX_DISK);
    while !bytes.is_empty() {
        let first = end.checked_add_signed(unzigzag(take_number(&mut bytes)?))?;
        let count = take_number(&mut bytes)?;
        end = first.checked_add(count).filter(|end| *end <= last)?;
        if count == 0 || count > (most - clusters.len()) as u64 {
            return None;
        }
        clusters.extend(first..end);
        if !(first..end).all(|cluster| seen.insert(cluster)) {
            return None;
        }
    }
    Some(clusters)
}

impl BootReads {
    /// The content of such a note: what was read first, as much as may be kept.
    pub fn content(&self) -> Value {
        let (mut room, mut left) = (MAX_ENCODED, MAX_CLUSTERS);
        let mut disks = Vec::new();
        for read in self.disks.iter().take(MAX_DISKS) {
            let clusters = &read.clusters[..read.clusters.len().min(left)];
            let encoded = encode(clusters, room);
            (room, left) = (room - encoded.len(), left - clusters.len());
            disks.push(Runs { disk: read.disk.clone(), runs: hex::encode(encoded) });
        }
        serde_json::to_value(Content { disks }).expect("text always serializes")
    }

    /// What a note says.
    pub fn of(note: &Note) -> Result<BootReads, FormatError> {
        DatedKind::BootReads.check(note)?;
        let malformed = FormatError::Malformed("it holds no reads of a boot");
        let Ok(content) = Content::deserialize(&note.content) else { return Err(malformed) };
        if content.disks.len() > MAX_DISKS {
            return Err(malformed);
        }
        let (mut room, mut left) = (MAX_ENCODED, MAX_CLUSTERS);
        let mut disks = Vec::new();
        for Runs { disk, runs } in content.disks {
            if runs.len() / 2 > room {
                return Err(malformed);
            }
            let encoded = hex::decode(&runs).map_err(|_| malformed.clone())?;
            let clusters = decode(&encoded, left).ok_or_else(|| malformed.clone())?;
            (room, left) = (room - encoded.len(), left - clusters.len());
            disks.push(DiskReads { disk, clusters });
        }
        Ok(BootReads { disks })
    }

    /// How many clusters it names.
    pub fn count(&self) -> usize {
        self.disks.iter().map(|read| read.clusters.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::ids::{PointId, VmId};
    use crate::names::VmName;
    use crate::time::Timestamp;

    fn note(content: Value) -> Note {
        let created = Timestamp(1_795_501_907_123);
        Note {
            note_id: DatedKind::BootReads.id(created, [1; 6]),
            vm: VmName::new("web01").unwrap(),
            vm_id: VmId::from_bytes([2; 16]),
            number: 3,
            point_id: PointId::from_bytes([4; 16]),
            created,
            kind: "boot-reads".into(),
            content,
        }
    }

    fn of(disk: &str, clusters: Vec<u64>) -> DiskReads {
        DiskReads { disk: DiskName::new(disk).unwrap(), clusters }
    }

    #[test]
    fn reads_come_back_in_their_order() {
        let last = cluster_count(MAX_DISK) - 1;
        let reads = BootReads {
            disks: vec![of("root", vec![0, 1, 2, 40_000, 7, 8, 3, last]), of("data", vec![]), of("logs", vec![5])],
        };
        let content = reads.content();
        // 0 +3; then 40,000 of which 3 are behind; back to 7; back to 3.
        assert!(content["disks"][0]["runs"].as_str().unwrap().starts_with("0003"), "{content}");
        assert_eq!(content["disks"][2], json!({ "disk": "logs", "runs": "0a01" }));
        assert_eq!(BootReads::of(&note(content)), Ok(reads));
    }

    #[test]
    fn no_more_is_kept_than_may_be() {
        let scattered: Vec<u64> = (0..70_000).map(|n| n * 2).collect();
        let reads = BootReads { disks: vec![of("root", (0..100_000).collect()), of("data", vec![1])] };
        let back = BootReads::of(&note(reads.content())).unwrap();
        assert_eq!(back.disks[0].clusters.len() + back.disks[1].clusters.len(), MAX_CLUSTERS);
        let reads = BootReads { disks: vec![of("root", scattered.clone()), of("data", vec![1])] };
        let back = BootReads::of(&note(reads.content())).unwrap();
        assert_eq!(back.disks[0].clusters, scattered[..back.disks[0].clusters.len()]);
        assert!(back.disks[0].clusters.len() > MAX_CLUSTERS / 2 && back.count() <= MAX_CLUSTERS);
    }

    #[test]
    fn what_is_no_list_of_reads_is_refused() {
        let runs = |text: &str| note(json!({ "disks": [{ "disk": "root", "runs": text }] }));
        assert!(BootReads::of(&runs("0001")).is_ok());
        // Cut off; empty runs; one cluster twice; before the first; beyond any disk; too many; numbers without end; no digits.
        for bad in [
            "00",
            "0000",
            "00010101",
            "0101",
            "ffffffffffffffff7f01",
            "00ffffff7f",
            "ffffffffffffffffffffff01",
            "zz",
            "000",
        ] {
            assert!(BootReads::of(&runs(bad)).is_err(), "{bad}");
        }
        assert!(BootReads::of(&runs(&"0001".repeat(MAX_ENCODED))).is_err(), "too long");
        assert!(BootReads::of(&note(json!({ "disks": [{ "disk": "a=b", "runs": "" }] }))).is_err());
        assert!(BootReads::of(&note(json!(null))).is_err());
        let mut other = runs("0001");
        other.kind = "boot-verdict".into();
        assert!(BootReads::of(&other).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_decode_to_what_encodes_to_as_much_or_to_nothing(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
            if let Some(clusters) = decode(&bytes, 1000) {
                prop_assert!(clusters.len() <= 1000);
                prop_assert_eq!(decode(&encode(&clusters, MAX_ENCODED), 1000), Some(clusters));
            }
        }

        #[test]
        fn any_clusters_come_back(clusters in prop::collection::hash_set(0..cluster_count(MAX_DISK), 0..200)) {
            let clusters: Vec<u64> = clusters.into_iter().collect();
            prop_assert_eq!(decode(&encode(&clusters, MAX_ENCODED), MAX_CLUSTERS), Some(clusters));
        }
    }
}
