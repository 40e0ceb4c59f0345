//! Every way rows can travel, with every router and every load, against a reference made of plain all-gathers: the same layer
//! with all experts and all micro-batches on each rank. Outputs, gradients and counts are exact.

use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use moe_core::testing::random;
use moe_core::{
    Activation, BranchConfig, Capacity, Dispatcher, DropPolicy, DroplessConfig, MlpConfig, Mode, MoeBlock, MoeConfig,
    RouteContext, RouterConfig, Routing, SeededNoise, Top1Config, Top2Config, TopKConfig, Weighs,
};
use moe_kernels::KernelOps;
use moe_parallel::all_to_all::Route;
use moe_parallel::comm::Reduction;
use moe_parallel::comm::thread::ThreadWorld;
use moe_parallel::dims::{ExpertOrder, part};
use moe_parallel::{
    Collectives, Communicator, Coordination, ExchangeConfig, Mesh, ParallelDims, Phase, RankDispatcher, Site,
};
use std::collections::HashMap;
use std::sync::Arc;

const WORLD: usize = 8;
const EXPERTS: usize = 12;
const D_MODEL: usize = 12;
const SITE: Site = Site::new(Phase::Save);

/// How tokens fall on experts and on ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Load {
    Balanced,
    Skewed,
    OneExpert,
    /// Every other data-parallel rank has no token.
    Idle,
    Ragged,
    Masked,
}

const LOADS: [Load; 6] = [Load::Balanced, Load::Skewed, Load::OneExpert, Load::Idle, Load::Ragged, Load::Masked];

fn routers() -> Vec<(&'static str, RouterConfig)> {
    let tight = Capacity { train_factor: Some(0.8), eval_factor: None, min_capacity: 1 };
    let top_k = |capacity| TopKConfig { top_k: 3, capacity, drop_policy: DropPolicy::Probs, jitter: false };
    let dropless = |k| RouterConfig::Dropless {
        config: DroplessConfig::softmax(k, true),
        selection_bias: false,
        bias: false,
        weighs: Weighs::Outputs,
    };
    let top_2 = |capacity| Top2Config { capacity, ..Top2Config::default() };
    vec![
        ("top-1, capacity", RouterConfig::Top1(Top1Config { capacity: tight, ..Top1Config::default() })),
        ("top-2, capacity", RouterConfig::Top2(top_2(tight))),
        ("top-k, capacity", RouterConfig::TopK(top_k(tight))),
        ("top-1, dropless", dropless(1)),
        ("top-2, dropless", RouterConfig::Top2(top_2(Capacity::UNLIMITED))),
        ("top-k, dropless", dropless(3)),
    ]
}

fn layer_config(router: RouterConfig) -> MoeConfig {
    let expert = MlpConfig {
        d_model: D_MODEL,
        d_ff: 20,
        activation: Activation::GeluTanh,
        bias: true,
        in_std: 0.3,
        out_std: 0.3,
    };
    MoeConfig {
        num_experts: EXPERTS,
        expert,
        router,
        branch: BranchConfig::Residual(MlpConfig { d_ff: 8, ..expert }),
        gate_bound: 0.5,
        load_balance_coef: 0.0,
        router_z_coef: 0.0,
    }
}

/// The tokens of a data-parallel rank; the first feature pulls them to some experts.
fn tokens(load: Load, d: usize) -> Vec<f32> {
    let count = match load {
        Load::Idle if d % 2 == 1 => 0,
        Load::Ragged => 3 * d + 1,
        _ => 13,
    };
    let mut values: Vec<f32> =
        random(40 + d as u64, &[count, D_MODEL], 1.0, DType::F32).flatten_all().unwrap().to_vec1().unwrap();
    values.iter_mut().step_by(D_MODEL).for_each(|v| *v = 1.0);
    values
}

fn mask(load: Load, d: usize, count: usize) -> Option<Vec<bool>> {
    (load == Load::Masked).then(|| (0..count).map(|i| !(i + d).is_multiple_of(3)).collect())
}

