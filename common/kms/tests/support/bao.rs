//! A real OpenBao server with a certificate of its own CA and raft storage, so that it can be sealed, killed and
//! started again.
//!
//! It ends with the process that started it: a shell waits beside it for the end of a pipe.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use reseal_kms::Transit;
use reseal_kms::config::{VaultAuth, VaultConfig};
use reseal_kms::transit::{Address, ApiPath};
use serde_json::{Value, json};
use tempfile::TempDir;
use ureq::tls::{Certificate, RootCerts, TlsConfig};

use super::{free_port, private_file};

/// How long a start may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// The program: `tests/scripts/setup.sh` puts it into the cache, unless another is named.
fn program() -> PathBuf {
    let variable = |name| std::env::var_os(name).map(PathBuf::from);
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().find(|folder| folder.join("Cargo.lock").exists());
    let cache = || variable("RESEAL_CACHE").unwrap_or_else(|| workspace.unwrap().join(".cache"));
    let path = variable("RESEAL_TEST_BAO").unwrap_or_else(|| cache().join("openbao/bin/bao"));
    let at = path.display();
    assert!(path.exists(), "there is no OpenBao at {at}: run tests/scripts/setup.sh, or set RESEAL_TEST_BAO");
    path
}

pub(crate) struct Bao {
    dir: TempDir,
    port: u16,
    server: Option<Child>,
    admin: ureq::Agent,
    unseal_key: String,
    pub(crate) root_token: String,
    mounts: AtomicU32,
}

/// One server for all tests that do it no harm.
pub(crate) fn shared() -> &'static Bao {
    static SHARED: OnceLock<Bao> = OnceLock::new();
    SHARED.get_or_init(Bao::start)
}

impl Bao {
    pub(crate) fn start() -> Bao {
        let dir = tempfile::tempdir().unwrap();
        let admin = write_certificates(dir.path());
        let (port, cluster) = (free_port(), free_port());
        fs::create_dir(dir.path().join("data")).unwrap();
        let at = dir.path().display();
        let config = format!(
            r#"
            storage "raft" {{
              path = "{at}/data"
              node_id = "one"
            }}
            listener "tcp" {{
              address = "127.0.0.1:{port}"
              cluster_address = "127.0.0.1:{cluster}"
              tls_cert_file = "{at}/server.pem"
              tls_key_file = "{at}/server.key"
            }}
            api_addr = "https://127.0.0.1:{port}"
            cluster_addr = "https://127.0.0.1:{cluster}"
            "#
        );
        fs::write(dir.path().join("server.hcl"), config).unwrap();
        let (unseal_key, root_token) = (String::new(), String::new());
        let mut bao = Bao { dir, port, server: None, admin, unseal_key, root_token, mounts: AtomicU32::new(0) };
        bao.launch();
        let (status, made) = bao.call("PUT", "sys/init", &json!({"secret_shares": 1, "secret_threshold": 1}));
        assert_eq!(status, 200, "{made}");
        bao.unseal_key = made["keys"][0].as_str().unwrap().to_owned();
        bao.root_token = made["root_token"].as_str().unwrap().to_owned();
        private_file(&bao.path("root.token"), &format!("{}\n", bao.root_token));
        bao.unseal();
        bao
    }

    fn launch(&mut self) {
        let script = r#""$0" server -config "$1" >>"$2" 2>&1 & server=$!; read -r _; kill -9 $server; wait"#;
        let mut shell = Command::new("sh");
        shell.args(["-c", script]).arg(program()).args([self.path("server.hcl"), self.path("log")]);
        self.server = Some(shell.stdin(Stdio::piped()).spawn().unwrap());
        self.until("answers", |bao| bao.try_call("GET", "sys/seal-status", &Value::Null).is_some());
    }

    /// Ends the server as a power cut would.
    pub(crate) fn kill(&mut self) {
        let mut server = self.server.take().unwrap();
        drop(server.stdin.take());
        server.wait().unwrap();
    }

    /// Starts it again, sealed.
    pub(crate) fn start_again(&mut self) {
        self.launch();
    }

    pub(crate) fn seal(&self) {
        assert_eq!(self.call("PUT", "sys/seal", &Value::Null).0, 204);
    }

    pub(crate) fn unseal(&self) {
        assert_eq!(self.call("PUT", "sys/unseal", &json!({"key": self.unseal_key})).0, 200);
        self.until("leads", |bao| bao.call("GET", "sys/health", &Value::Null).0 == 200);
    }

