//! Model folders with random damage: each is answered with tokens or a typed error, in little memory and little time.
//!
//! The cases run in a process of their own, whose memory is limited: what would take a machine's memory, or end the process
//! in another way than by a panic, ends that one.

use crate::support::tokenizer;
use candle_core::{DType, Device};
use moe_core::CounterRng;
use moe_models::Precision;
use moe_models::gpt::{Gpt, GptConfig};
use moe_serve::engine::{Engine, EngineConfig, Job, StopParams};
use moe_serve::text::{Event, TextListener, TextOptions};
use moe_serve::{Error, Result, ServedModel};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Memory that loading a folder of 300 kB and what the test needs itself may take, threads and their stacks included.
const MEMORY_KIB: usize = 3 << 20;
/// One case takes some 20 ms.
const CASE_LIMIT: Duration = Duration::from_secs(30);
/// Tells the process of the cases which it is.
const INNER: &str = "MOE_SERVE_TEST_DAMAGED_INNER";

#[test]
fn damaged_folders_give_answers_or_typed_errors() {
    run("damaged::damaged_folders_give_answers_or_typed_errors", 0..400);
}

#[test]
#[ignore = "takes minutes: the same with thousands of cases"]
fn thousands_of_damaged_folders_give_answers_or_typed_errors() {
    run("damaged::thousands_of_damaged_folders_give_answers_or_typed_errors", 400..20_400);
}

/// Runs the cases of the test named `name` in a process with limited memory.
#[track_caller]
fn run(name: &str, cases: std::ops::Range<usize>) {
    if std::env::var_os(INNER).is_some() {
        return run_here(cases);
    }
    let limited = if cfg!(target_os = "linux") {
        format!("ulimit -v {MEMORY_KIB} && exec \"$0\" \"$@\"")
    } else {
        "exec \"$0\" \"$@\"".into()
    };
    let output = Command::new("sh")
        .args(["-c", &limited])
        .arg(std::env::current_exe().expect("this program"))
        .args(["--exact", name, "--include-ignored", "--nocapture", "--test-threads", "1"])
        .env(INNER, "1")
        .stdin(Stdio::null())
        .output()
        .expect("a shell");
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
        let cases: Vec<&str> = text.lines().filter(|line| line.starts_with("case ")).collect();
        // The last case that began is the one that ended the process, if it did not end by itself.
        let rest: Vec<&str> = text.lines().filter(|line| !line.starts_with("case ")).collect();
        panic!("{}, last begun: {:?}\n{}", output.status, cases.last(), rest.join("\n"));
    }
}

fn run_here(cases: std::ops::Range<usize>) {
    let whole = [Folder::new("tiny-pr-moe"), Folder::new("tiny-dense")];
    for folder in &whole {
        folder.generate().expect("the undamaged folder works");
    }
    let current = Arc::new(AtomicUsize::new(cases.start));
    watch(current.clone());
    let (mut failed, mut outcomes) = (Vec::new(), BTreeMap::new());
    for case in cases {
        current.store(case, Ordering::SeqCst);
        let mut rng = CounterRng::new(0xdab, case as u64);
        let mut folder = whole[usize::from(case % 3 == 0)].clone();
        let damage = folder.damage(&mut rng);
        eprintln!("case {case}: {damage}");
        match catch_unwind(AssertUnwindSafe(|| folder.generate())) {
            Ok(Err(Error::EnginePanic(what))) => failed.push(format!("{case}, {damage}: the engine: {what}")),
            Ok(result) => *outcomes.entry(kind(&result)).or_insert(0) += 1,
            Err(_) => failed.push(format!("{case}, {damage}: a panic")),
        }
    }
    println!("{outcomes:?}");
    assert!(failed.is_empty(), "{} cases failed:\n{}", failed.len(), failed.join("\n"));
    assert!(outcomes.contains_key("answer") && outcomes.len() > 2, "the damage is of many kinds: {outcomes:?}");
}

/// Ends the process if one case takes too long.
fn watch(current: Arc<AtomicUsize>) {
    std::thread::spawn(move || {
        loop {
            let before = current.load(Ordering::SeqCst);
            std::thread::sleep(CASE_LIMIT);
            if current.load(Ordering::SeqCst) == before {
                eprintln!("case {before} takes more than {CASE_LIMIT:?}");
                std::process::abort();
            }
        }
    });
}

fn kind(result: &Result<()>) -> String {
    match result {
        Ok(()) => "answer".into(),
        Err(error) => format!("{error:?}").split([' ', '(', '{']).next().unwrap_or_default().into(),
    }
}

