//! [`KernelOps`]: the operations of an MoE layer on these kernels.

use crate::gemm::{Operand, PackedWeights};
use crate::{Error, Precision, Result, grouped_linear, permute, select};
use candle_core::{DType, Tensor, TensorId};
use moe_core::ops::{CandleOps, CpuOps, MoeOps, host};
use moe_core::{Activation, DispatchTable};
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

/// The kernels as [`MoeOps`].
///
/// They take f32 tensors on the CPU; tensors of another type or device go to `moe-core`'s operations.
#[derive(Debug, Clone, Default)]
pub struct KernelOps {
    precision: Precision,
    /// Weights packed at their first use, if they never change.
    frozen: Option<Arc<Frozen>>,
}

/// One packed matrix per expert.
type PackedExperts = Arc<Vec<PackedWeights>>;

/// Packed weights by tensor and precision.
#[derive(Debug, Default)]
struct Frozen(RwLock<HashMap<(TensorId, Precision), PackedExperts>>);

impl KernelOps {
    /// Operations of this precision: that of [`MoeOps::linear`] and [`MoeOps::grouped_linear`];
    /// [`MoeOps::router_linear`] is f32 always.
    pub fn new(precision: Precision) -> Self {
        Self { precision, frozen: None }
    }

    /// The same for weights that never change: each is packed at its first use and kept, and nothing has a gradient.
    ///
    /// A weight is known by its tensor: one whose memory changes later gives the old results.
    pub fn frozen(precision: Precision) -> Self {
        Self { precision, frozen: Some(Arc::default()) }
    }

    /// The precision of the products.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// `x W^T + b` in a precision of its own.
    fn linear_in(&self, precision: Precision, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        let Some(frozen) = &self.frozen else { return grouped_linear::linear(x, weight, bias, precision) };
        let (out, inner) = weight.dims2()?;
        let Some((&width, leading)) = x.dims().split_last() else {
            return Err(Error::Argument("linear needs an input of at least one dimension".into()));
        };
        let rows = leading.iter().product();
        let packed = frozen.get(weight, precision, [out, inner])?;
        let y = grouped_linear::grouped_linear_packed(&x.reshape((rows, width))?, &packed, bias, &[0, rows])?;
        Ok(y.reshape([leading, &[out]].concat())?)
    }
}

impl Frozen {
    /// The weights of `weight`, one matrix of `shape` or a stack of them.
    fn get(&self, weight: &Tensor, precision: Precision, shape: [usize; 2]) -> Result<PackedExperts> {
        let key = (weight.id(), precision);
        if let Some(found) = self.0.read().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Ok(Arc::clone(found));
        }
        let [out, inner] = shape;
        let packed = host::with_elements::<f32, _>(weight, |values| {
            let pack = |matrix: &[f32]| {
                PackedWeights::new(select::current(), precision, &Operand::rows(matrix, out, inner, inner))
            };
            Ok(Arc::new(values.chunks_exact(out * inner).map(pack).collect::<Vec<_>>()))
        })?;
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(key, Arc::clone(&packed));
        Ok(packed)
    }
}

/// Whether the kernels can take this tensor.
pub fn takes(tensor: &Tensor) -> bool {
    tensor.device().is_cpu() && tensor.dtype() == DType::F32
}

fn fallback(tensor: &Tensor) -> &'static dyn MoeOps {
    if host::is_host_real(tensor) { &CpuOps } else { &CandleOps }
}

impl MoeOps for KernelOps {
    fn permute(&self, tokens: &Tensor, table: &Arc<DispatchTable>) -> moe_core::Result<Tensor> {
        if takes(tokens) { Ok(permute::permute(tokens, table)?) } else { fallback(tokens).permute(tokens, table) }
    }

    fn unpermute(
        &self,
        rows: &Tensor,
        combine_weights: &Tensor,
        table: &Arc<DispatchTable>,
    ) -> moe_core::Result<Tensor> {
        if takes(rows) && takes(combine_weights) {
            return Ok(permute::unpermute(rows, combine_weights, table)?);
        }
        fallback(rows).unpermute(rows, combine_weights, table)
    }

    fn grouped_linear(
        &self,
        rows: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        offsets: &[usize],
    ) -> moe_core::Result<Tensor> {
        if takes(rows) && takes(weight) && bias.is_none_or(takes) {
            let Some(frozen) = &self.frozen else {
                return Ok(grouped_linear::grouped_linear(rows, weight, bias, offsets, self.precision)?);
            };
            let (_, out, inner) = weight.dims3()?;
            let packed = frozen.get(weight, self.precision, [out, inner])?;
            return Ok(grouped_linear::grouped_linear_packed(rows, &packed, bias, offsets)?);
        }
        fallback(rows).grouped_linear(rows, weight, bias, offsets)
    }

    fn activation(&self, activation: Activation, x: &Tensor) -> moe_core::Result<Tensor> {
        if takes(x) { Ok(crate::activation::activation(activation, x)?) } else { activation.apply(x) }
    }

    fn linear(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> moe_core::Result<Tensor> {
        if takes(x) && takes(weight) && bias.is_none_or(takes) {
            return Ok(self.linear_in(self.precision, x, weight, bias)?);
        }
        moe_core::ops::linear(x, weight, bias)
    }

    fn router_linear(&self, x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> moe_core::Result<Tensor> {
        if takes(x) && takes(weight) && bias.is_none_or(takes) {
            return Ok(self.linear_in(Precision::F32, x, weight, bias)?);
        }
        moe_core::ops::linear(x, weight, bias)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_core::testing::{random, values};

    #[test]
    fn frozen_weights_give_the_bits_of_plain_ones() {
        let (x, w) = (random(1, &[7, 21], 1.0, DType::F32), random(2, &[3, 40, 21], 1.0, DType::F32));
        let (b, gate) = (random(3, &[3, 40], 1.0, DType::F32), random(4, &[5, 21], 1.0, DType::F32));
        for precision in [Precision::F32, Precision::Bf16] {
            let (plain, frozen) = (KernelOps::new(precision), KernelOps::frozen(precision));
            for _ in 0..2 {
                let run = |ops: &KernelOps| {
                    let experts = ops.grouped_linear(&x, &w, Some(&b), &[0, 2, 2, 7]).unwrap();
                    let linear = ops.linear(&x.reshape((1, 7, 21)).unwrap(), &gate, None).unwrap();
                    [experts, linear, ops.router_linear(&x, &gate, None).unwrap()]
                        .map(|t| (t.dims().to_vec(), values(&t)))
                };
                assert_eq!(run(&frozen), run(&plain), "{precision:?}");
            }
            assert!(frozen.grouped_linear(&x, &w, Some(&b), &[0, 2, 7]).is_err());
            assert!(frozen.linear(&random(5, &[2, 20], 1.0, DType::F32), &gate, None).is_err());
        }
    }
}
