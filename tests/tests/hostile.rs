//! A vault that somebody else filled: unknown names, folders for files and files for folders, links, pipes, huge sizes.
//! No command panics, hangs or follows; what was right stays readable, or is refused with a line that says why.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::Victim;
use reseal_tests::mounting::Mounted;
use reseal_tests::process::system;
use reseal_tests::random::{Random, seeds};
use reseal_tests::site::{Site, copy_folder};

/// Names that look like something, or like nothing.
const NAMES: [&str; 22] = [
    "..%2F..%2Fetc",
    "%2E%2E",
    "%",
    "%zz",
    "%77eb",
    "%00",
    "a\nb",
    ".hidden",
    "-rf",
    "00000005.manifest",
    "99999999.manifest",
    "00000000.manifest",
    "99999999.forgotten",
    "00000002.forgotten",
    "00000002-00000000000000000000000000000000.note",
    "00000000000000000000000000000000.0",
    "00000000000000000000000000000000.4294967295",
    "00000000000000000000000000000000.99999999999999999999",
    "tenant.json",
    "reseal.json",
    "vms",
    "ÿÿÿÿ",
];

/// A folder and every one below it, in a fixed order.
fn folders(folder: &Path) -> Vec<PathBuf> {
    let mut below: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    below.sort();
    let below = below.into_iter().filter(|path| path.is_dir() && !path.is_symlink());
    [folder.to_owned()].into_iter().chain(below.flat_map(|path| folders(&path))).collect()
}

/// Every command that reads, in a bounded time; none panics. Whether all of them succeeded.
fn all_commands(site: &Site, disk: &str, how: &str) -> bool {
    let out = site.path("out.raw");
    let out_text = out.to_str().unwrap();
    let mut well = true;
    for command in [
        &["list"][..],
        &["list", "vm"],
        &["list", "--json"],
        &["show", "vm@latest"],
        &["show", "vm@99999999"],
        &["verify"],
        &["verify", "vm"],
        &["verify", "vm@1"],
        &["backup", "vm", disk],
        &["restore", "vm@1", out_text],
        &["key", "export", out_text, "--recovery-passphrase-file", "/nonexistent"],
    ] {
        let began = Instant::now();
        let run = site.reseal(command);
        let bounded = began.elapsed() < Duration::from_secs(20);
        let statuses: &[i32] = if command[0] == "key" { &[1, 2, 3, 4] } else { &[0, 1, 3, 4] };
        let ended = run.status.is_some_and(|status| statuses.contains(&status));
        assert!(bounded && ended, "{how}: {run:#?}");
        assert!(run.status == Some(0) || !run.said().is_empty(), "{how}: {run:#?}");
        assert!(!run.said().contains("panicked"), "{how}: {run:#?}");
        well &= run.status == Some(0) || command[0] == "key" || command[1..] == ["vm@99999999"];
        let _ = fs::remove_file(&out);
    }
    well
}

/// Goes through all of a mount that can be listed, and reads what can be opened.
fn walk(folder: &Path, depth: u32) {
    assert!(depth < 6, "{} is too deep", folder.display());
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let Ok(data) = entry.metadata() else { continue };
        if data.is_dir() {
            walk(&entry.path(), depth + 1);
        } else if data.is_file() {
            let _ = fs::read(entry.path());
        }
    }
}

fn check_mount(site: &Site) {
    match Mounted::try_new(site, "mnt", &["--io-timeout", "5"]) {
        Ok(mounted) => {
            walk(&mounted.path, 0);
            mounted.umount(site).ok();
        }
        Err(run) => assert!(!run.stderr.is_empty() && run.status.is_some_and(|status| status < 5), "{run:#?}"),
    }
}

/// Runs all commands on a copy of the vault that was changed.
fn with_changed(victim: &Victim, how: &str, change: impl FnOnce(&Path)) -> bool {
    let mut site = Site::bare();
    fs::copy(&victim.site.keyring, site.path("keyring.json")).unwrap();
    site.keyring = site.path("keyring.json");
    copy_folder(&victim.site.vault, &site.vault);
    change(&site.vault);
    let well = all_commands(&site, victim.disk(0), how);
    check_mount(&site);
    well
}

#[test]
fn garbage_of_any_name_in_any_folder_is_survived() {
    let victim = Victim::new();
    let mut random = Random::new(1);
    for (nth, folder) in folders(&victim.site.vault).iter().enumerate() {
        let below = folder.strip_prefix(&victim.site.vault).unwrap();
        with_changed(&victim, &format!("garbage in {}", below.display()), |vault| {
            for (n, name) in NAMES.iter().enumerate().filter(|(n, _)| (n + nth) % 2 == 0) {
                let path = vault.join(below).join(name);
                if !path.exists() {
                    fs::write(path, random.bytes(n * 37)).unwrap();
                }
            }
        });
    }
}

