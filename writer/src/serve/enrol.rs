//! What the administrator of the target site does with clients: enrol, list, revoke.

use std::path::Path;

use reseal_format::names::{ClientName, TenantName, VmName};
use reseal_format::time::Timestamp;
use reseal_kms::private_file::{beside, write_new};
use reseal_vault::random;
use zeroize::Zeroizing;

use super::audit::{Event, What};
use super::authority::Authority;
use super::config::{ANY, Role, Settings, checked_address};
use super::registry::{Enrolled, MAX_DAYS};
use crate::BackupError;
use reseal_site::certificate::now;

/// Names that are tried for a client that was given none.
const NAMES: u32 = 1000;

/// A client that is to be enrolled.
pub struct NewClient<'a> {
    pub tenant: TenantName,
    /// Made of the output's name, if none is given.
    pub name: Option<ClientName>,
    pub role: Role,
    /// None stands for any.
    pub vms: Vec<VmName>,
    pub days: u32,
    /// Where it reaches the server, if not where the configuration says.
    pub address: Option<String>,
    /// Its enrolment file, which must not exist.
    pub output: &'a Path,
}

/// What is made in the folder has to belong to its owner, for the server takes no other's.
fn check_owner(folder: &Path) -> Result<(), BackupError> {
    use std::os::unix::fs::MetadataExt;
    let user = rustix::process::geteuid().as_raw();
    let meta = match std::fs::metadata(folder) {
        Ok(meta) if meta.uid() != user => meta,
        _ => return Ok(()),
    };
    Err(BackupError::Usage(format!(
        "{} belongs to user {}, as whom the server runs, and you are user {user}: what you make there it could not read. Run \
         this as that user",
        folder.display(),
        meta.uid()
    )))
}

/// Enrols a client: its certificate is in the registry first, then it gets its file. Where that can't be written it is taken
/// out again; one that was killed in between leaves a certificate without a key.
pub fn enrol(settings: &Settings, new: NewClient<'_>) -> Result<(Enrolled, String), BackupError> {
    let output = new.output;
    if output.symlink_metadata().is_ok() {
        return Err(taken(output));
    }
    if !(1..=MAX_DAYS).contains(&new.days) {
        return Err(BackupError::Usage(format!("a certificate is valid for 1 to {MAX_DAYS} days, not {}", new.days)));
    }
    let address = match &new.address {
        Some(address) => checked_address(address).map_err(BackupError::Usage)?.to_owned(),
        None => settings.address()?,
    };
    let server_name = settings.server_name()?;
    let own_pki = settings.server_ca()?;
    check_owner(settings.authority())?;
    let now = now();
    let authority = Authority::open_or_make(settings.authority(), now)?;
    let server_ca = own_pki.unwrap_or_else(|| authority.pem().to_owned());
    let vms = match new.vms.is_empty() {
        true => vec![ANY.to_owned()],
        false => new.vms.iter().map(|vm| vm.as_str().to_owned()).collect(),
    };
    let registry = settings.registry();
    let audit = settings.audit()?;
    let is_given = new.name.is_some();
    for nth in 1..NAMES {
        let name = match &new.name {
            Some(name) => name.clone(),
            None => name_of(output, nth)?,
        };
        if registry.find(&new.tenant, &name)?.is_some() && !is_given {
            continue;
        }
        let (issued, key) = authority.enrol(&name, new.days, now)?;
        let enrolled =
            Enrolled::new(name, new.tenant.clone(), new.role, vms.clone(), new.days, issued.certificate.clone());
        if !registry.add(&enrolled)? {
            if is_given {
                break;
            }
            continue;
        }
        if let Err(e) = audit.record(&event(What::Enrolled, &enrolled)) {
            registry.take_back(&enrolled)?;
            return Err(BackupError::Usage(format!("nobody was enrolled: {e}")));
        }
        let file = File { address: &address, server_name: &server_name, server_ca: &server_ca, enrolled: &enrolled };
        let text = file.text(&issued.pem, &key);
        let staged = beside(output, &format!(".new-{}", hex::encode(random::<8>()?)));
        let written = write_new(output, &staged, text.as_bytes()).map_err(|e| {
            let why = reseal_cli::Failure::of(reseal_cli::Status::Usage, &e).message;
            BackupError::Usage(format!("the enrolment file {} can't be made: {why}", output.display()))
        });
        return match written {
            Ok(true) => Ok((enrolled, address)),
            other => {
                registry.take_back(&enrolled)?;
                let why = other.err().unwrap_or_else(|| taken(output));
                // It is in the log that somebody was enrolled, and has no file: what went wrong is said in any case.
                let _ = audit.record(&event(What::Failed, &enrolled).because(&why.to_string()));
                Err(why)
            }
        };
    }
    let name = new.name.map(|name| name.to_string()).unwrap_or_default();
    Err(BackupError::Usage(format!(
        "tenant {} has or had a client {name} already: choose another name with --name",
        new.tenant
    )))
}

