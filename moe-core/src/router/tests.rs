//! The golden vectors of DeepSpeed's own functions (executed on PyTorch), dropless routing, invariants, gradients.

use super::*;
use crate::testing::{check_gradients, random, random_var};
use crate::{Capacity, DROPPED, load_balance_loss, router_z_loss, updated_selection_bias};
use candle_core::{DType, Device, Tensor, Var};
use proptest::prelude::*;

const Z: [[f32; 4]; 6] = [
    [2., 1., 0., -1.],
    [1.5, 1., 0.5, 0.],
    [3., 0., 0., 1.],
    [0., 2., 1., -1.],
    [1., -1., 0.5, 0.],
    [0.2, 0.1, 0.4, 0.3],
];

/// The injected draws of the golden cases.
#[derive(Debug)]
struct Injected;

impl NoiseSource for Injected {
    fn uniform(&self, _: usize, _: usize) -> Vec<f32> {
        [
            [0.9, 0.1, 0.2, 0.3],
            [0.3, 0.5, 0.6, 0.1],
            [0.5, 0.2, 0.7, 0.4],
            [0.1, 0.8, 0.3, 0.2],
            [0.7, 0.4, 0.1, 0.6],
            [0.2, 0.6, 0.95, 0.5],
        ]
        .concat()
    }
    fn gumbel(&self, _: usize, _: usize) -> Vec<f32> {
        [[0., 3., 0., 0.], [0., 0., 2., 0.], [0., 1., 5., 0.], [0., 0., 0., 4.], [0., 0., 0., 0.], [0., 0., 0., 1.]]
            .concat()
    }
    fn jitter(&self, rows: usize, cols: usize, _: f32) -> Vec<f32> {
        vec![1.0; rows * cols]
    }
}

/// Token, expert, slot, weight.
type Entry = (usize, u32, u32, f32);

struct Golden {
    loss: f32,
    capacity: Option<usize>,
    load: [u32; 4],
    entries: Vec<Entry>,
}

fn logits() -> Tensor {
    Tensor::new(&Z, &Device::Cpu).unwrap()
}

/// The logits with the tie of token 2 (experts 1 and 2) broken the way PyTorch's `topk` happened to; ours would take the
/// lower id. 1e-7 moves no figure of the fixture.
fn untied_logits() -> Tensor {
    let mut z = Z;
    z[2][1] = -1e-7;
    Tensor::new(&z, &Device::Cpu).unwrap()
}

fn gate(experts: usize) -> Gate {
    Gate::new(Tensor::zeros((experts, 2), DType::F32, &Device::Cpu).unwrap()).unwrap()
}

fn capacity(factor: Option<f64>, min_capacity: usize) -> Capacity {
    Capacity { train_factor: factor, eval_factor: factor, min_capacity }
}

fn entries(routing: &Routing) -> Vec<Entry> {
    let weights = routing.combine_weights.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let mut found: Vec<Entry> = (0..weights.len())
        .filter(|&c| routing.expert_ids[c] != DROPPED)
        .map(|c| (c / routing.top_k, routing.expert_ids[c], routing.slots[c], weights[c]))
        .collect();
    found.sort_by_key(|e| (e.0, e.1));
    found
}

#[track_caller]
fn check(routing: Routing, want: &Golden) {
    let loss = routing.losses.load_balance.as_ref().unwrap().to_scalar::<f32>().unwrap();
    assert!((loss - want.loss).abs() < 2e-6, "load-balance loss {loss}, want {}", want.loss);
    if want.capacity.is_some() {
        assert_eq!(routing.capacity, want.capacity);
    }
    assert_eq!(routing.load.tokens_per_expert, want.load);
    let found = entries(&routing);
    assert_eq!(found.len(), want.entries.len(), "{found:?}");
    for (got, want) in found.iter().zip(&want.entries) {
        assert_eq!((got.0, got.1, got.2), (want.0, want.1, want.2), "{found:?}");
        assert!((got.3 - want.3).abs() < 2e-6, "weight of token {}: {} want {}", got.0, got.3, want.3);
    }
    assert_eq!(routing.load.routes() as usize - found.len(), routing.load.dropped as usize);
}

fn top1(config: Top1Config, mode: Mode, used: Option<&[bool]>) -> Routing {
    let context = RouteContext { used_tokens: used, ..RouteContext::new(mode, &Injected) };
    Top1Router::new(gate(4), config).unwrap().route_logits(&logits(), &context).unwrap()
}

