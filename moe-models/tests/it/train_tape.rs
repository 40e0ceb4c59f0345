//! Gradients of whole models as the trainer takes them, against candle's own graph: of the same kernels in f32, and of ordinary
//! operations in f64.

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use moe_core::{CandleOps, CounterRng};
use moe_models::gpt::{Gpt, GptConfig};
use moe_models::train::TrainModel;
use moe_models::train::step::{StepBuffers, accumulate};
use moe_models::{Decoder, DropoutConfig, Family, Model, Pass, Recompute, TokenBatch, TrainPass};
use std::collections::HashMap;
use std::sync::Arc;

const SEEDS: [u64; 2] = [11, 12];
const SOME: DropoutConfig = DropoutConfig { attention: 0.25, hidden: 0.1 };

fn batches(vocab_size: usize, seq_len: usize) -> [TokenBatch; 2] {
    SEEDS.map(|seed| {
        let mut rng = CounterRng::new(seed, 0);
        let mut ids = || (0..2 * seq_len).map(|_| rng.below(vocab_size as u32)).collect();
        TokenBatch { input_ids: ids(), target_ids: ids(), batch: 2, seq_len }
    })
}

/// Largest difference over the largest value.
fn distance(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let largest = want.iter().fold(1e-6f64, |most, v| most.max(v.abs()));
    let worst = got.iter().zip(want).fold(0f64, |worst, (g, w)| worst.max((f64::from(*g) - w).abs()));
    worst / largest
}

fn flat(tensor: &Tensor) -> Vec<f64> {
    tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// Sums over the micro-batches by candle's backward pass, by name.
fn by_candle(decoder: &Decoder, vars: &[(String, Var)], batches: &[TokenBatch]) -> HashMap<String, Vec<f64>> {
    let mut sums: HashMap<String, Vec<f64>> = HashMap::new();
    for (batch, &seed) in batches.iter().zip(&SEEDS) {
        let grads = decoder.loss(batch, Pass::train(seed)).unwrap().loss.backward().unwrap();
        for (name, var) in vars {
            let grad = grads.get(var).map_or_else(|| vec![0.0; var.elem_count()], flat);
            let sum = sums.entry(name.clone()).or_insert_with(|| vec![0.0; grad.len()]);
            sum.iter_mut().zip(grad).for_each(|(sum, grad)| *sum += grad);
        }
    }
    sums
}

fn check<F: Family>(what: &str, model: Model<F>) {
    let (vocab_size, config) = (model.decoder_config().vocab_size, model.decoder_config().clone());
    let batches = batches(vocab_size, 12);

    // The same operations in f64, over variables of their own.
    let wide: Vec<(String, Var)> = model
        .params()
        .iter()
        .map(|(name, var)| (name.clone(), Var::from_tensor(&var.to_dtype(DType::F64).unwrap()).unwrap()))
        .collect();
    let tensors = wide.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    let vb = VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu);
    let decoder = Decoder::new(config, vb, Arc::new(CandleOps)).unwrap().with_dropout(model.dropout()).unwrap();
    let in_f64 = by_candle(&decoder, &wide, &batches);
    let in_f32 = by_candle(model.training_decoder(), model.params(), &batches);

    let passes = SEEDS.map(|seed| TrainPass { seed, ..TrainPass::default() });
    let mut first: Option<Vec<Vec<u32>>> = None;
    let mut model = Some(model);
    for recompute in [Recompute::None, Recompute::Block, Recompute::Moe] {
        let this = model.take().unwrap().with_recompute(recompute);
        let mut buffers = StepBuffers::new(&this).unwrap();
        accumulate(&this, &batches, &passes, &mut buffers).unwrap();
        let grads = &buffers.grads;
        for (index, (name, _)) in TrainModel::params(&this).iter().enumerate() {
            let narrow = distance(grads.of(index), &in_f32[name]);
            let wide = distance(grads.of(index), &in_f64[name]);
            assert!(narrow < 2e-6, "{what} {recompute:?}: {name} is {narrow:e} from candle's in f32");
            assert!(wide < 1e-4, "{what} {recompute:?}: {name} is {wide:e} from candle's in f64");
        }
        let bits: Vec<Vec<u32>> = grads.all().iter().map(|g| g.iter().map(|v| v.to_bits()).collect()).collect();
        match &first {
            None => first = Some(bits),
            Some(first) => assert!(*first == bits, "{what}: {recompute:?} changes bits"),
        }
        model = Some(this);
    }
}

#[test]
fn every_gradient_of_every_family_is_that_of_candles_graph() {
    for preset in ["tiny-dense", "tiny-moe", "tiny-pr-moe"] {
        let mut shape = GptConfig::preset(preset).unwrap();
        (shape.vocab_size, shape.max_seq_len, shape.d_model, shape.d_ff, shape.num_heads) = (50, 16, 24, 40, 3);
        check(preset, Gpt::new(shape.clone(), 5, &Device::Cpu).unwrap());
        let dropping = Gpt::new(shape, 5, &Device::Cpu).unwrap().with_dropout(SOME).unwrap();
        check(&format!("{preset} with dropout"), dropping);
    }
    let dir = crate::golden::fixtures().join("qwen3_moe");
    let load = || Model::<Box<dyn Family>>::load(&dir, &Device::Cpu).unwrap();
    check("qwen3_moe", load());
    check("qwen3_moe with dropout", load().with_dropout(SOME).unwrap());
}
