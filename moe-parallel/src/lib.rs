//! One mixture-of-experts model over many ranks: layouts, communicators, all-to-alls, a dispatcher, tensor slicing.
//!
//! Ranks are threads of this process ([`comm::thread`], the reference), processes of an MPI job (feature `mpi`) or GPUs that
//! exchange over NCCL (feature `nccl`). Layers come from `moe-core` and know nothing of it.

pub mod all_to_all;
pub mod comm;
pub mod dims;
mod error;
mod exchanged;
pub mod expert;
pub mod mesh;
pub mod placement;
pub mod share;
pub mod tensor;
#[cfg(feature = "testing")]
pub mod testing;

pub use comm::{Collectives, Communicator, Fault, Phase, Site};
pub use dims::ParallelDims;
pub use error::{Error, Result};
pub use expert::{AllToAllDispatcher, Coordination, RankDispatcher};
pub use mesh::{ExchangeConfig, Mesh};
pub use placement::Placement;
pub use tensor::RankOps;
