//! Smaller mixture-of-experts language models, and how good they are: Mixture-of-Students by staged distillation, experts pruned
//! and merged, integers calibrated on a text, dense models upcycled; evaluation on text and on tasks.
//!
//! Nothing here trains by itself: students are trained by [`moe_models::train::Trainer`].

pub mod calibrate;
pub mod distill;
mod error;
pub mod eval;
pub mod experts;
pub mod kept;
pub mod schedule;
pub mod student;
pub mod teacher;
pub mod upcycle;

pub use distill::Student;
pub use error::{Error, Result};
pub use kept::KeptTargets;
pub use schedule::KdSchedule;
pub use student::{KeptLayers, StudentPlan};
pub use teacher::Teacher;

/// The models' crate, in the version whose types are in these signatures.
pub use moe_models;

/// The example of the README, which runs with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
