//! QEMU's programs, as both of reseal's use them: found, started with what they inherit and no more, bounded in time and in
//! what they say; the secrets that open their images; and text in definitions of libvirt's (`xml`).
//!
//! ```text
//! file → first line → secret → pipe → /dev/fd/N of a program           (secret)
//! name → program → what it inherits → run → how it ended, what it said (tool)
//! ```

pub mod secret;
pub mod tool;
pub mod xml;

pub use secret::{Secret, SecretError};
pub use tool::Missing;
