//! Reading blobs from packs.
//!
//! A blob is found through its pack's table of lengths, which is read once and cached. Where the generation that an index
//! remembers is gone or does not authenticate, the pack may have been rewritten since: what is cached of it is dropped,
//! its generations are listed, and the highest is tried before anything is called damage. Only where that one is gone too,
//! or its key is, they are listed again.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use reseal_format::FormatError;
use reseal_format::ids::{BlobId, PackId};
use reseal_format::index::BlobRef;
use reseal_format::keys::Kind;
use reseal_format::layout;
use reseal_format::names::TenantName;
use reseal_format::pack::{BlobLengths, PackOpener, TRAILER, Trailer};
use reseal_store::{Entry, Store, StoreError};

use crate::cache::{Cache, Weigh};
use crate::refresh::ROUNDS;
use crate::{Tenant, VaultError};

/// How much of a pack's tail is read at first: the trailer, and the table of lengths of up to 8,000 blobs.
const TAIL: usize = 32 * 1024;
/// So many bytes of a pack, or more, mostly have one length in its table.
const BYTES_A_LENGTH: u64 = 256;

/// Whether a read may wait for the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// It may.
    May,
    /// It gives [`VaultError::WouldBlock`] instead.
    MustNot,
}

/// A pack whose key is derived and whose table of lengths is open.
pub struct PackHandle {
    key: String,
    opener: PackOpener,
    lengths: BlobLengths,
}

impl Weigh for PackHandle {
    fn weight(&self) -> usize {
        // The expanded AES key and the table are what counts.
        self.lengths.memory() + 1024
    }
}

/// A stretch of a pack that begins and ends with a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// The blobs in it, emptied ones too.
    pub ordinals: Range<u32>,
    pub offset: u64,
    /// Bytes; 0 if all its blobs were emptied.
    pub length: usize,
    /// Whether these blobs were asked for.
    pub is_wanted: bool,
}

impl PackHandle {
    /// Key of the object in the store.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Its trailer.
    pub fn trailer(&self) -> &Trailer {
        self.opener.trailer()
    }

    /// Where its blobs are.
    pub fn lengths(&self) -> &BlobLengths {
        &self.lengths
    }

    /// All its blobs, in stretches of about so many bytes, each of such that are wanted, or of such that are not.
    pub fn windows(&self, bytes: usize, wanted: impl Fn(u32) -> bool) -> impl Iterator<Item = Window> {
        let count = self.lengths.count();
        let mut next = 0;
        std::iter::from_fn(move || {
            let is_wanted = next < count && wanted(next);
            let mut window = Window { ordinals: next..next, offset: 0, length: 0, is_wanted };
            while next < count && window.length < bytes && wanted(next) == is_wanted {
                if let Some((offset, length)) = self.lengths.place(next) {
                    window.offset = if window.length == 0 { offset } else { window.offset };
                    window.length += length;
                }
                next += 1;
            }
            window.ordinals.end = next;
            (!window.ordinals.is_empty()).then_some(window)
        })
    }

    /// Opens a sealed blob in place.
    pub fn open<'a>(&self, ordinal: u32, sealed: &'a mut [u8]) -> Result<&'a mut [u8], VaultError> {
        self.opener.open_blob(ordinal, sealed).map_err(VaultError::damaged(format!("{} blob {ordinal}", self.key)))
    }
}

struct IdTable {
    generation: u32,
    ids: Vec<BlobId>,
}

impl Weigh for IdTable {
    fn weight(&self) -> usize {
        self.ids.len() * BlobId::LENGTH
    }
}

/// A pack in a listing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PackFile {
    pub id: PackId,
    pub generation: u32,
    pub length: u64,
}

impl PackFile {
    /// The trailer at the end of the object of that key and length, which must name this generation of this pack. No key is needed, and
    /// nothing of it is authenticated.
    pub fn trailer(self, key: &str, tail: &[u8], length: u64) -> Result<Trailer, VaultError> {
        let cut = FormatError::Malformed("shorter than a trailer; it is cut off");
        let trailer = tail.last_chunk::<TRAILER>().ok_or(cut).and_then(|bytes| Trailer::decode(bytes, length));
        let trailer = trailer.map_err(VaultError::damaged(key))?;
        match (trailer.id, trailer.generation) == (self.id, self.generation) {
            true => Ok(trailer),
            false => Err(VaultError::damaged(key)(FormatError::Mismatch("its trailer names another pack"))),
        }
    }
}

