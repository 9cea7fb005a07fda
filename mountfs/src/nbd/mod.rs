//! Disks of restore points over NBD: where clients connect, and each one's thread.
//!
//! ```text
//! address → listener → client → a thread of its own → `reseal_nbd::server`   (listen, server)
//! ```

mod listen;
mod server;

pub use listen::{Address, ListenError, Listener};
pub use server::{JournalOwner, NbdServer};
