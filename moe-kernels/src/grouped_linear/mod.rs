//! Linear maps with gradients: one for all rows, or one per expert over the rows of each.
//!
//! Forward, gradient of the input and gradient of the weights are each one [`gemm`](crate::gemm) over all experts.

#[cfg(test)]
mod tests;

use crate::copies::{self, RoundedCopy};
use crate::custom::{self, Input, SliceOp, Target, with_inputs};
use crate::gemm::{Group, Operand, PackedWeights, Rounded, Start, Weights, gemm, gemm_new};
use crate::select::vectorize;
use crate::stack::PackedStack;
use crate::{Error, Isa, Precision, Result, parallel, select};
use candle_core::Tensor;
use moe_core::ops::{host, parts_per_expert, whole_experts};
use std::ops::Range;
use std::sync::Arc;

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
    apply_linear(x, weight, bias, (vec![0, leading.iter().product()], 1), precision)
}

fn apply_linear(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    (offsets, parts): (Vec<usize>, usize),
    precision: Precision,
) -> Result<Tensor> {
    let products = GroupedLinear { offsets, parts, precision, isa: select::current() };
    let copy = copies::of(weight, precision, products.isa);
    let op = Linear { products, copy };
    match bias {
        Some(bias) => custom::apply(op, &[x, weight, bias]),
        None => custom::apply(op, &[x, weight]),
    }
}

