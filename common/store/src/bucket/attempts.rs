//! Asking an object store, again where it does not answer, and no longer than somebody waits.
//!
//! What a store answers with is its last word, unless it says that it could not: a server error, a request to slow down, silence, a cut
//! connection. After those the same is asked again, later and later.

use std::future::Future;
use std::io;
use std::pin::pin;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use object_store::Error;
use tokio::runtime::{Builder, Runtime};
use tokio::select;
use tokio::time::{sleep, timeout};

use crate::StoreError;

/// How long a request is made again, from its first time on, beside the time that its bytes may take; and how long a store may answer
/// nothing at all, to no request, until none waits for it any longer.
const PATIENCE: Duration = Duration::from_secs(60);
/// The same for a store that has never answered: its address is more likely wrong than it is away.
const FIRST_PATIENCE: Duration = Duration::from_secs(30);
/// The first pause; each is twice the one before, up to the longest.
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long one request may take: this, and the time for its bytes over a line that is hardly worth the name.
const ONE: Duration = Duration::from_secs(20);
const SLOWEST: u64 = 128 << 10;
/// How often is looked whether it is heard of.
const LOOK: Duration = Duration::from_secs(1);
/// As much of what a store says as is shown.
const SHOWN: usize = 300;

/// Runs the requests of this process.
fn runtime() -> io::Result<&'static Runtime> {
    static RUNTIME: OnceLock<io::Result<Runtime>> = OnceLock::new();
    let made =
        RUNTIME.get_or_init(|| Builder::new_multi_thread().worker_threads(2).thread_name("store").enable_all().build());
    made.as_ref().map_err(|e| io::Error::new(e.kind(), e.to_string()))
}

/// Runs a request in the background.
pub(super) fn spawn(work: impl Future<Output = ()> + Send + 'static) -> io::Result<()> {
    runtime()?.spawn(work);
    Ok(())
}

/// Runs a request and waits for it, on a thread that may wait.
pub(super) fn wait<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> io::Result<T> {
    let (sender, receiver) = std::sync::mpsc::sync_channel(1);
    spawn(async move { _ = sender.send(work.await) })?;
    receiver.recv().map_err(|_| io::Error::other("the request ended without an answer"))
}

/// The last word of a store that was asked, and whether it may have done before what it was asked for.
pub(super) struct Refusal {
    pub error: Error,
    pub was_repeated: bool,
}

/// Whether a store is heard of.
#[derive(Default)]
pub(super) struct Attempts {
    /// How often it has answered or sent something.
    heard: AtomicU64,
}

impl Attempts {
    /// Says that the store is there.
    pub(super) fn heard(&self) {
        self.heard.fetch_add(1, Ordering::Relaxed);
    }

    /// How long is waited for it.
    fn patience(&self) -> Duration {
        match self.heard.load(Ordering::Relaxed) {
            0 => FIRST_PATIENCE,
            _ => PATIENCE,
        }
    }

    /// Ends when nothing was heard of it for too long, whoever asked. Only time counts in which this process ran.
    async fn silence(&self) {
        let (mut known, mut waited) = (self.heard.load(Ordering::Relaxed), Duration::ZERO);
        while waited < self.patience() {
            let before = Instant::now();
            sleep(LOOK).await;
            waited += before.elapsed().min(LOOK * 2);
            let heard = self.heard.load(Ordering::Relaxed);
            if heard != known {
                (known, waited) = (heard, Duration::ZERO);
            }
        }
    }

