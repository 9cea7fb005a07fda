//! A vault: opening it, reading restore points, committing them.
//!
//! ```text
//! open:   reseal.json → tenant record → KMS unwraps the master → keys           (tenant, heads)
//! read:   chain → manifest → index node → leaf → pack table → blob → frames     (points, tree, packs)
//! commit: blobs → packs, finished durable → manifest, created last              (pack_writer, points)
//! ```
//!
//! [`cache`] is the byte-bounded cache that all reading shares; [`heads`] remembers what was seen, so that a vault that
//! was rolled back is noticed.
//!
//! Architecture invariant: a restore point exists if and only if its manifest does, and whatever a manifest leads to was
//! durable before it was created. Nothing is served that was not authenticated.

pub mod cache;
mod error;
pub mod heads;
mod pack_writer;
mod packs;
mod points;
mod tenant;
mod tree;

pub use error::{Class, VaultError};
pub use pack_writer::{FinishingPack, PackWriter};
pub use packs::{PackFile, PackHandle, Packs, Wait};
pub use points::{Chain, Point, PointSpec, State, Which};
pub use tenant::{Tenant, create_tenant, create_vault, random};
pub use tree::Tree;
