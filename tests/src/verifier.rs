//! A writer in a guest whose every durable write can be told afterwards (`scripts/guest/verifier.c`).

use std::fs;
use std::path::{Path, PathBuf};

use crate::guest::script;
use crate::process::system;

const BLOCK: usize = 4096;
const WORDS: u64 = 512;
const BLOCKS: u64 = 4096;

/// Makes the program, which needs nothing of the guest.
pub fn compile(to: &Path) -> PathBuf {
    let source = script("guest/verifier.c");
    let [source, program] = [source.to_str().unwrap(), to.to_str().unwrap()];
    system("gcc", &["-O2", "-Wall", "-Werror", "-static", "-o", program, source]);
    to.to_owned()
}

/// The number that a console showed last: all writes up to it were durable.
///
/// # Panics
/// If the writer read something back that it had not written.
pub fn last_verified(console: &Path) -> Option<u64> {
    let said = String::from_utf8_lossy(&fs::read(console).unwrap_or_default()).into_owned();
    assert!(!said.contains("verifier-failed"), "what was read back in the guest is wrong: {said}");
    // The last line may be cut off.
    let whole = &said[..said.rfind('\n')?];
    whole.lines().rev().find_map(|line| line.split("verified ").nth(1)?.trim().parse().ok())
}

fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn block_of(number: u64) -> u64 {
    if number < BLOCKS { number } else { mix(number) % BLOCKS }
}

/// Checks the file that it wrote: each block is whole, and of no write before the last one to it that was durable.
#[track_caller]
pub fn check(content: &[u8], durable: u64) {
    assert_eq!(content.len() as u64, BLOCKS * BLOCK as u64);
    let mut least: Vec<u64> = vec![0; usize::try_from(BLOCKS).unwrap()];
    for number in 0..=durable {
        least[usize::try_from(block_of(number)).unwrap()] = number;
    }
    for (nth, (block, least)) in content.chunks(BLOCK).zip(least).enumerate() {
        let word = |nth: u64| u64::from_le_bytes(block[usize::try_from(nth).unwrap() * 8..][..8].try_into().unwrap());
        let number = word(0);
        assert_eq!(block_of(number), nth as u64, "block {nth} is of another place");
        assert!(number >= least, "block {nth} is of write {number}, and {least} was durable");
        for nth_word in 1..WORDS {
            let expected = mix(number.wrapping_mul(WORDS).wrapping_add(nth_word));
            assert_eq!(word(nth_word), expected, "block {nth} of write {number} is torn at word {nth_word}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(number: u64) -> Vec<u8> {
        let words = (0..WORDS).map(|nth| if nth == 0 { number } else { mix(number * WORDS + nth) });
        words.flat_map(u64::to_le_bytes).collect()
    }

    #[test]
    fn what_is_old_or_torn_is_found() {
        let mut content: Vec<u8> = (0..BLOCKS).flat_map(block).collect();
        check(&content, BLOCKS - 1);
        let at = usize::try_from(block_of(BLOCKS)).unwrap() * BLOCK;
        assert!(std::panic::catch_unwind(|| check(&content, BLOCKS)).is_err(), "an old block");
        content[at..at + BLOCK].copy_from_slice(&block(BLOCKS));
        check(&content, BLOCKS);
        content[at + BLOCK - 1] ^= 1;
        assert!(std::panic::catch_unwind(|| check(&content, BLOCKS)).is_err(), "a torn block");
    }
}