fn top2(factor: f64, sample_second_expert: bool) -> Routing {
    let config = Top2Config { capacity: capacity(Some(factor), 0), sample_second_expert, jitter: false };
    let context = RouteContext::new(Mode::Train, &Injected);
    Top2Router::new(gate(4), config).unwrap().route_logits(&logits(), &context).unwrap()
}

fn top_k(logits: &Tensor, top_k: usize, capacity: Capacity, drop_policy: DropPolicy) -> Routing {
    let config = TopKConfig { top_k, capacity, drop_policy, jitter: false };
    let context = RouteContext::new(Mode::Train, &Injected);
    TopKRouter::new(gate(4), config).unwrap().route_logits(logits, &context).unwrap()
}

const ALL_TOP1: [Entry; 6] = [
    (0, 0, 0, 0.643914),
    (1, 0, 1, 0.455054),
    (2, 0, 2, 0.809776),
    (3, 1, 0, 0.643914),
    (4, 0, 3, 0.473991),
    (5, 2, 0, 0.288651),
];

/// The reference kept tokens 2 and 4 of the four that tie here; ours is first come, first kept, as documented.
#[test]
fn golden_top1_first_come() {
    let config = Top1Config { capacity: capacity(Some(1.0), 0), use_rts: false, noisy_gate: None };
    let entries = vec![(0, 0, 0, 0.643914), (1, 0, 1, 0.455054), (3, 1, 0, 0.643914), (5, 2, 0, 0.288651)];
    check(top1(config, Mode::Train, None), &Golden { loss: 1.4897583, capacity: Some(2), load: [4, 1, 1, 0], entries });
}

#[test]
fn golden_top1_min_capacity() {
    let config = Top1Config { capacity: capacity(Some(1.0), 4), use_rts: false, noisy_gate: None };
    let want = Golden { loss: 1.4897583, capacity: Some(4), load: [4, 1, 1, 0], entries: ALL_TOP1.to_vec() };
    check(top1(config, Mode::Train, None), &want);
}

#[test]
fn golden_top1_drop_nothing() {
    let config = Top1Config { capacity: capacity(None, 0), use_rts: true, noisy_gate: None };
    let want = Golden { loss: 1.4897583, capacity: None, load: [4, 1, 1, 0], entries: ALL_TOP1.to_vec() };
    check(top1(config, Mode::Train, None), &want);
}

#[test]
fn golden_top1_used_token() {
    let config = Top1Config { capacity: capacity(Some(2.0), 0), use_rts: false, noisy_gate: None };
    let entries =
        vec![(0, 0, 0, 0.643914), (1, 0, 1, 0.455054), (3, 1, 0, 0.643914), (4, 0, 2, 0.473991), (5, 2, 0, 0.288651)];
    let want = Golden { loss: 1.1890686, capacity: Some(3), load: [3, 1, 1, 0], entries };
    check(top1(config, Mode::Train, Some(&[true, true, false, true, true, true])), &want);
}

#[test]
fn golden_top1_random_token_selection() {
    let config = Top1Config { capacity: capacity(Some(1.0), 0), use_rts: true, noisy_gate: None };
    let entries = vec![(0, 0, 0, 0.643914), (3, 1, 0, 0.643914), (4, 0, 1, 0.473991), (5, 2, 0, 0.288651)];
    let want = Golden { loss: 1.4897583, capacity: Some(2), load: [4, 1, 1, 0], entries };
    check(top1(config, Mode::Eval, None), &want);
}

#[test]
fn golden_top1_rsample() {
    let config = Top1Config { capacity: capacity(Some(2.0), 0), use_rts: false, noisy_gate: Some(NoisyGate::RSample) };
    let entries = vec![
        (0, 1, 0, 0.236883),
        (1, 2, 0, 0.167405),
        (2, 2, 1, 0.040316),
        (3, 3, 0, 0.032059),
        (4, 0, 0, 0.473991),
        (5, 3, 1, 0.261183),
    ];
    check(top1(config, Mode::Train, None), &Golden { loss: 0.8687432, capacity: Some(3), load: [1, 1, 2, 2], entries });
    assert_eq!(top1(config, Mode::Eval, None).load.tokens_per_expert, [4, 1, 1, 0], "no noise in evaluation");
}

