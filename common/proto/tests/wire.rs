//! The codec of reseal's own protocol: what is encoded decodes to the same, the bytes stay what they are, and no bytes make
//! it panic or take more than its limits allow.

#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use reseal_proto::wire::*;

/// Splits a message into header and payload, as its reader does.
fn split(side: Side, bytes: &[u8]) -> Option<Result<(Header, &[u8]), Violation>> {
    let (header, rest) = bytes.split_first_chunk::<HEADER_LENGTH>()?;
    match Header::decode(side, *header) {
        Ok(header) => Some(Ok((header, rest.get(..header.payload())?))),
        Err(violation) => Some(Err(violation)),
    }
}

fn from_source(bytes: &[u8]) -> Option<Result<FromSource, Violation>> {
    Some(split(Side::Source, bytes)?.and_then(|(header, payload)| FromSource::decode(header, payload)))
}

fn from_target(bytes: &[u8]) -> Option<Result<FromTarget, Violation>> {
    Some(split(Side::Target, bytes)?.and_then(|(header, payload)| FromTarget::decode(header, payload)))
}

fn line() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9 ä@:/.-]{0,40}"
}

fn tracking() -> impl Strategy<Value = Tracking> {
    (line(), line(), line()).prop_map(|(method, id, scope)| Tracking { method, id, scope })
}

fn offer() -> impl Strategy<Value = Offer> {
    let contents = vec(option::of(any::<[u8; HASH]>()), 1..=MAX_CLUSTERS);
    let told =
        (any::<u64>(), 0..u64::MAX / 2, contents, any::<bool>()).prop_map(|(sequence, first, clusters, check)| {
            let task = if check { Task::Check } else { Task::Read };
            Offer { sequence, first, count: clusters.len() as u64, task, clusters }
        });
    let untold =
        (any::<u64>(), 0..u64::MAX / 2, 1..u64::MAX / 2, any::<bool>()).prop_map(|(sequence, first, count, keep)| {
            let task = if keep { Task::Keep } else { Task::Clear };
            Offer { sequence, first, count, task, clusters: Vec::new() }
        });
    prop_oneof![told, untold]
}

fn trouble() -> impl Strategy<Value = Trouble> {
    (0u16..20, line()).prop_map(|(code, message)| {
        let code = match code {
            0 => TroubleCode::Protocol,
            1 => TroubleCode::Busy,
            2 => TroubleCode::Quota,
            code => TroubleCode::Other(code + 100),
        };
        Trouble { code, message }
    })
}

fn source_messages() -> impl Strategy<Value = FromSource> {
    let said = (line(), line(), option::of(1u32..)).prop_map(|(method, id, since)| Said { method, id, since });
    let disk = (line(), any::<u64>(), line(), option::of(tracking()), option::of(said));
    let definition = (line(), "(?s).{0,80}").prop_map(|(file_name, text)| Definition { file_name, text });
    let commit = (any::<u64>(), option::of(definition), vec(line(), 0..4));
    prop_oneof![
        line().prop_map(|software| FromSource::Hello(Hello { version: VERSION, software })),
        (line(), option::of(any::<[u8; 16]>())).prop_map(|(vm, resume)| FromSource::Begin(Begin { vm, resume })),
        disk.prop_map(|(name, length, source, tracking, said)| {
            FromSource::Disk(Disk { name, length, source, tracking, said })
        }),
        offer().prop_map(FromSource::Offer),
        (any::<u64>(), vec(vec(any::<u8>(), 0..300), 0..=MAX_CLUSTERS))
            .prop_map(|(sequence, frames)| FromSource::Data(Data { sequence, frames })),
        any::<u64>().prop_map(|offers| FromSource::DiskEnd(DiskEnd { offers })),
        Just(FromSource::Close),
        commit.prop_map(|(duration_ms, definition, warnings)| {
            FromSource::Commit(Commit { duration_ms, definition, warnings })
        }),
        Just(FromSource::Alive),
        trouble().prop_map(FromSource::Trouble),
        vec(any::<u8>(), 0..300).prop_map(|request| FromSource::Renew(Renew { request })),
        option::of(line()).prop_map(|after| FromSource::ListVms(ListVms { after })),
        (line(), any::<u32>()).prop_map(|(vm, after)| FromSource::ListPoints(ListPoints { vm, after })),
        (line(), any::<u32>()).prop_map(|(vm, number)| FromSource::Show(Show { vm, number })),
    ]
}

