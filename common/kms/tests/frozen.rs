//! Files and bytes of the first version, made once: later versions read them for ever. If a test here fails, the format has
//! changed, and its version must too.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use reseal_kms::kit::{KitContents, KitKey, KitLock, SealedKit, read_identities, read_kit, write_kit, write_sheet};
use reseal_kms::{KeyBytes, KeyName, Keyring, Kms, NamedKey, Passphrase};

const PASSPHRASE: &str = "correct horse battery staple";
const NAME: &str = "acme-0a1b2c3d";
const CONTEXT: &[u8] = b"vault and tenant";
const PAYLOAD: &[u8] = b"the master of a tenant";

fn phrase() -> Passphrase {
    Passphrase::new(PASSPHRASE.to_owned()).unwrap()
}

fn key() -> NamedKey {
    let bytes = std::array::from_fn(|i| u8::try_from(i).unwrap());
    NamedKey { name: KeyName::parse(NAME).unwrap(), key: KeyBytes::copy_from(&bytes) }
}

fn open() -> KitKey {
    KitKey::Passphrase(phrase())
}

/// The kit of version 1; that of version 2 has a master too.
fn kit() -> KitContents {
    KitContents {
        made: "2026-11-24T06:31:47Z".into(),
        vault_id: "00112233445566778899aabbccddeeff".into(),
        repo: "/srv/vault".into(),
        tenant: "acme".into(),
        tenant_id: "ffeeddccbbaa99887766554433221100".into(),
        kms: "keyring".into(),
        master: None,
        keys: vec![key()],
    }
}

fn kit_v2() -> KitContents {
    let master = std::array::from_fn(|i| 0xFF - u8::try_from(i).unwrap());
    KitContents { master: Some(KeyBytes::copy_from(&master)), ..kit() }
}

fn frozen(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/frozen").join(name)
}

/// A copy as private as the keyring demands: version control keeps no such mode.
fn private_copy(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    fs::copy(frozen(name), &path).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
    path
}

#[test]
fn keyrings_of_version_1_open() {
    let dir = tempfile::tempdir().unwrap();
    let wrapped = hex::decode(fs::read_to_string(frozen("wrapped-v1.hex")).unwrap().trim()).unwrap();
    for name in ["keyring-v1.json", "keyring-v1-sealed.json"] {
        let keyring = Keyring::open(&private_copy(dir.path(), name), |_| Ok(phrase())).unwrap();
        assert_eq!(keyring.export(&[NAME]).unwrap(), [key()], "{name}");
        assert_eq!(keyring.unwrap(NAME, CONTEXT, &wrapped).unwrap().as_slice(), PAYLOAD, "{name}");
    }
}

#[test]
fn a_kit_of_version_1_opens() {
    assert_eq!(read_kit(&frozen("kit-v1.age"), &open()).unwrap(), kit());
}

#[test]
fn kits_of_version_2_open() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["kit-v2.age", "kit-v2.sheet"] {
        assert_eq!(read_kit(&frozen(name), &open()).unwrap(), kit_v2(), "{name}");
    }
    let identities =
        read_identities(&private_copy(dir.path(), "identity.txt"), |_| panic!("it has no passphrase")).unwrap();
    assert_eq!(read_kit(&frozen("kit-v2-recipients.age"), &identities).unwrap(), kit_v2());
}

/// Made in a folder of the test, or, for a new version of a format, in the one that `RESEAL_FREEZE` names.
#[test]
fn they_can_be_made_anew() {
    let own = tempfile::tempdir().unwrap();
    let folder = std::env::var_os("RESEAL_FREEZE").map_or(own.path().to_owned(), PathBuf::from);
    let plain = Keyring::create(&folder.join("keyring-v1.json"), None).unwrap();
    plain.import(&[key()]).unwrap();
    let sealed = Keyring::create(&folder.join("keyring-v1-sealed.json"), Some(&phrase())).unwrap();
    sealed.import(&[key()]).unwrap();
    let wrapped = plain.wrap(NAME, CONTEXT, PAYLOAD).unwrap();
    assert_eq!(sealed.unwrap(NAME, CONTEXT, &wrapped).unwrap().as_slice(), PAYLOAD);
    fs::write(folder.join("wrapped-v1.hex"), hex::encode(wrapped) + "\n").unwrap();
    let (path, sheet) = (folder.join("kit-v2.age"), folder.join("kit-v2.sheet"));
    write_kit(&path, &kit_v2(), &KitLock::Passphrase(phrase())).unwrap();
    write_sheet(&sheet, &SealedKit::read(&path).unwrap().sheet("2026-11-24T06:31:47Z").unwrap()).unwrap();
    for path in [path, sheet] {
        assert_eq!(read_kit(&path, &open()).unwrap(), kit_v2());
    }
    // The recipient of identity.txt, which `age-keygen` made.
    let text = fs::read_to_string(frozen("identity.txt")).unwrap();
    let recipient = text.lines().find_map(|line| line.strip_prefix("# public key: ")).unwrap();
    let lock = KitLock::recipients(vec![recipient.parse().unwrap()]).unwrap();
    write_kit(&folder.join("kit-v2-recipients.age"), &kit_v2(), &lock).unwrap();
}
