//! A folder of an index and two shards, cut out of the input: refused with the name of a file, or tensors that can be read.
#![no_main]

use candle_core::Device;
use libfuzzer_sys::fuzz_target;
use moe_models::hf::Checkpoint;
use moe_models::{Family, ReadFamily};
use std::path::Path;
use std::sync::LazyLock;
use tempfile::TempDir;

const CONFIG: &[u8] = br#"{"model_type": "llama", "vocab_size": 2, "hidden_size": 2, "intermediate_size": 1,
    "hidden_act": "silu", "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 4, "tie_word_embeddings": true}"#;
const FILES: [&str; 3] =
    ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];

static DIR: LazyLock<TempDir> = LazyLock::new(|| tempfile::tempdir().expect("a folder"));

fuzz_target!(|input: &[u8]| {
    let family = <Box<dyn Family>>::read(CONFIG, Path::new("config.json")).expect("a configuration");
    // Two lengths, then what they count; the rest is the last file. Without an index the first shard is the only file.
    let [a, b, rest @ ..] = input else { return };
    let (index, rest) = rest.split_at(rest.len().min(usize::from(*a) * 4));
    let (first, second) = rest.split_at(rest.len().min(usize::from(*b) * 8));
    let index = if index.is_empty() {
        br#"{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}"#
    } else {
        index
    };
    for (name, bytes) in FILES.iter().zip([index, first, second]) {
        std::fs::write(DIR.path().join(name), bytes).expect("writes");
    }
    let table = family.decoder().expect("a decoder").params();
    let opened = Checkpoint::of_family(DIR.path(), &family);
    match opened.and_then(|checkpoint| checkpoint.check(&table).map(|()| checkpoint)) {
        Err(error) => assert!(error.to_string().contains("model") || error.to_string().contains("tensor"), "{error}"),
        Ok(checkpoint) => {
            for spec in table.specs() {
                assert_eq!(checkpoint.tensor(spec, &Device::Cpu).expect("checked").dims(), spec.shape);
            }
        }
    }
});
