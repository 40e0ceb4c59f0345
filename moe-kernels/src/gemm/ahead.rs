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
        let (start, sizes, strides, inner, element) = match weights {
            Weights::Plain(w) => {
                (w.values.as_ptr().cast::<u8>(), w.outer, [w.outer_stride, w.inner_stride], w.inner, 4)
            }
            Weights::Rounded(w) => {
                let (values, strides) = w.layout();
                (values.as_ptr().cast(), w.outer, strides, w.inner, 2)
            }
            Weights::Packed(_) => return Self::NONE,
        };
        let cols = cols.min(sizes.saturating_sub(first));
        let (runs, run, stride) = if strides[1] == 1 { (cols, inner, strides[0]) } else { (inner, cols, strides[1]) };
        let start = start.wrapping_add(first * strides[0] * element);
        Self { start, runs, run_bytes: run * element, stride_bytes: stride * element, run: 0, byte: 0 }
    }

    /// Lines in all.
    pub(super) fn lines(&self) -> usize {
        self.runs * self.run_bytes.div_ceil(LINE)
    }

    /// Fetches the next `lines`, as far as there are any.
    pub(super) fn fetch(&mut self, lines: usize) {
        for _ in 0..lines {
            if self.run >= self.runs {
                return;
            }
            let at = self.start.wrapping_add(self.run * self.stride_bytes + self.byte);
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a prefetch reads nothing; it may point anywhere.
            unsafe {
                std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(at.cast());
            }
            #[cfg(not(target_arch = "x86_64"))]
            let _ = at;
            self.byte += LINE;
            if self.byte >= self.run_bytes {
                (self.run, self.byte) = (self.run + 1, 0);
            }
        }
    }
}
