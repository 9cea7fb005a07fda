//! A server's handshake: what it answers to the last byte, what it does before TLS, and that no bytes make it panic or ask for
//! more than its limits allow.

#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use proptest::collection::vec;
use proptest::prelude::*;
use reseal_proto::nbd::handshake::{self, ClientHandshake, Wanted};
use reseal_proto::nbd::serve::{
    Agreed, Facts, Listed, MAX_LISTED, MAX_OPTIONS, Refused, ServerHandshake, Step, TlsTerms,
};
use reseal_proto::nbd::*;

/// Since when the export `written` tells its changes.
const SINCE: &str = "07/vm@1/disk";

fn facts(name: &str) -> Result<Facts, Refused> {
    match name {
        "disk" | "" | "written" => Ok(Facts {
            name: "disk".into(),
            description: Some("for people".into()),
            size: 0x1234,
            flags: ExportFlags::HAS_FLAGS.with(ExportFlags::READ_ONLY).with(ExportFlags::SEND_DF),
            block_size: BlockSize { minimum: 1, preferred: 65536, maximum: 32 << 20 },
            changed_since: (name == "written").then(|| SINCE.to_owned()),
        }),
        _ => Err(Refused { error: OptionError::Unknown, text: "only disk".into() }),
    }
}

/// How a dialogue ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Done(Agreed),
    Left,
    Violation(Violation),
    /// The client's bytes were used up.
    Waits,
}

/// Feeds a server what a client says; what it sent, and how it ended.
fn dialogue(terms: TlsTerms, mut said: &[u8]) -> (Vec<u8>, End) {
    let mut machine = ServerHandshake::new(terms);
    let mut sent = Vec::new();
    let mut step = machine.advance(&[]);
    loop {
        step = match step {
            Err(violation) => return (sent, End::Violation(violation)),
            Ok(Step::Read(length)) => {
                assert!(length > 0 && length <= MAX_OPTION, "it asked for {length} bytes");
                let Some((now, rest)) = said.split_at_checked(length) else { return (sent, End::Waits) };
                said = rest;
                machine.advance(now)
            }
            Ok(Step::Send(bytes)) => {
                sent.extend(bytes);
                machine.advance(&[])
            }
            Ok(Step::StartTls) => {
                sent.extend(b"<TLS>");
                machine.advance(&[])
            }
            Ok(Step::Open(name)) => machine.opened(facts(&name)),
            Ok(Step::List) => machine.listed(Ok(vec![Listed { name: "disk".into(), description: "d".into() }])),
            Ok(Step::Done(agreed)) => return (sent, End::Done(agreed)),
            Ok(Step::End) => return (sent, End::Left),
        };
    }
}

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    let pair = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(pair).collect()
}

const GREETING: &str = "4e42444d41474943 49484156454f5054 0003";

