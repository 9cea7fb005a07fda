//! What `reseal` and `reseal-mount` share on the command line.
//!
//! ```text
//! arguments → paths → passphrases → KMS, or recovery kit → an unlocked tenant (args, paths, passphrase, kms, kit)
//! result → one line for people, or JSON → exit status                         (failure, output, progress)
//! ```
//!
//! [`harden`] is called first thing: it keeps keys and plaintext out of core dumps and swap.

mod args;
mod background;
mod failure;
mod harden;
mod holding;
mod kit;
mod kms;
mod output;
mod passphrase;
mod paths;
mod process_id;
mod progress;
mod runtime;
mod size;

pub use args::{CommonArgs, DEFAULT_TENANT, Found, Opened};
pub use background::{Detach, Side, split};
pub use failure::{Failure, Status, finish};
pub use harden::{harden, no_open_swap, swap_in_the_clear, unlocked};
pub use holding::{end_when_erased, hold_keys};
pub use kit::of_kit;
pub use kms::of_tenant;
pub use output::{Output, counted, human_bytes, human_duration};
pub use passphrase::{read_new_passphrase, read_passphrase};
pub use paths::{Paths, open_store, serve_config};
pub use process_id::ProcessId;
pub use progress::Progress;
pub use runtime::{private_folder, runtime_folder};
pub use size::parse_size;
