//! Headers that are damaged in every field, and forms beside what candle takes them for.

use super::file::GgufFile;
use super::form::TensorForm;
use super::model::GgufModel;
use super::tensors::{GgufTensors, Layout};
use crate::hf::{Bytes, TensorFiles};
use crate::{Family, ModelSource};
use candle_core::Device;
use candle_core::quantized::gguf_file::Content;
use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use half::f16;
use proptest::prelude::*;
use std::borrow::Cow;
use std::io::Cursor;
use std::path::{Path, PathBuf};

fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/gguf")).join(name)).unwrap()
}

/// Those in forms that candle knows.
const FIXTURES: [&str; 10] = [
    "deepseek2.gguf",
    "deepseek2-joined.gguf",
    "deepseek3.gguf",
    "forms.gguf",
    "gpt-oss.gguf",
    "llama.gguf",
    "mixtral.gguf",
    "olmoe.gguf",
    "qwen2moe.gguf",
    "qwen3moe.gguf",
];

fn file(bytes: Vec<u8>) -> crate::Result<GgufFile> {
    GgufFile::new("it.gguf".into(), Bytes::Held(bytes.into()))
}

/// Everything that is asked of a file before its values.
fn opened(bytes: Vec<u8>) -> crate::Result<()> {
    let model = ModelSource::from_gguf_bytes(Path::new("it.gguf"), bytes)?;
    let (family, _) = model.family::<Box<dyn Family>>()?;
    model.checkpoint(&family)?.check(&family.decoder()?.params())?;
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        model.content(name)?;
    }
    Ok(())
}

#[track_caller]
fn refused(bytes: Vec<u8>, part: &str) {
    let text = opened(bytes).unwrap_err().to_string();
    assert!(text.contains("it.gguf") && text.contains(part), "{text:?} should name {part:?}");
}

#[test]
fn a_bias_of_blocks_is_refused() {
    let mut bytes = fixture("llama.gguf");
    let name = b"blk.0.attn_q.bias";
    let at = bytes.windows(name.len()).position(|part| part == name).unwrap() + name.len();
    // One dimension, its size, the form.
    assert_eq!(bytes[at..at + 4], 1u32.to_le_bytes());
    bytes[at + 12..at + 16].copy_from_slice(&8u32.to_le_bytes());
    refused(bytes, "tensor blk.0.attn_q.bias must be of floats, got Q8_0");
}

/// A file that is written field by field, and where each number of its header lies.
#[derive(Default)]
struct Written {
    bytes: Vec<u8>,
    /// First byte, and how many.
    fields: Vec<(usize, usize)>,
}

impl Written {
    fn u32(&mut self, value: u32) -> &mut Self {
        self.fields.push((self.bytes.len(), 4));
        self.bytes.extend(value.to_le_bytes());
        self
    }

    fn u64(&mut self, value: u64) -> &mut Self {
        self.fields.push((self.bytes.len(), 8));
        self.bytes.extend(value.to_le_bytes());
        self
    }

    fn text(&mut self, text: &str) -> &mut Self {
        self.u64(text.len() as u64).bytes.extend(text.as_bytes());
        self
    }

    /// Two tensors, `a` `[2, 32]` of Q8_0 and `b` `[3]` of F32, and a pair of each kind.
    fn file() -> Self {
        let mut out = Self { bytes: b"GGUF".to_vec(), fields: Vec::new() };
        out.u32(3).u64(2).u64(4);
        out.text("general.alignment").u32(4).u32(32);
        out.text("x.text").u32(8).text("words");
        out.text("x.texts").u32(9).u32(8).u64(2).text("one").text("two");
        out.text("x.numbers").u32(9).u32(5).u64(2).u32(7).u32(8);
        out.text("a").u32(2).u64(32).u64(2).u32(8).u64(0);
        out.text("b").u32(1).u64(3).u32(0).u64(96);
        out.bytes.resize(out.bytes.len().next_multiple_of(32), 0);
        out.bytes.extend([1; 96 + 12]);
        out
    }
}

