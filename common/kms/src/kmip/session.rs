//! One session: a connection, the version of the protocol, and the operations on the key of one name.

use std::time::Instant;

use reseal_proto::kmip::request::KEY_BITS;
use reseal_proto::kmip::response::{self, Refusal};
use reseal_proto::kmip::ttlv::Items;
use reseal_proto::kmip::{Attributes, CodecError, Reason, Request, Response, Sealed, State, Version, tags};

use super::channel::{Address, Channel};
use super::credentials::Credentials;
use super::target::{Target, UNFIT_USAGE};
use crate::{KeyBytes, KmsError, Secret};

/// A session about the key of one name.
pub(super) struct Session<'a> {
    channel: Channel,
    version: Version,
    target: Target<'a>,
}

/// A key that is there.
pub(super) struct Found {
    pub(super) id: String,
    pub(super) attributes: Attributes,
}

/// What a server says when asked to open something.
pub(super) enum Opened {
    /// It opens; this is what was sealed.
    Plaintext(Secret),
    /// It does not, as far as the server was able to say.
    Refused,
}

impl<'a> Session<'a> {
    /// Connects and agrees on a version.
    pub(super) fn start(
        address: &Address,
        credentials: &Credentials,
        deadline: Instant,
        target: Target<'a>,
    ) -> Result<Self, KmsError> {
        let channel = Channel::open(address, credentials, deadline).map_err(|fault| target.fault(fault))?;
        let mut session = Self { channel, version: Version::V1_0, target };
        session.version = session.negotiate()?;
        Ok(session)
    }

    /// The best version of both sides. A server that knows no such question speaks 1.0.
    fn negotiate(&mut self) -> Result<Version, KmsError> {
        // Servers answer it in any version that they speak, and hardly one speaks neither of these.
        for asking in [Version::V1_1, Version::V2_0] {
            self.version = asking;
            let request = Request::DiscoverVersions;
            match self.call(&request, |payload, _| response::best_version(payload))? {
                Ok(Some(version)) => return Ok(version),
                Ok(None) => return Err(self.target.nonsense("it speaks no version of KMIP from 1.0 to 2.0")),
                Err(refused) if refused.is_about_who_asks => return Err(refused.error),
                Err(_) => {}
            }
        }
        Ok(Version::V1_0)
    }

    /// Whether this version's Encrypt takes additional data and gives a tag.
    pub(super) fn encrypts(&self) -> bool {
        self.version >= Version::V1_4
    }

    /// The one key of this name. Its state and kind are not looked at.
    pub(super) fn find(&mut self) -> Result<Found, KmsError> {
        let mut found = self.all()?;
        match (found.pop(), found.is_empty()) {
            (Some(one), true) => Ok(one),
            (Some(_), false) => {
                Err(self.target.unfit("several keys have this name there: rename or destroy the others"))
            }
            (None, _) => Err(self.target.missing()),
        }
    }

    /// All of this name that are not destroyed.
    pub(super) fn all(&mut self) -> Result<Vec<Found>, KmsError> {
        let ids = self.demand(&Request::Locate { name: self.target.key }, |payload, _| response::located(payload))?;
        let mut found = Vec::new();
        for id in ids {
            // What is destroyed at this moment is none.
            if let Some(attributes) = self.attributes(&id)?
                && attributes.named
                && attributes.state != Some(State::Destroyed)
            {
                found.push(Found { id, attributes });
            }
        }
        Ok(found)
    }

    /// What a key is; none if there is none.
    pub(super) fn attributes(&mut self, id: &str) -> Result<Option<Attributes>, KmsError> {
        let name = self.target.key;
        let read = |payload: Items<'_>, version| response::attributes(payload, version, name);
        match self.call(&Request::GetAttributes { id }, read)? {
            Ok(attributes) => Ok(Some(attributes)),
            Err(refused) if refused.error.is_key_missing() => Ok(None),
            Err(refused) => Err(refused.error),
        }
    }

    /// Refuses a key that is not an active AES key of 256 bits for encrypting and decrypting.
    pub(super) fn check(&self, attributes: &Attributes) -> Result<(), KmsError> {
        let both = tags::MAY_ENCRYPT | tags::MAY_DECRYPT;
        let what = match attributes.state {
            _ if attributes.object_type != Some(tags::OBJECT_SYMMETRIC_KEY) => "it is no symmetric key",
            _ if attributes.algorithm != Some(tags::AES) => "it is no AES key",
            _ if attributes.length != Some(KEY_BITS) => "it has not 256 bits",
            _ if attributes.usage.is_none_or(|usage| usage & both != both) => UNFIT_USAGE,
            Some(State::Active) => return Ok(()),
            Some(State::PreActive) => "it is not active yet: activate it",
            Some(State::Deactivated) => "it was revoked: name another key",
            Some(State::Compromised) => "it was revoked as compromised: name another key",
            Some(State::Destroyed) => return Err(self.target.missing()),
            Some(State::Unknown) | None => "the server does not say that it is active",
        };
        Err(self.target.unfit(what))
    }

    /// Makes a key. It is not active yet.
    pub(super) fn create(&mut self) -> Result<String, KmsError> {
        self.demand(&Request::Create { name: self.target.key }, |payload, _| response::created(payload))
    }

    pub(super) fn activate(&mut self, id: &str) -> Result<(), KmsError> {
        self.demand(&Request::Activate { id }, |_, _| Ok(()))
    }

    pub(super) fn revoke(&mut self, id: &str) -> Result<(), KmsError> {
        self.demand(&Request::Revoke { id }, |_, _| Ok(()))
    }

    pub(super) fn destroy(&mut self, id: &str) -> Result<(), KmsError> {
        self.demand(&Request::Destroy { id }, |_, _| Ok(()))
    }

