//! Sizes against the paper's table, gradients of every parameter, decoding against the whole pass.

use super::*;
use crate::{
    CausalLm, Decoder, EvalRouting, Family, KvPool, LogitsOf, PoolConfig, Precision, SequenceStep, StepOutput,
};
use candle_core::{DType, Device, Tensor};
use moe_core::testing::values;
use moe_core::{Capacity, NoisyGate};

/// The derived column of the paper's model table, in billions as printed, and of its ablation models.
#[test]
fn parameter_counts_of_the_papers_models() {
    for (name, printed, digits) in [
        ("350m", 0.356, 3),
        ("1.3b", 1.316, 3),
        ("6.7b", 6.659, 3),
        ("125m-moe-64", 1.911, 3),
        ("350m-moe-128", 13.15, 2),
        ("1.3b-moe-128", 52.47, 2),
        ("350m-pr-moe-32-64", 4.12, 2),
        ("1.3b-pr-moe-64-128", 31.39, 2),
        ("350m-pr-moe-32-64-mos", 3.54, 2),
        ("1.3b-pr-moe-64-128-mos", 26.94, 2),
        ("350m-moe-32", 3.48, 2),
        ("350m-pyramid-moe-32-64", 4.02, 2),
        ("350m-residual-moe-32", 3.58, 2),
    ] {
        let config = GptConfig::preset(name).unwrap();
        config.validate().unwrap();
        let total = config.parameter_count().total as f64 / 1e9;
        assert_eq!(format!("{total:.digits$}"), format!("{printed:.digits$}"), "{name}: {total}");
    }
}

/// The printed formula, to the last parameter: dense `L(12h^2+13h) + 2h + (V+P)h`, `8h^2+5h` an expert.
#[test]
fn parameter_counts_equal_the_formula_and_the_tensors() {
    for name in GptConfig::preset_names() {
        let config = GptConfig::preset(name).unwrap();
        let (h, layers) = (config.d_model, config.num_layers);
        let mut want = layers * (12 * h * h + 13 * h) + 2 * h + (config.vocab_size + config.max_seq_len) * h;
        for (_, experts) in config.moe_layers() {
            let residual = config.moe.as_ref().unwrap().residual;
            want += (experts - usize::from(!residual)) * (8 * h * h + 5 * h) + h * experts;
            want += if residual { 2 * h + 2 } else { 0 };
        }
        assert_eq!(config.parameter_count().total, want, "{name}");
        assert_eq!(config.decoder().unwrap().params().elem_count(), want, "{name}: built tensors");
    }
    let dense = GptConfig::preset("tiny-dense").unwrap();
    assert_eq!(dense.parameter_count().active, dense.parameter_count().total);
    let moe = GptConfig::preset("tiny-moe").unwrap();
    let gates = 3 * 8 * 128;
    assert_eq!(moe.parameter_count().active, dense.parameter_count().total + gates);
}

fn small(kind: &str, change: impl FnOnce(&mut GptConfig)) -> GptConfig {
    let mut config = GptConfig::preset(kind).unwrap();
    (config.vocab_size, config.max_seq_len, config.d_model, config.num_heads, config.d_ff) = (37, 24, 16, 2, 32);
    config.init_std = 0.2;
    change(&mut config);
    config
}

fn with_moe(kind: &str, change: impl FnOnce(&mut GptMoeConfig)) -> GptConfig {
    small(kind, |c| change(c.moe.as_mut().unwrap()))
}

/// Every kind and every routing policy of the family.
fn family() -> Vec<(&'static str, GptConfig)> {
    vec![
        ("dense", small("tiny-dense", |_| ())),
        ("moe", small("tiny-moe", |_| ())),
        ("pyramid", small("tiny-pyramid-moe", |_| ())),
        ("residual", small("tiny-residual-moe", |_| ())),
        ("pr-moe", small("tiny-pr-moe", |_| ())),
        ("rsample", with_moe("tiny-pr-moe", |m| m.noisy_gate = Some(NoisyGate::RSample))),
        (
            "jitter, every layer",
            with_moe("tiny-moe", |m| {
                m.noisy_gate = Some(NoisyGate::Jitter);
                m.expert_interval = 1;
                m.num_experts = vec![4; 6];
            }),
        ),
        ("top-2", with_moe("tiny-moe", |m| m.top_k = 2)),
        (
            "top-3, z-loss",
            with_moe("tiny-moe", |m| {
                m.top_k = 3;
                m.z_loss_coef = 0.01;
            }),
        ),
    ]
}

