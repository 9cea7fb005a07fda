//! The server's configuration: who may come, and as whom.
//!
//! ```toml
//! listen = "0.0.0.0:7443"
//! address = "backup.example.com:7443"      # where clients reach it
//! repo = "/srv/vault"
//!
//! [authority]
//! folder = "/etc/reseal/authority"         # the default: beside this file
//! ```
//!
//! Certificates are issued by the site's own [`authority`](super::authority), and clients are enrolled by command. With one's own
//! PKI, for all clients or for some:
//!
//! ```toml
//! [tls]
//! certificate = "/etc/reseal/server.pem"   # with its chain
//! key = "/etc/reseal/server.key"           # mode 0600
//! client_ca = "/etc/reseal/clients.pem"    # what issues the clients' certificates
//! crl = "/etc/reseal/clients.crl"          # those of them that were revoked
//! server_ca = "/etc/reseal/ca.pem"         # what issued the server's: for who is enrolled by command
//!
//! [[client]]
//! name = "acme-site1"                      # for logs
//! certificate_sha256 = "9f86d081…"         # of the certificate in DER form
//! tenant = "acme"
//! role = "append"
//! vms = ["web01", "db01"]                  # or ["*"] for any
//! ```
//!
//! What else it may say is in [`super::operation`].
//!
//! A [`ServeConfig`] is what all that says at one moment, with the registry of the clients; it never changes. When the registry
//! does, or the server's certificate grows old, another takes its place.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use reseal_format::names::{TenantName, VmName};
use reseal_format::time::Timestamp;
use reseal_kms::{read_private, read_trusted};
use rustls::ServerConfig;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::audit::Audit;
use super::authority::Authority;
use super::operation::{AuditFile, Limits, Log, MetricsAt, Operation};
use super::registry::{Enrolled, Look, Registry};
use super::tls::{Pki, server_config};
use crate::BackupError;
use reseal_site::certificate::{Validity, now};
use reseal_site::pem;

/// Longest file that is read.
const MAX_FILE: u64 = 4 << 20;
/// Stands for any VM.
pub(super) const ANY: &str = "*";

/// What a certificate may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Add restore points.
    Append,
    /// Read them.
    Restore,
    /// Look after them.
    Admin,
}

impl Role {
    /// As the configuration names it.
    pub fn as_str(self) -> &'static str {
        match self {
            Role::Append => "append",
            Role::Restore => "restore",
            Role::Admin => "admin",
        }
    }
}

impl std::fmt::Display for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    listen: SocketAddr,
    address: Option<String>,
    repo: Option<String>,
    authority: Option<OwnAuthority>,
    tls: Option<Tls>,
    #[serde(default)]
    client: Vec<Client>,
    #[serde(default)]
    limits: Limits,
    #[serde(default)]
    log: Log,
    audit: Option<AuditFile>,
    metrics: Option<MetricsAt>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OwnAuthority {
    folder: PathBuf,
}

/// One's own PKI.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tls {
    certificate: PathBuf,
    key: PathBuf,
    client_ca: PathBuf,
    crl: Option<PathBuf>,
    server_ca: Option<PathBuf>,
}

/// One who may come.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Client {
    pub name: String,
    #[serde(with = "hex")]
    certificate_sha256: [u8; 32],
    pub tenant: TenantName,
    pub role: Role,
    vms: Vec<String>,
    /// As it was enrolled; `None` where the configuration names it.
    #[serde(skip)]
    pub(super) enrolled: Option<Arc<Enrolled>>,
}

impl Client {
    /// Whether it may add restore points of a VM.
    pub(super) fn may_append(&self, vm: &VmName) -> bool {
        self.role == Role::Append && self.names(vm)
    }

    /// Whether it reads restore points, and so makes none.
    pub(super) fn reads(&self) -> bool {
        matches!(self.role, Role::Restore | Role::Admin)
    }

    /// Whether it may read restore points of a VM. Of others it does not learn that they are there.
    pub(super) fn may_read(&self, vm: &VmName) -> bool {
        self.reads() && self.names(vm)
    }

