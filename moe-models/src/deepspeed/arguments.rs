//! [`Arguments`]: what Megatron's saved arguments say of a model, and what the command line says where there are none.

use super::pickle::{Id, Pickle, Value as Pickled};
use super::torch_file::TorchFile;
use crate::fields::{Checked, Fields};
use crate::{Error, Result};
use serde_json::{Map, Value, json};

/// What a model is that its tensors do not show.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Arguments {
    pub(super) num_heads: usize,
    pub(super) layer_norm_eps: f64,
    pub(super) init_std: f64,
    /// In which order rows of queries, keys and values lie.
    pub(super) qkv: QkvOrder,
    pub(super) top_k: Option<usize>,
    pub(super) train_capacity_factor: f64,
    pub(super) eval_capacity_factor: f64,
    pub(super) min_capacity: usize,
    pub(super) drop_tokens: bool,
    pub(super) sample_second_expert: bool,
    pub(super) aux_loss_coef: f64,
    /// What they say that the tensors show too.
    pub(super) told: Told,
}

/// What is there twice, and must be the same.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Told {
    pub(super) sizes: Vec<(&'static str, Option<usize>)>,
    pub(super) num_experts: Option<Vec<usize>>,
    pub(super) mlp_type: Option<String>,
    pub(super) d_ff: Option<usize>,
}

/// The order of the rows of `query_key_value`, from the outermost on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum QkvOrder {
    /// Version 0: part, head, column.
    PartHeadColumn,
    /// Version 1: head, column, part.
    HeadColumnPart,
    /// From version 2 on: head, part, column.
    HeadPartColumn,
}

/// Names that may be given beside a checkpoint.
pub(super) const NAMES: [&str; 11] = [
    "num_attention_heads",
    "checkpoint_version",
    "topk",
    "layernorm_epsilon",
    "init_method_std",
    "moe_train_capacity_factor",
    "moe_eval_capacity_factor",
    "moe_min_capacity",
    "moe_token_dropping",
    "moe_top2_2nd_expert_sampling",
    "moe_loss_coeff",
];

/// Refuses options of experts for a model that has none.
///
/// # Errors
/// [`Error::Argument`] naming one.
pub(super) fn refuse_for_dense(given: &Map<String, Value>) -> Result<()> {
    let is_of_experts = |name: &&&str| **name == "topk" || name.starts_with("moe_");
    match NAMES.iter().filter(is_of_experts).find(|name| given.contains_key(**name)) {
        Some(name) => {
            let flag = name.replace('_', "-");
            Err(Error::Argument(format!("--{flag} is of experts, and the checkpoint has none; leave the option out")))
        }
        None => Ok(()),
    }
}

/// Sizes that tensors show.
pub(super) const SIZES: [&str; 6] = [
    "num_layers",
    "hidden_size",
    "padded_vocab_size",
    "max_position_embeddings",
    "expert_interval",
    "tensor_model_parallel_size",
];

/// Values that a decoder of this family has; anything else is refused.
fn expected() -> Vec<(&'static str, Vec<Value>)> {
    let none = || vec![Value::Null, json!(false)];
    let yes = || vec![Value::Null, json!(true)];
    vec![
        ("swiglu", none()),
        ("squared_relu", none()),
        ("onnx_safe", none()),
        ("normalization", vec![Value::Null, json!("layernorm")]),
        ("apply_layernorm_1p", none()),
        ("apply_residual_connection_post_layernorm", none()),
        ("add_bias_linear", yes()),
        ("add_position_embedding", yes()),
        ("use_rotary_position_embeddings", none()),
        ("use_alibi_position_embeddings", none()),
        ("embed_layernorm", none()),
        ("untie_embeddings_and_output_weights", none()),
        ("num_experts_switch", none()),
        ("retro_add_retriever", none()),
        ("pipeline_model_parallel_size", vec![Value::Null, json!(1)]),
    ]
}

const MOST: usize = 1 << 24;

impl Arguments {
    /// What the file of the first slice says, and `given` by the names of Megatron's arguments.
    ///
    /// # Errors
    /// [`Error::Format`] naming an argument that is not implemented or missing; [`Error::Argument`] for a given one that contradicts the
    /// file or is not known.
    pub(super) fn read(file: &TorchFile, given: &Map<String, Value>) -> Result<Self> {
        let (pickle, root) = (file.pickle(), file.pickle().root());
        let mut values = saved(pickle, root);
        for (name, value) in given {
            let flag = name.replace('_', "-");
            if !NAMES.contains(&name.as_str()) {
                return Err(Error::Argument(format!("{name} is not one of {}", NAMES.join(", "))));
            }
            match values.get(name) {
                Some(other) if !other.is_null() && !is_same(other, value) => {
                    let reason = format!("--{flag} {value}: the checkpoint says {other}; leave the option out");
                    return Err(Error::Argument(reason));
                }
                _ => drop(values.insert(name.clone(), value.clone())),
            }
        }
        let fields = Fields::of(&Value::Object(values), "args");
        fields.and_then(Self::of).map_err(|reason| file.error(reason))
    }

