//! Quantization and its products with random shapes and values, NaN and infinities among the inputs: every instruction set
//! against the plain loops, bit for bit.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use moe_kernels::Isa;
use moe_kernels::quantized::{QuantFormat, QuantGroup, QuantizedWeights, quantized_gemm, quantized_gemm_reference};

#[derive(Debug, Arbitrary)]
struct Input {
    rows: Vec<u8>,
    n: u8,
    k: u16,
    group: Option<u8>,
    /// Bits of inputs and weights, repeated.
    bits: Vec<u32>,
}

fuzz_target!(|input: Input| {
    let rows: Vec<usize> = input.rows.iter().take(4).map(|&r| usize::from(r % 30)).collect();
    let (n, k) = (usize::from(input.n % 100) + 1, usize::from(input.k % 400) + 1);
    let format = match input.group {
        None => QuantFormat::Int8,
        Some(group) => QuantFormat::Int4 { group_size: 32 * (usize::from(group % 8) + 1) },
    };
    let value = |at: usize| match input.bits.len() {
        0 => 0.25,
        len => f32::from_bits(input.bits[at % len].wrapping_add((at / len) as u32)),
    };
    let total: usize = rows.iter().sum();
    let x: Vec<f32> = (0..total * k).map(value).collect();
    let w: Vec<f32> = (0..n * k).map(|at| value(at * 7 + 3)).collect();
    let Ok(weights) = QuantizedWeights::new(format, &w, [n, k]) else {
        assert!(w.iter().any(|v| !v.is_finite()), "finite weights must be taken");
        return;
    };
    assert!(weights.dequantize().iter().all(|v| !v.is_nan()));
    let mut first = 0;
    let groups: Vec<QuantGroup<'_>> = rows
        .iter()
        .map(|m| {
            let at = first;
            first += m;
            QuantGroup { rows: &x[at * k..first * k], weights: &weights, bias: None, out_offset: at * n }
        })
        .collect();
    let mut want = vec![0.0; total * n];
    quantized_gemm_reference(&groups, &mut want);
    for isa in Isa::available() {
        let mut got = vec![0.0; total * n];
        quantized_gemm(isa, &groups, &mut got);
        for (g, w) in got.iter().zip(&want) {
            assert!(g.to_bits() == w.to_bits() || g.is_nan() && w.is_nan(), "{isa} {format:?}: {g} for {w}");
        }
    }
});
