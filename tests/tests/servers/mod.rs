//! The real servers that the KMS crate's tests use, and the configuration that leads to them.
#![allow(dead_code)] // each test file uses its part

#[path = "../../../common/kms/tests/support/bao.rs"]
pub(crate) mod bao;
#[path = "../../../common/kms/tests/kmip_peer/pki.rs"]
pub(crate) mod pki;
#[path = "../../../common/kms/tests/kmip_peer/pykmip.rs"]
pub(crate) mod pykmip;

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use reseal_kms::config::VaultAuth;
use reseal_tests::site::Site;

use self::bao::Bao;
use self::pki::Pki;
use self::pykmip::PyKmip;
pub(crate) use reseal_tests::ports::free_port;

/// A file that only its owner may read.
pub(crate) fn private_file(path: &Path, content: &str) -> PathBuf {
    fs::write(path, content).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o600)).unwrap();
    path.to_owned()
}

/// A configuration file in the making.
#[derive(Default)]
pub(crate) struct Config {
    kms: String,
    tenants: String,
}

impl Config {
    /// An OpenBao, with credentials that may do what the documentation says and no more.
    pub(crate) fn bao(mut self, name: &str, bao: &Bao) -> Config {
        let mount = bao.mount();
        let VaultAuth::AppRole { role_id_file, secret_id_file, mount: auth } = bao.approle(&mount, "10m", "1h") else {
            panic!("an AppRole was made")
        };
        self.kms += &format!(
            "[kms.{name}]\nkind = \"vault\"\naddress = \"https://localhost:{}\"\nca = {:?}\nmount = \"{mount}\"\n\
             auth = {{ approle = {{ role_id_file = {role_id_file:?}, secret_id_file = {secret_id_file:?}, mount = \"{auth}\" }} }}\n",
            bao.port(),
            bao.ca(),
        );
        self
    }

    /// The same engine with a token in a file, which may do what the documentation says.
    pub(crate) fn bao_by_token(mut self, name: &str, bao: &Bao, mount: &str, token: &Path) -> Config {
        self.kms += &format!(
            "[kms.{name}]\nkind = \"vault\"\naddress = \"https://localhost:{}\"\nca = {:?}\nmount = \"{mount}\"\n\
             auth = {{ token_file = {token:?} }}\n",
            bao.port(),
            bao.ca(),
        );
        self
    }

    /// A PyKMIP.
    pub(crate) fn kmip(mut self, name: &str, pki: &Pki, server: &PyKmip) -> Config {
        let (ca, cert, key) = (pki.ca(), pki.cert("reseal"), pki.key("reseal"));
        let address = format!("127.0.0.1:{}", server.port());
        self.kms += &format!(
            "[kms.{name}]\nkind = \"kmip\"\naddress = \"{address}\"\nca = {ca:?}\ncert = {cert:?}\nkey = {key:?}\n"
        );
        self
    }

    /// A transit engine at an address where no TLS is asked for.
    pub(crate) fn plain(mut self, name: &str, port: u16, token: &Path) -> Config {
        self.kms += &format!(
            "[kms.{name}]\nkind = \"vault\"\naddress = \"http://127.0.0.1:{port}\"\nauth = {{ token_file = {token:?} }}\n"
        );
        self
    }

    /// Which KMS a tenant uses.
    pub(crate) fn tenant(mut self, line: &str) -> Config {
        self.tenants += &format!("{line}\n");
        self
    }

    /// The other tenants of the file go.
    pub(crate) fn only_tenant(mut self, line: &str) -> Config {
        self.tenants = format!("{line}\n");
        self
    }

    /// Writes it where the programs of the site look.
    pub(crate) fn write(&self, site: &mut Site) {
        let path = site.path("kms.toml");
        fs::write(&path, format!("{}\n[tenants]\n{}", self.kms, self.tenants)).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        site.kms_config = Some(path);
    }
}
