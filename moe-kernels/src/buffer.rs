//! Memory for packed operands: aligned to cache lines, and kept by each thread between calls, because fresh pages cost
//! more than the packing itself.

use std::cell::RefCell;

/// Words in one cache line.
const LINE: usize = 16;

#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; LINE]);

/// 32-bit words aligned to 64 bytes.
#[derive(Debug, Clone, Default)]
pub struct Words {
    lines: Vec<Line>,
    len: usize,
}

impl Words {
    /// `len` zero words.
    pub fn zeros(len: usize) -> Self {
        Self { lines: vec![Line([0; LINE]); len.div_ceil(LINE)], len }
    }

    /// Makes room for `len` words; their content is whatever was there before.
    fn resize(&mut self, len: usize) {
        let lines = len.div_ceil(LINE);
        if lines > self.lines.len() {
            self.lines.clear();
            self.lines.resize(lines, Line([0; LINE]));
        }
        self.len = len;
    }

    /// The words.
    pub fn as_slice(&self) -> &[u32] {
        // SAFETY: a line is 16 words without padding, and `len` words lie inside `lines`.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }

    /// The words.
    pub fn as_mut_slice(&mut self) -> &mut [u32] {
        // SAFETY: as in `as_slice`; the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }
}

/// Largest buffer a thread keeps, 256 MiB.
const KEEP_WORDS: usize = 64 << 20;

thread_local! {
    static SPARE: RefCell<Vec<Words>> = const { RefCell::new(Vec::new()) };
}

/// Calls `body` with `len` words of scratch memory whose content is not defined.
pub(crate) fn with_scratch<R>(len: usize, body: impl FnOnce(&mut [u32]) -> R) -> R {
    let mut words = SPARE.with_borrow_mut(Vec::pop).unwrap_or_default();
    words.resize(len);
    let result = body(words.as_mut_slice());
    if words.lines.len() * LINE <= KEEP_WORDS {
        SPARE.with_borrow_mut(|spare| spare.push(words));
    }
    result
}

/// The words as f32.
pub(crate) fn as_f32(words: &[u32]) -> &[f32] {
    // SAFETY: both are 4 bytes of the same alignment, and every bit pattern is an f32.
    unsafe { std::slice::from_raw_parts(words.as_ptr().cast(), words.len()) }
}

/// [`with_scratch`] as f32.
pub(crate) fn with_scratch_f32<R>(len: usize, body: impl FnOnce(&mut [f32]) -> R) -> R {
    with_scratch(len, |words| {
        // SAFETY: both are 4 bytes of the same alignment, and every bit pattern is an f32.
        body(unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), words.len()) })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_is_aligned_nests_and_has_the_asked_length() {
        with_scratch(5, |outer| {
            outer.fill(7);
            with_scratch(1000, |inner| {
                inner.fill(9);
                assert_eq!((inner.len(), inner.as_ptr() as usize % 64), (1000, 0));
            });
            assert_eq!(outer, [7; 5]);
        });
        with_scratch(0, |none| assert!(none.is_empty()));
    }
}
