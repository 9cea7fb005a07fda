//! What a prune is about to remove: whoever begins a backup relies on none of it. See `docs/FORMAT.md`, "Condemned blobs".
//!
//! ```text
//! "RSLGCLOG" ‖ version (2) ‖ zeros (2) ‖ entries (4) ‖ entry × entries ‖ BLAKE3 of all before it (32)
//! entry: pack (16) ‖ words (2), 0 for the whole pack ‖ bits of ordinals (8 × words), the lowest of the first word first
//! ```
//!
//! It is in clear and not authenticated: whoever could change it could as well remove the packs that it names.

use std::collections::BTreeMap;

use crate::ids::PackId;
use crate::ordinals::{MAX_WORDS, Ordinals};
use crate::{FORMAT_VERSION, FormatError};

const MAGIC: &[u8; 8] = b"RSLGCLOG";
const HEADER: usize = 16;
const DIGEST: usize = 32;
const ENTRY: usize = PackId::LENGTH + 2;

/// Most bytes of one object: a longer list is several.
pub const MAX_LIST: usize = 4 << 20;

/// Blobs that are about to go.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Condemned(BTreeMap<PackId, Blobs>);

/// Blobs of a pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Blobs {
    All,
    /// At least one.
    Some(Ordinals),
}

impl Condemned {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The packs, with what is condemned of each.
    pub fn packs(&self) -> impl Iterator<Item = (PackId, &Blobs)> {
        self.0.iter().map(|(id, blobs)| (*id, blobs))
    }

    /// What is condemned of a pack, if anything is.
    pub fn of(&self, pack: PackId) -> Option<&Blobs> {
        self.0.get(&pack)
    }

    pub fn contains(&self, pack: PackId, ordinal: u32) -> bool {
        match self.0.get(&pack) {
            None => false,
            Some(Blobs::All) => true,
            Some(Blobs::Some(ordinals)) => ordinals.contains(ordinal),
        }
    }

    /// Condemns more; no blobs are none.
    pub fn add(&mut self, pack: PackId, blobs: Blobs) {
        match (self.0.get_mut(&pack), blobs) {
            (_, Blobs::Some(ordinals)) if ordinals.is_empty() => {}
            (Some(Blobs::Some(known)), Blobs::Some(more)) => known.extend(&more),
            (Some(Blobs::All), _) => {}
            (_, blobs) => _ = self.0.insert(pack, blobs),
        }
    }

    /// The objects that say it.
    pub fn encode(&self) -> Vec<Vec<u8>> {
        let mut lists = Vec::new();
        let (mut entries, mut count) = (Vec::new(), 0);
        for (id, blobs) in &self.0 {
            let words = match blobs {
                Blobs::All => &[],
                Blobs::Some(ordinals) => ordinals.words(),
            };
            if HEADER + entries.len() + ENTRY + 8 * words.len() + DIGEST > MAX_LIST {
                lists.push(object(&std::mem::take(&mut entries), std::mem::take(&mut count)));
            }
            entries.extend(id.as_bytes());
            entries.extend(u16::try_from(words.len()).unwrap_or(u16::MAX).to_le_bytes());
            entries.extend(words.iter().flat_map(|word| word.to_le_bytes()));
            count += 1;
        }
        if count > 0 {
            lists.push(object(&entries, count));
        }
        lists
    }

    /// Adds what an object says.
    pub fn decode(&mut self, object: &[u8]) -> Result<(), FormatError> {
        let malformed = |what| Err(FormatError::Malformed(what));
        let Some((header, rest)) = object.split_first_chunk::<HEADER>().filter(|(header, _)| header.starts_with(MAGIC))
        else {
            return malformed("no list of condemned blobs");
        };
        let version = u16::from_le_bytes([header[8], header[9]]);
        if version != FORMAT_VERSION {
            return Err(FormatError::Version { found: version });
        }
        let Some((mut entries, digest)) = rest.split_last_chunk::<DIGEST>() else {
            return malformed("it is cut off");
        };
        if blake3::hash(&object[..object.len() - DIGEST]).as_bytes() != digest {
            return malformed("its digest is another");
        }
        for _ in 0..u32::from_le_bytes([header[12], header[13], header[14], header[15]]) {
            let Some((entry, rest)) = entries.split_first_chunk::<ENTRY>() else {
                return malformed("it has fewer entries than it says");
            };
            let (id, count) = entry.split_at(PackId::LENGTH);
            let mut pack = [0; PackId::LENGTH];
            pack.copy_from_slice(id);
            let count = usize::from(u16::from_le_bytes([count[0], count[1]]));
            let Some((words, rest)) = rest.split_at_checked(8 * count).filter(|_| count <= MAX_WORDS) else {
                return malformed("an entry is longer than it may be");
            };
            let words =
                words.chunks_exact(8).map(|word| word.iter().rev().fold(0, |sum, &byte| sum << 8 | u64::from(byte)));
            let blobs = match count {
                0 => Blobs::All,
                _ => Blobs::Some(Ordinals::from_words(words.collect()).unwrap_or_default()),
            };
            self.add(PackId::from_bytes(pack), blobs);
            entries = rest;
        }
        if entries.is_empty() { Ok(()) } else { malformed("it goes on behind its last entry") }
    }
}