#[test]
fn golden_top2() {
    let entries = vec![
        (0, 0, 0, 0.7310585),
        (0, 1, 1, 0.2689414),
        (1, 0, 1, 0.6224593),
        (1, 1, 2, 0.3775406),
        (2, 0, 2, 0.8807971),
        (2, 3, 0, 0.1192029),
        (3, 1, 0, 0.7310586),
        (3, 2, 1, 0.2689414),
        (4, 2, 2, 1.0),
        (5, 2, 0, 0.5249792),
        (5, 3, 1, 0.4750208),
    ];
    check(top2(1.0, false), &Golden { loss: 1.4897583, capacity: Some(3), load: [4, 3, 3, 2], entries });
}

#[test]
fn golden_top2_half_capacity() {
    let entries = vec![
        (0, 0, 0, 0.7310585),
        (0, 1, 1, 0.2689414),
        (1, 0, 1, 1.0),
        (2, 3, 0, 1.0),
        (3, 1, 0, 0.7310586),
        (3, 2, 1, 0.2689414),
        (5, 2, 0, 0.5249792),
        (5, 3, 1, 0.4750208),
    ];
    check(top2(0.5, false), &Golden { loss: 1.4897583, capacity: Some(2), load: [4, 3, 3, 2], entries });
}

#[test]
fn golden_top2_sampled() {
    let entries = vec![
        (0, 0, 0, 0.731059),
        (0, 1, 1, 0.268941),
        (1, 0, 1, 0.731059),
        (1, 2, 1, 0.268941),
        (2, 0, 2, 0.952574),
        (2, 2, 2, 0.047426),
        (3, 1, 0, 0.952574),
        (3, 3, 0, 0.047426),
        (5, 2, 0, 0.524979),
        (5, 3, 1, 0.475021),
    ];
    check(top2(1.0, true), &Golden { loss: 1.4897583, capacity: Some(3), load: [4, 2, 4, 2], entries });
}

#[test]
fn golden_top_k_position() {
    let entries = vec![
        (0, 0, 0, 0.6652409),
        (0, 1, 0, 0.2447285),
        (0, 2, 0, 0.0900306),
        (1, 0, 1, 0.5064803),
        (1, 1, 1, 0.3071959),
        (1, 2, 1, 0.1863237),
        (2, 0, 2, 0.8437947),
        (2, 2, 2, 0.0420101),
        (2, 3, 0, 0.1141952),
        (3, 1, 2, 1.0),
        (4, 3, 1, 1.0),
        (5, 3, 2, 1.0),
    ];
    let routing = top_k(&untied_logits(), 3, capacity(Some(0.5), 0), DropPolicy::Position);
    check(routing, &Golden { loss: 1.0904554, capacity: Some(3), load: [6, 3, 6, 3], entries });
}

#[test]
fn golden_top_k_probs() {
    let entries = vec![
        (0, 0, 0, 0.7310585),
        (0, 1, 0, 0.2689414),
        (1, 1, 1, 1.0),
        (2, 0, 1, 0.8807971),
        (2, 3, 0, 0.1192029),
        (3, 1, 2, 0.7310586),
        (3, 2, 0, 0.2689414),
        (4, 0, 2, 0.5064804),
        (4, 2, 1, 0.3071959),
        (4, 3, 1, 0.1863237),
        (5, 2, 2, 0.5249792),
        (5, 3, 2, 0.4750208),
    ];
    let routing = top_k(&untied_logits(), 3, capacity(Some(0.5), 0), DropPolicy::Probs);
    check(routing, &Golden { loss: 1.0904554, capacity: Some(3), load: [6, 3, 6, 3], entries });
}

#[test]
fn golden_top_k_drop_nothing() {
    let routing = top_k(&untied_logits(), 3, capacity(None, 0), DropPolicy::Probs);
    let found = entries(&routing);
    assert_eq!(found.len(), 18);
    assert_eq!(routing.load.tokens_per_expert, [6, 3, 6, 3]);
    let token =
        |t| found.iter().filter(|e| e.0 == t).map(|e| (e.1, e.2, (e.3 * 1e6).round() as i64)).collect::<Vec<_>>();
    assert_eq!(token(3), [(0, 3, 90031), (1, 2, 665241), (2, 3, 244728)]);
    assert_eq!(token(5), [(0, 5, 300610), (2, 5, 367165), (3, 2, 332225)]);
}

