//! `moe-train` with folders of published families: the same run as through the library and as PyTorch does it, resumed, over ranks,
//! saved as it came; and what it refuses by name.

use crate::golden::{fixtures, read};
use crate::train_cli::{moe_train, succeed};
use candle_core::{DType, Device, Tensor};
use moe_core::testing::values;
use moe_models::train::data::DataCache;
use moe_models::train::{Corpus, RunText, Silent, TrainConfig, Trainer, tokenizer};
use moe_models::{Decoder, DropoutConfig, Family, Model, Precision};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::AtomicBool;

type Any = Model<Box<dyn Family>>;

/// Entries of the fixtures' vocabularies.
const VOCAB: usize = 97;

/// A word for each entry. No word is an end of text by its name: that is what `config.json` says.
fn words() -> String {
    let vocab: serde_json::Map<String, Value> = (0..VOCAB).map(|id| (format!("w{id}"), id.into())).collect();
    let model = json!({"type": "WordLevel", "vocab": vocab, "unk_token": "w0"});
    let words = json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null, "model": model});
    words.to_string()
}

fn text_of(ids: impl IntoIterator<Item = u32>) -> String {
    ids.into_iter().map(|id| format!("w{id} ")).collect()
}

/// What the folder of a family says beside its weights, word for word.
const BESIDE: [(&str, &str); 3] = [
    ("tokenizer_config.json", "{\"eos_token\": \"w2\", \"bos_token\": \"w1\"}"),
    ("chat_template.jinja", "{{ messages }}"),
    ("generation_config.json", "{\"eos_token_id\": 2, \"temperature\": 0.25}"),
];

/// A folder with the fixture of a family as `model`, which has a tokenizer, and a text.
fn folder(family: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for file in std::fs::read_dir(fixtures().join(family)).unwrap().map(|f| f.unwrap().path()) {
        if file.is_file() {
            std::fs::copy(&file, model.join(file.file_name().unwrap())).unwrap();
        }
    }
    std::fs::write(model.join("tokenizer.json"), words()).unwrap();
    BESIDE.iter().for_each(|(name, text)| std::fs::write(model.join(name), text).unwrap());
    std::fs::write(dir.path().join("text.txt"), text_of((0..900).map(|i| 3 + i * i % 89))).unwrap();
    dir
}

/// Arguments of runs here: 6 steps of 2 micro-batches, without a change of the learning rate.
const SMALL: [&str; 20] = [
    "--data",
    "text.txt",
    "--init-from",
    "model",
    "--seq-length",
    "16",
    "--micro-batch-size",
    "2",
    "--global-batch-size",
    "4",
    "--train-tokens",
    "384",
    "--log-interval",
    "1",
    "--valid-fraction",
    "0.1",
    "--lr",
    "0.002",
    "--lr-warmup-tokens",
    "0",
];

/// [`SMALL`] with these in place of what it says of the same.
fn arguments<'a>(more: &[&'a str]) -> Vec<&'a str> {
    let given = |flag: &str| more.contains(&flag);
    let other_start = given("--model") || given("--model-config");
    let kept = SMALL.chunks(2).filter(|pair| !(given(pair[0]) || other_start && pair[0] == "--init-from"));
    kept.flatten().chain(more).copied().collect()
}

fn train(dir: &Path, out: &str, more: &[&str]) -> String {
    let arguments = arguments(&[&["--out", out], more].concat());
    succeed(&moe_train(dir, &arguments).output().unwrap())
}

/// The values of a tag in the metrics of a run, by steps.
fn metric(run: &Path, tag: &str) -> Vec<f64> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let records = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    records.filter_map(|record| record[tag].as_f64()).collect()
}

fn tensors(folder: &Path) -> HashMap<String, Tensor> {
    let files = std::fs::read_dir(folder).unwrap().map(|f| f.unwrap().path());
    let weights = files.filter(|f| f.file_name().unwrap().to_string_lossy().starts_with("model"));
    weights
        .filter(|f| f.extension().is_some_and(|e| e == "safetensors"))
        .flat_map(|file| candle_core::safetensors::load(file, &Device::Cpu).unwrap())
        .collect()
}