/// All packs that a tenant has, of every generation, from a listing.
pub fn list_packs(store: &dyn Store, tenant: &TenantName) -> Result<Vec<PackFile>, VaultError> {
    let folder = layout::packs(tenant);
    let mut found = Vec::new();
    let is_shelf = |name: &str| name.len() == 2 && name.bytes().all(|b| b.is_ascii_hexdigit());
    let shelves = store.list(&folder)?;
    for shelf in shelves.iter().filter(|entry| entry.is_folder && is_shelf(&entry.name)) {
        for entry in store.list(&format!("{folder}{}/", shelf.name))? {
            let Some((id, generation)) = layout::parse_pack_file(&entry.name) else { continue };
            found.push(PackFile { id, generation, length: entry.length });
        }
    }
    Ok(found)
}

/// The packs of a tenant.
pub struct Packs {
    tenant: Arc<Tenant>,
    handles: Cache<PackId, Arc<PackHandle>>,
    ids: Cache<PackId, Arc<IdTable>>,
}

impl Packs {
    /// A reader that keeps at most about so many bytes of tables.
    pub fn new(tenant: Arc<Tenant>, cache_bytes: usize) -> Packs {
        Packs { tenant, handles: Cache::new(cache_bytes / 2), ids: Cache::new(cache_bytes / 2) }
    }

    /// Keeps at most about so many bytes of tables from now on.
    pub fn resize_cache(&self, bytes: usize) {
        self.handles.resize(bytes / 2);
        self.ids.resize(bytes / 2);
    }

    /// Bytes of tables that it keeps now.
    pub(crate) fn cached_bytes(&self) -> usize {
        self.handles.bytes() + self.ids.bytes()
    }

    /// Forgets what is kept of any other generation than these.
    pub fn retain(&self, present: &BTreeSet<(PackId, u32)>) {
        self.handles.retain(|id, handle| present.contains(&(*id, handle.trailer().generation)));
        self.ids.retain(|id, table| present.contains(&(*id, table.generation)));
    }

    /// The tenant.
    pub fn tenant(&self) -> &Arc<Tenant> {
        &self.tenant
    }

    /// All packs there are, of every generation, from a listing.
    pub fn list(&self) -> Result<Vec<PackFile>, VaultError> {
        list_packs(&*self.tenant.store, &self.tenant.name)
    }

    /// Makes durable that these packs are in the vault: they were found by a listing, and their writers may have died
    /// before they had.
    pub fn settle(&self, found: &[PackFile]) -> Result<(), VaultError> {
        let shelves: BTreeSet<_> = found.iter().map(|pack| layout::pack_shelf(&self.tenant.name, pack.id)).collect();
        Ok(shelves.iter().try_for_each(|shelf| self.tenant.store.settle(shelf))?)
    }

    /// The generations of a pack that the store has. A listing that is made while one takes the place of another may show
    /// neither, so one that shows none is made again.
    pub fn generations(&self, id: PackId) -> Result<Vec<PackFile>, VaultError> {
        let shelf = layout::pack_shelf(&self.tenant.name, id);
        let list = || -> Result<Vec<PackFile>, VaultError> {
            let entries = self.tenant.store.list(&shelf)?;
            let of_pack = |entry: &Entry| match layout::parse_pack_file(&entry.name) {
                Some((other, generation)) if other == id => Some(PackFile { id, generation, length: entry.length }),
                _ => None,
            };
            Ok(entries.iter().filter_map(of_pack).collect())
        };
        let found = list()?;
        if found.is_empty() { list() } else { Ok(found) }
    }

    /// The highest generation of a pack that the store has.
    pub fn newest(&self, id: PackId) -> Result<Option<PackFile>, VaultError> {
        Ok(self.generations(id)?.into_iter().max())
    }

    /// What has taken the place of a generation that is gone; `None` where it is still there, or nothing has.
    pub fn successor(&self, of: PackFile) -> Result<Option<PackFile>, VaultError> {
        let found = self.generations(of.id)?;
        let is_there = found.iter().any(|file| file.generation == of.generation);
        Ok(found.into_iter().max().filter(|newest| !is_there && newest.generation > of.generation))
    }

