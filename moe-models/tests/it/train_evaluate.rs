//! Validation in numbers that can be worked out by hand.

use crate::toy::{Toy, VOCAB, config, corpus};
use moe_models::train::TrainModel;
use moe_models::train::evaluate::evaluate;

/// A model of zeros gives every token the probability 1 / vocabulary.
#[test]
fn a_uniform_model_costs_the_logarithm_of_the_vocabulary() {
    let toy = Toy::new(1);
    toy.params().iter().for_each(|(_, var)| var.set(&var.zeros_like().unwrap()).unwrap());
    let (corpus, _) = corpus(&config());
    let result = evaluate(&toy, &corpus.valid, 2, 1).unwrap();
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
fn neither_workers_nor_repetition_change_the_result() {
    let toy = Toy::new(1);
    let (corpus, _) = corpus(&config());
    let one = evaluate(&toy, &corpus.valid, 1, 1).unwrap();
    assert_eq!(one, evaluate(&toy, &corpus.valid, 1, 3).unwrap());
    assert_eq!(one, evaluate(&toy, &corpus.valid, 1, 1).unwrap());
    let wider = evaluate(&toy, &corpus.valid, 2, 2).unwrap();
    assert!((one.loss() - wider.loss()).abs() < 1e-5, "the batch size only regroups the windows");
}