fn batch(config: &GptConfig, batch: usize, seq_len: usize) -> TokenBatch {
    let mut rng = moe_core::CounterRng::new(5, 0);
    let mut ids = || (0..batch * seq_len).map(|_| rng.below(config.vocab_size as u32)).collect();
    TokenBatch { input_ids: ids(), target_ids: ids(), batch, seq_len }
}

/// No parameter is silently frozen: each gets a gradient, and not one of zeros (an idle expert's rows aside).
#[test]
fn every_parameter_of_every_model_gets_a_gradient() {
    for (kind, config) in family() {
        let model = Gpt::new(config, 1, &Device::Cpu).unwrap();
        let output = model.loss(&batch(model.config(), 4, 24), Pass::train(3)).unwrap();
        let grads = output.loss.backward().unwrap();
        for (name, var) in model.params() {
            let grad = grads.get(var).unwrap_or_else(|| panic!("{kind}: {name} has no gradient"));
            assert_eq!(grad.dims(), var.dims(), "{kind}: {name}");
            let moved = values(grad).iter().any(|g| *g != 0.0);
            assert!(moved, "{kind}: the gradient of {name} is zero everywhere");
        }
        assert!(output.parts.lm > 1.0 && output.loss.to_scalar::<f32>().unwrap().is_finite());
        assert_eq!(output.parts.aux() > 0.0, model.config().moe.is_some(), "{kind}: {:?}", output.parts);
        assert_eq!(output.layers.len(), model.config().moe_layers().len());
    }
}

/// The gradient of the whole model by central differences along a random direction, in f32.
#[test]
fn whole_model_gradient_along_a_direction() {
    for (kind, config) in family() {
        // A step across the border of a routing decision would not be a derivative; drop nothing and keep noise fixed.
        let mut config = config;
        if let Some(moe) = &mut config.moe {
            moe.capacity = Capacity::UNLIMITED;
        }
        let model = Gpt::new(config, 2, &Device::Cpu).unwrap();
        let batch = batch(model.config(), 1, 12);
        let loss = || model.loss(&batch, Pass::train(1)).unwrap().loss;
        let grads = loss().backward().unwrap();
        let mut slope = 0.0;
        let directions: Vec<Tensor> = model
            .params()
            .iter()
            .enumerate()
            .map(|(i, (_, var))| {
                let direction = moe_core::testing::random(i as u64, var.dims(), 0.2, DType::F32);
                let product = (grads.get(var).unwrap() * &direction).unwrap();
                slope += values(&product).iter().sum::<f64>();
                direction
            })
            .collect();
        let shift = |step: f64| {
            for ((_, var), direction) in model.params().iter().zip(&directions) {
                var.set(&(var.as_tensor().detach() + (direction * step).unwrap()).unwrap()).unwrap();
            }
        };
        const STEP: f64 = 2e-4; // small enough that no token changes its expert
        shift(STEP);
        let up = loss().to_scalar::<f32>().unwrap();
        shift(-2.0 * STEP);
        let down = loss().to_scalar::<f32>().unwrap();
        let numeric = f64::from(up - down) / (2.0 * STEP);
        assert!(
            (numeric - slope).abs() < 0.02 * slope.abs() + 0.02,
            "{kind}: slope {slope}, central difference {numeric}"
        );
    }
}

fn pool(decoder: &Decoder) -> KvPool {
    decoder.new_pool(PoolConfig::for_tokens(4, 24)).unwrap()
}

/// The logits of all tokens of one sequence, given in pieces.
fn in_pieces(decoder: &Decoder, ids: &[u32], pieces: &[usize], seed: u64) -> Vec<StepOutput> {
    let pool = pool(decoder);
    let mut sequence = pool.sequence().with_seed(seed);
    let mut start = 0;
    let outputs = pieces.iter().map(|len| {
        let (token_ids, logits) = (&ids[start..start + len], LogitsOf::All);
        start += len;
        decoder.forward(&mut [SequenceStep { sequence: &mut sequence, token_ids, logits }], &pool).unwrap()
    });
    let outputs = outputs.collect();
    assert_eq!(sequence.len(), ids.len());
    outputs
}

