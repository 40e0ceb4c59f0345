//! How the ranks of a run are found and laid out. Reads no environment itself and starts nothing: a binary hands it the variables,
//! and builds what it says.

mod choose;
mod cost;
#[cfg(test)]
mod tests;
mod variables;

pub use choose::{LayoutRequest, choose};
pub use cost::{LayoutCost, LevelBytes, MemoryBytes, RankCost, RunSize, TrafficBytes};
pub use variables::{Launched, Launcher, find};
