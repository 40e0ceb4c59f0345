//! Order, blend and resumption of the sampler.

use super::*;
use crate::train::data::{Documents, Packer};
use crate::train::tokenizer::train_bpe;

/// A source whose text is `letter` repeated; one token per letter keeps the counts plain.
fn source(letter: char, tokens: usize) -> PackedSource {
    let text: String =
        (0..tokens / 2).map(|i| if i % 7 == 0 { format!("{letter}\n") } else { format!("{letter} ") }).collect();
    let documents = Documents { name: letter.to_string(), weight: None, texts: vec![text] };
    let tokenizer = train_bpe(std::slice::from_ref(&documents), 257).unwrap();
    Packer::new(&tokenizer, 0, 257).unwrap().pack(&documents).unwrap()
}

fn sampler(seed: u64) -> SequenceSampler {
    let sources = vec![source('a', 500), source('b', 90), source('c', 300)];
    SequenceSampler::new(sources, &[3.0, 1.0, 2.0], 8, seed).unwrap()
}

fn draw(sampler: &mut SequenceSampler, count: usize) -> Vec<(usize, Vec<u32>, Vec<u32>)> {
    (0..count)
        .map(|_| {
            let (mut inputs, mut targets) = (Vec::new(), Vec::new());
            let source = sampler.draw(&mut inputs, &mut targets);
            (source, inputs, targets)
        })
        .collect()
}

#[test]
fn the_same_seed_draws_the_same_and_another_does_not() {
    assert_eq!(draw(&mut sampler(5), 300), draw(&mut sampler(5), 300));
    assert_ne!(draw(&mut sampler(5), 300), draw(&mut sampler(6), 300));
}

#[test]
fn a_restored_position_continues_exactly() {
    let mut whole = sampler(5);
    let all = draw(&mut whole, 250);
    for stop in [0, 1, 11, 137, 249] {
        let mut first = sampler(5);
        draw(&mut first, stop);
        let saved = serde_json::to_string(first.position()).unwrap();
        let mut resumed = sampler(5);
        resumed.seek(serde_json::from_str(&saved).unwrap()).unwrap();
        assert_eq!(resumed.position(), first.position());
        assert_eq!(draw(&mut resumed, 250 - stop), all[stop..], "stopped after {stop}");
        assert_eq!(resumed.position(), whole.position());
    }
    assert!(sampler(5).seek(DataPosition { drawn: vec![1] }).is_err());
}

#[test]
fn the_blend_never_strays_by_more_than_one_sequence_per_source() {
    let mut sampler = sampler(1);
    let shares = [0.5, 1.0 / 6.0, 1.0 / 3.0];
    for n in 1..=600 {
        draw(&mut sampler, 1);
        for (drawn, share) in sampler.position().drawn.iter().zip(shares) {
            assert!((*drawn as f64 - share * n as f64).abs() <= 1.5, "after {n}: {:?}", sampler.position());
        }
    }
    assert_eq!(sampler.position().drawn, [300, 100, 200]);
}

#[test]
fn every_epoch_is_a_new_permutation() {
    let one = source('a', 400);
    let count = one.num_sequences(8);
    let mut sampler = SequenceSampler::new(vec![one], &[1.0], 8, 3).unwrap();
    let epochs: Vec<Vec<usize>> =
        (0..3).map(|epoch| (0..count).map(|rank| sampler.shuffled(0, epoch, rank)).collect()).collect();
    for epoch in &epochs {
        let mut sorted = epoch.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..count).collect::<Vec<_>>());
    }
    assert_ne!(epochs[0], epochs[1]);
    assert_ne!(epochs[1], epochs[2]);
    assert_ne!(epochs[0], (0..count).collect::<Vec<_>>(), "shuffled at all");
}

#[test]
fn impossible_blends_are_refused() {
    for (sources, weights, word) in [
        (vec![], &[][..], "no training data"),
        (vec![source('a', 400)], &[1.0, 2.0], "positive weights"),
        (vec![source('a', 400)], &[0.0], "positive weights"),
        (vec![source('a', 6)], &[1.0], "too few"),
    ] {
        let message = SequenceSampler::new(sources, weights, 8, 0).unwrap_err().to_string();
        assert!(message.contains(word), "{message}");
    }
}

#[test]
fn weights_come_from_the_user_or_from_the_tokens() {
    let mut sources = vec![source('a', 500), source('b', 90)];
    let tokens: Vec<f64> = sources.iter().map(|s| s.num_tokens() as f64).collect();
    assert_eq!(blend_weights(&sources, Blend::Tokens).unwrap(), tokens);
    assert_eq!(blend_weights(&sources, Blend::Equal).unwrap(), [1.0, 1.0]);
    sources[1].weight = Some(2.5);
    assert_eq!(blend_weights(&sources, Blend::Equal).unwrap(), [1.0, 2.5]);
    assert!(blend_weights(&sources, Blend::Tokens).unwrap_err().to_string().contains("source b"));
}