    fn names(&self, vm: &VmName) -> bool {
        self.vms.iter().any(|allowed| allowed == ANY || allowed == vm.as_str())
    }

    /// Whether it may do what that client, as it was let in, does with a VM.
    pub(super) fn covers(&self, other: &Client, vm: Option<&VmName>) -> bool {
        (&self.tenant, self.role) == (&other.tenant, other.role) && vm.is_none_or(|vm| self.names(vm))
    }

    /// The VMs that it names.
    pub fn vms(&self) -> &[String] {
        &self.vms
    }

    /// The digest of its certificate.
    pub(super) fn certificate(&self) -> &[u8; 32] {
        &self.certificate_sha256
    }

    /// Whether older certificates of it would still be taken.
    pub(super) fn has_older(&self) -> bool {
        let certificates = self.enrolled.iter().flat_map(|enrolled| &enrolled.certificates);
        let mut older = certificates.take_while(|certificate| certificate.sha256 != self.certificate_sha256);
        older.any(|certificate| certificate.superseded.is_none())
    }
}

/// How a certificate stands that somebody shows.
enum Standing {
    Good(Client),
    /// A newer one has been used: nobody new comes with it, and who is there stays.
    Superseded(Client),
    Revoked,
}

/// What the configuration file says, checked as far as it says it alone.
pub struct Settings {
    path: PathBuf,
    listen: SocketAddr,
    address: Option<String>,
    pub repo: Option<String>,
    /// Folder of the site's own authority, and of the registry.
    authority: PathBuf,
    tls: Option<Tls>,
    clients: Vec<Client>,
    operation: Operation,
}

/// The host of an address, which its port follows.
fn host(address: &str) -> Option<&str> {
    let (host, port) = address.rsplit_once(':')?;
    let host = match host.strip_prefix('[') {
        Some(host) => host.strip_suffix(']')?,
        None => Some(host).filter(|host| !host.contains(':'))?,
    };
    let is_port = port.parse::<u16>().is_ok_and(|port| port != 0);
    (is_port && rustls::pki_types::ServerName::try_from(host).is_ok()).then_some(host)
}

/// An address that clients may be given, as HOST:PORT.
pub(super) fn checked_address(address: &str) -> Result<&str, String> {
    match host(address) {
        Some(_) => Ok(address),
        None => Err(format!("{address:?} is no address of a server; one is HOST:PORT, as backup.example.com:7443")),
    }
}

impl Settings {
    /// Reads the file.
    pub fn read(path: &Path) -> Result<Settings, BackupError> {
        let wrong = |what: String| BackupError::Usage(format!("{}: {what}", path.display()));
        let text = trusted(path)?;
        let text = std::str::from_utf8(&text).map_err(|_| wrong("it is not UTF-8".into()))?;
        let file: File = toml::from_str(text).map_err(|e| wrong(e.to_string().trim_end().replace('\n', " ")))?;
        let clients = checked(file.client).map_err(wrong)?;
        let operation = Operation { limits: file.limits, log: file.log, audit: file.audit, metrics: file.metrics };
        let operation = operation.checked().map_err(wrong)?;
        if file.tls.is_none() && !clients.is_empty() {
            return Err(wrong(
                "it names clients with [[client]], but no [tls] with the authority that issued their certificates; \
                 clients that are enrolled by command are not named here"
                    .into(),
            ));
        }
        file.address.as_deref().map(checked_address).transpose().map_err(|e| wrong(format!("address: {e}")))?;
        let beside = path.parent().unwrap_or(Path::new(""));
        let folder = file.authority.map_or_else(|| "authority".into(), |authority| authority.folder);
        Ok(Settings {
            path: path.to_owned(),
            listen: file.listen,
            address: file.address,
            repo: file.repo,
            authority: beside.join(folder),
            tls: file.tls,
            clients,
            operation,
        })
    }

    /// Where clients reach the server.
    pub(super) fn address(&self) -> Result<String, BackupError> {
        match &self.address {
            Some(address) => Ok(address.clone()),
            None if !self.listen.ip().is_unspecified() => Ok(self.listen.to_string()),
            None => Err(BackupError::Usage(format!(
                "{}: where do clients reach this server? Add address = \"HOST:PORT\"",
                self.path.display()
            ))),
        }
    }

