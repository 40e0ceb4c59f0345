//! `moe-compress upcycle`.

use crate::{Folders, sizes};
use anyhow::{Result, ensure};
use clap::Args;
use moe_compress::upcycle::{Upcycling, upcycle};
use moe_core::Capacity;
use moe_models::gpt::GptMoeConfig;

#[derive(Debug, Args)]
pub(crate) struct UpcycleArgs {
    #[command(flatten)]
    folders: Folders,
    /// Experts: one number for every MoE layer, or one for each such as 4,4,8.
    #[arg(long, value_name = "N[,N...]", value_delimiter = ',', required = true)]
    num_experts: Vec<usize>,
    /// Every n-th layer becomes an MoE layer [default: 2, or 1 with --granularity].
    #[arg(long, value_name = "N")]
    expert_interval: Option<usize>,
    /// Experts per token.
    #[arg(long, default_value_t = 2)]
    topk: usize,
    /// Keep the dense network beside the experts (Residual-MoE).
    #[arg(long)]
    residual: bool,
    /// Parts that each network is cut into: experts and experts per token then count parts.
    #[arg(long, value_name = "N", default_value_t = 1)]
    granularity: usize,
    /// Rows an expert takes in training, over the even share; all it is sent if it is not given.
    #[arg(long, value_name = "FACTOR")]
    moe_train_capacity_factor: Option<f64>,
    /// Of the routers' initial weights.
    #[arg(long, default_value_t = 1234)]
    seed: u64,
}

impl UpcycleArgs {
    pub(crate) fn run(&self) -> Result<()> {
        let dense = self.folders.load()?;
        println!("{}: {}", self.folders.model.display(), sizes(dense.config()));
        let interval = self.expert_interval.unwrap_or(if self.granularity > 1 { 1 } else { 2 });
        ensure!(interval > 0, "--expert-interval must be at least 1, got 0");
        let num_experts = match self.num_experts.as_slice() {
            [one] => vec![*one; dense.config().num_layers / interval],
            counts => counts.to_vec(),
        };
        let capacity = Capacity { train_factor: self.moe_train_capacity_factor, eval_factor: None, min_capacity: 4 };
        let moe = GptMoeConfig {
            expert_interval: interval,
            top_k: self.topk,
            capacity,
            ..GptMoeConfig::paper(num_experts, self.residual)
        };
        let (granularity, seed) = (self.granularity, self.seed);
        self.folders.save(&upcycle(&dense, &Upcycling { moe, granularity, seed })?)
    }
}
