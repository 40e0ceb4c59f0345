//! Round trips, and each kind of damage a checkpoint can have.

use super::*;
use crate::gpt::{Gpt, GptConfig};
use candle_core::{DType, Device};
use moe_core::testing::values;
use std::path::Path;

fn model() -> Gpt {
    let mut config = GptConfig::preset("tiny-pr-moe").unwrap();
    (config.vocab_size, config.max_seq_len, config.d_model, config.num_heads, config.d_ff) = (37, 24, 16, 2, 32);
    Gpt::new(config, 9, &Device::Cpu).unwrap()
}

fn same(a: &Gpt, b: &Gpt, round: bool) -> bool {
    a.config() == b.config()
        && a.params().iter().zip(b.params()).all(|((an, av), (bn, bv))| {
            let want = if round { av.to_dtype(DType::BF16).unwrap() } else { av.as_tensor().clone() };
            an == bn && values(&want) == values(bv)
        })
}

#[test]
fn round_trips_are_exact() {
    let model = model();
    for (dtype, shard_bytes) in [(DType::F32, usize::MAX), (DType::F32, 20_000), (DType::BF16, 20_000)] {
        let dir = tempfile::tempdir().unwrap();
        write::save_sharded(&model, dir.path(), dtype, shard_bytes).unwrap();
        assert_eq!(dir.path().join("model.safetensors.index.json").exists(), shard_bytes == 20_000);
        assert!(same(&model, &Gpt::load(dir.path(), &Device::Cpu).unwrap(), dtype == DType::BF16), "{dtype:?}");
        let names = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let leftovers: Vec<_> = names.filter(|name| name.to_string_lossy().starts_with(TEMPORARY_PREFIX)).collect();
        assert!(leftovers.is_empty(), "{leftovers:?}");
    }
    assert!(
        model
            .save(Path::new("/nonexistent-folder"), DType::F32)
            .unwrap_err()
            .to_string()
            .contains("/nonexistent-folder")
    );
    assert!(model.save(tempfile::tempdir().unwrap().path(), DType::U8).is_err());
}

#[test]
fn files_hold_one_tensor_per_expert() {
    let dir = tempfile::tempdir().unwrap();
    model().save(dir.path(), DType::F32).unwrap();
    let bytes = std::fs::read(dir.path().join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("model.layers.5.mlp.experts.7.fc_in.weight").unwrap().shape(), [32, 16]);
    assert_eq!(file.tensor("model.layers.1.mlp.experts.3.fc_out.bias").unwrap().shape(), [16]);
    assert!(file.tensor("model.layers.1.mlp.experts.fc_in.weight").is_err());
}

/// Every prefix length of a file, and a header that promises more than there is: an error, never a panic.
#[test]
fn truncated_and_damaged_weights_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    model().save(dir.path(), DType::F32).unwrap();
    let config = std::fs::read(dir.path().join("config.json")).unwrap();
    let bytes = std::fs::read(dir.path().join("model.safetensors")).unwrap();
    let load = |weights: &[u8]| Gpt::from_bytes(&config, weights.to_vec(), &Device::Cpu).map(|_| ());
    load(&bytes).unwrap();
    for len in [0, 1, 7, 8, 9, 100, bytes.len() / 2, bytes.len() - 1] {
        let text = load(&bytes[..len]).unwrap_err().to_string();
        assert!(text.contains("truncated"), "{len}: {text}");
    }
    let mut huge = bytes.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(load(&huge).is_err());
}

fn edited(find: &str, replace: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    model().save(dir.path(), DType::F32).unwrap();
    let path = dir.path().join("config.json");
    let json = std::fs::read_to_string(&path).unwrap();
    assert!(json.contains(find), "{find} in {json}");
    std::fs::write(&path, json.replacen(find, replace, 1)).unwrap();
    Gpt::load(dir.path(), &Device::Cpu).unwrap_err().to_string()
}

