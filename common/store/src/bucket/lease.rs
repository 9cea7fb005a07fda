//! Leases in a bucket: objects that their process renews.
//!
//! ```text
//! reseal-lease 1 NONCE BEAT SECONDS\n     what says whose it is, how often it was renewed, and how long it may go without
//! TEXT                                    what the process says of itself
//! ```
//!
//! A lease that was not renewed for as long as it says is *silent*: its process has ended, or it can't reach the store, or it stands
//! still. Nothing tells which, so nothing may rely on its having ended. Who must know sees to it that nothing which that process may still do
//! counts, and ends the lease then. One that only one may have is taken over: what is replaced is the version that was silent, so of several
//! who try, one has it.
//!
//! The process itself changes nothing below the folder of its leases while it could not renew one of them in time, nor ever again once one
//! was ended or taken over. That clock is its own, and it goes on while the machine sleeps. But a process may stand still between looking at it
//! and the request, so this only makes rare what the rest makes harmless.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use object_store::{PutMode, PutPayload, UpdateVersion};
use parking_lot::Mutex;
use rustix::time::{ClockId, clock_gettime};
use tokio::time::sleep;

use super::attempts::spawn;
use super::open::{AddressError, Variables};
use super::{Guard, Object, Shared, told_of_write};
use crate::{Lease, LeaseUse, Standing, StoreError, random_name};

/// How long a lease may go without being renewed, in seconds, and the variable that says otherwise.
const USUAL: u64 = 90;
const VARIABLE: &str = "RESEAL_LEASE_SECONDS";
/// What may be said there.
const RANGE: std::ops::RangeInclusive<u64> = 3..=3600;
/// For how many seconds it is tried to be removed at its end, and how long after one another: else others wait until it is silent.
const LAST_WHILE: u64 = 20;
const LAST_PAUSE: Duration = Duration::from_secs(1);
const LAST_PATIENCE: Duration = Duration::from_secs(5);
/// It is renewed so many times in that time, and at least so often: of what is sent meanwhile nobody tells how far it is, so these tell that the
/// store is there.
const BEATS: u64 = 6;
const LONGEST_BEAT: Duration = Duration::from_secs(15);
/// Stores tell times in seconds, rounded either way.
const ROUNDING: i64 = 2;
/// Longest lease that is read.
const MAX_LEASE: u64 = 64 << 10;
/// An object that tells the store's time when it is written.
const CLOCK: &str = "tmp/clock";
/// For so many seconds what was learnt of the store's clock is believed.
const CLOCK_AGE: u64 = 600;
const MAGIC: &str = "reseal-lease 1 ";

/// How long leases of a process in that environment may go without being renewed.
fn seconds(variables: &Variables) -> Result<u64, AddressError> {
    let Some(given) = variables.get(VARIABLE) else { return Ok(USUAL) };
    let parsed = given.parse().ok().filter(|seconds| RANGE.contains(seconds));
    parsed.ok_or_else(|| AddressError::LeaseSeconds(format!("{} to {}", RANGE.start(), RANGE.end())))
}

/// Seconds since the machine was started, asleep or not.
fn uptime() -> u64 {
    u64::try_from(clock_gettime(ClockId::Boottime).tv_sec).unwrap_or(0)
}

/// The leases of this process, and what it knows of the store's clock.
pub(super) struct Leases {
    seconds: u64,
    taken: Mutex<Vec<Arc<State>>>,
    /// The store's time and this machine's uptime when it was learnt.
    clock: Mutex<Option<(i64, u64)>>,
}

/// One lease of this process.
struct State {
    key: String,
    /// What must not be changed any more once it is lost: all below the folder that its own folder is in.
    guards: Option<String>,
    nonce: String,
    seconds: u64,
    text: Vec<u8>,
    of: LeaseUse,
    /// Uptime before the last request that renewed it.
    renewed: AtomicU64,
    is_lost: AtomicBool,
    is_dropped: AtomicBool,
}

impl State {
    fn payload(&self, beat: u64) -> PutPayload {
        let mut bytes = format!("{MAGIC}{} {beat} {}\n", self.nonce, self.seconds).into_bytes();
        bytes.extend_from_slice(&self.text);
        PutPayload::from(bytes)
    }

    fn is_late(&self) -> bool {
        uptime().saturating_sub(self.renewed.load(Ordering::Acquire)) >= self.seconds
    }

    /// Whether a lease's object is this one's.
    fn is_said_by(&self, bytes: &[u8]) -> bool {
        Said::of(bytes).is_some_and(|said| said.nonce == self.nonce)
    }

    fn lost(&self) -> StoreError {
        StoreError::Lost(self.key.clone())
    }
}

/// What a lease's object says.
struct Said {
    nonce: String,
    seconds: i64,
    text: Vec<u8>,
}

