//! [`Shape`]: the configuration of a model by the shapes of its tensors, and what its arguments add.

use super::arguments::{Arguments, Told};
use super::folder::{Folder, Slice};
use super::names::{self, MoeName};
use super::torch_file::TorchFile;
use crate::Result;
use crate::fields::Checked;
use crate::gpt::{GptConfig, GptMoeConfig};
use moe_core::Capacity;

/// What a checkpoint is of.
#[derive(Debug)]
pub(super) struct Shape {
    pub(super) config: GptConfig,
    /// What its MoE layers are called.
    pub(super) moe_name: MoeName,
}

/// Most rows or columns of a matrix.
const MOST: usize = 1 << 24;

impl Shape {
    /// # Errors
    /// [`crate::Error::Format`] naming a tensor that is missing, or an argument that the tensors contradict; as [`GptConfig::validate`].
    pub(super) fn of(folder: &Folder, arguments: &Arguments) -> Result<Self> {
        let file = &folder.slices[0].file;
        let refused = |reason| file.error(reason);
        let (moe_name, moe_layers) = moe_layers(&folder.slices[0]).map_err(refused)?;
        let d_ff = match arguments.told.d_ff {
            Some(d_ff) => d_ff,
            None => inner_width(folder, &moe_layers, moe_name)?,
        };
        let config = config(folder, arguments, &moe_layers, d_ff).map_err(refused)?;
        config.validate().map_err(|e| file.error(e.to_string()))?;
        Ok(Self { config, moe_name })
    }
}

fn config(folder: &Folder, arguments: &Arguments, moe_layers: &[(usize, usize)], d_ff: usize) -> Checked<GptConfig> {
    let first = &folder.slices[0];
    let [_, d_model] = matrix(first, names::WORDS)?;
    let words = folder.slices.iter().map(|slice| matrix(slice, names::WORDS)).collect::<Checked<Vec<_>>>()?;
    let vocab_size = words.iter().map(|[rows, _]| rows).sum();
    let [max_seq_len, _] = matrix(first, names::POSITIONS)?;
    let num_layers = first.tensors.keys().filter_map(|name| names::layer_of(name)).max().map_or(0, |last| last + 1);
    if num_layers == 0 {
        return Err("it has no layers under language_model.encoder, where Megatron has had them since 2021".into());
    }
    let counts: Vec<usize> = moe_layers.iter().map(|(_, experts)| *experts).collect();
    let expert_interval = moe_layers.first().map_or(1, |(layer, _)| layer + 1);
    let residual = first.tensors.keys().any(|name| name.ends_with(".mlp.coefficient.weight"));
    let moe = moe_layers.first().map(|_| GptMoeConfig {
        num_experts: counts.clone(),
        expert_interval,
        residual,
        top_k: arguments.top_k.unwrap_or(0),
        capacity: Capacity {
            train_factor: arguments.drop_tokens.then_some(arguments.train_capacity_factor),
            eval_factor: arguments.drop_tokens.then_some(arguments.eval_capacity_factor),
            min_capacity: arguments.min_capacity,
        },
        // Megatron-DeepSpeed has no arguments for these: they are DeepSpeed's own.
        use_rts: true,
        noisy_gate: None,
        z_loss_coef: 0.0,
        sample_second_expert: arguments.sample_second_expert,
        aux_loss_coef: arguments.aux_loss_coef,
    });
    if moe.is_some() && arguments.top_k.is_none() {
        return Err("args.topk is not saved in it, and it has experts; give --topk".into());
    }
    let config = GptConfig {
        vocab_size,
        max_seq_len,
        d_model,
        num_layers,
        num_heads: arguments.num_heads,
        d_ff,
        layer_norm_eps: arguments.layer_norm_eps,
        init_std: arguments.init_std,
        eos_token_id: None,
        moe,
    };
    agree(&arguments.told, &config, folder.slices.len())?;
    if let Some((layer, _)) = moe_layers.iter().find(|(layer, _)| !(layer + 1).is_multiple_of(expert_interval)) {
        return Err(format!(
            "layers {expert_interval} and {}, counted from 1, have experts: only experts in every n-th layer are implemented",
            layer + 1
        ));
    }
    Ok(config)
}