/// Token by token, in pieces, or all at once, with packed weights or without: the same experts, and the same logits to the
/// last bit. Nothing is drawn or dropped unless the original's evaluation is asked for; what it draws then belongs to the
/// sequence and the position.
#[test]
fn cached_decoding_has_the_bits_of_the_whole_pass() {
    for (kind, config) in family() {
        let mut cases = vec![(config.clone(), EvalRouting::TokenByToken)];
        let mut original = config;
        if let Some(moe) = &mut original.moe {
            assert!(moe.sample_second_expert || moe.top_k != 2);
            moe.capacity.eval_factor = None;
        }
        cases.push((original, EvalRouting::Original));
        for (config, routing) in cases {
            for precision in [Precision::F32, Precision::Bf16] {
                let model = Gpt::new(config.clone(), 3, &Device::Cpu).unwrap().with_precision(precision).unwrap();
                let ids = batch(model.config(), 1, 20).input_ids;
                let plain_loss = eval_loss(&model, &ids);
                let plain = Decoder::new(
                    model.decoder_config().clone(),
                    crate::ParamSource::detached(std::sync::Arc::new(model.table().clone()), model.params())
                        .builder(&Device::Cpu),
                    std::sync::Arc::new(moe_kernels::KernelOps::new(precision)),
                );
                let plain = plain.unwrap().with_eval_routing(routing);
                let whole = &in_pieces(&plain, &ids, &[20], 5)[0];
                let packed = model.into_packed().unwrap();
                let loss = packed.loss(&loss_batch(&ids), Pass::Eval).unwrap().parts.lm;
                assert_eq!(loss.to_bits(), plain_loss.to_bits(), "{kind} {precision:?}");
                let packed = packed.with_eval_routing(routing);
                for (decoder, pieces) in
                    [(&packed, vec![1; 20]), (&packed, vec![7, 1, 1, 11]), (&plain, vec![19, 1]), (&packed, vec![20])]
                {
                    let mut start = 0;
                    for (step, len) in in_pieces(decoder, &ids, &pieces, 5).iter().zip(&pieces) {
                        let want = whole.logits.narrow(0, start, *len).unwrap();
                        assert_eq!(values(&step.logits), values(&want), "{kind} {routing:?} {precision:?} at {start}");
                        for (got, want) in step.experts.iter().zip(&whole.experts) {
                            let k = want.top_k;
                            assert_eq!(
                                got.expert_ids,
                                want.expert_ids[start * k..(start + len) * k],
                                "{kind} at {start}"
                            );
                            assert!(!got.expert_ids.contains(&moe_core::DROPPED), "{kind}: a token was dropped");
                        }
                        start += len;
                    }
                }
            }
        }
    }
}

/// The second expert of top-2 is the second best unless draws are asked for; these follow the seed of the sequence.
#[test]
fn inference_draws_only_what_is_asked_for() {
    let config = with_moe("tiny-moe", |m| {
        m.top_k = 2;
        m.capacity.eval_factor = None;
    });
    let ids = batch(&config, 1, 20).input_ids;
    let experts = |config: &GptConfig, routing, seed| {
        let decoder = Gpt::new(config.clone(), 3, &Device::Cpu).unwrap().into_packed().unwrap();
        in_pieces(&decoder.with_eval_routing(routing), &ids, &[20], seed)[0].experts.clone()
    };
    let plain = experts(&config, EvalRouting::TokenByToken, 1);
    assert_eq!(plain, experts(&config, EvalRouting::TokenByToken, 2));
    let mut without = config.clone();
    without.moe.as_mut().unwrap().sample_second_expert = false;
    let chosen = |experts: &[crate::LayerExperts]| experts.iter().map(|e| e.expert_ids.clone()).collect::<Vec<_>>();
    assert_eq!(chosen(&plain), chosen(&experts(&without, EvalRouting::Original, 1)));
    let drawn = experts(&config, EvalRouting::Original, 1);
    assert_eq!(drawn, experts(&config, EvalRouting::Original, 1));
    assert_ne!(chosen(&drawn), chosen(&experts(&config, EvalRouting::Original, 2)));
    assert_ne!(chosen(&drawn), chosen(&plain));
}

