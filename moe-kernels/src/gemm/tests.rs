//! The product against plain sums in f64, and against itself: over instruction sets, threads and batches.

use super::*;
use moe_core::CounterRng;

fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut rng = CounterRng::new(seed, 0);
    (0..len).map(|_| rng.uniform_f32() - 0.5).collect()
}

/// Sizes of a set of groups with one `k` and `n` and rows of their own, as experts have.
struct Case {
    rows: &'static [usize],
    n: usize,
    k: usize,
    bias: bool,
}

const CASES: &[Case] = &[
    Case { rows: &[0], n: 5, k: 3, bias: true },
    Case { rows: &[1], n: 1, k: 1, bias: false },
    Case { rows: &[1], n: 300, k: 70, bias: true },
    Case { rows: &[3, 0, 1, 12], n: 33, k: 17, bias: true },
    Case { rows: &[13, 11, 24], n: 31, k: 64, bias: false },
    Case { rows: &[0, 0, 200, 0], n: 160, k: 95, bias: true },
    Case { rows: &[5, 6, 7], n: 129, k: 401, bias: true },
    Case { rows: &[4, 2], n: 64, k: 0, bias: true },
    Case { rows: &[25], n: 96, k: 800, bias: false },
];

struct Data {
    a: Vec<f32>,
    b: Vec<f32>,
    bias: Vec<f32>,
}

impl Case {
    fn total_rows(&self) -> usize {
        self.rows.iter().sum()
    }

    fn data(&self) -> Data {
        let experts = self.rows.len();
        Data {
            a: random(1, self.total_rows() * self.k),
            b: random(2, experts * self.n * self.k),
            bias: random(3, experts * self.n),
        }
    }

    fn run(&self, isa: Isa, precision: Precision, data: &Data) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.total_rows() * self.n];
        let (n, k, mut start) = (self.n, self.k, 0);
        let groups: Vec<Group<'_>> = (self.rows.iter().enumerate())
            .map(|(e, &rows)| {
                start += rows;
                let first = start - rows;
                Group {
                    a: Operand::rows(&data.a[first * k..][..rows * k], rows, k, k),
                    b: Operand::rows(&data.b[e * n * k..][..n * k], n, k, k).into(),
                    start: Start::bias(self.bias.then(|| &data.bias[e * n..][..n])),
                    out_offset: first * n,
                    out_stride: n,
                }
            })
            .collect();
        gemm(isa, precision, &groups, &mut out);
        out
    }

    /// Sums in f64 over inputs rounded as `precision` says.
    fn want(&self, precision: Precision, data: &Data) -> Vec<f64> {
        let round = |v: f32| f64::from(if precision == Precision::Bf16 { bf16_round(v) } else { v });
        let mut out = Vec::new();
        let mut row = 0;
        for (e, &rows) in self.rows.iter().enumerate() {
            for _ in 0..rows {
                for j in 0..self.n {
                    let b = &data.b[(e * self.n + j) * self.k..][..self.k];
                    let a = &data.a[row * self.k..][..self.k];
                    let sum: f64 = a.iter().zip(b).map(|(&a, &b)| round(a) * round(b)).sum();
                    out.push(sum + if self.bias { f64::from(data.bias[e * self.n + j]) } else { 0.0 });
                }
                row += 1;
            }
        }
        out
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn every_isa_gives_the_sums_and_the_same_bits() {
    for case in CASES {
        let data = case.data();
        for precision in [Precision::F32, Precision::Bf16] {
            let first = case.run(Isa::Portable, precision, &data);
            for isa in Isa::available() {
                let got = case.run(isa, precision, &data);
                for (i, (got, want)) in got.iter().zip(case.want(precision, &data)).enumerate() {
                    let tolerance = 1e-6 * (case.k as f64).sqrt().max(1.0);
                    let (rows, k) = (case.rows, case.k);
                    assert!((f64::from(*got) - want).abs() < tolerance, "{isa} {rows:?} k {k} [{i}]: {got} {want}");
                }
                if !isa.has_common_bits(precision) {
                    continue;
                }
                assert_eq!(bits(&got), bits(&first), "{isa} {precision:?} {:?} n {} k {}", case.rows, case.n, case.k);
            }
        }
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let case = Case { rows: &[301, 0, 5, 40], n: 260, k: 130, bias: true };
    let data = case.data();
    for precision in [Precision::F32, Precision::Bf16] {
        let isa = crate::select::current();
        let run_on = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| case.run(isa, precision, &data))
        };
        let one = run_on(1);
        for threads in [2, 3, 5] {
            assert_eq!(bits(&run_on(threads)), bits(&one), "{threads} threads");
        }
    }
}

