//! [`Opened`]: a model's files before they are packed, and in which forms that is done.

use crate::families::Family;
use crate::hf::Checkpoint;
use crate::hf::quantization::{QuantizationConfig, read_config};
use crate::{Error, ModelSource, Result};
use moe_core::WeightUse;
use moe_kernels::quantized::QuantFormat;
use moe_kernels::{PackedForms, WeightFormat};
use std::borrow::Cow;
use std::path::Path;

/// The files of a model, and the forms in which its weights are packed.
pub(crate) struct Opened {
    pub(crate) family: Box<dyn Family>,
    pub(crate) checkpoint: Checkpoint,
    pub(crate) forms: PackedForms,
    /// Of matrices that are integers in the files, or become such.
    integers: Option<QuantFormat>,
}

impl Opened {
    pub(crate) fn of_source(source: &ModelSource, forms: PackedForms) -> Result<Self> {
        let (family, quantization) = source.family::<Box<dyn Family>>()?;
        let checkpoint = source.checkpoint(&family)?;
        let own = Self::new((family, quantization), checkpoint, forms, &source.config_path())?;
        Ok(match own.integers {
            Some(format) if source.may_keep_integers() => {
                let (forms, checkpoint) = (own.forms.with_stored(format), own.checkpoint.with_integers(format));
                Self { forms, checkpoint, ..own }
            }
            _ => own,
        })
    }

    pub(crate) fn from_bytes(config_json: &[u8], weights: Cow<'static, [u8]>, forms: PackedForms) -> Result<Self> {
        let path = Path::new("config.json");
        let config = read_config::<Box<dyn Family>>(config_json, path)?;
        let checkpoint = Checkpoint::from_bytes(weights, &config.0)?;
        Self::new(config, checkpoint, forms, path)
    }

    fn new(
        (family, quantization): (Box<dyn Family>, Option<QuantizationConfig>),
        checkpoint: Checkpoint,
        forms: PackedForms,
        path: &Path,
    ) -> Result<Self> {
        let forms = match forms.of(WeightUse::Output) {
            // The embedding is the output layer; its rows stay for looking up.
            output @ WeightFormat::Quantized(_) if family.decoder()?.tie_embeddings => {
                forms.with(WeightUse::Table, output)?
            }
            _ => forms,
        };
        Ok(match (quantization, forms.of(WeightUse::Product)) {
            (Some(QuantizationConfig { format, .. }), _) => Self {
                family,
                checkpoint: checkpoint.with_integers(format),
                forms: stored_forms(forms, format, path)?,
                integers: Some(format),
            },
            (None, WeightFormat::Quantized(format)) => Self { family, checkpoint, forms, integers: Some(format) },
            (None, _) => Self { family, checkpoint, forms, integers: None },
        })
    }
}

/// The forms for a folder of integers in `format`: which matrices are quantized is the folder's choice, but for an output layer that it
/// holds as floats.
fn stored_forms(forms: PackedForms, format: QuantFormat, path: &Path) -> Result<PackedForms> {
    let own = forms.with_stored(format);
    match forms.of(WeightUse::Product) {
        WeightFormat::Quantized(asked) if asked != format => {
            let reason = format!(
                "the weights are quantized already, in {format}, not in {asked}; ask for nothing else, or start from the folder \
                 they were made of"
            );
            Err(Error::format(path, reason))
        }
        WeightFormat::Quantized(_) => Ok(own.with_products(forms.precision())),
        WeightFormat::Float(_) => Ok(own),
    }
}
