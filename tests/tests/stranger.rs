//! A reader and a rewriter in another language, written from `docs/FORMAT.md` alone, against the frozen vault.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::process::Command;

use reseal_tests::frozen::{Expected, Frozen};

/// Runs a script of `tests/stranger` on a copy of a vault; what it prints.
fn stranger(script: &str, frozen: &Frozen) -> String {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let cache = std::env::var_os("RESEAL_CACHE").map_or_else(|| tests.join("../.cache"), PathBuf::from);
    let python = cache.join("stranger/bin/python");
    assert!(python.exists(), "{} is missing: run tests/scripts/setup.sh", python.display());
    let output = Command::new(python)
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .arg(tests.join("stranger").join(script))
        .args([frozen.vault(), frozen.keyring()])
        .arg(&frozen.expected.tenant)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn read(frozen: &Frozen) -> Expected {
    serde_json::from_str(&stranger("read_vault.py", frozen)).unwrap()
}

#[test]
fn an_independent_reader_finds_the_same_in_the_frozen_vault() {
    let frozen = Frozen::copy("v1");
    assert_eq!(read(&frozen), frozen.expected);
}

#[test]
fn packs_that_were_rewritten_with_blobs_emptied_still_read() {
    let frozen = Frozen::copy("v1");
    let emptied: u32 = stranger("rewrite_packs.py", &frozen).trim().parse().unwrap();
    assert!(emptied > 0, "the forgotten point had blobs of its own");
    assert_eq!(read(&frozen), frozen.expected);
    let thawed = frozen.thaw();
    assert_eq!(thawed.content(), thawed.expected);
    assert_eq!(thawed.verify().damaged, []);
}
