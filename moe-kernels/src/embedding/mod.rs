//! Embedding lookup with a gradient that needs no atomics: tokens are sorted by id, and each row of the gradient is
//! summed by one thread, in token order.

#[cfg(test)]
mod tests;

use crate::custom::{self, Input, SliceOp, Target};
use crate::parallel::SharedMut;
use crate::select::vectorize;
use crate::{Error, Isa, Result, parallel, select};
use candle_core::Tensor;

/// The rows of `weight` that `ids` name.
///
/// # Shapes
/// `weight` `[vocab_size, d_model]`, f32 on the CPU, `ids` `[tokens]`; returns `[tokens, d_model]`
///
/// # Errors
/// [`Error::Argument`] if an id is outside the vocabulary.
pub fn embedding(weight: &Tensor, ids: &[u32]) -> Result<Tensor> {
    let (vocab, _) = weight.dims2()?;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
        return Err(Error::Argument(format!("id {id} is outside the vocabulary of {vocab}")));
    }
    custom::apply(Embedding { ids: ids.to_vec(), isa: select::current() }, &[weight])
}

/// Rows moved by one task.
const TASK_ROWS: usize = 64;
/// Rows of the gradient in one task.
const TASK_VOCAB: usize = 256;
/// Elements below which a second thread is not worth waking.
const LEAST_WORK: usize = 1 << 16;

struct Embedding {
    ids: Vec<u32>,
    isa: Isa,
}

/// Tokens by id, and by position among equal ids.
struct TokensById {
    /// First token of each id in `tokens`, and their number: `[vocab + 1]`.
    offsets: Vec<u32>,
    tokens: Vec<u32>,
}

impl TokensById {
    /// A counting sort.
    fn new(ids: &[u32], vocab: usize) -> Self {
        let mut offsets = vec![0u32; vocab + 1];
        for &id in ids {
            offsets[id as usize + 1] += 1;
        }
        for id in 0..vocab {
            offsets[id + 1] += offsets[id];
        }
        let mut next = offsets.clone();
        let mut tokens = vec![0; ids.len()];
        for (token, &id) in ids.iter().enumerate() {
            tokens[next[id as usize] as usize] = token as u32;
            next[id as usize] += 1;
        }
        Self { offsets, tokens }
    }

    fn of(&self, id: usize) -> &[u32] {
        &self.tokens[self.offsets[id] as usize..self.offsets[id + 1] as usize]
    }
}

impl Embedding {
    fn rows(&self, weight: &[f32], width: usize) -> Vec<f32> {
        parallel::filled(self.ids.len() * width, TASK_ROWS * width, LEAST_WORK, |range, rows| {
            for (into, &id) in rows.chunks_exact_mut(width).zip(&self.ids[range.start / width..]) {
                into.copy_from_slice(&weight[id as usize * width..][..width]);
            }
        })
    }

    /// Adds the gradient of the weight: each row's is finished before it is added to what is there.
    fn add_gradient(&self, grad: &[f32], vocab: usize, width: usize, sums: &mut [f32]) {
        let sorted = TokensById::new(&self.ids, vocab);
        let shared = SharedMut::new(sums);
        parallel::for_each_if(grad.len(), LEAST_WORK, vocab.div_ceil(TASK_VOCAB), |task| {
            let mut row = vec![0.0; width];
            let add = |sums: &mut [f32], terms: &[f32]| {
                vectorize!(self.isa, (sums: &mut [f32], terms: &[f32]) {
                    sums.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
                });
            };
            for id in task * TASK_VOCAB..((task + 1) * TASK_VOCAB).min(vocab) {
                let Some((&first, rest)) = sorted.of(id).split_first() else { continue };
                let of = |token: u32| &grad[token as usize * width..][..width];
                row.copy_from_slice(of(first));
                rest.iter().for_each(|&token| add(&mut row, of(token)));
                // SAFETY: each row belongs to one task.
                add(unsafe { shared.slice(id * width, width) }, &row);
            }
        });
    }
}

impl SliceOp for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn needs_inputs(&self) -> bool {
        false
    }

    fn forward(&self, inputs: &[Input<'_>]) -> (Vec<f32>, Vec<usize>) {
        let width = inputs[0].width();
        (self.rows(inputs[0].values, width), vec![self.ids.len(), width])
    }

    fn backward(&self, inputs: &[Input<'_>], _: &[f32], grad: &[f32], to: &mut [Target]) -> Result<()> {
        let (vocab, width) = (inputs[0].rows(), inputs[0].width());
        to[0].add_to(vocab * width, |sums| self.add_gradient(grad, vocab, width, sums));
        Ok(())
    }
}
