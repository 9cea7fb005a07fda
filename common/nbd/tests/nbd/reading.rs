//! Reading a whole export.

use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};
use reseal_nbd::{Export, Extent, NbdError, Options, Read, Request};
use zeroize::Zeroizing;

/// What reading an export gave.
#[derive(Debug)]
pub(crate) struct Whole {
    pub(crate) bytes: Vec<u8>,
    /// Bytes that were asked for.
    pub(crate) read: u64,
}

/// Impatient options, so that tests are short.
pub(crate) fn impatient() -> Options {
    Options { timeout: Duration::from_millis(400), give_up: Duration::from_secs(1), ..Options::default() }
}

/// Runs something that asks, beside as many pumps as the export likes.
pub(crate) fn with_pumps<R>(
    export: &Export,
    ask: impl FnOnce(Sender<Request<()>>, Receiver<Result<Read<()>, NbdError>>) -> R,
) -> R {
    let (request, requests) = bounded(16);
    let (answer, answers) = bounded(16);
    std::thread::scope(|scope| {
        for _ in 0..export.connections() {
            let (requests, answer) = (requests.clone(), answer.clone());
            scope.spawn(move || export.pump(&requests, &answer));
        }
        drop((requests, answer));
        ask(request, answers)
    })
}

/// What is at an area, with as many questions as it takes.
pub(crate) fn extents(export: &Export, mut offset: u64, end: u64) -> Result<Vec<Extent>, NbdError> {
    with_pumps(export, |request, _answers| {
        let mut all = Vec::new();
        while offset < end {
            let (answer, answers) = bounded(1);
            if request.send(Request::Status { offset, length: end - offset, answer }).is_err() {
                break;
            }
            let extents = answers.recv().expect("a status is answered")?;
            assert!(!extents.is_empty());
            offset += extents.iter().map(|extent| extent.length).sum::<u64>();
            assert!(offset <= end);
            all.extend(extents);
        }
        Ok(all)
    })
}

/// Reads all that is no hole and is dirty. `each` is told how many reads have come.
pub(crate) fn read_all(export: &Export, unit: u64, mut each: impl FnMut(usize)) -> Result<Whole, NbdError> {
    let mut wanted = Vec::new();
    let mut offset = 0;
    for extent in extents(export, 0, export.length())? {
        let end = offset + extent.length;
        while offset < end {
            let length = unit.min(end - offset);
            if !extent.zero && extent.dirty {
                wanted.push((offset, length));
            }
            offset += length;
        }
    }
    with_pumps(export, |request, answers| {
        let mut whole = Whole { bytes: vec![0; usize::try_from(export.length()).unwrap()], read: 0 };
        let count = wanted.len();
        let asker = std::thread::spawn(move || {
            for (offset, length) in wanted {
                // What was in a buffer before must not be seen.
                let buffer = Zeroizing::new(vec![0xee; usize::try_from(length).unwrap()]);
                if request.send(Request::Read(Read { offset, buffer, tag: () })).is_err() {
                    return;
                }
            }
        });
        let mut came = 0;
        for answer in &answers {
            let Read { offset, buffer, .. } = answer?;
            let start = usize::try_from(offset).unwrap();
            whole.bytes[start..start + buffer.len()].copy_from_slice(&buffer);
            whole.read += buffer.len() as u64;
            came += 1;
            each(came);
        }
        asker.join().unwrap();
        assert_eq!(came, count, "every read is answered");
        Ok(whole)
    })
}
