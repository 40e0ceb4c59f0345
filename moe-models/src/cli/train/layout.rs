//! Chooses the layout of a run's ranks, and tells what it costs.

use super::progress::Progress;
use super::rank_args::TrainRankArgs;
use super::run::Begin;
use crate::DecoderConfig;
use crate::cli::ranks::Seat;
use crate::train::launch::{LayoutCost, LayoutRequest, LevelBytes, RankCost, RunSize, choose as choose_layout};
use crate::train::{ReduceConfig, TrainConfig};
use anyhow::Result;
use moe_parallel::all_to_all::Route;
use moe_parallel::{Collectives, ExchangeConfig, ParallelDims};

/// How the ranks of a run are laid out.
pub(crate) struct Chosen {
    pub(crate) dims: ParallelDims,
    pub(crate) reduce: ReduceConfig,
    pub(crate) exchange: ExchangeConfig,
}

/// What a run's ranks have to hold and do; `beside` are models for inference alone.
pub(crate) fn run_size(decoder: &DecoderConfig, beside: Vec<DecoderConfig>, config: &TrainConfig) -> RunSize {
    RunSize {
        decoder: decoder.clone(),
        beside,
        precision: config.precision,
        seq_len: config.seq_len(),
        micro_batch_size: config.micro_batch_size,
        micro_batches: config.grad_accum(),
    }
}

/// The layout for a model, printed with its price; none for one rank.
pub(crate) fn choose(
    args: &TrainRankArgs,
    seat: &Seat,
    size: &RunSize,
    begin: Begin,
    progress: &Progress,
) -> Result<Option<Chosen>> {
    let world = seat.comm.as_ref().map_or(1, |comm| comm.size());
    let reduce = args.reduce();
    let of = |request: &LayoutRequest| choose_layout(size, world, seat.ranks_per_node, request, reduce);
    let asked = args.request()?;
    let layout = match of(&asked) {
        // The numbers asked for were for more ranks.
        Err(error) if begin == Begin::Restart => {
            progress.say(&format!("{error}; another layout is chosen for the ranks that are left"));
            let spread = LayoutRequest { dp: None, ep: None, ..asked };
            let least = LayoutRequest { memory_budget: asked.memory_budget, ..LayoutRequest::default() };
            of(&spread).or_else(|_| of(&least))?
        }
        layout => layout?,
    };
    if world == 1 {
        return Ok(None);
    }
    if begin != Begin::Restart {
        args.common.check_layout(&layout.dims)?;
    }
    describe(&layout, world.div_ceil(seat.ranks_per_node)).iter().for_each(|line| progress.say(line));
    let reduce = ReduceConfig { zero: layout.zero, ..reduce };
    Ok(Some(Chosen { dims: layout.dims, reduce, exchange: args.common.exchange(Route::Flat.into()) }))
}

fn megabytes(bytes: usize) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

fn levels(bytes: LevelBytes) -> String {
    format!("{} inside nodes, {} between", megabytes(bytes.intra_node), megabytes(bytes.inter_node))
}

/// What a layout is and costs, in lines.
fn describe(layout: &LayoutCost, nodes: usize) -> Vec<String> {
    let ParallelDims { dp, tp, ep, expert_slices, .. } = layout.dims;
    let (ranks, zero) = (layout.ranks.len(), u8::from(layout.zero));
    let mut lines = vec![format!(
        "layout: {ranks} ranks on {nodes} node{}: dp {dp} x tp {tp}, ep {ep}, expert slices {expert_slices}, zero {zero}",
        if nodes == 1 { "" } else { "s" }
    )];
    for (rank, cost) in layout.ranks.iter().enumerate() {
        let RankCost { parameters, experts, memory, .. } = cost;
        let experts: Vec<String> =
            experts.iter().map(|(count, held)| format!("{}..{} of {count}", held.start, held.end)).collect();
        let experts = if experts.is_empty() { "none".into() } else { experts.join(", ") };
        lines.push(format!(
            "  rank {rank}: {parameters} parameters, experts {experts}; {} of state (parameters {}, copies {}, gradients {}, \
             moments {}{}), about {} with activations and messages",
            megabytes(memory.state()),
            megabytes(memory.parameters),
            megabytes(memory.copies),
            megabytes(memory.gradients),
            megabytes(memory.moments),
            if memory.beside > 0 { format!(", teacher {}", megabytes(memory.beside)) } else { String::new() },
            megabytes(memory.total()),
        ));
    }
    let traffic = layout.traffic();
    for (what, bytes) in
        [("gradients", traffic.gradients), ("rows to experts", traffic.rows), ("tensor slices", traffic.tensors)]
    {
        if bytes != LevelBytes::default() {
            lines.push(format!("  sent a step for {what}: {}", levels(bytes)));
        }
    }
    lines
}
