//! A cache that is bounded by bytes, in shards so that threads seldom wait for one another.

use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::atomic::{AtomicUsize, Ordering};

use lru::LruCache;
use parking_lot::Mutex;

/// Enough that a few FUSE threads and a pool rarely meet in one.
const SHARDS: usize = 16;

/// Something with a size in memory, in bytes.
pub trait Weigh {
    /// About how many bytes it takes.
    fn weight(&self) -> usize;
}

impl<T: Weigh> Weigh for std::sync::Arc<T> {
    fn weight(&self) -> usize {
        (**self).weight()
    }
}

struct Shard<K, V> {
    entries: LruCache<K, V>,
    bytes: usize,
}

impl<K: Hash + Eq, V: Weigh> Shard<K, V> {
    /// Drops the oldest until it is within the limit, but for the last.
    fn trim(&mut self, limit: usize) {
        while self.bytes > limit && self.entries.len() > 1 {
            let Some((_, oldest)) = self.entries.pop_lru() else { break };
            self.bytes -= oldest.weight();
        }
    }
}

/// Least recently used goes first, in each shard by itself.
pub struct Cache<K, V> {
    shards: Vec<Mutex<Shard<K, V>>>,
    hasher: RandomState,
    shard_limit: AtomicUsize,
    bytes: AtomicUsize,
}

impl<K: Hash + Eq, V: Weigh + Clone> Cache<K, V> {
    /// A cache of at most about `limit` bytes; each shard keeps at least the entry it was given last.
    pub fn new(limit: usize) -> Cache<K, V> {
        let shard = || Mutex::new(Shard { entries: LruCache::unbounded(), bytes: 0 });
        Cache {
            shards: (0..SHARDS).map(|_| shard()).collect(),
            hasher: RandomState::new(),
            shard_limit: AtomicUsize::new(limit / SHARDS),
            bytes: AtomicUsize::new(0),
        }
    }

    /// Changes the limit; what is too much goes.
    pub fn resize(&self, limit: usize) {
        self.limit(limit);
        self.shards.iter().for_each(|shard| self.change(shard, |shard| shard.trim(limit / SHARDS)));
    }

    /// Changes the limit; what is too much in a shard goes when the next value comes to it.
    pub(crate) fn limit(&self, limit: usize) {
        self.shard_limit.store(limit / SHARDS, Ordering::Relaxed);
    }

    /// Bytes that it keeps now.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    fn change(&self, shard: &Mutex<Shard<K, V>>, change: impl FnOnce(&mut Shard<K, V>)) {
        let mut shard = shard.lock();
        let before = shard.bytes;
        change(&mut shard);
        // What is less is added as well: it wraps around.
        self.bytes.fetch_add(shard.bytes.wrapping_sub(before), Ordering::Relaxed);
    }

    fn shard(&self, key: &K) -> &Mutex<Shard<K, V>> {
        let hash = self.hasher.hash_one(key);
        // The low bits choose the bucket within a shard's own table, which hashes differently anyway.
        &self.shards[usize::try_from(hash % SHARDS as u64).unwrap_or(0)]
    }

    /// The value, which becomes the most recently used.
    pub fn get(&self, key: &K) -> Option<V> {
        self.shard(key).lock().entries.get(key).cloned()
    }

    /// Adds or replaces a value.
    pub fn put(&self, key: K, value: V) {
        self.change(self.shard(&key), |shard| {
            shard.bytes += value.weight();
            if let Some((_, old)) = shard.entries.push(key, value) {
                shard.bytes -= old.weight();
            }
            shard.trim(self.shard_limit.load(Ordering::Relaxed));
        });
    }

    /// Forgets values that do not count.
    pub(crate) fn retain(&self, counts: impl Fn(&K, &V) -> bool)
    where
        K: Clone,
    {
        for shard in &self.shards {
            self.change(shard, |shard| {
                let goes = |(key, value): (&K, &V)| (!counts(key, value)).then(|| key.clone());
                for key in shard.entries.iter().filter_map(goes).collect::<Vec<_>>() {
                    shard.bytes -= shard.entries.pop(&key).map_or(0, |value| value.weight());
                }
            });
        }
    }

    /// Forgets a value.
    pub fn remove(&self, key: &K) {
        self.change(self.shard(key), |shard| {
            if let Some(old) = shard.entries.pop(key) {
                shard.bytes -= old.weight();
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone)]
    struct Bytes(usize);

    impl Weigh for Bytes {
        fn weight(&self) -> usize {
            self.0
        }
    }

    #[test]
    fn it_stays_within_its_bytes() {
        let cache = Cache::new(16_000);
        for key in 0..10_000u32 {
            cache.put(key, Bytes(100));
            cache.put(key, Bytes(90));
        }
        let bytes: usize = cache.shards.iter().map(|shard| shard.lock().bytes).sum();
        let kept: usize = cache.shards.iter().map(|shard| shard.lock().entries.len()).sum();
        assert!(bytes <= 16_000 && bytes == kept * 90, "{bytes} bytes in {kept} entries");
        assert_eq!(cache.bytes(), bytes);
        assert!(cache.get(&9_999).is_some());
        cache.resize(8_000);
        let bytes: usize = cache.shards.iter().map(|shard| shard.lock().bytes).sum();
        assert!(bytes <= 8_000 && cache.get(&9_999).is_some(), "{bytes} bytes");
        cache.remove(&9_999);
        assert!(cache.get(&9_999).is_none());
        let bytes: usize = cache.shards.iter().map(|shard| shard.lock().bytes).sum();
        assert_eq!(cache.bytes(), bytes);
        // Each shard keeps one.
        cache.limit(0);
        (0..1_000).for_each(|key| cache.put(key, Bytes(90)));
        assert_eq!(cache.bytes(), SHARDS * 90);
    }
}
