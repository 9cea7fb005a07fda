//! Fifty tenants send at once, more than have places to shake hands: none sees an error, each gets its own disk back, and the server stays within its memory.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;

use reseal_tests::random::Random;
use reseal_tests::remote::{Authority, Sites};

const TENANTS: usize = 50;
const DISK: usize = 6 << 20;
/// Most that the server may have resident: its configured memory for windows is 256 MiB and for caches 64 MiB; each session has buffers
/// of its own besides, some MiB.
const MOST_KIB: u64 = 512 << 10;

#[test]
fn fifty_tenants_at_once_get_right_points_within_bounded_memory() {
    let authority = Authority::new();
    let names: Vec<String> = (0..TENANTS).map(|nth| format!("tenant-{nth}")).collect();
    let identities: Vec<_> = names.iter().map(|_| authority.issue(|_| {})).collect();
    let clients = names.iter().zip(&identities);
    let clients: Vec<_> = clients.map(|(name, of)| (of.clone(), name.as_str(), "append", "[\"*\"]")).collect();
    let more = "[limits]\nconnections = 64\nhandshakes = 4\nmemory = \"256M\"\ncache = \"64M\"\n";
    let mut sites = Sites::configured(authority, &clients, more, &|target| {
        for name in &names {
            target.reseal(["tenant", "add", name, "--no-recovery"]).ok();
        }
    });
    let disks: Vec<_> = (0..TENANTS).map(|nth| sites.source.disk(&format!("disk-{nth}"))).collect();
    let sources: Vec<_> = (0..TENANTS)
        .map(|nth| {
            fs::write(&disks[nth], Random::new(100 + nth as u64).bytes(DISK)).unwrap();
            let name = format!("{nth}.reseal");
            let enrolment = sites.enrolment(&name, &identities[nth], &sites.authority, sites.port);
            sites.source.start([
                "--repo",
                enrolment.to_str().unwrap(),
                "--json",
                "backup",
                "vm",
                disks[nth].to_str().unwrap(),
            ])
        })
        .collect();
    for (source, name) in sources.into_iter().zip(&names) {
        let run = source.wait().ok();
        assert_eq!(run.json()["number"], 1, "{name}");
        assert!(!run.stderr.contains("trying again"), "{name}: {run:#?}");
    }
    for (name, disk) in names.iter().zip(&disks) {
        let out = sites.target.path("restored");
        sites.target.reseal_of(name, ["restore", "--disk", "disk-0", "vm@1", out.to_str().unwrap()]).ok();
        assert!(fs::read(&out).unwrap() == fs::read(disk).unwrap(), "{name} is not what was backed up");
        fs::remove_file(out).unwrap();
    }
    let peak = sites.stop().ok().peak_kib;
    println!("the server had {} MiB resident at most", peak >> 10);
    assert!(peak < MOST_KIB, "the server had {} MiB resident", peak >> 10);
}