impl Said {
    fn of(bytes: &[u8]) -> Option<Said> {
        let end = bytes.iter().position(|byte| *byte == b'\n')?;
        let line = std::str::from_utf8(&bytes[..end]).ok()?.strip_prefix(MAGIC)?;
        let mut parts = line.split(' ');
        let (nonce, _beat, seconds) = (parts.next()?, parts.next()?, parts.next()?);
        let seconds = seconds.parse::<u64>().ok()?.clamp(*RANGE.start(), *RANGE.end());
        Some(Said { nonce: nonce.into(), seconds: i64::try_from(seconds).ok()?, text: bytes[end + 1..].to_vec() })
    }
}

impl Leases {
    pub(super) fn new(variables: &Variables) -> Result<Leases, AddressError> {
        Ok(Leases { seconds: seconds(variables)?, taken: Mutex::default(), clock: Mutex::default() })
    }

    /// Refuses to change what a lease guards that is lost, or could not be renewed in time.
    pub(super) fn check(&self, key: &str) -> Result<(), StoreError> {
        for state in self.taken.lock().iter() {
            let guards = state.guards.as_deref().is_some_and(|guarded| key.starts_with(guarded));
            if guards && (state.is_lost.load(Ordering::Acquire) || state.is_late()) {
                return Err(state.lost());
            }
        }
        Ok(())
    }
}

/// The folder above that of a key.
fn above(key: &str) -> Option<String> {
    let folder = key.rsplit_once('/')?.0;
    Some(folder.rsplit_once('/').map_or(String::new(), |(above, _)| format!("{above}/")))
}

/// A lease that this process renews until it is dropped.
pub(super) struct Renewed {
    shared: Arc<Shared>,
    state: Arc<State>,
}

impl Renewed {
    /// Takes a lease that nobody has, or only one who is silent.
    pub(super) async fn take(
        shared: Arc<Shared>,
        key: String,
        text: Vec<u8>,
        of: LeaseUse,
    ) -> Result<Renewed, StoreError> {
        let nonce = random_name().map_err(|source| StoreError::Io { key: key.clone(), action: "name", source })?;
        let state = Arc::new(State {
            guards: above(&key).filter(|_| of == LeaseUse::Changing),
            nonce,
            seconds: shared.leases.seconds,
            text,
            of,
            renewed: AtomicU64::new(uptime()),
            is_lost: AtomicBool::new(false),
            is_dropped: AtomicBool::new(false),
            key,
        });
        let version = match shared.make(&state.key, state.payload(0), None).await {
            Err(StoreError::Exists(key)) => take_over(&shared, &state).await?.ok_or(StoreError::Exists(key))?,
            other => other?,
        };
        shared.leases.taken.lock().push(state.clone());
        spawn(renew(shared.clone(), state.clone(), version)).map_err(|source| StoreError::Io {
            key: state.key.clone(),
            action: "renew",
            source,
        })?;
        Ok(Renewed { shared, state })
    }
}