#[test]
fn what_is_answered_is_so_to_the_last_byte() {
    // Flags; structured replies; base:allocation of "disk"; GO with name, description and block size.
    let said = hex("00000003
        49484156454f5054 00000008 00000000
        49484156454f5054 0000000a 0000001f 00000004 6469736b 00000001 0000000f 626173653a616c6c6f636174696f6e
        49484156454f5054 00000007 00000010 00000004 6469736b 0003 0001 0002 0003");
    let answered = hex(&format!(
        "{GREETING}
        0003e889045565a9 00000008 00000001 00000000
        0003e889045565a9 0000000a 00000004 00000013 00000001 626173653a616c6c6f636174696f6e
        0003e889045565a9 0000000a 00000001 00000000
        0003e889045565a9 00000007 00000003 0000000c 0000 0000000000001234 0083
        0003e889045565a9 00000007 00000003 00000006 0001 6469736b
        0003e889045565a9 00000007 00000003 0000000c 0002 666f722070656f706c65
        0003e889045565a9 00000007 00000003 0000000e 0003 00000001 00010000 02000000
        0003e889045565a9 00000007 00000001 00000000"
    ));
    let (sent, end) = dialogue(TlsTerms::Absent, &said);
    assert_eq!(end, End::Done(Agreed { structured: true, allocation: true, changes: false }));
    assert_eq!(sent, answered);
}

#[test]
fn the_export_name_alone_opens_too() {
    let name = hex("49484156454f5054 00000001 00000004 6469736b");
    for (flags, zeroes) in [("00000003", 0), ("00000001", 124), ("00000000", 124)] {
        let (sent, end) = dialogue(TlsTerms::Absent, &[hex(flags), name.clone()].concat());
        // Without chunks there is no word about keeping one whole.
        let expected = [hex(GREETING), hex("0000000000001234 0003"), vec![0; zeroes]].concat();
        assert_eq!((sent, end), (expected, End::Done(Agreed { structured: false, allocation: false, changes: false })));
    }
    let other = OptionRequest::ExportName("other".into()).encode();
    assert_eq!(dialogue(TlsTerms::Absent, &[hex("00000003"), other].concat()), (hex(GREETING), End::Left));
    // Whoever does not know fixed newstyle gets nothing else.
    let list = OptionRequest::List.encode();
    assert_eq!(dialogue(TlsTerms::Absent, &[hex("00000000"), list].concat()), (hex(GREETING), End::Left));
}

/// Replies to one option after those before.
fn replies(terms: TlsTerms, before: &[OptionRequest], option: &OptionRequest) -> (Vec<OptionReply>, End) {
    let said = |options: &[&OptionRequest]| -> Vec<u8> {
        let encoded = options.iter().flat_map(|option| option.encode());
        ClientFlags { fixed_newstyle: true, no_zeroes: true }.encode().into_iter().chain(encoded).collect()
    };
    let first: Vec<&OptionRequest> = before.iter().collect();
    let (skipped, _) = dialogue(terms, &said(&first));
    let (sent, end) = dialogue(terms, &said(&[&first[..], &[option]].concat()));
    let mut rest = &sent[skipped.len()..];
    let mut found = Vec::new();
    while let Some((header, data)) = rest.split_first_chunk::<OPTION_REPLY_HEADER_LENGTH>() {
        let header = OptionReplyHeader::decode(header).unwrap();
        assert_eq!(header.option, option.kind());
        found.push(OptionReply::decode(header.kind, &data[..header.length]).unwrap());
        rest = &data[header.length..];
        if rest == b"<TLS>" {
            break;
        }
    }
    (found, end)
}

fn query(export: &str, queries: &[&str]) -> MetaQuery {
    MetaQuery { export: export.into(), queries: queries.iter().map(|query| (*query).to_owned()).collect() }
}

fn error(error: OptionError) -> Vec<OptionReply> {
    vec![OptionReply::Error { error, text: String::new() }]
}

#[test]
fn where_tls_is_demanded_nothing_is_told_before() {
    let request = || InfoRequest { export: "disk".into(), wanted: vec![] };
    let all = [
        OptionRequest::List,
        OptionRequest::Info(request()),
        OptionRequest::Go(request()),
        OptionRequest::StructuredReply,
        OptionRequest::ListMetaContext(query("disk", &[])),
        OptionRequest::SetMetaContext(query("disk", &[])),
        OptionRequest::Other(99),
    ];
    for option in &all {
        assert_eq!(replies(TlsTerms::Demanded, &[], option), (error(OptionError::TlsRequired), End::Waits));
        let after = replies(TlsTerms::Demanded, &[OptionRequest::StartTls], option);
        assert_ne!(after.0, error(OptionError::TlsRequired), "{option:?}");
    }
    let named = OptionRequest::ExportName("disk".into());
    assert_eq!(replies(TlsTerms::Demanded, &[], &named), (vec![], End::Left));
    assert_eq!(replies(TlsTerms::Demanded, &[], &OptionRequest::Abort), (vec![OptionReply::Ack], End::Left));
    for (terms, expected) in [
        (TlsTerms::Offered, vec![OptionReply::Ack]),
        (TlsTerms::Demanded, vec![OptionReply::Ack]),
        (TlsTerms::Absent, error(OptionError::Unsupported)),
        (TlsTerms::Established, error(OptionError::Invalid)),
    ] {
        assert_eq!(replies(terms, &[], &OptionRequest::StartTls).0, expected, "{terms:?}");
    }
    let twice = replies(TlsTerms::Offered, &[OptionRequest::StartTls], &OptionRequest::StartTls);
    assert_eq!(twice.0, error(OptionError::Invalid));
}

#[test]
fn what_was_agreed_to_in_the_clear_is_forgotten_with_tls() {
    let before = [
        OptionRequest::StructuredReply,
        OptionRequest::SetMetaContext(query("disk", &[BASE_ALLOCATION])),
        OptionRequest::StartTls,
    ];
    let go = OptionRequest::Go(InfoRequest { export: "disk".into(), wanted: vec![] });
    let (_, end) = replies(TlsTerms::Offered, &before, &go);
    assert_eq!(end, End::Done(Agreed { structured: false, allocation: false, changes: false }));
}

#[test]
fn contexts_are_listed_selected_and_belong_to_one_export() {
    let chunks = [OptionRequest::StructuredReply];
    let listed = |queries: &[&str]| {
        replies(TlsTerms::Absent, &chunks, &OptionRequest::ListMetaContext(query("disk", queries))).0.len()
    };
    for (queries, found) in
        [(&[][..], 2), (&["base:"], 2), (&["x:", "base:allocation"], 2), (&["x:"], 1), (&["base:x"], 1)]
    {
        assert_eq!(listed(queries), found, "{queries:?}");
    }
    let set = |export, queries: &[&str]| OptionRequest::SetMetaContext(query(export, queries));
    let own = format!("{CHANGED_SINCE}{SINCE}");
    let names = |option: &OptionRequest| -> Vec<String> {
        let name = |reply| if let OptionReply::MetaContext { name, .. } = reply { Some(name) } else { None };
        replies(TlsTerms::Absent, &chunks, option).0.into_iter().filter_map(name).collect()
    };
    let list = |queries| OptionRequest::ListMetaContext(query("written", queries));
    for (queries, found) in [
        (&[][..], vec![BASE_ALLOCATION, &*own]),
        (&["reseal:"], vec![&*own]),
        (&[CHANGED_SINCE], vec![&*own]),
        (&["reseal:x", "base:"], vec![BASE_ALLOCATION]),
    ] {
        assert_eq!(names(&list(queries)), found, "{queries:?}");
    }
    assert_eq!(names(&set("written", &[&own])), vec![own.clone()]);
    // Another moment is none that it knows, and neither is a namespace.
    let other = format!("{CHANGED_SINCE}08/vm@1/disk");
    assert_eq!(names(&set("written", &[&other, "reseal:"])), Vec::<String>::new());
    for (queries, found) in [(&[][..], 1), (&["base:"], 1), (&["x:y", "base:allocation", "base:allocation"], 2)] {
        assert_eq!(replies(TlsTerms::Absent, &chunks, &set("disk", queries)).0.len(), found, "{queries:?}");
    }
    // Without chunks there is no reply that could tell them.
    assert_eq!(replies(TlsTerms::Absent, &[], &set("disk", &[BASE_ALLOCATION])).0, error(OptionError::Invalid));
    let unknown = replies(TlsTerms::Absent, &chunks, &set("other", &[BASE_ALLOCATION])).0;
    assert_eq!(unknown, [OptionReply::Error { error: OptionError::Unknown, text: "only disk".into() }]);
    let go = |export: &str| OptionRequest::Go(InfoRequest { export: export.into(), wanted: vec![] });
    let select = set("disk", &[BASE_ALLOCATION]);
    for (before, export, allocation) in [
        (vec![select.clone()], "disk", true),
        // Another name, though it is the same disk.
        (vec![select.clone()], "", false),
        (vec![select.clone(), set("disk", &[])], "disk", false),
        (vec![select.clone(), set("other", &[BASE_ALLOCATION])], "disk", false),
    ] {
        let before = [&chunks[..], &before].concat();
        let (_, end) = replies(TlsTerms::Absent, &before, &go(export));
        assert_eq!(end, End::Done(Agreed { structured: true, allocation, changes: false }), "{before:?}");
    }
}

#[test]
fn options_that_make_no_sense_are_refused_and_their_number_is_limited() {
    let flags = hex("00000003");
    // Data where there are none, a name that is longer than its option, and text that is none.
    for bad in [
        "49484156454f5054 00000003 00000001 00",
        "49484156454f5054 00000008 00000001 00",
        "49484156454f5054 00000007 00000006 ffffffff 0000",
        "49484156454f5054 00000007 00000008 00000002 ffff 0000",
        "49484156454f5054 00000007 0000000a 00000004 6469736b 0009",
    ] {
        let (sent, end) = dialogue(TlsTerms::Absent, &[flags.clone(), hex(bad)].concat());
        assert_eq!(end, End::Waits, "{bad}");
        let header = OptionReplyHeader::decode(&sent[18..]).unwrap();
        assert_eq!(OptionReply::decode(header.kind, &[]).unwrap(), error(OptionError::Invalid)[0], "{bad}");
    }
    let many = OptionRequest::Other(7).encode().repeat(MAX_OPTIONS + 1);
    let (_, end) = dialogue(TlsTerms::Absent, &[flags.clone(), many].concat());
    assert_eq!(end, End::Violation(Violation::TooManyOptions { max: MAX_OPTIONS }));
    let long = hex("49484156454f5054 00000007 00010001");
    let (_, end) = dialogue(TlsTerms::Absent, &[flags, long].concat());
    assert!(matches!(end, End::Violation(Violation::TooLong { .. })), "{end:?}");
    let (_, end) = dialogue(TlsTerms::Absent, &hex("00000007"));
    assert!(matches!(end, End::Violation(Violation::Value { .. })), "{end:?}");
}

#[test]
fn a_list_and_its_strings_fit_what_clients_take() {
    let mut machine = ServerHandshake::new(TlsTerms::Absent);
    machine.advance(&[]).unwrap();
    assert_eq!(machine.advance(&[]), Ok(Step::Read(CLIENT_FLAGS_LENGTH)));
    machine.advance(&[0, 0, 0, 3]).unwrap();
    let listed = machine.advance(&OptionRequest::List.encode()).unwrap();
    assert_eq!(listed, Step::List);
    let long = Listed { name: "ä".repeat(MAX_STRING), description: "ö".repeat(MAX_STRING) };
    let Ok(Step::Send(bytes)) = machine.listed(Ok(vec![long; MAX_LISTED + 10])) else { panic!("no list") };
    let (mut rest, mut count) = (&bytes[..], 0);
    while let Some((header, data)) = rest.split_first_chunk::<OPTION_REPLY_HEADER_LENGTH>() {
        let header = OptionReplyHeader::decode(header).unwrap();
        OptionReply::decode(header.kind, &data[..header.length]).unwrap();
        (rest, count) = (&data[header.length..], count + 1);
    }
    assert_eq!(count, MAX_OPTION_REPLIES);
}

/// Lets the client's machine and the server's talk.
fn talk(wanted: Wanted, terms: TlsTerms) -> (Result<handshake::Opened, handshake::HandshakeError>, Option<Agreed>) {
    let (mut client, mut server) = (ClientHandshake::new(wanted), ServerHandshake::new(terms));
    let (mut to_client, mut to_server) = (Vec::new(), Vec::new());
    let (mut client_step, mut server_step) = (client.advance(&[]), server.advance(&[]).unwrap());
    let mut agreed = None;
    for _ in 0..1000 {
        server_step = match server_step {
            Step::Read(length) if to_server.len() >= length => {
                let now: Vec<u8> = to_server.drain(..length).collect();
                server.advance(&now).unwrap()
            }
            Step::Send(bytes) => {
                to_client.extend(bytes);
                server.advance(&[]).unwrap()
            }
            Step::StartTls => server.advance(&[]).unwrap(),
            Step::Open(name) => server.opened(facts(&name)).unwrap(),
            Step::List => server.listed(Ok(Vec::new())).unwrap(),
            Step::Done(now) => {
                agreed = Some(now);
                Step::Done(now)
            }
            waits => waits,
        };
        client_step = match client_step {
            Ok(handshake::Step::Read(length)) if to_client.len() >= length => {
                let now: Vec<u8> = to_client.drain(..length).collect();
                client.advance(&now)
            }
            Ok(handshake::Step::Send(bytes)) => {
                to_server.extend(bytes);
                client.advance(&[])
            }
            Ok(handshake::Step::StartTls) => client.advance(&[]),
            Ok(handshake::Step::Done(opened)) => return (Ok(opened), agreed),
            Err(e) => return (Err(e), agreed),
            waits => waits,
        };
    }
    panic!("they do not come to an end: {client_step:?} {server_step:?}")
}

#[test]
fn our_client_and_our_server_understand_each_other() {
    let wanted =
        |export: &str, tls| Wanted { export: export.into(), tls, contexts: vec![(BASE_ALLOCATION.into(), true)] };
    for (tls, terms) in
        [(false, TlsTerms::Absent), (false, TlsTerms::Offered), (true, TlsTerms::Offered), (true, TlsTerms::Demanded)]
    {
        let (opened, agreed) = talk(wanted("disk", tls), terms);
        let opened = opened.unwrap();
        assert_eq!((opened.size, opened.structured, opened.block_size.preferred), (0x1234, true, 65536));
        assert_eq!(opened.contexts, [(serve::ALLOCATION_ID, BASE_ALLOCATION.to_owned())]);
        assert_eq!(agreed, Some(Agreed { structured: true, allocation: true, changes: false }));
        assert!(talk(wanted("other", tls), terms).0.is_err());
    }
    // Whoever asks since when is told, in full, where anything is known.
    let asking = |export: &str| Wanted {
        contexts: vec![(BASE_ALLOCATION.into(), false), (CHANGED_SINCE.into(), false)],
        ..wanted(export, false)
    };
    let (opened, agreed) = talk(asking("written"), TlsTerms::Absent);
    let both =
        [(serve::ALLOCATION_ID, BASE_ALLOCATION.to_owned()), (serve::CHANGES_ID, format!("{CHANGED_SINCE}{SINCE}"))];
    assert_eq!(opened.unwrap().contexts, both);
    assert_eq!(agreed, Some(Agreed { structured: true, allocation: true, changes: true }));
    assert_eq!(talk(asking("disk"), TlsTerms::Absent).0.unwrap().contexts, both[..1]);
    assert!(talk(wanted("disk", true), TlsTerms::Absent).0.is_err());
    assert!(talk(wanted("disk", false), TlsTerms::Demanded).0.is_err());
}

/// Options as a client may send them, and bytes that are none.
fn some_option() -> impl Strategy<Value = Vec<u8>> {
    let name = prop_oneof![Just("disk".to_owned()), "[a-z@/:]{0,12}"];
    let request = (name.clone(), vec(any::<u16>(), 0..6)).prop_map(|(export, wanted)| InfoRequest { export, wanted });
    let queries = prop_oneof![Just(BASE_ALLOCATION.to_owned()), Just("base:".to_owned()), "[a-z:]{0,12}"];
    let query = (name.clone(), vec(queries, 0..5)).prop_map(|(export, queries)| MetaQuery { export, queries });
    let option = prop_oneof![
        name.prop_map(OptionRequest::ExportName),
        Just(OptionRequest::Abort),
        Just(OptionRequest::List),
        Just(OptionRequest::StartTls),
        Just(OptionRequest::StructuredReply),
        request.clone().prop_map(OptionRequest::Info),
        request.prop_map(OptionRequest::Go),
        query.clone().prop_map(OptionRequest::ListMetaContext),
        query.prop_map(OptionRequest::SetMetaContext),
        any::<u32>().prop_map(OptionRequest::Other),
    ];
    let whole = option.prop_map(|option| option.encode());
    let changed = (whole.clone(), any::<prop::sample::Index>(), any::<u8>()).prop_map(|(mut bytes, at, value)| {
        let at = at.index(bytes.len());
        bytes[at] = value;
        bytes
    });
    prop_oneof![6 => whole, 2 => changed, 1 => vec(any::<u8>(), 0..64)]
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(options in vec(some_option(), 0..12), flags in 0u32..5, terms in 0..4) {
        let terms = match terms {
            0 => TlsTerms::Absent,
            1 => TlsTerms::Offered,
            2 => TlsTerms::Demanded,
            _ => TlsTerms::Established,
        };
        let said = [&flags.to_be_bytes()[..], &options.concat()].concat();
        let (sent, end) = dialogue(terms, &said);
        // Where TLS is demanded, nothing is opened unless it came first.
        if terms == TlsTerms::Demanded && matches!(end, End::Done(_)) {
            prop_assert!(sent.windows(5).any(|window| window == b"<TLS>"));
        }
        // What is sent can be read.
        prop_assert!(Greeting::decode(&sent[..GREETING_LENGTH]).is_ok());
    }
}
