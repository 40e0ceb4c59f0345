//! Parameters that are not trained: they stay, and cost nothing; the others do not notice.

use crate::train_gpt::{config, corpus, run_until, shape};
use candle_core::Device;
use moe_core::CounterRng;
use moe_models::gpt::Gpt;
use moe_models::train::step::{StepBuffers, accumulate};
use moe_models::train::{Outcome, TrainConfig, TrainModel, Trainer};
use moe_models::{Precision, Recompute, TokenBatch, TrainPass};
use std::collections::HashMap;
use std::path::Path;

/// Both embeddings (the first is the output layer too), and one stack of experts.
fn is_frozen(name: &str) -> bool {
    name.contains(".embed_") || name == "model.layers.1.mlp.experts.fc_in.weight"
}

fn model(config: &TrainConfig) -> Gpt {
    let model = Gpt::new(shape(), config.seed, &Device::Cpu).unwrap();
    model.with_precision(config.precision).unwrap().with_recompute(config.recompute)
}

fn bits(model: &Gpt) -> HashMap<String, Vec<u32>> {
    let read = |(name, var): &(String, candle_core::Var)| {
        let values = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        (name.clone(), values.iter().map(|x| x.to_bits()).collect())
    };
    model.params().iter().map(read).collect()
}

/// In both precisions and whatever is computed again: gradients of what is trained have the bits they have beside gradients of
/// everything, and no memory is kept for the rest.
#[test]
fn gradients_of_the_others_are_the_same_bits_and_buffers_smaller_by_the_frozen() {
    let mut rng = CounterRng::new(3, 0);
    let mut ids = || (0..2 * 16).map(|_| rng.below(262)).collect();
    let batches = [0, 1].map(|_| TokenBatch { input_ids: ids(), target_ids: ids(), batch: 2, seq_len: 16 });
    let passes = [7, 8].map(|seed| TrainPass { seed, ..TrainPass::default() });
    for (precision, recompute) in
        [(Precision::F32, Recompute::None), (Precision::Bf16, Recompute::None), (Precision::Bf16, Recompute::Block)]
    {
        let config = TrainConfig { precision, recompute, ..config() };
        let grads = |model: &Gpt| {
            let mut buffers = StepBuffers::new(model).unwrap();
            let sums = accumulate(model, &batches, &passes, &mut buffers).unwrap();
            let names = TrainModel::params(model).iter().map(|(name, _)| name.clone());
            let grads = buffers.grads.all().into_iter().map(|g| g.iter().map(|v| v.to_bits()).collect::<Vec<_>>());
            let elements: usize = buffers.grads.all().iter().map(|grad| grad.len()).sum();
            (sums.loss.to_bits(), names.zip(grads).collect::<HashMap<_, _>>(), elements, buffers.copies.bytes())
        };
        let (loss, all, elements, copies) = grads(&model(&config));
        let part = model(&config).with_frozen(is_frozen).unwrap();
        assert_eq!((part.precision(), part.recompute()), (precision, recompute));
        let (part_loss, some, part_elements, part_copies) = grads(&part);
        let label = format!("{precision:?} {recompute:?}");
        assert_eq!(loss, part_loss, "{label}");
        assert_eq!(some.len() + part.frozen().len(), all.len());
        assert!(some.keys().all(|name| !is_frozen(name)) && part.frozen().len() == 3);
        for (name, grad) in &some {
            assert!(*grad == all[name], "{label}: {name}");
        }
        let frozen: usize = part.frozen().iter().map(|tensor| tensor.elem_count()).sum();
        assert_eq!(elements - part_elements, frozen, "{label}: buffers");
        assert_eq!(copies, part_copies, "{label}: products share copies of frozen weights too");
    }
}

fn run(config: &TrainConfig, out: &Path, resume: Option<&Path>, stop_after: u64) -> (Outcome, Trainer<Gpt>) {
    let (corpus, tokenizer) = corpus(config);
    let mut trainer = match resume {
        None => {
            let model = model(config).with_frozen(is_frozen).unwrap();
            Trainer::new(model, config.clone(), corpus, tokenizer, out).unwrap()
        }
        Some(folder) => {
            // The order of the builder's calls is of no matter.
            let model = Gpt::load(folder, &Device::Cpu).unwrap().with_frozen(is_frozen).unwrap();
            let model = model.with_precision(config.precision).unwrap();
            Trainer::resume(model, config.clone(), corpus, tokenizer, out, folder).unwrap()
        }
    };
    (run_until(&mut trainer, stop_after), trainer)
}

#[test]
fn frozen_parameters_stay_and_a_run_resumes_exactly() {
    let config = config();
    let dir = tempfile::tempdir().unwrap();
    let before = bits(&model(&config));
    let (_, whole) = run(&config, &dir.path().join("whole"), None, u64::MAX);
    let after = bits(whole.model());
    for (name, old) in &before {
        assert_eq!(*old == after[name], is_frozen(name), "{name}");
    }
    let held: usize = whole.optimizer().moments().iter().map(|m| m.exp_avg.len() + m.exp_avg_sq.len()).sum();
    let frozen: usize = whole.model().frozen().iter().map(|tensor| tensor.elem_count()).sum();
    let all: usize = before.values().map(Vec::len).sum();
    assert_eq!(held, 2 * (all - frozen), "moments of what is trained alone");

    let out = dir.path().join("halves");
    assert_eq!(run(&config, &out, None, 7).0, Outcome::Stopped);
    let folder = out.join("step-00000007");
    // Frozen parameters are in the checkpoint, so the folder is a whole model.
    let saved = bits(&Gpt::load(&folder, &Device::Cpu).unwrap());
    assert!(before.iter().filter(|(name, _)| is_frozen(name)).all(|(name, bits)| saved[name] == *bits));
    // Whoever forgets to freeze is told.
    let (data, tokenizer) = corpus(&config);
    let thawed = Gpt::load(&folder, &Device::Cpu).unwrap().with_precision(config.precision).unwrap();
    let message = Trainer::resume(thawed, config.clone(), data, tokenizer, &out, &folder).unwrap_err().to_string();
    assert!(message.contains("frozen"), "{message}");

    let (_, resumed) = run(&config, &out, Some(&folder), u64::MAX);
    assert!(bits(resumed.model()) == after);
    assert_eq!(resumed.optimizer(), whole.optimizer());
}

#[test]
fn a_model_with_nothing_to_train_is_refused() {
    let message = model(&config()).with_frozen(|_| true).unwrap_err().to_string();
    assert!(message.contains("nothing to train"), "{message}");
    let thawed = model(&config()).with_frozen(is_frozen).and_then(|m| m.with_frozen(|_| false)).unwrap();
    assert_eq!(thawed.trainable().len(), thawed.params().len(), "the last call counts");
}