    /// The name that the server's certificate is for.
    pub(super) fn server_name(&self) -> Result<String, BackupError> {
        let address = self.address()?;
        // It was checked, or is that of a socket.
        host(&address).map(str::to_owned).ok_or_else(|| BackupError::Usage(format!("{address} has no host")))
    }

    /// The audit log, for a command: whoever else appends to it, lines stay whole.
    pub(super) fn audit(&self) -> Result<Audit, BackupError> {
        let audit = Audit::default();
        let file = self.operation.audit.as_ref().map(|audit| &*audit.file);
        audit
            .reopen(file)
            .map_err(|e| of(file.unwrap_or(&self.path), format!("the audit log can't be opened: {e}")))?;
        Ok(audit)
    }

    pub(super) fn authority(&self) -> &Path {
        &self.authority
    }

    /// The clients that were enrolled by command.
    pub fn registry(&self) -> Registry {
        Registry::of(&self.authority)
    }

    /// The clients that the file names.
    pub fn named(&self) -> &[Client] {
        &self.clients
    }

    /// The authority that a client is to trust, in PEM form, where that is of one's own PKI.
    pub(super) fn server_ca(&self) -> Result<Option<String>, BackupError> {
        let Some(tls) = &self.tls else { return Ok(None) };
        let Some(path) = &tls.server_ca else {
            return Err(BackupError::Usage(format!(
                "{}: the server's certificate is of your own PKI. So that clients know it, name the authority that issued it: \
                 server_ca = \"FILE\" in [tls]",
                self.path.display()
            )));
        };
        let text = trusted(path)?;
        pem::authorities(&text).map_err(|e| of(path, e))?;
        // Nothing but the certificates: what else is in the file is not for others.
        let certificates = pem::certificates(&text).map_err(|e| of(path, e))?;
        Ok(Some(certificates.iter().map(|certificate| pem::certificate(certificate)).collect()))
    }

    /// What one's own PKI says.
    fn pki(&self) -> Result<Option<Pki>, BackupError> {
        let Some(Tls { certificate, key, client_ca, crl, .. }) = &self.tls else { return Ok(None) };
        let private = read_private(key, MAX_FILE).map_err(said)?.ok_or_else(|| missing(key))?;
        let identity = pem::identity(&trusted(certificate)?, &private)
            .map_err(|e| of(certificate, format!("{e} (with the key {})", key.display())))?;
        let roots = pem::authorities(&trusted(client_ca)?).map_err(|e| of(client_ca, e))?;
        let revoked = match crl {
            Some(path) => pem::revocations(&trusted(path)?).map_err(|e| of(path, e))?,
            None => Vec::new(),
        };
        let named = crl.as_ref().unwrap_or(client_ca);
        Pki::new(identity, roots, revoked).map(Some).map_err(|e| of(named, e))
    }

    /// What the files that matter look like. Certificates and lists of one's own PKI are read when the server starts.
    fn look(&self) -> Result<Look, BackupError> {
        let mut look = self.registry().look()?;
        if let Ok(meta) = std::fs::metadata(&self.authority) {
            look.add(self.authority.clone(), &meta);
        }
        Ok(look)
    }
}

fn said(e: reseal_kms::KmsError) -> BackupError {
    BackupError::Usage(reseal_cli::Failure::of(reseal_cli::Status::Usage, &e).message)
}

fn of(path: &Path, what: String) -> BackupError {
    BackupError::Usage(format!("{}: {what}", path.display()))
}

fn missing(path: &Path) -> BackupError {
    of(path, "there is no such file".into())
}

fn trusted(path: &Path) -> Result<reseal_kms::Secret, BackupError> {
    read_trusted(path, MAX_FILE).map_err(said)?.ok_or_else(|| missing(path))
}

