//! [`CandleOps`]: the reference, in ordinary candle operations with candle's own gradients (candle's fused softmax, norms
//! and rotary silently give none).

mod attention;
mod decoder;
mod loss;
mod moe;
mod rotary;
#[cfg(test)]
mod tests;

use super::WeightOps;

/// The reference implementation: correct on every device and for every floating type, not fast.
#[derive(Debug, Clone, Copy, Default)]
pub struct CandleOps;

impl WeightOps for CandleOps {}
impl super::Ops for CandleOps {}
