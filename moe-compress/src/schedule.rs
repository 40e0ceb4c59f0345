//! [`KdSchedule`]: how long a student follows its teacher. Pure.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// Which of a run's steps count the divergence from the teacher.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KdSchedule {
    /// None: the student learns from text alone.
    None,
    /// All.
    Full,
    /// Those of the first part of training.
    Staged {
        /// Share of the training tokens after which text alone counts.
        stop: f64,
    },
}

impl KdSchedule {
    /// Mixture-of-Students as the paper has it: 400 thousand of 572 thousand steps. What matters is the share, for other runs have
    /// other numbers of steps.
    ///
    /// # Source
    /// Paper section 4.2, "staged knowledge distillation".
    pub const STAGED: Self = Self::Staged { stop: Self::STOP };

    /// Where [`KdSchedule::STAGED`] stops.
    pub const STOP: f64 = 0.7;

    /// Refuses a share that is none.
    ///
    /// # Errors
    /// [`Error::Argument`] naming it.
    pub fn validate(&self) -> Result<()> {
        match *self {
            Self::Staged { stop } if !(stop > 0.0 && stop < 1.0) => Err(Error::Argument(format!(
                "the share of training that follows the teacher must lie between 0 and 1, got {stop}; for all or none of it choose \
                 the full schedule or none"
            ))),
            _ => Ok(()),
        }
    }

    /// Whether a step follows the teacher that begins when so many of all training tokens have been seen.
    pub fn follows(&self, tokens: u64, train_tokens: u64) -> bool {
        match *self {
            Self::None => false,
            Self::Full => true,
            Self::Staged { stop } => (tokens as f64) < stop * train_tokens as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_switch_is_at_its_share_of_training() {
        let staged = KdSchedule::STAGED;
        let on: Vec<bool> = (0..10).map(|step| staged.follows(step * 100, 1000)).collect();
        assert_eq!(on, [true, true, true, true, true, true, true, false, false, false]);
        assert!((0..10).all(|step| KdSchedule::Full.follows(step, 10) && !KdSchedule::None.follows(step, 10)));
    }

    #[test]
    fn shares_outside_of_training_are_refused() {
        for stop in [0.0, 1.0, -0.5, f64::NAN] {
            assert!(KdSchedule::Staged { stop }.validate().unwrap_err().to_string().contains("share of training"));
        }
        for schedule in [KdSchedule::None, KdSchedule::Full, KdSchedule::STAGED] {
            schedule.validate().unwrap();
            let json = serde_json::to_string(&schedule).unwrap();
            assert_eq!(serde_json::from_str::<KdSchedule>(&json).unwrap(), schedule, "{json}");
        }
    }
}
