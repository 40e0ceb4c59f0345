//! Gradient accumulation against single micro-batches.

use crate::toy::{Toy, VOCAB};
use moe_models::Error;
use moe_models::train::TrainModel;
use moe_models::train::evaluate::add_losses;
use moe_models::train::model::{Pass, TokenBatch, TrainPass};
use moe_models::train::step::{StepBuffers, accumulate};
use std::sync::atomic::Ordering;

fn batch(salt: u32) -> TokenBatch {
    let ids: Vec<u32> = (0..17).map(|i| (i * 31 + salt * 7) % VOCAB as u32).collect();
    TokenBatch { input_ids: ids[..16].to_vec(), target_ids: ids[1..].to_vec(), batch: 2, seq_len: 8 }
}

fn pass(seed: u64) -> TrainPass {
    TrainPass { seed, ..TrainPass::default() }
}

#[test]
fn sums_are_those_of_the_micro_batches_in_order() {
    let toy = Toy::new(1);
    let (batches, passes): (Vec<_>, Vec<_>) = (0..5).map(|i| (batch(i), pass(u64::from(i) + 40))).unzip();
    let mut buffers = StepBuffers::new(&toy).unwrap();
    let sums = accumulate(&toy, &batches, &passes, &mut buffers).unwrap();
    let mut want: Vec<Vec<f32>> = toy.params().iter().map(|(_, var)| vec![0.0; var.elem_count()]).collect();
    let mut loss = 0.0;
    for (batch, &pass) in batches.iter().zip(&passes) {
        let output = toy.loss(batch, Pass::Train(pass)).unwrap();
        loss += output.parts.lm;
        let grads = output.loss.backward().unwrap();
        for ((_, var), sum) in toy.params().iter().zip(&mut want) {
            let grad = grads.get(var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            sum.iter_mut().zip(grad).for_each(|(s, g)| *s += g);
        }
    }
    assert_eq!(buffers.grads.all(), want);
    assert_eq!((sums.micro_batches, sums.parts.lm), (5, loss * (1.0 / 5.0)));
    assert_eq!(sums.layers[0].load.tokens_per_expert.iter().sum::<u32>(), 5 * 16);
    assert_eq!(sums.layers[0].load.dropped, 5);
}

#[test]
fn a_bad_micro_batch_is_an_error() {
    let toy = Toy::new(1);
    let mut bad = batch(3);
    bad.input_ids[0] = VOCAB as u32;
    let mut buffers = StepBuffers::new(&toy).unwrap();
    assert!(accumulate(&toy, &[batch(0), bad, batch(2)], &[1, 2, 3].map(pass), &mut buffers).is_err());
    assert!(accumulate(&toy, &[batch(0)], &[1, 2].map(pass), &mut buffers).is_err());
    assert!(accumulate(&toy, &[], &[], &mut buffers).is_err());
}

/// A run that ends with an error keeps the checkpoints it has, and the buffers can be used again.
#[test]
fn a_panic_of_the_model_is_an_error_with_its_text() {
    let toy = Toy::new(1);
    let mut buffers = StepBuffers::new(&toy).unwrap();
    let (batches, passes) = ([batch(0), batch(1)], [1, 2].map(pass));
    accumulate(&toy, &batches, &passes, &mut buffers).unwrap();
    let want: Vec<Vec<f32>> = buffers.grads.all().iter().map(|g| g.to_vec()).collect();
    toy.panics.store(true, Ordering::Relaxed);
    let error = accumulate(&toy, &batches, &passes, &mut buffers).unwrap_err();
    assert!(matches!(error, Error::Panic { micro_batch: 0, .. }), "{error:?}");
    let text = error.to_string();
    assert!(text.contains("micro-batch 0") && text.contains("out of bounds"), "{text}");
    let error = add_losses(&toy, &[(0, batch(0))], &mut []).unwrap_err();
    assert!(matches!(error, Error::Panic { micro_batch: 0, .. }), "{error:?}");
    toy.panics.store(false, Ordering::Relaxed);
    accumulate(&toy, &batches, &passes, &mut buffers).unwrap();
    assert_eq!(buffers.grads.all(), want);
}
