//! Packing and products of random groups: every instruction set against the portable loops, bit for bit (tiles: close), and
//! not a byte outside the groups.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use moe_kernels::gemm::{Group, Operand, PackedWeights, Start, Weights, gemm};
use moe_kernels::{Isa, Precision};

#[derive(Debug, Arbitrary)]
struct Input {
    rows: Vec<u8>,
    n: u8,
    k: u16,
    padding: u8,
    flip: [bool; 2],
    packed: bool,
    bf16: bool,
    start: u8,
    seed: u32,
}

fn values(seed: u32, len: usize) -> Vec<f32> {
    (0..len as u32).map(|i| ((i.wrapping_mul(2_654_435_761) ^ seed) % 2001) as f32 * 1e-3 - 1.0).collect()
}

fuzz_target!(|input: Input| {
    let rows: Vec<usize> = input.rows.iter().take(5).map(|&r| usize::from(r % 70)).collect();
    let (n, k) = (usize::from(input.n) + 1, usize::from(input.k % 500));
    let stride = n + usize::from(input.padding % 9);
    let total: usize = rows.iter().sum();
    let precision = if input.bf16 { Precision::Bf16 } else { Precision::F32 };
    let (a, b) = (values(input.seed, total * k), values(!input.seed, rows.len() * n * k));
    let bias = values(7, n);
    let operand = |values, flip: bool, outer: usize| {
        if flip { Operand::columns(values, outer, k, outer.max(1)) } else { Operand::rows(values, outer, k, k) }
    };
    let run = |isa| {
        let weights: Vec<Operand<'_>> =
            (0..rows.len()).map(|e| operand(&b[e * n * k..][..n * k], input.flip[1], n)).collect();
        let packed: Vec<PackedWeights> = weights.iter().map(|w| PackedWeights::new(isa, precision, w)).collect();
        let mut first = 0;
        let groups: Vec<Group<'_>> = rows
            .iter()
            .enumerate()
            .map(|(e, &m)| {
                let at = first;
                first += m;
                Group {
                    a: operand(&a[at * k..first * k], input.flip[0], m),
                    b: if input.packed { Weights::Packed(&packed[e]) } else { weights[e].into() },
                    start: match input.start % 3 {
                        0 => Start::Zero,
                        1 => Start::Bias(&bias),
                        _ => Start::Output,
                    },
                    out_offset: at * stride,
                    out_stride: stride,
                }
            })
            .collect();
        let mut out = vec![0.5; total * stride];
        gemm(isa, precision, &groups, &mut out);
        out
    };
    let want = run(Isa::Portable);
    for isa in Isa::available() {
        let got = run(isa);
        for (at, (g, w)) in got.iter().zip(&want).enumerate() {
            let same = if isa.has_common_bits(precision) { g.to_bits() == w.to_bits() } else { (g - w).abs() < 1e-3 };
            assert!(same && (at % stride < n || *g == 0.5), "{isa} at {at}: {g} for {w}");
        }
    }
});
