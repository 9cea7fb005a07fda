//! How long what a tenant writes can't be removed from an object store, whoever asks. The rule stands in the sealed part of the tenant
//! record; the object store keeps it (S3 Object Lock).

use serde::{Deserialize, Serialize};

use crate::time::Timestamp;

/// How firm a lock is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LockMode {
    /// Nobody can shorten it, nor the owner of the account.
    Compliance,
    /// Whom the object store gives the right to bypass it can.
    Governance,
}

impl LockMode {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            LockMode::Compliance => "compliance",
            LockMode::Governance => "governance",
        }
    }
}

/// How what a tenant's restore points lead to is locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockRule {
    /// What a restore point leads to can't be removed for at least so many days after it was made.
    pub days: u16,
    pub mode: LockMode,
}

/// How a restore point's objects were locked when it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Locked {
    /// Until when all of them were, at least; by the object store's clock.
    pub until: Timestamp,
    /// How firmly, at least.
    pub mode: LockMode,
}

/// Most days of a rule: ten years.
pub const MAX_LOCK_DAYS: u16 = 3653;
const DAY_MS: i64 = 24 * 3600 * 1000;

impl LockRule {
    /// Milliseconds that a restore point's objects have to be locked when it is made.
    pub fn least_ms(self) -> i64 {
        i64::from(self.days) * DAY_MS
    }

    /// Milliseconds that they are locked for: a quarter more, and at least a day, so that what many restore points share is not locked
    /// anew for each of them.
    pub fn usual_ms(self) -> i64 {
        self.least_ms() + (self.least_ms() / 4).max(DAY_MS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_locks_for_longer_than_it_must() {
        let days = |days| {
            let rule = LockRule { days, mode: LockMode::Compliance };
            (rule.least_ms() / DAY_MS, rule.usual_ms() / DAY_MS)
        };
        assert_eq!([days(1), days(4), days(30), days(MAX_LOCK_DAYS)], [(1, 2), (4, 5), (30, 37), (3653, 4566)]);
        let text = serde_json::to_string(&LockRule { days: 30, mode: LockMode::Governance }).unwrap();
        assert_eq!(text, r#"{"days":30,"mode":"governance"}"#);
    }
}
