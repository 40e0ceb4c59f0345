//! `cargo xtask golden`: regenerates the fixtures that PyTorch and transformers make.

use crate::shell::{self, command, root};
use anyhow::Result;

/// Each script writes its fixtures beside itself.
const SCRIPTS: &[&str] = &[
    "moe-core/tests/fixtures/make.py",
    "moe-kernels/tests/fixtures/make.py",
    "moe-models/tests/fixtures/make.py",
    "moe-models/tests/fixtures/deepspeed/make.py",
    "moe-compress/tests/fixtures/gptq/make.py",
    "moe-serve/tests/fixtures/chat_templates/make.py",
];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// A Python that has the packages of `xtask/golden/requirements.txt`; without it a virtual environment is made.
    #[arg(long, value_name = "PYTHON")]
    python: Option<String>,
}

fn run_scripts(python: &str) -> Result<()> {
    SCRIPTS.iter().try_for_each(|script| shell::run(&mut command(python, &[script])))
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if let Some(python) = &args.python {
        return run_scripts(python);
    }
    let venv = root().join("target/golden-venv");
    let python = venv.join("bin/python").to_string_lossy().into_owned();
    shell::run(&mut command("python3", &["-m", "venv", &venv.to_string_lossy()]))?;
    shell::run(&mut command(&python, &["-m", "pip", "install", "--requirement", "xtask/golden/requirements.txt"]))?;
    run_scripts(&python)
}
