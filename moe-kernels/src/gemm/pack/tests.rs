//! Packing is the same on every instruction set and from either orientation.

use super::*;

#[test]
fn rounding_is_that_of_the_half_crate() {
    let specials = [0.0, -0.0, 1.0, f32::MAX, f32::MIN, f32::INFINITY, f32::NEG_INFINITY, 1.003_906_3, 1.011_718_8];
    let spread = (0..20_000u32).map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9)));
    for value in specials.into_iter().chain(spread).filter(|v| !v.is_nan()) {
        let want = half::bf16::from_f32(value).to_f32();
        assert_eq!(bf16_round(value).to_bits(), want.to_bits(), "{value:e}");
    }
    assert!(bf16_round(f32::NAN).is_nan() && bf16_round(f32::from_bits(0x7fff_ffff)).is_nan());
}

#[test]
fn packing_is_the_same_on_every_isa_and_from_either_orientation() {
    for (outer, inner) in [(1, 1), (5, 3), (12, 16), (31, 33), (32, 32), (40, 70)] {
        let rows: Vec<f32> = (0..outer * inner).map(|i| ((i * 37) % 101) as f32 * 0.0137 - 0.5).collect();
        let columns: Vec<f32> = (0..outer * inner).map(|i| rows[i % outer * inner + i / outer]).collect();
        for format in [Format::F32, Format::Pairs, Format::Wide] {
            for (first, width) in [(0, 12.min(outer)), (0, 32), (outer - 1, 1), (outer / 2, 32)] {
                let pack_from = |isa, from: &Operand<'_>| {
                    let mut to = vec![u32::MAX; width * format.words(inner)];
                    pack(isa, format, from, first, width, &mut to);
                    to
                };
                let want = pack_from(Isa::Portable, &Operand::rows(&rows, outer, inner, inner));
                for isa in Isa::available() {
                    let label = format!("{isa} {format:?} {outer}x{inner} from {first} width {width}");
                    assert_eq!(pack_from(isa, &Operand::rows(&rows, outer, inner, inner)), want, "{label}");
                    assert_eq!(pack_from(isa, &Operand::columns(&columns, outer, inner, outer)), want, "{label}");
                }
            }
        }
    }
}
