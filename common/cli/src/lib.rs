//! What `reseal` and `reseal-mount` share on the command line.
//!
//! ```text
//! arguments → paths → passphrases → an unlocked tenant      (args, paths, passphrase)
//! result → one line for people, or JSON → exit status       (failure, output, progress)
//! ```
//!
//! [`harden`] is called first thing: it keeps keys and plaintext out of core dumps and swap.

mod args;
mod failure;
mod harden;
mod output;
mod passphrase;
mod paths;
mod progress;

pub use args::{CommonArgs, Opened};
pub use failure::{Failure, Status, finish};
pub use harden::{harden, unlocked};
pub use output::{Output, human_bytes, human_duration};
pub use passphrase::{read_new_passphrase, read_passphrase};
pub use paths::{Paths, open_store};
pub use progress::Progress;
