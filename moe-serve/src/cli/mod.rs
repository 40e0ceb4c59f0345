//! The command line: `moe-serve`, `moe-serve generate`, `moe-generate`.

mod bench;
mod engine;
mod generate;
mod load;
mod ranks;
mod serve;

pub use bench::BenchCommand;
pub use engine::EngineArgs;
pub use generate::GenerateArgs;
pub use load::ModelArgs;
pub use serve::ServeArgs;

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// Serves a mixture-of-experts language model over an OpenAI-compatible API, with a page at `/`.
///
/// Without arguments it serves the built-in model on 127.0.0.1:8000.
#[derive(Debug, Parser)]
#[command(name = "moe-serve", version, args_conflicts_with_subcommands = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    serve: ServeArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Continues a prompt in the terminal.
    Generate(GenerateArgs),
    /// Measures how fast a model is served.
    #[command(subcommand)]
    Bench(BenchCommand),
}

impl Cli {
    /// Logs as [`init_logging`] does; what listens to the process's spans itself logs when it runs.
    pub fn init_logging(&self) {
        let listens = matches!(&self.command, Some(Command::Bench(command)) if command.listens());
        if !listens {
            init_logging();
        }
    }

    /// Does what was asked.
    ///
    /// # Errors
    /// Whatever stopped it, with what was being done.
    pub fn run(self) -> anyhow::Result<()> {
        match self.command {
            Some(Command::Generate(args)) => args.run(),
            Some(Command::Bench(command)) => command.run(),
            None => self.serve.run(),
        }
    }
}

/// Logs to the terminal's error stream; `RUST_LOG` sets what.
pub fn init_logging() {
    tracing_subscriber::fmt().with_env_filter(log_filter()).with_writer(std::io::stderr).init();
}

/// What is logged: `RUST_LOG`, or else warnings and what the server tells.
fn log_filter() -> EnvFilter {
    EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn,moe_serve=info"))
}

/// Success, or the error on one line of the terminal's error stream.
pub fn exit_code(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
