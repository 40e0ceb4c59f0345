//! What every family must do, as one check that knows the API; a family adds a line and a fixture of transformers.
//! `fixtures/<family>/make.py` made the files.

use crate::golden::{fixtures, logits, read};
use crate::train_gpt::{config as train_config, corpus};
use candle_core::{DType, Device, Tensor};
use moe_core::RouterConfig;
use moe_core::testing::values;
use moe_models::config::LayerConfig;
use moe_models::hf::{FilePart, StackPlace};
use moe_models::train::checkpoint::CheckpointStore;
use moe_models::train::export::export;
use moe_models::train::{Event, TrainConfig, Trainer};
use moe_models::{
    CausalLm, Decoder, DecoderConfig, DropoutConfig, Family, LayerwisePass, LogitsOf, Model, PackedForms, Pass,
    PoolConfig, Precision, QuantFormat, ReadFamily, SequenceStep, TokenBatch,
};
use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

type Any = Model<Box<dyn Family>>;

struct Fixture {
    folder: PathBuf,
    expected: HashMap<String, Tensor>,
}

impl Fixture {
    fn load(name: &str) -> Self {
        Self { folder: fixtures().join(name), expected: read(&format!("{name}/expected/expected.safetensors")) }
    }

    fn name(&self) -> String {
        self.folder.file_name().unwrap().to_string_lossy().into_owned()
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        self.expected[name].flatten_all().unwrap().to_vec1().unwrap()
    }

    fn model(&self) -> Any {
        Any::load(&self.folder, &Device::Cpu).unwrap()
    }
}

/// The largest difference over the largest magnitude of `want`.
fn difference(got: &Tensor, want: &Tensor, what: &str) -> f64 {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let (got, want) = (values(got), values(want));
    let largest = want.iter().fold(0f64, |a, b| a.max(b.abs()));
    let worst = got.iter().zip(&want).fold(0f64, |a, (g, w)| a.max((g - w).abs()));
    assert!(!worst.is_nan() && largest > 0.0, "{what}: nothing to compare");
    worst / largest
}

const TOLERANCE: f64 = 1e-4;

fn logits_and_gradients_equal_transformers(fixture: &Fixture) {
    let model = fixture.model();
    let batch = TokenBatch {
        input_ids: fixture.ids("input_ids"),
        target_ids: fixture.ids("target_ids"),
        batch: 2,
        seq_len: 20,
    };
    let packed = Decoder::load(&fixture.folder, Precision::F32).unwrap();
    let mut worst_logit = 0f64;
    for sequence in 0..2 {
        let ids = &batch.input_ids[sequence * 20..][..20];
        let want = fixture.expected["logits"].get(sequence).unwrap();
        for decoder in [model.decoder(), &packed] {
            let off = difference(&logits(decoder, ids), &want, "logits");
            assert!(off <= TOLERANCE, "logits of sequence {sequence} are off by {off:e}");
            worst_logit = worst_logit.max(off);
        }
    }
    // Without auxiliary losses, which transformers adds only where it is asked to.
    let decoder = model.training_decoder();
    // Where training draws experts, the gradients are those of evaluation.
    let pass = if draws_experts(decoder.config()) { Pass::Eval } else { Pass::train(1) };
    let (hidden, _) = decoder.hidden(&batch.input_ids, 20, pass).unwrap();
    let loss = decoder.head().loss(&hidden, &batch.target_ids).unwrap();
    let want = values(&fixture.expected["loss"])[0];
    assert!((values(&loss)[0] - want).abs() <= TOLERANCE * want, "loss {} want {want}", values(&loss)[0]);
    let grads = loss.backward().unwrap();
    let (mut compared, mut worst) = (BTreeSet::new(), 0f64);
    for (spec, (name, var)) in model.table().specs().iter().zip(model.params()) {
        if !spec.trained {
            assert!(grads.get(var).is_none(), "{name} has a gradient");
            continue;
        }
        let grad = grads.get(var).unwrap_or_else(|| panic!("{name} has no gradient"));
        let experts = if spec.is_stacked() { spec.shape[0] } else { 1 };
        for expert in 0..experts {
            let (grad, index) =
                if spec.is_stacked() { (grad.get(expert).unwrap(), Some(expert)) } else { (grad.clone(), None) };
            let parts = model.config().names().parts(spec, index).unwrap();
            let rows = grad.dim(0).unwrap() / parts.len();
            for (part, FilePart { name, place, .. }) in parts.into_iter().enumerate() {
                let got = grad.narrow(0, part * rows, rows).unwrap();
                let mut want = fixture.expected[&format!("grad.{name}")].clone();
                if let Some(StackPlace { index, layout }) = place {
                    want = layout.from_files(&want.get(index).unwrap()).unwrap();
                }
                // An expert that no token came to has none.
                let off = if values(&want).iter().all(|v| *v == 0.0) {
                    values(&got).iter().fold(0f64, |a, v| a.max(v.abs()))
                } else {
                    difference(&got, &want, &name)
                };
                assert!(off <= TOLERANCE, "the gradient of {name} is off by {off:e}");
                worst = worst.max(off);
                compared.insert(name);
            }
        }
    }
    let gradients = fixture.expected.keys().filter(|name| name.starts_with("grad.")).count();
    assert_eq!(compared.len(), gradients, "every tensor of the files has its gradient compared");
    println!(
        "{}: worst difference over the largest magnitude {worst_logit:.1e} of logits, {worst:.1e} of {} gradients",
        fixture.name(),
        compared.len()
    );
}

