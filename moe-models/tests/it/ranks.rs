//! A PR-MoE over up to 8 ranks on threads equals one rank; and what a rank without a partner says.

use crate::equality::{Kind, Reference, check, layouts};
use crate::gguf::halved_blocks;
use crate::golden::fixtures;
use candle_core::backprop::GradStore;
use candle_core::{Device, Tensor, Var};
use moe_core::ParamSpec;
use moe_core::tape::{GradBuffers, Tape};
use moe_kernels::KernelOps;
use moe_models::gpt::{Gpt, GptConfig};
use moe_models::gpt::{Pass, TokenBatch};
use moe_models::hf::quantization::{nearest, save};
use moe_models::{
    CausalLm, Decoder, DropoutConfig, Family, LogitsOf, Model, PackedForms, ParamSource, PoolConfig, Precision,
    QuantFormat, SequenceStep,
};
use moe_parallel::all_to_all::Route;
use moe_parallel::comm::thread::ThreadWorld;
use moe_parallel::{Collectives, Coordination, ExchangeConfig, Mesh, ParallelDims};
use std::sync::Arc;

fn kind(experts: &[usize], top_k: usize, capacity: Option<f64>) -> Kind {
    let dropout = DropoutConfig::default();
    Kind { experts: experts.to_vec(), top_k, capacity, precision: Precision::F32, dropout }
}

/// Two expert counts in one model, on every layout.
#[test]
fn every_layout_equals_one_rank() {
    let reference = Reference::new(&kind(&[4, 8], 1, Some(1.0)));
    let mut count = 0;
    for world in [1, 2, 3, 4, 6, 8] {
        for layout in layouts(world) {
            ThreadWorld::new(world).run(|comm| check(&comm, &layout, &reference));
            count += 1;
        }
    }
    assert!(count > 60, "{count} layouts");
}

/// Experts that do not divide by the ranks, fewer experts than ranks, several choices, no drops, bf16 products.
#[test]
fn every_kind_of_model_equals_one_rank() {
    let kinds = [
        kind(&[3, 5], 2, None),
        kind(&[5], 3, Some(1.25)),
        Kind { precision: Precision::Bf16, ..kind(&[2, 7], 2, Some(1.0)) },
    ];
    for kind in &kinds {
        let reference = Reference::new(kind);
        for world in [2, 4, 6, 8] {
            // bf16 rounds what split matrices sum: those are held to f32's tolerance in f32 alone.
            let held = |l: &&crate::equality::Layout| {
                kind.precision == Precision::F32 || (l.dims.tp == 1 && l.dims.expert_slices == 1)
            };
            for layout in layouts(world).iter().filter(held).step_by(if world == 8 { 3 } else { 2 }) {
                ThreadWorld::new(world).run(|comm| check(&comm, layout, &reference));
            }
        }
    }
}

/// What is dropped is a matter of the micro-batch, not of who computes it: split heads drop what they drop on one rank, and what
/// all ranks of a group hold is dropped alike on them.
#[test]
fn dropout_over_ranks_equals_one_rank() {
    let dropout = DropoutConfig { attention: 0.3, hidden: 0.2 };
    let reference = Reference::new(&Kind { dropout, ..kind(&[4, 3], 2, None) });
    for world in [2, 4, 8] {
        for layout in layouts(world).iter().step_by(if world == 8 { 5 } else { 2 }) {
            ThreadWorld::new(world).run(|comm| check(&comm, layout, &reference));
        }
    }
}

/// Logits of a prompt and of a token after it.
fn decode(decoder: &Decoder, prompt: &[u32]) -> Vec<f32> {
    let pool = decoder.new_pool(PoolConfig { num_pages: 8, page_size: 4 }).unwrap();
    let mut sequence = pool.sequence();
    let mut logits = Vec::new();
    for token_ids in [prompt, &[7]] {
        let step = SequenceStep { sequence: &mut sequence, token_ids, logits: LogitsOf::Last };
        let output = decoder.forward(&mut [step], &pool).unwrap();
        logits.extend(output.logits.flatten_all().and_then(|t: Tensor| t.to_vec1::<f32>()).unwrap());
    }
    logits
}

