//! Transit against a real OpenBao: what the contract does not say, and what happens when the server, the token or the
//! key goes.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/ports.rs"]
mod ports;
mod support;

use std::fs;
use std::io;
use std::net::{TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use reseal_kms::config::{VaultAuth, VaultConfig};
use reseal_kms::transit::Address;
use reseal_kms::{Class, Kms, KmsError, Transit};
use serde_json::{Value, json};
use support::bao::{self, Bao, another_ca};
use support::private_file;

const CONTEXT: &[u8] = b"vault v, tenant t";
const PAYLOAD: &[u8] = b"magic, ids, generation and master of a tenant";

fn opens(kms: &dyn Kms, key: &str, wrapped: &[u8]) {
    assert_eq!(kms.unwrap(key, CONTEXT, wrapped).unwrap().as_slice(), PAYLOAD);
}

#[test]
fn a_missing_key_is_never_made_by_a_wrap_though_the_policy_would_allow_it() {
    let bao = bao::shared();
    let mount = bao.mount();
    let error = bao.transit(&mount).wrap("acme", CONTEXT, PAYLOAD).unwrap_err();
    assert!(matches!(error, KmsError::NoSuchKey { .. }), "{error}");
    assert_eq!(bao.call("GET", &format!("{mount}/keys/acme"), &Value::Null).0, 404);
}

#[test]
fn a_missing_mount_is_not_a_missing_key() {
    let kms = bao::shared().transit("no-such-mount");
    for error in [
        kms.destroy("acme").unwrap_err(),
        kms.create("acme").unwrap_err(),
        kms.wrap("acme", CONTEXT, PAYLOAD).unwrap_err(),
    ] {
        assert!(matches!(error, KmsError::BadAnswer { .. }), "{error}");
        assert!(!error.is_key_missing());
        assert!(error.to_string().contains("no-such-mount"), "{error}");
    }
}

#[test]
fn keys_that_may_be_known_elsewhere_or_do_not_bind_are_refused() {
    let bao = bao::shared();
    let mount = bao.mount();
    let kms = bao.transit(&mount);
    for (name, options) in [
        ("exportable", json!({"type": "aes256-gcm96", "exportable": true})),
        ("backup", json!({"type": "aes256-gcm96", "allow_plaintext_backup": true})),
        ("short", json!({"type": "aes128-gcm96"})),
        ("pair", json!({"type": "rsa-2048"})),
        ("derived", json!({"type": "aes256-gcm96", "derived": true})),
        ("convergent", json!({"type": "aes256-gcm96", "derived": true, "convergent_encryption": true})),
    ] {
        bao.must("POST", &format!("{mount}/keys/{name}"), &options);
        for error in [kms.wrap(name, CONTEXT, PAYLOAD).unwrap_err(), kms.rotate(name).unwrap_err()] {
            assert!(matches!(error, KmsError::UnfitKey { .. }), "{name}: {error}");
            assert!(error.to_string().contains(name), "{error}");
        }
    }
    bao.must("POST", &format!("{mount}/keys/chacha"), &json!({"type": "chacha20-poly1305"}));
    opens(&kms, "chacha", &kms.wrap("chacha", CONTEXT, PAYLOAD).unwrap());
}

#[test]
fn a_key_made_exportable_wraps_no_more_but_what_it_wrapped_can_be_moved_away() {
    let bao = bao::shared();
    let mount = bao.mount();
    let kms = bao.transit(&mount);
    kms.create("acme").unwrap();
    let wrapped = kms.wrap("acme", CONTEXT, PAYLOAD).unwrap();
    bao.must("POST", &format!("{mount}/keys/acme/config"), &json!({"exportable": true}));
    assert!(matches!(kms.wrap("acme", CONTEXT, PAYLOAD), Err(KmsError::UnfitKey { .. })));
    opens(&kms, "acme", &wrapped);
}

#[test]
fn a_key_is_made_as_it_must_be() {
    let bao = bao::shared();
    let mount = bao.mount();
    bao.transit(&mount).create("acme").unwrap();
    let key = &bao.must("GET", &format!("{mount}/keys/acme"), &Value::Null)["data"];
    assert_eq!(key["type"], "aes256-gcm96");
    for not in ["exportable", "allow_plaintext_backup", "derived", "deletion_allowed"] {
        assert_eq!(key[not], false, "{not}");
    }
}

#[test]
fn what_is_stored_opens_with_the_servers_own_tools() {
    let bao = bao::shared();
    let mount = bao.mount();
    let kms = bao.transit(&mount);
    kms.create("acme").unwrap();
    let wrapped = String::from_utf8(kms.wrap("acme", b"context", b"payload").unwrap()).unwrap();
    assert!(wrapped.starts_with("vault:v1:"), "{wrapped}");
    let body = json!({"ciphertext": wrapped, "associated_data": "Y29udGV4dA=="});
    assert_eq!(bao.must("POST", &format!("{mount}/decrypt/acme"), &body)["data"]["plaintext"], "cGF5bG9hZA==");
}

#[test]
fn a_rotation_adds_a_version_and_its_end_shuts_out_the_older_ones() {
    let bao = bao::shared();
    let mount = bao.mount();
    let kms = bao.transit(&mount);
    let read = || bao.must("GET", &format!("{mount}/keys/acme"), &Value::Null)["data"].clone();
    kms.create("acme").unwrap();
    let first = kms.wrap("acme", CONTEXT, PAYLOAD).unwrap();
    assert_eq!(kms.rotate("acme").unwrap().as_str(), "acme");
    let second = kms.wrap("acme", CONTEXT, PAYLOAD).unwrap();
    assert!(second.starts_with(b"vault:v2:"));
    // A version that came by itself meanwhile is not taken for the one that is in use.
    kms.rotate("acme").unwrap();
    kms.retire("acme", "acme", CONTEXT, &second).unwrap();
    assert_eq!((read()["min_decryption_version"].as_u64(), read()["latest_version"].as_u64()), (Some(2), Some(3)));
    opens(&kms, "acme", &second);
    let error = kms.unwrap("acme", CONTEXT, &first).unwrap_err();
    assert!(matches!(error, KmsError::Retired { .. }) && error.is_not_opened(), "{error}");
    assert_eq!(error.class(), Class::Damaged);
    // What is retired can't end a rotation in its favour.
    assert!(kms.retire("acme", "acme", CONTEXT, &first).is_err());
    assert_eq!(read()["min_decryption_version"], 2);
    // Another name takes the place of this one.
    kms.create("other").unwrap();
    let other = kms.wrap("other", CONTEXT, PAYLOAD).unwrap();
    kms.retire("acme", "other", CONTEXT, &other).unwrap();
    assert!(kms.unwrap("acme", CONTEXT, &second).unwrap_err().is_key_missing());
}

#[test]
fn a_sealed_or_killed_server_is_said_to_be_and_goes_on_afterwards() {
    let mut bao = Bao::start();
    let mount = bao.mount();
    let kms = Transit::new(&VaultConfig { auth: bao.approle(&mount, "1h", "2h"), ..bao.config(&mount) }).unwrap();
    kms.create("acme").unwrap();
    let wrapped = kms.wrap("acme", CONTEXT, PAYLOAD).unwrap();
    bao.seal();
    for error in [kms.unwrap("acme", CONTEXT, &wrapped).unwrap_err(), kms.wrap("acme", CONTEXT, PAYLOAD).unwrap_err()] {
        assert!(matches!(error, KmsError::Sealed { .. }), "{error}");
        assert_eq!(error.class(), Class::Unreachable);
        let text = error.to_string();
        assert!(text.contains("unseal") && text.contains("acme") && text.contains("https://localhost"), "{text}");
    }
    bao.unseal();
    opens(&kms, "acme", &wrapped);
    bao.kill();
    let started = Instant::now();
    let error = kms.unwrap("acme", CONTEXT, &wrapped).unwrap_err();
    assert!(matches!(error, KmsError::NotReached { .. }), "{error}");
    assert!(started.elapsed() < Duration::from_secs(8), "{:?}", started.elapsed());
    bao.start_again();
    assert!(matches!(kms.unwrap("acme", CONTEXT, &wrapped), Err(KmsError::Sealed { .. })));
    bao.unseal();
    opens(&kms, "acme", &wrapped);
    let fresh = bao.transit(&mount);
    opens(&fresh, "acme", &wrapped);
}

#[test]
fn a_server_of_another_ca_or_name_gets_no_token() {
    let bao = bao::shared();
    let mount = bao.mount();
    let good = bao.config(&mount);
    let ca = another_ca(&bao.path("another-ca.pem"));
    let other_ca = Transit::new(&VaultConfig { ca: Some(ca), ..good.clone() }).unwrap();
    let no_ca = Transit::new(&VaultConfig { ca: None, ..good.clone() }).unwrap();
    // The certificate is for 127.0.0.1 and localhost.
    let address = Address::parse(&format!("https://127.0.0.2:{}", forward(bao.port()))).unwrap();
    let other_name = Transit::new(&VaultConfig { address, ..good.clone() }).unwrap();
    for kms in [other_ca, no_ca, other_name] {
        let started = Instant::now();
        let error = kms.wrap("acme", CONTEXT, PAYLOAD).unwrap_err();
        assert!(matches!(error, KmsError::NotReached { .. }), "{error}");
        assert!(error.to_string().contains("its certificate is not valid by the CA"), "{error}");
        assert!(started.elapsed() < Duration::from_millis(1200), "tried again: {:?}", started.elapsed());
    }
    let plain = Address::parse(&format!("http://127.0.0.1:{}", bao.port())).unwrap();
    let plain = Transit::new(&VaultConfig { address: plain, ca: None, ..good }).unwrap();
    assert!(matches!(plain.wrap("acme", CONTEXT, PAYLOAD), Err(KmsError::BadAnswer { .. })));
}

/// A port of 127.0.0.2 that leads to one of 127.0.0.1.
fn forward(port: u16) -> u16 {
    let listener = TcpListener::bind("127.0.0.2:0").unwrap();
    let own = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for here in listener.incoming() {
            let (mut here, mut there) = (here.unwrap(), TcpStream::connect(("127.0.0.1", port)).unwrap());
            let (mut here_too, mut there_too) = (here.try_clone().unwrap(), there.try_clone().unwrap());
            thread::spawn(move || drop(io::copy(&mut there_too, &mut here_too)));
            thread::spawn(move || drop(io::copy(&mut here, &mut there)));
        }
    });
    own
}

