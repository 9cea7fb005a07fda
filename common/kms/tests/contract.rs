//! What every KMS has to do, written against the trait alone.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod kmip_peer;
#[path = "support/ports.rs"]
mod ports;

use reseal_kms::kms::{MAX_CONTEXT, MAX_PAYLOAD, MAX_WRAPPED};
use reseal_kms::{Class, Keyring, Kms, KmsError};

mod support;

const CONTEXT: &[u8] = b"vault v, tenant t";
const PAYLOAD: &[u8] = b"magic, ids, generation and master of a tenant";

/// Each KMS under test, with nothing in it.
fn each(check: impl Fn(&dyn Kms)) {
    let dir = tempfile::tempdir().unwrap();
    check(&Keyring::create(&dir.path().join("keyring.json"), None).unwrap());
    let bao = support::bao::shared();
    check(&bao.transit(&bao.mount()));
    kmip_peer::each(&check);
}

#[test]
fn the_kind_is_fixed() {
    let kinds = std::cell::RefCell::new(Vec::new());
    each(|kms| kinds.borrow_mut().push(kms.kind()));
    assert_eq!(kinds.into_inner(), ["keyring", "vault", "kmip", "kmip"]);
}

#[test]
fn unwrap_gives_back_what_was_wrapped() {
    each(|kms| {
        let key = kms.create("acme-0a1b2c3d").unwrap();
        for payload in [&b""[..], b"x", PAYLOAD, &[0xFF; MAX_PAYLOAD]] {
            for context in [&b""[..], CONTEXT, &[0xFF; MAX_CONTEXT]] {
                let wrapped = kms.wrap(key.as_str(), context, payload).unwrap();
                assert!(wrapped.len() <= MAX_WRAPPED);
                assert_eq!(kms.unwrap(key.as_str(), context, &wrapped).unwrap().as_slice(), payload);
            }
        }
    });
}

#[test]
fn wrapping_twice_gives_other_bytes_and_shows_no_payload() {
    each(|kms| {
        kms.create("a").unwrap();
        let (one, two) = (kms.wrap("a", CONTEXT, PAYLOAD).unwrap(), kms.wrap("a", CONTEXT, PAYLOAD).unwrap());
        assert_ne!(one, two);
        assert!(!one.windows(8).any(|w| w == &PAYLOAD[..8]));
    });
}

#[test]
fn another_key_or_context_opens_nothing() {
    each(|kms| {
        kms.create("a").unwrap();
        kms.create("b").unwrap();
        let wrapped = kms.wrap("a", CONTEXT, PAYLOAD).unwrap();
        for (key, context) in [("b", CONTEXT), ("a", &b"vault v, tenant u"[..]), ("a", b""), ("a", &CONTEXT[1..])] {
            let error = kms.unwrap(key, context, &wrapped).unwrap_err();
            assert_eq!(error.class(), Class::Damaged, "{error}");
            assert!(error.to_string().contains(&format!("key {key}")), "{error}");
        }
    });
}

#[test]
fn a_byte_flipped_anywhere_opens_nothing() {
    each(|kms| {
        kms.create("a").unwrap();
        let wrapped = kms.wrap("a", CONTEXT, PAYLOAD).unwrap();
        for at in 0..wrapped.len() {
            for bit in 0..8 {
                let mut damaged = wrapped.clone();
                damaged[at] ^= 1 << bit;
                let error = kms.unwrap("a", CONTEXT, &damaged).unwrap_err();
                assert_eq!(error.class(), Class::Damaged, "byte {at}, bit {bit}: {error}");
            }
        }
    });
}

#[test]
fn wrapped_bytes_of_any_other_length_open_nothing() {
    each(|kms| {
        kms.create("a").unwrap();
        let wrapped = kms.wrap("a", CONTEXT, PAYLOAD).unwrap();
        for len in 0..wrapped.len() {
            let error = kms.unwrap("a", CONTEXT, &wrapped[..len]).unwrap_err();
            assert_eq!(error.class(), Class::Damaged, "{len}: {error}");
        }
        for more in [1, 16, MAX_WRAPPED] {
            let longer = [wrapped.as_slice(), &vec![0; more]].concat();
            assert_eq!(kms.unwrap("a", CONTEXT, &longer).unwrap_err().class(), Class::Damaged);
        }
    });
}

#[test]
fn a_missing_key_is_an_error_that_names_it_and_is_never_made_on_the_way() {
    each(|kms| {
        kms.create("other").unwrap();
        let wrapped = kms.wrap("other", CONTEXT, PAYLOAD).unwrap();
        let errors = [
            kms.wrap("acme-0a1b2c3d", CONTEXT, PAYLOAD).unwrap_err(),
            kms.unwrap("acme-0a1b2c3d", CONTEXT, &wrapped).unwrap_err(),
            kms.destroy("acme-0a1b2c3d").unwrap_err(),
        ];
        for error in errors {
            assert!(error.is_key_missing(), "{error}");
            assert_eq!(error.class(), Class::Unreachable);
            assert!(error.to_string().contains("acme-0a1b2c3d"), "{error}");
        }
        assert!(kms.create("acme-0a1b2c3d").is_ok());
    });
}

