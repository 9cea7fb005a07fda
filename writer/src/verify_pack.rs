//! Reads one pack back and authenticates it: digest, tables, and every blob down to its id.

use std::sync::atomic::AtomicBool;

use reseal_format::FormatError;
use reseal_format::ids::{BlobId, Digest};
use reseal_format::keys::Kind;
use reseal_store::StoreError;
use reseal_vault::{PackFile, PackHandle, Packs, VaultError};

use crate::content::Content;
use crate::throttle::Throttle;
use crate::walk::Need;

/// The error number of a medium that can't be read.
const EIO: i32 = libc::EIO;
/// What is said of a pack whose clear digest is not that of its bytes.
pub(crate) const DIGEST: &str = "its digest does not match its bytes";
/// Bytes that are read at once.
const WINDOW: usize = 4 << 20;
/// How often a pack may be rewritten while it is verified.
const MAX_REWRITTEN: u32 = 4;

/// What is wrong with a pack.
#[derive(Default)]
pub(crate) struct Findings {
    /// Which generation they are about.
    pub generation: u32,
    /// What is wrong with the pack as a whole.
    pub whole: Option<String>,
    /// Whether no blob of it can be read because of that.
    pub unreadable: bool,
    /// Damaged blobs, with what is wrong.
    pub blobs: Vec<(u32, String)>,
    /// Blobs that are right.
    pub good: u64,
    /// Bytes read.
    pub bytes: u64,
}

impl Findings {
    pub(crate) fn is_bad(&self) -> bool {
        self.whole.is_some() || !self.blobs.is_empty()
    }
}

/// Verifies packs one after the other; one a thread.
pub(crate) struct PackVerifier<'a> {
    packs: &'a Packs,
    throttle: Option<&'a Throttle>,
    content: Content,
}