    /// Asks until there is an answer, or nobody waits any more. `bytes` are about how many go over the line.
    pub(super) async fn ask<T, F>(&self, bytes: u64, mut request: impl FnMut() -> F) -> Result<T, Refusal>
    where
        F: Future<Output = Result<T, Error>>,
    {
        let began = Instant::now();
        let moving = Duration::from_secs(bytes / SLOWEST);
        let limit = ONE + moving;
        let mut pause = PAUSE;
        let mut was_repeated = false;
        // What many bytes are allowed is for a store that is slow, not for one that is gone.
        let mut silence = pin!(self.silence());
        loop {
            let asked = select! {
                biased;
                asked = timeout(limit, request()) => asked,
                () = &mut silence => return Err(Refusal { error: silent(self.patience()), was_repeated: true }),
            };
            let error = match asked {
                Ok(Ok(answer)) => {
                    self.heard();
                    return Ok(answer);
                }
                Ok(Err(error)) => error,
                Err(_) => silent(limit),
            };
            // What this process has refused itself, and what comes of no answer, tells nothing of the store.
            let is_ours = matches!(error, Error::NotSupported { .. } | Error::Generic { .. } | Error::JoinError { .. });
            if !is_ours || status(&error).is_some() {
                self.heard();
            }
            if !is_passing(&error) || began.elapsed() + pause >= self.patience() + moving {
                return Err(Refusal { error, was_repeated });
            }
            was_repeated = true;
            select! {
                biased;
                () = sleep(with_jitter(pause)) => {}
                () = &mut silence => return Err(Refusal { error, was_repeated }),
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }
}

pub(super) fn silent(limit: Duration) -> Error {
    let seconds = limit.as_secs();
    let source =
        format!("it has not answered within {seconds} s; see whether it runs, and whether its endpoint is right")
            .into();
    Error::Generic { store: "the object store", source }
}

/// Whether asking again may bring something else. What a request is refused for that is wrong in itself is known by its text only; should
/// that be another one some day, such a request is made again in vain.
fn is_passing(error: &Error) -> bool {
    match error {
        Error::Generic { .. } => status(error)
            .is_none_or(|status| !status.starts_with('4') || matches!(&*status, "408" | "409" | "425" | "429")),
        Error::JoinError { .. } => true,
        _ => false,
    }
}

/// The status that a store answered with, as the text of the error has it.
pub(super) fn status(error: &Error) -> Option<String> {
    Some(error.to_string().split("status code: ").nth(1)?.get(..3)?.to_owned())
}

/// Whether this is what is told where a range begins behind the end of an object.
pub(super) fn is_behind_the_end(error: &StoreError) -> bool {
    matches!(error, StoreError::Io { source, .. } if source.kind() == io::ErrorKind::UnexpectedEof)
}

/// Between half and all of it, so that many who were refused together don't come back together.
fn with_jitter(pause: Duration) -> Duration {
    let mut random = [0u8; 1];
    // Without randomness it is only less even.
    let _ = getrandom::fill(&mut random);
    pause / 2 + pause * u32::from(random[0]) / 512
}

/// What is told of a refusal.
pub(super) fn told(key: &str, action: &'static str, error: Error) -> StoreError {
    // Of a listing: what has no objects is an empty list.
    if !asks_the_machine(&error) && status(&error).as_deref() == Some("404") && matches!(error, Error::Generic { .. }) {
        return no_bucket(key, action);
    }
    let error = match error {
        // What this process has refused itself.
        Error::NotSupported { source } => match source.downcast::<StoreError>() {
            Ok(own) => return *own,
            Err(source) => Error::NotSupported { source },
        },
        error => error,
    };
    let kind = match &error {
        Error::NotFound { .. } => return StoreError::NotFound(key.into()),
        Error::AlreadyExists { .. } => return StoreError::Exists(key.into()),
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => io::ErrorKind::PermissionDenied,
        Error::NotSupported { .. } | Error::NotImplemented { .. } | Error::InvalidPath { .. } => {
            io::ErrorKind::InvalidInput
        }
        error => match status(error).as_deref() {
            Some("416") => io::ErrorKind::UnexpectedEof,
            Some("401" | "403") => io::ErrorKind::PermissionDenied,
            _ => io::ErrorKind::Other,
        },
    };
    let remedy = match kind {
        io::ErrorKind::PermissionDenied => "; see what this key may do, and whether it is the right one",
        _ if asks_the_machine(&error) => {
            "; no keys were given (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile that has them), and this machine has no role"
        }
        _ => "",
    };
    StoreError::Io { key: key.into(), action, source: io::Error::new(kind, shown(&error) + remedy) }
}

/// Whether keys of S3 were asked of the machine itself, at the address where those of a cloud know theirs.
fn asks_the_machine(error: &Error) -> bool {
    matches!(error, Error::Generic { store: "S3", .. }) && error.to_string().contains("169.254.169.254")
}

/// Where something is written or listed nothing has to be there before but the bucket.
pub(super) fn no_bucket(key: &str, action: &'static str) -> StoreError {
    let source = io::Error::new(io::ErrorKind::InvalidInput, "there is no such bucket; make it first");
    StoreError::Io { key: key.into(), action, source }
}

/// What a store says comes from outside: it is cut, and without what could drive a terminal.
fn shown(error: &Error) -> String {
    let text: String = error.to_string().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic() -> Error {
        Error::Generic { store: "S3", source: "503\u{1b}[2J".repeat(99).into() }
    }

    #[test]
    fn what_passes_is_asked_again_and_what_is_an_answer_is_not() {
        let attempts = Attempts::default();
        let count = std::cell::Cell::new(0);
        let ask = |failures: u32, error: fn() -> Error| {
            count.set(0);
            let request = || {
                count.set(count.get() + 1);
                let fails = count.get() <= failures;
                async move { if fails { Err(error()) } else { Ok(()) } }
            };
            Builder::new_current_thread().enable_all().build().unwrap().block_on(attempts.ask(0, request))
        };
        assert!(ask(2, generic).is_ok() && count.get() == 3);
        let missing = || Error::NotFound { path: "k".into(), source: "404".into() };
        let refusal = ask(9, missing).err().unwrap();
        assert!(!refusal.was_repeated && count.get() == 1);
        assert!(matches!(told("k", "read", refusal.error), StoreError::NotFound(key) if key == "k"));
    }

    #[test]
    fn what_a_store_says_is_cut_and_drives_no_terminal() {
        let shown = told("k", "read", generic()).to_string();
        assert!(shown.chars().count() < SHOWN + 40 && !shown.contains(|c: char| c.is_control()), "{shown}");
        let denied = Error::PermissionDenied { path: "k".into(), source: "403".into() };
        assert!(told("k", "delete", denied).is_refused());
    }
}
