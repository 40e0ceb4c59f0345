//! [`QuantizationConfig`]: `quantization_config` of a `config.json`. It is taken out here before a family reads the rest.

use crate::fields::{Checked, Fields};
use crate::{Error, ReadFamily, Result};
use moe_kernels::quantized::QuantFormat;
use serde_json::{Map, Value, json};
use std::path::Path;

/// How the matrices of a folder are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuantizationConfig {
    /// Their integers and scales.
    pub format: QuantFormat,
    /// Linear maps that stay as they are, by the names of their modules. For other readers: here the files decide.
    pub ignore: Vec<String>,
}

/// What `config.json` calls it.
pub(super) const FIELD: &str = "quantization_config";
const METHOD: &str = "compressed-tensors";
const MXFP4: &str = "mxfp4";
/// Formats by the names of the library.
const PACKED: &str = "pack-quantized";
const INT: &str = "int-quantized";

/// Reads a `config.json`: a family's configuration, and how the folder's matrices are stored if they are integers. Those that are
/// MXFP4 are floats to whoever reads them.
///
/// # Errors
/// [`Error::Format`] naming the field that is wrong or not implemented.
pub(crate) fn read_config<F: ReadFamily>(json: &[u8], path: &Path) -> Result<(F, Option<QuantizationConfig>)> {
    // What is no object is the family's to refuse.
    let fields = serde_json::from_slice::<Map<String, Value>>(json).unwrap_or_default();
    let Some(quantization) = fields.get(FIELD) else { return Ok((F::read(json, path)?, None)) };
    let refused = |reason| Error::format(path, reason);
    let config = match quantization.get("quant_method") {
        Some(method) if method == MXFP4 => check_mxfp4(quantization).map(|()| None),
        _ => QuantizationConfig::from_json(quantization).map(Some),
    };
    let config = config.map_err(refused)?;
    let rest: Map<String, Value> = fields.into_iter().filter(|(name, _)| name != FIELD).collect();
    let rest = serde_json::to_vec(&rest).map_err(|e| Error::format(path, e.to_string()))?;
    Ok((F::read(&rest, path)?, config))
}

/// What is said of blocks of MXFP4, which are read as floats wherever they are in a folder.
fn check_mxfp4(value: &Value) -> Checked<()> {
    let mut fields = Fields::of(value, FIELD)?;
    fields.skip(&["quant_method", "modules_to_not_convert", "dequantize"]);
    fields.finish()
}

impl QuantizationConfig {
    /// Matrices in `format`, but for the linear maps `ignore`.
    pub fn new(format: QuantFormat, ignore: Vec<String>) -> Self {
        Self { format, ignore }
    }

    /// The value of `quantization_config`.
    ///
    /// # Errors
    /// The name of a field whose value is not implemented, and what is.
    pub fn from_json(value: &Value) -> std::result::Result<Self, String> {
        let mut fields = Fields::of(value, FIELD)?;
        fields.expect("quant_method", &[METHOD.into()])?;
        let format = fields.take("format");
        fields.expect("quantization_status", &[Value::Null, "compressed".into()])?;
        fields.expect_none(&["kv_cache_scheme", "sparsity_config", "moe_sparsity_config", "transform_config"])?;
        fields.skip(&["global_compression_ratio", "version", "run_compressed"]);
        let ignore = match fields.take("ignore") {
            Value::Null => Vec::new(),
            list => serde_json::from_value(list).map_err(|e| format!("{FIELD}.ignore: {e}"))?,
        };
        let groups = Fields::of(&fields.take("config_groups"), format!("{FIELD}.config_groups"))?;
        fields.finish()?;
        let [(name, group)] = groups.left().iter().collect::<Vec<_>>()[..] else {
            let count = groups.left().len();
            return Err(format!("{} must have one group, got {count}; no more is implemented", groups.at()));
        };
        let group = Fields::of(group, format!("{}.{name}", groups.at()))?;
        Ok(Self { format: group_format(group, &format)?, ignore })
    }

