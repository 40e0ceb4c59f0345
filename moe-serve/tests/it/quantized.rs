//! Quantized weights, from a folder of floats or of integers: the same text, and what is said of them at the start.

use crate::support::TestServer;
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

fn text(model: ServedModel) -> Value {
    let server = TestServer::start(model, Limits::default());
    let body = json!({"prompt": "The old man looked at", "max_tokens": 24, "temperature": 0, "ignore_eos": true});
    server.client.post("/v1/completions", &body).ok()["choices"][0]["text"].clone()
}

#[test]
fn a_quantized_folder_is_served_as_one_quantized_while_loading() {
    let root = tempfile::tempdir().expect("a folder");
    for format in [QuantFormat::Int8, QuantFormat::INT4] {
        let dir = root.path().join(format.to_string());
        save(&carried(), &dir, format, nearest).expect("saves");
        let stored = ServedModel::load(&dir, None, Precision::Bf16).expect("loads");
        assert_eq!(
            stored.defaults.eos_token_ids,
            ServedModel::embedded(None, Precision::Bf16).expect("loads").defaults.eos_token_ids
        );
        let forms = PackedForms::from(Precision::Bf16).with_products(format);
        let [stored, loaded] = [stored, ServedModel::embedded(None, forms).expect("loads")].map(text);
        assert_eq!(stored, loaded, "{format}");
        assert!(stored.as_str().is_some_and(|text| !text.is_empty()));
    }
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
    let int4 = root.path().join("int4");
    save(&carried(), &int4, QuantFormat::INT4, nearest).expect("saves");
    let (_, plain) = generate(&carried(), &[]);
    assert!(plain.contains("weights: ") && plain.contains("bf16 ") && !plain.contains("int"), "{plain}");
    let (text, quantized) = generate(&carried(), &["--quantize", "int8"]);
    assert!(quantized.contains("int8 ") && quantized.contains("bf16 "), "{quantized}");
    assert!(text.starts_with("The old man") && text.len() > "The old man ".len(), "{text}");
    let (from_folder, stored) = generate(&int4, &["--quantize", "int4"]);
    assert!(stored.contains("int4 in groups of 32 "), "{stored}");
    assert_eq!(generate(&carried(), &["--quantize", "int4"]).0, from_folder);
    let (none, refused) = generate(&int4, &["--quantize", "int8"]);
    assert!(
        refused.contains("quantized already, in int4 in groups of 32, not in int8") && none.is_empty(),
        "{refused}"
    );
}
