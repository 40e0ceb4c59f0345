//! Attention whose heads have a sink: a learned logit more in the softmax's denominator, of which nothing goes into the result.
//!
//! # Source
//! gpt-oss (2508.10925); transformers 5.23 `models/gpt_oss`.

use super::blocks::{Heads, Place, Strip, TrainedSinks, Training};
use super::{AttentionShape, HeadDropout};
use crate::custom::{self, Input, SliceOp, Target};
use crate::parallel::SharedMut;
use crate::{Precision, Result};
use candle_core::{D, Tensor};
use moe_core::ops::host::expect_shape;
use moe_core::tape;

/// [`super::grouped_query_attention`] with `sinks` `[num_heads]`, and with probabilities dropped if any are.
///
/// # Shapes
/// `[queries, keys, values]` as there; returns the shape of the queries
///
/// # Errors
/// [`crate::Error::Argument`] or [`crate::Error::Moe`] if the shapes do not fit.
pub fn grouped_query_attention_with_sinks(
    [queries, keys, values]: [&Tensor; 3],
    sinks: &Tensor,
    shape: AttentionShape,
    seq_len: usize,
    dropout: Option<HeadDropout>,
    precision: Precision,
) -> Result<Tensor> {
    let head_dim = shape.check(queries, keys, values, seq_len)?;
    expect_shape("sinks", sinks, &[shape.num_heads])?;
    let mut heads = Heads::new(shape, head_dim, precision);
    if let Some(dropout) = dropout {
        heads = heads.dropping(dropout);
    }
    let op = WithSinks { heads, seq_len };
    if tape::is_active() {
        return custom::apply(op, &[queries, keys, values, sinks]);
    }
    // candle's operations take no more than three tensors.
    let qkv = Tensor::cat(&[queries, keys, values], D::Minus1)?;
    custom::apply(op, &[&qkv, sinks])
}

/// Inputs: queries, keys and values, or one `[q | k | v]`; then the sinks.
struct WithSinks {
    heads: Heads,
    seq_len: usize,
}

impl WithSinks {
    /// Queries, keys and values.
    fn parts<'a>(&self, inputs: &[Input<'a>]) -> [Strip<'a>; 3] {
        let (q_width, kv_width) = (self.heads.d_model(), self.heads.kv_width());
        match inputs {
            [q, k, v, _] => {
                [Strip::new(q.values, q_width), Strip::new(k.values, kv_width), Strip::new(v.values, kv_width)]
            }
            all => [0, q_width, q_width + kv_width].map(|column| {
                let values = all[0].values;
                Strip::new(&values[column.min(values.len())..], q_width + 2 * kv_width)
            }),
        }
    }

    fn batch(&self, inputs: &[Input<'_>]) -> usize {
        inputs[0].rows() / self.seq_len.max(1)
    }
}