/// The inference pass over ranks, with packed weights: the bits of one rank where matrices are whole.
#[test]
fn inference_over_ranks_equals_one_rank() {
    let mut config = GptConfig::preset("tiny-pr-moe").unwrap();
    (config.vocab_size, config.max_seq_len, config.d_model, config.num_heads, config.d_ff) = (61, 16, 24, 4, 40);
    config.init_std = 0.2;
    let model = Gpt::new(config, 3, &Device::Cpu).unwrap();
    let (table, config) = (Arc::new(model.table().clone()), model.decoder_config().clone());
    let ops = || Arc::new(KernelOps::packing(Precision::F32));
    let whole = model.into_packed().unwrap();
    let prompt = |d: usize| (0..3 + d).map(|i| ((i * 11 + d * 5) % 61) as u32).collect::<Vec<_>>();
    for (dims, coordination) in [
        (ParallelDims::new(4, 1, 4, 1), Coordination::None),
        (ParallelDims::new(2, 2, 4, 1), Coordination::ByDestination),
        (ParallelDims::new(4, 1, 2, 2), Coordination::None),
    ] {
        let want: Vec<Vec<f32>> = (0..dims.dp).map(|d| decode(&whole, &prompt(d))).collect();
        ThreadWorld::new(4).run(|comm| {
            let exchange = ExchangeConfig { route: Route::Hierarchical.into(), coordination };
            let mesh = Mesh::new(Arc::clone(&comm), dims, 2, exchange).unwrap();
            let vb = ParamSource::initial(Arc::clone(&table), 3, mesh.placement()).builder(&Device::Cpu);
            let decoder = Decoder::over(config.clone(), vb, ops(), &mesh).unwrap();
            let d = dims.dense(comm.rank()).dp_rank;
            let got = decode(&decoder, &prompt(d));
            if dims.tp == 1 && dims.expert_slices == 1 {
                assert_eq!(got, want[d], "{dims:?}");
            }
            let worst = got.iter().zip(&want[d]).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(got.len() == want[d].len() && worst < 1e-4, "{dims:?}: {worst:e}");
        });
    }
}

/// Integers that a folder or a file of GGUF holds: each rank reads those of its own experts, or its part of each matrix.
#[test]
fn integers_over_ranks_are_those_of_one_rank() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("halved.gguf");
    let folders = [QuantFormat::Int8, QuantFormat::INT4].map(|format| {
        let folder = root.path().join(format!("{format}"));
        save(&fixtures().join("qwen3_moe"), &folder, format, nearest).unwrap();
        folder
    });
    let mut bytes = std::fs::read(fixtures().join("gguf/qwen3moe.gguf")).unwrap();
    halved_blocks(&mut bytes);
    std::fs::write(&file, bytes).unwrap();
    let f32 = PackedForms::from(Precision::F32);
    let forms_of = |decoder: &Decoder| decoder.weights().iter().map(|weight| weight.form()).collect::<Vec<_>>();
    let bytes_of = |decoder: &Decoder| decoder.weights().iter().map(|weight| weight.bytes()).sum::<usize>();
    // Experts of 20 columns: what is cut of groups of 32 is rounded anew where integers are asked for, and else stays floats.
    let [int8, int4] = folders;
    let cases = [(int8, f32, 0.04), (int4, f32, 0.2), (file, f32.with_products(QuantFormat::INT4), 0.2)];
    for (path, forms, bound) in cases {
        let is_cut = path.ends_with(format!("{}", QuantFormat::INT4));
        let whole = Decoder::load(&path, forms).unwrap();
        let prompt = |rank: usize| (0..5 + rank).map(|i| ((i * 11 + rank * 5) % 97) as u32).collect::<Vec<_>>();
        let want: Vec<Vec<f32>> = (0..4).map(|rank| decode(&whole, &prompt(rank))).collect();
        ThreadWorld::new(4).run(|comm| {
            let (rank, dims) = (comm.rank(), ParallelDims::new(4, 1, 4, 1));
            let mesh = Mesh::new(comm, dims, 4, ExchangeConfig::default()).unwrap();
            let decoder = Decoder::load_over(&path, forms, &mesh).unwrap();
            assert_eq!(decode(&decoder, &prompt(rank)), want[rank], "{}", path.display());
            assert!(bytes_of(&decoder) < bytes_of(&whole));
        });
        // Divided matrices keep their integers, but inputs are rounded part by part, and partial sums are added.
        for dims in [ParallelDims::new(1, 2, 2, 1), ParallelDims::new(2, 1, 1, 2)] {
            ThreadWorld::new(2).run(|comm| {
                let d = dims.dense(comm.rank()).dp_rank;
                let mesh = Mesh::new(comm, dims, 2, ExchangeConfig::default()).unwrap();
                let decoder = Decoder::load_over(&path, forms, &mesh).unwrap();
                let got = decode(&decoder, &prompt(d));
                let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| v * v).sum::<f32>().sqrt();
                let away = norm(&mut got.iter().zip(&want[d]).map(|(a, b)| a - b)) / norm(&mut want[d].iter().copied());
                assert!(away > 0.0 && away < bound, "{} over {dims:?}: {away}", path.display());
                let (here, there) = (forms_of(&decoder), forms_of(&whole));
                let changed: Vec<_> = here.iter().zip(&there).filter(|(here, there)| here != there).collect();
                assert!(is_cut || changed.is_empty(), "{} over {dims:?}: {changed:?}", path.display());
                assert!(changed.iter().all(|(here, there)| *here == "f32" && there.starts_with("int4")), "{changed:?}");
                assert!(!changed.is_empty() || bytes_of(&decoder) < bytes_of(&whole));
            });
        }
    }
}