/// Many tokens on one expert: the paper's capacity would drop most of them, an inference pass keeps all, and a routing that
/// depends on the batch is refused by name.
#[test]
fn inference_drops_nothing_and_refuses_capacity() {
    let config =
        with_moe("tiny-moe", |m| m.capacity = Capacity { eval_factor: Some(0.1), min_capacity: 1, ..m.capacity });
    let model = Gpt::new(config, 3, &Device::Cpu).unwrap();
    let output = model.loss(&batch(model.config(), 2, 24), Pass::Eval).unwrap();
    assert!(output.layers.iter().all(|layer| layer.load.dropped == 0), "{:?}", output.layers);
    let decoder = model.into_packed().unwrap().with_eval_routing(EvalRouting::Original);
    let pool = pool(&decoder);
    let mut sequence = pool.sequence();
    let step = SequenceStep { sequence: &mut sequence, token_ids: &[1, 2], logits: LogitsOf::Last };
    let error = decoder.forward(&mut [step], &pool).unwrap_err().to_string();
    assert!(error.contains("eval_capacity_factor of 0.1") && error.contains("layer 1"), "{error}");
    let dropped = decoder.loss(&loss_batch(&[3; 24]), Pass::Eval).unwrap();
    assert!(dropped.layers.iter().any(|layer| layer.load.dropped > 0), "the original drops in evaluation");
}

fn loss_batch(ids: &[u32]) -> TokenBatch {
    TokenBatch { target_ids: ids.to_vec(), input_ids: ids.to_vec(), batch: 1, seq_len: ids.len() }
}

fn eval_loss(model: &Gpt, ids: &[u32]) -> f64 {
    model.loss(&loss_batch(ids), Pass::Eval).unwrap().parts.lm
}

/// A sequence's logits do not depend on the other sequences of its batch: serving and training see the same numbers.
#[test]
fn a_sequence_does_not_depend_on_its_batch() {
    let config = with_moe("tiny-pr-moe", |m| m.capacity = Capacity::UNLIMITED);
    for precision in [Precision::F32, Precision::Bf16] {
        let model = Gpt::new(config.clone(), 5, &Device::Cpu).unwrap().with_precision(precision).unwrap();
        let many = batch(model.config(), 4, 24);
        let targets = |row: usize| {
            let kept = |i: usize| if i / 24 == row { many.target_ids[i] } else { IGNORED };
            TokenBatch { target_ids: (0..4 * 24).map(kept).collect(), ..many.clone() }
        };
        for row in 0..4 {
            let part = |ids: &[u32]| ids[row * 24..(row + 1) * 24].to_vec();
            let (input_ids, target_ids) = (part(&many.input_ids), part(&many.target_ids));
            let alone = TokenBatch { input_ids, target_ids, batch: 1, seq_len: 24 };
            let loss = |batch: &TokenBatch| model.loss(batch, Pass::Eval).unwrap().parts.lm;
            assert_eq!(loss(&alone).to_bits(), loss(&targets(row)).to_bits(), "{precision:?} row {row}");
        }
    }
}

#[test]
fn training_draws_follow_the_seed() {
    let config = with_moe("tiny-moe", |m| m.noisy_gate = Some(NoisyGate::RSample));
    let model = Gpt::new(config, 1, &Device::Cpu).unwrap();
    let batch = batch(model.config(), 2, 24);
    let load = |seed| model.loss(&batch, Pass::train(seed)).unwrap();
    assert_eq!(load(1).loss.to_scalar::<f32>().unwrap().to_bits(), load(1).loss.to_scalar::<f32>().unwrap().to_bits());
    assert_ne!(load(1).layers, load(2).layers);
}

#[test]
fn initial_values_follow_the_paper() {
    let config = GptConfig::preset("tiny-pr-moe").unwrap();
    let model = Gpt::new(config, 7, &Device::Cpu).unwrap();
    let std = |name: &str| {
        let (_, var) = model.params().iter().find(|(n, _)| n == name).unwrap();
        let v = values(var);
        (v.iter().map(|x| x * x).sum::<f64>() / v.len() as f64).sqrt()
    };
    let near =
        |name: &str, want: f64| assert!((std(name) / want - 1.0).abs() < 0.05, "{name}: {} want {want}", std(name));
    near("model.embed_tokens.weight", 0.02);
    near("model.layers.0.self_attn.qkv_proj.weight", 0.02);
    near("model.layers.0.self_attn.o_proj.weight", 0.02 / 12f64.sqrt());
    near("model.layers.5.mlp.experts.fc_out.weight", 0.02 / 12f64.sqrt());
    near("model.layers.1.mlp.gate.weight", 1.0 / 128f64.sqrt() / 3f64.sqrt());
    assert_eq!(std("model.layers.1.mlp.experts.fc_in.bias"), 0.0);
    let (_, experts) = model.params().iter().find(|(n, _)| n == "model.layers.1.mlp.experts.fc_in.weight").unwrap();
    assert_ne!(values(&experts.get(0).unwrap()), values(&experts.get(1).unwrap()), "experts start apart");
}

