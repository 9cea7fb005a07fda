//! The secret of an encrypted image: from the first line of a file to QEMU's programs, through a pipe.

use std::fs::File;
use std::io::{self, PipeReader, Read, Write, pipe};
use std::path::Path;

use zeroize::Zeroizing;

use super::ImageError;

/// Longest secret. A pipe takes so much without a reader, so that writing it never waits.
const MAX: usize = 4096;

/// A secret that opens an image.
pub(super) struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// Reads the first line of a file, without its end.
    pub(super) fn read(path: &Path) -> Result<Secret, ImageError> {
        let refused = |reason: &str| ImageError::SecretFile { path: path.display().to_string(), reason: reason.into() };
        let file = File::open(path).map_err(|e| refused(&e.to_string()))?;
        // The room is taken at once, so that no part of the secret is moved and left behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(MAX + 64));
        file.take(MAX as u64 + 2).read_to_end(&mut bytes).map_err(|e| refused(&e.to_string()))?;
        if let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            bytes.truncate(end);
        }
        if bytes.last() == Some(&b'\r') {
            bytes.pop();
        }
        match bytes.len() {
            0 => Err(refused("its first line is empty")),
            length if length > MAX => Err(refused("its first line is longer than 4096 bytes")),
            // QEMU looks a passphrase up as text.
            _ if str::from_utf8(&bytes).is_err() => Err(refused("its first line is not UTF-8, as QEMU demands")),
            _ => Ok(Secret(bytes)),
        }
    }

    /// A pipe that holds it, for one reader.
    pub(super) fn pipe(&self) -> io::Result<PipeReader> {
        let (reader, mut writer) = pipe()?;
        writer.write_all(&self.0)?;
        Ok(reader)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn the_first_line_counts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        for (content, wanted) in [(&b"one\ntwo"[..], &b"one"[..]), (b"one", b"one"), (b"a b \r\nx", b"a b ")] {
            fs::write(&path, content).unwrap();
            let mut read = Vec::new();
            Secret::read(&path).unwrap().pipe().unwrap().read_to_end(&mut read).unwrap();
            assert_eq!(read, wanted);
        }
        for wrong in [&b""[..], b"\nsecond", b"\xff\xfe", &[b'x'; MAX + 1]] {
            fs::write(&path, wrong).unwrap();
            assert!(matches!(Secret::read(&path), Err(ImageError::SecretFile { .. })));
        }
        fs::write(&path, [b'x'; MAX]).unwrap();
        Secret::read(&path).unwrap().pipe().unwrap();
        assert!(Secret::read(&folder.path().join("none")).is_err());
    }
}
