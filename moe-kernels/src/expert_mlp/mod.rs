//! The experts of one layer for inference, on slices: routed rows in, weighted sums per token out.
//!
//! Weights are packed once. Idle experts cost nothing: their weights are never touched.

#[cfg(test)]
mod tests;

use crate::activation::apply_into;
use crate::buffer::with_scratch_f32;
use crate::permute::{gather_into, sum_choices};
use crate::stack::PackedStack;
pub use crate::stack::WeightFormat;
use crate::{Error, Isa, Result, parallel};
use moe_core::{Activation, DispatchTable};

/// Multiply-adds of a matrix from which on several threads are of use.
const LEAST_WORK: usize = 1 << 18;

/// Packed two-layer feed-forward experts.
#[derive(Debug)]
pub struct PackedExperts {
    fc_in: PackedStack,
    fc_out: PackedStack,
    /// `[num_experts, d_model, d_ff]`
    sizes: [usize; 3],
    activation: Activation,
    isa: Isa,
}

impl PackedExperts {
    /// Experts whose weights `weights(expert)` gives one at a time: `fc_in` `[d_ff * activation.inputs(), d_model]`, gate
    /// before up for SwiGLU, and `fc_out` `[d_model, d_ff]`, row-major.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is no expert or a matrix has another size, or this machine cannot run `isa`.
    pub fn new(
        isa: Isa,
        format: impl Into<WeightFormat>,
        activation: Activation,
        [num_experts, d_model, d_ff]: [usize; 3],
        mut weights: impl FnMut(usize) -> [Vec<f32>; 2],
    ) -> Result<Self> {
        if num_experts == 0 || d_model == 0 || d_ff == 0 {
            return Err(Error::Argument(format!(
                "num_experts, d_model and d_ff must be at least 1, got {num_experts}, {d_model}, {d_ff}"
            )));
        }
        if !isa.is_available() {
            return Err(Error::Argument(format!(
                "this machine cannot run {isa} kernels; choose one of Isa::available()"
            )));
        }
        let format = format.into();
        let (fc_in, fc_out) = (PackedStack::new(format), PackedStack::new(format));
        let mut packed = Self { fc_in, fc_out, sizes: [num_experts, d_model, d_ff], activation, isa };
        let width = d_ff * activation.inputs();
        for expert in 0..num_experts {
            let [fc_in, fc_out] = weights(expert);
            if fc_in.len() != width * d_model || fc_out.len() != d_model * d_ff {
                return Err(Error::Argument(format!(
                    "expert {expert} needs {} and {} weights, got {} and {}",
                    width * d_model,
                    d_model * d_ff,
                    fc_in.len(),
                    fc_out.len()
                )));
            }
            packed.fc_in.push(isa, &fc_in, [width, d_model])?;
            packed.fc_out.push(isa, &fc_out, [d_model, d_ff])?;
        }
        Ok(packed)
    }

    /// Bytes of one expert's weights.
    pub fn expert_bytes(&self) -> usize {
        (self.fc_in.bytes() + self.fc_out.bytes()) / self.sizes[0]
    }

    /// Sends each token through its experts.
    ///
    /// # Shapes
    /// `tokens` `[tokens, d_model]`, `combine_weights` `[tokens, top_k]`; returns `[tokens, d_model]`
    ///
    /// # Errors
    /// [`Error::Argument`] if a size does not fit `table`.
    pub fn forward(&self, tokens: &[f32], table: &DispatchTable, combine_weights: &[f32]) -> Result<Vec<f32>> {
        let [num_experts, d_model, d_ff] = self.sizes;
        let fits = tokens.len() == table.num_tokens * d_model
            && combine_weights.len() == table.num_tokens * table.top_k
            && table.expert_offsets.len() == num_experts + 1;
        if !fits {
            return Err(Error::Argument(format!(
                "a table of {} tokens, top {} and {} experts does not fit {} values of width {d_model}, {} weights and {} experts",
                table.num_tokens,
                table.top_k,
                table.expert_offsets.len() - 1,
                tokens.len(),
                combine_weights.len(),
                num_experts
            )));
        }
        let (num_rows, width) = (table.num_rows(), d_ff * self.activation.inputs());
        // Fresh pages for these would cost as much as the products of a few hundred tokens: they are kept from call to call.
        let run = || {
            with_scratch_f32(num_rows * d_model, |rows| {
                gather_into(tokens, d_model, table, rows);
                with_scratch_f32(num_rows * d_ff, |inner| {
                    with_scratch_f32(num_rows * width, |hidden| {
                        self.fc_in.product(self.isa, rows, None, &table.expert_offsets, hidden);
                        apply_into(self.isa, self.activation, hidden, width, inner);
                    });
                    self.fc_out.product(self.isa, inner, None, &table.expert_offsets, rows);
                });
                sum_choices(self.isa, rows, Some(combine_weights), table, d_model)
            })
        };
        // Small layers are one product and the next before a second thread has woken up.
        Ok(if num_rows * d_model * d_ff >= LEAST_WORK { parallel::together(run) } else { run() })
    }
}

/// Weights of packed experts of [`experts`], borrowed.
#[derive(Clone, Copy)]
pub(crate) struct BorrowedMlp<'a> {
    /// `[d_ff * inputs, d_model]` each, at least one.
    pub(crate) fc_in: &'a PackedStack,
    /// `[experts, d_ff * inputs]`
    pub(crate) fc_in_bias: Option<&'a [f32]>,
    /// `[d_model, d_ff]` each.
    pub(crate) fc_out: &'a PackedStack,
    /// `[experts, d_model]`
    pub(crate) fc_out_bias: Option<&'a [f32]>,
}

/// The two linear maps of each expert over its rows, with the activation between them; sizes have been checked.
pub(crate) fn experts(
    isa: Isa,
    rows: &[f32],
    mlp: BorrowedMlp<'_>,
    activation: Activation,
    offsets: &[usize],
) -> Vec<f32> {
    let [[width, d_model], [_, d_ff]] = [mlp.fc_in, mlp.fc_out].map(|m| m.shape().unwrap_or([0; 2]));
    let num_rows = offsets[offsets.len() - 1];
    let run = || {
        with_scratch_f32(num_rows * d_ff, |inner| {
            with_scratch_f32(num_rows * width, |hidden| {
                mlp.fc_in.product(isa, rows, mlp.fc_in_bias, offsets, hidden);
                apply_into(isa, activation, hidden, width, inner);
            });
            mlp.fc_out.product_new(isa, inner, mlp.fc_out_bias, offsets, num_rows * d_model)
        })
    };
    if num_rows * d_model * d_ff >= LEAST_WORK { parallel::together(run) } else { run() }
}
