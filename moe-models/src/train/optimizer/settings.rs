//! What an optimizer is told: its settings, and for each parameter how it is updated.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// AdamW's settings besides the learning rate.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AdamWConfig {
    /// Decay rate of the first moment.
    pub beta1: f64,
    /// Decay rate of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, on the parameters that decay (not on biases and norms).
    pub weight_decay: f64,
    /// Largest global gradient norm; larger gradients are scaled down to it. 0 turns clipping off.
    pub clip_grad: f64,
}

impl Default for AdamWConfig {
    /// The paper's: betas 0.9 and 0.95, eps 1e-8, decay 0.1, clip 1.0.
    fn default() -> Self {
        Self { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, clip_grad: 1.0 }
    }
}

impl AdamWConfig {
    /// Refuses settings outside their range.
    ///
    /// # Errors
    /// [`Error::Config`] naming the setting.
    pub fn validate(&self) -> Result<()> {
        for (name, value, range) in [
            ("beta1", self.beta1, 0.0..1.0),
            ("beta2", self.beta2, 0.0..1.0),
            ("weight_decay", self.weight_decay, 0.0..f64::MAX),
            ("clip_grad", self.clip_grad, 0.0..f64::MAX),
            ("eps", self.eps, f64::MIN_POSITIVE..f64::MAX),
        ] {
            if !range.contains(&value) {
                return Err(Error::Config(format!("{name} must lie in {range:?}, got {value}")));
            }
        }
        Ok(())
    }
}

/// How one parameter is updated. One that is not updated at all is not given to the optimizer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct UpdateRule {
    /// Factor on [`AdamWConfig::weight_decay`]: 0 for parameters that do not decay.
    pub weight_decay: f64,
    /// Factor on the learning rate, and with it on what is decayed in a step.
    pub lr_scale: f64,
}

impl UpdateRule {
    /// The learning rate of the run, with decay or without.
    pub fn decays(decays: bool) -> Self {
        Self { weight_decay: if decays { 1.0 } else { 0.0 }, lr_scale: 1.0 }
    }

    /// Matrices decay, biases and norms do not.
    ///
    /// # Source
    /// Megatron's optimizer groups.
    pub fn for_shape(shape: &[usize]) -> Self {
        Self::decays(shape.len() >= 2)
    }

    /// Refuses factors that are negative or no numbers.
    ///
    /// # Errors
    /// [`Error::Config`] naming the factor.
    pub fn validate(&self) -> Result<()> {
        for (name, value) in [("weight_decay", self.weight_decay), ("lr_scale", self.lr_scale)] {
            if !(0.0..f64::MAX).contains(&value) {
                return Err(Error::Config(format!("{name} of a parameter must be a factor of 0 or more, got {value}")));
            }
        }
        Ok(())
    }
}
