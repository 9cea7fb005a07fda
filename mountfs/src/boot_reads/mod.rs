//! What a boot reads: recorded, kept as a note of the VM, and fetched ahead at the next boot of any of its restore points.
//!
//! ```text
//! guest → read that no overlay has → recorder → disk of the point          (recorder)
//! boot is over → note in the vault → next boot → clusters → frame cache    (reading, prefetch)
//! ```
//!
//! Neither changes what is read: the recorder only looks on, and what was fetched ahead wrongly, or could not be, is read as ever.

mod prefetch;
mod reading;
mod recorder;

pub use prefetch::{Limits, Prefetch};
pub use reading::BootReading;
pub use recorder::{Recorder, RecordingExports};
