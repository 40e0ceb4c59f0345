//! A teacher of random weights, large enough to have an opinion, with text and tokenizer.

use candle_core::{DType, Device};
use moe_models::gpt::{Gpt, GptConfig};
use moe_models::train::data::Documents;
use moe_models::train::export::export;
use moe_models::train::tokenizer;
use std::path::Path;

pub(crate) const VOCAB: usize = 262;

/// Six layers of a PR-MoE with 2, 4 and 4 experts.
pub(crate) fn shape() -> GptConfig {
    let mut config = GptConfig::preset("tiny-pr-moe").unwrap();
    (config.vocab_size, config.max_seq_len, config.d_model, config.num_heads, config.d_ff) = (VOCAB, 16, 16, 2, 64);
    config.moe.as_mut().unwrap().num_experts = vec![2, 4, 4];
    config.init_std = 0.4;
    config
}

pub(crate) fn text() -> String {
    (0..900).map(|i| format!("{} and {}, ", i * 37 % 91, i * i % 17)).collect()
}

/// `teacher/` and `text.txt` in a new folder.
pub(crate) fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("text.txt"), text()).unwrap();
    write_teacher(&shape(), &dir.path().join("teacher"));
    dir
}

pub(crate) fn write_teacher(shape: &GptConfig, dir: &Path) {
    let documents = [Documents { name: "text".into(), weight: None, texts: vec![text()] }];
    let tokenizer = tokenizer::train_bpe(&documents, VOCAB).unwrap();
    let mut shape = shape.clone();
    shape.eos_token_id = Some(tokenizer::eos_id(&tokenizer).unwrap());
    let model = Gpt::new(shape, 5, &Device::Cpu).unwrap();
    export(&model, &tokenizer::to_json(&tokenizer).unwrap().into(), dir, DType::F32).unwrap();
}
