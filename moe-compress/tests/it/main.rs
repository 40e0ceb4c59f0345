//! The crate from outside.

mod distill;
mod distill_cli;
mod experts;
mod teacher;
mod upcycle;
