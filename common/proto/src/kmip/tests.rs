#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use proptest::prelude::*;
use proptest::test_runner::RngSeed;

use super::request::{MAX_LOCATED, TAG_LEN};
use super::ttlv::{Items, MAX_DEPTH, Value, Writer};
use super::*;

const SEALED: Sealed<'_> = Sealed { iv: &[0xA1; 12], tag: &[0xB2; TAG_LEN], ciphertext: &[0xC3; 9] };

fn each_request() -> Vec<Request<'static>> {
    vec![
        Request::DiscoverVersions,
        Request::Locate { name: "acme-0a1b2c3d" },
        Request::Create { name: "acme-0a1b2c3d" },
        Request::Activate { id: "17" },
        Request::Revoke { id: "17" },
        Request::Destroy { id: "17" },
        Request::GetAttributes { id: "17" },
        Request::Get { id: "17" },
        Request::Encrypt { id: "17", additional: b"context", plaintext: b"plaintext" },
        Request::Decrypt { id: "17", additional: b"context", sealed: SEALED },
    ]
}

/// A response as a server makes it.
fn response(version: Version, operation: Option<u32>, status: u32, body: impl FnOnce(&mut Writer)) -> Vec<u8> {
    let mut w = Writer::new();
    w.structure(tags::RESPONSE_MESSAGE, |w| {
        w.structure(tags::RESPONSE_HEADER, |w| {
            version.write(w);
            w.integer(tags::BATCH_COUNT, 1);
        });
        w.structure(tags::BATCH_ITEM, |w| {
            if let Some(operation) = operation {
                w.enumeration(tags::OPERATION, operation);
            }
            w.enumeration(tags::RESULT_STATUS, status);
            body(w);
        });
    });
    w.finish().to_vec()
}

fn done(version: Version, request: &Request<'_>, payload: impl FnOnce(&mut Writer)) -> Vec<u8> {
    response(version, Some(request.operation()), 0, |w| w.structure(tags::RESPONSE_PAYLOAD, payload))
}

/// An answer to each request, as good as servers give them.
fn good_answer(version: Version, request: &Request<'_>) -> Vec<u8> {
    done(version, request, |w| match request {
        Request::DiscoverVersions => Version::KNOWN.iter().for_each(|version| version.write(w)),
        Request::GetAttributes { .. } if version >= Version::V2_0 => {
            w.structure(tags::ATTRIBUTES, |w| {
                w.enumeration(tags::STATE, 2);
                w.integer(tags::CRYPTOGRAPHIC_LENGTH, 256);
                w.structure(tags::NAME, |w| w.text(tags::NAME_VALUE, "acme"));
            });
        }
        Request::GetAttributes { .. } => {
            for (name, value) in [("State", 2), ("Object Type", 2), ("Cryptographic Algorithm", 3)] {
                w.structure(tags::ATTRIBUTE, |w| {
                    w.text(tags::ATTRIBUTE_NAME, name);
                    w.enumeration(tags::ATTRIBUTE_VALUE, value);
                });
            }
        }
        Request::Get { .. } => key_block(w, tags::RAW, tags::AES, &[5; 32], false),
        Request::Encrypt { .. } | Request::Decrypt { .. } => {
            w.bytes(tags::DATA, SEALED.ciphertext);
            w.bytes(tags::IV_COUNTER_NONCE, SEALED.iv);
            w.bytes(tags::AUTHENTICATED_ENCRYPTION_TAG, SEALED.tag);
        }
        _ => w.text(tags::UNIQUE_IDENTIFIER, "17"),
    })
}

fn key_block(w: &mut Writer, format: u32, algorithm: u32, material: &[u8], wrapped: bool) {
    w.structure(tags::SYMMETRIC_KEY, |w| {
        w.structure(tags::KEY_BLOCK, |w| {
            w.enumeration(tags::KEY_FORMAT_TYPE, format);
            w.structure(tags::KEY_VALUE, |w| w.bytes(tags::KEY_MATERIAL, material));
            w.enumeration(tags::CRYPTOGRAPHIC_ALGORITHM, algorithm);
            if wrapped {
                w.structure(tags::KEY_WRAPPING_DATA, |_| {});
            }
        });
    });
}