/// The object of a lease, if there is one.
async fn read(shared: &Shared, key: &str) -> Result<Option<Object>, StoreError> {
    match shared.read_within(key, MAX_LEASE).await {
        Ok(object) => Ok(Some(object)),
        Err(StoreError::NotFound(_)) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Puts a lease in the place of one that is silent; `None` where it is not.
async fn take_over(shared: &Shared, state: &State) -> Result<Option<UpdateVersion>, StoreError> {
    let Some(object) = read(shared, &state.key).await? else { return Ok(None) };
    if !is_silent(shared, object.modified, Said::of(&object.concat()).as_ref()).await? {
        return Ok(None);
    }
    state.renewed.store(uptime(), Ordering::Release);
    shared.update(&state.key, object.version, state.payload(0), None).await
}

async fn is_silent(shared: &Shared, modified: i64, said: Option<&Said>) -> Result<bool, StoreError> {
    let allowed = said.map_or(USUAL.cast_signed(), |said| said.seconds);
    Ok(store_time(shared).await? - modified > allowed + ROUNDING)
}

/// What the store's clock says.
pub(super) async fn store_time(shared: &Shared) -> Result<i64, StoreError> {
    let now = uptime();
    if let Some((time, at)) = *shared.leases.clock.lock()
        && now.saturating_sub(at) < CLOCK_AGE
    {
        return Ok(time + now.saturating_sub(at).cast_signed());
    }
    let path = shared.path(CLOCK)?;
    let put = shared.put(CLOCK, &path, &PutPayload::from_static(b"the store's clock"), PutMode::Overwrite, None).await;
    put.map_err(|refusal| told_of_write(CLOCK, "make", refusal.error))?;
    let time = shared.about(CLOCK).await?.last_modified.timestamp();
    *shared.leases.clock.lock() = Some((time, uptime()));
    Ok(time)
}

/// Renews a lease until it is dropped or lost.
async fn renew(shared: Arc<Shared>, state: Arc<State>, mut version: UpdateVersion) {
    let pause = Duration::from_millis(state.seconds * 1000 / BEATS).min(LONGEST_BEAT);
    let mut beat = 1;
    loop {
        sleep(pause).await;
        if state.is_dropped.load(Ordering::Acquire) {
            return;
        }
        let before = uptime();
        let renewed = match shared.update(&state.key, version.clone(), state.payload(beat), None).await {
            Ok(Some(next)) => Some(next),
            Ok(None) if state.is_dropped.load(Ordering::Acquire) => return,
            Ok(None) => match read(&shared, &state.key).await {
                // What an earlier request has made, whose answer was lost.
                Ok(Some(object)) if state.is_said_by(&object.concat()) => Some(object.version),
                // One who only reads takes it again: nobody relied on his not having it.
                Ok(None) if state.of == LeaseUse::Reading => {
                    shared.make(&state.key, state.payload(beat), None).await.ok()
                }
                Ok(_) => {
                    state.is_lost.store(true, Ordering::Release);
                    return;
                }
                Err(_) => None,
            },
            // It may be reached again before the time is over, or after it: as long as the lease stands, it is renewed.
            Err(_) => None,
        };
        if let Some(next) = renewed {
            state.renewed.store(before, Ordering::Release);
            let replaced = std::mem::replace(&mut version, next);
            shared.forget_version(&state.key, replaced, LAST_PATIENCE).await;
            beat += 1;
        }
    }
}

impl Lease for Renewed {
    fn check(&self) -> Result<(), StoreError> {
        let (shared, state) = (self.shared.clone(), self.state.clone());
        let key = self.state.key.clone();
        let asked = super::wait(async move { read(&shared, &state.key).await });
        let object = asked.map_err(|source| StoreError::Io { key, action: "read", source })??;
        let stands = object.is_some_and(|object| self.state.is_said_by(&object.concat()));
        match stands && !self.state.is_lost.load(Ordering::Acquire) {
            true => Ok(()),
            false => Err(self.state.lost()),
        }
    }

    fn take_back(&self, key: &str) -> Result<(), StoreError> {
        let (shared, name) = (self.shared.clone(), key.to_owned());
        // What the lease guards must not be changed any more, but for this.
        let asked = super::wait(async move { shared.delete_or_hide(&name, Guard::Off).await });
        asked.map_err(|source| StoreError::Io { key: key.into(), action: "delete", source })?
    }
}

impl Drop for Renewed {
    fn drop(&mut self) {
        self.state.is_dropped.store(true, Ordering::Release);
        // Not one that another process may have taken over by now.
        let is_ours = || !self.state.is_lost.load(Ordering::Acquire) && !self.state.is_late();
        self.shared.leases.taken.lock().retain(|state| !Arc::ptr_eq(state, &self.state));
        let began = uptime();
        // Not later, for then it may be another process's. Where it can't be removed it is silent soon.
        while is_ours() {
            let (shared, key) = (self.shared.clone(), self.state.key.clone());
            let asked = super::wait(async move { shared.delete_once(&key, LAST_PATIENCE).await });
            if matches!(asked, Ok(Ok(()) | Err(StoreError::NotFound(_)))) || uptime() - began >= LAST_WHILE {
                return;
            }
            std::thread::sleep(LAST_PAUSE);
        }
    }
}

/// A lease that some process has, or is silent.
pub(super) async fn standing(shared: &Shared, key: &str) -> Result<Option<Standing>, StoreError> {
    let Some(object) = read(shared, key).await? else { return Ok(None) };
    let bytes = object.concat();
    let said = Said::of(&bytes);
    let is_silent = is_silent(shared, object.modified, said.as_ref()).await?;
    Ok(Some(Standing { bytes: said.map_or(bytes, |said| said.text), is_silent }))
}

/// Removes a lease that is silent; whether nobody has it now.
pub(super) async fn end(shared: &Shared, key: &str) -> Result<bool, StoreError> {
    match standing(shared, key).await? {
        Some(standing) if standing.is_silent => match shared.hide(key, Guard::On).await {
            Ok(()) | Err(StoreError::NotFound(_)) => Ok(true),
            Err(e) => Err(e),
        },
        standing => Ok(standing.is_none()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_lease_says_is_read_within_bounds() {
        let said = Said::of(b"reseal-lease 1 00ff 12 90\n{\"what\":\"x\"}\n").unwrap();
        assert_eq!((said.nonce.as_str(), said.seconds, said.text.as_slice()), ("00ff", 90, &b"{\"what\":\"x\"}\n"[..]));
        let seconds = |text: &str| Said::of(format!("{MAGIC}a 1 {text}\n").as_bytes()).map(|said| said.seconds);
        assert_eq!(seconds("0"), Some(3));
        assert_eq!(seconds("99999999999"), Some(3600));
        for strange in ["-1", "", "x", "99999999999999999999999"] {
            assert_eq!(seconds(strange), None, "{strange}");
        }
        for strange in [&b""[..], b"\n", b"reseal-lease 1 \n", b"reseal-lease 2 a 1 90\n", b"\xff\n"] {
            assert!(Said::of(strange).is_none());
        }
    }

    #[test]
    fn a_lease_guards_what_its_folder_is_beside() {
        assert_eq!(above("tenants/acme/leases/1.lease").as_deref(), Some("tenants/acme/"));
        assert_eq!(above("leases/1").as_deref(), Some(""));
        assert_eq!(above("x"), None);
    }
}
