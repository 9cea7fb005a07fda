//! The first bytes of an empty qcow2 image with LUKS inside, for a key that lives only as long as the snapshot.
//!
//! QEMU could make it, but measures for seconds how many iterations a passphrase needs, and the guest stands still
//! meanwhile. The passphrase is 256 random bits, so a few iterations do.
//!
//! Formats: QEMU's docs/interop/qcow2.txt, and the LUKS1 On-Disk Format Specification 1.2.3. All numbers are
//! big-endian.
//!
//! ```text
//! cluster 0        header, extensions
//!         1        refcount table: one block
//!         2        refcount block: as many ones as there are clusters here
//!         3 … 34   LUKS header: 592 bytes, then eight areas of key material, of which the first is in use
//!        35 …      L1 table: all zero
//! ```

use std::num::NonZeroU32;

use aws_lc_rs::cipher::{AES_256, EncryptingKey, UnboundCipherKey};
use aws_lc_rs::pbkdf2::{PBKDF2_HMAC_SHA256, derive};
use sha2::{Digest, Sha256};
use zeroize::Zeroizing;

use super::QemuError;

const CLUSTER: usize = 64 << 10;
const REFCOUNT_TABLE: usize = CLUSTER;
const REFCOUNT_BLOCK: usize = 2 * CLUSTER;
const LUKS: usize = 3 * CLUSTER;
/// Where the payload would begin in a LUKS device, and so the length of what QEMU keeps of it in a qcow2 image.
const LUKS_LENGTH: usize = 4040 * SECTOR;
const L1_TABLE: usize = LUKS + LUKS_LENGTH.next_multiple_of(CLUSTER);
/// Bytes of disk for each entry of the L1 table: a cluster of L2 entries.
const PER_L1_ENTRY: u64 = (CLUSTER as u64 / 8) * CLUSTER as u64;
/// QEMU's limit for the L1 table, in entries.
const MAX_L1: u64 = (32 << 20) / 8;

const SECTOR: usize = 512;
/// Two AES-256 keys: XTS.
const KEY: usize = 64;
/// Pieces that the key is split into.
const STRIPES: usize = 4000;
const MATERIAL: usize = (KEY * STRIPES).next_multiple_of(SECTOR);
/// Sectors from one area of key material to the next, the first after 4096 bytes.
const FIRST_SLOT: usize = 8;
const SLOT_SECTORS: usize = 504;
const SLOTS: usize = 8;
/// The least that cryptsetup takes.
const ITERATIONS: NonZeroU32 = NonZeroU32::new(1000).unwrap();

/// What follows the passphrase of 256 bits in hexadecimal.
pub(super) const PASSPHRASE: usize = 64;

/// The image of a disk of `length` bytes: its first bytes, and its length. The rest is zeros.
pub(super) fn image(length: u64, passphrase: &[u8; PASSPHRASE]) -> Result<(Vec<u8>, u64), QemuError> {
    let entries = length.div_ceil(PER_L1_ENTRY).max(1);
    if entries > MAX_L1 {
        return Err(QemuError::Unusable(format!("a disk of {length} bytes is longer than a qcow2 image can hold")));
    }
    let end = (L1_TABLE as u64 + entries * 8).next_multiple_of(CLUSTER as u64);
    let mut image = vec![0; L1_TABLE];
    header(&mut image, length, entries);
    put(&mut image, REFCOUNT_TABLE, &(REFCOUNT_BLOCK as u64).to_be_bytes());
    let clusters = usize::try_from(end / CLUSTER as u64).unwrap_or(usize::MAX);
    // With the longest L1 table there are some 550; the block has room for 32,768.
    for count in image[REFCOUNT_BLOCK..LUKS].chunks_exact_mut(2).take(clusters) {
        count.copy_from_slice(&1u16.to_be_bytes());
    }
    luks(&mut image[LUKS..LUKS + LUKS_LENGTH], passphrase)?;
    Ok((image, end))
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

fn header(image: &mut [u8], length: u64, entries: u64) {
    let (version, cluster_bits, luks_method, table_clusters) = (3u32, 16u32, 2u32, 1u32);
    let (refcount_order, header_length) = (4u32, 104u32);
    put(image, 0, b"QFI\xfb");
    put(image, 4, &version.to_be_bytes());
    put(image, 20, &cluster_bits.to_be_bytes());
    put(image, 24, &length.to_be_bytes());
    put(image, 32, &luks_method.to_be_bytes());
    // Bounded by MAX_L1.
    put(image, 36, &u32::try_from(entries).unwrap_or(u32::MAX).to_be_bytes());
    put(image, 40, &(L1_TABLE as u64).to_be_bytes());
    put(image, 48, &(REFCOUNT_TABLE as u64).to_be_bytes());
    put(image, 56, &table_clusters.to_be_bytes());
    put(image, 96, &refcount_order.to_be_bytes());
    put(image, 100, &header_length.to_be_bytes());
    // The extension that says where the LUKS header is; zeros end the extensions.
    put(image, 104, &0x0537_be77_u32.to_be_bytes());
    put(image, 108, &16u32.to_be_bytes());
    put(image, 112, &(LUKS as u64).to_be_bytes());
    put(image, 120, &(LUKS_LENGTH as u64).to_be_bytes());
}

fn random(bytes: &mut [u8]) -> Result<(), QemuError> {
    getrandom::fill(bytes).map_err(QemuError::random)
}

fn stretch(passphrase: &[u8], salt: &[u8], out: &mut [u8]) {
    derive(PBKDF2_HMAC_SHA256, ITERATIONS, salt, passphrase, out);
}

fn luks(area: &mut [u8], passphrase: &[u8; PASSPHRASE]) -> Result<(), QemuError> {
    let mut master = Zeroizing::new([0; KEY]);
    random(&mut *master)?;
    let (mut master_salt, mut salt, mut uuid) = ([0; 32], [0; 32], [0; 16]);
    random(&mut master_salt)?;
    random(&mut salt)?;
    random(&mut uuid)?;
    let mut digest = [0; 20];
    stretch(&*master, &master_salt, &mut digest);
    let number = |value: usize| u32::try_from(value).unwrap_or(u32::MAX).to_be_bytes();
    put(area, 0, b"LUKS\xba\xbe\x00\x01");
    put(area, 8, b"aes");
    put(area, 40, b"xts-plain64");
    put(area, 72, b"sha256");
    put(area, 104, &number(LUKS_LENGTH / SECTOR));
    put(area, 108, &number(KEY));
    put(area, 112, &digest);
    put(area, 132, &master_salt);
    put(area, 164, &ITERATIONS.get().to_be_bytes());
    put(area, 168, uuid_text(uuid).as_bytes());
    for slot in 0..SLOTS {
        let at = 208 + 48 * slot;
        let state: u32 = if slot == 0 { 0x00ac_71f3 } else { 0x0000_dead };
        put(area, at, &state.to_be_bytes());
        put(area, at + 40, &number(FIRST_SLOT + slot * SLOT_SECTORS));
        put(area, at + 44, &number(STRIPES));
    }
    put(area, 212, &ITERATIONS.get().to_be_bytes());
    put(area, 216, &salt);
    let mut material = split(&master)?;
    let mut slot_key = Zeroizing::new([0; KEY]);
    stretch(passphrase, &salt, &mut *slot_key);
    encrypt(&mut material, &slot_key)?;
    put(area, FIRST_SLOT * SECTOR, &material);
    Ok(())
}

fn uuid_text(uuid: [u8; 16]) -> String {
    let text = hex::encode(uuid);
    [&text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..]].join("-")
}

