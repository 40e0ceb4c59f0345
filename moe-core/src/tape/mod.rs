//! [`Tape`]: reverse-mode differentiation of large operations, beside candle's own graph.
//!
//! candle's backward pass gives every tensor a zeroed gradient and adds each contribution into a third: three passes over
//! memory per operation, and all activations live until its end. An operation that knows of the tape gives its result as a new
//! leaf of candle's graph instead and records how gradients go back through it. Gradients then travel without a copy, those of
//! registered parameters are added where they are kept ([`GradBuffers`]), and what an operation holds is freed once it is passed.
//!
//! What lies between two recorded operations is candle's: a segment, gone through by candle as soon as a gradient for its end
//! arrives. So layers of ordinary tensor operations train beside recorded ones, and nobody needs to know which are which.
//!
//! Records are passed in the reverse of the order in which they were made. That order is fixed, and with it every sum and the
//! order in which ranks meet in collectives.

mod buffers;
mod gradients;
mod recompute;
#[cfg(test)]
mod tests;

pub use buffers::{After, CompleteGrads, GradBuffers, Watcher};
pub use gradients::{GradSlice, Gradients};
pub use recompute::recomputed;

use crate::Result;
use candle_core::{Device, Shape, Tensor, TensorId, Var, WithDType};
use std::cell::RefCell;
use std::collections::HashMap;

/// The gradients of a record's outputs, `None` where nothing depends on one, to those of its inputs.
type Back = Box<dyn FnOnce(Vec<Option<Tensor>>, &mut Gradients<'_>) -> Result<()>>;

struct Record {
    outputs: Vec<TensorId>,
    back: Back,
}

/// What operations on this thread do with their gradients.
enum State {
    /// candle's graph.
    Off,
    /// Records.
    Recording(Tape),
    /// None is wanted.
    Paused,
}

thread_local! {
    static STATE: RefCell<State> = const { RefCell::new(State::Off) };
}

/// Gives this thread its old state back when dropped.
struct Restore(Option<State>);

impl Restore {
    fn replacing(state: State) -> Self {
        Self(Some(STATE.replace(state)))
    }

    /// The state in between.
    fn finish(mut self) -> State {
        self.0.take().map_or(State::Off, |old| STATE.replace(old))
    }
}

impl Drop for Restore {
    fn drop(&mut self) {
        if let Some(old) = self.0.take() {
            STATE.set(old);
        }
    }
}

/// Operations of one forward pass, in order.
#[derive(Default)]
pub struct Tape {
    records: Vec<Record>,
    /// How often each variable was an operation's input.
    reads: HashMap<TensorId, usize>,
}

impl std::fmt::Debug for Tape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tape").field("records", &self.records.len()).finish_non_exhaustive()
    }
}

impl Tape {
    /// Runs `forward`, whose operations on this thread are recorded.
    pub fn record<R>(forward: impl FnOnce() -> R) -> (R, Self) {
        let restore = Restore::replacing(State::Recording(Self::default()));
        let result = forward();
        match restore.finish() {
            State::Recording(tape) => (result, tape),
            State::Off | State::Paused => (result, Self::default()),
        }
    }

    /// Takes the gradient of `outputs`, each with its own, back to the parameters.
    ///
    /// What several recorded operations bring to one parameter is summed before it is added to what is kept of it from passes
    /// before: the bits are those of passes that are each finished, and then added.
    ///
    /// # Errors
    /// What an operation's gradient returns.
    pub fn backward(mut self, outputs: Vec<(Tensor, Tensor)>, into: &mut Gradients<'_>) -> Result<()> {
        let read_again = self.reads.iter().filter(|(_, reads)| **reads > 1).map(|(id, _)| *id);
        let set_aside = into.set_aside(read_again);
        for (output, gradient) in outputs {
            into.give(&Edge::of(&output), gradient)?;
        }
        while let Some(Record { outputs, back }) = self.records.pop() {
            let gradients: Vec<Option<Tensor>> = outputs.into_iter().map(|output| into.take_leaf(output)).collect();
            if gradients.iter().any(Option::is_some) {
                back(gradients, into)?;
            }
        }
        into.add_back(set_aside)
    }