/// Rounded to integers while it is loaded, from whatever form the files have, it is nearly the same model.
fn serves_in_integers(fixture: &Fixture) {
    let ids = &fixture.ids("input_ids")[..12];
    let want = logits(&Decoder::load(&fixture.folder, Precision::F32).unwrap(), ids);
    let forms = PackedForms::from(Precision::F32).with_products(QuantFormat::Int8);
    let off = difference(&logits(&Decoder::load(&fixture.folder, forms).unwrap(), ids), &want, "logits");
    println!("{}: logits in 8 bits off by {off:.1e}", fixture.name());
    // A token whose experts change moves far.
    assert!(off > 0.0 && off < 0.5, "logits are off by {off:e}");
}

fn draws_experts(config: &DecoderConfig) -> bool {
    let router = |layer: &LayerConfig| layer.feed_forward.moe().map(|moe| moe.router);
    config.layers.iter().any(|layer| matches!(router(layer), Some(RouterConfig::SparseMixer(_))))
}

fn greedy_text_equals_transformers(fixture: &Fixture) {
    let want = fixture.ids("greedy");
    let decoder = Decoder::load(&fixture.folder, Precision::F32).unwrap();
    let pool = decoder.new_pool(PoolConfig::for_tokens(1, want.len())).unwrap();
    let mut sequence = pool.sequence();
    let mut ids = want[..7].to_vec();
    let mut next = ids.clone();
    while ids.len() < want.len() {
        let step = SequenceStep { sequence: &mut sequence, token_ids: &next, logits: LogitsOf::Last };
        let row = decoder.forward(&mut [step], &pool).unwrap().logits.get(0).unwrap().to_vec1::<f32>().unwrap();
        let best = (0..row.len()).fold(0, |best, i| if row[i] > row[best] { i } else { best }) as u32;
        ids.push(best);
        next = vec![best];
    }
    assert_eq!(ids, want);
}

