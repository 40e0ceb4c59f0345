//! `moe-distill` from outside: a staged run, resumed across the switch, over ranks, and what it says to bad input.

use crate::teacher::{folder, shape, write_teacher};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};

/// Twelve steps of four micro-batches.
const SMALL: [&str; 21] = [
    "--teacher",
    "teacher",
    "--data",
    "text.txt",
    "--seq-length",
    "16",
    "--micro-batch-size",
    "2",
    "--global-batch-size",
    "8",
    "--train-tokens",
    "1536",
    "--log-interval",
    "1",
    "--valid-fraction",
    "0.1",
    "--save-interval",
    "2",
    "--precision",
    "f32",
    "--resume",
];

fn moe_distill(dir: &Path, out: &str, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe-distill"));
    command.current_dir(dir).args(SMALL).args(["--out", out]).args(more).output().unwrap()
}

#[track_caller]
fn succeed(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}");
    text
}

/// The values of a tag by step.
fn metric(run: &Path, tag: &str) -> BTreeMap<u64, f64> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let records = text.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    records.filter_map(|r| Some((r["step"].as_u64()?, r[tag].as_f64()?))).collect()
}

fn weights(dir: &Path, step: u64) -> Vec<u8> {
    std::fs::read(dir.join(format!("step-{step:08}/model.safetensors"))).unwrap()
}

#[test]
fn a_staged_run_resumed_across_its_switch_ends_with_the_same_bits() {
    let dir = folder();
    let staged = ["--kd-stop", "0.5", "--kd-temp", "2"];
    let text = succeed(&moe_distill(dir.path(), "one", &[&staged[..], &["--export", "model"]].concat()));
    for part in ["following it in the first 6 of 12 steps", "6 layers; starting from scratch", "step 12/12", " (text "]
    {
        assert!(text.contains(part), "{part}: {text}");
    }
    let one = dir.path().join("one");
    let kd = metric(&one, "train/kd_loss");
    assert_eq!(kd.keys().copied().collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6]);
    assert!(kd.values().all(|&kd| kd > 0.0));
    let (total, lm) = (metric(&one, "train/loss"), metric(&one, "train/lm_loss"));
    let aux = metric(&one, "train/aux_loss");
    for (step, total) in &total {
        let sum = lm[step] + aux[step] + kd.get(step).unwrap_or(&0.0);
        assert!((total - sum).abs() < 1e-4, "step {step}: {total} {sum}");
    }

    // Settings that are not given again are the run's own.
    succeed(&moe_distill(dir.path(), "cut", &[&staged[..], &["--exit-interval", "5"]].concat()));
    succeed(&moe_distill(dir.path(), "cut", &["--exit-interval", "7"]));
    succeed(&moe_distill(dir.path(), "cut", &[]));
    assert_eq!(weights(&dir.path().join("cut"), 12), weights(&one, 12));
    // The student is a model as any other.
    let config = std::fs::read_to_string(dir.path().join("model/config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&config).unwrap();
    assert_eq!(
        (config["num_hidden_layers"].as_u64(), config["moe"]["num_experts"].to_string()),
        (Some(5), "[2,4]".into())
    );
    let tokenizer = |of: &str| std::fs::read(dir.path().join(of).join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer("model"), tokenizer("teacher"));
}

#[test]
fn students_learn_over_ranks_as_on_one() {
    let dir = folder();
    let more = ["--init", "teacher", "--drop-depth", "0.34", "--kd", "full"];
    succeed(&moe_distill(dir.path(), "one", &more));
    let layouts: [(&str, &[&str]); 3] = [
        ("ep", &["--ranks", "4", "--ep", "2"]),
        ("zero", &["--ranks", "4", "--ep", "1", "--zero", "2"]),
        ("tp", &["--ranks", "4", "--tp", "2", "--ep", "2"]),
    ];
    for (out, layout) in layouts {
        let text = succeed(&moe_distill(dir.path(), out, &[&more[..], layout].concat()));
        assert!(text.contains(", teacher "), "{text}");
        for tag in ["train/loss", "train/kd_loss", "valid/loss"] {
            let [one, got] = ["one", out].map(|run| metric(&dir.path().join(run), tag));
            assert!(one.len() > 1 && got.keys().eq(one.keys()), "{out} {tag}: {got:?}");
            for (step, want) in &one {
                assert!((got[step] - want).abs() < 1e-4 * want, "{out} {tag} step {step}: {} {want}", got[step]);
            }
            // Before the first update nothing but the order of sums inside a vocabulary can differ, and that is whole here.
            if out != "tp" && tag.starts_with("train") {
                assert_eq!(got[&1], one[&1], "{out} {tag}");
            }
        }
    }
}

/// Two micro-batches on four ranks that share the experts: those without one do in each step what the others do.
#[test]
fn ranks_without_micro_batches_leave_the_teacher_with_the_others() {
    let dir = folder();
    let small = SMALL.map(|arg| if arg == "2" { "4" } else { arg });
    let run = |out: &str, more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moe-distill"));
        command
            .current_dir(dir.path())
            .args(small)
            .args(["--kd-stop", "0.5", "--out", out])
            .args(more)
            .output()
            .unwrap()
    };
    succeed(&run("one", &[]));
    succeed(&run("four", &["--ranks", "4", "--ep", "4"]));
    let [one, four] = ["one", "four"].map(|run| metric(&dir.path().join(run), "train/loss"));
    assert!(one.len() == 12 && four.keys().eq(one.keys()), "{four:?}");
    for (step, want) in &one {
        assert!((four[step] - want).abs() < 1e-4 * want, "step {step}: {} {want}", four[step]);
    }
}

