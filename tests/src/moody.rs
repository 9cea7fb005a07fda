//! A KMS that counts what it is asked, and fails or takes its time as it is told.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use reseal_kms::{KeyName, Keyring, Kms, KmsError, Secret};

use crate::site::Site;

/// How it answers.
#[derive(Debug, Clone, Copy, Default)]
pub struct Mood {
    /// Whether it can be reached.
    pub is_away: bool,
    /// How long it takes.
    pub takes: Duration,
}

/// A site's keyring behind that.
pub struct MoodyKms {
    keyring: Keyring,
    mood: Mutex<Mood>,
    asked: AtomicU64,
}

impl MoodyKms {
    /// One that answers at once.
    pub fn new(site: &Site) -> Arc<MoodyKms> {
        let keyring = Keyring::open(&site.keyring, |_| unreachable!("it has no passphrase")).unwrap();
        Arc::new(MoodyKms { keyring, mood: Mutex::default(), asked: AtomicU64::new(0) })
    }

    pub fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    /// How often it was asked to unwrap something since the last call.
    pub fn take_asked(&self) -> u64 {
        self.asked.swap(0, Ordering::SeqCst)
    }
}

impl Kms for MoodyKms {
    fn kind(&self) -> &'static str {
        self.keyring.kind()
    }

    fn create(&self, name: &str) -> Result<KeyName, KmsError> {
        self.keyring.create(name)
    }

    fn wrap(&self, key: &str, context: &[u8], payload: &[u8]) -> Result<Vec<u8>, KmsError> {
        self.keyring.wrap(key, context, payload)
    }

    fn unwrap(&self, key: &str, context: &[u8], wrapped: &[u8]) -> Result<Secret, KmsError> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let mood = *self.mood.lock().unwrap();
        thread::sleep(mood.takes);
        if mood.is_away {
            let (kms, key) = ("a moody KMS".to_owned(), key.to_owned());
            return Err(KmsError::NotReached { kms, key, what: "it is away".to_owned() });
        }
        self.keyring.unwrap(key, context, wrapped)
    }

    fn destroy(&self, key: &str) -> Result<(), KmsError> {
        self.keyring.destroy(key)
    }
}
