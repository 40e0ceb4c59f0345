//! Packed weights that are kept in a file: the same model, found again, and made anew where something has changed.

use crate::golden::{fixtures, logits};
use candle_core::{DType, Device};
use moe_core::testing::values;
use moe_models::gpt::{Gpt, GptConfig};
use moe_models::hf::quantization::{nearest, save};
use moe_models::{Decoder, Kept, PackedForms, Precision, QuantFormat};
use std::path::{Path, PathBuf};

const IDS: [u32; 9] = [3, 1, 4, 1, 5, 9, 2, 6, 5];

fn forms() -> [PackedForms; 4] {
    let bf16 = PackedForms::from(Precision::Bf16);
    [
        Precision::F32.into(),
        bf16,
        bf16.with_products(QuantFormat::Int8),
        PackedForms::from(Precision::F32).with_products(QuantFormat::INT4),
    ]
}

fn tiny(seed: u64, dir: &Path) -> PathBuf {
    let mut config = GptConfig::preset("tiny-pr-moe").unwrap();
    (config.vocab_size, config.max_seq_len, config.d_model, config.num_heads, config.d_ff) = (61, 80, 24, 2, 40);
    Gpt::new(config, seed, &Device::Cpu).unwrap().save(dir, DType::F32).unwrap();
    dir.to_owned()
}

#[track_caller]
fn written(dir: &Path, forms: PackedForms, cache: &Path) -> PathBuf {
    match Decoder::load_kept(dir, forms, cache).unwrap().1 {
        Kept::Written(path) => path,
        other => panic!("{other:?}"),
    }
}

/// The model is there all the same, and nothing half-written.
#[test]
fn a_file_that_cannot_be_written_is_told_and_no_more() {
    let root = tempfile::tempdir().unwrap();
    let (dir, cache) = (root.path().join("model"), root.path().join("cache"));
    std::fs::create_dir(&dir).unwrap();
    tiny(3, &dir);
    let path = written(&dir, Precision::F32.into(), &cache);
    std::fs::remove_file(&path).unwrap();
    // A folder in its place, which no file replaces.
    std::fs::create_dir_all(path.join("held")).unwrap();
    let (decoder, kept) = Decoder::load_kept(&dir, Precision::F32, &cache).unwrap();
    match kept {
        Kept::Unwritten(reason) => assert!(reason.contains(path.to_str().unwrap()), "{reason}"),
        other => panic!("{other:?}"),
    }
    let whole = Decoder::load(&dir, Precision::F32).unwrap();
    assert_eq!(values(&logits(&decoder, &IDS)), values(&logits(&whole, &IDS)));
    let left: Vec<_> = std::fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(left, [path]);

    // What is no folder is said before anything is loaded.
    let file = root.path().join("file");
    std::fs::write(&file, "").unwrap();
    let text = Decoder::load_kept(&dir, Precision::F32, &file).unwrap_err().to_string();
    assert!(text.contains(file.to_str().unwrap()), "{text}");
}

#[test]
fn weights_that_were_kept_are_the_same_model() {
    let root = tempfile::tempdir().unwrap();
    let gpt = root.path().join("gpt");
    std::fs::create_dir(&gpt).unwrap();
    let integers = root.path().join("integers");
    tiny(3, &gpt);
    std::fs::write(gpt.join("tokenizer.json"), "{}").unwrap();
    save(&gpt, &integers, QuantFormat::Int8, nearest).unwrap();
    let cache = root.path().join("made/when/needed");
    // Latent attention makes matrices of others, in every layer under one name.
    for dir in [
        gpt,
        integers,
        fixtures().join("qwen3_moe"),
        fixtures().join("deepseek_v2"),
        fixtures().join("gguf/qwen3moe.gguf"),
    ] {
        for forms in forms() {
            let is_refused =
                dir.ends_with("integers") && forms.of(moe_core::WeightUse::Product) == QuantFormat::INT4.into();
            if is_refused {
                let text = Decoder::load_kept(&dir, forms, &cache).unwrap_err().to_string();
                assert!(text.contains("quantized already"), "{text}");
                continue;
            }
            let bits = values(&logits(&Decoder::load(&dir, forms).unwrap(), &IDS));
            let path = written(&dir, forms, &cache);
            let (found, kept) = Decoder::load_kept(&dir, forms, &cache).unwrap();
            assert_eq!(kept, Kept::Found(path), "{dir:?} {forms:?}");
            assert_eq!(values(&logits(&found, &IDS)), bits, "{dir:?} {forms:?}");
            let bytes = |decoder: &Decoder| decoder.weights().iter().map(|weight| weight.bytes()).sum::<usize>();
            assert_eq!(bytes(&found), bytes(&Decoder::load(&dir, forms).unwrap()));
        }
    }
}

#[test]
fn what_has_changed_or_is_damaged_is_packed_anew() {
    let root = tempfile::tempdir().unwrap();
    let (dir, cache) = (root.path().join("model"), root.path().join("cache"));
    std::fs::create_dir(&dir).unwrap();
    tiny(3, &dir);
    let bf16 = PackedForms::from(Precision::Bf16);
    let first = written(&dir, bf16, &cache);
    let whole = std::fs::read(&first).unwrap();
    for bytes in [&whole[..whole.len() - 1], &whole[..40], &[], &[whole.as_slice(), b"more"].concat()] {
        std::fs::write(&first, bytes).unwrap();
        assert_eq!(written(&dir, bf16, &cache), first);
        assert_eq!(std::fs::read(&first).unwrap(), whole);
    }
    for at in [0, 9, 17, 60] {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x55;
        std::fs::write(&first, bytes).unwrap();
        written(&dir, bf16, &cache);
    }
    // Other weights of the same size, at the same time.
    let file = dir.join("model.safetensors");
    let time = std::fs::metadata(&file).unwrap().modified().unwrap();
    tiny(4, &dir);
    std::fs::File::options().write(true).open(&file).unwrap().set_modified(time).unwrap();
    let second = written(&dir, bf16, &cache);
    assert_ne!(first, second);
    let bits = |decoder: &Decoder| values(&logits(decoder, &IDS));
    let found = Decoder::load_kept(&dir, bf16, &cache).unwrap().0;
    assert_eq!(bits(&found), bits(&Decoder::load(&dir, bf16).unwrap()));
    assert_ne!(written(&dir, Precision::F32.into(), &cache), second);
}
