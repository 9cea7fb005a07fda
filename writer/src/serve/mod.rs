//! The target site: takes restore points from sites that have no keys.
//!
//! ```text
//! config → listener → TLS → who is it? → session: begin → disks (check → seal → pack → index) → commit
//! (config) (listener)                    (session, receive)   landed: what need not be sent again
//! ```
//!
//! Who it is, is said by `config`, and by the `registry` of those whom the site's own `authority` has enrolled; `current` is what
//! counts of them now.
//!
//! The network has its own runtime; a session is a thread, and fills the same [`crate::draft`] that a local backup does.
//!
//! Architecture invariant: what another VM has is used only when the content has arrived, and nothing that is answered depends
//! on it (`docs/PROTOCOL.md`).

mod authority;
mod config;
mod current;
mod enrol;
mod landed;
mod listener;
mod receive;
mod registry;
mod renewal;
mod session;
mod tls;

pub use config::{Client, Role, ServeConfig, Settings};
pub use enrol::{NewClient, clients, enrol, revoke};
pub use listener::{Access, Server, Tenants};
pub use registry::{Certificate, Enrolled, MAX_DAYS, Registry};
