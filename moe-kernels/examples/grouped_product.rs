//! The kernels without any tensor library: two experts multiply their rows, on plain slices.
//!
//! `cargo run --release -p moe-kernels --example grouped_product`

use moe_kernels::gemm::{Group, Operand, PackedWeights, Start, Weights, gemm};
use moe_kernels::{Precision, select};

pub(crate) fn main() {
    let (d_model, d_ff) = (64, 96);
    let isa = select::current();
    let numbers = |len: usize, salt: usize| -> Vec<f32> {
        (0..len).map(|i| ((i * 37 + salt) % 101) as f32 * 0.02 - 1.0).collect()
    };
    // Five rows: the first two go to expert 0, the others to expert 1. The weights are packed once.
    let (rows, weights) = (numbers(5 * d_model, 1), [numbers(d_ff * d_model, 2), numbers(d_ff * d_model, 3)]);
    let pack = |w: &Vec<f32>| PackedWeights::new(isa, Precision::F32, &Operand::rows(w, d_ff, d_model, d_model));
    let packed = weights.each_ref().map(pack);
    let group = |expert: usize, first: usize, count: usize| Group {
        a: Operand::rows(&rows[first * d_model..][..count * d_model], count, d_model, d_model),
        b: Weights::Packed(&packed[expert]),
        start: Start::Zero,
        out_offset: first * d_ff,
        out_stride: d_ff,
    };
    let mut out = vec![0.0; 5 * d_ff];
    gemm(isa, Precision::F32, &[group(0, 0, 2), group(1, 2, 3)], &mut out);

    // Against a plain loop.
    for row in 0..5 {
        let weight = &weights[usize::from(row >= 2)];
        for column in 0..d_ff {
            let pairs = (0..d_model).map(|p| rows[row * d_model + p] * weight[column * d_model + p]);
            let want: f32 = pairs.sum();
            assert!((out[row * d_ff + column] - want).abs() < 1e-4, "row {row}, column {column}");
        }
    }
    println!("{isa}: 5 rows of {d_model} columns through two experts of {d_ff}: {:?} ..", &out[..3]);
}
