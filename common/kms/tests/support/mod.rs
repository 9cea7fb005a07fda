//! What tests of a KMS over the network share: a real OpenBao, and servers that misbehave as told.

#![allow(dead_code, reason = "each test binary uses a part")]

pub(crate) mod bao;
pub(crate) mod scripted;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

pub(crate) use crate::ports::free_port;

/// A file that only its owner may read.
pub(crate) fn private_file(path: &Path, content: &str) -> PathBuf {
    fs::write(path, content).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    path.to_owned()
}

/// An error with all its causes, and its Debug: whatever may reach a terminal or a log.
pub(crate) fn all_text(error: &dyn std::error::Error) -> String {
    let mut text = format!("{error} {error:?}");
    let mut cause = error.source();
    while let Some(error) = cause {
        text += &format!(" {error} {error:?}");
        cause = error.source();
    }
    text
}