#[test]
fn a_run_that_goes_on_for_longer_does_not_follow_again() {
    let dir = folder();
    succeed(&moe_distill(dir.path(), "run", &["--kd-stop", "0.5"]));
    let longer = SMALL.map(|arg| if arg == "1536" { "3072" } else { arg });
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe-distill"));
    succeed(&command.current_dir(dir.path()).args(longer).args(["--out", "run"]).output().unwrap());
    let run = dir.path().join("run");
    assert_eq!(metric(&run, "train/kd_loss").keys().copied().collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6]);
    assert_eq!(metric(&run, "train/lm_loss").len(), 24);
}

/// It was ended before its first checkpoint: what it says of itself is no more than how it was begun.
#[test]
fn a_run_without_a_checkpoint_begins_anew() {
    let dir = folder();
    let run = dir.path().join("run");
    succeed(&moe_distill(dir.path(), "run", &["--kd-stop", "0.5", "--exit-interval", "2"]));
    for entry in std::fs::read_dir(&run).unwrap().flatten().filter(|e| e.file_name() != "distillation.json") {
        let path = entry.path();
        if path.is_dir() { std::fs::remove_dir_all(path).unwrap() } else { std::fs::remove_file(path).unwrap() }
    }
    let longer = SMALL.map(|arg| if arg == "1536" { "3072" } else { arg });
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe-distill"));
    let text = succeed(&command.current_dir(dir.path()).args(longer).args(["--out", "run"]).output().unwrap());
    assert!(text.contains("starting a new run") && text.contains("in the first 12 of 24 steps"), "{text}");
    assert_eq!(metric(&run, "train/kd_loss").len(), 12);
    let record = std::fs::read_to_string(run.join("distillation.json")).unwrap();
    assert!(record.contains("\"train_tokens\": 3072"), "{record}");
}

/// Positions past the training length would never be trained; what a chat looks like is the teacher's.
#[test]
fn a_student_reads_what_it_was_trained_on() {
    let dir = folder();
    std::fs::write(dir.path().join("teacher/chat_template.jinja"), "{{ messages }}").unwrap();
    let short = SMALL.map(|arg| if arg == "16" { "8" } else { arg });
    for (out, init, length) in [("scratch", "scratch", 8), ("kept", "teacher", 16)] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moe-distill"));
        command.current_dir(dir.path()).args(short).args(["--out", out, "--init", init, "--exit-interval", "2"]);
        succeed(&command.output().unwrap());
        let step = dir.path().join(out).join("step-00000002");
        let config = std::fs::read_to_string(step.join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_str(&config).unwrap();
        assert_eq!(config["max_position_embeddings"].as_u64(), Some(length), "{config}");
        assert_eq!(std::fs::read_to_string(step.join("chat_template.jinja")).unwrap(), "{{ messages }}");
    }
}

