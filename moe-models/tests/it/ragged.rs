//! The ragged pass: every sequence's logits are those of the same sequence alone, to the last bit, whatever its neighbours and
//! however its tokens were cut.

use crate::golden::{fixtures, logits};
use candle_core::Device;
use moe_core::CounterRng;
use moe_kernels::KernelOps;
use moe_models::config::AttentionConfig;
use moe_models::gpt::{Gpt, GptConfig};
use moe_models::{
    CachedSequence, CausalLm, Decoder, EvalRouting, Family, LogitsOf, ParamSource, PoolConfig, Precision, ReadFamily,
    SequenceStep,
};
use std::sync::Arc;

fn gpt(change: impl FnOnce(&mut GptConfig)) -> Gpt {
    let mut config = GptConfig::preset("tiny-pr-moe").unwrap();
    (config.vocab_size, config.max_seq_len, config.d_model, config.num_heads, config.d_ff) = (61, 80, 24, 2, 40);
    config.init_std = 0.2;
    change(&mut config);
    Gpt::new(config, 3, &Device::Cpu).unwrap()
}

/// Both families, and every router that decides token by token.
fn decoders() -> Vec<(String, Decoder)> {
    let mut all = Vec::new();
    for precision in [Precision::F32, Precision::Bf16] {
        let qwen = Decoder::load(&fixtures().join("qwen3_moe"), precision).unwrap();
        all.push((format!("qwen3_moe {precision:?}"), qwen));
        let latent = Decoder::load(&fixtures().join("deepseek_v3"), precision).unwrap();
        all.push((format!("deepseek_v3 {precision:?}"), latent));
        for family in ["granitemoe", "phimoe", "gpt_oss", "llama4_text"] {
            let decoder = Decoder::load(&fixtures().join(family), precision).unwrap();
            all.push((format!("{family} {precision:?}"), decoder));
        }
        for top_k in [1, 2, 3] {
            let model = gpt(|c| c.moe.as_mut().unwrap().top_k = top_k).with_precision(precision).unwrap();
            all.push((format!("pr-moe top-{top_k} {precision:?}"), model.into_packed().unwrap()));
        }
    }
    let windowed = <Box<dyn Family>>::read_file(&fixtures().join("qwen3_moe/config.json")).unwrap();
    let mut config = windowed.decoder().unwrap();
    for (layer, window) in [(0, 9), (2, 40)] {
        let AttentionConfig::GroupedQuery(attention) = &mut config.layers[layer].attention else { unreachable!() };
        (attention.window, attention.scale) = (Some(window), Some(0.2));
    }
    let source = ParamSource::initial(Arc::new(config.params()), 3, moe_parallel::Placement::WHOLE);
    let ops = Arc::new(KernelOps::packing(Precision::Bf16));
    let windowed = Decoder::new(config, source.builder(&Device::Cpu), ops).unwrap();
    all.push(("windows, with a scale".into(), windowed));
    let drawn = gpt(|c| {
        let moe = c.moe.as_mut().unwrap();
        (moe.top_k, moe.capacity.eval_factor) = (2, None);
    });
    all.push(("top-2, drawn".into(), drawn.into_packed().unwrap().with_eval_routing(EvalRouting::Original)));
    all
}

struct Request {
    ids: Vec<u32>,
    sequence: CachedSequence,
    seed: u64,
    /// Row after row, as they came.
    got: Vec<Vec<f32>>,
}

