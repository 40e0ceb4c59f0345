//! GGUF files are served: a model, its tokenizer, its chat template and its end tokens from one file.

use crate::support::TestServer;
use moe_models::{PackedForms, Precision, QuantFormat};
use moe_serve::ServedModel;
use moe_serve::api::Limits;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-models/tests/fixtures/gguf").join(name)
}

fn load(forms: impl Into<PackedForms>) -> ServedModel {
    ServedModel::load(&file("forms.gguf"), None, forms).expect("loads")
}

fn text(model: ServedModel) -> Value {
    let server = TestServer::start(model, Limits::default());
    let body = json!({"prompt": "The old man", "max_tokens": 12, "temperature": 0, "ignore_eos": true});
    server.client.post("/v1/completions", &body).ok()["choices"][0]["text"].clone()
}

#[test]
fn a_file_says_how_it_is_served() {
    let model = load(Precision::F32);
    assert_eq!(model.name, "forms");
    assert_eq!(model.defaults.eos_token_ids, [0, 2]);
    assert_eq!(model.first_token(), Some(0));
    // Tokens that fill the table up are none.
    assert_eq!((model.tokenizer.num_tokens(), model.lm.vocab_size()), (316, 320));
    let prompt = model.chat_prompt("Hi").expect("renders");
    assert_eq!(prompt, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    let ids = model.tokenizer.encode(&prompt).expect("encodes");
    assert_eq!((ids[0], ids.iter().filter(|&&id| id == 2).count()), (1, 1), "special tokens of a prompt are tokens");
}

#[test]
fn a_file_is_served_in_any_form() {
    let plain = text(load(Precision::F32));
    assert!(plain.as_str().is_some_and(|text| !text.is_empty()));
    for format in [QuantFormat::Int8, QuantFormat::INT4] {
        let forms = PackedForms::from(Precision::F32).with_products(format);
        assert!(text(load(forms)).as_str().is_some_and(|text| !text.is_empty()), "{format}");
    }
}

#[test]
fn the_terminal_takes_a_file() {
    let run = |path: &Path| {
        let output = Command::new(env!("CARGO_BIN_EXE_moe-generate"))
            .args([
                "--prompt",
                "The old man",
                "--max-tokens",
                "12",
                "--temperature",
                "0",
                "--precision",
                "f32",
                "--model",
            ])
            .arg(path)
            .env_remove("RUST_LOG")
            .output()
            .expect("runs");
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    };
    let [out, err] = run(&file("forms.gguf"));
    assert!(out.starts_with("The old man") && err.contains("weights: "), "{out} {err}");
    let [out, err] = run(&file("olmoe.gguf"));
    assert!(out.is_empty() && err.contains("olmoe.gguf") && err.contains("tokenizer.json"), "{out} {err}");
}
