//! GGUF files: the logits of the model in the Hugging Face folder that they were made of, and of transformers; their tokenizers.
//! `fixtures/gguf/make.py` made the files.

use crate::golden::{fixtures, logits, read};
use candle_core::{DType, Device};
use moe_core::testing::values;
use moe_models::hf::quantization::{nearest, save};
use moe_models::{Decoder, Family, LayerwisePass, Model, ModelSource, PackedForms, Precision, QuantFormat, TokenBatch};
use std::path::PathBuf;
use tokenizers::Tokenizer;

type Any = Model<Box<dyn Family>>;

fn file(name: &str) -> PathBuf {
    fixtures().join("gguf").join(format!("{name}.gguf"))
}

fn load(name: &str) -> Decoder {
    Decoder::load(&file(name), Precision::F32).unwrap()
}

#[track_caller]
fn equals_folder(name: &str, folder: &str) {
    let ids = [5, 9, 2, 40, 77, 3, 3, 61, 18, 96, 0, 24, 50, 31, 7, 7, 12];
    let want = Decoder::load(&fixtures().join(folder), Precision::F32).unwrap();
    assert_eq!(values(&logits(&load(name), &ids)), values(&logits(&want, &ids)), "{name}");
    let model = Any::load_dequantized(&file(name), &Device::Cpu).unwrap();
    let folder = Any::load(&fixtures().join(folder), &Device::Cpu).unwrap();
    for ((name, got), (_, want)) in model.params().iter().zip(folder.params()) {
        assert_eq!(values(got), values(want), "{name}");
    }
}

#[test]
fn files_of_published_families_are_their_folders() {
    equals_folder("mixtral", "mixtral");
    equals_folder("olmoe", "olmoe");
    equals_folder("deepseek2", "deepseek_v2");
    equals_folder("deepseek2-joined", "deepseek_v2");
    equals_folder("deepseek3", "deepseek_v3");
    equals_folder("gpt-oss", "gpt_oss");
    equals_folder("gpt-oss-mxfp4", "gpt_oss/mxfp4");
}

#[track_caller]
fn equals_transformers(name: &str) {
    let expected = read("gguf/expected.safetensors");
    let ids: Vec<u32> = expected[&format!("{name}.input_ids")].to_vec1().unwrap();
    let want = values(&expected[&format!("{name}.logits")]);
    let largest = want.iter().fold(0f64, |most, value| most.max(value.abs()));
    let got = values(&logits(&load(name), &ids));
    assert_eq!(got.len(), want.len());
    let off = got.iter().zip(&want).fold(0f64, |most, (got, want)| most.max((got - want).abs())) / largest;
    assert!(off <= 1e-4, "{name}: off by {off:e} of the largest logit");
}

/// Also experts in Q4_0, positions stretched as Llama 3.1's, and a matrix in each form.
#[test]
fn files_of_other_models_are_those_of_transformers() {
    ["qwen2moe", "qwen3moe", "llama", "forms"].into_iter().for_each(equals_transformers);
}

#[test]
fn tokenizers_are_those_the_files_were_made_of() {
    let expected: serde_json::Value =
        serde_json::from_slice(&std::fs::read(fixtures().join("gguf/tokens.json")).unwrap()).unwrap();
    let mut texts = 0;
    for (name, samples) in expected.as_object().unwrap() {
        let json = ModelSource::open(&file(name)).unwrap().required("tokenizer.json").unwrap();
        let tokenizer = Tokenizer::from_bytes(&json).unwrap();
        for sample in samples.as_array().unwrap() {
            let (text, want) = (sample["text"].as_str().unwrap(), &sample["ids"]);
            let encoding = tokenizer.encode(text, true).unwrap();
            assert_eq!(&serde_json::json!(encoding.get_ids()), want, "{name}: {text:?}");
            // Special tokens are no text.
            if !text.contains("<|") {
                assert_eq!(tokenizer.decode(encoding.get_ids(), true).unwrap(), text, "{name}");
            }
            texts += 1;
        }
    }
    assert_eq!(texts, 11);
}

