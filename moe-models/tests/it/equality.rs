//! One model over ranks against one rank that runs the same micro-batches, data-parallel rank d's as number d. Shared by the
//! test on threads and by `examples/mpi_equality.rs`.

use candle_core::{Device, Tensor, Var};
use moe_core::tape::{GradBuffers, Tape};
use moe_core::{CounterRng, ParamSpec};
use moe_kernels::KernelOps;
use moe_models::gpt::{Gpt, GptConfig};
use moe_models::train::model::{Pass, TokenBatch};
use moe_models::{Decoder, DropoutConfig, ParamSource, ParamTable, Precision};
use moe_parallel::all_to_all::Route;
use moe_parallel::comm::Reduction;
use moe_parallel::dims::ExpertOrder;
use moe_parallel::{
    Collectives, Communicator, Coordination, ExchangeConfig, Mesh, ParallelDims, Phase, Placement, Site,
};
use std::collections::HashMap;
use std::sync::Arc;

const SEED: u64 = 5;
const SEQ_LEN: usize = 16;
/// Most data-parallel ranks of a layout.
const MOST_DP: usize = 8;
/// Of a tensor's largest value, where matrices are split over ranks and sums have another order.
const TOLERANCE: f32 = 1e-4;
/// The same where only sums of whole micro-batches have another order.
const REORDERED: f32 = 1e-6;

/// A model: experts of its MoE layers, choices per token, and whether tokens are dropped.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Kind {
    pub(crate) experts: Vec<usize>,
    pub(crate) top_k: usize,
    pub(crate) capacity: Option<f64>,
    pub(crate) precision: Precision,
    pub(crate) dropout: DropoutConfig,
}

/// A layout of ranks and the way rows travel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    pub(crate) dims: ParallelDims,
    pub(crate) ranks_per_node: usize,
    pub(crate) exchange: ExchangeConfig,
}

/// What one micro-batch gives on one rank: exact bits.
struct Outcome {
    logits: Vec<f32>,
    loss: f32,
    aux_loss: f64,
    /// By name, of the whole parameter.
    grads: HashMap<String, Tensor>,
}

/// A model on one rank, with the outcomes of all micro-batches.
pub(crate) struct Reference {
    kind: Kind,
    model: Gpt,
    outcomes: Vec<Outcome>,
}

/// Every layout of up to 8 ranks that is checked on `world` of them.
pub(crate) fn layouts(world: usize) -> Vec<Layout> {
    let mut all = Vec::new();
    for tp in [1, 2, 4].into_iter().filter(|tp| world.is_multiple_of(*tp)) {
        for ep in [1, 2, 3, 4, 6, 8] {
            for slices in [1, 2] {
                for order in [ExpertOrder::Consecutive, ExpertOrder::WithinTensor] {
                    let dims = ParallelDims::new(world / tp, tp, ep, slices).with_expert_order(order);
                    if dims.validate(world).is_err() || (tp == 1 && order == ExpertOrder::WithinTensor) {
                        continue;
                    }
                    for exchange in exchanges(dims) {
                        all.push(Layout { dims, ranks_per_node: if world == 8 { 4 } else { 2 }, exchange });
                    }
                }
            }
        }
    }
    all
}

/// Routes and coordinations that go with a layout.
fn exchanges(dims: ParallelDims) -> Vec<ExchangeConfig> {
    let shared = match dims.expert_order {
        ExpertOrder::WithinTensor => Coordination::ByTokens,
        _ => Coordination::ByDestination,
    };
    let coordinations = if dims.tp > 1 { vec![Coordination::None, shared] } else { vec![Coordination::None] };
    let with = |route: Route| {
        coordinations.iter().map(move |&coordination| ExchangeConfig { route: route.into(), coordination })
    };
    if dims.ep == 1 {
        with(Route::Flat).collect()
    } else {
        with(Route::Flat).chain(with(Route::Hierarchical)).collect()
    }
}

impl Reference {
    pub(crate) fn new(kind: &Kind) -> Self {
        let mut config = GptConfig::preset("tiny-pr-moe").expect("a preset");
        (config.vocab_size, config.max_seq_len, config.d_model, config.num_heads, config.d_ff) =
            (61, SEQ_LEN, 24, 4, 40);
        (config.init_std, config.num_layers) = (0.2, 2 * kind.experts.len());
        let moe = config.moe.as_mut().expect("experts");
        (moe.num_experts, moe.top_k, moe.capacity.train_factor) = (kind.experts.clone(), kind.top_k, kind.capacity);
        let model =
            Gpt::new(config, SEED, &Device::Cpu).and_then(|m| m.with_precision(kind.precision)).expect("a model");
        let model = model.with_dropout(kind.dropout).expect("probabilities");
        let outcomes = (0..MOST_DP)
            .map(|d| {
                let vars = model.params().iter().map(|(name, var)| (name.clone(), var.clone())).collect::<Vec<_>>();
                outcome(model.training_decoder(), &vars, d)
            })
            .collect();
        Self { kind: kind.clone(), model, outcomes }
    }

    fn table(&self) -> &ParamTable {
        self.model.table()
    }
}

/// Micro-batch `d`: one sequence, so that the gradient of the positions is that of the activations of the first layer.
fn batch(d: usize) -> (TokenBatch, Pass) {
    let mut rng = CounterRng::new(SEED, d as u64);
    let ids: Vec<u32> = (0..=SEQ_LEN).map(|_| rng.below(61)).collect();
    let batch =
        TokenBatch { input_ids: ids[..SEQ_LEN].to_vec(), target_ids: ids[1..].to_vec(), batch: 1, seq_len: SEQ_LEN };
    (batch, Pass::train(100 + d as u64))
}

