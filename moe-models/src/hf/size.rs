//! How large a model's weights are in files, counted from its configuration: no weight is read or made.

use super::quantization::{as_integers, refuse_stacks};
use super::tensor_file::TensorHeader;
use super::write::file_tensors;
use crate::{Family, Result};
use candle_core::DType;
use moe_kernels::quantized::QuantFormat;

/// How the weights of a folder are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoredForm {
    /// All as floats of one type.
    Floats(DType),
    /// The matrices that are multiplied with as integers with their scales, as [`super::quantization::save`] writes them.
    Integers {
        /// Of the matrices.
        format: QuantFormat,
        /// Of everything else.
        rest: DType,
    },
}

/// Bytes of all tensors of a model in files, without the files' headers.
///
/// # Errors
/// [`crate::Error::Argument`] for a type that weights do not have, and for integers of a family whose experts lie in stacks; the
/// family's for an impossible configuration.
pub fn tensor_bytes<F: Family + ?Sized>(family: &F, form: StoredForm) -> Result<u64> {
    let (format, dtype) = match form {
        StoredForm::Floats(dtype) => (None, dtype),
        StoredForm::Integers { format, rest } => (Some(format), rest),
    };
    if format.is_some() {
        refuse_stacks(family.names()).map_err(crate::Error::Argument)?;
    }
    let decoder = family.decoder()?;
    let table = decoder.params();
    let tensors = file_tensors(&table, family.names(), dtype)?;
    let bytes = tensors.iter().map(|tensor| match format.and_then(|format| as_integers(tensor, format)) {
        Some(stored) => stored.tensors().iter().map(TensorHeader::bytes).sum(),
        None => tensor.header.bytes(),
    });
    Ok(bytes.map(|bytes| bytes as u64).sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gpt::GptConfig;

    const FORMS: [StoredForm; 4] = [
        StoredForm::Floats(DType::F32),
        StoredForm::Floats(DType::BF16),
        StoredForm::Integers { format: QuantFormat::Int8, rest: DType::BF16 },
        StoredForm::Integers { format: QuantFormat::Int4 { group_size: 32 }, rest: DType::BF16 },
    ];

    /// By hand: matrices of `3h x h` and `h x h` in the attention of each layer, of `4h x h` and `h x 4h` in each feed-forward network
    /// and expert.
    fn by_hand(config: &GptConfig) -> [u64; 4] {
        let (h, layers) = (config.d_model as u64, config.num_layers as u64);
        let moe_layers = config.moe_layers();
        let experts: u64 = moe_layers.iter().map(|(_, experts)| *experts as u64).sum();
        let residual = config.moe.as_ref().is_some_and(|moe| moe.residual);
        let networks = experts + layers - if residual { 0 } else { moe_layers.len() as u64 };
        let (elements, outputs) = (layers * 4 * h * h + networks * 8 * h * h, layers * 4 * h + networks * 5 * h);
        let matrices = layers * 2 + networks * 2;
        let total = config.parameter_count().total as u64;
        let rest = 2 * (total - elements);
        // Eight integers of 4 bits in four bytes, a scale of two bytes for 32 of them, a shape of two numbers of eight bytes.
        let int4 = elements / 2 + elements / 32 * 2 + matrices * 16;
        [4 * total, 2 * total, rest + elements + outputs * 2, rest + int4]
    }

    #[test]
    fn the_papers_models_are_as_large_as_by_hand() {
        for name in GptConfig::preset_names() {
            let config = GptConfig::preset(name).unwrap();
            assert_eq!(FORMS.map(|form| tensor_bytes(&config, form).unwrap()), by_hand(&config), "{name}");
        }
    }

    /// Parameters of the paper's architectures as printed, four bytes each; in four bits nearly all of them take 4.5.
    #[test]
    fn the_papers_claims_about_size() {
        for (name, parameters) in [
            ("350m-moe-128", "13.15"),
            ("350m-pr-moe-32-64", "4.12"),
            ("350m-pr-moe-32-64-mos", "3.54"),
            ("1.3b-moe-128", "52.47"),
            ("1.3b-pr-moe-64-128", "31.39"),
            ("1.3b-pr-moe-64-128-mos", "26.94"),
        ] {
            let config = GptConfig::preset(name).unwrap();
            let [f32, .., int4] = FORMS.map(|form| tensor_bytes(&config, form).unwrap() as f64);
            assert_eq!(format!("{:.2}", f32 / 4e9), parameters, "{name}");
            let bits = 32.0 * int4 / f32;
            assert!((4.5..4.7).contains(&bits), "{name}: {bits} bits");
        }
    }

    #[test]
    fn types_that_weights_do_not_have_are_refused() {
        let config = GptConfig::preset("tiny-moe").unwrap();
        let refused = tensor_bytes(&config, StoredForm::Floats(DType::U8)).unwrap_err().to_string();
        assert!(refused.contains("f32, bf16 or f16"), "{refused}");
    }
}
