//! [`FaultPlan`]: what goes wrong, where and when, as a value; one seed is one plan.

use moe_core::CounterRng;
use std::time::Duration;

/// When in an operation a rank ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// Nothing was sent.
    Before,
    /// Half of the messages were sent.
    Inside,
    /// All messages were sent.
    After,
}

/// Something that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Injection {
    /// The operation's messages take this much longer.
    Delay(Duration),
    /// The operation's messages are lost.
    Drop,
    /// The rank ends, and the others can see that it is gone.
    Kill(Moment),
    /// The rank answers no more, but is not seen to be gone.
    Stop,
}

/// What goes wrong in a world of threads.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FaultPlan {
    injections: Vec<(usize, u64, Injection)>,
    jitter: Option<(u64, Duration)>,
}

impl FaultPlan {
    /// Nothing goes wrong.
    pub fn none() -> Self {
        Self::default()
    }

    /// Also this, in operation `operation` of rank `rank`, counted from 0 over all its groups.
    #[must_use]
    pub fn with(mut self, rank: usize, operation: u64, injection: Injection) -> Self {
        self.injections.push((rank, operation, injection));
        self
    }

    /// Also every message takes up to `most` longer, drawn by `seed`.
    #[must_use]
    pub fn with_jitter(self, seed: u64, most: Duration) -> Self {
        Self { jitter: Some((seed, most)), ..self }
    }

    /// One injection of any kind, in one of the first `operations` operations of one of `size` ranks, and jitter; messages
    /// are late by less than `timeout` or by more.
    ///
    /// # Panics
    /// If there is no rank or no operation.
    pub fn seeded(seed: u64, size: usize, operations: u64, timeout: Duration) -> Self {
        let mut rng = CounterRng::new(seed, 31);
        let mut below = |n: u64| rng.next_u64() % n;
        let (rank, operation) = (below(size as u64) as usize, below(operations));
        let injection = match below(7) {
            0 => Injection::Kill(Moment::Before),
            1 => Injection::Kill(Moment::Inside),
            2 => Injection::Kill(Moment::After),
            3 => Injection::Stop,
            4 => Injection::Drop,
            5 => Injection::Delay(timeout * 3),
            _ => Injection::Delay(timeout / 3),
        };
        Self::none().with(rank, operation, injection).with_jitter(seed, timeout / 100)
    }

    /// The injections, each with its rank and operation.
    pub fn injections(&self) -> &[(usize, u64, Injection)] {
        &self.injections
    }

    pub(super) fn at(&self, rank: usize, operation: u64) -> Option<Injection> {
        self.injections.iter().find(|(r, k, _)| (*r, *k) == (rank, operation)).map(|(_, _, injection)| *injection)
    }

    /// How much longer message number `index` of an operation takes.
    pub(super) fn lateness(&self, rank: usize, operation: u64, index: u64) -> Duration {
        let Some((seed, most)) = self.jitter else { return Duration::ZERO };
        let mixed = CounterRng::mix(seed, &[rank as u64, operation, index]);
        most.mul_f64((mixed >> 11) as f64 / (1u64 << 53) as f64)
    }
}
