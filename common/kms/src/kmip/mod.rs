//! KMIP over mutual TLS: what the key providers of vSphere speak, and most key management servers.
//!
//! ```text
//! operation → session (connect, show certificates, agree on a version) → find the key by its name, check it → use it
//! ```
//!
//! Modules in reading order: `credentials` (certificates and our private key), `channel` (one TLS connection under a
//! deadline), `target` (errors about one key of one server), `session` (operations on one key), `wrapped` (what is
//! stored), and here the KMS.
//!
//! From KMIP 1.4 on the server encrypts and decrypts, with AES-256-GCM, and the key never leaves it; so with PyKMIP,
//! which speaks 2.0. Before 1.4, Encrypt knows neither additional data nor tags, and nothing that is not authenticated
//! is used here. There, and with a server that can't encrypt, the key is fetched for each operation, as vSphere does,
//! and dropped at once: only if the operator allows it.
//!
//! Keys are found by their names each time, and an identifier is never stored: servers number keys anew when they are
//! moved or restored. Nothing is kept between operations: no connection, no key, no answer.
//!
//! Requests, answers and keys are wiped when dropped. Buffers of rustls, through which they pass in the clear, are not:
//! like all memory of the process they are kept from swap and core dumps by the program.

mod channel;
mod credentials;
mod session;
mod target;
mod wrapped;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use reseal_proto::kmip::State;
use reseal_proto::kmip::tags::OBJECT_SYMMETRIC_KEY;

use self::channel::Address;
use self::credentials::Credentials;
use self::session::{Found, Opened, Session};
use self::target::Target;
use self::wrapped::Wrapped;
use crate::{KeyName, Kms, KmsError, Secret};

/// Longest wait for one operation, whatever the configuration says: nothing waits for ever.
const LONGEST_WAIT: Duration = Duration::from_secs(600);

/// The answer when the server can't encrypt and must not hand the key out.
const NO_WAY: &str = "the server can't encrypt with AES-256-GCM itself, which takes KMIP 1.4, and \
    `allow_get` does not let reseal fetch the key";

/// What was wrapped by a server that has forgotten how.
const FORGOTTEN: &str = "the server wrapped the record itself, with KMIP 1.4 or later, which it does not speak now";

/// What was wrapped with a fetched key.
const FETCHED: &str = "the record was wrapped with the fetched key: set `allow_get` to open it; \
    `reseal rekey --kek` then wraps it anew";

/// How a server is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KmipConfig {
    /// `HOST:PORT`. The server's certificate must be for this host.
    pub address: String,
    /// Certificates of the CAs that vouch for the server, in PEM form. No others are trusted.
    pub ca: PathBuf,
    /// Our certificate and those between it and the server's CA, in PEM form.
    pub cert: PathBuf,
    /// Our private key, in PEM form, which nobody else may read.
    pub key: PathBuf,
    /// Whether the key may be fetched from a server that can't encrypt with it.
    pub allow_get: bool,
    /// How long an operation may take, with all that it waits for; ten minutes at most.
    pub timeout: Duration,
}

/// A key management server that speaks KMIP, see the module.
#[derive(Debug)]
pub struct Kmip {
    config: KmipConfig,
    address: Address,
    /// What errors call it.
    label: String,
}

impl Kmip {
    /// Checks the configuration and the files that it names. Nothing is sent.
    pub fn new(config: &KmipConfig) -> Result<Self, KmsError> {
        let Some(address) = Address::parse(&config.address) else {
            let what = "is no address of a KMIP server: write HOST:PORT, the port is commonly 5696".to_owned();
            return Err(KmsError::Config { path: PathBuf::from(&config.address), what });
        };
        Credentials::load(config)?;
        Ok(Self { config: config.clone(), address, label: format!("kmip:{}", config.address) })
    }

    fn target<'a>(&'a self, name: &'a KeyName) -> Target<'a> {
        Target { kms: &self.label, key: name.as_str() }
    }

    fn session<'a>(&'a self, name: &'a KeyName) -> Result<Session<'a>, KmsError> {
        let deadline = Instant::now() + self.config.timeout.min(LONGEST_WAIT);
        Session::start(&self.address, &Credentials::load(&self.config)?, deadline, self.target(name))
    }

    /// Wraps with the server's own Encrypt; none if it has none.
    fn wrap_there(
        &self,
        session: &mut Session<'_>,
        id: &str,
        name: &KeyName,
        context: &[u8],
        payload: &[u8],
    ) -> Result<Option<Vec<u8>>, KmsError> {
        if !session.encrypts() {
            return Ok(None);
        }
        let (additional, plaintext) = (wrapped::additional(name, context), wrapped::lead_in(payload));
        let Some(bytes) = session.encrypt(id, &additional, &plaintext, wrapped::by_server)? else {
            return Ok(None);
        };
        // Whoever stores this throws the old away: so it must be known to open.
        let Wrapped::ByServer(sealed) = Wrapped::parse(name, &bytes)? else {
            return Err(self.target(name).nonsense("it sealed in another form"));
        };
        match session.decrypt(id, &additional, sealed)? {
            Opened::Plaintext(opened) if opened == plaintext => Ok(Some(bytes)),
            _ => Err(self.target(name).nonsense("it does not open what it just sealed")),
        }
    }