/// The run of [`SMALL`] through the library: its losses and how its weights end.
fn through_the_library(dir: &Path, drops: DropoutConfig) -> (Vec<f64>, Any) {
    let config = TrainConfig {
        seq_length: Some(16),
        micro_batch_size: 2,
        global_batch_size: 4,
        train_tokens: 384,
        log_interval: 1,
        valid_fraction: 0.1,
        lr: 0.002,
        lr_warmup_tokens: Some(0),
        attention_dropout: Some(drops.attention),
        ..TrainConfig::default()
    };
    let model = Any::load(&dir.join("model"), &Device::Cpu).unwrap().with_precision(config.precision).unwrap();
    assert_eq!(model.dropout(), drops);
    let config = config.resolved(model.decoder_config().max_seq_len).unwrap();
    let text = RunText::read(&[dir.join("text.txt").display().to_string()], &[], &mut Silent).unwrap();
    let words = tokenizer::load(&dir.join("model/tokenizer.json")).unwrap();
    let (text, _) = text.pack(&words, model.decoder_config(), &DataCache::Memory, &mut Silent).unwrap();
    let corpus = Corpus::new(text, Vec::new(), &config).unwrap();
    let out = dir.join("library");
    let mut trainer = Trainer::new(model, config, corpus, words_again(&words), &out).unwrap();
    trainer.run(&AtomicBool::new(false), &mut Silent).unwrap();
    (metric(&out, "train/loss"), trainer.into_model())
}

fn words_again(words: &tokenizers::Tokenizer) -> String {
    tokenizer::to_json(words).unwrap()
}

/// Stopped in the middle, resumed and exported by the program: the bits of the whole run through the library, in a folder that has
/// all that it came with.
fn check(family: &str) {
    let dir = folder(family);
    let (losses, model) = through_the_library(dir.path(), DropoutConfig::default());
    assert!(losses.len() == 6 && losses[5] < losses[0], "{losses:?}");
    let stopped = train(dir.path(), "run", &["--exit-interval", "3"]);
    assert!(stopped.contains("stopped after step 3"), "{stopped}");
    let more = ["--resume", "--export", "trained", "--export-dtype", "f32"];
    assert!(train(dir.path(), "run", &more).contains("resuming from run/step-00000003"));
    assert_eq!(metric(&dir.path().join("run"), "train/loss"), losses);
    let trained = dir.path().join("trained");
    let again = Any::load(&trained, &Device::Cpu).unwrap();
    for ((name, want), (_, got)) in model.params().iter().zip(again.params()) {
        assert_eq!(values(got), values(want), "{name}");
    }
    // Published names, and every file as it came.
    let (before, after) = (tensors(&dir.path().join("model")), tensors(&trained));
    assert!(before.len() == after.len() && before.keys().all(|name| after.contains_key(name)));
    let json = |folder: &str| -> Value {
        serde_json::from_slice(&std::fs::read(dir.path().join(folder).join("config.json")).unwrap()).unwrap()
    };
    assert_eq!(json("trained"), json("model"));
    for (name, text) in BESIDE {
        assert_eq!(std::fs::read_to_string(trained.join(name)).unwrap(), text, "{name}");
    }
    Decoder::load(&trained, Precision::F32).unwrap();
}

macro_rules! families {
    ($($family:ident),* $(,)?) => {
        $(#[test]
        fn $family() {
            check(stringify!($family));
        })*
    };
}

mod trains_as_through_the_library {
    use super::check;

    families!(
        deepseek_v2,
        deepseek_v3,
        glm4_moe,
        gpt_oss,
        granitemoe,
        granitemoeshared,
        llama,
        llama4_text,
        mixtral,
        olmoe,
        phimoe,
        qwen2_moe,
        qwen3_moe,
    );
}

