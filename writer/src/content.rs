//! What an opened blob holds, and which id that has.

use reseal_format::FormatError;
use reseal_format::frames::FrameDecoder;
use reseal_format::geometry::{CLUSTER, MAX_LEVEL};
use reseal_format::ids::BlobId;
use reseal_format::index::IndexNode;
use reseal_format::keys::{DedupSecret, Kind};
use zeroize::Zeroizing;

/// Decodes what blobs hold; one a thread.
pub(crate) struct Content {
    decoder: FrameDecoder,
    cluster: Zeroizing<Vec<u8>>,
}

impl Content {
    pub(crate) fn new() -> std::io::Result<Content> {
        Ok(Content { decoder: FrameDecoder::new()?, cluster: Zeroizing::new(vec![0; CLUSTER]) })
    }

    /// Decodes what a blob of a pack of that kind holds; the id of its plaintext.
    pub(crate) fn id(&mut self, dedup: &DedupSecret, kind: Kind, content: &[u8]) -> Result<BlobId, FormatError> {
        if kind == Kind::DataPack {
            self.decoder.decode(content, &mut self.cluster)?;
            return Ok(dedup.id_of(&self.cluster));
        }
        let plain = IndexNode::decompress(content)?;
        let level = plain.first().copied().filter(|level| *level <= MAX_LEVEL);
        IndexNode::decode(&plain, level.ok_or(FormatError::Malformed("an index node of an impossible level"))?)?;
        Ok(dedup.id_of(&plain))
    }
}
