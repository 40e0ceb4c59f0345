//! [`Ahead`]: the part of an operand that a task will pack next, fetched into the second-level cache while it multiplies. Packing
//! reads rows far apart, which no hardware foresees; without this the multipliers wait for memory at every part of B.

use super::Weights;

/// Equal runs of bytes at equal distances, gone through line by line.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ahead {
    start: *const u8,
    runs: usize,
    run_bytes: usize,
    stride_bytes: usize,
    /// The next line: its run, and its place in the run.
    run: usize,
    byte: usize,
}

/// Bytes of a line.
const LINE: usize = 64;

impl Ahead {
    /// Nothing.
    pub(super) const NONE: Self =
        Self { start: std::ptr::null(), runs: 0, run_bytes: 0, stride_bytes: 0, run: 0, byte: 0 };

    /// Columns of C `first..first + cols` of weights that are packed where they are multiplied.
    pub(super) fn of(weights: &Weights<'_>, (first, cols): (usize, usize)) -> Self {
        let (start, outer, [outer_stride, inner_stride], inner, element) = match weights {
            Weights::Plain(w) => {
                (w.values.as_ptr().cast::<u8>(), w.outer, [w.outer_stride, w.inner_stride], w.inner, size_of::<f32>())
            }
            Weights::Rounded(w) => {
                let (values, strides) = w.layout();
                (values.as_ptr().cast(), w.outer, strides, w.inner, size_of::<u16>())
            }
            Weights::Packed(_) => return Self::NONE,
        };
        let cols = cols.min(outer.saturating_sub(first));
        let (runs, run, stride) =
            if inner_stride == 1 { (cols, inner, outer_stride) } else { (inner, cols, inner_stride) };
        let start = start.wrapping_add(first * outer_stride * element);
        Self { start, runs, run_bytes: run * element, stride_bytes: stride * element, run: 0, byte: 0 }
    }

    /// Lines in all.
    pub(super) fn lines(&self) -> usize {
        self.runs * self.run_bytes.div_ceil(LINE)
    }

    /// Fetches the next `lines`, as far as there are any.
    pub(super) fn fetch(&mut self, lines: usize) {
        for line in self.take(lines) {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a prefetch reads nothing; it may point anywhere.
            unsafe {
                std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(line.cast());
            }
            #[cfg(not(target_arch = "x86_64"))]
            let _ = line;
        }
    }
}

/// The lines that are left.
impl Iterator for &mut Ahead {
    type Item = *const u8;

    fn next(&mut self) -> Option<*const u8> {
        if self.run >= self.runs || self.run_bytes == 0 {
            return None;
        }
        let line = self.start.wrapping_add(self.run * self.stride_bytes + self.byte);
        self.byte += LINE;
        if self.byte >= self.run_bytes {
            (self.run, self.byte) = (self.run + 1, 0);
        }
        Some(line)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Operand, Rounded};
    use super::*;

    /// Offsets in bytes of all lines, taken a few at a time.
    fn offsets(weights: &Weights<'_>, of: (usize, usize), start: *const u8) -> Vec<usize> {
        let mut ahead = Ahead::of(weights, of);
        let mut all = Vec::new();
        while all.len() < ahead.lines() {
            all.extend(ahead.take(3).map(|line| line.addr() - start.addr()));
        }
        assert_eq!((&mut ahead).next(), None);
        all
    }

    /// Two columns of C of a `[5, 40]` operand in either orientation, and what lies past its end left out.
    #[test]
    fn every_line_of_a_part_is_fetched_once() {
        let values = [0.0f32; 200];
        let start = values.as_ptr().cast();
        // Rows of 160 bytes, three lines each; steps of 20 bytes, two values of each.
        let rows = Operand::rows(&values, 5, 40, 40).into();
        assert_eq!(offsets(&rows, (1, 2), start), [160, 224, 288, 320, 384, 448]);
        assert_eq!(offsets(&rows, (4, 32), start), [640, 704, 768]);
        let columns = Operand::columns(&values, 5, 40, 5).into();
        assert_eq!(offsets(&columns, (1, 2), start), (0..40).map(|p| p * 20 + 4).collect::<Vec<_>>());
        let bits = [0u16; 200];
        let rounded = Rounded::rows(&bits, 5, 40).into();
        assert_eq!(offsets(&rounded, (3, 1), bits.as_ptr().cast()), [240, 304]);
        assert_eq!(Ahead::NONE.lines(), 0);
    }
}
