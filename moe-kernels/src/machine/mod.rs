//! What the machine can do at most, measured: the rate of the multipliers and the bandwidth of the memory.
//!
//! Benches print these ceilings beside what kernels reach. They take a second or so.

#[cfg(target_arch = "x86_64")]
mod x86;

use crate::select::vectorize;
use crate::{Words, parallel};
use std::time::Instant;

/// Measured ceilings of one machine, on the threads of the current rayon pool.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Peaks {
    /// Threads they were measured on.
    pub threads: usize,
    /// Fused multiply-adds in f32 from registers, 10^9 operations per second (a multiply-add counts two); 0 if this machine
    /// has no kernel beyond portable loops.
    pub f32_gflops: f64,
    /// Products of bf16 from registers (AMX tiles, or else `vdpbf16ps`); 0 where the machine has neither.
    pub bf16_gflops: f64,
    /// Dot products of four pairs of bytes from registers (`vpdpbusd`), 10^9 operations per second; 0 where the machine has none.
    pub int8_gops: f64,
    /// Reading memory that no cache holds, 10^9 bytes per second.
    pub read_gbps: f64,
}

impl Peaks {
    /// Measures them, best of a few repetitions each.
    pub fn measure() -> Self {
        let threads = rayon::current_num_threads();
        Self {
            threads,
            f32_gflops: multiplier(Unit::F32),
            bf16_gflops: multiplier(Unit::Bf16),
            int8_gops: multiplier(Unit::Int8),
            read_gbps: read(),
        }
    }

    /// The highest of two measurements: other work on the machine only ever lowers one.
    pub fn highest(self, other: Self) -> Self {
        Self {
            threads: self.threads,
            f32_gflops: self.f32_gflops.max(other.f32_gflops),
            bf16_gflops: self.bf16_gflops.max(other.bf16_gflops),
            int8_gops: self.int8_gops.max(other.int8_gops),
            read_gbps: self.read_gbps.max(other.read_gbps),
        }
    }
}

/// The processor's name and the threads in use.
pub fn name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name"))
        .map(|rest| rest.trim_start_matches([' ', '\t', ':']));
    format!("{}, {} threads", model.unwrap_or(std::env::consts::ARCH), rayon::current_num_threads())
}

/// Repetitions of each measurement; the best counts.
const REPETITIONS: usize = 5;

/// A kind of multiplier.
#[derive(Debug, Clone, Copy)]
enum Unit {
    F32,
    Bf16,
    Int8,
}

/// 10^9 operations per second of one kind of multiplier, over all threads.
fn multiplier(unit: Unit) -> f64 {
    #[cfg(target_arch = "x86_64")]
    {
        const ROUNDS: usize = 1_000_000;
        let rate = || {
            let start = Instant::now();
            let operations: Vec<f64> = rayon::broadcast(|_| x86::multiply(unit, ROUNDS));
            operations.iter().sum::<f64>() / start.elapsed().as_secs_f64() / 1e9
        };
        (0..REPETITIONS).map(|_| rate()).fold(0.0, f64::max)
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        let _ = unit;
        0.0
    }
}

/// Bytes read by each thread: several times any cache of today.
const READ_BYTES: usize = 256 << 20;
/// Places of its part that a thread reads at once.
const STREAMS: usize = 8;

fn read() -> f64 {
    let threads = rayon::current_num_threads();
    let isa = crate::select::current();
    // Pages that were never written are all one page of zeros.
    let mut words = Words::zeros(threads * READ_BYTES / 4);
    words.as_mut_slice().iter_mut().step_by(512).enumerate().for_each(|(i, w)| *w = i as u32);
    let all = words.as_slice();
    let pass = || {
        let start = Instant::now();
        parallel::for_each(threads, |thread| {
            let part = &all[thread * (READ_BYTES / 4)..][..READ_BYTES / 4];
            std::hint::black_box(vectorize!(isa, (part: &[u32]) -> [u32; 16] { read_streams(part) }));
        });
        (threads * READ_BYTES) as f64 / start.elapsed().as_secs_f64() / 1e9
    };
    (0..REPETITIONS).map(|_| pass()).fold(0.0, f64::max)
}

/// One pass over `words` as several streams side by side.
#[inline(always)]
fn read_streams(words: &[u32]) -> [u32; 16] {
    let len = words.len() / STREAMS;
    let mut sums = [[0u32; 16]; STREAMS];
    for start in (0..len).step_by(16) {
        for (stream, sum) in sums.iter_mut().enumerate() {
            let line = &words[stream * len + start..][..16];
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a prefetch may point anywhere.
            unsafe {
                use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
                _mm_prefetch::<_MM_HINT_T1>(line.as_ptr().wrapping_add(1024).cast());
            }
            for (sum, word) in sum.iter_mut().zip(line) {
                *sum ^= word;
            }
        }
    }
    sums.into_iter().fold([0; 16], |mut all, sum| {
        all.iter_mut().zip(sum).for_each(|(a, s)| *a ^= s);
        all
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_read() {
        let mut words = vec![0u32; 16 * STREAMS * 3];
        for at in 0..words.len() {
            words[at] = 5;
            assert_eq!(read_streams(&words).iter().copied().sum::<u32>(), 5, "word {at}");
            words[at] = 0;
        }
    }
}
