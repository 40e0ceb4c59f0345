//! A model folder of any family, loaded and saved again under the names its family publishes: in bf16, or in the type that is asked
//! for. Experts in MXFP4 become floats.
//!
//! `cargo run --release -p moe-models --example resave -- FROM TO [f32|bf16|f16]`

use candle_core::{DType, Device};
use moe_models::{Family, Model};
use std::path::{Path, PathBuf};

pub(crate) fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut args = std::env::args().skip(1);
    let (Some(from), Some(to)) = (args.next().map(PathBuf::from), args.next().map(PathBuf::from)) else {
        return Err("resave FROM TO [f32|bf16|f16]".into());
    };
    let dtype = match args.next().as_deref() {
        None | Some("bf16") => DType::BF16,
        Some("f16") => DType::F16,
        Some("f32") => DType::F32,
        Some(other) => return Err(format!("weights are saved as f32, bf16 or f16, not {other}").into()),
    };
    resave(&from, &to, dtype)
}

/// Writes the model of one folder into another, which is made if need be.
pub(crate) fn resave(from: &Path, to: &Path, dtype: DType) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let model = Model::<Box<dyn Family>>::load(from, &Device::Cpu)?;
    std::fs::create_dir_all(to)?;
    Ok(model.save(to, dtype)?)
}
