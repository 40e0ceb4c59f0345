//! [`Pace`]: how a thread polls that waits.

use std::time::Duration;

/// Fast at first, then so that others get the core: there may be more ranks than cores.
#[derive(Debug)]
pub(super) struct Pace {
    turns: u32,
    sleeps: bool,
}

impl Pace {
    const SPINS: u32 = 50;
    const YIELDS: u32 = 500;
    const SHORTEST: Duration = Duration::from_micros(20);
    const LONGEST: Duration = Duration::from_millis(1);

    /// Of a wait that begins.
    pub(super) fn new() -> Self {
        Self { turns: 0, sleeps: true }
    }

    /// Of a wait in which the thread must not sleep, for others run on it too.
    #[cfg(feature = "mpi")]
    pub(super) fn awake() -> Self {
        Self { turns: 0, sleeps: false }
    }

    /// Between two looks.
    pub(super) fn rest(&mut self) {
        self.turns = self.turns.saturating_add(1);
        if self.turns < Self::SPINS {
            std::hint::spin_loop();
        } else if self.turns < Self::YIELDS || !self.sleeps {
            std::thread::yield_now();
        } else {
            let grown = Self::SHORTEST * (1 + (self.turns - Self::YIELDS) / 16);
            std::thread::sleep(grown.min(Self::LONGEST));
        }
    }
}
