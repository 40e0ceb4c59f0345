//! [`Units`]: what the elements of a model are counted in where ranks must agree: whole parameters and single experts, each cut
//! into chunks. Knows no values.
//!
//! ```text
//! unit    | a.weight        | mlp.experts.0.fc | mlp.experts.1.fc | ...     in the order of their names
//! chunk   | 0    | 1    | 2 | 3    | 4         | 5    | 6         | ...     CHUNK elements, the last of a unit fewer
//! ```
//!
//! Experts are units of their own, so that chunks are the same wherever the experts of a stack lie.

use crate::{Error, Result};
use candle_core::Var;
use moe_kernels::adamw::CHUNK;
use std::ops::Range;

/// A parameter, or one expert of a stacked parameter.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Unit {
    /// The same on every rank, and no other unit's.
    pub name: String,
    /// Size.
    pub elements: usize,
}

/// One chunk of a parameter that is held here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chunk {
    /// Number in the model.
    pub(super) number: usize,
    /// Elements of the parameter.
    pub(super) range: Range<usize>,
}

/// The units of a model over all ranks, and which of them the parameters held here are made of.
#[derive(Debug, Clone, PartialEq)]
pub struct Units {
    /// By name.
    all: Vec<Unit>,
    /// Number of the first chunk of each, and of the end.
    first_chunks: Vec<usize>,
    /// Of each parameter held here, in the order of its elements: indices of units.
    held: Vec<Vec<usize>>,
}

impl Units {
    /// Of parameters that are the whole model: for each its units, in the order of its elements.
    ///
    /// # Errors
    /// [`Error::Argument`] for a name that is given twice.
    pub fn new(held: &[Vec<Unit>]) -> Result<Self> {
        Self::within(held.concat(), held)
    }

    /// Of parameters that are a part of `model`, all of whose units every rank knows.
    ///
    /// # Errors
    /// [`Error::Argument`] for a name that is given twice, and for a unit held here that is not one of the model's.
    pub fn within(mut model: Vec<Unit>, held: &[Vec<Unit>]) -> Result<Self> {
        model.sort();
        if let Some(pair) = model.windows(2).find(|pair| pair[0].name == pair[1].name) {
            return Err(Error::Argument(format!("{} is given to the optimizer twice", pair[0].name)));
        }
        let find = |unit: &Unit| {
            let unknown = || format!("{} of {} elements is not a part of the model", unit.name, unit.elements);
            model.binary_search(unit).map_err(|_| Error::Argument(unknown()))
        };
        let held = held.iter().map(|units| units.iter().map(find).collect()).collect::<Result<_>>()?;
        let mut first_chunks = vec![0];
        for unit in &model {
            first_chunks.push(first_chunks[first_chunks.len() - 1] + unit.elements.div_ceil(CHUNK));
        }
        Ok(Self { all: model, first_chunks, held })
    }

    /// Of parameters that are one unit each.
    ///
    /// # Errors
    /// As [`Units::new`].
    pub fn of_params(params: &[(String, Var)]) -> Result<Self> {
        let unit = |(name, var): &(String, Var)| vec![Unit { name: name.clone(), elements: var.elem_count() }];
        Self::new(&params.iter().map(unit).collect::<Vec<_>>())
    }

    /// Number of parameters held here.
    pub fn num_params(&self) -> usize {
        self.held.len()
    }

    /// Size of a parameter held here.
    pub fn elements(&self, param: usize) -> usize {
        self.held[param].iter().map(|&unit| self.all[unit].elements).sum()
    }

    /// The units of the model, by name, each with the numbers of its chunks.
    pub(super) fn all(&self) -> impl Iterator<Item = (&Unit, Range<usize>)> {
        self.all.iter().zip(self.first_chunks.windows(2).map(|ends| ends[0]..ends[1]))
    }

    /// Chunks of the model.
    pub(super) fn num_chunks(&self) -> usize {
        self.first_chunks[self.all.len()]
    }

    /// The chunks of a parameter held here, in the order of its elements.
    pub(super) fn chunks(&self, param: usize) -> Vec<Chunk> {
        let (mut chunks, mut start) = (Vec::new(), 0);
        for &unit in &self.held[param] {
            let end = start + self.all[unit].elements;
            let numbers = self.first_chunks[unit]..;
            let chunk = |(number, at): (usize, usize)| Chunk { number, range: at..(at + CHUNK).min(end) };
            chunks.extend(numbers.zip((start..end).step_by(CHUNK)).map(chunk));
            start = end;
        }
        chunks
    }
}
