//! Renews this site's certificate over a connection that it has, before the first word of what that is for.
//!
//! ```text
//! lock the file → new key → Renew ──▶ target registers the new certificate ──▶ Renewed → replace the file
//! ```
//!
//! The old certificate is taken until the new one was used: whoever dies in between has a file that works.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256};
use reseal_format::time::Timestamp;
use reseal_kms::private_file::{beside, replace};
use reseal_proto::wire::{FromSource, FromTarget, Renew, Renewed};
use rustix::fs::{Access, AtFlags, CWD, FlockOperation, accessat, flock};
use zeroize::{Zeroize, Zeroizing};

use crate::certificate::Validity;
use crate::enrolment::Replacement;
use crate::{Enrolment, RemoteError, pem};

/// A lock of the enrolment file itself, and its path without symbolic links. It ends with the value.
struct Locked {
    path: PathBuf,
    _file: File,
}

/// Locks the file; `None` where another process is about to renew it, or has done so.
fn lock(enrolment: &Enrolment) -> Result<Option<Locked>, String> {
    let failed = |e: io::Error| format!("{}: {e}", enrolment.path.display());
    let path = std::fs::canonicalize(&enrolment.path).map_err(failed)?;
    let file = File::open(&path).map_err(failed)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
        locked => locked.map_err(|e| failed(e.into()))?,
    }
    // Its holder replaces it: what was locked may be the one before. The certificate tells.
    let now = Enrolment::read(&path).map_err(|e| e.to_string())?;
    Ok(now.is_same(enrolment).then_some(Locked { path, _file: file }))
}

fn is_writable(path: &Path) -> Result<(), String> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    accessat(CWD, folder, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS)
        .map_err(|e| format!("the folder {} can't be written to: {}", folder.display(), io::Error::from(e)))
}

/// A new key, and the request for its certificate.
fn request() -> Result<(Zeroizing<String>, Vec<u8>), String> {
    let failed = |e: rcgen::Error| format!("no key can be made: {e}");
    let mut pair = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    let request = params.serialize_request(&pair).map(|request| request.der().to_vec());
    let key = Zeroizing::new(pair.serialize_pem());
    pair.zeroize();
    Ok((key, request.map_err(failed)?))
}

/// Puts a new certificate into the file.
fn take_up(locked: &Locked, enrolment: &Enrolment, certificate: &[u8], key: &str) -> Result<(), String> {
    let validity = Validity::of(certificate)?;
    let certificate = pem::certificate(certificate);
    pem::identity(certificate.as_bytes(), key.as_bytes())?;
    if validity.expires <= enrolment.validity().expires {
        return Err("the new certificate ends no later".into());
    }
    let text = enrolment.with(&Replacement { certificate: &certificate, key, validity }).map_err(|e| e.to_string())?;
    let staged = beside(&locked.path, ".new");
    // Left by one who was killed; nobody else writes while this holds the lock.
    let _ = std::fs::remove_file(&staged);
    replace(&locked.path, &staged, text.as_bytes())
        .map_err(|e| reseal_cli::Failure::of(reseal_cli::Status::Failed, &e).message)
}

/// Asks for a new certificate, if it is time, and puts it into the enrolment file. Only that the connection ends is an error:
/// whatever else goes wrong, the certificate that there is goes on, and that is said.
pub fn renew<E: From<RemoteError>>(
    enrolment: &Enrolment,
    now: Timestamp,
    say: &dyn Fn(&str),
    ask: impl FnOnce(&FromSource) -> Result<FromTarget, E>,
) -> Result<(), E> {
    let validity = enrolment.validity();
    if !validity.renewal_is_due(now) {
        return Ok(());
    }
    let ends = validity.expires;
    let file = enrolment.path.display();
    let kept = |why: &str| {
        say(&format!("the certificate in {file} could not be renewed, and goes on until {ends}: {why}"));
        Ok(())
    };
    let prepared = lock(enrolment).and_then(|locked| match locked {
        Some(locked) => is_writable(&locked.path).and_then(|()| request()).map(|request| Some((locked, request))),
        None => Ok(None),
    });
    let (locked, (key, request)) = match prepared {
        Ok(Some(prepared)) => prepared,
        Ok(None) => return Ok(()),
        Err(why) => return kept(&why),
    };
    match ask(&FromSource::Renew(Renew { request }))? {
        FromTarget::Renewed(Renewed::Issued(certificate)) => match take_up(&locked, enrolment, &certificate, &key) {
            Ok(()) => Ok(()),
            Err(why) => kept(&why),
        },
        FromTarget::Renewed(Renewed::Refused(why)) => kept(&why),
        FromTarget::Renewed(Renewed::Elsewhere) => {
            if validity.is_ending(now) {
                say(&format!("the certificate in {file} ends at {ends}, and its own PKI has to renew it"));
            }
            Ok(())
        }
        _ => Err(RemoteError::Unexpected {
            peer: enrolment.address.clone(),
            what: "it does not answer a request for a certificate".into(),
        }
        .into()),
    }
}