    /// Reads the tail of one generation of a pack.
    pub fn open_generation(&self, id: PackId, generation: u32) -> Result<PackHandle, VaultError> {
        self.open_tail(id, generation, TAIL)
    }

    /// The same of one that was listed, and of its tail no more than such a pack mostly has: of many small ones that counts.
    pub fn open_listed(&self, file: PackFile) -> Result<PackHandle, VaultError> {
        let expected = TRAILER as u64 + file.length / BYTES_A_LENGTH;
        self.open_tail(file.id, file.generation, usize::try_from(expected).map_or(TAIL, |expected| expected.min(TAIL)))
    }

    fn open_tail(&self, id: PackId, generation: u32, at_first: usize) -> Result<PackHandle, VaultError> {
        let key = layout::pack(&self.tenant.name, id, generation);
        let store = &self.tenant.store;
        let (mut tail, length) = store.read_tail(&key, at_first)?;
        let damaged = |source| VaultError::Damaged { object: key.clone(), source };
        let trailer = PackFile { id, generation, length }.trailer(&key, &tail, length)?;
        let wanted = trailer.length_table_bytes() + TRAILER;
        if tail.len() < wanted {
            let mut more = vec![0; wanted - tail.len()];
            store.read_at(&key, length - wanted as u64, &mut more)?;
            more.append(&mut tail);
            tail = more;
        }
        tail.truncate(tail.len() - TRAILER);
        let table = tail.split_off(tail.len() - trailer.length_table_bytes());
        let opener = self.tenant.with_keys(&key, |keys| PackOpener::new(keys, trailer.clone()))?;
        let lengths = opener.open_lengths(table).map_err(damaged)?;
        Ok(PackHandle { key: key.clone(), opener, lengths })
    }

    /// The pack's handle, from the cache or of that generation.
    fn handle(&self, blob: BlobRef, wait: Wait) -> Result<Arc<PackHandle>, VaultError> {
        if let Some(handle) = self.handles.get(&blob.pack) {
            return Ok(handle);
        }
        if wait == Wait::MustNot {
            return Err(VaultError::WouldBlock);
        }
        self.open_and_keep(blob.pack, blob.generation)
    }

    fn open_and_keep(&self, id: PackId, generation: u32) -> Result<Arc<PackHandle>, VaultError> {
        let handle = Arc::new(self.open_generation(id, generation)?);
        self.handles.put(id, handle.clone());
        Ok(handle)
    }

    /// Has what is remembered of a blob's pack read again, in its newest generation. Who has the tables of an older one may still read in it what was
    /// made again since.
    pub(crate) fn renew(&self, blob: BlobRef) -> Result<(), VaultError> {
        self.forget(blob);
        if let Some(newest) = self.newest(blob.pack)? {
            self.open_and_keep(blob.pack, newest.generation)?;
        }
        Ok(())
    }

    /// Believes nothing any more that is remembered of a blob's pack.
    fn forget(&self, blob: BlobRef) {
        let generation = self.handles.get(&blob.pack).map_or(blob.generation, |handle| handle.trailer().generation);
        self.tenant.store.doubt(&layout::pack(&self.tenant.name, blob.pack, generation));
        self.handles.remove(&blob.pack);
        self.ids.remove(&blob.pack);
    }

    /// Runs `read` on the generation that is remembered; where that is gone or fails authentication, on the newest.
    fn with_fallback<T>(
        &self,
        blob: BlobRef,
        wait: Wait,
        mut read: impl FnMut(&Arc<PackHandle>) -> Result<T, VaultError>,
    ) -> Result<T, VaultError> {
        let first = self.handle(blob, wait).and_then(|handle| read(&handle));
        let Err(mut error) = first else { return first };
        if error.damaged_object().is_none() {
            return Err(error);
        }
        if wait == Wait::MustNot {
            return Err(VaultError::WouldBlock);
        }
        self.forget(blob);
        let (mut tried, mut doubted) = (None, None);
        for _ in 0..ROUNDS {
            let newest = self.newest(blob.pack)?.ok_or_else(|| VaultError::Missing {
                object: layout::pack(&self.tenant.name, blob.pack, blob.generation),
                why: "no generation of this pack is in the vault; restore it from a copy",
            })?;
            if tried == Some(newest.generation) {
                break;
            }
            tried = Some(newest.generation);
            // Not from the cache, where another thread may just have put the one that failed.
            match self.open_and_keep(blob.pack, newest.generation).and_then(|handle| read(&handle)) {
                Err(e) if may_be_replaced(&e) => error = e,
                // Of this one, too, something may be remembered that is not in the store.
                Err(e) if e.damaged_object().is_some() && doubted != tried && self.tenant.store.is_far() => {
                    self.tenant.store.doubt(&layout::pack(&self.tenant.name, blob.pack, newest.generation));
                    self.handles.remove(&blob.pack);
                    doubted = tried.take();
                    error = e;
                }
                other => return other,
            }
        }
        Err(error)
    }