    pub(super) fn of(mut fields: Fields) -> Checked<Self> {
        for (name, values) in expected() {
            fields.expect(name, &values)?;
        }
        let is_tanh = fields.or("bias_gelu_fusion", true)?;
        if !is_tanh && !fields.or("openai_gelu", false)? {
            let reason = "args.bias_gelu_fusion or args.openai_gelu must be true: without both GELU is exact, which is not \
                          implemented";
            return Err(reason.into());
        }
        let Some(num_heads) = fields.optional("num_attention_heads")? else {
            return Err("args.num_attention_heads is not saved in it; give --num-attention-heads".into());
        };
        if !(1..=MOST).contains(&num_heads) {
            return Err(format!("args.num_attention_heads must be between 1 and {MOST}, got {num_heads}"));
        }
        fields.expect("num_key_value_heads", &[Value::Null, num_heads.into()])?;
        let hidden_size = fields.optional::<usize>("hidden_size")?;
        if let Some(width) = hidden_size {
            fields.expect("kv_channels", &[Value::Null, (width / num_heads).into()])?;
        }
        let Some(version) = fields.optional::<f64>("checkpoint_version")? else {
            return Err("checkpoint_version is not saved in it; give --checkpoint-version (3 since 2021)".into());
        };
        let qkv = match version {
            0.0 => QkvOrder::PartHeadColumn,
            1.0 => QkvOrder::HeadColumnPart,
            2.0..4.0 => QkvOrder::HeadPartColumn,
            _ => return Err(format!("checkpoint_version {version} is not one of 0, 1, 2 and 3")),
        };
        let mut sizes = vec![("hidden_size", hidden_size)];
        for name in SIZES.into_iter().filter(|name| *name != "hidden_size") {
            sizes.push((name, fields.optional(name)?));
        }
        Ok(Self {
            num_heads,
            qkv,
            layer_norm_eps: fields.or("layernorm_epsilon", 1e-5)?,
            init_std: fields.or("init_method_std", 0.02)?,
            top_k: fields.optional("topk")?,
            train_capacity_factor: fields.or("moe_train_capacity_factor", 1.0)?,
            eval_capacity_factor: fields.or("moe_eval_capacity_factor", 1.0)?,
            min_capacity: fields.or("moe_min_capacity", 4)?,
            drop_tokens: fields.or("moe_token_dropping", true)?,
            sample_second_expert: fields.or("moe_top2_2nd_expert_sampling", true)?,
            aux_loss_coef: fields.or("moe_loss_coeff", 0.1)?,
            told: Told {
                sizes,
                num_experts: fields.optional("num_experts")?,
                mlp_type: fields.optional("mlp_type")?,
                d_ff: fields.optional("ffn_hidden_size")?,
            },
        })
    }
}

/// Numbers are the same as 3 and 3.0 too.
fn is_same(a: &Value, b: &Value) -> bool {
    a == b || (a.is_number() && a.as_f64() == b.as_f64())
}

/// The saved arguments that are looked at, and `checkpoint_version`, which lies beside them.
fn saved(pickle: &Pickle, root: Id) -> Map<String, Value> {
    let mut values = Map::new();
    let arguments = pickle.entry(root, "args").and_then(|args| match pickle.get(args) {
        // A namespace, of whatever class, is its attributes.
        Pickled::Made { state, .. } => *state,
        _ => Some(args),
    });
    let others = ["bias_gelu_fusion", "openai_gelu", "num_key_value_heads", "kv_channels", "num_experts", "mlp_type"];
    let looked_at = expected().into_iter().map(|(name, _)| name).chain(NAMES).chain(SIZES).chain(others);
    for name in looked_at.chain(["ffn_hidden_size", "model_parallel_size"]) {
        if let Some(value) = arguments.and_then(|arguments| pickle.entry(arguments, name)) {
            values.insert(name.into(), plain(pickle, value));
        }
    }
    // Before Megatron had other ways to spread a model.
    if let Some(size) = values.remove("model_parallel_size") {
        values.entry("tensor_model_parallel_size").or_insert(size);
    }
    if let Some(version) = pickle.entry(root, "checkpoint_version") {
        values.insert("checkpoint_version".into(), plain(pickle, version));
    }
    values
}

/// Most entries of a list that is looked at.
const MOST_ENTRIES: usize = 1 << 16;

/// A plain value, or a list of such; of all else only that it is something else.
fn plain(pickle: &Pickle, id: Id) -> Value {
    match pickle.get(id) {
        Pickled::List(items) | Pickled::Tuple(items) if items.len() <= MOST_ENTRIES => {
            items.iter().map(|&item| scalar(pickle, item)).collect()
        }
        _ => scalar(pickle, id),
    }
}

fn scalar(pickle: &Pickle, id: Id) -> Value {
    match pickle.get(id) {
        Pickled::None => Value::Null,
        Pickled::Bool(value) => (*value).into(),
        Pickled::Int(value) => (*value).into(),
        Pickled::Float(value) => (*value).into(),
        Pickled::Text(value) => value.as_str().into(),
        _ => "something that is no number and no text".into(),
    }
}