/// Reads all that could be read from an answer, whatever it is.
fn read_everything(bytes: &[u8]) {
    for request in each_request() {
        let Ok(Response { version, result: Ok(payload) }) = Response::parse(bytes, &request) else {
            continue;
        };
        let _ = response::best_version(payload);
        let _ = response::created(payload);
        let _ = response::sealed(payload);
        let _ = response::opened(payload);
        let _ = response::key(payload);
        let _ = response::attributes(payload, version, "acme");
        if let Ok(ids) = response::located(payload) {
            assert!(ids.len() <= MAX_LOCATED && ids.iter().all(|id| id.len() <= 256));
        }
    }
}

// TTLV.

#[test]
fn values_are_laid_out_as_the_specification_shows() {
    let tag = ttlv::Tag::standard(0x0020);
    type Write = fn(&mut Writer, ttlv::Tag);
    let cases: [(Write, &str); 6] = [
        (|w, t| w.integer(t, 8), "4200200200000004 0000000800000000"),
        (|w, t| w.enumeration(t, 255), "4200200500000004 000000FF00000000"),
        (|w, t| w.boolean(t, true), "4200200600000008 0000000000000001"),
        (|w, t| w.text(t, "Hello World"), "420020070000000B 48656C6C6F20576F 726C640000000000"),
        (|w, t| w.bytes(t, &[1, 2, 3]), "4200200800000003 0102030000000000"),
        (
            |w, t| {
                w.structure(t, |w| {
                    w.enumeration(ttlv::Tag::standard(0x0004), 254);
                    w.integer(ttlv::Tag::standard(0x0005), 255);
                });
            },
            "4200200100000020 4200040500000004 000000FE00000000 4200050200000004 000000FF00000000",
        ),
    ];
    for (write, expected) in cases {
        let mut w = Writer::new();
        write(&mut w, tag);
        assert_eq!(hex(&w.finish()), expected.replace(' ', ""));
    }
}

#[test]
fn types_that_are_never_written_are_read() {
    for (bytes, value) in [
        (&[0x42, 0, 0x20, 3, 0, 0, 0, 8, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFE][..], Value::LongInteger(-2)),
        (&[0x42, 0, 0x20, 4, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 1], Value::BigInteger(&[0, 0, 0, 0, 0, 0, 0, 1])),
        (&[0x42, 0, 0x20, 9, 0, 0, 0, 8, 0, 0, 0, 0, 0x47, 0xDA, 0x67, 0xF8], Value::DateTime(0x47DA_67F8)),
        (&[0x42, 0, 0x20, 10, 0, 0, 0, 4, 0, 0x0D, 0x2F, 0, 0, 0, 0, 0], Value::Interval(864_000)),
        (&[0x42, 0, 0x20, 11, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 9], Value::DateTimeExtended(9)),
    ] {
        assert_eq!(Items::check(bytes).unwrap().get(ttlv::Tag::standard(0x20)), Ok(value));
    }
}

#[test]
fn lengths_types_and_values_are_checked() {
    let tag = ttlv::Tag::standard(0x20);
    let item = |kind: u8, length: u8, value: &[u8]| [&[0x42, 0, 0x20, kind, 0, 0, 0, length][..], value].concat();
    let bad_length = |len| CodecError::BadLength { tag, len };
    for (bytes, error) in [
        (vec![0x42; 7], CodecError::Truncated),
        (item(2, 4, &[0; 7]), CodecError::Truncated),
        (item(8, 9, &[0; 8]), CodecError::Truncated),
        (item(2, 8, &[0; 8]), bad_length(8)),
        (item(2, 3, &[0; 8]), bad_length(3)),
        (item(5, 0, &[]), bad_length(0)),
        (item(3, 4, &[0; 8]), bad_length(4)),
        (item(4, 3, &[0; 8]), bad_length(3)),
        (item(1, 4, &[0; 8]), bad_length(4)),
        (item(6, 8, &[0, 0, 0, 0, 0, 0, 0, 2]), CodecError::BadValue { tag }),
        (item(7, 1, &[0xFF, 0, 0, 0, 0, 0, 0, 0]), CodecError::BadValue { tag }),
        (item(0, 0, &[]), CodecError::UnknownType { tag, kind: 0 }),
        (item(12, 0, &[]), CodecError::UnknownType { tag, kind: 12 }),
        ([0x42, 0, 0x20, 8, 0xFF, 0xFF, 0xFF, 0xFF].to_vec(), CodecError::Truncated),
    ] {
        assert_eq!(Items::check(&bytes), Err(error), "{bytes:?}");
    }
}

