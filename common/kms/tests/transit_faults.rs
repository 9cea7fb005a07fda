//! Transit against servers that are slow, broken, old or hostile.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "support/ports.rs"]
mod ports;
mod support;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use reseal_kms::transit::Address;
use reseal_kms::{Class, Kms, KmsError, Transit};
use support::all_text;
use support::scripted::{KEY, Reply, Request, Scripted, TOKEN, http};

const CONTEXT: &[u8] = b"vault v, tenant t";
const PAYLOAD: &[u8] = b"magic, ids, generation and master of a tenant";
const PAYLOAD_BASE64: &str = "bWFnaWMsIGlkcywgZ2VuZXJhdGlvbiBhbmQgbWFzdGVyIG9mIGEgdGVuYW50";
const ROLE_ID: &str = "role-id-of-the-scripted-server";
const SECRET_ID: &str = "secret-id-of-the-scripted-server";
const SEALED_28: &str = "BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBw==";
const SECOND: Duration = Duration::from_secs(1);

fn wrapped() -> Vec<u8> {
    format!("vault:v1:{SEALED_28}").into_bytes()
}

/// All operations of a KMS, each of which must fail.
fn failures(kms: &dyn Kms) -> Vec<KmsError> {
    vec![
        kms.create("acme").unwrap_err(),
        kms.wrap("acme", CONTEXT, PAYLOAD).unwrap_err(),
        kms.unwrap("acme", CONTEXT, &wrapped()).unwrap_err(),
        kms.rotate("acme").unwrap_err(),
        kms.retire("acme", "acme", CONTEXT, &wrapped()).unwrap_err(),
        kms.destroy("acme").unwrap_err(),
    ]
}