#[test]
fn wrong_configurations_are_named() {
    for (find, replace, part) in [
        ("\"hidden_size\": 16,", "", "missing field `hidden_size`"),
        ("\"hidden_size\": 16,", "\"hidden_size\": 16, \"rope_theta\": 1e4,", "unknown field `rope_theta`"),
        ("\"hidden_size\": 16", "\"hidden_size\": 32", "must have shape"),
        ("\"hidden_size\": 16", "\"hidden_size\": -1", "invalid value"),
        ("\"num_hidden_layers\": 6", "\"num_hidden_layers\": 7", "is missing"),
        ("\"num_experts_per_tok\": 1", "\"num_experts_per_tok\": 5", "num_experts_per_tok must be between 1"),
        ("\"expert_interval\": 2", "\"expert_interval\": 3", "one entry for each of the 2 MoE layers"),
        ("\"mlp_type\": \"residual\"", "\"mlp_type\": \"standard\"", "does not belong"),
        ("\"tie_word_embeddings\": true", "\"tie_word_embeddings\": false", "tie_word_embeddings"),
        ("\"moe_gpt\"", "\"llama\"", "model_type must be \"moe_gpt\""),
        ("{", "[", "config.json"),
    ] {
        let text = edited(find, replace);
        assert!(text.contains(part), "{replace}: {text:?} should name {part:?}");
        assert!(text.contains("config.json") || text.contains("model.safetensors"), "{text} names its file");
    }
}

#[test]
fn broken_indexes_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    write::save_sharded(&model(), dir.path(), DType::F32, 20_000).unwrap();
    let index = dir.path().join("model.safetensors.index.json");
    let good = std::fs::read_to_string(&index).unwrap();
    for (find, replace, part) in [
        ("model-00001-of", "../model-00001-of", "not the name of a file"),
        ("\"weight_map\"", "\"weights\"", "weight_map"),
        ("model-00001-of", "model-99999-of", "model-99999"),
        // Tensors in another file than the one that it names, which is then not read.
        ("model-00002-of", "model-00001-of", "is missing"),
    ] {
        std::fs::write(&index, good.replace(find, replace)).unwrap();
        let text = Gpt::load(dir.path(), &Device::Cpu).unwrap_err().to_string();
        assert!(text.contains(part), "{text}");
    }
    std::fs::write(&index, &good).unwrap();
    let shard = |f: &std::fs::DirEntry| f.file_name().to_string_lossy().starts_with("model-00002-of");
    let second = std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap()).find(shard).unwrap().path();
    // A shard more, that holds tensors of another.
    std::fs::copy(&second, dir.path().join("again.safetensors")).unwrap();
    std::fs::write(
        &index,
        good.replacen("\"weight_map\": {", "\"weight_map\": {\"experts.0.w\": \"again.safetensors\",", 1),
    )
    .unwrap();
    let twice = Gpt::load(dir.path(), &Device::Cpu).unwrap_err().to_string();
    assert!(twice.contains("is in two files"), "{twice}");
    std::fs::write(&index, &good).unwrap();
    std::fs::remove_file(&second).unwrap();
    assert!(
        Gpt::load(dir.path(), &Device::Cpu).unwrap_err().to_string().contains("model-00002-of"),
        "a shard is missing"
    );
}

#[test]
fn an_adapter_in_the_folder_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    model().save(dir.path(), DType::F32).unwrap();
    Gpt::load(dir.path(), &Device::Cpu).unwrap();
    std::fs::write(dir.path().join("adapter_config.json"), "{}").unwrap();
    let text = Gpt::load(dir.path(), &Device::Cpu).unwrap_err().to_string();
    assert!(text.contains("adapter_config.json: adapters (LoRA) are not implemented"), "{text}");
    // As most come, without the model.
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    let text = crate::Decoder::load(dir.path(), moe_kernels::Precision::F32).unwrap_err().to_string();
    assert!(text.contains("adapters (LoRA)"), "{text}");
}

