//! The `moe-train` program from outside: a run, an interrupt, a resume, and what it says to bad input.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

pub(crate) fn moe_train(dir: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moe-train"));
    command.current_dir(dir).args(arguments);
    command
}

/// A model small enough for a debug build, on a text of numbers.
pub(crate) const SMALL: [&str; 31] = [
    "--data",
    "text.txt",
    "--preset",
    "tiny-pr-moe",
    "--hidden-size",
    "16",
    "--num-layers",
    "4",
    "--num-heads",
    "2",
    "--num-experts",
    "2,4",
    "--vocab-size",
    "262",
    "--seq-length",
    "16",
    "--micro-batch-size",
    "2",
    "--global-batch-size",
    "4",
    "--log-interval",
    "1",
    "--valid-fraction",
    "0.1",
    "--recompute",
    "block",
    "--attention-dropout",
    "0.1",
    "--hidden-dropout",
    "0.2",
    "--resume",
];

pub(crate) fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let text: String = (0..900).map(|i| format!("{} and {}, ", i * 37 % 91, i * i % 17)).collect();
    std::fs::write(dir.path().join("text.txt"), text).unwrap();
    dir
}

fn arguments<'a>(more: &[&'a str]) -> Vec<&'a str> {
    SMALL.iter().chain(more).copied().collect()
}

#[track_caller]
pub(crate) fn succeed(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{text}");
    text
}

#[test]
fn runs_resumes_and_exports() {
    let dir = folder();
    let more = ["--out", "run", "--train-tokens", "640", "--export", "model", "--export-best"];
    let text = succeed(&moe_train(dir.path(), &arguments(&more)).output().unwrap());
    assert!(text.contains("no checkpoint in run; starting a new run"), "{text}");
    assert!(text.contains("step 10/10") && text.contains("bits per byte"), "{text}");
    let mut files: Vec<_> =
        std::fs::read_dir(dir.path().join("model")).unwrap().map(|e| e.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(
        files,
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    );
    // Longer, with nothing else said: the saved settings hold.
    let text =
        succeed(&moe_train(dir.path(), &["--out", "run", "--resume", "--train-tokens", "960"]).output().unwrap());
    assert!(text.contains("resuming from run/step-00000010") && text.contains("step 15/15"), "{text}");
    assert!(text.contains("checking the cached tokens of text") && !text.contains("tokenising"), "{text}");
}

/// On one rank and on two, and only before the first step of all.
#[test]
fn a_run_validates_before_its_first_step() {
    let dir = folder();
    let start = |out: &str, more: &[&str]| {
        let own = ["--out", out, "--train-tokens", "256", "--eval-on-start"];
        let text = succeed(&moe_train(dir.path(), &arguments(&[&own[..], more].concat())).output().unwrap());
        text.lines().find(|line| line.starts_with("step 0: valid loss ")).map(str::to_owned)
    };
    let first = start("one", &["--exit-interval", "2"]);
    assert!(first.is_some());
    assert_eq!(start("one", &[]), None, "resumed from step 2");
    assert_eq!(start("two", &["--ranks", "2"]), first);
}

fn tokens_in(dir: &Path) -> Vec<PathBuf> {
    files_below(dir).into_iter().filter(|path| path.extension().is_some_and(|ending| ending == "tokens")).collect()
}

#[test]
fn runs_share_tokens_where_they_are_asked_to() {
    let dir = folder();
    let train = |out: &str| {
        let more =
            ["--out", out, "--train-tokens", "64", "--data-cache", "shared", "--export", &format!("{out}-model")];
        succeed(&moe_train(dir.path(), &arguments(&more)).output().unwrap())
    };
    assert!(train("one").contains("tokenising text"));
    let kept = tokens_in(dir.path());
    assert!(kept.len() == 1 && kept[0].starts_with(dir.path().join("shared")), "{kept:?}");
    let text = train("two");
    assert!(text.contains("checking the cached tokens of text") && !text.contains("tokenising"), "{text}");
    // A resumed run looks where it kept them, and makes anew what is damaged.
    let whole = std::fs::read(&kept[0]).unwrap();
    std::fs::write(&kept[0], &whole[..whole.len() - 1]).unwrap();
    let more = ["--out", "two", "--resume", "--train-tokens", "128"];
    let text = succeed(&moe_train(dir.path(), &more).output().unwrap());
    assert!(text.contains("tokenising text again: shared/") && text.contains("step 2/2"), "{text}");
    assert!(std::fs::read(&kept[0]).unwrap() == whole);
    // Another place may be named for the rest of a run.
    let more = ["--out", "two", "--resume", "--train-tokens", "192", "--data-cache", "moved"];
    assert!(succeed(&moe_train(dir.path(), &more).output().unwrap()).contains("step 3/3"));
    assert_eq!(tokens_in(&dir.path().join("moved")).len(), 1);

    let evaluate = |more: &[&str]| {
        let arguments = [&["--evaluate", "one-model", "--valid", "text.txt"], more].concat();
        let output = moe_train(dir.path(), &arguments).output().unwrap();
        (succeed(&output), String::from_utf8(output.stdout).unwrap())
    };
    let (_, held) = evaluate(&[]);
    assert_eq!(tokens_in(dir.path()).len(), 2, "an evaluation keeps no tokens by itself");
    let (text, mapped) = evaluate(&["--data-cache", "shared"]);
    assert!(text.contains("checking the cached tokens") && mapped == held, "{text}");
}

/// Interrupted like a person would, at whatever step it is; the weights must end as those of the undisturbed run.
#[cfg(unix)]
#[test]
fn interrupted_and_resumed_ends_with_the_same_weights() {
    let dir = folder();
    let more = |out: &'static str| arguments(&["--out", out, "--train-tokens", "3840"]);
    succeed(&moe_train(dir.path(), &more("whole")).output().unwrap());
    let mut child = moe_train(dir.path(), &more("cut")).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.starts_with("step 7/")), "reaches step 7");
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let rest: Vec<String> = lines.collect();
    assert!(child.wait().unwrap().success(), "{rest:?}");
    assert!(rest.iter().any(|line| line.starts_with("stopped after step")), "{rest:?}");
    let latest = std::fs::read_to_string(dir.path().join("cut/latest")).unwrap();
    assert_ne!(latest, "step-00000060", "stopped before the end");
    succeed(&moe_train(dir.path(), &more("cut")).output().unwrap());
    for file in ["model.safetensors", "optimizer.safetensors"] {
        let read = |out: &str| std::fs::read(dir.path().join(out).join("step-00000060").join(file)).unwrap();
        assert!(read("whole") == read("cut"), "{file} differs after {latest}");
    }
}

