//! Dense models that became mixtures say what they said.

use crate::teacher::shape;
use candle_core::{Device, Tensor};
use moe_compress::upcycle::{Upcycling, upcycle};
use moe_core::testing::{assert_close, values};
use moe_core::{Capacity, CounterRng};
use moe_models::Pass;
use moe_models::gpt::{Gpt, GptConfig, GptMoeConfig};

fn dense() -> Gpt {
    Gpt::new(GptConfig { moe: None, ..shape() }, 3, &Device::Cpu).unwrap()
}

fn mixture(num_experts: Vec<usize>, top_k: usize) -> GptMoeConfig {
    let capacity = Capacity { train_factor: None, eval_factor: None, ..Capacity::DEEPSPEED };
    GptMoeConfig { top_k, capacity, ..GptMoeConfig::paper(num_experts, false) }
}

fn ids() -> Vec<u32> {
    let mut rng = CounterRng::new(1, 1);
    (0..64).map(|_| (rng.uniform_f64() * 262.0) as u32).collect()
}

fn logits(model: &Gpt) -> Tensor {
    let (hidden, _) = model.decoder().hidden(&ids(), 16, Pass::Eval).unwrap();
    model.decoder().head().logits(&hidden).unwrap()
}

#[test]
fn logits_stay_as_they_were() {
    let dense = dense();
    let want = logits(&dense);
    let every = |num_experts: usize, top_k| GptMoeConfig { expert_interval: 1, ..mixture(vec![num_experts; 6], top_k) };
    for (moe, granularity) in [
        (mixture(vec![4, 4, 8], 2), 1),
        (GptMoeConfig { residual: true, ..mixture(vec![2, 3, 5], 2) }, 1),
        (mixture(vec![5; 3], 4), 1),
        (every(8, 2), 2),
        (every(8, 4), 2),
        (every(12, 4), 4),
        (every(16, 8), 8),
    ] {
        let model = upcycle(&dense, &Upcycling { moe: moe.clone(), granularity, seed: 7 }).unwrap();
        assert_eq!(model.config().d_ff, 64 / granularity);
        let largest = values(&want).iter().fold(0f64, |a, b| a.max(b.abs()));
        assert_close(
            &(logits(&model) / largest).unwrap(),
            &(&want / largest).unwrap(),
            2e-6,
            &format!("{moe:?} {granularity}"),
        );
        if granularity > 1 {
            // In training too the parts of a copy are chosen together.
            let (hidden, _) = model.training_decoder().hidden(&ids(), 16, Pass::train(9)).unwrap();
            let trained = (model.decoder().head().logits(&hidden).unwrap() / largest).unwrap();
            assert_close(&trained, &(&want / largest).unwrap(), 2e-6, &format!("{moe:?} {granularity}, in training"));
        }
        // Rows are spread: the gates are not all alike.
        let (hidden, outputs) = model.decoder().hidden(&[1, 7, 30, 200, 5, 6, 9, 99], 8, Pass::Eval).unwrap();
        assert!(
            hidden.dims2().unwrap().0 == 8
                && outputs.iter().any(|(_, output)| {
                    output.load.tokens_per_expert.iter().filter(|&&rows| rows > 0).count() > moe.top_k
                })
        );
    }
}

#[test]
fn mixtures_that_would_say_something_else_are_refused() {
    let refused = |model: &Gpt, moe: GptMoeConfig, granularity| {
        upcycle(model, &Upcycling { moe, granularity, seed: 1 }).unwrap_err().to_string()
    };
    let every = |num_experts, top_k| GptMoeConfig { expert_interval: 1, ..mixture(vec![num_experts; 6], top_k) };
    for (moe, granularity, part) in [
        (mixture(vec![4; 3], 1), 1, "2 or more"),
        (every(6, 2), 0, "granularity must divide"),
        (every(6, 3), 3, "granularity must divide the inner width 64"),
        (every(6, 3), 2, "multiples of the granularity 2"),
        (mixture(vec![4; 3], 2), 2, "experts in every layer"),
        (mixture(vec![4; 2], 2), 1, "each of the 3 MoE layers"),
    ] {
        let text = refused(&dense(), moe, granularity);
        assert!(text.contains(part), "{text}");
    }
    let moe = Gpt::new(shape(), 1, &Device::Cpu).unwrap();
    assert!(refused(&moe, every(4, 2), 1).contains("experts already"));
}