/// The original's own unit-test vector.
#[test]
fn golden_top_k_upstream_unit_test() {
    let z = [[0.11f32, 0.2, 0.1, 0.3], [0.3, 0.4, 0.11, 0.1], [0.11, 0.1, 0.6, 0.5], [0.1, 0.11, 0.7, 0.8]];
    let z = Tensor::new(&z, &Device::Cpu).unwrap();
    let places = |policy| {
        let routing = top_k(&z, 2, capacity(Some(1.0), 1), policy);
        assert_eq!(routing.capacity, Some(2));
        entries(&routing).into_iter().map(|e| (e.0, e.1, e.2)).collect::<Vec<_>>()
    };
    let probs = [(0, 1, 0), (1, 0, 0), (1, 1, 1), (2, 2, 0), (2, 3, 0), (3, 2, 1), (3, 3, 1)];
    let position = [(0, 1, 0), (0, 3, 0), (1, 0, 0), (1, 1, 1), (2, 2, 0), (2, 3, 1), (3, 2, 1)];
    assert_eq!(places(DropPolicy::Probs), probs);
    assert_eq!(places(DropPolicy::Position), position);
}

#[track_caller]
fn check_gradient(z: &Var, loss: &Tensor, want: &[[f32; 4]; 6]) {
    let grads = loss.backward().unwrap();
    let got = grads.get(z).unwrap().to_vec2::<f32>().unwrap();
    for (token, (got, want)) in got.iter().zip(want).enumerate() {
        for (g, w) in got.iter().zip(want) {
            assert!((g - w).abs() < 2e-6, "token {token}: {got:?} want {want:?}");
        }
    }
}

#[test]
fn golden_gradient_top1_loss() {
    let z = Var::from_tensor(&logits()).unwrap();
    let config = Top1Config { capacity: capacity(Some(1.0), 4), use_rts: false, noisy_gate: None };
    let context = RouteContext::new(Mode::Train, &Injected);
    let routing = Top1Router::new(gate(4), config).unwrap().route_logits(&z, &context).unwrap();
    let want = [
        [0.0787232, -0.0500003, -0.0183941, -0.0103289],
        [0.0877938, -0.0387518, -0.0235042, -0.0255378],
        [0.0612068, -0.0103915, -0.0103915, -0.0404238],
        [0.0268271, -0.0164108, -0.0060372, -0.0043791],
        [0.0922912, -0.0088923, -0.0398525, -0.0435464],
        [0.0670173, -0.0106397, -0.0143620, -0.0420156],
    ];
    check_gradient(&z, &routing.losses.load_balance.unwrap(), &want);
}

/// The gradient of `sum (token + 1)(expert + 1) weight`.
#[test]
fn golden_gradient_top2_weights() {
    let z = Var::from_tensor(&logits()).unwrap();
    let config = Top2Config { capacity: capacity(Some(1.0), 0), sample_second_expert: false, jitter: false };
    let context = RouteContext::new(Mode::Train, &Injected);
    let routing = Top2Router::new(gate(4), config).unwrap().route_logits(&z, &context).unwrap();
    let factors: Vec<f32> = (0..12)
        .map(|c| match routing.expert_ids[c] {
            DROPPED => 0.0,
            expert => ((c / 2 + 1) as u32 * (expert + 1)) as f32,
        })
        .collect();
    let factors = Tensor::from_vec(factors, (6, 2), &Device::Cpu).unwrap();
    let want = [
        [-0.1966119, 0.1966119, 0., 0.],
        [-0.4700074, 0.4700074, 0., 0.],
        [-0.9449422, 0., 0., 0.9449422],
        [0., -0.7864478, 0.7864478, 0.],
        [0., 0., 0., 0.],
        [0., 0., -1.4962561, 1.4962562],
    ];
    check_gradient(&z, &(routing.combine_weights * factors).unwrap().sum_all().unwrap(), &want);
}

