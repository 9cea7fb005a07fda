//! The recovery kit at its real cost, and in the hands of another program.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{ErrorKind, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use reseal_kms::kit::{KitContents, read_kit, write_kit};
use reseal_kms::{Keyring, Kms, KmsError, Passphrase};

const PASSPHRASE: &str = "correct horse battery staple";

fn phrase(text: &str) -> Passphrase {
    Passphrase::new(text.to_owned()).unwrap()
}

fn kit_of(keyring: &Keyring, names: &[&str]) -> KitContents {
    KitContents {
        made: "2026-11-24T06:31:47Z".into(),
        vault_id: "00112233445566778899aabbccddeeff".into(),
        repo: "s3://bucket/prefix".into(),
        tenant: "acme".into(),
        tenant_id: "ffeeddccbbaa99887766554433221100".into(),
        kms: keyring.kind().into(),
        keys: keyring.export(names).unwrap(),
    }
}

#[test]
fn a_new_machine_with_only_the_kit_unwraps_what_the_old_one_wrapped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kit.age");
    let old = Keyring::create(&dir.path().join("old"), None).unwrap();
    old.create("acme-0a1b2c3d").unwrap();
    let wrapped = old.wrap("acme-0a1b2c3d", b"context", b"payload").unwrap();
    write_kit(&path, &kit_of(&old, &["acme-0a1b2c3d"]), &phrase(PASSPHRASE)).unwrap();
    old.destroy("acme-0a1b2c3d").unwrap();

    let kit = read_kit(&path, &phrase(PASSPHRASE)).unwrap();
    let new = Keyring::create(&dir.path().join("new"), Some(&phrase("another"))).unwrap();
    new.import(&kit.keys).unwrap();
    assert_eq!(new.unwrap("acme-0a1b2c3d", b"context", &wrapped).unwrap().as_slice(), b"payload");

    let error = read_kit(&path, &phrase("correct horse battery stable")).unwrap_err();
    assert!(matches!(error, KmsError::KitWrongPassphrase { .. }), "{error}");
    let error = write_kit(&path, &kit, &phrase(PASSPHRASE)).unwrap_err();
    assert!(matches!(error, KmsError::KitExists { .. }), "{error}");
}

#[test]
fn a_folder_that_is_missing_is_not_made() {
    let dir = tempfile::tempdir().unwrap();
    let keyring = Keyring::create(&dir.path().join("k"), None).unwrap();
    keyring.create("a").unwrap();
    // The stick is not mounted: a kit on the machine itself would be no kit.
    let path = dir.path().join("usb/kit.age");
    let error = write_kit(&path, &kit_of(&keyring, &["a"]), &phrase(PASSPHRASE)).unwrap_err();
    assert!(matches!(&error, KmsError::Io { source, .. } if source.kind() == ErrorKind::NotFound), "{error}");
    assert!(!dir.path().join("usb").exists());
}

#[test]
fn the_age_program_opens_a_kit() {
    if !installed("age") || !installed("script") {
        eprintln!("skipped: the programs `age` and `script` are not installed");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let keyring = Keyring::create(&dir.path().join("k"), None).unwrap();
    keyring.create("acme-0a1b2c3d").unwrap();
    let kit = kit_of(&keyring, &["acme-0a1b2c3d"]);
    write_kit(&dir.path().join("kit.age"), &kit, &phrase(PASSPHRASE)).unwrap();

    decrypt_with_age(dir.path());
    let text = std::fs::read_to_string(dir.path().join("kit.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json["format"], "reseal-recovery-kit");
    assert_eq!(json["tenant"], "acme");
    assert_eq!(json["keys"][0]["name"], "acme-0a1b2c3d");
    assert_eq!(json["keys"][0]["key"], hex::encode(kit.keys[0].key.expose()));
}

fn installed(program: &str) -> bool {
    Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
}

/// `age` takes a passphrase from a terminal only; `script` gives it one.
fn decrypt_with_age(dir: &Path) {
    let mut script = Command::new("script")
        .args(["--quiet", "--return", "--command", "age -d -o kit.json kit.age", "/dev/null"])
        .current_dir(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    script.stdin.take().unwrap().write_all(format!("{PASSPHRASE}\n").as_bytes()).unwrap();
    let output = script.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}
