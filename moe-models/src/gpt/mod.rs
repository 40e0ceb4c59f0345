//! The paper's GPT family: dense, MoE every n-th layer, Pyramid, Residual, PR-MoE.
//!
//! Pre-LayerNorm blocks, learned positions, GELU (tanh), output tied to the embedding (paper section 4, Megatron's GPT).

mod config;
mod network;
mod params;
mod presets;
#[cfg(test)]
mod tests;

pub use config::{GptConfig, GptMoeConfig, ParameterCount};
pub use params::has_weight_decay;
pub(crate) use params::{ParamSpec, param_specs};

use crate::{CausalLm, Error, KvCache, Result, StepOutput};
use candle_core::{DType, Device, Tensor, Var};
use moe_core::{ExpertLoad, Mode};
pub use moe_kernels::cross_entropy::IGNORED;
use moe_kernels::{KernelOps, Precision};
use network::{Network, PassContext, layer_experts};
use params::Params;
use std::path::Path;

/// A model of the family, with its weights.
#[derive(Debug)]
pub struct Gpt {
    config: GptConfig,
    params: Params,
    /// Over the variables: gradients are recorded.
    training: Network,
    /// Over the same memory, detached.
    inference: Network,
    device: Device,
}

/// Token sequences and what follows each token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenBatch {
    /// `[batch, seq_len]`, row by row.
    pub input_ids: Vec<u32>,
    /// `[batch, seq_len]`: the next token of each; [`IGNORED`] where it does not count.
    pub target_ids: Vec<u32>,
    /// Sequences.
    pub batch: usize,
    /// Tokens per sequence.
    pub seq_len: usize,
}

/// Why a loss is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// With gradients, training capacity and noise; `seed` drives every random draw of the pass.
    Train {
        /// A different one for every micro-batch.
        seed: u64,
    },
    /// Without gradients, evaluation capacity.
    Eval,
}

/// The loss of one batch and what it is made of.
#[derive(Debug, Clone)]
pub struct LossOutput {
    /// Language-model loss plus scaled auxiliary losses: a scalar, with its graph in [`Pass::Train`].
    pub loss: Tensor,
    /// Mean cross-entropy in nats per token.
    pub lm_loss: f64,
    /// Scaled auxiliary losses, summed over layers.
    pub aux_loss: f64,
    /// Load of each MoE layer.
    pub layers: Vec<LayerLoad>,
}

/// The load of one MoE layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerLoad {
    /// Transformer layer, from 0.
    pub layer: usize,
    /// Demand and drops.
    pub load: ExpertLoad,
}

impl Gpt {
    /// A fresh model; the same seed gives the same weights.
    ///
    /// # Errors
    /// [`Error::Config`] if the configuration is not valid.
    pub fn new(config: GptConfig, seed: u64, device: &Device) -> Result<Self> {
        config.validate()?;
        let params = Params::initial(&config, seed, device)?;
        Self::with_params(config, params, device)
    }

    /// A model with the weights that `get` gives for each parameter.
    pub(crate) fn from_fn(
        config: GptConfig,
        device: &Device,
        get: impl FnMut(&ParamSpec) -> Result<Tensor>,
    ) -> Result<Self> {
        config.validate()?;
        let params = Params::from_fn(&config, get)?;
        Self::with_params(config, params, device)
    }

    fn with_params(config: GptConfig, params: Params, device: &Device) -> Result<Self> {
        let ops = KernelOps::new(Precision::F32);
        let training = Self::training_network(&config, &params, ops.clone())?;
        let inference = Self::inference_network(&config, &params, ops)?;
        Ok(Self { config, training, inference, device: device.clone(), params })
    }

    fn training_network(config: &GptConfig, params: &Params, ops: KernelOps) -> Result<Network> {
        Network::new(config, ops, params.vars.iter().map(|(name, var)| (name, var.as_tensor().clone())))
    }

    fn inference_network(config: &GptConfig, params: &Params, ops: KernelOps) -> Result<Network> {
        Network::new(config, ops, params.vars.iter().map(|(name, var)| (name, var.detach())))
    }

    /// The same model with its matrix products in `precision`; sums, softmax, norms and the router stay f32. A new model
    /// computes in f32.
    ///
    /// # Errors
    /// None that a built model can cause.
    pub fn with_precision(mut self, precision: Precision) -> Result<Self> {
        let ops = KernelOps::new(precision);
        self.training = Self::training_network(&self.config, &self.params, ops.clone())?;
        self.inference = Self::inference_network(&self.config, &self.params, ops)?;
        Ok(self)
    }

    /// The same model for inference alone: each weight is packed for the kernels at its first use and kept, so later changes
    /// of the parameters do not show in [`CausalLm::forward`] and [`Pass::Eval`].
    ///
    /// # Errors
    /// None that a built model can cause.
    pub fn frozen(mut self) -> Result<Self> {
        self.inference = Self::inference_network(&self.config, &self.params, KernelOps::frozen(self.precision()))?;
        Ok(self)
    }

    /// The precision of the matrix products.
    pub fn precision(&self) -> Precision {
        self.training.precision()
    }

