//! The key of a passphrase: Argon2id (RFC 9106).

use argon2::{Algorithm, Argon2, Block, Params, Version};
use zeroize::Zeroizing;

use crate::secret::KEY_LEN;
use crate::{KeyBytes, KmsError, Passphrase};

pub(crate) const SALT_LEN: usize = 16;

// What a file may ask for. More would let a hostile file take the machine's memory or an hour of its time before its first byte is
// authenticated.
const MAX_MEMORY_KIB: u32 = 1024 * 1024;
const MAX_PASSES: u32 = 16;
const MAX_LANES: u32 = 16;

/// How expensive a guess is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cost {
    pub(crate) memory_kib: u32,
    pub(crate) passes: u32,
    pub(crate) lanes: u32,
}

impl Cost {
    /// The second recommended option of RFC 9106, section 4, for machines that can't spare 2 GiB.
    pub(crate) const RECOMMENDED: Self = Self { memory_kib: 64 * 1024, passes: 3, lanes: 4 };

    /// Whether this machine is willing to pay it, and Argon2 defined for it.
    pub(crate) fn is_acceptable(self) -> bool {
        (1..=MAX_LANES).contains(&self.lanes)
            && (1..=MAX_PASSES).contains(&self.passes)
            && (8 * self.lanes..=MAX_MEMORY_KIB).contains(&self.memory_kib)
    }
}

/// All that turns a passphrase into a key, but the passphrase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KdfParams {
    pub(crate) cost: Cost,
    pub(crate) salt: [u8; SALT_LEN],
}

impl KdfParams {
    /// Parameters with a fresh salt.
    pub(crate) fn fresh(cost: Cost) -> Result<Self, KmsError> {
        let mut salt = [0; SALT_LEN];
        getrandom::fill(&mut salt).map_err(KmsError::Random)?;
        Ok(Self { cost, salt })
    }

    /// The key of `passphrase`. The memory it takes is asked for, not assumed, and wiped.
    pub(crate) fn derive(&self, passphrase: &Passphrase) -> Result<KeyBytes, KmsError> {
        let Cost { memory_kib, passes, lanes } = self.cost;
        let refused = || KmsError::Kdf { memory_kib };
        if !self.cost.is_acceptable() {
            return Err(refused());
        }
        let params = Params::new(memory_kib, passes, lanes, Some(KEY_LEN)).map_err(|_| refused())?;
        let mut memory = Zeroizing::new(Vec::new());
        memory.try_reserve_exact(params.block_count()).map_err(|_| refused())?;
        memory.resize(params.block_count(), Block::new());
        let mut key = KeyBytes::zeroed();
        Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
            .hash_password_into_with_memory(
                passphrase.expose().as_bytes(),
                &self.salt,
                key.expose_mut(),
                memory.as_mut_slice(),
            )
            .map_err(|_| refused())?;
        Ok(key)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn cost(memory_kib: u32, passes: u32, lanes: u32) -> Cost {
        Cost { memory_kib, passes, lanes }
    }

    #[test]
    fn only_bounded_costs_are_accepted() {
        assert!(Cost::RECOMMENDED.is_acceptable());
        assert!(cost(MAX_MEMORY_KIB, MAX_PASSES, MAX_LANES).is_acceptable());
        for bad in [
            cost(MAX_MEMORY_KIB + 1, 1, 1),
            cost(64, MAX_PASSES + 1, 1),
            cost(1024, 1, MAX_LANES + 1),
            cost(u32::MAX, u32::MAX, u32::MAX),
            cost(64, 0, 1),
            cost(64, 1, 0),
            cost(31, 1, 4),
            cost(0, 0, 0),
        ] {
            assert!(!bad.is_acceptable(), "{bad:?}");
            let params = KdfParams { cost: bad, salt: [0; SALT_LEN] };
            let passphrase = Passphrase::new("x".into()).unwrap();
            assert!(matches!(params.derive(&passphrase), Err(KmsError::Kdf { .. })));
        }
    }

    /// Computed with the `argon2` command of the reference implementation: `argon2 SALT -id -t 3 -k 64 -p 4 -l 32 -r`.
    #[test]
    fn agrees_with_the_reference_implementation() {
        let params = KdfParams { cost: cost(64, 3, 4), salt: *b"0123456789abcdef" };
        let key = params.derive(&Passphrase::new("open sesame".into()).unwrap()).unwrap();
        assert_eq!(hex::encode(key.expose()), "0fc138b50ef89b3c6aa4cd028fbd0b78a878527581663fb0a753dfeb1cdd4633");
    }

    #[test]
    fn the_key_depends_on_passphrase_salt_and_cost() {
        let derive = |text: &str, salt: u8, passes| {
            let params = KdfParams { cost: cost(32, passes, 1), salt: [salt; SALT_LEN] };
            params.derive(&Passphrase::new(text.to_owned()).unwrap()).unwrap()
        };
        let base = derive("x", 1, 1);
        assert_eq!(base, derive("x", 1, 1));
        for other in [derive("y", 1, 1), derive("x", 2, 1), derive("x", 1, 2)] {
            assert_ne!(base, other);
        }
    }
}
