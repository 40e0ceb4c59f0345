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

/// Calls `work` with the number of each block and the range of its elements, of `len` in all.
fn for_blocks(len: usize, width: usize, work: impl Fn(usize, Range<usize>) + Sync) {
    let block = block_len(width);
    parallel::for_each_if(len, LEAST_WORK, len.div_ceil(block), |task| {
        work(task, task * block..((task + 1) * block).min(len));
    });
}

/// What `norm` writes, given each block of the rows `x` and the place for its result.
pub(crate) fn forward(x: &[f32], width: usize, norm: impl Fn(&[f32], &mut [f32]) + Sync) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    let shared = SharedMut::new(&mut out);
    for_blocks(x.len(), width, |_, range| {
        // SAFETY: blocks do not overlap.
        let into = unsafe { shared.slice(range.start, range.len()) };
        norm(&x[range], into);
    });
    out
}

/// The gradient of the rows `x`, and that of the `num_params` parameters, which is summed over the blocks in their order.
///
/// `backward` gets a block of `x` and of `grad`, the place for the gradient of the rows, and zeros to sum the other in.
pub(crate) fn backward(
    x: &[f32],
    grad: &[f32],
    width: usize,
    num_params: usize,
    backward: impl Fn(&[f32], &[f32], &mut [f32], &mut [f32]) + Sync,
) -> (Vec<f32>, Vec<f32>) {
    let mut dx = vec![0.0; x.len()];
    let mut partial = vec![0.0; x.len().div_ceil(block_len(width)) * num_params];
    let (dx_shared, partial_shared) = (SharedMut::new(&mut dx), SharedMut::new(&mut partial));
    for_blocks(x.len(), width, |task, range| {
        // SAFETY: blocks do not overlap, and each has partial sums of its own.
        let (into, sums) =
            unsafe { (dx_shared.slice(range.start, range.len()), partial_shared.slice(task * num_params, num_params)) };
        backward(&x[range.clone()], &grad[range], into, sums);
    });
    let mut sums = vec![0.0; num_params];
    for part in partial.chunks_exact(num_params.max(1)) {
        sums.iter_mut().zip(part).for_each(|(sum, v)| *sum += v);
    }
    (dx, sums)
}
