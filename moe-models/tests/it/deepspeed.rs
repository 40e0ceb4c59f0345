//! Checkpoints that DeepSpeed wrote, imported by the `moe-import` program: the logits that PyTorch computed with its MoE layers, and
//! what is refused. `fixtures/deepspeed/make.py` made the files.

use crate::golden::{fixtures, logits, read};
use candle_core::{Device, Tensor};
use moe_core::testing::values;
use moe_models::gpt::{Gpt, GptConfig};
use moe_models::train::tokenizer;
use moe_models::{CausalLm, Decoder, Family, LogitsOf, Model, PoolConfig, Precision, ReadFamily, SequenceStep};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn checkpoint(case: &str) -> PathBuf {
    fixtures().join("deepspeed").join(case)
}

/// With the tokenizer of the fixtures; `arguments` may give another.
fn moe_import(from: &Path, out: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe-import"));
    command.arg("--from").arg(from).arg("--out").arg(out).args(arguments);
    if !arguments.contains(&"--tokenizer") {
        let folder = checkpoint("tokenizer");
        command.arg("--vocab-file").arg(folder.join("vocab.json")).arg("--merge-file").arg(folder.join("merges.txt"));
    }
    command.output().unwrap()
}

/// A folder that a checkpoint was imported to.
struct Imported {
    _dir: tempfile::TempDir,
    folder: PathBuf,
}

impl Imported {
    fn new(case: &str, arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("model");
        let output = moe_import(&checkpoint(case), &folder, arguments);
        assert!(output.status.success(), "{case}: {}", String::from_utf8_lossy(&output.stderr));
        Self { _dir: dir, folder }
    }

    fn config(&self) -> GptConfig {
        GptConfig::read_file(&self.folder.join("config.json")).unwrap()
    }

    fn experts(&self) -> Vec<usize> {
        self.config().moe.map(|moe| moe.num_experts).unwrap_or_default()
    }
}

/// The largest difference from the logits of a case, over their largest magnitude.
fn difference(decoder: &Decoder, case: &str) -> f64 {
    let expected = read(&format!("deepspeed/{case}/expected.safetensors"));
    let (mut apart, mut largest) = (0f64, 0f64);
    for sequence in 0..2 {
        let ids: Vec<u32> = expected["input_ids"].get(sequence).unwrap().to_vec1().unwrap();
        let (got, want) = (values(&logits(decoder, &ids)), values(&expected["logits"].get(sequence).unwrap()));
        assert_eq!(got.len(), want.len(), "{case}");
        for (got, want) in got.iter().zip(&want) {
            assert!(got.is_finite(), "{case}");
            (apart, largest) = (apart.max((got - want).abs()), largest.max(want.abs()));
        }
    }
    assert!(largest > 0.5, "{case}: nothing to compare");
    apart / largest
}

/// Largest difference of logits, of their largest magnitude.
const TOLERANCE: f64 = 1e-5;

/// Served and trained, the model has the logits that DeepSpeed's layers gave.
fn check(case: &str, arguments: &[&str]) -> Imported {
    let imported = Imported::new(case, arguments);
    let packed = Decoder::load(&imported.folder, Precision::F32).unwrap();
    let model = Gpt::load(&imported.folder, &Device::Cpu).unwrap();
    for decoder in [&packed, model.decoder()] {
        let off = difference(decoder, case);
        println!("{case}: logits off by {off:e}");
        assert!(off <= TOLERANCE, "{case}: logits are off by {off:e}");
    }
    imported
}

#[test]
fn experts_in_every_second_layer() {
    let imported = check("moe", &[]);
    assert_eq!(imported.experts(), [3, 3]);
    let config = imported.config();
    let moe = config.moe.unwrap();
    assert_eq!((moe.expert_interval, moe.residual, moe.top_k, moe.capacity.eval_factor), (2, false, 1, Some(4.0)));
    assert_eq!((config.num_heads, config.d_ff, config.vocab_size, config.init_std), (2, 24, 64, 0.014));
}

