//! The NBD codec: what is encoded decodes to the same, and no bytes make it panic or take more than its limits allow.

#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect
#![allow(clippy::cast_possible_truncation)] // numbers of a test that are known to be small

use proptest::collection::vec;
use proptest::prelude::*;
use reseal_proto::nbd::handshake::{ClientHandshake, HandshakeError, Opened, Refusal, Step, Wanted};
use reseal_proto::nbd::*;

/// What `qemu-nbd` 7.2 sent to a client that asked for the allocation and the bitmap `b0` of a qcow2 image of 16 KiB with 4 KiB
/// written at 4 KiB, then for its extents, for 128 bytes around 8 KiB, and for bytes past the end.
const DIALOGUE: &str = include_str!("data/nbd-qemu-7.2.hex");

fn recorded() -> Vec<u8> {
    let digits: Vec<u8> = DIALOGUE.bytes().filter(u8::is_ascii_hexdigit).collect();
    let pair = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks(2).map(pair).collect()
}

fn wanted(tls: bool) -> Wanted {
    let contexts = vec![(BASE_ALLOCATION.to_owned(), false), (format!("{DIRTY_BITMAP}b0"), true)];
    Wanted { export: "disk".into(), tls, contexts }
}

/// Feeds a handshake. Returns what was opened, or why not, and what is left of the bytes; `None` where they ended.
fn handshake(mut bytes: &[u8], tls: bool) -> (Option<Result<Opened, HandshakeError>>, &[u8]) {
    let mut machine = ClientHandshake::new(wanted(tls));
    let mut input: &[u8] = &[];
    loop {
        match machine.advance(input) {
            Ok(Step::Read(length)) => {
                assert!(length > 0 && length <= MAX_OPTION_REPLY, "it asked for {length} bytes");
                let Some((now, rest)) = bytes.split_at_checked(length) else { return (None, bytes) };
                (input, bytes) = (now, rest);
            }
            Ok(Step::Send(_) | Step::StartTls) => input = &[],
            Ok(Step::Done(opened)) => return (Some(Ok(opened)), bytes),
            Err(e) => return (Some(Err(e)), bytes),
        }
    }
}

/// Decodes replies until the bytes end or make no sense, as a client does.
fn replies(mut bytes: &[u8]) -> (Vec<Reply>, Result<(), Violation>) {
    let mut found = Vec::new();
    let result = (|| {
        while let Some(start) = bytes.first_chunk() {
            let length = Reply::length(*start)?;
            let Some((header, rest)) = bytes.split_at_checked(length) else { break };
            bytes = rest;
            let reply = Reply::decode(header)?;
            found.push(reply);
            let Reply::Chunk(chunk) = reply else { continue };
            let Some((payload, rest)) = bytes.split_at_checked(chunk.length as usize) else { break };
            bytes = rest;
            match chunk.kind {
                ChunkKind::None | ChunkKind::Data => {}
                ChunkKind::Hole => drop(Hole::decode(payload)?),
                ChunkKind::BlockStatus => drop(BlockStatus::decode(payload)?),
                kind => drop(ErrorChunk::decode(kind, payload)?),
            }
        }
        Ok(())
    })();
    (found, result)
}

#[test]
fn a_recorded_dialogue_is_understood() {
    let bytes = recorded();
    let (opened, rest) = handshake(&bytes, false);
    let opened = opened.unwrap().unwrap();
    assert_eq!(opened.size, 16 << 10);
    assert!(opened.structured && opened.flags.contains(ExportFlags::READ_ONLY));
    assert!(!opened.flags.contains(ExportFlags::CAN_MULTI_CONN));
    assert_eq!(opened.block_size, BlockSize { minimum: 1, preferred: 4096, maximum: 32 << 20 });
    let names: Vec<_> = opened.contexts.iter().map(|(_, name)| name.as_str()).collect();
    assert_eq!(names, ["base:allocation", "qemu:dirty-bitmap:b0"]);
    let (found, result) = replies(rest);
    result.unwrap();
    let kinds: Vec<_> = found
        .iter()
        .map(|reply| match reply {
            Reply::Chunk(chunk) => (chunk.kind, chunk.cookie),
            other => panic!("{other:?}"),
        })
        .collect();
    let expected = [
        (ChunkKind::BlockStatus, 1),
        (ChunkKind::BlockStatus, 1),
        (ChunkKind::Data, 2),
        (ChunkKind::Hole, 2),
        (ChunkKind::Error, 3),
    ];
    assert_eq!(kinds, expected);
}

