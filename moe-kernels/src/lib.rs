//! CPU kernels for mixture-of-experts models: the operations that cost time, forward and backward, at the speed of the
//! memory and of the multipliers.
//!
//! Functions on slices at the bottom ([`gemm`]), candle operations with gradients above them. Knows no model.
//!
//! Results do not depend on the number of threads, on the other rows of a batch, or on the instruction set ([`Isa`]; one
//! exception: bf16 on [`Isa::Amx`]).
#![allow(unsafe_code)] // This crate is where the workspace keeps its vector code; every block states why it is sound.

pub mod activation;
pub mod adamw;
pub mod add_norm;
pub mod attention;
mod buffer;
pub mod copies;
pub mod cross_entropy;
mod custom;
pub mod distillation;
pub mod dropout;
pub mod embedding;
mod error;
pub mod expert_mlp;
mod forms;
pub mod gate;
pub mod gemm;
pub mod grouped_linear;
mod kept;
pub mod layer_norm;
mod log_sum_exp;
pub mod machine;
mod mlp;
mod norm_rows;
pub mod ops;
mod output_loss;
mod packed;
pub mod parallel;
pub mod permute;
pub mod quantized;
pub mod rms_norm;
pub mod rotary;
pub mod select;
mod stack;
pub mod sums;

pub use buffer::{SharedBytes, Words};
pub use error::{Error, Result};
pub use forms::PackedForms;
pub use gemm::Precision;
pub use kept::{KeptWeights, LAYOUT};
pub use log_sum_exp::log_sum_exp;
pub use ops::KernelOps;
pub use packed::PackedMatrices;
pub use select::Isa;
pub use stack::{PackedStack, WeightFormat};

/// The layers' crate, in the version whose types are in these signatures.
pub use moe_core;

/// The example of the README, which runs with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