/// Families from their published files: loss, logits and gradients of each rank's part.
#[test]
fn published_families_over_ranks_equal_one_rank() {
    for (family, tensor_slicing) in [
        ("qwen3_moe", true),
        ("qwen2_moe", true),
        ("mixtral", true),
        ("olmoe", false),
        ("glm4_moe", true),
        ("llama", true),
        ("deepseek_v3", false),
        ("granitemoe", true),
        ("granitemoeshared", true),
        ("phimoe", false),
        ("gpt_oss", true),
        ("llama4_text", true),
    ] {
        family_over_ranks_equals_one_rank(family, tensor_slicing);
    }
}

fn family_over_ranks_equals_one_rank(family: &str, tensor_slicing: bool) {
    let dir = fixtures().join(family);
    let whole = Model::<Box<dyn Family>>::load(&dir, &Device::Cpu).unwrap();
    let table = Arc::new(whole.table().clone());
    let ids: Vec<u32> = (0..13).map(|i| i * 7 % 97).collect();
    let batch = TokenBatch { input_ids: ids[..12].to_vec(), target_ids: ids[1..].to_vec(), batch: 1, seq_len: 12 };
    let want = whole.loss(&batch, Pass::train(1)).unwrap();
    let want_grads = want.loss.backward().unwrap();
    a_rank_without_tokens_takes_part(&whole, &batch, &want_grads);
    let (hidden, _) = whole.decoder().hidden(&batch.input_ids, 12, Pass::Eval).unwrap();
    let want_logits = whole.decoder().head().logits(&hidden).unwrap();
    for (dims, coordination) in [
        (ParallelDims::new(1, 2, 2, 1), Coordination::ByDestination),
        (ParallelDims::new(2, 1, 1, 2), Coordination::None),
        (ParallelDims::new(2, 1, 2, 1), Coordination::None),
    ] {
        if dims.tp > 1 && !tensor_slicing {
            continue;
        }
        ThreadWorld::new(2).run(|comm| {
            let exchange = ExchangeConfig { route: Route::Flat.into(), coordination };
            let mesh = Mesh::new(Arc::clone(&comm), dims, 2, exchange).unwrap();
            let placement = mesh.placement();
            let values = table.specs().iter().zip(whole.params()).map(|(spec, (name, var))| {
                let part = placement.local(spec, var.as_detached_tensor()).unwrap();
                (name.clone(), Var::from_tensor(&part.contiguous().unwrap()).unwrap())
            });
            let vars: Vec<(String, Var)> = values.collect();
            let vb = ParamSource::variables(Arc::clone(&table), &vars).at(placement).builder(&Device::Cpu);
            let ops = Arc::new(KernelOps::default());
            let decoder = Decoder::over(whole.decoder_config().clone(), vb, ops, &mesh).unwrap();
            // Every rank has the same tokens here, so experts see them once per data-parallel rank.
            let got = decoder.loss(&batch, Pass::train(1)).unwrap();
            assert!((got.parts.lm - want.parts.lm).abs() < 1e-5, "{dims:?}: {:?} {:?}", got.parts, want.parts);
            let (hidden, _) = decoder.hidden(&batch.input_ids, 12, Pass::Eval).unwrap();
            let logits = decoder.head().logits(&hidden).unwrap();
            moe_core::testing::assert_close(&logits, &want_logits, 1e-4, &format!("{dims:?}: logits"));
            let grads = got.loss.backward().unwrap();
            for (spec, (name, var)) in table.specs().iter().zip(&vars).filter(|(spec, _)| spec.trained) {
                let times = if spec.is_stacked() && (dims.ep > 1 || dims.expert_slices > 1) { dims.dp } else { 1 };
                let whole_var = whole.params().iter().find(|(n, _)| n == name).map(|(_, v)| v).unwrap();
                let part = placement.local(spec, want_grads.get(whole_var).unwrap().clone()).unwrap();
                let want = (part * times as f64).unwrap();
                moe_core::testing::assert_close(grads.get(var).unwrap(), &want, 1e-5, &format!("{dims:?}: {name}"));
            }
        });
    }
}

