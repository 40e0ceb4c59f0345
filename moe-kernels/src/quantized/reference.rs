//! The definition in plain loops.

use super::{QuantFormat, QuantGroup};

/// [`super::quantized_gemm`], one element after another.
pub fn quantized_gemm(groups: &[QuantGroup<'_>], out: &mut [f32]) {
    for group in groups {
        let [n, k] = group.weights.shape();
        for (i, row) in group.rows.chunks_exact(k.max(1)).enumerate() {
            let (integers, scale) = quantize_row(row);
            for col in 0..n {
                out[group.out_offset + i * n + col] =
                    dot(group, col, &integers) * scale + group.bias.map_or(0.0, |b| b[col]);
            }
        }
    }
}

/// A row's integers and their scale; the scale of a row that is not finite is NaN.
fn quantize_row(row: &[f32]) -> (Vec<i32>, f32) {
    if row.iter().any(|v| !v.is_finite()) {
        return (vec![0; row.len()], f32::NAN);
    }
    let largest = row.iter().fold(0.0f32, |most, v| most.max(v.abs()));
    let scale = if largest > 0.0 { (largest / 127.0).max(f32::MIN_POSITIVE) } else { 0.0 };
    let factor = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    (row.iter().map(|v| (v * factor).clamp(-127.0, 127.0).round_ties_even() as i32).collect(), scale)
}

/// One output before the input's scale.
fn dot(group: &QuantGroup<'_>, col: usize, integers: &[i32]) -> f32 {
    let part = |first: usize, integers: &[i32]| {
        let terms = integers.iter().enumerate().map(|(p, &x)| {
            let (q, scale) = group.weights.value(col, first + p);
            (x * q, scale)
        });
        terms.fold((0, 0.0), |(sum, _), (term, scale)| (sum + term, scale))
    };
    match group.weights.format() {
        QuantFormat::Int8 => {
            let (sum, scale) = part(0, integers);
            sum as f32 * scale
        }
        QuantFormat::Int4 { group_size } => {
            let mut total = 0.0f32;
            for (index, integers) in integers.chunks(group_size).enumerate() {
                let (sum, scale) = part(index * group_size, integers);
                total = (sum as f32).mul_add(scale, total);
            }
            total
        }
    }
}