#[test]
fn an_approle_whose_token_was_revoked_logs_in_again() {
    let bao = bao::shared();
    let mount = bao.mount();
    let kms = Transit::new(&VaultConfig { auth: bao.approle(&mount, "1h", "2h"), ..bao.config(&mount) }).unwrap();
    kms.create("acme").unwrap();
    let wrapped = kms.wrap("acme", CONTEXT, PAYLOAD).unwrap();
    for _ in 0..3 {
        assert_eq!(bao.tokens_of(&mount).len(), 1);
        bao.revoke_tokens_of(&mount);
        opens(&kms, "acme", &wrapped);
    }
    // Several threads at once make one new token.
    bao.revoke_tokens_of(&mount);
    thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| opens(&kms, "acme", &wrapped));
        }
    });
    assert_eq!(bao.tokens_of(&mount).len(), 1);
    drop(kms);
    assert_eq!(bao.tokens_of(&mount).len(), 0, "its token outlives the KMS");
}

#[test]
fn an_approle_lives_on_past_the_lease_and_the_maximum_of_its_tokens() {
    let bao = bao::shared();
    let mount = bao.mount();
    let kms = Transit::new(&VaultConfig { auth: bao.approle(&mount, "3s", "5s"), ..bao.config(&mount) }).unwrap();
    kms.create("acme").unwrap();
    let wrapped = kms.wrap("acme", CONTEXT, PAYLOAD).unwrap();
    let end = Instant::now() + Duration::from_secs(9);
    while Instant::now() < end {
        opens(&kms, "acme", &wrapped);
        thread::sleep(Duration::from_millis(200));
    }
    // Long unused: nothing is left of the token.
    thread::sleep(Duration::from_secs(6));
    assert_eq!(bao.tokens_of(&mount).len(), 0);
    opens(&kms, "acme", &wrapped);
}

