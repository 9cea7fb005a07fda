//! What the contexts say of an area, put together.

use reseal_proto::nbd::{Descriptor, state};

/// Consecutive, from the offset asked for; covers at least one byte, maybe less than asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    pub length: u64,
    /// The server says that it reads as zeros.
    pub zero: bool,
    /// The bitmap says that it was written to; true where no bitmap was asked for.
    pub dirty: bool,
}

/// An area that was asked about, rounded to what the server takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Area {
    /// What was asked for.
    pub(crate) offset: u64,
    pub(crate) length: u64,
    /// What is asked of the server.
    pub(crate) start: u64,
    pub(crate) asked: u32,
}

impl Area {
    /// `minimum` is a power of two and divides the export's size, in which the area lies.
    pub(crate) fn new(offset: u64, length: u64, minimum: u32) -> Area {
        let unit = u64::from(minimum);
        let start = offset - offset % unit;
        let end = (offset + length).next_multiple_of(unit);
        let most = u32::MAX - u32::MAX % minimum;
        let asked = u32::try_from(end - start).unwrap_or(most).min(most);
        Area { offset, length, start, asked }
    }

    /// Whether a context may say that; what is wrong otherwise.
    pub(crate) fn check(&self, descriptors: &[Descriptor], minimum: u32, size: u64) -> Result<(), &'static str> {
        let mut covered = 0;
        for descriptor in descriptors {
            if covered >= u64::from(self.asked) {
                return Err("extents beyond what was asked for");
            }
            if !descriptor.length.is_multiple_of(minimum) {
                return Err("an extent that is no multiple of its minimum block size");
            }
            covered += u64::from(descriptor.length);
        }
        match covered {
            0 => Err("no extent at all"),
            _ if covered > size - self.start => Err("extents beyond the end of the export"),
            _ => Ok(()),
        }
    }

    /// Extents of what was asked for, as far as both contexts go. Each has been checked.
    pub(crate) fn extents(&self, allocation: Option<&[Descriptor]>, dirty: Option<&[Descriptor]>) -> Vec<Extent> {
        let whole = [Descriptor { length: self.asked, flags: 0 }];
        let all_dirty = [Descriptor { length: self.asked, flags: state::DIRTY }];
        let mut allocation = Steps::new(allocation.unwrap_or(&whole));
        let mut dirty = Steps::new(dirty.unwrap_or(&all_dirty));
        let mut skip = self.offset - self.start;
        let mut left = self.length;
        let mut extents: Vec<Extent> = Vec::new();
        while let (Some((bytes, allocated)), Some((other, changed))) = (allocation.now(), dirty.now())
            && left > 0
        {
            let bytes = bytes.min(other);
            allocation.take(bytes);
            dirty.take(bytes);
            let skipped = u64::from(bytes).min(skip);
            skip -= skipped;
            let length = (u64::from(bytes) - skipped).min(left);
            left -= length;
            let (zero, dirty) = (allocated & state::ZERO != 0, changed & state::DIRTY != 0);
            match extents.last_mut() {
                _ if length == 0 => {}
                Some(last) if (last.zero, last.dirty) == (zero, dirty) => last.length += length,
                _ => extents.push(Extent { length, zero, dirty }),
            }
        }
        extents
    }
}

/// Walks through descriptors.
struct Steps<'a> {
    rest: std::slice::Iter<'a, Descriptor>,
    now: Option<Descriptor>,
}

impl<'a> Steps<'a> {
    fn new(descriptors: &'a [Descriptor]) -> Steps<'a> {
        let mut rest = descriptors.iter();
        let now = rest.next().copied();
        Steps { rest, now }
    }

    fn now(&self) -> Option<(u32, u32)> {
        self.now.map(|descriptor| (descriptor.length, descriptor.flags))
    }

    fn take(&mut self, bytes: u32) {
        if let Some(now) = &mut self.now {
            now.length -= bytes.min(now.length);
            if now.length == 0 {
                self.now = self.rest.next().copied();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(descriptors: &[(u32, u32)]) -> Vec<Descriptor> {
        descriptors.iter().map(|&(length, flags)| Descriptor { length, flags }).collect()
    }

    fn extent(length: u64, zero: bool, dirty: bool) -> Extent {
        Extent { length, zero, dirty }
    }

    #[test]
    fn contexts_of_different_steps_are_put_together() {
        let area = Area::new(0, 100, 1);
        let allocation = list(&[(40, 0), (30, state::HOLE | state::ZERO), (60, 0)]);
        let dirty = list(&[(50, 0), (50, state::DIRTY)]);
        let both = area.extents(Some(&allocation), Some(&dirty));
        let expected =
            [extent(40, false, false), extent(10, true, false), extent(20, true, true), extent(30, false, true)];
        assert_eq!(both, expected);
        assert_eq!(
            area.extents(Some(&allocation), None),
            [extent(40, false, true), extent(30, true, true), extent(30, false, true)]
        );
        assert_eq!(area.extents(None, None), [extent(100, false, true)]);
        // A hole that is not said to be zero is not.
        assert_eq!(area.extents(Some(&list(&[(100, state::HOLE)])), None), [extent(100, false, true)]);
    }

    #[test]
    fn the_shorter_context_decides_how_far_it_goes() {
        let area = Area::new(0, 100, 1);
        let extents = area.extents(Some(&list(&[(10, 0)])), Some(&list(&[(100, 0)])));
        assert_eq!(extents, [extent(10, false, false)]);
    }

    #[test]
    fn what_is_asked_is_rounded_and_what_is_answered_is_not() {
        let area = Area::new(1000, 100, 4096);
        assert_eq!((area.start, area.asked), (0, 4096));
        assert_eq!(area.extents(Some(&list(&[(4096, state::ZERO)])), None), [extent(100, true, true)]);
        let area = Area::new(8000, 1000, 4096);
        assert_eq!((area.start, area.asked), (4096, 8192));
        let extents = area.extents(Some(&list(&[(4096, 0), (4096, state::ZERO)])), None);
        assert_eq!(extents, [extent(192, false, true), extent(808, true, true)]);
        let area = Area::new(0, 1 << 40, 4096);
        assert_eq!(area.asked, u32::MAX - 4095);
    }

    #[test]
    fn lies_about_extents_are_seen() {
        let area = Area::new(8192, 8192, 4096);
        let check = |descriptors: &[(u32, u32)]| area.check(&list(descriptors), 4096, 20480);
        assert!(check(&[(4096, 0)]).is_ok() && check(&[(4096, 0), (8192, 0)]).is_ok());
        assert!(check(&[(8192, 0), (4096, 0)]).unwrap_err().contains("beyond what was asked"));
        assert!(check(&[(4096, 0), (12288, 0)]).unwrap_err().contains("beyond the end"));
        assert!(check(&[(512, 0)]).unwrap_err().contains("multiple"));
        assert!(check(&[]).unwrap_err().contains("no extent"));
    }
}