/// A pyramid with residual branches, whose experts were spread over two ranks, in bf16, which is kept.
#[test]
fn pyramid_residual_experts_of_two_ranks() {
    let imported = check("pr_moe", &[]);
    assert_eq!(imported.experts(), [2, 4]);
    assert!(imported.config().moe.unwrap().residual);
    let weights = candle_core::safetensors::load(imported.folder.join("model.safetensors"), &Device::Cpu).unwrap();
    assert!(weights.values().all(|tensor| tensor.dtype() == candle_core::DType::BF16));
    // The layers of experts are their own, not copies of those of the first rank.
    let expert = |index: usize| values(&weights[&format!("model.layers.3.mlp.experts.{index}.fc_in.weight")]);
    assert!((1..4).all(|index| expert(index) != expert(0)));
    check("pr_moe", &["--dtype", "f32"]);
}

/// Everything in two slices, experts and residual branches too.
#[test]
fn tensor_slices() {
    assert_eq!(check("sliced", &[]).experts(), [4]);
}

/// The rest in two slices, and each expert whole, in the file of the one rank that held it. Top-2.
#[test]
fn tensor_slices_with_whole_experts() {
    let imported = check("sliced_whole_experts", &[]);
    assert_eq!((imported.experts(), imported.config().moe.unwrap().top_k), (vec![4], 2));
}

/// No experts, and queries, keys and values in the orders of versions 0 and 1; a file with the optimizer's and the random generators' states.
#[test]
fn dense_in_the_first_orders_of_heads() {
    assert_eq!(check("dense", &[]).config().moe, None);
    check("dense_1", &[]);
}

/// The residual layer that Megatron-DeepSpeed had of its own, DeepSpeed's first files, and no arguments in them.
#[test]
fn the_first_format_and_no_arguments() {
    let flags = ["--num-attention-heads", "2", "--checkpoint-version", "3", "--topk", "1"];
    let imported = check("early", &flags);
    assert_eq!(imported.experts(), [3, 3]);
    assert!(imported.config().moe.unwrap().residual);
    let dir = tempfile::tempdir().unwrap();
    for missing in [0, 2, 4] {
        let left = [&flags[..missing], &flags[missing + 2..]].concat();
        refused(&checkpoint("early"), dir.path(), &left, &["mp_rank_00_model_states.pt", flags[missing]]);
    }
    // In another order of rows the logits are others.
    let other = Imported::new("early", &["--num-attention-heads", "2", "--checkpoint-version", "1", "--topk", "1"]);
    assert!(difference(&Decoder::load(&other.folder, Precision::F32).unwrap(), "early") > 0.01);
}

/// The folder is as any other: it names its family, has the tokenizer, and goes on with a text token by token.
#[test]
fn an_imported_folder_generates() {
    let imported = Imported::new("moe", &[]);
    let tokenizer = tokenizer::load(&imported.folder.join("tokenizer.json")).unwrap();
    let json = std::fs::read(checkpoint("tokenizer").join("expected.json")).unwrap();
    let expected: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let text = expected["text"].as_str().unwrap();
    let want: Vec<u32> = serde_json::from_value(expected["ids"].clone()).unwrap();
    let ids = tokenizer.encode(format!("{text}<|endoftext|>"), true).unwrap().get_ids().to_vec();
    assert_eq!(ids, want, "as transformers reads GPT-2's files");
    assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    assert_eq!(imported.config().eos_token_id, Some(0));

    let family = <Box<dyn Family>>::read_file(&imported.folder.join("config.json")).unwrap();
    assert_eq!(family.decoder().unwrap().max_seq_len, 24);
    Model::<Box<dyn Family>>::load(&imported.folder, &Device::Cpu).unwrap();
    let decoder = Decoder::load(&imported.folder, Precision::F32).unwrap();
    let pool = decoder.new_pool(PoolConfig::for_tokens(1, 24)).unwrap();
    let mut sequence = pool.sequence();
    let (mut all, mut next) = (ids[..7].to_vec(), ids[..7].to_vec());
    let best = |row: &Tensor| row.argmax(0).unwrap().to_scalar::<u32>().unwrap();
    while all.len() < 24 {
        let step = SequenceStep { sequence: &mut sequence, token_ids: &next, logits: LogitsOf::Last };
        next = vec![best(&decoder.forward(&mut [step], &pool).unwrap().logits.get(0).unwrap())];
        assert_eq!(next[0], best(&logits(&decoder, &all).get(all.len() - 1).unwrap()));
        all.extend(&next);
    }
}

