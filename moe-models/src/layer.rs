//! [`Layer`]: one block of a decoder, over the residual stream; and what of it a training pass computes again.

use crate::Result;
use crate::blocks::{Attention, FeedForward, Norm, Rotaries};
use crate::config::{LayerConfig, Multipliers};
use crate::decoder::Backend;
use crate::dropout::{DropoutConfig, Place};
use candle_core::Tensor;
use candle_nn::VarBuilder;
use moe_core::ops::Dropout;
use moe_core::tape::{cut, recomputed};
use moe_core::{ExpertObserver, Mode, MoeOutput, Ops, RouteContext, SeededNoise, Weight};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use tracing::debug_span;

/// Attention and the feed-forward part, each with the norm that it reads.
#[derive(Debug)]
pub(crate) struct Layer {
    attention_norm: Norm,
    pub(crate) attention: Attention,
    feed_forward_norm: Norm,
    feed_forward: FeedForward,
    /// Factor on what both add to the residual stream.
    residual: f64,
    ops: Arc<dyn Ops>,
}

impl Layer {
    /// Layer `index`, whose parameters lie under `vb`.
    ///
    /// # Errors
    /// If a parameter is missing or has another shape, or the layer cannot be split so.
    pub(crate) fn new(
        index: usize,
        config: &LayerConfig,
        vb: VarBuilder<'_>,
        backend: Backend<'_>,
        rotaries: &mut Rotaries,
    ) -> Result<Self> {
        let (config, ops) = &backend.layer(index, config)?;
        let dispatcher = |num_experts| backend.dispatcher(index, num_experts);
        let norm = |name: &str| Norm::new(&config.norm, vb.pp(name), Arc::clone(ops));
        Ok(Self {
            attention_norm: norm("input_layernorm")?,
            attention: Attention::new(&config.attention, vb.pp("self_attn"), Arc::clone(ops), rotaries)?,
            feed_forward_norm: norm("post_attention_layernorm")?,
            feed_forward: FeedForward::new(&config.feed_forward, vb.pp("mlp"), Arc::clone(ops), dispatcher)?,
            residual: 1.0,
            ops: Arc::clone(ops),
        })
    }

    /// The same with a factor on what its parts add to the residual stream.
    pub(crate) fn with_residual(self, residual: f64) -> Self {
        Self { residual, ..self }
    }

    /// The sum that attention ends with, and its norm, which the feed-forward part reads; `attend` maps the normed
    /// `[tokens, d_model]` to what attention adds.
    fn attended(
        &self,
        stream: Stream,
        attend: impl FnOnce(&Attention, &Tensor) -> Result<Tensor>,
    ) -> Result<[Tensor; 2]> {
        let [x, normed] = stream.normed(&self.attention_norm)?;
        let attended = debug_span!("attention").in_scope(|| attend(&self.attention, &normed))?;
        let added = Multipliers::apply(self.residual, attended)?;
        self.feed_forward_norm.add(&x, &added)
    }

    /// What it multiplies with.
    pub(crate) fn weights(&self) -> Vec<&Weight> {
        [self.attention.weights(), self.feed_forward.weights()].concat()
    }

    /// An inference pass: `attend` maps the normed `[tokens, d_model]` to what attention adds.
    ///
    /// # Errors
    /// If a part refuses the input.
    pub(crate) fn forward(
        &self,
        stream: Stream,
        context: &RouteContext<'_>,
        attend: impl FnOnce(&Attention, &Tensor) -> Result<Tensor>,
    ) -> Result<(Stream, Option<MoeOutput>)> {
        let [x, normed] = self.attended(stream, attend)?;
        let (added, output) = self.feed(&normed, context)?;
        Ok((Stream { x, added: Some(added) }, output))
    }

    /// What the feed-forward part adds.
    fn feed(&self, normed: &Tensor, context: &RouteContext<'_>) -> Result<(Tensor, Option<MoeOutput>)> {
        let (added, output) = debug_span!("feed_forward").in_scope(|| self.feed_forward.forward(normed, context))?;
        Ok((Multipliers::apply(self.residual, added)?, output))
    }

    /// The sum after attention over whole sequences, and its norm.
    fn attended_sequences(&self, stream: Stream, pass: LayerPass) -> Result<[Tensor; 2]> {
        self.attended(stream, |attention, x| {
            let attended = attention.forward(x, pass.seq_len, pass.dropout(Place::Probabilities)?)?;
            pass.dropped(&*self.ops, attended, Place::Attention)
        })
    }

    /// What the feed-forward part adds over whole sequences.
    fn fed(&self, normed: &Tensor, pass: LayerPass) -> Result<(Tensor, Option<MoeOutput>)> {
        let (added, output) = self.feed(normed, &pass.context(&pass.noise()))?;
        Ok((pass.dropped(&*self.ops, added, Place::FeedForward)?, output))
    }

    /// Whole sequences without a backward pass, with the experts' results shown to `observer`.
    ///
    /// # Errors
    /// If a part refuses the input; those of `observer`.
    pub(crate) fn observed_sequences(
        &self,
        stream: Stream,
        pass: LayerPass,
        observer: &dyn ExpertObserver,
    ) -> Result<Stream> {
        let [x, normed] = self.attended_sequences(stream, pass)?;
        let noise = pass.noise();
        let context = RouteContext { observer: Some(observer), ..pass.context(&noise) };
        let (added, _) = self.feed(&normed, &context)?;
        Ok(Stream { x, added: Some(added) })
    }

