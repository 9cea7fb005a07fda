//! Which packs hold which blobs, as far as this machine knows: an LMDB file that all processes of a tenant share.
//!
//! It is a cache made from the packs' own id tables and holds keyed ids only. It may be lost, stale or wrong: whoever
//! asks checks the answer against the pack's id table. So the first 8 bytes of an id are enough as a key.

use std::collections::{BTreeSet, HashSet};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use heed::types::Bytes;
use heed::{CommitOrAbort, Database, Env, EnvOpenOptions, MdbError, RwTxn, WithoutTls};
use parking_lot::Mutex;
use reseal_format::ids::{BlobId, PackId};
use reseal_format::index::BlobRef;
use reseal_format::keys::Scope;
use reseal_vault::heads::tenant_folder;

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
/// A damaged blob by its place.
const DAMAGED: u8 = b'x';
/// The number of the next pack.
const NEXT: &[u8] = b"next";

type Table = Database<'static, Bytes, Bytes>;

/// The lookup of one tenant.
#[derive(Clone, Copy)]
pub(crate) struct Lookup {
    env: &'static Env<WithoutTls>,
    table: Table,
}

/// Lookups that this process has open: LMDB allows each file once, and for as long as the process lives.
static OPEN: Mutex<Vec<(PathBuf, Lookup)>> = Mutex::new(Vec::new());

/// Where a tenant's lookup is.
pub(crate) fn lookup_folder(state: &Path, scope: &Scope) -> PathBuf {
    tenant_folder(state, scope).join("lookup")
}

impl Lookup {
    /// Opens it, or makes it anew where there is none or it is damaged.
    pub(crate) fn open(folder: &Path) -> heed::Result<Lookup> {
        let mut open = OPEN.lock();
        if let Some((_, lookup)) = open.iter().find(|(path, _)| path == folder) {
            return Ok(*lookup);
        }
        let lookup = match Lookup::open_once(folder) {
            // It is a cache: what is damaged is made again from the packs. Any other reason may pass by itself, and other
            // processes may be using the file.
            Err(heed::Error::Mdb(MdbError::Invalid | MdbError::Corrupted | MdbError::VersionMismatch)) => {
                std::fs::remove_dir_all(folder)?;
                Lookup::open_once(folder)?
            }
            other => other?,
        };
        open.push((folder.to_owned(), lookup));
        Ok(lookup)
    }