    /// [`Tape::backward`] of a scalar.
    ///
    /// # Errors
    /// As there.
    pub fn backward_of(self, loss: &Tensor, into: &mut Gradients<'_>) -> Result<()> {
        let one = loss.ones_like()?;
        self.backward(vec![(loss.clone(), one)], into)
    }
}

/// Whether operations on this thread are recorded.
pub fn is_recording() -> bool {
    STATE.with_borrow(|state| matches!(state, State::Recording(_)))
}

/// Whether operations on this thread leave candle's graph alone: they are recorded, or no gradient is wanted.
pub fn is_active() -> bool {
    !STATE.with_borrow(|state| matches!(state, State::Off))
}

/// Whether an operation on `inputs` has to be prepared for a backward pass.
pub fn tracks(inputs: &[&Tensor]) -> bool {
    !STATE.with_borrow(|state| matches!(state, State::Paused)) && inputs.iter().any(|input| input.track_op())
}

/// Runs `body` without gradients: nothing is recorded, and no operation that knows of the tape prepares for a backward pass.
pub fn paused<R>(body: impl FnOnce() -> R) -> R {
    let _restore = Restore::replacing(State::Paused);
    body()
}

/// The result of an operation that will be recorded, without a copy.
///
/// # Errors
/// If the values do not fit the shape.
pub fn output<T: WithDType>(values: Vec<T>, dims: &[usize], device: &Device) -> Result<Tensor> {
    Ok(Var::from_vec(values, dims, device)?.into_inner())
}

/// Records an operation: `outputs` are leaves ([`output`]), and `back` gives the gradients of its inputs, in a fixed order, to
/// [`Gradients`]. Without a recording `outputs` stay leaves that nothing leads back from.
pub fn record(outputs: &[&Tensor], back: impl FnOnce(Vec<Option<Tensor>>, &mut Gradients<'_>) -> Result<()> + 'static) {
    STATE.with_borrow_mut(|state| {
        if let State::Recording(tape) = state {
            let outputs = outputs.iter().map(|output| output.id()).collect();
            tape.records.push(Record { outputs, back: Box::new(back) });
        }
    });
}

/// Where the gradient of an operation's input goes. Unlike the tensor it does not keep a leaf's values in memory.
#[derive(Debug, Clone)]
pub enum Edge {
    /// Nowhere: no variable is behind it.
    Constant,
    /// To a leaf of this shape.
    Leaf(TensorId, Shape),
    /// Through candle's graph.
    Segment(Tensor),
}

impl Edge {
    /// Of an input.
    pub fn of(tensor: &Tensor) -> Self {
        match (tensor.track_op(), tensor.is_variable()) {
            (false, _) => Self::Constant,
            (true, true) => {
                STATE.with_borrow_mut(|state| {
                    if let State::Recording(tape) = state {
                        *tape.reads.entry(tensor.id()).or_default() += 1;
                    }
                });
                Self::Leaf(tensor.id(), tensor.shape().clone())
            }
            (true, false) => Self::Segment(tensor.clone()),
        }
    }

    /// Whether a gradient is wanted.
    pub fn is_wanted(&self) -> bool {
        !matches!(self, Self::Constant)
    }
}

/// The same values behind a leaf while a tape records, as an operation's output is one already: all gradients of what follows are
/// summed before they go further back, whatever follows is made of.
///
/// # Errors
/// If the values cannot be copied.
pub fn cut(tensor: &Tensor) -> Result<Tensor> {
    if !is_recording() || !tensor.track_op() || tensor.is_variable() {
        return Ok(tensor.clone());
    }
    let (leaf, edge) = (leaf(tensor)?, Edge::of(tensor));
    record(&[&leaf], move |gradients, into| {
        gradients.into_iter().flatten().try_for_each(|gradient| into.give(&edge, gradient))
    });
    Ok(leaf)
}

/// A leaf with the values of `tensor`.
fn leaf(tensor: &Tensor) -> Result<Tensor> {
    Ok(Var::from_tensor(&tensor.detach())?.into_inner())
}