fn target_messages() -> impl Strategy<Value = FromTarget> {
    let disk = (line(), any::<u64>(), option::of(tracking()));
    let disk = disk.prop_map(|(name, length, tracking)| NewestDisk { name, length, tracking });
    let newest = (any::<u32>(), any::<[u8; 16]>(), vec(disk, 0..3));
    let newest = newest.prop_map(|(number, point, disks)| Newest { number, point, disks });
    let areas = vec(1u64..1 << 40, 0..10).prop_map(|steps| {
        let mut at = 0;
        let area = |step: u64| {
            let start = at + step / 2;
            at = start + step;
            start..at
        };
        steps.into_iter().map(area).collect()
    });
    let start = prop_oneof![
        line().prop_map(Start::Whole),
        (any::<u32>(), areas).prop_map(|(number, always)| Start::Since { number, always }),
    ];
    let committed = (any::<u32>(), any::<[u8; 16]>(), any::<u64>(), vec(line(), 0..4));
    let vms = (btree_set(line(), 0..5), any::<bool>()).prop_map(|(names, more)| {
        let names: Vec<_> = names.into_iter().collect();
        Vms { more: more && !names.is_empty(), names }
    });
    let state = prop_oneof![Just(PointState::Live), Just(PointState::Forgotten), Just(PointState::Missing)];
    let points = (btree_map(1u32.., state, 0..9), any::<bool>()).prop_map(|(numbers, more)| {
        let numbers: Vec<_> = numbers.into_iter().collect();
        Points { more: more && !numbers.is_empty(), numbers }
    });
    let shown = prop_oneof![
        trouble().prop_map(Shown::Refused),
        vec(any::<u8>(), 0..300).prop_map(|bytes| Shown::Manifest(Plaintext(bytes))),
        vec(any::<u8>(), 0..300).prop_map(|bytes| Shown::Tombstone(Plaintext(bytes))),
    ];
    prop_oneof![
        (line(), any::<u64>(), 1u16..).prop_map(|(software, time, window)| {
            FromTarget::Welcome(Welcome { version: VERSION, software, time, window })
        }),
        (any::<[u8; 16]>(), option::of(newest)).prop_map(|(point, newest)| FromTarget::Begun(Begun { point, newest })),
        start.prop_map(|start| FromTarget::DiskReady(DiskReady { start })),
        (any::<u64>(), any::<u16>()).prop_map(|(sequence, clusters)| FromTarget::Need(Need { sequence, clusters })),
        Just(FromTarget::DiskDone),
        line().prop_map(FromTarget::Distrusted),
        Just(FromTarget::Closed),
        committed.prop_map(|(number, point, created, warnings)| {
            FromTarget::Committed(Committed { number, point, created, warnings })
        }),
        Just(FromTarget::Alive),
        trouble().prop_map(FromTarget::Trouble),
        line().prop_map(|why| FromTarget::Renewed(Renewed::Refused(why))),
        vec(any::<u8>(), 0..300).prop_map(|certificate| FromTarget::Renewed(Renewed::Issued(certificate))),
        Just(FromTarget::Renewed(Renewed::Elsewhere)),
        vms.prop_map(FromTarget::Vms),
        points.prop_map(FromTarget::Points),
        shown.prop_map(FromTarget::Shown),
    ]
}

