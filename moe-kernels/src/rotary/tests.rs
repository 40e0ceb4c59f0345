//! Rotation and its gradient against ordinary candle operations in f64, which central differences check in `moe-core`; the table
//! against angles computed here.

use super::*;
use candle_core::{DType, Var};
use moe_core::ops::{CandleOps, DecoderOps};
use moe_core::testing::{assert_close, random, random_var, values};

const LAYOUTS: [RotaryLayout; 2] = [RotaryLayout::Halves, RotaryLayout::Interleaved];

#[test]
fn values_and_gradients_equal_the_reference() {
    // Pairs one off a vector's width, partial rotation, one row, several sequences.
    for (shape, head_dim, rotary_dim) in
        [(&[1, 2][..], 2, 2), (&[5, 34], 34, 34), (&[2, 3, 60], 30, 30), (&[2, 7, 96], 48, 20), (&[70, 256], 64, 62)]
    {
        let table = RotaryTable::new(head_dim, rotary_dim, 10_000.0, 100).unwrap();
        for layout in LAYOUTS {
            let x = random_var(1, shape, 1.0, DType::F32);
            let wide = Var::from_tensor(&x.to_dtype(DType::F64).unwrap()).unwrap();
            let label = format!("{shape:?} {head_dim} {rotary_dim} {layout:?}");
            let got = rotary(&x, &table, layout, Positions::From(9)).unwrap();
            let want = CandleOps.rotary(&wide, &table, layout, Positions::From(9)).unwrap();
            assert_close(&got, &want, 1e-6, &label);
            let factors = random(4, shape, 1.0, DType::F32);
            let backward = |y: &Tensor, f: &Tensor| (y * f).unwrap().sum_all().unwrap().backward().unwrap();
            let (got, want) = (backward(&got, &factors), backward(&want, &factors.to_dtype(DType::F64).unwrap()));
            assert_close(got.get(&x).unwrap(), want.get(&wide).unwrap(), 1e-6, &label);
        }
    }
}

#[test]
fn the_table_holds_rounded_angles_of_f64() {
    let table = RotaryTable::new(10, 6, 500_000.0, 131_072).unwrap();
    for position in [0, 1, 77, 131_071] {
        let (cos, sin) = table.at(position);
        for i in 0..3 {
            let angle = f64::from(position) * 500_000f64.powf(-(2.0 * i as f64) / 6.0);
            assert_eq!([cos[i], sin[i]], [angle.cos() as f32, angle.sin() as f32], "{position} {i}");
        }
    }
}

/// A pair of columns turned by hand: both layouts, and the columns that stay.
#[test]
fn the_layouts_pair_the_columns_they_say() {
    let table = RotaryTable::from_frequencies(5, &[std::f64::consts::FRAC_PI_2, 0.0], 2).unwrap();
    let x = Tensor::new(&[[1f32, 2.0, 3.0, 4.0, 5.0]], &candle_core::Device::Cpu).unwrap();
    for (layout, want) in LAYOUTS.into_iter().zip([[-3.0, 2.0, 1.0, 4.0, 5.0], [-2.0, 1.0, 3.0, 4.0, 5.0]]) {
        let got = rotary(&x, &table, layout, Positions::From(1)).unwrap();
        assert_close(&got, &Tensor::new(&[want], x.device()).unwrap(), 1e-6, &format!("{layout:?}"));
    }
}

#[test]
fn decoding_has_the_bits_of_the_whole_pass() {
    let table = RotaryTable::new(16, 12, 10_000.0, 40).unwrap();
    let x = random(3, &[2, 40, 48], 1.0, DType::F32);
    for layout in LAYOUTS {
        let whole = rotary(&x, &table, layout, Positions::From(0)).unwrap();
        for (start, len) in [(0, 1), (17, 1), (39, 1), (5, 20)] {
            let piece = |t: &Tensor| t.narrow(1, start, len).unwrap();
            let got = rotary(&piece(&x), &table, layout, Positions::From(start as u32)).unwrap();
            assert_eq!(values(&got), values(&piece(&whole)), "{start}+{len} {layout:?}");
        }
        let mixed = Tensor::cat(&[x.get(0).unwrap().get(9).unwrap(), x.get(1).unwrap().get(2).unwrap()], 0).unwrap();
        let got = rotary(&mixed.reshape((2, 48)).unwrap(), &table, layout, Positions::Each(&[9, 2])).unwrap();
        let want = [(0, 9), (1, 2)].map(|(b, t)| values(&whole.get(b).unwrap().get(t).unwrap())).concat();
        assert_eq!(values(&got), want, "{layout:?}");
    }
}

#[test]
fn neither_threads_nor_instruction_sets_change_anything() {
    let table = RotaryTable::new(66, 62, 10_000.0, 500).unwrap();
    let x: Vec<f32> = (0..500 * 132).map(|i| ((i * 37) % 1009) as f32 * 0.002 - 1.0).collect();
    for layout in LAYOUTS {
        let run = |threads: usize, isa: Isa| {
            let op = Rotary { table: table.clone(), layout, positions: (0..500).collect(), isa };
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| [1.0, -1.0].map(|sign| op.turn(&x, sign)))
        };
        let one = run(1, Isa::Portable);
        for isa in Isa::available() {
            for threads in [1, 2, 3, 5] {
                assert!(run(threads, isa) == one, "{threads} threads, {isa}, {layout:?}");
            }
        }
    }
}

#[test]
fn no_rows_are_fine_and_bad_arguments_are_named() {
    let table = RotaryTable::new(4, 4, 10_000.0, 8).unwrap();
    let halves = RotaryLayout::Halves;
    let none = random(1, &[2, 0, 8], 1.0, DType::F32);
    assert_eq!(rotary(&none, &table, halves, Positions::From(100)).unwrap().dims(), [2, 0, 8]);
    let x = random(1, &[2, 3, 8], 1.0, DType::F32);
    let refused = |positions, name: &str| {
        let error = rotary(&x, &table, halves, positions).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    };
    refused(Positions::From(6), "max_positions");
    refused(Positions::From(u32::MAX), "max_positions");
    refused(Positions::Each(&[0, 1, 2, 0, 1, 8]), "max_positions");
    refused(Positions::Each(&[0, 1, 2]), "positions");
    assert!(rotary(&x.narrow(2, 0, 6).unwrap(), &table, halves, Positions::From(0)).is_err());
    let bad = [(4, 3, 1e4, "rotary_dim"), (4, 6, 1e4, "rotary_dim"), (4, 0, 1e4, "rotary_dim"), (4, 4, 0.0, "theta")];
    for (head_dim, rotary_dim, theta, name) in bad {
        let error = RotaryTable::new(head_dim, rotary_dim, theta, 8).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
}