/// Saved under the names it came with: the same tensors, bit for bit, and the same configuration.
fn round_trips_under_the_published_names(fixture: &Fixture) {
    let model = fixture.model();
    let dir = tempfile::tempdir().unwrap();
    model.save(dir.path(), DType::F32).unwrap();
    let saved = candle_core::safetensors::load(dir.path().join("model.safetensors"), &Device::Cpu).unwrap();
    let mut names = 0;
    for file in std::fs::read_dir(&fixture.folder).unwrap().map(|f| f.unwrap().path()) {
        if file.extension().is_some_and(|e| e == "safetensors") {
            for (name, tensor) in candle_core::safetensors::load(&file, &Device::Cpu).unwrap() {
                assert_eq!(values(&saved[&name]), values(&tensor), "{name}");
                names += 1;
            }
        }
    }
    assert_eq!(saved.len(), names);
    let json = |path: PathBuf| -> serde_json::Value { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
    assert_eq!(json(dir.path().join("config.json")), json(fixture.folder.join("config.json")));
    let exported = dir.path().join("exported");
    export(&model, &"{}".to_owned().into(), &exported, DType::BF16).unwrap();
    assert_eq!(json(exported.join("config.json"))["dtype"], "bfloat16");
    Any::load(&exported, &Device::Cpu).unwrap();
}

/// Trained a few steps, stopped, loaded from the checkpoint as whatever family it names, and trained on: the bits of a run that
/// was never stopped.
fn trains_and_resumes(fixture: &Fixture) {
    let json = std::fs::read_to_string(fixture.folder.join("config.json")).unwrap();
    let vocab = fixture.model().decoder_config().vocab_size;
    let json = json.replacen(&format!("\"vocab_size\": {vocab}"), "\"vocab_size\": 262", 1);
    let family = || <Box<dyn Family>>::read(json.as_bytes(), Path::new("config.json")).unwrap();
    let config = TrainConfig { seq_length: Some(16), ..train_config() }.resolved(128).unwrap();
    let run = |out: &Path, resume: Option<&Path>, stop_after: u64| {
        let (corpus, tokenizer) = corpus(&config);
        let mut trainer = match resume {
            None => {
                let model = Any::new(family(), config.seed, &Device::Cpu).unwrap().with_precision(config.precision);
                Trainer::new(model.unwrap(), config.clone(), corpus, tokenizer, out).unwrap()
            }
            Some(folder) => {
                let model = Any::load(folder, &Device::Cpu).unwrap().with_precision(config.precision).unwrap();
                Trainer::resume(model, config.clone(), corpus, tokenizer, out, folder).unwrap()
            }
        };
        let stop = AtomicBool::new(false);
        let mut losses = Vec::new();
        let mut observer = |event: &Event| {
            if let Event::Step { step, loss, .. } = event {
                losses.push(*loss);
                stop.store(*step == stop_after, Ordering::Relaxed);
            }
        };
        trainer.run(&stop, &mut observer).unwrap();
        let params = trainer.model().params().iter().flat_map(|(_, var)| values(var)).collect::<Vec<f64>>();
        (params, losses)
    };
    let (whole, halves) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (want, losses) = run(whole.path(), None, u64::MAX);
    assert!(losses.last() < losses.first(), "{losses:?}");
    run(halves.path(), None, 4);
    let folder = CheckpointStore::open(halves.path(), 2).unwrap().latest().unwrap().unwrap();
    assert!(run(halves.path(), Some(&folder), u64::MAX).0 == want, "resumed run and whole run differ");
}

fn check(name: &str) {
    let fixture = Fixture::load(name);
    logits_and_gradients_equal_transformers(&fixture);
    greedy_text_equals_transformers(&fixture);
    serves_in_integers(&fixture);
    round_trips_under_the_published_names(&fixture);
    trains_and_resumes(&fixture);
}

#[test]
fn granitemoe_equals_transformers() {
    check("granitemoe");
}

/// What files say of dropout is what training drops, and a number that is none is refused.
#[test]
fn granitemoe_drops_what_its_files_say() {
    let path = fixtures().join("granitemoe/config.json");
    let json = std::fs::read_to_string(&path).unwrap();
    let model = |share: &str| {
        let json = json.replacen("\"attention_dropout\": 0.0", &format!("\"attention_dropout\": {share}"), 1);
        Any::new(<Box<dyn Family>>::read(json.as_bytes(), &path).unwrap(), 1, &Device::Cpu)
    };
    assert_eq!(model("0.1").unwrap().dropout(), DropoutConfig { attention: 0.1, hidden: 0.0 });
    assert!(model("1.0").unwrap_err().to_string().contains("attention"));
}

#[test]
fn granitemoeshared_equals_transformers() {
    check("granitemoeshared");
}

#[test]
fn gpt_oss_equals_transformers() {
    check("gpt_oss");
}

#[test]
fn llama4_text_equals_transformers() {
    check("llama4_text");
}

/// Experts in blocks of 4 bits, as published files have them: the values that transformers makes of them, and floats once saved.
#[test]
fn gpt_oss_is_read_from_mxfp4() {
    let folder = fixtures().join("gpt_oss/mxfp4");
    let expected = read("gpt_oss/mxfp4/expected/expected.safetensors");
    let ids = expected["input_ids"].to_vec1::<u32>().unwrap();
    let model = Any::load(&folder, &Device::Cpu).unwrap();
    let packed = Decoder::load(&folder, Precision::F32).unwrap();
    for decoder in [model.decoder(), &packed] {
        let off = difference(&logits(decoder, &ids), &expected["logits"], "logits");
        assert!(off <= TOLERANCE, "logits are off by {off:e}");
    }
    let dir = tempfile::tempdir().unwrap();
    model.save(dir.path(), DType::BF16).unwrap();
    let json = std::fs::read_to_string(dir.path().join("config.json")).unwrap();
    assert!(!json.contains("quantization_config"), "{json}");
    let again = Any::load(dir.path(), &Device::Cpu).unwrap();
    for ((name, read), (_, saved)) in model.params().iter().zip(again.params()) {
        // These values are bf16's own.
        if name.contains("experts") && name.ends_with("weight") {
            assert_eq!(values(read), values(saved), "{name}");
        }
    }

    // What does not fit is refused by its name.
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(folder.join("config.json"), copy.path().join("config.json")).unwrap();
    let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
    let blocks = "model.layers.1.mlp.experts.down_proj_blocks";
    let refused = |change: fn(&mut HashMap<String, Tensor>)| {
        let mut tensors = tensors.clone();
        change(&mut tensors);
        candle_core::safetensors::save(&tensors, copy.path().join("model.safetensors")).unwrap();
        Any::load(copy.path(), &Device::Cpu).unwrap_err().to_string()
    };
    let text = refused(|t| drop(t.remove("model.layers.1.mlp.experts.down_proj_scales")));
    assert!(text.contains("down_proj_scales is missing"), "{text}");
    let text = refused(|t| {
        let name = "model.layers.1.mlp.experts.down_proj_blocks";
        t.insert(name.into(), t[name].narrow(1, 0, 31).unwrap().contiguous().unwrap());
    });
    assert!(text.contains(blocks) && text.contains("[4, 32, 1, 16]"), "{text}");
    let text = refused(|t| {
        let name = "model.layers.1.mlp.experts.down_proj_blocks";
        t.insert(name.into(), t[name].to_dtype(DType::F32).unwrap());
    });
    assert!(text.contains(blocks) && text.contains("must be U8"), "{text}");
    let text = refused(|t| {
        let name = "model.layers.1.mlp.experts.down_proj_scales";
        let mut scales = t[name].flatten_all().unwrap().to_vec1::<u8>().unwrap();
        *scales.last_mut().unwrap() = 255;
        t.insert(name.into(), Tensor::from_vec(scales, t[name].shape(), &Device::Cpu).unwrap());
    });
    assert!(text.contains("down_proj_scales gives expert 3 a weight of NaN"), "{text}");
}

#[test]
fn phimoe_equals_transformers() {
    check("phimoe");
}

/// Beyond the length that its factors are for, a sequence is refused.
#[test]
fn phimoe_ends_at_its_original_length() {
    let decoder = Decoder::load(&fixtures().join("phimoe"), Precision::F32).unwrap();
    assert_eq!(decoder.max_seq_len(), 128);
    let pool = decoder.new_pool(PoolConfig::for_tokens(1, 200)).unwrap();
    let ids = vec![1; 129];
    let step = SequenceStep { sequence: &mut pool.sequence(), token_ids: &ids, logits: LogitsOf::Last };
    let text = decoder.forward(&mut [step], &pool).unwrap_err().to_string();
    assert!(text.contains("129 tokens exceed the model's longest sequence of 128"), "{text}");
}

#[test]
fn qwen3_moe_equals_transformers() {
    check("qwen3_moe");
}

#[test]
fn qwen2_moe_equals_transformers() {
    check("qwen2_moe");
}

#[test]
fn mixtral_equals_transformers() {
    check("mixtral");
}

#[test]
fn deepseek_v2_equals_transformers() {
    check("deepseek_v2");
}

#[test]
fn deepseek_v3_equals_transformers() {
    check("deepseek_v3");
}

#[test]
fn glm4_moe_equals_transformers() {
    check("glm4_moe");
}

/// Files of GLM-4.5 and DeepSeek-V3 have a layer more, which predicts the token after the next; the model is the same without.
#[test]
fn a_folder_with_layers_after_the_last_is_read_without_them() {
    let (from, dir) = (fixtures().join("glm4_moe"), tempfile::tempdir().unwrap());
    let model = Any::load(&from, &Device::Cpu).unwrap();
    model.save(dir.path(), DType::F32).unwrap();
    let file = dir.path().join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&file, &Device::Cpu).unwrap();
    let extra = Tensor::ones(7, DType::F32, &Device::Cpu).unwrap();
    tensors.insert("model.layers.3.enorm.weight".into(), extra.clone());
    candle_core::safetensors::save(&tensors, &file).unwrap();

    let ids = [5, 9, 2, 40];
    let want = values(&logits(model.decoder(), &ids));
    assert_eq!(values(&logits(Any::load(dir.path(), &Device::Cpu).unwrap().decoder(), &ids)), want);
    let packed = Decoder::load(&from, Precision::F32).unwrap();
    let got = Decoder::load(dir.path(), Precision::F32).unwrap();
    assert_eq!(values(&logits(&got, &ids)), values(&logits(&packed, &ids)));
    let (json, bytes) = (std::fs::read(dir.path().join("config.json")).unwrap(), std::fs::read(&file).unwrap());
    let held = Any::from_bytes(&json, bytes, &Device::Cpu).unwrap();
    assert_eq!(values(&logits(held.decoder(), &ids)), want);
    let batch = TokenBatch { input_ids: ids.to_vec(), target_ids: ids.to_vec(), batch: 1, seq_len: 4 };
    LayerwisePass::open(dir.path(), &[batch]).unwrap();

    // No other tensor is left out.
    tensors.insert("model.layers.2.enorm.weight".into(), extra);
    candle_core::safetensors::save(&tensors, &file).unwrap();
    let refused = Any::load(dir.path(), &Device::Cpu).unwrap_err().to_string();
    assert!(refused.contains("model.layers.2.enorm.weight does not belong"), "{refused}");
}

