//! A vault: opening it, reading restore points, committing them.
//!
//! ```text
//! open:   reseal.json → tenant record → KMS unwraps the master → keys           (record, tenant, heads)
//! read:   chain → manifest → index node → leaf → pack table → blob → frames     (points, tree, packs)
//! commit: blobs → packs, finished durable → manifest, created last              (pack_writer, points)
//! keys:   unwrap → wrap anew → replace the record; or destroy the key           (rekey, erase)
//!         who is at work, and what is sealed under which DEK                    (leases, epochs)
//!         record replaced → unwrap again, in processes that go on               (refresh)
//! escrow: recovery kit → master → keys; or wrap it anew → replace the record    (escrow)
//! notes:  listing → the latest of a kind → opened                               (notes)
//! hold:   a note that says so; forget: tombstone → manifest deleted           (forget)
//! prune:  what is condemned, and who must not rely on it                        (gc)
//! lock:   what can't be removed for a while                                     (locks)
//! tidy:   what a tenant has, and may have; removing one that has nothing        (holdings, quota, objectives)
//! ```
//!
//! [`cache`] is the byte-bounded cache that all reading shares; [`heads`] remembers what was seen, so that a vault that
//! was rolled back is noticed.
//!
//! Architecture invariant: a restore point exists if and only if its manifest does, and whatever a manifest leads to was
//! durable before it was created. Nothing is served that was not authenticated.

pub mod cache;
pub mod disk;
mod epochs;
mod erase;
mod error;
mod escrow;
mod forget;
mod frame_cache;
mod gc;
pub mod heads;
mod holdings;
mod leases;
mod locks;
mod notes;
mod objectives;
mod pack_writer;
mod packs;
mod points;
mod quota;
mod record;
mod refresh;
mod rekey;
mod tenant;
mod tree;
pub mod wipe;

pub use epochs::{Count, Epochs, ObjectSeal, PackSeal};
pub use erase::Erased;
pub use error::{Class, VaultError};
pub use forget::{Forgetting, HeldPoint, Left};
pub use holdings::{Holdings, VmHoldings, tenants};
pub use leases::{Held, Holder, Pins, PointName, Silenced, holders};
pub use locks::{Locks, ToLock};
pub use notes::{Booted, NoteNames};
pub use pack_writer::{FinishingPack, PackWriter};
pub use packs::{PackFile, PackHandle, Packs, Wait, Window, list_packs};
pub use points::{Chain, Point, PointSpec, Points, Shown, State, Which, open_newest};
pub use quota::Quota;
pub use record::Record;
pub use rekey::Rewrapped;
pub use tenant::{MadeTenant, Tenant, create_tenant, create_vault, random, random_master, vault_id};
pub use tree::Tree;
