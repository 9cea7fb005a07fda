//! Damage to the file at every place, and passphrases, at a cost that a test can pay a thousand times.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::time::Instant;

use tempfile::TempDir;

use super::*;

const CHEAP: Cost = Cost { memory_kib: 8, passes: 1, lanes: 1 };
const CONTEXT: &[u8] = b"vault and tenant";
const PAYLOAD: &[u8] = b"the master of a tenant";

fn phrase(text: &str) -> Passphrase {
    Passphrase::new(text.to_owned()).unwrap()
}

fn never_asked(_: &Path) -> io::Result<Passphrase> {
    panic!("asked for a passphrase of a keyring without one")
}

/// A keyring with one key, under `passphrase` or none.
fn keyring(dir: &TempDir, passphrase: Option<&str>) -> Keyring {
    let passphrase = passphrase.map(phrase);
    let keyring = Keyring::create_at_cost(&dir.path().join("keyring.json"), passphrase.as_ref(), CHEAP).unwrap();
    keyring
        .import(&[NamedKey { name: KeyName::parse("acme").unwrap(), key: KeyBytes::copy_from(&[0xA5; 32]) }])
        .unwrap();
    keyring
}

fn open(path: &Path, passphrase: &str) -> Result<Keyring, KmsError> {
    Keyring::open(path, |_| Ok(phrase(passphrase)))
}

/// Opens and reads everything, as any use of the keyring does.
fn read_all(path: &Path, passphrase: &str) -> Result<Vec<NamedKey>, KmsError> {
    let keyring = open(path, passphrase)?;
    let names: Vec<KeyName> = keyring.list()?.into_iter().map(|info| info.name).collect();
    keyring.export(&names.iter().map(KeyName::as_str).collect::<Vec<_>>())
}

/// What may come of a damaged file: an error about the file, never a panic, never another key.
fn is_file_error(error: &KmsError) -> bool {
    matches!(
        error,
        KmsError::KeyringCorrupt { .. }
            | KmsError::KeyringTruncated { .. }
            | KmsError::KeyringVersion { .. }
            | KmsError::WrongPassphrase { .. }
    )
}

#[test]
fn a_passphrase_opens_what_it_sealed_and_no_other_does() {
    let dir = tempfile::tempdir().unwrap();
    let made = keyring(&dir, Some("open sesame"));
    let wrapped = made.wrap("acme", CONTEXT, PAYLOAD).unwrap();
    assert!(is_passphrase_protected(made.path()).unwrap());
    let opened = open(made.path(), "open sesame").unwrap();
    assert_eq!(**opened.unwrap("acme", CONTEXT, &wrapped).unwrap(), *PAYLOAD);
    for wrong in ["open sesam", "open sesame ", "Open sesame", "x"] {
        let error = open(made.path(), wrong).unwrap_err();
        assert!(matches!(error, KmsError::WrongPassphrase { .. }), "{error}");
        assert!(!error.to_string().contains("sesam"), "{error}");
    }
}

#[test]
fn a_sealed_file_shows_neither_keys_nor_their_names() {
    let dir = tempfile::tempdir().unwrap();
    let sealed = fs::read_to_string(keyring(&dir, Some("open sesame")).path()).unwrap();
    // The hex of the key whole: four digits of it stand in a random ciphertext by chance now and then.
    let key = "a5".repeat(16);
    for secret in [key.as_str(), "acme", "sesame"] {
        assert!(!sealed.contains(secret), "{sealed}");
    }
}

#[test]
fn a_passphrase_that_cannot_be_had_is_said_with_its_cause() {
    let dir = tempfile::tempdir().unwrap();
    let made = keyring(&dir, Some("open sesame"));
    let error = Keyring::open(made.path(), |_| Err(io::Error::other("no terminal"))).unwrap_err();
    assert!(matches!(&error, KmsError::PassphraseUnavailable { source, .. } if source.to_string() == "no terminal"));
}

#[test]
fn a_passphrase_can_be_added_changed_and_removed() {
    let dir = tempfile::tempdir().unwrap();
    let mut made = keyring(&dir, None);
    let wrapped = made.wrap("acme", CONTEXT, PAYLOAD).unwrap();
    let path = made.path().to_owned();
    assert!(!is_passphrase_protected(&path).unwrap());
    for next in ["first", "second"] {
        made.set_passphrase_at_cost(Some(&phrase(next)), CHEAP).unwrap();
        assert!(is_passphrase_protected(&path).unwrap());
        assert!(made.unwrap("acme", CONTEXT, &wrapped).is_ok());
        assert!(open(&path, next).unwrap().unwrap("acme", CONTEXT, &wrapped).is_ok());
    }
    assert!(matches!(open(&path, "first"), Err(KmsError::WrongPassphrase { .. })));
    made.set_passphrase_at_cost(None, CHEAP).unwrap();
    assert!(!is_passphrase_protected(&path).unwrap());
    let opened = Keyring::open(&path, never_asked).unwrap();
    assert!(opened.unwrap("acme", CONTEXT, &wrapped).is_ok());
}

