//! Keys that are missing, wrong, damaged or open to others; and recovery on a machine that has nothing.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use reseal_kms::{Keyring, Kms};
use reseal_tests::library::LibraryDisk;
use reseal_tests::process::run;
use reseal_tests::random::Random;
use reseal_tests::site::Site;

const CONTENT: usize = 300_000;

/// A site with one point; its disk's content.
fn with_point(site: &Site) -> Vec<u8> {
    let content = Random::new(5).bytes(CONTENT);
    let disk = site.disk("d.raw");
    fs::write(&disk, &content).unwrap();
    site.backup("vm", &disk);
    content
}

fn passphrase(site: &Site, name: &str, text: &str) -> PathBuf {
    let path = site.path(name);
    fs::write(&path, format!("{text}\nsecond line is no part of it\n")).unwrap();
    path
}

/// Every command that needs keys fails like this.
#[track_caller]
fn all_fail(site: &Site, status: i32, said: &[&str]) {
    let disk = site.disk("d.raw");
    for command in [&["list"][..], &["show", "vm@1"], &["verify"], &["backup", "vm", disk.to_str().unwrap()]] {
        site.reseal(command).fails(status, said);
    }
    let restored = site.path("restored.raw");
    site.restore("vm@1", "disk-0", &restored).fails(status, said);
    assert!(!restored.exists(), "a restore without keys made a file");
}

#[test]
fn without_its_keyring_nothing_opens() {
    let site = Site::new();
    with_point(&site);
    let keyring = site.keyring.to_str().unwrap();
    fs::rename(&site.keyring, site.path("away")).unwrap();
    all_fail(&site, 4, &[keyring, "RESEAL_KEYRING", "reseal key import"]);
    assert!(!site.keyring.exists(), "no command makes a keyring by itself");
    fs::rename(site.path("away"), &site.keyring).unwrap();
    site.verify();
}

#[test]
fn the_keyring_of_another_site_opens_nothing() {
    let site = Site::new();
    with_point(&site);
    fs::copy(&Site::new().keyring, &site.keyring).unwrap();
    all_fail(&site, 4, &["is not in the keyring", "reseal key import"]);
}

/// The same name, another key.
#[test]
fn a_wrong_key_of_the_right_name_opens_nothing() {
    let site = Site::new();
    with_point(&site);
    let name = site.tenant().kms().key.clone();
    fs::remove_file(&site.keyring).unwrap();
    Keyring::create(&site.keyring, None).unwrap().create(&name).unwrap();
    all_fail(&site, 3, &["does not open this tenant's record"]);
}

#[test]
fn a_damaged_keyring_is_said_so() {
    let site = Site::new();
    with_point(&site);
    let keyring = site.keyring.to_str().unwrap();
    let whole = fs::read(&site.keyring).unwrap();
    for (nth, cut) in [0, 1, whole.len() / 2, whole.len() - 3].into_iter().enumerate() {
        fs::write(&site.keyring, &whole[..cut]).unwrap();
        let run = site.reseal(["list"]).expect(&[1, 3]);
        assert!(run.stderr.contains(keyring), "cut {nth}: {run:#?}");
    }
    for content in [&b"\x00\xff garbage"[..], b"{}", b"[]", &[b'['; 100_000]] {
        fs::write(&site.keyring, content).unwrap();
        let run = site.reseal(["list"]).expect(&[1, 3]);
        assert!(run.stderr.contains(keyring), "{run:#?}");
    }
    let mut random = Random::new(1);
    for _ in 0..100 {
        let mut damaged = whole.clone();
        let at = random.index(whole.len());
        damaged[at] ^= 1 << random.below(8);
        fs::write(&site.keyring, &damaged).unwrap();
        // A flipped bit may also land where nothing depends on it, such as a date.
        site.reseal(["list"]).expect(&[0, 1, 3, 4]);
    }
    fs::write(&site.keyring, &whole).unwrap();
    site.verify();
}

#[test]
fn a_keyring_that_others_may_read_is_refused() {
    let site = Site::new();
    with_point(&site);
    for mode in [0o640, 0o604, 0o620, 0o601, 0o777] {
        fs::set_permissions(&site.keyring, fs::Permissions::from_mode(mode)).unwrap();
        all_fail(&site, 1, &[site.keyring.to_str().unwrap(), "chmod 600"]);
    }
    fs::set_permissions(&site.keyring, fs::Permissions::from_mode(0o600)).unwrap();
    site.verify();
}

