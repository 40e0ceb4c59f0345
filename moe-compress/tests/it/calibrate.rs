//! Folders of calibrated integers: nearer to the floats than the nearest, layer after layer, and what they are where an expert has seen
//! nothing.

use crate::teacher::shape;
use candle_core::{DType, Device};
use moe_compress::calibrate::{Factor, LayerInputs, quantize, save_calibrated};
use moe_core::CounterRng;
use moe_core::ops::ProductObserver;
use moe_core::testing::values;
use moe_kernels::quantized::IntegerMatrix;
use moe_models::gpt::Gpt;
use moe_models::hf::quantization::{nearest, save};
use moe_models::{Decoder, LayerwisePass, Model, Pass, Precision, QuantFormat, TokenBatch};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const FORMATS: [QuantFormat; 2] = [QuantFormat::Int8, QuantFormat::INT4];

fn write(model: &Gpt, dir: &Path) {
    std::fs::create_dir(dir).unwrap();
    model.save(dir, DType::F32).unwrap();
}

fn teacher(root: &Path) -> PathBuf {
    let dir = root.join("teacher");
    write(&Gpt::new(shape(), 5, &Device::Cpu).unwrap(), &dir);
    dir
}

/// Tiny folders of published families, whose vocabularies have 33 entries at least.
fn published() -> impl Iterator<Item = PathBuf> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-models/tests/fixtures");
    ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "glm4_moe", "deepseek_v3"]
        .into_iter()
        .map(move |family| fixtures.join(family))
}

/// Few of the ids come often, so that inputs have something in common.
fn batches(tokens: usize, seq_len: usize, vocab: u32) -> Vec<TokenBatch> {
    let mut rng = CounterRng::new(8, 0);
    let mut batch = || {
        let input_ids: Vec<u32> = (0..seq_len * 4).map(|_| rng.below(vocab).min(rng.below(vocab))).collect();
        TokenBatch { target_ids: input_ids.clone(), input_ids, batch: 4, seq_len }
    };
    (0..tokens / (4 * seq_len)).map(|_| batch()).collect()
}

fn weights(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("model.safetensors")).unwrap()
}

fn hidden(dir: &Path, batches: &[TokenBatch]) -> Vec<f64> {
    hidden_of(&Decoder::load(dir, Precision::F32).unwrap(), batches)
}

fn hidden_of(decoder: &Decoder, batches: &[TokenBatch]) -> Vec<f64> {
    let run = |batch: &TokenBatch| decoder.hidden(&batch.input_ids, batch.seq_len, Pass::Eval).unwrap().0;
    batches.iter().flat_map(|batch| values(&run(batch))).collect()
}

/// On text that was not calibrated on, in every family. Of the weights alone: inputs are quantized alike in either.
#[test]
fn calibrated_models_are_nearer_to_their_floats() {
    let root = tempfile::tempdir().unwrap();
    let published = published().map(|folder| (folder, 33));
    for (from, vocab) in [(teacher(root.path()), 262)].into_iter().chain(published) {
        let text = batches(4096, 16, vocab);
        let (text, others) = text.split_at(48);
        let want = hidden(&from, others);
        for format in FORMATS {
            let name = from.file_name().unwrap().to_string_lossy().into_owned();
            let [plain, calibrated] =
                ["plain", "calibrated"].map(|kind| root.path().join(format!("{name}-{format}-{kind}")));
            save(&from, &plain, format, nearest).unwrap();
            let mut told = Vec::new();
            let report = save_calibrated(&from, &calibrated, format, text, &mut |done| told.push(*done)).unwrap();
            assert_eq!((report.tokens, &report.layers), (48 * 64, &told));
            let distance = |dir: &Path| {
                let weights: Model = Model::load_dequantized(dir, &Device::Cpu).unwrap();
                let got = hidden_of(weights.decoder(), others);
                let errors: f64 = got.iter().zip(&want).map(|(a, b)| (a - b) * (a - b)).sum();
                (errors / want.iter().map(|x| x * x).sum::<f64>()).sqrt()
            };
            let (plain, calibrated) = (distance(&plain), distance(&calibrated));
            println!("{name} {format}: {plain:.4} nearest, {calibrated:.4} calibrated");
            assert!(calibrated > 0.0 && calibrated < 0.9 * plain, "{name} {format}: {calibrated} {plain}");
        }
    }
}

/// Layer by layer by hand: inputs come from the layers before as they are quantized, and these compute as the folder does.
#[test]
fn inputs_come_from_quantized_layers() {
    let root = tempfile::tempdir().unwrap();
    let (from, text) = (teacher(root.path()), batches(1024, 16, 262));
    for format in FORMATS {
        let to = root.path().join(format!("calibrated-{format}"));
        save_calibrated(&from, &to, format, &text, &mut |_| {}).unwrap();

        let (plain, mut matrices) = (root.path().join(format!("plain-{format}")), Vec::new());
        save(&from, &plain, format, |matrix| {
            matrices.push((matrix.parameter.to_owned(), matrix.values.to_vec(), matrix.shape));
            nearest(matrix)
        })
        .unwrap();
        let mut pass = LayerwisePass::open(&from, &text).unwrap();
        let mut all: HashMap<String, IntegerMatrix> = HashMap::new();
        for _ in 0..6 {
            let inputs = Arc::new(LayerInputs::default());
            pass.observe(Arc::clone(&inputs) as Arc<dyn ProductObserver>).unwrap();
            let inputs = inputs.take();
            let mut of_layer = HashMap::new();
            for (name, values, shape) in matrices.iter().filter(|(name, ..)| pass.is_next(name)) {
                let moments = inputs.inputs_of(name).map(|at| inputs.moments(at));
                let integers = match moments.filter(|moments| moments.tokens() >= shape[1]) {
                    Some(moments) => quantize(format, values, *shape, &Factor::new(moments).unwrap()).unwrap(),
                    None => IntegerMatrix::nearest(format, values, *shape).unwrap(),
                };
                of_layer.insert(name.clone(), integers);
            }
            all.extend(of_layer.clone());
            pass.advance(format, of_layer).unwrap();
        }
        let by_hand = root.path().join(format!("by-hand-{format}"));
        save(&from, &by_hand, format, |matrix| Ok(all[matrix.parameter].clone())).unwrap();
        assert!(weights(&to) == weights(&by_hand), "{format}");
        assert!(weights(&to) != weights(&plain), "{format}");
        let at_the_end: Vec<f64> = pass.hidden().unwrap().iter().flat_map(values).collect();
        assert_eq!(at_the_end, hidden(&to, &text), "{format}");
    }
}

