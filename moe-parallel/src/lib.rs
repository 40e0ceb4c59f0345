//! One mixture-of-experts model over many ranks: layouts, communicators, all-to-alls, a dispatcher, tensor slicing.
//!
//! Ranks are threads of this process ([`comm::thread`], the reference), processes that reach each other over TCP
//! ([`comm::tcp`]), processes of an MPI job (feature `mpi`) or GPUs that exchange over NCCL (feature `nccl`). Layers come from
//! `moe-core` and know nothing of it.
//!
//! ```
//! use moe_parallel::comm::{Reduction, thread::ThreadWorld};
//! use moe_parallel::{Collectives, Phase, Site};
//!
//! let sums = ThreadWorld::new(4).run(|comm| {
//!     let site = Site::layer(Phase::Forward, 2); // named in errors
//!     comm.all_reduce(site, &[comm.rank() as f32, 1.0], Reduction::Sum)
//! });
//! for sum in sums {
//!     assert_eq!(sum?, [6.0, 4.0]);
//! }
//! # Ok::<(), moe_parallel::Error>(())
//! ```

pub mod all_to_all;
pub mod comm;
pub mod dims;
mod error;
mod exchanged;
pub mod expert;
pub mod extent;
pub mod mesh;
pub mod placement;
pub mod share;
pub mod tensor;
pub mod tensor_box;
#[cfg(feature = "testing")]
pub mod testing;

pub use comm::{Collectives, Communicator, Fault, Phase, Site};
pub use dims::ParallelDims;
pub use error::{Error, Result};
pub use expert::{AllToAllDispatcher, Coordination, RankDispatcher};
pub use extent::Extent;
pub use mesh::{ExchangeConfig, Mesh};
pub use placement::Placement;
pub use tensor::RankOps;
pub use tensor_box::TensorBox;

/// The layers' crate, in the version whose types are in these signatures.
pub use moe_core;

/// The example of the README, which runs with the tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
