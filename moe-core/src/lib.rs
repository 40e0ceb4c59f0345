//! MoE layers.
mod error;
pub use error::{Error, Result};
/// Marks a choice that was dropped for lack of capacity in `expert_ids`.
pub const DROPPED: u32 = u32::MAX;
