//! Another site as the target of a backup: what is right of ┃ happens there.
//!
//! ```text
//! enrolment → connection ─┬─ asker, one a worker: offer → … → answered → data
//!                         └─ dispatcher: hands what comes to who waits for it
//! ```
//!
//! [`Remote`] keeps a restore point going over several connections: what has landed is not sent again.

mod asker;
mod connection;
mod target;

pub(crate) use asker::{Answered, Asker, Next, Offered};
pub use target::{Remote, Sent};