    fn open_once(folder: &Path) -> heed::Result<Lookup> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        let mut options = EnvOpenOptions::new().read_txn_without_tls();
        options.map_size(MAP).max_readers(READERS);
        // It holds neither keys nor plaintext, so it need not be locked in memory, where it could not be given back.
        //
        // SAFETY: the file is in this tool's own state folder and only ever changed through LMDB, whose locks hold
        // between processes.
        let env = reseal_cli::unlocked(|| unsafe { options.open(folder) })?;
        // A page behind the end of the file could not be read: the process would be killed.
        let pages = env.info().last_page_number as u64 + 1;
        let wanted = pages * u64::from(env.unnamed_database_stat().page_size);
        if std::fs::metadata(folder.join("data.mdb"))?.len() < wanted {
            return Err(heed::Error::Mdb(MdbError::Corrupted));
        }
        let env: &'static Env<WithoutTls> = Box::leak(Box::new(env));
        env.clear_stale_readers()?;
        let opened = env.create_databases_and_commit(env.write_txn()?, |opener, txn| {
            let table = opener.database_options().types::<Bytes, Bytes>().create(txn)?;
            heed::Result::Ok(CommitOrAbort::<_, ()>::Commit(table))
        })?;
        let table = opened.commit().ok_or(std::io::Error::other("the table was not opened"))?;
        Ok(Lookup { env, table })
    }

    /// The packs that it holds.
    pub(crate) fn packs(&self) -> heed::Result<BTreeSet<(PackId, u32)>> {
        let txn = self.env.read_txn()?;
        let rows = self.table.prefix_iter(&txn, &[BY_ID])?;
        rows.filter_map(|row| row.map(|(key, value)| parse_pack(&key[1..], value)).transpose()).collect()
    }

    /// Forgets packs that are gone.
    pub(crate) fn forget(&self, gone: impl Iterator<Item = PackId>) -> heed::Result<()> {
        let mut txn = self.env.write_txn()?;
        for id in gone {
            if let Some(number) = self.number(&txn, id)? {
                self.table.delete(&mut txn, &pack_key(BY_NUMBER, &number.to_be_bytes()))?;
            }
            self.table.delete(&mut txn, &pack_key(BY_ID, id.as_bytes()))?;
        }
        txn.commit()
    }

    /// The blobs that a verification found damaged: nothing is deduplicated against them.
    pub(crate) fn damaged(&self) -> heed::Result<HashSet<(PackId, u32)>> {
        let txn = self.env.read_txn()?;
        let rows = self.table.prefix_iter(&txn, &[DAMAGED])?;
        rows.filter_map(|row| row.map(|(key, _)| parse_damaged(&key[1..])).transpose()).collect()
    }

    /// Remembers damaged blobs, instead of or beside those that it knows.
    pub(crate) fn set_damaged(&self, blobs: &[(PackId, u32)], replace: bool) -> heed::Result<()> {
        let known = self.damaged()?;
        let gone: Vec<_> = known.iter().filter(|blob| replace && !blobs.contains(blob)).collect();
        if gone.is_empty() && blobs.iter().all(|blob| known.contains(blob)) {
            return Ok(());
        }
        let mut txn = self.env.write_txn()?;
        for blob in gone {
            self.table.delete(&mut txn, &damaged_key(blob))?;
        }
        for blob in blobs {
            self.table.put(&mut txn, &damaged_key(blob), b"damaged")?;
        }
        txn.commit()
    }

    /// Knows no damage any more of packs that were mended.
    pub(crate) fn mended(&self, packs: &BTreeSet<PackId>) -> heed::Result<()> {
        let damaged = self.damaged()?;
        let mut txn = self.env.write_txn()?;
        for blob in damaged.iter().filter(|(pack, _)| packs.contains(pack)) {
            self.table.delete(&mut txn, &damaged_key(blob))?;
        }
        txn.commit()
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

fn damaged_key((pack, ordinal): &(PackId, u32)) -> Vec<u8> {
    [&[DAMAGED], &pack.as_bytes()[..], &ordinal.to_be_bytes()].concat()
}

fn parse_damaged(key: &[u8]) -> Option<(PackId, u32)> {
    let (pack, ordinal) = key.split_first_chunk::<16>()?;
    Some((PackId::from_bytes(*pack), u32::from_be_bytes(ordinal.try_into().ok()?)))
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
        let pack = |n: u8| PackId::from_bytes([n; 16]);
        let ids: Vec<_> = (0..100u8).map(|n| BlobId::from_bytes([n; 32])).collect();
        lookup.learn(pack(1), 0, &ids).unwrap();
        lookup.learn(pack(1), 0, &ids).unwrap();
        lookup.learn(pack(2), 0, &[]).unwrap();
        assert_eq!(lookup.packs().unwrap(), [(pack(1), 0), (pack(2), 0)].into());
        let place = BlobRef { pack: pack(1), generation: 0, ordinal: 7 };
        assert_eq!(lookup.find(&ids[7]).unwrap(), Some(place));
        assert_eq!(lookup.find(&BlobId::from_bytes([200; 32])).unwrap(), None);
        lookup.forget([pack(1)].into_iter()).unwrap();
        assert_eq!(lookup.packs().unwrap(), [(pack(2), 0)].into());
        assert_eq!(lookup.find(&ids[7]).unwrap(), None);
    }

    #[test]
    fn damage_is_remembered_until_a_whole_verification_says_otherwise() {
        let folder = tempfile::tempdir().unwrap();
        let lookup = Lookup::open(&folder.path().join("lookup")).unwrap();
        let blob = |n: u8| (PackId::from_bytes([n; 16]), 7);
        lookup.set_damaged(&[blob(1)], false).unwrap();
        lookup.set_damaged(&[blob(2)], false).unwrap();
        assert_eq!(lookup.damaged().unwrap(), [blob(1), blob(2)].into());
        lookup.set_damaged(&[blob(2)], true).unwrap();
        assert_eq!(lookup.damaged().unwrap(), [blob(2)].into());
        lookup.set_damaged(&[blob(1), (blob(2).0, 9)], false).unwrap();
        lookup.mended(&[blob(2).0, blob(3).0].into()).unwrap();
        assert_eq!(lookup.damaged().unwrap(), [blob(1)].into());
    }

    #[test]
    fn a_damaged_file_is_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("data.mdb"), [0x55; 9000]).unwrap();
        let lookup = Lookup::open(folder.path()).unwrap();
        assert_eq!(lookup.find(&BlobId::from_bytes([1; 32])).unwrap(), None);
    }

    #[test]
    fn a_file_that_was_cut_off_is_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let (whole, cut) = (folder.path().join("whole"), folder.path().join("cut"));
        let lookup = Lookup::open(&whole).unwrap();
        let ids: Vec<_> =
            (0..9_000u32).map(|n| BlobId::from_bytes(*blake3::hash(&n.to_le_bytes()).as_bytes())).collect();
        lookup.learn(PackId::from_bytes([1; 16]), 0, &ids).unwrap();
        std::fs::create_dir(&cut).unwrap();
        let bytes = std::fs::read(whole.join("data.mdb")).unwrap();
        std::fs::write(cut.join("data.mdb"), &bytes[..bytes.len() / 2 / 4096 * 4096]).unwrap();
        assert_eq!(Lookup::open(&cut).unwrap().find(&ids[7]).unwrap(), None);
    }
}
