//! Whoever holds the vault changes it: each region of each kind of object flipped, cut, extended, swapped with a sibling,
//! replayed from an older copy, removed. It is reported by name, and never served.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

mod common;

use std::fs;
use std::path::Path;

use common::{Content, Victim};
use reseal_tests::random::{Random, seeds};
use reseal_tests::site::copy_folder;

/// Header of a sealed object, in regions (docs/FORMAT.md); its ciphertext and tag follow.
const SEALED: [(&str, usize, usize); 10] = [
    ("magic", 0, 8),
    ("version", 8, 10),
    ("kind", 10, 11),
    ("reserved", 11, 12),
    ("epoch", 12, 16),
    ("id", 16, 32),
    ("salt", 32, 64),
    ("VM id", 64, 80),
    ("number and generation", 80, 92),
    ("parent and length", 92, 128),
];

/// Trailer of a pack, in regions, counted from the start of the trailer.
const TRAILER: [(&str, usize, usize); 11] = [
    ("magic", 0, 8),
    ("version", 8, 10),
    ("kind", 10, 11),
    ("reserved", 11, 12),
    ("generation", 12, 16),
    ("pack id", 16, 32),
    ("epoch", 32, 36),
    ("count and lengths", 36, 48),
    ("reserved", 48, 56),
    ("salt", 56, 88),
    ("digest and end", 88, 128),
];

/// Flips a bit in each of several bytes of a region, one at a time.
fn flip_region(victim: &Victim, key: &str, region: &str, from: usize, to: usize, random: &mut Random) {
    let whole = victim.read(key);
    for round in 0..3 {
        let at = match round {
            0 => from,
            1 => to - 1,
            _ => from + random.index(to - from),
        };
        let mut damaged = whole.clone();
        damaged[at] ^= 1 << random.below(8);
        victim.write(key, &damaged);
        victim.assert_reported(key, &format!("{region}, byte {at}"));
    }
    victim.write(key, &whole);
}

#[test]
fn flipped_bytes_of_sealed_objects_are_reported() {
    let victim = Victim::new();
    let mut random = Random::new(1);
    for key in victim.sealed() {
        let length = victim.read(&key).len();
        for (region, from, to) in
            SEALED.into_iter().chain([("content", 128, length - 16), ("tag", length - 16, length)])
        {
            flip_region(&victim, &key, region, from, to, &mut random);
        }
    }
    victim.assert_whole();
}

#[test]
fn flipped_bytes_of_packs_are_reported() {
    let victim = Victim::new();
    let mut random = Random::new(2);
    for key in victim.packs() {
        let bytes = victim.read(&key);
        let trailer = bytes.len() - 128;
        let count = usize::try_from(u32::from_le_bytes(bytes[trailer + 36..trailer + 40].try_into().unwrap())).unwrap();
        let lengths = trailer - (count * 4 + 16);
        let ids = lengths - (count * 32 + 16);
        for (region, from, to) in [("blobs", 0, ids), ("id table", ids, lengths), ("length table", lengths, trailer)] {
            flip_region(&victim, &key, region, from, to, &mut random);
        }
        for (region, from, to) in TRAILER {
            flip_region(&victim, &key, region, trailer + from, trailer + to, &mut random);
        }
    }
    victim.assert_whole();
}

#[test]
fn cut_extended_and_removed_objects_are_reported() {
    let victim = Victim::new();
    let mut random = Random::new(3);
    let mut unneeded = 0;
    for key in victim.sealed().into_iter().chain(victim.packs()) {
        let whole = victim.read(&key);
        let length = whole.len();
        for cut in [0, 1, 127, 128, length / 2, length - 1] {
            victim.write(&key, &whole[..cut.min(length - 1)]);
            victim.assert_reported(&key, &format!("cut to {cut} bytes"));
        }
        for more in [1, 128, 5000] {
            victim.write(&key, &[&whole[..], &random.bytes(more)].concat());
            victim.assert_reported(&key, &format!("extended by {more} bytes"));
        }
        victim.write(&key, &vec![0; length]);
        victim.assert_reported(&key, "all zeros");
        fs::remove_file(victim.site.vault.join(&key)).unwrap();
        if key.ends_with(".note") {
            // Nothing says which notes there were; what they say of a point is advice.
            victim.assert_never_wrong();
        } else if victim.is_needed(&key) {
            victim.assert_reported(victim.reported_as(&key), "removed");
        } else {
            // What only the forgotten point needed is garbage.
            victim.assert_refused_or_same("garbage removed");
            unneeded += 1;
        }
        victim.write(&key, &whole);
    }
    assert!((1..=2).contains(&unneeded), "{unneeded} packs were not needed");
    victim.assert_whole();
}

