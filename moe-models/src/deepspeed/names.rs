//! What tensors of Megatron-DeepSpeed are called, and how its ranks slice them.

use crate::config::MOST_LAYERS;

/// A row for each token of the vocabulary.
pub(super) const WORDS: &str = "language_model.embedding.word_embeddings.weight";
/// Learned positions.
pub(super) const POSITIONS: &str = "language_model.embedding.position_embeddings.weight";
const ENCODER: &str = "language_model.encoder.";

/// Where DeepSpeed's MoE layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MoeName {
    /// It is the layer's `mlp`, with a residual branch of its own, whose coefficients are the experts' and the branch's.
    Layer,
    /// It is `mlp.moe`, in the residual layer that Megatron-DeepSpeed had of its own at first: coefficients without a bias, the
    /// branch's first.
    Inside,
}

impl MoeName {
    fn prefix(self) -> &'static str {
        match self {
            Self::Layer => "mlp.deepspeed_moe",
            Self::Inside => "mlp.moe.deepspeed_moe",
        }
    }
}

/// How a tensor is arranged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Arranged {
    /// As here; slices, if it is in slices, are along this dimension.
    Along(usize),
    /// As here, and never in slices.
    Whole,
    /// Queries, keys and values of each head together, heads in slices.
    ByHead,
    /// A row for the experts and one for the fixed branch, in the order of [`MoeName`].
    Coefficients,
    /// Its bias, if it has one.
    CoefficientBias,
}

/// A tensor by its name in their files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Theirs {
    pub(super) name: String,
    /// The layer of the expert in whose file it lies; `None` for what lies in the slices' own.
    pub(super) layer_of_expert: Option<usize>,
    pub(super) arranged: Arranged,
}

/// Parts of a layer: ours, theirs, how the weight and how the bias are arranged.
const PARTS: [(&str, &str, Arranged, Arranged); 8] = {
    use Arranged::{Along, ByHead, CoefficientBias, Coefficients, Whole};
    [
        ("input_layernorm", "input_layernorm", Whole, Whole),
        ("post_attention_layernorm", "post_attention_layernorm", Whole, Whole),
        ("self_attn.qkv_proj", "self_attention.query_key_value", ByHead, ByHead),
        ("self_attn.o_proj", "self_attention.dense", Along(1), Whole),
        ("mlp.fc_in", "mlp.dense_h_to_4h", Along(0), Along(0)),
        ("mlp.fc_out", "mlp.dense_4h_to_h", Along(1), Whole),
        ("mlp.coefficient", "mlp.coefficient", Coefficients, CoefficientBias),
        ("norm", "final_layernorm", Whole, Whole),
    ]
};

/// What a parameter of ours, or one expert of it, is in their files.
pub(super) fn theirs(parameter: &str, expert: Option<usize>, moe: MoeName) -> Option<Theirs> {
    let of = |name: &str, arranged| Some(Theirs { name: name.into(), layer_of_expert: None, arranged });
    let below = parameter.strip_prefix("model.")?;
    match below {
        "embed_tokens.weight" => return of(WORDS, Arranged::Along(0)),
        "embed_positions.weight" => return of(POSITIONS, Arranged::Whole),
        _ => {}
    }
    let Some((layer, part)) = below.strip_prefix("layers.").and_then(|below| below.split_once('.')) else {
        let (name, arranged) = part_of(below)?;
        return of(&format!("{ENCODER}{name}"), arranged);
    };
    let index = layer.parse().ok()?;
    if part == "mlp.gate.weight" {
        return of(&gate(index, moe), Arranged::Whole);
    }
    if let Some(expert) = expert {
        let (name, arranged) = part_of(&part.replace("mlp.experts.", "mlp."))?;
        let name = self::expert(index, expert, moe, name.strip_prefix("mlp.")?);
        return Some(Theirs { name, layer_of_expert: Some(index), arranged });
    }
    let (name, arranged) = match part.strip_prefix("mlp.residual_mlp.") {
        Some(part) => part_of(&format!("mlp.{part}")).map(|(name, arranged)| (format!("mlp.{name}"), arranged))?,
        None => part_of(part)?,
    };
    of(&format!("{ENCODER}layers.{layer}.{name}"), arranged)
}

/// Their name of `part.weight` or `part.bias`.
fn part_of(name: &str) -> Option<(String, Arranged)> {
    let (part, kind) = name.rsplit_once('.')?;
    let (_, theirs, weight, bias) = PARTS.iter().find(|(ours, ..)| *ours == part)?;
    Some((format!("{theirs}.{kind}"), if kind == "weight" { *weight } else { *bias }))
}

/// The gate's weight in layer `layer`.
pub(super) fn gate(layer: usize, moe: MoeName) -> String {
    format!("{ENCODER}layers.{layer}.{}.gate.wg.weight", moe.prefix())
}

/// `part` of an expert.
pub(super) fn expert(layer: usize, expert: usize, moe: MoeName, part: &str) -> String {
    format!("{ENCODER}layers.{layer}.{}.experts.deepspeed_experts.{expert}.{part}", moe.prefix())
}

/// The layer that a tensor is in.
pub(super) fn layer_of(name: &str) -> Option<usize> {
    let layer = name.strip_prefix(ENCODER)?.strip_prefix("layers.")?.split_once('.')?.0.parse().ok();
    layer.filter(|&layer| layer < MOST_LAYERS)
}

/// Whether a tensor is the first matrix of a dense layer's network.
pub(super) fn is_dense_in(name: &str) -> bool {
    layer_of(name).is_some_and(|layer| name == format!("{ENCODER}layers.{layer}.mlp.dense_h_to_4h.weight"))
}