#[test]
fn an_existing_key_is_not_made_again() {
    each(|kms| {
        kms.create("a").unwrap();
        let wrapped = kms.wrap("a", CONTEXT, PAYLOAD).unwrap();
        assert!(kms.create("a").unwrap_err().is_key_taken());
        assert!(kms.unwrap("a", CONTEXT, &wrapped).is_ok());
    });
}

#[test]
fn a_destroyed_key_opens_nothing_and_a_new_one_of_its_name_neither() {
    each(|kms| {
        kms.create("a").unwrap();
        kms.create("b").unwrap();
        let wrapped = kms.wrap("a", CONTEXT, PAYLOAD).unwrap();
        kms.destroy("a").unwrap();
        assert!(kms.unwrap("a", CONTEXT, &wrapped).unwrap_err().is_key_missing());
        kms.create("a").unwrap();
        assert_eq!(kms.unwrap("a", CONTEXT, &wrapped).unwrap_err().class(), Class::Damaged);
        assert!(kms.wrap("b", CONTEXT, PAYLOAD).is_ok());
    });
}

#[test]
fn a_rotation_leaves_what_was_wrapped_before_until_it_is_retired() {
    each(|kms| {
        let old = kms.create("acme-0a1b2c3d").unwrap();
        let before = kms.wrap(old.as_str(), CONTEXT, PAYLOAD).unwrap();
        let new = kms.rotate(old.as_str()).unwrap();
        assert_eq!(kms.unwrap(old.as_str(), CONTEXT, &before).unwrap().as_slice(), PAYLOAD);
        let after = kms.wrap(new.as_str(), CONTEXT, PAYLOAD).unwrap();
        for _ in 0..2 {
            kms.retire(old.as_str(), new.as_str(), CONTEXT, &after).unwrap();
            let error = kms.unwrap(old.as_str(), CONTEXT, &before).unwrap_err();
            assert!(error.is_key_missing() || error.class() == Class::Damaged, "{error}");
            assert_eq!(kms.unwrap(new.as_str(), CONTEXT, &after).unwrap().as_slice(), PAYLOAD);
        }
    });
}

#[test]
fn nothing_is_retired_in_favour_of_what_does_not_open() {
    each(|kms| {
        let old = kms.create("acme-0a1b2c3d").unwrap();
        let before = kms.wrap(old.as_str(), CONTEXT, PAYLOAD).unwrap();
        let new = kms.rotate(old.as_str()).unwrap();
        let mut after = kms.wrap(new.as_str(), CONTEXT, PAYLOAD).unwrap();
        assert!(kms.retire(old.as_str(), new.as_str(), b"another context", &after).is_err());
        let last = after.len() - 3;
        after[last] ^= 1;
        assert!(kms.retire(old.as_str(), new.as_str(), CONTEXT, &after).is_err());
        assert_eq!(kms.unwrap(old.as_str(), CONTEXT, &before).unwrap().as_slice(), PAYLOAD);
    });
}

#[test]
fn without_a_rotation_nothing_is_retired() {
    each(|kms| {
        let key = kms.create("a").unwrap();
        let wrapped = kms.wrap(key.as_str(), CONTEXT, PAYLOAD).unwrap();
        kms.retire(key.as_str(), key.as_str(), CONTEXT, &wrapped).unwrap();
        assert_eq!(kms.unwrap(key.as_str(), CONTEXT, &wrapped).unwrap().as_slice(), PAYLOAD);
    });
}

#[test]
fn what_is_too_long_or_badly_named_is_refused() {
    each(|kms| {
        kms.create("a").unwrap();
        let wrapped = kms.wrap("a", CONTEXT, PAYLOAD).unwrap();
        let errors = [
            kms.wrap("a", &[0; MAX_CONTEXT + 1], PAYLOAD).unwrap_err(),
            kms.wrap("a", CONTEXT, &[0; MAX_PAYLOAD + 1]).unwrap_err(),
            kms.unwrap("a", &[0; MAX_CONTEXT + 1], &wrapped).unwrap_err(),
        ];
        for error in errors {
            assert!(matches!(error, KmsError::TooLong { .. }), "{error}");
        }
        for name in ["", "../a", "a b", "a\0", &"a".repeat(129)] {
            assert!(matches!(kms.create(name), Err(KmsError::InvalidName { .. })), "{name:?}");
            assert!(matches!(kms.wrap(name, CONTEXT, PAYLOAD), Err(KmsError::InvalidName { .. })), "{name:?}");
            assert!(matches!(kms.unwrap(name, CONTEXT, &wrapped), Err(KmsError::InvalidName { .. })), "{name:?}");
            assert!(matches!(kms.destroy(name), Err(KmsError::InvalidName { .. })), "{name:?}");
        }
    });
}

#[test]
fn many_threads_use_one_kms() {
    each(|kms| {
        std::thread::scope(|scope| {
            for thread in 0..4 {
                scope.spawn(move || {
                    for round in 0..4 {
                        let key = kms.create(&format!("t{thread}-{round}")).unwrap();
                        let wrapped = kms.wrap(key.as_str(), CONTEXT, PAYLOAD).unwrap();
                        assert_eq!(kms.unwrap(key.as_str(), CONTEXT, &wrapped).unwrap().as_slice(), PAYLOAD);
                    }
                });
            }
        });
    });
}