/// The answer to a lookup of the token, or else that of the test.
fn after_lookup(request: &Request, reply: Reply) -> Reply {
    if request.line.ends_with("lookup-self") { http(403, r#"{"errors":["permission denied"]}"#) } else { reply }
}

#[test]
fn nobody_there_is_said_soon_with_address_and_key() {
    let port = support::free_port();
    let server = Scripted::start(|_| Reply::Never);
    let address = Address::parse(&format!("http://127.0.0.1:{port}")).unwrap();
    let kms = Transit::new(&reseal_kms::config::VaultConfig { address, ..server.config(SECOND) }).unwrap();
    for error in failures(&kms) {
        assert!(matches!(error, KmsError::NotReached { .. }), "{error}");
        assert_eq!(error.class(), Class::Unreachable);
        let text = error.to_string();
        assert!(text.contains(&format!("127.0.0.1:{port}")) && text.contains("key acme"), "{text}");
    }
    let started = Instant::now();
    assert!(kms.unwrap("acme", CONTEXT, &wrapped()).is_err());
    let took = started.elapsed();
    assert!(took > Duration::from_millis(1000) && took < Duration::from_secs(4), "three tries with pauses: {took:?}");
}

#[test]
fn a_server_that_never_answers_or_drips_is_left_after_the_timeout() {
    for drip in [false, true] {
        let server = Scripted::start(move |request| {
            let text = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{KEY}", KEY.len());
            let slow = if drip { Reply::Dripping(text, Duration::from_millis(100)) } else { Reply::Never };
            after_lookup(request, slow)
        });
        let kms = server.transit(SECOND);
        let started = Instant::now();
        let error = kms.wrap("acme", CONTEXT, PAYLOAD).unwrap_err();
        assert!(matches!(error, KmsError::NotReached { .. }), "drip {drip}: {error}");
        assert!(error.to_string().contains("no answer within 1 s"), "{error}");
        assert!(started.elapsed() < 4 * SECOND, "drip {drip}: {:?}", started.elapsed());
    }
}

#[test]
fn a_server_that_is_busy_is_asked_again_and_soon_enough_given_up() {
    for status in [429, 500, 502, 503] {
        let server = Scripted::start(move |request| {
            let body = if status == 502 { "<html>" } else { r#"{"errors":["busy"]}"# };
            after_lookup(request, if request.nth < 3 { http(status, body) } else { http(200, KEY) })
        });
        // The lookup and two refusals come first.
        let error = server.transit(SECOND).wrap("acme", CONTEXT, PAYLOAD).unwrap_err();
        assert!(matches!(error, KmsError::BadAnswer { .. }), "{status} was not outlived: {error}");
        assert_eq!(server.seen()[..3], ["GET /v1/transit/keys/acme"; 3]);

        let server = Scripted::start(move |request| after_lookup(request, http(status, r#"{"errors":[]}"#)));
        let error = server.transit(SECOND).unwrap("acme", CONTEXT, &wrapped()).unwrap_err();
        assert!(matches!(error, KmsError::NotReached { .. }), "{error}");
        assert!(error.to_string().contains(&format!("HTTP {status}")), "{error}");
        assert_eq!(server.seen().len(), 3);
    }
}

#[test]
fn answers_that_make_no_sense_are_refused() {
    let long = format!(r#"{{"data":{{"x":"{}"}}}}"#, "x".repeat(256 * 1024));
    let cut = Reply::Whole(format!("HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n{KEY}"));
    let cut_chunk = Reply::Whole("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFFFF\r\n{}".into());
    let endless = Reply::Whole(format!("HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n{long}"));
    let heads = Reply::Whole(format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "x".repeat(100_000)));
    let cases = [
        http(200, ""),
        http(200, "not JSON"),
        http(200, "[]"),
        http(200, r#"{"data":null}"#),
        http(200, r#"{"data":{"type":"aes256-gcm96","ciphertext":7,"plaintext":7}}"#),
        http(200, &"[".repeat(100_000)),
        http(200, &KEY[..KEY.len() - 5]),
        http(204, ""),
        http(404, "<html>no such page</html>"),
        http(404, r#"{"errors":["no handler for route"]}"#),
        http(418, r#"{"errors":["a teapot"]}"#),
        http(200, &long),
        Reply::Whole("SSH-2.0-OpenSSH_9.2\r\n".into()),
        Reply::Whole("\0\0\0\0".into()),
        cut,
        cut_chunk,
        endless,
        heads,
    ];
    let next = AtomicUsize::new(0);
    let cases: &'static [Reply] = Vec::from(cases).leak();
    let current: &'static Mutex<usize> = Box::leak(Box::new(Mutex::new(0)));
    let server = Scripted::start(move |request| {
        let reply = match &cases[*current.lock().unwrap()] {
            Reply::Whole(text) => Reply::Whole(text.clone()),
            _ => unreachable!(),
        };
        after_lookup(request, reply)
    });
    let kms = server.transit(SECOND);
    while next.load(Ordering::Relaxed) < cases.len() {
        let nth = next.fetch_add(1, Ordering::Relaxed);
        *current.lock().unwrap() = nth;
        for error in failures(&kms) {
            assert!(matches!(error, KmsError::BadAnswer { .. }), "case {nth}: {error}");
            assert_eq!(error.class(), Class::Unreachable);
            assert!(error.to_string().len() < 500, "case {nth}: {error}");
            assert!(!error.to_string().contains(|c: char| c.is_control()), "case {nth}: {error:?}");
        }
    }
}

#[test]
fn a_connection_cut_before_the_answer_is_tried_again() {
    let server = Scripted::start(|request| after_lookup(request, Reply::Whole(String::new())));
    let error = server.transit(SECOND).unwrap("acme", CONTEXT, &wrapped()).unwrap_err();
    assert!(matches!(error, KmsError::NotReached { .. }), "{error}");
    assert_eq!(server.seen().len(), 3);
}

#[test]
fn a_redirect_leads_nowhere() {
    let other = Scripted::start(|_| http(200, KEY));
    let to = other.address();
    for status in [301, 302, 307, 308] {
        let to = to.clone();
        let server = Scripted::start(move |_| {
            Reply::Whole(format!(
                "HTTP/1.1 {status} X\r\nLocation: {to}/v1/transit/keys/acme\r\nContent-Length: 0\r\n\r\n"
            ))
        });
        for error in failures(&server.transit(SECOND)) {
            assert!(matches!(error, KmsError::BadAnswer { .. }), "{error}");
            assert!(error.to_string().contains("sends elsewhere"), "{error}");
        }
    }
    assert!(other.seen().is_empty());
}

#[test]
fn a_server_that_says_it_is_sealed_is_believed() {
    let server = Scripted::start(|request| after_lookup(request, http(503, r#"{"errors":["Vault is sealed"]}"#)));
    for error in failures(&server.transit(SECOND)) {
        assert!(matches!(error, KmsError::Sealed { .. }), "{error}");
    }
}

#[test]
fn an_old_server_that_takes_no_notice_of_the_context_is_refused() {
    let server = Scripted::start(|request| {
        let reply = match request.line.split('/').nth(3) {
            Some("keys") => http(200, KEY),
            Some("encrypt") => http(200, &format!(r#"{{"data":{{"ciphertext":"vault:v1:{SEALED_28}"}}}}"#)),
            _ => http(200, &format!(r#"{{"data":{{"plaintext":"{PAYLOAD_BASE64}"}}}}"#)),
        };
        after_lookup(request, reply)
    });
    let error = server.transit(SECOND).wrap("acme", CONTEXT, PAYLOAD).unwrap_err();
    assert!(matches!(error, KmsError::BadAnswer { .. }), "{error}");
    assert!(error.to_string().contains("context"), "{error}");
}

#[test]
fn a_key_that_was_made_anew_between_reading_and_encrypting_is_noticed() {
    let reads = AtomicUsize::new(0);
    let server = Scripted::start(move |request| {
        let reply = match request.line.split('/').nth(3) {
            Some("keys") if reads.fetch_add(1, Ordering::Relaxed) == 0 => http(200, KEY),
            Some("keys") => http(200, &KEY.replace(r#""1":1"#, r#""1":2"#)),
            _ => http(200, &format!(r#"{{"data":{{"ciphertext":"vault:v1:{SEALED_28}"}}}}"#)),
        };
        after_lookup(request, reply)
    });
    let error = server.transit(SECOND).wrap("acme", CONTEXT, PAYLOAD).unwrap_err();
    assert!(error.to_string().contains("the key changed"), "{error}");
}

#[test]
fn malformed_wrapped_bytes_are_not_sent_at_all() {
    let server = Scripted::start(|_| http(200, KEY));
    let kms = server.transit(SECOND);
    for bad in [&b""[..], b"vault:v0:", b"keyring bytes \x01\x02", &[b'x'; 70_000]] {
        assert_eq!(kms.unwrap("acme", CONTEXT, bad).unwrap_err().class(), Class::Damaged);
    }
    for name in ["../sys/seal", "a/b", ""] {
        assert!(matches!(kms.unwrap(name, CONTEXT, &wrapped()), Err(KmsError::InvalidName { .. })));
    }
    assert!(server.seen().is_empty());
}

#[test]
fn no_secret_is_in_an_error_though_the_server_repeats_all_it_is_sent() {
    let echo = |request: &Request| {
        let told = serde_json::json!({"errors": [request.text, request.body]}).to_string();
        let status = [400, 401, 403, 404, 500][request.nth % 5];
        http(status, &told)
    };
    let server = Scripted::start(move |request| echo(request));
    let login = format!(r#"{{"auth":{{"client_token":"{TOKEN}","lease_duration":3600,"renewable":true}}}}"#);
    let logs_in =
        Scripted::start(
            move |request| {
                if request.line.ends_with("approle/login") { http(200, &login) } else { echo(request) }
            },
        );
    let good_until = Scripted::start(move |request| {
        if request.line.contains("/keys/") { http(200, KEY) } else { after_lookup(request, echo(request)) }
    });
    let all = [
        server.transit(SECOND),
        Transit::new(&server.approle_config(ROLE_ID, SECRET_ID)).unwrap(),
        Transit::new(&logs_in.approle_config(ROLE_ID, SECRET_ID)).unwrap(),
        good_until.transit(SECOND),
    ];
    for kms in &all {
        let mut texts = vec![format!("{kms:?}")];
        for _ in 0..5 {
            let failed = [
                kms.create("acme").err(),
                kms.wrap("acme", CONTEXT, PAYLOAD).err(),
                kms.unwrap("acme", CONTEXT, &wrapped()).err(),
                kms.destroy("acme").err(),
                kms.rotate("acme").err(),
            ];
            texts.extend(failed.iter().flatten().map(|error| all_text(error)));
        }
        for text in &texts {
            for secret in [TOKEN, ROLE_ID, SECRET_ID, PAYLOAD_BASE64] {
                assert!(!text.contains(secret) && !text.contains(&secret[..12]), "{text}");
            }
        }
    }
}

#[test]
fn one_login_serves_many_requests_and_the_token_is_given_back() {
    let login = format!(r#"{{"auth":{{"client_token":"{TOKEN}","lease_duration":3600,"renewable":true}}}}"#);
    let server = Scripted::start(move |request| {
        if request.line.ends_with("approle/login") {
            return http(200, &login);
        }
        if request.text.contains(TOKEN) { http(200, KEY) } else { http(403, r#"{"errors":["permission denied"]}"#) }
    });
    let kms = Transit::new(&server.approle_config(ROLE_ID, SECRET_ID)).unwrap();
    for _ in 0..5 {
        let error = kms.create("acme").unwrap_err();
        assert!(error.is_key_taken(), "{error}");
    }
    drop(kms);
    let seen = server.seen();
    assert_eq!(seen.iter().filter(|line| line.ends_with("approle/login")).count(), 1);
    assert_eq!(seen.last().unwrap(), "POST /v1/auth/token/revoke-self");
    assert_eq!(seen.len(), 7);
}

#[test]
fn credentials_that_others_can_read_or_that_are_none_are_refused_by_name() {
    use std::os::unix::fs::PermissionsExt;
    let server = Scripted::start(|_| http(200, KEY));
    let config = server.config(SECOND);
    let reseal_kms::config::VaultAuth::TokenFile(file) = &config.auth else { unreachable!() };
    let kms = Transit::new(&config).unwrap();
    let failed = |content: &str| {
        std::fs::write(file, content).unwrap();
        let error = kms.create("acme").unwrap_err();
        assert!(error.to_string().contains(file.to_str().unwrap()), "{error}");
        error
    };
    for bad in ["", "\n", "two words", "a\nb", "a\u{7}b", "täglich", &"x".repeat(9000)] {
        let error = failed(bad);
        assert!(matches!(error, KmsError::ConfigNames { .. }), "{error}");
        assert_eq!(error.class(), Class::Usage);
    }
    std::fs::set_permissions(file, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert!(matches!(failed(TOKEN), KmsError::Exposed { .. }));
    std::fs::remove_file(file).unwrap();
    assert!(matches!(kms.create("acme").unwrap_err(), KmsError::ConfigNames { .. }));
    assert!(server.seen().is_empty());
}
