//! Multiply-adds from registers, as many chains as the hardware can overlap.

use crate::Isa;
use std::arch::x86_64::*;
use std::hint::black_box;

/// Independent chains.
const CHAINS: usize = 12;

/// Runs `rounds` of 12 multiply-adds; returns the operations done.
pub(super) fn multiply(isa: Isa, pairs: bool, rounds: usize) -> f64 {
    let lanes = match isa {
        Isa::Portable => return 0.0,
        // SAFETY: `isa` is one that this machine can run.
        Isa::Avx2 => unsafe { avx2(rounds) },
        // SAFETY: as above; pairs are asked for only where the machine multiplies them.
        Isa::Avx512Bf16 if pairs => unsafe { avx512_pairs(rounds) },
        // SAFETY: as above.
        Isa::Avx512 | Isa::Avx512Bf16 => unsafe { avx512(rounds) },
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
