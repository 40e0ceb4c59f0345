//! [`MoeOps`]: what an MoE layer needs of a backend.

use super::{Activation, WeightOps, host};
use crate::{DispatchTable, DroplessConfig, ExpertLoad, MlpWeights, Result, Weight};
use candle_core::Tensor;
use std::sync::Arc;

/// Moves rows between token order and expert order, and multiplies each expert's rows with that expert's weights.
pub trait MoeOps: WeightOps {
    /// `x W^T + b` for router logits and mixing coefficients: never in less than f32, whatever the precision of the other
    /// products, because a rounded logit sends a token to another expert.
    ///
    /// # Shapes
    /// `x` `[tokens, d_model]`, `weight` `[out, d_model]`, `bias` `[out]` to `[tokens, out]`
    ///
    /// # Errors
    /// If the sizes do not fit.
    fn gate(&self, x: &Tensor, weight: &Weight, bias: Option<&Tensor>) -> Result<Tensor>;

    /// The whole decision of a [`crate::DroplessRouter`] in one sweep, without gradients and losses; `None` where a backend
    /// has no such form for this weight.
    ///
    /// # Shapes
    /// `tokens` `[tokens, d_model]`, `weight` `[num_experts, d_model]`, `selection_bias` `[num_experts]`
    ///
    /// # Errors
    /// If the sizes do not fit.
    fn choose(
        &self,
        tokens: &Tensor,
        weight: &Weight,
        selection_bias: Option<&Tensor>,
        config: &DroplessConfig,
    ) -> Result<Option<Choices>> {
        let _ = (tokens, weight, selection_bias, config);
        Ok(None)
    }

    /// Copies each routed token to its row. Without rows the result still takes part in the graph.
    ///
    /// # Shapes
    /// `tokens` `[tokens, d_model]` to `[rows, d_model]`, in the order of `table`
    ///
    /// # Errors
    /// If `tokens` does not have `table.num_tokens` rows.
    fn permute(&self, tokens: &Tensor, table: &Arc<DispatchTable>) -> Result<Tensor>;

    /// Sums each token's rows, scaled by its weights; a token without rows gets zeros.
    ///
    /// # Shapes
    /// `rows` `[rows, d_model]`, `combine_weights` `[tokens, top_k]` to `[tokens, d_model]`
    ///
    /// # Errors
    /// If a shape does not fit `table`.
    fn unpermute(&self, rows: &Tensor, combine_weights: &Tensor, table: &Arc<DispatchTable>) -> Result<Tensor>;

    /// `rows_e W_e^T + b_e` for each expert `e` over its rows `offsets[e]..offsets[e + 1]`.
    ///
    /// The rows of each expert may be cut into `parts` batches: `offsets` then has `experts * parts + 1` entries, those of one
    /// expert side by side. It changes one thing: the gradients of weights and biases are the sums of each batch's own, in
    /// their order, as if the batches had been run one after the other.
    ///
    /// # Shapes
    /// `rows` `[rows, in]`, `weight` `[experts, out, in]`, `bias` `[experts, out]` to `[rows, out]`
    ///
    /// # Errors
    /// If a shape does not fit `offsets`.
    fn grouped_linear(
        &self,
        rows: &Tensor,
        weight: &Weight,
        bias: Option<&Tensor>,
        offsets: &[usize],
    ) -> Result<Tensor>;

    /// Applies an activation to the last dimension.
    ///
    /// # Shapes
    /// `[.., d_ff * activation.inputs()]` to `[.., d_ff]`
    ///
    /// # Errors
    /// If the width does not fit.
    fn activation(&self, activation: Activation, x: &Tensor) -> Result<Tensor>;

    /// `a` and `b` weighed by a softmax over two logits per row: the mix of a residual MoE.
    ///
    /// # Shapes
    /// `a` and `b` `[tokens, d_model]`, `logits` `[tokens, 2]` to `[tokens, d_model]`
    ///
    /// # Errors
    /// If a shape does not fit.
    fn mix(&self, a: &Tensor, b: &Tensor, logits: &Tensor) -> Result<Tensor> {
        if logits.elem_count() == 0 {
            return Ok((a + b)?); // candle takes no maximum of nothing
        }
        let exp = logits.broadcast_sub(&logits.detach().max_keepdim(1)?)?.exp()?;
        let mix = exp.broadcast_div(&exp.sum_keepdim(1)?)?;
        Ok((a.broadcast_mul(&mix.narrow(1, 0, 1)?)? + b.broadcast_mul(&mix.narrow(1, 1, 1)?)?)?)
    }

