//! The multipliers that a type runs on.

use moe_kernels::machine::Peaks;
use moe_kernels::{Isa, Precision, select};

/// 10^9 operations per second that products of this type can reach; bf16 runs on those of f32 where it has none.
pub(crate) fn gflops(precision: Precision, peaks: &Peaks) -> f64 {
    match precision {
        Precision::Bf16 if select::current() >= Isa::Avx512Bf16 => peaks.bf16_gflops,
        Precision::Bf16 | Precision::F32 => peaks.f32_gflops,
    }
}