/// Whole parameters; biases are not zero, so that a lost one shows.
fn parameters(config: &MoeConfig, load: Load) -> Vec<(moe_core::ParamSpec, Vec<f32>)> {
    let value = |(index, spec): (usize, moe_core::ParamSpec)| {
        let mut values: Vec<f32> =
            random(index as u64, &spec.shape, 0.3, DType::F32).flatten_all().unwrap().to_vec1().unwrap();
        if spec.name == config.gate().name {
            for (expert, row) in values.chunks_mut(D_MODEL).enumerate() {
                row[0] = match load {
                    Load::Skewed => -0.4 * expert as f32,
                    Load::OneExpert if expert == 5 => 40.0,
                    _ => row[0],
                };
            }
        }
        (spec, values)
    };
    config.params().into_iter().enumerate().map(value).collect()
}

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn variables(params: &[(String, Vec<usize>, Vec<f32>)]) -> (Vec<(String, Var)>, VarBuilder<'static>) {
    let var = |(name, shape, values): &(String, Vec<usize>, Vec<f32>)| {
        (name.clone(), Var::from_vec(values.clone(), shape.as_slice(), &Device::Cpu).unwrap())
    };
    let vars: Vec<(String, Var)> = params.iter().map(var).collect();
    let tensors: HashMap<String, Tensor> = vars.iter().map(|(n, v)| (n.clone(), v.as_tensor().clone())).collect();
    (vars, VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu))
}

/// Output, gradient of the tokens and gradients of the parameters of one micro-batch.
struct Step {
    hidden: Vec<f32>,
    tokens: Vec<f32>,
    params: Vec<Vec<f32>>,
    /// Rows each expert takes of it.
    kept: Vec<usize>,
    routing: Routing,
}

fn step<D: Dispatcher>(block: &MoeBlock<D>, vars: &[(String, Var)], load: Load, d: usize, values: &[f32]) -> Step {
    let count = values.len() / D_MODEL;
    let input = Var::from_vec(values.to_vec(), (count, D_MODEL), &Device::Cpu).unwrap();
    let (noise, used) = (SeededNoise::new(d as u64, 0), mask(load, d, count));
    let context = RouteContext { used_tokens: used.as_deref(), ..RouteContext::new(Mode::Train, &noise) };
    let output = block.forward(input.as_tensor(), &context).unwrap();
    let factors = random(90 + d as u64, &[count, D_MODEL], 1.0, DType::F32);
    // A rank without tokens has a loss too: a sum of nothing, with its graph.
    let rows =
        Tensor::cat(&[&output.hidden.mul(&factors).unwrap(), &output.hidden.narrow(0, 0, 0).unwrap()], 0).unwrap();
    let grads = rows.sum_all().unwrap().backward().unwrap();
    let grad = |var: &Var| grads.get(var).map_or(vec![0.0; var.elem_count()], flat);
    let mut kept = vec![0; EXPERTS];
    output.routing.expert_ids.iter().filter(|&&e| e != moe_core::DROPPED).for_each(|&e| kept[e as usize] += 1);
    let params = vars.iter().map(|(_, v)| grad(v)).collect();
    Step { hidden: flat(&output.hidden), tokens: grad(&input), params, kept, routing: output.routing }
}

fn sum(parts: impl Iterator<Item = Vec<f32>>) -> Vec<f32> {
    let add = |mut sum: Vec<f32>, part: Vec<f32>| {
        sum.iter_mut().zip(&part).for_each(|(a, b)| *a += b);
        sum
    };
    parts.reduce(add).unwrap()
}

#[track_caller]
fn same(got: &[f32], want: &[f32], what: &str) {
    assert_eq!(got.len(), want.len(), "{what}");
    let differ = got.iter().zip(want).filter(|(a, b)| a != b).count();
    assert_eq!(differ, 0, "{what}: {differ} of {} values differ", got.len());
}

fn close(got: &[f32], want: &[f32], what: &str) {
    let largest = want.iter().fold(0f32, |m, v| m.max(v.abs()));
    let worst = got.iter().zip(want).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
    assert!(worst <= 1e-4 * largest, "{what}: {worst:e} of {largest:e}");
}

