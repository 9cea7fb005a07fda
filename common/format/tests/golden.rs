//! One object of each kind, made of fixed keys, ids and salts, against committed bytes; and committed frames that must decode.
//!
//! If a test here fails, the format changed: that needs another `FORMAT_VERSION`, and this one must stay readable. Bytes that
//! zstd made are only read, never made again, for another version of zstd may compress to others.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

use reseal_format::frames::{FrameDecoder, FrameEncoder, FrameShift, Frames};
use reseal_format::geometry::CLUSTER;
use reseal_format::ids::{BlobId, Digest, NoteId, PackId, PointId, TenantId, VaultId, VmId};
use reseal_format::index::{BlobRef, IndexNode};
use reseal_format::keys::{DedupSecret, Dek, Kind, Master, Scope};
use reseal_format::manifest::{Definition, Disk, Manifest, Note, Parent, Root, Stats, Tombstone};
use reseal_format::names::{DiskName, TenantName, VmName};
use reseal_format::overlay::{BATCH_HEADER, BatchHeader, BlockKey, CHUNK_PAGES, Head, OverlayKey, PAGE, Record};
use reseal_format::pack::{PackOpener, PackSealer, TRAILER, Trailer};
use reseal_format::tenant::{KmsRef, TenantKeys, TenantRecord, master_payload};
use reseal_format::time::Timestamp;
use reseal_format::vaultfile::VaultFile;
use reseal_format::{FORMAT_VERSION, layout};
use zeroize::Zeroizing;

const CHANGED: &str = "the format changed: bump FORMAT_VERSION and keep reading the old one";

/// N bytes that count up from `start`, so that a field which moved or was cut shows.
fn count<const N: usize>(start: u8) -> [u8; N] {
    std::array::from_fn(|i| start.wrapping_add(u8::try_from(i).unwrap()))
}

fn secret(start: u8) -> Zeroizing<[u8; 32]> {
    Zeroizing::new(count(start))
}

fn scope() -> Scope {
    Scope { vault: VaultId::from_bytes(count(0x00)), tenant: TenantId::from_bytes(count(0x10)) }
}

fn keys() -> TenantKeys {
    TenantKeys::new(scope(), Dek::from_bytes(secret(0x20)), DedupSecret::from_bytes(secret(0x40)))
}

fn tenant() -> TenantName {
    TenantName::new("acme").unwrap()
}

fn vm() -> VmName {
    VmName::new("web 01").unwrap()
}

fn data_pack_id() -> PackId {
    PackId::from_bytes(count(0x80))
}

fn index_pack_id() -> PackId {
    PackId::from_bytes(count(0x90))
}

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn golden(name: &str) -> Vec<u8> {
    std::fs::read(path(name)).unwrap()
}

