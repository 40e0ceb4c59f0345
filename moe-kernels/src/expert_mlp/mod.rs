//! The experts of one layer for inference, on slices: routed rows in, weighted sums per token out.
//!
//! Weights are packed once. Idle experts cost nothing: their weights are never touched.

#[cfg(test)]
mod tests;

use crate::activation::apply_into;
use crate::buffer::with_scratch_f32;
use crate::gemm::{Group, Operand, PackedWeights, Start, Weights, gemm};
use crate::permute::{gather_into, sum_choices};
use crate::{Error, Isa, Precision, Result};
use moe_core::{Activation, DispatchTable};

/// Packed two-layer feed-forward experts.
#[derive(Debug)]
pub struct PackedExperts {
    fc_in: Vec<PackedWeights>,
    fc_out: Vec<PackedWeights>,
    activation: Activation,
    isa: Isa,
    precision: Precision,
}

impl PackedExperts {
    /// Experts whose weights `weights(expert)` gives one at a time: `fc_in` `[d_ff * activation.inputs(), d_model]`, gate
    /// before up for SwiGLU, and `fc_out` `[d_model, d_ff]`, row-major.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is no expert or a matrix has another size, or this machine cannot run `isa`.
    pub fn new(
        isa: Isa,
        precision: Precision,
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
        let mut packed = Self { fc_in: Vec::new(), fc_out: Vec::new(), activation, isa, precision };
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
            let pack = |values: &[f32], out, inner| {
                PackedWeights::new(isa, precision, &Operand::rows(values, out, inner, inner))
            };
            packed.fc_in.push(pack(&fc_in, width, d_model));
            packed.fc_out.push(pack(&fc_out, d_model, d_ff));
        }
        Ok(packed)
    }

    /// Bytes of one expert's weights.
    pub fn expert_bytes(&self) -> usize {
        self.fc_in[0].bytes() + self.fc_out[0].bytes()
    }

    /// Sends each token through its experts.
    ///
    /// # Shapes
    /// `tokens` `[tokens, d_model]`, `combine_weights` `[tokens, top_k]`; returns `[tokens, d_model]`
    ///
    /// # Errors
    /// [`Error::Argument`] if a size does not fit `table`.
    pub fn forward(&self, tokens: &[f32], table: &DispatchTable, combine_weights: &[f32]) -> Result<Vec<f32>> {
        let [width, d_model] = self.fc_in[0].shape();
        let fits = tokens.len() == table.num_tokens * d_model
            && combine_weights.len() == table.num_tokens * table.top_k
            && table.expert_offsets.len() == self.fc_in.len() + 1;
        if !fits {
            return Err(Error::Argument(format!(
                "a table of {} tokens, top {} and {} experts does not fit {} values of width {d_model}, {} weights and {} experts",
                table.num_tokens,
                table.top_k,
                table.expert_offsets.len() - 1,
                tokens.len(),
                combine_weights.len(),
                self.fc_in.len()
            )));
        }
        let (num_rows, d_ff) = (table.num_rows(), width / self.activation.inputs());
        // Fresh pages for these would cost as much as the products of a few hundred tokens: they are kept from call to call.
        Ok(with_scratch_f32(num_rows * d_model, |rows| {
            gather_into(tokens, d_model, table, rows);
            with_scratch_f32(num_rows * d_ff, |inner| {
                with_scratch_f32(num_rows * width, |hidden| {
                    self.product(rows, &self.fc_in, &table.expert_offsets, hidden);
                    apply_into(self.isa, self.activation, hidden, width, inner);
                });
                self.product(inner, &self.fc_out, &table.expert_offsets, rows);
            });
            sum_choices(self.isa, rows, Some(combine_weights), table, d_model)
        }))
    }

    /// Each expert's rows times its matrix, into `out`.
    fn product(&self, rows: &[f32], weights: &[PackedWeights], offsets: &[usize], out: &mut [f32]) {
        let [width, inner] = weights[0].shape();
        let groups: Vec<Group<'_>> = (offsets.windows(2).zip(weights))
            .filter(|(pair, _)| pair[1] > pair[0])
            .map(|(pair, packed)| Group {
                a: Operand::rows(&rows[pair[0] * inner..pair[1] * inner], pair[1] - pair[0], inner, inner),
                b: Weights::Packed(packed),
                start: Start::Zero,
                out_offset: pair[0] * width,
                out_stride: width,
            })
            .collect();
        gemm(self.isa, self.precision, &groups, out);
    }
}
