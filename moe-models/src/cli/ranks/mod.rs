//! Ranks of a program: their arguments, and how they find each other.

mod args;
mod world;

pub use args::RankArgs;
pub(crate) use args::no_effect;
pub use world::{Process, Seat, World};
