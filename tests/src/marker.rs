//! Text that is put on a disk, and looked for where nothing of a disk may be.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use crate::random::Random;
use crate::site::files_below;

/// Bytes of a marker. Found text needs far fewer: a [`PIECE`].
pub const MARKER: usize = 64;
/// A piece of the marker that would be found: shorter than any encoding unit that could split it.
const PIECE: usize = 16;

/// One of its own for each seed.
pub struct Marker(Vec<u8>);

impl Marker {
    /// Printable, so that it can stand in a definition too.
    pub fn new(seed: u64) -> Marker {
        let mut random = Random::new(seed);
        Marker((0..MARKER).map(|_| b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"[random.index(32)]).collect())
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.0).unwrap()
    }

    /// As much of it as is looked for.
    pub fn piece(&self) -> &str {
        &self.text()[..PIECE]
    }

    /// Whether any piece of it is there.
    pub fn is_in(&self, bytes: &[u8]) -> bool {
        let pieces: HashSet<&[u8]> = self.0.windows(PIECE).collect();
        bytes.windows(PIECE).any(|window| pieces.contains(window))
    }

    /// Files below a folder that hold any piece of it.
    pub fn found_below(&self, folder: &Path) -> Vec<String> {
        let is_found = |path: &std::path::PathBuf| {
            self.is_in(&fs::read(path).unwrap()) || self.is_in(path.as_os_str().as_encoded_bytes())
        };
        files_below(folder).into_iter().filter(is_found).map(|path| path.display().to_string()).collect()
    }
}