/// The clusters that the committed frames hold: zeros, text and noise, frame by frame.
fn clusters() -> [(&'static str, FrameShift, Vec<u8>); 3] {
    let text = |n: usize| (0..n).map(|i| b"golden bytes "[i * i / 777 % 13]).collect::<Vec<u8>>();
    let mut noise = vec![0; 16 << 10];
    blake3::Hasher::new().update(b"noise").finalize_xof().fill(&mut noise);
    let mixed = [vec![0; 16 << 10], text(16 << 10), noise, text(16 << 10)].concat();
    let half = [text(32 << 10), vec![0; 32 << 10]].concat();
    [
        ("frames-16k.bin", FrameShift::K16, mixed),
        ("frames-32k.bin", FrameShift::K32, half),
        ("frames-64k.bin", FrameShift::K64, text(CLUSTER)),
    ]
}

fn node() -> IndexNode {
    let place = |ordinal| Some(BlobRef { pack: data_pack_id(), generation: 0, ordinal });
    let elsewhere = Some(BlobRef { pack: PackId::from_bytes(count(0xA0)), generation: 7, ordinal: 16_383 });
    IndexNode::from_children(0, &[place(0), None, place(1), elsewhere])
}

fn pack(kind: Kind, id: PackId, salt: [u8; 32], blobs: Vec<(BlobId, Vec<u8>)>) -> Vec<u8> {
    let mut sealer = PackSealer::new(&keys(), kind, id, salt).unwrap();
    let mut object = Vec::new();
    for (blob, mut content) in blobs {
        sealer.seal(blob, &mut content);
        object.extend(content);
    }
    object.extend(sealer.finish());
    object
}

fn data_pack() -> Vec<u8> {
    let blobs = clusters().into_iter().skip(1);
    let blobs = blobs.map(|(name, _, plain)| (keys().dedup().id_of(&plain), golden(name))).collect();
    pack(Kind::DataPack, data_pack_id(), count(0xB0), blobs)
}

fn index_pack() -> Vec<u8> {
    let id = keys().dedup().id_of(&node().encode());
    pack(Kind::IndexPack, index_pack_id(), count(0xD0), vec![(id, golden("node.zst"))])
}

fn manifest() -> Manifest {
    Manifest {
        vm: vm(),
        vm_id: VmId::from_bytes(count(0x50)),
        number: 2,
        point_id: PointId::from_bytes(count(0x60)),
        created: Timestamp(1_795_501_907_123),
        parent: Some(Parent { number: 1, digest: Digest::of(b"parent") }),
        disks: vec![
            Disk {
                name: DiskName::new("root").unwrap(),
                length: 200_000,
                root: Some(Root { pack: index_pack_id(), generation: 0, ordinal: 0 }),
                used_clusters: 3,
                source: "/dev/vg/root".into(),
                tracking: None,
                claim: None,
            },
            Disk {
                name: DiskName::new("empty").unwrap(),
                length: 0,
                root: None,
                used_clusters: 0,
                source: String::new(),
                tracking: None,
                claim: None,
            },
        ],
        definition: Some(Definition { file_name: "web01.xml".into(), text: "<domain type=\"kvm\"/>\n".into() }),
        stats: Stats { read: 200_000, changed: 196_608, new: 131_072, stored: 18_000, duration_ms: 12 },
        warnings: vec!["root: it was written to".into()],
        locked: None,
    }
}

fn tombstone() -> Tombstone {
    Tombstone {
        vm: vm(),
        vm_id: VmId::from_bytes(count(0x50)),
        number: 1,
        point_id: PointId::from_bytes(count(0x61)),
        digest: Digest::of(b"parent"),
        parent: None,
        reason: "policy".into(),
        created: Timestamp(1_795_501_907_124),
        fenced: false,
    }
}

fn note() -> Note {
    Note {
        note_id: NoteId::from_bytes(count(0x70)),
        vm: vm(),
        vm_id: VmId::from_bytes(count(0x50)),
        number: 2,
        point_id: PointId::from_bytes(count(0x60)),
        created: Timestamp(1_795_501_907_125),
        kind: "boot-verdict".into(),
        content: serde_json::json!({"booted": true, "seconds": 31}),
    }
}

fn master() -> Master {
    Master::from_bytes(secret(0xE0))
}

fn record() -> TenantRecord {
    let kms = KmsRef { kind: "keyring".into(), key: "acme-0a1b2c3d".into() };
    TenantRecord::new(&keys(), &tenant(), &master(), count(0xC0), kms, count::<64>(0x01).to_vec())
}

fn overlay_key() -> OverlayKey {
    OverlayKey::from_bytes(secret(0x11))
}

fn overlay_id() -> [u8; 16] {
    count(0x21)
}

fn overlay_head(generation: u64) -> Head {
    let point = *manifest().point_id.as_bytes();
    Head {
        overlay: overlay_id(),
        generation,
        point,
        disk: 1,
        length: 1 << 40,
        journal: 3,
        sequence: 9,
        link: count(0x31),
    }
}

const OVERLAY_BLOCK: u64 = 1 << 33;
const OVERLAY_COUNTER: u64 = 0x0102_0304_0506;

fn overlay_block() -> Vec<u8> {
    (0..PAGE).map(|i| b"golden bytes "[i * i / 77 % 13]).collect()
}

/// The start of an overlay's file: both heads, a block, and two flushes, the first of two batches.
fn overlay() -> Vec<u8> {
    let (key, id) = (overlay_key(), overlay_id());
    let mut file = [overlay_head(4).seal(&key, &count(0x41)), overlay_head(5).seal(&key, &count(0x42))].concat();
    let mut block = overlay_block();
    let tag = BlockKey::new(&key, &id, &count(0x51)).seal(OVERLAY_COUNTER, OVERLAY_BLOCK, &mut block);
    file.extend(block);
    let (mut link, ahead) = (count(0x31), 3 + CHUNK_PAGES);
    for (nth, (records, first)) in overlay_records(tag).iter().zip([9, 9, 11]).enumerate() {
        let sequence = 9 + nth as u64;
        let header =
            BatchHeader { sequence, first, salt: count(0x51), link, next: 4 + nth as u64, ahead, is_last: nth > 0 };
        let mut encoded = Vec::new();
        records.iter().for_each(|record| record.encode(&mut encoded));
        let (bytes, digest) = header.seal(&key, &id, &encoded);
        file.extend(bytes);
        link = digest;
    }
    // Where the next one would be.
    file.extend([0; PAGE]);
    file
}

fn overlay_records(tag: [u8; 16]) -> [Vec<Record>; 3] {
    let block = Record::Block { block: OVERLAY_BLOCK, page: 2, session: 0, counter: OVERLAY_COUNTER, tag };
    let zeros = Record::Zeros { block: 5, count: 300 };
    [vec![Record::Session { number: 0, salt: count(0x51) }], vec![zeros, block], vec![]]
}

/// Everything that must come out as committed, byte for byte.
fn objects() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("reseal.json", VaultFile::new(scope().vault).encode()),
        ("tenant.json", record().encode()),
        ("payload.bin", master_payload(&scope(), 1, &master()).to_vec()),
        ("node.bin", node().encode()),
        ("data.pack", data_pack()),
        ("index.pack", index_pack()),
        ("manifest.bin", manifest().seal(&keys(), count(0xC1)).unwrap().0),
        ("tombstone.bin", tombstone().seal(&keys(), count(0xC2)).unwrap()),
        ("note.bin", note().seal(&keys(), count(0xC3)).unwrap()),
        ("disk.overlay", overlay()),
    ]
}

