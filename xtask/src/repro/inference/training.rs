//! Training a MoE beside the dense model of its quality: the paper's table 3.

use super::claims::{Claim, digits};
use super::data::{Data, Training};
use super::models::{DENSE, MOE, Model};
use super::place::Place;
use crate::shell;
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::fmt::Write as _;
use std::path::Path;
use std::process::Command;

/// Samples a second on 128 GPUs: dense, MoE.
///
/// # Source
/// Paper table 3.
const TABLE_3: [f64; 2] = [70.0, 372.0];

const SEQ_LENGTH: usize = 256;
/// Steps that do not count: the first ones make buffers.
const WARM_UP: u64 = 2;

struct Job {
    experts: usize,
    sequences: usize,
    steps: u64,
}

impl Job {
    fn of(place: &Place) -> Self {
        if place.size.smoke {
            return Self { experts: 4, sequences: 8, steps: WARM_UP + 2 };
        }
        Self { experts: 16, sequences: 32, steps: WARM_UP + 6 }
    }
}

pub(super) fn run(place: &Place) -> Result<Vec<Training>> {
    [&MOE, &DENSE].into_iter().map(|model| train(place, model)).collect()
}

fn train(place: &Place, model: &Model) -> Result<Training> {
    let Job { experts, sequences, steps } = Job::of(place);
    let out = place.run_folder(&format!("train-{}", model.name));
    let mut config = model.config(place.size.narrow);
    let has_experts = config.get("moe").is_some();
    if has_experts {
        config["moe"]["num_experts"] = vec![experts; model.layers / 2].into();
    }
    let file = place.run_folder(&format!("train-{}.json", model.name));
    std::fs::write(&file, config.to_string())?;
    let tokens = steps * (sequences * SEQ_LENGTH) as u64;
    let mut program = Command::new(place.program("moe-train"));
    program.arg("--model-config").arg(file).arg("--out").arg(&out);
    program.arg("--data-cache").arg(place.run_folder("data-cache"));
    for (flag, value) in [
        ("--seq-length", SEQ_LENGTH.to_string()),
        ("--micro-batch-size", "8".into()),
        ("--global-batch-size", sequences.to_string()),
        ("--train-tokens", tokens.to_string()),
        ("--tokenizer", place.tokenizer()?.display().to_string()),
        ("--log-interval", "1".into()),
        ("--eval-interval", "1000".into()),
        ("--eval-iters", "1".into()),
        ("--save-interval", "1000".into()),
    ] {
        program.args([flag, &value]);
    }
    shell::output(&mut program)?;
    measure(&out, model, has_experts.then_some(experts), sequences)
}

/// What a run has written down.
fn measure(out: &Path, model: &Model, experts: Option<usize>, sequences: usize) -> Result<Training> {
    let read = |name: &str| {
        let path = out.join(name);
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let summary: Value = serde_json::from_str(&read("model_summary.json")?)?;
    let count = |key: &str| summary[key].as_f64().with_context(|| format!("model_summary.json has no {key}"));
    let records = read("metrics.jsonl")?.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
    let counts = |record: &&Value| record["step"].as_u64().is_some_and(|step| step > WARM_UP);
    let rates = records.iter().filter(counts).filter_map(|record| record["train/tokens_per_second"].as_f64());
    let mut rates: Vec<f64> = rates.collect();
    ensure!(!rates.is_empty(), "{} has no step after {WARM_UP}", out.display());
    rates.sort_by(f64::total_cmp);
    Ok(Training {
        model: model.name.into(),
        experts,
        parameters: count("total_parameters")?,
        active_parameters: count("active_parameters")?,
        sequences,
        seq_length: SEQ_LENGTH,
        steps: rates.len(),
        tokens_per_second: rates[rates.len() / 2],
    })
}

fn find<'a>(data: &'a Data, model: &Model) -> Option<&'a Training> {
    data.training.iter().find(|training| training.model == model.name)
}

pub(super) fn section(data: &Data) -> String {
    let [dense, moe] = TABLE_3;
    let mut text = format!(
        "\n## Training (table 3)\n\nThe paper, on 128 GPUs: {} {dense} samples/s, {} {moe} samples/s. Here: the same layers at 1/{} of \
         the width on one process of {} threads, with fewer experts, as a step has thousands of tokens instead of a million, and \
         AdamW's work on each expert does not shrink with them; medians of the steps that count.\n\n\
         | model | experts of a layer | parameters, M | of a token, M | sequences x length | steps | tokens/s | samples/s |\n\
         |---|---|---|---|---|---|---|---|\n",
        DENSE.published, MOE.published, data.narrow, data.cores,
    );
    for row in &data.training {
        let _ = writeln!(
            text,
            "| {} | {} | {:.1} | {:.2} | {} x {} | {} | {:.0} | {} |",
            row.model,
            row.experts.map_or("-".into(), |experts| experts.to_string()),
            row.parameters / 1e6,
            row.active_parameters / 1e6,
            row.sequences,
            row.seq_length,
            row.steps,
            row.tokens_per_second,
            digits(row.samples()),
        );
    }
    text
}

/// What the paper says about this.
pub(super) fn claims(data: &Data) -> Vec<Claim> {
    let gain = find(data, &MOE).zip(find(data, &DENSE)).map(|(moe, dense)| moe.samples() / dense.samples());
    let [dense, moe] = TABLE_3;
    vec![Claim {
        says: "the MoE trains at least 5 times as many samples/s as the dense model of its quality".into(),
        published: format!("{:.2}x", moe / dense),
        here: gain.map_or("-".into(), |gain| format!("{}x", digits(gain))),
        shows: gain.map(|gain| ("here".into(), Some(gain >= 5.0))).into_iter().collect(),
    }]
}

#[cfg(test)]
mod tests {
    use super::super::claims::tests::verdicts;
    use super::super::data::tests::data;
    use super::*;

    #[test]
    fn a_run_is_its_steps_after_the_first() {
        let dir = std::env::temp_dir().join(format!("repro-training-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let write = |rates: &[f64]| {
            let line = |(step, rate): (usize, &f64)| {
                format!("{{\"step\": {}, \"train/tokens_per_second\": {rate}}}\n", step + 1)
            };
            let lines: String = rates.iter().enumerate().map(line).collect();
            std::fs::write(dir.join("metrics.jsonl"), lines).unwrap();
        };
        let summary = r#"{"total_parameters": 2000000, "active_parameters": 1000000}"#;
        std::fs::write(dir.join("model_summary.json"), summary).unwrap();
        write(&[1.0, 1.0, 2560.0, 512.0, 5120.0]);
        let moe = measure(&dir, &MOE, Some(4), 8).unwrap();
        assert_eq!((moe.steps, moe.samples()), (3, 10.0));
        write(&[1.0, 1.0, 256.0]);
        let dense = measure(&dir, &DENSE, None, 8).unwrap();
        write(&[1.0, 1.0]);
        assert!(measure(&dir, &DENSE, None, 8).unwrap_err().to_string().contains("no step after 2"));
        std::fs::remove_dir_all(&dir).unwrap();

        let mut all = data(Vec::new());
        assert_eq!(verdicts(&claims(&all)), "?");
        all.training = vec![moe, dense];
        assert!(section(&all).contains("| MoE-128 | 4 | 2.0 | 1.00 | 8 x 256 | 3 | 2560 | 10.0 |"));
        assert_eq!((claims(&all)[0].here.as_str(), verdicts(&claims(&all)).as_str()), ("10.0x", "+"));
        all.training[0].tokens_per_second /= 2.1;
        assert_eq!(verdicts(&claims(&all)), "-");
    }
}
