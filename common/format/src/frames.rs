//! A cluster as frames: parts of equal size, each one zstd frame by itself, so that a small read decompresses little.
//!
//! ```text
//! shift u8 ‖ length u16 × (65536 >> shift) ‖ frames
//! ```
//!
//! A length of 0 is a frame of zeros, `RAW` one that is stored as it is.

use std::ops::Range;

use zstd::zstd_safe::CParameter;

use crate::FormatError;
use crate::geometry::{CLUSTER, is_zero};

/// Length that stands for a frame stored as it is, which a 16-bit number can't always hold.
const RAW: u16 = 0xFFFF;

/// How large a frame is: 2^shift bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameShift(u8);

impl FrameShift {
    /// 16 KiB.
    pub const K16: FrameShift = FrameShift(14);
    /// 32 KiB.
    pub const K32: FrameShift = FrameShift(15);
    /// 64 KiB: one frame a cluster.
    pub const K64: FrameShift = FrameShift(16);
    /// What reseal writes. Readers take any of the three.
    pub const DEFAULT: FrameShift = FrameShift::K32;

    fn from_byte(byte: u8) -> Option<FrameShift> {
        [FrameShift::K16, FrameShift::K32, FrameShift::K64].into_iter().find(|shift| shift.0 == byte)
    }

    /// Bytes of a frame.
    pub fn bytes(self) -> usize {
        1 << self.0
    }

    /// Frames of a cluster.
    pub fn count(self) -> usize {
        CLUSTER >> self.0
    }

    fn table(self) -> usize {
        1 + 2 * self.count()
    }
}

/// Most bytes of an encoded cluster: the table, and every frame stored as it is.
pub const MAX_ENCODED: usize = 1 + 2 * 4 + CLUSTER;

/// zstd level that reseal writes. `docs/FORMAT.md` has the measurement behind both defaults.
pub const DEFAULT_LEVEL: i32 = 1;

/// Turns clusters into frames; holds the compressor's working memory, so one a thread.
pub struct FrameEncoder {
    shift: FrameShift,
    zstd: zstd::bulk::Compressor<'static>,
    scratch: Vec<u8>,
}

impl FrameEncoder {
    /// An encoder for frames of that size at that zstd level.
    pub fn new(shift: FrameShift, level: i32) -> std::io::Result<FrameEncoder> {
        let mut zstd = zstd::bulk::Compressor::new(level)?;
        // The length is known from the geometry and the tag authenticates: neither needs bytes in each frame.
        zstd.set_parameter(CParameter::ContentSizeFlag(false))?;
        zstd.set_parameter(CParameter::ChecksumFlag(false))?;
        if level == DEFAULT_LEVEL {
            // For inputs of this size level 1 would take a table of 2^13: this one costs no time and saves 0.2 % on a
            // Debian disk. Matches from 5 bytes on would save 1.3 % more and take 6 % more time.
            zstd.set_parameter(CParameter::HashLog(14))?;
        }
        Ok(FrameEncoder { shift, zstd, scratch: Vec::with_capacity(CLUSTER) })
    }

    /// Appends the frames of one whole cluster to `out`.
    ///
    /// # Panics
    /// If `cluster` is not exactly one cluster long.
    pub fn encode(&mut self, cluster: &[u8], out: &mut Vec<u8>) {
        assert_eq!(cluster.len(), CLUSTER, "a cluster has one length");
        let table = out.len();
        out.push(self.shift.0);
        out.resize(table + self.shift.table(), 0);
        for (nth, frame) in cluster.chunks_exact(self.shift.bytes()).enumerate() {
            let length = self.encode_frame(frame, out);
            let at = table + 1 + 2 * nth;
            out[at..at + 2].copy_from_slice(&length.to_le_bytes());
        }
    }

    fn encode_frame(&mut self, frame: &[u8], out: &mut Vec<u8>) -> u16 {
        if is_zero(frame) {
            return 0;
        }
        self.scratch.clear();
        // A buffer of the frame's own length: what does not fit did not shrink, and is stored as it is.
        self.scratch.reserve(frame.len());
        let fits = self.zstd.compress_to_buffer(frame, &mut self.scratch).is_ok() && self.scratch.len() < frame.len();
        match u16::try_from(self.scratch.len()) {
            Ok(length) if fits && length != RAW => {
                out.extend_from_slice(&self.scratch);
                length
            }
            _ => {
                out.extend_from_slice(frame);
                RAW
            }
        }
    }
}

/// An encoded cluster, parsed: where each of its frames stands.
pub struct Frames<'a> {
    bytes: &'a [u8],
    shift: FrameShift,
}

