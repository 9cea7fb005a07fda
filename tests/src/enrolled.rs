//! A target that issues its clients' certificates itself, and a source that is enrolled there.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rcgen::{ExtendedKeyUsagePurpose, date_time_ymd};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::ports::free_port;
use crate::process::{Run, Running, signal};
use crate::random::Random;
use crate::remote::{Authority, Identity, private, serve};
use crate::site::Site;

const DAY: i64 = 86_400;

/// Both sites. The target has the tenants `default` and `acme`.
pub struct Enrolling {
    pub target: Site,
    pub source: Site,
    pub port: u16,
    server: Option<Running>,
}

impl Enrolling {
    /// Both, with a server that has the shortest configuration that there is.
    pub fn new() -> Enrolling {
        let mut sites = Enrolling::stopped();
        sites.start();
        sites
    }

    /// The same before the server's first start.
    pub fn stopped() -> Enrolling {
        let (target, source, port) = (Site::new(), Site::bare(), free_port());
        target.reseal(["tenant", "add", "acme", "--no-recovery"]).ok();
        let config =
            format!("listen = \"127.0.0.1:{port}\"\naddress = \"localhost:{port}\"\nrepo = {:?}\n", target.vault);
        private(target.path("serve.toml"), &config);
        Enrolling { target, source, port, server: None }
    }

    /// Starts the server.
    pub fn start(&mut self) {
        self.server = Some(serve(&self.target, self.port));
    }

    /// Ends the server; what it printed.
    pub fn stop(&mut self) -> String {
        let server = self.server.take().unwrap();
        signal(server.id(), libc::SIGTERM);
        server.wait().ok().stderr
    }

    /// Kills the server.
    pub fn kill(&mut self) {
        self.server.take().unwrap().kill();
    }

    /// `reseal tenant …` with this server's configuration.
    pub fn tenant(&self, words: &[&str]) -> Run {
        let config = self.target.path("serve.toml");
        let mut all = vec!["tenant"];
        all.extend(words);
        all.extend(["--config", config.to_str().unwrap()]);
        self.target.reseal(all)
    }

    /// Enrols a client; its file, which is at the source.
    #[track_caller]
    pub fn enrol(&self, tenant: &str, name: &str, role: &str, more: &[&str]) -> PathBuf {
        let file = self.source.path(format!("{name}.reseal"));
        let words = ["enroll", tenant, "--role", role, "-o", file.to_str().unwrap()];
        self.tenant(&words.iter().chain(more).copied().collect::<Vec<_>>()).ok();
        file
    }

    /// The words of a backup with an enrolment file.
    pub fn words(file: &Path, vm: &str, disk: &Path) -> Vec<String> {
        let words = ["--repo", file.to_str().unwrap(), "--json", "backup", vm, disk.to_str().unwrap()];
        words.map(str::to_owned).to_vec()
    }

    /// Backs up with an enrolment file.
    pub fn backup(&self, file: &Path, vm: &str, disk: &Path) -> Run {
        self.source.reseal(Enrolling::words(file, vm, disk))
    }

    /// A disk of random content.
    pub fn disk(&self, name: &str, bytes: usize) -> PathBuf {
        let path = self.source.disk(name);
        let file = fs::File::create(&path).unwrap();
        file.write_all_at(&Random::new(bytes as u64).bytes(bytes), 0).unwrap();
        path
    }

    /// Restore points of a tenant.
    pub fn points(&self, tenant: &str) -> usize {
        let prefix = format!("tenants/{tenant}/");
        let is_point = |key: &&String| key.starts_with(&prefix) && key.ends_with(".manifest");
        self.target.objects().iter().filter(is_point).count()
    }

    /// The server's authority.
    pub fn authority(&self) -> Authority {
        Authority::read(&self.target.path("authority/authority.pem"))
    }

    /// The file of a client in the registry.
    pub fn registered(&self, tenant: &str, name: &str) -> PathBuf {
        self.target.path(format!("authority/clients/{tenant}/{name}.json"))
    }

    /// What the registry has of a client.
    pub fn record(&self, tenant: &str, name: &str) -> Value {
        serde_json::from_slice(&fs::read(self.registered(tenant, name)).unwrap()).unwrap()
    }

    /// A certificate that is valid between two days from now, registered as the only one of a client and put in its file, if
    /// there is one.
    pub fn aged(&self, tenant: &str, name: &str, file: &Path, days: std::ops::Range<i64>) -> Identity {
        let identity = between(&self.authority(), days.clone());
        let mut record = self.record(tenant, name);
        let time = |days| rfc3339(now() + days * DAY);
        record["certificates"] = json!([{
            "sha256": identity.sha256, "serial": "00", "issued": time(days.start), "expires": time(days.end),
        }]);
        private(self.registered(tenant, name).with_file_name(".test"), &record.to_string());
        fs::rename(self.registered(tenant, name).with_file_name(".test"), self.registered(tenant, name)).unwrap();
        put(file, &identity);
        identity
    }
}

impl Default for Enrolling {
    fn default() -> Enrolling {
        Enrolling::new()
    }
}

impl Drop for Enrolling {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.kill();
        }
    }
}

/// Seconds since 1970.
fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs().try_into().unwrap()
}

fn rfc3339(seconds: i64) -> String {
    reseal_format::time::Timestamp(seconds * 1000).to_rfc3339()
}

/// A client's certificate that is valid between two days from now.
pub fn between(authority: &Authority, days: std::ops::Range<i64>) -> Identity {
    let at = |days: i64| date_time_ymd(1970, 1, 1) + Duration::from_secs((now() + days * DAY).try_into().unwrap());
    authority.issue(|params| {
        params.not_before = at(days.start);
        params.not_after = at(days.end);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    })
}

/// Between which bytes of a file's text a field has its PEM text.
fn span(text: &str, field: &str) -> (usize, usize) {
    let start = text.find(&format!("\n{field} = \"\"\"\n")).unwrap() + field.len() + 8;
    (start, start + text[start..].find("\"\"\"").unwrap())
}

/// A field of an enrolment file that holds PEM text.
pub fn field(file: &Path, field: &str) -> String {
    let text = fs::read_to_string(file).unwrap();
    let (start, end) = span(&text, field);
    text[start..end].to_owned()
}

/// The certificate of an enrolment file with its key.
pub fn identity(file: &Path) -> Identity {
    let (certificate, key) = (field(file, "certificate"), field(file, "key"));
    use rustls::pki_types::pem::PemObject;
    let der = rustls::pki_types::CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
    Identity { sha256: hex::encode(Sha256::digest(der)), certificate, key }
}

/// Puts another certificate with its key in an enrolment file.
pub fn put(file: &Path, identity: &Identity) {
    let mut text = fs::read_to_string(file).unwrap();
    for (field, new) in [("certificate", &identity.certificate), ("key", &identity.key)] {
        let (start, end) = span(&text, field);
        text.replace_range(start..end, new);
    }
    private(file.to_owned(), &text);
}