/// A text that is one global batch, so that every step sees all of it: five steps as torch.optim.AdamW does them.
fn equals_pytorch(family: &str, more: &[&str]) -> tempfile::TempDir {
    let (dir, expected) = (folder(family), read(&format!("training/{family}.safetensors")));
    let ids: Vec<u32> = expected["text"].to_vec1().unwrap();
    // The end is the program's to add.
    std::fs::write(dir.path().join("text.txt"), text_of(ids[..ids.len() - 1].iter().copied())).unwrap();
    let own = ["--seq-length", "20", "--train-tokens", "400", "--min-lr", "0.002", "--weight-decay", "0.1"];
    let rest = ["--valid-fraction", "0", "--precision", "f32", "--moe-loss-coeff", "0"];
    train(dir.path(), "run", &[&own[..], &rest, more].concat());
    for (tag, name, tolerance) in [("train/loss", "losses", 1e-5), ("train/grad_norm", "norms", 1e-4)] {
        let (got, want) = (metric(&dir.path().join("run"), tag), values(&expected[name]));
        assert_eq!((got.len(), want.len()), (5, 5));
        let off: Vec<f64> = got.iter().zip(&want).map(|(got, want)| ((got - want) / want).abs()).collect();
        println!("{family} {tag}: off by {off:?}");
        assert!(off.iter().all(|off| *off <= tolerance), "{tag}: {got:?}, want {want:?}");
    }
    dir
}

#[test]
fn qwen3_moe_trains_as_in_pytorch() {
    equals_pytorch("qwen3_moe", &[]);
}

/// With biases that move by the loads that transformers' routers have seen.
#[test]
fn deepseek_v3_trains_and_balances_as_in_pytorch() {
    let dir = equals_pytorch("deepseek_v3", &["--bias-update-speed", "0.01"]);
    let (before, after) = (tensors(&dir.path().join("model")), tensors(&dir.path().join("run/step-00000005")));
    let expected = read("training/deepseek_v3.safetensors");
    let biases: Vec<_> = expected.iter().filter(|(name, _)| name.ends_with("e_score_correction_bias")).collect();
    assert_eq!(biases.len(), 2);
    for (name, want) in biases {
        let (got, want) = (values(&after[name]), values(want));
        assert!(got.iter().zip(&want).all(|(got, want)| (got - want).abs() < 1e-7), "{name}: {got:?}, want {want:?}");
        assert_ne!(got, values(&before[name]), "{name} has moved");
    }
}

/// The biases are state: stopped and resumed, they end with the same bits; without the option they stay.
#[test]
fn moved_biases_survive_a_resume() {
    let dir = folder("glm4_moe");
    let biases = |folder: &str| {
        let tensors = tensors(&dir.path().join(folder));
        let mut biases: Vec<_> = tensors.into_iter().filter(|(name, _)| name.ends_with("correction_bias")).collect();
        biases.sort_by(|a, b| a.0.cmp(&b.0));
        biases.into_iter().map(|(_, bias)| values(&bias)).collect::<Vec<_>>()
    };
    let speed = ["--bias-update-speed", "0.01"];
    train(dir.path(), "still", &[]);
    assert_eq!(biases("still/step-00000006"), biases("model"));
    train(dir.path(), "whole", &speed);
    train(dir.path(), "cut", &[&speed[..], &["--exit-interval", "4"]].concat());
    // The saved settings hold.
    succeed(&moe_train(dir.path(), &["--out", "cut", "--resume"]).output().unwrap());
    let moved = biases("whole/step-00000006");
    assert_eq!((moved.len(), &moved), (2, &biases("cut/step-00000006")));
    assert_ne!(moved, biases("model"));
    assert_eq!(metric(&dir.path().join("whole"), "train/loss"), metric(&dir.path().join("cut"), "train/loss"));
    let other = ["--out", "cut", "--resume", "--train-tokens", "512", "--bias-update-speed", "0.02"];
    refused(dir.path(), &other, &["bias_update_speed is 0.02", "0.01"]);
}

