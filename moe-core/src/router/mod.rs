//! Routers: the policies that send tokens to experts. Each returns a [`Routing`] value and keeps nothing.
//!
//! Choices are made on the host from f32 probabilities by plain functions; the combine weights and losses are tensors
//! with gradients. Ties go to the lower expert id and to the earlier token.

mod dropless;
mod expert_choice;
mod gate;
mod hash;
mod infer;
mod noise;
mod select;
mod sparse_mixer;
#[cfg(test)]
mod tests;
mod top1;
mod top2;
mod top_k;

pub use dropless::{DroplessConfig, DroplessRouter, GroupScore, ScoreFunction};
pub use expert_choice::{ExpertChoiceConfig, ExpertChoiceRouter};
pub use gate::Gate;
pub use hash::HashRouter;
pub use noise::{NoiseSource, PositionedNoise, SeededNoise};
pub use sparse_mixer::{SparseMixerConfig, SparseMixerRouter};
pub use top_k::{DropPolicy, TopKConfig, TopKRouter};
pub use top1::{NoisyGate, Top1Config, Top1Router};
pub use top2::{Top2Config, Top2Router};

use crate::{ExpertRows, Result, Routing, Weight};
use candle_core::Tensor;
use std::fmt::Debug;

/// Sends tokens to experts.
pub trait Router: Debug + Send + Sync {
    /// Experts to choose from.
    fn num_experts(&self) -> usize;

    /// Decides for every token.
    ///
    /// # Shapes
    /// - `tokens`: `[tokens, d_model]`
    ///
    /// # Errors
    /// [`crate::Error::Input`] if `tokens` or the context does not fit the policy.
    fn route(&self, tokens: &Tensor, context: &RouteContext<'_>) -> Result<Routing>;

    /// What it multiplies with; by default nothing.
    fn weights(&self) -> Vec<&Weight> {
        Vec::new()
    }
}

impl<R: Router + ?Sized> Router for Box<R> {
    fn num_experts(&self) -> usize {
        (**self).num_experts()
    }
    fn route(&self, tokens: &Tensor, context: &RouteContext<'_>) -> Result<Routing> {
        (**self).route(tokens, context)
    }
    fn weights(&self) -> Vec<&Weight> {
        (**self).weights()
    }
}

/// Whether a pass trains (noise, training capacity) or evaluates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Training: noise policies apply, the training capacity factor is used.
    Train,
    /// Evaluation as the original does it: its evaluation capacity, its draws.
    Eval,
    /// Evaluation and serving without gradients and losses: nothing is drawn or dropped, so that a token's experts depend
    /// on that token alone. (Where experts choose tokens they do so here too, over the tokens that there are.)
    Infer,
}

/// What a routing decision may depend on besides the tokens.
#[derive(Debug, Clone, Copy)]
pub struct RouteContext<'a> {
    /// Training or evaluation.
    pub mode: Mode,
    /// Where random draws come from.
    pub noise: &'a dyn NoiseSource,
    /// Which tokens count (padding does not), `[tokens]`; all if `None`.
    pub used_tokens: Option<&'a [bool]>,
    /// Vocabulary ids of the tokens, `[tokens]`: needed by [`HashRouter`] only.
    pub token_ids: Option<&'a [u32]>,
    /// Tokens per sequence: needed by the per-sequence load-balance loss only.
    pub seq_len: Option<usize>,
    /// Who sees what the experts make of their rows; no decision depends on it.
    pub observer: Option<&'a dyn ExpertObserver>,
}

/// Sees what the experts of a layer make of their rows.
pub trait ExpertObserver: Debug {
    /// The results of the experts held here, in the order of the rows they were given, for tokens that were routed so.
    ///
    /// # Errors
    /// The pass ends with them.
    fn observe(&self, routing: &Routing, outputs: &ExpertRows) -> Result<()>;
}

impl<'a> RouteContext<'a> {
    /// A context with this mode and noise and nothing else.
    pub fn new(mode: Mode, noise: &'a dyn NoiseSource) -> Self {
        Self { mode, noise, used_tokens: None, token_ids: None, seq_len: None, observer: None }
    }

    /// The context of an inference pass.
    pub fn infer() -> Self {
        Self::new(Mode::Infer, &SeededNoise::ZERO)
    }

    /// Shows the experts' results to whoever wants to see them.
    pub(crate) fn observe(&self, routing: &Routing, outputs: &ExpertRows) -> Result<()> {
        self.observer.map_or(Ok(()), |observer| observer.observe(routing, outputs))
    }

    pub(crate) fn is_train(&self) -> bool {
        self.mode == Mode::Train
    }

    fn check(&self, num_tokens: usize) -> Result<()> {
        for (name, len) in
            [("used_tokens", self.used_tokens.map(<[_]>::len)), ("token_ids", self.token_ids.map(<[_]>::len))]
        {
            if len.is_some_and(|len| len != num_tokens) {
                return Err(crate::Error::Input(format!(
                    "{name} must have one entry per token: {num_tokens}, got {len:?}"
                )));
            }
        }
        Ok(())
    }

    fn is_used(&self, token: usize) -> bool {
        self.used_tokens.is_none_or(|used| used[token])
    }
}
