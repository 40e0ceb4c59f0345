//! [`ScriptedLm`]: predicts, after any `n` tokens, the `n`-th token of a fixed text. For testing what surrounds a model.

use super::{ids, tokenizer};
use candle_core::{Device, Tensor};
use moe_models::{CacheLayout, CausalLm, KvPool, LayerExperts, PagedStep, Result, StepOutput};
use std::time::Duration;

/// Reading this makes the model panic.
pub(crate) const PANIC_TEXT: &str = "\u{1}";
/// Reading this makes the model return NaN.
pub(crate) const NAN_TEXT: &str = "\u{2}";

/// Tokens of padding after the tokenizer's, as in a model whose vocabulary was rounded up.
const PADDING: usize = 20;

pub(crate) struct ScriptedLm {
    script: Vec<u32>,
    vocab_size: usize,
    max_seq_len: usize,
    step: Duration,
    panic_id: u32,
    nan_id: u32,
}

impl ScriptedLm {
    /// After the script comes token 0, the end of text.
    pub(crate) fn new(script: &str) -> Self {
        Self {
            script: ids(script),
            vocab_size: tokenizer().get_vocab_size(true) + PADDING,
            max_seq_len: 128,
            step: Duration::ZERO,
            panic_id: ids(PANIC_TEXT)[0],
            nan_id: ids(NAN_TEXT)[0],
        }
    }

    /// Takes so long per step.
    pub(crate) fn slow(self, step: Duration) -> Self {
        Self { step, ..self }
    }

    /// Row after reading `token_id` as the `len`-th token: the script's next token, and padding even likelier.
    fn logits(&self, token_id: u32, len: usize) -> Vec<f32> {
        let mut row = vec![0.0; self.vocab_size];
        row[self.vocab_size - PADDING..].fill(50.0);
        row[self.script.get(len).copied().unwrap_or(0) as usize] = 20.0;
        if token_id == self.nan_id {
            row[3] = f32::NAN;
        }
        row
    }
}

fn experts(layer: usize, num_experts: u32, top_k: u32, token_ids: &[u32]) -> LayerExperts {
    let choices = token_ids.iter().flat_map(|id| (0..top_k).map(move |k| (id + k) % num_experts));
    let weights = token_ids.iter().flat_map(|_| (0..top_k).map(|k| if k == 0 { 0.75 } else { 0.25 }));
    let (num_experts, top_k) = (num_experts as usize, top_k as usize);
    LayerExperts { layer, num_experts, top_k, expert_ids: choices.collect(), weights: weights.collect() }
}

impl CausalLm for ScriptedLm {
    fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    fn max_seq_len(&self) -> usize {
        self.max_seq_len
    }

    fn num_layers(&self) -> usize {
        4
    }

    fn moe_layers(&self) -> Vec<(usize, usize)> {
        vec![(1, 4), (3, 8)]
    }

    fn device(&self) -> &Device {
        &Device::Cpu
    }

    fn cache_layout(&self) -> CacheLayout {
        CacheLayout::default()
    }

    fn run(&self, step: &PagedStep, _: &KvPool) -> Result<StepOutput> {
        std::thread::sleep(self.step);
        let ids = step.token_ids();
        assert!(!ids.contains(&self.panic_id), "the model read what it cannot bear");
        let wanted = step.logit_rows();
        let row = |&row: &u32| self.logits(ids[row as usize], step.positions()[row as usize] as usize + 1);
        let rows: Vec<f32> = wanted.iter().flat_map(row).collect();
        let logits = Tensor::from_vec(rows, (wanted.len(), self.vocab_size), &Device::Cpu)?;
        Ok(StepOutput { logits, experts: vec![experts(1, 4, 1, ids), experts(3, 8, 2, ids)] })
    }
}