impl<'a> PackVerifier<'a> {
    pub(crate) fn new(packs: &'a Packs, throttle: Option<&'a Throttle>) -> std::io::Result<PackVerifier<'a>> {
        Ok(PackVerifier { packs, throttle, content: Content::new()? })
    }

    /// Verifies a pack: everything in it, or only what is needed. What is needed must also be there. Where it was rewritten
    /// since it was listed, the generation that took its place is what counts.
    pub(crate) fn verify(
        &mut self,
        mut file: PackFile,
        need: Option<&Need>,
        everything: bool,
    ) -> Result<Findings, VaultError> {
        let mut rewritten = 0;
        loop {
            let findings = self.generation(file, need, everything)?;
            if !findings.is_bad() || rewritten == MAX_REWRITTEN {
                return Ok(findings);
            }
            match self.packs.successor(file)? {
                Some(successor) => file = successor,
                // Whoever can't read it there goes on to the generation that has taken its place.
                None if self.is_superseded(file)? => {
                    let Findings { generation, good, bytes, .. } = findings;
                    return Ok(Findings { generation, good, bytes, ..Findings::default() });
                }
                None => return Ok(findings),
            }
            rewritten += 1;
        }
    }

    fn is_superseded(&self, file: PackFile) -> Result<bool, VaultError> {
        Ok(self.packs.newest(file.id)?.is_some_and(|newest| newest.generation > file.generation))
    }

    fn generation(&mut self, file: PackFile, need: Option<&Need>, everything: bool) -> Result<Findings, VaultError> {
        let mut findings = Findings { generation: file.generation, ..Findings::default() };
        let handle = match self.packs.open_generation(file.id, file.generation) {
            Ok(handle) => handle,
            // The storage did not let go of it when another generation took its place, and its key may be destroyed. Nobody
            // reads it any more.
            Err(e) if e.damaged_object().is_some() && self.is_superseded(file)? => return Ok(findings),
            // Nothing needs it: it was pruned since it was listed.
            Err(VaultError::Store(StoreError::NotFound(_))) if need.is_none() => return Ok(findings),
            Err(e) => {
                (findings.whole, findings.unreadable) = (Some(reason(damage(e)?)), true);
                return Ok(findings);
            }
        };
        let ids = match self.packs.read_ids(&handle) {
            Ok(ids) => Some(ids),
            Err(e) => {
                // No reader of disks needs it, but the next backups can't be deduplicated against this pack.
                findings.whole = Some(format!("its id table {}", reason(damage(e)?)));
                None
            }
        };
        if let Some(need) = need.filter(|need| need.kind != handle.trailer().kind) {
            (findings.whole, findings.unreadable) = (Some(format!("it is needed as a {}", name(need.kind))), true);
            return Ok(findings);
        }
        let missing = |ordinal: &u32| handle.lengths().place(*ordinal).is_none();
        for ordinal in need.into_iter().flat_map(|need| need.ordinals.iter()).filter(missing) {
            findings.blobs.push((ordinal, "the pack has no such blob, or it was emptied".into()));
        }
        if everything {
            self.everything(&handle, ids.as_deref(), &mut findings)?;
        } else if let Some(need) = need {
            for ordinal in need.ordinals.iter() {
                self.one(&handle, ids.as_deref(), ordinal, &mut findings)?;
            }
        }
        Ok(findings)
    }

    /// Reads the object from its start to its end, in windows that begin and end with a blob.
    fn everything(
        &mut self,
        handle: &PackHandle,
        ids: Option<&[BlobId]>,
        findings: &mut Findings,
    ) -> Result<(), VaultError> {
        let mut hasher = blake3::Hasher::new();
        let mut window = Vec::new();
        let mut whole = true;
        for part in handle.windows(WINDOW, |_| true) {
            window.resize(part.length, 0);
            self.take(part.length);
            if let Err(e) = self.packs.tenant().store().read_at(handle.key(), part.offset, &mut window) {
                // Some of it may be readable: each blob by itself.
                damage(e.into())?;
                whole = false;
                for ordinal in part.ordinals {
                    self.one(handle, ids, ordinal, findings)?;
                }
                continue;
            }
            hasher.update(&window);
            findings.bytes += part.length as u64;
            for ordinal in part.ordinals {
                let Some((offset, length)) = handle.lengths().place(ordinal) else { continue };
                let at = usize::try_from(offset - part.offset).unwrap_or(usize::MAX);
                self.blob(handle, ids, ordinal, &mut window[at..at + length], findings);
            }
        }
        let trailer = handle.trailer();
        window.resize(trailer.tail_bytes(), 0);
        if let Err(e) = self.packs.tenant().store().read_at(handle.key(), trailer.blob_bytes, &mut window) {
            findings.whole.get_or_insert(reason(damage(e.into())?));
            return Ok(());
        }
        findings.bytes += window.len() as u64;
        // The digest covers all before it: it stands 40 bytes before the end.
        hasher.update(&window[..trailer.tail_bytes() - 40]);
        if whole && Digest::from_bytes(*hasher.finalize().as_bytes()) != trailer.digest {
            findings.whole.get_or_insert(DIGEST.into());
        }
        Ok(())
    }

    /// Reads one blob by itself; one that is not there is not this function's to report.
    fn one(
        &mut self,
        handle: &PackHandle,
        ids: Option<&[BlobId]>,
        ordinal: u32,
        findings: &mut Findings,
    ) -> Result<(), VaultError> {
        let Some((offset, length)) = handle.lengths().place(ordinal) else { return Ok(()) };
        let mut sealed = vec![0; length];
        self.take(length);
        match self.packs.tenant().store().read_at(handle.key(), offset, &mut sealed) {
            Ok(()) => self.blob(handle, ids, ordinal, &mut sealed, findings),
            Err(e) => findings.blobs.push((ordinal, reason(damage(e.into())?))),
        }
        findings.bytes += length as u64;
        Ok(())
    }

    fn take(&self, bytes: usize) {
        if let Some(throttle) = self.throttle {
            throttle.take(bytes as u64, &AtomicBool::new(false));
        }
    }

    fn blob(
        &mut self,
        handle: &PackHandle,
        ids: Option<&[BlobId]>,
        ordinal: u32,
        sealed: &mut [u8],
        findings: &mut Findings,
    ) {
        let id = ids.and_then(|ids| ids.get(ordinal as usize)).copied();
        let checked = match handle.open(ordinal, sealed) {
            Err(e) => Err(reason(e)),
            Ok(content) => self.content(handle.trailer().kind, content, id).map_err(|e| e.to_string()),
        };
        match checked {
            Ok(()) => findings.good += 1,
            Err(what) => findings.blobs.push((ordinal, what)),
        }
    }

    /// Opened bytes are what was sealed; that they also decode, and to the plaintext of their id, shows that what was
    /// sealed was right.
    fn content(&mut self, kind: Kind, content: &[u8], id: Option<BlobId>) -> Result<(), FormatError> {
        let found = self.content.id(self.packs.tenant().keys().dedup(), kind, content)?;
        match id.is_none_or(|id| id == found) {
            true => Ok(()),
            false => Err(FormatError::Mismatch("its content is not that of its id")),
        }
    }
}

/// Passes on errors that say nothing about the object: those of a store that can't be reached. One that can't read a
/// stretch of a medium (EIO) says that this is lost.
pub(crate) fn damage(error: VaultError) -> Result<VaultError, VaultError> {
    match &error {
        VaultError::Store(StoreError::Io { source, .. }) if source.raw_os_error() == Some(EIO) => Ok(error),
        _ if error.damaged_object().is_some() => Ok(error),
        _ => Err(error),
    }
}

/// What is wrong, without the object's name, which stands before it.
pub(crate) fn reason(error: VaultError) -> String {
    match error {
        VaultError::Damaged { source, .. } => source.to_string(),
        VaultError::Store(StoreError::Io { source, .. }) => format!("can't be read: {source}"),
        other => other.to_string(),
    }
}

fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::IndexPack => "pack of index nodes",
        _ => "pack of clusters",
    }
}
