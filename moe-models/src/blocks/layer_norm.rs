//! LayerNorm over the last dimension. candle's fused one silently gives no gradient.

use crate::Result;
use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, D, DType, Layout, Shape, Tensor};
use moe_core::ops::host::{self, Real};

/// `(x - mean) / sqrt(variance + epsilon) * weight + bias` over the last dimension.
///
/// # Shapes
/// `x` `[.., d_model]`, `weight` and `bias` `[d_model]`; returns the shape of `x`
///
/// # Errors
/// If a shape does not fit.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, epsilon: f64) -> Result<Tensor> {
    let width = x.dim(D::Minus1)?;
    host::expect_shape("layer norm weight", weight, &[width])?;
    host::expect_shape("layer norm bias", bias, &[width])?;
    if host::is_host_real(x) {
        return Ok(x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, LayerNorm { epsilon })?);
    }
    reference(x, weight, bias, epsilon)
}

/// The same in ordinary candle operations.
pub(super) fn reference(x: &Tensor, weight: &Tensor, bias: &Tensor, epsilon: f64) -> Result<Tensor> {
    let centered = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centered.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = centered.broadcast_div(&(variance + epsilon)?.sqrt()?)?;
    Ok(normed.broadcast_mul(weight)?.broadcast_add(bias)?)
}

struct LayerNorm {
    epsilon: f64,
}

/// Mean and inverse standard deviation of a row.
#[inline(always)]
fn moments<T: Real>(row: &[T], epsilon: f64) -> (T, T) {
    let scale = T::from_f64(1.0 / row.len() as f64);
    let mean = host::sum_by(row.len(), |i| row[i]) * scale;
    let variance = host::sum_by(row.len(), |i| (row[i] - mean) * (row[i] - mean)) * scale;
    (mean, T::from_f64(1.0) / (variance + T::from_f64(epsilon)).sqrt_())
}

impl LayerNorm {
    fn forward<T: Real>(&self, x: &[T], weight: &[T], bias: &[T]) -> Vec<T> {
        host::dispatch(|| {
            let mut out = Vec::with_capacity(x.len());
            for row in x.chunks_exact(weight.len()) {
                let (mean, inverse) = moments(row, self.epsilon);
                out.extend(row.iter().zip(weight).zip(bias).map(|((&v, &w), &b)| (v - mean) * inverse * w + b));
            }
            out
        })
    }

    /// Gradients of input, weight and bias.
    fn backward<T: Real>(&self, x: &[T], weight: &[T], grad: &[T]) -> [Vec<T>; 3] {
        host::dispatch(|| {
            let (zero, width) = (T::from_f64(0.0), weight.len());
            let scale = T::from_f64(1.0 / width as f64);
            let mut dx = vec![zero; x.len()];
            let (mut dw, mut db) = (vec![zero; width], vec![zero; width]);
            for ((row, g), into) in x.chunks_exact(width).zip(grad.chunks_exact(width)).zip(dx.chunks_exact_mut(width))
            {
                let (mean, inverse) = moments(row, self.epsilon);
                let mean_g = host::sum_by(width, |i| g[i] * weight[i]) * scale;
                let mean_gx = host::sum_by(width, |i| g[i] * weight[i] * ((row[i] - mean) * inverse)) * scale;
                for i in 0..width {
                    let normed = (row[i] - mean) * inverse;
                    into[i] = (g[i] * weight[i] - mean_g - normed * mean_gx) * inverse;
                    dw[i] += g[i] * normed;
                    db[i] += g[i];
                }
            }
            [dx, dw, db]
        })
    }

    fn gradients<T: Real>(&self, x: &Tensor, weight: &Tensor, grad: &Tensor) -> candle_core::Result<[Tensor; 3]> {
        host::with_elements::<T, _>(x, |xs| {
            host::with_elements::<T, _>(weight, |ws| {
                host::with_elements::<T, _>(grad, |gs| {
                    let [dx, dw, db] = self.backward(xs, ws, gs);
                    Ok([
                        Tensor::from_vec(dx, x.shape(), x.device())?,
                        Tensor::from_vec(dw, weight.shape(), x.device())?,
                        Tensor::from_vec(db, weight.shape(), x.device())?,
                    ])
                })
            })
        })
    }
}

impl CustomOp3 for LayerNorm {
    fn name(&self) -> &'static str {
        "layer_norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = match x.dtype() {
            DType::F64 => CpuStorage::F64(self.forward::<f64>(
                host::elements(x, xl)?,
                host::elements(w, wl)?,
                host::elements(b, bl)?,
            )),
            _ => CpuStorage::F32(self.forward::<f32>(
                host::elements(x, xl)?,
                host::elements(w, wl)?,
                host::elements(b, bl)?,
            )),
        };
        Ok((out, xl.shape().clone()))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, db] = match x.dtype() {
            DType::F64 => self.gradients::<f64>(x, w, grad)?,
            _ => self.gradients::<f32>(x, w, grad)?,
        };
        Ok((Some(dx), Some(dw), Some(db)))
    }
}