/// Two and four ranks make the run that one makes, in any layout that the family has, and the folder that it makes.
fn equal_over_ranks(family: &str, more: &[&str], layouts: &[&[&str]]) {
    let dir = folder(family);
    let own = ["--precision", "f32", "--global-batch-size", "8", "--train-tokens", "768", "--export-dtype", "f32"];
    let run = |out: &str, layout: &[&str]| {
        let exported = format!("{out}-model");
        train(dir.path(), out, &[&own[..], more, layout, &["--export", &exported]].concat());
        (metric(&dir.path().join(out), "train/loss"), tensors(&dir.path().join(exported)))
    };
    let (losses, weights) = run("one", &[]);
    assert_eq!(losses.len(), 6);
    for layout in layouts {
        let (got, trained) = run(&format!("over{}", layout.join("")), layout);
        assert_eq!(got.len(), 6, "{layout:?}");
        assert!(got.iter().zip(&losses).all(|(a, b)| (a - b).abs() < 1e-5 * b), "{layout:?}: {got:?}, want {losses:?}");
        assert_eq!(trained.len(), weights.len());
        for (name, want) in &weights {
            let (got, want) = (values(&trained[name]), values(want));
            // Whole multiples of the speed, whatever the order of sums.
            if name.ends_with("correction_bias") {
                assert_eq!(got, want, "{layout:?}: {name}");
            }
            let largest = want.iter().fold(0f64, |a, b| a.max(b.abs()));
            let off = got.iter().zip(&want).fold(0f64, |a, (x, y)| a.max((x - y).abs()));
            // A rank for each micro-batch adds up in the order of one.
            let most = if layout.contains(&"4") && !layout.contains(&"--tp") { 0.0 } else { 1e-4 };
            assert!(off <= most * largest, "{layout:?}: {name} is off by {off:e} of {largest:e}");
        }
    }
}

#[test]
fn qwen3_moe_over_ranks_is_the_run_of_one() {
    let layouts: [&[&str]; 3] = [
        &["--ranks", "2", "--ep", "2", "--zero", "1"],
        &["--ranks", "4", "--tp", "2", "--ep", "2"],
        &["--ranks", "4", "--zero", "2"],
    ];
    equal_over_ranks("qwen3_moe", &[], &layouts);
}

#[test]
fn deepseek_v3_over_ranks_is_the_run_of_one_and_balances_alike() {
    let layouts: [&[&str]; 2] = [&["--ranks", "2", "--ep", "2"], &["--ranks", "4", "--ep", "4", "--zero", "2"]];
    equal_over_ranks("deepseek_v3", &["--bias-update-speed", "0.01"], &layouts);
}

/// Where no matrix can be split, the layout that is chosen splits none.
#[test]
fn layouts_are_chosen_for_what_a_family_can() {
    equal_over_ranks("phimoe", &[], &[&["--ranks", "2"]]);
    equal_over_ranks("olmoe", &[], &[&["--ranks", "4"]]);
}

/// Experts that are published as one tensor lie in parts until they are exported.
#[test]
fn gpt_oss_over_ranks_is_the_run_of_one() {
    equal_over_ranks("gpt_oss", &[], &[&["--ranks", "2", "--ep", "2"], &["--ranks", "4", "--tp", "2", "--ep", "4"]]);
}