/// A program that does not outlive its test.
#[cfg(unix)]
struct Running(Child);

#[cfg(unix)]
impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a run, sends it SIGTERM when it prints a line with `word`, and checks that it ends at once as documented.
#[cfg(unix)]
#[track_caller]
fn check_terminated(dir: &Path, arguments: &[&str], word: &str) {
    let mut child = Running(moe_train(dir, arguments).stderr(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(child.0.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.contains(word)), "never came to {word}");
    assert!(Command::new("kill").args(["-TERM", &child.0.id().to_string()]).status().unwrap().success());
    let deadline = Instant::now() + Duration::from_secs(60);
    let status = loop {
        if let Some(status) = child.0.try_wait().unwrap() {
            break status;
        }
        assert!(Instant::now() < deadline, "{word}: still running a minute after SIGTERM");
        std::thread::sleep(Duration::from_millis(10));
    };
    let rest: Vec<String> = lines.collect();
    assert_eq!(status.code(), Some(130), "{word}: {rest:?}");
    assert!(rest.iter().any(|line| line.contains("ended by a signal; no step was under way")), "{word}: {rest:?}");
    assert!(!rest.iter().any(|line| line.contains("saving after this step") || line.starts_with("run:")), "{rest:?}");
}

#[cfg(unix)]
#[test]
fn termination_is_heeded_while_text_is_prepared() {
    let dir = folder();
    succeed(&moe_train(dir.path(), &arguments(&["--out", "small", "--train-tokens", "64"])).output().unwrap());
    // A pipe that nobody writes to is read for ever.
    assert!(Command::new("mkfifo").arg(dir.path().join("pipe.txt")).status().unwrap().success());
    check_terminated(dir.path(), &["--data", "pipe.txt"], "reading pipe.txt");
    // Words of which no two are alike.
    let words: String = (1..2_000_000u64).map(|i| format!("{:x} ", i.wrapping_mul(0x9E37_79B9_7F4A_7C15))).collect();
    std::fs::write(dir.path().join("large.txt"), words).unwrap();
    check_terminated(dir.path(), &["--data", "large.txt"], "training a tokenizer");
    let tokenizer = "small/step-00000001/tokenizer.json";
    check_terminated(dir.path(), &["--data", "large.txt", "--tokenizer", tokenizer], "tokenising large");
}

#[test]
fn the_exit_status_is_documented() {
    let help = moe_train(Path::new("."), &["--help"]).output().unwrap();
    let text = String::from_utf8(help.stdout).unwrap();
    assert!(text.contains("Exit status:") && text.contains("130  ended at once"), "{text}");
}

#[track_caller]
fn check_refused(dir: &Path, more: &[&str], words: &[&str]) {
    let output = moe_train(dir, more).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{more:?} was accepted");
    assert!(!text.contains("panicked"), "{text}");
    words.iter().for_each(|word| assert!(text.contains(word), "{more:?} should mention {word:?}: {text}"));
}

#[test]
fn bad_input_is_named_and_nothing_is_written() {
    let dir = folder();
    let write = |name: &str, text: &str| {
        std::fs::write(dir.path().join(name), text).unwrap();
    };
    write("empty.txt", " \n");
    write("broken.jsonl", "{\"text\": \"a\"}\n{\"text\": 1}\n");
    write("tokenizer.json", "{");
    write("config.toml", "learning = 1\n");
    let inputs = files_below(dir.path());
    let check = |more: &[&str], words: &[&str]| check_refused(dir.path(), more, words);
    check(&["--data", "missing.txt"], &["missing.txt"]);
    check(&["--data", "empty.txt"], &["empty.txt", "no text"]);
    check(&["--data", "broken.jsonl"], &["broken.jsonl", "line 2"]);
    check(&["--data", "text.txt", "--tokenizer", "tokenizer.json"], &["tokenizer.json"]);
    check(&["--data", "text.txt", "--vocab-size", "9000"], &["9000", "lower vocab_size"]);
    check(&["--config", "config.toml"], &["config.toml", "learning"]);
    check(&["--preset", "huge"], &["huge", "tiny-pr-moe"]);
    check(&["--num-experts", "0"], &["num_experts"]);
    check(&["--num-experts", "4", "--topk", "5"], &["5", "4"]);
    check(&["--preset", "tiny-dense", "--topk", "1"], &["dense"]);
    check(&["--global-batch-size", "3", "--micro-batch-size", "2"], &["global_batch_size 3"]);
    check(&["--attention-dropout", "1"], &["attention_dropout", "got 1"]);
    check(&["--out", "text.txt/run"], &["text.txt"]);
    check(&["--export", "text.txt"], &["text.txt", "empty folder"]);
    let left: Vec<PathBuf> = files_below(dir.path()).into_iter().filter(|path| !inputs.contains(path)).collect();
    assert!(left.iter().all(|path| path.ends_with("runs/moe-train/run.lock")), "more than an unused folder: {left:?}");
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

#[test]
fn a_model_folder_is_evaluated_on_any_text() {
    let dir = folder();
    let more = ["--out", "run", "--train-tokens", "64", "--export", "model"];
    succeed(&moe_train(dir.path(), &arguments(&more)).output().unwrap());
    let latest = std::fs::read_to_string(dir.path().join("run/latest")).unwrap();
    let state = std::fs::read_to_string(dir.path().join("run").join(latest).join("trainer_state.json")).unwrap();
    for flag in ["\"recompute\": \"block\"", "\"attention_dropout\": 0.1", "\"hidden_dropout\": 0.2"] {
        assert!(state.contains(flag), "the flag is part of the run: {state}");
    }
    let evaluate = |more: &[&str]| {
        let mut arguments = vec!["--evaluate", "model"];
        arguments.extend(more);
        moe_train(dir.path(), &arguments).output().unwrap()
    };
    let one = evaluate(&["--valid", "text.txt", "--eval-iters", "0"]);
    succeed(&one);
    let table = String::from_utf8(one.stdout).unwrap();
    let bits: f64 = table.lines().last().unwrap().split_whitespace().last().unwrap().parse().unwrap();
    assert!(table.contains("text") && bits > 0.5 && bits < 20.0, "{table}");
    let two = evaluate(&["--valid", "text.txt", "--micro-batch-size", "8", "--eval-iters", "0"]);
    assert_eq!(String::from_utf8(two.stdout).unwrap(), table, "the same for any grouping");
    let refused = evaluate(&[]);
    assert!(!refused.status.success() && String::from_utf8_lossy(&refused.stderr).contains("--valid"));
}

/// Every flag that is accepted has an effect; one that would have none is refused by its name.
#[test]
fn flags_without_effect_are_refused() {
    let dir = folder();
    let check = |more: &[&str], words: &[&str]| check_refused(dir.path(), more, words);
    check(&["--data", "text.txt", "--valid", "text.txt=2"], &["text.txt", "weight 2"]);
    check(&["--evaluate", "model", "--valid", "text.txt=2"], &["model"]);
    for flag in ["--eval-interval=3", "--eval-iters=3", "--eval-on-start"] {
        let name = flag.split('=').next().unwrap();
        check(&["--data", "text.txt", "--valid-fraction", "0", flag], &[name, "--valid"]);
    }
    check(&["--data", "text.txt", "--valid-fraction", "0", "--export", "model", "--export-best"], &["--export-best"]);
    let training_only =
        ["--lr 1", "--data text.txt", "--out run", "--tokenizer t.json", "--hidden-size 8", "--train-tokens 5"];
    for flags in training_only.into_iter().chain(["--eval-on-start"]) {
        let mut arguments = vec!["--evaluate", "model", "--valid", "text.txt"];
        arguments.extend(flags.split(' '));
        check(&arguments, &["--evaluate", flags.split(' ').next().unwrap()]);
    }
}

#[test]
fn a_held_out_fraction_beside_validation_text_is_told_of() {
    let dir = folder();
    let more = ["--out", "run", "--train-tokens", "64", "--valid", "text.txt"];
    let text = succeed(&moe_train(dir.path(), &arguments(&more)).output().unwrap());
    assert!(text.contains("(text.txt), so --valid-fraction 0.1 has no effect"), "{text}");
}

#[test]
fn a_resumed_run_keeps_its_tokenizer() {
    let dir = folder();
    succeed(&moe_train(dir.path(), &arguments(&["--out", "run", "--train-tokens", "64"])).output().unwrap());
    let own = "run/step-00000001/tokenizer.json";
    let resume = |more: &[&str]| {
        let mut arguments = vec!["--out", "run", "--resume", "--train-tokens", "128"];
        arguments.extend(more);
        moe_train(dir.path(), &arguments).output().unwrap()
    };
    let refused = |output: Output, words: &[&str]| {
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && words.iter().all(|word| text.contains(word)), "{text}");
    };
    refused(resume(&["--vocab-size", "300"]), &["--vocab-size 300", "262", "drop --vocab-size"]);
    let other = std::fs::read_to_string(dir.path().join(own))
        .unwrap()
        .replace("\"add_prefix_space\": false", "\"add_prefix_space\": true");
    std::fs::write(dir.path().join("other.json"), other).unwrap();
    refused(resume(&["--tokenizer", "other.json"]), &["--tokenizer other.json", "drop --tokenizer"]);
    refused(resume(&["--tokenizer", "missing.json"]), &["missing.json"]);
    std::fs::copy(dir.path().join(own), dir.path().join("same.json")).unwrap();
    succeed(&resume(&["--tokenizer", "same.json"]));
    succeed(&resume(&["--vocab-size", "262"]));
}

/// Two runs in one folder would delete each other's files; a killed one must not stand in the way of the next.
#[cfg(unix)]
/// Without its teacher it would be another run.
#[test]
fn a_students_run_is_not_gone_on_with() {
    let dir = folder();
    let run = |more: &[&str]| moe_train(dir.path(), &arguments(&[&["--out", "run"], more].concat())).output().unwrap();
    let short = ["--train-tokens", "320"];
    std::fs::create_dir(dir.path().join("run")).unwrap();
    let record = dir.path().join("run/distillation.json");
    std::fs::write(&record, "{}").unwrap();
    // A new run is none of a student.
    succeed(&run(&short));
    assert!(!record.exists());
    std::fs::write(&record, "{}").unwrap();
    let refused = |output: Output, part: &str| {
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && text.contains(part) && record.exists(), "{text}");
    };
    refused(run(&["--train-tokens", "640"]), "resume it with moe-distill");
    // What is not resumed is refused before anything of it is changed, or text is read.
    let new: Vec<&str> = arguments(&["--out", "run", "--data", "none.txt"]);
    let new: Vec<&str> = new.into_iter().filter(|argument| *argument != "--resume").collect();
    refused(moe_train(dir.path(), &new).output().unwrap(), "already holds checkpoints");
}

