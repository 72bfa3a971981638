//! Buffers that begin where a cache line begins.
//!
//! The one idea: a vector as long as half a line or a whole one that begins anywhere often lies in two lines, and to load it
//! counts twice. So activations, which are loaded again for every row of weights, begin with a line, and rows of them do where
//! their lengths are multiples of it.

use std::ops::{Deref, DerefMut};

/// A cache line of x86-64 and of most ARM CPUs.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([i8; 64]);

/// Bytes from the beginning of a line on. There can only be more of them; new ones are zero.
#[derive(Default)]
pub(crate) struct Aligned {
    lines: Vec<Line>,
    len: usize,
}

impl Aligned {
    /// None yet.
    pub const fn new() -> Aligned {
        Aligned { lines: Vec::new(), len: 0 }
    }

    /// Makes them at least so many.
    pub fn grow(&mut self, len: usize) {
        if len > self.len {
            self.lines.resize(len.div_ceil(size_of::<Line>()), Line([0; 64]));
            self.len = len;
        }
    }
}

impl Deref for Aligned {
    type Target = [i8];

    fn deref(&self) -> &[i8] {
        // SAFETY: lines are arrays of bytes, side by side, and together hold at least `len`.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [i8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn begins_with_a_line_and_keeps_what_it_holds() {
        let mut bytes = Aligned::new();
        assert!(bytes.is_empty());
        for len in [3, 2, 64, 65, 1000] {
            bytes.grow(len);
            assert_eq!((bytes.len(), bytes.as_ptr().addr() % 64), (len.max(3), 0));
            bytes[2] -= 1;
            assert!(bytes.iter().enumerate().all(|(i, &byte)| byte == 0 || i == 2));
        }
        assert_eq!(bytes[2], -5);
    }
}