/// Every router whose weights carry gradients, small enough for central differences.
fn routers(gate_weight: &Tensor) -> Vec<(&'static str, Box<dyn Router>)> {
    let gate = || Gate::new(gate_weight.clone()).unwrap();
    let bias = random(5, &[6], 0.2, DType::F64);
    let dropless = |change: &dyn Fn(&mut DroplessConfig)| {
        let mut config = DroplessConfig::softmax(2, true);
        change(&mut config);
        config
    };
    let grouped = dropless(&|c| {
        c.score_function = ScoreFunction::Sigmoid;
        c.num_groups = 3;
        c.top_groups = 2;
        c.group_score = GroupScore::TopTwoSum;
        c.scale = 2.5;
    });
    let cap = Capacity { train_factor: Some(0.7), eval_factor: None, min_capacity: 1 };
    let top1 = |noisy_gate, use_rts| Top1Config { capacity: cap, use_rts, noisy_gate };
    let top_k = |drop_policy| TopKConfig { top_k: 3, capacity: cap, drop_policy, jitter: true };
    vec![
        ("top1", Box::new(Top1Router::new(gate(), top1(None, true)).unwrap())),
        ("top1 jitter", Box::new(Top1Router::new(gate(), top1(Some(NoisyGate::Jitter), false)).unwrap())),
        ("top1 rsample", Box::new(Top1Router::new(gate(), top1(Some(NoisyGate::RSample), true)).unwrap())),
        ("top2", Box::new(Top2Router::new(gate(), Top2Config { capacity: cap, ..Top2Config::default() }).unwrap())),
        ("top3 probs", Box::new(TopKRouter::new(gate(), top_k(DropPolicy::Probs)).unwrap())),
        ("top3 position", Box::new(TopKRouter::new(gate(), top_k(DropPolicy::Position)).unwrap())),
        ("softmax", Box::new(DroplessRouter::new(gate(), None, dropless(&|c| c.normalize = false)).unwrap())),
        ("softmax norm", Box::new(DroplessRouter::new(gate(), None, dropless(&|_| ())).unwrap())),
        ("sequence loss", Box::new(DroplessRouter::new(gate(), None, dropless(&|c| c.sequence_loss = true)).unwrap())),
        ("sigmoid groups bias", Box::new(DroplessRouter::new(gate(), Some(bias), grouped).unwrap())),
        (
            "expert choice",
            Box::new(ExpertChoiceRouter::new(gate(), ExpertChoiceConfig { capacity_factor: 2.0 }).unwrap()),
        ),
    ]
}

#[test]
fn finite_differences_of_every_weight_path_and_loss() {
    let gate_weight = random_var(1, &[6, 5], 0.7, DType::F64);
    let tokens = random_var(2, &[8, 5], 1.0, DType::F64);
    let noise = SeededNoise::new(3, 4);
    for (name, router) in routers(&gate_weight) {
        let context = RouteContext { seq_len: Some(4), ..RouteContext::new(Mode::Train, &noise) };
        let probe = router.route(&tokens, &context).unwrap();
        let factors = random(6, probe.combine_weights.dims(), 1.0, DType::F64);
        println!("{name}: {:?}, dropped {}", probe.load.tokens_per_expert, probe.load.dropped);
        let part = |pick: &dyn Fn(Routing) -> Tensor| {
            check_gradients(&[("gate", &gate_weight), ("tokens", &tokens)], || {
                pick(router.route(&tokens, &context).unwrap())
            });
        };
        part(&|r| (r.combine_weights * &factors).unwrap().sum_all().unwrap());
        part(&|r| r.losses.router_z.unwrap());
        if probe.losses.load_balance.is_some() {
            part(&|r| r.losses.load_balance.unwrap());
        }
    }
}

#[test]
fn loss_functions_by_hand() {
    let probs = Tensor::new(&[[0.5f32, 0.5], [0.25, 0.75]], &Device::Cpu).unwrap();
    let loss = |ids: &[u32]| load_balance_loss(&probs, ids, 1).unwrap().to_scalar::<f32>().unwrap();
    assert!((loss(&[0, 1]) - 1.0).abs() < 1e-6);
    assert!((loss(&[1, 1]) - 2.0 * 0.625).abs() < 1e-6);
    let logits = Tensor::zeros((3, 4), DType::F32, &Device::Cpu).unwrap();
    let z = router_z_loss(&logits).unwrap().to_scalar::<f32>().unwrap();
    assert!((z - 4f32.ln().powi(2)).abs() < 1e-6);
    assert_eq!(updated_selection_bias(&[0.0, 0.0, 0.5], &[4, 1, 1], 0.125).unwrap(), [-0.125, 0.125, 0.625]);
    assert!(updated_selection_bias(&[0.0], &[1, 2], 0.1).is_err());
    assert!(load_balance_loss(&probs, &[0], 1).is_err());
}

