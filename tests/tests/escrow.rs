//! Recovery kits of tenants whatever keeps their keys: what they open when the KMS is gone for good, what they don't, and the
//! sheet on paper.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

mod servers;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use reseal_kms::kit::{KitContents, KitKey, KitLock, read_identities, read_kit, write_kit};
use reseal_kms::{KeyBytes, Passphrase};
use reseal_tests::mounting::Mounted;
use reseal_tests::process::{Run, system};
use reseal_tests::random::Random;
use reseal_tests::site::Site;
use serde_json::{Value, json};

use servers::Config;
use servers::bao::{Bao, shared};

/// Bytes of a test disk.
const DISK: usize = 300_000;

/// What opens the kits of a tenant, in words of the command line: for whoever makes one, and whoever uses it.
struct Opener {
    make: Vec<String>,
    open: Vec<String>,
}

impl Opener {
    fn passphrase(site: &Site) -> Opener {
        let file = site.path("passphrase");
        fs::write(&file, "correct horse\n").unwrap();
        let words = vec!["--recovery-passphrase-file".to_owned(), text(&file)];
        Opener { make: words.clone(), open: words }
    }

    /// A key pair that `age-keygen` makes.
    fn identity(site: &Site, name: &str) -> Opener {
        let file = site.path(name);
        system("age-keygen", &["-o", &text(&file)]);
        let recipient = system("age-keygen", &["-y", &text(&file)]).trim().to_owned();
        let make = vec!["--recovery-recipient".to_owned(), recipient];
        Opener { make, open: vec!["--recovery-identity".to_owned(), text(&file)] }
    }

