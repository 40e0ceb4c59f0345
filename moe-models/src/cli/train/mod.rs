//! Command-line programs that train: arguments, ranks, progress, signals and restarts. What is trained is a [`Recipe`]'s matter.

mod args;
mod evaluate;
mod layout;
mod model_args;
mod progress;
mod rank_args;
mod recipe;
mod restart;
mod run;
mod signals;

pub use args::{EXIT_STATUS, TrainArgs};
pub use model_args::ModelArgs;
pub use recipe::{Plain, Recipe, STUDENT_RECORD};

use crate::train::export;
use anyhow::Result;
use progress::Progress;
use signals::Signals;
use std::process::ExitCode;

/// Runs a program whose `recipe` is made once the kernels are chosen; an error is told on stderr.
pub fn main<R: Recipe>(args: &TrainArgs, recipe: impl FnOnce() -> Result<R>) -> ExitCode {
    super::exit_code(|| run(args, &recipe()?))
}

fn run<R: Recipe>(args: &TrainArgs, recipe: &R) -> Result<()> {
    if let Some(folder) = &args.evaluate {
        let config = args.apply_to(run::base_config(args, None)?);
        return evaluate::evaluate_folder(folder, &config, &mut Progress::new(config.log_interval));
    }
    if let Some(target) = &args.export {
        export::check_target(target)?;
    }
    let signals = Signals::listen()?;
    restart::run(args, recipe, &signals)
}