/// A configuration that was checked.
pub struct ServeConfig {
    pub listen: SocketAddr,
    /// The vault, unless it is named elsewhere.
    pub repo: Option<String>,
    /// Limits, log, audit, metrics.
    pub operation: Operation,
    /// Who could not be read, and so can't come.
    pub faults: Vec<String>,
    pub(super) tls: Arc<ServerConfig>,
    /// When the server's certificate ends.
    pub(super) certificate_ends: Timestamp,
    settings: Arc<Settings>,
    pki: Option<Arc<Pki>>,
    clients: HashMap<[u8; 32], Standing>,
    look: Look,
    /// When the server needs another certificate.
    reissue: Option<Timestamp>,
}

impl ServeConfig {
    /// Reads and checks the file, and those that it names. Without an own PKI, the site's authority is made if there is none.
    pub fn read(path: &Path) -> Result<ServeConfig, BackupError> {
        let settings = Settings::read(path)?;
        let pki = settings.pki()?.map(Arc::new);
        if pki.is_none() {
            settings.server_name()?;
            Authority::open_or_make(&settings.authority, now())?;
        }
        let config = ServeConfig::of(Arc::new(settings), pki, now())?;
        if config.settings.clients.is_empty() && config.pki.is_some() && config.clients.is_empty() {
            let what = "it has no [[client]], and none was enrolled, so nobody could come";
            return Err(of(path, what.into()));
        }
        Ok(config)
    }

    fn of(settings: Arc<Settings>, pki: Option<Arc<Pki>>, now: Timestamp) -> Result<ServeConfig, BackupError> {
        // Before anything is read: what changes meanwhile shows the next time.
        let look = settings.look()?;
        let authority = Authority::open(&settings.authority)?;
        let (identity, reissue) = match (&pki, &authority) {
            (Some(pki), _) => (pki.identity(), None),
            (None, Some(authority)) => {
                let (identity, due) = authority.server(&settings.server_name()?, now)?;
                (Arc::new(identity), Some(due))
            }
            (None, None) => return Err(of(&settings.authority, "the site's authority is gone".into())),
        };
        let certificate = identity.cert.first().map(|certificate| Validity::of(certificate));
        let certificate = certificate.unwrap_or_else(|| Err("there is no certificate".into()));
        let certificate_ends = certificate.map_err(|e| of(&settings.path, format!("its certificate: {e}")))?.expires;
        let verifiers = match &authority {
            Some(authority) => vec![authority.verifier()?],
            None => Vec::new(),
        };
        let verifiers = pki.iter().map(|pki| pki.verifier()).chain(verifiers).collect();
        let tls = server_config(identity, verifiers).map_err(|e| of(&settings.path, e))?;
        let mut clients = HashMap::new();
        let everybody = settings.registry().everybody()?;
        for enrolled in everybody.enrolled {
            let enrolled = Arc::new(enrolled);
            for certificate in &enrolled.certificates {
                let client = Client {
                    name: enrolled.name.as_str().to_owned(),
                    certificate_sha256: certificate.sha256,
                    tenant: enrolled.tenant.clone(),
                    role: enrolled.role,
                    vms: enrolled.vms.clone(),
                    enrolled: Some(enrolled.clone()),
                };
                let standing = match (enrolled.revoked, certificate.superseded) {
                    (Some(_), _) => Standing::Revoked,
                    (None, Some(_)) => Standing::Superseded(client),
                    (None, None) => Standing::Good(client),
                };
                clients.insert(certificate.sha256, standing);
            }
        }
        for client in &settings.clients {
            clients.insert(client.certificate_sha256, Standing::Good(client.clone()));
        }
        let (listen, repo, operation) = (settings.listen, settings.repo.clone(), settings.operation.clone());
        let (faults, tls) = (everybody.faults, Arc::new(tls));
        Ok(ServeConfig {
            listen,
            repo,
            operation,
            faults,
            tls,
            certificate_ends,
            settings,
            pki,
            clients,
            look,
            reissue,
        })
    }

    /// What takes its place, if the registry has changed or the server needs another certificate.
    pub(super) fn successor(&self, now: Timestamp) -> Result<Option<ServeConfig>, BackupError> {
        if self.reissue.is_none_or(|due| now < due) && self.settings.look()? == self.look {
            return Ok(None);
        }
        ServeConfig::of(self.settings.clone(), self.pki.clone(), now).map(Some)
    }