impl SliceOp for WithSinks {
    fn name(&self) -> &'static str {
        "grouped_query_attention_with_sinks"
    }

    fn needs_output(&self) -> bool {
        true
    }

    fn forward(&self, inputs: &[Input<'_>]) -> (Vec<f32>, Vec<usize>) {
        let sinks = inputs[inputs.len() - 1].values;
        let sizes = (self.batch(inputs), self.seq_len);
        let out = self.heads.forward_batch(self.parts(inputs), Some(sinks), sizes);
        let leading = &inputs[0].dims[..inputs[0].dims.len() - 1];
        (out, [leading, &[self.heads.d_model()]].concat())
    }

    fn backward(&self, inputs: &[Input<'_>], out: &[f32], grad: &[f32], to: &mut [Target]) -> Result<()> {
        let (d_model, kv_width, batch) = (self.heads.d_model(), self.heads.kv_width(), self.batch(inputs));
        let sinks = inputs[inputs.len() - 1].values;
        let mut into: Vec<Vec<f32>> = inputs[..inputs.len() - 1].iter().map(|i| vec![0.0; i.values.len()]).collect();
        // Of each sequence a row, so that their sum has one order.
        let mut d_sinks = vec![0.0; batch * sinks.len()];
        let d_qkv = match into.as_mut_slice() {
            [q, k, v] => {
                let place = |values: &mut [f32], stride| Place::new(SharedMut::new(values), stride);
                [place(q, d_model), place(k, kv_width), place(v, kv_width)]
            }
            all => {
                let place = Place::new(SharedMut::new(&mut all[0]), d_model + 2 * kv_width);
                [0, d_model, d_model + kv_width].map(|column| place.from(0, column))
            }
        };
        let all = Training {
            sinks: Some(TrainedSinks {
                values: sinks,
                gradient: Place::new(SharedMut::new(&mut d_sinks), sinks.len()),
            }),
            qkv: self.parts(inputs),
            out: Strip::new(out, d_model),
            grad: Strip::new(grad, d_model),
            d_qkv,
        };
        // SAFETY: the buffers are borrowed here alone, and the parts of one have columns of their own.
        unsafe { self.heads.backward_batch(all, batch, self.seq_len) };
        let last = to.len() - 1;
        to.iter_mut().zip(into).for_each(|(to, gradient)| to.bring(|| gradient));
        to[last].add_to(sinks.len(), |sums| {
            for row in d_sinks.chunks_exact(sinks.len()) {
                sums.iter_mut().zip(row).for_each(|(sum, d)| *sum += d);
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    //! Against ordinary candle operations in f64; whole passes against pages, bit for bit.

    use super::*;
    use crate::attention::{new_pages, paged_attention_with_sinks, write_pages};
    use candle_core::{DType, Device, Var};
    use moe_core::ops::{CandleOps, DecoderOps, Dropout, KvShape, PagedKv, PagedSequence};
    use moe_core::testing::{assert_close, random, random_var, values};

    const SHAPES: [AttentionShape; 4] = [
        AttentionShape::new(4, 4),
        AttentionShape { window: Some(7), ..AttentionShape::new(6, 2) },
        AttentionShape { scale: Some(0.3), ..AttentionShape::new(50, 1) },
        AttentionShape { chunk: Some(16), ..AttentionShape::new(4, 2) },
    ];

    fn vars(shape: AttentionShape, batch: usize, seq: usize) -> [Var; 4] {
        let part = |seed, heads| random_var(seed, &[batch, seq, heads * 9], 1.0, DType::F32);
        let sinks = random_var(4, &[shape.num_heads], 2.0, DType::F32);
        [part(1, shape.num_heads), part(2, shape.num_kv_heads), part(3, shape.num_kv_heads), sinks]
    }

    fn gradients(y: &Tensor, factors: &Tensor, vars: &[Var]) -> Vec<Tensor> {
        let grads = (y * factors).unwrap().sum_all().unwrap().backward().unwrap();
        vars.iter().map(|var| grads.get(var).unwrap().clone()).collect()
    }

    #[test]
    fn values_and_gradients_equal_the_reference() {
        for shape in SHAPES {
            for (batch, seq) in [(1, 1), (2, 5), (1, 49), (2, 70)] {
                for (dropout, precision, tolerance) in
                    [(false, Precision::F32, 1e-5), (true, Precision::F32, 1e-5), (false, Precision::Bf16, 4e-2)]
                {
                    let drop = dropout.then(|| HeadDropout::of_all(Dropout::new(0.3, 7).unwrap()));
                    let vars = vars(shape, batch, seq);
                    let wide = vars.each_ref().map(|v| Var::from_tensor(&v.to_dtype(DType::F64).unwrap()).unwrap());
                    let [q, k, v, sinks] = &vars;
                    let run =
                        || grouped_query_attention_with_sinks([q, k, v], sinks, shape, seq, drop, precision).unwrap();
                    let got = run();
                    let [q, k, v, sinks] = &wide;
                    let want = CandleOps.attention_with_sinks([q, k, v], sinks, shape, seq, drop).unwrap();
                    let label = format!("{shape:?} {batch}x{seq} {precision:?}, dropout {dropout}");
                    assert_close(&got, &want, tolerance, &label);
                    let factors = random(6, got.dims(), 1.0, DType::F32);
                    let got = gradients(&got, &factors, &vars);
                    let want = gradients(&want, &factors.to_dtype(DType::F64).unwrap(), &wide);
                    // A key head's gradient is the sum of its query heads', a sink's that of all rows.
                    let tolerance = 2.0 * tolerance * (shape.num_heads / shape.num_kv_heads) as f64;
                    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                        assert_close(got, want, tolerance, &format!("{label} d{i}"));
                    }
                    // On the tape, without the copy.
                    let (y, recording) = tape::Tape::record(run);
                    let mut buffers = tape::GradBuffers::new(["q", "k", "v", "sinks"].into_iter().zip(&vars)).unwrap();
                    buffers.begin();
                    recording.backward(vec![(y, factors)], &mut buffers.gradients()).unwrap();
                    buffers.finish();
                    for (i, (taped, plain)) in buffers.all().into_iter().zip(&got).enumerate() {
                        let taped: Vec<f64> = taped.iter().map(|v| f64::from(*v)).collect();
                        assert_eq!(taped, values(plain), "{label} d{i}");
                    }
                }
            }
        }
    }

    /// Without a sink that counts it is the attention without one.
    #[test]
    fn a_sink_far_below_changes_nothing_and_one_far_above_takes_all() {
        let shape = SHAPES[0];
        let [q, k, v, _] = vars(shape, 1, 20);
        let with = |sink: f32| {
            let sinks = Tensor::full(sink, shape.num_heads, &Device::Cpu).unwrap();
            grouped_query_attention_with_sinks([&q, &k, &v], &sinks, shape, 20, None, Precision::F32).unwrap()
        };
        let plain = crate::attention::grouped_query_attention(&q, &k, &v, shape, 20, Precision::F32).unwrap();
        assert_close(&with(-1e4), &plain, 1e-6, "far below");
        assert!(values(&with(1e4)).iter().all(|v| v.abs() < 1e-30));
        let bad = Tensor::zeros(3, DType::F32, &Device::Cpu).unwrap();
        let refused = grouped_query_attention_with_sinks([&q, &k, &v], &bad, shape, 20, None, Precision::F32);
        assert!(refused.unwrap_err().to_string().contains("sinks"));
    }

    /// Token by token, in chunks and at once, in rows and packed.
    #[test]
    fn pages_have_the_bits_of_the_whole_pass() {
        for (shape, precision, block_size) in SHAPES
            .into_iter()
            .flat_map(|shape| [Precision::F32, Precision::Bf16].map(|precision| (shape, precision)))
            .flat_map(|(shape, precision)| [5, 32].map(|size| (shape, precision, size)))
        {
            let seq = 70;
            let [q, k, v, sinks] = vars(shape, 1, seq).map(|v| v.as_detached_tensor());
            let whole = grouped_query_attention_with_sinks([&q, &k, &v], &sinks, shape, seq, None, precision).unwrap();
            let [q, k, v, whole] = [q, k, v, whole].map(|t| t.squeeze(0).unwrap());
            let kv = KvShape { num_kv_heads: shape.num_kv_heads, head_dim: 9 };
            let num_blocks = seq.div_ceil(block_size);
            let [keys, values_] = new_pages(num_blocks, block_size, kv, precision, &Device::Cpu).unwrap();
            let pool = PagedKv { keys: &keys, values: &values_, block_size, shape: kv };
            let blocks: Vec<u32> = (0..num_blocks as u32).rev().collect();
            let slot = |t: usize| blocks[t / block_size] * block_size as u32 + (t % block_size) as u32;
            let mut len = 0;
            for new in [1, 1, 13, 30, 1, 24] {
                let part = |t: &Tensor| t.narrow(0, len, new).unwrap();
                let slots: Vec<u32> = (len..len + new).map(slot).collect();
                write_pages(pool, &part(&k), &part(&v), &slots, precision).unwrap();
                let want = values(&part(&whole));
                len += new;
                let sequence = PagedSequence { blocks: &blocks, len, new };
                let queries = q.narrow(0, len - new, new).unwrap();
                let got = paged_attention_with_sinks(&queries, &sinks, pool, &[sequence], shape, precision).unwrap();
                assert_eq!(values(&got), want, "{shape:?} {precision:?} {block_size}: {len}");
                if pool.is_in_rows() && precision == Precision::F32 {
                    let want =
                        CandleOps.paged_attention_with_sinks(&queries, &sinks, pool, &[sequence], shape).unwrap();
                    assert_close(&got, &want, 1e-5, &format!("{shape:?}: {len}"));
                }
            }
        }
    }
}
