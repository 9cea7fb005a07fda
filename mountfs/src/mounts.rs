//! What the kernel says is mounted where.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::mount::UnmountFlags;

/// The type of our mounts, as the kernel and `mount` show it.
const TYPE: &[u8] = b"fuse.reseal";

/// What is mounted at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum MountedAt {
    Nothing,
    /// A mount of ours, with the number of its device.
    Reseal(String),
    Other,
}

/// The path by which the kernel knows a mountpoint. The mount itself is not touched: a dead one could not be.
pub(crate) fn kernel_path(mountpoint: &Path) -> io::Result<PathBuf> {
    let absolute = std::path::absolute(mountpoint)?;
    match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => Ok(parent.canonicalize()?.join(name)),
        _ => absolute.canonicalize(),
    }
}

/// What is mounted at exactly that path, as [`kernel_path`] gives it.
pub(crate) fn mounted_at(path: &Path) -> io::Result<MountedAt> {
    Ok(find(&std::fs::read("/proc/self/mountinfo")?, path))
}

/// Whether what is mounted there can be written to.
pub(crate) fn is_writable(path: &Path) -> io::Result<bool> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    Ok(top(&table, path).is_some_and(|top| top.options.split(|&byte| byte == b',').any(|option| option == b"rw")))
}

/// A line of the table.
struct Line<'a> {
    device: &'a [u8],
    options: &'a [u8],
    kind: &'a [u8],
}

/// What is mounted at a path: of several the last is on top.
fn top<'a>(table: &'a [u8], path: &Path) -> Option<Line<'a>> {
    table.split(|&byte| byte == b'\n').rev().find_map(|line| {
        let mut fields = line.split(|&byte| byte == b' ');
        let device = fields.nth(2)?;
        let point = fields.nth(1)?;
        let options = fields.next()?;
        let kind = fields.skip_while(|&field| field != b"-").nth(1)?;
        (unescape(point).as_bytes() == path.as_os_str().as_bytes()).then_some(Line { device, options, kind })
    })
}

fn find(table: &[u8], path: &Path) -> MountedAt {
    match top(table, path) {
        None => MountedAt::Nothing,
        Some(Line { device, kind: TYPE, .. }) => MountedAt::Reseal(String::from_utf8_lossy(device).into_owned()),
        Some(_) => MountedAt::Other,
    }
}

/// Spaces and the like stand as three octal digits after a backslash.
fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()).filter(|_| first == b'\\') {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes)
}

/// Whether a mount goes at once, even while it is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unmount {
    IfUnused,
    Detach,
}

/// Unmounts, through `fusermount3` where this user may not do it alone.
pub(crate) fn unmount(path: &Path, how: Unmount) -> io::Result<()> {
    let flags = match how {
        Unmount::IfUnused => UnmountFlags::empty(),
        Unmount::Detach => UnmountFlags::DETACH,
    };
    match rustix::mount::unmount(path, flags | UnmountFlags::NOFOLLOW) {
        Err(Errno::PERM) => {}
        other => return Ok(other?),
    }
    let mut command = Command::new("fusermount3");
    command.arg("-u");
    if how == Unmount::Detach {
        command.arg("-z");
    }
    let output = command.arg("--").arg(path).stdin(Stdio::null()).output()?;
    match (output.status.success(), String::from_utf8_lossy(&output.stderr)) {
        (true, _) => Ok(()),
        (false, text) if text.contains("busy") => Err(Errno::BUSY.into()),
        (false, text) => Err(io::Error::other(text.trim().to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_on_top_counts_and_escapes_are_undone() {
        let table = b"22 1 254:0 / / rw - ext4 /dev/vda rw\n\
            40 22 0:50 / /mnt/a\\040b ro,nosuid shared:7 - fuse.reseal reseal ro\n\
            41 22 0:51 / /mnt/c ro - fuse.reseal reseal ro\n\
            42 41 0:52 / /mnt/c rw - tmpfs tmpfs rw\n";
        assert_eq!(find(table, Path::new("/mnt/a b")), MountedAt::Reseal("0:50".into()));
        assert_eq!(find(table, Path::new("/mnt/c")), MountedAt::Other);
        assert_eq!(find(table, Path::new("/mnt/d")), MountedAt::Nothing);
        assert_eq!(top(table, Path::new("/mnt/c")).unwrap().options, b"rw");
        assert_eq!(top(table, Path::new("/mnt/a b")).unwrap().options, b"ro,nosuid");
    }
}
