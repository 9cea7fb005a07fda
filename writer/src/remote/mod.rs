//! Another site as the target of a backup: what is right of ┃ happens there.
//!
//! ```text
//! enrolment → connection ─┬─ asker, one a worker: offer → need → data
//!                         └─ dispatcher: hands what comes to who waits for it
//! ```
//!
//! [`Remote`] keeps a restore point going over several connections: what has landed is not sent again.

mod connection;
mod enrolment;
mod error;
mod greeting;
mod renewal;
mod target;

pub(crate) use connection::Asker;
pub use enrolment::Enrolment;
pub use error::RemoteError;
pub use greeting::greet;
pub use target::{Remote, Sent};
