//! Sums of whole tensors: the residual stream, and the mix of a residual MoE. The bits are candle's.

use crate::custom::{self, Input, SliceOp, Target, with_inputs};
use crate::parallel::SharedMut;
use crate::select::vectorize;
use crate::{Error, Isa, Result, parallel, select};
use candle_core::Tensor;
use moe_core::ops::host;
use moe_core::tape::{self, Edge};

/// Elements below which a second thread is not worth waking.
const LEAST_WORK: usize = 1 << 16;
/// Elements per task.
const TASK: usize = 1 << 13;

/// `a + b` of one shape, f32 on the CPU. Both get the gradient itself, not a copy.
///
/// # Errors
/// [`Error::Argument`] if the shapes differ.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    same_shape(a, b)?;
    if !tape::is_active() && (a.track_op() || b.track_op()) {
        return Ok((a + b)?);
    }
    let isa = select::current();
    let sum = with_inputs("a sum", &[a, b], |inputs| {
        let (a, b) = (inputs[0].values, inputs[1].values);
        parallel::filled(a.len(), TASK, LEAST_WORK, |range, out| {
            let (a, b) = (&a[range.clone()], &b[range]);
            vectorize!(isa, (a: &[f32], b: &[f32], out: &mut [f32]) {
                out.iter_mut().zip(a).zip(b).for_each(|((o, a), b)| *o = a + b);
            });
        })
    })?;
    if !tape::tracks(&[a, b]) {
        return Ok(Tensor::from_vec(sum, a.shape(), a.device())?);
    }
    let out = tape::output(sum, a.dims(), a.device())?;
    let edges = [Edge::of(a), Edge::of(b)];
    tape::record(&[&out], move |gradients, into| {
        let gradient = gradients.into_iter().flatten();
        gradient
            .flat_map(|g| edges.iter().map(move |edge| (edge, g.clone())))
            .try_for_each(|(edge, g)| into.give(edge, g))
    });
    Ok(out)
}

/// `a` and `b` `[tokens, d_model]` weighed by a softmax over `logits` `[tokens, 2]`.
///
/// # Errors
/// [`Error::Argument`] if a shape does not fit.
pub fn mix(a: &Tensor, b: &Tensor, logits: &Tensor) -> Result<Tensor> {
    same_shape(a, b)?;
    let (tokens, _) = a.dims2()?;
    if logits.dims() != [tokens, 2] {
        return Err(Error::Argument(format!("logits must have shape [{tokens}, 2], got {:?}", logits.dims())));
    }
    custom::apply(Mix(select::current()), &[a, b, logits])
}

/// The weights of `a` and `b` of one row.
fn weights_of(logits: &[f32], row: usize) -> [f32; 2] {
    let [x, y] = [0, 1].map(|i| logits[2 * row + i]);
    let max = if y > x { y } else { x };
    let [x, y] = [(x - max).exp(), (y - max).exp()];
    [x / (x + y), y / (x + y)]
}

struct Mix(Isa);

impl Mix {
    /// Elements of whole rows of one task.
    fn part(width: usize) -> usize {
        (TASK / width.max(1)).max(1) * width
    }

    /// The gradient times one of the two weights of each row.
    fn weighed(&self, grad: &[f32], logits: &[f32], width: usize, which: usize) -> Vec<f32> {
        parallel::filled(grad.len(), Self::part(width), LEAST_WORK, |range, out| {
            let first = range.start / width;
            let rows = grad[range].chunks_exact(width).zip(out.chunks_exact_mut(width));
            for (row, (grad, out)) in rows.enumerate() {
                let weight = weights_of(logits, first + row)[which];
                vectorize!(self.0, (grad: &[f32], weight: f32, out: &mut [f32]) {
                    out.iter_mut().zip(grad).for_each(|(o, g)| *o = g * weight);
                });
            }
        })
    }

    /// Gradient of the logits: of each row, from the products of its gradient with both sides.
    fn of_logits(&self, [a, b, logits]: [&[f32]; 3], grad: &[f32], width: usize) -> Vec<f32> {
        let mut out = vec![0.0; logits.len()];
        let (rows, shared) = (logits.len() / 2, SharedMut::new(&mut out));
        let per_task = (TASK / width.max(1)).max(1);
        parallel::for_each_if(grad.len(), LEAST_WORK, rows.div_ceil(per_task), |task| {
            for row in task * per_task..((task + 1) * per_task).min(rows) {
                let range = row * width..(row + 1) * width;
                let (grad, a, b) = (&grad[range.clone()], &a[range.clone()], &b[range]);
                let along = |side: &[f32]| {
                    vectorize!(self.0, (grad: &[f32], side: &[f32]) -> f32 {
                        host::sum_by(grad.len(), |i| grad[i] * side[i])
                    })
                };
                let (of_a, of_b) = (along(a), along(b));
                let [x, y] = weights_of(logits, row);
                let mean = x * of_a + y * of_b;
                // SAFETY: each row belongs to one task.
                let into = unsafe { shared.slice(2 * row, 2) };
                into.copy_from_slice(&[x * (of_a - mean), y * (of_b - mean)]);
            }
        });
        out
    }
}