#[test]
fn selection_bias_moves_the_choice_and_not_the_weight() {
    let logits = Tensor::new(&[[0.3f32, 0.2, 0.1, 0.0]], &Device::Cpu).unwrap();
    let bias = Tensor::new(&[0f32, 0., 0., 1.], &Device::Cpu).unwrap();
    let mut config = DroplessConfig::softmax(1, false);
    config.score_function = ScoreFunction::Sigmoid;
    let context = RouteContext::new(Mode::Eval, &Injected);
    let route = |bias| DroplessRouter::new(gate(4), bias, config).unwrap().route_logits(&logits, &context).unwrap();
    assert_eq!(route(None).expert_ids, [0]);
    let biased = route(Some(bias));
    assert_eq!(biased.expert_ids, [3]);
    assert_eq!(biased.combine_weights.to_vec2::<f32>().unwrap(), [[0.5]]);
}

#[test]
fn groups_limit_the_choice() {
    let logits = Tensor::new(&[[5f32, -9., 3., 4., 0., 0.]], &Device::Cpu).unwrap();
    let context = RouteContext::new(Mode::Eval, &Injected);
    let chosen = |group_score| {
        let config = DroplessConfig { num_groups: 3, top_groups: 1, group_score, ..DroplessConfig::softmax(2, true) };
        let mut ids =
            DroplessRouter::new(gate(6), None, config).unwrap().route_logits(&logits, &context).unwrap().expert_ids;
        ids.sort_unstable();
        ids
    };
    assert_eq!(chosen(GroupScore::Max), [0, 1], "the group of the best expert");
    let even = Tensor::new(&[[2f32, -9., 1.9, 1.9, 0., 0.]], &Device::Cpu).unwrap();
    let config = DroplessConfig {
        num_groups: 3,
        top_groups: 1,
        group_score: GroupScore::TopTwoSum,
        ..DroplessConfig::softmax(2, true)
    };
    let ids = DroplessRouter::new(gate(6), None, config).unwrap().route_logits(&even, &context).unwrap().expert_ids;
    assert_eq!(ids, [2, 3], "the group with the best pair");
}

#[test]
fn hash_routing_is_fixed_and_spread() {
    let router = HashRouter::new(8, 1).unwrap();
    let ids: Vec<u32> = (0..4000).collect();
    let tokens = Tensor::zeros((4000, 2), DType::F32, &Device::Cpu).unwrap();
    let context = RouteContext { token_ids: Some(&ids), ..RouteContext::new(Mode::Eval, &Injected) };
    let routing = router.route(&tokens, &context).unwrap();
    assert_eq!(routing.expert_ids, ids.iter().map(|&id| router.expert_of(id)).collect::<Vec<_>>());
    assert!(routing.load.imbalance() < 1.2, "{:?}", routing.load);
    assert!(router.route(&tokens, &RouteContext::new(Mode::Eval, &Injected)).is_err(), "token ids are needed");
}

#[test]
fn impossible_settings_are_refused() {
    let text = |e: crate::Error| e.to_string();
    let top_k =
        |k| TopKConfig { top_k: k, capacity: Capacity::DEEPSPEED, drop_policy: DropPolicy::Probs, jitter: false };
    assert!(text(TopKRouter::new(gate(4), top_k(5)).unwrap_err()).contains("top_k must be between 1"));
    assert!(text(TopKRouter::new(gate(4), top_k(0)).unwrap_err()).contains("got 0"));
    assert!(text(Top2Router::new(gate(1), Top2Config::default()).unwrap_err()).contains("at least 2 experts"));
    assert!(text(HashRouter::new(0, 1).unwrap_err()).contains("num_experts"));
    let bad = Capacity { train_factor: Some(-1.0), ..Capacity::DEEPSPEED };
    assert!(
        text(Top1Router::new(gate(4), Top1Config { capacity: bad, ..Top1Config::default() }).unwrap_err())
            .contains("capacity factor")
    );
    let groups = DroplessConfig { num_groups: 3, ..DroplessConfig::softmax(1, true) };
    assert!(text(DroplessRouter::new(gate(4), None, groups).unwrap_err()).contains("n_group"));
    let narrow = DroplessConfig { num_groups: 2, top_groups: 1, ..DroplessConfig::softmax(3, true) };
    assert!(text(DroplessRouter::new(gate(4), None, narrow).unwrap_err()).contains("topk_group"));
    assert!(
        text(Gate::new(Tensor::zeros((0, 2), DType::F32, &Device::Cpu).unwrap()).unwrap_err()).contains("num_experts")
    );
}