    fn key(&self) -> KitKey {
        let file = Path::new(&self.open[1]);
        match self.open[0].as_str() {
            "--recovery-identity" => read_identities(file, |_| panic!("it has no passphrase")).unwrap(),
            _ => KitKey::Passphrase(Passphrase::new(fs::read_to_string(file).unwrap().trim().to_owned()).unwrap()),
        }
    }
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Runs `reseal` for a tenant.
fn of<A: AsRef<OsStr>>(site: &Site, tenant: &str, words: &[A], more: &[String]) -> Run {
    let before = ["--tenant", tenant].map(|word| OsStr::new(word).to_owned());
    let words = words.iter().map(|word| word.as_ref().to_owned());
    site.reseal(before.into_iter().chain(words).chain(more.iter().map(|word| OsStr::new(word).to_owned())))
}

fn backup(site: &Site, tenant: &str, seed: u64, more: &[String]) -> Vec<u8> {
    let path = site.disk(&format!("{seed}.raw"));
    let content = Random::new(seed).bytes(DISK);
    fs::write(&path, &content).unwrap();
    of(site, tenant, &["backup", "vm", path.to_str().unwrap()], more).ok();
    content
}

/// Everything of the tenant authenticates, and its newest point is this.
#[track_caller]
fn assert_opens(site: &Site, tenant: &str, content: &[u8], more: &[String]) {
    of(site, tenant, &["list"], more).ok();
    of(site, tenant, &["show", "vm@latest"], more).ok();
    of(site, tenant, &["verify"], more).ok();
    assert_restores(site, tenant, content, more);
    let words: Vec<&str> = ["--tenant", tenant].into_iter().chain(more.iter().map(String::as_str)).collect();
    let mounted = Mounted::new(site, "mnt", &words);
    assert!(fs::read(mounted.path.join("vm/latest/disk-0.raw")).unwrap() == content);
    mounted.umount(site);
}

/// Its newest point is this.
#[track_caller]
fn assert_restores(site: &Site, tenant: &str, content: &[u8], more: &[String]) {
    let out = site.path("restored.raw");
    of(site, tenant, &["restore", "--disk", "disk-0", "vm@latest", out.to_str().unwrap()], more).ok();
    assert!(fs::read(&out).unwrap() == content, "the disk of {tenant} differs");
    fs::remove_file(&out).unwrap();
}

/// Every command that reads fails like this.
#[track_caller]
fn all_fail(site: &Site, tenant: &str, more: &[String], status: i32, said: &[&str]) {
    let (folder, out) = (site.path("not-mounted"), site.path("never.raw"));
    fs::create_dir_all(&folder).unwrap();
    for words in [
        &["list"][..],
        &["show", "vm@1"],
        &["verify"],
        &["restore", "--disk", "disk-0", "vm@1", out.to_str().unwrap()],
        &["mount", folder.to_str().unwrap()],
    ] {
        of(site, tenant, words, more).fails(status, said);
    }
    assert!(!out.exists());
}

/// The objects that differ from before, by key.
fn changed(site: &Site, before: &BTreeMap<String, Vec<u8>>) -> Vec<String> {
    let now = site.contents();
    now.keys().chain(before.keys()).filter(|key| now.get(*key) != before.get(*key)).cloned().collect()
}

/// The words that name a kit to commands that read.
fn with_kit(kit: &Path, opener: &Opener) -> Vec<String> {
    [&["--recovery-kit".to_owned(), text(kit)], &opener.open[..]].concat()
}

/// The kit with something else in it, sealed to a passphrase.
fn altered(kit: &Path, opener: &Opener, site: &Site, alter: impl Fn(&mut KitContents)) -> (PathBuf, Opener) {
    let mut contents = read_kit(kit, &opener.key()).unwrap();
    alter(&mut contents);
    let (path, opener) = (site.path("altered.age"), Opener::passphrase(site));
    let _ = fs::remove_file(&path);
    let KitKey::Passphrase(passphrase) = opener.key() else { panic!("it is one") };
    write_kit(&path, &contents, &KitLock::Passphrase(passphrase)).unwrap();
    (path, opener)
}

#[test]
fn tenants_outlive_their_kms_by_their_kits() {
    let mut bao = Bao::start();
    let mut site = Site::bare();
    let config = Config::default().bao("site-bao", &bao).tenant("acme = \"site-bao\"");
    config.tenant("globex = \"site-bao\"").write(&mut site);
    let usb = site.path("usb");
    fs::create_dir(&usb).unwrap();
    let (acme, globex) = (usb.join("acme.age"), usb.join("globex.age"));
    let (passphrase, identity) = (Opener::passphrase(&site), Opener::identity(&site, "offline.txt"));
    let made = of(&site, "acme", &["init", "--json", "--recovery", &text(&acme)], &passphrase.make).ok().json();
    assert_eq!(
        (&made["kms"], &made["keyring"], &made["recovery_kit"]),
        (&json!("site-bao"), &json!(null), &json!(acme))
    );
    // No passphrase is asked for where there are recipients.
    site.reseal(
        [&["tenant", "add", "globex", "--recovery", &text(&globex)].map(str::to_owned)[..], &identity.make].concat(),
    )
    .ok();
    assert!(!site.keyring.exists());
    for (kit, opener) in [(&acme, &passphrase), (&globex, &identity)] {
        let contents = read_kit(kit, &opener.key()).unwrap();
        assert!(contents.master.is_some() && contents.keys.is_empty() && contents.kms == "vault", "{contents:?}");
    }
    let contents = [backup(&site, "acme", 1, &[]), backup(&site, "globex", 2, &[])];

    bao.kill();
    for ((tenant, kit, opener), content) in
        [("acme", &acme, &passphrase), ("globex", &globex, &identity)].into_iter().zip(&contents)
    {
        // A machine that has nothing but vault and kit, and one that asks for the KMS in vain.
        let host = site.elsewhere();
        all_fail(&host, tenant, &[], 1, &["\"vault\"", "--kms-config"]);
        all_fail(&site, tenant, &[], 4, &[tenant, "can't be reached"]);
        let read = with_kit(kit, opener);
        let before = site.contents();
        assert_opens(&host, tenant, content, &read);
        assert_restores(&site, tenant, content, &read);
        assert_eq!(changed(&site, &before), [""; 0]);
        assert!(!host.keyring.exists());
        of(&site, tenant, &["tenant", "show", tenant], &read).ok();
        let newer = backup(&site, tenant, 3, &read);
        assert_restores(&host, tenant, &newer, &read);

        // The configuration still gives it the KMS that is lost: nobody is moved without being told so.
        let import = ["key", "import", "--json", &text(kit)].map(str::to_owned);
        let before = site.contents();
        site.reseal([&import[..], &opener.open].concat())
            .fails(4, &[tenant, "nothing was changed", "--to-kms keyring"]);
        assert_eq!(changed(&site, &before), [""; 0]);
        let import = [&import[..], &["--to-kms".to_owned(), "keyring".to_owned()], &opener.open].concat();
        let told = site.reseal(&import).ok().json();
        let record = format!("tenants/{tenant}/tenant.json");
        assert_eq!(changed(&site, &before), [record.clone(), record.clone()]);
        assert_eq!((&told["objects"], &told["generation"]), (&json!([record]), &json!(2)));
        let line = format!("{tenant} = \"keyring\"");
        assert_eq!((&told["config"], &told["old_kind"]), (&json!(line), &json!("vault")));
        let again = site.reseal(import.iter().filter(|word| *word != "--json")).ok();
        assert!(again.stdout.contains("nothing was changed") && again.stdout.contains(&line), "{again:#?}");
        all_fail(&site, tenant, &[], 1, &[tenant, "\"keyring\"", "--kms-config"]);

        let file = site.path("kms.toml");
        let entry = format!("{tenant} = \"site-bao\"");
        fs::write(&file, fs::read_to_string(&file).unwrap().replace(&entry, &line)).unwrap();
        let newest = backup(&site, tenant, 4, &[]);
        assert_restores(&site, tenant, &newest, &[]);
        // The kit opens it as before.
        assert_restores(&host, tenant, &newest, &read);
        of(&site, tenant, &["rekey", "--kek"], &[]).ok();
        assert_restores(&site, tenant, &newest, &[]);
        assert_restores(&host, tenant, &newest, &read);
    }
}

/// `rekey` keeps the master, so a kit from before opens the tenant after it, wherever its key is.
#[test]
fn a_kit_outlives_rotations_and_moves() {
    let mut site = Site::bare();
    let config = Config::default().bao("bao", shared());
    config.write(&mut site);
    let (kit, opener) = (site.path("kit.age"), Opener::identity(&site, "offline.txt"));
    of(&site, "acme", &["init", "--recovery", &text(&kit)], &opener.make).ok();
    let content = backup(&site, "acme", 1, &[]);
    let read = with_kit(&kit, &opener);

    let import = [&["key", "import", "--json", &text(&kit)].map(str::to_owned)[..], &opener.open].concat();
    // The key in it still opens the record: it is brought back, and the vault stays as it is.
    let host = site.elsewhere();
    let before = site.contents();
    let told = host.reseal(&import).ok().json();
    assert_eq!((told["added"].as_array().unwrap().len(), &told["objects"]), (1, &json!([])));
    assert_eq!(changed(&site, &before), [""; 0]);
    assert_opens(&host, "acme", &content, &[]);

    // Rotated: with a new kit on the way, which has the new key, and without.
    let newer = site.path("newer.age");
    let rotated = of(&site, "acme", &["rekey", "--kek", "--json", "--recovery", &text(&newer)], &opener.make).ok();
    assert_eq!(rotated.json()["recovery_kit"], json!(newer));
    let host = site.elsewhere();
    assert_opens(&host, "acme", &content, &read);
    let told = host.reseal(["key", "import", "--json", &text(&newer), &opener.open[0], &opener.open[1]]).ok().json();
    assert_eq!(told["objects"], json!([]));
    let rotated = of(&site, "acme", &["rekey", "--kek"], &[]).ok();
    assert!(rotated.stdout.contains("kits        open the tenant still") && rotated.stderr.is_empty(), "{rotated:#?}");
    let host = site.elsewhere();
    assert_opens(&host, "acme", &content, &read);
    // No kit has this key: the master is wrapped under a new one.
    let told = host.reseal(&import).ok().json();
    assert_eq!((told["objects"].as_array().unwrap().len(), &told["kms"]), (1, &json!("keyring")));
    assert_opens(&host, "acme", &content, &[]);
    of(&site, "acme", &["list"], &[]).fails(4, &["is not in the keyring"]);
    site.reseal(&import).ok();
    assert_opens(&site, "acme", &content, &[]);

    let moved = site.path("moved.age");
    let words = ["rekey", "--to-kms", "bao", "--recovery", &text(&moved)];
    of(&site, "acme", &words, &opener.make).ok();
    config_for(&mut site, "acme = \"bao\"");
    for kit in [&kit, &newer, &moved] {
        assert_opens(&site.elsewhere(), "acme", &content, &with_kit(kit, &opener));
    }
    assert!(read_kit(&moved, &opener.key()).unwrap().keys.is_empty());
    assert_opens(&site, "acme", &content, &[]);
    // The KMS is there: whoever imports all the same changes nothing.
    let before = site.contents();
    let told = site.reseal(&import).ok().json();
    assert_eq!((&told["objects"], &told["kms"], changed(&site, &before)), (&json!([]), &json!("bao"), Vec::new()));
    // A new kit by an old one, from a machine that has nothing else.
    let (last, other) = (site.path("last.age"), Opener::passphrase(&site));
    let host = site.elsewhere();
    let words = ["key", "export", &text(&last), "--recovery-recipient", &opener.make[1]];
    of(&host, "acme", &words, &read).ok();
    assert_opens(&host, "acme", &content, &with_kit(&last, &opener));
    let from_kms = site.path("from-kms.age");
    of(&site, "acme", &["key", "export", &text(&from_kms)], &other.make).ok();
    assert_opens(&host, "acme", &content, &with_kit(&from_kms, &other));
}

/// The tenants of the configuration that the site has.
fn config_for(site: &mut Site, line: &str) {
    let file = site.path("kms.toml");
    fs::write(&file, fs::read_to_string(&file).unwrap() + line + "\n").unwrap();
}

#[test]
fn a_kit_opens_its_own_tenant_and_no_other() {
    let site = Site::bare();
    let (kit, opener) = (site.path("kit.age"), Opener::identity(&site, "offline.txt"));
    of(&site, "default", &["init", "--recovery", &text(&kit)], &opener.make).ok();
    let content = backup(&site, "default", 1, &[]);
    site.reseal(["tenant", "add", "other", "--no-recovery"]).ok();
    backup(&site, "other", 2, &[]);
    let read = with_kit(&kit, &opener);
    all_fail(&site, "other", &read, 1, &[kit.to_str().unwrap(), "of tenant default", "tenant other", "made 2"]);
    let another = Site::new();
    backup(&another, "default", 1, &[]);
    all_fail(&another, "default", &read, 1, &["of tenant default in the vault", "made 2"]);

    let import = [&["key", "import", &text(&kit)].map(str::to_owned)[..], &opener.open].concat();
    another.reseal(&import).fails(1, &["of tenant default in the vault", "made 2"]);
    let nobody = Site::bare();
    of(&nobody, "somebody", &["init", "--no-recovery"], &[]).ok();
    nobody.reseal(&import).fails(1, &["kit.age is of tenant default", "no such tenant", "--repo"]);

    // What a kit has to say after `rekey --data`, which makes a new master.
    let (old, by) = altered(&kit, &opener, &site, |kit| {
        kit.master = Some(KeyBytes::copy_from(&[7; 32]));
        kit.keys.clear();
        kit.made = "2026-01-02T03:04:05Z".into();
    });
    let said = [old.to_str().unwrap(), "2026-01-02T03:04:05Z", "is older", "generation 1", "rekey --data"];
    all_fail(&site, "default", &with_kit(&old, &by), 3, &said);
    let before = site.contents();
    site.reseal([&["key", "import", &text(&old)].map(str::to_owned)[..], &by.open].concat()).fails(3, &said);
    assert_eq!(changed(&site, &before), [""; 0]);
    // A record that was put back opens with the kit, but this machine has seen the newer one.
    let record = site.tenant_folder().join("tenant.json");
    let old_record = fs::read(&record).unwrap();
    site.reseal(["rekey", "--kek"]).ok();
    let new_record = fs::read(&record).unwrap();
    fs::write(&record, &old_record).unwrap();
    all_fail(&site, "default", &read, 3, &["rolled back"]);
    // Another generation written over it authenticates with neither.
    let forged = String::from_utf8(old_record).unwrap().replace("\"generation\": 1", "\"generation\": 9");
    fs::write(&record, forged).unwrap();
    all_fail(&site.elsewhere(), "default", &read, 3, &["generation 9"]);
    fs::write(&record, new_record).unwrap();
    assert_opens(&site, "default", &content, &read);

    // Who changes keys is told that a kit is of no use for that.
    for words in
        [&["rekey", "--kek"][..], &["tenant", "erase", "default", "--yes", "default"], &["init", "--no-recovery"]]
    {
        of(&site, "default", words, &read).fails(2, &["--recovery-kit", "reseal key import"]);
    }
    // Somebody else's identity, the wrong way to open it, and none.
    let stranger = Opener::identity(&site, "stranger.txt");
    all_fail(&site, "default", &with_kit(&kit, &stranger), 1, &["other age recipients"]);
    all_fail(&site, "default", &with_kit(&kit, &by), 2, &["--recovery-identity"]);
    all_fail(&site, "default", &with_kit(&old, &opener), 2, &["leave out --recovery-identity"]);
    all_fail(&site, "default", &with_kit(&site.path("none.age"), &opener), 4, &["none.age", "mounted"]);
}

#[test]
fn a_kit_of_an_erased_tenant_opens_nothing() {
    let site = Site::bare();
    let (kit, opener) = (site.path("kit.age"), Opener::passphrase(&site));
    of(&site, "default", &["init", "--recovery", &text(&kit)], &opener.make).ok();
    let content = backup(&site, "default", 1, &[]);
    let (read, record) = (with_kit(&kit, &opener), site.tenant_folder().join("tenant.json"));
    let copy = fs::read(&record).unwrap();
    let erased = site.reseal(["tenant", "erase", "default", "--yes", "default"]).ok();
    assert!(erased.stdout.contains("recovery kits"), "{erased:#?}");
    for host in [&site, &site.elsewhere()] {
        all_fail(host, "default", &read, 3, &["was erased"]);
        host.reseal([&["key", "import", &text(&kit)].map(str::to_owned)[..], &opener.open].concat())
            .fails(3, &["was erased"]);
    }
    // With a copy of the record, as the documentation says, it does.
    fs::write(&record, copy).unwrap();
    assert_opens(&site.elsewhere(), "default", &content, &read);
}

#[test]
fn recipients_are_refused_before_anything_is_made() {
    let site = Site::bare();
    let good = Opener::identity(&site, "offline.txt").make;
    let kit = site.path("kit.age");
    let list = site.path("recipients");
    fs::write(&list, format!("# the safe\n{}\nage1wrong\n", good[1])).unwrap();
    let secret = fs::read_to_string(site.path("offline.txt")).unwrap().lines().last().unwrap().to_owned();
    let recipient = "--recovery-recipient";
    let bad = [
        (vec![recipient, "age1wrong"], vec!["age1wrong"]),
        (vec![recipient, &good[1], recipient, "ssh-ed25519 AAAA"], vec!["ssh-ed25519 AAAA"]),
        (vec![recipient, &secret], vec!["age-keygen -y"]),
        (vec!["--recovery-recipients-file", list.to_str().unwrap()], vec!["recipients: line 3", "age1wrong"]),
        (vec!["--recovery-recipients-file", "/nonexistent"], vec!["/nonexistent"]),
    ];
    let refused = |words: &[&str]| {
        for (recipients, said) in &bad {
            let run = site.reseal([words, recipients].concat()).fails(2, said);
            assert!(!run.said().contains(&secret[20..]), "{run:#?}");
        }
        assert!(!kit.exists());
    };
    let path = text(&kit);
    refused(&["init", "--recovery", &path]);
    assert!(!site.vault.exists() && !site.keyring.exists(), "nothing was made");
    site.reseal(["init", "--no-recovery", recipient, &good[1]]).fails(2, &["--recovery FILE"]);
    site.reseal(["init", recipient, &good[1]]).fails(2, &["--recovery"]);
    site.reseal(["init", "--no-recovery"]).ok();
    let before = site.contents();
    refused(&["tenant", "add", "other", "--recovery", &path]);
    refused(&["rekey", "--kek", "--recovery", &path]);
    refused(&["key", "export", &path]);
    site.reseal(["rekey", "--kek", recipient, &good[1]]).fails(2, &["--recovery FILE"]);
    assert_eq!(changed(&site, &before), [""; 0]);
    // Several of both kinds: each opens it.
    let second = Opener::identity(&site, "second.txt");
    fs::write(&list, format!("# the safe\n\n{}\n", second.make[1])).unwrap();
    site.reseal(["key", "export", &path, recipient, &good[1], "--recovery-recipients-file", list.to_str().unwrap()])
        .ok();
    for identity in ["offline.txt", "second.txt"] {
        let identity = text(&site.path(identity));
        site.reseal(["list", "--recovery-kit", &path, "--recovery-identity", &identity]).ok();
    }
    // Like the keyring, an identity that others may read is refused.
    system("chmod", &["644", &text(&site.path("second.txt"))]);
    let identity = text(&site.path("second.txt"));
    site.reseal(["list", "--recovery-kit", &path, "--recovery-identity", &identity])
        .fails(1, &["second.txt", "chmod 600"]);
}

#[test]
fn a_sheet_of_paper_opens_a_tenant_and_names_what_was_typed_wrong() {
    let site = Site::bare();
    let (kit, opener) = (site.path("kit.age"), Opener::passphrase(&site));
    of(&site, "default", &["init", "--recovery", &text(&kit)], &opener.make).ok();
    let content = backup(&site, "default", 1, &[]);
    let sheet = site.path("sheet.txt");
    // Nobody is asked for a passphrase.
    site.reseal(["key", "print", &text(&kit), "-o", &text(&sheet)]).ok();
    site.reseal(["key", "print", &text(&kit), "-o", &text(&sheet)]).fails(2, &["sheet.txt", "exists already"]);
    site.reseal(["key", "print", &text(&kit), "-o", &text(&site.vault.join("sheet"))]).fails(2, &["inside the vault"]);
    site.reseal(["key", "print", &text(&site.disk("1.raw"))]).fails(2, &["is no recovery kit"]);
    let printed = fs::read_to_string(&sheet).unwrap();
    let shown = site.reseal(["key", "print", &text(&kit)]).ok().stdout;
    let body = |text: &str| text[text.find("-----BEGIN").unwrap()..].trim_end().to_owned();
    assert_eq!(body(&shown), body(&printed));
    assert_eq!(
        body(site.reseal(["key", "print", "--json", &text(&kit)]).ok().json()["text"].as_str().unwrap()),
        body(&printed)
    );
    let told = site.reseal(["key", "print", "--json", &text(&kit), "-o", &text(&site.path("two"))]).ok().json();
    assert_eq!(told["sheet"], json!(site.path("two")));

    let host = site.elsewhere();
    assert_opens(&host, "default", &content, &with_kit(&sheet, &opener));
    let typed = site.path("typed.txt");
    fs::write(&typed, body(&printed).replace(' ', "  ").replace('\n', "\r\n\r\n")).unwrap();
    let import = [&["key", "import", "--json", &text(&typed)].map(str::to_owned)[..], &opener.open].concat();
    assert_eq!(host.reseal(&import).ok().json()["added"].as_array().unwrap().len(), 1);
    assert_opens(&host, "default", &content, &[]);

    let lines: Vec<String> = printed.lines().map(str::to_owned).collect();
    let is_numbered = |line: &str| line.split_once(':').is_some_and(|(number, _)| number.trim().parse::<u32>().is_ok());
    let numbered: Vec<usize> = (0..lines.len()).filter(|&nth| is_numbered(&lines[nth])).collect();
    assert!(numbered.len() > 15, "{printed}");
    for &nth in &numbered {
        let mut wrong = lines.clone();
        let at = 10 + nth % 50;
        let at = if &wrong[nth][at..=at] == " " { at + 1 } else { at };
        let other = if &wrong[nth][at..=at] == "x" { "y" } else { "x" };
        wrong[nth].replace_range(at..=at, other);
        fs::write(&typed, wrong.join("\n")).unwrap();
        let number = lines[nth].split(':').next().unwrap().trim();
        let said = ["typed.txt", &format!("line {number} does not match its check")];
        site.elsewhere().reseal(&import).fails(3, &said);
        of(&host, "default", &["list"], &with_kit(&typed, &opener)).fails(3, &said);
    }
}

/// What earlier versions wrote: keys of a keyring, and no master. Sealed here by the real age.
#[test]
fn a_kit_of_version_1_brings_its_key_and_no_more() {
    let site = Site::bare();
    let (kit, opener) = (site.path("kit.age"), Opener::identity(&site, "offline.txt"));
    of(&site, "default", &["init", "--recovery", &text(&kit)], &opener.make).ok();
    let content = backup(&site, "default", 1, &[]);
    let identity = opener.open[1].clone();
    let mut kit_json: Value = serde_json::from_str(&system("age", &["-d", "-i", &identity, &text(&kit)])).unwrap();
    kit_json["version"] = json!(1);
    kit_json.as_object_mut().unwrap().remove("master");
    let (plain, old) = (site.path("tmp/kit.json"), site.path("v1.age"));
    fs::write(&plain, kit_json.to_string()).unwrap();
    system("age", &["-r", &opener.make[1], "-o", &text(&old), &text(&plain)]);

    all_fail(&site, "default", &with_kit(&old, &opener), 1, &["v1.age", "version 1", "reseal key import"]);
    let import = ["key", "import", &text(&old), &opener.open[0], &identity].map(str::to_owned);
    let host = site.elsewhere();
    // With the vault at hand, and without it as ever.
    host.reseal(&import).ok();
    assert_opens(&host, "default", &content, &[]);
    let host = site.elsewhere();
    reseal_tests::process::run(host.command("reseal", &import).env_remove("RESEAL_REPO")).ok();
    assert_opens(&host, "default", &content, &[]);
    site.reseal(["rekey", "--kek"]).ok();
    let host = site.elsewhere();
    host.reseal(&import).fails(1, &["version 1", "rotated since"]);
    assert!(!host.keyring.exists());

    // A kit without such a key needs the vault.
    let (bare, by) = altered(&kit, &opener, &site, |kit| kit.keys.clear());
    let mut command = host.command("reseal", ["key", "import", &text(&bare), &by.open[0], &by.open[1]]);
    reseal_tests::process::run(command.env_remove("RESEAL_REPO")).fails(2, &["--repo", "--recovery-kit"]);
    assert!(!host.keyring.exists());
}
