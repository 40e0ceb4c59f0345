//! Quantized weights, from a folder of floats or of integers: the same text, and what is said of them at the start.

use crate::support::{TestServer, tokenizer};
use candle_core::{DType, Device};
use moe_models::gpt::{Gpt, GptConfig};
use moe_models::hf::quantization::{nearest, save};
use moe_models::{PackedForms, Precision, QuantFormat};
use moe_serve::ServedModel;
use moe_serve::api::Limits;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

fn carried() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("model")
}

/// A model of random floats.
fn write_floats(dir: &Path) {
    let mut config = GptConfig::preset("tiny-pr-moe").expect("a preset");
    (config.vocab_size, config.d_model, config.d_ff, config.num_heads, config.init_std) = (320, 64, 64, 2, 0.3);
    Gpt::new(config, 1, &Device::Cpu).expect("a valid configuration").save(dir, DType::BF16).expect("saves");
    tokenizer().save(dir.join("tokenizer.json"), false).expect("saves");
}

fn text(model: ServedModel) -> Value {
    let server = TestServer::start(model, Limits::default());
    let body = json!({"prompt": "The old man looked at", "max_tokens": 24, "temperature": 0, "ignore_eos": true});
    server.client.post("/v1/completions", &body).ok()["choices"][0]["text"].clone()
}

#[test]
fn a_quantized_folder_is_served_as_one_quantized_while_loading() {
    let root = tempfile::tempdir().expect("a folder");
    let floats = root.path().join("floats");
    std::fs::create_dir(&floats).expect("a folder");
    write_floats(&floats);
    for format in [QuantFormat::Int8, QuantFormat::INT4] {
        let dir = root.path().join(format.to_string());
        save(&floats, &dir, format, nearest).expect("saves");
        let stored = ServedModel::load(&dir, None, Precision::Bf16).expect("loads");
        let forms = PackedForms::from(Precision::Bf16).with_products(format);
        let loaded = ServedModel::load(&floats, None, forms).expect("loads");
        assert_eq!(stored.defaults.eos_token_ids, loaded.defaults.eos_token_ids);
        let [stored, loaded] = [stored, loaded].map(text);
        assert_eq!(stored, loaded, "{format}");
        assert!(stored.as_str().is_some_and(|text| !text.is_empty()));
    }
}

#[test]
fn the_model_inside_is_its_folder_in_4_bits() {
    let folder = ServedModel::load(&carried(), None, Precision::Bf16).expect("loads");
    let forms = PackedForms::from(Precision::Bf16).with_products(QuantFormat::INT4);
    let inside = ServedModel::embedded(None, forms).expect("loads");
    assert_eq!(folder.defaults.eos_token_ids, inside.defaults.eos_token_ids);
    let [folder, inside] = [folder, inside].map(text);
    assert_eq!(folder, inside);
    assert!(folder.as_str().is_some_and(|text| text.len() > 24), "{folder}");
    let forms = PackedForms::from(Precision::Bf16).with_products(QuantFormat::Int8);
    let error = ServedModel::embedded(None, forms).expect_err("refused").to_string();
    assert!(error.contains("quantized already"), "{error}");
}

/// Standard output and error of `moe-generate` on a folder.
fn generate(dir: &Path, options: &[&str]) -> (String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_moe-generate"))
        .args(["--prompt", "The old man", "--max-tokens", "8", "--temperature", "0", "--model"])
        .arg(dir)
        .args(options)
        .env_remove("RUST_LOG")
        .output()
        .expect("runs");
    let [out, err] = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    (out, err)
}

#[test]
fn the_start_tells_the_form_and_the_size_of_the_weights() {
    let root = tempfile::tempdir().expect("a folder");
    let [floats, int4] = ["floats", "int4"].map(|name| root.path().join(name));
    std::fs::create_dir(&floats).expect("a folder");
    write_floats(&floats);
    save(&floats, &int4, QuantFormat::INT4, nearest).expect("saves");
    let (_, plain) = generate(&floats, &[]);
    assert!(plain.contains("weights: ") && plain.contains("bf16 ") && !plain.contains("int"), "{plain}");
    let (text, quantized) = generate(&floats, &["--quantize", "int8"]);
    assert!(quantized.contains("int8 ") && quantized.contains("bf16 "), "{quantized}");
    assert!(text.starts_with("The old man") && text.len() > "The old man ".len(), "{text}");
    let (from_folder, stored) = generate(&int4, &["--quantize", "int4"]);
    assert!(stored.contains("int4 in groups of 32 "), "{stored}");
    assert_eq!(generate(&floats, &["--quantize", "int4"]).0, from_folder);
    let (none, refused) = generate(&int4, &["--quantize", "int8"]);
    assert!(
        refused.contains("quantized already, in int4 in groups of 32, not in int8") && none.is_empty(),
        "{refused}"
    );
}