/// The gate of an expert that is another's: of two alike the first is chosen. Scales stay finite, its integers are the nearest.
#[test]
fn an_expert_that_sees_nothing_is_rounded_to_the_nearest() {
    let root = tempfile::tempdir().unwrap();
    let from = root.path().join("unseen");
    let model = Gpt::new(shape(), 5, &Device::Cpu).unwrap();
    let (_, gate) = model.params().iter().find(|(name, _)| name == "model.layers.3.mlp.gate.weight").unwrap();
    let rows = [0, 1, 2, 0].map(|row| gate.get(row).unwrap());
    gate.set(&candle_core::Tensor::stack(&rows, 0).unwrap()).unwrap();
    write(&model, &from);
    let text = batches(8192, 16, 262);
    for format in FORMATS {
        let [plain, to] = ["plain", "calibrated"].map(|kind| root.path().join(format!("{kind}-{format}")));
        save(&from, &plain, format, nearest).unwrap();
        let report = save_calibrated(&from, &to, format, &text, &mut |_| {}).unwrap();
        let experts: Vec<_> = report.layers.iter().map(|of| (of.layer, of.experts, of.nearest_experts > 0)).collect();
        assert_eq!(experts[3], (3, 4, true), "{report:?}");
        assert_eq!(
            experts.iter().map(|(layer, experts, _)| (*layer, *experts)).collect::<Vec<_>>(),
            [(0, 0), (1, 2), (2, 0), (3, 4), (4, 0), (5, 4)]
        );
        // Attention's two, and of each expert and the fixed branch another two.
        assert!(report.layers[5].moment_bytes >= (2 * 16 * 16 + 2 * (16 * 16 + 64 * 64)) * 4);
        let load = |dir: &Path| Model::load_dequantized(dir, &Device::Cpu).unwrap();
        let (plain, got): (Gpt, Gpt) = (load(&plain), load(&to));
        let stack = |model: &Gpt, layer: usize, expert: usize| {
            let name = format!("model.layers.{layer}.mlp.experts.fc_out.weight");
            let (_, stack) = model.params().iter().find(|(own, _)| *own == name).unwrap();
            values(&stack.get(expert).unwrap())
        };
        assert_eq!(stack(&got, 3, 3), stack(&plain, 3, 3), "{format}");
        assert!((0..3).any(|expert| stack(&got, 3, expert) != stack(&plain, 3, expert)), "{format}");
        assert!(stack(&got, 3, 3).iter().chain(&hidden(&to, &text[..2])).all(|x| x.is_finite()), "{format}");
    }
}

/// Fewer tokens than any matrix has inputs.
#[test]
fn hardly_any_text_gives_the_nearest_integers() {
    let root = tempfile::tempdir().unwrap();
    let from = teacher(root.path());
    let text = [TokenBatch { input_ids: vec![5; 15], target_ids: vec![5; 15], batch: 1, seq_len: 15 }];
    for format in FORMATS {
        let [plain, to] = ["plain", "calibrated"].map(|kind| root.path().join(format!("{kind}-{format}")));
        save(&from, &plain, format, nearest).unwrap();
        let report = save_calibrated(&from, &to, format, &text, &mut |_| {}).unwrap();
        assert!(report.layers.iter().all(|of| of.nearest_experts == of.experts), "{report:?}");
        assert!(weights(&to) == weights(&plain), "{format}");
    }
}

#[test]
fn what_cannot_be_calibrated_is_told() {
    let root = tempfile::tempdir().unwrap();
    let (from, to) = (teacher(root.path()), root.path().join("x"));
    let fails = |from: &Path, batches: &[TokenBatch]| {
        let text = save_calibrated(from, &to, QuantFormat::INT4, batches, &mut |_| {}).unwrap_err().to_string();
        assert!(!to.exists(), "{text}");
        text
    };
    assert!(fails(&from, &[]).contains("a calibration needs tokens"));
    let outside = TokenBatch { input_ids: vec![262; 8], target_ids: vec![0; 8], batch: 1, seq_len: 8 };
    assert!(fails(&from, &[outside]).contains("token id 262 is outside the vocabulary of 262"));
    // Activations whose squares are no numbers any more.
    let large = root.path().join("large");
    let model = Gpt::new(shape(), 5, &Device::Cpu).unwrap();
    let (_, bias) = model.params().iter().find(|(name, _)| name == "model.layers.0.mlp.fc_in.bias").unwrap();
    bias.set(&candle_core::Tensor::full(1e30f32, bias.dims(), &Device::Cpu).unwrap()).unwrap();
    write(&model, &large);
    let text = fails(&large, &batches(1024, 16, 262));
    assert!(text.contains("model.layers.0.mlp.fc_out.weight: inputs") && text.contains("not finite"), "{text}");
}