/// Two ranks share the experts, and one of them has no tokens: it takes part in the pass there and back, its experts have the
/// gradients that the other's tokens make, and everything else has zeros.
fn a_rank_without_tokens_takes_part(whole: &Model<Box<dyn Family>>, batch: &TokenBatch, want: &GradStore) {
    let table = Arc::new(whole.table().clone());
    ThreadWorld::new(2).run(|comm| {
        let exchange = ExchangeConfig { route: Route::Flat.into(), coordination: Coordination::None };
        let mesh = Mesh::new(Arc::clone(&comm), ParallelDims::new(2, 1, 2, 1), 2, exchange).unwrap();
        let placement = mesh.placement();
        let part = |(spec, (name, var)): (&ParamSpec, &(String, Var))| {
            let part = placement.local(spec, var.as_detached_tensor()).unwrap().contiguous().unwrap();
            (name.clone(), Var::from_tensor(&part).unwrap())
        };
        let vars: Vec<(String, Var)> = table.specs().iter().zip(whole.params()).map(part).collect();
        let vb = ParamSource::variables(Arc::clone(&table), &vars).at(placement).builder(&Device::Cpu);
        let ops = Arc::new(KernelOps::default());
        let decoder = Decoder::over(whole.decoder_config().clone(), vb, ops, &mesh).unwrap();
        let own = match comm.rank() {
            0 => batch.clone(),
            _ => TokenBatch { input_ids: vec![], target_ids: vec![], batch: 0, ..batch.clone() },
        };
        let mut buffers = GradBuffers::new(vars.iter().map(|(name, var)| (name.as_str(), var))).unwrap();
        buffers.begin();
        let (loss, tape) = Tape::record(|| decoder.loss(&own, Pass::train(1)).unwrap().loss);
        tape.backward_of(&loss, &mut buffers.gradients()).unwrap();
        buffers.finish();
        for (index, spec) in table.specs().iter().enumerate().filter(|(_, spec)| spec.trained) {
            let (name, var) = &vars[index];
            let of_whole = want.get(&whole.params()[index].1).unwrap();
            let mut want = placement.local(spec, of_whole.clone()).unwrap();
            if comm.rank() > 0 && !spec.is_stacked() {
                want = want.zeros_like().unwrap();
            }
            let got = Tensor::from_slice(buffers.of(index), var.shape(), &Device::Cpu).unwrap();
            moe_core::testing::assert_close(&got, &want, 1e-5, &format!("rank {}: {name}", comm.rank()));
        }
    });
}

/// Heads that the ranks cannot share, and norms that span them, are refused with the layer and the numbers.
#[test]
fn heads_that_ranks_cannot_share_are_refused() {
    refuses_tensor_slicing("qwen3_moe", 4, "layer 0: tp 4 must divide num_kv_heads 2");
    refuses_tensor_slicing("olmoe", 2, "layer 0: tp must be 1, got 2: the norms");
    refuses_tensor_slicing("phimoe", 2, "tp must be 1, got 2: an output layer with a bias");
    refuses_tensor_slicing("deepseek_v3", 2, "layer 0: tp must be 1, got 2: latent attention");
}

fn refuses_tensor_slicing(family: &str, tp: usize, reason: &str) {
    let whole = Model::<Box<dyn Family>>::load(&fixtures().join(family), &Device::Cpu).unwrap();
    let table = Arc::new(whole.table().clone());
    ThreadWorld::new(tp).run(|comm| {
        let mesh = Mesh::new(comm, ParallelDims::new(1, tp, 1, 1), tp, ExchangeConfig::default()).unwrap();
        let vb = ParamSource::initial(Arc::clone(&table), 3, mesh.placement()).builder(&Device::Cpu);
        let error = Decoder::over(whole.decoder_config().clone(), vb, Arc::new(KernelOps::default()), &mesh);
        let text = error.map(drop).unwrap_err().to_string();
        assert!(text.contains(reason), "{text}");
    });
}