#[test]
fn a_passphrase_changed_meanwhile_is_asked_for_anew_and_a_removed_one_is_not_missed() {
    let dir = tempfile::tempdir().unwrap();
    let mut made = keyring(&dir, Some("first"));
    let other = open(made.path(), "first").unwrap();
    made.set_passphrase_at_cost(Some(&phrase("second")), CHEAP).unwrap();
    assert!(matches!(other.create("new"), Err(KmsError::PassphraseChanged { .. })));
    assert!(matches!(other.list(), Err(KmsError::PassphraseChanged { .. })));
    made.set_passphrase_at_cost(None, CHEAP).unwrap();
    other.create("new").unwrap();
    assert!(!is_passphrase_protected(made.path()).unwrap());
    assert_eq!(made.list().unwrap().len(), 2);
}

#[test]
fn a_change_keeps_a_sealed_keyring_sealed() {
    let dir = tempfile::tempdir().unwrap();
    let made = keyring(&dir, Some("open sesame"));
    made.create("new").unwrap();
    made.destroy("acme").unwrap();
    assert!(is_passphrase_protected(made.path()).unwrap());
    let names: Vec<_> = open(made.path(), "open sesame").unwrap().list().unwrap().into_iter().map(|i| i.name).collect();
    assert_eq!(names, [KeyName::parse("new").unwrap()]);
}

#[test]
fn a_file_cut_anywhere_is_reported() {
    for passphrase in [None, Some("x")] {
        let dir = tempfile::tempdir().unwrap();
        let path = keyring(&dir, passphrase).path().to_owned();
        let whole = fs::read(&path).unwrap();
        // The last byte is a line's end, which JSON does without.
        for len in 0..whole.len() - 1 {
            fs::write(&path, &whole[..len]).unwrap();
            let error = read_all(&path, "x").unwrap_err();
            assert!(matches!(error, KmsError::KeyringTruncated { .. }), "{len}: {error}");
        }
    }
}

#[test]
fn a_byte_flipped_anywhere_is_reported_or_changes_no_key() {
    for passphrase in [None, Some("x")] {
        let dir = tempfile::tempdir().unwrap();
        let path = keyring(&dir, passphrase).path().to_owned();
        let whole = fs::read(&path).unwrap();
        let keys = read_all(&path, "x").unwrap();
        let mut unnoticed = 0;
        for at in 0..whole.len() {
            for flip in [0x01, 0x04, 0x20, 0x80] {
                let mut damaged = whole.clone();
                damaged[at] ^= flip;
                fs::write(&path, &damaged).unwrap();
                match read_all(&path, "x") {
                    Ok(read) => {
                        assert_eq!(read, keys, "byte {at} flipped by {flip:#x}");
                        unnoticed += 1;
                    }
                    Err(error) => {
                        assert!(is_file_error(&error), "{error}");
                        assert!(!error.to_string().contains("a5a5"), "{error}");
                    }
                }
            }
        }
        // Blanks between the fields, and upper case in hex that is not a key.
        assert!(unnoticed < whole.len(), "{unnoticed}");
    }
}

#[test]
fn the_content_of_a_sealed_file_moved_under_other_parameters_does_not_open() {
    let dir = tempfile::tempdir().unwrap();
    let made = keyring(&dir, Some("x"));
    let text = fs::read_to_string(made.path()).unwrap();
    for (from, to) in [("\"passes\": 1", "\"passes\": 2"), ("\"memory_kib\": 8", "\"memory_kib\": 9")] {
        assert!(text.contains(from));
        fs::write(made.path(), text.replace(from, to)).unwrap();
        assert!(matches!(open(made.path(), "x"), Err(KmsError::WrongPassphrase { .. })));
    }
}

