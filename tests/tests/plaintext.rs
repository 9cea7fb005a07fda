//! What a disk holds is nowhere in the clear: not in the vault, the state, temporary files, or a home; nor in the memory
//! image that a crash would leave. Only in the target of a restore.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::fs;

use reseal_tests::marker::{MARKER, Marker};
use reseal_tests::model::{DiskFile, ReadDisk};
use reseal_tests::mounting::Mounted;
use reseal_tests::random::Random;
use reseal_tests::site::Site;

#[test]
fn a_marker_is_found_nowhere_but_where_it_was_restored() {
    let site = Site::new();
    let (marker, defined) = (Marker::new(1), Marker::new(2));
    let disk = site.disk("d.raw");
    // Clusters that compress well, badly and not at all, a partial last one, and one marker that crosses a border.
    let mut random = Random::new(3);
    let mut content: Vec<u8> = marker.bytes().iter().copied().cycle().take(300_000).collect();
    for at in (300_000..900_000).step_by(5000) {
        content.extend(random.bytes(4900));
        content.extend(marker.bytes());
        content.resize(at + 5000, 0);
    }
    content[65_536 * 5 - 30..][..MARKER].copy_from_slice(marker.bytes());
    fs::write(&disk, &content).unwrap();
    let definition = site.disk("vm.xml");
    fs::write(&definition, format!("<domain>{}</domain>", defined.text())).unwrap();
    assert_eq!(marker.found_below(&site.path("disks")).len(), 1, "the search finds what is there");

    let said = |run: reseal_tests::process::Run| {
        assert!(!run.said().contains(marker.piece()), "{run:#?}");
        run
    };
    let words = ["backup", "-v", "vm", disk.to_str().unwrap(), "--definition", definition.to_str().unwrap()];
    said(site.reseal(words)).ok();
    fs::write(&disk, [&marker.bytes()[7..], &content].concat()).unwrap();
    said(site.reseal(words)).ok();
    said(site.reseal(["verify", "-v"])).ok();
    said(site.reseal(["list", "-v"])).ok();
    said(site.reseal(["show", "-v", "vm@1"])).ok();
    let mounted = Mounted::new(&site, "mnt", &[]);
    let shown = mounted.disk(&site, "vm", 1, "disk-0");
    let mut read = vec![0; content.len()];
    shown.read(0, &mut read);
    assert!(read == content);
    let text = fs::read_to_string(mounted.point(&site, "vm", 1).join("vm.xml")).unwrap();
    assert!(text.contains(defined.text()));
    drop(shown);
    let elsewhere = |site: &Site| {
        for marker in [&marker, &defined] {
            let folders = ["vault", "state", "keys", "home", "tmp"].map(|folder| site.path(folder));
            for folder in folders.iter().chain([&std::env::temp_dir().join("reseal"), &"/dev/shm".into()]) {
                assert_eq!(marker.found_below(folder), Vec::<String>::new());
            }
        }
    };
    elsewhere(&site);
    said(mounted.umount(&site)).ok();
    let target = site.path("target");
    fs::create_dir(&target).unwrap();
    said(site.restore("vm@1", "disk-0", &target.join("out.raw"))).ok();
    elsewhere(&site);
    assert_eq!(marker.found_below(&target).len(), 1);
    // A backup that was killed leaves unfinished files: they are sealed too.
    let big = site.disk("big.raw");
    let file = DiskFile::create(&big, 64 << 20);
    for at in (0..64u64 << 20).step_by(4096) {
        file.write(at, &[&at.to_le_bytes()[..], marker.bytes()].concat());
    }
    for after in [20, 60, 100] {
        let running = site.start(["backup", "big", big.to_str().unwrap()]);
        std::thread::sleep(std::time::Duration::from_millis(after));
        running.kill();
        elsewhere(&site);
    }
}

/// The process can't be dumped or debugged by this user, and its memory is kept from swap.
#[test]
fn processes_with_keys_are_not_dumpable_and_locked() {
    let site = Site::new();
    let disk = site.disk("d.raw");
    fs::write(&disk, Random::new(4).bytes(200_000)).unwrap();
    site.backup("vm", &disk);
    let mounted = Mounted::new(&site, "mnt", &[]);
    let status = fs::read_to_string(format!("/proc/{}/status", mounted.process())).unwrap();
    let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
    assert_ne!(locked.trim(), "0 kB");
    let limits = fs::read_to_string(format!("/proc/{}/limits", mounted.process())).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
    mounted.umount(&site).ok();
}
