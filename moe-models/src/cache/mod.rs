//! Keys and values of many sequences in pages of one pool.
//!
//! A sequence holds a list of pages; clones of it share them, and a page that is shared is copied before it is written to. A
//! page goes back to the pool when the last sequence that holds it is dropped. A [`PrefixCache`] holds pages too, for sequences to
//! come.

mod pool;
mod prefix;
mod sequence;
mod step;
#[cfg(test)]
mod tests;

pub use pool::{CacheLayout, KvPool, Pages, PoolConfig};
pub use prefix::PrefixCache;
pub use sequence::CachedSequence;
pub use step::PagedStep;
