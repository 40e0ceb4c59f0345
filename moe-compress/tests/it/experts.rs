//! What experts do, and models that are left with fewer.

use crate::teacher::shape;
use candle_core::{Device, Tensor};
use moe_compress::experts::{measure, merge, prune};
use moe_core::testing::{assert_close, values};
use moe_models::Pass;
use moe_models::gpt::{Gpt, GptConfig};
use moe_models::train::model::TokenBatch;

fn model() -> Gpt {
    Gpt::new(shape(), 11, &Device::Cpu).unwrap()
}

fn batches() -> Vec<TokenBatch> {
    let batch = |salt: usize| {
        let input_ids: Vec<u32> = (0..32).map(|i| ((i * i * 7 + salt * i + salt) % 262) as u32).collect();
        TokenBatch { target_ids: input_ids.clone(), input_ids, batch: 2, seq_len: 16 }
    };
    (0..4).map(batch).collect()
}

fn hidden(model: &Gpt) -> Tensor {
    let batch = &batches()[1];
    model.decoder().hidden(&batch.input_ids, 16, Pass::Eval).unwrap().0
}

fn param<'a>(model: &'a Gpt, name: &str) -> &'a Tensor {
    model.params().iter().find(|(own, _)| own == name).unwrap().1.as_tensor()
}

/// Rows as the pass itself counts them; contributions follow an expert's outputs.
#[test]
fn what_experts_do_is_measured() {
    let model = model();
    let usage = measure(model.decoder(), &batches()).unwrap();
    assert_eq!(usage.iter().map(|of| of.layer).collect::<Vec<_>>(), [1, 3, 5]);
    for (number, of) in usage.iter().enumerate() {
        let mut rows = vec![0; of.rows.len()];
        for batch in batches() {
            let (_, outputs) = model.decoder().hidden(&batch.input_ids, 16, Pass::Eval).unwrap();
            let load = &outputs[number].1.load.tokens_per_expert;
            rows.iter_mut().zip(load).for_each(|(sum, &more)| *sum += u64::from(more));
        }
        assert_eq!((rows.iter().sum::<u64>(), &rows), (128, &of.rows));
        // An expert without rows contributes nothing, one with rows something.
        assert!(of.rows.iter().zip(&of.contributions).all(|(&rows, &sum)| (rows > 0) == (sum > 0.0)));
    }
    // Twice the output is twice the contribution.
    let doubled = self::model();
    for name in ["model.layers.5.mlp.experts.fc_out.weight", "model.layers.5.mlp.experts.fc_out.bias"] {
        let var = &doubled.params().iter().find(|(own, _)| own == name).unwrap().1;
        var.set(&(var.as_tensor() * 2.0).unwrap()).unwrap();
    }
    let twice = measure(doubled.decoder(), &batches()).unwrap();
    assert_eq!(twice[2].rows, usage[2].rows);
    for (twice, once) in twice[2].contributions.iter().zip(&usage[2].contributions) {
        assert!((twice - 2.0 * once).abs() < 1e-3 * (1.0 + once), "{twice} {once}");
    }
}

#[test]
fn with_all_experts_kept_it_is_the_same_model() {
    let model = model();
    let all = [vec![0, 1], vec![0, 1, 2, 3], vec![0, 1, 2, 3]];
    for same in
        [prune(&model, &all).unwrap(), merge(&model, &all, &measure(model.decoder(), &batches()).unwrap()).unwrap()]
    {
        assert_eq!(values(&hidden(&same)), values(&hidden(&model)));
    }
}

#[test]
fn what_is_left_of_each_layer() {
    let model = model();
    let kept = [vec![1], vec![0, 3], vec![0, 1, 2]];
    let pruned = prune(&model, &kept).unwrap();
    assert_eq!(pruned.config().moe.as_ref().unwrap().num_experts, [1, 2, 3]);
    let name = "model.layers.3.mlp.experts.fc_in.weight";
    for (at, expert) in [0, 3].into_iter().enumerate() {
        assert_eq!(values(&param(&pruned, name).get(at).unwrap()), values(&param(&model, name).get(expert).unwrap()));
        let gate = "model.layers.3.mlp.gate.weight";
        assert_eq!(values(&param(&pruned, gate).get(at).unwrap()), values(&param(&model, gate).get(expert).unwrap()));
    }
    // Of a layer that keeps one expert of two, the other becomes a part of it.
    let usage = measure(model.decoder(), &batches()).unwrap();
    let merged = merge(&model, &kept, &usage).unwrap();
    let rows: Vec<f64> = usage[0].rows.iter().map(|&rows| rows as f64 / 128.0).collect();
    let name = "model.layers.1.mlp.experts.fc_out.weight";
    let part = |expert: usize| (param(&model, name).get(expert).unwrap() * rows[expert]).unwrap();
    let want = (part(0) + part(1)).unwrap();
    assert_close(&param(&merged, name).get(0).unwrap(), &want, 1e-6, "merged by rows");
    assert!(values(&hidden(&merged)).iter().all(|x| x.is_finite()));
}

#[test]
fn what_does_not_fit_is_refused() {
    let (model, usage) = (model(), measure(model().decoder(), &batches()).unwrap());
    for kept in [
        vec![vec![0]],
        vec![vec![], vec![0], vec![0]],
        vec![vec![1, 0], vec![0], vec![0]],
        vec![vec![2], vec![0], vec![0]],
    ] {
        let text = prune(&model, &kept).unwrap_err().to_string();
        assert!(text.contains("for each of the 3 layers"), "{text}");
    }
    let other = Gpt::new(
        GptConfig {
            num_layers: 4,
            ..{
                let mut config = shape();
                config.moe.as_mut().unwrap().num_experts = vec![2, 4];
                config
            }
        },
        1,
        &Device::Cpu,
    )
    .unwrap();
    let text = merge(&other, &[vec![0], vec![0]], &usage).unwrap_err().to_string();
    assert!(text.contains("measured on another model"), "{text}");
}
