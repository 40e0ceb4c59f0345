//! A model run layer by layer has the bits of one that is run as a whole, and shows what its matrices read.

use crate::golden::fixtures;
use candle_core::{DType, Device, Tensor};
use moe_core::CounterRng;
use moe_core::ops::ProductObserver;
use moe_core::testing::values;
use moe_kernels::quantized::IntegerMatrix;
use moe_models::gpt::{Gpt, GptConfig, TokenBatch};
use moe_models::hf::quantization::{nearest, save};
use moe_models::{Decoder, Family, LayerwisePass, Pass, Precision, QuantFormat, ReadFamily};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

fn gpt(root: &Path) -> PathBuf {
    let mut config = GptConfig::preset("tiny-pr-moe").unwrap();
    (config.vocab_size, config.max_seq_len, config.d_model, config.num_heads, config.d_ff) = (33, 20, 24, 2, 40);
    config.init_std = 0.2;
    let dir = root.join("gpt");
    std::fs::create_dir(&dir).unwrap();
    Gpt::new(config, 3, &Device::Cpu).unwrap().save(&dir, DType::BF16).unwrap();
    dir
}

/// Of several lengths.
fn batches() -> Vec<TokenBatch> {
    let mut rng = CounterRng::new(5, 0);
    let mut batch = |batch: usize, seq_len: usize| {
        let input_ids: Vec<u32> = (0..batch * seq_len).map(|_| rng.below(33)).collect();
        TokenBatch { target_ids: input_ids.clone(), input_ids, batch, seq_len }
    };
    vec![batch(2, 12), batch(1, 5), batch(3, 7)]
}

/// Rows that each matrix has read, and their width.
#[derive(Debug, Default)]
struct Seen(Mutex<BTreeMap<String, (usize, usize)>>);

impl ProductObserver for Seen {
    fn observe(&self, matrix: &str, inputs: &Tensor) -> moe_core::Result<()> {
        let width = inputs.dims()[inputs.rank() - 1];
        let mut seen = self.0.lock().unwrap();
        let (rows, _) = seen.entry(matrix.to_owned()).or_insert((0, width));
        *rows += inputs.elem_count() / width;
        Ok(())
    }
}

#[track_caller]
fn assert_bits(pass: &LayerwisePass, whole: &Decoder) {
    for (got, batch) in pass.hidden().unwrap().iter().zip(batches()) {
        let (want, _) = whole.hidden(&batch.input_ids, batch.seq_len, Pass::Eval).unwrap();
        assert_eq!(values(got), values(&want));
    }
}

/// Rows of one parameter, which is several tensors in files.
fn below_each_other(format: QuantFormat, parts: &[IntegerMatrix]) -> IntegerMatrix {
    let shape = [parts.iter().map(|part| part.shape()[0]).sum(), parts[0].shape()[1]];
    let integers = parts.iter().flat_map(|part| part.integers().to_vec()).collect();
    IntegerMatrix::new(format, shape, integers, parts.iter().flat_map(|part| part.scales().to_vec()).collect()).unwrap()
}

const PUBLISHED: [&str; 12] = [
    "qwen3_moe",
    "qwen2_moe",
    "mixtral",
    "olmoe",
    "glm4_moe",
    "deepseek_v3",
    "granitemoe",
    "granitemoeshared",
    "phimoe",
    "gpt_oss",
    "llama4_text",
    "llama",
];

