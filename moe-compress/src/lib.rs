//! Smaller mixture-of-experts language models, and how good they are: Mixture-of-Students by staged distillation, experts pruned
//! and merged, dense models upcycled; evaluation on text and on tasks.
//!
//! Nothing here trains by itself: students are trained by [`moe_models::train::Trainer`].

mod error;

pub use error::{Error, Result};
