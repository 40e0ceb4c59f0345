//! [`Original`]: the decoder with the MoE layers of the code that the paper starts from. One-hot einsums move tokens, every expert
//! gets `capacity` rows of every rank, all of them travel flat, and every expert multiplies all its rows.
//!
//! Attention, dense layers and products are those of [`moe_models::Decoder`], so that the difference is the formulation's alone.

use anyhow::{Context, Result, ensure};
use candle_core::{Storage, Tensor};
use candle_nn::VarBuilder;
use moe_core::{
    Capacity, Dispatcher, EinsumDispatcher, EinsumReceipt, ExpertRows, Mlp, Mode, MoeBlock, MoeConfig, Ops, ParamInit,
    ParamSpec, RouteContext, RouterConfig, Routing, SeededNoise, Top1Config,
};
use moe_models::blocks::{Attention, Embedding, Norm, OutputHead, Rotaries};
use moe_models::config::FeedForwardConfig;
use moe_models::{DecoderConfig, KvPool, PagedStep};
use moe_parallel::all_to_all::{AllToAll, Counts, Direction, Moving, Nodes, Plan, Route};
use moe_parallel::dims::part;
use moe_parallel::{Collectives, Mesh, Phase, Site};
use std::sync::Arc;

/// Sends `capacity` rows for each expert to the rank that holds it, zeros where no token goes there.
///
/// # Source
/// DeepSpeed `MOELayer.forward`: einsum, `all_to_all_single`, experts, `all_to_all_single`, einsum.
#[derive(Debug, Clone)]
pub(crate) struct PaddedDispatcher {
    all_to_all: Arc<AllToAll>,
    site: Site,
}

impl PaddedDispatcher {
    /// Of layer number `layer`, over all ranks of `mesh`.
    fn new(mesh: &Mesh, layer: u32) -> Result<Self> {
        let world = mesh.world();
        let nodes = Nodes::uniform(world.group().members(), mesh.ranks_per_node());
        let all_to_all = Arc::new(AllToAll::new(Arc::clone(world), nodes, Route::Flat)?);
        Ok(Self { all_to_all, site: Site::layer(Phase::Forward, layer) })
    }

    /// Ranks agree on the rows without asking: as many for every expert.
    fn plan(&self, num_experts: usize, capacity: usize) -> Plan {
        let (rank, size) = (self.all_to_all.comm().rank(), self.all_to_all.comm().size());
        let held: Vec<usize> = (0..size).map(|rank| part(num_experts, rank, size).len()).collect();
        let nodes = self.all_to_all.nodes();
        self.all_to_all.plan(&Counts::equal(capacity, &held, rank, Route::Flat, nodes))
    }

    fn start(&self, plan: &Arc<Plan>, direction: Direction, rows: &Tensor) -> moe_core::Result<Moving<f32>> {
        let rows = rows.contiguous()?;
        let (storage, layout) = rows.storage_and_layout();
        let (Storage::Cpu(values), Some((from, to))) = (&*storage, layout.contiguous_offsets()) else {
            return Err(moe_core::Error::Input("rows must lie in the CPU's memory".into()));
        };
        let values = &values.as_slice::<f32>()?[from..to];
        Ok(self.all_to_all.start(plan, direction, self.site, values, rows.dim(1)?)?)
    }
}

/// What one dispatch leaves behind.
#[derive(Debug)]
pub(crate) struct PaddedReceipt {
    einsum: EinsumReceipt,
    plan: Arc<Plan>,
    num_experts: usize,
    d_model: usize,
}

fn arrived(moving: Moving<f32>, like: &Tensor, width: usize) -> moe_core::Result<Tensor> {
    let values = moving.finish()?;
    Ok(Tensor::from_vec(values, ((), width), like.device())?)
}

impl Dispatcher for PaddedDispatcher {
    type Dispatching = (Moving<f32>, PaddedReceipt, Tensor);
    type Receipt = PaddedReceipt;
    type Combining = (Moving<f32>, PaddedReceipt, Tensor);

    fn num_local_experts(&self, num_experts: usize) -> usize {
        let comm = self.all_to_all.comm();
        part(num_experts, comm.rank(), comm.size()).len()
    }

    fn begin_dispatch(&self, tokens: &Tensor, routing: &Routing) -> moe_core::Result<Self::Dispatching> {
        let (ExpertRows { rows, offsets }, einsum) = EinsumDispatcher.dispatch(tokens, routing)?;
        let plan = Arc::new(self.plan(routing.num_experts, offsets[1]));
        let receipt = PaddedReceipt {
            einsum,
            plan: Arc::clone(&plan),
            num_experts: routing.num_experts,
            d_model: tokens.dim(1)?,
        };
        Ok((self.start(&plan, Direction::There, &rows)?, receipt, rows))
    }

    fn finish_dispatch(
        &self,
        (moving, receipt, sent): Self::Dispatching,
    ) -> moe_core::Result<(ExpertRows, PaddedReceipt)> {
        let rows = arrived(moving, &sent, receipt.d_model)?;
        let held = self.num_local_experts(receipt.num_experts);
        let each = rows.dim(0)? / held.max(1);
        Ok((ExpertRows { rows, offsets: (0..=held).map(|expert| expert * each).collect() }, receipt))
    }

    fn begin_combine(&self, rows: ExpertRows, receipt: PaddedReceipt) -> moe_core::Result<Self::Combining> {
        Ok((self.start(&receipt.plan, Direction::Back, &rows.rows)?, receipt, rows.rows))
    }

