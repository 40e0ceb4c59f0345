//! Scores and generated texts against brute force: one sequence at a time, nothing shared.

use crate::eval_request::{model_folder, tokenizer};
use candle_core::Device;
use moe_compress::eval::{Generator, LogLikelihood, RequestEncoder, Scorer, TokenRequest};
use moe_models::gpt::{Gpt, GptConfig};
use moe_models::{CausalLm, Decoder, IGNORED, LogitsOf, Pass, PoolConfig, Precision, SequenceStep, TokenBatch};

const VOCAB: u32 = 61;
/// Ids from here on are padding.
const NUM_TOKENS: usize = 50;

fn gpt() -> Gpt {
    let mut config = GptConfig::preset("tiny-pr-moe").unwrap();
    (config.vocab_size, config.max_seq_len, config.d_model, config.num_heads, config.d_ff) = (61, 80, 24, 2, 40);
    config.init_std = 0.2;
    Gpt::new(config, 3, &Device::Cpu).unwrap()
}

fn ids(count: usize, salt: u32) -> Vec<u32> {
    (0..count as u32).map(|i| (i * i * 7 + salt * 13 + i) % NUM_TOKENS as u32).collect()
}

/// Contexts alone and shared, within a page and over several, continuations of one token and of many; more than a batch.
fn requests() -> Vec<TokenRequest> {
    let mut all = Vec::new();
    for salt in 0..24 {
        for (context, continuations) in [(1, &[1][..]), (32, &[1, 2, 33]), (33, &[1, 1, 7]), (70, &[10, 1, 11, 3])] {
            for (choice, &continuation) in continuations.iter().enumerate() {
                let continuation = ids(continuation, salt + 100 * choice as u32 + 1);
                all.push(TokenRequest { context: ids(context, salt), continuation });
            }
        }
    }
    all
}

/// All logits of one sequence alone.
fn logits(lm: &Decoder, token_ids: &[u32]) -> Vec<Vec<f32>> {
    let pool = lm.new_pool(PoolConfig::for_tokens(1, token_ids.len())).unwrap();
    let mut sequence = pool.sequence();
    let step = SequenceStep { sequence: &mut sequence, token_ids, logits: LogitsOf::All };
    lm.forward(&mut [step], &pool).unwrap().logits.to_vec2().unwrap()
}

/// The softmax written out.
fn brute_force(lm: &Decoder, request: &TokenRequest) -> LogLikelihood {
    let whole = [&request.context[..], &request.continuation].concat();
    let rows = logits(lm, &whole[..whole.len() - 1]);
    let (mut logprob, mut is_greedy) = (0.0, true);
    for (row, &target) in rows[request.context.len() - 1..].iter().zip(&request.continuation) {
        let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
        logprob += (f64::from(row[target as usize]).exp() / sum).ln();
        is_greedy &= row[..NUM_TOKENS].iter().all(|x| *x <= row[target as usize]);
    }
    LogLikelihood { logprob, is_greedy }
}

#[test]
fn scores_are_those_of_each_request_alone() {
    let lm = gpt().into_packed().unwrap();
    let mut requests = requests();
    // Some continuations that the model itself would have written.
    for request in requests.iter_mut().step_by(5) {
        for i in 0..request.continuation.len() {
            let read = [&request.context[..], &request.continuation[..i]].concat();
            let row = logits(&lm, &read).pop().unwrap();
            let best = (0..NUM_TOKENS).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
            request.continuation[i] = best as u32;
        }
    }
    let mut seen = Vec::new();
    let got = Scorer::new(&lm, NUM_TOKENS).log_likelihoods(&requests, &mut |done| seen.push(done)).unwrap();
    assert_eq!(got.len(), requests.len());
    for (got, request) in got.iter().zip(&requests) {
        let want = brute_force(&lm, request);
        assert!((got.logprob - want.logprob).abs() < 1e-9 && want.logprob < 0.0, "{got:?}, not {want:?}");
        assert_eq!(got.is_greedy, want.is_greedy);
    }
    let greedy = got.iter().filter(|score| score.is_greedy).count();
    assert!((requests.len() / 5..requests.len() / 2).contains(&greedy), "{greedy} of both kinds");
    assert!(seen.len() > 1 && seen.is_sorted() && seen.last() == Some(&requests.len()), "{seen:?}");
}

