//! The packed experts against `moe-core`'s layer parts in f64.

use super::*;
use crate::Precision;
use crate::quantized::{QuantFormat, QuantizedWeights};
use candle_core::{DType, Device, Tensor};
use moe_core::ops::{CandleOps, MoeOps};
use moe_core::testing::{assert_close, random, skewed_expert_ids, values};
use moe_core::{ExpertMlps, ExpertRows, Experts, MlpWeights};
use std::sync::Arc;

fn table(num_tokens: usize, num_experts: usize, top_k: usize) -> DispatchTable {
    let first = skewed_expert_ids(3, num_tokens, num_experts, 0.6);
    let expert_ids: Vec<u32> =
        (0..num_tokens * top_k).map(|c| (first[c / top_k] + (c % top_k) as u32) % num_experts as u32).collect();
    let mut counts = vec![0; num_experts];
    let slots: Vec<u32> = (expert_ids.iter())
        .map(|&e| {
            counts[e as usize] += 1;
            counts[e as usize] - 1
        })
        .collect();
    DispatchTable::from_slots(num_tokens, top_k, num_experts, &expert_ids, &slots)
}

fn f32s(tensor: &Tensor) -> Vec<f32> {
    values(tensor).iter().map(|&v| v as f32).collect()
}

/// The weights `[experts, out, in]` that a format keeps of these; floats are left as they are.
fn kept(weights: &Tensor, format: WeightFormat) -> Tensor {
    let WeightFormat::Quantized(format) = format else { return weights.clone() };
    let (experts, out, inner) = weights.dims3().unwrap();
    let one = |e| QuantizedWeights::new(format, &f32s(&weights.get(e).unwrap()), [out, inner]).unwrap().dequantize();
    let all: Vec<f32> = (0..experts).flat_map(one).collect();
    Tensor::from_vec(all, weights.shape(), &Device::Cpu).unwrap()
}

/// The layer's parts of `moe-core` in f64.
fn reference(
    x: &Tensor,
    [fc_in, fc_out]: [&Tensor; 2],
    combine: &Tensor,
    activation: Activation,
    table: &DispatchTable,
) -> Tensor {
    let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
    let weights =
        MlpWeights { fc_in: wide(fc_in).into(), fc_in_bias: None, fc_out: wide(fc_out).into(), fc_out_bias: None };
    let ops: Arc<dyn MoeOps> = Arc::new(CandleOps);
    let mlps = ExpertMlps::of(weights, activation, Arc::clone(&ops)).unwrap();
    let shared = Arc::new(table.clone());
    let rows = ops.permute(&wide(x), &shared).unwrap();
    let rows = mlps.forward(ExpertRows { rows, offsets: table.expert_offsets.clone() }).unwrap().rows;
    ops.unpermute(&rows, &wide(combine), &shared).unwrap()
}

#[test]
fn packed_experts_equal_the_reference() {
    for activation in [Activation::GeluTanh, Activation::SwiGlu] {
        for (tokens, experts, top_k, d_model, d_ff) in [(0, 3, 1, 8, 6), (1, 4, 2, 33, 40), (50, 4, 3, 16, 70)] {
            let width = d_ff * activation.inputs();
            let x = random(1, &[tokens, d_model], 1.0, DType::F32);
            let fc_in = random(2, &[experts, width, d_model], 0.2, DType::F32);
            let fc_out = random(3, &[experts, d_model, d_ff], 0.2, DType::F32);
            let combine = random(4, &[tokens, top_k], 1.0, DType::F32);
            let table = table(tokens, experts, top_k);

            let want =
                |format| reference(&x, [&kept(&fc_in, format), &kept(&fc_out, format)], &combine, activation, &table);
            for isa in Isa::available() {
                // Against the weights that the format keeps: what is left is the rounding of the inputs.
                let formats = [
                    (WeightFormat::from(Precision::F32), 1e-5),
                    (Precision::Bf16.into(), 4e-2),
                    (QuantFormat::Int8.into(), 0.15),
                    (QuantFormat::INT4.into(), 0.15),
                ];
                for (format, tolerance) in formats {
                    let one = |t: &Tensor, e: usize| f32s(&t.get(e).unwrap());
                    let packed = PackedExperts::new(isa, format, activation, [experts, d_model, d_ff], |e| {
                        [one(&fc_in, e), one(&fc_out, e)]
                    })
                    .unwrap();
                    let got = packed.forward(&f32s(&x), &table, &f32s(&combine)).unwrap();
                    let got = Tensor::from_vec(got, (tokens, d_model), &Device::Cpu).unwrap();
                    assert_close(
                        &got,
                        &want(format),
                        tolerance,
                        &format!("{isa} {format:?} {activation:?} {tokens} tokens"),
                    );
                    assert!(packed.forward(&[1.0], &table, &f32s(&combine)).is_err());
                }
            }
        }
    }
    let none = PackedExperts::new(Isa::Portable, Precision::F32, Activation::GeluTanh, [0, 1, 1], |_| [vec![], vec![]]);
    assert!(none.unwrap_err().to_string().contains("num_experts"));
}