/// `rows_e W_e^T + b_e` for each expert `e` over its rows `offsets[e]..offsets[e + 1]`; the rows of each expert may be cut into
/// batches, whose gradients of the weights are summed in their order ([`moe_core::MoeOps::grouped_linear`]).
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
    let parts = check(offsets, num_rows, experts, [inner, weight_inner])?;
    if let Some(bias) = bias {
        host::expect_shape("bias", bias, &[experts, out])?;
    }
    apply_linear(rows, weight, bias, (offsets.to_vec(), parts), precision)
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
    weights: &PackedStack,
    bias: Option<&Tensor>,
    offsets: &[usize],
) -> Result<Tensor> {
    let (Some([out, weight_inner]), Some((&inner, leading))) = (weights.shape(), rows.dims().split_last()) else {
        return Err(Error::Argument("grouped_linear needs at least one expert and rows of at least one column".into()));
    };
    let experts = weights.len();
    let parts = check(offsets, leading.iter().product(), experts, [inner, weight_inner])?;
    let offsets = &whole_experts(offsets, parts);
    if let Some(bias) = bias.filter(|bias| bias.elem_count() != experts * out) {
        let dims = bias.dims();
        return Err(Error::Argument(format!("bias must have {experts} x {out} values, got shape {dims:?}")));
    }
    let inputs: Vec<&Tensor> = [rows].into_iter().chain(bias).collect();
    let y = with_inputs("linear", &inputs, |inputs| {
        let (x, bias) = (inputs[0].values, inputs.get(1).map(|bias| bias.values));
        weights.product_new(select::current(), x, bias, offsets, offsets[experts] * out)
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

/// Refuses offsets that do not fit; into how many batches they cut the rows of each expert.
pub(crate) fn check(
    offsets: &[usize],
    num_rows: usize,
    experts: usize,
    [inner, weight_inner]: [usize; 2],
) -> Result<usize> {
    let rising = offsets.windows(2).all(|pair| pair[0] <= pair[1]);
    let parts = parts_per_expert(offsets, experts);
    let Some(parts) = parts.filter(|_| offsets[0] == 0 && offsets.last() == Some(&num_rows) && rising) else {
        return Err(Error::Argument(format!(
            "offsets {offsets:?} must rise from 0 to {num_rows} rows, with one entry more than {experts} experts or a multiple \
             of them"
        )));
    };
    if inner != weight_inner {
        return Err(Error::Argument(format!("rows of width {inner} do not fit weights of input width {weight_inner}")));
    }
    Ok(parts)
}

/// The weights of one call, `[experts, out, in]`.
#[derive(Clone, Copy)]
pub(crate) enum Matrices<'a> {
    Plain(&'a [f32]),
    Rounded(&'a [u16]),
}

impl<'a> Matrices<'a> {
    /// The values, or the copy that there is of them.
    pub(crate) fn of(values: &'a [f32], copy: Option<&'a [u16]>) -> Self {
        copy.map_or(Self::Plain(values), Self::Rounded)
    }

    /// Matrix `e`, to be summed over `in`.
    fn rows(self, e: usize, out: usize, inner: usize) -> Weights<'a> {
        let range = e * out * inner..(e + 1) * out * inner;
        match self {
            Self::Plain(w) => Operand::rows(&w[range], out, inner, inner).into(),
            Self::Rounded(w) => Rounded::rows(&w[range], out, inner).into(),
        }
    }

    /// The same, to be summed over `out`.
    fn columns(self, e: usize, out: usize, inner: usize) -> Weights<'a> {
        let range = e * out * inner..(e + 1) * out * inner;
        match self {
            Self::Plain(w) => Operand::columns(&w[range], inner, out, inner).into(),
            Self::Rounded(w) => Rounded::columns(&w[range], inner, out).into(),
        }
    }
}

/// A linear map of each expert, as one operation.
struct Linear {
    products: GroupedLinear,
    /// Of the weights.
    copy: Option<Arc<RoundedCopy>>,
}

/// The products of one call.
pub(crate) struct GroupedLinear {
    /// Of each batch of each expert.
    pub(crate) offsets: Vec<usize>,
    /// Batches of each expert.
    pub(crate) parts: usize,
    pub(crate) precision: Precision,
    pub(crate) isa: Isa,
}

impl GroupedLinear {
    /// The products that `group` makes of each expert, its first row and the number of its rows; `len` values.
    fn products<'a>(&self, len: usize, group: impl Fn(usize, usize, usize) -> Group<'a>) -> Vec<f32> {
        let experts = (0..self.num_experts()).map(|e| {
            let (first, end) = (self.offsets[e * self.parts], self.offsets[(e + 1) * self.parts]);
            group(e, first, end - first)
        });
        gemm_new(self.isa, self.precision, &experts.collect::<Vec<_>>(), len)
    }

    pub(crate) fn num_experts(&self) -> usize {
        (self.offsets.len() - 1) / self.parts
    }

    pub(crate) fn num_rows(&self) -> usize {
        self.offsets[self.offsets.len() - 1]
    }

    /// The rows of batch `part` of expert `e`.
    fn rows_of(&self, e: usize, part: usize) -> Range<usize> {
        self.offsets[e * self.parts + part]..self.offsets[e * self.parts + part + 1]
    }

    /// `[rows, out]`
    pub(crate) fn product(
        &self,
        x: &[f32],
        w: Matrices<'_>,
        bias: Option<&[f32]>,
        inner: usize,
        out: usize,
    ) -> Vec<f32> {
        self.products(self.num_rows() * out, |e, first, rows| Group {
            a: Operand::rows(&x[first * inner..][..rows * inner], rows, inner, inner),
            b: w.rows(e, out, inner),
            start: Start::bias(bias.map(|b| &b[e * out..][..out])),
            out_offset: first * out,
            out_stride: out,
        })
    }

    /// Gradient of the rows, `[rows, in]`.
    pub(crate) fn input_gradient(&self, grad: &[f32], w: Matrices<'_>, inner: usize, out: usize) -> Vec<f32> {
        self.products(self.num_rows() * inner, |e, first, rows| Group {
            a: Operand::rows(&grad[first * out..][..rows * out], rows, out, out),
            b: w.columns(e, out, inner),
            start: Start::Zero,
            out_offset: first * inner,
            out_stride: inner,
        })
    }

    /// Brings the gradient of the weights, `[experts, out, in]`; zeros for experts without rows. Each batch's products are
    /// finished before they are added to those of the batches before it: one chain over all rows would round otherwise than
    /// batches that are run one after the other do.
    pub(crate) fn bring_weight_gradient(&self, grad: &[f32], x: &[f32], inner: usize, out: usize, to: &mut Target) {
        let size = out * inner;
        let product = |start: Start<'static>| {
            move |e: usize, rows: Range<usize>| Group {
                a: Operand::columns(&grad[rows.start * out..rows.end * out], out, rows.len(), out),
                b: Operand::columns(&x[rows.start * inner..rows.end * inner], inner, rows.len(), inner).into(),
                start,
                out_offset: e * size,
                out_stride: inner,
            }
        };
        let first = || -> Vec<Group<'_>> {
            let product = product(Start::Zero);
            (0..self.num_experts()).map(|e| product(e, self.rows_of(e, 0))).collect()
        };
        let (sums, done) = match to {
            Target::Unwanted => return,
            Target::Own(own) => {
                let new = gemm_new(self.isa, self.precision, &first(), self.num_experts() * size);
                (own.insert(new).as_mut_slice(), 1)
            }
            Target::Kept(slice) if slice.is_stale() => {
                let sums = slice.sum();
                gemm(self.isa, self.precision, &first(), sums);
                (sums, 1)
            }
            Target::Kept(slice) => (slice.sum(), 0),
        };
        for part in done..self.parts {
            let product = product(Start::Added);
            let batch =
                (0..self.num_experts()).map(|e| (e, self.rows_of(e, part))).filter(|(_, rows)| !rows.is_empty());
            let groups: Vec<Group<'_>> = batch.map(|(e, rows)| product(e, rows)).collect();
            gemm(self.isa, self.precision, &groups, sums);
        }
    }

    /// Adds the gradient of the bias, `[experts, out]`: sums over the rows of each batch in their order, and over batches in
    /// theirs.
    pub(crate) fn add_bias_gradient(&self, grad: &[f32], out: usize, sums: &mut [f32]) {
        let experts = self.num_experts();
        let shared = parallel::SharedMut::new(sums);
        // Columns in strips, so that one group alone gives work to several threads too.
        const STRIP: usize = 256;
        let strips = out.div_ceil(STRIP);
        parallel::for_each_if(grad.len(), 1 << 16, experts * strips, |task| {
            let (e, start) = (task / strips, task % strips * STRIP);
            let width = STRIP.min(out - start);
            // SAFETY: each task sums columns of its own.
            let into = unsafe { shared.slice(e * out + start, width) };
            let offsets = &self.offsets[e * self.parts..][..=self.parts];
            vectorize!(self.isa, (offsets: &[usize], grad: &[f32], out: usize, start: usize, into: &mut [f32]) {
                let (mut batch, width) = ([0.0; STRIP], into.len());
                for part in offsets.windows(2) {
                    batch[..width].fill(0.0);
                    for row in part[0]..part[1] {
                        for (sum, value) in batch[..width].iter_mut().zip(&grad[row * out + start..][..width]) {
                            *sum += value;
                        }
                    }
                    into.iter_mut().zip(&batch[..width]).for_each(|(sum, term)| *sum += term);
                }
            });
        });
    }
}

