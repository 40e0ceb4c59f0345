//! What command-line programs share: words of their arguments, and programs that train. Alone in this crate it prints and reads
//! the environment.

pub mod allocator;
pub mod import;
pub mod init;
pub mod ranks;
pub mod train;

use crate::{PackedForms, Precision, QuantFormat};
use candle_core::DType;
use moe_kernels::select;
use std::process::ExitCode;

/// Runs the body of a program with the kernels that the environment names, if it names any; an error is told on stderr.
pub fn exit_code(body: impl FnOnce() -> anyhow::Result<()>) -> ExitCode {
    match choose_kernels().and_then(|()| body()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Uses the kernels that the environment names, if it names any.
///
/// # Errors
/// For a name that is none, or kernels that this machine cannot run.
pub fn choose_kernels() -> anyhow::Result<()> {
    match std::env::var(select::ENV) {
        Ok(name) => Ok(select::force(name.parse()?)?),
        Err(_) => Ok(()),
    }
}

/// [`Precision`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum PrecisionArg {
    /// Rounded to bf16: half the memory traffic.
    Bf16,
    /// Weights and activations as they are.
    F32,
}

impl From<PrecisionArg> for Precision {
    fn from(precision: PrecisionArg) -> Self {
        match precision {
            PrecisionArg::Bf16 => Self::Bf16,
            PrecisionArg::F32 => Self::F32,
        }
    }
}

/// [`QuantFormat`] on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum QuantizeArg {
    /// 8 bits, a scale for each output.
    Int8,
    /// 4 bits, a scale for each output and 32 inputs.
    Int4,
}

impl From<QuantizeArg> for QuantFormat {
    fn from(format: QuantizeArg) -> Self {
        match format {
            QuantizeArg::Int8 => Self::Int8,
            QuantizeArg::Int4 => Self::INT4,
        }
    }
}

/// The forms of weights that three options ask for: all in one precision, matrices quantized if that is said, and so the output layer.
pub fn packed_forms(
    precision: PrecisionArg,
    quantize: Option<QuantizeArg>,
    quantize_output: Option<QuantizeArg>,
) -> PackedForms {
    let forms = PackedForms::from(Precision::from(precision));
    let forms = quantize.map_or(forms, |format| forms.with_products(QuantFormat::from(format)));
    quantize_output.map_or(forms, |format| forms.with_output(QuantFormat::from(format)))
}

/// Number format of weights in files, on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum DtypeArg {
    /// 32 bits.
    F32,
    /// 16 bits, of which 8 are the exponent's.
    Bf16,
    /// 16 bits, of which 5 are the exponent's.
    F16,
}

impl From<DtypeArg> for DType {
    fn from(dtype: DtypeArg) -> Self {
        match dtype {
            DtypeArg::F32 => Self::F32,
            DtypeArg::Bf16 => Self::BF16,
            DtypeArg::F16 => Self::F16,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_core::WeightUse;

    #[test]
    fn the_output_layer_has_a_form_of_its_own() {
        let of = |quantize, output| {
            let forms = packed_forms(PrecisionArg::Bf16, quantize, output);
            [WeightUse::Product, WeightUse::Table, WeightUse::Output].map(|purpose| forms.of(purpose))
        };
        let (plain, int8, int4) = (Precision::Bf16.into(), QuantFormat::Int8.into(), QuantFormat::INT4.into());
        assert_eq!(of(None, None), [plain, plain, plain]);
        assert_eq!(of(Some(QuantizeArg::Int4), None), [int4, plain, plain]);
        assert_eq!(of(Some(QuantizeArg::Int4), Some(QuantizeArg::Int8)), [int4, plain, int8]);
        assert_eq!(of(None, Some(QuantizeArg::Int8)), [plain, plain, int8]);
    }
}
