//! Ranks that are threads of this process: the reference engine, with no dependency, for tests and for embedding.
//!
//! Messages move without a copy. On [`Clock::Virtual`] one rank runs at a time and time passes only while all wait: waiting
//! costs nothing, and with a [`FaultPlan`] a run is a function of its seed.

mod plan;
mod world;

pub use plan::{FaultPlan, Injection, Moment};
pub use world::{Clock, ThreadWorld};