#[test]
fn a_keyring_is_made_for_its_owner_only() {
    let site = Site::new();
    assert_eq!(fs::metadata(&site.keyring).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::metadata(site.keyring.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn a_sealed_keyring_opens_with_its_passphrase_only() {
    let site = Site::bare();
    let right = passphrase(&site, "right", "correct horse");
    let right = right.to_str().unwrap();
    let option = "--keyring-passphrase-file";
    site.reseal(["init", "--no-recovery", option, right]).ok();
    assert!(!fs::read_to_string(&site.keyring).unwrap().contains("default-"), "names of keys are sealed too");
    site.reseal(["list"]).fails(1, &[site.keyring.to_str().unwrap(), "passphrase"]);
    let wrong = passphrase(&site, "wrong", "correct horse ");
    site.reseal(["list", option, wrong.to_str().unwrap()])
        .fails(1, &["wrong passphrase", site.keyring.to_str().unwrap()]);
    site.reseal(["list", option, "/nonexistent"]).fails(1, &["/nonexistent"]);
    site.reseal(["list", option, right]).ok();
    let mut command = site.command("reseal", ["list"]);
    run(command.env("RESEAL_KEYRING_PASSPHRASE_FILE", right)).ok();
}

#[test]
fn vault_and_kit_are_enough_on_a_new_host() {
    let site = Site::bare();
    let secret = passphrase(&site, "secret", "kit passphrase");
    let kit = site.path("kit.age");
    let (secret, kit) = (secret.to_str().unwrap(), kit.to_str().unwrap());
    site.reseal(["init", "--recovery", kit, "--recovery-passphrase-file", secret]).ok();
    let content = with_point(&site);
    assert_eq!(fs::metadata(kit).unwrap().permissions().mode() & 0o777, 0o600);

    let host = site.elsewhere();
    host.reseal(["list"]).fails(4, &["no keyring", "reseal key import"]);
    let option = "--recovery-passphrase-file";
    let wrong = passphrase(&host, "wrong", "another");
    host.reseal(["key", "import", kit, option, wrong.to_str().unwrap()]).fails(1, &["wrong passphrase", kit]);
    assert!(!host.keyring.exists(), "a failed import makes no keyring");
    host.reseal(["key", "import", "/nonexistent.age", option, secret]).fails(4, &["/nonexistent.age", "mounted"]);
    let imported = host.reseal(["key", "import", "--json", kit, option, secret]).ok().json();
    assert_eq!(imported["added"].as_array().unwrap().len(), 1);
    let again = host.reseal(["key", "import", "--json", kit, option, secret]).ok().json();
    assert_eq!((again["added"].as_array().unwrap().len(), again["already"].as_array().unwrap().len()), (0, 1));
    host.verify();
    let disk = LibraryDisk::open(&host.tenant(), "vm", 1, "disk-0").unwrap();
    assert_eq!(disk.all().unwrap(), content);
    // It goes on where the old host ended.
    let source = host.disk("d.raw");
    fs::write(&source, &content).unwrap();
    let next = host.backup("vm", &source);
    assert_eq!((next["number"].as_u64(), next["stats"]["stored"].as_u64()), (Some(2), Some(0)));
    let restored = host.path("restored.raw");
    host.restore("vm@1", "disk-0", &restored).ok();
    assert!(fs::read(restored).unwrap() == content);
}

#[test]
fn a_kit_can_be_written_later_and_a_damaged_one_is_refused() {
    let site = Site::new();
    with_point(&site);
    let secret = passphrase(&site, "secret", "p");
    let kit = site.path("later.age");
    let (secret, path) = (secret.to_str().unwrap(), kit.to_str().unwrap());
    let option = "--recovery-passphrase-file";
    site.reseal(["key", "export", path, option, secret]).ok();
    site.reseal(["key", "export", path, option, secret]).fails(2, &[path, "exists already"]);
    let host = site.elsewhere();
    let whole = fs::read(&kit).unwrap();
    let broken = host.path("broken.age");
    let middle = whole.len() / 2;
    let flipped: Vec<u8> = whole.iter().enumerate().map(|(n, &b)| if n == middle { b ^ 1 } else { b }).collect();
    for damaged in [&whole[..middle], &flipped[..], b"no kit", b""] {
        fs::write(&broken, damaged).unwrap();
        let run = host.reseal(["key", "import", broken.to_str().unwrap(), option, secret]).expect(&[1, 2, 3]);
        assert!(run.stderr.contains("broken.age") && !host.keyring.exists(), "{run:#?}");
    }
    host.reseal(["key", "import", path, option, secret]).ok();
    host.verify();
}

#[test]
fn a_kit_is_not_written_over_a_file_or_into_the_vault() {
    let site = Site::bare();
    let secret = passphrase(&site, "secret", "p");
    let secret = secret.to_str().unwrap();
    let kit = site.path("kit.age");
    fs::write(&kit, "precious").unwrap();
    let option = "--recovery-passphrase-file";
    site.reseal(["init", "--recovery", kit.to_str().unwrap(), option, secret]).fails(2, &["exists already"]);
    let inside = site.vault.join("kit.age");
    site.reseal(["init", "--recovery", inside.to_str().unwrap(), option, secret]).fails(2, &["inside the vault"]);
    site.reseal(["init", "--recovery", "/nonexistent/kit.age", option, secret]).fails(2, &["/nonexistent"]);
    site.reseal(["init", "--recovery", site.path("new.age").to_str().unwrap(), option, "/nonexistent"])
        .fails(2, &["/nonexistent"]);
    assert!(!site.vault.exists() && !site.keyring.exists(), "nothing was made");
    assert_eq!(fs::read(kit).unwrap(), b"precious");
}