    fn until(&self, what: &str, done: impl Fn(&Bao) -> bool) {
        let end = Instant::now() + PATIENCE;
        while !done(self) {
            let log = || fs::read_to_string(self.path("log")).unwrap_or_default();
            assert!(Instant::now() < end, "OpenBao never {what}: {}", log());
            thread::sleep(Duration::from_millis(50));
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.path("ca.pem")
    }

    /// A request with the root token: status and answer.
    pub(crate) fn call(&self, method: &str, path: &str, body: &Value) -> (u16, Value) {
        self.try_call(method, path, body).unwrap_or_else(|| panic!("OpenBao does not answer {method} {path}"))
    }

    fn try_call(&self, method: &str, path: &str, body: &Value) -> Option<(u16, Value)> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("https://127.0.0.1:{}/v1/{path}", self.port))
            .header("X-Vault-Token", &self.root_token)
            .body(body)
            .unwrap();
        let request = self.admin.configure_request(request).allow_non_standard_methods(true).build();
        let mut answer = self.admin.run(request).ok()?;
        let text = answer.body_mut().read_to_string().ok()?;
        Some((answer.status().as_u16(), serde_json::from_str(&text).unwrap_or(Value::Null)))
    }

    /// The same, which must succeed.
    pub(crate) fn must(&self, method: &str, path: &str, body: &Value) -> Value {
        let (status, answer) = self.call(method, path, body);
        assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        answer
    }

    /// A transit engine with nothing in it, and where it is mounted.
    pub(crate) fn mount(&self) -> String {
        let mount = format!("transit-{}", self.mounts.fetch_add(1, Ordering::Relaxed));
        self.must("POST", &format!("sys/mounts/{mount}"), &json!({"type": "transit"}));
        mount
    }

    /// A configuration for that mount, with the root token.
    pub(crate) fn config(&self, mount: &str) -> VaultConfig {
        VaultConfig {
            address: Address::parse(&format!("https://localhost:{}", self.port)).unwrap(),
            mount: ApiPath::parse(mount).unwrap(),
            ca: Some(self.ca()),
            auth: VaultAuth::TokenFile(self.path("root.token")),
            namespace: None,
            timeout: Duration::from_secs(10),
        }
    }

    pub(crate) fn transit(&self, mount: &str) -> Transit {
        Transit::new(&self.config(mount)).unwrap()
    }

    /// A policy as the documentation gives it, for one mount.
    pub(crate) fn policy(&self, mount: &str) -> String {
        let rules = format!(
            r#"path "{mount}/keys/*" {{ capabilities = ["read", "create", "update", "delete"] }}
            path "{mount}/encrypt/*" {{ capabilities = ["update"] }}
            path "{mount}/decrypt/*" {{ capabilities = ["update"] }}"#
        );
        let name = format!("reseal-{mount}");
        self.must("PUT", &format!("sys/policies/acl/{name}"), &json!({"policy": rules}));
        name
    }

    /// An AppRole for that mount whose tokens live so long; files with its ids.
    pub(crate) fn approle(&self, mount: &str, ttl: &str, max_ttl: &str) -> VaultAuth {
        let policy = self.policy(mount);
        let auth = format!("approle-{mount}");
        self.must("POST", &format!("sys/auth/{auth}"), &json!({"type": "approle"}));
        let role = format!("auth/{auth}/role/reseal");
        self.must("POST", &role, &json!({"token_policies": [policy], "token_ttl": ttl, "token_max_ttl": max_ttl}));
        let role_id = self.must("GET", &format!("{role}/role-id"), &Value::Null);
        let secret_id = self.must("POST", &format!("{role}/secret-id"), &json!({}));
        let file = |name: &str, id: &Value| {
            private_file(&self.path(&format!("{mount}.{name}")), &format!("{}\n", id.as_str().unwrap()))
        };
        VaultAuth::AppRole {
            role_id_file: file("role-id", &role_id["data"]["role_id"]),
            secret_id_file: file("secret-id", &secret_id["data"]["secret_id"]),
            mount: ApiPath::parse(&auth).unwrap(),
        }
    }

    /// A token with the policy of that mount.
    pub(crate) fn token(&self, mount: &str, mut options: Value) -> String {
        options["policies"] = json!([self.policy(mount)]);
        let made = self.must("POST", "auth/token/create", &options);
        made["auth"]["client_token"].as_str().unwrap().to_owned()
    }

    /// Tokens with the policy of that mount that are alive.
    pub(crate) fn tokens_of(&self, mount: &str) -> Vec<String> {
        let all = self.must("LIST", "auth/token/accessors", &Value::Null);
        let accessors = all["data"]["keys"].as_array().unwrap().iter().map(|key| key.as_str().unwrap().to_owned());
        let policy = format!("reseal-{mount}");
        let ours = |accessor: &String| {
            let (_, token) = self.call("POST", "auth/token/lookup-accessor", &json!({"accessor": accessor}));
            token["data"]["policies"].as_array().is_some_and(|all| all.iter().any(|one| *one == policy.as_str()))
        };
        accessors.filter(ours).collect()
    }

    pub(crate) fn revoke_tokens_of(&self, mount: &str) {
        for accessor in self.tokens_of(mount) {
            self.must("POST", "auth/token/revoke-accessor", &json!({"accessor": accessor}));
        }
    }
}

/// A certificate authority's certificate, which signed nothing.
pub(crate) fn another_ca(path: &Path) -> PathBuf {
    let (_, pem) = authority("another CA");
    fs::write(path, pem).unwrap();
    path.to_owned()
}

fn authority(name: &str) -> (Issuer<'static, KeyPair>, String) {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, name);
    let key = KeyPair::generate().unwrap();
    let pem = params.self_signed(&key).unwrap().pem();
    (Issuer::new(params, key), pem)
}

/// Writes a CA's certificate, and a server's with its key; an agent that trusts them.
fn write_certificates(dir: &Path) -> ureq::Agent {
    let (issuer, ca) = authority("test CA");
    let key = KeyPair::generate().unwrap();
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    let server = CertificateParams::new(names).unwrap().signed_by(&key, &issuer).unwrap();
    fs::write(dir.join("ca.pem"), &ca).unwrap();
    fs::write(dir.join("server.pem"), server.pem()).unwrap();
    private_file(&dir.join("server.key"), &key.serialize_pem());
    let roots = vec![Certificate::from_pem(ca.as_bytes()).unwrap()];
    let tls = TlsConfig::builder()
        .unversioned_rustls_crypto_provider(std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .root_certs(RootCerts::Specific(std::sync::Arc::new(roots)))
        .build();
    let config = ureq::Agent::config_builder()
        .tls_config(tls)
        .proxy(None)
        .http_status_as_error(false)
        .timeout_global(Some(Duration::from_secs(30)))
        .build();
    config.new_agent()
}
