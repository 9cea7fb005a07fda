//! The operator's KMS configuration: what it says, and what is refused in it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/ports.rs"]
mod ports;
mod support;

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use reseal_kms::config::{KEYRING, VaultAuth};
use reseal_kms::{Class, KmsConfig, KmsError, Transit};
use support::scripted::{KEY, Scripted, http};

const WHOLE: &str = r#"
[kms.site-bao]
kind = "vault"
address = "https://bao.example:8200"
mount = "teams/a/transit"
namespace = "ns1"
ca = "CA"
timeout = 30
auth = { approle = { role_id_file = "/r", secret_id_file = "/s", mount = "ours" } }

[kms.local]
kind = "vault"
address = "http://127.0.0.1:8200"
auth = { token_file = "/etc/reseal/bao.token" }

[kms.hsm]
kind = "kmip"
address = "hsm.example:5696"
ca = "/a"
cert = "/b"
key = "/c"

[tenants]
acme = "site-bao"
"Größe & Co" = "local"
globex = { kms = "local", key = "globex-kek" }
initech = "keyring"
"#;

fn write(dir: &Path, text: &str) -> PathBuf {
    let ca = dir.join("ca.pem");
    if !ca.exists() {
        support::bao::another_ca(&ca);
    }
    let path = dir.join("kms.toml");
    fs::write(&path, text.replace("\"CA\"", &format!("{:?}", ca.display().to_string()))).unwrap();
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    path
}

fn refused(text: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), text);
    let error = KmsConfig::load(&path).unwrap_err();
    assert!(matches!(error, KmsError::Config { .. }), "{error}");
    assert_eq!(error.class(), Class::Usage);
    let text = error.to_string();
    assert!(text.contains(path.to_str().unwrap()) && !text.contains('\n'), "{text}");
    text
}

#[test]
fn each_tenant_gets_the_kms_that_stands_there() {
    let dir = tempfile::tempdir().unwrap();
    let config = KmsConfig::load(&write(dir.path(), WHOLE)).unwrap();
    for (tenant, kms) in [("acme", "site-bao"), ("Größe & Co", "local"), ("globex", "local")] {
        assert_eq!(config.kms_of(tenant), kms);
        assert_eq!(config.for_tenant(tenant).unwrap().unwrap().kind(), "vault");
    }
    for tenant in ["initech", "default", ""] {
        assert_eq!(config.kms_of(tenant), KEYRING);
        assert!(config.for_tenant(tenant).unwrap().is_none());
    }
    assert_eq!(config.open("local").unwrap().kind(), "vault");
    assert!(matches!(config.open("nowhere"), Err(KmsError::Config { .. })));
}

#[test]
fn without_a_file_all_tenants_use_the_keyring_unless_it_was_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let none = dir.path().join("kms.toml");
    assert!(KmsConfig::load_if_there(&none).unwrap().for_tenant("acme").unwrap().is_none());
    assert!(matches!(KmsConfig::load(&none), Err(KmsError::Config { .. })));
    let empty = KmsConfig::load(&write(dir.path(), "")).unwrap();
    assert!(empty.for_tenant("acme").unwrap().is_none());
}

#[test]
fn an_error_names_the_line() {
    for (from, to, line, what) in [
        ("mount =", "muont =", 5, "muont"),
        ("kind = \"vault\"", "kind = \"vualt\"", 3, "kind"),
        ("timeout = 30", "timeout = 0", 8, "timeout"),
        ("timeout = 30", "timeout = 301", 8, "timeout"),
        ("timeout = 30", "timeout = \"30\"", 8, "invalid type"),
        ("https://bao", "http://bao", 4, "not encrypted"),
        ("/transit\"", "/../sys\"", 5, "path"),
        ("mount = \"teams", "cert = \"/x\"\nmount = \"teams", 5, "cert"),
        ("ca = \"CA\"\n", "", 2, "`ca` is missing"),
        ("\"/r\"", "\"r\"", 9, "whole path"),
        ("role_id_file = \"/r\", ", "", 9, "role_id_file"),
        ("token_file = \"/etc/reseal/bao.token\"", "", 14, "auth"),
        ("auth = { token_file = \"/etc/reseal/bao.token\" }\n", "", 11, "`auth` is missing"),
        ("auth = { token_file", "ca = \"/x\"\nauth = { token_file", 13, "not https"),
        ("hsm.example:5696", "hsm.example", 18, "HOST:PORT"),
        ("cert = \"/b\"\n", "", 16, "`cert` is missing"),
        ("cert = \"/b\"", "auth = { token_file = \"/t\" }", 20, "auth"),
        ("acme = \"site-bao\"", "acme = \"site-boa\"", 24, "site-boa"),
        ("\"globex-kek\"", "\"../kek\"", 26, "can't name a key"),
        ("key = \"globex-kek\"", "kee = \"globex-kek\"", 26, "kee"),
        ("\"keyring\"", "{ kms = \"keyring\", key = \"a\" }", 27, "keyring"),
        ("\"keyring\"", "7", 27, "invalid type"),
        ("[kms.local]", "[kms.keyring]", 11, "can't name a KMS"),
        ("[kms.local]", "[kms.hsm]", 16, "duplicate"),
        ("initech", "acme", 27, "duplicate"),
        ("[tenants]", "[tenant]", 23, "tenant"),
        ("[tenants]", "[tenants", 23, ""),
    ] {
        assert!(WHOLE.contains(from), "{from}");
        let text = refused(&WHOLE.replacen(from, to, 1));
        assert!(text.contains(&format!("line {line}: ")) && text.contains(what), "{from} → {to}: {text}");
    }
}

