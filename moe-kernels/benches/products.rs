//! Products at the shapes of training: the output, the gradient of the input and that of the weights, of one linear map over all
//! rows and of 16 experts over theirs, packed on the way: rows, and weights as training has them (in bf16 rounded before); beside the
//! multipliers' rate measured around them.
//!
//! Prints a table, and one JSON line per row with `--json`; words choose a type or a product. `cargo xtask bench kernels` keeps the
//! output.

use moe_kernels::gemm::{Group, Operand, Rounded, Start, bf16_round, gemm};
use moe_kernels::machine::{self, Peaks};
use moe_kernels::{Isa, Precision, select};
use std::time::Instant;

/// Columns of the input and of the output.
const SHAPES: [[usize; 2]; 2] = [[512, 2048], [1024, 4096]];
/// Matrices, and rows of each.
const ROWS: [[usize; 2]; 6] = [[1, 128], [1, 512], [1, 2048], [16, 128], [16, 256], [16, 512]];
/// Seconds of one row at the least.
const SECONDS: f64 = 0.4;

/// One of the three products of a linear map.
#[derive(Clone, Copy, PartialEq)]
enum Product {
    Output,
    InputGradient,
    WeightGradient,
}

const PRODUCTS: [(&str, Product); 3] =
    [("output", Product::Output), ("input", Product::InputGradient), ("weight", Product::WeightGradient)];

/// Sizes of one row of the table.
#[derive(Clone, Copy)]
struct Sizes {
    inner: usize,
    out: usize,
    matrices: usize,
    rows: usize,
}

impl Sizes {
    fn flops(self) -> f64 {
        (2 * self.inner * self.out * self.matrices * self.rows) as f64
    }

    /// Values `[rows, inner]`, `[matrices, out, inner]` and `[rows, out]`.
    fn lens(self) -> [usize; 3] {
        let Self { inner, out, matrices, rows } = self;
        [matrices * rows * inner, matrices * out * inner, matrices * rows * out]
    }
}

/// The product of matrix `index`, with `x` `[rows, inner]`, weights and gradients of the output; and the length of the result.
fn group<'a>(of: Product, sizes: Sizes, index: usize, [x, w, grad]: [&'a [f32]; 3]) -> Group<'a> {
    let Sizes { inner, out, rows, .. } = sizes;
    let x = &x[index * rows * inner..][..rows * inner];
    let w = &w[index * out * inner..][..out * inner];
    let grad = &grad[index * rows * out..][..rows * out];
    let (a, b, size, stride) = match of {
        Product::Output => (Operand::rows(x, rows, inner, inner), Operand::rows(w, out, inner, inner), rows * out, out),
        Product::InputGradient => {
            (Operand::rows(grad, rows, out, out), Operand::columns(w, inner, out, inner), rows * inner, inner)
        }
        Product::WeightGradient => {
            (Operand::columns(grad, out, rows, out), Operand::columns(x, inner, rows, inner), out * inner, inner)
        }
    };
    Group { a, b: b.into(), start: Start::Zero, out_offset: index * size, out_stride: stride }
}