#[test]
fn depth_is_limited_however_long_the_message_is() {
    let nested = |depth: usize| {
        let mut bytes = Vec::new();
        for left in (0..depth).rev() {
            bytes.extend_from_slice(&[0x42, 0, 0x20, 1]);
            bytes.extend_from_slice(&u32::try_from(left * 8).unwrap().to_be_bytes());
        }
        bytes
    };
    assert!(Items::check(&nested(MAX_DEPTH)).is_ok());
    for depth in [MAX_DEPTH + 1, MAX_MESSAGE / 8] {
        assert_eq!(Items::check(&nested(depth)), Err(CodecError::TooDeep));
    }
}

#[test]
fn length_is_limited_before_anything_is_read() {
    let header = |length: u32| {
        let mut header = [0x42, 0, 0x7B, 1, 0, 0, 0, 0];
        header[4..].copy_from_slice(&length.to_be_bytes());
        header
    };
    let limit = MAX_MESSAGE - HEADER_LEN;
    assert_eq!(rest_of_response(&header(u32::try_from(limit).unwrap())), Ok(limit));
    for length in [limit + 1, 1 << 20, u32::MAX as usize] {
        let refused = rest_of_response(&header(u32::try_from(length).unwrap()));
        assert_eq!(refused, Err(CodecError::TooLong { len: length, limit }));
    }
    for other in [*b"HTTP/1.1", [0x42, 0, 0x78, 1, 0, 0, 0, 0], [0x42, 0, 0x7B, 8, 0, 0, 0, 0]] {
        assert_eq!(rest_of_response(&other), Err(CodecError::NoResponse));
    }
    let long = vec![0; MAX_MESSAGE + 8];
    assert!(matches!(Items::check(&long), Err(CodecError::TooLong { .. })));
}

#[test]
fn debug_shows_neither_texts_nor_bytes() {
    let mut w = Writer::new();
    w.text(tags::NAME_VALUE, "sesame");
    w.bytes(tags::KEY_MATERIAL, b"sesame");
    let bytes = w.finish();
    let shown = format!("{:?}", Items::check(&bytes).unwrap());
    assert!(shown.contains("6 bytes") && !shown.contains("sesame") && !shown.contains("115"), "{shown}");
}

// Messages.

#[test]
fn requests_are_as_they_were() {
    let golden = |request: Request<'_>, version, expected: &str| {
        assert_eq!(hex(&request.encode(version)), expected.replace(' ', ""));
    };
    // Header: version, longest response, one item. Item: operation, most items, the name as an attribute.
    golden(
        Request::Locate { name: "a" },
        Version::V1_4,
        "42007801000000C0 4200770100000048 4200690100000020 42006A0200000004 0000000100000000 42006B0200000004 \
         0000000400000000 4200500200000004 0001000000000000 42000D0200000004 0000000100000000 42000F0100000068 \
         42005C0500000004 0000000800000000 4200790100000050 42004F0200000004 0000001100000000 4200080100000038 \
         42000A0700000004 4E616D6500000000 42000B0100000020 4200550700000001 6100000000000000 4200540500000004 \
         0000000100000000",
    );
    // From 2.0 on an attribute is its tag.
    golden(
        Request::Locate { name: "a" },
        Version::V2_0,
        "42007801000000B0 4200770100000048 4200690100000020 42006A0200000004 0000000200000000 42006B0200000004 \
         0000000000000000 4200500200000004 0001000000000000 42000D0200000004 0000000100000000 42000F0100000058 \
         42005C0500000004 0000000800000000 4200790100000040 42004F0200000004 0000001100000000 4201250100000028 \
         4200530100000020 4200550700000001 6100000000000000 4200540500000004 0000000100000000",
    );
    // Parameters: GCM, AES, random IV, tag of 16 bytes.
    golden(
        Request::Encrypt { id: "17", additional: b"context", plaintext: b"plaintext" },
        Version::V2_0,
        "42007801000000F0 4200770100000048 4200690100000020 42006A0200000004 0000000200000000 42006B0200000004 \
         0000000000000000 4200500200000004 0001000000000000 42000D0200000004 0000000100000000 42000F0100000098 \
         42005C0500000004 0000001F00000000 4200790100000080 4200940700000002 3137000000000000 42002B0100000040 \
         4200110500000004 0000000900000000 4200280500000004 0000000300000000 4200C50600000008 0000000000000001 \
         4200CE0200000004 0000001000000000 4200C20800000009 706C61696E746578 7400000000000000 4200FE0800000007 \
         636F6E7465787400",
    );
}