/// Files by name.
#[derive(Clone)]
struct Folder(BTreeMap<&'static str, Vec<u8>>);

const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

impl Folder {
    /// Of a tiny model; one with experts has an index, which one file does not need.
    fn new(preset: &str) -> Self {
        let mut config = GptConfig::preset(preset).expect("a preset");
        let has_index = config.moe.is_some();
        (config.vocab_size, config.d_model, config.d_ff, config.num_heads) = (320, 8, 8, 2);
        config.max_seq_len = 32;
        let dir = tempfile::tempdir().expect("a folder");
        Gpt::new(config, 1, &Device::Cpu).expect("valid").save(dir.path(), DType::BF16).expect("saves");
        tokenizer().save(dir.path().join("tokenizer.json"), true).expect("saves");
        let read = |name| (name, std::fs::read(dir.path().join(name)).expect(name));
        let mut files = BTreeMap::from(["config.json", WEIGHTS, "tokenizer.json"].map(read));
        if has_index {
            let (header, _) = header(&files[WEIGHTS]).expect("a header");
            let names = header.as_object().expect("an object").keys().filter(|name| *name != "__metadata__");
            let map: BTreeMap<&String, &str> = names.map(|name| (name, WEIGHTS)).collect();
            files.insert(INDEX, json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string().into());
        }
        let chat = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}";
        let config =
            json!({"bos_token": "<|endoftext|>", "eos_token": {"content": "<|endoftext|>"}, "chat_template": chat});
        files.insert("tokenizer_config.json", config.to_string().into());
        let generation = json!({"do_sample": true, "temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.01,
            "repetition_penalty": 1.1, "max_length": 30, "max_new_tokens": 4, "min_new_tokens": 1, "bos_token_id": 0,
            "eos_token_id": [0, 5], "suppress_tokens": [7], "stop_strings": ["END"]});
        files.insert("generation_config.json", generation.to_string().into());
        Self(files)
    }

    /// Damages one file, sometimes two; says how.
    fn damage(&mut self, rng: &mut CounterRng) -> String {
        let times = 1 + rng.below(4) / 3;
        let how: Vec<String> = (0..times)
            .map(|_| {
                let names: Vec<&'static str> = self.0.keys().copied().collect();
                let name = names[below(rng, names.len())];
                let how = match self.0.get_mut(name) {
                    Some(bytes) => damage_file(rng, name, bytes),
                    None => None,
                };
                if how.is_none() {
                    self.0.remove(name);
                }
                format!("{name} {}", how.unwrap_or("removed"))
            })
            .collect();
        how.join(" and ")
    }

    /// Loads the folder and generates a few tokens, after a message and after a plain prompt.
    fn generate(&self) -> Result<()> {
        let dir = tempfile::tempdir().expect("a folder");
        for (name, bytes) in &self.0 {
            std::fs::write(dir.path().join(name), bytes).expect("writes");
        }
        generate_from(dir.path())
    }
}

fn generate_from(dir: &Path) -> Result<()> {
    let model = ServedModel::load(dir, None, Precision::F32)?;
    let d = &model.defaults;
    let sampling = d.sampling.clone();
    let mut prompts = Vec::new();
    for text in [model.chat_prompt("how are you?")?, "the cat sat on the mat".to_owned(), "\u{1f980}".to_owned()] {
        let ids = model.tokenizer.encode(&text)?;
        let first = model.first_token().filter(|_| ids.is_empty());
        let ids: Vec<u32> = first.into_iter().chain(ids).take(model.lm.max_seq_len().saturating_sub(1)).collect();
        prompts.extend((!ids.is_empty()).then_some(ids));
    }
    if prompts.is_empty() {
        return Ok(());
    }
    let max_tokens = d.max_new_tokens.or(d.max_length).unwrap_or(4).min(6);
    let stop = StopParams { max_tokens, min_tokens: d.min_new_tokens, ..StopParams::default() };
    let (logprobs, prompt_logprobs) = (Some(3), Some(2));
    let job = Job { prompts, n: 2, sampling, stop, logprobs, prompt_logprobs, experts: true, ..Job::default() };
    let options = TextOptions { stops: d.stop_strings.clone(), min_tokens: d.min_new_tokens, ..TextOptions::default() };
    let (listener, mut events) = TextListener::new(model.tokenizer.clone(), options);
    let engine = Engine::start(model.lm.clone(), EngineConfig { max_queue: 1, ..model.engine_config() }, Arc::new(()))?;
    engine.submit(job, Box::new(listener), events.cancel_flag())?;
    loop {
        if let Event::Done(result) = events.blocking_next() {
            return result;
        }
    }
}

fn below(rng: &mut CounterRng, bound: usize) -> usize {
    rng.below(u32::try_from(bound).expect("small files")) as usize
}

