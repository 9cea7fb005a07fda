//! Ports for servers.
#![allow(unreachable_pub, reason = "in the crate of tests it is reached")]

use std::net::TcpListener;
use std::sync::atomic::{AtomicU16, Ordering};

/// A port that nobody listens at, from 20,000 to 29,999: the system gives these to nobody who asks for any, so it stays free until the server
/// that it is for listens, and while that is stopped. Programs that run at the same time mostly get others.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = u16::try_from(std::process::id() % 200).unwrap() * 50;
    let mut ports = std::iter::repeat_with(|| 20_000 + (first + NEXT.fetch_add(1, Ordering::Relaxed)) % 10_000);
    ports.find(|&port| TcpListener::bind(("127.0.0.1", port)).is_ok()).unwrap()
}
