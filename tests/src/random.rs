//! Numbers that only look random: the same seed gives the same test, everywhere.

/// SplitMix64: small, and good enough to fill disks with what does not compress.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Starts from a seed.
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which must not be 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.number() % limit
    }

    /// The same, as an index.
    pub fn index(&mut self, limit: usize) -> usize {
        usize::try_from(self.below(limit as u64)).unwrap_or(0)
    }

    /// Fills a buffer.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let word = self.number().to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }

    /// So many bytes.
    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.fill(&mut bytes);
        bytes
    }
}

/// How much longer than usual tests run: ten times for each unit of `RESEAL_SOAK`, which `make soak` sets.
pub fn soak() -> u32 {
    let units = std::env::var("RESEAL_SOAK").ok().and_then(|units| units.parse().ok()).unwrap_or(0);
    (10 * units).max(1)
}

/// Seeds for so many rounds; more of them in a soak. They are fixed, so that a failure comes again.
pub fn seeds(rounds: u32) -> impl Iterator<Item = u64> {
    (0..u64::from(rounds) * u64::from(soak())).map(|round| 0x5EED_0000 + round)
}
