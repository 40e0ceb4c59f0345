//! `moe-train`: trains a model of the paper's GPT family on text files. Reads arguments and shows progress; everything
//! else is `moe_models::train`.

mod allocator;
mod args;
mod evaluate;
mod layout;
mod model_args;
mod progress;
mod rank_args;
mod restart;
mod run;
mod signals;
mod world;

use anyhow::Result;
use args::Args;
use clap::Parser;
use moe_kernels::select;
use moe_models::train::export;
use progress::Progress;
use signals::Signals;
use std::process::ExitCode;

fn main() -> ExitCode {
    allocator::keep_freed_memory();
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
    if let Some(folder) = &args.evaluate {
        let config = args.apply_to(run::base_config(args, None)?);
        return evaluate::evaluate_folder(folder, &config, &mut Progress::new(config.log_interval));
    }
    if let Some(target) = &args.export {
        export::check_target(target)?;
    }
    let signals = Signals::listen()?;
    restart::run(args, &signals)
}
