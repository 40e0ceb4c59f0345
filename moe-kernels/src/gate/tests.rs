//! The fused gate against the routers of `moe-core`: same experts, same weights, same table.

use super::*;
use crate::{KernelOps, select};
use candle_core::{DType, Device, Tensor};
use moe_core::testing::random;
use moe_core::{
    DroplessRouter, Gate, GroupScore, Mode, RouteContext, Router, Routing, ScoreFunction, SeededNoise, Top1Config,
    Top1Router,
};
use std::sync::Arc;

fn flat(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

struct Case {
    name: &'static str,
    experts: usize,
    bias: bool,
    config: DroplessConfig,
}

fn cases() -> Vec<Case> {
    let softmax = DroplessConfig::softmax;
    let sigmoid =
        |top_k, normalize| DroplessConfig { score_function: ScoreFunction::Sigmoid, ..softmax(top_k, normalize) };
    let grouped = |config, num_groups, top_groups, group_score| DroplessConfig {
        num_groups,
        top_groups,
        group_score,
        scale: 2.5,
        ..config
    };
    let (max, two) = (GroupScore::Max, GroupScore::TopTwoSum);
    let case = |name, experts, bias, config| Case { name, experts, bias, config };
    vec![
        case("paper, top 1", 128, false, softmax(1, false)),
        case("one expert", 1, false, softmax(1, true)),
        case("mixtral", 8, false, softmax(2, true)),
        case("olmoe", 64, false, softmax(8, false)),
        case("all experts", 40, false, softmax(40, true)),
        case("many of an odd number", 67, true, softmax(30, true)),
        case("sigmoid with bias", 33, true, sigmoid(4, true)),
        case("deepseek v2", 20, false, grouped(softmax(3, false), 5, 2, max)),
        case("deepseek v3", 256, true, grouped(sigmoid(8, true), 8, 4, two)),
        case("groups of one expert", 6, true, grouped(sigmoid(2, true), 6, 3, two)),
        case("all groups", 12, true, grouped(sigmoid(2, false), 4, 4, two)),
    ]
}

#[track_caller]
fn assert_routed_alike(got: &Gated, want: &Routing, label: &str) {
    assert_eq!(got.expert_ids, want.expert_ids, "{label}: experts");
    assert_eq!(got.table, DispatchTable::new(want), "{label}: table");
    assert_eq!(got.load, want.load, "{label}: load");
    let weights = flat(&want.combine_weights);
    if is_candle_vectorised() {
        assert_eq!(bits(&got.combine_weights), bits(&weights), "{label}: weights");
    }
    for (got, want) in got.combine_weights.iter().zip(&weights) {
        assert!((got - want).abs() <= 4.0 * f32::EPSILON * want.abs(), "{label}: weight {got} against {want}");
    }
}

/// Without AVX2 candle adds in another order.
fn is_candle_vectorised() -> bool {
    Isa::Avx2.is_available()
}

#[test]
fn chooses_as_the_dropless_router_does() {
    const WIDTH: usize = 40;
    let noise = SeededNoise::new(1, 0);
    let context = RouteContext::new(Mode::Eval, &noise);
    for case in cases() {
        let weight = random(2, &[case.experts, WIDTH], 0.4, DType::F32);
        let bias = case.bias.then(|| random(3, &[case.experts], 0.2, DType::F32));
        let gate = Gate::with_ops(weight.clone().into(), Arc::new(KernelOps::default())).unwrap();
        let router = DroplessRouter::new(gate, bias.clone(), case.config).unwrap();
        for tokens in [1, 2, 13, 300] {
            let x = random(4, &[tokens, WIDTH], 1.0, DType::F32);
            let want = router.route(&x, &context).unwrap();
            for isa in Isa::available() {
                let bias = bias.as_ref().map(flat);
                let gate =
                    FusedGate::new(isa, case.config, &flat(&weight), [case.experts, WIDTH], bias.as_deref()).unwrap();
                let label = format!("{}, {tokens} tokens, {isa}", case.name);
                assert_routed_alike(&gate.forward(&flat(&x)).unwrap(), &want, &label);
            }
        }
    }
}

#[test]
fn ties_and_extremes_go_as_in_the_dropless_router() {
    let noise = SeededNoise::new(1, 0);
    let context = RouteContext::new(Mode::Eval, &noise);
    for case in cases() {
        let experts = case.experts;
        let row = |token: usize| {
            (0..experts).map(move |e| match token {
                0 => 0.0,
                1 => -0.0,
                2 => (e * 7 % 3) as f32,
                3 => {
                    if e == experts / 2 {
                        200.0
                    } else {
                        -200.0
                    }
                }
                4 => {
                    if e % 2 == 0 {
                        f32::NEG_INFINITY
                    } else {
                        1.0
                    }
                }
                5 => 1.0 + (e % 5) as f32 * f32::EPSILON,
                6 => -3e38,
                _ => 1e-30 * e as f32,
            })
        };
        let logits: Vec<f32> = (0..8).filter(|&t| t != 4 || experts > 1).flat_map(row).collect();
        let x = Tensor::from_vec(logits.clone(), (logits.len() / experts, experts), &Device::Cpu).unwrap();
        let bias = case.bias.then(|| Tensor::zeros(experts, DType::F32, &Device::Cpu).unwrap());
        let gate = Gate::new(random(1, &[experts, 2], 1.0, DType::F32)).unwrap();
        let want = DroplessRouter::new(gate, bias.clone(), case.config).unwrap().route_logits(&x, &context).unwrap();
        let bias = bias.as_ref().map(flat);
        for isa in Isa::available() {
            let weight = vec![0.0; experts];
            let gate = FusedGate::new(isa, case.config, &weight, [experts, 1], bias.as_deref()).unwrap();
            assert_routed_alike(&gate.forward_logits(&logits).unwrap(), &want, &format!("{}, {isa}", case.name));
        }
    }
}

/// NaN of both signs, alone, in several experts, in all; beside infinities, whose difference is NaN.
#[test]
fn nan_logits_give_nan_weights_as_in_the_dropless_router() {
    let noise = SeededNoise::new(1, 0);
    let context = RouteContext::new(Mode::Eval, &noise);
    for case in cases() {
        let experts = case.experts;
        let row = |token: usize| {
            (0..experts).map(move |e| match token {
                0 if e == experts / 2 => f32::NAN,
                1 if e == experts - 1 => -f32::NAN,
                2 if e % 3 == 0 => -f32::NAN,
                3 => f32::NAN,
                _ => (e * 7 % 5) as f32 * 0.3 - 0.7,
            })
        };
        let logits: Vec<f32> = (0..5).flat_map(row).collect();
        let x = Tensor::from_vec(logits.clone(), (5, experts), &Device::Cpu).unwrap();
        let bias = case.bias.then(|| random(3, &[experts], 0.2, DType::F32));
        let gate = Gate::new(random(1, &[experts, 2], 1.0, DType::F32)).unwrap();
        let want = DroplessRouter::new(gate, bias.clone(), case.config).unwrap().route_logits(&x, &context).unwrap();
        let want_weights = flat(&want.combine_weights);
        let bias = bias.as_ref().map(flat);
        for isa in Isa::available() {
            let weight = vec![0.0; experts];
            let gate = FusedGate::new(isa, case.config, &weight, [experts, 1], bias.as_deref()).unwrap();
            let got = gate.forward_logits(&logits).unwrap();
            let label = format!("{}, {isa}", case.name);
            assert_eq!(got.expert_ids, want.expert_ids, "{label}: experts");
            assert_eq!(got.load, want.load, "{label}: load");
            for (name, weights) in [("fused", &got.combine_weights), ("router", &want_weights)] {
                for (token, weights) in weights.chunks_exact(case.config.top_k).enumerate() {
                    let has_nan = weights.iter().any(|w| w.is_nan());
                    assert_eq!(has_nan, token < 4, "{label}, {name}, token {token}: {weights:?}");
                }
            }
        }
    }
}

#[test]
fn a_dropped_nan_stays_nan() {
    let capacity = Capacity { train_factor: None, eval_factor: Some(1e-3), min_capacity: 1 };
    let gate = FusedGate::new(select::current(), DroplessConfig::softmax(1, false), &[0.0; 2], [2, 1], None);
    let got = gate.unwrap().with_capacity(capacity).unwrap().forward_logits(&[1.0, 0.0, f32::NAN, 0.0]).unwrap();
    assert_eq!((got.expert_ids, got.load.dropped), (vec![0, DROPPED], 1));
    assert!(got.combine_weights[0] > 0.5 && got.combine_weights[1].is_nan());
}

#[test]
fn a_limited_gate_drops_as_the_top_1_router_does() {
    let noise = SeededNoise::new(1, 0);
    let context = RouteContext::new(Mode::Eval, &noise);
    let (experts, width) = (8, 24);
    let weight = random(1, &[experts, width], 0.4, DType::F32);
    for (tokens, factor) in [(3, Some(1.0)), (200, Some(0.5)), (200, Some(1.25)), (64, None)] {
        let capacity = Capacity { eval_factor: factor, ..Capacity::DEEPSPEED };
        let config = Top1Config { capacity, use_rts: false, noisy_gate: None };
        let router = Gate::with_ops(weight.clone().into(), Arc::new(KernelOps::default())).unwrap();
        let router = Top1Router::new(router, config).unwrap();
        let x = random(2, &[tokens, width], 1.0, DType::F32);
        let gate = FusedGate::new(
            select::current(),
            DroplessConfig::softmax(1, false),
            &flat(&weight),
            [experts, width],
            None,
        );
        let got = gate.unwrap().with_capacity(capacity).unwrap().forward(&flat(&x)).unwrap();
        let want = router.route(&x, &context).unwrap();
        assert_routed_alike(&got, &want, &format!("{tokens} tokens, factor {factor:?}"));
        assert_eq!(got.load.dropped > 0, tokens == 200, "{tokens} tokens must press on the capacity only when many");
    }
}

#[test]
fn neither_threads_nor_the_other_tokens_change_a_decision() {
    let (experts, width, tokens) = (96, 50, 333);
    let (weight, x) = (random(1, &[experts, width], 0.4, DType::F32), random(2, &[tokens, width], 1.0, DType::F32));
    let (weight, x) = (flat(&weight), flat(&x));
    let config = DroplessConfig::softmax(6, true);
    let gate = FusedGate::new(select::current(), config, &weight, [experts, width], None).unwrap();
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| gate.forward(&x).unwrap())
    };
    let whole = run(1);
    for threads in [2, 3, 5] {
        assert_eq!(run(threads), whole, "{threads} threads");
    }
    for token in [0, 1, 95, 96, 332] {
        let alone = gate.forward(&x[token * width..][..width]).unwrap();
        assert_eq!(alone.expert_ids, whole.expert_ids[token * 6..][..6]);
        assert_eq!(bits(&alone.combine_weights), bits(&whole.combine_weights[token * 6..][..6]));
    }
}

