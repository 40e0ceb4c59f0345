//! The learning rate as a pure function of the tokens seen. Keeps no state.

use crate::{Error, Result};

/// Linear warm-up, then half a cosine, then a floor; all lengths in tokens.
///
/// # Source
/// PAPER.md 1.2 (Megatron-DeepSpeed `optimizer_param_scheduler.py`, `get_lr`). As there, step `n` uses the tokens seen
/// *before* it, so the first step of a run with a warm-up has rate 0. Without a warm-up (`warmup_tokens` 0) the rate
/// starts at `lr_max`, where the paper's formula would divide by zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LrSchedule {
    /// Rate at the end of the warm-up.
    pub lr_max: f64,
    /// Rate from `decay_tokens` on.
    pub lr_min: f64,
    /// Tokens of linear warm-up.
    pub warmup_tokens: u64,
    /// Tokens, counted from the start of training, at which the cosine reaches `lr_min`.
    pub decay_tokens: u64,
}

impl LrSchedule {
    /// Refuses rates and lengths that make no schedule.
    ///
    /// # Errors
    /// [`Error::Config`] naming the setting.
    pub fn validate(&self) -> Result<()> {
        let Self { lr_max, lr_min, warmup_tokens, decay_tokens } = *self;
        if !(lr_max.is_finite() && lr_max > 0.0) {
            return Err(Error::Config(format!("lr must be a positive number, got {lr_max}")));
        }
        if !(lr_min.is_finite() && (0.0..=lr_max).contains(&lr_min)) {
            return Err(Error::Config(format!("min_lr must lie in 0..=lr ({lr_max}), got {lr_min}")));
        }
        if warmup_tokens > decay_tokens {
            return Err(Error::Config(format!(
                "lr_warmup_tokens ({warmup_tokens}) exceeds lr_decay_tokens ({decay_tokens}); shorten the warm-up or lengthen the decay"
            )));
        }
        Ok(())
    }

    /// The rate after `tokens` tokens.
    pub fn lr(&self, tokens: u64) -> f64 {
        if self.warmup_tokens > 0 && tokens <= self.warmup_tokens {
            return self.lr_max * tokens as f64 / self.warmup_tokens as f64;
        }
        if tokens > self.decay_tokens {
            return self.lr_min;
        }
        let length = (self.decay_tokens - self.warmup_tokens).max(1);
        let progress = (tokens - self.warmup_tokens) as f64 / length as f64;
        self.lr_min + (self.lr_max - self.lr_min) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAPER_350M_MOE: LrSchedule =
        LrSchedule { lr_max: 2.0e-4, lr_min: 2.0e-6, warmup_tokens: 375_000_000, decay_tokens: 300_000_000_000 };

    #[track_caller]
    fn check(schedule: LrSchedule, tokens: u64, want: f64) {
        let got = schedule.lr(tokens);
        assert!((got - want).abs() <= 1e-12 * want.abs().max(1e-30), "lr({tokens}) = {got}, want {want}");
    }

    #[test]
    fn the_paper_at_its_corners() {
        let s = PAPER_350M_MOE;
        check(s, 0, 0.0);
        check(s, 187_500_000, 1.0e-4);
        check(s, 375_000_000, 2.0e-4);
        // Half way between W and D the cosine is 0: the mean of the two rates.
        check(s, (375_000_000 + 300_000_000_000) / 2, 1.01e-4);
        check(s, 300_000_000_001, 2.0e-6);
        assert!((s.lr(300_000_000_000) - 2.0e-6).abs() < 1e-18);
        // A quarter of the way: (1 + cos(pi/4)) / 2 = 0.8535533905932737.
        check(s, 375_000_000 + 299_625_000_000 / 4, 2.0e-6 + 1.98e-4 * 0.853_553_390_593_273_7);
    }

    #[test]
    fn without_warmup_it_starts_at_the_top() {
        check(LrSchedule { warmup_tokens: 0, decay_tokens: 100, ..PAPER_350M_MOE }, 0, 2.0e-4);
    }

    #[test]
    fn warmup_that_fills_the_whole_run() {
        let s = LrSchedule { warmup_tokens: 100, decay_tokens: 100, ..PAPER_350M_MOE };
        check(s, 100, 2.0e-4);
        check(s, 101, 2.0e-6);
        s.validate().unwrap();
    }

    #[test]
    fn impossible_settings_are_refused() {
        for (bad, word) in [
            (LrSchedule { lr_max: 0.0, ..PAPER_350M_MOE }, "lr must"),
            (LrSchedule { lr_max: f64::NAN, ..PAPER_350M_MOE }, "lr must"),
            (LrSchedule { lr_min: 1.0, ..PAPER_350M_MOE }, "min_lr"),
            (LrSchedule { warmup_tokens: u64::MAX, ..PAPER_350M_MOE }, "lr_warmup_tokens"),
        ] {
            let message = bad.validate().unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
    }
}