#[test]
fn a_secret_id_that_is_wrong_is_said_without_repeating_it() {
    let bao = bao::shared();
    let mount = bao.mount();
    let VaultAuth::AppRole { role_id_file, mount: auth, .. } = bao.approle(&mount, "1h", "2h") else { unreachable!() };
    let secret_id_file = private_file(&bao.path("wrong-secret-id"), "0f0f0f0f-wrong");
    let auth = VaultAuth::AppRole { role_id_file, secret_id_file, mount: auth };
    let kms = Transit::new(&VaultConfig { auth, ..bao.config(&mount) }).unwrap();
    let error = kms.wrap("acme", CONTEXT, PAYLOAD).unwrap_err();
    assert!(matches!(error, KmsError::Denied { .. }), "{error}");
    assert!(error.to_string().contains("log in"), "{error}");
    assert!(!support::all_text(&error).contains("0f0f0f0f"), "{error}");
}

#[test]
fn a_revoked_token_of_a_file_is_denied_until_the_file_has_another() {
    let bao = bao::shared();
    let mount = bao.mount();
    let file = private_file(&bao.path(&format!("{mount}.token")), &bao.token(&mount, json!({"ttl": "1h"})));
    let auth = VaultAuth::TokenFile(file.clone());
    let kms = Transit::new(&VaultConfig { auth, ..bao.config(&mount) }).unwrap();
    kms.create("acme").unwrap();
    let wrapped = kms.wrap("acme", CONTEXT, PAYLOAD).unwrap();
    bao.revoke_tokens_of(&mount);
    let error = kms.unwrap("acme", CONTEXT, &wrapped).unwrap_err();
    assert!(matches!(error, KmsError::Denied { .. }), "{error}");
    assert_eq!(error.class(), Class::Unreachable);
    fs::write(&file, bao.token(&mount, json!({"ttl": "1h"}))).unwrap();
    opens(&kms, "acme", &wrapped);
    drop(kms);
    assert_eq!(bao.tokens_of(&mount).len(), 1, "the token of a file is not ours to revoke");
}