#[test]
fn one_run_at_a_time_in_a_folder() {
    let dir = folder();
    succeed(&moe_train(dir.path(), &arguments(&["--out", "run", "--train-tokens", "64"])).output().unwrap());
    // A pipe that nobody writes to keeps the first run at reading.
    assert!(Command::new("mkfifo").arg(dir.path().join("pipe.txt")).status().unwrap().success());
    let mut first = moe_train(dir.path(), &["--out", "run", "--resume", "--data", "pipe.txt"]);
    let mut first = Running(first.stderr(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(first.0.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.contains("reading pipe.txt")));
    // What a checkpoint under way looks like.
    std::fs::create_dir(dir.path().join("run/.tmp-step-00000002")).unwrap();
    let holder = format!("in use by process {}", first.0.id());
    let more = ["--out", "run", "--resume", "--train-tokens", "128"];
    check_refused(dir.path(), &more, &[&holder, "run", "another folder"]);
    check_refused(dir.path(), &["--out", "run", "--train-tokens", "64", "--data", "text.txt"], &[&holder]);
    assert!(dir.path().join("run/.tmp-step-00000002").exists(), "the other run's files are left alone");
    drop(first);
    let text = succeed(&moe_train(dir.path(), &more).output().unwrap());
    assert!(text.contains("resuming from run/step-00000001"), "{text}");
}

/// A run that starts from a model folder starts where that model is, over ranks too.
#[test]
fn runs_start_from_the_weights_of_a_folder() {
    let dir = folder();
    let first = ["--out", "first", "--train-tokens", "640", "--export", "model", "--export-dtype", "f32"];
    succeed(&moe_train(dir.path(), &arguments(&first)).output().unwrap());
    let loss = |out: &str, line: usize| {
        let text = std::fs::read_to_string(dir.path().join(out).join("metrics.jsonl")).unwrap();
        let record: serde_json::Value = serde_json::from_str(text.lines().nth(line).unwrap()).unwrap();
        record["train/lm_loss"].as_f64().unwrap()
    };
    let plain = ["--data", "text.txt", "--seq-length", "16", "--micro-batch-size", "2", "--global-batch-size", "4"];
    let more = ["--log-interval", "1", "--valid-fraction", "0.1", "--train-tokens", "128", "--init-from", "model"];
    for (out, ranks) in [("one", "1"), ("two", "2")] {
        let all = [&plain[..], &more, &["--out", out, "--ranks", ranks]].concat();
        succeed(&moe_train(dir.path(), &all).output().unwrap());
        let tokenizer = |of: &str| std::fs::read(dir.path().join(of).join("tokenizer.json")).unwrap();
        assert_eq!(tokenizer("model"), tokenizer(&format!("{out}/step-00000002")));
        assert!(loss(out, 0) < loss("first", 0) - 0.05, "{} {}", loss(out, 0), loss("first", 0));
    }
    assert_eq!(loss("one", 0), loss("two", 0));
    let both = [&plain[..], &more, &["--out", "x", "--preset", "tiny-moe"]].concat();
    let output = moe_train(dir.path(), &both).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("cannot be used with"));
    let other = [&plain[..], &more, &["--out", "x", "--num-layers", "6"]].concat();
    let text = String::from_utf8_lossy(&moe_train(dir.path(), &other).output().unwrap().stderr).into_owned();
    assert!(text.contains("is missing"), "{text}");
}
