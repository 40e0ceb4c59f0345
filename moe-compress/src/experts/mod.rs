//! Fewer experts: how much each one does ([`ExpertUse`]), which are kept ([`keep`]), and the model that is left ([`prune`],
//! [`merge`]).

mod choose;
mod reduce;
mod usage;

pub use choose::{Budget, Ranking, keep};
pub use reduce::{merge, prune};
pub use usage::{ExpertUse, measure};
