//! Restore points that are held and forgotten, by the real program: what goes, what stays, and that nothing else is hurt.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Barrier;

use reseal_format::hold_note::Hold;
use reseal_tests::library::{self, vm};
use reseal_tests::mounting::Mounted;
use reseal_tests::random::Random;
use reseal_tests::site::Site;
use reseal_vault::{State, VaultError};
use serde_json::{Value, json};

const MIB: usize = 1 << 20;

/// A VM with so many restore points, each with another first MiB; and the disk as each of them has it.
fn site(points: usize) -> (Site, Vec<Vec<u8>>) {
    let site = Site::new();
    let path = site.disk("disk.raw");
    let mut content = Random::new(99).bytes(3 * MIB);
    let mut contents = Vec::new();
    for seed in 0..points as u64 {
        content[..MIB].copy_from_slice(&Random::new(seed).bytes(MIB));
        fs::write(&path, &content).unwrap();
        site.backup("web", &path);
        contents.push(content.clone());
    }
    (site, contents)
}

fn numbers(site: &Site) -> Vec<u64> {
    site.reseal(["list", "--json"]).ok().json_lines().iter().map(|point| point["number"].as_u64().unwrap()).collect()
}

fn object(site: &Site, name: &str) -> PathBuf {
    site.tenant_folder().join("vms/web").join(name)
}

#[track_caller]
fn assert_restores(site: &Site, number: usize, content: &[u8]) {
    let to = site.path(format!("restored-{number}"));
    site.restore(&format!("web@{number}"), "disk-0", &to).ok();
    assert!(fs::read(&to).unwrap() == content, "web@{number} differs");
    fs::remove_file(to).unwrap();
}

