//! The target site: takes restore points from sites that have no keys.
//!
//! ```text
//! config → listener → TLS → who is it? → session: begin → disks (check → seal → pack → index) → commit
//! (config) (listener, handshakes)        (session, receive)   landed: what need not be sent again
//!                                      → who reads: questions → answers (reading), or a disk over NBD (nbd)
//!
//! what all share (site), each session's part of it (desk): who runs (running) · tenants that are unlocked (tenants)
//!    limits: handshakes, windows, rates, turns        told: logging, audit, metrics, standing, health
//! ```
//!
//! Who it is, is said by `config`, and by the `registry` of those whom the site's own `authority` has enrolled.
//!
//! The network has its own runtime; a session is a thread, and fills the same [`crate::draft`] that a local backup does.
//!
//! Architecture invariant: what another VM has is used only when the content has arrived, and nothing that is answered depends
//! on it (`docs/PROTOCOL.md`).

pub mod audit;
mod authority;
mod config;
mod desk;
mod enrol;
mod handshakes;
mod health;
mod landed;
mod listener;
mod logging;
mod metrics;
mod nbd;
pub mod operation;
mod rates;
mod reading;
mod receive;
mod registry;
mod renewal;
mod running;
mod session;
mod site;
mod standing;
mod tenants;
mod tls;
mod turns;
mod windows;

pub use config::{Client, Role, ServeConfig, Settings};
pub use enrol::{NewClient, clients, enrol, revoke};
pub use listener::{Read, Server};
pub use logging::Logging;
pub use registry::{Certificate, Enrolled, MAX_DAYS, Registry};
pub use tenants::{Access, OpenTenant, Tenants};
