//! The `moe-eval` program from outside, on a small trained model.

use crate::eval_request::model_folder;
use serde_json::Value;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const ALL: &str = "lambada,piqa,hellaswag,boolq,arc_easy,arc_challenge,openbookqa,winogrande,triviaqa,webqs";

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/eval")
}

fn moe_eval(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe-eval"));
    command.arg("--model").arg(model_folder()).args(arguments).output().unwrap()
}

#[track_caller]
fn succeed(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[track_caller]
fn refused(arguments: &[&str], parts: &[&str]) {
    let output = moe_eval(arguments);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && output.stdout.is_empty(), "{arguments:?}");
    assert!(parts.iter().all(|part| text.contains(part)), "{arguments:?}: {text}");
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

#[test]
fn every_task_has_its_metrics_and_chances() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("report.json");
    let fixtures = fixtures().display().to_string();
    let printed = succeed(&moe_eval(&["--tasks", ALL, "--task-dir", &fixtures, "--json", &file.display().to_string()]));
    let report = json(&file);
    let tasks = report["tasks"].as_array().unwrap();
    assert_eq!(tasks.iter().filter_map(|t| t["task"].as_str()).collect::<Vec<_>>().join(","), ALL);
    let chance = |task: &str| tasks.iter().find(|t| t["task"] == task).unwrap()["metrics"][0]["chance"].as_f64();
    assert_eq!((chance("piqa"), chance("hellaswag"), chance("lambada")), (Some(0.5), Some(0.25), None));
    assert_eq!(chance("arc_easy"), Some((1.0 / 4.0 + 1.0 / 3.0) / 2.0));
    for task in tasks {
        for metric in task["metrics"].as_array().unwrap() {
            let (name, value) = (metric["metric"].as_str().unwrap(), metric["value"].as_f64().unwrap());
            assert!(name == "perplexity" && value > 1.0 || (0.0..=1.0).contains(&value), "{task}");
            let row = |line: &&str| line.starts_with(task["task"].as_str().unwrap()) && line.contains(name);
            let line = printed.lines().find(row).unwrap_or_else(|| panic!("{task} in {printed}"));
            assert!(line.contains(&format!("{value:.4}")), "{line}");
        }
    }
    assert_eq!((&report["text"], &report["max_length"]), (&Value::Null, &Value::from(256)));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing but the report is left");
}

/// As families that name it in their own way have it.
#[test]
fn a_document_ends_as_the_model_says_where_its_tokenizer_has_no_usual_name() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(model_folder().join(name), dir.path().join(name)).unwrap();
    }
    let (fixtures, model) = (fixtures().display().to_string(), dir.path().display().to_string());
    let evaluate = |model: &str| {
        let arguments = [
            "--tasks",
            "lambada",
            "--task-dir",
            &fixtures,
            "--text",
            &format!("{fixtures}/text.txt"),
            "--max-length",
            "16",
        ];
        Command::new(env!("CARGO_BIN_EXE_moe-eval")).args(["--model", model]).args(arguments).output().unwrap()
    };
    let numbers = |text: String| {
        text.lines().map(|line| line.split_once(' ').map(|(_, rest)| rest.to_owned())).collect::<Vec<_>>()
    };
    let want = numbers(succeed(&evaluate(&model_folder().display().to_string())));
    let path = dir.path().join("tokenizer.json");
    let renamed = std::fs::read_to_string(&path).unwrap().replace("<|endoftext|>", "<|fin|>");
    std::fs::write(&path, renamed).unwrap();
    assert_eq!(numbers(succeed(&evaluate(&model))), want);
    let config = std::fs::read_to_string(dir.path().join("config.json")).unwrap();
    std::fs::write(dir.path().join("config.json"), config.replace("\"eos_token_id\": 0", "\"eos_token_id\": null"))
        .unwrap();
    let output = evaluate(&model);
    assert!(String::from_utf8_lossy(&output.stderr).contains("no end-of-document token"), "{output:?}");
}

#[test]
fn compressed_items_and_a_limit() {
    let dir = tempfile::tempdir().unwrap();
    let plain = std::fs::read(fixtures().join("lambada_openai.test.jsonl")).unwrap();
    let file = std::fs::File::create(dir.path().join("lambada_openai.test.jsonl.xz")).unwrap();
    let mut xz = lzma_rust2::XzWriter::new(file, lzma_rust2::XzOptions::with_preset(0)).unwrap();
    xz.write_all(&plain).unwrap();
    xz.finish().unwrap();
    let run = |dir: &Path, more: &[&str]| {
        let dir = dir.display().to_string();
        succeed(&moe_eval(&[&["--tasks", "lambada", "--task-dir", &dir], more].concat()))
    };
    assert_eq!(run(dir.path(), &[]), run(&fixtures(), &[]));
    let first = run(dir.path(), &["--limit", "1"]);
    assert!(first.contains("the first 1 items") && first != run(dir.path(), &["--limit", "2"]), "{first}");
    assert_eq!(run(dir.path(), &["--limit", "3"]).lines().nth(2), run(dir.path(), &[]).lines().nth(2));
}