#[test]
fn a_secret_in_the_wrong_place_is_not_repeated() {
    let secret = "s.SecretThatWasPastedHere";
    for (from, to) in [
        ("{ token_file = \"/etc/reseal/bao.token\" }", format!("\"{secret}\"")),
        ("\"/etc/reseal/bao.token\"", format!("\"{secret}\"")),
        ("token_file = \"/etc/reseal/bao.token\"", format!("token = \"{secret}\"")),
        ("timeout = 30", format!("timeout = \"{secret}\"")),
        ("http://127.0.0.1:8200", format!("http://root:{secret}@127.0.0.1:8200")),
    ] {
        assert!(WHOLE.contains(from), "{from}");
        let text = refused(&WHOLE.replacen(from, &to, 1));
        assert!(!text.contains(secret), "{text}");
    }
}

#[test]
fn a_file_that_others_may_change_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), WHOLE);
    for mode in [0o664, 0o646, 0o620, 0o602, 0o666] {
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        let error = KmsConfig::load_if_there(&path).unwrap_err();
        assert!(error.to_string().contains("chmod go-w"), "{mode:o}: {error}");
    }
    for mode in [0o644, 0o600, 0o400] {
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        KmsConfig::load(&path).unwrap();
    }
    if chown(&path, Some(12345), None).is_ok() {
        assert!(KmsConfig::load(&path).unwrap_err().to_string().contains("12345"));
    }
}

#[test]
fn a_file_that_is_no_text_or_too_long_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "");
    for bytes in [&[0xFF; 4][..], &[b'#'; (1 << 20) + 1]] {
        fs::write(&path, bytes).unwrap();
        assert!(matches!(KmsConfig::load(&path), Err(KmsError::Config { .. })));
    }
    fs::write(&path, "a = ".to_owned() + &"[".repeat(100_000)).unwrap();
    assert!(matches!(KmsConfig::load(&path), Err(KmsError::Config { .. })));
}

#[test]
fn a_key_that_the_configuration_names_is_the_only_one_that_anything_is_sent_for() {
    let server = Scripted::start(|_| http(404, r#"{"errors":[]}"#));
    let dir = tempfile::tempdir().unwrap();
    let token = support::private_file(&dir.path().join("token"), "s.token");
    let text = format!(
        "[kms.local]\nkind = \"vault\"\naddress = \"{}\"\nauth = {{ token_file = {token:?} }}\n\
         [tenants]\nacme = {{ kms = \"local\", key = \"acme-kek\" }}\n",
        server.address()
    );
    let kms = KmsConfig::load(&write(dir.path(), &text)).unwrap().for_tenant("acme").unwrap().unwrap();
    for error in [
        kms.unwrap("other-kek", b"", b"vault:v1:BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBw==").unwrap_err(),
        kms.wrap("other-kek", b"", b"").unwrap_err(),
        kms.destroy("other-kek").unwrap_err(),
        kms.rotate("other-kek").unwrap_err(),
        kms.retire("acme-kek", "other-kek", b"", b"").unwrap_err(),
        kms.retire("other-kek", "acme-kek", b"", b"").unwrap_err(),
    ] {
        let text = error.to_string();
        assert!(matches!(error, KmsError::Config { .. }), "{text}");
        assert!(
            ["acme-kek", "other-kek", "tenant acme", "nothing was sent"].iter().all(|part| text.contains(part)),
            "{text}"
        );
    }
    assert!(server.seen().is_empty());
    assert!(kms.wrap("acme-kek", b"", b"").unwrap_err().is_key_missing());
    assert_eq!(server.seen(), ["GET /v1/transit/keys/acme-kek"]);
}

#[test]
fn a_new_key_takes_the_name_that_the_configuration_gives() {
    let bao = support::bao::shared();
    let mount = bao.mount();
    let dir = tempfile::tempdir().unwrap();
    let text = format!(
        "[kms.bao]\nkind = \"vault\"\naddress = \"https://127.0.0.1:{}\"\nca = {:?}\n\
         mount = \"{mount}\"\nauth = {{ token_file = {:?} }}\n\
         [tenants]\nacme = {{ kms = \"bao\", key = \"acme-kek\" }}\n",
        bao.port(),
        bao.ca(),
        bao.path("root.token"),
    );
    let kms = KmsConfig::load(&write(dir.path(), &text)).unwrap().for_tenant("acme").unwrap().unwrap();
    assert_eq!(kms.create("acme-0a1b2c3d").unwrap().as_str(), "acme-kek");
    let wrapped = kms.wrap("acme-kek", b"context", b"payload").unwrap();
    assert_eq!(kms.rotate("acme-kek").unwrap().as_str(), "acme-kek");
    assert_eq!(kms.unwrap("acme-kek", b"context", &wrapped).unwrap().as_slice(), b"payload");
}

#[test]
fn a_ca_file_that_is_none_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let server = Scripted::start(|_| http(200, KEY));
    for (name, content) in [("empty", ""), ("noise", "no PEM"), ("missing", "")] {
        let ca = dir.path().join(name);
        if name != "missing" {
            fs::write(&ca, content).unwrap();
        }
        let mut config = server.config(Duration::from_secs(1));
        config.ca = Some(ca.clone());
        let error = Transit::new(&config).unwrap_err();
        assert!(matches!(error, KmsError::ConfigNames { .. }), "{error}");
        assert!(error.to_string().contains(ca.to_str().unwrap()), "{error}");
        assert!(matches!(config.auth, VaultAuth::TokenFile(_)));
    }
}