#[test]
fn what_is_written_is_what_version_1_wrote() {
    assert_eq!(FORMAT_VERSION, 1, "these are the bytes of version 1; a new version needs its own beside them");
    for (name, bytes) in objects() {
        assert!(bytes == golden(name), "{name}: {CHANGED}");
    }
}

#[test]
fn object_keys_are_those_of_version_1() {
    let keys = [
        layout::VAULT_FILE.to_owned(),
        layout::tenant_record(&TenantName::new(".ä b").unwrap()),
        layout::manifest(&tenant(), &vm(), 12),
        layout::tombstone(&tenant(), &vm(), 12),
        layout::note(&tenant(), &vm(), 12, NoteId::from_bytes(count(0x70))),
        layout::pack(&tenant(), data_pack_id(), 3),
    ];
    let wanted = [
        "reseal.json",
        "tenants/%2E%C3%A4%20b/tenant.json",
        "tenants/acme/vms/web%2001/00000012.manifest",
        "tenants/acme/vms/web%2001/00000012.forgotten",
        "tenants/acme/vms/web%2001/notes/00000012-707172737475767778797a7b7c7d7e7f.note",
        "tenants/acme/packs/80/808182838485868788898a8b8c8d8e8f.3",
    ];
    assert_eq!(keys, wanted, "{CHANGED}");
}

#[test]
fn committed_frames_decode() {
    for (name, shift, plain) in clusters() {
        let encoded = golden(name);
        assert_eq!(Frames::parse(&encoded).unwrap().shift(), shift, "{name}");
        let mut cluster = vec![1; CLUSTER];
        FrameDecoder::new().unwrap().decode(&encoded, &mut cluster).unwrap();
        assert!(cluster == plain, "{name}: {CHANGED}");
    }
}

#[test]
fn committed_objects_open() {
    assert_eq!(VaultFile::decode(&golden("reseal.json")).unwrap().vault_id, scope().vault, "{CHANGED}");
    let record = TenantRecord::decode(&golden("tenant.json")).unwrap();
    let keys = record.unlock(scope().vault, &tenant(), &golden("payload.bin")).unwrap();
    assert_eq!(Manifest::open(&keys, &vm(), 2, &golden("manifest.bin")).unwrap().0, manifest(), "{CHANGED}");
    assert_eq!(Tombstone::open(&keys, &vm(), 1, &golden("tombstone.bin")).unwrap(), tombstone(), "{CHANGED}");
    let id = note().note_id;
    assert_eq!(Note::open(&keys, &vm(), 2, id, &golden("note.bin")).unwrap(), note(), "{CHANGED}");

    let index = open_pack(&keys, &golden("index.pack"));
    let plain = IndexNode::decompress(&index[0].1).unwrap();
    assert!(plain == golden("node.bin") && index[0].0 == keys.dedup().id_of(&plain), "{CHANGED}");
    assert!(IndexNode::decode(&plain, 0).unwrap() == node(), "{CHANGED}");

    let data = open_pack(&keys, &golden("data.pack"));
    assert_eq!(data.len(), 2);
    for ((id, content), (_, _, plain)) in data.iter().zip(clusters().iter().skip(1)) {
        let mut cluster = vec![1; CLUSTER];
        FrameDecoder::new().unwrap().decode(content, &mut cluster).unwrap();
        assert!(cluster == *plain && *id == keys.dedup().id_of(plain), "{CHANGED}");
    }
}

