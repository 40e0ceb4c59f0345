//! `moe-eval`: how good a model folder is, on text and on zero-shot tasks. Reads arguments and prints; everything else is
//! `moe_compress::eval`.

mod args;
mod progress;
mod table;

use anyhow::{Context, Result};
use args::Args;
use candle_core::Device;
use clap::Parser;
use moe_compress::eval::{Report, RequestEncoder, Task, TaskModel, TextOptions, TextReport, evaluate_text};
use moe_kernels::select;
use moe_models::families::{Family, ReadFamily};
use moe_models::train::tokenizer;
use moe_models::{CausalLm, Decoder, Model};
use progress::Progress;
use std::process::ExitCode;

fn main() -> ExitCode {
    match choose_kernels().and_then(|()| run(&Args::parse())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Forces the kernels that the environment names, if it names any.
fn choose_kernels() -> Result<()> {
    match std::env::var(select::ENV) {
        Ok(name) => Ok(select::force(name.parse()?)?),
        Err(_) => Ok(()),
    }
}

fn run(args: &Args) -> Result<()> {
    // What is wrong with arguments and files shows before the first slow step.
    let tasks = args.tasks()?;
    let config = args.model.join("config.json");
    let max_length = args.max_length_of(<Box<dyn Family>>::read_file(&config)?.decoder()?.max_seq_len)?;
    let text = args.evaluates_text().then(|| text(args, max_length)).transpose()?;
    let mut report = Report {
        model: args.model.display().to_string(),
        precision: args.precision_name(),
        max_length,
        text,
        tasks: Vec::new(),
    };
    report.text.iter().for_each(table::print_text);
    if !tasks.is_empty() {
        run_tasks(args, &tasks, &mut report)?;
    }
    if let Some(path) = &args.json {
        report.write(path).context("--json")?;
    }
    Ok(())
}

fn text(args: &Args, seq_len: usize) -> Result<TextReport> {
    let model = Model::<Box<dyn Family>>::load(&args.model, &Device::Cpu)?.with_precision(args.precision.into())?;
    let tokenizer = tokenizer::load(&args.model.join("tokenizer.json"))?;
    let options = TextOptions { paths: args.text.clone(), seq_len, max_tokens: args.max_tokens };
    Ok(evaluate_text(&model, &tokenizer, &options, &mut Progress::default())?)
}

/// Puts each task to the model and prints its rows at once: the next may take long.
fn run_tasks(args: &Args, tasks: &[(&Task, Vec<moe_compress::eval::Item>)], report: &mut Report) -> Result<()> {
    let lm = Decoder::load(&args.model, moe_models::Precision::from(args.precision))?;
    let tokenizer = tokenizer::load(&args.model.join("tokenizer.json"))?;
    let encoder = RequestEncoder::new(tokenizer, lm.vocab_size(), report.max_length)?;
    let model = TaskModel { lm: &lm, encoder: &encoder };
    table::print_task_head(args.limit);
    for (task, items) in tasks {
        let mut progress = Progress::default();
        let scored = task.evaluate(items, &model, &mut |done, total| progress.requests(task.name, done, total))?;
        table::print_task(&scored);
        report.tasks.push(scored);
    }
    Ok(())
}
