//! The model that is left when some experts of each layer are dropped, or merged into those that are kept.

use super::ExpertUse;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use moe_core::ParamSpec;
use moe_models::gpt::{Gpt, GptConfig};
use std::collections::HashMap;

/// The model without the experts that `kept` does not name: of each layer with experts those to keep, ascending.
///
/// # Errors
/// [`Error::Argument`] if `kept` does not fit the model.
pub fn prune(model: &Gpt, kept: &[Vec<usize>]) -> Result<Gpt> {
    reduce(model, kept, |_, experts, kept| select(experts, kept))
}

/// The same with each dropped expert merged into the kept one whose gate is most like its own (by the cosine between their rows):
/// weights are means over the merged experts, each counted as often as it has rows in `usage`, or alike where none has any. The
/// gates of those that are kept stay.
///
/// # Errors
/// [`Error::Argument`] if `kept` or `usage` does not fit the model.
///
/// # Source
/// M-SMoE (2310.01334), section 3.2: frequency-weighted merging of experts with similar routing. Differs: neurons are not
/// aligned before they are averaged.
pub fn merge(model: &Gpt, kept: &[Vec<usize>], usage: &[ExpertUse]) -> Result<Gpt> {
    let layers = model.config().moe_layers();
    let fits = |(of, (layer, experts)): (&ExpertUse, &(usize, usize))| of.layer == *layer && of.rows.len() == *experts;
    if usage.len() != layers.len() || !usage.iter().zip(&layers).all(fits) {
        return Err(Error::Argument("the experts' use was measured on another model; measure it on this one".into()));
    }
    check(model.config(), kept)?;
    let mut groups = Vec::with_capacity(layers.len());
    for ((of, (layer, _)), kept) in usage.iter().zip(&layers).zip(kept) {
        groups.push(group(&gate_rows(model, *layer)?, kept, &of.rows));
    }
    reduce(model, kept, |index, experts, _| weighted_means(experts, &groups[index]))
}

/// The experts that make up one that is kept, each with its part.
type Merged = Vec<(usize, f64)>;

/// Which experts each kept one is made of.
fn group(gates: &[Vec<f32>], kept: &[usize], rows: &[u64]) -> Vec<Merged> {
    let mut groups: Vec<Vec<usize>> = kept.iter().map(|&expert| vec![expert]).collect();
    for dropped in (0..gates.len()).filter(|expert| !kept.contains(expert)) {
        let likeness = |at: usize| cosine(&gates[kept[at]], &gates[dropped]);
        let nearest = (0..kept.len()).max_by(|&a, &b| likeness(a).total_cmp(&likeness(b)).then(b.cmp(&a)));
        if let Some(nearest) = nearest {
            groups[nearest].push(dropped);
        }
    }
    let parts = |group: Vec<usize>| {
        let all: u64 = group.iter().map(|&expert| rows[expert]).sum();
        let count = group.len() as f64;
        let part = |expert: usize| if all > 0 { rows[expert] as f64 / all as f64 } else { 1.0 / count };
        group.into_iter().map(|expert| (expert, part(expert))).collect()
    };
    groups.into_iter().map(parts).collect()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f64::MIN_POSITIVE)
}

fn gate_rows(model: &Gpt, layer: usize) -> Result<Vec<Vec<f32>>> {
    let name = format!("model.layers.{layer}.mlp.gate.weight");
    let found = model.params().iter().find(|(own, _)| *own == name);
    let (_, var) = found.ok_or_else(|| Error::Argument(format!("the model has no parameter {name}")))?;
    Ok(var.to_dtype(DType::F32)?.to_vec2()?)
}

fn check(config: &GptConfig, kept: &[Vec<usize>]) -> Result<()> {
    let layers = config.moe_layers();
    let is_chosen = |(kept, (_, experts)): (&Vec<usize>, &(usize, usize))| {
        !kept.is_empty() && kept.windows(2).all(|pair| pair[0] < pair[1]) && kept.iter().all(|e| e < experts)
    };
    if kept.len() == layers.len() && kept.iter().zip(&layers).all(is_chosen) {
        return Ok(());
    }
    Err(Error::Argument(format!(
        "the experts to keep must be named for each of the {} layers with experts, ascending, at least one each; got {kept:?}",
        layers.len()
    )))
}

/// A model of fewer experts, whose stacks `stack` makes of the old ones: of the MoE layer's number, the stack and what is kept.
fn reduce(model: &Gpt, kept: &[Vec<usize>], stack: impl Fn(usize, &Tensor, &[usize]) -> Result<Tensor>) -> Result<Gpt> {
    check(model.config(), kept)?;
    let layers = model.config().moe_layers();
    let mut config = model.config().clone();
    if let Some(moe) = &mut config.moe {
        moe.num_experts = kept.iter().map(Vec::len).collect();
    }
    let old: HashMap<&str, &Tensor> =
        model.params().iter().map(|(name, var)| (name.as_str(), var.as_tensor())).collect();
    let number_of =
        |name: &str| layers.iter().position(|(layer, _)| name.starts_with(&format!("model.layers.{layer}.mlp.")));
    let value = |spec: &ParamSpec| -> Result<Tensor> {
        let Some(own) = old.get(spec.name.as_str()) else {
            return Err(Error::Argument(format!("the model has no parameter {}", spec.name)));
        };
        let own = own.detach();
        match number_of(&spec.name) {
            Some(index) if spec.is_stacked() => stack(index, &own, &kept[index]),
            Some(index) if spec.name.ends_with(".gate.weight") => select(&own, &kept[index]),
            _ => Ok(own),
        }
    };
    Ok(Gpt::of_parts(config, None, |spec, _| value(spec).map_err(Error::into_model))?)
}

fn select(experts: &Tensor, kept: &[usize]) -> Result<Tensor> {
    let ids: Vec<u32> = kept.iter().map(|&expert| expert as u32).collect();
    Ok(experts.contiguous()?.index_select(&Tensor::new(ids, &Device::Cpu)?, 0)?)
}

fn weighted_means(experts: &Tensor, groups: &[Merged]) -> Result<Tensor> {
    let mean = |group: &Merged| -> Result<Tensor> {
        let [(first, _)] = group.as_slice() else {
            let mut sum = experts.get(0)?.zeros_like()?;
            for &(expert, part) in group {
                sum = (sum + (experts.get(expert)? * part)?)?;
            }
            return Ok(sum);
        };
        Ok(experts.get(*first)?)
    };
    Ok(Tensor::stack(&groups.iter().map(mean).collect::<Result<Vec<_>>>()?, 0)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropped_experts_go_to_the_one_most_like_them() {
        let gates = [vec![1.0, 0.0], vec![0.0, 1.0], vec![0.9, 0.1], vec![-0.1, -2.0], vec![0.1, 3.0]];
        // The fourth is like neither, and less unlike the first; nothing was sent to the last two.
        let want = [vec![(0, 0.5), (2, 0.375), (3, 0.125)], vec![(1, 0.5), (4, 0.5)]];
        assert_eq!(group(&gates, &[0, 1], &[4, 0, 3, 1, 0]), want);
        let third = 1.0 / 3.0;
        assert_eq!(group(&gates, &[1, 2, 4], &[1; 5])[1], [(2, third), (0, third), (3, third)]);
    }
}