    /// Gets a key that was made just now into use, and makes sure that it is the only one of its name.
    fn put_in_use(&self, session: &mut Session<'_>, id: &str, name: &KeyName) -> Result<(), KmsError> {
        session.activate(id)?;
        // Another process may have made one of this name at the same time. Whoever sees the other's gives way: at worst
        // both.
        let found = session.all()?;
        match found.as_slice() {
            [only] if only.id == id => session.check(&only.attributes),
            [] => Err(self.target(name).nonsense("it does not find the key that it just made")),
            _ => Err(self.target(name).taken()),
        }
    }
}

/// Revokes what is in use, and destroys.
fn destroy(session: &mut Session<'_>, found: &Found) -> Result<(), KmsError> {
    if found.attributes.state == Some(State::Active) {
        session.revoke(&found.id)?;
    }
    session.destroy(&found.id)
}

impl Kms for Kmip {
    fn kind(&self) -> &'static str {
        "kmip"
    }

    fn create(&self, name: &str) -> Result<KeyName, KmsError> {
        let name = KeyName::parse(name)?;
        let mut session = self.session(&name)?;
        if !session.all()?.is_empty() {
            return Err(self.target(&name).taken());
        }
        let id = session.create()?;
        match self.put_in_use(&mut session, &id, &name) {
            Ok(()) => Ok(name),
            Err(error) => {
                // Nobody uses it yet. If this fails too, what counts is the error that led here.
                if let Ok(Some(attributes)) = session.attributes(&id) {
                    let _ = destroy(&mut session, &Found { id, attributes });
                }
                Err(error)
            }
        }
    }

    fn wrap(&self, key: &str, context: &[u8], payload: &[u8]) -> Result<Vec<u8>, KmsError> {
        let name = KeyName::parse(key)?;
        crate::kms::check_lengths(context, payload)?;
        let mut session = self.session(&name)?;
        let found = session.find()?;
        session.check(&found.attributes)?;
        if let Some(wrapped) = self.wrap_there(&mut session, &found.id, &name, context, payload)? {
            return Ok(wrapped);
        }
        if !self.config.allow_get {
            return Err(self.target(&name).unfit(NO_WAY));
        }
        wrapped::by_client(&name, &session.get(&found.id)?, context, payload)
    }

    fn unwrap(&self, key: &str, context: &[u8], wrapped: &[u8]) -> Result<Secret, KmsError> {
        let name = KeyName::parse(key)?;
        crate::kms::check_lengths(context, &[])?;
        let wrapped = Wrapped::parse(&name, wrapped)?;
        let target = self.target(&name);
        let mut session = self.session(&name)?;
        let found = session.find()?;
        session.check(&found.attributes)?;
        match wrapped {
            Wrapped::ByServer(_) if !session.encrypts() => Err(target.unfit(FORGOTTEN)),
            Wrapped::ByServer(sealed) => {
                match session.decrypt(&found.id, &wrapped::additional(&name, context), sealed)? {
                    Opened::Plaintext(plaintext) => wrapped::lead_out(&plaintext).ok_or_else(|| target.not_opened()),
                    Opened::Refused => Err(target.not_opened()),
                }
            }
            Wrapped::ByClient(_) if !self.config.allow_get => Err(target.unfit(FETCHED)),
            Wrapped::ByClient(sealed) => {
                let kek = session.get(&found.id)?;
                wrapped::open_by_client(&name, &kek, context, sealed).ok_or_else(|| target.not_opened())
            }
        }
    }

    /// Revoked first, for servers destroy no key that is in use; a key that an interrupted call has revoked is
    /// destroyed by the next. Then the server has to show that the key is gone.
    fn destroy(&self, key: &str) -> Result<(), KmsError> {
        let name = KeyName::parse(key)?;
        let mut session = self.session(&name)?;
        let found = session.find()?;
        if found.attributes.object_type != Some(OBJECT_SYMMETRIC_KEY) {
            return Err(self.target(&name).unfit("it is no symmetric key"));
        }
        destroy(&mut session, &found)?;
        let left = session.attributes(&found.id)?.is_some_and(|left| left.state != Some(State::Destroyed));
        if left || !session.all()?.is_empty() {
            return Err(self.target(&name).nonsense("it says that it destroyed the key, and still has it"));
        }
        Ok(())
    }
}
