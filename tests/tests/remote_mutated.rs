//! Whole sessions of a client that appends, and of one that reads, changed at random: messages lost, doubled, exchanged, cut, a bit
//! turned. Whatever comes of them, the server goes on, what was there stays, and nothing that it made is not whole.
#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use reseal_proto::wire::{
    Begin, Commit, Data, Definition, Disk, DiskEnd, FromSource, FromTarget, Hello, ListPoints, ListVms, Offer, Show,
    Shown, Task, Tracking, VERSION,
};
use reseal_tests::random::{Random, seeds};
use reseal_tests::remote::{Authority, Sites};

const CLUSTER: usize = 65_536;
/// Clusters of an offer.
const COUNT: usize = 4;

/// A session that makes a point of two disks, as a client writes it who waits for no answer.
fn session(vm: &str, random: &mut Random) -> Vec<Vec<u8>> {
    let mut messages = vec![
        FromSource::Hello(Hello { version: VERSION, software: "changed".into() }),
        FromSource::Begin(Begin { vm: vm.into(), resume: None }),
    ];
    for name in ["one", "two"] {
        let tracking = Tracking { method: "bitmap".into(), id: "a".into(), scope: "b".into() };
        messages.push(FromSource::Disk(Disk {
            name: name.into(),
            length: (3 * COUNT * CLUSTER) as u64 - 100,
            source: "a disk".into(),
            tracking: Some(tracking),
            said: None,
        }));
        for sequence in 0..3 {
            let clusters: Vec<Vec<u8>> = (0..COUNT).map(|_| random.bytes(CLUSTER)).collect();
            // The last cluster ends with zeros: there the disk is at its end.
            let clusters: Vec<Vec<u8>> = clusters
                .into_iter()
                .enumerate()
                .map(|(nth, mut cluster)| {
                    if sequence == 2 && nth + 1 == COUNT {
                        cluster[CLUSTER - 100..].fill(0);
                    }
                    cluster
                })
                .collect();
            let hashes = clusters.iter().map(|cluster| Some(*blake3::hash(cluster).as_bytes())).collect();
            messages.push(FromSource::Offer(Offer {
                sequence,
                first: sequence * COUNT as u64,
                count: COUNT as u64,
                task: Task::Read,
                clusters: hashes,
            }));
            let frames = clusters.iter().map(|cluster| [&[16, 0xff, 0xff], &cluster[..]].concat()).collect();
            messages.push(FromSource::Data(Data { sequence, frames }));
        }
        messages.push(FromSource::DiskEnd(DiskEnd { offers: 3 }));
    }
    messages.push(FromSource::Close);
    let definition = Some(Definition { file_name: "vm.xml".into(), text: "<vm/>".into() });
    messages.push(FromSource::Commit(Commit { duration_ms: 5, definition, warnings: vec!["none".into()] }));
    messages.iter().map(FromSource::encode).collect()
}

/// Changes a session in one to three places.
fn change(messages: &mut Vec<Vec<u8>>, random: &mut Random) {
    for _ in 0..=random.index(3) {
        if messages.is_empty() {
            return;
        }
        let (at, other) = (random.index(messages.len()), random.index(messages.len()));
        match random.index(8) {
            0 => drop(messages.remove(at)),
            1 => messages.insert(other, messages[at].clone()),
            2 => messages.swap(at, other),
            3 => {
                let length = random.index(messages[at].len());
                messages[at].truncate(length);
            }
            4 => messages[at].extend(random.bytes(5)),
            // In the head of a message, where its numbers are, as often as anywhere.
            5 | 6 => {
                let within = messages[at].len().min(64);
                let byte = random.index(within.max(1));
                if let Some(byte) = messages[at].get_mut(byte) {
                    *byte ^= 1 << random.index(8);
                }
            }
            _ => {
                let byte = random.index(messages[at].len().max(1));
                if let Some(byte) = messages[at].get_mut(byte) {
                    *byte ^= 1 << random.index(8);
                }
            }
        }
    }
}

