//! All-to-alls of rows: [`Plan`]s are pure values made of counts, and one executor, [`AllToAll`], runs any of them, there and
//! back. Knows no expert and no layer.

mod measure;
mod plan;
mod run;
#[cfg(test)]
mod tests;

pub use measure::{RouteTimes, Timing};
pub use plan::{Counts, Nodes, Plan, Route, RouteChoice, Step, Traffic, Transfer};
pub use run::{AllToAll, Direction, Moving, SentBytes};
