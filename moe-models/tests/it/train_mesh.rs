//! Steps over every kind of layout against one rank on the same global batch: losses, norms and weights, with gradients and
//! moments divided and not, with fewer micro-batches than ranks, and while passes still run.

use crate::train_gpt::{config, corpus, shape};
use crate::train_ranks::{Layout, weights};
use candle_core::Device;
use moe_models::gpt::Gpt;
use moe_models::train::optimizer::{AdamW, Update, UpdateRule};
use moe_models::train::step::{BatchSums, StepBuffers, accumulate_share};
use moe_models::train::{DividedParam, OneRank, Ranks, Saving, TrainConfig, TrainModel, Zero};
use moe_models::{TokenBatch, TrainPass};
use moe_parallel::ParallelDims;
use moe_parallel::comm::thread::ThreadWorld;
use std::collections::BTreeMap;

const STEPS: usize = 3;

/// Losses and norms of some steps, and the weights after them.
#[derive(Debug, PartialEq)]
struct End {
    losses: Vec<f64>,
    norms: Vec<f64>,
    weights: BTreeMap<String, Vec<f32>>,
}

/// The micro-batches of a step.
fn batches(config: &TrainConfig, count: usize, step: usize) -> (Vec<TokenBatch>, Vec<TrainPass>) {
    let (mut corpus, _) = corpus(config);
    let mut draw = || {
        let (mut input_ids, mut target_ids) = (Vec::new(), Vec::new());
        for _ in 0..2 {
            corpus.sampler.draw(&mut input_ids, &mut target_ids);
        }
        TokenBatch { input_ids, target_ids, batch: 2, seq_len: 16 }
    };
    let all: Vec<_> = (0..count * (step + 1)).map(|_| draw()).collect();
    let pass = |micro_batch: usize| TrainPass {
        seed: (31 * step + micro_batch) as u64,
        step: step as u64,
        tokens: 0,
        micro_batch,
    };
    (all[count * step..].to_vec(), (0..count).map(pass).collect())
}

/// What one rank does of the steps.
fn steps(model: &Gpt, ranks: &dyn Ranks, count: usize) -> (Vec<f64>, Vec<f64>) {
    let config = config();
    let param = |name: &String| DividedParam { name: name.clone(), group: model.grad_group(name) };
    let params: Vec<_> = TrainModel::params(model).iter().map(|(name, _)| param(name)).collect();
    let mut division =
        ranks.division(Saving::new(model, model.placement()).unwrap().units().unwrap(), &params).unwrap();
    let rules: Vec<UpdateRule> =
        TrainModel::params(model).iter().map(|(name, var)| model.update_rule(name, var.dims())).collect();
    // Without a large epsilon a gradient that is zero but for rounding moves by a whole step.
    let settings = TrainConfig { eps: 1e-2, ..config.clone() }.adamw();
    let mut optimizer = AdamW::new(settings, division.owned().clone(), rules).unwrap();
    let mut buffers = StepBuffers::new(model).unwrap();
    let (mut losses, mut norms) = (Vec::new(), Vec::new());
    for step in 0..STEPS {
        let (all, passes) = batches(&config, count, step);
        let share = ranks.share(count);
        let (own, passes) = (&all[share.clone()], &passes[share]);
        let idle = TrainPass { step: step as u64, ..TrainPass::default() };
        let own = accumulate_share(model, own, passes, idle, ranks.passes(count), &mut buffers, &mut *division);
        let sums = BatchSums::over(ranks, count, own).unwrap();
        division.finish(&mut buffers.grads).unwrap();
        let params = TrainModel::params(model);
        let grads = division.grads(&buffers.grads);
        let grad_scale = 1.0 / count as f64;
        let squares = division.gather_squares(optimizer.squares(params, &grads).unwrap()).unwrap();
        let grad_norm = optimizer.norm(&squares).unwrap() * grad_scale;
        optimizer.apply(params, &grads, Update { lr: 1e-2, grad_scale, grad_norm }, &buffers.copies).unwrap();
        let written = division.gather_params(params).unwrap();
        buffers.copies.refresh(written.into_iter().map(|param| params[param].1.as_tensor())).unwrap();
        losses.push(sums.loss);
        norms.push(grad_norm);
    }
    (losses, norms)
}