    fn finish_combine(&self, (moving, receipt, sent): Self::Combining) -> moe_core::Result<Tensor> {
        let rows = arrived(moving, &sent, receipt.d_model)?;
        let rows = ExpertRows { rows, offsets: Vec::new() };
        EinsumDispatcher.finish_combine(EinsumDispatcher.begin_combine(rows, receipt.einsum)?)
    }
}

#[derive(Debug)]
enum FeedForward {
    Dense(Mlp),
    Moe(MoeBlock<PaddedDispatcher>),
}

#[derive(Debug)]
struct Layer {
    attention_norm: Norm,
    attention: Attention,
    feed_forward_norm: Norm,
    feed_forward: FeedForward,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Original {
    tokens: Embedding,
    positions: Embedding,
    layers: Vec<Layer>,
    norm: Norm,
    head: OutputHead,
    ops: Arc<dyn Ops>,
}

impl Original {
    /// This rank's part, whose parameters `vb` gives; experts take `min_capacity` rows at least.
    ///
    /// # Errors
    /// For a model of another family, or one whose layers are divided; if a parameter is missing.
    pub(crate) fn over(
        config: &DecoderConfig,
        vb: VarBuilder<'_>,
        ops: Arc<dyn Ops>,
        mesh: &Mesh,
        min_capacity: usize,
    ) -> Result<Self> {
        ensure!(config.learned_positions && config.tie_embeddings, "the original is a moe_gpt");
        ensure!(mesh.placement().tensor().1 == 1, "the original's layers are not divided: --tp must be 1");
        let model = vb.pp("model");
        let table = |name: &str, rows: usize| {
            let spec = ParamSpec::new("weight", &[rows, config.d_model], ParamInit::Zeros);
            Embedding::new(&spec, model.pp(name), Arc::clone(&ops))
        };
        let tokens = table("embed_tokens", config.vocab_size)?;
        let mut rotaries = Rotaries::new(config.max_seq_len);
        let mut layers = Vec::new();
        for (index, layer) in config.layers.iter().enumerate() {
            let vb = model.pp("layers").pp(index);
            let norm = |name: &str| Norm::new(&layer.norm, vb.pp(name), Arc::clone(&ops));
            let feed_forward = match &layer.feed_forward {
                FeedForwardConfig::Dense(mlp) => FeedForward::Dense(Mlp::new(mlp, vb.pp("mlp"), Arc::clone(&ops))?),
                FeedForwardConfig::Moe(moe) => {
                    let dispatcher = PaddedDispatcher::new(mesh, index as u32)?;
                    let moe = with_capacity(moe, min_capacity)?;
                    let block = MoeBlock::with_dispatcher(&moe, vb.pp("mlp"), Arc::clone(&ops), dispatcher)?;
                    FeedForward::Moe(block)
                }
            };
            layers.push(Layer {
                attention_norm: norm("input_layernorm")?,
                attention: Attention::new(&layer.attention, vb.pp("self_attn"), Arc::clone(&ops), &mut rotaries)?,
                feed_forward_norm: norm("post_attention_layernorm")?,
                feed_forward,
            });
        }
        Ok(Self {
            positions: table("embed_positions", config.max_seq_len)?,
            head: OutputHead::tied(tokens.table(), Arc::clone(&ops)),
            norm: Norm::new(&config.norm, model.pp("norm"), Arc::clone(&ops))?,
            tokens,
            layers,
            ops,
        })
    }

    /// Logits after every token of `step`, and how many tokens found an expert full, over all layers.
    ///
    /// # Errors
    /// If a part refuses the input, or a rank fails.
    pub(crate) fn run(&self, step: &PagedStep, pool: &KvPool) -> Result<(Tensor, u64)> {
        let mut dropped = 0;
        let mut x =
            self.ops.add(&self.tokens.forward(step.token_ids())?, &self.positions.forward(step.positions())?)?;
        for (index, layer) in self.layers.iter().enumerate() {
            let normed = layer.attention_norm.forward(&x)?;
            let attended = tracing::debug_span!("attention")
                .in_scope(|| layer.attention.forward_paged(&normed, step, pool.layer(index)))?;
            let [sum, normed] = layer.feed_forward_norm.add(&x, &attended)?;
            let added = match &layer.feed_forward {
                FeedForward::Dense(mlp) => mlp.forward(&normed)?,
                FeedForward::Moe(moe) => {
                    let noise = SeededNoise::new(0, index as u64);
                    let output = moe.forward(&normed, &RouteContext::new(Mode::Eval, &noise))?;
                    dropped += u64::from(output.load.dropped);
                    output.hidden
                }
            };
            x = self.ops.add(&sum, &added)?;
        }
        Ok((self.head.logits(&self.norm.forward(&x)?)?, dropped))
    }
}

/// The layer as DeepSpeed evaluates it: a capacity factor of 1, the first tokens first.
fn with_capacity(moe: &MoeConfig, min_capacity: usize) -> Result<MoeConfig> {
    let RouterConfig::Top1(router) = moe.router else { None.context("the original's layers are top-1")? };
    let capacity = Capacity { eval_factor: Some(1.0), min_capacity, ..router.capacity };
    Ok(MoeConfig { router: RouterConfig::Top1(Top1Config { capacity, use_rts: false, noisy_gate: None }), ..*moe })
}
