//! The forward pass: embedding, transformer blocks, tied output. Built twice over the same weights, once with gradients
//! and once without.

use super::GptConfig;
use crate::{Error, KvCache, LayerExperts, Result};
use candle_core::Tensor;
use moe_core::ops::MoeOps;
use moe_core::{
    Activation, DropPolicy, ExpertMlps, Gate, LocalDispatcher, Mlp, MlpWeights, Mode, MoeLayer, MoeOutput, NoisyGate,
    ResidualMoe, RouteContext, Router, SeededNoise, Top1Config, Top1Router, Top2Config, Top2Router, TopKConfig,
    TopKRouter,
};
use moe_kernels::attention::{causal_attention, causal_attention_cached};
use moe_kernels::cross_entropy::linear_cross_entropy;
use moe_kernels::embedding::embedding;
use moe_kernels::layer_norm::layer_norm;
use moe_kernels::{KernelOps, Precision};
use std::collections::HashMap;
use std::sync::Arc;

type Moe = MoeLayer<Box<dyn Router>, LocalDispatcher, ExpertMlps>;

#[derive(Debug)]
enum FeedForward {
    Dense(Mlp),
    Moe(Moe),
    Residual(ResidualMoe<Box<dyn Router>, LocalDispatcher, ExpertMlps>),
}

#[derive(Debug)]
struct Norm {
    weight: Tensor,
    bias: Tensor,
    epsilon: f64,
}

impl Norm {
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(layer_norm(x, &self.weight, &self.bias, self.epsilon)?)
    }
}

#[derive(Debug)]
struct Block {
    attention_norm: Norm,
    qkv: (Tensor, Tensor),
    out: (Tensor, Tensor),
    mlp_norm: Norm,
    feed_forward: FeedForward,
}

/// The layers of a model over one set of tensors.
#[derive(Debug)]
pub(super) struct Network {
    embed_tokens: Tensor,
    embed_positions: Tensor,
    blocks: Vec<Block>,
    norm: Norm,
    num_heads: usize,
    ops: Arc<dyn MoeOps>,
    precision: Precision,
}

/// How a pass routes.
#[derive(Debug, Clone, Copy)]
pub(super) struct PassContext {
    pub(super) mode: Mode,
    pub(super) seed: u64,
}

/// The output of one MoE layer.
pub(super) type LayerOutput = (usize, MoeOutput);

/// Hands out tensors by name.
struct Tensors<'a> {
    config: &'a GptConfig,
    ops: Arc<dyn MoeOps>,
    by_name: HashMap<&'a str, Tensor>,
}