    /// The value of `quantization_config` that says so.
    pub fn to_json(&self) -> Value {
        let args = |num_bits: u32, strategy: &str, group_size: Option<usize>, dynamic: bool| {
            json!({
                "num_bits": num_bits, "type": "int", "symmetric": true, "strategy": strategy, "group_size": group_size,
                "dynamic": dynamic,
            })
        };
        let (format, weights, inputs) = match self.format {
            QuantFormat::Int8 => (INT, args(8, "channel", None, false), args(8, "token", None, true)),
            QuantFormat::Int4 { group_size } => (PACKED, args(4, "group", Some(group_size), false), Value::Null),
        };
        json!({
            "quant_method": METHOD,
            "format": format,
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": { "targets": ["Linear"], "weights": weights, "input_activations": inputs },
            },
            "ignore": self.ignore,
        })
    }
}

/// What a group says of its weights. Which modules it is for is not asked: the files show it.
fn group_format(mut group: Fields, format: &Value) -> Checked<QuantFormat> {
    group.skip(&["targets"]);
    group.expect("format", &[Value::Null, format.clone()])?;
    group.expect_none(&["output_activations"])?;
    check_inputs(group.take("input_activations"), group.at())?;
    let mut weights = Fields::of(&group.take("weights"), format!("{}.weights", group.at()))?;
    group.finish()?;
    check_integers(&mut weights)?;
    weights.expect("dynamic", &[false.into(), Value::Null])?;
    let group_size = weights.take("group_size");
    let found = match format.as_str() {
        Some(PACKED) => {
            weights.expect("num_bits", &[4.into()])?;
            weights.expect("strategy", &["group".into(), Value::Null])?;
            let size = group_size.as_u64().and_then(|size| usize::try_from(size).ok());
            let size = size.filter(|size| (32..=16384).contains(size) && size.is_multiple_of(32));
            QuantFormat::Int4 {
                group_size: size.ok_or_else(|| {
                    format!("{}.group_size must be a multiple of 32 up to 16384, got {group_size}", weights.at())
                })?,
            }
        }
        Some(INT) => {
            weights.expect("num_bits", &[8.into()])?;
            weights.expect("strategy", &["channel".into()])?;
            if ![Value::Null, (-1).into()].contains(&group_size) {
                return Err(format!(
                    "{}.group_size must be null for a scale per channel, got {group_size}",
                    weights.at()
                ));
            }
            QuantFormat::Int8
        }
        _ => return Err(format!("{FIELD}.format must be {PACKED:?} or {INT:?}, got {format}")),
    };
    weights.finish()?;
    Ok(found)
}

/// Symmetric integers in the order of the columns.
fn check_integers(args: &mut Fields) -> Checked<()> {
    args.expect("type", &["int".into(), Value::Null])?;
    args.expect("symmetric", &[true.into(), Value::Null])?;
    // "weight" is how integers were found; "group" would be another order of them.
    args.expect("actorder", &[Value::Null, false.into(), "weight".into(), "static".into()])?;
    args.expect_none(&["block_structure"])?;
    args.skip(&["scale_dtype", "zp_dtype", "observer", "observer_kwargs"]);
    Ok(())
}

/// Inputs of products are quantized row by row here, to 8 bits: what files ask for at most, and what those that ask for nothing get.
fn check_inputs(inputs: Value, at: &str) -> Checked<()> {
    if inputs.is_null() {
        return Ok(());
    }
    let mut inputs = Fields::of(&inputs, format!("{at}.input_activations"))?;
    inputs.expect("num_bits", &[8.into()])?;
    inputs.expect("dynamic", &[true.into()])?;
    inputs.expect("strategy", &["token".into()])?;
    inputs.expect("group_size", &[Value::Null])?;
    check_integers(&mut inputs)?;
    inputs.finish()
}