impl SliceOp for Mix {
    fn name(&self) -> &'static str {
        "mix"
    }

    fn forward(&self, inputs: &[Input<'_>]) -> (Vec<f32>, Vec<usize>) {
        let (a, b, logits, width) = (inputs[0].values, inputs[1].values, inputs[2].values, inputs[0].width());
        let out = parallel::filled(a.len(), Self::part(width), LEAST_WORK, |range, out| {
            let (a, b, first) = (&a[range.clone()], &b[range.clone()], range.start / width);
            let rows = a.chunks_exact(width).zip(b.chunks_exact(width)).zip(out.chunks_exact_mut(width));
            for (row, ((a, b), out)) in rows.enumerate() {
                let [of_a, of_b] = weights_of(logits, first + row);
                vectorize!(self.0, (a: &[f32], of_a: f32, b: &[f32], of_b: f32, out: &mut [f32]) {
                    out.iter_mut().zip(a).zip(b).for_each(|((o, a), b)| *o = a * of_a + b * of_b);
                });
            }
        });
        (out, inputs[0].dims.to_vec())
    }

    fn backward(&self, inputs: &[Input<'_>], _: &[f32], grad: &[f32], to: &mut [Target]) -> Result<()> {
        let ([a, b, logits], width) = ([0, 1, 2].map(|i| inputs[i].values), inputs[0].width());
        to[0].bring(|| self.weighed(grad, logits, width, 0));
        to[1].bring(|| self.weighed(grad, logits, width, 1));
        to[2].bring(|| self.of_logits([a, b, logits], grad, width));
        Ok(())
    }
}

fn same_shape(a: &Tensor, b: &Tensor) -> Result<()> {
    if a.dims() == b.dims() {
        return Ok(());
    }
    Err(Error::Argument(format!("both sides of a sum must have one shape, got {:?} and {:?}", a.dims(), b.dims())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;
    use moe_core::testing::{assert_close, random, random_var, values};
    use moe_core::{CandleOps, MoeOps};

    #[test]
    fn sums_have_the_bits_of_candles() {
        for (tokens, width) in [(0, 7), (1, 1), (3, 33), (700, 257)] {
            let (a, b) = (random(1, &[tokens, width], 1.0, DType::F32), random(2, &[tokens, width], 3.0, DType::F32));
            let logits = random(3, &[tokens, 2], 4.0, DType::F32);
            assert_eq!(values(&add(&a, &b).unwrap()), values(&(&a + &b).unwrap()), "{tokens} x {width}");
            let want = CandleOps.mix(&a, &b, &logits).unwrap();
            assert_eq!(values(&mix(&a, &b, &logits).unwrap()), values(&want), "{tokens} x {width}");
        }
        let vars =
            [(1, [70, 33]), (2, [70, 33]), (3, [70, 2])].map(|(seed, dims)| random_var(seed, &dims, 2.0, DType::F32));
        let [a, b, logits] = vars.each_ref().map(|var| var.as_tensor());
        let gradients = |y: Tensor| {
            let grads = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            vars.each_ref().map(|var| grads.get(var).unwrap().clone())
        };
        let (got, want) = (gradients(mix(a, b, logits).unwrap()), gradients(CandleOps.mix(a, b, logits).unwrap()));
        for (index, (got, want)) in got.iter().zip(&want).enumerate() {
            assert_close(got, want, 2e-5, &format!("gradient {index} of mix"));
        }
        let (a, b) = (random(1, &[2, 3], 1.0, DType::F32), random(2, &[3, 2], 1.0, DType::F32));
        assert!(add(&a, &b).unwrap_err().to_string().contains("one shape"));
        assert!(mix(&a, &a, &b).unwrap_err().to_string().contains("logits"));
        let nan = Tensor::new(&[[f32::NAN, 0.0], [0.0, f32::NAN]], a.device()).unwrap();
        assert!(values(&mix(&a, &a, &nan).unwrap()).iter().all(|v| v.is_nan()));
    }
}