/// Median and least seconds of one call.
fn measure(isa: Isa, precision: Precision, of: Product, sizes: Sizes) -> [f64; 2] {
    let values = |len: usize, step: usize| (0..len).map(|i| ((i * step % 101) as f32 - 50.0) * 0.01).collect();
    let [x, w, grad]: [Vec<f32>; 3] = [(0, 37), (1, 31), (2, 29)].map(|(i, step)| values(sizes.lens()[i], step));
    let mut groups: Vec<Group<'_>> =
        (0..sizes.matrices).map(|index| group(of, sizes, index, [&x, &w, &grad])).collect();
    let Sizes { inner, out, .. } = sizes;
    let bits: Vec<u16> = w.iter().map(|&v| (bf16_round(v).to_bits() >> 16) as u16).collect();
    if precision == Precision::Bf16 && of != Product::WeightGradient {
        for (group, bits) in groups.iter_mut().zip(bits.chunks_exact(out * inner)) {
            group.b = match of {
                Product::InputGradient => Rounded::columns(bits, inner, out).into(),
                _ => Rounded::rows(bits, out, inner).into(),
            };
        }
    }
    let [of_x, of_w, of_grad] = sizes.lens();
    let len = [of_grad, of_x, of_w][of as usize];
    let mut out = vec![0.0; len + 16];
    // On a line of the cache, as large buffers of a run are.
    let first = out.as_ptr().align_offset(64);
    let out = &mut out[first..first + len];
    let mut times = Vec::new();
    let mut total = 0.0;
    // The first call warms up.
    while total < SECONDS || times.len() < 4 {
        let start = Instant::now();
        gemm(isa, precision, &groups, out);
        times.push(start.elapsed().as_secs_f64());
        total += times[times.len() - 1];
    }
    assert!(out.iter().all(|v| v.is_finite()));
    let mut times = times.split_off(1);
    times.sort_by(f64::total_cmp);
    [times[times.len() / 2], times[0]]
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let json = arguments.iter().any(|a| a == "--json");
    let only: Vec<&String> = arguments.iter().filter(|a| !a.starts_with("--")).collect();
    if let Ok(name) = std::env::var(select::ENV) {
        name.parse().and_then(select::force).expect("a known instruction set");
    }
    let isa = select::current();
    let types = [("bf16", Precision::Bf16), ("f32", Precision::F32)];
    let wanted =
        |name: &str, all: &[&str]| only.iter().any(|o| *o == name) || !only.iter().any(|o| all.contains(&o.as_str()));
    println!(
        "machine: {}; kernels: {isa}; operands packed on the way, weights in bf16 rounded before",
        machine::name()
    );
    for (kind, precision) in types.into_iter().filter(|t| wanted(t.0, &types.map(|t| t.0))) {
        let before = Peaks::measure();
        let mut measured = Vec::new();
        for [inner, out] in SHAPES {
            for [matrices, rows] in ROWS {
                for (name, of) in PRODUCTS.into_iter().filter(|p| wanted(p.0, &PRODUCTS.map(|p| p.0))) {
                    let sizes = Sizes { inner, out, matrices, rows };
                    measured.push((name, sizes, measure(isa, precision, of, sizes)));
                }
            }
        }
        let peaks = before.highest(Peaks::measure());
        let is_bf16 = precision == Precision::Bf16 && isa >= Isa::Avx512Bf16;
        let peak = if is_bf16 { peaks.bf16_gflops } else { peaks.f32_gflops };
        println!("\n{kind}: multipliers reach {peak:.1} GFLOP/s");
        println!(
            "{:>6}{:>6}{:>10}{:>7}  {:<8}{:>10}{:>10}{:>10}{:>9}{:>9}",
            "in", "out", "matrices", "rows", "product", "ms", "best, ms", "GFLOP/s", "of peak", "best"
        );
        for (name, sizes, [seconds, best]) in measured {
            let Sizes { inner, out, matrices, rows } = sizes;
            let share = |seconds: f64| sizes.flops() / seconds / 1e9 / peak;
            println!(
                "{inner:>6}{out:>6}{matrices:>10}{rows:>7}  {name:<8}{:>10.3}{:>10.3}{:>10.1}{:>8.1}%{:>8.1}%",
                seconds * 1e3,
                best * 1e3,
                sizes.flops() / seconds / 1e9,
                100.0 * share(seconds),
                100.0 * share(best)
            );
            if json {
                let line = serde_json::json!({
                    "type": kind, "in": inner, "out": out, "matrices": matrices, "rows": rows, "product": name,
                    "seconds": seconds, "best": best, "flops": sizes.flops(), "peak_gflops": peak,
                });
                println!("json {line}");
            }
        }
    }
}