    /// The tenants that anybody may come as.
    pub fn tenants(&self) -> Vec<TenantName> {
        let good = |standing: &Standing| match standing {
            Standing::Good(client) => Some(client.tenant.clone()),
            _ => None,
        };
        let mut tenants: Vec<_> = self.clients.values().filter_map(good).collect();
        tenants.sort();
        tenants.dedup();
        tenants
    }

    /// Whether the configuration file itself names a client of a tenant.
    pub fn names(&self, tenant: &TenantName) -> bool {
        self.settings.clients.iter().any(|client| client.tenant == *tenant)
    }

    /// Who may come with the certificate of that digest.
    pub(super) fn who(&self, digest: &[u8; 32]) -> Option<&Client> {
        match self.clients.get(digest) {
            Some(Standing::Good(client)) => Some(client),
            _ => None,
        }
    }

    /// Whether who came with the certificate of that digest may go on with what he does. That it was superseded meanwhile does not
    /// matter.
    pub(super) fn may_stay(&self, digest: &[u8; 32], as_what: &Client, vm: Option<&VmName>) -> bool {
        match self.clients.get(digest) {
            Some(Standing::Good(client) | Standing::Superseded(client)) => client.covers(as_what, vm),
            _ => false,
        }
    }

    /// Whether the certificate of that digest was revoked.
    pub(super) fn is_revoked(&self, digest: &[u8; 32]) -> bool {
        matches!(self.clients.get(digest), Some(Standing::Revoked))
    }

    /// Why a certificate that the authority issued is not taken.
    pub(super) fn why_not(&self, digest: &[u8; 32]) -> &'static str {
        match self.clients.get(digest) {
            Some(Standing::Revoked) => {
                "the certificate was revoked at this site; whoever runs it can enrol a new client"
            }
            Some(Standing::Superseded(_)) => {
                "the certificate was renewed, and the new one has been used: this enrolment file is an older copy. Each machine \
                 needs one of its own; whoever runs this site can enrol another client"
            }
            _ => {
                "this site does not know the certificate; whoever runs it can enrol a client, or name the certificate in the \
                 configuration"
            }
        }
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }
}

/// The digest of a certificate in DER form.
pub(super) fn digest(certificate: &[u8]) -> [u8; 32] {
    Sha256::digest(certificate).into()
}

