//! Against PyTorch: a dense model against transformers' GPT-2, the optimizer against `torch.optim.AdamW`.
//! `fixtures/make.py` made the files.

use candle_core::{Device, Tensor, Var};
use moe_core::testing::{assert_close, values};
use moe_models::gpt::{Gpt, Pass, TokenBatch};
use moe_models::train::optimizer::{AdamW, AdamWConfig, Owned, Units, UpdateRule};
use moe_models::{CausalLm, Decoder, LogitsOf, PoolConfig, SequenceStep};
use std::collections::HashMap;
use std::path::PathBuf;

pub(crate) fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

pub(crate) fn read(name: &str) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(fixtures().join(name), &Device::Cpu).unwrap()
}

/// The logits of every token of one sequence.
pub(crate) fn logits(decoder: &Decoder, token_ids: &[u32]) -> Tensor {
    let config = PoolConfig::for_tokens(1, decoder.max_seq_len());
    let pool = decoder.new_pool(config).unwrap();
    let step = SequenceStep { sequence: &mut pool.sequence(), token_ids, logits: LogitsOf::All };
    decoder.forward(&mut [step], &pool).unwrap().logits
}

#[test]
fn dense_model_equals_gpt2_of_transformers() {
    let model = Gpt::load(&fixtures().join("gpt2"), &Device::Cpu).unwrap();
    let expected = read("gpt2/expected.safetensors");
    let ids = |name: &str| expected[name].flatten_all().unwrap().to_vec1::<u32>().unwrap();
    let batch = TokenBatch { input_ids: ids("input_ids"), target_ids: ids("target_ids"), batch: 2, seq_len: 20 };
    for sequence in 0..2 {
        let tokens = &batch.input_ids[sequence * 20..][..20];
        let logits = logits(model.decoder(), tokens);
        assert_close(&logits, &expected["logits"].get(sequence).unwrap(), 5e-5, "logits");
    }
    let output = model.loss(&batch, Pass::train(1)).unwrap();
    let want = values(&expected["loss"])[0];
    assert!((output.parts.lm - want).abs() < 1e-5, "loss {} want {want}", output.parts.lm);
    let grads = output.loss.backward().unwrap();
    for (name, var) in model.params() {
        assert_close(grads.get(var).unwrap(), &expected[&format!("grad.{name}")], 2e-5, name);
    }
}

#[test]
fn adamw_equals_pytorch() {
    let expected = read("adamw.safetensors");
    let var = |name: &str| Var::from_tensor(&expected[name]).unwrap();
    let params = vec![("weight".to_owned(), var("weight.0")), ("bias".to_owned(), var("bias.0"))];
    let config = AdamWConfig { weight_decay: 0.1, clip_grad: 1.0, ..AdamWConfig::default() };
    let mut optimizer = {
        let owned = Owned::everything(Units::of_params(&params).unwrap());
        AdamW::new(config, owned, [true, false].map(UpdateRule::decays).to_vec()).unwrap()
    };
    for step in 1..=6 {
        let grad =
            |name: &str| expected[&format!("{name}.grad.{step}")].flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let report = optimizer.step(&params, &[grad("weight"), grad("bias")], 1.0, 0.05 / f64::from(step)).unwrap();
        let norm = values(&expected[&format!("norm.{step}")])[0];
        assert!((report.grad_norm - norm).abs() < 1e-5 * norm, "step {step}: norm {} want {norm}", report.grad_norm);
        for (name, var) in &params {
            assert_close(var, &expected[&format!("{name}.{step}")], 1e-6, &format!("{name} after step {step}"));
        }
    }
}