/// Refused with these words in the message, and nothing is left of the new folder.
#[track_caller]
fn refused(from: &Path, dir: &Path, arguments: &[&str], words: &[&str]) {
    let out = dir.join("out");
    let output = moe_import(from, &out, arguments);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code().is_some_and(|code| code == 1 || code == 2), "{text}");
    words.iter().for_each(|word| assert!(text.contains(word), "{word} is not in: {text}"));
    assert!(!out.exists() && !dir.join(".tmp-out").exists(), "{text}");
}

/// A copy of a checkpoint that may be damaged, and its folder of files.
fn copy(case: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let step = dir.path().join("from/global_step3");
    std::fs::create_dir_all(&step).unwrap();
    std::fs::copy(checkpoint(case).join("latest"), dir.path().join("from/latest")).unwrap();
    for file in std::fs::read_dir(checkpoint(case).join("global_step3")).unwrap().map(|f| f.unwrap().path()) {
        std::fs::copy(&file, step.join(file.file_name().unwrap())).unwrap();
    }
    (dir, step)
}

const FIRST: &str = "mp_rank_00_model_states.pt";

#[test]
fn files_that_are_missing_are_named() {
    let expert = "layer_1_expert_2_mp_rank_00_model_states.pt";
    for (case, file) in [
        ("moe", expert),
        ("moe", FIRST),
        ("sliced", "mp_rank_01_model_states.pt"),
        ("sliced_whole_experts", "layer_0_expert_2_mp_rank_01_model_states.pt"),
    ] {
        let (dir, step) = copy(case);
        std::fs::remove_file(step.join(file)).unwrap();
        // Of an expert nothing tells which rank held it.
        let named = file.replace("expert_2_mp_rank_01", "expert_2_mp_rank_00");
        refused(&dir.path().join("from"), dir.path(), &[], &[&named, "is missing"]);
    }
    // One slice of an expert, of two.
    let (dir, step) = copy("sliced");
    let slice = "layer_0_expert_3_mp_rank_00_model_states.pt";
    std::fs::remove_file(step.join(slice)).unwrap();
    let other = slice.replace("rank_00", "rank_01");
    refused(&dir.path().join("from"), dir.path(), &[], &[&other, "dense_h_to_4h.weight", "[24, 16]", "[12, 16]"]);
    // Nothing at all.
    let empty = tempfile::tempdir().unwrap();
    refused(empty.path(), empty.path(), &[], &[FIRST, "latest"]);
    refused(&empty.path().join("none"), empty.path(), &[], &["none"]);
}

#[test]
fn files_that_are_damaged_are_named() {
    let expert = "layer_0_expert_1_mp_rank_00_model_states.pt";
    for file in [FIRST, expert] {
        let (dir, step) = copy("moe");
        let from = dir.path().join("from");
        let whole = std::fs::read(step.join(file)).unwrap();
        for len in [0, 1, 100, whole.len() / 2, whole.len() - 1] {
            std::fs::write(step.join(file), &whole[..len]).unwrap();
            refused(&from, dir.path(), &[], &[file, "copy it again"]);
        }
        std::fs::write(step.join(file), b"\x80\x02}q\x00.").unwrap();
        refused(&from, dir.path(), &[], &[file, "bare pickle", "save it again"]);
    }
    // Another expert's file, and one of another layer.
    for other in ["layer_0_expert_2_mp_rank_00_model_states.pt", "layer_1_expert_1_mp_rank_00_model_states.pt"] {
        let (dir, step) = copy("moe");
        std::fs::copy(step.join(other), step.join(expert)).unwrap();
        refused(
            &dir.path().join("from"),
            dir.path(),
            &[],
            &[expert, "deepspeed_experts.1.dense_h_to_4h", "another expert"],
        );
    }
    // Of another model: slices where whole ones were.
    let (dir, step) = copy("sliced");
    std::fs::copy(checkpoint("moe").join("global_step3").join(FIRST), step.join("mp_rank_01_model_states.pt")).unwrap();
    refused(&dir.path().join("from"), dir.path(), &[], &["padded_vocab_size is 64", "96"]);
    // Left of another run.
    let (dir, step) = copy("moe");
    std::fs::copy(step.join(FIRST), step.join("mp_rank_01_model_states.pt")).unwrap();
    refused(&dir.path().join("from"), dir.path(), &[], &["mp_rank_01", "mp_world_size", "remove"]);
    let (dir, step) = copy("moe");
    std::fs::copy(step.join(expert), step.join("layer_0_expert_3_mp_rank_00_model_states.pt")).unwrap();
    refused(&dir.path().join("from"), dir.path(), &[], &["layer_0_expert_3", "[3, 3]", "remove it"]);
}

