//! What a prune and those who make restore points tell each other, so that nothing is removed that somebody relies on.
//!
//! ```text
//! backup: lease on VM@n → what is condemned? → what packs are there? → blobs that are not condemned → VM@n, create-only
//! prune:  mark from manifests → condemn the rest → who has a lease? → each has ended, or is fenced → mark what is new → remove
//! ```
//!
//! A prune that sees no lease condemned before that lease was taken, so whoever has it has read what was condemned. One whose lease it
//! sees may rely on anything until he has ended: by then his restore point exists and is marked, or, once he is fenced, never will.
//! No clock decides that, only how long is waited.
//!
//! Nor is a prune believed to have ended because nothing is heard of it: it may stand still before a rewriting or a removal, and go on
//! another day. All that it may still do is to generations of packs that it has condemned. So the next one gives each pack that is left of
//! those another generation, before it says that they are no longer condemned.
//!
//! Architecture invariant: what was condemned stays so until it is gone, or no prune wants to remove it any more.

use reseal_format::condemned::{Condemned, MAX_LIST};
use reseal_format::ids::{CondemnedId, Digest, PointId, VmId};
use reseal_format::layout;
use reseal_format::manifest::{Parent, Tombstone};
use reseal_format::names::VmName;
use reseal_format::seal::MAX_OBJECT;
use reseal_store::{Lease, StoreError};

use crate::notes::now;
use crate::points::is_fence;
use crate::tenant::random;
use crate::{Tenant, VaultError};

/// What is said to have been the reason of a fence.
const FENCED: &str = "a prune gave up waiting for the backup that was to make it";

impl Tenant {
    /// The lists of what prunes are about to remove: of the one that is at work, and of any that died.
    pub fn condemned_lists(&self) -> Result<Vec<CondemnedId>, VaultError> {
        let entries = self.store.list(&layout::gc(&self.name))?;
        Ok(entries.iter().filter_map(|entry| layout::parse_condemned_file(&entry.name)).collect())
    }

    /// All that is condemned. Asked before packs are listed: a list is gone only after what it names.
    pub fn condemned(&self) -> Result<Condemned, VaultError> {
        let mut condemned = Condemned::default();
        self.condemned_lists()?.into_iter().try_for_each(|id| self.add_condemned(id, &mut condemned))?;
        Ok(condemned)
    }

    /// Adds what a list says; one that is gone says nothing.
    pub fn add_condemned(&self, id: CondemnedId, to: &mut Condemned) -> Result<(), VaultError> {
        let key = layout::condemned(&self.name, id);
        match self.store.get(&key, MAX_LIST) {
            Ok(list) => to.decode(&list).map_err(VaultError::damaged(key)),
            Err(StoreError::NotFound(_)) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Says what is about to be removed; durable when it returns. The lists that say so.
    pub fn condemn(&self, condemned: &Condemned) -> Result<Vec<CondemnedId>, VaultError> {
        let lists = condemned.encode().into_iter().map(|list| {
            let id = CondemnedId::from_bytes(random()?);
            self.store.create(&layout::condemned(&self.name, id), &list)?;
            Ok(id)
        });
        lists.collect()
    }

    /// Says no longer that what these lists name is about to be removed.
    pub fn drop_condemned(&self, lists: &[CondemnedId]) -> Result<(), VaultError> {
        for id in lists {
            match self.store.hide(&layout::condemned(&self.name, *id)) {
                Err(StoreError::NotFound(_)) => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// Sees to it that the next restore point of a VM, if it has that number, is never made; whether that is so now. It is not where
    /// the number is not the next one: it was made, or given up, before.
    ///
    /// `under` is the lease of who does. The number is taken where a manifest is made, create-only: one of the two succeeds. Then a tombstone takes its place.
    pub fn fence(&self, vm: &VmName, number: u32, under: &dyn Lease) -> Result<bool, VaultError> {
        let chain = self.chain(vm)?;
        if chain.last().checked_add(1) != Some(number) {
            return Ok(false);
        }
        let (vm_id, parent): (VmId, Option<Parent>) = match self.parent_of_next(vm, &chain)? {
            None => (VmId::from_bytes(random()?), None),
            Some((parent, Some(point))) => (point.manifest.vm_id, Some(parent)),
            Some((parent, None)) => (self.tombstone(vm, parent.number)?.vm_id, Some(parent)),
        };
        let tombstone = Tombstone {
            vm: vm.clone(),
            vm_id,
            number,
            point_id: PointId::from_bytes(random()?),
            digest: Digest::from_bytes(random()?),
            parent,
            reason: FENCED.to_owned(),
            created: now(),
            fenced: true,
        };
        let key = layout::manifest(&self.name, vm, number);
        let sealed = tombstone.seal(&self.keys(), random()?).map_err(VaultError::damaged(&key))?;
        match self.store.create(&key, &sealed) {
            Ok(()) => {
                // Who has ended it may have changed the keys since.
                if let Err(e) = under.check() {
                    under.take_back(&key)?;
                    return Err(e.into());
                }
                self.finish_fence(vm, number, &sealed).map(|()| true)
            }
            Err(StoreError::Exists(_)) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    fn finish_fence(&self, vm: &VmName, number: u32, sealed: &[u8]) -> Result<(), VaultError> {
        match self.store.create(&layout::tombstone(&self.name, vm, number), sealed) {
            Ok(()) | Err(StoreError::Exists(_)) => {}
            Err(e) => return Err(e.into()),
        }
        match self.store.hide(&layout::manifest(&self.name, vm, number)) {
            Ok(()) | Err(StoreError::NotFound(_)) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// What says that a number was forgotten, or is about to: a fence whose maker died stands where the manifest would.
    pub fn forgotten(&self, vm: &VmName, number: u32) -> Result<Tombstone, VaultError> {
        match self.tombstone(vm, number) {
            Err(VaultError::Store(StoreError::NotFound(_))) => {
                let key = layout::manifest(&self.name, vm, number);
                self.open_sealed(&key, |keys, object| Tombstone::open(keys, vm, number, object))
            }
            other => other,
        }
    }

    /// Finishes a fence of this number whose maker died in the midst; whether there was one.
    pub fn settle_fence(&self, vm: &VmName, number: u32) -> Result<bool, VaultError> {
        let key = layout::manifest(&self.name, vm, number);
        let object = match self.store.get(&key, MAX_OBJECT) {
            Err(StoreError::NotFound(_)) => return Ok(false),
            other => other?,
        };
        if !is_fence(&object) {
            return Ok(false);
        }
        self.with_keys(&key, |keys| Tombstone::open(keys, vm, number, &object))?;
        self.finish_fence(vm, number, &object)?;
        Ok(true)
    }
}
