//! `moe-eval`: how good a model is, on text and on zero-shot tasks. Reads arguments and prints; everything else is
//! `moe_compress::eval`.

mod args;
mod progress;
mod table;

use anyhow::{Context, Result};
use args::{Args, TaskItems};
use clap::Parser;
use moe_compress::eval::{Report, RequestEncoder, TaskModel, TextOptions, TextReport, evaluate_text};
use moe_models::cli::exit_code;
use moe_models::{CausalLm, Decoder, ModelSource};
use progress::Progress;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args = Args::parse();
    exit_code(|| run(&args))
}

fn run(args: &Args) -> Result<()> {
    // What is wrong with arguments and items shows before the first slow step.
    let tasks = args.tasks()?;
    args.check_json()?;
    let source = ModelSource::open(&args.model)?;
    let lm = Decoder::from_source(&source, moe_models::Precision::from(args.precision))?;
    let max_length = args.max_length_of(lm.max_seq_len())?;
    let encoder = encoder(&source, &lm, &tasks, max_length)?;
    let text = args.evaluates_text().then(|| text(args, &source, &lm, max_length)).transpose()?;
    let mut report = Report {
        model: args.model.display().to_string(),
        precision: args.precision_name(),
        max_length,
        text,
        tasks: Vec::new(),
    };
    report.text.iter().for_each(table::print_text);
    write(args, &report)?;
    match encoder {
        Some(encoder) => run_tasks(args, &TaskModel { lm: &lm, encoder: &encoder }, &tasks, &mut report),
        None => Ok(()),
    }
}

/// For the tasks, if there are any, all of whose items can be put to the model.
fn encoder(
    source: &ModelSource,
    lm: &Decoder,
    tasks: &[TaskItems],
    max_length: usize,
) -> Result<Option<RequestEncoder>> {
    if tasks.is_empty() {
        return Ok(None);
    }
    let encoder = RequestEncoder::new(source.tokenizer()?, lm.config(), max_length)?;
    for (task, items) in tasks {
        task.encode(items, &encoder)?;
    }
    Ok(Some(encoder))
}

/// What there is so far: what comes next may take long, and fail.
fn write(args: &Args, report: &Report) -> Result<()> {
    args.json.as_ref().map_or(Ok(()), |path| report.write(path).context("--json"))
}

fn text(args: &Args, source: &ModelSource, lm: &Decoder, seq_len: usize) -> Result<TextReport> {
    let tokenizer = source.tokenizer()?;
    let options = TextOptions { paths: args.text.clone(), seq_len, max_tokens: args.max_tokens };
    Ok(evaluate_text(lm, &tokenizer, &options, &mut Progress::default())?)
}

/// Puts each task to the model and prints its rows at once: the next may take long.
fn run_tasks(args: &Args, model: &TaskModel<'_>, tasks: &[TaskItems], report: &mut Report) -> Result<()> {
    table::print_task_head(args.limit);
    for (task, items) in tasks {
        let mut progress = Progress::default();
        let scored = task.evaluate(items, model, &mut |done, total| progress.requests(task.name, done, total))?;
        table::print_task(&scored);
        report.tasks.push(scored);
        write(args, report)?;
    }
    Ok(())
}