impl SliceOp for Linear {
    fn name(&self) -> &'static str {
        "grouped_linear"
    }

    fn forward(&self, inputs: &[Input<'_>]) -> (Vec<f32>, Vec<usize>) {
        let (x, w) = (inputs[0], inputs[1]);
        let out = w.rows() / self.products.num_experts();
        let copy = self.copy.as_ref().map(|copy| copy.read());
        let matrices = Matrices::of(w.values, copy.as_deref().map(Vec::as_slice));
        let y = self.products.product(x.values, matrices, inputs.get(2).map(|b| b.values), x.width(), out);
        (y, [&x.dims[..x.dims.len() - 1], &[out]].concat())
    }

    fn backward(&self, inputs: &[Input<'_>], _: &[f32], grad: &[f32], to: &mut [Target]) -> Result<()> {
        let (x, w, products) = (inputs[0], inputs[1], &self.products);
        let (inner, out) = (x.width(), w.rows() / products.num_experts());
        let copy = self.copy.as_ref().map(|copy| copy.read());
        let matrices = Matrices::of(w.values, copy.as_deref().map(Vec::as_slice));
        to[0].bring(|| products.input_gradient(grad, matrices, inner, out));
        products.bring_weight_gradient(grad, x.values, inner, out, &mut to[1]);
        if let Some(bias) = to.get_mut(2) {
            bias.add_to(products.num_experts() * out, |sums| products.add_bias_gradient(grad, out, sums));
        }
        Ok(())
    }
}
