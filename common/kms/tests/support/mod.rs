//! What tests of a KMS over the network share: a real OpenBao, and servers that misbehave as told.

#![allow(dead_code, reason = "each test binary uses a part")]

pub(crate) mod bao;
pub(crate) mod scripted;

use std::fs::{self, Permissions};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// A file that only its owner may read.
pub(crate) fn private_file(path: &Path, content: &str) -> PathBuf {
    fs::write(path, content).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    path.to_owned()
}

/// A port where nobody listened just now.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
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
