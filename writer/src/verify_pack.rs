//! Reads one pack back and authenticates it: digest, tables, and every blob down to its id.

use reseal_format::FormatError;
use reseal_format::frames::FrameDecoder;
use reseal_format::geometry::{CLUSTER, MAX_LEVEL};
use reseal_format::ids::{BlobId, Digest};
use reseal_format::index::IndexNode;
use reseal_format::keys::Kind;
use reseal_format::pack::TRAILER;
use reseal_vault::{PackFile, PackHandle, Packs, VaultError};
use zeroize::Zeroizing;

use crate::walk::Ordinals;

/// Bytes that are read at once.
const WINDOW: usize = 4 << 20;

/// What is wrong with a pack.
#[derive(Default)]
pub(crate) struct Findings {
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

/// Verifies packs one after the other; one a thread.
pub(crate) struct PackVerifier<'a> {
    packs: &'a Packs,
    decoder: FrameDecoder,
    cluster: Zeroizing<Vec<u8>>,
}

impl<'a> PackVerifier<'a> {
    pub(crate) fn new(packs: &'a Packs) -> std::io::Result<PackVerifier<'a>> {
        Ok(PackVerifier { packs, decoder: FrameDecoder::new()?, cluster: Zeroizing::new(vec![0; CLUSTER]) })
    }

    /// Verifies a pack: everything in it, or only these blobs.
    pub(crate) fn verify(&mut self, file: PackFile, only: Option<&Ordinals>) -> Findings {
        let mut findings = Findings::default();
        let opened = self.packs.open_generation(file.id, file.generation);
        let opened = opened.and_then(|handle| Ok((self.packs.read_ids(&handle)?, handle)));
        match opened {
            Err(e) => (findings.whole, findings.unreadable) = (Some(reason(&e)), true),
            Ok((ids, handle)) => {
                let read = match only {
                    None => self.everything(&handle, &ids, &mut findings),
                    Some(only) => self.some(&handle, &ids, only, &mut findings),
                };
                if let Err(e) = read {
                    (findings.whole, findings.unreadable) = (Some(reason(&e)), true);
                }
            }
        }
        findings
    }

    /// Reads the object from its start to its end, in windows that begin and end with a blob.
    fn everything(&mut self, handle: &PackHandle, ids: &[BlobId], findings: &mut Findings) -> Result<(), VaultError> {
        let mut hasher = blake3::Hasher::new();
        let mut window = Vec::new();
        let mut ordinal = 0;
        while ordinal < handle.lengths().count() {
            let first = ordinal;
            let mut size = 0;
            let mut start = None;
            while ordinal < handle.lengths().count() && size < WINDOW {
                if let Some((offset, length)) = handle.lengths().place(ordinal) {
                    start.get_or_insert(offset);
                    size += length;
                }
                ordinal += 1;
            }
            window.resize(size, 0);
            let start = start.unwrap_or(0);
            self.packs.tenant().store().read_at(handle.key(), start, &mut window)?;
            hasher.update(&window);
            findings.bytes += size as u64;
            for nth in first..ordinal {
                let Some((offset, length)) = handle.lengths().place(nth) else { continue };
                let at = usize::try_from(offset - start).unwrap_or(usize::MAX);
                self.blob(handle, ids, nth, &mut window[at..at + length], findings);
            }
        }
        let trailer = handle.trailer();
        window.resize(trailer.tail_bytes(), 0);
        self.packs.tenant().store().read_at(handle.key(), trailer.blob_bytes, &mut window)?;
        findings.bytes += window.len() as u64;
        // The digest covers all before it: it stands 40 bytes before the end.
        hasher.update(&window[..trailer.tail_bytes() - 40]);
        if Digest::from_bytes(*hasher.finalize().as_bytes()) != trailer.digest
            || window[window.len() - TRAILER..][..8] != *b"RSLPACK1"
        {
            findings.whole = Some("its digest does not match its bytes".into());
        }
        Ok(())
    }

    fn some(
        &mut self,
        handle: &PackHandle,
        ids: &[BlobId],
        only: &Ordinals,
        findings: &mut Findings,
    ) -> Result<(), VaultError> {
        let mut sealed = Vec::new();
        for ordinal in (0..handle.lengths().count()).filter(|ordinal| only.contains(*ordinal)) {
            let Some((offset, length)) = handle.lengths().place(ordinal) else { continue };
            sealed.resize(length, 0);
            self.packs.tenant().store().read_at(handle.key(), offset, &mut sealed)?;
            findings.bytes += length as u64;
            self.blob(handle, ids, ordinal, &mut sealed, findings);
        }
        Ok(())
    }

    fn blob(&mut self, handle: &PackHandle, ids: &[BlobId], ordinal: u32, sealed: &mut [u8], findings: &mut Findings) {
        let checked = match handle.open(ordinal, sealed) {
            Err(e) => Err(reason(&e)),
            Ok(content) => {
                self.content(handle.trailer().kind, content, ids[ordinal as usize]).map_err(|e| e.to_string())
            }
        };
        match checked {
            Ok(()) => findings.good += 1,
            Err(what) => findings.blobs.push((ordinal, what)),
        }
    }

    /// Opened bytes are what was sealed; that they also decode, and to the plaintext of their id, shows that what was
    /// sealed was right.
    fn content(&mut self, kind: Kind, content: &[u8], id: BlobId) -> Result<(), FormatError> {
        let dedup = self.packs.tenant().keys().dedup();
        let found = if kind == Kind::DataPack {
            self.decoder.decode(content, &mut self.cluster)?;
            dedup.id_of(&self.cluster)
        } else {
            let plain = IndexNode::decompress(content)?;
            let level = plain.first().copied().filter(|level| *level <= MAX_LEVEL);
            IndexNode::decode(&plain, level.ok_or(FormatError::Malformed("an index node of an impossible level"))?)?;
            dedup.id_of(&plain)
        };
        match found == id {
            true => Ok(()),
            false => Err(FormatError::Mismatch("its content is not that of its id")),
        }
    }
}

/// What is wrong, without the object's name, which stands before it.
fn reason(error: &VaultError) -> String {
    match error {
        VaultError::Damaged { source, .. } => source.to_string(),
        other => other.to_string(),
    }
}
