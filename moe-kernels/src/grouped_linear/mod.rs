//! Linear maps with gradients: one for all rows, or one per expert over the rows of each.
//!
//! Forward, gradient of the input and gradient of the weights are each one [`gemm`](crate::gemm) over all experts.

#[cfg(test)]
mod tests;

use crate::custom::{self, Input, SliceOp, with_inputs};
use crate::gemm::{Group, Operand, PackedWeights, Start, Weights, gemm_new};
use crate::{Error, Isa, Precision, Result, parallel, select};
use candle_core::Tensor;
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
    if let Some(bias) = bias {
        host::expect_shape("bias", bias, &[out])?;
    }
    apply_linear(x, weight, bias, vec![0, leading.iter().product()], precision)
}

fn apply_linear(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    offsets: Vec<usize>,
    precision: Precision,
) -> Result<Tensor> {
    let op = GroupedLinear { offsets, precision, isa: select::current() };
    match bias {
        Some(bias) => custom::apply(op, &[x, weight, bias]),
        None => custom::apply(op, &[x, weight]),
    }
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
    apply_linear(rows, weight, bias, offsets.to_vec(), precision)
}

/// [`grouped_linear`] without gradients, with weights packed before, one matrix per expert.
///
/// # Shapes
/// `rows` `[rows, in]` (with one matrix: `[.., in]`), `weights` `[out, in]` each, `bias` `[experts, out]`; returns
/// `[rows, out]`
///
/// # Errors
/// [`Error::Argument`] if a shape does not fit `offsets`.
pub fn grouped_linear_packed(
    rows: &Tensor,
    weights: &[PackedWeights],
    bias: Option<&Tensor>,
    offsets: &[usize],
) -> Result<Tensor> {
    let (Some(first), Some((&inner, leading))) = (weights.first(), rows.dims().split_last()) else {
        return Err(Error::Argument("grouped_linear needs at least one expert and rows of at least one column".into()));
    };
    let [out, weight_inner] = first.shape();
    let experts = weights.len();
    check(offsets, leading.iter().product(), experts, [inner, weight_inner])?;
    if let Some(bias) = bias.filter(|bias| bias.elem_count() != experts * out) {
        let dims = bias.dims();
        return Err(Error::Argument(format!("bias must have {experts} x {out} values, got shape {dims:?}")));
    }
    let inputs: Vec<&Tensor> = [rows].into_iter().chain(bias).collect();
    let y = with_inputs("linear", &inputs, |inputs| {
        let (x, bias) = (inputs[0].values, inputs.get(1).map(|bias| bias.values));
        let groups = packed_groups(x, weights, bias, offsets);
        gemm_new(select::current(), first.precision(), &groups, offsets[experts] * out)
    })?;
    Ok(Tensor::from_vec(y, [leading, &[out]].concat(), rows.device())?)
}

/// The products of each expert's rows `x` with its matrix.
pub(crate) fn packed_groups<'a>(
    x: &'a [f32],
    weights: &'a [PackedWeights],
    bias: Option<&'a [f32]>,
    offsets: &[usize],
) -> Vec<Group<'a>> {
    let group = |(expert, (pair, packed)): (usize, (&[usize], &'a PackedWeights))| {
        let [out, inner] = packed.shape();
        Group {
            a: Operand::rows(&x[pair[0] * inner..pair[1] * inner], pair[1] - pair[0], inner, inner),
            b: Weights::Packed(packed),
            start: Start::bias(bias.map(|bias| &bias[expert * out..][..out])),
            out_offset: pair[0] * out,
            out_stride: out,
        }
    };
    offsets.windows(2).zip(weights).enumerate().filter(|(_, (pair, _))| pair[1] > pair[0]).map(group).collect()
}

pub(crate) fn check(
    offsets: &[usize],
    num_rows: usize,
    experts: usize,
    [inner, weight_inner]: [usize; 2],
) -> Result<()> {
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
    /// The products that `group` makes of each expert, its first row and the number of its rows; `len` values.
    fn products<'a>(&self, len: usize, group: impl Fn(usize, usize, usize) -> Group<'a>) -> Vec<f32> {
        let pairs = self.offsets.windows(2).enumerate();
        let groups: Vec<_> = pairs.map(|(e, pair)| group(e, pair[0], pair[1] - pair[0])).collect();
        gemm_new(self.isa, self.precision, &groups, len)
    }

    fn num_experts(&self) -> usize {
        self.offsets.len() - 1
    }

    fn num_rows(&self) -> usize {
        self.offsets[self.num_experts()]
    }

    /// `[rows, out]`
    fn product(&self, x: &[f32], w: &[f32], bias: Option<&[f32]>, inner: usize, out: usize) -> Vec<f32> {
        self.products(self.num_rows() * out, |e, first, rows| Group {
            a: Operand::rows(&x[first * inner..][..rows * inner], rows, inner, inner),
            b: Operand::rows(&w[e * out * inner..][..out * inner], out, inner, inner).into(),
            start: Start::bias(bias.map(|b| &b[e * out..][..out])),
            out_offset: first * out,
            out_stride: out,
        })
    }

    /// Gradient of the rows, `[rows, in]`.
    fn input_gradient(&self, grad: &[f32], w: &[f32], inner: usize, out: usize) -> Vec<f32> {
        self.products(self.num_rows() * inner, |e, first, rows| Group {
            a: Operand::rows(&grad[first * out..][..rows * out], rows, out, out),
            b: Operand::columns(&w[e * out * inner..][..out * inner], inner, out, inner).into(),
            start: Start::Zero,
            out_offset: first * inner,
            out_stride: inner,
        })
    }

    /// Gradient of the weights, `[experts, out, in]`; zeros for experts without rows.
    fn weight_gradient(&self, grad: &[f32], x: &[f32], inner: usize, out: usize) -> Vec<f32> {
        self.products(self.num_experts() * out * inner, |e, first, rows| Group {
            a: Operand::columns(&grad[first * out..][..rows * out], out, rows, out),
            b: Operand::columns(&x[first * inner..][..rows * inner], inner, rows, inner).into(),
            start: Start::Zero,
            out_offset: e * out * inner,
            out_stride: inner,
        })
    }

    /// Gradient of the bias, `[experts, out]`: sums over rows, in their order.
    fn bias_gradient(&self, grad: &[f32], out: usize) -> Vec<f32> {
        let experts = self.num_experts();
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
}

impl SliceOp for GroupedLinear {
    fn name(&self) -> &'static str {
        "grouped_linear"
    }

    fn forward(&self, inputs: &[Input<'_>]) -> (Vec<f32>, Vec<usize>) {
        let (x, w) = (inputs[0], inputs[1]);
        let out = w.rows() / self.num_experts();
        let y = self.product(x.values, w.values, inputs.get(2).map(|b| b.values), x.width(), out);
        (y, [&x.dims[..x.dims.len() - 1], &[out]].concat())
    }

    fn backward(&self, inputs: &[Input<'_>], _: &[f32], grad: &[f32]) -> Result<Vec<Vec<f32>>> {
        let (x, w) = (inputs[0], inputs[1]);
        let (inner, out) = (x.width(), w.rows() / self.num_experts());
        let mut gradients =
            vec![self.input_gradient(grad, w.values, inner, out), self.weight_gradient(grad, x.values, inner, out)];
        if inputs.len() == 3 {
            gradients.push(self.bias_gradient(grad, out));
        }
        Ok(gradients)
    }
}