    /// Whole sequences.
    ///
    /// # Errors
    /// If a part refuses the input.
    pub(crate) fn sequences(&self, stream: Stream, pass: LayerPass) -> Result<(Stream, Option<MoeOutput>)> {
        let _layer = debug_span!("layer", index = pass.layer).entered();
        let [x, normed] = self.attended_sequences(stream, pass)?;
        let (added, output) = self.fed(&normed, pass)?;
        Ok((Stream { x, added: Some(added) }, output))
    }

    /// Whole sequences; what `pass` says is computed again in a backward pass.
    ///
    /// # Errors
    /// If a part refuses the input.
    pub(crate) fn forward_sequences(
        self: &Arc<Self>,
        stream: Stream,
        pass: LayerPass,
    ) -> Result<(Stream, Option<MoeOutput>)> {
        match pass.recompute {
            Recompute::Block => {
                let layer = Arc::clone(self);
                let inputs: Vec<Tensor> = [stream.x].into_iter().chain(stream.added).collect();
                let (outputs, output) = recomputed(&inputs, move |inputs| {
                    let (stream, output) = layer.sequences(Stream::of(inputs), pass).map_err(moe_core::Error::from)?;
                    let tensors = [stream.x].into_iter().chain(stream.added).chain(losses_of(&output));
                    Ok((tensors.collect(), output))
                })?;
                Ok((Stream::of(&outputs[..2]), with_losses(output, &outputs[2..])))
            }
            Recompute::Moe if matches!(self.feed_forward, FeedForward::Moe(_)) => {
                let [x, normed] = self.attended_sequences(stream, pass)?;
                let layer = Arc::clone(self);
                let (outputs, output) = recomputed(&[normed], move |inputs| {
                    let (added, output) = layer.fed(&inputs[0], pass).map_err(moe_core::Error::from)?;
                    Ok(([added].into_iter().chain(losses_of(&output)).collect(), output))
                })?;
                Ok((Stream { x, added: Some(outputs[0].clone()) }, with_losses(output, &outputs[1..])))
            }
            Recompute::Moe | Recompute::None => {
                let (stream, output) = self.sequences(stream, pass)?;
                // Gradients are summed here, as they are where a layer is computed again: the bits are the same.
                let losses = losses_of(&output).iter().map(cut).collect::<moe_core::Result<Vec<_>>>()?;
                let (x, added) = (cut(&stream.x)?, stream.added.as_ref().map(cut).transpose()?);
                Ok((Stream { x, added }, with_losses(output, &losses)))
            }
        }
    }
}

/// The residual stream: what has been summed, and what a block has added since.
#[derive(Debug, Clone)]
pub(crate) struct Stream {
    pub(crate) x: Tensor,
    pub(crate) added: Option<Tensor>,
}

impl Stream {
    /// Of one or two tensors.
    fn of(tensors: &[Tensor]) -> Self {
        Self { x: tensors[0].clone(), added: tensors.get(1).cloned() }
    }

    /// The sum, and its norm.
    pub(crate) fn normed(self, norm: &Norm) -> Result<[Tensor; 2]> {
        match self.added {
            Some(added) => norm.add(&self.x, &added),
            None => Ok([self.x.clone(), norm.forward(&self.x)?]),
        }
    }

    pub(crate) fn sum(self, ops: &dyn Ops) -> Result<Tensor> {
        match self.added {
            Some(added) => Ok(ops.add(&self.x, &added)?),
            None => Ok(self.x),
        }
    }
}

/// What one layer's pass over whole sequences depends on besides its input.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LayerPass {
    pub(crate) mode: Mode,
    pub(crate) seed: u64,
    pub(crate) layer: usize,
    pub(crate) seq_len: usize,
    pub(crate) recompute: Recompute,
    /// Nothing outside training.
    pub(crate) dropout: DropoutConfig,
}

impl LayerPass {
    /// Token by token, without a backward pass.
    pub(crate) fn infer(layer: usize, seq_len: usize) -> Self {
        let (recompute, dropout) = (Recompute::None, DropoutConfig::default());
        Self { mode: Mode::Infer, seed: 0, layer, seq_len, recompute, dropout }
    }

    fn noise(&self) -> SeededNoise {
        SeededNoise::new(self.seed, self.layer as u64)
    }

    fn dropout(&self, place: Place) -> Result<Option<Dropout>> {
        self.dropout.at(place, self.layer, self.seed)
    }

    fn dropped(&self, ops: &dyn Ops, x: Tensor, place: Place) -> Result<Tensor> {
        match self.dropout(place)? {
            Some(dropout) => Ok(ops.dropout(&x, dropout)?),
            None => Ok(x),
        }
    }

    fn context<'a>(&self, noise: &'a SeededNoise) -> RouteContext<'a> {
        RouteContext { seq_len: Some(self.seq_len), ..RouteContext::new(self.mode, noise) }
    }
}

/// The auxiliary losses that a layer has.
fn losses_of(output: &Option<MoeOutput>) -> Vec<Tensor> {
    let losses = output.iter().flat_map(|output| [&output.losses.load_balance, &output.losses.router_z]);
    losses.flatten().cloned().collect()
}

/// An output with these in the place of its own.
fn with_losses(output: Option<MoeOutput>, losses: &[Tensor]) -> Option<MoeOutput> {
    let mut losses = losses.iter().cloned();
    output.map(|mut output| {
        for loss in [&mut output.losses.load_balance, &mut output.losses.router_z].into_iter().flatten() {
            if let Some(new) = losses.next() {
                *loss = new;
            }
        }
        output
    })
}

/// What a training pass computes again on its way back instead of keeping it. The bits are the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// Nothing.
    #[default]
    None,
    /// Every layer: its input alone is kept.
    Block,
    /// The feed-forward part of layers with experts.
    Moe,
}
