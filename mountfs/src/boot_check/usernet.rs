//! Reads what QEMU says of the connections of a guest behind its own address translation.
//!
//! ```text
//! Hub -1 (net0):
//!   Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
//!   TCP[ESTABLISHED]   14       127.0.0.1 43210       10.0.2.15    22     0     0
//!   TCP[HOST_FORWARD]  12       127.0.0.1 40001       10.0.2.15    22     0     0
//! ```

/// A connection, or a port that is forwarded.
struct Row<'a> {
    state: &'a str,
    source: u16,
    destination: u16,
}

fn rows(said: &str) -> impl Iterator<Item = Row<'_>> {
    said.lines().filter_map(|line| {
        let mut words = line.split_whitespace();
        let state = words.next()?.strip_prefix("TCP[")?.strip_suffix(']')?;
        // The descriptor, and the address.
        let source = words.nth(2)?.parse().ok()?;
        let destination = words.nth(1)?.parse().ok()?;
        Some(Row { state, source, destination })
    })
}

/// The port of this machine that leads to the guest's.
pub(super) fn forwarded(said: &str, guest: u16) -> Option<u16> {
    rows(said).find(|row| row.state == "HOST_FORWARD" && row.destination == guest).map(|row| row.source)
}

/// Whether the guest has taken a connection at that port.
pub(super) fn is_taken(said: &str, guest: u16) -> bool {
    rows(said).any(|row| row.state == "ESTABLISHED" && row.destination == guest)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAID: &str = "Hub -1 (net0):\r\n  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ\r\n  \
                        TCP[SYN_SENT]      14       127.0.0.1 43210       10.0.2.15    22     0     0\r\n  \
                        TCP[HOST_FORWARD]  12       127.0.0.1 40001       10.0.2.15    22     0     0\r\n  \
                        UDP[236 sec]       15       10.0.2.15    68        10.0.2.2    67     0     0\r\n";

    #[test]
    fn only_a_connection_that_the_guest_has_taken_counts() {
        assert_eq!(forwarded(SAID, 22), Some(40_001));
        assert_eq!(forwarded(SAID, 23), None);
        assert!(!is_taken(SAID, 22));
        let taken = SAID.replace("SYN_SENT", "ESTABLISHED");
        assert!(is_taken(&taken, 22) && !is_taken(&taken, 43_210) && !is_taken(&taken, 23));
        for at in 0..taken.len() {
            let _ = (is_taken(&taken[..at], 22), forwarded(&taken[at..], 22));
        }
    }
}
