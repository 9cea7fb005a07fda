//! Memory that held a disk's plaintext is overwritten before it is given back.

/// Overwrites with zeros in a way that the compiler may not leave out.
pub fn wipe(bytes: &mut [u8]) {
    // `zeroize` writes byte by byte; this runs for every frame that leaves the cache, so it must cost next to nothing.
    // SAFETY: the pointer and the length are those of one exclusively borrowed slice.
    unsafe { libc::explicit_bzero(bytes.as_mut_ptr().cast(), bytes.len()) }
}

/// Bytes that are wiped when they are dropped.
pub struct Secret(pub Vec<u8>);

impl Drop for Secret {
    fn drop(&mut self) {
        wipe(&mut self.0);
    }
}

/// A buffer that is reused and wiped at its end.
#[derive(Default)]
pub struct Buffer(Vec<u8>);

impl Buffer {
    /// An empty buffer with room for so many bytes.
    pub fn with_capacity(bytes: usize) -> Buffer {
        Buffer(Vec::with_capacity(bytes))
    }

    /// The first `length` bytes; what is in them is left from before.
    pub fn take(&mut self, length: usize) -> &mut [u8] {
        if self.0.len() < length {
            // Grown anew, not moved: a move would leave plaintext behind.
            wipe(&mut self.0);
            self.0 = vec![0; length];
        }
        &mut self.0[..length]
    }

    /// The buffer as a vector, for a reader that sets the length itself.
    pub fn vector(&mut self) -> &mut Vec<u8> {
        &mut self.0
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let whole = self.0.capacity();
        self.0.resize(whole, 0);
        wipe(&mut self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_keeps_its_bytes_until_it_grows() {
        let mut buffer = Buffer::default();
        buffer.take(4).copy_from_slice(b"abcd");
        assert_eq!(buffer.take(3), b"abc");
        assert_eq!(buffer.take(8), [0; 8]);
        wipe(buffer.take(8));
    }
}
