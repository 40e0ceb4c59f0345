//! [`AllToAll::measure`]: how long an exchange takes by each route, measured where it is going to be run.

use super::{AllToAll, Counts, Direction, Route, RouteChoice};
use crate::Result;
use crate::comm::{Collectives, Site};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Rows between each pair of ranks, one size after the other.
const ROWS: [usize; 6] = [1, 4, 16, 64, 256, 1024];
/// Exchanges of a size by each route; the fastest counts, after one that does not.
const ROUNDS: usize = 5;
/// No larger size is tried once an exchange takes so long.
const LONG: Duration = Duration::from_millis(100);

/// An exchange of equal parts, there and back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Rows of all ranks together.
    pub rows: u64,
    /// Time by the flat route, of the slowest rank.
    pub flat: Duration,
    /// Time by the hierarchical route.
    pub hierarchical: Duration,
}

/// What was measured, the same on every rank.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteTimes {
    /// Up to so many rows of all ranks together take the hierarchical route; more the flat one.
    pub few: u64,
    /// From few rows to many.
    pub timings: Vec<Timing>,
}

impl fmt::Display for RouteTimes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.few {
            0 => write!(f, "flat")?,
            few => write!(f, "hierarchical up to {few} rows, else flat")?,
        }
        for (index, Timing { rows, flat, hierarchical }) in self.timings.iter().enumerate() {
            let [flat, hierarchical] = [flat, hierarchical].map(|time| 1e3 * time.as_secs_f64());
            let before = if index == 0 { " (" } else { "; " };
            write!(f, "{before}{rows} rows: flat {flat:.3} ms, hierarchical {hierarchical:.3} ms")?;
        }
        if self.timings.is_empty() { Ok(()) } else { write!(f, ")") }
    }
}

impl AllToAll {
    /// Times exchanges of rows of `width` by both routes, once and where the route depends on the size, and has later ones take the
    /// faster one of their size. Called by all ranks.
    ///
    /// # Errors
    /// [`crate::Error::Fault`].
    pub fn measure(self: &Arc<Self>, site: Site, width: usize) -> Result<()> {
        if self.choice() != RouteChoice::BySize || self.route_times().is_some() {
            return Ok(());
        }
        let size = self.comm().size();
        let mut timings = Vec::new();
        for rows in ROWS {
            let [flat, hierarchical] =
                [Route::Flat, Route::Hierarchical].map(|route| self.time(site, route, rows, width));
            let timing = Timing { rows: (rows * size * size) as u64, flat: flat?, hierarchical: hierarchical? };
            timings.push(timing);
            if timing.flat.max(timing.hierarchical) > LONG {
                break;
            }
        }
        let few = timings
            .iter()
            .take_while(|timing| timing.hierarchical < timing.flat)
            .last()
            .map_or(0, |timing| timing.rows);
        self.set_route_times(RouteTimes { few, timings });
        Ok(())
    }

    /// The fastest of some exchanges of `rows` between each pair of ranks, on the slowest rank.
    fn time(self: &Arc<Self>, site: Site, route: Route, rows: usize, width: usize) -> Result<Duration> {
        let (rank, size) = (self.comm().rank(), self.comm().size());
        let plan = Arc::new(self.plan(&Counts::equal(rows, &vec![1; size], rank, route, self.nodes())));
        let values = vec![0f32; plan.rows * width];
        let mut fastest = Duration::MAX;
        for round in 0..=ROUNDS {
            self.comm().barrier(site)?;
            let begun = Instant::now();
            let there = self.run(&plan, Direction::There, site, &values, width)?;
            self.run(&plan, Direction::Back, site, &there, width)?;
            if round > 0 {
                fastest = fastest.min(begun.elapsed());
            }
        }
        let own = u64::try_from(fastest.as_nanos()).unwrap_or(u64::MAX);
        let all = self.comm().all_gather(site, &[own])?;
        Ok(Duration::from_nanos(all.into_iter().max().unwrap_or(own)))
    }
}
