//! The training loop as a library: text in, checkpoints and metrics out.
//!
//! Each file has one job; [`Trainer`] puts them together. Nothing here prints or reads the environment: progress goes to
//! an [`Observer`]. Every random draw is a function of `(seed, step, micro-batch)` or `(seed, source, epoch)`, so the
//! whole state of a run is its weights, its optimizer moments and a few counters, and a resumed run is bit-identical.

mod alike;
mod balance;
pub mod checkpoint;
pub mod config;
pub mod data;
pub mod division;
pub mod evaluate;
pub mod excerpt;
pub mod export;
mod files;
pub mod folder_files;
pub mod launch;
pub mod lock;
pub mod memory;
pub mod mesh;
pub mod metrics;
pub mod model;
pub mod non_finite;
pub mod observer;
pub mod optimizer;
pub mod prepare;
pub mod ranks;
pub mod run_folder;
pub mod saving;
pub mod schedule;
pub mod shards;
pub mod step;
pub mod timeline;
pub mod tokenizer;
mod tokenizer_file;
pub mod trainer;

pub use config::{Blend, TrainConfig};
pub use division::Division;
pub use folder_files::FolderFiles;
pub use lock::RunLock;
pub use mesh::{MeshRanks, ReduceConfig, Zero};
pub use model::TrainModel;
pub use non_finite::{NonFinite, NonFiniteLoss};
pub use observer::{Event, Observer, Silent};
pub use prepare::{RunText, TokenizerChoice};
pub use ranks::{DividedParam, OneRank, Passes, Ranks, Traffic, first_rank_first};
pub use run_folder::{RunFolder, lock_for, take_over_for};
pub use saving::Saving;
pub use timeline::Timeline;
pub use trainer::{Corpus, Outcome, Trainer};
