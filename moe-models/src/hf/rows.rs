//! Rows of a matrix, copied from the map and given back to it: what a model is packed from, a stretch at a time.

use super::Checkpoint;
use super::checkpoint::joined;
use super::names::FilePart;
use crate::{Error, Result};
use candle_core::Tensor;
use moe_core::ParamSpec;
use std::ops::Range;

impl Checkpoint {
    /// Whether rows of a parameter or of one expert of it can be had by themselves: those of floats that lie there row by row.
    pub(crate) fn has_rows(&self, spec: &ParamSpec, expert: Option<usize>) -> bool {
        let is_matrix = spec.shape.len() == 2 + usize::from(expert.is_some());
        let is_integers =
            |part: &FilePart| self.quantized.is_some_and(|format| self.files.holds_integers(part, format));
        let by_row = |part: &FilePart| !is_integers(part) && self.files.has_rows(part);
        let lies_by_row = || self.parts_of(spec, expert).is_ok_and(|parts| parts.iter().all(by_row));
        is_matrix && !self.is_whole(spec) && lies_by_row()
    }

    /// Rows `rows` of a parameter that is one matrix, or of one expert, in the type of the file. The pages that they lie in are
    /// let go of: a model that is packed from a map is not in memory twice.
    ///
    /// # Errors
    /// [`Error::Format`] if a tensor is missing, has another shape or too few rows.
    pub(crate) fn rows(&self, spec: &ParamSpec, expert: Option<usize>, rows: Range<usize>) -> Result<Tensor> {
        let (mut first, mut parts) = (0, Vec::new());
        for part in self.parts_of(spec, expert)? {
            // Of a stack the first dimension counts experts.
            let count = part.shape[usize::from(part.place.is_some())];
            let own = rows.start.clamp(first, first + count) - first..rows.end.clamp(first, first + count) - first;
            first += count;
            if !own.is_empty() {
                parts.push(self.files.rows(&part, own)?);
            }
        }
        match rows.end <= first && !parts.is_empty() {
            true => joined(&parts),
            false => Err(Error::Argument(format!("rows {rows:?} are not among the {first} of {}", spec.name))),
        }
    }
}
