//! The `moe-init` program from outside: folders of initial weights, and what it refuses.

use candle_core::Device;
use moe_models::train::tokenizer;
use moe_models::{Decoder, Family, Model, Precision, ReadFamily};
use std::path::Path;
use std::process::{Command, Output};

fn moe_init(dir: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_moe-init")).current_dir(dir).args(arguments).output().unwrap()
}

fn fixture(family: &str) -> String {
    format!("{}/tests/fixtures/{family}/config.json", env!("CARGO_MANIFEST_DIR"))
}

/// Whole, for any reader, and the weights that training from this seed begins with.
#[test]
fn a_folder_is_the_model_that_training_begins_with() {
    let dir = tempfile::tempdir().unwrap();
    for family in ["qwen3_moe", "deepseek_v3", "gpt_oss"] {
        let config = fixture(family);
        let small = ["--set", "vocab_size=300", "--set", "max_position_embeddings=64"];
        let arguments = [&["--config", &config, "--out", family, "--seed", "7", "--dtype", "f32"], &small[..]].concat();
        let output = moe_init(dir.path(), &arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let folder = dir.path().join(family);
        let read = <Box<dyn Family>>::read_file(&folder.join("config.json")).unwrap();
        let new = Model::new(read, 7, &Device::Cpu).unwrap();
        let loaded = Model::<Box<dyn Family>>::load(&folder, &Device::Cpu).unwrap();
        assert_eq!(new.decoder_config().vocab_size, 300);
        for ((name, new), (_, loaded)) in new.params().iter().zip(loaded.params()) {
            let values = |var: &candle_core::Var| var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(values(new), values(loaded), "{name}");
        }
        let count = format!("{} parameters", new.table().elem_count());
        assert!(String::from_utf8_lossy(&output.stdout).contains(&count), "{count}");
        let tokenizer = tokenizer::load(&folder.join("tokenizer.json")).unwrap();
        assert_eq!(Some(tokenizer::eos_id(&tokenizer).unwrap()), new.decoder_config().eos_token_id);
        assert_eq!(tokenizer.get_vocab_size(true), 300);
        Decoder::load(&folder, Precision::Bf16).unwrap();
    }
}

#[test]
fn the_end_of_a_text_may_be_set() {
    let dir = tempfile::tempdir().unwrap();
    let config = fixture("qwen3_moe");
    let ends = |out: &str, more: &[&str]| {
        let small = ["--config", &config, "--set", "vocab_size=300", "--out", out];
        let output = moe_init(dir.path(), &[&small[..], more].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let json = std::fs::read(dir.path().join(out).join("config.json")).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        ["bos_token_id", "eos_token_id"].map(|field| json[field].as_u64().unwrap())
    };
    let [first, last] = ends("own", &[]);
    assert_eq!((first, ends("set", &["--set", "eos_token_id=5"])), (last, [first, 5]));
    // A tokenizer that names no end has the configuration's.
    let plain = std::fs::read_to_string(dir.path().join("own/tokenizer.json")).unwrap();
    let nameless = dir.path().join("tokenizer.json");
    std::fs::write(&nameless, plain.replace("<|endoftext|>", "<|nothing|>")).unwrap();
    let nameless = nameless.display().to_string();
    assert_eq!(ends("nameless", &["--tokenizer", &nameless, "--set", "eos_token_id=7"])[1], 7);
}

#[test]
fn what_cannot_be_written_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(dir.path().join("full/inside")).unwrap();
    let config = fixture("olmoe");
    for (arguments, words) in [
        (vec!["--preset", "gpt-5", "--out", "a"], vec!["gpt-5", "olmoe-1b-7b"]),
        (vec!["--out", "a"], vec!["--preset"]),
        (vec!["--config", &config, "--set", "hidden=3", "--out", "a"], vec!["--set hidden", "no such field"]),
        (vec!["--config", &config, "--set", "hidden_size", "--out", "a"], vec!["FIELD=VALUE"]),
        (vec!["--config", &config, "--set", "hidden_act=silu", "--out", "a"], vec!["not JSON"]),
        (vec!["--config", &config, "--set", "hidden_size=-3", "--out", "a"], vec!["hidden_size"]),
        (vec!["--config", &config, "--set", "vocab_size=90", "--out", "a"], vec!["vocab_size", "257"]),
        (vec!["--config", "absent.json", "--out", "a"], vec!["absent.json"]),
        (vec!["--config", &config, "--set", "vocab_size=300", "--out", "full"], vec!["not an empty folder"]),
    ] {
        let output = moe_init(dir.path(), &arguments);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{arguments:?}");
        words.iter().for_each(|word| assert!(text.contains(word), "{arguments:?}: {word}: {text}"));
        assert!(!dir.path().join("a").exists(), "{arguments:?}");
    }
}
