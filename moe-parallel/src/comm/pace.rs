//! [`Pace`]: how a thread polls that waits.

use std::time::Duration;

/// Fast at first, then so that others get the core: there may be more ranks than cores.
#[derive(Debug)]
pub(super) struct Pace {
    turns: u32,
    spins: u32,
    sleeps: bool,
}

impl Pace {
    /// Looks of a fraction of a microsecond that are cheaper than to let others run.
    pub(super) const SPINS: u32 = 50;
    const YIELDS: u32 = 500;
    const SHORTEST: Duration = Duration::from_micros(20);
    const LONGEST: Duration = Duration::from_millis(1);
    /// Looks after which a sleep is as long as it gets while messages move, 40 us. With those of 1 ms a link that hands on one
    /// piece of 128 KB a look gave 4 hosts of 2 ranks a third of the speed (2026-11-26).
    const MOVING_LOOKS: u32 = 16;

    /// Of a wait that begins.
    pub(super) fn new() -> Self {
        Self::spinning(Self::SPINS)
    }

    /// Of a wait that begins, in which this often nobody else gets the core.
    pub(super) fn spinning(spins: u32) -> Self {
        Self { turns: 0, spins, sleeps: true }
    }

    /// Of a wait in which the thread must not sleep, for others run on it too.
    pub(super) fn awake() -> Self {
        Self { turns: 0, spins: Self::SPINS, sleeps: false }
    }

    /// Between two looks while messages are on their way: each look moves a piece of them, so none is long in coming.
    pub(super) fn rest_while_moving(&mut self) {
        self.turns = self.turns.min(Self::YIELDS + Self::MOVING_LOOKS);
        self.rest();
    }

    /// Between two looks.
    pub(super) fn rest(&mut self) {
        self.turns = self.turns.saturating_add(1);
        if self.turns < self.spins {
            std::hint::spin_loop();
        } else if self.turns < Self::YIELDS || !self.sleeps {
            std::thread::yield_now();
        } else {
            let grown = Self::SHORTEST * (1 + (self.turns - Self::YIELDS) / 16);
            std::thread::sleep(grown.min(Self::LONGEST));
        }
    }
}