/// What gradients do not change is no weight that could be rounded.
#[test]
fn biases_of_scores_stay_f32_in_files() {
    let (model, dir) = (Fixture::load("glm4_moe").model(), tempfile::tempdir().unwrap());
    model.save(dir.path(), DType::BF16).unwrap();
    let saved = candle_core::safetensors::load(dir.path().join("model.safetensors"), &Device::Cpu).unwrap();
    let again = Any::load(dir.path(), &Device::Cpu).unwrap();
    let mut biases = 0;
    for ((spec, (name, var)), (_, read)) in model.table().specs().iter().zip(model.params()).zip(again.params()) {
        if !spec.trained {
            let bias = &saved[&name.replace("gate.selection_bias", "gate.e_score_correction_bias")];
            assert_eq!((bias.dtype(), values(read)), (DType::F32, values(var)), "{name}");
            biases += 1;
        }
    }
    assert_eq!(biases, 2);
    assert!(saved.values().any(|tensor| tensor.dtype() == DType::BF16));
}

/// What the decoder has no use for in published files, and what it could not do without.
#[test]
fn layers_after_the_last_are_left_out() {
    let family = <Box<dyn Family>>::read_file(&fixtures().join("glm4_moe/config.json")).unwrap();
    assert!(family.is_extra("model.layers.3.shared_head.norm.weight"));
    assert!(!family.is_extra("model.layers.2.mlp.gate.weight") && !family.is_extra("model.norm.weight"));
}

