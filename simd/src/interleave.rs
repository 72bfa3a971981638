//! The interleaved order of a matrix: eight rows side by side, so that rows stand in the lanes of a vector as they are read.
//!
//! The one idea: of eight rows, block b of each row is taken together, and every field of the block is dealt out in small
//! units, row after row: two bytes at a time for scales, four for weights. A byte comes to stand at
//!
//! ```text
//! 8·(place of its unit) + row·(bytes of a unit) + (byte within the unit)
//! ```
//!
//! so the size does not change, and 32 bytes hold four bytes of each of eight rows. The place of a unit is where it starts in
//! a row's block, but in Q6_K, whose units come in the order in which kernels read them: [`Format::place`]. Q4_0, of 18 bytes a
//! row and block:
//!
//! ```text
//! 0     d of rows 0..8           16 bytes
//! 16    bytes 2..6 of row 0 | bytes 2..6 of row 1 | ... | bytes 2..6 of row 7        32 bytes
//! 48    bytes 6..10 ...
//! ```
//!
//! One order serves every ISA. Formats with one scale a row have none: `channel.rs` reads them best as they lie in the file.

#![forbid(unsafe_code)]

use crate::Format;

/// Rows dealt out together.
pub const ROWS: usize = 8;

impl Format {
    /// Whether this format has an interleaved order.
    pub const fn interleaves(self) -> bool {
        !self.fields().is_empty()
    }

    /// Where byte `at` of a row's block is in the order in which units are stored: that of the file, but for Q6_K, in which kernels
    /// would jump about, and CPUs fetch memory ahead only where it is read in order. `d` comes first, then the scales, then of each
    /// half, for four weights at a time of each of its groups, the lower bits of groups 0 and 2, of 1 and 3, and the upper
    /// bits of all four.
    #[inline(always)]
    pub(crate) const fn place(self, at: usize) -> usize {
        match self {
            Format::Q6K if at < 128 => 18 + 96 * (at / 64) + 12 * (at % 32 / 4) + 4 * (at % 64 / 32) + at % 4,
            Format::Q6K if at < 192 => 18 + 96 * ((at - 128) / 32) + 12 * (at % 32 / 4) + 8 + at % 4,
            Format::Q6K if at < 208 => 2 + at - 192,
            Format::Q6K => at - 208,
            _ => at,
        }
    }

    /// The fields of a block: where each starts, and the bytes of a unit. A field ends where the next starts.
    const fn fields(self) -> &'static [(usize, usize)] {
        match self {
            Format::Q4_0 | Format::Q8_0 | Format::Iq4Nl => &[(0, 2), (2, 4)],
            Format::Q4K | Format::Q5K => &[(0, 2), (4, 4)],
            Format::Q6K => &[(0, 4), (192, 2)],
            Format::Tq2_0 => &[(0, 4), (64, 2)],
            _ => &[],
        }
    }

    /// Puts `rows`, which are [`ROWS`] rows in GGUF order, into interleaved order.
    ///
    /// # Panics
    /// If the format does not interleave, or if the slices are not eight rows of whole blocks, and equally long.
    pub fn interleave(self, rows: &[u8], out: &mut [u8]) {
        self.deal(rows, out, |row, dealt, rows, out| out[dealt..][..row.len()].copy_from_slice(&rows[row]));
    }

    /// The inverse of [`Format::interleave`].
    ///
    /// # Panics
    /// As [`Format::interleave`].
    pub fn deinterleave(self, interleaved: &[u8], out: &mut [u8]) {
        self.deal(interleaved, out, |row, dealt, interleaved, out| {
            let n = row.len();
            out[row].copy_from_slice(&interleaved[dealt..][..n]);
        });
    }

    /// Calls `unit` for every unit: its range in eight rows, and where it starts when interleaved.
    fn deal(self, from: &[u8], to: &mut [u8], unit: impl Fn(std::ops::Range<usize>, usize, &[u8], &mut [u8])) {
        let (block, name) = (self.block_bytes(), self.name());
        assert!(self.interleaves(), "{name}: has no interleaved order");
        assert!(from.len() == to.len(), "{name}: {} bytes into {}", from.len(), to.len());
        assert!(from.len().is_multiple_of(ROWS * block), "{name}: {} bytes: expected eight rows of blocks", from.len());
        let row_bytes = from.len() / ROWS;
        let fields = self.fields();
        for b in 0..row_bytes / block {
            for (f, &(start, size)) in fields.iter().enumerate() {
                let end = fields.get(f + 1).map_or(block, |next| next.0);
                for at in (start..end).step_by(size) {
                    for row in 0..ROWS {
                        let first = row * row_bytes + b * block + at;
                        unit(first..first + size, ROWS * (b * block + self.place(at)) + row * size, from, to);
                    }
                }
            }
        }
    }
}