/// One mode, router and load on all ranks.
fn check(
    comm: &Arc<dyn Communicator>,
    dims: ParallelDims,
    exchange: ExchangeConfig,
    name: &str,
    router: RouterConfig,
    load: Load,
) {
    let label = format!("{name} {load:?} {dims:?} {exchange:?} rank {}", comm.rank());
    let config = layer_config(router);
    let mesh = Mesh::new(Arc::clone(comm), dims, 4, exchange).unwrap();
    let (placement, d) = (mesh.placement(), dims.dense(comm.rank()).dp_rank);
    let whole = parameters(&config, load);

    // 1. The layer over ranks.
    let held = placement.experts(EXPERTS);
    let local = whole.iter().map(|(spec, values)| {
        let (mut shape, mut values) = (spec.shape.clone(), values.clone());
        if spec.is_stacked() {
            let each = values.len() / EXPERTS;
            values = values[held.start * each..held.end * each].to_vec();
            shape[0] = held.len();
        }
        (spec.name.clone(), shape, values)
    });
    let (vars, vb) = variables(&local.collect::<Vec<_>>());
    let ops = Arc::new(KernelOps::default());
    let dispatcher = mesh.dispatcher(EXPERTS, 3, ops.clone()).unwrap();
    let block = MoeBlock::with_dispatcher(&config, vb, ops.clone(), dispatcher.clone()).unwrap();
    let got = step(&block, &vars, load, d, &tokens(load, d));

    // 2. Everything on every rank, by plain all-gathers: tokens of all micro-batches, experts of all ranks.
    let counts: Vec<usize> = (0..dims.dp).map(|d| tokens(load, d).len()).collect();
    let all = mesh.data().all_gather_v(SITE, &tokens(load, d), &counts).unwrap();
    let groups = dims.experts(EXPERTS).expert_group(comm.rank());
    let place = groups.iter().position(|&r| r == comm.rank()).unwrap();
    let experts = comm.split(SITE, groups[0] as u64, place as u64).unwrap();
    let gathered = whole.iter().zip(&vars).map(|((spec, values), (_, var))| {
        let values = if spec.is_stacked() {
            let each = values.len() / EXPERTS;
            let counts: Vec<usize> =
                (0..experts.size()).map(|r| part(EXPERTS, r, experts.size()).len() * each).collect();
            experts.all_gather_v(SITE, &flat(var), &counts).unwrap()
        } else {
            flat(var)
        };
        (spec.name.clone(), spec.shape.clone(), values)
    });
    let (whole_vars, vb) = variables(&gathered.collect::<Vec<_>>());
    let reference = MoeBlock::new(&config, vb, ops).unwrap();
    let mut rest = all.as_slice();
    let want: Vec<Step> = (0..dims.dp)
        .map(|d| {
            let (own, others) = rest.split_at(counts[d]);
            rest = others;
            step(&reference, &whole_vars, load, d, own)
        })
        .collect();

    // 3. Exact, but where each tensor index has seen a part of the rows: there sums have another order.
    same(&got.hidden, &want[d].hidden, &format!("{label}: output"));
    same(&got.tokens, &want[d].tokens, &format!("{label}: gradient of the tokens"));
    let by_tokens = exchange.coordination == Coordination::ByTokens;
    let senders: Vec<usize> = if dims.expert_order == ExpertOrder::WithinTensor {
        groups.iter().map(|&rank| dims.dense(rank).dp_rank).collect()
    } else {
        (0..dims.dp).collect()
    };
    for (index, (spec, _)) in whole.iter().enumerate() {
        let what = format!("{label}: gradient of {}", spec.name);
        if !spec.is_stacked() {
            same(&got.params[index], &want[d].params[index], &what);
            continue;
        }
        let each = whole_vars[index].1.elem_count() / EXPERTS;
        let own = |d: &usize| want[*d].params[index][held.start * each..held.end * each].to_vec();
        let total = sum(senders.iter().map(own));
        if by_tokens {
            let parts = mesh.tensor().all_reduce(SITE, &got.params[index], Reduction::Sum).unwrap();
            close(&parts, &total, &what);
        } else {
            same(&got.params[index], &total, &what);
        }
    }
    // 4. Counted: rows of each expert here, by the rank they come from.
    let RankDispatcher::AllToAll(ranks) = &dispatcher else { panic!("{label}: rows must travel") };
    let own = tokens(load, d);
    let own = Tensor::from_vec(own.clone(), (own.len() / D_MODEL, D_MODEL), &Device::Cpu).unwrap();
    let (rows, receipt) = ranks.dispatch(&own, &got.routing).unwrap();
    let (tp_rank, from) = (dims.dense(comm.rank()).tp_rank, ranks.exchange().all_to_all.comm());
    let expected = held.flat_map(|expert| {
        from.group().members().iter().map(move |&rank| (dims.dense(rank).dp_rank, expert)).collect::<Vec<_>>()
    });
    let expected = expected.map(|(d, expert)| match want[d].kept[expert] {
        count if by_tokens => part(count, tp_rank, dims.tp).len(),
        count => count,
    });
    let counted: Vec<usize> = rows.offsets.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert_eq!(counted, expected.collect::<Vec<_>>(), "{label}: rows of each expert from each rank");
    ranks.combine(rows, receipt).unwrap();
}

