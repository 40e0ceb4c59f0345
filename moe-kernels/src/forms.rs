//! [`PackedForms`]: in which form weights are kept for inference, by what they are for.

use crate::quantized::QuantFormat;
use crate::stack::WeightFormat;
use crate::{Error, Precision, Result};
use moe_core::WeightUse;

/// Forms of weights by their use. Gates are f32 in any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedForms {
    precision: Precision,
    product: WeightFormat,
    table: WeightFormat,
    output: WeightFormat,
    stored: Option<QuantFormat>,
}

/// Everything in one precision.
impl From<Precision> for PackedForms {
    fn from(precision: Precision) -> Self {
        let format = precision.into();
        Self { precision, product: format, table: format, output: format, stored: None }
    }
}

impl PackedForms {
    /// The same with another form for one use. A table whose products are quantized keeps its rows as floats beside them, so
    /// that what is looked up is not rounded: it is worth it where the output layer is the embedding.
    ///
    /// # Errors
    /// [`Error::Argument`] for anything but f32 for [`WeightUse::Gate`].
    pub fn with(self, purpose: WeightUse, format: impl Into<WeightFormat>) -> Result<Self> {
        let format = format.into();
        match purpose {
            WeightUse::Product => Ok(self.with_products(format)),
            WeightUse::Table => Ok(Self { table: format, ..self }),
            WeightUse::Output => Ok(self.with_output(format)),
            WeightUse::Gate if format == Precision::F32.into() => Ok(self),
            WeightUse::Gate => Err(Error::Argument(format!(
                "gates are f32 always, not {format}: a rounded logit sends a token to another expert"
            ))),
        }
    }

    /// [`PackedForms::with`] for matrices that are multiplied with and nothing else.
    #[must_use]
    pub fn with_products(self, format: impl Into<WeightFormat>) -> Self {
        Self { product: format.into(), ..self }
    }

    /// [`PackedForms::with`] for the output layer.
    #[must_use]
    pub fn with_output(self, format: impl Into<WeightFormat>) -> Self {
        Self { output: format.into(), ..self }
    }

    /// The same for weights of which the source holds some as integers of `format`: those are kept as they are.
    #[must_use]
    pub fn with_stored(self, format: QuantFormat) -> Self {
        Self { stored: Some(format), ..self }
    }

    /// The form of weights for `purpose` that the source holds as floats.
    pub fn of(&self, purpose: WeightUse) -> WeightFormat {
        match purpose {
            WeightUse::Product => self.product,
            WeightUse::Gate => Precision::F32.into(),
            WeightUse::Table => self.table,
            WeightUse::Output => self.output,
        }
    }

    /// The format of integers that the source holds.
    pub fn stored(&self) -> Option<QuantFormat> {
        self.stored
    }

    /// What is not multiplied with a weight of integers is read in this precision: attention's products and pages.
    pub fn precision(&self) -> Precision {
        self.precision
    }
}
