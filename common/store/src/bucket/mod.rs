//! A bucket of S3 or of one like it, of Azure or of Google.
//!
//! An object is made by one conditional request, so it exists whole and durable, or not; and of several who make one, one succeeds.
//! Where the answer to such a request was lost, the store is asked what is there: whoever finds his own bytes has made them.
//!
//! A lease is an object that its process renews: see `lease.rs`. What is locked, and a bucket that keeps versions: see `versions.rs`.

mod attempts;
mod lease;
mod open;
mod past;
mod probe;
mod profile;
mod signed;
mod tags;
mod versions;

use std::future::Future;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::TryStreamExt;
use object_store::path::Path;
use object_store::{
    Error, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload,
    UpdateVersion,
};

use crate::{Entry, Lease, LeaseUse, Lock, LockMode, Standing, Store, StoreError, Upload};
use attempts::{Attempts, Refusal, is_behind_the_end, told, wait};
use lease::{Leases, Renewed};
pub use open::{AddressError, Variables, is_address};
use past::Past;
use tags::Tags;
use versions::Versions;

/// How often is looked what became of an object that others make and remove at the same time.
const ROUNDS: usize = 8;

/// A bucket, or what is below a prefix in it.
pub struct Bucket {
    shared: Arc<Shared>,
}

/// What requests need that outlive a call.
struct Shared {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    attempts: Attempts,
    tags: Tags,
    leases: Leases,
    versions: Versions,
    /// If it is shown as it was at a moment.
    past: Option<Past>,
}

/// What an object is, and which version of it.
struct Object {
    chunks: Vec<Bytes>,
    length: u64,
    version: UpdateVersion,
    /// When it was made or replaced, by the store's clock, in seconds.
    modified: i64,
}

impl Object {
    fn concat(&self) -> Vec<u8> {
        self.chunks.concat()
    }

    fn is(&self, bytes: &PutPayload) -> bool {
        self.length == bytes.content_length() as u64
            && self.chunks.iter().flatten().eq(bytes.iter().flat_map(|chunk| chunk.iter()))
    }
}

impl Bucket {
    /// The place that an address means. Nothing is asked of it yet.
    pub fn open(address: &str) -> Result<Bucket, AddressError> {
        Bucket::open_with(address, &open::of_this_process())
    }

    /// The same in another environment than this process's.
    pub fn open_with(address: &str, variables: &Variables) -> Result<Bucket, AddressError> {
        let open::Place { store, prefix, signed, past } = open::open(address, variables)?;
        let (attempts, tags, leases) = (Attempts::default(), Tags::default(), Leases::new(variables)?);
        let (versions, past) = (Versions::new(signed), past.map(Past::new));
        Ok(Bucket { shared: Arc::new(Shared { store, prefix, attempts, tags, leases, versions, past }) })
    }

    /// Runs a request and waits for it.
    fn run<T, F>(
        &self,
        key: &str,
        action: &'static str,
        request: impl FnOnce(Arc<Shared>) -> F,
    ) -> Result<T, StoreError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send + 'static,
    {
        let failed = |source| StoreError::Io { key: key.into(), action, source };
        wait(request(self.shared.clone())).map_err(failed)?
    }

    /// Reads a part of an object; all of it where none is given.
    fn read(&self, key: &str, range: Option<GetRange>, bytes: u64) -> Result<Object, StoreError> {
        let name = key.to_owned();
        self.run(key, "read", |shared| async move { shared.read(&name, range, bytes).await })
    }

    /// Reads a range, as far as the object has it; its parts, and how long the object is.
    pub(crate) fn fetch(&self, key: &str, range: Range<u64>) -> Result<(Vec<Bytes>, u64), StoreError> {
        let bytes = range.end - range.start;
        match self.read(key, Some(GetRange::Bounded(range.clone())), bytes) {
            Ok(object) => Ok((object.chunks, object.length)),
            Err(e) if is_behind_the_end(&e) => Ok((Vec::new(), self.length(key)?)),
            Err(e) => Err(e),
        }
    }

