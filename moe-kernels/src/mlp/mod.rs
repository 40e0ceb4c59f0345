//! Feed-forward networks as one operation: both linear maps of each expert and the activation between them, with a backward
//! pass of their own. What lies between the maps is kept once, before the activation, whose result is computed again on the way
//! back; there both are overwritten by their gradients.
//!
//! The bits are those of the three operations one after the other.

#[cfg(test)]
mod tests;

use crate::activation::{apply_into, gradient_in_place};
use crate::buffer::with_scratch_f32;
use crate::copies::{self, RoundedCopy};
use crate::custom::{self, Input, SliceOp, Target};
use crate::grouped_linear::{GroupedLinear, Matrices, check};
use crate::{Error, Precision, Result, select};
use candle_core::Tensor;
use moe_core::ops::host::expect_shape;
use moe_core::tape;
use moe_core::{Activation, MlpWeights};
use std::sync::{Arc, Mutex, PoisonError};

/// Each expert's network over its rows ([`moe_core::MoeOps::experts`]), while a tape is active: candle's operations take no
/// more than three tensors.
///
/// # Shapes
/// `rows` `[rows, d_model]` to the same
///
/// # Errors
/// [`Error::Argument`] if a shape does not fit `offsets`.
pub(crate) fn experts(
    rows: &Tensor,
    weights: &MlpWeights,
    activation: Activation,
    offsets: &[usize],
    precision: Precision,
) -> Result<Tensor> {
    let (fc_in, fc_out) = (weights.fc_in.tensor()?, weights.fc_out.tensor()?);
    let ((num_rows, d_model), (experts, width, inner)) = (rows.dims2()?, fc_in.dims3()?);
    let parts = check(offsets, num_rows, experts, [d_model, inner])?;
    expect_shape("fc_out", fc_out, &[experts, d_model, width / activation.inputs()])?;
    apply(rows, [fc_in, fc_out], weights, activation, (offsets.to_vec(), parts), precision)
}

/// One network over the last dimension ([`moe_core::Ops::mlp`]), while a tape is active.
///
/// # Shapes
/// `[.., d_model]` to the same
///
/// # Errors
/// [`Error::Argument`] if the sizes do not fit.
pub(crate) fn dense(
    x: &Tensor,
    [fc_in, fc_out]: [&Tensor; 2],
    weights: &MlpWeights,
    activation: Activation,
    precision: Precision,
) -> Result<Tensor> {
    let ((width, inner), d_model) = (fc_in.dims2()?, x.dim(candle_core::D::Minus1)?);
    if inner != d_model {
        return Err(Error::Argument(format!("fc_in of input width {inner} got an input of width {d_model}")));
    }
    expect_shape("fc_out", fc_out, &[d_model, width / activation.inputs()])?;
    let rows = x.elem_count() / d_model.max(1);
    apply(x, [fc_in, fc_out], weights, activation, (vec![0, rows], 1), precision)
}

fn apply(
    rows: &Tensor,
    [fc_in, fc_out]: [&Tensor; 2],
    weights: &MlpWeights,
    activation: Activation,
    (offsets, parts): (Vec<usize>, usize),
    precision: Precision,
) -> Result<Tensor> {
    let (fc_in_bias, fc_out_bias) = (weights.fc_in_bias.as_ref(), weights.fc_out_bias.as_ref());
    if let Some(bias) = fc_in_bias {
        expect_shape("fc_in_bias", bias, &fc_in.dims()[..fc_in.rank() - 1])?;
    }
    if let Some(bias) = fc_out_bias {
        expect_shape("fc_out_bias", bias, &fc_out.dims()[..fc_out.rank() - 1])?;
    }
    let inputs: Vec<&Tensor> = [rows, fc_in, fc_out].into_iter().chain(fc_in_bias).chain(fc_out_bias).collect();
    let isa = select::current();
    let op = GroupedMlp {
        linear: GroupedLinear { offsets, parts, precision, isa },
        copies: [fc_in, fc_out].map(|weight| copies::of(weight, precision, isa)),
        activation,
        has_bias: [fc_in_bias.is_some(), fc_out_bias.is_some()],
        keeps_hidden: tape::tracks(&inputs),
        hidden: Mutex::new(None),
    };
    custom::apply(op, &inputs)
}

