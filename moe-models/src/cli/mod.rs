//! What command-line programs share: words of their arguments, and programs that train. Alone in this crate it prints and reads
//! the environment.

pub mod allocator;
pub mod train;

use crate::Precision;

/// [`Precision`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PrecisionArg {
    /// Rounded to bf16: half the memory traffic.
    Bf16,
    /// Weights and activations as they are.
    F32,
}

impl From<PrecisionArg> for Precision {
    fn from(precision: PrecisionArg) -> Self {
        match precision {
            PrecisionArg::Bf16 => Self::Bf16,
            PrecisionArg::F32 => Self::F32,
        }
    }
}