#[test]
fn no_request_has_a_time_stamp_and_all_are_short() {
    for request in each_request() {
        for version in Version::KNOWN {
            let bytes = request.encode(version);
            let message = Items::check(&bytes).unwrap().structure(tags::REQUEST_MESSAGE).unwrap();
            let header = message.structure(tags::REQUEST_HEADER).unwrap();
            assert_eq!(header.find(ttlv::Tag::standard(0x0092)), None);
            assert_eq!(header.integer(tags::BATCH_COUNT), Ok(1));
            let item = message.structure(tags::BATCH_ITEM).unwrap();
            assert_eq!(item.enumeration(tags::OPERATION), Ok(request.operation()));
        }
    }
    let most = [0xFF; 5 * 1024];
    let longest = Request::Encrypt { id: "17", additional: &most, plaintext: &most }.encode(Version::V2_0);
    assert!(longest.len() < MAX_MESSAGE && longest.capacity() == MAX_MESSAGE, "it was not moved while it grew");
}

#[test]
fn answers_are_understood() {
    for version in [Version::V1_4, Version::V2_0] {
        for request in each_request() {
            let bytes = good_answer(version, &request);
            let response = Response::parse(&bytes, &request).unwrap();
            assert_eq!(response.version, version);
            let payload = response.result.unwrap();
            match request {
                Request::DiscoverVersions => {
                    assert_eq!(response::best_version(payload), Ok(Some(Version::V2_0)));
                }
                Request::Locate { .. } => assert_eq!(response::located(payload).unwrap(), ["17"]),
                Request::Create { .. } => assert_eq!(response::created(payload).unwrap(), "17"),
                Request::Get { .. } => assert_eq!(response::key(payload), Ok(&[5; 32])),
                Request::Decrypt { .. } => assert_eq!(response::opened(payload), Ok(SEALED.ciphertext)),
                Request::Encrypt { .. } => {
                    let sealed = response::sealed(payload).unwrap();
                    assert_eq!((sealed.iv, sealed.tag), (SEALED.iv, SEALED.tag));
                }
                Request::GetAttributes { .. } => {
                    let found = response::attributes(payload, version, "acme").unwrap();
                    assert_eq!(found.state, Some(State::Active));
                    assert_eq!(found.named, version == Version::V2_0);
                    assert_eq!(found.usage, None);
                }
                _ => {}
            }
        }
    }
}

#[test]
fn what_answers_something_else_is_no_answer() {
    let asked = Request::Activate { id: "17" };
    let other = good_answer(Version::V1_4, &Request::Destroy { id: "17" });
    assert_eq!(Response::parse(&other, &asked).unwrap_err(), CodecError::OtherOperation);
    let nameless = response(Version::V1_4, None, 0, |w| w.structure(tags::RESPONSE_PAYLOAD, |_| {}));
    assert_eq!(Response::parse(&nameless, &asked).unwrap_err(), CodecError::Missing { tag: tags::OPERATION });
    let empty = response(Version::V1_4, Some(asked.operation()), 0, |_| {});
    assert_eq!(Response::parse(&empty, &asked).unwrap_err(), CodecError::Missing { tag: tags::RESPONSE_PAYLOAD });
    let good = good_answer(Version::V1_4, &asked);
    let twice = [good.as_slice(), &good].concat();
    assert_eq!(Response::parse(&twice, &asked).unwrap_err(), CodecError::Trailing);
    let mut two_items = Writer::new();
    two_items.structure(tags::RESPONSE_MESSAGE, |w| {
        w.structure(tags::RESPONSE_HEADER, |w| Version::V1_4.write(w));
        w.structure(tags::BATCH_ITEM, |_| {});
        w.structure(tags::BATCH_ITEM, |_| {});
    });
    assert_eq!(Response::parse(&two_items.finish(), &asked).unwrap_err(), CodecError::OtherOperation);
}