/// Inputs: rows, `fc_in`, `fc_out`, and the biases that there are.
struct GroupedMlp {
    linear: GroupedLinear,
    /// Of `fc_in` and `fc_out`.
    copies: [Option<Arc<RoundedCopy>>; 2],
    activation: Activation,
    has_bias: [bool; 2],
    keeps_hidden: bool,
    /// `[rows, d_ff * inputs]` before the activation, from the forward pass to the backward pass.
    hidden: Mutex<Option<Vec<f32>>>,
}

/// The widths of one call.
#[derive(Clone, Copy)]
struct Widths {
    d_model: usize,
    /// Of the hidden rows before the activation.
    width: usize,
    d_ff: usize,
}

impl GroupedMlp {
    fn widths(&self, inputs: &[Input<'_>]) -> Widths {
        let width = inputs[1].rows() / self.linear.num_experts();
        Widths { d_model: inputs[0].width(), width, d_ff: width / self.activation.inputs() }
    }

    /// Index of the biases among the inputs.
    fn biases(&self) -> [Option<usize>; 2] {
        let [first, second] = self.has_bias;
        [first.then_some(3), second.then_some(3 + usize::from(first))]
    }
}

impl SliceOp for GroupedMlp {
    fn name(&self) -> &'static str {
        "mlp"
    }

    fn forward(&self, inputs: &[Input<'_>]) -> (Vec<f32>, Vec<usize>) {
        let Widths { d_model, width, d_ff } = self.widths(inputs);
        let [in_bias, out_bias] = self.biases().map(|index| index.map(|index| inputs[index].values));
        let copies = self.copies.each_ref().map(|copy| copy.as_ref().map(|copy| copy.read()));
        let [fc_in, fc_out] =
            [0, 1].map(|i| Matrices::of(inputs[1 + i].values, copies[i].as_deref().map(Vec::as_slice)));
        let hidden = self.linear.product(inputs[0].values, fc_in, in_bias, d_model, width);
        let out = with_scratch_f32(self.linear.num_rows() * d_ff, |activated| {
            apply_into(self.linear.isa, self.activation, &hidden, width, activated);
            self.linear.product(activated, fc_out, out_bias, d_ff, d_model)
        });
        if self.keeps_hidden {
            *self.hidden.lock().unwrap_or_else(PoisonError::into_inner) = Some(hidden);
        }
        (out, inputs[0].dims.to_vec())
    }

    fn backward(&self, inputs: &[Input<'_>], _: &[f32], grad: &[f32], to: &mut [Target]) -> Result<()> {
        let kept = self.hidden.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(mut hidden) = kept else {
            return Err(Error::Argument("an mlp can be differentiated once; compute it again".into()));
        };
        let Widths { d_model, width, d_ff } = self.widths(inputs);
        let [in_bias, out_bias] = self.biases();
        let rows = inputs[0].values;
        let linear = &self.linear;
        let copies = self.copies.each_ref().map(|copy| copy.as_ref().map(|copy| copy.read()));
        let [fc_in, fc_out] =
            [0, 1].map(|i| Matrices::of(inputs[1 + i].values, copies[i].as_deref().map(Vec::as_slice)));

        let mut activated = linear.input_gradient(grad, fc_out, d_ff, d_model);
        gradient_in_place(linear.isa, self.activation, &mut hidden, width, &mut activated);
        linear.bring_weight_gradient(grad, &activated, d_ff, d_model, &mut to[2]);
        drop(activated);
        if let Some(bias) = out_bias {
            to[bias].add_to(linear.num_experts() * d_model, |sums| linear.add_bias_gradient(grad, d_model, sums));
        }
        linear.bring_weight_gradient(&hidden, rows, d_model, width, &mut to[1]);
        if let Some(bias) = in_bias {
            to[bias].add_to(linear.num_experts() * width, |sums| linear.add_bias_gradient(&hidden, width, sums));
        }
        to[0].bring(|| linear.input_gradient(&hidden, fc_in, d_model, width));
        Ok(())
    }
}