impl Tensors<'_> {
    fn get(&self, name: &str) -> Result<Tensor> {
        self.by_name.get(name).cloned().ok_or_else(|| Error::Config(format!("the model has no tensor {name}")))
    }

    fn pair(&self, prefix: &str) -> Result<(Tensor, Tensor)> {
        Ok((self.get(&format!("{prefix}.weight"))?, self.get(&format!("{prefix}.bias"))?))
    }

    fn norm(&self, prefix: &str) -> Result<Norm> {
        let (weight, bias) = self.pair(prefix)?;
        Ok(Norm { weight, bias, epsilon: self.config.layer_norm_eps })
    }

    fn mlp(&self, prefix: &str) -> Result<MlpWeights> {
        let (fc_in, fc_in_bias) = self.pair(&format!("{prefix}.fc_in"))?;
        let (fc_out, fc_out_bias) = self.pair(&format!("{prefix}.fc_out"))?;
        Ok(MlpWeights { fc_in, fc_in_bias: Some(fc_in_bias), fc_out, fc_out_bias: Some(fc_out_bias) })
    }

    fn router(&self, gate: Tensor) -> Result<Box<dyn Router>> {
        let Some(moe) = &self.config.moe else { return Err(Error::Config("a dense model has no router".into())) };
        let (gate, capacity) = (Gate::with_ops(gate, Arc::clone(&self.ops))?, moe.capacity);
        let jitter = moe.noisy_gate == Some(NoisyGate::Jitter);
        Ok(match moe.top_k {
            1 => {
                let config = Top1Config { capacity, use_rts: moe.use_rts, noisy_gate: moe.noisy_gate };
                Box::new(Top1Router::new(gate, config)?)
            }
            2 => {
                let config = Top2Config { capacity, sample_second_expert: moe.sample_second_expert, jitter };
                Box::new(Top2Router::new(gate, config)?)
            }
            top_k => {
                let config = TopKConfig { top_k, capacity, drop_policy: DropPolicy::Probs, jitter };
                Box::new(TopKRouter::new(gate, config)?)
            }
        })
    }

    fn feed_forward(&self, layer: usize) -> Result<FeedForward> {
        let prefix = format!("model.layers.{layer}.mlp");
        let activation = Activation::GeluTanh;
        let (Some(_), Some(moe)) = (self.config.experts_of_layer(layer), &self.config.moe) else {
            return Ok(FeedForward::Dense(Mlp::with_ops(self.mlp(&prefix)?, activation, Arc::clone(&self.ops))?));
        };
        let router = self.router(self.get(&format!("{prefix}.gate.weight"))?)?;
        let weights = self.mlp(&format!("{prefix}.experts"))?;
        let experts = ExpertMlps::with_ops(weights, activation, Arc::clone(&self.ops))?;
        let layer = MoeLayer::new(router, LocalDispatcher::with_ops(Arc::clone(&self.ops)), experts)?;
        if !moe.residual {
            return Ok(FeedForward::Moe(layer));
        }
        let weights = self.mlp(&format!("{prefix}.residual_mlp"))?;
        let mlp = Mlp::with_ops(weights, activation, Arc::clone(&self.ops))?;
        let (coefficient, bias) = self.pair(&format!("{prefix}.coefficient"))?;
        Ok(FeedForward::Residual(ResidualMoe::new(layer, mlp, coefficient, bias)?))
    }

    fn block(&self, layer: usize) -> Result<Block> {
        let prefix = format!("model.layers.{layer}");
        Ok(Block {
            attention_norm: self.norm(&format!("{prefix}.input_layernorm"))?,
            qkv: self.pair(&format!("{prefix}.self_attn.qkv_proj"))?,
            out: self.pair(&format!("{prefix}.self_attn.o_proj"))?,
            mlp_norm: self.norm(&format!("{prefix}.post_attention_layernorm"))?,
            feed_forward: self.feed_forward(layer)?,
        })
    }
}

impl FeedForward {
    /// `[tokens, d_model]` to the same; the second value is there for MoE layers.
    fn forward(&self, x: &Tensor, context: &RouteContext<'_>) -> Result<(Tensor, Option<MoeOutput>)> {
        let output = match self {
            Self::Dense(mlp) => return Ok((mlp.forward(x)?, None)),
            Self::Moe(moe) => moe.forward(x, context)?,
            Self::Residual(moe) => moe.forward(x, context)?,
        };
        Ok((output.hidden.clone(), Some(output)))
    }
}

impl Network {
    pub(super) fn new(
        config: &GptConfig,
        ops: KernelOps,
        tensors: impl Iterator<Item = (impl AsRef<str>, Tensor)>,
    ) -> Result<Self> {
        let precision = ops.precision();
        let owned: Vec<_> = tensors.collect();
        let by_name = owned.iter().map(|(name, tensor)| (name.as_ref(), tensor.clone())).collect();
        let tensors = Tensors { config, ops: Arc::new(ops), by_name };
        Ok(Self {
            embed_tokens: tensors.get("model.embed_tokens.weight")?,
            embed_positions: tensors.get("model.embed_positions.weight")?,
            blocks: (0..config.num_layers).map(|l| tensors.block(l)).collect::<Result<_>>()?,
            norm: tensors.norm("model.norm")?,
            num_heads: config.num_heads,
            precision,
            ops: tensors.ops,
        })
    }

    pub(super) fn precision(&self) -> Precision {
        self.precision
    }

    /// Token and position embeddings, `[tokens, d_model]`; positions restart after every `seq_len` tokens.
    fn embed(&self, ids: &[u32], seq_len: usize, first_position: usize) -> Result<Tensor> {
        let positions: Vec<u32> = (0..ids.len()).map(|i| (first_position + i % seq_len) as u32).collect();
        Ok((embedding(&self.embed_tokens, ids)? + embedding(&self.embed_positions, &positions)?)?)
    }