fn student(dir: &Path, out: &str, more: &[&str]) -> (String, serde_json::Value) {
    let text = succeed(&moe_distill(dir, out, &[more, &["--exit-interval", "2"]].concat()));
    let config = std::fs::read(dir.join(out).join("step-00000002/config.json")).unwrap();
    (text, serde_json::from_slice(&config).unwrap())
}

/// What has no weights changes the teacher's student; a size without a model's name is of the teacher's shape.
#[test]
fn flags_change_the_student_and_do_not_replace_it() {
    let dir = folder();
    let (_, plain) = student(dir.path(), "plain", &[]);
    for (init, out) in [("scratch", "coefficient"), ("teacher", "kept")] {
        let (text, config) =
            student(dir.path(), out, &["--moe-loss-coeff", "0.5", "--init", init, "--drop-depth", "0.125"]);
        let mut want = plain.clone();
        want["moe"]["router_aux_loss_coef"] = 0.5.into();
        assert_eq!(config, want, "{init}");
        assert!(text.contains(if init == "teacher" { "from its weights" } else { "from scratch" }), "{text}");
    }
    let (_, shallow) = student(dir.path(), "shallow", &["--num-layers", "4"]);
    let sizes = |config: &serde_json::Value| {
        ["hidden_size", "num_attention_heads", "intermediate_size"].map(|key| config[key].clone())
    };
    assert_eq!((shallow["num_hidden_layers"].as_u64(), sizes(&shallow)), (Some(4), sizes(&plain)));
    // Weights of another folder, and of no teacher in memory.
    let whole = dir.path().join("plain/step-00000002");
    let from = ["--init-from", whole.to_str().unwrap(), "--kd", "none"];
    let (text, _) = student(dir.path(), "from", &from);
    assert!(text.contains("starting from the weights in") && text.contains("step-00000002"), "{text}");
    let text = succeed(&moe_distill(dir.path(), "from", &["--ranks", "2", "--exit-interval", "4"]));
    assert!(text.contains("starting from the weights in") && !text.contains(", teacher "), "{text}");
}

#[test]
fn students_may_differ_from_their_teacher() {
    let dir = folder();
    let shape = ["--preset", "tiny-pyramid-moe", "--hidden-size", "12", "--num-heads", "3", "--num-layers", "4"];
    let more = [&shape[..], &["--num-experts", "3,5", "--kd-weight", "0.5"]].concat();
    succeed(&moe_distill(dir.path(), "run", &more));
    assert_eq!(metric(&dir.path().join("run"), "train/kd_loss").len(), 9);
    // What a student is before it learns is its loss on text, as in every validation.
    assert!(!metric(&dir.path().join("run"), "valid/loss").contains_key(&0));
    succeed(&moe_distill(dir.path(), "measured", &[&more[..], &["--eval-on-start"]].concat()));
    let measured = dir.path().join("measured");
    let (valid, lm) = (metric(&measured, "valid/loss"), metric(&measured, "train/lm_loss"));
    assert!((valid[&0] - lm[&1]).abs() < 0.1 * lm[&1], "{} {}", valid[&0], lm[&1]);
    assert_eq!(lm, metric(&dir.path().join("run"), "train/lm_loss"));
    let none = moe_distill(dir.path(), "none", &["--kd", "none"]);
    assert!(succeed(&none).contains("following it in no step"));
    assert!(metric(&dir.path().join("none"), "train/kd_loss").is_empty());
}

/// The second run finds what the first has asked for, and ends with the same bits.
#[test]
fn runs_share_what_the_teacher_says() {
    let dir = folder();
    let more = ["--kd-top-k", "12", "--kd-cache", "said"];
    let text = succeed(&moe_distill(dir.path(), "one", &more));
    assert!(text.contains("from its 12 likeliest entries, 96 bytes a token"), "{text}");
    let kept = || {
        let folder = std::fs::read_dir(dir.path().join("said")).unwrap().next().unwrap().unwrap().path();
        std::fs::read_dir(folder).unwrap().map(|file| file.unwrap().metadata().unwrap().len()).sum::<u64>()
    };
    let bytes = kept();
    succeed(&moe_distill(dir.path(), "two", &[&more[..], &["--exit-interval", "5"]].concat()));
    // A run that goes on finds them too, without being told again.
    succeed(&moe_distill(dir.path(), "two", &[]));
    assert_eq!(kept(), bytes);
    assert!(!dir.path().join("two/teacher-targets").exists());
    assert_eq!(weights(&dir.path().join("one"), 12), weights(&dir.path().join("two"), 12));
    let output = moe_distill(dir.path(), "ranks", &[&more[..], &["--ranks", "2"]].concat());
    assert!(String::from_utf8_lossy(&output.stderr).contains("--kd-top-k is for one rank"));
}