/// With matrices asked for in 4 bits, those of Q4_0 keep their integers, and their scales are rounded to bf16.
#[test]
fn integers_of_q4_0_are_kept() {
    let forms = PackedForms::from(Precision::F32).with_products(QuantFormat::INT4);
    let kept = Decoder::load(&file("qwen3moe"), forms).unwrap();
    let ids = [5, 9, 2, 40, 77];
    // The model with what these integers stand for, and everything else as it is rounded on the way.
    let model = Any::load_dequantized(&file("qwen3moe"), &Device::Cpu).unwrap();
    let dir = tempfile::tempdir().unwrap();
    model.save(dir.path(), DType::F32).unwrap();
    let again = Decoder::load(dir.path(), forms).unwrap();
    // Every block of Q4_0 holds a -8, by which rounding its values again finds the same integers and scales.
    assert_eq!(values(&logits(&kept, &ids)), values(&logits(&again, &ids)));
    let plain = values(&logits(&load("qwen3moe"), &ids));
    assert_ne!(values(&logits(&kept, &ids)), plain);
    assert!(kept.weights().iter().any(|weight| weight.form() == "int4 in groups of 32"));

    // Where no block does, the integers are still those of the file.
    let mut bytes = std::fs::read(file("qwen3moe")).unwrap();
    let blocks = halved_blocks(&mut bytes);
    let path = dir.path().join("halved.gguf");
    std::fs::write(&path, bytes).unwrap();
    let source = ModelSource::open(&path).unwrap();
    let (family, _) = source.family::<Box<dyn Family>>().unwrap();
    let checkpoint = source.checkpoint(&family).unwrap().with_integers(QuantFormat::INT4);
    let table = family.decoder().unwrap().params();
    let spec = table.get("model.layers.0.mlp.experts.fc_in.weight").unwrap();
    let expert = checkpoint.expert(spec, 1, &Device::Cpu).unwrap();
    let scale = half::bf16::from_f32(blocks).to_f32();
    for value in values(&expert) {
        let integer = value / f64::from(scale);
        assert!(integer == integer.round() && (-4.0..4.0).contains(&integer), "{value}");
    }
}

/// Gives all blocks of Q4_0 of the first layer's experts one scale and integers of half the size; the scale.
pub(crate) fn halved_blocks(bytes: &mut [u8]) -> f32 {
    let content = candle_core::quantized::gguf_file::Content::read(&mut std::io::Cursor::new(&*bytes)).unwrap();
    let scale = half::f16::from_f32(0.0123);
    for name in ["blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"] {
        let info = &content.tensor_infos[name];
        let start = (content.tensor_data_offset + info.offset) as usize;
        let size = info.shape.elem_count() / 32 * 18;
        for block in bytes[start..start + size].chunks_exact_mut(18) {
            block[..2].copy_from_slice(&scale.to_le_bytes());
            let halved = |nibble: u8| ((nibble as i8 - 8) / 2 + 8) as u8;
            // Toward zero, but for -8, which is -4.
            block[2..].iter_mut().for_each(|byte| *byte = halved(*byte & 15).min(11) | halved(*byte >> 4).min(11) << 4);
        }
    }
    scale.to_f32()
}

/// Everything that takes a folder takes a file: it is trained from, run layer by layer, and written as a folder of integers.
#[test]
fn a_file_is_a_source_like_a_folder() {
    let model = Any::load(&file("olmoe"), &Device::Cpu).unwrap();
    let dir = tempfile::tempdir().unwrap();
    model.save(dir.path(), DType::F32).unwrap();
    let ids = [5, 9, 2, 40];
    let again = Decoder::load(dir.path(), Precision::F32).unwrap();
    assert_eq!(values(&logits(&load("olmoe"), &ids)), values(&logits(&again, &ids)));

    let batch = TokenBatch { input_ids: ids.to_vec(), target_ids: ids.to_vec(), batch: 1, seq_len: 4 };
    LayerwisePass::open(&file("olmoe"), &[batch]).unwrap();

    let [from_file, from_folder] = [(file("olmoe"), "a"), (fixtures().join("olmoe"), "b")].map(|(from, name)| {
        let to = dir.path().join(name);
        save(&from, &to, QuantFormat::INT4, nearest).unwrap();
        logits(&Decoder::load(&to, Precision::F32).unwrap(), &ids)
    });
    assert_eq!(values(&from_file), values(&from_folder));
}

#[test]
fn quantized_files_are_not_trained_from_unasked() {
    let refused = |error: moe_models::Error, part: &str| {
        let text = error.to_string();
        assert!(text.contains("forms.gguf") && text.contains("Q4_1") && text.contains(part), "{text}");
    };
    refused(Any::load(&file("forms"), &Device::Cpu).unwrap_err(), "load_dequantized");
    let dir = tempfile::tempdir().unwrap();
    refused(save(&file("forms"), &dir.path().join("to"), QuantFormat::INT4, nearest).unwrap_err(), "quantized already");
    Any::load_dequantized(&file("forms"), &Device::Cpu).unwrap();
}

#[test]
fn other_files_are_refused() {
    let text = Decoder::load(&fixtures().join("olmoe/config.json"), Precision::F32).unwrap_err().to_string();
    assert!(text.contains("config.json") && text.contains("does not begin with the letters GGUF"), "{text}");
    let text = Decoder::load(&fixtures().join("nowhere.gguf"), Precision::F32).unwrap_err().to_string();
    assert!(text.contains("nowhere.gguf"), "{text}");
}
