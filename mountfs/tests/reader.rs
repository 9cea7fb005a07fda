//! The disk reader against models, without FUSE.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use reseal_format::frames::FrameShift;
use reseal_format::geometry::{CLUSTER, CLUSTER_U64};
use reseal_format::manifest::Disk;
use reseal_vault::disk::{DiskReader, Tools};
use reseal_vault::{Class, VaultError, Wait};
use support::faults::{Faulty, Mood};
use support::{Model, Numbers, Vault, disk_bytes, flip, model_seek};

const CACHE: usize = 4 << 20;

fn read(reader: &DiskReader, disk: &Disk, offset: u64, length: usize, wait: Wait) -> Result<Vec<u8>, VaultError> {
    let mut out = vec![0xee; DiskReader::clip(disk, offset, length)];
    reader.read(disk, offset, &mut out, wait, &mut Tools::new()).map(|()| out)
}

#[test]
fn random_reads_equal_the_model_at_every_frame_size() {
    for (seed, shift) in [(11, FrameShift::K16), (12, FrameShift::K32), (13, FrameShift::K64)] {
        let vault = Vault { shift, ..Vault::new() };
        let bytes = disk_bytes(seed, 40 * CLUSTER + 12_345);
        let disk = vault.store_disk("disk-0", &Model::of(&bytes));
        // Small, so that frames leave the cache and come back.
        let reader = DiskReader::new(vault.tenant.clone(), 1 << 20);
        let mut numbers = Numbers(seed);
        for _ in 0..2_000 {
            let offset = usize::try_from(numbers.below(bytes.len() as u64 + 10)).unwrap();
            let length = usize::try_from(numbers.below(3 * CLUSTER_U64)).unwrap();
            let wanted = &bytes[offset.min(bytes.len())..(offset + length).min(bytes.len())];
            assert!(read(&reader, &disk, offset as u64, length, Wait::May).unwrap() == wanted, "{offset}+{length}");
        }
    }
}

#[test]
fn seeks_equal_the_model() {
    let vault = Vault::new();
    let bytes = disk_bytes(21, 100 * CLUSTER + 1);
    let disk = vault.store_disk("disk-0", &Model::of(&bytes));
    let reader = DiskReader::new(vault.tenant.clone(), CACHE);
    for offset in (0..bytes.len() as u64).step_by(CLUSTER / 3) {
        assert_eq!(reader.next_data(&disk, offset).unwrap(), model_seek(&bytes, offset, false), "data from {offset}");
        assert_eq!(
            Some(reader.next_hole(&disk, offset).unwrap()),
            model_seek(&bytes, offset, true),
            "hole from {offset}"
        );
    }
}

#[test]
fn a_stretch_is_what_seeks_say_up_to_its_end() {
    let vault = Vault::new();
    let bytes = disk_bytes(22, 100 * CLUSTER + 1);
    let length = bytes.len() as u64;
    let disk = vault.store_disk("disk-0", &Model::of(&bytes));
    let reader = DiskReader::new(vault.tenant.clone(), CACHE);
    for offset in (0..length).step_by(CLUSTER / 3) {
        let data = reader.next_data(&disk, offset).unwrap().unwrap_or(length);
        let hole = reader.next_hole(&disk, offset).unwrap();
        for end in [offset + 1, offset + 5 * CLUSTER_U64 + 3, length].map(|end| end.min(length)) {
            let expected = if data == offset { (false, hole.min(end)) } else { (true, data.min(end)) };
            assert_eq!(reader.stretch(&disk, offset, end).unwrap(), expected, "{offset} to {end}");
        }
    }
}

#[test]
fn a_huge_sparse_disk_costs_what_it_holds() {
    let vault = Vault::new();
    let length = (16 << 40) + 100;
    let places = [0, 1023, 1024, 5_000_000, length / CLUSTER_U64];
    let clusters: BTreeMap<u64, Vec<u8>> = places.map(|cluster| (cluster, vec![7; CLUSTER])).into();
    let disk = vault.store_disk("disk-0", &Model { length, clusters });
    let reader = DiskReader::new(vault.tenant.clone(), CACHE);
    assert_eq!(read(&reader, &disk, length - 4, 100, Wait::May).unwrap(), [7; 4]);
    assert_eq!(read(&reader, &disk, 1 << 40, 100, Wait::May).unwrap(), [0; 100]);
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(data) = reader.next_data(&disk, at).unwrap() {
        let end = reader.next_hole(&disk, data).unwrap();
        found.push((data / CLUSTER_U64, end));
        if end == length {
            break;
        }
        at = end;
    }
    let ends = [CLUSTER_U64, 1025 * CLUSTER_U64, 5_000_001 * CLUSTER_U64, length];
    assert_eq!(found, [0, 1023, 5_000_000, length / CLUSTER_U64].into_iter().zip(ends).collect::<Vec<_>>());
}