#[test]
fn llama_equals_transformers() {
    check("llama");
}

#[test]
fn olmoe_equals_transformers() {
    check("olmoe");
}

#[track_caller]
fn refuses(family: &str, cases: &[(&str, &str, &str)]) {
    let path = fixtures().join(family).join("config.json");
    let good = std::fs::read_to_string(&path).unwrap();
    for (find, replace, part) in cases {
        assert!(good.contains(find), "{find}");
        let text = <Box<dyn Family>>::read(good.replacen(find, replace, 1).as_bytes(), &path).unwrap_err().to_string();
        assert!(text.contains(part) && text.contains("config.json"), "{text:?} should name {part:?}");
    }
}

#[test]
fn families_refuse_what_they_do_not_implement() {
    refuses(
        "mixtral",
        &[
            ("\"router_jitter_noise\": 0.0", "\"router_jitter_noise\": 0.1", "router_jitter_noise"),
            ("\"sliding_window\": 12", "\"sliding_window\": 0", "window must be at least 1"),
            ("\"num_local_experts\": 6", "\"num_local_experts\": 0", "num_local_experts must be between 1"),
            ("\"num_local_experts\": 6", "\"num_local_experts\": 6, \"num_experts\": 5", "must be the same"),
            ("\"eos_token_id\": 2", "\"eos_token_id\": [2, 97]", "eos_token_id 97 is outside the vocabulary"),
        ],
    );
    refuses(
        "deepseek_v2",
        &[
            ("\"topk_method\": \"group_limited_greedy\"", "\"topk_method\": \"noaux_tc\"", "topk_method"),
            ("\"norm_topk_prob\": false", "\"norm_topk_prob\": true", "norm_topk_prob"),
            ("\"mlp_bias\": false", "\"mlp_bias\": true", "mlp_bias"),
            ("\"pretraining_tp\": 1", "\"moe_layer_freq\": 2", "moe_layer_freq must be null or 1"),
        ],
    );
    refuses(
        "deepseek_v3",
        &[
            ("\"q_lora_rank\": 14", "\"q_lora_rank\": 0", "q_lora_rank"),
            ("\"kv_lora_rank\": 20", "\"kv_lora_rank\": 0", "kv_lora_rank must be between 1"),
            ("\"qk_rope_head_dim\": 6", "\"qk_rope_head_dim\": 5", "head_dim must be even"),
            ("\"v_head_dim\": 8", "\"v_head_dim\": null", "v_head_dim is missing"),
            ("\"n_routed_experts\": 8", "\"num_local_experts\": 0", "num_local_experts must be between 1"),
        ],
    );
    refuses(
        "glm4_moe",
        &[
            ("\"n_group\": 4", "\"n_group\": 3", "n_group must divide the 8 experts"),
            ("\"topk_group\": 2", "\"topk_group\": 5", "topk_group must be between 1 and n_group"),
            ("\"routed_scaling_factor\": 1.5", "\"routed_scaling_factor\": 0.0", "routed_scaling_factor"),
            ("\"partial_rotary_factor\": 0.5", "\"partial_rotary_factor\": 0.6", "partial_rotary_factor"),
        ],
    );
    refuses(
        "granitemoeshared",
        &[
            ("\"attention_dropout\": 0.0", "\"attention_dropout\": \"much\"", "attention_dropout"),
            ("\"residual_multiplier\": 0.7", "\"residual_multiplier\": 0.0", "residual_multiplier must be a positive"),
            ("\"logits_scaling\": 0.5", "\"logits_scaling\": -1.0", "logits_scaling must be a positive"),
            (
                "\"model_type\": \"granitemoeshared\"",
                "\"model_type\": \"granitemoe\"",
                "shared_intermediate_size is not",
            ),
            (
                "\"use_cache\": true",
                "\"use_cache\": true, \"position_embedding_type\": \"nope\"",
                "position_embedding_type",
            ),
            ("\"hidden_act\": \"silu\"", "\"hidden_act\": \"gelu\"", "hidden_act"),
        ],
    );
    refuses(
        "phimoe",
        &[
            ("\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 3", "num_experts_per_tok must be 2"),
            ("\"router_jitter_noise\": 0.1", "\"router_jitter_noise\": 1.5", "router_jitter_noise must be at least 0"),
            ("\"input_jitter_noise\": 0.05", "\"input_jitter_noise\": -1.0", "input_jitter_noise must be at least 0"),
            ("\"rope_type\": \"longrope\"", "\"rope_type\": \"dynamic\"", "rope_type \"dynamic\""),
            ("\"short_mscale\": 1.2", "\"short_mscale\": null", "rope_parameters.short_mscale is missing"),
            (
                "\"short_mscale\": 1.2",
                "\"short_mscale\": 1.2, \"factor\": 4.0",
                "rope_parameters.factor is not implemented",
            ),
            ("      1.25,\n", "", "4 pairs of columns turn, but there are 3 factors"),
            ("\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true", "tie_embeddings must be false"),
            ("\"use_cache\": true", "\"use_cache\": true, \"hidden_dropout\": 0.1", "hidden_dropout"),
        ],
    );
    refuses(
        "gpt_oss",
        &[
            ("\"swiglu_alpha\": 1.702", "\"swiglu_alpha\": 1.5", "swiglu_alpha"),
            ("\"swiglu_limit\": 7.0", "\"swiglu_limit\": 5.0", "swiglu_limit"),
            ("\"sliding_attention\"", "\"chunked_attention\"", "layer_types must be"),
            (
                "  \"full_attention\"\n",
                "  \"full_attention\", \"full_attention\"\n",
                "an entry for each of 2 layers, got 3",
            ),
            ("\"rope_parameters\"", "\"old_rope_parameters\"", "rope_parameters is missing"),
            ("\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 2, \"experts_per_token\": 3", "experts_per_token"),
            ("\"sliding_window\": 6", "\"sliding_window\": 0", "window must be at least 1"),
        ],
    );
    refuses(
        "llama4_text",
        &[
            ("\"num_experts_per_tok\": 1", "\"num_experts_per_tok\": 2", "num_experts_per_tok must be null or 1"),
            ("\"attention_chunk_size\": 8", "\"attention_chunk_size\": null", "attention_chunk_size is missing"),
            ("\"attention_chunk_size\": 8", "\"attention_chunk_size\": 0", "chunk must be at least 1"),
            ("\"attn_scale\": 0.3", "\"attn_scale\": -0.3", "temperature must have"),
            ("\"chunked_attention\"", "\"sliding_attention\"", "layer_types must be"),
            ("\"router_jitter_noise\": 0.0", "\"router_jitter_noise\": 0.1", "router_jitter_noise"),
            ("\"no_rope_layers\": [\n    1,", "\"no_rope_layers\": [\n    2,", "no_rope_layers must be 0 or 1"),
            (
                "\"no_rope_layers\": [\n    1,\n",
                "\"no_rope_layers\": [\n",
                "no_rope_layers must have an entry for each of 4",
            ),
            ("\"attn_temperature_tuning\": true", "\"attn_temperature_tuning\": \"yes\"", "attn_temperature_tuning"),
        ],
    );
    refuses("olmoe", &[("\"clip_qkv\": null", "\"clip_qkv\": 8.0", "clip_qkv")]);
    refuses(
        "qwen2_moe",
        &[
            ("\"full_attention\"", "\"sliding_attention\"", "layer_types"),
            ("\"rope_type\": \"yarn\"", "\"rope_type\": \"longrope\"", "rope_type \"longrope\""),
            ("\"factor\": 4.0", "\"factor\": -1.0", "rope_parameters.factor must be a positive number"),
            ("\"rope_type\": \"yarn\"", "\"rope_type\": \"yarn\", \"new\": 1", "rope_parameters.new"),
            ("\"shared_expert_intermediate_size\": 24", "\"shared_expert_intermediate_size\": 0", "shared_expert"),
        ],
    );
}