/// The routers of `moe-core` refuse an empty batch.
#[test]
fn no_token_chooses_nothing() {
    for case in cases() {
        let weight = vec![0.5; case.experts];
        let bias = case.bias.then(|| vec![0.0; case.experts]);
        let gate = FusedGate::new(select::current(), case.config, &weight, [case.experts, 1], bias.as_deref()).unwrap();
        let got = gate.forward(&[]).unwrap();
        assert_eq!(got, gate.forward_logits(&[]).unwrap());
        assert_eq!((got.expert_ids.len(), got.combine_weights.len(), got.table.num_rows()), (0, 0, 0));
        assert_eq!(got.table.expert_offsets, vec![0; case.experts + 1]);
        assert_eq!(got.load.routes(), 0);
    }
}

#[test]
fn bad_arguments_are_named() {
    let isa = select::current();
    let config = DroplessConfig::softmax(2, true);
    let refused = |outcome: Result<FusedGate>, word: &str| {
        let message = outcome.unwrap_err().to_string();
        assert!(message.contains(word), "{message}");
    };
    refused(FusedGate::new(isa, config, &[0.0; 11], [4, 3], None), "weight");
    refused(FusedGate::new(isa, config, &[], [0, 3], None), "weight");
    refused(FusedGate::new(isa, config, &[0.0; 12], [4, 3], Some(&[0.0; 3])), "selection_bias");
    refused(FusedGate::new(isa, DroplessConfig::softmax(5, true), &[0.0; 12], [4, 3], None), "5");
    let gate = FusedGate::new(isa, config, &[0.0; 12], [4, 3], None).unwrap();
    assert!(gate.forward(&[0.0; 4]).unwrap_err().to_string().contains("tokens"));
    assert!(gate.forward_logits(&[0.0; 5]).unwrap_err().to_string().contains("logits"));
    refused(gate.with_capacity(Capacity::DEEPSPEED), "top_k");
}
