//! The paper's models by name, and tiny ones of every kind.

use super::{GptConfig, GptMoeConfig};
use moe_core::Capacity;

struct Preset {
    name: &'static str,
    layers: usize,
    d_model: usize,
    heads: usize,
    /// Experts of the MoE layers but the last two, and of the last two.
    experts: Option<(usize, usize)>,
    residual: bool,
    init_std: f64,
}

const fn row(name: &'static str, layers: usize, d_model: usize, heads: usize) -> Preset {
    Preset { name, layers, d_model, heads, experts: None, residual: false, init_std: 0.014 }
}

const fn moe(preset: Preset, most: usize, last_two: usize, residual: bool) -> Preset {
    Preset { experts: Some((most, last_two)), residual, ..preset }
}

/// The rows of the paper's model table, then the ablation models of its figure 4.
const PAPER: &[Preset] = &[
    row("350m", 24, 1024, 16),
    row("1.3b", 24, 2048, 16),
    Preset { init_std: 0.01, ..row("6.7b", 32, 4096, 32) },
    moe(row("125m-moe-64", 12, 768, 12), 64, 64, false),
    moe(row("350m-moe-128", 24, 1024, 16), 128, 128, false),
    moe(row("1.3b-moe-128", 24, 2048, 16), 128, 128, false),
    moe(row("350m-pr-moe-32-64", 24, 1024, 16), 32, 64, true),
    moe(row("1.3b-pr-moe-64-128", 24, 2048, 16), 64, 128, true),
    moe(row("350m-pr-moe-32-64-mos", 21, 1024, 16), 32, 64, true),
    moe(row("1.3b-pr-moe-64-128-mos", 21, 2048, 16), 64, 128, true),
    moe(row("350m-moe-32", 24, 1024, 16), 32, 32, false),
    moe(row("350m-pyramid-moe-32-64", 24, 1024, 16), 32, 64, false),
    moe(row("350m-residual-moe-32", 24, 1024, 16), 32, 32, true),
];

/// One of each kind, of a size for a laptop. The pyramid's last two MoE layers have twice the experts.
const TINY: &[Preset] = &[
    row("tiny-dense", 6, 128, 4),
    moe(row("tiny-moe", 6, 128, 4), 8, 8, false),
    moe(row("tiny-pyramid-moe", 6, 128, 4), 4, 8, false),
    moe(row("tiny-residual-moe", 6, 128, 4), 4, 4, true),
    moe(row("tiny-pr-moe", 6, 128, 4), 4, 8, true),
];

fn experts(preset: &Preset) -> Option<GptMoeConfig> {
    let (most, last_two) = preset.experts?;
    let layers = preset.layers / 2;
    let counts = (0..layers).map(|l| if l + 2 < layers { most } else { last_two }).collect();
    Some(GptMoeConfig::paper(counts, preset.residual))
}

impl GptConfig {
    /// The model of this name, if there is one.
    ///
    /// The paper's models have a vocabulary of 50304 (GPT-2's, padded), 2048 positions and the paper's routing; the tiny
    /// ones a vocabulary of 1024, 256 positions, and drop nothing outside training.
    ///
    /// # Source
    /// Paper table 1 (layouts), Megatron-DeepSpeed's `examples_deepspeed/MoE` (the rest).
    pub fn preset(name: &str) -> Option<Self> {
        let build = |preset: &Preset, vocab_size, max_seq_len| Self {
            vocab_size,
            max_seq_len,
            d_model: preset.d_model,
            num_layers: preset.layers,
            num_heads: preset.heads,
            d_ff: 4 * preset.d_model,
            layer_norm_eps: 1e-5,
            init_std: preset.init_std,
            eos_token_id: None,
            moe: experts(preset),
        };
        if let Some(preset) = PAPER.iter().find(|p| p.name == name) {
            return Some(Self { eos_token_id: Some(50256), ..build(preset, 50304, 2048) });
        }
        let mut config = build(TINY.iter().find(|p| p.name == name)?, 1024, 256);
        config.init_std = 0.02;
        config.eos_token_id = Some(0);
        if let Some(moe) = &mut config.moe {
            moe.capacity = Capacity { train_factor: Some(1.25), eval_factor: None, min_capacity: 4 };
        }
        Some(config)
    }

    /// Every name that [`GptConfig::preset`] knows.
    pub fn preset_names() -> impl Iterator<Item = &'static str> {
        PAPER.iter().chain(TINY).map(|p| p.name)
    }
}