/// The sizes of a matrix that must be there.
fn matrix(slice: &Slice, name: &str) -> Checked<[usize; 2]> {
    let tensor =
        slice.tensors.get(name).ok_or_else(|| format!("{name} is missing: is it a GPT of Megatron-DeepSpeed?"))?;
    match tensor.shape.as_slice() {
        &[rows, columns] if (1..=MOST).contains(&rows) && (1..=MOST).contains(&columns) => Ok([rows, columns]),
        other => Err(format!("{name} must be a matrix, got the shape {other:?}")),
    }
}

/// Layers with experts, counted from 0, with their counts; and what they are called.
fn moe_layers(slice: &Slice) -> Checked<(MoeName, Vec<(usize, usize)>)> {
    let layers_of = |moe: MoeName| {
        let mut layers = Vec::new();
        for name in slice.tensors.keys() {
            let Some(layer) = names::layer_of(name).filter(|layer| *name == names::gate(*layer, moe)) else { continue };
            layers.push((layer, matrix(slice, name)?[0]));
        }
        layers.sort_unstable();
        Ok::<_, String>(layers)
    };
    match (layers_of(MoeName::Layer)?, layers_of(MoeName::Inside)?) {
        (layers, inside) if inside.is_empty() => Ok((MoeName::Layer, layers)),
        (layers, inside) if layers.is_empty() => Ok((MoeName::Inside, inside)),
        _ => Err("some of its MoE layers are called mlp.moe, others mlp; one model has one of these".into()),
    }
}

/// The inner width of feed-forward networks: of a dense layer, which is always sliced, or of the first expert.
fn inner_width(folder: &Folder, moe_layers: &[(usize, usize)], moe: MoeName) -> Result<usize> {
    let first = &folder.slices[0];
    let dense = first.tensors.keys().find(|name| names::is_dense_in(name));
    if let Some(name) = dense {
        let [rows, _] = matrix(first, name).map_err(|reason| first.file.error(reason))?;
        return Ok(rows * folder.slices.len());
    }
    let Some(&(layer, _)) = moe_layers.first() else {
        return Err(first.file.error("it has no feed-forward networks"));
    };
    let files = folder.expert(0, 0)?;
    let file = TorchFile::open(&folder.dir.join(files[0].name()))?;
    let name = names::expert(layer, 0, moe, "dense_h_to_4h.weight");
    let tensors = file.tensors(file.pickle().root()).map_err(|reason| file.error(reason))?;
    match tensors.get(&name).map(|tensor| tensor.shape.as_slice()) {
        Some(&[rows, _]) => Ok(rows * files.len()),
        _ => Err(file.error(format!("has no matrix {name}"))),
    }
}

fn agree(told: &Told, config: &GptConfig, slices: usize) -> Checked<()> {
    let interval = config.moe.as_ref().map(|moe| moe.expert_interval);
    for &(name, told) in &told.sizes {
        let found = match name {
            "num_layers" => Some(config.num_layers),
            "hidden_size" => Some(config.d_model),
            "padded_vocab_size" => Some(config.vocab_size),
            "max_position_embeddings" => Some(config.max_seq_len),
            "tensor_model_parallel_size" => Some(slices),
            _ => interval,
        };
        if let (Some(told), Some(found)) = (told, found)
            && told != found
        {
            return Err(format!("args.{name} is {told}, but by its tensors it is {found}"));
        }
    }
    let found = config.moe.as_ref().map_or_else(Vec::new, |moe| moe.num_experts.clone());
    if let Some(told) = &told.num_experts {
        let is_so = match told.as_slice() {
            [] | [0 | 1] if found.is_empty() => true,
            &[all] => !found.is_empty() && found.iter().all(|&count| count == all),
            all => all == found,
        };
        if !is_so {
            return Err(format!("args.num_experts is {told:?}, but by its tensors its MoE layers have {found:?}"));
        }
    }
    if let (Some(told), Some(moe)) = (&told.mlp_type, &config.moe) {
        let found = if moe.residual { "residual" } else { "standard" };
        if told != found {
            return Err(format!("args.mlp_type is {told:?}, but by its tensors it is {found:?}"));
        }
    }
    Ok(())
}
