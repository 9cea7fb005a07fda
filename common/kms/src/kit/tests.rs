//! Damage to a kit at every place, and its bounds, at a cost that a test can pay a thousand times.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use tempfile::TempDir;

use super::*;

const CHEAP: u8 = 1;

fn phrase(text: &str) -> Passphrase {
    Passphrase::new(text.to_owned()).unwrap()
}

fn contents() -> KitContents {
    let key =
        |name: &str, byte| NamedKey { name: KeyName::parse(name).unwrap(), key: KeyBytes::copy_from(&[byte; 32]) };
    KitContents {
        made: "2026-11-24T06:31:47Z".into(),
        vault_id: "00112233445566778899aabbccddeeff".into(),
        repo: "/srv/vault \"with\" quotes".into(),
        tenant: "Größe & Co".into(),
        tenant_id: "ffeeddccbbaa99887766554433221100".into(),
        kms: "keyring".into(),
        keys: vec![key("acme-0a1b2c3d", 0xA5), key("acme-4e5f6071", 0x5A)],
    }
}

fn written(dir: &TempDir) -> PathBuf {
    let path = dir.path().join("kit.age");
    write_at_cost(&path, &contents(), &phrase("open sesame"), CHEAP).unwrap();
    path
}

/// An age file with any content, as someone else might make it.
fn sealed(dir: &TempDir, content: &[u8], work_factor: u8) -> PathBuf {
    let path = dir.path().join("other.age");
    fs::write(&path, seal(content, &phrase("x"), work_factor).unwrap()).unwrap();
    path
}

#[test]
fn what_is_read_is_what_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = written(&dir);
    assert_eq!(read_kit(&path, &phrase("open sesame")).unwrap(), contents());
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_kit_is_printable_and_nothing_but_armor() {
    let dir = tempfile::tempdir().unwrap();
    let text = fs::read_to_string(written(&dir)).unwrap();
    assert!(text.starts_with("-----BEGIN AGE ENCRYPTED FILE-----\n"));
    assert!(text.ends_with("\n-----END AGE ENCRYPTED FILE-----\n"));
    assert!(text.lines().all(|line| line.len() <= 64 && line.bytes().all(|b| b.is_ascii_graphic() || b == b' ')));
}

#[test]
fn a_kit_typed_in_on_another_system_opens() {
    let dir = tempfile::tempdir().unwrap();
    let path = written(&dir);
    let text = fs::read_to_string(&path).unwrap();
    for typed in [text.replace('\n', "\r\n"), format!("{text}\n\n"), text.trim_end().to_owned()] {
        fs::write(&path, typed).unwrap();
        assert_eq!(read_kit(&path, &phrase("open sesame")).unwrap(), contents());
    }
}

#[test]
fn an_existing_file_is_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kit.age");
    fs::write(&path, b"precious").unwrap();
    let error = write_at_cost(&path, &contents(), &phrase("x"), CHEAP).unwrap_err();
    assert!(matches!(error, KmsError::KitExists { .. }), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}

#[test]
fn a_wrong_passphrase_is_said_to_be_that() {
    let dir = tempfile::tempdir().unwrap();
    let path = written(&dir);
    for wrong in ["open sesam", "open sesame ", "x"] {
        let error = read_kit(&path, &phrase(wrong)).unwrap_err();
        assert!(matches!(error, KmsError::KitWrongPassphrase { .. }), "{error}");
        assert!(!error.to_string().contains("sesam"), "{error}");
    }
}

#[test]
fn a_kit_cut_anywhere_is_reported() {
    let dir = tempfile::tempdir().unwrap();
    let path = written(&dir);
    let whole = fs::read(&path).unwrap();
    for len in 0..whole.len() - 1 {
        fs::write(&path, &whole[..len]).unwrap();
        let error = read_kit(&path, &phrase("open sesame")).unwrap_err();
        assert!(matches!(error, KmsError::KitCorrupt { .. } | KmsError::NotAKit { .. }), "{len}: {error}");
    }
}

#[test]
fn a_byte_flipped_anywhere_is_reported_or_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = written(&dir);
    let whole = fs::read(&path).unwrap();
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << (at % 8);
        fs::write(&path, &damaged).unwrap();
        match read_kit(&path, &phrase("open sesame")) {
            // Blanks at the end of a line mean nothing to age.
            Ok(read) => assert_eq!(read, contents(), "byte {at}"),
            Err(
                KmsError::KitCorrupt { .. }
                | KmsError::NotAKit { .. }
                | KmsError::KitWrongPassphrase { .. }
                | KmsError::KitTooCostly { .. },
            ) => {}
            Err(error) => panic!("byte {at}: {error}"),
        }
    }
}

