//! The transit engine of HashiCorp Vault and OpenBao: keys that never leave the server, which encrypts and decrypts
//! with them.
//!
//! ```text
//! operator's configuration → address, credentials → session → request over TLS → bounded answer → wrapped or payload
//! ```
//!
//! Modules in reading order: `address` (whom it speaks to), `http` (one request), `forms` (its JSON), `session`
//! (tokens), `ciphertext` (the form of wrapped bytes), and here what the contract asks for, made of those.
//!
//! The context is the associated data of AES-256-GCM. The tenant record holds the key's name alone: address and mount
//! come from the configuration, so nothing in a record leads a request elsewhere.
//!
//! What the policy of the credentials must allow, for the mount `transit`: `read`, `create`, `update` and `delete` on
//! `transit/keys/*`; `update` on `transit/encrypt/*` and `transit/decrypt/*`. Without `create` on `transit/encrypt/*`
//! no request makes a missing key; setting `disable_upsert` at `transit/config/keys` has the same effect for all.

mod address;
mod ciphertext;
mod forms;
mod http;
mod session;

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use ureq::http::Method;

pub use self::address::{Address, ApiPath};
use self::ciphertext::Ciphertext;
use self::forms::{Data, Decrypted, Encrypted, KeyData};
use self::http::{Call, Client, Fault, said};
use self::session::Sessions;
use crate::config::VaultConfig;
use crate::kms::{MAX_WRAPPED, check_lengths};
use crate::{KeyName, Kms, KmsError, Secret, base64};

/// Requests of one operation together take at most this many times the time of one, and the last one its own.
const PATIENCE: u32 = 3;

/// The type of key that is made here.
const MADE: &str = "aes256-gcm96";

/// Types of key that authenticate and have 256 bits.
const FIT: [&str; 3] = [MADE, "chacha20-poly1305", "xchacha20-poly1305"];

/// A transit engine, see the module.
///
/// Nothing is sent before the first operation. Each reads the server's mind anew: no answer is kept but the token.
pub struct Transit {
    /// Kind and address, for errors.
    name: String,
    mount: ApiPath,
    timeout: std::time::Duration,
    sessions: Arc<Sessions>,
    /// Looking whether a key is there and making it are two requests: in this process nobody comes between.
    making: Mutex<()>,
}

/// One operation, for its errors and its end.
struct Task<'a> {
    kms: &'a str,
    key: &'a str,
    action: &'static str,
    deadline: Instant,
}

impl Task<'_> {
    fn kms(&self) -> String {
        self.kms.to_owned()
    }

    fn key(&self) -> String {
        self.key.to_owned()
    }

    /// What a fault means wherever nothing else is said about it.
    fn fault(&self, fault: Fault) -> KmsError {
        let (kms, key) = (self.kms(), self.key());
        match fault {
            Fault::NotReached(what) => KmsError::NotReached { kms, key, what },
            Fault::Sealed => KmsError::Sealed { kms, key },
            Fault::BadAnswer(what) => KmsError::BadAnswer { kms, key, what },
            Fault::Refused { status: status @ (401 | 403), reason } => {
                KmsError::Denied { kms, key, action: self.action, what: said(status, &reason) }
            }
            Fault::Refused { status, reason } => KmsError::BadAnswer { kms, key, what: said(status, &reason) },
        }
    }

    fn not_opened(&self) -> KmsError {
        KmsError::NotOpened { kms: self.kms(), key: self.key() }
    }

    fn bad_answer(&self, what: &str) -> KmsError {
        self.fault(Fault::BadAnswer(what.to_owned()))
    }

    /// Refuses keys that the server would hand out, or that do not bind what they wrap.
    fn check_fit(&self, data: &KeyData) -> Result<(), KmsError> {
        let unfit = |what| Err(KmsError::UnfitKey { kms: self.kms(), key: self.key(), what });
        if data.exportable {
            return unfit("it is exportable, so it may be known elsewhere");
        }
        if data.allow_plaintext_backup {
            return unfit("it allows backups in the clear, so it may be known elsewhere");
        }
        if !FIT.contains(&data.kind.as_str()) {
            return unfit("its type is not aes256-gcm96 or chacha20-poly1305");
        }
        if data.derived || data.convergent_encryption {
            return unfit("it is derived or convergent, which needs what is not sent here");
        }
        if data.soft_deleted {
            return unfit("it is deleted, though not yet for good");
        }
        Ok(())
    }
}

