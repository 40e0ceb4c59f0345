//! The operations an MoE layer is made of, behind one trait, so that kernels can replace them.
//!
//! [`CandleOps`] is the reference in ordinary candle calls and runs on every device. [`CpuOps`] computes the same in
//! custom operations with their own gradients; candle's fused softmax, norms and rotary silently give none.

mod activation;
mod candle_ops;
mod cpu_ops;
pub mod host;
mod linear;
#[cfg(test)]
mod tests;

pub use activation::Activation;
pub use candle_ops::CandleOps;
pub use cpu_ops::CpuOps;
pub use linear::linear;

use crate::{DispatchTable, Result};
use candle_core::Tensor;
use std::fmt::Debug;
use std::sync::Arc;

/// Moves rows between token order and expert order, and multiplies each expert's rows with that expert's weights.
pub trait MoeOps: Debug + Send + Sync {
    /// Copies each routed token to its row.
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
    /// # Shapes
    /// `rows` `[rows, in]`, `weight` `[experts, out, in]`, `bias` `[experts, out]` to `[rows, out]`
    ///
    /// # Errors
    /// If a shape does not fit `offsets`.
    fn grouped_linear(
        &self,
        rows: &Tensor,
        weight: &Tensor,
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
    fn activation(&self, activation: Activation, x: &Tensor) -> Result<Tensor> {
        activation.apply(x)
    }

    /// `x W^T + b` over the last dimension.
    ///
    /// # Shapes
    /// `x` `[.., in]`, `weight` `[out, in]`, `bias` `[out]` to `[.., out]`
    ///
    /// # Errors
    /// If the sizes do not fit.
    fn linear(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        linear(x, weight, bias)
    }

    /// [`MoeOps::linear`] for router logits and mixing coefficients: never in less than f32, whatever the precision of the
    /// other products, because a rounded logit sends a token to another expert.
    ///
    /// # Errors
    /// If the sizes do not fit.
    fn router_linear(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        linear(x, weight, bias)
    }
}

/// The operations for tensors like this one: [`CpuOps`] for f32 and f64 on the CPU, else [`CandleOps`].
pub fn default_ops(like: &Tensor) -> Arc<dyn MoeOps> {
    if host::is_host_real(like) { Arc::new(CpuOps) } else { Arc::new(CandleOps) }
}

fn check_grouped(rows: &Tensor, weight: &Tensor, bias: Option<&Tensor>, offsets: &[usize]) -> Result<()> {
    let (num_rows, inner) = rows.dims2()?;
    let (experts, out, weight_inner) = weight.dims3()?;
    let fits = offsets.len() == experts + 1
        && offsets.first() == Some(&0)
        && offsets.last() == Some(&num_rows)
        && offsets.windows(2).all(|pair| pair[0] <= pair[1]);
    if !fits {
        return Err(crate::Error::Input(format!(
            "offsets {offsets:?} must rise from 0 to {num_rows} rows with one entry more than {experts} experts"
        )));
    }
    if inner != weight_inner {
        return Err(crate::Error::Input(format!(
            "rows of width {inner} do not fit weights of input width {weight_inner}"
        )));
    }
    bias.map_or(Ok(()), |b| host::expect_shape("bias", b, &[experts, out]))
}

fn check_unpermute(rows: &Tensor, weights: &Tensor, table: &DispatchTable) -> Result<usize> {
    let (num_rows, width) = rows.dims2()?;
    if num_rows != table.num_rows() {
        return Err(crate::Error::Input(format!("rows must number {}, got {num_rows}", table.num_rows())));
    }
    host::expect_shape("combine_weights", weights, &[table.num_tokens, table.top_k])?;
    Ok(width)
}

fn check_permute(tokens: &Tensor, table: &DispatchTable) -> Result<usize> {
    let (num_tokens, width) = tokens.dims2()?;
    if num_tokens != table.num_tokens {
        return Err(crate::Error::Input(format!("tokens must number {}, got {num_tokens}", table.num_tokens)));
    }
    Ok(width)
}
