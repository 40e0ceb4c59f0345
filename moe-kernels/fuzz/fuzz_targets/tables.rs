//! The fused gate and its table over random logits: rows, offsets and slots agree with one another and with the choices,
//! whatever the logits, drops included.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use moe_core::{Capacity, DROPPED, DroplessConfig};
use moe_kernels::Isa;
use moe_kernels::gate::FusedGate;
use moe_kernels::permute::{permute, unpermute};
use std::sync::Arc;

#[derive(Debug, Arbitrary)]
struct Input {
    experts: u8,
    top_k: u8,
    limited: bool,
    normalize: bool,
    logits: Vec<i8>,
}

fuzz_target!(|input: Input| {
    let experts = usize::from(input.experts % 130) + 1;
    let top_k = if input.limited { 1 } else { usize::from(input.top_k) % experts + 1 };
    let weight = vec![0.0; experts];
    let settings = DroplessConfig::softmax(top_k, input.normalize);
    let mut gate = FusedGate::new(Isa::fastest(), settings, &weight, [experts, 1], None).expect("sizes fit");
    if input.limited {
        gate = gate.with_capacity(Capacity::DEEPSPEED).expect("top_k is 1");
    }
    let tokens = input.logits.len() / experts;
    let logits: Vec<f32> = input.logits[..tokens * experts].iter().map(|&l| f32::from(l) * 0.25).collect();
    let gated = gate.forward_logits(&logits).expect("whole rows");
    let table = &gated.table;
    assert_eq!((table.num_tokens, table.top_k, table.expert_offsets.len()), (tokens, top_k, experts + 1));
    assert_eq!(gated.load.tokens_per_expert.iter().sum::<u32>() as usize, tokens * top_k);
    let kept = gated.expert_ids.iter().filter(|&&e| e != DROPPED).count();
    assert_eq!((kept, table.num_rows()), (tokens * top_k - gated.load.dropped as usize, kept));
    if tokens == 0 {
        return;
    }
    // Token t holds the number t: its rows carry it to its experts and back.
    let device = candle_core::Device::Cpu;
    let numbers: Vec<f32> = (0..tokens).map(|t| t as f32).collect();
    let x = candle_core::Tensor::from_vec(numbers, (tokens, 1), &device).expect("sizes fit");
    let table = Arc::new(gated.table.clone());
    let rows = permute(&x, &table).expect("sizes fit");
    let ones = candle_core::Tensor::ones((tokens, top_k), candle_core::DType::F32, &device).expect("sizes fit");
    let back = unpermute(&rows, &ones, &table).expect("sizes fit").flatten_all().and_then(|t| t.to_vec1::<f32>());
    for (token, (value, ids)) in back.expect("on the host").iter().zip(gated.expert_ids.chunks_exact(top_k)).enumerate() {
        let kept = ids.iter().filter(|&&e| e != DROPPED).count();
        assert_eq!(*value, (token * kept) as f32, "token {token} to {ids:?}");
        let mut different = ids.iter().filter(|&&e| e != DROPPED).collect::<Vec<_>>();
        different.sort_unstable();
        different.dedup();
        assert_eq!(different.len(), kept, "token {token} chose an expert twice: {ids:?}");
    }
});
