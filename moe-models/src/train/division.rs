//! [`Division`]: which part of gradients and moments each rank of a run has, and how the parts come together.

use super::optimizer::{ChunkSum, Grads, Owned};
use crate::Result;
use candle_core::Var;
use moe_core::tape::{After, CompleteGrads, GradBuffers};
use std::fmt::Debug;
use std::time::Instant;

/// One rank's part in the gradients, moments and updates of a run, made once for its parameters. All ranks call the same methods
/// in the same order.
///
/// What has a default does what ranks do that add nothing up and each own every element.
///
/// # Errors
/// All methods: [`crate::Error`] if a rank is missing or does something else than the others; then it is one on every rank.
pub trait Division: Debug + Send {
    /// The elements this rank updates, and holds moments of.
    fn owned(&self) -> &Owned;

    /// The ranks that divide the moments of a parameter among them; `None` if each owns all it holds.
    fn divides(&self, _param: usize) -> Option<&[usize]> {
        None
    }

    /// Parameters whose gradients are added up together. Those that are complete early in a backward pass come first.
    fn buckets(&self) -> &[Vec<usize>] {
        &[]
    }

    /// Whether gradients are added up after every pass, rather than after the last one of a step.
    fn every_pass(&self) -> bool {
        false
    }

    /// Whether adding up begins as soon as a bucket is complete, or else at the end of the pass.
    fn overlaps(&self) -> bool {
        true
    }

    /// This rank has worked on something; nobody need keep it.
    fn note(&self, _what: &str, _begin: Instant, _end: Instant) {}

    /// A step begins.
    fn begin(&mut self) {}

    /// A bucket is complete on this rank: adding up over the ranks begins. A rank brings the sums over its own micro-batches, of
    /// which no value may count one twice.
    fn start(&mut self, bucket: usize, complete: &mut CompleteGrads<'_>) -> Result<After>;

    /// Time to go on with what was begun, between two parts of a backward pass.
    fn advance(&mut self, _complete: &mut CompleteGrads<'_>) -> Result<()> {
        Ok(())
    }

    /// Ends what was begun in a pass: all buckets.
    fn finish(&mut self, buffers: &mut GradBuffers) -> Result<()>;

    /// The sums over all micro-batches of the step.
    fn grads<'a>(&'a self, buffers: &'a GradBuffers) -> Grads<'a> {
        Grads::Whole(buffers.all())
    }

    /// The sums of squares of all chunks of the model, of which this rank brings those it owns.
    fn gather_squares(&self, own: Vec<ChunkSum>) -> Result<Vec<ChunkSum>> {
        Ok(own)
    }

    /// Brings what other ranks have updated into `params`, of which this rank has updated what it owns. The indices of those
    /// that were written to, whose copies in bf16 are then made anew.
    fn gather_params(&self, _params: &[(String, Var)]) -> Result<Vec<usize>> {
        Ok(Vec::new())
    }
}

/// Of a run of one rank.
#[derive(Debug)]
pub struct Undivided(pub Owned);

impl Division for Undivided {
    fn owned(&self) -> &Owned {
        &self.0
    }

    fn start(&mut self, _: usize, _: &mut CompleteGrads<'_>) -> Result<After> {
        Ok(After::Keep)
    }

    fn finish(&mut self, _: &mut GradBuffers) -> Result<()> {
        Ok(())
    }
}