    /// The key itself.
    pub(super) fn get(&mut self, id: &str) -> Result<KeyBytes, KmsError> {
        self.demand(&Request::Get { id }, |payload, _| response::key(payload).map(KeyBytes::copy_from))
    }

    /// Encrypts, and gives to `keep` what the server answers. None if the server can't do that at all.
    pub(super) fn encrypt<T>(
        &mut self,
        id: &str,
        additional: &[u8],
        plaintext: &[u8],
        keep: impl FnOnce(Sealed<'_>) -> T,
    ) -> Result<Option<T>, KmsError> {
        let read = |payload: Items<'_>, _| {
            let sealed = response::sealed(payload)?;
            if sealed.ciphertext.len() != plaintext.len() {
                return Err(CodecError::BadLength { tag: tags::DATA, len: sealed.ciphertext.len() });
            }
            Ok(keep(sealed))
        };
        match self.call(&Request::Encrypt { id, additional, plaintext }, read)? {
            Ok(kept) => Ok(Some(kept)),
            Err(refused) if refused.is_about_ability => Ok(None),
            Err(refused) => Err(refused.error),
        }
    }

    /// Decrypts. Servers name a tag that does not fit in many ways, down to a general failure; so one that refuses is
    /// asked to open something that it just sealed, and only if it does, the bytes were at fault.
    pub(super) fn decrypt(&mut self, id: &str, additional: &[u8], sealed: Sealed<'_>) -> Result<Opened, KmsError> {
        let refused = match self.open(id, additional, sealed)? {
            Ok(plaintext) => return Ok(Opened::Plaintext(plaintext)),
            Err(refused) => refused,
        };
        if refused.is_about_bytes {
            return Ok(Opened::Refused);
        }
        if refused.is_about_who_asks || refused.error.is_key_missing() || !self.opens_what_it_seals(id)? {
            return Err(refused.error);
        }
        Ok(Opened::Refused)
    }

    fn opens_what_it_seals(&mut self, id: &str) -> Result<bool, KmsError> {
        const PROBE: &[u8] = b"probe";
        let kept =
            self.encrypt(id, PROBE, PROBE, |sealed| (sealed.iv.to_vec(), *sealed.tag, sealed.ciphertext.to_vec()))?;
        let Some((iv, tag, ciphertext)) = kept else {
            return Ok(false);
        };
        let opened = self.open(id, PROBE, Sealed { iv: &iv, tag: &tag, ciphertext: &ciphertext })?;
        Ok(opened.is_ok_and(|plaintext| plaintext.as_slice() == PROBE))
    }

    fn open(&mut self, id: &str, additional: &[u8], sealed: Sealed<'_>) -> Result<Result<Secret, Refused>, KmsError> {
        let read = |payload: Items<'_>, _| {
            let plaintext = response::opened(payload)?;
            if plaintext.len() != sealed.ciphertext.len() {
                return Err(CodecError::BadLength { tag: tags::DATA, len: plaintext.len() });
            }
            Ok(Secret::new(plaintext.to_vec()))
        };
        self.call(&Request::Decrypt { id, additional, sealed }, read)
    }

    /// Asks, and takes any refusal for an error.
    fn demand<T>(
        &mut self,
        request: &Request<'_>,
        read: impl FnOnce(Items<'_>, Version) -> Result<T, CodecError>,
    ) -> Result<T, KmsError> {
        self.call(request, read)?.map_err(|refused| refused.error)
    }

    /// Asks, and gives what `read` makes of the answer, or the server's refusal.
    fn call<T>(
        &mut self,
        request: &Request<'_>,
        read: impl FnOnce(Items<'_>, Version) -> Result<T, CodecError>,
    ) -> Result<Result<T, Refused>, KmsError> {
        let bytes = self.channel.exchange(&request.encode(self.version)).map_err(|fault| self.target.fault(fault))?;
        let codec = |error| self.target.codec(request, error);
        let response = Response::parse(&bytes, request).map_err(codec)?;
        match response.result {
            Err(refusal) => Ok(Err(Refused::new(self.target, request, refusal))),
            // Other versions lay the same answer out in another way.
            Ok(_) if response.version != self.version => {
                let Version { major, minor } = response.version;
                Err(codec(CodecError::OtherVersion { major, minor }))
            }
            Ok(payload) => read(payload, self.version).map(Ok).map_err(codec),
        }
    }
}

/// A refusal as an error, and what it is about.
struct Refused {
    error: KmsError,
    /// The server does not know us, or does not let us.
    is_about_who_asks: bool,
    /// The server can't do such a thing.
    is_about_ability: bool,
    /// What was to be opened is not what was sealed.
    is_about_bytes: bool,
}

impl Refused {
    fn new(target: Target<'_>, request: &Request<'_>, refusal: Refusal<'_>) -> Self {
        let any = |reasons: &[Reason]| reasons.contains(&refusal.reason);
        Self {
            error: target.refused(request, refusal),
            is_about_who_asks: any(&[
                Reason::AUTHENTICATION_NOT_SUCCESSFUL,
                Reason::PERMISSION_DENIED,
                Reason::NOT_AUTHORISED,
                Reason::ATTESTATION_REQUIRED,
                Reason::ATTESTATION_FAILED,
            ]),
            is_about_ability: any(&[
                Reason::OPERATION_NOT_SUPPORTED,
                Reason::FEATURE_NOT_SUPPORTED,
                Reason::UNSUPPORTED_CRYPTOGRAPHIC_PARAMETERS,
            ]),
            is_about_bytes: any(&[Reason::CRYPTOGRAPHIC_FAILURE]),
        }
    }
}
