//! The secret of an encrypted image: from the first line of a file to QEMU's programs, through a pipe.

use std::fs::File;
use std::io::{self, PipeReader, Read, Write, pipe};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

/// Longest secret. A pipe takes so much without a reader, so that writing it never waits.
const MAX: usize = 4096;
/// Any access of group or others.
const FOREIGN_BITS: u32 = 0o077;

/// A file that gives no secret.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", .path.display())]
pub struct SecretError {
    pub path: PathBuf,
    pub reason: String,
}

/// A secret that opens an image.
pub struct Secret(Zeroizing<String>);

impl Secret {
    /// Reads the first line of a file, without its end.
    pub fn read(path: &Path) -> Result<Secret, SecretError> {
        let file = File::open(path).map_err(|e| refused(path, e.to_string()))?;
        Secret::of(path, file)
    }

    /// The same for a secret that is to protect something new: refused unless the file belongs to this user and nobody else has
    /// any access. A pipe may be one, as of a shell's `<(…)`.
    pub fn read_private(path: &Path) -> Result<Secret, SecretError> {
        let mut options = File::options();
        let file = options.read(true).custom_flags(libc::O_NOCTTY).open(path);
        let file = file.map_err(|e| refused(path, e.to_string()))?;
        let data = file.metadata().map_err(|e| refused(path, e.to_string()))?;
        let user = rustix::process::geteuid().as_raw();
        if data.uid() != user {
            return Err(refused(path, format!("it belongs to user {}, not to you (user {user})", data.uid())));
        }
        match data.mode() & FOREIGN_BITS {
            0 => Secret::of(path, file),
            _ => {
                let (mode, shown) = (data.mode() & 0o7777, path.display());
                Err(refused(path, format!("others may access it (mode {mode:04o}): run `chmod 600 {shown}`")))
            }
        }
    }

    fn of(path: &Path, file: File) -> Result<Secret, SecretError> {
        // The room is taken at once, so that no part of the secret is moved and left behind.
        let mut bytes = Zeroizing::new(Vec::with_capacity(MAX + 64));
        file.take(MAX as u64 + 2).read_to_end(&mut bytes).map_err(|e| refused(path, e.to_string()))?;
        if let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            bytes.truncate(end);
        }
        if bytes.last() == Some(&b'\r') {
            bytes.pop();
        }
        let mut text = Zeroizing::new(String::with_capacity(MAX));
        match (bytes.len(), str::from_utf8(&bytes)) {
            (0, _) => Err(refused(path, "its first line is empty")),
            (length, _) if length > MAX => Err(refused(path, "its first line is longer than 4096 bytes")),
            // QEMU looks a passphrase up as text.
            (_, Err(_)) => Err(refused(path, "its first line is not UTF-8, as QEMU demands")),
            (_, Ok(line)) => {
                text.push_str(line);
                Ok(Secret(text))
            }
        }
    }

    /// A pipe that holds it, for one reader.
    pub fn pipe(&self) -> io::Result<PipeReader> {
        let (reader, mut writer) = pipe()?;
        writer.write_all(self.0.as_bytes())?;
        Ok(reader)
    }

    /// The secret itself, for a QEMU that is told of it on a private socket.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

fn refused(path: &Path, reason: impl Into<String>) -> SecretError {
    SecretError { path: path.to_owned(), reason: reason.into() }
}

/// Arguments of QEMU's programs that name a secret which they inherit at descriptor `fd`.
pub fn arguments(id: &str, fd: i32) -> [String; 2] {
    ["--object".into(), format!("secret,id={id},file=/dev/fd/{fd}")]
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

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
            assert!(Secret::read(&path).is_err());
        }
        fs::write(&path, [b'x'; MAX]).unwrap();
        Secret::read(&path).unwrap().pipe().unwrap();
        assert!(Secret::read(&folder.path().join("none")).is_err());
    }

    #[test]
    fn what_others_may_read_is_no_secret() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("secret");
        fs::write(&path, "one\n").unwrap();
        for (mode, is_private) in [(0o600, true), (0o400, true), (0o640, false), (0o604, false), (0o620, false)] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let read = Secret::read_private(&path);
            assert_eq!(read.is_ok(), is_private, "{mode:o}");
            assert!(read.err().is_none_or(|e| e.to_string().contains("chmod 600")));
        }
    }
}
