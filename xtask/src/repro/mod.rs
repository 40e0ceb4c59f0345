//! `cargo xtask repro`: the paper's claims, at a size for two cores.

mod inference;
mod quality;
mod sizes;

use anyhow::Result;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// What is rebuilt.
    #[command(subcommand)]
    what: What,
}

#[derive(clap::Subcommand)]
enum What {
    /// The claims about serving, over emulated hosts: what the formulation, the kinds of models and the routes are worth; as root.
    Inference(inference::Args),
    /// The claims about quality: trains what is missing, and reports.
    Quality(quality::Args),
    /// The claims about size: models counted, and small ones measured in files.
    Sizes(sizes::Args),
}

pub(crate) fn run(args: &Args) -> Result<()> {
    match &args.what {
        What::Inference(args) => inference::run(args),
        What::Quality(args) => quality::run(args),
        What::Sizes(args) => sizes::run(args),
    }
}
