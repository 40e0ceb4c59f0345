//! Mixtures of experts made of dense models: every expert begins as a copy of a layer's feed-forward network, or as a part of one, so
//! that the new model says what the old one says until it is trained.

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use moe_core::ParamSpec;
use moe_models::gpt::{Gpt, GptConfig, GptMoeConfig};
use std::collections::HashMap;

/// How experts are made.
#[derive(Debug, Clone, PartialEq)]
pub struct Upcycling {
    /// The mixture: experts of each layer, which layers, experts per token and the rest. Experts per token must be 2 or more, whose
    /// weights sum to 1; of one alone the weight is its probability, which would scale what the layer adds.
    pub moe: GptMoeConfig,
    /// Parts that each network is cut into, of its inner width: 1 for whole copies. With more, experts and experts per token of
    /// `moe` count parts, all layers have experts, and none keeps a dense network.
    pub granularity: usize,
    /// Of the routers' initial weights.
    pub seed: u64,
}

impl Upcycling {
    /// The mixture's configuration.
    ///
    /// # Errors
    /// [`Error::Argument`] naming what cannot keep the function of `dense`.
    fn config(&self, dense: &GptConfig) -> Result<GptConfig> {
        let refuse = |text: String| Err(Error::Argument(text));
        let Self { moe, granularity, .. } = self;
        let granularity = *granularity;
        if dense.moe.is_some() {
            return refuse("the model has experts already; upcycling begins with a dense one".into());
        }
        if moe.top_k < 2 {
            return refuse(
                "one expert per token is weighted by its probability, which would change what the model says; choose 2 or more".into(),
            );
        }
        if granularity == 0 || !dense.d_ff.is_multiple_of(granularity) {
            return refuse(format!("the granularity must divide the inner width {}, got {granularity}", dense.d_ff));
        }
        let in_parts = moe.num_experts.iter().chain([&moe.top_k]).all(|count| count.is_multiple_of(granularity));
        if granularity > 1 && (moe.expert_interval != 1 || moe.residual || !in_parts) {
            return refuse(format!(
                "experts that are parts of a network need experts in every layer (an interval of 1), no residual network, and \
                 experts and experts per token that are multiples of the granularity {granularity}"
            ));
        }
        // A second expert that is drawn would be a part of another copy.
        let moe = GptMoeConfig { sample_second_expert: moe.sample_second_expert && granularity == 1, ..moe.clone() };
        let config = GptConfig { d_ff: dense.d_ff / granularity, moe: Some(moe), ..dense.clone() };
        config.validate().map_err(|e| Error::Argument(e.to_string()))?;
        Ok(config)
    }
}

/// A mixture of experts that says what `dense` says: logits are equal but for rounding wherever no row is dropped.
///
/// # Errors
/// [`Error::Argument`] if the mixture asked for cannot be one.
///
/// # Source
/// Sparse Upcycling (2212.05055), with weights that sum to 1; parts: virtual groups of He et al. (2410.07524), section 3.2. All parts
/// of one copy have the same row of the gate, so that they are chosen together (in training too: with two experts per token the second is
/// the next likeliest, not drawn as elsewhere) and each gets the same share of the copy's weight;
/// outputs are scaled by the number of parts to make up for it.
pub fn upcycle(dense: &Gpt, how: &Upcycling) -> Result<Gpt> {
    let config = how.config(dense.config())?;
    let old: HashMap<&str, &Tensor> =
        dense.params().iter().map(|(name, var)| (name.as_str(), var.as_tensor())).collect();
    let get = |name: &str| -> Result<Tensor> {
        let found = old.get(name).map(|tensor| tensor.detach());
        found.ok_or_else(|| Error::Argument(format!("the dense model has no parameter {name}")))
    };
    let value = |spec: &ParamSpec| -> Result<Tensor> {
        if let Some(same) = old.get(spec.name.as_str()).filter(|same| same.dims() == spec.shape) {
            return Ok(same.detach());
        }
        if spec.is_stacked() {
            let (prefix, rest) = spec.name.split_once(".experts.").unwrap_or_default();
            return part_of_network(spec, &get(&format!("{prefix}.{rest}"))?, how.granularity);
        }
        if let Some((prefix, rest)) = spec.name.split_once(".residual_mlp.") {
            return get(&format!("{prefix}.{rest}"));
        }
        let initial = spec.initial(how.seed, &Device::Cpu).map_err(moe_models::Error::from)?.to_dtype(DType::F32)?;
        if how.granularity > 1 && spec.name.ends_with(".gate.weight") {
            return repeated(&initial, how.granularity);
        }
        Ok(initial)
    };
    Ok(Gpt::of_parts(config, None, |spec, _| value(spec).map_err(Error::into_model))?)
}

/// The stack of experts whose networks, or parts of them, are those of the dense parameter `whole`.
fn part_of_network(spec: &ParamSpec, whole: &Tensor, granularity: usize) -> Result<Tensor> {
    let name = spec.name.as_str();
    let cut = |dim: usize, part: usize| {
        let size = whole.dim(dim)? / granularity;
        whole.narrow(dim, part * size, size)
    };
    let of_part = |part: usize| -> Result<Tensor> {
        Ok(match name {
            _ if name.ends_with("fc_in.weight") || name.ends_with("fc_in.bias") => cut(0, part)?.contiguous()?,
            _ if name.ends_with("fc_out.weight") => (cut(1, part)?.contiguous()? * granularity as f64)?,
            // Weights sum to 1, so this one is added once.
            _ => whole.clone(),
        })
    };
    let parts = (0..granularity).map(of_part).collect::<Result<Vec<_>>>()?;
    let experts: Vec<&Tensor> = (0..spec.shape[0]).map(|expert| &parts[expert % granularity]).collect();
    Ok(Tensor::stack(&experts, 0)?)
}

/// Every `granularity` rows the first of them.
fn repeated(gate: &Tensor, granularity: usize) -> Result<Tensor> {
    let rows = gate.dim(0)? as u32;
    let first: Vec<u32> = (0..rows).map(|row| row / granularity as u32 * granularity as u32).collect();
    Ok(gate.index_select(&Tensor::new(first, &Device::Cpu)?, 0)?)
}