#[test]
fn a_hostile_cost_is_refused_before_it_is_paid() {
    let dir = tempfile::tempdir().unwrap();
    let made = keyring(&dir, Some("x"));
    let text = fs::read_to_string(made.path()).unwrap();
    let started = Instant::now();
    for (from, to) in [
        ("\"memory_kib\": 8", "\"memory_kib\": 4294967295"),
        ("\"passes\": 1", "\"passes\": 4294967295"),
        ("\"lanes\": 1", "\"lanes\": 16777215"),
        ("\"lanes\": 1", "\"lanes\": 0"),
        ("\"memory_kib\": 8", "\"memory_kib\": 99999999999999999999"),
        ("argon2id", "none"),
    ] {
        assert!(text.contains(from));
        fs::write(made.path(), text.replace(from, to)).unwrap();
        let error = Keyring::open(made.path(), never_asked).unwrap_err();
        assert!(matches!(error, KmsError::KeyringCorrupt { .. }), "{error}");
    }
    assert!(started.elapsed() < Duration::from_secs(1));
}

#[test]
fn files_that_are_no_keyring_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let made = keyring(&dir, None);
    let text = fs::read_to_string(made.path()).unwrap();
    let entry = &text[text.find("    {").unwrap()..=text.rfind('}').unwrap() - 4];
    let check = |content: &str| {
        fs::write(made.path(), content).unwrap();
        Keyring::open(made.path(), never_asked).unwrap_err()
    };
    for bad in [
        "[]",
        "{\"format\":\"reseal-keyring\",\"version\":1}",
        "{\"format\":\"reseal-keyring\",\"version\":1,\"keys\":[],\"sealed\":null,\"more\":1}",
        "{\"format\":\"other\",\"version\":1,\"keys\":[]}",
        "not json",
        &text.replace("a5a5a5", "A5A5A5"),
        &text.replace("\"acme\"", "\"../acme\""),
        &text.replace("\"acme\"", "\"acme2\""),
        &format!("{text}x"),
        &text.replace("\n  ]", &format!(",\n{entry}\n  ]")),
    ] {
        let error = check(bad);
        assert!(matches!(error, KmsError::KeyringCorrupt { .. }), "{bad}: {error}");
        assert!(!error.to_string().contains("a5a5"), "{error}");
        assert!(error.to_string().contains(made.path().to_str().unwrap()), "{error}");
    }
    let newer = check(&text.replace("\"version\": 1", "\"version\": 2, \"unheard\": [1]"));
    assert!(matches!(newer, KmsError::KeyringVersion { found: 2, known: 1, .. }), "{newer}");
}

#[test]
fn what_a_killed_writer_left_is_cleared_away() {
    let dir = tempfile::tempdir().unwrap();
    let made = keyring(&dir, None);
    fs::write(made.staged(), b"half a file with keys").unwrap();
    made.create("new").unwrap();
    assert!(!made.staged().exists());
    assert_eq!(made.list().unwrap().len(), 2);
}

#[test]
fn a_lock_that_never_ends_is_an_error_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut made = keyring(&dir, None);
    made.patience = Duration::from_millis(30);
    let before = fs::read(made.path()).unwrap();
    let _held = Lock::acquire(&private_file::beside(made.path(), ".lock"), Duration::ZERO).unwrap();
    assert!(matches!(made.create("new"), Err(KmsError::Busy { .. })));
    assert!(matches!(made.destroy("acme"), Err(KmsError::Busy { .. })));
    assert!(matches!(made.set_passphrase_at_cost(None, CHEAP), Err(KmsError::Busy { .. })));
    assert_eq!(fs::read(made.path()).unwrap(), before);
    assert!(made.wrap("acme", CONTEXT, PAYLOAD).is_ok(), "readers need no lock");
}

#[test]
fn debug_of_an_open_keyring_shows_no_secret() {
    let dir = tempfile::tempdir().unwrap();
    let made = keyring(&dir, Some("open sesame"));
    let unlocked = hex::encode(made.unlocked.as_ref().unwrap().key.expose());
    let shown = format!("{made:?} {:?}", made.load().unwrap().keys);
    for secret in ["a5a5", "A5A5", "165", "sesame", &unlocked[..8]] {
        assert!(!shown.contains(secret), "{shown}");
    }
}

#[test]
fn a_full_keyring_refuses_more_and_the_largest_fits_its_limits() {
    let dir = tempfile::tempdir().unwrap();
    let made = Keyring::create_at_cost(&dir.path().join("k"), Some(&phrase("x")), CHEAP).unwrap();
    let names = (0..MAX_KEYS).map(|i| KeyName::parse(&format!("{i:05}{}", "x".repeat(123))).unwrap());
    let keys: Vec<NamedKey> = names.map(|name| NamedKey { name, key: KeyBytes::zeroed() }).collect();
    made.import(&keys).unwrap();
    assert!(matches!(made.create("one-more"), Err(KmsError::KeyringFull { .. })));
    assert_eq!(open(made.path(), "x").unwrap().list().unwrap().len(), MAX_KEYS);
}