#[test]
fn a_refusal_tells_its_reason_also_without_naming_the_operation() {
    let asked = Request::Activate { id: "17" };
    for operation in [None, Some(asked.operation())] {
        let bytes = response(Version::V1_0, operation, 1, |w| {
            w.enumeration(tags::RESULT_REASON, 0x0C);
            w.text(tags::RESULT_MESSAGE, "no");
        });
        let refusal = Response::parse(&bytes, &asked).unwrap().result.unwrap_err();
        assert_eq!((refusal.reason, refusal.message), (Reason::PERMISSION_DENIED, "no"));
        assert_eq!(refusal.reason.to_string(), "Permission Denied");
    }
    // Pending, undone, or a status that does not exist: not done.
    for status in [2, 3, 77] {
        let bytes = response(Version::V1_0, Some(asked.operation()), status, |_| {});
        let refusal = Response::parse(&bytes, &asked).unwrap().result.unwrap_err();
        assert_eq!((refusal.reason, refusal.message), (Reason::GENERAL_FAILURE, ""));
    }
    assert_eq!(Reason(0x777).to_string(), "result reason 0x777");
}

#[test]
fn lists_are_limited() {
    let asked = Request::Locate { name: "a" };
    let list = |count: usize, id: &str| {
        done(Version::V1_4, &asked, |w| (0..count).for_each(|_| w.text(tags::UNIQUE_IDENTIFIER, id)))
    };
    let located = |bytes: &[u8]| response::located(Response::parse(bytes, &asked).unwrap().result.unwrap());
    assert_eq!(located(&list(MAX_LOCATED, "x")).unwrap().len(), MAX_LOCATED);
    assert!(matches!(located(&list(MAX_LOCATED + 1, "x")), Err(CodecError::TooMany { .. })));
    for id in ["", &"x".repeat(257)] {
        assert!(matches!(located(&list(1, id)), Err(CodecError::BadLength { .. })));
    }
    let asked = Request::DiscoverVersions;
    let many = done(Version::V1_4, &asked, |w| (0..65).for_each(|_| Version::V1_4.write(w)));
    let payload = Response::parse(&many, &asked).unwrap().result.unwrap();
    assert!(matches!(response::best_version(payload), Err(CodecError::TooMany { .. })));
}

#[test]
fn versions_that_are_not_known_are_not_chosen() {
    let asked = Request::DiscoverVersions;
    for (offered, best) in [
        (vec![(3, 0), (2, 1), (1, 4), (1, 0)], Some(Version::V1_4)),
        (vec![(1, 0), (2, 0)], Some(Version::V2_0)),
        (vec![(2, 1), (0, 9), (-1, 0)], None),
        (vec![], None),
    ] {
        let bytes = done(Version::V1_1, &asked, |w| {
            offered.iter().for_each(|&(major, minor)| Version { major, minor }.write(w));
        });
        let payload = Response::parse(&bytes, &asked).unwrap().result.unwrap();
        assert_eq!(response::best_version(payload), Ok(best));
    }
}

#[test]
fn only_a_plain_aes_key_of_256_bits_is_taken() {
    let asked = Request::Get { id: "17" };
    for (format, algorithm, length, wrapped) in
        [(2, 3, 32, false), (1, 2, 32, false), (1, 3, 16, false), (1, 3, 33, false), (1, 3, 32, true)]
    {
        let bytes = done(Version::V1_4, &asked, |w| key_block(w, format, algorithm, &vec![5; length], wrapped));
        let payload = Response::parse(&bytes, &asked).unwrap().result.unwrap();
        assert!(response::key(payload).is_err(), "{format} {algorithm} {length} {wrapped}");
    }
}

