//! [`GradBuffers`]: where the gradients of parameters are kept: one flat f32 buffer per group, made once.

use super::{GradSlice, Gradients};
use crate::{Error, Result};
use candle_core::{TensorId, Var};
use std::collections::HashMap;
use std::ops::Range;

/// Gradients that are kept, reduced and updated together: one after the other in the order of their parameters.
#[derive(Debug, Clone)]
pub struct GradGroup {
    /// For errors and reports.
    pub name: String,
    /// All of them.
    pub values: Vec<f32>,
}

#[derive(Debug, Clone)]
struct Place {
    group: usize,
    range: Range<usize>,
}

/// Sums of the gradients of registered parameters.
///
/// # Source
/// Megatron-LM's gradient accumulation fusion into `main_grad` (2104.04473, section 3).
#[derive(Debug)]
pub struct GradBuffers {
    places: Vec<Place>,
    by_id: HashMap<TensorId, usize>,
    groups: Vec<GradGroup>,
    /// Parameters whose values are those of an earlier sum.
    stale: Vec<bool>,
}

impl GradBuffers {
    /// Buffers for `params`, each with the name of the group it belongs to; all are zero.
    ///
    /// # Errors
    /// [`Error::Input`] for a variable that is given twice.
    pub fn new<'a>(params: impl IntoIterator<Item = (&'a str, &'a Var, String)>) -> Result<Self> {
        let mut buffers = Self { places: Vec::new(), by_id: HashMap::new(), groups: Vec::new(), stale: Vec::new() };
        let mut lens: Vec<usize> = Vec::new();
        for (name, var, group_name) in params {
            let group = buffers.groups.iter().position(|group| group.name == group_name).unwrap_or_else(|| {
                buffers.groups.push(GradGroup { name: group_name, values: Vec::new() });
                lens.push(0);
                lens.len() - 1
            });
            let range = lens[group]..lens[group] + var.elem_count();
            lens[group] = range.end;
            if buffers.by_id.insert(var.id(), buffers.places.len()).is_some() {
                return Err(Error::Input(format!("parameter {name} is registered twice")));
            }
            buffers.places.push(Place { group, range });
        }
        buffers.groups.iter_mut().zip(lens).for_each(|(group, len)| group.values = vec![0.0; len]);
        buffers.stale = vec![true; buffers.places.len()];
        Ok(buffers)
    }

    /// The gradient of parameter `index`, in the order they were registered in, row-major.
    pub fn of(&self, index: usize) -> &[f32] {
        let place = &self.places[index];
        &self.groups[place.group].values[place.range.clone()]
    }

    /// All of them, in the order they were registered in.
    pub fn all(&self) -> Vec<&[f32]> {
        (0..self.places.len()).map(|index| self.of(index)).collect()
    }

    /// The groups, in the order of their first parameters.
    pub fn groups(&self) -> &[GradGroup] {
        &self.groups
    }

    /// The same, to be reduced.
    pub fn groups_mut(&mut self) -> &mut [GradGroup] {
        &mut self.groups
    }

    /// Begins a new sum. Nothing is written yet: the first contribution to each parameter replaces what is there.
    pub fn begin(&mut self) {
        self.stale.fill(true);
    }

    /// Ends the sum: parameters that took no part have zeros.
    pub fn finish(&mut self) {
        for (place, stale) in self.places.iter().zip(&mut self.stale) {
            if std::mem::replace(stale, false) {
                self.groups[place.group].values[place.range.clone()].fill(0.0);
            }
        }
    }

    /// Where a backward pass adds its gradients.
    pub fn gradients(&mut self) -> Gradients<'_> {
        let Self { places, by_id, groups, stale } = self;
        let mut rest: Vec<&mut [f32]> = groups.iter_mut().map(|group| group.values.as_mut_slice()).collect();
        let slices = places.iter().zip(stale).map(|(place, stale)| {
            let (values, others) = std::mem::take(&mut rest[place.group]).split_at_mut(place.range.len());
            rest[place.group] = others;
            GradSlice::new(values, stale)
        });
        Gradients::new(by_id, slices.map(Some).collect())
    }
}