/// The loss of the training pass, over other code.
#[test]
fn scores_are_the_losses_of_the_trainer() {
    let model = gpt();
    for request in requests().iter().take(11) {
        let whole = [&request.context[..], &request.continuation].concat();
        let seq_len = whole.len() - 1;
        let target = |i: usize| if i + 1 < request.context.len() { IGNORED } else { whole[i + 1] };
        let target_ids = (0..seq_len).map(target).collect();
        let batch = TokenBatch { input_ids: whole[..seq_len].to_vec(), target_ids, batch: 1, seq_len };
        let nats = model.loss(&batch, Pass::Eval).unwrap().parts.lm * request.continuation.len() as f64;
        let scorer = Scorer::new(model.decoder(), VOCAB as usize);
        let got = scorer.log_likelihoods(std::slice::from_ref(request), &mut |_| ()).unwrap()[0];
        assert!((got.logprob + nats).abs() < 1e-4 * nats.max(1.0), "{got:?}, not {nats} nats");
    }
}

#[test]
fn broken_requests_are_refused_and_no_request_is_none() {
    let lm = gpt().into_packed().unwrap();
    let scorer = Scorer::new(&lm, NUM_TOKENS);
    assert!(scorer.log_likelihoods(&[], &mut |_| ()).unwrap().is_empty());
    for (context, continuation, part) in [
        (vec![], vec![1], "at least one token"),
        (vec![1], vec![], "at least one token"),
        (vec![1], vec![1, VOCAB], "vocabulary of 61"),
        (vec![VOCAB], vec![1], "vocabulary"),
    ] {
        let request = TokenRequest { context, continuation };
        let message = scorer.log_likelihoods(&[request], &mut |_| ()).unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
}

/// Token by token, the whole text read anew for each.
fn continued(lm: &Decoder, encoder: &RequestEncoder, prompt: &str, max_tokens: usize, stops: &[&str]) -> String {
    let mut read = encoder.encode_prompt(prompt, 1000).unwrap();
    let begin = read.len();
    for _ in 0..max_tokens {
        let row = logits(lm, &read).pop().unwrap();
        let best = (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap() as u32;
        if best == encoder.eos_id() {
            break;
        }
        read.push(best);
        let text = encoder.decode(&read[begin..]).unwrap();
        if let Some(at) = stops.iter().filter_map(|stop| text.find(stop)).min() {
            return text[..at].to_owned();
        }
    }
    encoder.decode(&read[begin..]).unwrap()
}

#[test]
fn greedy_texts_are_those_of_each_prompt_alone() {
    let lm = Decoder::load(&model_folder(), Precision::F32).unwrap();
    let encoder = RequestEncoder::new(tokenizer(), lm.vocab_size(), 256).unwrap();
    let prompts = ["The old man looked at the sea and", "Question: Who?\nAnswer:", "def main", "1, 2, 3,"];
    for (stops, max_tokens) in [(&["\n", ".", ","][..], 24), (&[], 12)] {
        let generator = Generator { lm: &lm, encoder: &encoder, stops, max_tokens };
        let got = generator.generate(&prompts, &mut |_| ()).unwrap();
        let want: Vec<String> =
            prompts.iter().map(|prompt| continued(&lm, &encoder, prompt, max_tokens, stops)).collect();
        assert_eq!(got, want);
        assert!(got.iter().any(|text| text.len() > 3), "{got:?}");
    }
}

#[test]
fn a_prompt_leaves_room_for_the_answer() {
    let lm = Decoder::load(&model_folder(), Precision::F32).unwrap();
    let encoder = RequestEncoder::new(tokenizer(), lm.vocab_size(), 16).unwrap();
    let generator = Generator { lm: &lm, encoder: &encoder, stops: &[], max_tokens: 256 };
    let prompt = "a long way down the road there was a house, and in the house there was a table";
    let got = generator.generate(&[prompt], &mut |_| ()).unwrap();
    let read = encoder.encode_prompt(prompt, 8).unwrap();
    assert_eq!(read.len(), 8);
    let kept = encoder.decode(&read).unwrap();
    assert!(prompt.ends_with(&kept) && kept.len() < prompt.len(), "{kept}");
    assert_eq!(got, [continued(&lm, &encoder, &kept, 8, &[])]);
}
