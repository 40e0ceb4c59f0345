//! The crate from outside.

mod distill;
mod distill_cli;
mod teacher;