#[test]
fn folders_and_links_for_files_are_survived() {
    let victim = Victim::new();
    let outside = victim.site.path("outside");
    fs::write(&outside, "a file of somebody else").unwrap();
    for key in victim.site.objects() {
        let mut random = Random::new(2);
        type Change<'a> = (&'a str, Box<dyn Fn(&Path) + 'a>);
        let changes: [Change; 4] = [
            ("a folder", Box::new(|path| fs::create_dir(path).unwrap())),
            ("a link to nothing", Box::new(|path| symlink("/nonexistent", path).unwrap())),
            ("a link to itself", Box::new(|path| symlink(path, path).unwrap())),
            ("a link outside", Box::new(|path| symlink(&outside, path).unwrap())),
        ];
        let (name, change) = &changes[random.index(4)];
        let more = &changes[(random.index(4) + key.len()) % 4];
        for (name, change) in [(name, change), (&more.0, &more.1)] {
            let well = with_changed(&victim, &format!("{name} for {key}"), |vault| {
                fs::remove_file(vault.join(&key)).unwrap();
                change(&vault.join(&key));
            });
            assert!(!well || key.ends_with(".note") || key.contains("/packs/"), "{name} for {key} went unseen");
        }
    }
    assert_eq!(fs::read_to_string(outside).unwrap(), "a file of somebody else");
}

/// A pipe would block whoever opens it, and a device has no end.
#[test]
fn pipes_and_devices_for_files_never_hang() {
    let victim = Victim::new();
    for key in ["reseal.json", "tenants/default/tenant.json", "tenants/default/vms/vm/00000002.manifest"] {
        for kind in ["pipe", "zero"] {
            with_changed(&victim, &format!("a {kind} for {key}"), |vault| {
                let path = vault.join(key);
                fs::remove_file(&path).unwrap();
                match kind {
                    "pipe" => drop(system("mkfifo", &[path.to_str().unwrap()])),
                    _ => symlink("/dev/zero", path).unwrap(),
                }
            });
        }
    }
    let pack = victim.site.packs(1)[0].clone();
    with_changed(&victim, "a pipe for a pack", |vault| {
        fs::remove_file(vault.join(&pack)).unwrap();
        system("mkfifo", &[vault.join(&pack).to_str().unwrap()]);
    });
}

#[test]
fn files_for_folders_are_survived() {
    let victim = Victim::new();
    for folder in folders(&victim.site.vault).into_iter().skip(1) {
        let below = folder.strip_prefix(&victim.site.vault).unwrap();
        with_changed(&victim, &format!("a file for {}", below.display()), |vault| {
            fs::remove_dir_all(vault.join(below)).unwrap();
            fs::write(vault.join(below), "x").unwrap();
        });
    }
}

/// Sparse files of terabytes under names that are read: none is read whole.
#[test]
fn huge_objects_are_refused_without_memory() {
    let victim = Victim::new();
    let keys = ["reseal.json", "tenants/default/tenant.json", "tenants/default/vms/vm/00000002.manifest"];
    let packs = [victim.site.packs(1)[0].clone(), victim.site.packs(2)[0].clone()];
    for key in keys.iter().copied().chain(packs.iter().map(String::as_str)) {
        with_changed(&victim, &format!("a huge {key}"), |vault| {
            fs::File::options().write(true).open(vault.join(key)).unwrap().set_len(4 << 40).unwrap();
        });
    }
}

/// A listing of very many names takes time in proportion, and no more.
#[test]
fn very_many_names_are_survived() {
    let victim = Victim::new();
    with_changed(&victim, "twenty thousand names", |vault| {
        let tenant = vault.join("tenants/default");
        for n in 0..20_000 {
            let shelf = tenant.join(format!("packs/{:02x}", n % 256));
            fs::create_dir_all(&shelf).unwrap();
            fs::write(shelf.join(format!("{:02x}{n:030x}.0", n % 256)), b"x").unwrap();
        }
        for n in 0..2000 {
            fs::create_dir(tenant.join(format!("vms/vm-{n}"))).unwrap();
        }
    });
}

/// A whole tree of random names and contents where a vault should be.
#[test]
fn random_trees_are_no_vaults_and_survived() {
    for seed in seeds(20) {
        let site = Site::new();
        let mut random = Random::new(seed);
        let disk = site.disk("d.raw");
        fs::write(&disk, random.bytes(100_000)).unwrap();
        site.backup("vm", &disk);
        for _ in 0..30 {
            let all = folders(&site.vault);
            let path = all[random.index(all.len())].join(NAMES[random.index(NAMES.len())]);
            if path.exists() || path.is_symlink() {
                continue;
            }
            let length = random.index(500);
            match random.below(4) {
                0 => fs::create_dir(path).unwrap(),
                1 => symlink(NAMES[random.index(NAMES.len())], path).unwrap(),
                _ => fs::write(path, random.bytes(length)).unwrap(),
            }
        }
        all_commands(&site, disk.to_str().unwrap(), &format!("seed {seed:#x}"));
        check_mount(&site);
    }
}