fn checked(clients: Vec<Client>) -> Result<Vec<Client>, String> {
    for (nth, client) in clients.iter().enumerate() {
        let name = &client.name;
        if name.is_empty() || name.chars().any(char::is_control) {
            return Err(format!("the name {name:?} of a client is empty or can't be printed"));
        }
        if clients[..nth].iter().any(|other| other.certificate_sha256 == client.certificate_sha256) {
            return Err(format!("the certificate of client {name} is named twice: each belongs to one"));
        }
        if client.role != Role::Admin && client.vms.is_empty() {
            return Err(format!("client {name} may {}, but vms names none; [\"*\"] stands for any", client.role));
        }
        for vm in client.vms.iter().filter(|vm| *vm != ANY) {
            VmName::new(vm).map_err(|e| format!("client {name}: {e}"))?;
        }
    }
    Ok(clients)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clients(text: &str) -> Result<Vec<Client>, String> {
        #[derive(Deserialize)]
        struct Clients {
            client: Vec<Client>,
        }
        let parsed: Clients = toml::from_str(text).map_err(|e| e.message().to_owned())?;
        checked(parsed.client)
    }

    fn client(name: &str, digit: char, role: &str, vms: &str) -> String {
        let digest = digit.to_string().repeat(64);
        format!(
            "[[client]]\nname = {name:?}\ncertificate_sha256 = \"{digest}\"\ntenant = \"acme\"\nrole = {role:?}\nvms = {vms}\n"
        )
    }

    #[test]
    fn an_appender_may_add_to_the_vms_that_are_named_and_others_to_none() {
        let text = [
            client("a", '1', "append", "[\"web01\"]"),
            client("b", '2', "append", "[\"*\"]"),
            client("c", '3', "restore", "[\"*\"]"),
        ];
        let clients = clients(&text.concat()).unwrap();
        let may =
            |vm: &str| clients.iter().map(|client| client.may_append(&VmName::new(vm).unwrap())).collect::<Vec<_>>();
        assert_eq!(may("web01"), [true, true, false]);
        assert_eq!(may("web02"), [false, true, false]);
        let may =
            |vm: &str| clients.iter().map(|client| client.may_read(&VmName::new(vm).unwrap())).collect::<Vec<_>>();
        assert_eq!(may("web01"), [false, false, true]);
    }

    #[test]
    fn an_address_has_a_host_and_a_port() {
        for (address, is) in [
            ("backup.example.com:7443", Some("backup.example.com")),
            ("192.0.2.1:1", Some("192.0.2.1")),
            ("[2001:db8::1]:7443", Some("2001:db8::1")),
            ("2001:db8::1:7443", None),
            ("backup.example.com", None),
            ("backup.example.com:0", None),
            ("backup.example.com:x", None),
            (":7443", None),
            ("a b:7443", None),
            ("a\nb:7443", None),
        ] {
            assert_eq!(host(address), is, "{address}");
        }
    }

    /// A configuration with nothing but what is needed.
    fn minimal() -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serve.toml");
        std::fs::write(&path, "listen = \"127.0.0.1:7443\"\naddress = \"backup.example.com:7443\"\n").unwrap();
        (folder, path)
    }

    #[test]
    fn the_servers_certificate_is_made_anew_in_time_and_the_authority_stays() {
        let (folder, path) = minimal();
        let config = ServeConfig::read(&path).unwrap();
        let authority = Authority::open(&folder.path().join("authority")).unwrap().unwrap();
        let days = |days: i64| Timestamp(now().0 + days * 86_400_000);
        assert!(config.successor(now()).unwrap().is_none() && config.successor(days(59)).unwrap().is_none());
        let next = config.successor(days(61)).unwrap().expect("another certificate");
        assert!(next.successor(days(61)).unwrap().is_none() && next.reissue > config.reissue);
        let again = Authority::open(&folder.path().join("authority")).unwrap().unwrap();
        assert_eq!(again.pem(), authority.pem());
        // An authority that vanishes is not replaced by another: nobody would know it.
        std::fs::remove_file(folder.path().join("authority/authority.pem")).unwrap();
        assert!(next.successor(days(61)).is_err());
    }

    #[test]
    fn a_configuration_that_lets_nobody_in_or_says_not_where_it_is_is_refused() {
        let (_folder, path) = minimal();
        let refused = |text: &str| {
            std::fs::write(&path, text).unwrap();
            ServeConfig::read(&path).err().expect(text).to_string()
        };
        assert!(refused("listen = \"0.0.0.0:7443\"\n").contains("address"));
        assert!(refused("listen = \"127.0.0.1:7443\"\naddress = \"backup\"\n").contains("HOST:PORT"));
        let named = client("a", '1', "append", "[\"x\"]");
        assert!(refused(&format!("listen = \"127.0.0.1:7443\"\n{named}")).contains("[tls]"));
    }

    #[test]
    fn what_makes_no_sense_is_refused_by_name() {
        let twice = client("a", '1', "append", "[\"x\"]") + &client("b", '1', "append", "[\"y\"]");
        assert!(clients(&twice).unwrap_err().contains("client b is named twice"));
        assert!(clients(&client("a", '1', "append", "[]")).unwrap_err().contains("names none"));
        assert!(clients(&client("a", '1', "append", "[\"a/b\"]")).unwrap_err().contains("client a"));
        assert!(clients(&client("a", '1', "root", "[\"x\"]")).unwrap_err().contains("unknown variant"));
        assert!(clients(&client("\u{1b}", '1', "append", "[\"x\"]")).is_err());
        assert!(clients(&client("a", 'x', "append", "[\"x\"]")).is_err());
    }
}