/// With no integers it is the model of the folder, in every family; with all of them that of the quantized folder.
#[test]
fn layer_by_layer_it_is_the_same_model() {
    let root = tempfile::tempdir().unwrap();
    let published = PUBLISHED.map(|family| fixtures().join(family));
    for from in [gpt(root.path())].into_iter().chain(published) {
        let mut pass = LayerwisePass::open(&from, &batches()).unwrap();
        for _ in 0..pass.config().layers.len() {
            pass.advance(QuantFormat::INT4, HashMap::new()).unwrap();
        }
        assert_bits(&pass, &Decoder::load(&from, Precision::F32).unwrap());
        for format in [QuantFormat::Int8, QuantFormat::INT4] {
            let family = <Box<dyn Family>>::read_file(&from.join("config.json")).unwrap();
            if family.names().has_stacks() {
                let text = save(&from, &root.path().join("refused"), format, nearest).unwrap_err().to_string();
                assert!(text.contains("config.json") && text.contains("one tensor of all of them"), "{text}");
                continue;
            }
            let to = root.path().join(format!("{}-{format}", from.file_name().unwrap().to_string_lossy()));
            let mut integers = HashMap::<String, Vec<IntegerMatrix>>::new();
            save(&from, &to, format, |matrix| {
                let rounded = nearest(matrix)?;
                integers.entry(matrix.parameter.to_owned()).or_default().push(rounded.clone());
                Ok(rounded)
            })
            .unwrap();
            let mut pass = LayerwisePass::open(&from, &batches()).unwrap();
            for _ in 0..pass.config().layers.len() {
                let of_layer = integers.iter().filter(|(name, _)| pass.is_next(name));
                let of_layer = of_layer.map(|(name, parts)| (name.clone(), below_each_other(format, parts))).collect();
                pass.advance(format, of_layer).unwrap();
            }
            assert_bits(&pass, &Decoder::load(&to, Precision::F32).unwrap());
        }
    }
}

#[test]
fn every_matrix_of_the_next_layer_is_seen() {
    let root = tempfile::tempdir().unwrap();
    let mut pass = LayerwisePass::open(&gpt(root.path()), &batches()).unwrap();
    let tokens = 2 * 12 + 5 + 3 * 7;
    for layer in 0..2 {
        let seen = Arc::new(Seen::default());
        pass.observe(Arc::clone(&seen) as Arc<dyn ProductObserver>).unwrap();
        let seen = seen.0.lock().unwrap();
        assert!(seen.keys().all(|name| pass.is_next(name)), "{seen:?}");
        let of = |part: &str| seen[&format!("model.layers.{layer}.{part}.weight")];
        assert_eq!([of("self_attn.qkv_proj"), of("self_attn.o_proj")], [(tokens, 24); 2]);
        if layer == 0 {
            assert_eq!([of("mlp.fc_in"), of("mlp.fc_out")], [(tokens, 24), (tokens, 40)]);
        } else {
            assert_eq!([of("mlp.residual_mlp.fc_in"), of("mlp.residual_mlp.fc_out")], [(tokens, 24), (tokens, 40)]);
            let expert = |end: &str| -> usize {
                let experts = seen.iter().filter(|(name, _)| name.contains(".experts.") && name.ends_with(end));
                experts.map(|(_, (rows, _))| rows).sum()
            };
            assert_eq!([expert("fc_in.weight"), expert("fc_out.weight")], [tokens; 2]);
        }
        pass.advance(QuantFormat::INT4, HashMap::new()).unwrap();
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let from = gpt(root.path());
    let long = TokenBatch { input_ids: vec![1; 21], target_ids: vec![1; 21], batch: 1, seq_len: 21 };
    let text = LayerwisePass::open(&from, &[long]).unwrap_err().to_string();
    assert!(text.contains("21 tokens exceed the model's longest sequence of 20"), "{text}");
    let mut pass = LayerwisePass::open(&from, &batches()).unwrap();
    let name = "model.layers.0.mlp.fc_in.weight";
    assert!(
        pass.is_next(name) && !pass.is_next("model.layers.1.mlp.fc_in.weight") && !pass.is_next("model.norm.weight")
    );
    let small = IntegerMatrix::nearest(QuantFormat::INT4, &[1.0; 24], [1, 24]).unwrap();
    let text = pass.advance(QuantFormat::INT4, HashMap::from([(name.to_owned(), small)])).unwrap_err().to_string();
    assert!(text.contains("[1, 24]") && text.contains("[40, 24]"), "{text}");
    assert_eq!(pass.next_layer(), 0);
    (0..6).for_each(|_| pass.advance(QuantFormat::INT4, HashMap::new()).unwrap());
    let text = pass.advance(QuantFormat::INT4, HashMap::new()).unwrap_err().to_string();
    assert!(text.contains("all 6 layers have been run") && !pass.is_next("model.layers.6.x"), "{text}");
    let to = root.path().join("four");
    save(&from, &to, QuantFormat::INT4, nearest).unwrap();
    let text = LayerwisePass::open(&to, &batches()).unwrap_err().to_string();
    assert!(text.contains("config.json") && text.contains("quantized already, in int4"), "{text}");
}
