//! The keyring as a file among users and processes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;

use reseal_kms::{Class, KeyBytes, KeyName, Keyring, Kms, KmsError, NamedKey, Passphrase, is_passphrase_protected};

fn phrase(text: &str) -> Passphrase {
    Passphrase::new(text.to_owned()).unwrap()
}

fn never_asked(_: &Path) -> io::Result<Passphrase> {
    panic!("asked for a passphrase of a keyring without one")
}

fn named(name: &str, byte: u8) -> NamedKey {
    NamedKey { name: KeyName::parse(name).unwrap(), key: KeyBytes::copy_from(&[byte; 32]) }
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn keyring_and_new_folders_are_for_their_owner_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config/reseal/keyring.json");
    let keyring = Keyring::create(&path, None).unwrap();
    keyring.create("a").unwrap();
    assert_eq!(mode(&path), 0o600);
    assert_eq!(mode(&dir.path().join("config")), 0o700);
    assert_eq!(mode(&dir.path().join("config/reseal")), 0o700);
    assert!(Keyring::open(&path, never_asked).is_ok());
}

#[test]
fn an_existing_keyring_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("k");
    Keyring::create(&path, None).unwrap().create("a").unwrap();
    let before = fs::read(&path).unwrap();
    let error = Keyring::create(&path, None).unwrap_err();
    assert!(matches!(error, KmsError::KeyringExists { .. }), "{error}");
    assert_eq!(fs::read(&path).unwrap(), before);
}

#[test]
fn any_access_of_others_is_refused_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("k");
    let keyring = Keyring::create(&path, None).unwrap();
    for bits in [0o640, 0o620, 0o610, 0o604, 0o602, 0o601, 0o666, 0o777] {
        fs::set_permissions(&path, Permissions::from_mode(bits)).unwrap();
        for error in [
            Keyring::open(&path, never_asked).unwrap_err(),
            keyring.create("a").unwrap_err(),
            is_passphrase_protected(&path).unwrap_err(),
        ] {
            assert!(matches!(error, KmsError::Exposed { mode, .. } if mode == bits), "{error}");
            assert!(error.to_string().contains(&format!("chmod 600 {}", keyring.path().display())), "{error}");
        }
    }
    for bits in [0o600, 0o400] {
        fs::set_permissions(&path, Permissions::from_mode(bits)).unwrap();
        assert!(Keyring::open(&path, never_asked).is_ok());
    }
}

#[test]
fn a_keyring_of_another_user_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("k");
    Keyring::create(&path, None).unwrap();
    if let Err(error) = chown(&path, Some(12345), None) {
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        eprintln!("skipped: only root can give a file to another user");
        return;
    }
    let error = Keyring::open(&path, never_asked).unwrap_err();
    assert!(matches!(error, KmsError::ForeignOwner { owner: 12345, .. }), "{error}");
    assert!(error.to_string().contains("chown"), "{error}");
}

#[test]
fn a_missing_keyring_is_unreachable_and_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none/k");
    for error in [Keyring::open(&path, never_asked).unwrap_err(), is_passphrase_protected(&path).unwrap_err()] {
        assert!(matches!(error, KmsError::KeyringMissing { .. }), "{error}");
        assert_eq!(error.class(), Class::Unreachable);
        let message = error.to_string();
        assert!(message.contains(path.to_str().unwrap()) && message.contains("reseal key import KIT"), "{message}");
    }
    let keyring = Keyring::create(&path, None).unwrap();
    keyring.create("a").unwrap();
    fs::remove_file(&path).unwrap();
    assert!(matches!(keyring.wrap("a", b"", b""), Err(KmsError::KeyringMissing { .. })));
    assert!(matches!(keyring.create("b"), Err(KmsError::KeyringMissing { .. })));
    assert!(!path.exists(), "a keyring that was taken away must not come back with one key");
}

#[test]
fn a_missing_key_says_where_it_comes_from() {
    let dir = tempfile::tempdir().unwrap();
    let keyring = Keyring::create(&dir.path().join("k"), None).unwrap();
    for error in [keyring.wrap("acme-0a1b2c3d", b"", b"").unwrap_err(), keyring.export(&["acme-0a1b2c3d"]).unwrap_err()]
    {
        let message = error.to_string();
        assert!(message.contains("acme-0a1b2c3d") && message.contains("reseal key import KIT"), "{message}");
    }
}

#[test]
fn a_link_to_the_keyring_stays_a_link() {
    let dir = tempfile::tempdir().unwrap();
    let (path, link) = (dir.path().join("real"), dir.path().join("link"));
    Keyring::create(&path, None).unwrap();
    symlink(&path, &link).unwrap();
    Keyring::open(&link, never_asked).unwrap().create("a").unwrap();
    assert!(link.symlink_metadata().unwrap().is_symlink());
    assert_eq!(Keyring::open(&path, never_asked).unwrap().list().unwrap().len(), 1);
}

