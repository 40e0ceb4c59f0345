//! `cargo xtask bench`: runs the benches of the crates and keeps what they print with machine, commit and command.

use crate::shell::{cargo, command, output, root};
use anyhow::Result;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folder that gets `bench.txt`.
    #[arg(long, default_value = "runs/bench")]
    out: PathBuf,
}

fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, m)| m.trim().to_owned()));
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{}, {cores} cores", model.unwrap_or_else(|| "unknown processor".into()))
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let commit = output(&mut command("git", &["describe", "--always", "--dirty"]))?;
    let compiler = output(&mut command("rustc", &["--version"]))?;
    let table = output(&mut cargo(&["bench", "--quiet", "--package", "moe-models", "--bench", "layers"]))?;
    let report = format!(
        "machine: {}\ncommit: {}\ncompiler: {}\ncommand: cargo xtask bench\n\n{table}",
        processor(),
        commit.trim(),
        compiler.trim()
    );
    print!("{report}");
    let out = root().join(&args.out);
    std::fs::create_dir_all(&out)?;
    std::fs::write(out.join("bench.txt"), report)?;
    println!("\nkept in {}", out.join("bench.txt").display());
    Ok(())
}