#[test]
fn a_committed_overlay_opens() {
    let (file, key, id) = (golden("disk.overlay"), overlay_key(), overlay_id());
    let pages: Vec<&[u8; PAGE]> = file.chunks_exact(PAGE).map(|page| page.try_into().unwrap()).collect();
    assert_eq!(Head::open(&key, pages[0]).unwrap(), overlay_head(4), "{CHANGED}");
    assert_eq!(Head::open(&key, pages[1]).unwrap(), overlay_head(5), "{CHANGED}");
    let mut found = Vec::new();
    let (mut at, mut link) = (overlay_head(5).journal, overlay_head(5).link);
    for (sequence, first) in [(9, 9), (10, 9), (11, 11)] {
        let batch = pages[usize::try_from(at).unwrap()];
        let (header, length) = BatchHeader::decode(batch.first_chunk::<BATCH_HEADER>().unwrap()).unwrap();
        assert_eq!((header.sequence, header.first, header.link), (sequence, first, link), "{CHANGED}");
        assert_eq!((header.ahead, header.is_last), (3 + CHUNK_PAGES, sequence > 9), "{CHANGED}");
        let (records, digest) = header.open(&key, &id, batch, length).unwrap();
        found.push(records);
        (at, link) = (header.next, digest);
    }
    let Some(Record::Block { tag, .. }) = found[1].last().copied() else { panic!("{CHANGED}") };
    assert_eq!(found, overlay_records(tag), "{CHANGED}");
    let mut plain = vec![0; PAGE];
    let session = BlockKey::new(&key, &id, &count(0x51));
    session.open(OVERLAY_COUNTER, OVERLAY_BLOCK, &tag, pages[2], &mut plain).unwrap();
    assert!(plain == overlay_block(), "{CHANGED}");
}

fn open_pack(keys: &TenantKeys, object: &[u8]) -> Vec<(BlobId, Vec<u8>)> {
    let trailer = Trailer::decode(object.last_chunk::<TRAILER>().unwrap(), object.len() as u64).unwrap();
    let (blobs, tail) = object.split_at(usize::try_from(trailer.blob_bytes).unwrap());
    let (ids, tail) = tail.split_at(trailer.id_table_bytes());
    let opener = PackOpener::new(keys, trailer).unwrap();
    let lengths = opener.open_lengths(tail[..tail.len() - TRAILER].to_vec()).unwrap();
    let ids = opener.open_ids(ids.to_vec()).unwrap();
    let open = |(id, ordinal): (BlobId, u32)| {
        let (start, length) = lengths.place(ordinal).unwrap();
        let start = usize::try_from(start).unwrap();
        let mut sealed = blobs[start..start + length].to_vec();
        (id, opener.open_blob(ordinal, &mut sealed).unwrap().to_vec())
    };
    ids.into_iter().zip(0..).map(open).collect()
}

/// Made in a folder of the test, or, for a new version of the format, in the one that `RESEAL_FREEZE` names.
#[test]
fn they_can_be_made_anew() {
    let own = tempfile::tempdir().unwrap();
    let folder = std::env::var_os("RESEAL_FREEZE").map_or(own.path().to_owned(), PathBuf::from);
    for (name, shift, plain) in clusters() {
        let mut encoded = Vec::new();
        FrameEncoder::new(shift, 1).unwrap().encode(&plain, &mut encoded);
        let mut back = vec![1; CLUSTER];
        FrameDecoder::new().unwrap().decode(&encoded, &mut back).unwrap();
        assert!(back == plain, "{name}");
        std::fs::write(folder.join(name), encoded).unwrap();
    }
    std::fs::write(folder.join("node.zst"), IndexNode::compress(&node().encode()).unwrap()).unwrap();
    for (name, bytes) in objects() {
        std::fs::write(folder.join(name), bytes).unwrap();
    }
}