#[test]
fn a_row_does_not_depend_on_the_rows_beside_it() {
    let (n, k) = (100, 333);
    let a = random(1, 40 * k);
    let b = random(2, n * k);
    for isa in Isa::available() {
        for precision in [Precision::F32, Precision::Bf16] {
            let run = |first: usize, rows: usize| {
                let mut out = vec![0.0; rows * n];
                let group = Group {
                    a: Operand::rows(&a[first * k..][..rows * k], rows, k, k),
                    b: Operand::rows(&b, n, k, k).into(),
                    start: Start::Zero,
                    out_offset: 0,
                    out_stride: n,
                };
                gemm(isa, precision, &[group], &mut out);
                out
            };
            let all = run(0, 40);
            for (first, rows) in [(0, 1), (7, 1), (3, 2), (10, 12), (11, 13), (39, 1), (20, 5)] {
                assert_eq!(
                    bits(&run(first, rows)),
                    bits(&all[first * n..][..rows * n]),
                    "{isa} {precision:?}: rows {first}..{}",
                    first + rows
                );
            }
        }
    }
}

#[test]
fn transposed_operands_and_strided_output() {
    let (m, n, k) = (30, 45, 27);
    let a = random(1, k * m);
    let b = random(2, k * n);
    for isa in Isa::available() {
        let mut out = vec![7.0; m * (n + 3)];
        let group = Group {
            a: Operand::columns(&a, m, k, m),
            b: Operand::columns(&b, n, k, n).into(),
            start: Start::Zero,
            out_offset: 0,
            out_stride: n + 3,
        };
        gemm(isa, Precision::F32, &[group], &mut out);
        for i in 0..m {
            for j in 0..n + 3 {
                let got = f64::from(out[i * (n + 3) + j]);
                let want: f64 =
                    if j >= n { 7.0 } else { (0..k).map(|p| f64::from(a[p * m + i]) * f64::from(b[p * n + j])).sum() };
                assert!((got - want).abs() < 1e-5, "{isa} [{i}, {j}]: {got} {want}");
            }
        }
    }
}

#[test]
#[should_panic(expected = "groups must not share output")]
fn groups_that_share_output_are_refused() {
    let v = [1.0; 4];
    let group = Group {
        a: Operand::rows(&v, 2, 2, 2),
        b: Operand::rows(&v, 2, 2, 2).into(),
        start: Start::Zero,
        out_offset: 0,
        out_stride: 2,
    };
    gemm(Isa::Portable, Precision::F32, &[group, group], &mut [0.0; 8]);
}

#[test]
fn a_product_can_start_from_the_output() {
    let (m, n, k) = (14, 40, 31);
    let (a, b) = (random(1, m * 2 * k), random(2, n * 2 * k));
    for isa in Isa::available() {
        // The sum over 2k in two halves is the chain over 2k.
        let product = |from: usize, inner: usize, start| Group {
            a: Operand::rows(&a[from..], m, inner, 2 * k),
            b: Operand::rows(&b[from..], n, inner, 2 * k).into(),
            start,
            out_offset: 0,
            out_stride: n,
        };
        let whole = gemm_new(isa, Precision::F32, &[product(0, 2 * k, Start::Zero)], m * n);
        let mut halves = gemm_new(isa, Precision::F32, &[product(0, k, Start::Zero)], m * n);
        gemm(isa, Precision::F32, &[product(k, k, Start::Output)], &mut halves);
        assert_eq!(bits(&halves), bits(&whole), "{isa}");
    }
}

#[test]
#[should_panic(expected = "must cover")]
fn a_new_output_must_be_covered() {
    let v = [1.0; 4];
    let group = Group {
        a: Operand::rows(&v, 2, 2, 2),
        b: Operand::rows(&v, 2, 2, 2).into(),
        start: Start::Zero,
        out_offset: 0,
        out_stride: 2,
    };
    gemm_new(Isa::Portable, Precision::F32, &[group], 5);
}

