//! The index: a tree of fan-out 1,024 from a disk's clusters to blobs.
//!
//! Leaves (level 0) and nodes have one encoding; only what their entries point at differs.
//!
//! ```text
//! level u8 ‖ 0 u8 ‖ packs u16 ‖ (pack id 16 ‖ generation u32) × packs ‖ entry u32 × 1024
//! ```
//!
//! An entry is `HOLE`, or slot of the pack table × 2^14 + ordinal. As a blob, a node is one zstd frame of that.

use crate::FormatError;
use crate::geometry::FANOUT;
use crate::ids::PackId;
use crate::pack::MAX_BLOBS;

/// Entry of a cluster, or of a whole subtree, that is all zeros.
const HOLE: u32 = u32::MAX;
/// Bits of an entry that hold the ordinal.
const ORDINAL_BITS: u32 = 14;
const FIXED: usize = 4;
const PACK: usize = PackId::LENGTH + 4;
/// Longest node: every child in another pack.
pub const MAX_NODE: usize = FIXED + FANOUT * PACK + FANOUT * 4;
/// zstd level of nodes: they are few and small, and every restore point writes some.
const LEVEL: i32 = 3;

/// Where a blob is. The generation is a hint: a pack that was rewritten since has the same ordinals under a higher one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlobRef {
    pub pack: PackId,
    pub generation: u32,
    pub ordinal: u32,
}

/// A leaf or a node.
#[derive(Clone, PartialEq, Eq)]
pub struct IndexNode {
    level: u8,
    packs: Vec<(PackId, u32)>,
    entries: Vec<u32>,
}

impl IndexNode {
    /// A node of that level whose children are all holes.
    pub fn new(level: u8) -> IndexNode {
        IndexNode { level, packs: Vec::new(), entries: vec![HOLE; FANOUT] }
    }

    /// 0 for a leaf.
    pub fn level(&self) -> u8 {
        self.level
    }

    /// The child in that slot, unless it is a hole.
    pub fn get(&self, slot: usize) -> Option<BlobRef> {
        let entry = self.entries[slot];
        if entry == HOLE {
            return None;
        }
        let (pack, generation) = self.packs[(entry >> ORDINAL_BITS) as usize];
        Some(BlobRef { pack, generation, ordinal: entry & ((1 << ORDINAL_BITS) - 1) })
    }

    /// Whether the child in that slot is a hole.
    pub fn is_hole(&self, slot: usize) -> bool {
        self.entries[slot] == HOLE
    }

    /// Whether all children are holes.
    pub fn is_empty(&self) -> bool {
        self.entries.iter().all(|&entry| entry == HOLE)
    }

    /// The packs that the children are in, with the generations when the node was written.
    pub fn packs(&self) -> &[(PackId, u32)] {
        &self.packs
    }

    /// Bytes of memory that it takes.
    pub fn memory(&self) -> usize {
        self.packs.len() * size_of::<(PackId, u32)>() + FANOUT * 4
    }

    /// Whether both map every slot to the same blob, whatever the generations.
    pub fn same_children(&self, other: &IndexNode) -> bool {
        let place = |node: &IndexNode, slot| node.get(slot).map(|blob| (blob.pack, blob.ordinal));
        self.level == other.level && (0..FANOUT).all(|slot| place(self, slot) == place(other, slot))
    }

    /// A node of that level with these children.
    ///
    /// # Panics
    /// If there are more than 1,024, or an ordinal is past the end of any pack.
    pub fn from_children(level: u8, children: &[Option<BlobRef>]) -> IndexNode {
        assert!(children.len() <= FANOUT, "a node has 1,024 slots");
        let mut node = IndexNode::new(level);
        for (entry, child) in node.entries.iter_mut().zip(children) {
            let Some(blob) = child else { continue };
            assert!(blob.ordinal < MAX_BLOBS, "an ordinal is below the limit of a pack");
            let named = |&(pack, generation): &(PackId, u32)| (pack, generation) == (blob.pack, blob.generation);
            // Neighbours are mostly in the pack that was named last.
            let slot = node.packs.iter().rposition(named).unwrap_or_else(|| {
                node.packs.push((blob.pack, blob.generation));
                node.packs.len() - 1
            });
            *entry = (u32::try_from(slot).unwrap_or(HOLE) << ORDINAL_BITS) | blob.ordinal;
        }
        node
    }

