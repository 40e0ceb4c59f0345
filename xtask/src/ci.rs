//! `cargo xtask test` and `cargo xtask ci`.

use crate::shell::{self, cargo};
use anyhow::Result;

/// Unit, integration and documentation tests of the whole workspace.
pub(crate) fn test() -> Result<()> {
    shell::run(&mut cargo(&["test", "--workspace"]))
}

/// Format, lints with warnings as errors, documentation, and the tests unless they are left out.
pub(crate) fn run(skip_tests: bool) -> Result<()> {
    shell::run(&mut cargo(&["fmt", "--all", "--check"]))?;
    shell::run(&mut cargo(&["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    shell::run(cargo(&["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"))?;
    if skip_tests { Ok(()) } else { test() }
}
