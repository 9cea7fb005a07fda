//! Which packs hold which blobs, as far as this machine knows: an LMDB file that all processes of a tenant share.
//!
//! It is a cache made from the packs' own id tables and holds keyed ids only. It may be lost, stale or wrong: whoever
//! asks checks the answer against the pack's id table. So the first 8 bytes of an id are enough as a key.

use std::collections::BTreeSet;
use std::path::Path;

use heed::types::Bytes;
use heed::{CommitOrAbort, Database, Env, EnvOpenOptions, RwTxn, WithoutTls};
use reseal_format::ids::{BlobId, PackId};
use reseal_format::index::BlobRef;
use reseal_vault::PackFile;

/// Address space of the file, which grows as it is filled: room for about 300 million blobs.
const MAP: usize = 16 << 30;
/// Threads of all processes that may look something up at once.
const READERS: u32 = 1024;

/// First byte of a key: a pack by its id.
const BY_ID: u8 = b'p';
/// A pack by its number.
const BY_NUMBER: u8 = b'n';
/// A blob by the start of its id.
const BLOB: u8 = b'b';
/// The number of the next pack.
const NEXT: &[u8] = b"next";

type Table = Database<'static, Bytes, Bytes>;

/// The lookup of one tenant.
pub(crate) struct Lookup {
    env: &'static Env<WithoutTls>,
    table: Table,
}

impl Lookup {
    /// Opens it, or makes it anew where there is none or it can't be opened.
    pub(crate) fn open(folder: &Path) -> heed::Result<Lookup> {
        Lookup::open_once(folder).or_else(|_| {
            // It is a cache: what is damaged is made again from the packs.
            std::fs::remove_dir_all(folder)?;
            Lookup::open_once(folder)
        })
    }

    fn open_once(folder: &Path) -> heed::Result<Lookup> {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let mut options = EnvOpenOptions::new().read_txn_without_tls();
        options.map_size(MAP).max_readers(READERS);
        // SAFETY: the file is in this tool's own state folder and only ever changed through LMDB, whose locks hold
        // between processes.
        let env = unsafe { options.open(folder)? };
        // A backup opens one, at the start, and ends with the process.
        let env: &'static Env<WithoutTls> = Box::leak(Box::new(env));
        env.clear_stale_readers()?;
        let opened = env.create_databases_and_commit(env.write_txn()?, |opener, txn| {
            let table = opener.database_options().types::<Bytes, Bytes>().create(txn)?;
            heed::Result::Ok(CommitOrAbort::<_, ()>::Commit(table))
        })?;
        let table = opened.commit().ok_or(std::io::Error::other("the table was not opened"))?;
        Ok(Lookup { env, table })
    }

    /// Which of these packs it does not hold; it forgets those that it holds and are not among them.
    pub(crate) fn reconcile(&self, present: &[PackFile]) -> heed::Result<Vec<PackFile>> {
        let present: BTreeSet<(PackId, u32)> = present.iter().map(|pack| (pack.id, pack.generation)).collect();
        let mut known = BTreeSet::new();
        let mut gone = Vec::new();
        let txn = self.env.read_txn()?;
        for row in self.table.prefix_iter(&txn, &[BY_ID])? {
            let (key, value) = row?;
            let Some(pack) = parse_pack(&key[1..], value) else { continue };
            match present.contains(&pack) {
                true => drop(known.insert(pack)),
                false => gone.push(pack.0),
            }
        }
        drop(txn);
        if !gone.is_empty() {
            let mut txn = self.env.write_txn()?;
            for id in gone {
                if let Some(number) = self.number(&txn, id)? {
                    self.table.delete(&mut txn, &pack_key(BY_NUMBER, &number.to_be_bytes()))?;
                }
                self.table.delete(&mut txn, &pack_key(BY_ID, id.as_bytes()))?;
            }
            txn.commit()?;
        }
        let unknown = present.difference(&known);
        Ok(unknown.map(|&(id, generation)| PackFile { id, generation, length: 0 }).collect())
    }

    fn number(&self, txn: &heed::RoTxn<'_>, id: PackId) -> heed::Result<Option<u32>> {
        let row = self.table.get(txn, &pack_key(BY_ID, id.as_bytes()))?;
        Ok(row.and_then(|row| row.first_chunk()).map(|number| u32::from_be_bytes(*number)))
    }

