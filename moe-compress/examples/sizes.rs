//! What models take in files: the paper's, counted, and small ones of the same kinds, written to a folder with random weights and
//! measured. `cargo xtask repro sizes` makes a table of its lines.
//!
//! ```console
//! $ cargo run --release -p moe-compress --example sizes -- FOLDER
//! ```

use anyhow::{Context, Result, ensure};
use candle_core::{DType, Device};
use moe_compress::{KeptLayers, StudentPlan};
use moe_kernels::quantized::QuantFormat;
use moe_models::gpt::{Gpt, GptConfig};
use moe_models::hf::quantization::{nearest, save};
use moe_models::hf::size::{StoredForm, tensor_bytes};
use serde_json::json;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

const INT4: QuantFormat = QuantFormat::Int4 { group_size: 32 };

const FORMS: [(&str, StoredForm); 4] = [
    ("f32", StoredForm::Floats(DType::F32)),
    ("bf16", StoredForm::Floats(DType::BF16)),
    ("int8", StoredForm::Integers { format: QuantFormat::Int8, rest: DType::BF16 }),
    ("int4", StoredForm::Integers { format: INT4, rest: DType::BF16 }),
];

/// The models that the paper's claims about size rest on.
const PAPER: [&str; 6] = [
    "350m-moe-128",
    "350m-pr-moe-32-64",
    "350m-pr-moe-32-64-mos",
    "1.3b-moe-128",
    "1.3b-pr-moe-64-128",
    "1.3b-pr-moe-64-128-mos",
];

fn main() -> Result<()> {
    let folder: PathBuf =
        std::env::args_os().nth(1).context("name a folder for the models, which must be empty")?.into();
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    for name in PAPER {
        let config = GptConfig::preset(name).with_context(|| format!("there is no preset {name}"))?;
        let mut bytes = serde_json::Map::new();
        for (form, stored) in FORMS {
            bytes.insert(form.into(), tensor_bytes(&config, stored)?.into());
        }
        let row = json!({ "counted": name, "parameters": config.parameter_count().total, "bytes": bytes });
        println!("json {row}");
    }
    for (name, config) in small_models()? {
        measure(&folder, name, &config)?;
    }
    Ok(())
}

/// A PR-MoE of eight layers, the MoE with twice the experts of its larger layers, and its student of seven layers.
fn small_models() -> Result<[(&'static str, GptConfig); 3]> {
    let preset = |name: &str, experts: Vec<usize>| -> Result<GptConfig> {
        let mut config = GptConfig::preset(name).with_context(|| format!("there is no preset {name}"))?;
        config.num_layers = 8;
        config.moe.as_mut().context("the preset has no experts")?.num_experts = experts;
        Ok(config)
    };
    let teacher = preset("tiny-pr-moe", vec![8, 8, 16, 16])?;
    let student = StudentPlan::new(&teacher, 0.125, KeptLayers::Evenly)?.config;
    Ok([("MoE-32", preset("tiny-moe", vec![32; 4])?), ("PR-MoE-8/16", teacher), ("PR-MoE-8/16+L7+MoS", student)])
}

/// Writes a model in every form; a line for each.
fn measure(folder: &Path, name: &str, config: &GptConfig) -> Result<()> {
    let model = Gpt::new(config.clone(), 1, &Device::Cpu)?;
    let place = |form: &str| folder.join(format!("{}-{form}", name.replace(['/', '+'], "-")));
    for (form, stored) in FORMS {
        let to = place(form);
        match stored {
            StoredForm::Floats(dtype) => {
                std::fs::create_dir(&to).with_context(|| format!("cannot make {}", to.display()))?;
                model.save(&to, dtype)?;
            }
            StoredForm::Integers { format, .. } => save(&place("bf16"), &to, format, nearest)?,
        }
        let row = json!({
            "measured": name,
            "form": form,
            "parameters": config.parameter_count().total,
            "counted_bytes": tensor_bytes(config, stored)?,
            "tensor_bytes": of_weight_files(&to, tensors_of)?,
            "file_bytes": of_weight_files(&to, |path| Ok(std::fs::metadata(path)?.len()))?,
        });
        println!("json {row}");
    }
    Ok(())
}

/// The sum of what `bytes` says of each file of weights.
fn of_weight_files(folder: &Path, bytes: impl Fn(&Path) -> Result<u64>) -> Result<u64> {
    let mut sum = 0;
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|ending| ending == "safetensors") {
            sum += bytes(&path).with_context(|| format!("{}", path.display()))?;
        }
    }
    Ok(sum)
}

/// What follows the header, whose length is the first eight bytes.
fn tensors_of(path: &Path) -> Result<u64> {
    let mut header_bytes = [0; 8];
    File::open(path)?.read_exact(&mut header_bytes)?;
    let (length, before) = (std::fs::metadata(path)?.len(), 8 + u64::from_le_bytes(header_bytes));
    ensure!(before <= length, "its header is longer than the file");
    Ok(length - before)
}