    /// The same in the background; then `then` is called.
    pub(crate) fn fetch_then(
        &self,
        key: &str,
        range: Range<u64>,
        then: impl FnOnce(Result<(Vec<Bytes>, u64), StoreError>) + Send + 'static,
    ) -> io::Result<()> {
        let (shared, key, bytes) = (self.shared.clone(), key.to_owned(), range.end - range.start);
        attempts::spawn(async move {
            let read = shared.read(&key, Some(GetRange::Bounded(range)), bytes).await;
            then(read.map(|object| (object.chunks, object.length)));
        })
    }

    /// Makes an object.
    fn make(&self, key: &str, payload: PutPayload, lock: Option<Lock>) -> Result<(), StoreError> {
        let name = key.to_owned();
        self.run(key, "make", |shared| async move { shared.make(&name, payload, lock).await.map(drop) })
    }
}

impl Shared {
    /// The path of a key. Keys are built from encoded names, so one that is not legal is a mistake.
    fn path(&self, key: &str) -> Result<Path, StoreError> {
        let illegal = || {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "not a legal key");
            StoreError::Io { key: key.into(), action: "use", source }
        };
        if key.is_empty() || key.starts_with('/') {
            return Err(illegal());
        }
        let parsed = Path::parse(key).map_err(|_| illegal())?;
        Ok(self.prefix.parts().chain(parsed.parts()).collect())
    }

    /// Reads a part of an object; all of it where none is given. `bytes` are about how many that are.
    async fn read(&self, key: &str, range: Option<GetRange>, bytes: u64) -> Result<Object, StoreError> {
        // More is not taken, whatever the store sends.
        let most = match &range {
            Some(GetRange::Bounded(range)) => range.end - range.start,
            Some(GetRange::Suffix(last)) => *last,
            Some(GetRange::Offset(_)) | None => bytes,
        };
        let path = self.path(key)?;
        let version = self.version_then(key).await?;
        let request = || async {
            let options = GetOptions { range: range.clone(), version: version.clone(), ..GetOptions::default() };
            let result = self.store.get_opts(&path, options).await?;
            let (length, modified) = (result.meta.size, result.meta.last_modified.timestamp());
            let version = UpdateVersion { e_tag: result.meta.e_tag.clone(), version: result.meta.version.clone() };
            // As much as it says that it sends, and no more.
            let most = most.min(result.range.end.saturating_sub(result.range.start));
            let mut stream = result.into_stream();
            let (mut chunks, mut had): (Vec<Bytes>, u64) = Default::default();
            while let Some(chunk) = stream.try_next().await? {
                self.attempts.heard();
                had += chunk.len() as u64;
                if had > most {
                    return Err(not_any_more(too_much(key, most)));
                }
                chunks.push(chunk);
            }
            Ok(Object { chunks, length, version, modified })
        };
        self.attempts.ask(bytes, request).await.map_err(|refusal| told(key, "read", refusal.error))
    }

    /// At most so many bytes of an object, from its beginning on, and how many it has.
    async fn read_within(&self, key: &str, limit: u64) -> Result<Object, StoreError> {
        match self.read(key, Some(GetRange::Bounded(0..limit.max(1))), limit).await {
            // It has none.
            Err(e) if is_behind_the_end(&e) => self.read(key, None, 0).await,
            other => other,
        }
    }

    async fn put(
        &self,
        key: &str,
        path: &Path,
        payload: &PutPayload,
        mode: PutMode,
        lock: Option<Lock>,
    ) -> Result<UpdateVersion, Refusal> {
        let bytes = payload.content_length() as u64;
        let request = || async {
            self.check_present(key).map_err(not_any_more)?;
            self.check_guard(key, Guard::On)?;
            if let Some(lock) = lock {
                return self.versions.signed()?.put(path, payload.clone(), mode.clone(), lock).await;
            }
            let options = PutOptions { mode: mode.clone(), ..PutOptions::default() };
            let result = self.store.put_opts(path, payload.clone(), options).await?;
            Ok(UpdateVersion { e_tag: result.e_tag, version: result.version })
        };
        self.attempts.ask(bytes, request).await
    }

    /// Makes an object, if there is none of that key.
    async fn make(&self, key: &str, payload: PutPayload, lock: Option<Lock>) -> Result<UpdateVersion, StoreError> {
        let path = self.path(key)?;
        for _ in 0..ROUNDS {
            let refusal = match self.put(key, &path, &payload, PutMode::Create, lock).await {
                Ok(version) => return Ok(version),
                Err(refusal) => refusal,
            };
            if !matches!(refusal.error, Error::AlreadyExists { .. }) {
                return Err(told_of_write(key, "make", refusal.error));
            }
            // It may be what a request made whose answer was lost; and some say so of one that is just being removed.
            let ours = match refusal.was_repeated {
                true => self
                    .read_within(key, payload.content_length() as u64)
                    .await
                    .map(|object| object.is(&payload).then_some(object.version)),
                false => self.about(key).await.map(|_| None),
            };
            match ours {
                Ok(Some(version)) => return Ok(version),
                Ok(None) => return Err(StoreError::Exists(key.into())),
                Err(StoreError::NotFound(_)) => {}
                Err(e) => return Err(e),
            }
        }
        Err(StoreError::Exists(key.into()))
    }

    /// What a store says of an object without its bytes.
    async fn about(&self, key: &str) -> Result<ObjectMeta, StoreError> {
        let path = self.path(key)?;
        let version = self.version_then(key).await?;
        let request = || async {
            let options = GetOptions { head: true, version: version.clone(), ..GetOptions::default() };
            Ok(self.store.get_opts(&path, options).await?.meta)
        };
        self.attempts.ask(0, request).await.map_err(|refusal| told(key, "look at", refusal.error))
    }

    /// Puts `new` in the place of a version; `None` where that is not what is there.
    async fn update(
        &self,
        key: &str,
        version: UpdateVersion,
        new: PutPayload,
        lock: Option<Lock>,
    ) -> Result<Option<UpdateVersion>, StoreError> {
        let path = self.path(key)?;
        let put = |version| self.put(key, &path, &new, PutMode::Update(version), lock);
        // Asked before, for another request may find it out while this one is under way.
        let bare = self.tags.without_quotes(&version);
        let mut answer = put(self.tags.told(&version)).await;
        if let Err(Refusal { error: Error::Precondition { .. }, was_repeated }) = answer
            && let Some(bare) = bare
            && self.is_there(key, &version).await?
            && probe::are_bare_tags_compared(self).await?
        {
            self.tags.leave_quotes_out();
            answer = put(bare).await;
            answer =
                answer.map_err(|refusal| Refusal { was_repeated: refusal.was_repeated || was_repeated, ..refusal });
        }
        let refusal = match answer {
            Ok(version) => return Ok(Some(version)),
            Err(refusal) => refusal,
        };
        match refusal.error {
            Error::Precondition { .. } | Error::AlreadyExists { .. } if refusal.was_repeated => {
                match self.read_within(key, new.content_length() as u64).await {
                    Ok(object) => Ok(object.is(&new).then_some(object.version)),
                    Err(StoreError::NotFound(_)) => Ok(None),
                    Err(e) => Err(e),
                }
            }
            Error::Precondition { .. } | Error::AlreadyExists { .. } | Error::NotFound { .. } => Ok(None),
            error => Err(told_of_write(key, "replace", error)),
        }
    }

    /// Whether that version is what is there, as the store says.
    async fn is_there(&self, key: &str, version: &UpdateVersion) -> Result<bool, StoreError> {
        match self.about(key).await {
            Ok(meta) => Ok(meta.e_tag == version.e_tag),
            Err(StoreError::NotFound(_)) => Ok(false),
            Err(e) => Err(e),
        }
    }

    /// Refuses what this process's leases guard, if that is asked for. Asked each time: it may take long until a store answers.
    fn check_guard(&self, key: &str, guard: Guard) -> Result<(), Error> {
        match guard {
            Guard::On => self.leases.check(key).map_err(not_any_more),
            Guard::Off => Ok(()),
        }
    }

    /// Removes an object; in a bucket with versions, it is only hidden.
    async fn hide(&self, key: &str, guard: Guard) -> Result<(), StoreError> {
        self.check_present(key)?;
        let path = self.path(key)?;
        let request = || async {
            self.check_guard(key, guard)?;
            self.store.delete(&path).await
        };
        match self.attempts.ask(0, request).await {
            Ok(()) => Ok(()),
            // Done before, and the answer was lost.
            Err(Refusal { error: Error::NotFound { .. }, was_repeated: true }) => Ok(()),
            Err(refusal) => Err(told(key, "delete", refusal.error)),
        }
    }

    /// The same, but not asked again.
    async fn delete_once(&self, key: &str, patience: Duration) -> Result<(), StoreError> {
        let path = self.path(key)?;
        let asked = tokio::time::timeout(patience, self.store.delete(&path)).await;
        asked.unwrap_or_else(|_| Err(attempts::silent(patience))).map_err(|error| told(key, "delete", error))
    }

    async fn list(&self, folder: &str) -> Result<Vec<Entry>, StoreError> {
        let path = match folder.is_empty() {
            true => self.prefix.clone(),
            false => self.path(folder)?,
        };
        if let Some(past) = &self.past {
            return self.folder_then(past, folder, &path).await;
        }
        let asked = self.attempts.ask(0, || self.store.list_with_delimiter(Some(&path))).await;
        let shown = if folder.is_empty() { "the vault's folder" } else { folder };
        let listed = asked.map_err(|refusal| told(shown, "list", refusal.error))?;
        let folders = listed
            .common_prefixes
            .iter()
            .filter_map(|path| Some(Entry { name: path.filename()?.to_owned(), length: 0, is_folder: true }));
        // Some have an object in the place of a folder that is empty by now.
        let objects = listed.objects.iter().filter(|object| object.location != path).filter_map(|object| {
            Some(Entry { name: object.location.filename()?.to_owned(), length: object.size, is_folder: false })
        });
        Ok(folders.chain(objects).collect())
    }
}

