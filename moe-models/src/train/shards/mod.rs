//! Weights and moments in files that ranks write together, each its part, and that ranks of any other layout read.
//!
//! ```text
//! checkpoint.index.json                 what is where: boxes of whole tensors, by the names they have on one rank
//! model-00001-of-00004.safetensors      weights that rank 0 wrote          (model.safetensors of one rank)
//! optimizer-00003-of-00004.safetensors  moments that rank 2 wrote          (optimizer.safetensors of one rank)
//! model.safetensors.index.json          where tensors are whole: the same weights as anyone reads them
//! ```
//!
//! An entry of the index says which box of which tensor lies where, and a reader asks for the boxes it wants: neither knows the
//! layout of the other. Where ranks split no matrix, one of those that hold a weight writes it whole, under the name its family
//! publishes, so the folder is a Hugging Face folder whoever wrote it. Families that publish all experts of a layer as one tensor
//! have that where every rank holds all experts; where ranks hold some of them each, no rank could write it, so experts lie singly
//! under the names they have here, and the folder is one of parts, as where matrices are split.
//!
//! One save, in this order; what ranks send each other is the caller's:
//!
//! ```text
//! rank 0      CheckpointStore::begin     the folder, under a temporary name
//! all ranks   write_part                 their files, flushed to the disk; a PartReport of them
//! rank 0      finish                     the reports of all ranks: whether they make up the model; the index
//! rank 0      CheckpointStore::commit    trainer_state.json last of all, then the folder's own name
//!             CheckpointStore::abort     instead, where any rank failed and all are done with writing
//! ```
//!
//! Which of the ranks that hold the same part writes it is planned by each alone ([`WritePlan`]). A [`Reader`] checks all that can
//! be checked without reading the values when it is opened, and reads them from mapped files where they are asked for;
//! [`export`] makes a folder of whole tensors.
//!
//! Knows neither layouts of ranks, but in [`WritePlan`], nor the loop.

mod export;
mod finish;
mod index;
mod model;
mod part;
mod plan;
mod reader;
mod report;
#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "lists of one range are meant")]
mod tests;
mod write;

pub use export::export;
pub use finish::finish;
pub use index::{Entry, Kind, Save, TensorInfo, Tensors, tensors};
pub use part::{MomentsPart, SavingRank, WeightsPart, write_part};
pub use plan::{Held, WritePlan, writers};
pub use reader::Reader;
pub use report::PartReport;
