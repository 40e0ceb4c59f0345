//! Sums of whole tensors without gradients: the residual stream, and the mix of a residual MoE. The bits are candle's.

use crate::custom::with_inputs;
use crate::parallel::SharedMut;
use crate::{Error, Isa, Result, parallel, select};
use candle_core::Tensor;

/// Elements below which a second thread is not worth waking.
const LEAST_WORK: usize = 1 << 16;
/// Elements per task.
const TASK: usize = 1 << 13;

/// `a + b` of one shape, f32 on the CPU.
///
/// # Errors
/// [`Error::Argument`] if the shapes differ.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    same_shape(a, b)?;
    rows_of(&[a, b], 1, |isa, inputs, range, out| {
        let (a, b) = (&inputs[0][range.clone()], &inputs[1][range]);
        isa.vectorize(|| out.iter_mut().zip(a).zip(b).for_each(|((o, a), b)| *o = a + b));
    })
}

/// `a` and `b` `[tokens, d_model]` weighed by a softmax over `logits` `[tokens, 2]`.
///
/// # Errors
/// [`Error::Argument`] if a shape does not fit.
pub fn mix(a: &Tensor, b: &Tensor, logits: &Tensor) -> Result<Tensor> {
    same_shape(a, b)?;
    let (tokens, width) = a.dims2()?;
    if logits.dims() != [tokens, 2] {
        return Err(Error::Argument(format!("logits must have shape [{tokens}, 2], got {:?}", logits.dims())));
    }
    rows_of(&[a, b, logits], width, |isa, inputs, range, out| {
        let (a, b) = (&inputs[0][range.clone()], &inputs[1][range.clone()]);
        let first = range.start / width;
        isa.vectorize(|| {
            let rows = a.chunks_exact(width).zip(b.chunks_exact(width)).zip(out.chunks_exact_mut(width));
            for (row, ((a, b), out)) in rows.enumerate() {
                let [x, y] = [0, 1].map(|i| inputs[2][2 * (first + row) + i]);
                let max = if y > x { y } else { x };
                let [x, y] = [(x - max).exp(), (y - max).exp()];
                let (of_a, of_b) = (x / (x + y), y / (x + y));
                out.iter_mut().zip(a).zip(b).for_each(|((o, a), b)| *o = a * of_a + b * of_b);
            }
        });
    })
}

fn same_shape(a: &Tensor, b: &Tensor) -> Result<()> {
    if a.dims() == b.dims() {
        return Ok(());
    }
    Err(Error::Argument(format!("both sides of a sum must have one shape, got {:?} and {:?}", a.dims(), b.dims())))
}

/// Calls `work` with the inputs, a range of whole rows of the first, and that range of the output.
fn rows_of(
    tensors: &[&Tensor],
    width: usize,
    work: impl Fn(Isa, &[&[f32]], std::ops::Range<usize>, &mut [f32]) + Sync,
) -> Result<Tensor> {
    let isa = select::current();
    let out = with_inputs("a sum", tensors, |inputs| {
        let values: Vec<&[f32]> = inputs.iter().map(|input| input.values).collect();
        let len = values[0].len();
        let per_task = (TASK / width.max(1)).max(1) * width.max(1);
        let mut out = vec![0.0; len];
        let shared = SharedMut::new(&mut out);
        parallel::for_each_if(len, LEAST_WORK, len.div_ceil(per_task), |task| {
            let range = task * per_task..((task + 1) * per_task).min(len);
            // SAFETY: tasks have elements of their own.
            let into = unsafe { shared.slice(range.start, range.len()) };
            work(isa, &values, range, into);
        });
        out
    })?;
    Ok(Tensor::from_vec(out, tensors[0].shape(), tensors[0].device())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;
    use moe_core::testing::{random, values};
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
        let (a, b) = (random(1, &[2, 3], 1.0, DType::F32), random(2, &[3, 2], 1.0, DType::F32));
        assert!(add(&a, &b).unwrap_err().to_string().contains("one shape"));
        assert!(mix(&a, &a, &b).unwrap_err().to_string().contains("logits"));
        let nan = Tensor::new(&[[f32::NAN, 0.0], [0.0, f32::NAN]], a.device()).unwrap();
        assert!(values(&mix(&a, &a, &nan).unwrap()).iter().all(|v| v.is_nan()));
    }
}