/// Whether what this process's leases guard is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Guard {
    On,
    Off,
}

/// What is told of a store that sends more than it was asked for.
fn too_much(key: &str, most: u64) -> StoreError {
    let what = format!(
        "the store sends more than {most} bytes, which is all that there should be; it does not speak its protocol"
    );
    StoreError::Io { key: key.into(), action: "read", source: io::Error::new(io::ErrorKind::InvalidData, what) }
}

/// Ends asking again; [`told`] tells it as it is.
fn not_any_more(error: StoreError) -> Error {
    Error::NotSupported { source: Box::new(error) }
}

/// What is told where something could not be written.
fn told_of_write(key: &str, action: &'static str, error: Error) -> StoreError {
    match error {
        Error::NotFound { .. } => attempts::no_bucket(key, action),
        error => told(key, action, error),
    }
}

impl Store for Bucket {
    fn get(&self, key: &str, limit: usize) -> Result<Vec<u8>, StoreError> {
        // One byte more than it may have shows that it has too many; a store answers with what there is.
        let most = (limit as u64).saturating_add(1);
        let object = match self.read(key, Some(GetRange::Bounded(0..most)), 0) {
            // An object without a byte has no first one.
            Err(e) if is_behind_the_end(&e) => return Ok(Vec::new()),
            other => other?,
        };
        match usize::try_from(object.length).is_ok_and(|length| length <= limit) {
            true => whole(key, object.concat(), object.length, 0),
            false => Err(StoreError::TooLong { key: key.into(), length: object.length, limit }),
        }
    }

