//! An OpenAI-compatible server for the mixture-of-experts models of this workspace.
//!
//! Three layers, each ignorant of the next: [`engine`] works on token ids, [`text`] puts characters around it, [`api`]
//! speaks HTTP. [`ServedModel`] holds a model with everything needed to talk to it; [`cli`] is the command line.

pub mod api;
pub mod cli;
pub mod engine;
mod error;
mod generation_config;
mod served_model;
pub mod text;

pub use error::{Error, Result};
pub use generation_config::GenerationDefaults;
pub use served_model::ServedModel;

/// The models' crate, in the version whose types are in these signatures.
pub use moe_models;

/// The example of the README, which runs with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
