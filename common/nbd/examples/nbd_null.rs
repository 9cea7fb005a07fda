//! Reads an NBD export into nothing, as `nbdcopy URI null:` does, and prints bytes and seconds.
//!
//! ```text
//! cargo run --release -p reseal-nbd --example nbd_null -- URI [UNIT_KIB [IN_FLIGHT [CONNECTIONS [CA_FILE]]]]
//! ```

use std::process::ExitCode;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, bounded};
use reseal_nbd::{Export, NbdError, NbdUri, Options, Read, Request, TlsFiles};
use zeroize::Zeroizing;

/// Buffers that go round.
const BUFFERS: usize = 32;

type Answer = Result<Read<()>, NbdError>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: usize| arguments.get(at).and_then(|text| text.parse().ok()).unwrap_or(default);
    let Some(uri) = arguments.first() else {
        eprintln!("usage: nbd_null URI [UNIT_KIB [IN_FLIGHT [CONNECTIONS [CA_FILE]]]]");
        return ExitCode::from(2);
    };
    let unit = number(1, 1024) << 10;
    let defaults = Options::default();
    let options = Options {
        in_flight: number(2, defaults.in_flight),
        connections: number(3, defaults.connections),
        tls: TlsFiles { ca: arguments.get(4).map(Into::into), ..TlsFiles::default() },
        ..defaults
    };
    match run(uri, unit, &options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("nbd_null: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(uri: &str, unit: usize, options: &Options) -> Result<(), NbdError> {
    let began = Instant::now();
    let uri: NbdUri = uri.parse()?;
    let export = Export::open(&uri, options, None)?;
    let (request, requests) = bounded(BUFFERS);
    let (answer, answers) = bounded(BUFFERS);
    let (free, buffers) = bounded(BUFFERS);
    for _ in 0..BUFFERS {
        let _ = free.send(Zeroizing::new(vec![0; unit]));
    }
    let bytes = std::thread::scope(|scope| {
        for _ in 0..export.connections() {
            let (requests, answer) = (requests.clone(), answer.clone());
            let export = &export;
            scope.spawn(move || export.pump(&requests, &answer));
        }
        drop((requests, answer));
        let export = &export;
        scope.spawn(move || {
            if let Err(e) = plan(export, unit, &request, &buffers) {
                eprintln!("nbd_null: {e}");
            }
        });
        take(&answers, &free)
    })?;
    let seconds = began.elapsed().as_secs_f64();
    let (length, rate) = (export.length(), bytes as f64 / seconds / 1e6);
    println!("{bytes} bytes of {length} in {seconds:.3} s, {rate:.0} MB/s");
    Ok(())
}

/// Asks for all that is no hole.
fn plan(
    export: &Export,
    unit: usize,
    requests: &Sender<Request<()>>,
    buffers: &Receiver<Zeroizing<Vec<u8>>>,
) -> Result<(), NbdError> {
    let mut offset = 0;
    while offset < export.length() {
        let (answer, answers) = bounded(1);
        let length = (export.length() - offset).min(1 << 31);
        if requests.send(Request::Status { offset, length, answer }).is_err() {
            return Ok(());
        }
        let Ok(extents) = answers.recv() else { return Ok(()) };
        for extent in extents? {
            let end = offset + extent.length;
            while offset < end {
                let length = usize::try_from(end - offset).unwrap_or(unit).min(unit);
                if !extent.zero {
                    let Ok(mut buffer) = buffers.recv() else { return Ok(()) };
                    buffer.resize(length, 0);
                    if requests.send(Request::Read(Read { offset, buffer, tag: () })).is_err() {
                        return Ok(());
                    }
                    offset += length as u64;
                } else {
                    offset = end;
                }
            }
        }
    }
    Ok(())
}

fn take(answers: &Receiver<Answer>, free: &Sender<Zeroizing<Vec<u8>>>) -> Result<u64, NbdError> {
    let mut bytes = 0;
    for answer in answers {
        let read = answer?;
        bytes += read.buffer.len() as u64;
        // The plan may have ended.
        let _ = free.send(read.buffer);
    }
    Ok(bytes)
}
