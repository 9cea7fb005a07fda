//! A reader of an overlay's file, written from `docs/FORMAT.md` with other libraries than the program's.

use std::collections::BTreeMap;

use aes_gcm::Aes256Gcm;
use aes_gcm::aead::{Aead, KeyInit, Payload};
use hkdf::Hkdf;
use sha2::Sha256;

const PAGE: usize = 4096;

/// What an overlay has of its disk.
pub(crate) struct Read {
    /// As the head says: point, place of the disk, its length.
    pub(crate) point: [u8; 16],
    pub(crate) disk: u16,
    pub(crate) length: u64,
    /// Blocks that were written, and those that are zeros.
    pub(crate) blocks: BTreeMap<u64, Vec<u8>>,
    /// Flushes that the journal tells of.
    pub(crate) flushes: usize,
}

fn part<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes[at..at + N].try_into().unwrap()
}

fn number(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(part(bytes, at))
}

fn at(page: u64) -> usize {
    usize::try_from(page).unwrap() * PAGE
}

/// Opens what was sealed under a key of the overlay; `sealed` ends with the tag.
fn open(key: &[u8], salt: &[u8], what: u8, id: &[u8], counter: u64, aad: &[u8], sealed: &[u8]) -> Option<Vec<u8>> {
    let mut derived = [0; 32];
    let info = [&b"reseal/1 overlay"[..], &[what], id].concat();
    Hkdf::<Sha256>::new(Some(salt), key).expand(&info, &mut derived).unwrap();
    let mut nonce = [0; 12];
    nonce[4..].copy_from_slice(&counter.to_be_bytes());
    let cipher = Aes256Gcm::new_from_slice(&derived).unwrap();
    cipher.decrypt(&nonce.into(), Payload { msg: sealed, aad }).ok()
}

/// Reads the file of a disk.
pub(crate) fn read(file: &[u8], key: &[u8], id: &[u8; 16]) -> Read {
    let heads = [&file[..PAGE], &file[PAGE..2 * PAGE]].into_iter().filter_map(|page| {
        assert_eq!((&page[..8], part(page, 8), &page[16..32]), (&b"RSLOVER1"[..], 1u16.to_le_bytes(), &id[..]));
        let opened = open(key, &page[40..72], 1, id, 0, &page[..72], &page[72..176])?;
        Some((number(page, 32), opened))
    });
    let (_, head) = heads.max_by_key(|(generation, _)| *generation).unwrap();
    let mut found = Read {
        point: part(&head, 0),
        disk: u16::from_le_bytes(part(&head, 16)),
        length: number(&head, 24),
        blocks: BTreeMap::new(),
        flushes: 0,
    };
    let (mut page, mut sequence, mut link) = (number(&head, 32), number(&head, 40), part::<32>(&head, 48));
    let mut sessions: Vec<[u8; 32]> = Vec::new();
    loop {
        let batch = &file[at(page)..];
        if batch[..8] != *b"RSLBATCH" || number(batch, 8) != sequence || batch[56..88] != link {
            return found;
        }
        let length = u32::from_le_bytes(part(batch, 104)) as usize;
        let end = 112 + length + 16;
        let records = open(key, &batch[24..56], 2, id, sequence, &batch[..112], &batch[112..end]).unwrap();
        let mut rest = &records[..];
        while let Some((kind, record)) = rest.split_first() {
            let length = [36, 44, 16][usize::from(*kind) - 1];
            rest = &record[length..];
            match kind {
                1 => {
                    let number = u32::from_le_bytes(part(record, 0)) as usize;
                    sessions.truncate(number);
                    assert_eq!(sessions.len(), number);
                    sessions.push(part(record, 4));
                }
                2 => {
                    let (block, page) = (number(record, 0), number(record, 8));
                    let salt = sessions[u32::from_le_bytes(part(record, 16)) as usize];
                    let sealed = [&file[at(page)..at(page + 1)], &record[28..44]].concat();
                    let opened = open(key, &salt, 3, id, number(record, 20), &block.to_le_bytes(), &sealed);
                    // A later flush may have given the page to another block, and then tells of this one again.
                    drop(found.blocks.insert(block, opened.unwrap_or_default()));
                }
                _ => {
                    let (block, count) = (number(record, 0), number(record, 8));
                    found.blocks.extend((block..block + count).map(|block| (block, vec![0; PAGE])));
                }
            }
        }
        found.flushes += usize::from(batch[108]);
        link = *blake3::hash(&batch[..end]).as_bytes();
        (page, sequence) = (number(batch, 88), sequence + 1);
    }
}
