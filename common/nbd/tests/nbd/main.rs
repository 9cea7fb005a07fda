//! The NBD client against real servers, over TLS, and against servers that lie.

#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

mod lying;
mod reading;
mod real;
mod server;
mod tls;
