//! Fields in the order of the wire, all big-endian.

use super::{MAX_STRING, Violation};

/// What has not been taken yet of one part.
pub(super) struct Fields<'a> {
    what: &'static str,
    length: usize,
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    pub(super) fn of(what: &'static str, bytes: &'a [u8]) -> Fields<'a> {
        Fields { what, length: bytes.len(), rest: bytes }
    }

    fn misfit(&self) -> Violation {
        Violation::Length { what: self.what, length: self.length as u64 }
    }

    pub(super) fn bytes(&mut self, length: usize) -> Result<&'a [u8], Violation> {
        let (taken, rest) = self.rest.split_at_checked(length).ok_or_else(|| self.misfit())?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Violation> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or_else(|| self.misfit())?;
        self.rest = rest;
        Ok(*taken)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Violation> {
        self.array().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Violation> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Violation> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string that has its length before it.
    pub(super) fn string(&mut self) -> Result<String, Violation> {
        let length = self.u32()?;
        let max = MAX_STRING as u64;
        let too_long = || Violation::TooLong { what: "a string", length: length.into(), max };
        let length = usize::try_from(length).ok().filter(|length| *length <= MAX_STRING).ok_or_else(too_long)?;
        let bytes = self.bytes(length)?;
        text(self.what, bytes)
    }

    /// A string that goes to the end.
    pub(super) fn last_string(&mut self) -> Result<String, Violation> {
        let bytes = std::mem::take(&mut self.rest);
        text(self.what, bytes)
    }

    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }

    /// All was taken.
    pub(super) fn end(&self) -> Result<(), Violation> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.misfit()) }
    }
}

fn text(what: &'static str, bytes: &[u8]) -> Result<String, Violation> {
    if bytes.len() > MAX_STRING {
        return Err(Violation::TooLong { what: "a string", length: bytes.len() as u64, max: MAX_STRING as u64 });
    }
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| Violation::NotText { what })
}

/// A message for people, from a peer: whatever it holds, it can be shown.
pub(super) fn message(bytes: &[u8]) -> String {
    let bytes = &bytes[..bytes.len().min(MAX_STRING)];
    let text = String::from_utf8_lossy(bytes);
    text.trim_end_matches(['\0', '\n']).chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Appends a string with its length before it. The caller has limited it.
pub(super) fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend(length32(text.len()).to_be_bytes());
    out.extend(text.as_bytes());
}

/// A length of something in memory that has been limited before. One that does not fit, which can't be, becomes a length
/// that every peer refuses.
pub(super) fn length32(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}