proptest! {
    /// Loads add up, no expert is over capacity, slots are dense, dropped weights are 0: for every router.
    #[test]
    fn invariants(tokens in 1usize..40, seed in 0u64..1000, train: bool) {
        let gate_weight = random(seed, &[6, 5], 1.0, DType::F64);
        let x = random(seed + 1, &[tokens, 5], 1.0, DType::F64);
        let noise = SeededNoise::new(seed, 0);
        let mode = if train { Mode::Train } else { Mode::Eval };
        for (name, router) in routers(&gate_weight) {
            let context = RouteContext { seq_len: Some(tokens), ..RouteContext::new(mode, &noise) };
            let routing = router.route(&x, &context).unwrap();
            let kept: Vec<usize> = (0..routing.expert_ids.len()).filter(|&c| routing.expert_ids[c] != DROPPED).collect();
            prop_assert_eq!(kept.len() as u64 + u64::from(routing.load.dropped), routing.load.routes(), "{}", name);
            let weights = crate::testing::values(&routing.combine_weights);
            let mut slots: Vec<Vec<u32>> = vec![vec![]; 6];
            for &c in &kept {
                slots[routing.expert_ids[c] as usize].push(routing.slots[c]);
            }
            for list in &mut slots {
                list.sort_unstable();
                prop_assert!(list.iter().enumerate().all(|(i, &s)| i as u32 == s), "{} slots {:?}", name, list);
                prop_assert!(routing.capacity.is_none_or(|c| list.len() <= c), "{} over capacity", name);
            }
            for (expert, weight) in routing.expert_ids.iter().zip(&weights) {
                prop_assert!(*expert != DROPPED || *weight == 0.0, "{} weight of a dropped route", name);
            }
            prop_assert_eq!(router.route(&x, &context).unwrap().expert_ids, routing.expert_ids, "{} repeats", name);
        }
    }
}

/// `exp(100)` is no number of f32: what it would make of a gradient must not reach the gate.
#[test]
fn gradients_of_sigmoid_scores_are_numbers_at_any_logit() {
    let config = DroplessConfig { score_function: ScoreFunction::Sigmoid, ..DroplessConfig::softmax(2, false) };
    let router = DroplessRouter::new(gate(4), None, config).unwrap();
    let logits =
        Var::from_slice(&[-100f32, 3.0, 1.0, -90.0, -200.0, -300.0, -100.0, -150.0], (2, 4), &Device::Cpu).unwrap();
    let routing = router.route_logits(&logits, &RouteContext::new(Mode::Train, &Injected)).unwrap();
    let weights = routing.combine_weights.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(weights.iter().all(|weight| weight.is_finite()), "{weights:?}");
    let grads = routing.combine_weights.sum_all().unwrap().backward().unwrap();
    let grads = grads.get(&logits).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!(grads.iter().all(|grad| grad.is_finite()) && grads[1] > 0.0, "{grads:?}");
}

#[test]
fn logits_of_other_experts_are_refused() {
    let other = Tensor::zeros((3, 2), DType::F32, &Device::Cpu).unwrap();
    let context = RouteContext::new(Mode::Train, &Injected);
    let capacity = capacity(None, 0);
    let results = [
        Top1Router::new(gate(4), Top1Config::default()).unwrap().route_logits(&other, &context),
        TopKRouter::new(gate(4), TopKConfig { top_k: 4, capacity, drop_policy: DropPolicy::Probs, jitter: false })
            .unwrap()
            .route_logits(&other, &context),
        DroplessRouter::new(gate(4), None, DroplessConfig::softmax(2, false)).unwrap().route_logits(&other, &context),
        ExpertChoiceRouter::new(gate(4), ExpertChoiceConfig { capacity_factor: 2.0 })
            .unwrap()
            .route_logits(&other, &context),
    ];
    for result in results {
        let message = result.unwrap_err().to_string();
        assert!(message.contains("router logits") && message.contains('4'), "{message}");
    }
}