    /// Has a pack's table of lengths at hand for who will read it soon. What can't be read now is told to him.
    pub(crate) fn open_ahead(&self, id: PackId, generation: u32) {
        let _ = self.handle(BlobRef { pack: id, generation, ordinal: 0 }, Wait::May);
    }

    /// Which object a blob is in, and at which offset, as far as is known: the pack may have been rewritten since.
    pub fn place(&self, blob: BlobRef, wait: Wait) -> Result<Option<(Arc<PackHandle>, u64)>, VaultError> {
        self.with_fallback(blob, wait, |handle| {
            Ok(handle.lengths.place(blob.ordinal).map(|(offset, _)| (handle.clone(), offset)))
        })
    }

    /// Reads a blob of a pack of that kind and opens it: its content replaces what is in `buf`.
    pub fn read_blob(&self, kind: Kind, blob: BlobRef, wait: Wait, buf: &mut Vec<u8>) -> Result<(), VaultError> {
        self.with_fallback(blob, wait, |handle| {
            let object = || format!("{} blob {}", handle.key, blob.ordinal);
            let malformed = |what| VaultError::Damaged { object: object(), source: what };
            if handle.trailer().kind != kind {
                return Err(malformed(FormatError::Mismatch("it is in a pack of another kind")));
            }
            let place = handle.lengths.place(blob.ordinal);
            let (offset, length) = place.ok_or_else(|| VaultError::Missing {
                object: object(),
                why: "the pack has no such blob, or it was emptied",
            })?;
            buf.resize(length, 0);
            match wait {
                Wait::May => self.tenant.store.read_at(&handle.key, offset, buf)?,
                Wait::MustNot => {
                    if !self.tenant.store.try_read_at(&handle.key, offset, buf)? {
                        return Err(VaultError::WouldBlock);
                    }
                }
            }
            let plain = handle.open(blob.ordinal, buf)?.len();
            buf.truncate(plain);
            Ok(())
        })
    }

    /// The id of a blob, from its pack's table of ids.
    pub fn blob_id(&self, blob: BlobRef) -> Result<Option<BlobId>, VaultError> {
        if let Some(table) = self.ids.get(&blob.pack) {
            return Ok(table.ids.get(blob.ordinal as usize).copied());
        }
        let table = self.with_fallback(blob, Wait::May, |handle| {
            Ok(IdTable { generation: handle.trailer().generation, ids: self.read_ids(handle)? })
        })?;
        let id = table.ids.get(blob.ordinal as usize).copied();
        self.ids.put(blob.pack, Arc::new(table));
        Ok(id)
    }

    /// Reads and opens a pack's table of ids.
    pub fn read_ids(&self, handle: &PackHandle) -> Result<Vec<BlobId>, VaultError> {
        let trailer = handle.trailer();
        let mut table = vec![0; trailer.id_table_bytes()];
        self.tenant.store.read_at(&handle.key, trailer.blob_bytes, &mut table)?;
        handle.opener.open_ids(table).map_err(VaultError::damaged(format!("{} id table", handle.key)))
    }
}

/// Whether this may be because a generation that was listed a moment ago was replaced since: it is gone, or so is the key
/// that it was sealed under.
fn may_be_replaced(error: &VaultError) -> bool {
    matches!(
        error,
        VaultError::Store(StoreError::NotFound(_)) | VaultError::Damaged { source: FormatError::UnknownEpoch(_), .. }
    )
}