    fn read_at(&self, key: &str, offset: u64, buf: &mut [u8]) -> Result<(), StoreError> {
        if buf.is_empty() {
            return Ok(());
        }
        let wanted = offset.saturating_add(buf.len() as u64);
        let (chunks, length) = self.fetch(key, offset..wanted)?;
        let mut at = 0;
        for chunk in &chunks {
            let part = chunk.len().min(buf.len() - at);
            buf[at..at + part].copy_from_slice(&chunk[..part]);
            at += part;
        }
        match at == buf.len() {
            true => Ok(()),
            false => Err(StoreError::Short { key: key.into(), length, wanted }),
        }
    }

    fn try_read_at(&self, _: &str, _: u64, _: &mut [u8]) -> Result<bool, StoreError> {
        Ok(false)
    }

    fn is_far(&self) -> bool {
        true
    }

    fn read_tail(&self, key: &str, want: usize) -> Result<(Vec<u8>, u64), StoreError> {
        let (wanted, name) = (want as u64, key.to_owned());
        self.run(key, "read", |shared| async move { shared.read_tail(&name, wanted).await })
    }

    fn replace(&self, key: &str, expected: &[u8], new: &[u8]) -> Result<(), StoreError> {
        self.replace_with(key, expected, new, None)
    }

    fn replace_locked(&self, key: &str, expected: &[u8], new: &[u8], lock: Lock) -> Result<(), StoreError> {
        self.replace_with(key, expected, new, Some(lock))
    }