/// A small generator, so that a failure can be repeated.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self, below: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % below
    }
}

#[test]
fn a_dialogue_that_was_changed_is_survived() {
    let bytes = recorded();
    let mut numbers = Numbers(20_260_101);
    for _ in 0..100_000 {
        let mut changed = bytes.clone();
        for _ in 0..=numbers.next(4) {
            let at = numbers.next(changed.len());
            match numbers.next(5) {
                0 => changed[at] ^= 1 << numbers.next(8),
                1 => changed[at] = [0, 1, 0x7f, 0x80, 0xff][numbers.next(5)],
                2 => drop(changed.remove(at)),
                3 => changed.insert(at, numbers.next(256) as u8),
                _ => changed.truncate(at.max(16)),
            }
        }
        let (opened, rest) = handshake(&changed, numbers.next(2) == 0);
        if let Some(Ok(opened)) = opened {
            assert!(opened.block_size.minimum.is_power_of_two());
            let _ = replies(rest);
        }
        let _ = replies(&changed);
    }
}

#[test]
fn no_name_is_sent_before_tls() {
    let greeting = Greeting { fixed_newstyle: true, no_zeroes: true }.encode();
    let mut machine = ClientHandshake::new(wanted(true));
    assert_eq!(machine.advance(&[]), Ok(Step::Read(GREETING_LENGTH)));
    let Ok(Step::Send(sent)) = machine.advance(&greeting) else { panic!("nothing to send") };
    let header = OptionHeader::decode(&sent[CLIENT_FLAGS_LENGTH..]).unwrap();
    assert_eq!(header, OptionHeader { kind: OptionKind::StartTls, length: 0 });
    assert_eq!(sent.len(), CLIENT_FLAGS_LENGTH + OPTION_HEADER_LENGTH);
    assert_eq!(machine.advance(&[]), Ok(Step::Read(OPTION_REPLY_HEADER_LENGTH)));
    let refusal = OptionReply::Error { error: OptionError::Unsupported, text: String::new() };
    let refused = machine.advance(&refusal.encode(OptionKind::StartTls));
    assert!(matches!(refused, Err(HandshakeError::Refused(Refusal::NoTls { .. }))), "{refused:?}");
}

/// A server that answers each option with what `answer` says.
fn server(answer: impl Fn(&OptionRequest) -> Vec<OptionReply>) -> Result<Opened, HandshakeError> {
    let mut machine = ClientHandshake::new(wanted(false));
    let mut to_client = Greeting { fixed_newstyle: true, no_zeroes: true }.encode().to_vec();
    let mut first = true;
    let mut input = Vec::new();
    loop {
        match machine.advance(&input)? {
            Step::Read(length) => {
                assert!(to_client.len() >= length, "the client waits for what does not come");
                input = to_client.drain(..length).collect();
            }
            Step::Send(bytes) => {
                let at = if first { CLIENT_FLAGS_LENGTH } else { 0 };
                if std::mem::take(&mut first) {
                    let flags = ClientFlags::decode(&bytes[..at]).unwrap();
                    assert!(flags.fixed_newstyle && flags.no_zeroes);
                }
                let (header, data) = bytes[at..].split_at(OPTION_HEADER_LENGTH);
                let header = OptionHeader::decode(header).unwrap();
                assert_eq!(header.length, data.len());
                let request = OptionRequest::decode(header.kind, data).unwrap();
                to_client.extend(answer(&request).iter().flat_map(|reply| reply.encode(header.kind)));
                input.clear();
            }
            Step::StartTls => panic!("nobody asked for TLS"),
            Step::Done(opened) => return Ok(opened),
        }
    }
}

fn refuse(error: OptionError) -> Vec<OptionReply> {
    vec![OptionReply::Error { error, text: "because\n\u{1b}[31m".into() }]
}