fn taken(output: &Path) -> BackupError {
    BackupError::Usage(format!("{} exists already: it is kept as it is; name another file with -o", output.display()))
}

/// A name for a client: that of its file, with a number from the second on.
fn name_of(output: &Path, nth: u32) -> Result<ClientName, BackupError> {
    let stem = output.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    let name = if nth == 1 { stem } else { format!("{stem}-{nth}") };
    ClientName::new(&name).map_err(|e| BackupError::Usage(format!("{e}; choose one with --name")))
}

/// An enrolment file.
struct File<'a> {
    address: &'a str,
    server_name: &'a str,
    server_ca: &'a str,
    enrolled: &'a Enrolled,
}

/// A string as TOML writes it. That is as JSON does, where no control characters are.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

impl File<'_> {
    fn text(&self, certificate: &str, key: &str) -> Zeroizing<String> {
        let enrolled = self.enrolled;
        let vms: Vec<_> = enrolled.vms.iter().map(|vm| quoted(vm)).collect();
        let times = enrolled.newest().map(|newest| (newest.issued, newest.expires));
        let (issued, expires) = times.unwrap_or((Timestamp(0), Timestamp(0)));
        // Room for all of it: a text that grows would leave pieces of the key behind.
        let mut text = Zeroizing::new(String::with_capacity(
            4096 + self.server_ca.len() + certificate.len() + key.len() + vms.iter().map(String::len).sum::<usize>(),
        ));
        let lines = [
            "# A site's place at another. For one machine only: keep it private, and make no copies, for it renews itself.",
            "version = 1",
            &format!("address = {}", quoted(self.address)),
            &format!("server_name = {}", quoted(self.server_name)),
            &format!("tenant = {}", quoted(enrolled.tenant.as_str())),
            &format!("client = {}", quoted(enrolled.name.as_str())),
            &format!("role = {}", quoted(&enrolled.role.to_string())),
            &format!("vms = [{}]", vms.join(", ")),
            &format!("issued = {}", quoted(&issued.to_rfc3339())),
            &format!("expires = {}", quoted(&expires.to_rfc3339())),
        ];
        for line in lines {
            text.push_str(line);
            text.push('\n');
        }
        for (field, pem) in [("server_ca", self.server_ca), ("certificate", certificate), ("key", key)] {
            for part in [field, " = \"\"\"\n", pem, "\"\"\"\n"] {
                text.push_str(part);
            }
        }
        text
    }
}

/// Who was enrolled, and what of the registry can't be read.
pub fn clients(settings: &Settings) -> Result<(Vec<Enrolled>, Vec<String>), BackupError> {
    let everybody = settings.registry().everybody()?;
    Ok((everybody.enrolled, everybody.faults))
}

/// Revokes a client: its certificates are taken no more, and its connections end. False if it was revoked before.
pub fn revoke(settings: &Settings, tenant: &TenantName, name: &ClientName) -> Result<bool, BackupError> {
    check_owner(settings.authority())?;
    let revoked = settings.registry().change(tenant, name, |enrolled| {
        let is_new = enrolled.revoked.is_none();
        enrolled.revoked.get_or_insert(now());
        Ok(is_new.then(|| enrolled.clone()))
    })?;
    let Some(enrolled) = revoked else { return Ok(false) };
    // It is revoked, whether or not that can be noted.
    let noted = settings.audit().and_then(|audit| {
        audit.record(&event(What::Revoked, &enrolled)).map_err(|e| BackupError::Usage(e.to_string()))
    });
    match noted {
        Ok(()) => Ok(true),
        Err(e) => {
            Err(BackupError::Usage(format!("{name} of tenant {tenant} is revoked, but that could not be noted: {e}")))
        }
    }
}

/// What happened to a client, for the audit log.
fn event(what: What, enrolled: &Enrolled) -> Event<'_> {
    Event {
        client: Some(enrolled.name.as_str()),
        certificate_sha256: enrolled.newest().map(|newest| newest.sha256),
        tenant: Some(&enrolled.tenant),
        ..Event::new(what)
    }
}