#[test]
fn objects_in_one_anothers_place_are_reported() {
    let victim = Victim::new();
    for keys in [victim.sealed(), victim.packs()] {
        for one in &keys {
            for other in keys.iter().filter(|other| *other != one) {
                let (mine, theirs) = (victim.read(one), victim.read(other));
                victim.write(one, &theirs);
                victim.assert_reported(one, &format!("replaced by {other}"));
                victim.write(other, &mine);
                victim.assert_reported(one, &format!("swapped with {other}"));
                victim.assert_reported(other, &format!("swapped with {one}"));
                victim.write(one, &mine);
                victim.write(other, &theirs);
            }
        }
    }
    victim.assert_whole();
}

/// Another vault of the same owner, in the same keyring, with the same disks: its objects don't open here.
#[test]
fn objects_of_another_vault_or_tenant_are_reported() {
    let victim = Victim::new();
    let stranger = Victim::new();
    for kind in [Victim::sealed, Victim::packs] {
        for (mine, theirs) in kind(&victim).iter().zip(kind(&stranger)) {
            let whole = victim.read(mine);
            victim.write(mine, &stranger.read(&theirs));
            victim.assert_reported(mine, &format!("replaced by another vault's {theirs}"));
            victim.write(mine, &whole);
        }
    }
    victim.assert_whole();
}

/// The two records are JSON and partly in clear: a byte that matters is refused, and one that does not changes nothing.
#[test]
fn damaged_records_are_refused_or_mean_the_same() {
    let victim = Victim::new();
    let mut random = Random::new(4);
    for key in ["reseal.json", "tenants/default/tenant.json"] {
        let whole = victim.read(key);
        for at in (0..whole.len()).step_by(whole.len() / 150 + 1) {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << random.below(7);
            victim.write(key, &damaged);
            victim.assert_refused_or_same(&format!("{key} byte {at}"));
        }
        for cut in [0, 1, whole.len() / 2, whole.len() - 3] {
            victim.write(key, &whole[..cut]);
            victim.site.reseal(["verify"]).fails(3, &[key]);
        }
        victim.write(key, &vec![b'['; 2 << 20]);
        victim.site.reseal(["verify"]).fails(3, &[key]);
        fs::remove_file(victim.site.vault.join(key)).unwrap();
        victim.site.reseal(["verify"]).fails(3, &[key, "missing"]);
        victim.site.reseal(["init", "--no-recovery"]).fails(3, &[key, "missing"]);
        victim.assert_refused_or_same(&format!("{key} removed"));
        victim.write(key, &whole);
    }
    victim.assert_whole();
}

#[test]
fn an_older_tenant_record_is_noticed() {
    let victim = Victim::new();
    // What a rekey will leave behind: this machine has seen a later generation than the vault now has.
    let seen = common::seen_file(&victim.site);
    let text = fs::read_to_string(&seen).unwrap();
    fs::write(&seen, text.replace("\"record_generation\": 1", "\"record_generation\": 2")).unwrap();
    for command in [&["list"][..], &["verify"], &["show", "vm@1"], &["backup", "vm", victim.disk(0)]] {
        victim.site.reseal(command).fails(3, &["tenant record", "rolled back", "--accept-rollback"]);
    }
    victim.site.reseal(["list", "--accept-rollback"]).ok();
    victim.assert_whole();
}

