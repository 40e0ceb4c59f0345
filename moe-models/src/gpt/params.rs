//! The named parameters of a model: their shapes and initial values, and where a network gets them from.

use super::GptConfig;
use crate::Result;
use candle_core::{DType, Device, Tensor, Var};
use moe_core::CounterRng;

/// How a parameter starts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Init {
    Zeros,
    Ones,
    Normal(f64),
    /// Uniform in `±bound`.
    Uniform(f64),
}

/// One parameter of a configuration.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct ParamSpec {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    pub(super) init: Init,
}

/// Whether AdamW decays this parameter: matrices yes, biases and norms no.
///
/// # Source
/// Megatron's optimizer groups: no decay on biases and 1-D parameters. Stacked expert biases are biases.
pub fn has_weight_decay(name: &str, shape: &[usize]) -> bool {
    shape.len() >= 2 && !name.ends_with("bias")
}

/// All parameters of `config`, in the order of the forward pass.
pub(crate) fn param_specs(config: &GptConfig) -> Vec<ParamSpec> {
    let mut specs = Specs { config, out: Vec::new() };
    let (d, std) = (config.d_model, config.init_std);
    specs.add("model.embed_tokens.weight", &[config.vocab_size, d], Init::Normal(std));
    specs.add("model.embed_positions.weight", &[config.max_seq_len, d], Init::Normal(std));
    for layer in 0..config.num_layers {
        specs.layer(layer);
    }
    specs.norm("model.norm");
    specs.out
}

struct Specs<'a> {
    config: &'a GptConfig,
    out: Vec<ParamSpec>,
}

impl Specs<'_> {
    fn add(&mut self, name: impl Into<String>, shape: &[usize], init: Init) {
        self.out.push(ParamSpec { name: name.into(), shape: shape.to_vec(), init });
    }

    fn norm(&mut self, name: &str) {
        self.add(format!("{name}.weight"), &[self.config.d_model], Init::Ones);
        self.add(format!("{name}.bias"), &[self.config.d_model], Init::Zeros);
    }

    /// Projections into the residual stream start smaller.
    fn residual_std(&self) -> f64 {
        self.config.init_std / (2.0 * self.config.num_layers as f64).sqrt()
    }

    fn mlp(&mut self, prefix: &str, stack: &[usize]) {
        let (d, ff) = (self.config.d_model, self.config.d_ff);
        let shape = |tail: &[usize]| [stack, tail].concat();
        self.add(format!("{prefix}.fc_in.weight"), &shape(&[ff, d]), Init::Normal(self.config.init_std));
        self.add(format!("{prefix}.fc_in.bias"), &shape(&[ff]), Init::Zeros);
        self.add(format!("{prefix}.fc_out.weight"), &shape(&[d, ff]), Init::Normal(self.residual_std()));
        self.add(format!("{prefix}.fc_out.bias"), &shape(&[d]), Init::Zeros);
    }

    fn layer(&mut self, layer: usize) {
        let (d, std) = (self.config.d_model, self.config.init_std);
        let prefix = format!("model.layers.{layer}");
        self.norm(&format!("{prefix}.input_layernorm"));
        self.add(format!("{prefix}.self_attn.qkv_proj.weight"), &[3 * d, d], Init::Normal(std));
        self.add(format!("{prefix}.self_attn.qkv_proj.bias"), &[3 * d], Init::Zeros);
        self.add(format!("{prefix}.self_attn.o_proj.weight"), &[d, d], Init::Normal(self.residual_std()));
        self.add(format!("{prefix}.self_attn.o_proj.bias"), &[d], Init::Zeros);
        self.norm(&format!("{prefix}.post_attention_layernorm"));
        let mlp = format!("{prefix}.mlp");
        let (Some(experts), Some(moe)) = (self.config.experts_of_layer(layer), self.config.moe.as_ref()) else {
            return self.mlp(&mlp, &[]);
        };
        let bound = 1.0 / (d as f64).sqrt();
        let residual = moe.residual;
        self.add(format!("{mlp}.gate.weight"), &[experts, d], Init::Uniform(bound));
        self.mlp(&format!("{mlp}.experts"), &[experts]);
        if residual {
            self.mlp(&format!("{mlp}.residual_mlp"), &[]);
            self.add(format!("{mlp}.coefficient.weight"), &[2, d], Init::Uniform(bound));
            self.add(format!("{mlp}.coefficient.bias"), &[2], Init::Uniform(bound));
        }
    }
}

/// FNV-1a: a stable number for a name.
fn stream_of(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, b| (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

impl ParamSpec {
    /// Initial values: a function of seed and name alone; experts of one stack have streams of their own, so that a
    /// rank holding some of them draws the same values.
    pub(super) fn initial(&self, seed: u64, device: &Device) -> Result<Tensor> {
        let count: usize = self.shape.iter().product();
        let stack = if self.name.contains(".experts.") { self.shape[0] } else { 1 };
        let stream = stream_of(&self.name);
        let mut values = Vec::with_capacity(count);
        for expert in 0..stack {
            let mut rng = CounterRng::new(CounterRng::mix(seed, &[expert as u64]), stream);
            values.extend((0..count / stack).map(|_| match self.init {
                Init::Zeros => 0.0,
                Init::Ones => 1.0,
                Init::Normal(std) => (rng.normal_f64() * std) as f32,
                Init::Uniform(bound) => ((2.0 * rng.uniform_f64() - 1.0) * bound) as f32,
            }));
        }
        Ok(Tensor::from_vec(values, self.shape.as_slice(), device)?)
    }
}

/// The parameters of a model, in the order of [`param_specs`].
#[derive(Debug)]
pub(super) struct Params {
    pub(super) vars: Vec<(String, Var)>,
}

impl Params {
    pub(super) fn initial(config: &GptConfig, seed: u64, device: &Device) -> Result<Self> {
        Self::from_fn(config, |spec| spec.initial(seed, device))
    }

    pub(super) fn from_fn(config: &GptConfig, mut get: impl FnMut(&ParamSpec) -> Result<Tensor>) -> Result<Self> {
        let mut vars = Vec::new();
        for spec in param_specs(config) {
            let tensor = get(&spec)?.to_dtype(DType::F32)?;
            vars.push((spec.name, Var::from_tensor(&tensor)?));
        }
        Ok(Self { vars })
    }
}