#[test]
fn what_is_forgotten_is_gone_and_all_else_stays_as_it_was() {
    let (site, contents) = site(4);
    let before = site.contents();
    // A bare word is no wish to forget.
    site.reseal(["forget", "web"]).fails(2, &["what is to stay?", "--keep-daily"]);
    site.reseal(["forget"]).expect(&[2]);
    site.reseal(["forget", "--all"]).fails(2, &["what is to stay?"]);
    site.reseal(["forget", "web@9"]).fails(1, &["there is no restore point web@9"]);
    // All are found before the first goes.
    site.reseal(["forget", "web@1", "web@9"]).fails(1, &["web@9"]);
    let said = site.reseal(["forget", "web@2", "--dry-run"]).ok().stdout;
    assert!(said.contains("web@2") && said.contains("would be forgotten"), "{said}");
    assert_eq!(site.contents(), before, "nothing was done until now");

    // The first, which has no parent, and one in the middle.
    let said = site.reseal(["forget", "web@1", "web@3", "web@3", "--reason", "customer's wish", "--json"]).ok();
    let lines = said.json_lines();
    assert_eq!(
        lines.iter().map(|line| line["event"].as_str().unwrap()).collect::<Vec<_>>(),
        ["forgotten", "forgotten", "summary"]
    );
    assert_eq!((&lines[2]["forgotten"], &lines[2]["dry_run"]), (&json!(2), &json!(false)));
    assert_eq!(numbers(&site), [2, 4]);
    let tombstone = site.tenant().tombstone(&vm("web"), 3).unwrap();
    assert_eq!(tombstone.reason, "customer's wish");
    site.reseal(["show", "web@3"]).fails(1, &["there is no restore point web@3"]);
    site.reseal(["forget", "web@3"]).fails(1, &["there is no restore point web@3"]);
    site.verify();
    for number in [2, 4] {
        assert_restores(&site, number, &contents[number - 1]);
    }
    let mounted = Mounted::new(&site, "mnt", &[]);
    let shown: Vec<_> = fs::read_dir(site.path("mnt/web")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(shown.len(), 3, "two points and the newest: {shown:?}");
    drop(mounted);
    let after = site.contents();
    assert!(before.iter().all(|(key, bytes)| key.ends_with(".manifest") || after.get(key) == Some(bytes)));
    assert!(!after.keys().any(|key| key.ends_with(".lease")));

    // The newest; then the next one's number is new all the same, and nothing is missed.
    site.reseal(["forget", "web@latest"]).ok();
    assert_eq!(numbers(&site), [2]);
    let path = site.disk("disk.raw");
    site.backup("web", &path);
    assert_eq!(numbers(&site), [2, 5]);
    assert_restores(&site, 5, &contents[3]);
    site.verify();
    // One with all of its VM gone.
    site.reseal(["forget", "web@2", "web@5"]).ok();
    assert_eq!(numbers(&site), Vec::<u64>::new());
    site.reseal(["show", "web@latest"]).expect(&[1]);
    site.backup("web", &path);
    assert_eq!(numbers(&site), [6]);
    site.verify();
    site.reseal(["status"]).ok();
}

#[test]
fn a_policy_says_what_goes_and_why_the_rest_stays_and_a_hold_overrides_it() {
    let (site, contents) = site(5);
    let said = site.reseal(["hold", "web@2", "--reason", "court order 7"]).ok().stdout;
    assert!(said.contains("web@2 is held") && said.contains("--release"), "{said}");
    assert!(site.reseal(["list"]).ok().stdout.lines().any(|line| line.starts_with("web@2 ") && line.ends_with("held")));
    let shown = site.reseal(["show", "web@2", "--json"]).ok().json();
    assert_eq!(shown["held"]["reason"], "court order 7");
    assert!(site.reseal(["show", "web@2"]).ok().stdout.contains(": court order 7"));
    assert_eq!(site.reseal(["show", "web@1", "--json"]).ok().json()["held"], Value::Null);

    let words = ["forget", "web", "--keep-last", "2", "--json"];
    let planned = site.reseal([&words[..], &["--dry-run"]].concat()).ok().json_lines();
    assert_eq!(numbers(&site), [1, 2, 3, 4, 5]);
    let done = site.reseal(words).ok().json_lines();
    let events = |lines: &[Value]| -> Vec<(String, String, Value)> {
        let text = |line: &Value, field: &str| line[field].as_str().unwrap().to_owned();
        let points = lines.iter().filter(|line| line["event"] != "summary");
        points.map(|line| (text(line, "point"), text(line, "event"), line["reasons"].clone())).collect()
    };
    let expected = |gone: &str| {
        [
            ("web@1", gone, json!([])),
            ("web@2", "kept", json!(["held"])),
            ("web@3", gone, json!([])),
            ("web@4", "kept", json!(["last"])),
            ("web@5", "kept", json!(["last"])),
        ]
        .map(|(point, event, reasons)| (point.to_owned(), event.to_owned(), reasons))
    };
    assert_eq!(events(&planned), expected("would_be_forgotten"));
    assert_eq!(events(&done), expected("forgotten"));
    assert_eq!(numbers(&site), [2, 4, 5]);

    // By name it is not forgotten either, and the others that were named are.
    site.reseal(["forget", "web@2", "web@4", "--dry-run"]).fails(1, &["web@2 is held since", "court order 7"]);
    site.reseal(["forget", "web@2", "web@4"]).fails(1, &["web@2 is held since", "reseal hold web@2 --release"]);
    assert_eq!(numbers(&site), [2, 5]);
    // A hold that nobody can read is one.
    let notes = object(&site, "notes");
    let note = fs::read_dir(&notes).unwrap().next().unwrap().unwrap().path();
    let whole = fs::read(&note).unwrap();
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    fs::write(&note, flipped).unwrap();
    site.reseal(["forget", "web@2"]).fails(3, &["notes/00000002-"]);
    site.reseal(["forget", "web", "--keep-last", "1"]).fails(3, &["notes/00000002-"]);
    site.reseal(["list"]).expect(&[3]);
    fs::write(&note, whole).unwrap();
    assert_eq!(numbers(&site), [2, 5]);
    assert_restores(&site, 2, &contents[1]);

    assert!(site.reseal(["hold", "web@2", "--release"]).ok().stdout.contains("is not held any more"));
    assert!(site.reseal(["hold", "web@2", "--release"]).ok().stdout.contains("was not held"));
    site.reseal(["forget", "--all", "--keep-yearly", "1"]).ok();
    assert_eq!(numbers(&site), [5]);
    site.reseal(["hold", "web@2"]).fails(1, &["there is no restore point web@2"]);
    site.verify();
}

/// Puts back what the last step of forgetting took away, as if the process had died before.
fn put_back(site: &Site, name: &str, bytes: &[u8]) {
    fs::write(object(site, name), bytes).unwrap();
}

#[test]
fn forgetting_that_died_is_finished_and_a_tombstone_that_was_made_up_is_damage() {
    let (site, contents) = site(3);
    let manifest = fs::read(object(&site, "00000002.manifest")).unwrap();
    site.reseal(["forget", "web@2"]).ok();
    put_back(&site, "00000002.manifest", &manifest);
    assert_eq!(numbers(&site), [1, 3], "the tombstone counts");
    site.verify();
    let tombstone = fs::read(object(&site, "00000002.forgotten")).unwrap();
    site.reseal(["forget", "web@2"]).ok();
    assert!(!object(&site, "00000002.manifest").exists());
    assert_eq!(fs::read(object(&site, "00000002.forgotten")).unwrap(), tombstone);

    // Another's tombstone, and one of bytes: neither takes a restore point away for good.
    for bytes in [&tombstone[..], b"x"] {
        fs::write(object(&site, "00000003.forgotten"), bytes).unwrap();
        site.reseal(["forget", "web@3"]).fails(3, &["00000003.forgotten"]);
        assert!(object(&site, "00000003.manifest").exists());
        fs::remove_file(object(&site, "00000003.forgotten")).unwrap();
    }
    assert_restores(&site, 3, &contents[2]);
    // Without its tombstone what is gone is missing.
    fs::remove_file(object(&site, "00000002.forgotten")).unwrap();
    site.reseal(["list"]).fails(3, &["it was removed without `reseal forget`"]);
}

#[test]
fn of_two_who_hold_and_forget_at_a_time_one_sees_the_other() {
    let (site, _) = site(24);
    let web = vm("web");
    let outcomes: Vec<_> = (1..=24)
        .map(|number| {
            let (holder, forgetter) = (site.tenant(), site.tenant());
            let point = holder.point(&web, number).unwrap();
            let start = Barrier::new(2);
            let (held, forgotten) = std::thread::scope(|scope| {
                let hold = scope.spawn(|| {
                    start.wait();
                    holder.set_hold(&point.manifest, &Hold { held: true, reason: None })
                });
                let forgetting = forgetter.forgetting().unwrap();
                start.wait();
                // A little later each time, so that they meet at every step.
                std::thread::sleep(std::time::Duration::from_micros(u64::from(number) * 150));
                (hold.join(), forgetting.forget(&point, "race"))
            });
            let state = holder.chain(&web).unwrap().numbers().find(|(n, _)| *n == number).map(|(_, state)| state);
            match (held.unwrap(), forgotten) {
                (Ok(()), Err(VaultError::Held { .. })) => assert_eq!(state, Some(State::Live)),
                (Err(VaultError::NoPoint { .. }), Ok(_)) => assert_eq!(state, Some(State::Forgotten)),
                // Both gave up, and nothing is lost.
                (Err(VaultError::NoPoint { .. }), Err(VaultError::Held { .. })) => assert_eq!(state, Some(State::Live)),
                other => panic!("{other:?}, and the point is {state:?}"),
            }
            state
        })
        .collect();
    assert!(outcomes.contains(&Some(State::Live)) || outcomes.contains(&Some(State::Forgotten)));
    let one = site.tenant();
    let _first = one.forgetting().unwrap();
    assert!(matches!(site.tenant().forgetting(), Err(VaultError::Busy { .. })), "one at a time");
    drop(_first);
    library::backup(&one, &site.heads(&one), "web", Path::new(&site.disk("disk.raw"))).unwrap();
    site.verify();
}

#[test]
fn policies_of_the_tenant_are_applied_by_a_prune() {
    let (site, contents) = site(5);
    let path = site.disk("disk.raw");
    for vm in ["db", "old"] {
        for _ in 0..3 {
            site.backup(vm, &path);
        }
    }
    let of = |vm: &str| -> Vec<u64> {
        let points = site.reseal(["list", vm, "--json"]).ok().json_lines();
        points.iter().map(|point| point["number"].as_u64().unwrap()).collect()
    };
    // Without a policy nothing goes by itself.
    assert_eq!(site.reseal(["prune", "--json"]).ok().json()["forgotten"], json!([]));
    assert!(site.reseal(["tenant", "show", "default"]).ok().stdout.contains("keeps       all"));
    let set = |words: &[&str]| site.reseal([&["tenant", "set", "default", "--json"], words].concat()).ok().json();
    assert_eq!(set(&["--keep-last", "2", "--keep-within", "1s"])["retention"], json!({"last": 2, "within": 1}));
    assert_eq!(set(&["--vm", "db", "--keep-last", "1"])["vm"], "db");
    assert_eq!(set(&["--vm", "old", "--keep-all"])["retention"], Value::Null);
    let shown = site.reseal(["tenant", "show", "default", "--json"]).ok().json();
    assert_eq!(shown["retention"], json!({"last": 2, "within": 1}));
    assert_eq!(shown["vm_retention"], json!({"db": {"last": 1}, "old": null}));
    let text = site.reseal(["tenant", "show", "default"]).ok().stdout;
    assert!(
        text.contains("keeps       --keep-last 2 --keep-within 1s")
            && text.contains("keeps       all")
            && text.contains("for old"),
        "{text}"
    );
    for words in [
        &["--keep-last", "1", "--quota", "5G"][..],
        &["--keep-last", "1", "--objective", "5h"],
        &["--keep-all", "--keep-last", "1"],
        &["--keep-as-tenant"],
        &["--keep-last", "0"],
        &["--vm", "db"],
    ] {
        site.reseal([&["tenant", "set", "default"], words].concat()).expect(&[2]);
    }

    set(&["--keep-last", "2"]);
    site.reseal(["hold", "web@2"]).ok();
    let before = site.contents();
    let planned = site.reseal(["prune", "--dry-run", "--json"]).ok().json();
    assert_eq!(planned["forgotten"], json!(["db@1", "db@2", "web@1", "web@3"]), "{planned}");
    assert!(site.reseal(["prune", "--dry-run"]).ok().stdout.contains("would be forgotten"));
    assert_eq!(site.contents(), before, "nothing was done until now");
    let bytes = site.reseal(["prune", "--no-forget", "--json"]).ok().json();
    assert_eq!((&bytes["freed"], &bytes["forgotten"]), (&json!(0), &json!([])));
    let pruned = site.reseal(["prune", "--json"]).ok().json();
    for (key, what) in [("forgotten", &planned), ("removed", &planned), ("rewritten", &planned)] {
        assert_eq!(pruned[key], what[key], "{key}");
    }
    // The first MiB of two of them, each in a pack that has nothing else; of the first one it lies beside what all need.
    assert!(
        pruned["freed"].as_u64().unwrap() > MIB as u64 && planned["freed"].as_u64().unwrap() > MIB as u64,
        "{pruned}"
    );
    assert_eq!((of("web"), of("db"), of("old")), (vec![2, 4, 5], vec![3], vec![1, 2, 3]));
    assert_eq!(site.tenant().tombstone(&vm("web"), 1).unwrap().reason, "policy of the tenant");
    for number in [2, 4, 5] {
        assert_restores(&site, number, &contents[number - 1]);
    }
    site.verify();

    // As the tenant's again; and other keys keep what was said.
    set(&["--vm", "old", "--keep-as-tenant"]);
    site.reseal(["rekey", "--data", "--no-recovery"]).ok();
    assert_eq!(site.reseal(["prune", "--json"]).ok().json()["forgotten"], json!(["old@1"]));
    set(&["--keep-all"]);
    site.backup("old", &path);
    assert_eq!(site.reseal(["prune", "--json"]).ok().json()["forgotten"], json!([]));
    site.verify();
}
