//! The crate from outside.

mod compress_cli;
mod distill;
mod distill_cli;
mod experts;
mod teacher;
mod upcycle;