impl Transit {
    /// Reads the CA certificates; sends nothing.
    pub fn new(config: &VaultConfig) -> Result<Self, KmsError> {
        let VaultConfig { address, mount, ca, auth, namespace, timeout } = config.clone();
        let name = format!("vault at {address}");
        let client = Client::new(address, namespace, ca.as_deref(), timeout)?;
        Ok(Self { name, mount, timeout, sessions: Sessions::new(client, auth), making: Mutex::new(()) })
    }

    fn task<'a>(&'a self, key: &'a KeyName, action: &'static str) -> Task<'a> {
        Task { kms: &self.name, key: key.as_str(), action, deadline: Instant::now() + self.timeout * PATIENCE }
    }

    /// Sends with a token, and once more with another one if the server refuses that.
    fn send(
        &self,
        task: &Task<'_>,
        method: Method,
        path: &str,
        body: &[u8],
        secrets: &[&str],
    ) -> Result<Secret, Failed> {
        let send = |token: &http::Token| {
            let call = Call { method: method.clone(), path, token: Some(token), body, secrets };
            self.sessions.client.send(&call, task.deadline)
        };
        let token = self.sessions.token(task)?;
        match send(&token) {
            Err(Fault::Refused { status: 401 | 403, reason }) => match self.sessions.instead_of(&token, task)? {
                Some(other) => Ok(send(&other)?),
                None => Err(Fault::Refused { status: 403, reason }.into()),
            },
            other => Ok(other?),
        }
    }

    /// Sends what only sets something.
    fn set(&self, task: &Task<'_>, method: Method, path: &str, fields: &str) -> Result<(), KmsError> {
        self.send(task, method, path, fields.as_bytes(), &[]).map(drop).map_err(|failed| failed.told(task))
    }

    fn key_path(&self, task: &Task<'_>) -> String {
        format!("{}/keys/{}", self.mount, task.key)
    }

    /// The key as it is now, none if it does not exist.
    fn look(&self, task: &Task<'_>) -> Result<Option<KeyData>, KmsError> {
        match self.send(task, Method::GET, &self.key_path(task), &[], &[]) {
            Ok(answer) => parse::<Data<KeyData>>(task, &answer).map(|answer| Some(answer.data)),
            // A mount that does not exist, or another server, gives a reason: that is not the same as no key.
            Err(Failed::Fault(Fault::Refused { status: 404, reason })) if reason.is_empty() => Ok(None),
            Err(failed) => Err(failed.told(task)),
        }
    }

    /// The key as it is now, which must exist.
    fn read(&self, task: &Task<'_>) -> Result<KeyData, KmsError> {
        self.look(task)?.ok_or_else(|| KmsError::NoSuchKey { kms: task.kms(), key: task.key() })
    }

    fn encrypt(&self, task: &Task<'_>, context: &[u8], payload: &[u8]) -> Result<String, KmsError> {
        let plaintext = base64::encode(payload);
        let body = forms::to_json(&[("plaintext", &plaintext), ("associated_data", &base64::encode(context))]);
        let answer =
            self.send(task, Method::POST, &format!("{}/encrypt/{}", self.mount, task.key), &body, &[&plaintext]);
        let answer = answer.map_err(|failed| failed.told(task))?;
        let ciphertext = parse::<Data<Encrypted>>(task, &answer)?.data.ciphertext;
        if ciphertext.len() > MAX_WRAPPED {
            return Err(task.bad_answer("a ciphertext that is far too long"));
        }
        Ok(ciphertext)
    }

    fn decrypt(&self, task: &Task<'_>, context: &[u8], ciphertext: &Ciphertext<'_>) -> Result<Secret, KmsError> {
        let body = forms::to_json(&[("ciphertext", ciphertext.text), ("associated_data", &base64::encode(context))]);
        let answer = self.send(task, Method::POST, &format!("{}/decrypt/{}", self.mount, task.key), &body, &[]);
        let answer = answer.map_err(|failed| match failed {
            Failed::Fault(Fault::Refused { status: 400, reason }) => not_decrypted(task, reason),
            other => other.told(task),
        })?;
        let plaintext = parse::<Data<Decrypted>>(task, &answer)?.data.plaintext;
        base64::decode(&plaintext.0).ok_or_else(|| task.bad_answer("a plaintext that is not base64"))
    }

    /// Has the server prove that it binds what it wrapped to key and context: an old one takes no notice of a context.
    fn check_wrapped(
        &self,
        task: &Task<'_>,
        context: &[u8],
        payload: &[u8],
        made: &Ciphertext<'_>,
    ) -> Result<(), KmsError> {
        let other = [context, b"\0"].concat();
        match self.decrypt(task, &other, made) {
            Err(error) if error.is_not_opened() => {}
            Err(error) => return Err(error),
            Ok(_) => {
                return Err(task.bad_answer("it does not bind what it wraps to a context: a newer version is needed"));
            }
        }
        if *self.decrypt(task, context, made)? == *payload {
            Ok(())
        } else {
            Err(task.bad_answer("what it wrapped opens as something else"))
        }
    }
}