/// The anti-forensic splitter of LUKS1: all pieces are needed to get the key back.
fn split(key: &[u8; KEY]) -> Result<Zeroizing<Vec<u8>>, QemuError> {
    let mut material = Zeroizing::new(vec![0; MATERIAL]);
    let last = KEY * (STRIPES - 1);
    random(&mut material[..last])?;
    let mut state = Zeroizing::new([0; KEY]);
    for piece in material[..last].chunks_exact(KEY) {
        state.iter_mut().zip(piece).for_each(|(state, piece)| *state ^= piece);
        for (nth, block) in (0u32..).zip(state.chunks_exact_mut(32)) {
            let hashed = Sha256::new().chain_update(nth.to_be_bytes()).chain_update(&*block).finalize();
            block.copy_from_slice(&hashed);
        }
    }
    for (at, byte) in material[last..last + KEY].iter_mut().enumerate() {
        *byte = state[at] ^ key[at];
    }
    Ok(material)
}

/// AES-256-XTS (IEEE 1619) of sectors that are numbered from 0.
fn encrypt(sectors: &mut [u8], key: &[u8; KEY]) -> Result<(), QemuError> {
    let failed = |_| QemuError::Unusable("AES-256 is not available".into());
    let cipher = |key: &[u8]| UnboundCipherKey::new(&AES_256, key).and_then(EncryptingKey::ecb).map_err(failed);
    let (data_key, tweak_key) = (cipher(&key[..KEY / 2])?, cipher(&key[KEY / 2..])?);
    for (number, sector) in (0u128..).zip(sectors.chunks_exact_mut(SECTOR)) {
        let mut first = number.to_le_bytes();
        tweak_key.encrypt(&mut first).map_err(failed)?;
        let mask = |sector: &mut [u8]| {
            let mut tweak = u128::from_le_bytes(first);
            for block in sector.chunks_exact_mut(16) {
                block.iter_mut().zip(tweak.to_le_bytes()).for_each(|(byte, mask)| *byte ^= mask);
                // Times x, modulo x^128 + x^7 + x^2 + x + 1.
                tweak = (tweak << 1) ^ if tweak >> 127 == 1 { 0x87 } else { 0 };
            }
        };
        mask(sector);
        data_key.encrypt(sector).map_err(failed)?;
        mask(sector);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn xts_gives_the_standard_vector() {
        // IEEE 1619-2007, vector 10 but for its sector: XTS-AES-256, data unit 0xff.
        let text = |digits: &str| hex::decode(digits).unwrap();
        let mut key = [0; KEY];
        key.copy_from_slice(&text(
            "2718281828459045235360287471352662497757247093699959574966967627314159265358979323846264338327950288\
             4197169399375105820974944592",
        ));
        let mut sectors = vec![0; 256 * SECTOR];
        let plain: Vec<u8> = (0..=255).chain(0..=255).collect();
        sectors[255 * SECTOR..].copy_from_slice(&plain);
        encrypt(&mut sectors, &key).unwrap();
        assert_eq!(sectors[255 * SECTOR..][..16], text("1c3b3a102f770386e4836c99e370cf9b"));
    }

    #[test]
    fn longer_than_qcow2_is_refused() {
        assert!(image(1 << 51, &[b'0'; PASSPHRASE]).is_ok());
        assert!(image((1 << 51) + 1, &[b'0'; PASSPHRASE]).is_err());
    }
}
