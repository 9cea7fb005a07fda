//! The server's configuration: who may come, and as whom.
//!
//! ```toml
//! listen = "0.0.0.0:7443"
//! repo = "/srv/vault"
//!
//! [tls]
//! certificate = "/etc/reseal/server.pem"   # with its chain
//! key = "/etc/reseal/server.key"           # mode 0600
//! client_ca = "/etc/reseal/clients.pem"    # what issues the clients' certificates
//!
//! [[client]]
//! name = "acme-site1"                      # for logs
//! certificate_sha256 = "9f86d081…"         # of the certificate in DER form
//! tenant = "acme"
//! role = "append"
//! vms = ["web01", "db01"]                  # or ["*"] for any
//! ```

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use reseal_format::names::{TenantName, VmName};
use reseal_kms::{read_private, read_trusted};
use reseal_proto::wire::ALPN;
use rustls::ServerConfig;
use rustls::server::WebPkiClientVerifier;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::BackupError;
use crate::pem;

/// Longest file that is read.
const MAX_FILE: u64 = 4 << 20;
/// Stands for any VM.
const ANY: &str = "*";

/// What a certificate may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Add restore points.
    Append,
    /// Read them.
    Restore,
    /// Look after them.
    Admin,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    listen: SocketAddr,
    repo: Option<String>,
    tls: Tls,
    #[serde(default)]
    client: Vec<Client>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Tls {
    certificate: PathBuf,
    key: PathBuf,
    client_ca: PathBuf,
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
}

impl Client {
    /// Whether it may add restore points of a VM.
    pub(super) fn may_append(&self, vm: &VmName) -> bool {
        self.role == Role::Append && self.vms.iter().any(|allowed| allowed == ANY || allowed == vm.as_str())
    }
}

/// A configuration that was checked.
pub struct ServeConfig {
    pub listen: SocketAddr,
    /// The vault, unless it is named elsewhere.
    pub repo: Option<String>,
    pub(super) tls: Arc<ServerConfig>,
    clients: Vec<Client>,
}

impl ServeConfig {
    /// Reads and checks the file, and those that it names.
    pub fn read(path: &Path) -> Result<ServeConfig, BackupError> {
        let wrong = |what: String| BackupError::Usage(format!("{}: {what}", path.display()));
        let said = |e: reseal_kms::KmsError| BackupError::Usage(e.to_string());
        let missing = |path: &Path| BackupError::Usage(format!("{}: there is no such file", path.display()));
        let trusted = |path: &Path| read_trusted(path, MAX_FILE).map_err(said)?.ok_or_else(|| missing(path));
        let text = trusted(path)?;
        let text = std::str::from_utf8(&text).map_err(|_| wrong("it is not UTF-8".into()))?;
        let file: File = toml::from_str(text).map_err(|e| wrong(e.to_string().trim_end().replace('\n', " ")))?;
        let clients = checked(file.client).map_err(wrong)?;
        let Tls { certificate, key, client_ca } = &file.tls;
        let of = |path: &Path, what: String| BackupError::Usage(format!("{}: {what}", path.display()));
        let private = read_private(key, MAX_FILE).map_err(said)?.ok_or_else(|| missing(key))?;
        let identity = pem::identity(&trusted(certificate)?, &private)
            .map_err(|e| of(certificate, format!("{e} (with the key {})", key.display())))?;
        let roots = pem::authorities(&trusted(client_ca)?).map_err(|e| of(client_ca, e))?;
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), pem::provider()).build();
        let verifier = verifier.map_err(|e| of(client_ca, e.to_string()))?;
        let mut tls = ServerConfig::builder_with_provider(pem::provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| wrong(format!("TLS can't be set up: {e}")))?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(identity)));
        tls.alpn_protocols = vec![ALPN.to_vec()];
        // Each connection shows its certificate anew.
        tls.send_tls13_tickets = 0;
        tls.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        Ok(ServeConfig { listen: file.listen, repo: file.repo, tls: Arc::new(tls), clients })
    }

    /// The tenants that anybody may come as.
    pub fn tenants(&self) -> Vec<TenantName> {
        let mut tenants: Vec<_> = self.clients.iter().map(|client| client.tenant.clone()).collect();
        tenants.sort();
        tenants.dedup();
        tenants
    }

    /// Who has that certificate, in DER form.
    pub(super) fn who(&self, certificate: &[u8]) -> Option<&Client> {
        let digest: [u8; 32] = Sha256::digest(certificate).into();
        self.clients.iter().find(|client| client.certificate_sha256 == digest)
    }
}

fn checked(clients: Vec<Client>) -> Result<Vec<Client>, String> {
    if clients.is_empty() {
        return Err("it has no [[client]], so nobody could come".into());
    }
    for (nth, client) in clients.iter().enumerate() {
        let name = &client.name;
        if name.is_empty() || name.chars().any(char::is_control) {
            return Err(format!("the name {name:?} of a client is empty or can't be printed"));
        }
        if clients[..nth].iter().any(|other| other.certificate_sha256 == client.certificate_sha256) {
            return Err(format!("the certificate of client {name} is named twice: each belongs to one"));
        }
        if client.role == Role::Append && client.vms.is_empty() {
            return Err(format!("client {name} may append, but vms names none; [\"*\"] stands for any"));
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