/// Started on four ranks, resumed on two, ended by one, from checkpoints in parts.
#[test]
fn a_run_of_a_family_changes_its_layout() {
    for (family, layout, more) in [
        ("gpt_oss", ["--tp", "2", "--ep", "4"], &[][..]),
        ("deepseek_v3", ["--zero", "1", "--ep", "4"], &["--bias-update-speed", "0.01"][..]),
    ] {
        let dir = folder(family);
        let own = ["--precision", "f32", "--global-batch-size", "8", "--train-tokens", "768"];
        train(dir.path(), "one", &[&own[..], more].concat());
        let stations = [
            [&["--ranks", "4", "--exit-interval", "2"], &layout[..]].concat(),
            vec!["--ranks", "2", "--ep", "2", "--exit-interval", "4"],
            vec![],
        ];
        for (station, step) in stations.iter().zip([2, 4, 6]) {
            let said = train(dir.path(), "many", &[&own[..], more, &["--resume"], station].concat());
            assert!(said.contains(&format!("after step {step}")), "{family}: {said}");
        }
        let losses = |run: &str| metric(&dir.path().join(run), "train/loss");
        let (got, want) = (losses("many"), losses("one"));
        assert_eq!((got.len(), want.len()), (6, 6));
        assert!(got.iter().zip(&want).all(|(a, b)| (a - b).abs() < 1e-5 * b), "{family}: {got:?}, want {want:?}");
    }
}

/// Matrices of 4 bits in blocks are read as floats, and are floats from then on.
#[test]
fn gpt_oss_trains_from_mxfp4() {
    let dir = folder("gpt_oss/mxfp4");
    train(dir.path(), "run", &["--export", "trained"]);
    let json = std::fs::read_to_string(dir.path().join("trained/config.json")).unwrap();
    assert!(!json.contains("quantization_config"), "{json}");
    let losses = metric(&dir.path().join("run"), "train/loss");
    assert!(losses[5] < losses[0], "{losses:?}");
    Any::load(&dir.path().join("trained"), &Device::Cpu).unwrap();
}

/// Of a `config.json` alone: the weights that the library draws, with the end of text of the run's tokenizer.
#[test]
fn a_configuration_alone_starts_with_fresh_weights() {
    let dir = folder("olmoe");
    let config = std::fs::read_to_string(dir.path().join("model/config.json")).unwrap();
    let config = config.replacen("\"vocab_size\": 97", "\"vocab_size\": 300", 1);
    std::fs::write(dir.path().join("large.json"), config).unwrap();
    let more = ["--model-config", "large.json", "--vocab-size", "270", "--seed", "9", "--lr", "1e-30"];
    train(dir.path(), "run", &more);
    let saved = Any::load(&dir.path().join("run/step-00000006"), &Device::Cpu).unwrap();
    let text = std::fs::read_to_string(dir.path().join("large.json")).unwrap();
    let family = <Box<dyn Family> as moe_models::ReadFamily>::read(text.as_bytes(), Path::new("large.json")).unwrap();
    let drawn = Any::new(family, 9, &Device::Cpu).unwrap();
    for ((name, want), (_, got)) in drawn.params().iter().zip(saved.params()) {
        assert_eq!(values(got), values(want), "{name}");
    }
    assert_eq!(saved.decoder_config().eos_token_id, Some(0), "the end of text of the tokenizer");
    let end: Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("run/step-00000006/generation_config.json")).unwrap())
            .unwrap();
    assert_eq!(end["eos_token_id"], 0);
    train(dir.path(), "words", &["--model-config", "model/config.json", "--tokenizer", "model/tokenizer.json"]);
    let saved = Any::load(&dir.path().join("words/step-00000006"), &Device::Cpu).unwrap();
    assert_eq!(saved.decoder_config().eos_token_id, Some(2), "what the configuration says, as no word has that name");
}

