//! The inference pass: one stream, many sequences in one ragged pass, and the time of a token as its sequence grows.
//!
//! The model is the one that moe-serve carries, and a random one of its shape with 2,048 positions. Attention's own reads are
//! timed beside the whole: the same kernel over pages, alone. `cargo xtask bench decode` keeps the output and draws it.

use anyhow::{Context, Result};
use candle_core::{Device, Tensor};
use moe_core::CounterRng;
use moe_kernels::attention::{AttentionShape, PagedKv, PagedSequence, new_pages, paged_attention, write_pages};
use moe_kernels::{machine, select};
use moe_models::config::AttentionConfig;
use moe_models::gpt::{Gpt, GptConfig};
use moe_models::{
    CachedSequence, CausalLm, Decoder, KvPool, LogitsOf, PoolConfig, Precision, ReadFamily, SequenceStep,
};
use std::path::Path;
use std::time::Instant;

// What the program that serves it uses: fresh pages for every buffer would cost more than the kernels.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const SEQUENCES: [usize; 4] = [1, 4, 8, 32];
const CONTEXTS: [usize; 7] = [16, 32, 64, 128, 256, 512, 1024];
const PRECISION: Precision = Precision::Bf16;

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn seconds(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    work()?;
    Ok(start.elapsed().as_secs_f64())
}

/// One sequence's part of a step.
fn step<'a>(sequence: &'a mut CachedSequence, token_ids: &'a [u32]) -> SequenceStep<'a> {
    SequenceStep { sequence, token_ids, logits: LogitsOf::Last }
}

struct Bench {
    decoder: Decoder,
    json: bool,
    /// Only this many sequences, for profiles.
    only: Option<usize>,
}

impl Bench {
    fn pool(&self, sequences: usize) -> Result<KvPool> {
        let config = PoolConfig::for_tokens(sequences, self.decoder.max_seq_len());
        Ok(self.decoder.new_pool(config)?)
    }

    fn ids(&self, count: usize) -> Vec<u32> {
        let mut rng = CounterRng::new(1, 0);
        (0..count).map(|_| rng.below(self.decoder.vocab_size() as u32)).collect()
    }

    fn row(&self, value: &serde_json::Value) {
        if self.json {
            println!("json {value}");
        }
    }

    /// Tokens per second of many sequences that decode side by side, after a prompt of 32 tokens each.
    fn many(&self) -> Result<()> {
        const PROMPT: usize = 32;
        const NEW: usize = 160;
        println!("{:>10}{:>14}{:>14}{:>10}{:>16}", "sequences", "tokens/s", "ms a step", "times 1", "first token ms");
        let mut one = 0.0;
        for count in SEQUENCES.into_iter().filter(|count| self.only.is_none_or(|only| only == *count)) {
            let pool = self.pool(count)?;
            let prompt = self.ids(PROMPT);
            let mut first = Vec::new();
            let mut steps = Vec::new();
            for _ in 0..4 {
                let mut sequences: Vec<CachedSequence> = (0..count).map(|_| pool.sequence()).collect();
                first.push(seconds(|| {
                    let mut batch: Vec<_> = sequences.iter_mut().map(|s| step(s, &prompt)).collect();
                    self.decoder.forward(&mut batch, &pool)?;
                    Ok(())
                })?);
                for token in self.ids(NEW) {
                    steps.push(seconds(|| {
                        let ids = [token];
                        let mut batch: Vec<_> = sequences.iter_mut().map(|s| step(s, &ids)).collect();
                        self.decoder.forward(&mut batch, &pool)?;
                        Ok(())
                    })?);
                }
            }
            let (a_step, first) = (median(steps), median(first));
            let rate = count as f64 / a_step;
            if count == 1 {
                one = rate;
            }
            let times = rate / one;
            println!("{count:>10}{rate:>14.0}{:>14.3}{times:>10.2}{:>16.3}", a_step * 1e3, first * 1e3);
            self.row(&serde_json::json!({
                "bench": "decode", "sequences": count, "tokens_per_second": rate, "step_seconds": a_step,
                "first_token_seconds": first,
            }));
        }
        Ok(())
    }

