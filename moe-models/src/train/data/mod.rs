//! From text files to batches: read ([`source`]), tokenise and pack ([`packed`]), draw training sequences in a
//! deterministic, resumable order ([`sampler`]), and hold fixed validation windows ([`valid`]).

pub mod documents;
pub mod packed;
pub(crate) mod pieces;
pub mod sampler;
pub mod source;
pub mod valid;

pub use documents::{Documents, read_documents};
pub use packed::{PackedSource, Packer};
pub use sampler::{DataPosition, SequenceSampler};
pub use source::{Origin, SourceSpec};
pub use valid::ValidSource;