/// What a configuration asks for and this project does not do is refused by the name of the field.
#[test]
fn qwen3_moe_refuses_what_it_does_not_implement() {
    refuses(
        "qwen3_moe",
        &[
            ("\"hidden_act\": \"silu\"", "\"hidden_act\": \"gelu\"", "hidden_act"),
            ("\"use_sliding_window\": false", "\"use_sliding_window\": true", "use_sliding_window"),
            ("\"rope_type\": \"default\"", "\"rope_type\": \"axial\"", "rope_type \"axial\""),
            ("\"attention_dropout\": 0.0", "\"attention_dropout\": 0.1", "attention_dropout"),
            ("\"use_cache\": true", "\"use_cache\": true, \"rope_scaling\": {\"type\": \"yarn\"}", "rope_scaling"),
            ("\"use_cache\": true", "\"use_cache\": true, \"shared_expert_intermediate_size\": 5", "shared_expert"),
            ("\"num_experts_per_tok\": 2", "\"num_experts_per_tok\": 7", "between 1 and the 6 experts"),
            ("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3", "num_kv_heads 3 must divide"),
            ("\"head_dim\": 12", "\"head_dim\": 11", "head_dim"),
            ("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 99999999999", "num_hidden_layers"),
            ("\"model_type\": \"qwen3_moe\"", "\"model_type\": \"qwen9\"", "qwen9"),
        ],
    );
    let path = fixtures().join("qwen3_moe/config.json");
    let good = std::fs::read_to_string(&path).unwrap();
    // Published files say it in the words of transformers 4.
    let old =
        good.replace("\"num_local_experts\"", "\"num_experts\"").replace("\"dtype\"", "\"torch_dtype\"").replacen(
            "\"use_cache\": true",
            "\"use_cache\": true, \"rope_theta\": 1000000.0, \"rope_scaling\": null, \"max_window_layers\": 3",
            1,
        );
    let start = old.find("\"rope_parameters\"").unwrap();
    let end = start + old[start..].find("},").unwrap() + 2;
    let old = format!("{}{}", &old[..start], &old[end..]);
    <Box<dyn Family>>::read(old.as_bytes(), &path).unwrap().decoder().unwrap();
}