    fn create(&self, key: &str, bytes: &[u8]) -> Result<(), StoreError> {
        self.make(key, PutPayload::from(bytes.to_vec()), None)
    }

    fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError> {
        self.shared.path(key)?;
        let bucket = Bucket { shared: self.shared.clone() };
        Ok(Box::new(BucketUpload { bucket, key: key.into(), chunks: Vec::new(), lock: None }))
    }

    fn list(&self, folder: &str) -> Result<Vec<Entry>, StoreError> {
        let name = folder.to_owned();
        self.run(folder, "list", |shared| async move { shared.list(&name).await })
    }

    fn settle(&self, _: &str) -> Result<(), StoreError> {
        // What a listing shows is durable.
        Ok(())
    }

    fn delete(&self, key: &str) -> Result<(), StoreError> {
        let name = key.to_owned();
        self.run(key, "delete", |shared| async move { shared.delete(&name, Guard::On).await })
    }

    fn hide(&self, key: &str) -> Result<(), StoreError> {
        let name = key.to_owned();
        self.run(key, "delete", |shared| async move { shared.delete_or_hide(&name, Guard::On).await })
    }

    fn time(&self) -> Result<i64, StoreError> {
        self.run("", "ask the time of", |shared| async move { lease::store_time(&shared).await })
    }

    fn lock(&self, key: &str, lock: Lock) -> Result<(), StoreError> {
        let name = key.to_owned();
        self.run(key, "lock", |shared| async move { shared.lock(&name, lock).await })
    }

    fn lock_of(&self, key: &str) -> Result<Option<Lock>, StoreError> {
        let name = key.to_owned();
        self.run(key, "look at", |shared| async move { shared.lock_of(&name).await })
    }

    fn probe_locks(&self, mode: LockMode) -> Result<(), StoreError> {
        self.run("", "probe", |shared| async move { probe::locks(&shared, mode).await })
    }

    fn sweep(&self) -> Result<(), StoreError> {
        // What was not made whole does not exist.
        Ok(())
    }

    fn is_past(&self) -> bool {
        self.shared.past.is_some()
    }

    fn probe(&self) -> Result<(), StoreError> {
        self.run("", "probe", |shared| async move { probe::conditions(&shared).await })
    }

    fn lease(&self, key: &str, bytes: &[u8], of: LeaseUse) -> Result<Box<dyn Lease>, StoreError> {
        let (name, text) = (key.to_owned(), bytes.to_vec());
        let taken = self.run(key, "make", |shared| async move { Renewed::take(shared, name, text, of).await })?;
        Ok(Box::new(taken))
    }