#[test]
fn all_modes_routers_and_loads() {
    let plain = ParallelDims::new(WORLD, 1, WORLD, 1);
    let pairs = ParallelDims::new(WORLD / 2, 2, WORLD, 1);
    let within = ParallelDims::new(WORLD / 2, 2, WORLD / 2, 1).with_expert_order(ExpertOrder::WithinTensor);
    let modes = [(plain, Coordination::None), (pairs, Coordination::ByDestination), (within, Coordination::ByTokens)];
    ThreadWorld::new(WORLD).run(|comm| {
        for (dims, coordination) in modes {
            for route in [Route::Flat, Route::Hierarchical] {
                for (name, router) in routers() {
                    for load in LOADS {
                        check(&comm, dims, ExchangeConfig { route: route.into(), coordination }, name, router, load);
                    }
                }
            }
        }
    });
}

/// Nothing coordinated: every rank of a tensor group sends its rows, and experts see them twice.
#[test]
fn uncoordinated_tensor_groups_get_the_same_results() {
    let pairs = ParallelDims::new(WORLD / 2, 2, WORLD, 1);
    ThreadWorld::new(WORLD).run(|comm| {
        let config = layer_config(routers()[4].1);
        let whole = parameters(&config, Load::Ragged);
        let run = |coordination| {
            let exchange = ExchangeConfig { route: Route::Flat.into(), coordination };
            let mesh = Mesh::new(Arc::clone(&comm), pairs, 4, exchange).unwrap();
            let held = mesh.placement().experts(EXPERTS);
            let local = whole.iter().map(|(spec, values)| {
                let each = values.len() / EXPERTS;
                match spec.is_stacked() {
                    true => (
                        spec.name.clone(),
                        [&[held.len()], &spec.shape[1..]].concat(),
                        values[held.start * each..held.end * each].to_vec(),
                    ),
                    false => (spec.name.clone(), spec.shape.clone(), values.clone()),
                }
            });
            let (vars, vb) = variables(&local.collect::<Vec<_>>());
            let ops = Arc::new(KernelOps::default());
            let dispatcher = mesh.dispatcher(EXPERTS, 0, ops.clone()).unwrap();
            let block = MoeBlock::with_dispatcher(&config, vb, ops, dispatcher).unwrap();
            let d = pairs.dense(comm.rank()).dp_rank;
            step(&block, &vars, Load::Ragged, d, &tokens(Load::Ragged, d))
        };
        let (twice, once) = (run(Coordination::None), run(Coordination::ByDestination));
        same(&twice.hidden, &once.hidden, "output");
        same(&twice.tokens, &once.tokens, "gradient of the tokens");
        twice.params.iter().zip(&once.params).for_each(|(a, b)| close(a, b, "gradients of the parameters"));
    });
}
