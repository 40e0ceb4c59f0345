//! [`GradBuffers`]: where the gradients of parameters are kept: an f32 buffer for each, made when it is first written to.

use super::gradients::{Gradients, Watch};
use crate::{Error, Result};
use candle_core::{TensorId, Var};
use std::collections::HashMap;
use std::fmt;

/// One registered parameter's gradient.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    pub(super) elements: usize,
    /// Empty while an operation has them, before the first use, and once they are released.
    pub(super) values: Vec<f32>,
    /// The values are those of an earlier sum.
    pub(super) stale: bool,
    /// How often something arrives in one pass, as far as passes were seen.
    pub(super) arrivals: usize,
}

impl Slot {
    /// Makes sure that there are values, which then are stale.
    pub(super) fn allocate(&mut self) {
        if self.values.len() < self.elements {
            self.values = vec![0.0; self.elements];
            self.stale = true;
        }
    }

    /// Gives the memory back; the next sum begins anew.
    pub(super) fn release(&mut self) {
        (self.values, self.stale) = (Vec::new(), true);
    }

    /// Ends the sum: without a contribution it is zero.
    pub(super) fn settle(&mut self) {
        self.allocate();
        if std::mem::replace(&mut self.stale, false) {
            self.values.fill(0.0);
        }
    }
}

/// What becomes of a parameter's buffer after somebody was told of its gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// It is kept, with its values.
    Keep,
    /// Its memory is given back until the next gradient.
    Release,
}

/// Sums of the gradients of registered parameters.
///
/// # Source
/// Megatron-LM's gradient accumulation fusion into `main_grad` (2104.04473, section 3).
#[derive(Debug)]
pub struct GradBuffers {
    pub(super) by_id: HashMap<TensorId, usize>,
    pub(super) slots: Vec<Slot>,
}

impl GradBuffers {
    /// Buffers for `params`.
    ///
    /// # Errors
    /// [`Error::Input`] for a variable that is given twice.
    pub fn new<'a>(params: impl IntoIterator<Item = (&'a str, &'a Var)>) -> Result<Self> {
        let mut buffers = Self { by_id: HashMap::new(), slots: Vec::new() };
        for (name, var) in params {
            if buffers.by_id.insert(var.id(), buffers.slots.len()).is_some() {
                return Err(Error::Input(format!("parameter {name} is registered twice")));
            }
            buffers.slots.push(Slot { elements: var.elem_count(), values: Vec::new(), stale: true, arrivals: 0 });
        }
        Ok(buffers)
    }

    /// The gradient of parameter `index`, in the order they were registered in, row-major; empty if it is released.
    pub fn of(&self, index: usize) -> &[f32] {
        &self.slots[index].values
    }

    /// The same, to be changed.
    pub fn of_mut(&mut self, index: usize) -> &mut [f32] {
        &mut self.slots[index].values
    }

    /// All of them, in the order they were registered in.
    pub fn all(&self) -> Vec<&[f32]> {
        self.slots.iter().map(|slot| slot.values.as_slice()).collect()
    }

    /// Begins a new sum. Nothing is written yet: the first contribution to each parameter replaces what is there.
    pub fn begin(&mut self) {
        self.slots.iter_mut().for_each(|slot| slot.stale = true);
    }

    /// Ends the sum: parameters that took no part have zeros.
    pub fn finish(&mut self) {
        self.slots.iter_mut().for_each(Slot::settle);
    }

    /// Where a backward pass adds its gradients.
    pub fn gradients(&mut self) -> Gradients<'_> {
        Gradients::new(self, None)
    }

    /// The same for the last pass of a sum, with `watcher` told of each of `groups` of parameters as soon as nothing more will
    /// arrive for it, group by group in their order. Groups whose parameters arrive early in the backward pass come first.
    /// [`Gradients::finish`] tells of the rest.
    ///
    /// That nothing more will arrive is known from the passes before; whatever arrives against it is an error. So the first
    /// pass of all tells of everything at its end.
    pub fn watched<'a>(&'a mut self, groups: &'a [Vec<usize>], watcher: &'a mut dyn Watcher) -> Gradients<'a> {
        Gradients::new(self, Some(Watch::new(groups, watcher)))
    }
}

/// Is told how far a backward pass has come.
pub trait Watcher {
    /// The gradients of group `group` are complete.
    ///
    /// # Errors
    /// The pass ends with them.
    fn complete(&mut self, group: usize, complete: &mut CompleteGrads<'_>) -> Result<After>;

    /// Something has arrived, perhaps not the last for any group: time to see to what was begun.
    ///
    /// # Errors
    /// The pass ends with them.
    fn arrived(&mut self, complete: &mut CompleteGrads<'_>) -> Result<()> {
        let _ = complete;
        Ok(())
    }
}

/// The gradients to which a backward pass adds nothing more: of the groups that its watcher was told of.
pub struct CompleteGrads<'a> {
    pub(super) slots: &'a mut [Slot],
    pub(super) groups: &'a [Vec<usize>],
}

impl fmt::Debug for CompleteGrads<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompleteGrads").field("groups", &self.groups.len()).finish_non_exhaustive()
    }
}

impl CompleteGrads<'_> {
    fn check(&self, group: usize) -> Result<&[usize]> {
        let told = self.groups.len();
        let of = self.groups.get(group).map(Vec::as_slice);
        of.ok_or_else(|| Error::Input(format!("group {group} of parameters is not complete; {told} are")))
    }

    /// The sum of each parameter of a group, in the group's order; empty if it is released.
    ///
    /// # Errors
    /// [`Error::Input`] for a group that is not complete.
    pub fn sums(&self, group: usize) -> Result<Vec<&[f32]>> {
        Ok(self.check(group)?.iter().map(|&index| self.slots[index].values.as_slice()).collect())
    }

    /// The sum of parameter `member` of a group, to be changed.
    ///
    /// # Errors
    /// [`Error::Input`] for a group that is not complete or has no such parameter.
    pub fn sum_mut(&mut self, group: usize, member: usize) -> Result<&mut [f32]> {
        let members = self.check(group)?;
        let Some(&index) = members.get(member) else {
            let count = members.len();
            return Err(Error::Input(format!("group {group} has {count} parameters, and no parameter {member}")));
        };
        Ok(&mut self.slots[index].values)
    }
}