#[test]
fn trying_never_waits_and_finds_what_is_there() {
    let vault = Vault::new();
    let bytes = disk_bytes(31, 20 * CLUSTER);
    let disk = vault.store_disk("disk-0", &Model::of(&bytes));
    let store = Faulty::new(vault.tenant.store().clone());
    let reader = DiskReader::new(vault.tenant_over(store.clone()), 64 << 20);
    store.set(Mood::Hangs);
    let tried = |at: u64| read(&reader, &disk, at, 4096, Wait::MustNot);
    assert!(matches!(tried(0), Err(VaultError::WouldBlock)), "the index is not known");
    store.set(Mood::Answers);
    for at in (0..bytes.len() as u64).step_by(4096) {
        read(&reader, &disk, at, 4096, Wait::May).unwrap();
    }
    store.set(Mood::Hangs);
    let reads = store.reads.load(Ordering::Relaxed);
    for at in (0..bytes.len() as u64).step_by(4096) {
        let start = usize::try_from(at).unwrap();
        assert!(tried(at).unwrap() == bytes[start..start + 4096], "at {at}");
    }
    assert_eq!(store.reads.load(Ordering::Relaxed), reads, "all of it came from the cache");
    store.set(Mood::Answers);
    store.is_cold.store(false, Ordering::Relaxed);
    let whole = DiskReader::new(vault.tenant_over(store), 64 << 20);
    read(&whole, &disk, 0, CLUSTER, Wait::May).unwrap();
    assert!(
        read(&whole, &disk, 0, bytes.len(), Wait::MustNot).unwrap() == bytes,
        "a store that answers at once is read"
    );
}

#[test]
fn a_failing_store_is_unreachable_and_comes_back() {
    let vault = Vault::new();
    let bytes = disk_bytes(41, 8 * CLUSTER);
    let disk = vault.store_disk("disk-0", &Model::of(&bytes));
    let store = Faulty::new(vault.tenant.store().clone());
    let reader = DiskReader::new(vault.tenant_over(store.clone()), CACHE);
    store.set(Mood::Fails);
    let error = read(&reader, &disk, 0, bytes.len(), Wait::May).unwrap_err();
    assert_eq!(error.class(), Class::Unreachable);
    store.set(Mood::Answers);
    assert!(read(&reader, &disk, 0, bytes.len(), Wait::May).unwrap() == bytes);
}

#[test]
fn a_flipped_bit_is_an_error_that_names_the_blob_and_never_data() {
    let vault = Vault::new();
    let bytes = disk_bytes(51, 12 * CLUSTER);
    let disk = vault.store_disk("disk-0", &Model::of(&bytes));
    let pack = vault.packs()[0].clone();
    let whole = std::fs::read(&pack).unwrap();
    let mut numbers = Numbers(52);
    let mut errors = 0;
    for _ in 0..40 {
        let at = usize::try_from(numbers.below(whole.len() as u64)).unwrap();
        flip(&pack, at);
        // A new tenant: the store keeps files open.
        let tenant = vault.tenant_over(std::sync::Arc::new(reseal_store::Local::new(vault.repo())));
        let reader = DiskReader::new(tenant, CACHE);
        for cluster in 0..12 {
            let wanted = &bytes[cluster * CLUSTER..(cluster + 1) * CLUSTER];
            match read(&reader, &disk, (cluster * CLUSTER) as u64, CLUSTER, Wait::May) {
                Ok(got) => assert!(got == wanted, "cluster {cluster} with byte {at} flipped"),
                Err(error) => {
                    errors += 1;
                    assert_eq!(error.class(), Class::Damaged, "{error}");
                    let name = pack.file_name().unwrap().to_str().unwrap();
                    assert!(error.to_string().contains(name), "{error}");
                }
            }
        }
        std::fs::write(&pack, &whole).unwrap();
    }
    assert!(errors >= 30, "{errors} of 40 flipped bits were met");
}
