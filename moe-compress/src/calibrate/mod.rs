//! Integers that keep what matrices make of their inputs on a text, in the place of those nearest to the weights.
//!
//! ```text
//! text  ->  inputs of each matrix (inputs.rs)  ->  SecondMoments  ->  Factor  ->  integers (gptq.rs)
//! ```
//!
//! [`save_calibrated`] goes through a folder layer by layer: a layer's inputs come from the layers before it as they were quantized.
//! In memory are the sequences, one layer's weights and the moments of its inputs.

mod gptq;
mod inputs;
mod moments;
mod save;
#[cfg(test)]
mod tests;

pub use gptq::{Factor, quantize};
pub use inputs::{LayerInputs, LayerMoments};
pub use moments::SecondMoments;
pub use save::{CalibratedLayer, Calibration, save_calibrated};