#[test]
fn bad_input_is_told() {
    let dir = folder();
    succeed(&moe_distill(dir.path(), "run", &["--exit-interval", "2"]));
    // A new run where there is one is refused before its settings are written.
    let new = SMALL.iter().filter(|word| **word != "--resume").chain(&["--out", "run", "--kd", "full"]);
    let output = Command::new(env!("CARGO_BIN_EXE_moe-distill")).current_dir(dir.path()).args(new).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("already holds checkpoints"), "{text}");
    let record = std::fs::read_to_string(dir.path().join("run/distillation.json")).unwrap();
    assert!(record.contains("staged"), "{record}");
    let published = "{\"model_type\": \"llama\", \"hidden_act\": \"silu\", \"vocab_size\": 262, \"hidden_size\": 16, \
        \"intermediate_size\": 32, \"num_hidden_layers\": 2, \"num_attention_heads\": 2, \"max_position_embeddings\": 16}";
    std::fs::write(dir.path().join("llama.json"), published).unwrap();
    // As many entries, but others.
    write_teacher(&shape(), &dir.path().join("other"));
    let path = dir.path().join("other/tokenizer.json");
    let swapped =
        std::fs::read_to_string(&path).unwrap().replacen("\"ignore_merges\": false", "\"ignore_merges\": true", 1);
    std::fs::write(&path, swapped).unwrap();
    let cases: [(&str, &[&str], &str); 19] = [
        ("new", &["--init-from", "teacher", "--init", "scratch"], "--init and --init-from"),
        ("new", &["--num-layers", "4", "--drop-depth", "0.2"], "--drop-depth is for a student"),
        ("new", &["--kd-stop", "1.5"], "--kd-stop"),
        ("new", &["--kd-weight=-1"], "--kd-weight"),
        ("new", &["--kd-temp", "0"], "--kd-temp"),
        ("new", &["--drop-depth", "0.01"], "--drop-depth"),
        ("new", &["--init-from", "other"], "--init-from other has another tokenizer"),
        ("new", &["--kd-cache", "said"], "give --kd-top-k too"),
        ("run", &["--kd", "full"], "other settings"),
        ("run", &["--num-layers", "4"], "the model asked for differs"),
        ("new", &["--kd", "full", "--kd-stop", "0.5"], "--kd-stop is the end of the staged schedule"),
        ("new", &["--kd", "none", "--kd-temp", "2"], "--kd-temp has no effect"),
        ("new", &["--kd-stop", "1.5"], "between 0 and 1"),
        ("new", &["--kd-top-k", "0"], "--kd-top-k must be 1 to 262"),
        ("new", &["--drop-depth", "0.01"], "drops at least one layer"),
        ("new", &["--num-layers", "4", "--init", "teacher"], "drop the flags that describe a model"),
        ("new", &["--vocab-size", "300"], "teacher's tokenizer"),
        ("new", &["--model-config", "llama.json"], "this project's own (moe_gpt), got a llama"),
        ("new", &["--teacher", "text.txt"], "config.json"),
    ];
    for (out, more, part) in cases {
        let given: Vec<&str> = if more[0] == "--teacher" { SMALL[2..].to_vec() } else { SMALL.to_vec() };
        let output = Command::new(env!("CARGO_BIN_EXE_moe-distill"))
            .current_dir(dir.path())
            .args(given)
            .args(["--out", out])
            .args(more)
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains(part), "{more:?}: {text}");
        assert!(out == "run" || !dir.path().join(out).join("distillation.json").exists(), "{more:?}");
    }
    let mut evaluating = Command::new(env!("CARGO_BIN_EXE_moe-distill"));
    evaluating.current_dir(dir.path()).args(["--teacher", "teacher", "--evaluate", "teacher", "--valid", "text.txt"]);
    let text = String::from_utf8_lossy(&evaluating.output().unwrap().stderr).into_owned();
    assert!(text.contains("--evaluate needs no teacher"), "{text}");
}
