//! A model folder, asked: loads any family, reads a prompt, writes the likeliest continuation.
//!
//! `cargo run --release -p moe-models --example ask -- [FOLDER [PROMPT]]`

use moe_models::{CausalLm, Decoder, LogitsOf, PoolConfig, Precision, SequenceStep};
use std::path::PathBuf;
use tokenizers::Tokenizer;

const NEW_TOKENS: usize = 24;

pub(crate) fn main() -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let mut args = std::env::args().skip(1);
    // Without arguments: the model that moe-serve carries.
    let carried = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../moe-serve/model"));
    let folder = args.next().map(PathBuf::from).filter(|path| path.is_dir()).unwrap_or_else(carried);
    let prompt = args.next().unwrap_or_else(|| "The old man looked at the sea and".to_owned());

    let model = Decoder::load(&folder, Precision::Bf16)?;
    let tokenizer = Tokenizer::from_file(folder.join("tokenizer.json"))?;
    let mut ids = tokenizer.encode(prompt, false)?.get_ids().to_vec();

    let pages = PoolConfig::for_tokens(1, ids.len() + NEW_TOKENS);
    let pool = model.new_pool(pages)?;
    let mut sequence = pool.sequence();
    for _ in 0..NEW_TOKENS {
        let token_ids = &ids[sequence.len()..];
        let step = SequenceStep { sequence: &mut sequence, token_ids, logits: LogitsOf::Last };
        let logits = model.forward(&mut [step], &pool)?.logits.get(0)?;
        ids.push(logits.argmax(0)?.to_scalar()?);
    }
    println!("{}", tokenizer.decode(&ids, false)?);
    Ok(())
}
