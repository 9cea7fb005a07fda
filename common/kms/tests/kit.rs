//! The recovery kit at its real cost, and in the hands of another program.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::Permissions;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use reseal_kms::kit::{KitContents, KitKey, KitLock, read_identities, read_kit, write_kit};
use reseal_kms::{KeyBytes, Keyring, Kms, KmsError, Passphrase};

const PASSPHRASE: &str = "correct horse battery staple";

fn phrase(text: &str) -> Passphrase {
    Passphrase::new(text.to_owned()).unwrap()
}

fn lock() -> KitLock {
    KitLock::Passphrase(phrase(PASSPHRASE))
}

fn key(text: &str) -> KitKey {
    KitKey::Passphrase(phrase(text))
}

fn kit_of(keyring: &Keyring, names: &[&str]) -> KitContents {
    KitContents {
        made: "2026-11-24T06:31:47Z".into(),
        vault_id: "00112233445566778899aabbccddeeff".into(),
        repo: "s3://bucket/prefix".into(),
        tenant: "acme".into(),
        tenant_id: "ffeeddccbbaa99887766554433221100".into(),
        kms: keyring.kind().into(),
        master: Some(KeyBytes::copy_from(&[0xC3; 32])),
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
    write_kit(&path, &kit_of(&old, &["acme-0a1b2c3d"]), &lock()).unwrap();
    old.destroy("acme-0a1b2c3d").unwrap();

    let kit = read_kit(&path, &key(PASSPHRASE)).unwrap();
    let new = Keyring::create(&dir.path().join("new"), Some(&phrase("another"))).unwrap();
    new.import(&kit.keys).unwrap();
    assert_eq!(new.unwrap("acme-0a1b2c3d", b"context", &wrapped).unwrap().as_slice(), b"payload");

    let error = read_kit(&path, &key("correct horse battery stable")).unwrap_err();
    assert!(matches!(error, KmsError::KitWrongPassphrase { .. }), "{error}");
    let error = write_kit(&path, &kit, &lock()).unwrap_err();
    assert!(matches!(error, KmsError::KitExists { .. }), "{error}");
}

#[test]
fn a_folder_that_is_missing_is_not_made() {
    let dir = tempfile::tempdir().unwrap();
    let keyring = Keyring::create(&dir.path().join("k"), None).unwrap();
    keyring.create("a").unwrap();
    // The stick is not mounted: a kit on the machine itself would be no kit.
    let path = dir.path().join("usb/kit.age");
    let error = write_kit(&path, &kit_of(&keyring, &["a"]), &lock()).unwrap_err();
    assert!(matches!(&error, KmsError::Io { source, .. } if source.kind() == ErrorKind::NotFound), "{error}");
    assert!(!dir.path().join("usb").exists());
}

#[test]
fn the_age_program_opens_a_kit_and_seals_one_that_opens() {
    let dir = tempfile::tempdir().unwrap();
    let keyring = Keyring::create(&dir.path().join("k"), None).unwrap();
    keyring.create("acme-0a1b2c3d").unwrap();
    let kit = kit_of(&keyring, &["acme-0a1b2c3d"]);
    write_kit(&dir.path().join("kit.age"), &kit, &lock()).unwrap();

    age_at_a_terminal(dir.path(), "age -d -o kit.json kit.age", 1);
    let text = std::fs::read_to_string(dir.path().join("kit.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&json["format"], &json["version"]), (&"reseal-recovery-kit".into(), &2.into()));
    assert_eq!(json["tenant"], "acme");
    assert_eq!(json["master"], hex::encode(kit.master.as_ref().unwrap().expose()));
    assert_eq!(json["keys"][0]["name"], "acme-0a1b2c3d");
    assert_eq!(json["keys"][0]["key"], hex::encode(kit.keys[0].key.expose()));

    for (command, sealed) in [("age -p -a -o again.age kit.json", "again.age"), ("age -p -o binary kit.json", "binary")]
    {
        age_at_a_terminal(dir.path(), command, 2);
        assert_eq!(read_kit(&dir.path().join(sealed), &key(PASSPHRASE)).unwrap(), kit);
    }
}

#[test]
fn the_age_program_opens_a_kit_for_recipients_and_seals_one_that_opens() {
    let dir = tempfile::tempdir().unwrap();
    let keyring = Keyring::create(&dir.path().join("k"), None).unwrap();
    let kit = kit_of(&keyring, &[]);
    let run = |program: &str, arguments: &[&str]| {
        let ended = Command::new(program).args(arguments).current_dir(dir.path()).output().unwrap();
        assert!(ended.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&ended.stderr));
        String::from_utf8(ended.stdout).unwrap()
    };
    run("age-keygen", &["-o", "identity.txt"]);
    let recipient = run("age-keygen", &["-y", "identity.txt"]);
    let lock = KitLock::recipients(vec![recipient.trim().parse().unwrap()]).unwrap();
    write_kit(&dir.path().join("kit.age"), &kit, &lock).unwrap();
    let text = run("age", &["-d", "-i", "identity.txt", "kit.age"]);
    assert_eq!(serde_json::from_str::<serde_json::Value>(&text).unwrap()["version"], 2);

    let identities = |name: &str| read_identities(&dir.path().join(name), |_| Ok(phrase(PASSPHRASE))).unwrap();
    std::fs::write(dir.path().join("kit.json"), text).unwrap();
    run("age", &["-r", recipient.trim(), "-o", "again.age", "kit.json"]);
    assert_eq!(read_kit(&dir.path().join("again.age"), &identities("identity.txt")).unwrap(), kit);
    age_at_a_terminal(dir.path(), "age -p -o identity.age identity.txt", 2);
    std::fs::set_permissions(dir.path().join("identity.age"), Permissions::from_mode(0o600)).unwrap();
    assert_eq!(read_kit(&dir.path().join("again.age"), &identities("identity.age")).unwrap(), kit);
}

/// `age` takes a passphrase from a terminal only; `script` gives it one, and types it so many times.
fn age_at_a_terminal(dir: &Path, command: &str, times: usize) {
    let mut script = Command::new("script")
        .args(["--quiet", "--return", "--command", command, "/dev/null"])
        .current_dir(dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("can't start script: {e}; run tests/scripts/setup.sh"));
    script.stdin.take().unwrap().write_all(format!("{PASSPHRASE}\n").repeat(times).as_bytes()).unwrap();
    let output = script.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}
