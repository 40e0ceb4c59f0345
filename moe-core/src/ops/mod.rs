//! The operations layers are made of, behind three narrow traits, so that kernels can replace them.
//!
//! [`MoeOps`] is what an MoE layer needs, [`DecoderOps`] the rest of a decoder, [`LossOps`] its loss; [`WeightOps`] says in
//! which form a backend keeps weights. [`CandleOps`] is the reference in ordinary candle calls, with candle's own gradients,
//! on every device. A backend is one type that implements all of them ([`Ops`]).

mod activation;
mod attention;
mod candle;
mod decoder;
mod distillation;
mod dropout;
pub mod host;
mod loss;
mod moe;
mod observed;
mod rotary;
#[cfg(test)]
mod tests;
mod vocabulary;

pub use activation::{Activation, SIGMOID_LEAST, sigmoid};
pub use attention::{AttentionShape, KvShape, PagedKv, PagedSequence, check_sequences};
pub use candle::CandleOps;
pub use decoder::DecoderOps;
pub use distillation::{Distillation, DistilledLoss, SoftTargets, StudentOutput};
pub use dropout::{Dropout, DropoutRow, HeadDropout};
pub use loss::{IGNORED, LossOps, check_targets};
pub use moe::{Choices, MoeOps, experts_stepwise, parts_per_expert, whole_experts};
pub use observed::{ObservedOps, ProductObserver};
pub use rotary::{Positions, RotaryLayout, RotaryTable};
pub use vocabulary::{PartStatistics, VocabularyPart, VocabularyParts};

use crate::{MlpWeights, Result, Weight, WeightSource, WeightUse};
use candle_core::Tensor;
use std::fmt::Debug;

/// In which form a backend keeps weights.
pub trait WeightOps: Debug + Send + Sync {
    /// Fetches a weight and keeps it for `purpose`. A backend that packs fetches matrix by matrix; by default the tensor is
    /// kept as it is, with its gradient.
    ///
    /// # Errors
    /// If the source has no such weight, or this backend cannot keep it.
    fn weight(&self, source: &WeightSource<'_>, purpose: WeightUse) -> Result<Weight> {
        let _ = purpose;
        Ok(Weight::Tensor(source.whole()?))
    }
}

/// Everything a decoder needs of a backend.
pub trait Ops: MoeOps + DecoderOps + LossOps {
    /// A feed-forward network over the last dimension: two linear maps with the activation between them.
    ///
    /// # Shapes
    /// `[.., d_model]` to the same
    ///
    /// # Errors
    /// If the sizes do not fit.
    fn mlp(&self, x: &Tensor, weights: &MlpWeights, activation: Activation) -> Result<Tensor> {
        mlp_stepwise(self, x, weights, activation)
    }
}

/// [`Ops::mlp`] one operation after the other: its default, and what a backend falls back on for weights that it has no form of
/// its own for.
///
/// # Shapes
/// `[.., d_model]` to the same
///
/// # Errors
/// If the sizes do not fit.
pub fn mlp_stepwise<O: Ops + ?Sized>(
    ops: &O,
    x: &Tensor,
    weights: &MlpWeights,
    activation: Activation,
) -> Result<Tensor> {
    let hidden = ops.linear(x, &weights.fc_in, weights.fc_in_bias.as_ref())?;
    let hidden = ops.activation(activation, &hidden)?;
    ops.linear(&hidden, &weights.fc_out, weights.fc_out_bias.as_ref())
}