    /// Learns a pack; `ids` by ordinal, empty for a pack that nothing is deduplicated against.
    pub(crate) fn learn(&self, id: PackId, generation: u32, ids: &[BlobId]) -> heed::Result<()> {
        let mut txn = self.env.write_txn()?;
        if self.number(&txn, id)?.is_some() {
            return Ok(()); // another process was faster
        }
        let number = self.take_number(&mut txn)?;
        let mut row = number.to_be_bytes().to_vec();
        row.extend(generation.to_be_bytes());
        self.table.put(&mut txn, &pack_key(BY_ID, id.as_bytes()), &row)?;
        let row = [&id.as_bytes()[..], &generation.to_be_bytes()].concat();
        self.table.put(&mut txn, &pack_key(BY_NUMBER, &number.to_be_bytes()), &row)?;
        // In the order of the tree, neighbouring keys share pages.
        let mut sorted: Vec<(&BlobId, u16)> = ids.iter().zip(0..).collect();
        sorted.sort_unstable();
        for (id, ordinal) in sorted {
            let mut row = [0; 6];
            row[..4].copy_from_slice(&number.to_be_bytes());
            row[4..].copy_from_slice(&ordinal.to_be_bytes());
            self.table.put(&mut txn, &blob_key(id), &row)?;
        }
        txn.commit()
    }

    fn take_number(&self, txn: &mut RwTxn<'_>) -> heed::Result<u32> {
        let number =
            self.table.get(txn, NEXT)?.and_then(|row| row.first_chunk()).map_or(0, |row| u32::from_be_bytes(*row));
        self.table.put(txn, NEXT, &number.wrapping_add(1).to_be_bytes())?;
        Ok(number)
    }

    /// Where a blob of that id may be. To be checked against the pack's id table.
    pub(crate) fn find(&self, id: &BlobId) -> heed::Result<Option<BlobRef>> {
        let txn = self.env.read_txn()?;
        let Some(row) = self.table.get(&txn, &blob_key(id))? else { return Ok(None) };
        let Some((number, ordinal)) = row.split_first_chunk::<4>() else { return Ok(None) };
        let Some(pack) = self.table.get(&txn, &pack_key(BY_NUMBER, number))? else { return Ok(None) };
        let ordinal = <[u8; 2]>::try_from(ordinal).ok().map(u16::from_be_bytes);
        let place = pack.split_first_chunk::<16>().zip(ordinal).and_then(|((id, generation), ordinal)| {
            let generation = u32::from_be_bytes(generation.try_into().ok()?);
            Some(BlobRef { pack: PackId::from_bytes(*id), generation, ordinal: u32::from(ordinal) })
        });
        Ok(place)
    }
}

fn pack_key(kind: u8, id: &[u8]) -> Vec<u8> {
    [&[kind], id].concat()
}

fn blob_key(id: &BlobId) -> [u8; 9] {
    let mut key = [BLOB; 9];
    key[1..].copy_from_slice(&id.as_bytes()[..8]);
    key
}

fn parse_pack(id: &[u8], row: &[u8]) -> Option<(PackId, u32)> {
    let generation = row.get(4..8)?.try_into().ok()?;
    Some((PackId::from_bytes(id.try_into().ok()?), u32::from_be_bytes(generation)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_finds_what_it_learnt_and_forgets_what_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let lookup = Lookup::open(&folder.path().join("lookup")).unwrap();
        let pack = |n: u8| PackFile { id: PackId::from_bytes([n; 16]), generation: 0, length: 0 };
        let ids: Vec<_> = (0..100u8).map(|n| BlobId::from_bytes([n; 32])).collect();
        assert_eq!(lookup.reconcile(&[pack(1), pack(2)]).unwrap(), [pack(1), pack(2)]);
        lookup.learn(pack(1).id, 0, &ids).unwrap();
        lookup.learn(pack(1).id, 0, &ids).unwrap();
        lookup.learn(pack(2).id, 0, &[]).unwrap();
        assert_eq!(lookup.reconcile(&[pack(1), pack(2)]).unwrap(), []);
        let found = lookup.find(&ids[7]).unwrap();
        assert_eq!(found, Some(BlobRef { pack: pack(1).id, generation: 0, ordinal: 7 }));
        assert_eq!(lookup.find(&BlobId::from_bytes([200; 32])).unwrap(), None);
        assert_eq!(lookup.reconcile(&[pack(2)]).unwrap(), []);
        assert_eq!(lookup.find(&ids[7]).unwrap(), None);
    }

    #[test]
    fn a_damaged_file_is_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("data.mdb"), [0x55; 9000]).unwrap();
        let lookup = Lookup::open(folder.path()).unwrap();
        assert_eq!(lookup.find(&BlobId::from_bytes([1; 32])).unwrap(), None);
    }
}
