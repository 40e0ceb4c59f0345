//! `moe-compress` from outside.

use crate::teacher::{folder, shape, write_teacher};
use moe_models::ReadFamily;
use moe_models::gpt::GptConfig;
use std::path::Path;
use std::process::{Command, Output};

fn moe_compress(dir: &Path, words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_moe-compress")).current_dir(dir).args(words).output().unwrap()
}

#[track_caller]
fn succeed(output: &Output) -> String {
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{error}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn experts(dir: &Path, model: &str) -> Vec<usize> {
    let config = GptConfig::read_file(&dir.join(model).join("config.json")).unwrap();
    config.moe.map_or_else(Vec::new, |moe| moe.num_experts)
}

const TEACHER: [&str; 4] = ["--model", "teacher", "--data", "text.txt"];

#[test]
fn experts_are_dropped_and_merged() {
    let dir = folder();
    std::fs::write(dir.path().join("teacher/chat_template.jinja"), "{{ messages }}").unwrap();
    let run = |what: &str, out: &str, more: &[&str]| {
        let words = [&[what][..], &TEACHER, &["--out", out, "--calibration-tokens", "512"], more].concat();
        succeed(&moe_compress(dir.path(), &words))
    };
    let said = run("prune", "half", &["--keep", "0.5"]);
    assert!(said.contains("layer 3") && said.matches(" kept").count() == 5, "{said}");
    assert_eq!(experts(dir.path(), "half"), [1, 2, 2]);
    run("prune", "counts", &["--keep-experts", "2,1,3", "--by", "frequency"]);
    assert_eq!(experts(dir.path(), "counts"), [2, 1, 3]);
    run("prune", "all", &["--keep", "0.6", "--across-layers", "--by", "random", "--seed", "3"]);
    assert_eq!(experts(dir.path(), "all").iter().sum::<usize>(), 6);
    let said = run("merge", "merged", &["--keep-experts", "1", "--dtype", "f32"]);
    assert!(said.contains("merged: ") && said.contains("experts 1, 1, 1"), "{said}");
    for file in ["tokenizer.json", "generation_config.json", "model.safetensors", "chat_template.jinja"] {
        assert!(dir.path().join("merged").join(file).exists(), "{file}");
    }
}

#[test]
fn dense_models_become_mixtures() {
    let dir = folder();
    write_teacher(&GptConfig { moe: None, ..shape() }, &dir.path().join("dense"));
    let run = |out: &str, more: &[&str]| {
        succeed(&moe_compress(dir.path(), &[&["upcycle", "--model", "dense", "--out", out][..], more].concat()))
    };
    run("moe", &["--num-experts", "4"]);
    assert_eq!(experts(dir.path(), "moe"), [4, 4, 4]);
    let said = run("fine", &["--num-experts", "8", "--granularity", "2", "--topk", "4"]);
    assert!(said.contains("dense: ") && said.contains("experts 8, 8, 8, 8, 8, 8"), "{said}");
}

/// The files are as small as their integers, and the model says nearly what it said.
#[test]
fn weights_become_integers() {
    let dir = folder();
    let run = |out: &str, more: &[&str]| {
        succeed(&moe_compress(dir.path(), &[&["quantize", "--model", "teacher", "--out", out][..], more].concat()))
    };
    let said = run("eight", &["--format", "int8"]);
    assert!(said.contains("eight: ") && said.contains("int8"), "{said}");
    run("four", &["--format", "int4"]);
    let bytes = |model: &str| dir.path().join(model).join("model.safetensors").metadata().unwrap().len();
    assert!(bytes("four") < bytes("eight") && bytes("eight") < bytes("teacher"));
    let logits = |model: &str| {
        let decoder = moe_models::Decoder::load(&dir.path().join(model), moe_models::Precision::F32).unwrap();
        let (hidden, _) = decoder.hidden(&[5, 80, 131, 7, 9, 200, 33, 1], 8, moe_models::Pass::Eval).unwrap();
        moe_core::testing::values(&decoder.head().logits(&hidden).unwrap())
    };
    let want = logits("teacher");
    let distance = |model: &str| {
        let got = logits(model);
        let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
        norm(&mut got.iter().zip(&want).map(|(a, b)| a - b)) / norm(&mut want.iter().copied())
    };
    let (eight, four) = (distance("eight"), distance("four"));
    assert!(eight > 0.0 && eight < four && eight < 0.2, "{eight} {four}");

    // It is evaluated as it is, in integers.
    let bits = |model: &str| {
        let mut eval = Command::new(env!("CARGO_BIN_EXE_moe-eval"));
        eval.current_dir(dir.path()).args(["--model", model, "--text", "text.txt", "--json", "report.json"]);
        succeed(&eval.output().unwrap());
        let json = std::fs::read(dir.path().join("report.json")).unwrap();
        let report: serde_json::Value = serde_json::from_slice(&json).unwrap();
        report["text"]["sources"][0]["bits_per_byte"].as_f64().unwrap()
    };
    let (whole, eight) = (bits("teacher"), bits("eight"));
    assert!(whole != eight && (whole - eight).abs() < 0.1 * whole, "{whole} {eight}");
}

/// The report says what was calibrated on, and what both models are worth on text that was not.
#[test]
fn integers_are_calibrated_on_a_text() {
    let dir = folder();
    let run = |out: &str, more: &[&str]| {
        let words = [&["quantize", "--model", "teacher", "--out", out, "--format", "int4"][..], more].concat();
        succeed(&moe_compress(dir.path(), &words))
    };
    let bits = |said: &str, model: &str| -> f64 {
        let row = said.lines().rfind(|line| line.starts_with(model)).unwrap_or_else(|| panic!("no {model} in {said}"));
        row.split_whitespace().nth(2).unwrap().parse().unwrap()
    };
    std::fs::create_dir(dir.path().join("texts")).unwrap();
    std::fs::copy(dir.path().join("text.txt"), dir.path().join("texts/long.txt")).unwrap();
    std::fs::write(dir.path().join("texts/short.txt"), "1 and 2, 3 and 4").unwrap();
    let said = run("calibrated", &["--calibrate", "--data", "texts", "--calibration-tokens", "2048"]);
    assert!(said.contains("calibrated on 2048 tokens; 0.") && said.contains(" of 10 experts got fewer"), "{said}");
    let (before, after) = (bits(&said, "teacher"), bits(&said, "calibrated"));
    assert!(before != after && (before - after).abs() < 0.2 * before, "{said}");
    // The same text by its name, for either kind; what is held out of it alone is another text.
    let measure = ["--text", "text.txt", "--max-tokens", "1024"];
    let said = run("again", &[&["--calibrate", "--calibration-tokens", "2048"][..], &measure].concat());
    assert!(said.contains("at most 1024 tokens") && bits(&said, "teacher") != before, "{said}");
    let plain = run("plain", &measure);
    assert_eq!(bits(&plain, "teacher"), bits(&said, "teacher"));
    assert!(!plain.contains("calibrated") && bits(&plain, "plain") != bits(&plain, "teacher"), "{plain}");
    let weights = |model: &str| std::fs::read(dir.path().join(model).join("model.safetensors")).unwrap();
    assert!(weights("plain") != weights("calibrated") && weights("again") != weights("calibrated"));
    let said = run("unmeasured", &[]);
    assert!(!said.contains("bits per byte") && weights("unmeasured") == weights("plain"), "{said}");
}

#[test]
fn bad_input_is_told() {
    let dir = folder();
    write_teacher(&GptConfig { moe: None, ..shape() }, &dir.path().join("dense"));
    std::fs::write(dir.path().join("short.txt"), "1 and 2, 3 and 4").unwrap();
    const INT8: [&str; 7] = ["quantize", "--model", "teacher", "--out", "x", "--format", "int8"];
    let int8 = |more: &[&'static str]| [&INT8[..], more].concat();
    let calibrations: [(Vec<&str>, &str); 8] = [
        (int8(&["--data", "text.txt"]), "are for --calibrate"),
        (int8(&["--calibration-tokens", "64"]), "are for --calibrate"),
        (int8(&["--max-tokens", "64"]), "give --text"),
        (int8(&["--calibrate", "--calibration-tokens", "3"]), "--calibration-tokens 3 must be at least 16"),
        (int8(&["--text", "text.txt", "--max-tokens", "3"]), "--max-tokens 3 must be at least 16"),
        (int8(&["--calibrate", "--data", "short.txt"]), "no source has 36 tokens"),
        (int8(&["--text", "short.txt"]), "no source has 17 tokens"),
        (int8(&["--calibrate", "--data", "text.txt=3"]), "drop the weight"),
    ];
    std::fs::create_dir(dir.path().join("mixtral")).unwrap();
    let fixture = concat!(env!("CARGO_MANIFEST_DIR"), "/../moe-models/tests/fixtures/mixtral/config.json");
    std::fs::copy(fixture, dir.path().join("mixtral/config.json")).unwrap();
    let cases: [(&[&str], &str); 16] = [
        (&["prune", "--model", "mixtral", "--out", "x", "--keep", "0.5"], "mixtral is a mixtral; experts are pruned"),
        (&["prune", "--model", "dense", "--out", "x", "--keep", "0.5"], "is a dense model"),
        (&["prune", "--model", "teacher", "--out", "x"], "--keep <SHARE>"),
        (
            &["prune", "--model", "teacher", "--out", "x", "--keep", "0"],
            "--keep: the share of experts to keep must be above 0",
        ),
        (
            &["prune", "--model", "teacher", "--out", "x", "--keep-experts", "9", "--data", "none.txt"],
            "--keep-experts: layer 1",
        ),
        (&["prune", "--model", "teacher", "--out", "dense", "--keep", "0.5"], "not an empty folder"),
        (&["prune", "--model", "none", "--out", "x", "--keep", "0.5"], "none/config.json"),
        (&["prune", "--model", "teacher", "--out", "x", "--keep", "0.5", "--seed", "3"], "--seed is of --by random"),
        (&["merge", "--model", "teacher", "--out", "x", "--keep", "0.5", "--calibration-tokens", "3"], "at least 16"),
        (&["quantize", "--model", "none", "--out", "x", "--format", "int8"], "none is not there"),
        (&["quantize", "--model", "teacher", "--out", "x", "--format", "int8", "--group-size", "32"], "is for int4"),
        (&["quantize", "--model", "teacher", "--out", "x", "--format", "int4", "--group-size", "33"], "--group-size: "),
        (&["quantize", "--model", "teacher", "--out", "x", "--format", "int4", "--group-size", "0"], "multiple of 32"),
        (&["merge", "--model", "teacher", "--out", "x", "--keep-experts", "1,2"], "each of the 3 layers"),
        (&["upcycle", "--model", "teacher", "--out", "x", "--num-experts", "4"], "experts already"),
        (&["upcycle", "--model", "dense", "--out", "x", "--num-experts", "4", "--topk", "1"], "2 or more"),
    ];
    for (words, part) in cases.into_iter().chain(calibrations.iter().map(|(words, part)| (words.as_slice(), *part))) {
        let output = moe_compress(dir.path(), words);
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains(part), "{words:?}: {text}");
        assert!(!dir.path().join("x").exists(), "{words:?}");
    }
}

#[test]
fn a_gguf_file_is_quantized_as_a_folder_is() {
    let dir = tempfile::tempdir().unwrap();
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../moe-models/tests/fixtures/gguf/olmoe.gguf");
    let output = moe_compress(dir.path(), &["quantize", "--model", file, "--out", "int8", "--format", "int8"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("int8: ") && text.contains("MB of weights in int8"), "{text}");
    let config = std::fs::read_to_string(dir.path().join("int8/config.json")).unwrap();
    assert!(config.contains("quantization_config") && config.contains("olmoe"), "{config}");
}