fn alone(count: usize) -> End {
    let model = Gpt::new(shape(), 5, &Device::Cpu).unwrap();
    let (losses, norms) = steps(&model, &OneRank, count);
    End { losses, norms, weights: weights(&[&model]) }
}

fn over(layout: Layout, count: usize) -> End {
    let ends = ThreadWorld::new(layout.dims.world_size()).run(|comm| {
        let mesh = layout.mesh(&comm).unwrap();
        let model = Gpt::new_over(shape(), 5, mesh.clone()).unwrap();
        let ranks = layout.ranks(&mesh, model.table()).unwrap();
        (steps(&model, &*ranks, count), model)
    });
    let (sums, models): (Vec<_>, Vec<_>) = ends.into_iter().unzip();
    assert!(sums.iter().all(|sum| *sum == sums[0]), "ranks end alike: {layout:?}");
    let (losses, norms) = sums.into_iter().next().unwrap();
    End { losses, norms, weights: weights(&models.iter().collect::<Vec<_>>()) }
}

/// The largest difference, as a part of each tensor's largest value.
fn distance(a: &End, b: &End) -> f32 {
    let of = |(name, a): (&String, &Vec<f32>)| {
        let b = &b.weights[name];
        let largest = a.iter().fold(1e-3f32, |most, v| most.max(v.abs()));
        a.iter().zip(b).fold(0f32, |most, (a, b)| most.max((a - b).abs())) / largest
    };
    assert!(a.weights.keys().eq(b.weights.keys()));
    a.weights.iter().map(of).fold(0f32, f32::max)
}

const ZERO: [Zero; 3] = [Zero::Off, Zero::Moments, Zero::Gradients];

fn layouts() -> Vec<ParallelDims> {
    [
        (4, 1, 1, 1),
        (2, 1, 2, 1),
        (4, 1, 4, 1),
        (4, 1, 2, 1),
        (2, 2, 2, 1),
        (2, 1, 1, 2),
        (2, 2, 4, 1),
        (1, 2, 2, 1),
        (3, 1, 3, 1),
        (1, 4, 4, 1),
    ]
    .map(|(dp, tp, ep, slices)| ParallelDims::new(dp, tp, ep, slices))
    .to_vec()
}

/// Where sums have the order of one rank they have its bits; elsewhere they differ by rounding.
#[test]
fn steps_of_every_layout_are_those_of_one_rank() {
    for count in [1, 2, 4, 5] {
        let want = alone(count);
        for dims in layouts() {
            for zero in ZERO {
                for overlap in [true, false] {
                    let mut layout = Layout::new(dims, zero);
                    layout.reduce.overlap = overlap;
                    let got = over(layout, count);
                    let label = format!("{count} micro-batches, {layout:?}");
                    let whole = dims.tp == 1 && dims.expert_slices == 1;
                    // Experts of the layers with fewer experts than ranks are added up in groups first.
                    let in_order = whole && (dims.ep == 1 || dims.ep == dims.dp && dims.ep <= 2) && count <= dims.dp;
                    if in_order || count == 1 && whole {
                        assert!(got == want, "{label}: {:?} {:?}", got.norms, want.norms);
                        continue;
                    }
                    let far = distance(&got, &want);
                    assert!(far < 2e-5, "{label}: {far:e}");
                    for (got, want) in got.losses.iter().chain(&got.norms).zip(want.losses.iter().chain(&want.norms)) {
                        assert!((got - want).abs() < 1e-5 * want.abs(), "{label}: {got} {want}");
                    }
                }
            }
        }
    }
}
