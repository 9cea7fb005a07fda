//! The console of a guest that is watched: read all the time, kept only in memory, and no more of it than its end.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use zeroize::{Zeroize, Zeroizing};

/// As much as is kept of what the console showed: a few screens.
const KEPT: usize = 16 << 10;
/// Lines of it that are shown to people.
const LINES: usize = 15;
/// Longest line that is shown.
const WIDTH: usize = 200;
/// How long the rest of a console is waited for.
const DRAIN: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(5);

/// The end of what a console showed, and whether a text was in it.
struct Tail {
    /// Never moved by growing, so no copy of it is left behind.
    bytes: Zeroizing<Vec<u8>>,
    pattern: Option<Vec<u8>>,
    is_shown: bool,
}

impl Tail {
    fn new(pattern: Option<&str>) -> Tail {
        let bytes = Zeroizing::new(Vec::with_capacity(2 * KEPT));
        Tail { bytes, pattern: pattern.map(|text| text.as_bytes().to_vec()), is_shown: false }
    }

    /// Takes what came, which is no more than [`KEPT`].
    fn add(&mut self, more: &[u8]) {
        // The pattern may have begun in what came before.
        let before = self.pattern.as_ref().map_or(0, |pattern| pattern.len().saturating_sub(1));
        let from = self.bytes.len().saturating_sub(before);
        self.bytes.extend_from_slice(more);
        if let Some(pattern) = self.pattern.as_ref().filter(|_| !self.is_shown) {
            self.is_shown = self.bytes[from..].windows(pattern.len()).any(|window| window == pattern);
        }
        if let Some(over) = self.bytes.len().checked_sub(KEPT) {
            self.bytes.copy_within(over.., 0);
            self.bytes[KEPT..].zeroize();
            self.bytes.truncate(KEPT);
        }
    }

    /// Its last lines, which can't drive a terminal.
    fn lines(&self) -> Vec<String> {
        let text = String::from_utf8_lossy(&self.bytes);
        let plain = without_sequences(&text);
        let lines: Vec<&str> = plain.lines().map(str::trim_end).filter(|line| !line.is_empty()).collect();
        lines[lines.len().saturating_sub(LINES)..].iter().map(|line| escaped(line)).collect()
    }
}

/// Leaves out the sequences that move a cursor and choose colours.
fn without_sequences(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\u{1b}' if chars.next_if_eq(&'[').is_some() => {
                // Parameters, then one letter.
                while chars.next_if(|c| matches!(c, ' '..='?')).is_some() {}
                chars.next_if(|c| matches!(c, '@'..='~'));
            }
            '\r' => {}
            c => out.push(c),
        }
    }
    out
}

fn escaped(line: &str) -> String {
    let mut out = String::new();
    for c in line.chars().take(WIDTH) {
        match c.is_control() {
            true => out.extend(c.escape_default()),
            false => out.push(c),
        }
    }
    out
}

/// A console that is being read.
pub(super) struct Console {
    tail: Arc<Mutex<Tail>>,
    is_closed: Arc<AtomicBool>,
}

impl Console {
    /// Reads what comes from the console's socket, until that is closed.
    pub(super) fn watch(mut socket: UnixStream, pattern: Option<&str>) -> std::io::Result<Console> {
        let tail = Arc::new(Mutex::new(Tail::new(pattern)));
        let is_closed = Arc::new(AtomicBool::new(false));
        let (into, closed) = (tail.clone(), is_closed.clone());
        let read = move || {
            let mut buffer = Zeroizing::new([0; 4096]);
            loop {
                match socket.read(&mut *buffer) {
                    Ok(0) => break,
                    Ok(length) => into.lock().add(&buffer[..length]),
                    Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                    Err(_) => break,
                }
            }
            closed.store(true, Ordering::Release);
        };
        thread::Builder::new().name("console".into()).spawn(read)?;
        Ok(Console { tail, is_closed })
    }

    /// Whether the text was shown.
    pub(super) fn is_shown(&self) -> bool {
        self.tail.lock().is_shown
    }

    /// Waits, not for long, until nothing comes any more: QEMU has ended.
    pub(super) fn drain(&self) {
        let until = Instant::now() + DRAIN;
        while !self.is_closed.load(Ordering::Acquire) && Instant::now() < until {
            thread::sleep(PAUSE);
        }
    }

    /// Its last lines, for a terminal only: they are the guest's.
    pub(super) fn last_lines(&self) -> Vec<String> {
        self.tail.lock().lines()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_text_is_found_wherever_it_is_cut() {
        let whole = b"Debian GNU/Linux 12 guest ttyS0\n\nguest login: ";
        for at in 0..whole.len() {
            let mut tail = Tail::new(Some("login:"));
            tail.add(&whole[..at]);
            tail.add(&whole[at..]);
            assert!(tail.is_shown, "cut at {at}");
        }
        let mut tail = Tail::new(Some("login:"));
        whole.iter().for_each(|byte| tail.add(&[*byte]));
        assert!(tail.is_shown);
        let mut never = Tail::new(None);
        never.add(whole);
        assert!(!never.is_shown);
    }

    #[test]
    fn only_the_end_is_kept_and_what_was_shown_stays_shown() {
        let mut tail = Tail::new(Some("login:"));
        tail.add(b"login:");
        let place = tail.bytes.as_ptr();
        for _ in 0..1000 {
            tail.add(&[b'x'; 4096]);
        }
        assert!(tail.is_shown && tail.bytes.len() == KEPT && tail.bytes.as_ptr() == place);
        tail.add(b"\nlast");
        assert_eq!(tail.lines().last().unwrap(), "last");
    }

    #[test]
    fn lines_can_not_drive_a_terminal() {
        let mut tail = Tail::new(None);
        tail.add(b"\x1b[2J\x1b[0;32m  OK  \x1b[0m done\r\n\x1b]0;title\x07\n\n\xff\xc2\x9b1m\n");
        assert_eq!(tail.lines(), ["  OK   done", "\\u{1b}]0;title\\u{7}", "\u{fffd}\\u{9b}1m"]);
        tail.add("line\n".repeat(100).as_bytes());
        tail.add(&[b'y'; 1000]);
        let lines = tail.lines();
        assert_eq!((lines.len(), lines.last().unwrap().len()), (LINES, WIDTH));
    }

    #[test]
    fn a_socket_is_read_until_it_is_closed() {
        let (mut guest, ours) = UnixStream::pair().unwrap();
        let console = Console::watch(ours, Some("login:")).unwrap();
        guest.write_all(b"a login: ").unwrap();
        drop(guest);
        let began = Instant::now();
        while !console.is_closed.load(Ordering::Acquire) && began.elapsed() < Duration::from_secs(60) {
            console.drain();
        }
        assert!(console.is_shown());
        assert_eq!(console.last_lines(), ["a login:"]);
    }
}
