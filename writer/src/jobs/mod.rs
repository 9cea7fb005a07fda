//! Scheduled jobs: a file that says which VMs are backed up from where, and how.
//!
//! ```text
//! file → jobs → run: lock → pool ─┬─ before → attempt → (unreachable: pause, again) → after   one VM
//! (file, job)  (run)              └─ …                                                       as many at once as is said
//! ```
//!
//! Each attempt is a process of its own, this program's `backup` (`attempt`). So one that crashes, or is killed for want of memory,
//! ends nothing but itself; each has a memory limit and a lease of its own; it is the very code that an administrator runs by hand,
//! with the same options; and the process that runs commands of the administrator has no keys.
//!
//! Architecture invariant: nothing here is given to a shell, and no program is looked for in PATH.

mod attempt;
mod child;
mod command;
mod file;
mod job;
mod lock;
mod run;

pub use attempt::{Launch, Made};
pub use command::Command;
pub use file::JobFile;
pub use job::{Job, Policy};
pub use run::{Ended, Event, Outcome, Run, Summary};
