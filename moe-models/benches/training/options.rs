//! The command line: words that choose parts and rows, and settings.

use crate::models::SIZES;
use crate::rows::Row;
use anyhow::{Context, Result, bail, ensure};

/// The part that measures more and more experts.
pub(crate) const GROWTH: &str = "growth";
/// Set for the process that measures one row: the model's name and the row's follow.
pub(crate) const HERE: &str = "--here";

pub(crate) struct Options {
    pub(crate) words: Vec<String>,
    /// Steps that count, after one that does not.
    pub(crate) steps: usize,
    /// Print a line of JSON for each row too.
    pub(crate) json: bool,
    /// Measure one row in this process.
    pub(crate) here: bool,
}

impl Options {
    pub(crate) fn read() -> Result<Self> {
        let mut options = Self { words: Vec::new(), steps: 4, json: false, here: false };
        let mut arguments = std::env::args().skip(1);
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--json" => options.json = true,
                HERE => options.here = true,
                // From cargo.
                "--bench" => (),
                "--steps" => {
                    let steps = arguments.next().context("--steps needs a number")?;
                    options.steps = steps.parse().with_context(|| format!("--steps needs a number, got {steps}"))?;
                }
                _ => options.words.push(argument),
            }
        }
        ensure!(options.steps >= 1, "--steps must be at least 1");
        if !options.here {
            options.check_words()?;
        }
        Ok(options)
    }

    fn check_words(&self) -> Result<()> {
        let mut known = Self::parts();
        for name in Row::all().iter().flat_map(Row::names) {
            if !known.contains(&name) {
                known.push(name);
            }
        }
        match self.words.iter().find(|word| !known.contains(&word.as_str())) {
            Some(word) => bail!("{word:?} is none of {}, --steps and --json", known.join(", ")),
            None => Ok(()),
        }
    }

    fn parts() -> Vec<&'static str> {
        SIZES.into_iter().chain([GROWTH]).collect()
    }

    /// The parts that the words name, or all of them.
    pub(crate) fn chosen_parts(&self) -> Vec<&'static str> {
        let is_named = |part: &&str| self.words.iter().any(|word| word == part);
        let named: Vec<_> = Self::parts().into_iter().filter(is_named).collect();
        if named.is_empty() { Self::parts() } else { named }
    }
}