    /// The two linear maps of each expert over its rows, with the activation between them.
    ///
    /// # Shapes
    /// `rows` `[rows, d_model]` to the same
    ///
    /// # Errors
    /// If a shape does not fit `offsets`.
    fn experts(
        &self,
        rows: &Tensor,
        weights: &MlpWeights,
        activation: Activation,
        offsets: &[usize],
    ) -> Result<Tensor> {
        experts_stepwise(self, rows, weights, activation, offsets)
    }
}

/// [`MoeOps::experts`] one operation after the other: its default, and what a backend falls back on for weights that it has no
/// form of its own for.
///
/// # Shapes
/// `rows` `[rows, d_model]` to the same
///
/// # Errors
/// If a shape does not fit `offsets`.
pub fn experts_stepwise<O: MoeOps + ?Sized>(
    ops: &O,
    rows: &Tensor,
    weights: &MlpWeights,
    activation: Activation,
    offsets: &[usize],
) -> Result<Tensor> {
    let hidden = ops.grouped_linear(rows, &weights.fc_in, weights.fc_in_bias.as_ref(), offsets)?;
    let hidden = ops.activation(activation, &hidden)?;
    ops.grouped_linear(&hidden, &weights.fc_out, weights.fc_out_bias.as_ref(), offsets)
}

/// What [`MoeOps::choose`] decided.
#[derive(Debug, Clone, PartialEq)]
pub struct Choices {
    /// Chosen experts, `[tokens, top_k]`, best first.
    pub expert_ids: Vec<u32>,
    /// Factors of the combine, `[tokens, top_k]`.
    pub combine_weights: Vec<f32>,
    /// Demand.
    pub load: ExpertLoad,
}

/// Into how many batches `offsets` cuts the rows of each of `experts` experts; `None` if it is not as many for each.
pub fn parts_per_expert(offsets: &[usize], experts: usize) -> Option<usize> {
    let groups = offsets.len().checked_sub(1)?;
    (experts > 0 && groups > 0 && groups.is_multiple_of(experts)).then(|| groups / experts)
}

/// The offsets of whole experts, from those of their batches.
pub fn whole_experts(offsets: &[usize], parts: usize) -> Vec<usize> {
    offsets.iter().step_by(parts.max(1)).copied().collect()
}

pub(super) fn check_grouped(
    (num_rows, inner): (usize, usize),
    weight: &[usize],
    bias: Option<&Tensor>,
    offsets: &[usize],
) -> Result<()> {
    let &[experts, out, weight_inner] = weight else {
        return Err(crate::Error::Input(format!("weights of experts must be [experts, out, in], got {weight:?}")));
    };
    let fits = parts_per_expert(offsets, experts).is_some()
        && offsets.first() == Some(&0)
        && offsets.last() == Some(&num_rows)
        && offsets.windows(2).all(|pair| pair[0] <= pair[1]);
    if !fits {
        return Err(crate::Error::Input(format!(
            "offsets {offsets:?} must rise from 0 to {num_rows} rows, with one entry more than {experts} experts or a multiple \
             of them"
        )));
    }
    if inner != weight_inner {
        return Err(crate::Error::Input(format!(
            "rows of width {inner} do not fit weights of input width {weight_inner}"
        )));
    }
    bias.map_or(Ok(()), |b| host::expect_shape("bias", b, &[experts, out]))
}

pub(super) fn check_unpermute(rows: &Tensor, weights: &Tensor, table: &DispatchTable) -> Result<usize> {
    let (num_rows, width) = rows.dims2()?;
    if num_rows != table.num_rows() {
        return Err(crate::Error::Input(format!("rows must number {}, got {num_rows}", table.num_rows())));
    }
    host::expect_shape("combine_weights", weights, &[table.num_tokens, table.top_k])?;
    Ok(width)
}

pub(super) fn check_permute(tokens: &Tensor, table: &DispatchTable) -> Result<usize> {
    let (num_tokens, width) = tokens.dims2()?;
    if num_tokens != table.num_tokens {
        return Err(crate::Error::Input(format!("tokens must number {}, got {num_tokens}", table.num_tokens)));
    }
    Ok(width)
}