fn object(entries: &[u8], count: u32) -> Vec<u8> {
    let mut object = Vec::with_capacity(HEADER + entries.len() + DIGEST);
    object.extend(MAGIC);
    object.extend(FORMAT_VERSION.to_le_bytes());
    object.extend([0; 2]);
    object.extend(count.to_le_bytes());
    object.extend(entries);
    let digest = blake3::hash(&object);
    object.extend(digest.as_bytes());
    object
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pack::MAX_BLOBS;

    fn condemned() -> impl Strategy<Value = Condemned> {
        let blobs = prop_oneof![
            Just(Blobs::All),
            prop::collection::vec(0..MAX_BLOBS, 1..40).prop_map(|ordinals| Blobs::Some(ordinals.into_iter().collect())),
        ];
        prop::collection::vec((any::<u8>(), blobs), 0..40).prop_map(|entries| {
            let mut condemned = Condemned::default();
            entries.into_iter().for_each(|(id, blobs)| condemned.add(PackId::from_bytes([id; 16]), blobs));
            condemned
        })
    }

    fn decoded(lists: &[Vec<u8>]) -> Result<Condemned, FormatError> {
        let mut condemned = Condemned::default();
        lists.iter().try_for_each(|list| condemned.decode(list))?;
        Ok(condemned)
    }

    proptest! {
        #[test]
        fn it_is_read_as_it_was_written(written in condemned(), at in any::<prop::sample::Index>(), bit in 0..8u8) {
            let lists = written.encode();
            prop_assert_eq!(decoded(&lists).unwrap(), written.clone());
            for list in lists {
                let mut changed = list.clone();
                changed[at.index(list.len())] ^= 1 << bit;
                prop_assert!(decoded(&[changed]).is_err());
                prop_assert!(decoded(&[list[..at.index(list.len())].to_vec()]).is_err());
            }
        }

        #[test]
        fn anything_else_is_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200), count in any::<u32>()) {
            let _ = decoded(std::slice::from_ref(&bytes));
            // What has the right digest is looked at to its end.
            let _ = decoded(&[object(&bytes, count)]);
        }
    }

    #[test]
    fn a_long_list_is_several_and_each_has_its_limit() {
        let mut condemned = Condemned::default();
        for nth in 0..5_000u32 {
            let mut id = [0; 16];
            id[..4].copy_from_slice(&nth.to_le_bytes());
            condemned.add(PackId::from_bytes(id), Blobs::Some((0..MAX_BLOBS).step_by(2).collect()));
        }
        let lists = condemned.encode();
        assert!(lists.len() == 3 && lists.iter().all(|list| list.len() <= MAX_LIST));
        assert!(decoded(&lists).unwrap() == condemned);
        assert!(
            condemned.contains(PackId::from_bytes([0; 16]), 2) && !condemned.contains(PackId::from_bytes([0; 16]), 3)
        );
    }

    #[test]
    fn more_of_a_pack_is_added_to_what_was_condemned_before() {
        let pack = PackId::from_bytes([1; 16]);
        let mut condemned = Condemned::default();
        condemned.add(pack, Blobs::Some(Ordinals::default()));
        assert!(condemned.is_empty() && condemned.encode().is_empty());
        condemned.add(pack, Blobs::Some([1].into_iter().collect()));
        condemned.add(pack, Blobs::Some([7].into_iter().collect()));
        assert!(condemned.contains(pack, 1) && condemned.contains(pack, 7) && !condemned.contains(pack, 2));
        condemned.add(pack, Blobs::All);
        condemned.add(pack, Blobs::Some([3].into_iter().collect()));
        assert!(condemned.contains(pack, 2) && condemned.packs().count() == 1);
    }
}