#[test]
fn exported_keys_open_on_another_machine_what_they_wrapped_on_this_one() {
    let dir = tempfile::tempdir().unwrap();
    let old = Keyring::create(&dir.path().join("old"), None).unwrap();
    old.create("a").unwrap();
    old.create("b").unwrap();
    let wrapped = old.wrap("a", b"context", b"payload").unwrap();
    let keys = old.export(&["a"]).unwrap();
    let new = Keyring::create(&dir.path().join("new"), None).unwrap();
    let imported = new.import(&keys).unwrap();
    assert_eq!((imported.added.len(), imported.already.len()), (1, 0));
    assert_eq!(new.unwrap("a", b"context", &wrapped).unwrap().as_slice(), b"payload");
    assert_eq!(new.list().unwrap().len(), 1);
}

#[test]
fn importing_a_key_again_changes_nothing_and_a_different_one_is_refused_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("k");
    let keyring = Keyring::create(&path, None).unwrap();
    keyring.import(&[named("a", 1)]).unwrap();
    let before = fs::read(&path).unwrap();
    let again = keyring.import(&[named("a", 1)]).unwrap();
    assert_eq!((again.added.len(), again.already.len()), (0, 1));
    assert_eq!(fs::read(&path).unwrap(), before);
    for conflict in [vec![named("new", 3), named("a", 2)], vec![named("new", 3), named("new", 4)]] {
        let error = keyring.import(&conflict).unwrap_err();
        assert!(matches!(error, KmsError::KeyConflict { .. }), "{error}");
        assert_eq!(fs::read(&path).unwrap(), before, "all or nothing");
    }
    assert_eq!(keyring.export(&["a"]).unwrap(), [named("a", 1)]);
}

#[test]
fn the_same_key_under_another_name_opens_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let keyring = Keyring::create(&dir.path().join("k"), None).unwrap();
    keyring.import(&[named("a", 1), named("b", 1)]).unwrap();
    let wrapped = keyring.wrap("a", b"context", b"payload").unwrap();
    assert!(matches!(keyring.unwrap("b", b"context", &wrapped), Err(KmsError::Unwrap { .. })));
}

#[test]
fn open_keyrings_see_what_the_others_do() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("k");
    let one = Keyring::create(&path, None).unwrap();
    let two = Keyring::open(&path, never_asked).unwrap();
    one.create("a").unwrap();
    let wrapped = two.wrap("a", b"", b"payload").unwrap();
    two.destroy("a").unwrap();
    assert!(matches!(one.unwrap("a", b"", &wrapped), Err(KmsError::KeyMissing { .. })));
}

#[test]
fn concurrent_writers_lose_no_key_and_readers_never_see_half_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("k");
    Keyring::create(&path, None).unwrap().create("always").unwrap();
    std::thread::scope(|scope| {
        for writer in 0..8 {
            let path = &path;
            scope.spawn(move || {
                let keyring = Keyring::open(path, never_asked).unwrap();
                for key in 0..8 {
                    keyring.create(&format!("w{writer}-{key}")).unwrap();
                }
            });
        }
        for _ in 0..2 {
            scope.spawn(|| {
                for _ in 0..200 {
                    let keyring = Keyring::open(&path, never_asked).unwrap();
                    assert!(keyring.wrap("always", b"", b"payload").is_ok());
                }
            });
        }
    });
    assert_eq!(Keyring::open(&path, never_asked).unwrap().list().unwrap().len(), 65);
    assert_eq!(mode(&path), 0o600);
}

#[test]
fn of_concurrent_creators_one_wins() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a/b/k");
    let made: Vec<bool> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| Keyring::create(&path, None).is_ok())).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(made.iter().filter(|won| **won).count(), 1);
}

#[test]
fn a_passphrase_at_its_real_cost_seals_and_opens() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("k");
    let mut keyring = Keyring::create(&path, Some(&phrase("open sesame"))).unwrap();
    keyring.create("a").unwrap();
    assert!(is_passphrase_protected(&path).unwrap());
    assert!(Keyring::open(&path, |_| Ok(phrase("open sesame"))).unwrap().wrap("a", b"", b"").is_ok());
    let error = Keyring::open(&path, |_| Ok(phrase("open says me"))).unwrap_err();
    assert!(matches!(error, KmsError::WrongPassphrase { .. }), "{error}");
    keyring.set_passphrase(None).unwrap();
    assert!(Keyring::open(&path, never_asked).is_ok());
}