#[test]
fn impossible_configurations_are_refused() {
    let refuse = |config: GptConfig, part: &str| {
        let text = config.validate().unwrap_err().to_string();
        assert!(text.contains(part), "{text:?} should name {part:?}");
        assert!(Gpt::new(config, 1, &Device::Cpu).is_err());
    };
    refuse(with_moe("tiny-moe", |m| m.num_experts = vec![0, 8, 8]), "num_experts must be between 1");
    refuse(with_moe("tiny-moe", |m| m.top_k = 9), "num_experts_per_tok must be between 1 and the 8 experts, got 9");
    refuse(with_moe("tiny-moe", |m| m.num_experts = vec![8, 8]), "one entry for each of the 3 MoE layers");
    refuse(with_moe("tiny-moe", |m| m.expert_interval = 0), "expert_interval");
    refuse(with_moe("tiny-moe", |m| m.capacity.train_factor = Some(0.0)), "capacity factor");
    refuse(with_moe("tiny-moe", |m| m.aux_loss_coef = f64::NAN), "router_aux_loss_coef");
    refuse(small("tiny-dense", |c| c.num_heads = 3), "num_attention_heads 3 must divide hidden_size 16");
    refuse(small("tiny-dense", |c| c.vocab_size = 0), "vocab_size");
    refuse(small("tiny-dense", |c| c.eos_token_id = Some(37)), "eos_token_id");
}

#[test]
fn impossible_inputs_are_refused_and_leave_the_sequence() {
    let model = Gpt::new(small("tiny-moe", |_| ()), 1, &Device::Cpu).unwrap();
    let mut bad = batch(model.config(), 2, 8);
    bad.target_ids.pop();
    assert!(model.loss(&bad, Pass::Eval).unwrap_err().to_string().contains("15 targets"));
    for seq_len in [0, 7] {
        let text = model.decoder().hidden(&[1; 16], seq_len, Pass::Eval).unwrap_err().to_string();
        assert!(text.contains("whole sequences"), "{text}");
    }
    let decoder = model.into_packed().unwrap();
    let (pool, other) = (pool(&decoder), pool(&decoder));
    let mut sequence = pool.sequence();
    let forward = |sequence: &mut crate::CachedSequence, token_ids: &[u32], pool: &KvPool| {
        decoder.forward(&mut [SequenceStep { sequence, token_ids, logits: LogitsOf::Last }], pool)
    };
    forward(&mut sequence, &[1, 2], &pool).unwrap();
    for (ids, part) in
        [(vec![], "at least one token"), (vec![37], "token id 37"), (vec![0; 23], "longest sequence of 24")]
    {
        let text = forward(&mut sequence, &ids, &pool).unwrap_err().to_string();
        assert!(text.contains(part), "{text}");
        assert_eq!(sequence.len(), 2);
    }
    assert!(forward(&mut sequence, &[1], &other).unwrap_err().to_string().contains("another pool"));
    assert!(decoder.forward(&mut [], &pool).is_err());
    let small = PoolConfig { num_pages: 1, page_size: 4 };
    let narrow = KvPool::new(crate::CacheLayout::default(), small, &moe_core::CandleOps, &Device::Cpu).unwrap();
    let text = forward(&mut narrow.sequence(), &[1], &narrow).unwrap_err().to_string();
    assert!(text.contains("another model, of 0 layers"), "{text}");
    let tight = decoder.new_pool(small).unwrap();
    let mut sequence = tight.sequence();
    forward(&mut sequence, &[1, 2, 3], &tight).unwrap();
    assert!(matches!(forward(&mut sequence, &[1, 2], &tight), Err(crate::Error::OutOfPages { .. })));
    assert_eq!(sequence.len(), 3);
    forward(&mut sequence, &[1], &tight).unwrap();
}
