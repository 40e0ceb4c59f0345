//! Linear maps with gradients: one for all rows, or one per expert over the rows of each.
//!
//! Forward, gradient of the input and gradient of the weights are each one [`gemm`](crate::gemm) over all experts.

#[cfg(test)]
mod tests;

use crate::gemm::{Group, Operand, PackedWeights, Start, Weights, gemm_new};
use crate::{Error, Isa, Precision, Result, parallel, select};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Shape, Tensor};
use moe_core::ops::host;

/// `x W^T + b` over the last dimension.
///
/// # Shapes
/// `x` `[.., in]`, `weight` `[out, in]`, `bias` `[out]`, all f32 on the CPU; returns `[.., out]`
///
/// # Errors
/// [`Error::Argument`] if the sizes do not fit.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, precision: Precision) -> Result<Tensor> {
    let (out, inner) = weight.dims2()?;
    let Some((&width, leading)) = x.dims().split_last() else {
        return Err(Error::Argument("linear needs an input of at least one dimension".into()));
    };
    if width != inner {
        return Err(Error::Argument(format!("linear with weight [{out}, {inner}] got an input of width {width}")));
    }
    let rows: usize = leading.iter().product();
    let shape = [leading, &[out]].concat();
    let bias = bias.map(|b| b.reshape((1, out))).transpose()?;
    let y = grouped_linear(&x.reshape((rows, inner))?, &weight.unsqueeze(0)?, bias.as_ref(), &[0, rows], precision)?;
    Ok(y.reshape(shape)?)
}

/// `rows_e W_e^T + b_e` for each expert `e` over its rows `offsets[e]..offsets[e + 1]`.
///
/// # Shapes
/// `rows` `[rows, in]`, `weight` `[experts, out, in]`, `bias` `[experts, out]`, all f32 on the CPU; returns `[rows, out]`
///
/// # Errors
/// [`Error::Argument`] if a shape does not fit `offsets`.
pub fn grouped_linear(
    rows: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    offsets: &[usize],
    precision: Precision,
) -> Result<Tensor> {
    let ((num_rows, inner), (experts, out, weight_inner)) = (rows.dims2()?, weight.dims3()?);
    check(offsets, num_rows, experts, [inner, weight_inner])?;
    if let Some(bias) = bias {
        host::expect_shape("bias", bias, &[experts, out])?;
    }
    let op = GroupedLinear { offsets: offsets.to_vec(), precision, isa: select::current() };
    let (rows, weight) = (rows.contiguous()?, weight.contiguous()?);
    Ok(match bias {
        Some(bias) => rows.apply_op3(&weight, &bias.contiguous()?, op)?,
        None => rows.apply_op2(&weight, op)?,
    })
}

/// [`grouped_linear`] without gradients, with weights packed before, one matrix per expert.
///
/// # Shapes
/// `rows` `[rows, in]`, `weights` `[out, in]` each, `bias` `[experts, out]`; returns `[rows, out]`
///
/// # Errors
/// [`Error::Argument`] if a shape does not fit `offsets`.
pub fn grouped_linear_packed(
    rows: &Tensor,
    weights: &[PackedWeights],
    bias: Option<&Tensor>,
    offsets: &[usize],
) -> Result<Tensor> {
    let (num_rows, inner) = rows.dims2()?;
    let Some(first) = weights.first() else {
        return Err(Error::Argument("grouped_linear needs at least one expert".into()));
    };
    let [out, weight_inner] = first.shape();
    check(offsets, num_rows, weights.len(), [inner, weight_inner])?;
    let experts = weights.len();
    let run = |x: &[f32], bias: Option<&[f32]>| {
        let groups: Vec<Group<'_>> = (offsets.windows(2).zip(weights).enumerate())
            .map(|(e, (pair, packed))| Group {
                a: Operand::rows(&x[pair[0] * inner..pair[1] * inner], pair[1] - pair[0], inner, inner),
                b: Weights::Packed(packed),
                start: Start::bias(bias.map(|b| &b[e * out..][..out])),
                out_offset: pair[0] * out,
                out_stride: out,
            })
            .collect();
        Ok(gemm_new(select::current(), first.precision(), &groups, num_rows * out))
    };
    let y = host::with_elements::<f32, _>(rows, |x| match bias {
        Some(bias) => {
            if bias.elem_count() != experts * out {
                candle_core::bail!("bias must have {experts} x {out} values, got shape {:?}", bias.dims());
            }
            host::with_elements::<f32, _>(bias, |b| run(x, Some(b)))
        }
        None => run(x, None),
    })?;
    Ok(Tensor::from_vec(y, (num_rows, out), rows.device())?)
}

fn check(offsets: &[usize], num_rows: usize, experts: usize, [inner, weight_inner]: [usize; 2]) -> Result<()> {
    let rising = offsets.windows(2).all(|pair| pair[0] <= pair[1]);
    if offsets.len() != experts + 1 || offsets[0] != 0 || offsets[experts] != num_rows || !rising {
        return Err(Error::Argument(format!(
            "offsets {offsets:?} must rise from 0 to {num_rows} rows with one entry more than {experts} experts"
        )));
    }
    if inner != weight_inner {
        return Err(Error::Argument(format!("rows of width {inner} do not fit weights of input width {weight_inner}")));
    }
    Ok(())
}

struct GroupedLinear {
    offsets: Vec<usize>,
    precision: Precision,
    isa: Isa,
}