#[test]
fn weights_packed_before_give_the_same_bits() {
    let (m, n, k) = (20, 75, 41);
    let (a, b) = (random(1, m * k), random(2, n * k));
    let weights = Operand::rows(&b, n, k, k);
    for isa in Isa::available() {
        for precision in [Precision::F32, Precision::Bf16] {
            let product = |b| {
                let group =
                    Group { a: Operand::rows(&a, m, k, k), b, start: Start::Zero, out_offset: 0, out_stride: n };
                gemm_new(isa, precision, &[group], m * n)
            };
            let packed = PackedWeights::new(isa, precision, &weights);
            assert_eq!(bits(&product(Weights::Packed(&packed))), bits(&product(weights.into())), "{isa} {precision:?}");
        }
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]

    /// Random groups, strides and orientations: every instruction set and number of threads gives the bits of the plain loops,
    /// and nothing outside the groups is written.
    #[test]
    fn random_groups_agree_everywhere(
        rows in proptest::collection::vec(0usize..40, 1..6),
        n in 1usize..100,
        k in 0usize..80,
        padding in 0usize..5,
        flip in proptest::prelude::any::<[bool; 2]>(),
        bf16 in proptest::prelude::any::<bool>(),
        threads in 1usize..4,
    ) {
        let precision = if bf16 { Precision::Bf16 } else { Precision::F32 };
        let stride = n + padding;
        let total: usize = rows.iter().sum();
        let (a, b) = (random(1, total * k), random(2, rows.len() * n * k));
        let operand = |values, flip: bool, outer: usize| {
            if flip { Operand::columns(values, outer, k, outer.max(1)) } else { Operand::rows(values, outer, k, k) }
        };
        let mut first = 0;
        let groups: Vec<Group<'_>> = rows.iter().enumerate().map(|(e, &rows)| {
            first += rows;
            Group {
                a: operand(&a[(first - rows) * k..][..rows * k], flip[0], rows),
                b: operand(&b[e * n * k..][..n * k], flip[1], n).into(),
                start: Start::Zero,
                out_offset: (first - rows) * stride,
                out_stride: stride,
            }
        }).collect();
        let run = |isa, threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let mut out = vec![9.0; total * stride];
            pool.install(|| gemm(isa, precision, &groups, &mut out));
            out
        };
        let want = run(Isa::Portable, 1);
        for isa in Isa::available() {
            let got = run(isa, threads);
            if isa.has_common_bits(precision) {
                proptest::prop_assert_eq!(bits(&got), bits(&want), "{}", isa);
            } else {
                proptest::prop_assert_eq!(bits(&got), bits(&run(isa, 1)), "{}", isa);
                let close = got.iter().zip(&want).all(|(g, w)| (g - w).abs() < 1e-5);
                proptest::prop_assert!(close, "{}: {:?} {:?}", isa, got, want);
            }
        }
        for row in want.chunks_exact(stride) {
            proptest::prop_assert!(row[n..].iter().all(|v| *v == 9.0));
        }
    }
}

/// An output larger than the caches, which vectors store past them where it begins on a line: the same bits from there and from
/// elsewhere, with a last panel that is not whole, on every set.
#[test]
fn outputs_past_the_caches_have_the_same_bits() {
    let (m, n, k) = (2900, 2901, 3);
    let (a, b) = (random(1, m * k), random(2, n * k));
    let operand = |values, outer| Operand::rows(values, outer, k, k);
    // Rows of whole lines, and rows that are not.
    for stride in [n.next_multiple_of(16), n] {
        let len = (m - 1) * stride + n;
        let mut buffer = vec![0.0f32; len + 17];
        let line = buffer.as_ptr().align_offset(64);
        for isa in Isa::available() {
            for first in [line, line + 1] {
                let out = &mut buffer[first..first + len];
                let group = Group {
                    a: operand(&a, m),
                    b: operand(&b, n).into(),
                    start: Start::Zero,
                    out_offset: 0,
                    out_stride: stride,
                };
                out.fill(f32::NAN);
                gemm(isa, Precision::F32, &[group], out);
                for (row, out) in out.chunks(stride).enumerate() {
                    for (col, sum) in out[..n].iter().enumerate() {
                        let term = |p: usize| (a[row * k + p], b[col * k + p]);
                        let want = (0..k).map(term).fold(0.0f32, |sum, (a, b)| a.mul_add(b, sum));
                        assert_eq!(
                            sum.to_bits(),
                            want.to_bits(),
                            "{isa}: {row}, {col} of rows of {stride} from {first}"
                        );
                    }
                }
            }
        }
    }
}

/// What a sum of sizes wraps round to must not pass for a place inside.
#[test]
#[should_panic(expected = "the product must fit its output")]
fn an_output_whose_end_has_no_number_is_refused() {
    let a = [1.0; 9];
    let group = Group {
        a: Operand::rows(&a, 9, 1, 1),
        b: Operand::rows(&a[..1], 1, 1, 1).into(),
        start: Start::Zero,
        out_offset: 0,
        out_stride: 1 << 61,
    };
    gemm(Isa::Portable, Precision::F32, &[group], &mut [0.0]);
}

#[test]
#[should_panic(expected = "must lie inside its 1 values")]
fn an_operand_whose_end_has_no_number_is_refused() {
    let _ = Operand::rows(&[1.0], 9, 1, 1 << 61);
}

/// More values than are packed at a time in one row.
#[test]
fn rows_of_any_width_are_packed() {
    let (n, k) = (3, PACKED_AT_ONCE + 1);
    let weights = random(5, n * k);
    let rows = |range: std::ops::Range<usize>| Ok(weights[range.start * k..range.end * k].to_vec());
    let packed = PackedWeights::from_rows(Isa::Portable, Precision::F32, [n, k], rows).unwrap();
    let x = random(6, k);
    let product = |b: Weights<'_>| {
        let mut out = vec![0.0; n];
        let a = Operand::rows(&x, 1, k, k);
        gemm(
            Isa::Portable,
            Precision::F32,
            &[Group { a, b, start: Start::Zero, out_offset: 0, out_stride: n }],
            &mut out,
        );
        out
    };
    assert_eq!(product(Weights::Packed(&packed)), product(Operand::rows(&weights, n, k, k).into()));
}