// Anything at all.

proptest! {
    #![proptest_config(ProptestConfig {
        rng_seed: RngSeed::Fixed(0x4B4D_4950),
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn what_is_written_is_read(tree in tree()) {
        let mut w = Writer::new();
        tree.write(&mut w);
        let bytes = w.finish();
        let items = Items::check(&bytes).unwrap();
        let mut read = items.into_iter();
        prop_assert_eq!(Node::read(read.next().unwrap().value), tree);
        prop_assert!(read.next().is_none());
        // Nothing that is cut short is whole.
        for len in 1..bytes.len() {
            prop_assert!(Items::check(&bytes[..len]).is_err());
        }
    }

    #[test]
    fn arbitrary_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = Items::check(&bytes).map(|items| format!("{items:?}"));
        read_everything(&bytes);
    }

    #[test]
    fn arbitrary_headers_are_limited(header in any::<[u8; HEADER_LEN]>()) {
        if let Ok(rest) = rest_of_response(&header) {
            prop_assert!(rest <= MAX_MESSAGE - HEADER_LEN);
        }
    }
}

#[test]
fn altered_answers_are_read_or_refused() {
    for version in [Version::V1_4, Version::V2_0] {
        for request in each_request() {
            let good = good_answer(version, &request);
            let mut random = Random(0x5EED);
            for _ in 0..3_000 {
                let mut bytes = good.clone();
                for _ in 0..=random.below(3) {
                    let at = random.below(bytes.len());
                    match random.below(5) {
                        0 => bytes[at] = [0, 1, 7, 8, 0x42, 0x7F, 0x80, 0xFF][random.below(8)],
                        1 => bytes[at] ^= 1 << random.below(8),
                        2 => bytes.truncate(at.max(1)),
                        3 => bytes.insert(at, 0),
                        _ => drop(bytes.splice(at..at, good[..at.min(good.len())].to_vec())),
                    }
                }
                read_everything(&bytes);
            }
        }
    }
}

/// A tree of items, as a model.
#[derive(Clone, Debug, PartialEq)]
enum Node {
    Structure(Vec<Node>),
    Integer(i32),
    Enumeration(u32),
    Boolean(bool),
    Text(String),
    Bytes(Vec<u8>),
}

fn tree() -> impl Strategy<Value = Node> {
    let leaf = prop_oneof![
        any::<i32>().prop_map(Node::Integer),
        any::<u32>().prop_map(Node::Enumeration),
        any::<bool>().prop_map(Node::Boolean),
        ".{0,20}".prop_map(Node::Text),
        prop::collection::vec(any::<u8>(), 0..40).prop_map(Node::Bytes),
    ];
    leaf.prop_recursive(6, 40, 5, |inner| prop::collection::vec(inner, 0..5).prop_map(Node::Structure))
}

impl Node {
    fn write(&self, w: &mut Writer) {
        let tag = tags::ATTRIBUTE;
        match self {
            Self::Structure(nodes) => w.structure(tag, |w| nodes.iter().for_each(|node| node.write(w))),
            Self::Integer(value) => w.integer(tag, *value),
            Self::Enumeration(value) => w.enumeration(tag, *value),
            Self::Boolean(value) => w.boolean(tag, *value),
            Self::Text(value) => w.text(tag, value),
            Self::Bytes(value) => w.bytes(tag, value),
        }
    }

    fn read(value: Value<'_>) -> Self {
        match value {
            Value::Structure(items) => Self::Structure(items.into_iter().map(|item| Self::read(item.value)).collect()),
            Value::Integer(value) => Self::Integer(value),
            Value::Enumeration(value) => Self::Enumeration(value),
            Value::Boolean(value) => Self::Boolean(value),
            Value::Text(value) => Self::Text(value.to_owned()),
            Value::Bytes(value) => Self::Bytes(value.to_vec()),
            other => panic!("{other:?} is never written"),
        }
    }
}

/// Numbers from a seed: a failure comes back.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % limit as u64).unwrap()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02X}")).collect()
}