/// `None`: the file is to be removed.
fn damage_file(rng: &mut CounterRng, name: &str, bytes: &mut Vec<u8>) -> Option<&'static str> {
    // A safetensors file begins with the length of its header; most damage to the rest only changes weights.
    let reach = if name == WEIGHTS && rng.below(4) > 0 { bytes.len().min(12_000) } else { bytes.len() };
    let (at, len) = (below(rng, reach), 1 + below(rng, 200));
    let end = (at + len).min(bytes.len());
    Some(match rng.below(16) {
        0 => return None,
        1 => {
            for _ in 0..1 + rng.below(8) {
                let at = below(rng, reach);
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << rng.below(8);
                }
            }
            "with flipped bits"
        }
        2 => {
            bytes.truncate(at);
            "cut off"
        }
        3 => {
            let slice = bytes[at..end].to_vec();
            let to = below(rng, bytes.len());
            bytes.splice(to..to, slice);
            "with a slice twice"
        }
        4 => {
            bytes.drain(at..end);
            "without a slice"
        }
        5 => {
            let number = HUGE[below(rng, HUGE.len())].to_le_bytes();
            let at = if rng.below(2) == 0 { 0 } else { at };
            bytes.iter_mut().skip(at).zip(number).for_each(|(byte, new)| *byte = new);
            "with another number at its head or inside"
        }
        kind => {
            let parsed =
                if name == WEIGHTS { header(bytes) } else { serde_json::from_slice(bytes).ok().map(|j| (j, &[][..])) };
            let Some((mut json, rest)) = parsed else { return Some("left damaged") };
            let how = damage_json(rng, kind, &mut json);
            let text = json.to_string().into_bytes();
            *bytes =
                if name == WEIGHTS { [&(text.len() as u64).to_le_bytes(), &text[..], rest].concat() } else { text };
            how
        }
    })
}

const HUGE: [u64; 9] = [0, 1, 1 << 24, 1 << 31, u32::MAX as u64, 1 << 40, 1 << 53, 1 << 63, u64::MAX];

/// The header of a safetensors file, and what follows it.
fn header(bytes: &[u8]) -> Option<(Value, &[u8])> {
    let len = u64::from_le_bytes(bytes.first_chunk().copied()?);
    let (json, rest) = bytes[8..].split_at_checked(usize::try_from(len).ok()?)?;
    Some((serde_json::from_slice(json).ok()?, rest))
}

fn damage_json(rng: &mut CounterRng, kind: u32, json: &mut Value) -> &'static str {
    let numbers_only = (6..=11).contains(&kind);
    let wanted = |value: &Value| !numbers_only || value.is_number();
    let count = count(json, &wanted);
    if count == 0 {
        return "left as it is";
    }
    let mut index = below(rng, count);
    let Some(value) = nth(json, &mut index, &wanted) else { return "left as it is" };
    match (kind, value) {
        (6..=11, value) => {
            let numbers =
                [json!(-1), json!(0.5), json!(-1e308), json!(1e308), json!(1e-308), json!("NaN"), Value::Null];
            let number = below(rng, HUGE.len() + numbers.len());
            *value = numbers.get(number).cloned().unwrap_or_else(|| json!(HUGE[number - numbers.len()]));
            "with another number"
        }
        (12..=13, Value::Object(map)) => {
            let at = below(rng, map.len());
            if let Some(key) = map.keys().nth(at).cloned() {
                map.shift_remove(&key);
            }
            "without a key"
        }
        (12..=13, Value::Array(list)) => {
            if !list.is_empty() {
                list.remove(below(rng, list.len()));
            }
            "without an element"
        }
        (14, Value::Array(list)) => {
            let twice = list.clone();
            list.extend(twice);
            "with a list twice"
        }
        (_, value) => {
            let others =
                [json!([]), json!({}), json!(""), json!("a"), json!(true), Value::Null, json!([[[]]]), json!(7)];
            *value = others[below(rng, others.len())].clone();
            "with a value of another kind"
        }
    }
}

fn count(json: &Value, wanted: &impl Fn(&Value) -> bool) -> usize {
    let inside: usize = match json {
        Value::Array(list) => list.iter().map(|v| count(v, wanted)).sum(),
        Value::Object(map) => map.values().map(|v| count(v, wanted)).sum(),
        _ => 0,
    };
    inside + usize::from(wanted(json))
}

/// The value that `index` counts down to.
fn nth<'a>(json: &'a mut Value, index: &mut usize, wanted: &impl Fn(&Value) -> bool) -> Option<&'a mut Value> {
    if wanted(json) {
        if *index == 0 {
            return Some(json);
        }
        *index -= 1;
    }
    match json {
        Value::Array(list) => list.iter_mut().find_map(|v| nth(v, index, wanted)),
        Value::Object(map) => map.values_mut().find_map(|v| nth(v, index, wanted)),
        _ => None,
    }
}