fn outcome(decoder: &Decoder, vars: &[(String, Var)], d: usize) -> Outcome {
    let (batch, pass) = batch(d);
    let (hidden, _) = decoder.hidden(&batch.input_ids, SEQ_LEN, pass).expect("a forward pass");
    let logits = decoder.head().logits(&hidden.detach()).expect("logits");
    // As the trainer takes them: where gradients are kept.
    let mut buffers = GradBuffers::new(vars.iter().map(|(name, var)| (name.as_str(), var))).expect("variables");
    buffers.begin();
    let (output, tape) = Tape::record(|| decoder.loss(&batch, pass).expect("a loss"));
    tape.backward_of(&output.loss, &mut buffers.gradients()).expect("a backward pass");
    buffers.finish();
    let grads = vars.iter().enumerate().map(|(index, (name, var))| {
        let grad = Tensor::from_slice(buffers.of(index), var.shape(), var.device()).expect("a gradient");
        (name.clone(), grad)
    });
    Outcome {
        logits: flat(&logits),
        loss: output.loss.to_scalar().expect("a scalar"),
        aux_loss: output.parts.aux(),
        grads: grads.collect(),
    }
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().and_then(|t| t.to_vec1()).expect("values")
}

/// Equal to the last bit (0 and -0 are one number), or within `tolerance` of the largest value.
fn compare(got: &[f32], want: &[f32], tolerance: Option<f32>, what: &dyn Fn() -> String) {
    assert_eq!(got.len(), want.len(), "{}: sizes", what());
    let Some(tolerance) = tolerance else {
        let differ = got.iter().zip(want).filter(|(a, b)| a != b).count();
        assert_eq!(differ, 0, "{}: {differ} of {} values differ", what(), got.len());
        return;
    };
    let largest = want.iter().fold(0f32, |most, v| most.max(v.abs()));
    let worst = got.iter().zip(want).fold(0f32, |most, (a, b)| most.max((a - b).abs()));
    assert!(worst <= tolerance * largest, "{}: differs by {worst:e} of {largest:e}", what());
}

/// The part of a whole gradient that a rank holds.
fn part(placement: &Placement, spec: &ParamSpec, whole: &Tensor) -> Vec<f32> {
    flat(&placement.local(spec, whole.clone()).expect("a part"))
}

/// Sums in the given order.
fn sum(parts: impl Iterator<Item = Vec<f32>>) -> Vec<f32> {
    parts
        .reduce(|mut sum, part| {
            sum.iter_mut().zip(&part).for_each(|(a, b)| *a += b);
            sum
        })
        .unwrap_or_default()
}

/// Runs one step of the model over all ranks of `world` and holds it to the reference.
pub(crate) fn check(world: &Arc<dyn Communicator>, layout: &Layout, reference: &Reference) {
    let Layout { dims, ranks_per_node, exchange } = *layout;
    let label = |what: &str| format!("{:?} {layout:?} rank {}: {what}", reference.kind, world.rank());

    // 1. This rank's part of the model, and its step.
    let mesh = Mesh::new(Arc::clone(world), dims, ranks_per_node, exchange).expect("a mesh");
    let placement = mesh.placement();
    let table = Arc::new(reference.table().clone());
    let value = |spec: &ParamSpec| {
        let whole = spec.initial(SEED, &Device::Cpu).expect("values");
        Var::from_tensor(&placement.local(spec, whole).expect("a part")).expect("a variable")
    };
    let vars: Vec<(String, Var)> = table.specs().iter().map(|spec| (spec.name.clone(), value(spec))).collect();
    let vb = ParamSource::variables(Arc::clone(&table), &vars).at(placement).builder(&Device::Cpu);
    let config = reference.model.decoder_config().clone();
    let ops = Arc::new(KernelOps::new(reference.kind.precision));
    let decoder = Decoder::over(config, vb, ops, &mesh).expect("a decoder");
    let decoder = decoder.with_dropout(reference.kind.dropout).expect("probabilities");
    let d = dims.dense(world.rank()).dp_rank;
    let got = outcome(&decoder, &vars, d);

    // 2. Outputs of its micro-batch.
    let whole_matrices = dims.tp == 1 && dims.expert_slices == 1;
    let tolerance = (!whole_matrices).then_some(TOLERANCE);
    let want = &reference.outcomes[d];
    compare(&got.logits, &want.logits, tolerance, &|| label("logits"));
    compare(&[got.loss], &[want.loss], tolerance, &|| label("loss"));
    compare(&[got.aux_loss as f32], &[want.aux_loss as f32], tolerance, &|| label("auxiliary loss"));

    // 3. Gradients: its own, then summed over the ranks that hold the same part.
    for spec in table.specs() {
        let (name, own) = (&spec.name, flat(&got.grads[&spec.name]));
        let of = |d: usize| part(&placement, spec, &reference.outcomes[d].grads[name]);
        if !spec.is_stacked() {
            compare(&own, &of(d), tolerance, &|| label(&format!("gradient of {name}")));
        }
        let experts = dims.experts(spec.shape[0]);
        let (mut reordered, replicas) = (tolerance, mesh.gradient_group(spec).expect("a group"));
        if spec.is_stacked() && whole_matrices {
            let senders = experts.expert_group(world.rank());
            let want = sum(senders.iter().map(|&rank| of(dims.dense(rank).dp_rank)));
            compare(&own, &want, None, &|| label(&format!("gradient of {name} over its senders")));
            let in_order = experts.ep == 1 || experts.ep == dims.dp;
            reordered = (!in_order).then_some(REORDERED);
        }
        let site = Site::new(Phase::Update);
        let total = replicas.all_reduce(site, &own, Reduction::Sum).expect("a sum");
        compare(&total, &sum((0..dims.dp).map(of)), reordered, &|| label(&format!("sum of the gradients of {name}")));
    }
}