/// A folder is evaluated to what its run has measured, and a run that starts from it measures the same before its first step.
#[test]
fn evaluation_knows_every_family() {
    let dir = folder("mixtral");
    std::fs::write(dir.path().join("valid.txt"), text_of((0..200).map(|i| 3 + i * 7 % 89))).unwrap();
    let more = ["--valid", "valid.txt", "--precision", "f32", "--export", "trained", "--export-dtype", "f32"];
    train(dir.path(), "run", &more);
    let measured = *metric(&dir.path().join("run"), "valid/loss").last().unwrap();
    let arguments = [
        "--evaluate",
        "trained",
        "--valid",
        "valid.txt",
        "--precision",
        "f32",
        "--seq-length",
        "16",
        "--micro-batch-size",
        "2",
    ];
    let output = moe_train(dir.path(), &arguments).output().unwrap();
    succeed(&output);
    let table = String::from_utf8(output.stdout).unwrap();
    let row = table.lines().find(|line| line.starts_with("all")).unwrap();
    assert_eq!(row.split_whitespace().nth(2).unwrap(), format!("{measured:.4}"), "{table}");
}

/// Flags change what has no weights, under the names that the family has for it, and the run keeps it.
#[test]
fn routing_and_losses_of_a_folder_may_be_changed() {
    let saved = |dir: &Path| -> Value {
        serde_json::from_slice(&std::fs::read(dir.join("run/step-00000006/config.json")).unwrap()).unwrap()
    };
    for (family, top_k, coef) in [("qwen3_moe", 2, "router_aux_loss_coef"), ("deepseek_v2", 3, "aux_loss_alpha")] {
        let dir = folder(family);
        let changed = ["--topk", "1", "--moe-loss-coeff", "0.25"];
        train(dir.path(), "run", &changed);
        let json = saved(dir.path());
        assert_eq!((&json["num_experts_per_tok"], &json[coef]), (&json!(1), &json!(0.25)));
        assert!(metric(&dir.path().join("run"), "train/load_balance_loss").iter().all(|loss| *loss > 0.0));
        let longer = ["--out", "run", "--train-tokens", "448", "--resume"];
        succeed(&moe_train(dir.path(), &arguments(&[&longer[..], &changed].concat())).output().unwrap());
        // The folder's own values are others.
        let differs = format!("num_experts_per_tok: asked {top_k}, saved 1");
        refused(dir.path(), &arguments(&longer), &[&differs, coef]);
    }
}

/// Published files of gpt-oss say it twice.
#[test]
fn experts_of_a_token_are_changed_under_both_names() {
    let dir = folder("gpt_oss");
    let path = dir.path().join("model/config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["experts_per_token"] = config["num_experts_per_tok"].clone();
    std::fs::write(&path, config.to_string()).unwrap();
    train(dir.path(), "run", &["--topk", "1"]);
    let saved = std::fs::read(dir.path().join("run/step-00000006/config.json")).unwrap();
    let saved: Value = serde_json::from_slice(&saved).unwrap();
    assert_eq!((&saved["num_experts_per_tok"], &saved["experts_per_token"]), (&json!(1), &json!(1)));
}

/// What a configuration says of dropout is what is dropped, unless a flag says otherwise.
#[test]
fn granitemoe_drops_what_its_files_say() {
    let dir = folder("granitemoe");
    let path = dir.path().join("model/config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, config.replacen("\"attention_dropout\": 0.0", "\"attention_dropout\": 0.125", 1)).unwrap();
    let (losses, _) = through_the_library(dir.path(), DropoutConfig { attention: 0.125, hidden: 0.0 });
    train(dir.path(), "run", &[]);
    assert_eq!(metric(&dir.path().join("run"), "train/loss"), losses);
    train(dir.path(), "none", &["--attention-dropout", "0"]);
    assert_ne!(metric(&dir.path().join("none"), "train/loss"), losses);
}

#[track_caller]
fn refused(dir: &Path, arguments: &[&str], words: &[&str]) {
    let output = moe_train(dir, arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && !text.contains("panicked"), "{arguments:?}: {text}");
    words.iter().for_each(|word| assert!(text.contains(word), "{arguments:?} should mention {word:?}: {text}"));
}

