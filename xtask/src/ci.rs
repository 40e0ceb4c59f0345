//! `cargo xtask test` and `cargo xtask ci`.

use crate::{
    api,
    shell::{self, cargo},
};
use anyhow::Result;

/// Unit, integration and documentation tests of the whole workspace.
pub(crate) fn test() -> Result<()> {
    shell::run(&mut cargo(&["test", "--workspace"]))
}

/// Features that need nothing of the system, each by itself. Those of MPI are linted by `.ci/run`.
const FEATURES: [(&str, &str); 5] = [
    ("moe-core", ""),
    ("moe-core", "x86-v4"),
    ("moe-core", "testing"),
    ("moe-parallel", "testing"),
    ("moe-parallel", "nccl"),
];

/// Format, lints with warnings as errors, features one by one, documentation, public interfaces, and the tests unless they are left
/// out.
pub(crate) fn run(skip_tests: bool) -> Result<()> {
    shell::run(&mut cargo(&["fmt", "--all", "--check"]))?;
    shell::run(&mut cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    for (package, feature) in FEATURES {
        let lint =
            ["clippy", "--package", package, "--no-default-features", "--features", feature, "--", "-D", "warnings"];
        shell::run(&mut cargo(&lint))?;
    }
    api::document()?;
    api::check()?;
    if skip_tests { Ok(()) } else { test() }
}
