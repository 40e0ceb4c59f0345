//! How the norms share their rows out: blocks of rows are tasks, and each task writes a block of its own.
//!
//! The blocks follow from the shape alone, so that sums over them do not depend on the number of threads. Knows no norm.

use crate::parallel::{self, SharedMut};
use std::ops::Range;

/// Rows per task, and per partial sum of the gradients of the parameters.
const TASK_ROWS: usize = 64;
/// Elements below which a second thread is not worth waking.
const LEAST_WORK: usize = 1 << 15;

/// Elements of a block of rows; at least one, so that rows without columns make no blocks.
fn block_len(width: usize) -> usize {
    (TASK_ROWS * width).max(1)
}

/// What `norm` writes, given the range of each block of rows, of `len` elements in all, and the place for its result, zeroed.
pub(crate) fn for_blocks(len: usize, width: usize, norm: impl Fn(Range<usize>, &mut [f32]) + Sync) -> Vec<f32> {
    parallel::filled(len, block_len(width), LEAST_WORK, norm)
}

/// The gradient of rows of `len` elements in all, and that of the `num_params` parameters, which is summed over the blocks in their order.
///
/// `backward` gets the range of a block, the place for the gradient of its rows, and zeros to sum the other in.
pub(crate) fn backward(
    len: usize,
    width: usize,
    num_params: usize,
    backward: impl Fn(Range<usize>, &mut [f32], &mut [f32]) + Sync,
) -> (Vec<f32>, Vec<f32>) {
    let mut partial = vec![0.0; len.div_ceil(block_len(width)) * num_params];
    let shared = SharedMut::new(&mut partial);
    let dx = for_blocks(len, width, |range, into| {
        // SAFETY: each block has partial sums of its own.
        let sums = unsafe { shared.slice(range.start / block_len(width) * num_params, num_params) };
        backward(range, into, sums);
    });
    let mut sums = vec![0.0; num_params];
    for part in partial.chunks_exact(num_params.max(1)) {
        sums.iter_mut().zip(part).for_each(|(sum, v)| *sum += v);
    }
    (dx, sums)
}
