//! How things stand: whether restore points are as new as they have to be, what became of the last attempts, what a verification
//! found, whether KMS and server answer.
//!
//! ```text
//! backup, session of the server → results ┐
//! verify → verdicts                       ├→ tenant, site → report → JSON, metrics, exit status
//! newest manifests, listings → vault      ┤
//! last boots that were tried → vault      ┘
//! ```
//!
//! [`results`] and [`verdicts`] are files in the state folder: hints of this machine, that may be lost. What counts, the newest
//! restore points and the objectives, is read from the vault, where both are sealed.
//!
//! Architecture invariant: it costs one listing, one manifest and one note a VM, and one listing of the tenant's packs: never a
//! manifest for each restore point.

pub mod boot;
pub mod metrics;
mod note;
mod report;
mod results;
mod site;
mod tenant;
mod verdicts;

pub use report::{Problem, Report};
pub use results::{Attempt, Promise, Results, VmResults};
pub use site::{SiteReport, SiteVm};
pub use tenant::{Newest, RekeyState, TenantReport, VmReport, age};
pub use verdicts::{Verdict, Verdicts};

pub(crate) use report::severity;
pub(crate) use results::session_ended;
