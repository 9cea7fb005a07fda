//! Fields in the order of the wire, all big-endian.

use super::Violation;

/// What has not been taken yet of one message.
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

    pub(super) fn array<const N: usize>(&mut self) -> Result<[u8; N], Violation> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or_else(|| self.misfit())?;
        self.rest = rest;
        Ok(*taken)
    }

    pub(super) fn u8(&mut self) -> Result<u8, Violation> {
        self.array().map(u8::from_be_bytes)
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

    /// How many there are of something, limited before memory is taken for them.
    pub(super) fn count(&mut self, what: &'static str, max: usize) -> Result<usize, Violation> {
        let count = self.u32()?;
        let fits = usize::try_from(count).ok().filter(|count| *count <= max);
        fits.ok_or(Violation::TooLong { what, length: count.into(), max: max as u64 })
    }

    /// Text with its length before it.
    pub(super) fn text(&mut self, what: &'static str, max: usize) -> Result<String, Violation> {
        let length = self.count(what, max)?;
        let bytes = self.bytes(length)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| Violation::NotText { what })
    }

    /// A line for people or a name: text that can't drive a terminal.
    pub(super) fn line(&mut self, what: &'static str, max: usize) -> Result<String, Violation> {
        let text = self.text(what, max)?;
        if text.chars().any(char::is_control) { Err(Violation::NotText { what }) } else { Ok(text) }
    }

    /// Something that may be missing: a byte that says so is before it.
    pub(super) fn option<T>(
        &mut self,
        what: &'static str,
        take: impl FnOnce(&mut Fields<'a>) -> Result<T, Violation>,
    ) -> Result<Option<T>, Violation> {
        match self.u8()? {
            0 => Ok(None),
            1 => take(self).map(Some),
            value => Err(Violation::Value { what, value: value.into() }),
        }
    }

    /// So many of the same.
    pub(super) fn list<T>(
        &mut self,
        what: &'static str,
        max: usize,
        mut take: impl FnMut(&mut Fields<'a>) -> Result<T, Violation>,
    ) -> Result<Vec<T>, Violation> {
        let count = self.count(what, max)?;
        // Not made as long as is claimed: each has to be there.
        let mut list = Vec::new();
        for _ in 0..count {
            list.push(take(self)?);
        }
        Ok(list)
    }

    /// All was taken.
    pub(super) fn end(&self) -> Result<(), Violation> {
        if self.rest.is_empty() { Ok(()) } else { Err(self.misfit()) }
    }
}

/// A length of something in memory that has been limited before. One that does not fit, which can't be, becomes a length
/// that every peer refuses.
pub(super) fn length32(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

/// A message in the making.
#[derive(Default)]
pub(super) struct Out(pub(super) Vec<u8>);

impl Out {
    pub(super) fn bytes(&mut self, bytes: &[u8]) -> &mut Out {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(super) fn u8(&mut self, value: u8) -> &mut Out {
        self.bytes(&[value])
    }

    pub(super) fn u16(&mut self, value: u16) -> &mut Out {
        self.bytes(&value.to_be_bytes())
    }

    pub(super) fn u32(&mut self, value: u32) -> &mut Out {
        self.bytes(&value.to_be_bytes())
    }

    pub(super) fn u64(&mut self, value: u64) -> &mut Out {
        self.bytes(&value.to_be_bytes())
    }

    pub(super) fn text(&mut self, text: &str) -> &mut Out {
        self.u32(length32(text.len())).bytes(text.as_bytes())
    }

    /// A line for people, cut to what a peer takes, without control characters.
    pub(super) fn line(&mut self, text: &str, max: usize) -> &mut Out {
        let mut line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let end = (0..=max.min(line.len())).rev().find(|&at| line.is_char_boundary(at)).unwrap_or(0);
        line.truncate(end);
        self.text(&line)
    }

    pub(super) fn option<T>(&mut self, value: Option<&T>, put: impl FnOnce(&mut Out, &T)) -> &mut Out {
        self.u8(value.is_some().into());
        if let Some(value) = value {
            put(self, value);
        }
        self
    }

    pub(super) fn list<T>(&mut self, values: &[T], mut put: impl FnMut(&mut Out, &T)) -> &mut Out {
        self.u32(length32(values.len()));
        for value in values {
            put(self, value);
        }
        self
    }
}