#[test]
fn what_a_family_cannot_do_is_refused_by_name() {
    let check = |family: &str, more: &[&str], words: &[&str]| {
        let dir = folder(family);
        refused(dir.path(), &arguments(&[&["--out", "run"], more].concat()), words);
        // Layouts are chosen for a vocabulary, which a text may be needed for.
        let late = more.contains(&"--ranks");
        assert!(late || !dir.path().join("run/data-cache").exists(), "{more:?}: told before text is read");
    };
    check("qwen3_moe", &["--hidden-size", "8"], &["--hidden-size is for models of this project's own", "qwen3_moe"]);
    check("qwen3_moe", &["--moe-train-capacity-factor", "1"], &["--moe-train-capacity-factor", "qwen3_moe"]);
    check("qwen3_moe", &["--topk", "7"], &["between 1 and the 6 experts"]);
    check("qwen3_moe", &["--moe-loss-coeff", "nan"], &["--moe-loss-coeff"]);
    check("qwen3_moe", &["--moe-loss-coeff=-1"], &["router_aux_loss_coef must be 0 or more"]);
    check("qwen3_moe", &["--bias-update-speed", "0.001"], &["bias_update_speed 0.001 has no effect", "drop it"]);
    check("deepseek_v3", &["--bias-update-speed=-0.001"], &["bias_update_speed must be 0 or more"]);
    check("phimoe", &["--topk", "3"], &["num_experts_per_tok must be 2"]);
    check("llama", &["--topk", "1"], &["the model is dense", "--topk"]);
    check("llama", &["--moe-loss-coeff", "0.1"], &["the model is dense", "--moe-loss-coeff"]);
    check("olmoe", &["--ranks", "2", "--tp", "2"], &["tp 2 is not possible for this model", "nearest are"]);
    check("phimoe", &["--ranks", "2", "--tp", "2"], &["lm_head_bias", "dp 2 x tp 1"]);
    check("quantized/int8", &[], &["weights are quantized", "int8"]);
    check("qwen3_moe", &["--seq-length", "129"], &["seq_length must lie in 1..=128"]);
}

#[test]
fn what_is_no_folder_of_floats_is_refused_by_name() {
    let dir = folder("qwen3_moe");
    let gguf = fixtures().join("gguf/qwen3moe.gguf").display().to_string();
    let check = |path: &str, words: &[&str]| refused(dir.path(), &arguments(&["--out", "run", "--model", path]), words);
    check(&gguf, &["qwen3moe.gguf is a file", "GGUF", "config.json"]);
    check("absent", &["absent/config.json"]);
    std::fs::remove_file(dir.path().join("model/tokenizer.json")).unwrap();
    check("model", &["model/tokenizer.json"]);
    std::fs::write(dir.path().join("model/tokenizer.json"), words().replace("\"w96\":96", "\"w96\":97")).unwrap();
    check("model", &["needs a vocabulary of 98", "97"]);
    let config = std::fs::read_to_string(dir.path().join("model/config.json")).unwrap();
    std::fs::write(dir.path().join("model/config.json"), config.replacen("qwen3_moe", "qwen9", 1)).unwrap();
    check("model", &["qwen9", "mixtral"]);
}

/// bf16 weights become f32 where they are trained, and bf16 where they are exported so.
#[test]
fn weights_in_bf16_are_a_start_too() {
    let dir = folder("mixtral");
    let model = Any::load(&dir.path().join("model"), &Device::Cpu).unwrap();
    let rounded = dir.path().join("rounded");
    std::fs::create_dir(&rounded).unwrap();
    model.save(&rounded, DType::BF16).unwrap();
    std::fs::copy(dir.path().join("model/tokenizer.json"), rounded.join("tokenizer.json")).unwrap();
    train(dir.path(), "run", &["--model", "rounded", "--lr", "1e-30", "--export", "exported"]);
    let (before, after) = (tensors(&rounded), tensors(&dir.path().join("exported")));
    for (name, want) in &before {
        assert_eq!((after[name].dtype(), values(&after[name])), (DType::BF16, values(want)), "{name}");
    }
}
