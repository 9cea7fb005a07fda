//! Error numbers of replies.

use std::fmt;

/// An error number, those of Linux by chance. 0 is success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub u32);

impl Errno {
    pub const NONE: Errno = Errno(0);
    pub const PERM: Errno = Errno(1);
    pub const IO: Errno = Errno(5);
    pub const NOMEM: Errno = Errno(12);
    pub const INVAL: Errno = Errno(22);
    pub const NOSPC: Errno = Errno(28);
    pub const OVERFLOW: Errno = Errno(75);
    pub const NOTSUP: Errno = Errno(95);
    pub const SHUTDOWN: Errno = Errno(108);

    pub fn is_error(self) -> bool {
        self != Errno::NONE
    }

    fn name(self) -> Option<(&'static str, &'static str)> {
        Some(match self {
            Errno::PERM => ("EPERM", "not permitted"),
            Errno::IO => ("EIO", "input/output error"),
            Errno::NOMEM => ("ENOMEM", "out of memory"),
            Errno::INVAL => ("EINVAL", "invalid request"),
            Errno::NOSPC => ("ENOSPC", "no space left"),
            Errno::OVERFLOW => ("EOVERFLOW", "value too large"),
            Errno::NOTSUP => ("ENOTSUP", "not supported"),
            Errno::SHUTDOWN => ("ESHUTDOWN", "shutting down"),
            _ => return None,
        })
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some((name, meaning)) => write!(f, "{name}, {meaning}"),
            None => write!(f, "error {}", self.0),
        }
    }
}