#[test]
fn a_header_is_read_as_it_was_written() {
    let file = file(Written::file().bytes).unwrap();
    assert_eq!(file.text("x.text"), Ok(Some("words")));
    assert_eq!(file.texts("x.texts"), Ok(Some(vec!["one", "two"])));
    assert_eq!(file.numbers("x.numbers", 2), Ok(Some(vec![7.0, 8.0])));
    assert_eq!(file.numbers("x.numbers", 1), Err("x.numbers has 2 entries for 1 tokens".to_owned()));
    assert_eq!((file.text("y"), file.count("general.alignment")), (Ok(None), Ok(Some(32))));
    assert!(file.text("x.texts").unwrap_err().contains("x.texts must be a text"));
    let (a, b) = (file.tensor("a").unwrap(), file.tensor("b").unwrap());
    assert_eq!((a.shape.as_slice(), a.bytes, a.row_bytes()), (&[2, 32][..], 68, 34));
    assert_eq!((b.shape.as_slice(), file.data(b)), (&[3][..], &[1; 12][..]));
}

/// Every number of a header as every bad number: an error or another file, never a panic; and no prefix is a file.
#[test]
fn no_number_of_a_header_is_trusted() {
    let good = Written::file();
    let mut refused = 0;
    for &(at, size) in &good.fields {
        let old = good.bytes[at..at + size].to_vec();
        for value in [0, 1, 2, 5, 9, 31, 33, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 60, 1 << 63, u64::MAX, u64::MAX - 31]
        {
            let mut bytes = good.bytes.clone();
            bytes[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
            if let Err(error) = file(bytes) {
                assert!(error.to_string().contains("it.gguf"), "{error}");
                refused += 1;
            } else {
                // Numbers of 4 bytes may be values, of which any will do.
                assert!(size == 4 || value < 1 << 32, "{value} at {at} instead of {old:?}");
            }
        }
    }
    assert!(refused > 10 * good.fields.len(), "{refused} of {} fields", good.fields.len());
    for len in 0..good.bytes.len() {
        assert!(file(good.bytes[..len].to_vec()).is_err(), "{len} bytes");
    }
}

#[test]
fn what_is_wrong_with_a_header_is_named() {
    let good = Written::file();
    let with = |find: &[u8], replace: &[u8]| {
        let at = good.bytes.windows(find.len()).position(|window| window == find).expect("there");
        let mut bytes = good.bytes.clone();
        bytes[at..at + replace.len()].copy_from_slice(replace);
        file(bytes).unwrap_err().to_string()
    };
    let number = |name: &[u8], after: usize, value: u64, size: usize| {
        let find = [&(name.len() as u64).to_le_bytes()[..], name].concat();
        let at = good.bytes.windows(find.len()).position(|window| window == find).expect("there") + find.len() + after;
        let mut bytes = good.bytes.clone();
        bytes[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
        file(bytes).unwrap_err().to_string()
    };
    for (text, part) in [
        (with(b"GGUF", b"GGML"), "does not begin with the letters GGUF"),
        (with(b"GGUF\x03", b"GGUF\x01"), "version 1 is not implemented"),
        (with(b"GGUF\x03\0\0\0", b"GGUF\0\0\0\x03"), "big-endian"),
        (with(b"x.texts", b"x.text\xff"), "not UTF-8"),
        (with(b"general.alignment\x04\0\0\0\x20", b"general.alignment\x04\0\0\0\x00"), "general.alignment must be"),
        (number(b"a", 0, 5, 4), "tensor a: it must have 1 to 4 dimensions, got 5"),
        (number(b"a", 4, 48, 8), "tensor a: rows of 48 values are not whole blocks of 32, as Q8_0"),
        (number(b"a", 12, 0, 8), "tensor a: no tensor can have the dimensions [32, 0]"),
        (number(b"a", 12, 1 << 60, 8), "tensor a: no tensor can have the dimensions"),
        (number(b"a", 20, 13, 4), "tensor a: Q5_K is not implemented"),
        (number(b"a", 20, 4, 4), "tensor a: unknown form 4 is not implemented"),
        (number(b"b", 16, 97, 8), "tensor b begins at 97, no multiple of 32"),
        (number(b"b", 16, 64, 8), "tensors a and b overlap"),
        (number(b"b", 16, 128, 8), "tensor b has 12 bytes from 128 on, past the end"),
        (number(b"b", 16, u64::MAX - 31, 8), "past the end"),
        (number(b"x.texts", 8, 1 << 60, 8), "x.texts: it ends after"),
        (number(b"x.numbers", 8, u64::MAX, 8), "x.numbers: it ends after"),
        (number(b"x.numbers", 4, 9, 4), "an array of arrays"),
        (number(b"x.text", 0, 13, 4), "x.text: there is no type 13"),
    ] {
        assert!(text.contains(part) && text.contains("it.gguf"), "{text:?} should name {part:?}");
    }
    let twice = with_same_name(&good.bytes, b"b", b"a");
    assert!(file(twice).unwrap_err().to_string().contains("tensor a is there twice"));
}

fn with_same_name(bytes: &[u8], find: &[u8], replace: &[u8]) -> Vec<u8> {
    let find = [&(find.len() as u64).to_le_bytes()[..], find].concat();
    let at = bytes.windows(find.len()).position(|window| window == find).expect("there") + 8;
    let mut bytes = bytes.to_vec();
    bytes[at..at + replace.len()].copy_from_slice(replace);
    bytes
}

/// Every byte of the headers of a model without and of one with a tokenizer, flipped: no panic, and errors name the file.
#[test]
fn flipped_bytes_of_whole_models_are_survived() {
    for (name, step) in
        [("olmoe.gguf", 1), ("deepseek2.gguf", 3), ("llama.gguf", 29), ("forms.gguf", 31), ("gpt-oss-mxfp4.gguf", 5)]
    {
        let good = fixture(name);
        opened(good.clone()).unwrap();
        let header = file(good.clone()).unwrap().tensors().values().map(|tensor| tensor.start).min().unwrap();
        for at in (0..header).step_by(step) {
            for flip in [0x01, 0x80, 0xff] {
                let mut bytes = good.clone();
                bytes[at] ^= flip;
                if let Err(error) = opened(bytes) {
                    assert!(error.to_string().contains("it.gguf"), "byte {at} of {name}: {error}");
                }
            }
        }
        for len in (0..good.len()).step_by(good.len() / 50) {
            assert!(opened(good[..len].to_vec()).is_err(), "{len} bytes of {name}");
        }
    }
}

/// The same places and forms as candle's reader finds in files that the `gguf` package has written.
#[test]
fn headers_are_those_that_candle_reads() {
    for name in FIXTURES {
        let bytes = fixture(name);
        let want = Content::read(&mut Cursor::new(&bytes)).unwrap();
        let got = file(bytes).unwrap();
        assert_eq!(got.tensors().len(), want.tensor_infos.len(), "{name}");
        for (tensor, info) in &want.tensor_infos {
            let at = got.tensor(tensor).unwrap();
            assert_eq!(at.shape, info.shape.dims(), "{tensor} of {name}");
            assert_eq!(at.start as u64, want.tensor_data_offset + info.offset, "{tensor} of {name}");
            assert_eq!(at.form.name(), format!("{:?}", info.ggml_dtype).replace('K', "_K"), "{tensor} of {name}");
        }
        let keys = got.keys("").count();
        assert_eq!(keys, want.metadata.len(), "{name}");
    }
}

const FORMS: [(TensorForm, GgmlDType, &[usize]); 6] = [
    (TensorForm::F16, GgmlDType::F16, &[]),
    (TensorForm::Q8_0, GgmlDType::Q8_0, &[0]),
    (TensorForm::Q4_0, GgmlDType::Q4_0, &[0]),
    (TensorForm::Q4_1, GgmlDType::Q4_1, &[0, 2]),
    (TensorForm::Q4K, GgmlDType::Q4K, &[0, 2]),
    (TensorForm::Q6K, GgmlDType::Q6K, &[208]),
];

proptest! {
    /// Blocks of any bytes, their scales finite, are the values that candle takes them for, bit for bit.
    #[test]
    fn values_are_those_of_candle(
        mut bytes in proptest::collection::vec(any::<u8>(), 3 * 210),
        scales in proptest::collection::vec(-4.0f32..4.0, 64),
    ) {
        for (form, dtype, scales_at) in FORMS {
            let (values, size) = form.block();
            let blocks = bytes.len() / size;
            for (block, at) in (0..blocks).flat_map(|block| scales_at.iter().map(move |at| (block, at))) {
                let scale = f16::from_f32(scales[(block + at) % scales.len()]);
                bytes[block * size + at..][..2].copy_from_slice(&scale.to_le_bytes());
            }
            let whole = &bytes[..blocks * size];
            let storage = QStorage::from_data(Cow::Borrowed(whole), &Device::Cpu, dtype).unwrap();
            let tensor = QTensor::new(storage, (blocks, values)).unwrap();
            let want: Vec<f32> =
                tensor.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
            let got = form.values(whole);
            prop_assert_eq!(got.len(), want.len());
            for (got, want) in got.iter().zip(&want) {
                prop_assert!(got == want || got.is_nan() && want.is_nan(), "{}: {got} and {want}", form.name());
            }
        }
    }
}

/// A key of a fixture under another name, of the same length.
fn renamed(name: &str, key: &str, new: &str) -> Vec<u8> {
    assert_eq!(key.len(), new.len());
    with_same_name(&fixture(name), key.as_bytes(), new.as_bytes())
}

/// The number (4 bytes) of a key of a fixture replaced.
fn renumbered(name: &str, key: &str, value: u32) -> Vec<u8> {
    let mut bytes = fixture(name);
    let at = bytes.windows(key.len()).position(|window| window == key.as_bytes()).expect("there") + key.len() + 4;
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
    bytes
}

#[test]
fn what_is_not_implemented_is_refused_by_its_name() {
    let text = |name, find: &str, replace: &str| with_same_name(&fixture(name), find.as_bytes(), replace.as_bytes());
    refused(
        text("olmoe.gguf", "olmoe", "olmo9"),
        "general.architecture \"olmo9\" is not one of deepseek2, gpt-oss, llama",
    );
    refused(renamed("llama.gguf", "llama.vocab_size", "llama.vocabulary"), "llama.vocabulary is not implemented");
    refused(renamed("olmoe.gguf", "olmoe.block_count", "olmoe.block_cownt"), "block_count is missing");
    refused(renumbered("olmoe.gguf", "olmoe.vocab_size", 96), "olmoe.vocab_size must be null or 97, got 96");
    refused(renumbered("olmoe.gguf", "olmoe.expert_used_count", 0), "num_experts_per_tok");
    refused(renumbered("olmoe.gguf", "olmoe.expert_count", 9), "must have shape");
    refused(renumbered("olmoe.gguf", "olmoe.block_count", 3), "blk.2");
    refused(renumbered("olmoe.gguf", "olmoe.block_count", 1), "does not belong to the configured model");
    refused(renumbered("mixtral.gguf", "llama.attention.head_count", 3), "llama.rope.dimension_count must be");
    refused(renumbered("llama.gguf", "llama.rope.dimension_count", 8), "llama.rope.dimension_count must be null or 16");
    refused(renumbered("llama.gguf", "llama.rope.freq_base", 5000f32.to_bits()), "rope_freqs.weight has other factors");
    refused(
        renumbered("deepseek3.gguf", "deepseek2.expert_gating_func", 3),
        "expert_gating_func must be 1 or 2, got 3",
    );
    refused(renumbered("deepseek2.gguf", "deepseek2.attention.key_length", 16), "key_length 16 and value_length 20");
    refused(text("deepseek2.gguf", "yarn", "none"), "yarn_log_multiplier needs a rope.scaling.type of yarn");
    refused(text("gpt-oss.gguf", "yarn", "none"), "gpt-oss.rope.scaling.type must be yarn");
    refused(
        renumbered("gpt-oss-mxfp4.gguf", "gpt-oss.attention.sliding_window_pattern", 3),
        "gpt-oss.attention.sliding_window_pattern must be null or 2, got 3",
    );
    refused(renumbered("forms.gguf", "general.quantization_version", 1), "general.quantization_version must be 2");
    refused(text("forms.gguf", "smollm", "smoll9"), "tokenizer.ggml.pre \"smoll9\" is not one of gpt-2");
    refused(text("forms.gguf", "gpt2", "gpt9"), "tokenizer.ggml.model must be gpt2 or llama, got \"gpt9\"");
    refused(
        renamed("forms.gguf", "tokenizer.ggml.merges", "tokenizer.ggml.merged"),
        "tokenizer.ggml.merged is not implemented",
    );
    refused(
        renumbered("forms.gguf", "tokenizer.ggml.bos_token_id", 320),
        "bos_token_id 320 is not one of the 320 tokens",
    );
    refused(
        renamed("llama.gguf", "tokenizer.ggml.scores", "tokenizer.ggml.merges"),
        "tokenizer.ggml.scores is missing",
    );
}

/// What a V3 of one group says to transformers, which takes eight where a configuration says nothing.
#[test]
fn the_groups_and_heads_of_deepseek_are_always_said() {
    let config = |bytes: Vec<u8>| -> serde_json::Value {
        let model = GgufModel::from_bytes(Path::new("it.gguf"), bytes).unwrap();
        serde_json::from_slice(&model.content("config.json").unwrap().unwrap()).unwrap()
    };
    let json = config(renumbered("deepseek3.gguf", "deepseek2.expert_group_count", 1));
    assert_eq!((&json["n_group"], &json["topk_group"]), (&1.into(), &1.into()));
    for name in ["deepseek2.gguf", "deepseek3.gguf"] {
        let json = config(fixture(name));
        assert!(json["n_group"].is_u64() && json["topk_group"].is_u64(), "{json}");
        assert_eq!(json["num_key_value_heads"], json["num_attention_heads"]);
    }
}

/// The first scale of a tensor in each form that has them.
#[test]
fn blocks_that_stand_for_no_number_are_refused_by_the_name_of_their_tensor() {
    let mut seen = std::collections::BTreeSet::new();
    for name in ["forms.gguf", "gpt-oss-mxfp4.gguf"] {
        let good = fixture(name);
        let header = file(good.clone()).unwrap();
        for (tensor, at) in header.tensors().iter().filter(|(_, at)| at.form.is_quantized()) {
            let (scale, bytes): (usize, &[u8]) = match at.form {
                TensorForm::Mxfp4 => (0, &[255]),
                TensorForm::Q6K => (208, &[0x00, 0x7c]),
                _ => (0, &[0x01, 0x7e]),
            };
            let mut bad = good.clone();
            bad[at.start + scale..][..bytes.len()].copy_from_slice(bytes);
            let source = ModelSource::from_gguf_bytes(Path::new("it.gguf"), bad).unwrap();
            let (family, _) = source.family::<Box<dyn Family>>().unwrap();
            let (checkpoint, table) = (source.checkpoint(&family).unwrap(), family.decoder().unwrap().params());
            let read = table.specs().iter().try_for_each(|spec| checkpoint.tensor(spec, &Device::Cpu).map(drop));
            let text = read.unwrap_err().to_string();
            assert!(
                text.contains("it.gguf") && text.contains(&format!("tensor {tensor} has {}", at.form.name())),
                "{text}"
            );
            seen.insert(at.form.name());
        }
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), ["MXFP4", "Q4_0", "Q4_1", "Q4_K", "Q6_K", "Q8_0"]);
}

/// Factors that only one architecture's configuration is made of.
#[test]
fn factors_on_frequencies_that_nobody_has_read_are_refused() {
    let mut out = Written { bytes: b"GGUF".to_vec(), fields: Vec::new() };
    out.u32(3).u64(1).u64(0).text("rope_freqs.weight").u32(1).u64(8).u32(0).u64(0);
    out.bytes.resize(out.bytes.len().next_multiple_of(32) + 32, 0);
    let file = std::sync::Arc::new(file(out.bytes).unwrap());
    let unused = |reads_rope_freqs| {
        let tensors = GgufTensors::new(file.clone(), Layout { reads_rope_freqs, ..Layout::default() });
        tensors.unused(&std::collections::BTreeSet::new()).map(|error| error.to_string())
    };
    assert_eq!(unused(true), None);
    assert!(unused(false).unwrap().contains("tensor rope_freqs.weight does not belong"));
}

/// What a folder of a model has, as far as a file of it says.
#[test]
fn a_file_says_what_its_model_would_have_in_a_folder() {
    let model = GgufModel::from_bytes(Path::new("it.gguf"), fixture("forms.gguf")).unwrap();
    let json =
        |name: &str| -> serde_json::Value { serde_json::from_slice(&model.content(name).unwrap().unwrap()).unwrap() };
    assert_eq!(json("generation_config.json"), serde_json::json!({ "bos_token_id": 0, "eos_token_id": [0, 2] }));
    let tokenizer = json("tokenizer_config.json");
    assert_eq!((&tokenizer["bos_token"], &tokenizer["eos_token"]), (&"<|endoftext|>".into(), &"<|endoftext|>".into()));
    assert!(tokenizer["chat_template"].as_str().unwrap().starts_with("{% for m in messages %}"));
    assert_eq!(json("config.json")["rms_norm_eps"], 1e-6);
    assert!(model.content("vocab.json").unwrap().is_none());
    assert_eq!(model.quantized_form(), Some("Q4_1"));
}