impl Kms for Transit {
    fn kind(&self) -> &'static str {
        "vault"
    }

    /// The server makes a key that exists already without complaint, so it is looked for first. Another process that
    /// makes the same name in the same moment is not noticed; names have random digits at their end.
    fn create(&self, name: &str) -> Result<KeyName, KmsError> {
        let name = KeyName::parse(name)?;
        let task = self.task(&name, "make a key to work");
        let taken = || KmsError::KeyTaken { kms: task.kms(), key: task.key() };
        let waited = || task.fault(Fault::NotReached("another thread waits for it to make a key".into()));
        let _alone = self.making.try_lock_until(task.deadline).ok_or_else(waited)?;
        if self.look(&task)?.is_some() {
            return Err(taken());
        }
        let fields = forms::to_json(&[("type", MADE)]);
        let answer = self.send(&task, Method::POST, &self.key_path(&task), &fields, &[]);
        let answer = answer.map_err(|failed| failed.told(&task))?;
        // Some versions answer with the key, and say if it was there; others with nothing.
        let warnings = parse::<Data<serde::de::IgnoredAny>>(&task, &answer).ok().and_then(|answer| answer.warnings);
        if warnings.is_some_and(|all| all.iter().any(|warning| warning.contains("already existed"))) {
            return Err(taken());
        }
        task.check_fit(&self.read(&task)?)?;
        Ok(name.clone())
    }

    fn wrap(&self, key: &str, context: &[u8], payload: &[u8]) -> Result<Vec<u8>, KmsError> {
        let name = KeyName::parse(key)?;
        check_lengths(context, payload)?;
        let task = self.task(&name, "wrap");
        let before = self.read(&task)?;
        task.check_fit(&before)?;
        let text = self.encrypt(&task, context, payload)?;
        let made = Ciphertext::parse(text.as_bytes()).ok_or_else(|| task.bad_answer("that is no ciphertext"))?;
        let after = self.read(&task)?;
        task.check_fit(&after)?;
        // A key that was destroyed in between would have been made anew by the request to encrypt.
        let same = before.keys.iter().all(|(version, at)| after.keys.get(version).is_none_or(|then| then == at));
        if !same || made.version < before.latest_version || !after.keys.contains_key(&made.version) {
            return Err(task
                .bad_answer("the key changed while it was used; if it was destroyed, look for a new one of its name"));
        }
        self.check_wrapped(&task, context, payload, &made)?;
        Ok(text.into_bytes())
    }

    /// Also under a key that [`Kms::wrap`] refuses: what it wrapped must be had to move it under a better one.
    fn unwrap(&self, key: &str, context: &[u8], wrapped: &[u8]) -> Result<Secret, KmsError> {
        let name = KeyName::parse(key)?;
        check_lengths(context, &[])?;
        if wrapped.len() > MAX_WRAPPED {
            return Err(KmsError::WrappedTooLong { key: name.to_string(), len: wrapped.len() });
        }
        let task = self.task(&name, "unwrap");
        match Ciphertext::parse(wrapped) {
            Some(ciphertext) => self.decrypt(&task, context, &ciphertext),
            None => Err(task.not_opened()),
        }
    }

    fn destroy(&self, key: &str) -> Result<(), KmsError> {
        let name = KeyName::parse(key)?;
        let task = self.task(&name, "destroy the key, that is to work");
        self.read(&task)?;
        let path = self.key_path(&task);
        self.set(&task, Method::POST, &format!("{path}/config"), r#"{"deletion_allowed":true}"#)?;
        let deleted = self.set(&task, Method::DELETE, &path, "");
        // What counts is whether it is gone: the answer to a first try may have been lost.
        match (self.look(&task)?, deleted) {
            (None, _) => Ok(()),
            (Some(_), Err(error)) => Err(error),
            (Some(_), Ok(())) => Err(task.bad_answer("the key is there still, after it was deleted")),
        }
    }

    fn rotate(&self, key: &str) -> Result<KeyName, KmsError> {
        let name = KeyName::parse(key)?;
        let task = self.task(&name, "rotate the key, that is to work");
        let before = self.read(&task)?;
        task.check_fit(&before)?;
        self.set(&task, Method::POST, &format!("{}/rotate", self.key_path(&task)), "{}")?;
        if self.read(&task)?.latest_version > before.latest_version {
            Ok(name.clone())
        } else {
            Err(task.bad_answer("the key has no newer version, after it was rotated"))
        }
    }

    fn retire(&self, old: &str, new: &str, context: &[u8], wrapped: &[u8]) -> Result<(), KmsError> {
        let name = KeyName::parse(old)?;
        self.unwrap(new, context, wrapped)?;
        if name.as_str() != new {
            return match self.destroy(old) {
                Err(error) if !error.is_key_missing() => Err(error),
                _ => Ok(()),
            };
        }
        let task = self.task(&name, "retire versions of the key, to work");
        let version = Ciphertext::parse(wrapped).ok_or_else(|| task.not_opened())?.version;
        if self.read(&task)?.min_decryption_version >= version {
            return Ok(());
        }
        let fields = format!(r#"{{"min_decryption_version":{version}}}"#);
        self.set(&task, Method::POST, &format!("{}/config", self.key_path(&task)), &fields)?;
        if self.read(&task)?.min_decryption_version >= version {
            Ok(())
        } else {
            Err(task.bad_answer("older versions of the key still decrypt, after they were retired"))
        }
    }
}

impl fmt::Debug for Transit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transit").field("name", &self.name).field("mount", &self.mount).finish_non_exhaustive()
    }
}

/// A failure of a request with a token: of the request, or of what leads to the token.
enum Failed {
    Fault(Fault),
    Session(KmsError),
}

impl Failed {
    fn told(self, task: &Task<'_>) -> KmsError {
        match self {
            Self::Fault(fault) => task.fault(fault),
            Self::Session(error) => error,
        }
    }
}

impl From<Fault> for Failed {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<KmsError> for Failed {
    fn from(error: KmsError) -> Self {
        Self::Session(error)
    }
}

fn parse<T: DeserializeOwned>(task: &Task<'_>, answer: &[u8]) -> Result<T, KmsError> {
    forms::parse(answer).map_err(|fault| task.fault(fault))
}

/// Why the server does not decrypt, from what it says: there is one status for all of it.
fn not_decrypted(task: &Task<'_>, reason: String) -> KmsError {
    let says = |part: &str| reason.contains(part);
    if says("encryption key not found") {
        KmsError::NoSuchKey { kms: task.kms(), key: task.key() }
    } else if says("(too old)") {
        KmsError::Retired { kms: task.kms(), key: task.key() }
    } else if says("message authentication failed") || says("invalid ciphertext") {
        task.not_opened()
    } else {
        task.fault(Fault::Refused { status: 400, reason })
    }
}
