//! Configurations of published models by name, each the `config.json` of that size.

use anyhow::{Context, Result};

macro_rules! presets {
    ($($name:literal),* $(,)?) => {
        &[$(($name, include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/presets/", $name, ".json")))),*]
    };
}

const PRESETS: &[(&str, &str)] = presets!(
    "mixtral-8x7b",
    "olmoe-1b-7b",
    "qwen1.5-moe-a2.7b",
    "qwen3-30b-a3b",
    "qwen3-moe-1.8b",
    "deepseek-v2-lite",
);

/// All of them.
pub(super) fn names() -> impl Iterator<Item = &'static str> {
    PRESETS.iter().map(|(name, _)| *name)
}

/// The `config.json` of one of them.
pub(super) fn json(name: &str) -> Result<&'static str> {
    let found = PRESETS.iter().find(|(known, _)| *known == name).map(|(_, json)| *json);
    found.with_context(|| {
        let known: Vec<&str> = names().collect();
        format!("--preset {name:?} is not one of {}; name another, or give a --config", known.join(", "))
    })
}