    /// Attention over pages alone, all layers, for one new token, after weights have been read.
    fn attention_seconds(&self, context: usize) -> Result<f64> {
        let layers = &self.decoder.config().layers;
        let AttentionConfig::GroupedQuery(config) = layers[0].attention else {
            anyhow::bail!("the bench measures grouped-query attention");
        };
        let size = PoolConfig::PAGE_SIZE;
        let blocks: Vec<u32> = (0..context.div_ceil(size) as u32).collect();
        let random = |rows: usize, width: usize| Tensor::randn(0f32, 1.0, (rows, width), &Device::Cpu);
        let kv = config.kv_shape();
        let slots: Vec<u32> = (0..context as u32).collect();
        let pools = (0..layers.len())
            .map(|_| {
                let pages = new_pages(blocks.len(), size, kv, PRECISION, &Device::Cpu)?;
                let pool = PagedKv { keys: &pages[0], values: &pages[1], block_size: size, shape: kv };
                write_pages(pool, &random(context, kv.width())?, &random(context, kv.width())?, &slots, PRECISION)?;
                Ok(pages)
            })
            .collect::<Result<Vec<_>>>()?;
        let queries = random(1, config.q_width())?;
        let shape = AttentionShape::new(config.num_heads, config.num_kv_heads);
        let sequence = PagedSequence { blocks: &blocks, len: context, new: 1 };
        let run = || {
            for [keys, values] in &pools {
                let pool = PagedKv { keys, values, block_size: size, shape: kv };
                paged_attention(&queries, pool, &[sequence], shape, PRECISION)?;
            }
            Ok(())
        };
        // Inside a pass attention finds the caches full of weights: so it does here, by a token of a short sequence before it.
        let pool = self.pool(1)?;
        let mut short = pool.sequence();
        let ids = self.ids(16);
        let after_weights = || {
            short.truncate(15);
            let held = short.len();
            self.decoder.forward(&mut [step(&mut short, &ids[held..])], &pool)?;
            seconds(run)
        };
        Ok(median(std::iter::repeat_with(after_weights).take(200).collect::<Result<_>>()?))
    }

    /// Time of one token of one sequence, at several lengths.
    fn growing(&self) -> Result<()> {
        println!("{:>10}{:>14}{:>16}{:>14}{:>10}", "context", "us a token", "attention us", "rest us", "rest/16");
        let pool = self.pool(1)?;
        let ids = self.ids(self.decoder.max_seq_len());
        let mut at_16 = 0.0;
        for context in CONTEXTS {
            let mut sequence = pool.sequence();
            self.decoder.forward(&mut [step(&mut sequence, &ids[..context - 1])], &pool)?;
            let one = || {
                // A clone shares the pages; its last one is copied outside of the time.
                let mut sequence = sequence.clone();
                sequence.truncate(context - 2);
                self.decoder.forward(&mut [step(&mut sequence, &ids[context - 2..context - 1])], &pool)?;
                seconds(|| {
                    self.decoder.forward(&mut [step(&mut sequence, &ids[context - 1..context])], &pool)?;
                    Ok(())
                })
            };
            for _ in 0..20 {
                one()?;
            }
            let token = median((0..300).map(|_| one()).collect::<Result<_>>()?);
            let attention = self.attention_seconds(context)?;
            let rest = token - attention;
            if context == CONTEXTS[0] {
                at_16 = rest;
            }
            println!(
                "{context:>10}{:>14.1}{:>16.1}{:>14.1}{:>10.3}",
                token * 1e6,
                attention * 1e6,
                rest * 1e6,
                rest / at_16
            );
            self.row(&serde_json::json!({
                "bench": "context", "context": context, "token_seconds": token, "attention_seconds": attention,
            }));
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let json = std::env::args().any(|a| a == "--json");
    if let Ok(name) = std::env::var(select::ENV) {
        select::force(name.parse()?)?;
    }
    println!("machine: {}; kernels: {}; {} threads", machine::name(), select::current(), rayon::current_num_threads());
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-serve/model");
    let decoder = Decoder::load(&folder, PRECISION).context("the model that moe-serve carries")?;
    println!("\nThe built-in model, in 4 bits: sequences side by side in one ragged pass, context 32 to 192");
    let only = std::env::args().find_map(|a| a.parse().ok());
    Bench { decoder, json, only }.many()?;
    if only.is_some() {
        return Ok(());
    }

    let path = folder.join("config.json");
    let mut fields: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&std::fs::read(&path)?)?;
    // How that model's own weights are kept.
    fields.remove("quantization_config");
    let mut config = GptConfig::read(&serde_json::to_vec(&fields)?, &path)?;
    config.max_seq_len = 2048;
    let decoder = Gpt::new(config, 1, &Device::Cpu)?.with_precision(PRECISION)?.into_packed()?;
    println!("\nA random model of its shape with 2048 positions, bf16: one token more, by the length of its sequence");
    Bench { decoder, json, only }.growing()?;
    Ok(())
}
