//! Activation recomputation: a part of a model that keeps its inputs alone, and runs again in the backward pass.

use super::{Edge, Tape, is_recording, leaf, paused, record};
use crate::Result;
use candle_core::Tensor;

/// The tensors that `run` makes of `inputs`, and what else it returns. While a tape records, `run` keeps nothing for the backward
/// pass but its inputs: it runs a second time there, on the same bits, and gives the same gradients.
///
/// `run` must be a pure function of its inputs and of parameters that do not change until the backward pass. Sums have the same
/// order as without if inputs and outputs are cut there ([`super::cut`]).
///
/// # Errors
/// What `run` returns.
///
/// # Source
/// Chen et al. 2016 (1604.06174).
pub fn recomputed<S>(
    inputs: &[Tensor],
    run: impl Fn(&[Tensor]) -> Result<(Vec<Tensor>, S)> + 'static,
) -> Result<(Vec<Tensor>, S)> {
    if !is_recording() {
        return run(inputs);
    }
    let kept: Vec<Tensor> = inputs.iter().map(Tensor::detach).collect();
    let (outputs, rest) = paused(|| run(&kept))?;
    let outputs = outputs.iter().map(leaf).collect::<Result<Vec<_>>>()?;
    let edges: Vec<Edge> = inputs.iter().map(Edge::of).collect();
    record(&outputs.iter().collect::<Vec<_>>(), move |gradients, into| {
        let again = kept.iter().map(leaf).collect::<Result<Vec<_>>>()?;
        let (outputs, tape) = Tape::record(|| run(&again));
        let given = outputs?.0.into_iter().zip(gradients);
        tape.backward(given.filter_map(|(output, gradient)| Some((output, gradient?))).collect(), into)?;
        for (input, edge) in again.iter().zip(&edges) {
            if let Some(gradient) = into.take_leaf(input.id()) {
                into.give(edge, gradient)?;
            }
        }
        Ok(())
    });
    Ok((outputs, rest))
}