#[test]
fn a_vault_that_is_rolled_back_whole_is_noticed() {
    let victim = Victim::new();
    let older = victim.site.path("older");
    copy_folder(&victim.site.vault, &older);
    let number = victim.site.backup("vm", Path::new(victim.disk(0)))["number"].as_u64().unwrap();
    let newer = victim.site.path("newer");
    fs::rename(&victim.site.vault, &newer).unwrap();
    fs::rename(&older, &victim.site.vault).unwrap();
    let said = ["newest restore point of vm", "rolled back", "--accept-rollback"];
    for command in [&["list"][..], &["list", "vm"], &["show", "vm@latest"], &["backup", "vm", victim.disk(0)]] {
        victim.site.reseal(command).fails(3, &said);
    }
    let verified = victim.site.reseal(["verify"]).expect(&[3]);
    assert!(verified.said().contains("rolled back"), "{verified:#?}");
    victim.site.restore("vm@latest", "disk-0", &victim.site.path("out.raw")).fails(3, &said);
    victim.site.reseal(["list", "--accept-rollback"]).ok();
    victim.assert_whole();
    assert_eq!(victim.site.backup("vm", Path::new(victim.disk(0)))["number"], number);
}

#[test]
fn a_removed_newest_point_is_noticed() {
    let victim = Victim::new();
    let last = victim.site.backup("vm", Path::new(victim.disk(0)))["number"].as_u64().unwrap();
    let key = format!("tenants/default/vms/vm/{last:08}.manifest");
    fs::remove_file(victim.site.vault.join(&key)).unwrap();
    victim.site.reseal(["list"]).fails(3, &["newest restore point of vm"]);
    let verified = victim.site.reseal(["verify"]).expect(&[3]);
    assert!(verified.said().contains("newest restore point of vm"), "{verified:#?}");
    victim.site.reseal(["show", "vm@latest"]).fails(3, &["newest restore point of vm"]);
}

#[test]
fn a_vm_that_vanished_whole_is_noticed() {
    let victim = Victim::new();
    fs::remove_dir_all(victim.site.tenant_folder().join("vms/vm")).unwrap();
    victim.site.reseal(["list"]).fails(3, &["newest restore point of vm"]);
    assert!(victim.site.reseal(["verify"]).expect(&[3]).said().contains("newest restore point of vm"));
    victim.site.reseal(["backup", "vm", victim.disk(0)]).fails(3, &["newest restore point of vm"]);
}

/// A removed point in the middle is a gap without a tombstone; the others are served.
#[test]
fn a_removed_middle_point_hurts_itself_only() {
    let victim = Victim::new();
    let key = "tenants/default/vms/vm/00000001.manifest";
    fs::remove_file(victim.site.vault.join(key)).unwrap();
    victim.assert_reported(key, "removed");
    victim.site.reseal(["show", "vm@1"]).fails(3, &[key, "reseal forget"]);
    assert_eq!(victim.read_point(2), Content::Right);
}

/// Any change anywhere, many times: what comes out is right, or an error.
#[test]
fn random_damage_is_never_served() {
    let victim = Victim::new();
    for seed in seeds(150) {
        let mut random = Random::new(seed);
        let keys = victim.site.objects();
        let key = &keys[random.index(keys.len())];
        let whole = victim.read(key);
        let mut damaged = whole.clone();
        let at = random.index(damaged.len());
        match random.below(4) {
            0 => damaged[at] ^= 1 << random.below(8),
            1 => damaged.truncate(at),
            2 => drop(damaged.splice(at..at, random.bytes(1 + at % 70))),
            _ => {
                let end = (at + 1 + random.index(5000)).min(damaged.len());
                random.fill(&mut damaged[at..end]);
            }
        }
        victim.write(key, &damaged);
        victim.assert_refused_or_same(&format!("seed {seed:#x}, {key}"));
        victim.assert_mount_never_wrong();
        victim.write(key, &whole);
    }
    victim.assert_whole();
}
