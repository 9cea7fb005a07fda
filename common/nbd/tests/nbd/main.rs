//! The NBD client against real servers, over TLS, and against servers that lie; and the server the other way round.

#![allow(clippy::unwrap_used)] // helpers of tests end where they meet what they did not expect

mod hostile_client;
mod lying;
mod reading;
mod real;
mod served;
mod server;
mod serving;
mod tls;
mod writing;
