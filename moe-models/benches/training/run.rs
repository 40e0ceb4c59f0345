//! One run of the trainer's step over a model. All that the bench uses of the trainer is here.

use crate::models::{BATCH, SEQ_LEN};
use crate::rows::Row;
use anyhow::{Result, ensure};
use candle_core::{DType, Tensor, Var};
use moe_core::{CounterRng, ParamSpec};
use moe_kernels::Precision;
use moe_models::gpt::Gpt;
use moe_models::hf::NameTable;
use moe_models::train::model::{LossOutput, Pass, TokenBatch, TrainPass};
use moe_models::train::optimizer::{AdamW, Owned, UpdateRule};
use moe_models::train::step::{BatchSums, StepBuffers, accumulate};
use moe_models::train::{Saving, TrainConfig, TrainModel};
use moe_parallel::Placement;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const LR: f64 = 1e-4;

/// A model that counts the time of its losses.
struct Timed<'a> {
    model: &'a Gpt,
    forward_ns: AtomicU64,
}

impl TrainModel for Timed<'_> {
    fn vocab_size(&self) -> usize {
        TrainModel::vocab_size(self.model)
    }
    fn max_seq_len(&self) -> usize {
        TrainModel::max_seq_len(self.model)
    }
    fn params(&self) -> &[(String, Var)] {
        TrainModel::params(self.model)
    }
    fn update_rule(&self, name: &str, shape: &[usize]) -> UpdateRule {
        self.model.update_rule(name, shape)
    }
    fn weights(&self) -> &[(String, Var)] {
        self.model.weights()
    }
    fn specs(&self) -> Vec<ParamSpec> {
        self.model.specs()
    }
    fn names(&self) -> NameTable {
        self.model.names()
    }
    fn frozen(&self) -> &[Tensor] {
        self.model.frozen()
    }
    fn grad_group(&self, name: &str) -> String {
        self.model.grad_group(name)
    }
    fn precision(&self) -> Precision {
        self.model.precision()
    }
    fn loss(&self, batch: &TokenBatch, pass: Pass) -> moe_models::Result<LossOutput> {
        let start = Instant::now();
        let output = self.model.loss(batch, pass);
        self.forward_ns.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        output
    }
    fn save_config(&self, dir: &Path, dtype: DType) -> moe_models::Result<()> {
        self.model.save_config(dir, dtype)
    }
}

/// Times of one step.
#[derive(Clone, Copy)]
pub(crate) struct Times {
    pub(crate) step: Duration,
    pub(crate) forward: Duration,
    pub(crate) backward: Duration,
    pub(crate) optimizer: Duration,
}

/// What one step did.
pub(crate) struct Stepped {
    pub(crate) times: Times,
    pub(crate) lm_loss: f64,
    pub(crate) drop_rate: f64,
}

pub(crate) struct Run<'a> {
    model: Timed<'a>,
    config: TrainConfig,
    optimizer: AdamW,
    buffers: StepBuffers,
    rng: CounterRng,
    step: u64,
}

impl<'a> Run<'a> {
    pub(crate) fn new(model: &'a Gpt, row: &Row) -> Result<Self> {
        let config = TrainConfig {
            micro_batch_size: row.micro_batch_size.1,
            global_batch_size: BATCH,
            precision: model.precision(),
            ..TrainConfig::default()
        };
        let config = config.resolved(SEQ_LEN)?;
        let params = TrainModel::params(model);
        let rules = params.iter().map(|(name, var)| model.update_rule(name, var.dims())).collect();
        let units = Saving::new(model, Placement::WHOLE)?.units()?;
        let optimizer = AdamW::new(config.adamw(), Owned::everything(units), rules)?;
        let buffers = StepBuffers::new(model)?;
        let model = Timed { model, forward_ns: AtomicU64::new(0) };
        Ok(Self { model, config, optimizer, buffers, rng: CounterRng::new(2, 0), step: 0 })
    }

    fn random_batches(&mut self) -> Vec<TokenBatch> {
        let (batch, vocab_size) = (self.config.micro_batch_size, self.model.vocab_size() as u32);
        let mut ids = || (0..batch * SEQ_LEN).map(|_| self.rng.below(vocab_size)).collect();
        let draw = |_| TokenBatch { input_ids: ids(), target_ids: ids(), batch, seq_len: SEQ_LEN };
        (0..self.config.grad_accum()).map(draw).collect()
    }

    /// What `Trainer` does between drawing a batch and reporting.
    pub(crate) fn step(&mut self) -> Result<Stepped> {
        let batches = self.random_batches();
        let pass = |i: usize| {
            let seed = CounterRng::mix(3, &[self.step, i as u64]);
            TrainPass { seed, step: self.step, tokens: 0, micro_batch: i }
        };
        let passes: Vec<TrainPass> = (0..batches.len()).map(pass).collect();
        self.model.forward_ns.store(0, Ordering::Relaxed);
        self.step += 1;

        let start = Instant::now();
        let sums = accumulate(&self.model, &batches, &passes, &mut self.buffers)?;
        let accumulated = start.elapsed();
        let scale = 1.0 / sums.micro_batches as f64;
        let report = self.optimizer.step_with_copies(
            TrainModel::params(&self.model),
            &self.buffers.grads.all(),
            scale,
            LR,
            &self.buffers.copies,
        )?;
        let optimizer = start.elapsed() - accumulated;
        let (lm_loss, drop_rate) = (sums.parts.lm, drop_rate(&sums));
        drop(sums);
        let step = start.elapsed();

        ensure!(report.applied, "the gradients of step {} are not finite", self.step);
        // The rest is backward and adding up.
        let forward = Duration::from_nanos(self.model.forward_ns.load(Ordering::Relaxed));
        let backward = accumulated.saturating_sub(forward);
        Ok(Stepped { times: Times { step, forward, backward, optimizer }, lm_loss, drop_rate })
    }
}

fn drop_rate(sums: &BatchSums) -> f64 {
    sums.layers.iter().map(|layer| layer.load.drop_rate()).sum::<f64>() / sums.layers.len().max(1) as f64
}