proptest! {
    #[test]
    fn what_a_source_says_is_understood_and_cut_off_it_is_not(message in source_messages(), at in any::<prop::sample::Index>()) {
        let bytes = message.encode();
        prop_assert_eq!(from_source(&bytes), Some(Ok(message)));
        // Shorter than its header says it never arrives whole; with a header that fits, it is refused.
        let cut = at.index(bytes.len());
        prop_assert!(from_source(&bytes[..cut]).is_none());
        if cut > HEADER_LENGTH {
            let mut shorter = bytes[..cut].to_vec();
            shorter[4..8].copy_from_slice(&u32::try_from(cut - HEADER_LENGTH).unwrap().to_be_bytes());
            prop_assert!(from_source(&shorter).unwrap().is_err());
        }
    }

    #[test]
    fn what_a_target_says_is_understood_and_cut_off_it_is_not(message in target_messages(), at in any::<prop::sample::Index>()) {
        let bytes = message.encode();
        prop_assert_eq!(from_target(&bytes), Some(Ok(message)));
        let cut = at.index(bytes.len());
        if cut > HEADER_LENGTH {
            let mut shorter = bytes[..cut].to_vec();
            shorter[4..8].copy_from_slice(&u32::try_from(cut - HEADER_LENGTH).unwrap().to_be_bytes());
            prop_assert!(from_target(&shorter).unwrap().is_err());
        }
    }

    #[test]
    fn bytes_after_the_end_of_a_message_are_refused(message in source_messages(), extra in 1usize..40) {
        let mut bytes = message.encode();
        bytes.extend(vec![0; extra]);
        let length = u32::try_from(bytes.len() - HEADER_LENGTH).unwrap();
        bytes[4..8].copy_from_slice(&length.to_be_bytes());
        prop_assert!(from_source(&bytes).unwrap().is_err());
    }

    #[test]
    fn hostile_bytes_never_panic(kind in any::<u8>(), payload in vec(any::<u8>(), 0..600)) {
        let mut bytes = vec![kind & 0xbf, 0, 0, 0];
        bytes.extend(u32::try_from(payload.len()).unwrap().to_be_bytes());
        bytes.extend(payload);
        let _ = (from_source(&bytes), from_target(&bytes));
    }

    #[test]
    fn a_message_that_was_changed_never_panics(
        message in source_messages(),
        answer in target_messages(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        for mut bytes in [message.encode(), answer.encode()] {
            for (at, with) in &changes {
                let at = at.index(bytes.len());
                bytes[at] = *with;
            }
            let _ = (from_source(&bytes), from_target(&bytes));
        }
    }
}

#[test]
fn no_kind_of_message_claims_more_than_its_limit() {
    let mut known = 0;
    for side in [Side::Source, Side::Target] {
        for kind in 0..=u8::MAX {
            let claim = |length: u32| {
                let [a, b, c, d] = length.to_be_bytes();
                Header::decode(side, [kind, 0, 0, 0, a, b, c, d])
            };
            known += u32::from(claim(0).is_ok());
            match claim(u32::MAX) {
                Err(Violation::Kind { .. }) => assert!(claim(0).is_err()),
                Err(Violation::TooLong { max, .. }) => assert!(max < 16 << 20, "{kind:#x}: {max}"),
                other => panic!("{kind:#x}: {other:?}"),
            }
        }
    }
    assert_eq!(known, 28);
    assert!(Header::decode(Side::Source, [1, 0, 1, 0, 0, 0, 0, 0]).is_err(), "reserved bytes are zero");
}

#[test]
fn a_list_that_claims_much_takes_no_memory_for_it() {
    let mut bytes = FromSource::Data(Data { sequence: 1, frames: Vec::new() }).encode();
    let at = bytes.len() - 4;
    bytes[at..].copy_from_slice(&16u32.to_be_bytes());
    assert!(matches!(from_source(&bytes), Some(Err(Violation::Length { .. }))));
    bytes[at..].copy_from_slice(&17u32.to_be_bytes());
    assert!(matches!(from_source(&bytes), Some(Err(Violation::TooLong { length: 17, max: 16, .. }))));
}

#[test]
fn frames_that_are_written_in_place_make_the_same_message() {
    let frames: Vec<Vec<u8>> = vec![vec![1; 300], Vec::new(), vec![2; MAX_FRAMES]];
    let mut message = DataMessage::new(77, vec![9; 50]);
    for frames in &frames {
        assert_eq!(message.cluster(|out| out.extend_from_slice(frames)), frames.len());
    }
    assert_eq!(message.finish(), FromSource::Data(Data { sequence: 77, frames }).encode());
    assert_eq!(
        DataMessage::new(1, Vec::new()).finish(),
        FromSource::Data(Data { sequence: 1, frames: Vec::new() }).encode()
    );
}

#[test]
fn the_largest_messages_fit_their_limits() {
    let frames = vec![vec![7; MAX_FRAMES]; MAX_CLUSTERS];
    let data = FromSource::Data(Data { sequence: 0, frames });
    assert_eq!(from_source(&data.encode()), Some(Ok(data)));
    let text = "x".repeat(MAX_DEFINITION);
    let definition = Some(Definition { file_name: "y".repeat(MAX_TEXT), text });
    let warnings = vec!["z".repeat(MAX_TEXT); MAX_WARNINGS];
    let commit = FromSource::Commit(Commit { duration_ms: 1, definition, warnings });
    assert_eq!(from_source(&commit.encode()), Some(Ok(commit)));
    let tracking = Tracking { method: "m".repeat(MAX_TEXT), id: "i".repeat(MAX_TEXT), scope: "s".repeat(MAX_TEXT) };
    let disk = NewestDisk { name: "d".repeat(MAX_NAME), length: 1, tracking: Some(tracking) };
    let newest = Some(Newest { number: 1, point: [0; 16], disks: vec![disk; MAX_DISKS] });
    let begun = FromTarget::Begun(Begun { point: [0; 16], newest });
    assert_eq!(from_target(&begun.encode()), Some(Ok(begun)));
    let renew = FromSource::Renew(Renew { request: vec![1; MAX_REQUEST] });
    assert_eq!(from_source(&renew.encode()), Some(Ok(renew)));
    let issued = FromTarget::Renewed(Renewed::Issued(vec![1; MAX_CERTIFICATE]));
    assert_eq!(from_target(&issued.encode()), Some(Ok(issued)));
    let always = (0..MAX_AREAS as u64).map(|n| n * 10..n * 10 + 1).collect();
    let ready = FromTarget::DiskReady(DiskReady { start: Start::Since { number: 1, always } });
    assert_eq!(from_target(&ready.encode()), Some(Ok(ready)));
    let list = FromSource::ListVms(ListVms { after: Some("v".repeat(MAX_NAME)) });
    assert_eq!(from_source(&list.encode()), Some(Ok(list)));
    let show = FromSource::Show(Show { vm: "v".repeat(MAX_NAME), number: u32::MAX });
    assert_eq!(from_source(&show.encode()), Some(Ok(show)));
    let names = (0..MAX_LISTED_VMS).map(|nth| format!("{nth:0MAX_NAME$}")).collect();
    let vms = FromTarget::Vms(Vms { names, more: true });
    assert_eq!(from_target(&vms.encode()), Some(Ok(vms)));
    let numbers = (1..=u32::try_from(MAX_LISTED_POINTS).unwrap()).map(|number| (number, PointState::Live)).collect();
    let points = FromTarget::Points(Points { numbers, more: true });
    assert_eq!(from_target(&points.encode()), Some(Ok(points)));
    let shown = FromTarget::Shown(Shown::Manifest(Plaintext(vec![7; MAX_SHOWN])));
    assert_eq!(from_target(&shown.encode()), Some(Ok(shown)));
}

#[test]
fn lists_of_what_there_is_are_in_order_and_a_page_before_another_is_not_empty() {
    let number = |number: u32| (number, PointState::Live);
    let points = |numbers: Vec<_>, more| from_target(&FromTarget::Points(Points { numbers, more }).encode()).unwrap();
    let vms = |names: &[&str], more| {
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        from_target(&FromTarget::Vms(Vms { names, more }).encode()).unwrap()
    };
    assert!(points(vec![number(1), number(2)], true).is_ok() && vms(&["a", "b"], true).is_ok());
    assert!(points(vec![number(2), number(1)], false).is_err(), "descending");
    assert!(points(vec![number(2), number(2)], false).is_err(), "twice");
    assert!(points(vec![number(0)], false).is_err(), "there is no number 0");
    assert!(points(vec![], false).is_ok() && points(vec![], true).is_err());
    assert!(vms(&["b", "a"], false).is_err() && vms(&["a", "a"], false).is_err());
    assert!(vms(&[], false).is_ok() && vms(&[], true).is_err());
    let with = |message: FromTarget, at: usize, value: u8| {
        let mut bytes = message.encode();
        let at = if at < bytes.len() { HEADER_LENGTH + at } else { bytes.len() - 1 };
        bytes[at] = value;
        from_target(&bytes).unwrap()
    };
    let page = FromTarget::Points(Points { numbers: vec![number(1)], more: false });
    assert!(with(page.clone(), 8, 3).is_err(), "an unknown state");
    assert!(with(page, usize::MAX, 2).is_err(), "neither more nor not");
    assert!(
        with(FromTarget::Shown(Shown::Manifest(Plaintext(vec![]))), 0, 3).is_err(),
        "neither manifest nor tombstone"
    );
}

#[test]
fn what_is_shown_is_never_printed() {
    let shown = FromTarget::Shown(Shown::Manifest(Plaintext(b"secret".to_vec())));
    assert_eq!(format!("{shown:?}"), "Shown(Manifest(Plaintext(6 bytes)))");
}

#[test]
fn text_for_people_is_cut_and_can_not_drive_a_terminal() {
    let message = format!("\u{1b}[2J{}", "ä".repeat(MAX_TEXT));
    let sent = FromTarget::Trouble(Trouble { code: TroubleCode::Failed, message }).encode();
    let Some(Ok(FromTarget::Trouble(trouble))) = from_target(&sent) else { panic!("no trouble") };
    assert!(trouble.message.starts_with(" [2Jä") && trouble.message.len() <= MAX_TEXT);
    // One who does not filter is refused.
    let mut hostile = sent;
    hostile[HEADER_LENGTH + 6] = 0x1b;
    assert!(matches!(from_target(&hostile), Some(Err(Violation::NotText { .. }))));
}

#[test]
fn offers_are_checked_against_themselves() {
    let offer = Offer { sequence: 3, first: 5, count: 2, task: Task::Read, clusters: vec![None, Some([9; HASH])] };
    let bytes = FromSource::Offer(offer).encode();
    let with = |at: usize, value: u8| {
        let mut bytes = bytes.clone();
        bytes[HEADER_LENGTH + at] = value;
        from_source(&bytes).unwrap()
    };
    assert!(with(23, 0).is_err(), "no clusters");
    assert!(with(23, 17).is_err(), "more clusters than an offer has");
    assert!(with(24, 9).is_err(), "an unknown task");
    assert!(with(26, 4).is_err(), "a hole past the last cluster");
    assert!(with(26, 0).is_err(), "a hash is missing");
    assert!(with(26, 3).is_err(), "a hash is too many");
    assert!(with(8, 0xff).is_ok() && with(16, 0xff).is_err(), "the end must be a number");
}

/// Bytes of messages as they stand in `docs/PROTOCOL.md`. If this fails, bump the version.
#[test]
fn the_bytes_stay_what_they_are() {
    let golden: [(Vec<u8>, &str); 21] = [
        (
            FromSource::Hello(Hello { version: 1, software: "r".into() }).encode(),
            "01000000 0000000f 52534c5749524500 0001 00000001 72",
        ),
        (
            FromSource::Begin(Begin { vm: "a".into(), resume: Some([0x11; 16]) }).encode(),
            "02000000 00000016 00000001 61 01 11111111111111111111111111111111",
        ),
        (
            FromSource::Offer(Offer {
                sequence: 1,
                first: 16,
                count: 2,
                task: Task::Read,
                clusters: vec![None, Some([0xab; 32])],
            })
            .encode(),
            "04000000 0000003b 0000000000000001 0000000000000010 0000000000000002 00 0001 \
             abababababababababababababababababababababababababababababababab",
        ),
        (
            FromSource::Data(Data { sequence: 1, frames: vec![vec![0x0f, 0, 0, 0, 0]] }).encode(),
            "05000000 00000015 0000000000000001 00000001 00000005 0f00000000",
        ),
        (
            FromTarget::Welcome(Welcome { version: 1, software: "r".into(), time: 5, window: 64 }).encode(),
            "81000000 00000019 52534c5749524500 0001 00000001 72 0000000000000005 0040",
        ),
        (
            FromTarget::DiskReady(DiskReady {
                start: Start::Since { number: 7, always: vec![0..65_536, 131_072..196_608] },
            })
            .encode(),
            "83000000 00000029 01 00000007 00000002 0000000000000000 0000000000010000 0000000000020000 0000000000030000",
        ),
        (FromTarget::Need(Need { sequence: 1, clusters: 2 }).encode(), "84000000 0000000a 0000000000000001 0002"),
        (
            FromTarget::Trouble(Trouble { code: TroubleCode::Quota, message: "q".into() }).encode(),
            "91000000 00000007 0005 00000001 71",
        ),
        (FromSource::Renew(Renew { request: vec![0x30, 0] }).encode(), "20000000 00000006 00000002 3000"),
        (FromTarget::Renewed(Renewed::Refused("w".into())).encode(), "a0000000 00000006 00 00000001 77"),
        (FromTarget::Renewed(Renewed::Issued(vec![0x30, 0])).encode(), "a0000000 00000007 01 00000002 3000"),
        (FromTarget::Renewed(Renewed::Elsewhere).encode(), "a0000000 00000001 02"),
        (FromSource::ListVms(ListVms { after: None }).encode(), "30000000 00000001 00"),
        (FromSource::ListVms(ListVms { after: Some("a".into()) }).encode(), "30000000 00000006 01 00000001 61"),
        (
            FromSource::ListPoints(ListPoints { vm: "a".into(), after: 7 }).encode(),
            "31000000 00000009 00000001 61 00000007",
        ),
        (FromSource::Show(Show { vm: "a".into(), number: 7 }).encode(), "32000000 00000009 00000001 61 00000007"),
        (
            FromTarget::Vms(Vms { names: vec!["a".into(), "b".into()], more: true }).encode(),
            "b0000000 0000000f 00000002 00000001 61 00000001 62 01",
        ),
        (
            FromTarget::Points(Points {
                numbers: vec![(1, PointState::Live), (2, PointState::Forgotten), (3, PointState::Missing)],
                more: false,
            })
            .encode(),
            "b1000000 00000014 00000003 00000001 00 00000002 01 00000003 02 00",
        ),
        (
            FromTarget::Shown(Shown::Refused(Trouble { code: TroubleCode::Unknown, message: "n".into() })).encode(),
            "b2000000 00000008 00 0007 00000001 6e",
        ),
        (FromTarget::Shown(Shown::Manifest(Plaintext(b"{}".to_vec()))).encode(), "b2000000 00000007 01 00000002 7b7d"),
        (FromTarget::Shown(Shown::Tombstone(Plaintext(b"{}".to_vec()))).encode(), "b2000000 00000007 02 00000002 7b7d"),
    ];
    for (bytes, expected) in golden {
        let found: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(found, expected.replace(' ', ""));
    }
}
