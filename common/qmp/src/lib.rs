//! Talking with a running QEMU and with the agent in its guest.
//!
//! ```text
//! socket → Line: lines of JSON, each within a deadline → Client: commands and events of the monitor
//!                                                      → Agent: commands of the guest agent
//! ```
//!
//! Synchronous, one command after the other. The codec is `proto/qmp.rs`.

mod agent;
mod client;
mod error;
mod line;

pub use agent::{Agent, thaw_surely};
pub use client::{Client, Event};
pub use error::MonitorError;
pub use line::Line;