#[test]
fn names_that_are_paths_are_refused() {
    let (dir, step) = copy("moe");
    let from = dir.path().join("from");
    for name in ["../from/global_step3", "/etc", "global_step3/", "", "..", "."] {
        std::fs::write(from.join("latest"), name).unwrap();
        refused(&from, dir.path(), &[], &["latest", "the name of a folder"]);
        refused(&from, dir.path(), &["--tag", name], &["--tag", "the name of a folder"]);
    }
    std::fs::write(from.join("latest"), b"\xff\xfe").unwrap();
    refused(&from, dir.path(), &[], &["latest", "the name of a folder"]);
    std::fs::write(from.join("latest"), "global_step9").unwrap();
    refused(&from, dir.path(), &[], &["global_step9", "give another --tag"]);
    // The tag, or its folder, without `latest`.
    for (from, arguments) in [(from.as_path(), &["--tag", "global_step3"][..]), (&step, &[])] {
        let out = dir.path().join("tagged");
        let output = moe_import(from, &out, arguments);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        std::fs::remove_dir_all(out).unwrap();
    }
}

#[test]
fn other_formats_and_options_are_refused_by_name() {
    let (dir, step) = copy("moe");
    let from = dir.path().join("from");
    for (arguments, words) in [
        (&["--topk", "2"][..], &["--topk 2", "says 1"][..]),
        (&["--num-attention-heads", "4"], &["--num-attention-heads 4", "says 2"]),
        (&["--layernorm-epsilon", "nan"], &["--layernorm-epsilon", "must be a number"]),
        (&["--tokenizer", "none.json"], &["none.json"]),
        (&["--topk", "1", "--tokenizer"], &["--tokenizer"]),
        (&["--tag", "global_step4"], &["global_step4"]),
        (&["--dtype", "f64"], &["f64", "bf16"]),
    ] {
        refused(&from, dir.path(), arguments, words);
    }
    let (dense, _) = copy("dense");
    for arguments in [["--topk", "1"], ["--moe-min-capacity", "4"]] {
        refused(&dense.path().join("from"), dense.path(), &arguments, &[arguments[0], "is of experts"]);
    }
    // What the checkpoint says too may be given.
    let output = moe_import(&from, &dir.path().join("same"), &["--topk", "1", "--checkpoint-version", "3"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    // A tokenizer of more tokens than the model has.
    let large = dir.path().join("tokenizer.json");
    let text = std::fs::read_to_string(dir.path().join("same/tokenizer.json")).unwrap();
    std::fs::write(&large, text.replacen("\"'\": 1", "\"'\": 64", 1)).unwrap();
    refused(&from, dir.path(), &["--tokenizer", large.to_str().unwrap()], &["65", "64"]);
    // A folder that is not empty.
    let full = dir.path().join("same");
    let output = moe_import(&from, &full, &[]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("not an empty folder"));
    // No tokenizer.
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe-import"));
    let output = command.arg("--from").arg(&from).arg("--out").arg(dir.path().join("out")).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("--vocab-file and --merge-file"));

    std::fs::write(step.join("layer_01-model_00-model_states.pt"), b"").unwrap();
    refused(&from, dir.path(), &[], &["layer_01-model_00", "pipeline", "--no-pipeline-parallel"]);
    std::fs::remove_file(step.join("layer_01-model_00-model_states.pt")).unwrap();
    std::fs::rename(step.join(FIRST), step.join("zero_pp_rank_0_mp_rank_00_model_states.pt")).unwrap();
    refused(&from, dir.path(), &[], &["zero_pp_rank_0", "stage 3"]);
}
