//! From text files to batches: read ([`text_source`], [`documents`]), tokenise and pack ([`packer`]) into files that are kept
//! ([`cache`]) and mapped ([`packed`]), draw training sequences in a deterministic, resumable order ([`sampler`]), and hold
//! fixed validation windows ([`valid`]).
//!
//! Text and tokens pass in pieces: neither is ever held whole, so a corpus may be larger than memory.

pub mod cache;
pub mod documents;
pub mod packed;
pub mod packer;
pub(crate) mod pieces;
pub mod sampler;
pub mod source;
pub mod text_source;
mod token_file;
pub mod valid;

pub use cache::DataCache;
pub use documents::Documents;
pub use packed::PackedSource;
pub use packer::Packer;
pub use sampler::{DataPosition, SequenceSampler};
pub use source::{Origin, SourceSpec};
pub use text_source::TextSource;
pub use valid::ValidSource;