    /// Reads a Hugging Face folder.
    ///
    /// # Errors
    /// If a file is missing, damaged, or does not fit the configuration.
    pub fn load(dir: &Path, device: &Device) -> Result<Self> {
        crate::hf::load(dir, device)
    }

    /// Reads a model from the contents of `config.json` and `model.safetensors`.
    ///
    /// # Errors
    /// If one of them is damaged or they do not fit each other.
    pub fn from_bytes(config_json: &[u8], safetensors: &[u8], device: &Device) -> Result<Self> {
        crate::hf::from_bytes(config_json, safetensors, device)
    }

    /// Writes `config.json`, `generation_config.json` and `model.safetensors` (in shards past 5 GB) into an existing
    /// folder. Each file is written whole under another name first.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be written.
    pub fn save(&self, dir: &Path, dtype: DType) -> Result<()> {
        crate::hf::save(self, dir, dtype)
    }

    /// The configuration.
    pub fn config(&self) -> &GptConfig {
        &self.config
    }

    /// Every parameter with its name, in the order of the forward pass; experts are stacked.
    pub fn params(&self) -> &[(String, Var)] {
        &self.params.vars
    }

    /// The training loss of a batch.
    ///
    /// # Errors
    /// [`Error::Argument`] if the sizes do not fit or an id is outside the vocabulary.
    ///
    /// # Source
    /// Megatron-DeepSpeed `pretrain_gpt.py`: LM loss plus coefficient times the sum over layers of the load-balance loss.
    pub fn loss(&self, batch: &TokenBatch, pass: Pass) -> Result<LossOutput> {
        let tokens = batch.batch * batch.seq_len;
        if tokens == 0 || batch.input_ids.len() != tokens || batch.target_ids.len() != tokens {
            return Err(Error::Argument(format!(
                "a batch of {} x {} tokens got {} inputs and {} targets",
                batch.batch,
                batch.seq_len,
                batch.input_ids.len(),
                batch.target_ids.len()
            )));
        }
        self.check_ids(&batch.input_ids, batch.seq_len)?;
        let (network, context) = match pass {
            Pass::Train { seed } => (&self.training, PassContext { mode: Mode::Train, seed }),
            Pass::Eval => (&self.inference, PassContext { mode: Mode::Eval, seed: 0 }),
        };
        let (lm_loss, outputs) = network.loss(&batch.input_ids, &batch.target_ids, batch.seq_len, context)?;
        let mut loss = lm_loss.clone();
        if let Some(moe) = &self.config.moe {
            for (_, output) in &outputs {
                for (part, coef) in
                    [(&output.losses.load_balance, moe.aux_loss_coef), (&output.losses.router_z, moe.z_loss_coef)]
                {
                    if let (Some(part), true) = (part, coef > 0.0) {
                        loss = (loss + (part.to_dtype(lm_loss.dtype())? * coef)?)?;
                    }
                }
            }
        }
        let scalar = |t: &Tensor| -> Result<f64> { Ok(t.to_dtype(DType::F64)?.to_scalar()?) };
        let lm = scalar(&lm_loss)?;
        let aux_loss = scalar(&loss)? - lm;
        let layers = outputs.into_iter().map(|(layer, output)| LayerLoad { layer, load: output.load }).collect();
        Ok(LossOutput { loss, lm_loss: lm, aux_loss, layers })
    }

    fn check_ids(&self, ids: &[u32], len: usize) -> Result<()> {
        if let Some(id) = ids.iter().find(|&&id| id as usize >= self.config.vocab_size) {
            let vocab = self.config.vocab_size;
            return Err(Error::Argument(format!("token id {id} is outside the vocabulary of {vocab}")));
        }
        if len > self.config.max_seq_len {
            let max = self.config.max_seq_len;
            return Err(Error::Argument(format!("{len} tokens exceed the model's longest sequence of {max}")));
        }
        Ok(())
    }
}

impl CausalLm for Gpt {
    fn vocab_size(&self) -> usize {
        self.config.vocab_size
    }

    fn max_seq_len(&self) -> usize {
        self.config.max_seq_len
    }

    fn num_layers(&self) -> usize {
        self.config.num_layers
    }

    fn moe_layers(&self) -> Vec<(usize, usize)> {
        self.config.moe_layers()
    }

    fn device(&self) -> &Device {
        &self.device
    }

    fn forward(&self, token_ids: &[u32], cache: &mut KvCache) -> Result<StepOutput> {
        if token_ids.is_empty() {
            return Err(Error::Argument("forward needs at least one token".into()));
        }
        if cache.layers.len() != self.config.num_layers {
            let (got, want) = (cache.layers.len(), self.config.num_layers);
            return Err(Error::Argument(format!("the cache is for {got} layers, the model has {want}")));
        }
        self.check_ids(token_ids, cache.len + token_ids.len())?;
        let pass = PassContext { mode: Mode::Eval, seed: 0 };
        let (logits, outputs) = self.inference.forward_cached(token_ids, cache, pass)?;
        Ok(StepOutput { logits, experts: outputs.iter().map(layer_experts).collect::<Result<_>>()? })
    }
}