impl<'a> Frames<'a> {
    /// Checks the table against the length of the whole.
    pub fn parse(bytes: &'a [u8]) -> Result<Frames<'a>, FormatError> {
        let shift = bytes.first().copied().and_then(FrameShift::from_byte);
        let shift = shift.ok_or(FormatError::Malformed("unknown frame size"))?;
        if bytes.len() < shift.table() {
            return Err(FormatError::Malformed("frame table is cut off"));
        }
        let frames = Frames { bytes, shift };
        let end = frames.range(shift.count() - 1).end;
        if end != bytes.len() {
            return Err(FormatError::Malformed("frames do not fill the blob"));
        }
        Ok(frames)
    }

    /// How large its frames are.
    pub fn shift(&self) -> FrameShift {
        self.shift
    }

    fn length(&self, nth: usize) -> u16 {
        u16::from_le_bytes([self.bytes[1 + 2 * nth], self.bytes[2 + 2 * nth]])
    }

    fn stored(&self, nth: usize) -> usize {
        match self.length(nth) {
            RAW => self.shift.bytes(),
            length => usize::from(length),
        }
    }

    fn range(&self, nth: usize) -> Range<usize> {
        let start = self.shift.table() + (0..nth).map(|before| self.stored(before)).sum::<usize>();
        start..start + self.stored(nth)
    }
}

/// Turns frames back into bytes; one a thread.
pub struct FrameDecoder(zstd::bulk::Decompressor<'static>);

impl FrameDecoder {
    /// A decoder.
    pub fn new() -> std::io::Result<FrameDecoder> {
        Ok(FrameDecoder(zstd::bulk::Decompressor::new()?))
    }

    /// Writes frame `nth` to `out`, which must be exactly as long as a frame.
    pub fn decode_frame(&mut self, frames: &Frames<'_>, nth: usize, out: &mut [u8]) -> Result<(), FormatError> {
        assert_eq!(out.len(), frames.shift.bytes(), "a frame has one length");
        let stored = &frames.bytes[frames.range(nth)];
        match frames.length(nth) {
            0 => out.fill(0),
            RAW => out.copy_from_slice(stored),
            _ => match self.0.decompress_to_buffer(stored, out) {
                Ok(length) if length == out.len() => {}
                _ => return Err(FormatError::Malformed("a frame does not decompress to its length")),
            },
        }
        Ok(())
    }

    /// Writes the whole cluster to `out`.
    pub fn decode(&mut self, encoded: &[u8], out: &mut [u8]) -> Result<(), FormatError> {
        assert_eq!(out.len(), CLUSTER, "a cluster has one length");
        let frames = Frames::parse(encoded)?;
        for (nth, part) in out.chunks_exact_mut(frames.shift.bytes()).enumerate() {
            self.decode_frame(&frames, nth, part)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cluster(pattern: u8) -> Vec<u8> {
        let noise = |i: usize| blake3::hash(&i.to_le_bytes()).as_bytes()[0];
        (0..CLUSTER)
            .map(|i| match pattern {
                0 => 0,
                1 => u8::try_from(i / 700 % 251).unwrap(),
                2 => noise(i),
                _ if i < CLUSTER / 2 => 0,
                _ => noise(i / 9),
            })
            .collect()
    }

    #[test]
    fn what_was_encoded_decodes_at_every_frame_size() {
        for shift in [FrameShift::K16, FrameShift::K32, FrameShift::K64] {
            let mut encoder = FrameEncoder::new(shift, DEFAULT_LEVEL).unwrap();
            for pattern in 0..4 {
                let plain = cluster(pattern);
                let mut encoded = Vec::new();
                encoder.encode(&plain, &mut encoded);
                assert!(encoded.len() <= MAX_ENCODED);
                let mut back = vec![1; CLUSTER];
                FrameDecoder::new().unwrap().decode(&encoded, &mut back).unwrap();
                assert!(back == plain, "{shift:?} pattern {pattern}");
            }
        }
    }

    #[test]
    fn zero_frames_take_no_bytes() {
        let mut encoded = Vec::new();
        FrameEncoder::new(FrameShift::K16, 1).unwrap().encode(&cluster(0), &mut encoded);
        assert_eq!(encoded.len(), 9);
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), shift in 13u8..18) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() { *first = shift; }
            let _ = FrameDecoder::new().unwrap().decode(&bytes, &mut vec![0; CLUSTER]);
        }

        #[test]
        fn a_flipped_byte_never_panics(at in 0usize..20_000, with in 1u8..) {
            let mut encoded = Vec::new();
            FrameEncoder::new(FrameShift::K16, 1).unwrap().encode(&cluster(1), &mut encoded);
            let at = at % encoded.len();
            encoded[at] ^= with;
            let _ = FrameDecoder::new().unwrap().decode(&encoded, &mut vec![0; CLUSTER]);
        }
    }
}