#[test]
fn text_is_counted_source_by_source() {
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(fixtures().join("text.txt")).unwrap();
    for name in ["a.txt", "b.txt"] {
        std::fs::write(dir.path().join(name), &text).unwrap();
    }
    let (folder, file) = (dir.path().display().to_string(), dir.path().join("report.json"));
    let arguments = ["--text", &folder, "--max-length", "16", "--precision", "f32", "--json"];
    let printed = succeed(&moe_eval(&[&arguments[..], &[&file.display().to_string()]].concat()));
    assert!(printed.starts_with("text: the whole text of each source"), "{printed}");
    let report = json(&file);
    let sources = report["text"]["sources"].as_array().unwrap();
    assert_eq!(sources.iter().map(|s| s["source"].as_str().unwrap()).collect::<Vec<_>>(), ["a", "b", "all"]);
    let number = |i: usize, name: &str| sources[i][name].as_f64().unwrap();
    for name in ["tokens", "bytes", "words"] {
        assert_eq!((number(0, name), number(2, name)), (number(1, name), 2.0 * number(0, name)), "{name}");
    }
    let (words, bytes) = (text.split_whitespace().count() as f64, text.len() as f64);
    assert!((0.85 * words..words).contains(&number(0, "words")) && (0.85 * bytes..bytes).contains(&number(0, "bytes")));
    let nats = number(0, "nats");
    assert!((number(0, "bits_per_byte") - nats / 2f64.ln() / number(0, "bytes")).abs() < 1e-9);
    assert!((number(0, "token_perplexity") - (nats / number(0, "tokens")).exp()).abs() < 1e-6);
    // A trained model is far better than the logarithm of its vocabulary.
    assert!((nats / number(0, "tokens")) < 0.8 * 4096f64.ln());

    let part = succeed(&moe_eval(&["--text", &folder, "--max-length", "16", "--max-tokens", "40"]));
    assert!(part.contains("at most 40 tokens"), "{part}");
    let tokens = part.lines().nth(2).and_then(|line| line.split_whitespace().nth(1));
    assert_eq!(tokens, Some("32"), "two windows of 16: {part}");
}

#[test]
fn refusals_name_the_argument_or_the_line() {
    let fixtures = fixtures().display().to_string();
    let text = format!("{fixtures}/text.txt");
    refused(&[], &["--text", "--tasks"]);
    refused(&["--tasks", "piqa"], &["--task-dir"]);
    refused(&["--text", &text, "--limit", "3"], &["--tasks"]);
    refused(&["--tasks", "piqa,nosuch", "--task-dir", &fixtures], &["--tasks", "nosuch", "hellaswag"]);
    refused(&["--tasks", "piqa", "--task-dir", "/nowhere"], &["--task-dir", "/nowhere", "piqa.validation.jsonl.xz"]);
    refused(&["--text", &text, "--max-length", "257"], &["--max-length 257", "256"]);
    refused(&["--text", &text, "--max-length", "16", "--max-tokens", "15"], &["--max-tokens 15", "16"]);
    refused(&["--text", "nosuch.txt"], &["nosuch.txt"]);
    refused(&["--text", &text, "--json", "/nowhere/report.json"], &["--json /nowhere/report.json"]);

    let dir = tempfile::tempdir().unwrap();
    let good = r#"{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}"#;
    let bad = good.replace("0}", "7}");
    std::fs::write(dir.path().join("piqa.validation.jsonl"), format!("{good}\n\n{bad}\n")).unwrap();
    let folder = dir.path().display().to_string();
    refused(&["--tasks", "piqa", "--task-dir", &folder], &["piqa.validation.jsonl", "line 3", "label 7"]);
    std::fs::write(dir.path().join("piqa.validation.jsonl"), "\n").unwrap();
    refused(&["--tasks", "piqa", "--task-dir", &folder], &["piqa.validation.jsonl", "holds no items"]);
    let long = good.replace("\"a\"", &format!("\"{}\"", "a b ".repeat(300)));
    std::fs::write(dir.path().join("piqa.validation.jsonl"), format!("{good}\n{long}\n")).unwrap();
    // Before the text, which would take its time.
    refused(&["--tasks", "piqa", "--task-dir", &folder, "--text", &text], &["item 2", "--max-length"]);
    std::fs::write(dir.path().join("short.txt"), "no window").unwrap();
    let short = dir.path().join("short.txt").display().to_string();
    refused(&["--text", &short], &["short has", "fewer than a window of 256", "--max-length"]);
}

/// A GGUF file has its own tokenizer in it.
#[test]
fn a_file_is_evaluated_as_a_folder_is() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text.txt");
    std::fs::write(&text, "The old man looked at the sea, and it was grey.\n".repeat(20)).unwrap();
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../moe-models/tests/fixtures/gguf/forms.gguf");
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe-eval"));
    let printed = succeed(&command.arg("--model").arg(model).arg("--text").arg(&text).output().unwrap());
    let row = printed.lines().find(|line| line.starts_with("text ")).unwrap_or_else(|| panic!("{printed}"));
    let numbers: Vec<f64> = row.split_whitespace().skip(1).map(|number| number.parse().unwrap()).collect();
    // Random weights know nothing of the text: hundreds of choices for each token.
    assert!(numbers[0] == 512.0 && numbers[3] > 1.0 && (300.0..1200.0).contains(&numbers[4]), "{printed}");
}