/// Runs random requests to their ends in random batches: some wait, some bring a chunk of a prompt, some one token.
fn run(decoder: &Decoder, rng: &mut CounterRng, batches: &mut usize) -> Vec<Request> {
    let mut below = |n: usize| rng.below(n as u32) as usize;
    let count = 2 + below(5);
    // In rows and packed.
    let config = PoolConfig { num_pages: 500, page_size: [1, 3, 8, 32, 64][below(5)] };
    let pool = decoder.new_pool(config).unwrap();
    let mut requests: Vec<Request> = (0..count)
        .map(|_| {
            let ids = (0..1 + below(70)).map(|_| below(61) as u32).collect();
            let seed = below(5) as u64;
            Request { ids, sequence: pool.sequence().with_seed(seed), seed, got: Vec::new() }
        })
        .collect();
    while requests.iter().any(|r| r.sequence.len() < r.ids.len()) {
        let mut steps = Vec::new();
        let mut who = Vec::new();
        for (index, request) in requests.iter_mut().enumerate() {
            let left = request.ids.len() - request.sequence.len();
            if left == 0 || below(4) == 0 {
                continue;
            }
            let new = if below(2) == 0 { 1 } else { 1 + below(left) };
            let start = request.sequence.len();
            let token_ids = &request.ids[start..start + new];
            steps.push(SequenceStep { sequence: &mut request.sequence, token_ids, logits: LogitsOf::All });
            who.push((index, new));
        }
        if steps.is_empty() {
            continue;
        }
        let rows = decoder.forward(&mut steps, &pool).unwrap().logits.to_vec2::<f32>().unwrap();
        *batches += 1;
        let mut rows = rows.into_iter();
        for (index, new) in who {
            requests[index].got.extend(rows.by_ref().take(new));
        }
    }
    requests
}

fn alone(decoder: &Decoder, request: &Request) -> Vec<Vec<f32>> {
    let pool = decoder.new_pool(PoolConfig::for_tokens(1, 80)).unwrap();
    let mut sequence = pool.sequence().with_seed(request.seed);
    let step = SequenceStep { sequence: &mut sequence, token_ids: &request.ids, logits: LogitsOf::All };
    decoder.forward(&mut [step], &pool).unwrap().logits.to_vec2().unwrap()
}

#[test]
fn logits_do_not_depend_on_neighbours_or_chunks() {
    let (mut batches, mut tokens) = (0, 0);
    for (name, decoder) in decoders() {
        for seed in 0..6 {
            let mut rng = CounterRng::new(seed, 9);
            for request in run(&decoder, &mut rng, &mut batches) {
                let want = alone(&decoder, &request);
                tokens += want.len();
                for (at, (got, want)) in request.got.iter().zip(&want).enumerate() {
                    let bits = |row: &[f32]| row.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
                    assert_eq!(bits(got), bits(want), "{name}, seed {seed}, token {at}");
                }
                assert_eq!(request.got.len(), want.len());
            }
        }
    }
    println!("{batches} ragged batches, {tokens} tokens compared bit for bit");
    assert!(batches > 200 && tokens > 5_000, "{batches} batches, {tokens} tokens");
}

/// Continuations that share a prompt's pages go their own ways.
#[test]
fn forks_share_a_prompt_and_nothing_else() {
    let (_, decoder) = decoders().remove(0);
    let pool = decoder.new_pool(PoolConfig::for_tokens(4, 40)).unwrap();
    let free = pool.free_pages();
    let prompt: Vec<u32> = (0..21).map(|i| i * 7 % 61).collect();
    let mut first = pool.sequence();
    let step = SequenceStep { sequence: &mut first, token_ids: &prompt, logits: LogitsOf::None };
    assert_eq!(decoder.forward(&mut [step], &pool).unwrap().logits.dims(), [0, 97]);
    let mut second = first.clone();
    let (a, b) = ([5, 6, 7], [8, 9]);
    let mut steps = [
        SequenceStep { sequence: &mut first, token_ids: &a, logits: LogitsOf::Last },
        SequenceStep { sequence: &mut second, token_ids: &b, logits: LogitsOf::All },
    ];
    let rows = decoder.forward(&mut steps, &pool).unwrap().logits.to_vec2::<f32>().unwrap();
    let whole = |tail: &[u32]| logits(&decoder, &[prompt.as_slice(), tail].concat()).to_vec2::<f32>().unwrap();
    assert_eq!(rows[0], whole(&a)[23]);
    assert_eq!(rows[1..], whole(&b)[21..]);
    drop((first, second));
    assert_eq!(pool.free_pages(), free, "all pages came back");
}
