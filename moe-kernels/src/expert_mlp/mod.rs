//! The experts of one layer for inference, on slices: routed rows in, weighted sums per token out.
//!
//! Weights are packed once. Idle experts cost nothing: their weights are never touched.

#[cfg(test)]
mod tests;

use crate::activation::apply_into;
use crate::buffer::with_scratch_f32;
use crate::gemm::{Group, Operand, PackedWeights, Start, Weights, gemm, gemm_new};
use crate::grouped_linear::packed_groups;
use crate::permute::{gather_into, sum_choices};
use crate::quantized::{QuantFormat, QuantGroup, QuantizedWeights, quantized_gemm};
use crate::{Error, Isa, Precision, Result, parallel};
use moe_core::{Activation, DispatchTable};

/// Multiply-adds of a matrix from which on several threads are of use.
const LEAST_WORK: usize = 1 << 18;

/// How weights that never change are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightFormat {
    /// As numbers of this precision; the products' inputs have it too.
    Float(Precision),
    /// As integers; the products' inputs are quantized to 8 bits on the way.
    Quantized(QuantFormat),
}

impl From<Precision> for WeightFormat {
    fn from(precision: Precision) -> Self {
        Self::Float(precision)
    }
}

impl From<QuantFormat> for WeightFormat {
    fn from(format: QuantFormat) -> Self {
        Self::Quantized(format)
    }
}

/// One matrix per expert.
#[derive(Debug)]
enum Matrices {
    Float(Precision, Vec<PackedWeights>),
    Quantized(Vec<QuantizedWeights>),
}

impl Matrices {
    fn new(format: WeightFormat) -> Self {
        match format {
            WeightFormat::Float(precision) => Self::Float(precision, Vec::new()),
            WeightFormat::Quantized(_) => Self::Quantized(Vec::new()),
        }
    }

    fn push(&mut self, isa: Isa, format: WeightFormat, values: &[f32], [out, inner]: [usize; 2]) -> Result<()> {
        match (self, format) {
            (Self::Quantized(all), WeightFormat::Quantized(format)) => {
                all.push(QuantizedWeights::new(format, values, [out, inner])?);
            }
            (Self::Float(precision, all), _) => {
                all.push(PackedWeights::new(isa, *precision, &Operand::rows(values, out, inner, inner)));
            }
            _ => unreachable!("matrices are made for one format"),
        }
        Ok(())
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Float(_, all) => all[0].bytes(),
            Self::Quantized(all) => all[0].bytes(),
        }
    }

    /// Each expert's rows times its matrix, into `out`.
    fn product(&self, isa: Isa, rows: &[f32], [width, inner]: [usize; 2], offsets: &[usize], out: &mut [f32]) {
        let busy = offsets.windows(2).enumerate().filter(|(_, pair)| pair[1] > pair[0]);
        match self {
            Self::Float(precision, all) => {
                let groups: Vec<Group<'_>> = busy
                    .map(|(expert, pair)| Group {
                        a: Operand::rows(&rows[pair[0] * inner..pair[1] * inner], pair[1] - pair[0], inner, inner),
                        b: Weights::Packed(&all[expert]),
                        start: Start::Zero,
                        out_offset: pair[0] * width,
                        out_stride: width,
                    })
                    .collect();
                gemm(isa, *precision, &groups, out);
            }
            Self::Quantized(all) => {
                let groups: Vec<QuantGroup<'_>> = busy
                    .map(|(expert, pair)| QuantGroup {
                        rows: &rows[pair[0] * inner..pair[1] * inner],
                        weights: &all[expert],
                        bias: None,
                        out_offset: pair[0] * width,
                    })
                    .collect();
                quantized_gemm(isa, &groups, out);
            }
        }
    }
}

/// Packed two-layer feed-forward experts.
#[derive(Debug)]
pub struct PackedExperts {
    fc_in: Matrices,
    fc_out: Matrices,
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
        let (fc_in, fc_out) = (Matrices::new(format), Matrices::new(format));
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
            packed.fc_in.push(isa, format, &fc_in, [width, d_model])?;
            packed.fc_out.push(isa, format, &fc_out, [d_model, d_ff])?;
        }
        Ok(packed)
    }

    /// Bytes of one expert's weights.
    pub fn expert_bytes(&self) -> usize {
        self.fc_in.bytes() + self.fc_out.bytes()
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
                        self.fc_in.product(self.isa, rows, [width, d_model], &table.expert_offsets, hidden);
                        apply_into(self.isa, self.activation, hidden, width, inner);
                    });
                    self.fc_out.product(self.isa, inner, [d_model, d_ff], &table.expert_offsets, rows);
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
    /// `[d_ff * inputs, d_model]` each.
    pub(crate) fc_in: &'a [PackedWeights],
    /// `[experts, d_ff * inputs]`
    pub(crate) fc_in_bias: Option<&'a [f32]>,
    /// `[d_model, d_ff]` each.
    pub(crate) fc_out: &'a [PackedWeights],
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
    let ([width, d_model], d_ff) = (mlp.fc_in[0].shape(), mlp.fc_out[0].shape()[1]);
    let precision = mlp.fc_in[0].precision();
    let num_rows = offsets[offsets.len() - 1];
    let run = || {
        with_scratch_f32(num_rows * d_ff, |inner| {
            with_scratch_f32(num_rows * width, |hidden| {
                gemm(isa, precision, &packed_groups(rows, mlp.fc_in, mlp.fc_in_bias, offsets), hidden);
                apply_into(isa, activation, hidden, width, inner);
            });
            let groups = packed_groups(inner, mlp.fc_out, mlp.fc_out_bias, offsets);
            gemm_new(isa, precision, &groups, num_rows * d_model)
        })
    };
    if num_rows * d_model * d_ff >= LEAST_WORK { parallel::together(run) } else { run() }
}