    /// The plaintext of the node, from which its blob id is made.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(FIXED + self.packs.len() * PACK + FANOUT * 4);
        bytes.extend([self.level, 0]);
        bytes.extend(u16::try_from(self.packs.len()).unwrap_or(u16::MAX).to_le_bytes());
        for (pack, generation) in &self.packs {
            bytes.extend(pack.as_bytes());
            bytes.extend(generation.to_le_bytes());
        }
        for entry in &self.entries {
            bytes.extend(entry.to_le_bytes());
        }
        bytes
    }

    /// Parses, checks every entry, and refuses a node of another level: so no path through a tree can loop.
    pub fn decode(bytes: &[u8], level: u8) -> Result<IndexNode, FormatError> {
        let malformed = FormatError::Malformed;
        let (fixed, rest) = bytes.split_at_checked(FIXED).ok_or(malformed("index node is cut off"))?;
        if fixed[0] != level || fixed[1] != 0 {
            return Err(malformed("index node is of another level"));
        }
        let count = usize::from(u16::from_le_bytes([fixed[2], fixed[3]]));
        if count > FANOUT || rest.len() != count * PACK + FANOUT * 4 {
            return Err(malformed("index node has a wrong length"));
        }
        let (packs, entries) = rest.split_at(count * PACK);
        let packs = packs.chunks_exact(PACK).map(|row| {
            let (id, generation) = row.split_at(PackId::LENGTH);
            (PackId::from_bytes(take(id)), u32::from_le_bytes(take(generation)))
        });
        let entries: Vec<u32> = entries.chunks_exact(4).map(|entry| u32::from_le_bytes(take(entry))).collect();
        if entries.iter().any(|&entry| entry != HOLE && (entry >> ORDINAL_BITS) as usize >= count) {
            return Err(malformed("index entry points past its pack table"));
        }
        Ok(IndexNode { level, packs: packs.collect(), entries })
    }

    /// The node as the content of a blob.
    pub fn compress(encoded: &[u8]) -> std::io::Result<Vec<u8>> {
        zstd::bulk::compress(encoded, LEVEL)
    }

    /// The plaintext of a node from the content of its blob.
    pub fn decompress(content: &[u8]) -> Result<Vec<u8>, FormatError> {
        zstd::bulk::decompress(content, MAX_NODE)
            .map_err(|_| FormatError::Malformed("index node does not decompress within its limit"))
    }
}

/// The first bytes of a slice that is known to be long enough.
fn take<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[..N]);
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn blob(pack: u8, ordinal: u32) -> BlobRef {
        BlobRef { pack: PackId::from_bytes([pack; 16]), generation: 0, ordinal }
    }

    #[test]
    fn children_come_back() {
        let children: Vec<_> =
            (0..1024u32).map(|i| (i % 3 != 0).then(|| blob(u8::try_from(i % 7).unwrap(), i))).collect();
        let node = IndexNode::from_children(1, &children);
        assert_eq!(node.packs().len(), 7);
        let content = IndexNode::compress(&node.encode()).unwrap();
        let back = IndexNode::decode(&IndexNode::decompress(&content).unwrap(), 1).unwrap();
        for (slot, child) in children.iter().enumerate() {
            assert_eq!(back.get(slot), *child);
        }
        assert!(back.same_children(&node));
        assert!(IndexNode::decode(&node.encode(), 0).is_err(), "another level");
    }

    proptest! {
        #[test]
        fn hostile_nodes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..9000), packs in 0u16..40) {
            let wanted = FIXED + usize::from(packs) * PACK + FANOUT * 4;
            if bytes.len() > wanted { bytes.truncate(wanted); }
            if let [level, zero, low, high, ..] = &mut bytes[..] {
                (*level, *zero) = (0, 0);
                [*low, *high] = packs.to_le_bytes();
            }
            if let Ok(node) = IndexNode::decode(&bytes, 0) {
                for slot in 0..FANOUT { let _ = node.get(slot); }
            }
            let _ = IndexNode::decompress(&bytes);
        }
    }
}