#[test]
fn sessions_that_are_changed_at_random_harm_nothing() {
    let sites = Sites::new();
    let disk = sites.source.disk("disk");
    fs::write(&disk, Random::new(1).bytes(5 * CLUSTER)).unwrap();
    sites.source.reseal(sites.words(sites.port, "good", &[disk.to_str().unwrap()])).ok();
    let (mut made, mut refused) = (BTreeSet::new(), 0);
    for seed in seeds(120) {
        let mut random = Random::new(seed);
        let mut messages = session("vm", &mut random);
        // One in ten is not changed, so that it is known that those make a point.
        let changed = seed % 10 != 0;
        if changed {
            change(&mut messages, &mut random);
        }
        let mut peer = sites.connect(&sites.client);
        for message in &messages {
            peer.write(message);
        }
        peer.end();
        let mut committed = None;
        while let Some(answer) = peer.hear() {
            if let FromTarget::Committed(point) = answer {
                committed = Some(point.number);
            }
        }
        match committed {
            Some(number) => assert!(made.insert(number), "{number} was made twice, seed {seed:#x}"),
            None => {
                assert!(changed, "a session that is right made nothing, seed {seed:#x}");
                refused += 1;
            }
        }
    }
    assert!(made.len() > 12 && refused > 60, "{made:?} {refused}");
    // What was acknowledged is there, nothing else is but what a lost answer may have left, and all of it is whole.
    let listed = sites.target.reseal(["list", "--json", "vm"]).ok().json_lines();
    let numbers: BTreeSet<_> =
        listed.iter().map(|point| u32::try_from(point["number"].as_u64().unwrap()).unwrap()).collect();
    assert!(made.is_subset(&numbers), "{made:?} {numbers:?}");
    sites.target.verify();
    let out = sites.target.path("good");
    sites.target.restore("good@1", "disk-0", &out).ok();
    assert!(fs::read(out).unwrap() == fs::read(&disk).unwrap());
    sites.source.reseal(sites.words(sites.port, "good", &[disk.to_str().unwrap()])).ok();
}

/// What one who reads asks, as a client writes it who waits for no answer.
fn questions() -> Vec<Vec<u8>> {
    let vm = || "good".to_owned();
    let mut messages = vec![FromSource::Hello(Hello { version: VERSION, software: "changed".into() })];
    messages.push(FromSource::ListVms(ListVms { after: None }));
    messages.push(FromSource::ListPoints(ListPoints { vm: vm(), after: 0 }));
    messages.extend([1, 2, 1].map(|number| FromSource::Show(Show { vm: vm(), number })));
    messages.push(FromSource::ListVms(ListVms { after: Some(vm()) }));
    messages.iter().map(FromSource::encode).collect()
}

#[test]
fn questions_that_are_changed_at_random_harm_nothing() {
    let authority = Authority::new();
    let (source, reader) = (authority.issue(|_| {}), authority.issue(|_| {}));
    let clients = [(source, "append", "[\"*\"]"), (reader.clone(), "restore", "[\"*\"]")];
    let sites = Sites::with(authority, &clients);
    let disk = sites.source.disk("disk");
    fs::write(&disk, Random::new(1).bytes(5 * CLUSTER)).unwrap();
    sites.source.reseal(sites.words(sites.port, "good", &[disk.to_str().unwrap()])).ok();
    let before = sites.target.contents();
    let ask = |messages: &[Vec<u8>]| {
        let mut peer = sites.connect(&reader);
        messages.iter().for_each(|message| peer.write(message));
        peer.end();
        std::iter::from_fn(|| peer.hear()).collect::<Vec<_>>()
    };
    let right = ask(&questions());
    assert_eq!(right.len(), 7, "{right:?}");
    let (mut ended, mut shown) = (0, 0);
    for seed in seeds(150) {
        let mut random = Random::new(seed);
        let mut messages = questions();
        change(&mut messages, &mut random);
        for answer in ask(&messages) {
            match answer {
                FromTarget::Trouble(_) => ended += 1,
                // One that is shown is the one that there is.
                FromTarget::Shown(Shown::Manifest(_)) => {
                    assert!(right.contains(&answer), "{answer:?}, seed {seed:#x}");
                    shown += 1;
                }
                _ => {}
            }
        }
    }
    assert!(ended > 20 && shown > 50, "{ended} {shown}");
    assert_eq!(ask(&questions())[1..], right[1..]);
    // Whoever only asks changes nothing. Leases come and go, and so do files that they are made from.
    let lasts = |objects: BTreeMap<String, Vec<u8>>| -> BTreeMap<_, _> {
        objects.into_iter().filter(|(key, _)| !key.contains("/leases/") && !key.starts_with("tmp/")).collect()
    };
    let (before, after) = (lasts(before), lasts(sites.target.contents()));
    assert!(after == before, "{:?}, before {:?}", after.keys(), before.keys());
}
