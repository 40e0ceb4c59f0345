//! Validation in numbers that can be worked out by hand.

use crate::toy::{Toy, VOCAB, config, corpus};
use moe_models::gpt::{Gpt, GptConfig, IGNORED};
use moe_models::train::TrainModel;
use moe_models::train::evaluate::{SourceLoss, add_losses, evaluate};
use moe_models::train::model::TokenBatch;

/// A model of zeros gives every token the probability 1 / vocabulary.
#[test]
fn a_uniform_model_costs_the_logarithm_of_the_vocabulary() {
    let toy = Toy::new(1);
    toy.params().iter().for_each(|(_, var)| var.set(&var.zeros_like().unwrap()).unwrap());
    let (corpus, _) = corpus(&config());
    let result = evaluate(&toy, &corpus.valid, 2).unwrap();
    assert_eq!(result.sources.len(), 2);
    assert!((result.loss() - (VOCAB as f64).ln()).abs() < 1e-5);
    let (mut tokens, mut bytes) = (0, 0);
    for (source, valid) in result.sources.iter().zip(&corpus.valid) {
        assert_eq!((source.tokens, source.bytes), (valid.num_targets() as u64, valid.target_bytes()));
        let bits = source.tokens as f64 * (VOCAB as f64).log2() / source.bytes as f64;
        assert!((source.bits_per_byte() - bits).abs() < 1e-5 * bits, "{}: {}", source.name, source.bits_per_byte());
        (tokens, bytes) = (tokens + source.tokens, bytes + source.bytes);
    }
    let bits = tokens as f64 * (VOCAB as f64).log2() / bytes as f64;
    assert!((result.bits_per_byte() - bits).abs() < 1e-5 * bits);
}

#[test]
fn repetition_does_not_change_the_result() {
    let toy = Toy::new(1);
    let (corpus, _) = corpus(&config());
    let one = evaluate(&toy, &corpus.valid, 1).unwrap();
    assert_eq!(one, evaluate(&toy, &corpus.valid, 1).unwrap());
    let wider = evaluate(&toy, &corpus.valid, 2).unwrap();
    assert!((one.loss() - wider.loss()).abs() < 1e-5, "the batch size only regroups the windows");
}

/// Batches of which 8, 1 and 0 targets count must weigh 8 to 1 to 0, whatever they are grouped with.
#[test]
fn ignored_targets_weigh_nothing() {
    let mut shape = GptConfig::preset("tiny-dense").unwrap();
    (shape.vocab_size, shape.max_seq_len, shape.d_model, shape.d_ff, shape.num_layers) = (50, 8, 16, 32, 2);
    let model = Gpt::new(shape, 7, &candle_core::Device::Cpu).unwrap();
    let batch = |salt: u32, counted: std::ops::Range<usize>| {
        let ids: Vec<u32> = (0..9).map(|i| (i * i * 3 + salt * 11) % 50).collect();
        let target = |i: usize| if counted.contains(&i) { ids[i + 1] } else { IGNORED };
        TokenBatch { target_ids: (0..8).map(target).collect(), input_ids: ids[..8].to_vec(), batch: 1, seq_len: 8 }
    };
    let total = |batches: &[TokenBatch]| {
        let mut result = [SourceLoss { name: "s".into(), tokens: 0, bytes: 1, nats: 0.0 }];
        let batches: Vec<_> = batches.iter().map(|batch| (0, batch.clone())).collect();
        add_losses(&model, &batches, &mut result).unwrap();
        (result[0].tokens, result[0].nats)
    };
    let (tokens, nats) = total(&[batch(1, 0..8), batch(2, 3..4), batch(3, 0..0)]);
    let one_by_one: Vec<TokenBatch> = (0..8).map(|i| batch(1, i..i + 1)).chain([batch(2, 3..4)]).collect();
    let want: f64 = one_by_one.iter().map(|batch| total(std::slice::from_ref(batch)).1).sum();
    assert_eq!(tokens, 9);
    assert!((nats - want).abs() < 1e-4 && want > 1.0, "{nats} nats, target by target {want}");
}