#[test]
fn a_token_of_a_file_is_kept_alive_while_nothing_is_asked() {
    let bao = bao::shared();
    let mount = bao.mount();
    let token = bao.token(&mount, json!({"period": "5s"}));
    let auth = VaultAuth::TokenFile(private_file(&bao.path(&format!("{mount}.token")), &token));
    let kms = Transit::new(&VaultConfig { auth, ..bao.config(&mount) }).unwrap();
    kms.create("acme").unwrap();
    let wrapped = kms.wrap("acme", CONTEXT, PAYLOAD).unwrap();
    thread::sleep(Duration::from_secs(9));
    assert_eq!(bao.tokens_of(&mount).len(), 1);
    opens(&kms, "acme", &wrapped);
    drop(kms);
    thread::sleep(Duration::from_secs(7));
    assert_eq!(bao.tokens_of(&mount).len(), 0, "a closed KMS keeps no token alive");
}

#[test]
fn what_the_policy_forbids_is_denied_and_named() {
    let bao = bao::shared();
    let (mount, other) = (bao.mount(), bao.mount());
    let token = bao.token(&other, json!({"ttl": "1h"}));
    let auth = VaultAuth::TokenFile(private_file(&bao.path(&format!("{mount}.token")), &token));
    let kms = Transit::new(&VaultConfig { auth, ..bao.config(&mount) }).unwrap();
    for (error, action) in [
        (kms.create("acme").unwrap_err(), "make a key"),
        (kms.wrap("acme", CONTEXT, PAYLOAD).unwrap_err(), "wrap"),
        (kms.destroy("acme").unwrap_err(), "destroy"),
    ] {
        assert!(matches!(error, KmsError::Denied { .. }), "{error}");
        assert!(error.to_string().contains(action), "{error}");
        assert!(!error.to_string().contains(&token), "{error}");
    }
}

#[test]
fn another_tenants_key_of_the_same_name_opens_nothing() {
    let bao = bao::shared();
    let (one, two) = (bao.transit(&bao.mount()), bao.transit(&bao.mount()));
    one.create("acme").unwrap();
    two.create("acme").unwrap();
    let wrapped = one.wrap("acme", CONTEXT, PAYLOAD).unwrap();
    let error = two.unwrap("acme", CONTEXT, &wrapped).unwrap_err();
    assert!(matches!(error, KmsError::NotOpened { .. }), "{error}");
}

#[test]
fn a_key_destroyed_behind_our_back_is_missing_and_not_made_anew() {
    let bao = bao::shared();
    let mount = bao.mount();
    let kms = bao.transit(&mount);
    kms.create("acme").unwrap();
    let wrapped = kms.wrap("acme", CONTEXT, PAYLOAD).unwrap();
    bao.must("POST", &format!("{mount}/keys/acme/config"), &json!({"deletion_allowed": true}));
    bao.must("DELETE", &format!("{mount}/keys/acme"), &Value::Null);
    for error in [
        kms.unwrap("acme", CONTEXT, &wrapped).unwrap_err(),
        kms.wrap("acme", CONTEXT, PAYLOAD).unwrap_err(),
        kms.rotate("acme").unwrap_err(),
        kms.destroy("acme").unwrap_err(),
    ] {
        assert!(error.is_key_missing(), "{error}");
    }
    assert_eq!(bao.call("GET", &format!("{mount}/keys/acme"), &Value::Null).0, 404);
}

#[test]
fn a_namespace_is_another_place() {
    let bao = bao::shared();
    bao.must("POST", "sys/namespaces/team", &json!({}));
    bao.must("POST", "team/sys/mounts/apart", &json!({"type": "transit"}));
    let namespace = Some(reseal_kms::transit::ApiPath::parse("team").unwrap());
    let kms = Transit::new(&VaultConfig { namespace, ..bao.config("apart") }).unwrap();
    kms.create("acme").unwrap();
    opens(&kms, "acme", &kms.wrap("acme", CONTEXT, PAYLOAD).unwrap());
    assert!(matches!(bao.transit("apart").wrap("acme", CONTEXT, PAYLOAD), Err(KmsError::BadAnswer { .. })));
}
