//! [`linear`]: `x W^T + b`, one graph node with one backward pass.

use super::host::{self, Real, View};
use crate::Result;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, DType, Layout, Shape, Tensor};

/// Applies a linear map to the last dimension.
///
/// # Shapes
/// - `x`: `[.., in]`; `weight`: `[out, in]`; `bias`: `[out]`
/// - returns: `[.., out]`
///
/// # Errors
/// [`crate::Error::Input`] if the sizes do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (out, inner) = weight.dims2()?;
    let dims = x.dims().to_vec();
    let Some((&last, leading)) = dims.split_last() else {
        return Err(crate::Error::Input("linear needs an input of at least one dimension".into()));
    };
    if last != inner {
        return Err(crate::Error::Input(format!("linear with weight [{out}, {inner}] got an input of width {last}")));
    }
    let rows: usize = leading.iter().product();
    let flat = x.reshape((rows, inner))?;
    let y = if host::is_host_real(x) {
        let (flat, weight) = (flat.contiguous()?, weight.contiguous()?);
        match bias {
            Some(bias) => flat.apply_op3(&weight, &bias.contiguous()?, Linear)?,
            None => flat.apply_op2(&weight, Linear)?,
        }
    } else {
        let y = flat.matmul(&weight.t()?)?;
        match bias {
            Some(bias) => y.broadcast_add(bias)?,
            None => y,
        }
    };
    let mut shape = leading.to_vec();
    shape.push(out);
    Ok(y.reshape(shape)?)
}

/// Sums the rows of `[rows, cols]` values.
pub(crate) fn column_sums<T: Real>(values: &[T], cols: usize) -> Vec<T> {
    host::dispatch(|| {
        let mut sums = vec![T::from_f64(0.0); cols];
        for row in values.chunks_exact(cols) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum += *value;
            }
        }
        sums
    })
}

/// Adds `bias` to each row of `values`.
pub(crate) fn add_bias<T: Real>(values: &mut [T], bias: &[T]) {
    host::dispatch(|| {
        for row in values.chunks_exact_mut(bias.len()) {
            for (value, b) in row.iter_mut().zip(bias) {
                *value += *b;
            }
        }
    });
}

struct Linear;

impl Linear {
    fn product(s: (&CpuStorage, &Layout), w: (&CpuStorage, &Layout)) -> candle_core::Result<(CpuStorage, Shape)> {
        let (rows, inner) = s.1.shape().dims2()?;
        let (out, _) = w.1.shape().dims2()?;
        let x = View::row_major(s.1.start_offset(), rows, inner);
        let w_t = View::row_major(w.1.start_offset(), out, inner).transposed();
        Ok((host::matmul((s.0, x), (w.0, w_t))?, Shape::from((rows, out))))
    }

    fn gradients(x: &Tensor, w: &Tensor, grad: &Tensor) -> candle_core::Result<(Tensor, Tensor)> {
        let (x, w, grad) = (x.detach(), w.detach(), grad.contiguous()?);
        Ok((grad.matmul(&w)?, grad.t()?.matmul(&x)?))
    }
}

fn add_bias_storage(y: CpuStorage, b: &CpuStorage, l: &Layout) -> candle_core::Result<CpuStorage> {
    match y {
        CpuStorage::F32(mut y) => {
            add_bias(&mut y, host::elements::<f32>(b, l)?);
            Ok(CpuStorage::F32(y))
        }
        CpuStorage::F64(mut y) => {
            add_bias(&mut y, host::elements::<f64>(b, l)?);
            Ok(CpuStorage::F64(y))
        }
        _ => candle_core::bail!("linear computes in f32 or f64"),
    }
}

pub(crate) fn column_sums_tensor(grad: &Tensor) -> candle_core::Result<Tensor> {
    let cols = grad.dim(candle_core::D::Minus1)?;
    let device = grad.device();
    match grad.dtype() {
        DType::F64 => host::with_elements::<f64, _>(grad, |g| Tensor::from_vec(column_sums(g, cols), cols, device)),
        _ => host::with_elements::<f32, _>(grad, |g| Tensor::from_vec(column_sums(g, cols), cols, device)),
    }
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        s: &CpuStorage,
        sl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Self::product((s, sl), (w, wl))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (dx, dw) = Self::gradients(x, w, grad)?;
        Ok((Some(dx), Some(dw)))
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear_bias"
    }

    fn cpu_fwd(
        &self,
        s: &CpuStorage,
        sl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
        b: &CpuStorage,
        bl: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (y, shape) = Self::product((s, sl), (w, wl))?;
        Ok((add_bias_storage(y, b, bl)?, shape))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (dx, dw) = Self::gradients(x, w, grad)?;
        Ok((Some(dx), Some(dw), Some(column_sums_tensor(grad)?)))
    }
}
