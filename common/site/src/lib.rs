//! Another site, as this one sees it: the one file that says where it is and who we are, the certificates in that, and a
//! connection to it.
//!
//! ```text
//! enrolment file → Enrolment → TLS → Line: message by message      (enrolment, pem, certificate, line)
//!                                    its certificate made anew       (renewal)
//! its restore points, and one's own, alike: reader, reading
//! ```
//!
//! Architecture invariant: a site has the authority, and the name, of its enrolment file, or nothing is said to it.

pub mod certificate;
mod enrolment;
mod error;
mod line;
pub mod pem;
mod reader;
mod reading;
mod renewal;

pub use enrolment::Enrolment;
pub use error::RemoteError;
pub use line::{Line, greet};
pub use reader::{Say, SiteReader};
pub use reading::{Reading, enrolment};
pub use renewal::renew;