    fn standing(&self, key: &str) -> Result<Option<Standing>, StoreError> {
        let name = key.to_owned();
        self.run(key, "read", |shared| async move { lease::standing(&shared, &name).await })
    }

    fn end(&self, key: &str) -> Result<bool, StoreError> {
        let name = key.to_owned();
        self.run(key, "delete", |shared| async move { lease::end(&shared, &name).await })
    }
}

impl Bucket {
    fn replace_with(&self, key: &str, expected: &[u8], new: &[u8], lock: Option<Lock>) -> Result<(), StoreError> {
        self.shared.leases.check(key)?;
        let most = expected.len().max(new.len());
        let name = key.to_owned();
        let read = self.run(key, "read", |shared| async move { shared.read_within(&name, most as u64).await });
        let object = match read? {
            object if object.length > most as u64 => return Err(StoreError::Changed(key.into())),
            object => object,
        };
        let now = object.concat();
        if now == new {
            return Ok(());
        }
        if now != expected {
            return Err(StoreError::Changed(key.into()));
        }
        let (name, new) = (key.to_owned(), PutPayload::from(new.to_vec()));
        let replaced =
            self.run(key, "replace", |shared| async move { shared.update(&name, object.version, new, lock).await })?;
        replaced.map(drop).ok_or_else(|| StoreError::Changed(key.into()))
    }

    fn length(&self, key: &str) -> Result<u64, StoreError> {
        let name = key.to_owned();
        self.run(key, "look at", |shared| async move { Ok(shared.about(&name).await?.size) })
    }
}

impl Shared {
    /// The last bytes of an object. Not all stores can be asked for them, nor do all answer for an object without a byte.
    async fn read_tail(&self, key: &str, want: u64) -> Result<(Vec<u8>, u64), StoreError> {
        let asked = match want {
            0 => None,
            _ => Some(self.read(key, Some(GetRange::Suffix(want)), want).await),
        };
        let (bytes, length) = match asked {
            Some(Ok(object)) => (object.concat(), object.length),
            Some(Err(e)) if !is_behind_the_end(&e) && !is_not_asked_so(&e) => return Err(e),
            Some(Err(_)) | None => {
                let length = self.about(key).await?.size;
                let start = length.saturating_sub(want);
                match length - start {
                    0 => (Vec::new(), length),
                    part => (self.read(key, Some(GetRange::Bounded(start..length)), part).await?.concat(), length),
                }
            }
        };
        let expected = usize::try_from(want.min(length)).unwrap_or(usize::MAX);
        whole(key, bytes, expected as u64, length - expected as u64).map(|bytes| (bytes, length))
    }
}

/// Whether this is what is told where a store can't be asked for the end of an object.
fn is_not_asked_so(error: &StoreError) -> bool {
    matches!(error, StoreError::Io { source, .. } if source.kind() == io::ErrorKind::InvalidInput)
}

/// A store that answers with fewer or more bytes than it says is not believed.
fn whole(key: &str, bytes: Vec<u8>, expected: u64, start: u64) -> Result<Vec<u8>, StoreError> {
    match bytes.len() as u64 == expected {
        true => Ok(bytes),
        false => {
            let (length, wanted) = (start + bytes.len() as u64, start + expected);
            Err(StoreError::Short { key: key.into(), length, wanted })
        }
    }
}

/// An object in the making: its bytes are kept until it is whole, so that one request makes it.
struct BucketUpload {
    bucket: Bucket,
    key: String,
    chunks: Vec<Bytes>,
    lock: Option<Lock>,
}

impl Upload for BucketUpload {
    fn append(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        self.chunks.push(Bytes::copy_from_slice(bytes));
        Ok(())
    }

    fn lock(&mut self, lock: Lock) -> Result<(), StoreError> {
        self.lock = Some(lock);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<(), StoreError> {
        self.bucket.make(&self.key, self.chunks.into_iter().collect(), self.lock)
    }
}