impl GroupedLinear {
    /// Expert, first row and rows, of every expert.
    fn experts(&self) -> impl Iterator<Item = (usize, usize, usize)> + '_ {
        self.offsets.windows(2).enumerate().map(|(e, pair)| (e, pair[0], pair[1] - pair[0]))
    }

    /// `[rows, out]`
    fn forward(&self, x: &[f32], w: &[f32], bias: Option<&[f32]>, inner: usize, out: usize) -> Vec<f32> {
        let groups: Vec<Group<'_>> = (self.experts())
            .map(|(e, first, rows)| Group {
                a: Operand::rows(&x[first * inner..][..rows * inner], rows, inner, inner),
                b: Operand::rows(&w[e * out * inner..][..out * inner], out, inner, inner).into(),
                start: Start::bias(bias.map(|b| &b[e * out..][..out])),
                out_offset: first * out,
                out_stride: out,
            })
            .collect();
        gemm_new(self.isa, self.precision, &groups, self.offsets[self.offsets.len() - 1] * out)
    }

    /// Gradient of the rows, `[rows, in]`.
    fn input_gradient(&self, grad: &[f32], w: &[f32], inner: usize, out: usize) -> Vec<f32> {
        let groups: Vec<Group<'_>> = (self.experts())
            .map(|(e, first, rows)| Group {
                a: Operand::rows(&grad[first * out..][..rows * out], rows, out, out),
                b: Operand::columns(&w[e * out * inner..][..out * inner], inner, out, inner).into(),
                start: Start::Zero,
                out_offset: first * inner,
                out_stride: inner,
            })
            .collect();
        gemm_new(self.isa, self.precision, &groups, self.offsets[self.offsets.len() - 1] * inner)
    }

    /// Gradient of the weights, `[experts, out, in]`; zeros for experts without rows.
    fn weight_gradient(&self, grad: &[f32], x: &[f32], inner: usize, out: usize) -> Vec<f32> {
        let groups: Vec<Group<'_>> = (self.experts())
            .map(|(e, first, rows)| Group {
                a: Operand::columns(&grad[first * out..][..rows * out], out, rows, out),
                b: Operand::columns(&x[first * inner..][..rows * inner], inner, rows, inner).into(),
                start: Start::Zero,
                out_offset: e * out * inner,
                out_stride: inner,
            })
            .collect();
        gemm_new(self.isa, self.precision, &groups, groups.len() * out * inner)
    }

    /// Gradient of the bias, `[experts, out]`: sums over rows, in their order.
    fn bias_gradient(&self, grad: &[f32], out: usize) -> Vec<f32> {
        let experts = self.offsets.len() - 1;
        let mut sums = vec![0.0; experts * out];
        let shared = parallel::SharedMut::new(&mut sums);
        // Columns in strips, so that one group alone gives work to several threads too.
        const STRIP: usize = 256;
        let strips = out.div_ceil(STRIP);
        parallel::for_each_if(grad.len(), 1 << 16, experts * strips, |task| {
            let (e, start) = (task / strips, task % strips * STRIP);
            let width = STRIP.min(out - start);
            // SAFETY: each task sums columns of its own.
            let into = unsafe { shared.slice(e * out + start, width) };
            self.isa.vectorize(|| {
                for row in self.offsets[e]..self.offsets[e + 1] {
                    for (sum, value) in into.iter_mut().zip(&grad[row * out + start..][..width]) {
                        *sum += value;
                    }
                }
            });
        });
        sums
    }

    /// Gradients of rows and weights, and of the bias if asked.
    fn gradients(&self, x: &Tensor, w: &Tensor, grad: &Tensor, bias: bool) -> candle_core::Result<Vec<Tensor>> {
        let (experts, out, inner) = w.dims3()?;
        host::with_elements::<f32, _>(x, |xs| {
            host::with_elements::<f32, _>(w, |ws| {
                host::with_elements::<f32, _>(grad, |gs| {
                    let mut grads = vec![
                        Tensor::from_vec(self.input_gradient(gs, ws, inner, out), x.shape(), x.device())?,
                        Tensor::from_vec(self.weight_gradient(gs, xs, inner, out), w.shape(), x.device())?,
                    ];
                    if bias {
                        grads.push(Tensor::from_vec(self.bias_gradient(gs, out), (experts, out), x.device())?);
                    }
                    Ok(grads)
                })
            })
        })
    }

    fn run(
        &self,
        (x, xl): (&CpuStorage, &Layout),
        (w, wl): (&CpuStorage, &Layout),
        bias: Option<&[f32]>,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let ((rows, inner), (_, out, _)) = (xl.shape().dims2()?, wl.shape().dims3()?);
        let y = self.forward(host::elements(x, xl)?, host::elements(w, wl)?, bias, inner, out);
        Ok((CpuStorage::F32(y), Shape::from((rows, out))))
    }
}

impl CustomOp2 for GroupedLinear {
    fn name(&self) -> &'static str {
        "grouped_linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        xl: &Layout,
        w: &CpuStorage,
        wl: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.run((x, xl), (w, wl), None)
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.gradients(x, w, grad, false)?;
        let dw = grads.pop();
        Ok((grads.pop(), dw))
    }
}

impl CustomOp3 for GroupedLinear {
    fn name(&self) -> &'static str {
        "grouped_linear_bias"
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
        self.run((x, xl), (w, wl), Some(host::elements(b, bl)?))
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.gradients(x, w, grad, true)?;
        let (db, dw) = (grads.pop(), grads.pop());
        Ok((grads.pop(), dw, db))
    }
}
