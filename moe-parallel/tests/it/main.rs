//! Public behaviour of `moe-parallel`, one module per topic.

mod layer;
mod modes;
mod tcp;