#[test]
fn an_index_without_files_and_too_many_layers_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = GptConfig::preset("tiny-dense").unwrap();
    (config.vocab_size, config.max_seq_len, config.d_model, config.num_heads, config.d_ff) = (37, 24, 16, 2, 32);
    Gpt::new(config, 9, &Device::Cpu).unwrap().save(dir.path(), DType::F32).unwrap();
    let refused = |part: &str| {
        let text = Gpt::load(dir.path(), &Device::Cpu).unwrap_err().to_string();
        assert!(text.contains(part), "{text}");
    };
    let index = dir.path().join("model.safetensors.index.json");
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    std::fs::write(&index, r#"{"weight_map": {}}"#).unwrap();
    refused("weight_map names no file");
    std::fs::remove_file(&index).unwrap();
    // Their descriptions alone would take tens of gigabytes.
    let path = dir.path().join("config.json");
    let json = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, json.replacen("\"num_hidden_layers\": 6", "\"num_hidden_layers\": 16777216", 1)).unwrap();
    refused("num_hidden_layers must be between 1 and 4096, got 16777216");
}

/// As transformers has it; and what is written last is what is read.
#[test]
fn one_file_is_taken_before_an_index_and_neither_outlives_the_other() {
    let dir = tempfile::tempdir().unwrap();
    let [old, new] = [9, 10].map(|seed| Gpt::new(model().config().clone(), seed, &Device::Cpu).unwrap());
    let file = dir.path().join("model.safetensors");
    write::save_sharded(&old, dir.path(), DType::F32, usize::MAX).unwrap();
    let bytes = std::fs::read(&file).unwrap();
    write::save_sharded(&new, dir.path(), DType::F32, 20_000).unwrap();
    assert!(!file.exists());
    assert!(same(&new, &Gpt::load(dir.path(), &Device::Cpu).unwrap(), false));
    std::fs::write(&file, bytes).unwrap();
    assert!(same(&old, &Gpt::load(dir.path(), &Device::Cpu).unwrap(), false));
    write::save_sharded(&new, dir.path(), DType::F32, usize::MAX).unwrap();
    assert!(!dir.path().join("model.safetensors.index.json").exists());
    assert!(same(&new, &Gpt::load(dir.path(), &Device::Cpu).unwrap(), false));
    // Shards that the index before named and the one now does not are gone.
    let files = || {
        std::fs::read_dir(dir.path())
            .unwrap()
            .filter(|file| file.as_ref().unwrap().file_name().to_string_lossy().starts_with("model-"))
    };
    assert_eq!(files().count(), 0);
    for shard_bytes in [20_000, 40_000] {
        write::save_sharded(&new, dir.path(), DType::F32, shard_bytes).unwrap();
    }
    let first = files().next().unwrap().unwrap().file_name().into_string().unwrap();
    let count: usize = first.trim_end_matches(".safetensors").rsplit('-').next().unwrap().parse().unwrap();
    assert_eq!(files().count(), count, "{first}");
    assert!(same(&new, &Gpt::load(dir.path(), &Device::Cpu).unwrap(), false));
}

/// More parameters than a number counts, named before anything is added up.
#[test]
fn a_configuration_without_bounds_is_refused_and_not_added_up() {
    let json = r#"{
        "model_type": "qwen3_moe", "hidden_act": "silu", "vocab_size": 16777216, "hidden_size": 16777216, "num_hidden_layers": 4096,
        "num_attention_heads": 128, "num_key_value_heads": 128, "head_dim": 128, "moe_intermediate_size": 16777216,
        "num_experts": 65536, "num_experts_per_tok": 8, "max_position_embeddings": 16777216, "intermediate_size": 16777216
    }"#;
    let dir = tempfile::tempdir().unwrap();
    model().save(dir.path(), DType::F32).unwrap();
    let weights = std::fs::read(dir.path().join("model.safetensors")).unwrap();
    let text = crate::Decoder::from_bytes(json.as_bytes(), weights, crate::Precision::F32).unwrap_err().to_string();
    assert!(text.contains("model.embed_tokens.weight must have shape"), "{text}");
    let family =
        <Box<dyn crate::Family> as crate::ReadFamily>::read(json.as_bytes(), Path::new("config.json")).unwrap();
    let table = family.decoder().unwrap().params();
    let text = file_tensors(&table, family.names(), DType::F32).unwrap_err().to_string();
    assert!(text.contains("more parameters than any files hold"), "{text}");
}