fn good(request: &OptionRequest) -> Vec<OptionReply> {
    match request {
        OptionRequest::StructuredReply => vec![OptionReply::Ack],
        OptionRequest::SetMetaContext(query) => {
            let contexts = query.queries.iter().zip(7..);
            let contexts = contexts.map(|(name, id)| OptionReply::MetaContext { id, name: name.clone() });
            contexts.chain([OptionReply::Ack]).collect()
        }
        OptionRequest::Go(_) => {
            let flags = ExportFlags::HAS_FLAGS;
            vec![OptionReply::Info(Info::Export { size: 512, flags }), OptionReply::Ack]
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_server_without_limits_has_the_protocols_own() {
    let opened = server(good).unwrap();
    assert_eq!(opened.block_size, BlockSize::DEFAULT);
    assert_eq!(opened.contexts.len(), 2);
}

#[test]
fn a_bitmap_that_is_not_offered_is_refused_with_what_is() {
    let error = server(|request| match request {
        OptionRequest::SetMetaContext(_) => {
            vec![OptionReply::MetaContext { id: 0, name: BASE_ALLOCATION.into() }, OptionReply::Ack]
        }
        OptionRequest::ListMetaContext(query) => {
            assert_eq!(query.queries, ["qemu:"]);
            let name = format!("{DIRTY_BITMAP}other");
            vec![OptionReply::MetaContext { id: 0, name }, OptionReply::Ack]
        }
        other => good(other),
    });
    let error = error.unwrap_err().to_string();
    assert!(error.contains("qemu:dirty-bitmap:b0") && error.contains("it offers qemu:dirty-bitmap:other"), "{error}");
    // Also where structured replies are not to be had.
    let error = server(|request| match request {
        OptionRequest::StructuredReply => refuse(OptionError::Unsupported),
        other => good(other),
    });
    assert!(matches!(error, Err(HandshakeError::Refused(Refusal::NoContext { .. }))));
}

#[test]
fn refusals_are_told_apart() {
    let go = |error| {
        let result = server(|request| match request {
            OptionRequest::Go(_) => refuse(error),
            other => good(other),
        });
        match result {
            Err(HandshakeError::Refused(refusal)) => refusal,
            other => panic!("{other:?}"),
        }
    };
    assert!(matches!(go(OptionError::Unknown), Refusal::NoSuchExport { .. }));
    assert!(matches!(go(OptionError::TlsRequired), Refusal::TlsRequired { .. }));
    assert!(matches!(go(OptionError::Shutdown), Refusal::ShuttingDown));
    assert!(go(OptionError::Unsupported).to_string().contains("NBD_OPT_GO"));
    let text = go(OptionError::Other(99)).to_string();
    assert!(text.contains("because") && !text.chars().any(char::is_control), "{text:?}");
}

#[test]
fn lies_in_the_handshake_are_violations() {
    let lie = |kind: OptionKind, reply: OptionReply| {
        let result = server(|request| match request.kind() == kind {
            true => vec![reply.clone(), OptionReply::Ack],
            false => good(request),
        });
        match result {
            Err(HandshakeError::Violation(violation)) => violation.to_string(),
            other => panic!("{other:?}"),
        }
    };
    let context = |id, name: &str| OptionReply::MetaContext { id, name: name.into() };
    assert!(lie(OptionKind::SetMetaContext, context(1, "base:else")).contains("base:else"));
    assert!(lie(OptionKind::Go, OptionReply::Ack).contains("its size"));
    assert!(lie(OptionKind::Go, context(1, BASE_ALLOCATION)).contains("does not belong"));
    assert!(lie(OptionKind::StructuredReply, OptionReply::Other(17)).contains("does not belong"));
    let size = |minimum, preferred, maximum| {
        lie(OptionKind::Go, OptionReply::Info(Info::BlockSize(BlockSize { minimum, preferred, maximum })))
    };
    assert!(size(3, 4096, 1 << 20).contains("the minimum block size is 3"));
    assert!(size(0, 4096, 1 << 20).contains("minimum"));
    assert!(size(1 << 17, 1 << 17, 1 << 20).contains("minimum"));
    assert!(size(512, 1, 1 << 20).contains("preferred"));
    assert!(size(512, 512, 0).contains("maximum"));
    let endless = server(|request| match request {
        OptionRequest::Go(_) => vec![OptionReply::Info(Info::Other(9)); MAX_OPTION_REPLIES + 1],
        other => good(other),
    });
    assert!(matches!(endless, Err(HandshakeError::Violation(Violation::TooManyReplies { .. }))));
}

#[test]
fn old_and_foreign_servers_are_named() {
    let mut old = Greeting { fixed_newstyle: true, no_zeroes: true }.encode();
    old[8..16].copy_from_slice(&0x0000_4202_8186_1253u64.to_be_bytes());
    assert_eq!(Greeting::decode(&old), Err(Violation::OldStyle));
    let ssh = b"SSH-2.0-OpenSSH_9.";
    assert!(matches!(Greeting::decode(ssh), Err(Violation::Magic { .. })));
    let (result, _) = handshake(&Greeting { fixed_newstyle: false, no_zeroes: true }.encode(), true);
    assert!(matches!(result, Some(Err(HandshakeError::Refused(Refusal::NotFixedNewstyle)))));
}

#[test]
fn lengths_are_limited_before_anything_is_read() {
    let reply = |length: u32| {
        let mut bytes = OptionReply::Ack.encode(OptionKind::Go);
        bytes[16..].copy_from_slice(&length.to_be_bytes());
        OptionReplyHeader::decode(&bytes)
    };
    assert!(reply(MAX_OPTION_REPLY as u32).is_ok() && reply(MAX_OPTION_REPLY as u32 + 1).is_err());
    assert!(reply(u32::MAX).is_err());
    let option = |length: u32| {
        let mut bytes = OptionRequest::Abort.encode();
        bytes[12..].copy_from_slice(&length.to_be_bytes());
        OptionHeader::decode(&bytes)
    };
    assert!(option(MAX_OPTION as u32).is_ok() && option(MAX_OPTION as u32 + 1).is_err());
    let chunk = |kind, length| Reply::decode(&Reply::Chunk(Chunk { done: true, kind, cookie: 1, length }).encode());
    let most = 4 + 8 * MAX_DESCRIPTORS as u32;
    for (kind, possible, not) in [
        (ChunkKind::None, vec![0], vec![1, u32::MAX]),
        (ChunkKind::Data, vec![9, u32::MAX], vec![0, 8]),
        (ChunkKind::Hole, vec![12], vec![0, 11, 13]),
        (ChunkKind::BlockStatus, vec![12, 20, most], vec![0, 4, 8, 13, most + 8, u32::MAX]),
        (ChunkKind::Error, vec![6, 4102], vec![0, 5, 8192, u32::MAX]),
        (ChunkKind::ErrorOffset, vec![14, 4110], vec![6, 13, 8192]),
        (ChunkKind::OtherError(0x8099), vec![6, 100], vec![5, u32::MAX]),
    ] {
        possible.iter().for_each(|length| assert!(chunk(kind, *length).is_ok(), "{kind:?} {length}"));
        not.iter().for_each(|length| assert!(chunk(kind, *length).is_err(), "{kind:?} {length}"));
    }
    let undone = Chunk { done: false, kind: ChunkKind::None, cookie: 1, length: 0 };
    assert!(Reply::decode(&Reply::Chunk(undone).encode()).is_err());
    // A count of queries that can't be is refused, and not used as a capacity.
    let mut query = OptionRequest::SetMetaContext(MetaQuery { export: String::new(), queries: vec![] }).encode();
    query[20..].copy_from_slice(&u32::MAX.to_be_bytes());
    assert!(OptionRequest::decode(OptionKind::SetMetaContext, &query[16..]).is_err());
}

fn text() -> impl Strategy<Value = String> {
    "[ -~äßß€]{0,60}"
}

fn info_request() -> impl Strategy<Value = InfoRequest> {
    (text(), vec(any::<u16>(), 0..5)).prop_map(|(export, wanted)| InfoRequest { export, wanted })
}

fn meta_query() -> impl Strategy<Value = MetaQuery> {
    (text(), vec(text(), 0..5)).prop_map(|(export, queries)| MetaQuery { export, queries })
}

fn option() -> impl Strategy<Value = OptionRequest> {
    prop_oneof![
        text().prop_map(OptionRequest::ExportName),
        Just(OptionRequest::Abort),
        Just(OptionRequest::List),
        Just(OptionRequest::StartTls),
        Just(OptionRequest::StructuredReply),
        info_request().prop_map(OptionRequest::Info),
        info_request().prop_map(OptionRequest::Go),
        meta_query().prop_map(OptionRequest::ListMetaContext),
        meta_query().prop_map(OptionRequest::SetMetaContext),
        (11..u32::MAX).prop_map(OptionRequest::Other),
    ]
}

fn option_reply() -> impl Strategy<Value = OptionReply> {
    let sizes = (0..17u32, 0..20u32, 0..10u32).prop_map(|(minimum, preferred, maximum)| BlockSize {
        minimum: 1 << minimum,
        preferred: (1 << minimum) + preferred,
        maximum: (1 << minimum) + maximum,
    });
    let error = prop_oneof![
        Just(OptionError::Unsupported),
        Just(OptionError::Policy),
        Just(OptionError::Invalid),
        Just(OptionError::Platform),
        Just(OptionError::TlsRequired),
        Just(OptionError::Unknown),
        Just(OptionError::Shutdown),
        Just(OptionError::BlockSizeRequired),
        Just(OptionError::TooBig),
        (10..1u32 << 31).prop_map(OptionError::Other),
    ];
    prop_oneof![
        Just(OptionReply::Ack),
        (text(), text()).prop_map(|(name, details)| OptionReply::Server { name, details }),
        (any::<u64>(), any::<u16>())
            .prop_map(|(size, flags)| OptionReply::Info(Info::Export { size, flags: ExportFlags(flags) })),
        text().prop_map(|text| OptionReply::Info(Info::Name(text))),
        text().prop_map(|text| OptionReply::Info(Info::Description(text))),
        sizes.prop_map(|size| OptionReply::Info(Info::BlockSize(size))),
        (4..u16::MAX).prop_map(|kind| OptionReply::Info(Info::Other(kind))),
        (any::<u32>(), text()).prop_map(|(id, name)| OptionReply::MetaContext { id, name }),
        (error, text()).prop_map(|(error, text)| OptionReply::Error { error, text }),
    ]
}

fn command() -> impl Strategy<Value = Command> {
    prop_oneof![
        Just(Command::Read),
        Just(Command::Write),
        Just(Command::Disconnect),
        Just(Command::Flush),
        Just(Command::Trim),
        Just(Command::Cache),
        Just(Command::WriteZeroes),
        Just(Command::BlockStatus),
        (8..u16::MAX).prop_map(Command::Other),
    ]
}

fn chunk() -> impl Strategy<Value = Chunk> {
    let kind = prop_oneof![
        Just((ChunkKind::None, 0)),
        (9..u32::MAX).prop_map(|length| (ChunkKind::Data, length)),
        Just((ChunkKind::Hole, 12)),
        (1..1000u32).prop_map(|count| (ChunkKind::BlockStatus, 4 + 8 * count)),
        (6..4000u32).prop_map(|length| (ChunkKind::Error, length)),
        (14..4000u32).prop_map(|length| (ChunkKind::ErrorOffset, length)),
        (0x8003..u16::MAX, 6..4000u32).prop_map(|(kind, length)| (ChunkKind::OtherError(kind), length)),
    ];
    (any::<bool>(), kind, any::<u64>()).prop_map(|(done, (kind, length), cookie)| {
        let done = done || kind == ChunkKind::None;
        Chunk { done, kind, cookie, length }
    })
}

proptest! {
    #[test]
    fn greetings_come_back(fixed_newstyle: bool, no_zeroes: bool) {
        let greeting = Greeting { fixed_newstyle, no_zeroes };
        prop_assert_eq!(Greeting::decode(&greeting.encode()), Ok(greeting));
        let flags = ClientFlags { fixed_newstyle, no_zeroes };
        prop_assert_eq!(ClientFlags::decode(&flags.encode()), Ok(flags));
    }

    #[test]
    fn options_come_back(option in option()) {
        let bytes = option.encode();
        let (header, data) = bytes.split_at(OPTION_HEADER_LENGTH);
        let header = OptionHeader::decode(header).unwrap();
        prop_assert_eq!(header.length, data.len());
        prop_assert_eq!(OptionRequest::decode(header.kind, data), Ok(option));
    }

    #[test]
    fn replies_to_options_come_back(reply in option_reply(), number in 1..12u32) {
        let option = OptionKind::of(number);
        let bytes = reply.encode(option);
        let (header, data) = bytes.split_at(OPTION_REPLY_HEADER_LENGTH);
        let header = OptionReplyHeader::decode(header).unwrap();
        prop_assert_eq!((header.option, header.length), (option, data.len()));
        prop_assert_eq!(OptionReply::decode(header.kind, data), Ok(reply));
    }

    #[test]
    fn requests_come_back(
        command in command(), flags: u16, cookie: u64, offset: u64, length: u32,
    ) {
        let request = Request { command, flags: CommandFlags(flags), cookie, offset, length };
        prop_assert_eq!(Request::decode(&request.encode()), Ok(request));
    }

    #[test]
    fn replies_come_back(chunk in chunk(), error: u32, cookie: u64) {
        for reply in [Reply::Chunk(chunk), Reply::Simple { error: Errno(error), cookie }] {
            let bytes = reply.encode();
            prop_assert_eq!(Reply::length(*bytes.first_chunk().unwrap()), Ok(bytes.len()));
            prop_assert_eq!(Reply::decode(&bytes), Ok(reply));
        }
    }

    #[test]
    fn payloads_come_back(
        offset: u64, length in 1..u32::MAX, context: u32, extents in vec((1..u32::MAX, any::<u32>()), 1..50),
        error in 1..u32::MAX, text in text(), at: Option<u64>,
    ) {
        let hole = Hole { offset, length };
        prop_assert_eq!(Hole::decode(&hole.encode()), Ok(hole));
        let descriptors = extents.iter().map(|&(length, flags)| Descriptor { length, flags }).collect();
        let status = BlockStatus { context, descriptors };
        prop_assert_eq!(BlockStatus::decode(&status.encode()), Ok(status));
        let chunk = ErrorChunk { error: Errno(error), text, offset: at };
        let kind = if at.is_some() { ChunkKind::ErrorOffset } else { ChunkKind::Error };
        prop_assert_eq!(ErrorChunk::decode(kind, &chunk.encode()), Ok(chunk));
    }

    #[test]
    fn any_bytes_are_survived(bytes in vec(any::<u8>(), 0..200), kind: u32, tls: bool) {
        let _ = handshake(&bytes, tls);
        let _ = replies(&bytes);
        let _ = OptionHeader::decode(&bytes);
        let _ = OptionReplyHeader::decode(&bytes);
        let _ = Request::decode(&bytes);
        let _ = Hole::decode(&bytes);
        let _ = BlockStatus::decode(&bytes);
        for kind in (0..12).chain([kind]) {
            let _ = OptionRequest::decode(OptionKind::of(kind), &bytes);
            let _ = OptionReply::decode(kind, &bytes);
            let _ = OptionReply::decode(kind | 1 << 31, &bytes);
        }
        for kind in [ChunkKind::Error, ChunkKind::ErrorOffset, ChunkKind::OtherError(0x8009)] {
            let _ = ErrorChunk::decode(kind, &bytes);
        }
    }

    /// At every state: a right beginning of a recorded dialogue, then anything.
    #[test]
    fn any_bytes_after_a_right_beginning_are_survived(
        cut in 0..233usize, bytes in vec(any::<u8>(), 0..200), header: bool, length in 0..70_000u32, kind in 0..12u32,
    ) {
        let recorded = recorded();
        let mut dialogue = recorded[..cut].to_vec();
        if header {
            // A header that looks right, of a reply of any kind and length.
            dialogue.extend(&recorded[18..26]);
            dialogue.extend(kind.to_be_bytes());
            dialogue.extend(kind.to_be_bytes());
            dialogue.extend(length.to_be_bytes());
        }
        dialogue.extend(bytes);
        let (_, rest) = handshake(&dialogue, false);
        let _ = replies(rest);
    }
}