#[test]
fn a_costly_kit_is_refused_before_it_is_paid_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = written(&dir);
    // The cost stands in clear in the header, so a hostile file can claim any.
    let reader = ArmoredReader::new(fs::File::open(&path).unwrap());
    let binary: Vec<u8> = reader.bytes().map(Result::unwrap).collect();
    let line = binary.iter().position(|b| *b == b'\n').unwrap() + 1;
    let end = line + binary[line..].iter().position(|b| *b == b'\n').unwrap();
    assert!(binary[line..end].starts_with(b"-> scrypt ") && binary[line..end].ends_with(b" 1"));
    for (claimed, refused) in [("21", 21), ("63", 63), ("64", 64)] {
        fs::write(&path, [&binary[..end - 1], claimed.as_bytes(), &binary[end..]].concat()).unwrap();
        let error = read_kit(&path, &phrase("open sesame")).unwrap_err();
        assert!(matches!(error, KmsError::KitTooCostly { required, limit: 20, .. } if required == refused), "{error}");
    }
}

#[test]
fn other_files_are_told_from_damaged_kits() {
    let dir = tempfile::tempdir().unwrap();
    let missing = read_kit(&dir.path().join("none"), &phrase("x")).unwrap_err();
    assert!(matches!(missing, KmsError::KitMissing { .. }), "{missing}");
    let path = dir.path().join("file");
    for content in [&b""[..], b"hello", b"{\"format\":\"reseal-recovery-kit\"}"] {
        fs::write(&path, content).unwrap();
        assert!(matches!(read_kit(&path, &phrase("x")), Err(KmsError::NotAKit { .. })));
    }
    fs::write(&path, vec![b'-'; 1024 * 1024 + 1]).unwrap();
    assert!(matches!(read_kit(&path, &phrase("x")), Err(KmsError::TooLarge { .. })));
    let identity = age::x25519::Identity::generate();
    fs::write(&path, age::encrypt(&identity.to_public(), b"{}").unwrap()).unwrap();
    assert!(matches!(read_kit(&path, &phrase("x")), Err(KmsError::NotAKit { .. })));
    let letter = sealed(&dir, b"{\"format\":\"letter\",\"version\":1}", CHEAP);
    assert!(matches!(read_kit(&letter, &phrase("x")), Err(KmsError::NotAKit { .. })));
}

#[test]
fn content_that_does_not_fit_the_format_is_refused_without_quoting_it() {
    let dir = tempfile::tempdir().unwrap();
    let good = String::from_utf8(encode(&contents()).to_vec()).unwrap();
    let read = |content: &str| read_kit(&sealed(&dir, content.as_bytes(), CHEAP), &phrase("x"));
    assert_eq!(read(&good).unwrap(), contents());
    let newer = read(&good.replace("\"version\": 1", "\"version\": 9, \"unheard\": 1")).unwrap_err();
    assert!(matches!(newer, KmsError::KitVersion { found: 9, known: 1, .. }), "{newer}");
    for bad in [
        good.replace("a5a5a5", "A5A5A5"),
        good.replace("acme-4e5f6071", "acme-0a1b2c3d"),
        good.replace("acme-4e5f6071", "../../x"),
        good.replace("\"kms\"", "\"kind\""),
        good.replace("\"Größe & Co\"", "\"\""),
        good.replace("Größe", &"x".repeat(MAX_TEXT)),
        good[..good.len() / 2].to_owned(),
        String::new(),
    ] {
        let error = read(&bad).unwrap_err();
        assert!(matches!(error, KmsError::KitCorrupt { .. }), "{error}");
        assert!(!format!("{error} {error:?}").contains("a5a5"), "{error}");
    }
}

#[test]
fn a_kit_that_could_not_be_read_is_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kit.age");
    let twice = || contents().keys.into_iter().chain(contents().keys).collect();
    for bad in [
        KitContents { keys: Vec::new(), ..contents() },
        KitContents { keys: twice(), ..contents() },
        KitContents { tenant: String::new(), ..contents() },
        KitContents { repo: "x".repeat(MAX_TEXT + 1), ..contents() },
    ] {
        assert!(matches!(write_at_cost(&path, &bad, &phrase("x"), CHEAP), Err(KmsError::KitInvalid { .. })));
        assert!(!path.exists());
    }
}

#[test]
fn the_largest_kit_fits_its_limits() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("kit.age");
    let worst = || "\u{1}".repeat(MAX_TEXT);
    let names = (0..MAX_KEYS).map(|i| KeyName::parse(&format!("{i:05}{}", "x".repeat(123))).unwrap());
    let kit = KitContents {
        made: worst(),
        vault_id: worst(),
        repo: worst(),
        tenant: worst(),
        tenant_id: worst(),
        kms: worst(),
        keys: names.map(|name| NamedKey { name, key: KeyBytes::zeroed() }).collect(),
    };
    let encoded = encode(&kit);
    assert!(encoded.len() < TEXT_ROOM + MAX_KEYS * KEY_ROOM, "the buffer grew");
    write_at_cost(&path, &kit, &phrase("x"), CHEAP).unwrap();
    assert_eq!(read_kit(&path, &phrase("x")).unwrap(), kit);
}

#[test]
fn debug_of_a_kit_shows_no_key() {
    let shown = format!("{:?}", contents());
    assert!(shown.contains("acme-0a1b2c3d"));
    assert!(!shown.contains("a5a5") && !shown.contains("165"), "{shown}");
}
