//! Multiply-adds from registers, as many chains as the hardware can overlap.

use super::Unit;
use crate::Isa;
use std::arch::x86_64::*;
use std::hint::black_box;

/// Independent chains.
const CHAINS: usize = 12;

/// Runs `rounds` of 12 multiply-adds on the widest `unit` of this machine; returns the operations done, 0 without one.
pub(super) fn multiply(unit: Unit, rounds: usize) -> f64 {
    let strongest = Isa::available().pop().unwrap_or(Isa::Portable);
    let lanes = match (unit, strongest) {
        (Unit::F32, Isa::Portable) => return 0.0,
        // SAFETY: this machine can run `strongest`.
        (Unit::F32, Isa::Avx2) => unsafe { avx2(rounds) },
        // SAFETY: as above.
        (Unit::F32, _) => unsafe { avx512(rounds) },
        #[cfg(target_os = "linux")]
        (Unit::Bf16, _) if crate::gemm::has_amx() => return crate::gemm::amx_rounds(rounds / 4),
        // SAFETY: the machine has the instruction.
        (Unit::Bf16, _) if Isa::Avx512Bf16.is_available() => unsafe { avx512_pairs(rounds) },
        // SAFETY: the machine has the instructions.
        (Unit::Int8, _) if is_x86_feature_detected!("avx512vnni") => unsafe { avx512_bytes(rounds) },
        _ => return 0.0,
    };
    (rounds * CHAINS * lanes * 2) as f64
}

#[target_feature(enable = "avx2,fma")]
unsafe fn avx2(rounds: usize) -> usize {
    let factor = black_box(_mm256_set1_ps(0.5));
    let mut sums = [_mm256_setzero_ps(); CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm256_fmadd_ps(factor, factor, *sum);
        }
    }
    black_box(sums);
    8
}

#[target_feature(enable = "avx512f")]
unsafe fn avx512(rounds: usize) -> usize {
    let factor = black_box(_mm512_set1_ps(0.5));
    let mut sums = [_mm512_setzero_ps(); CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_fmadd_ps(factor, factor, *sum);
        }
    }
    black_box(sums);
    16
}

#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn avx512_pairs(rounds: usize) -> usize {
    // SAFETY: both are 64 bytes without invalid values.
    let factor: __m512bh = unsafe { std::mem::transmute(black_box(_mm512_set1_epi32(0x3f00_3f00))) };
    let mut sums = [_mm512_setzero_ps(); CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbf16_ps(*sum, factor, factor);
        }
    }
    black_box(sums);
    32
}

#[target_feature(enable = "avx512f,avx512vnni")]
unsafe fn avx512_bytes(rounds: usize) -> usize {
    let factor = black_box(_mm512_set1_epi32(1));
    let mut sums = [_mm512_setzero_si512(); CHAINS];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, factor, factor);
        }
    }
    black_box(sums);
    64
}