    /// One pass through the blocks and the last norm; `attend` maps a layer's `[tokens, 3 d_model]` to `[tokens, d_model]`.
    fn run(
        &self,
        mut x: Tensor,
        pass: PassContext,
        seq_len: usize,
        mut attend: impl FnMut(usize, Tensor) -> Result<Tensor>,
    ) -> Result<(Tensor, Vec<LayerOutput>)> {
        let mut outputs = Vec::new();
        for (layer, block) in self.blocks.iter().enumerate() {
            let qkv = self.ops.linear(&block.attention_norm.forward(&x)?, &block.qkv.0, Some(&block.qkv.1))?;
            let attended = attend(layer, qkv)?;
            x = (x + self.ops.linear(&attended, &block.out.0, Some(&block.out.1))?)?;
            let noise = SeededNoise::new(pass.seed, layer as u64);
            let context = RouteContext { seq_len: Some(seq_len), ..RouteContext::new(pass.mode, &noise) };
            let (hidden, output) = block.feed_forward.forward(&block.mlp_norm.forward(&x)?, &context)?;
            x = (x + hidden)?;
            outputs.extend(output.map(|o| (layer, o)));
        }
        Ok((self.norm.forward(&x)?, outputs))
    }

    /// Mean cross-entropy of whole sequences in nats per token; the logits are never whole in memory.
    pub(super) fn loss(
        &self,
        ids: &[u32],
        targets: &[u32],
        seq_len: usize,
        pass: PassContext,
    ) -> Result<(Tensor, Vec<LayerOutput>)> {
        let (hidden, outputs) = self.hidden(ids, seq_len, pass)?;
        Ok((linear_cross_entropy(&hidden, &self.embed_tokens, targets, self.precision)?, outputs))
    }

    /// What the output layer sees of whole sequences, `[batch * seq_len, d_model]`.
    fn hidden(&self, ids: &[u32], seq_len: usize, pass: PassContext) -> Result<(Tensor, Vec<LayerOutput>)> {
        let x = self.embed(ids, seq_len, 0)?;
        let batch = ids.len() / seq_len;
        self.run(x, pass, seq_len, |_, qkv| {
            let width = qkv.dim(1)?;
            let out = causal_attention(&qkv.reshape((batch, seq_len, width))?, self.num_heads, self.precision)?;
            Ok(out.reshape((ids.len(), width / 3))?)
        })
    }

    /// Logits `[tokens, vocab_size]` of the tokens after those in `cache`, which grows by them if all goes well.
    pub(super) fn forward_cached(
        &self,
        ids: &[u32],
        cache: &mut KvCache,
        pass: PassContext,
    ) -> Result<(Tensor, Vec<LayerOutput>)> {
        let x = self.embed(ids, ids.len(), cache.len)?;
        let mut grown = cache.layers.clone();
        let (hidden, outputs) = self.run(x, pass, ids.len(), |layer, qkv| {
            let d_model = qkv.dim(1)? / 3;
            let (mut keys, mut values) = (qkv.narrow(1, d_model, d_model)?, qkv.narrow(1, 2 * d_model, d_model)?);
            if let Some((old_keys, old_values)) = &grown[layer] {
                keys = Tensor::cat(&[old_keys, &keys], 0)?;
                values = Tensor::cat(&[old_values, &values], 0)?;
            }
            let queries = qkv.narrow(1, 0, d_model)?;
            let out = causal_attention_cached(&queries, &keys, &values, self.num_heads, self.precision)?;
            grown[layer] = Some((keys.contiguous()?, values.contiguous()?));
            Ok(out)
        })?;
        cache.layers = grown;
        cache.len += ids.len();
        Ok((self.ops.linear(&hidden, &self.embed_tokens, None)?, outputs))
    }
}

/// What a caller learns of a layer's routing.
pub(super) fn layer_experts((layer, output): &LayerOutput) -> Result<LayerExperts> {
    let routing = &output.routing;
    Ok(LayerExperts {
        layer: *layer,
        num_experts: routing.num_experts,
        top_k: routing.top_k,
        expert_ids: routing.expert_ids.clone(),
        weights: moe_core::ops::host::to_f32_vec(&routing.combine_weights)?,
    })
}
