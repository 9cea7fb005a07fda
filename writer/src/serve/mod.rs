//! The target site: takes restore points from sites that have no keys.
//!
//! ```text
//! config → listener → TLS → who is it? → session: begin → disks (check → seal → pack → index) → commit
//! (config) (listener)                    (session, receive)   landed: what need not be sent again
//! ```
//!
//! The network has its own runtime; a session is a thread, and fills the same [`crate::draft`] that a local backup does.
//!
//! Architecture invariant: what another VM has is used only when the content has arrived, and nothing that is answered depends
//! on it (`docs/PROTOCOL.md`).

mod config;
mod landed;
mod listener;
mod receive;
mod session;

pub use config::{Client, Role, ServeConfig};
pub use listener::{Access, Server, Tenants};
