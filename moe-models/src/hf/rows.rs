//! Rows of a matrix, copied from the map and given back to it: what a model is packed from, a stretch at a time.

use super::names::{FilePart, StackPlace};
use super::{Checkpoint, Layout};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use moe_core::ParamSpec;
use std::ops::Range;

impl Checkpoint {
    /// Whether rows of a parameter or of one expert of it can be had by themselves: those of floats that lie there row by row.
    pub(crate) fn has_rows(&self, spec: &ParamSpec, expert: Option<usize>) -> bool {
        let is_matrix = spec.shape.len() == 2 + usize::from(expert.is_some());
        let by_row = |part: &FilePart| part.place.is_none_or(|place| place.layout == Layout::Rows);
        let lies_by_row = || self.parts_of(spec, expert).is_ok_and(|parts| parts.iter().all(by_row));
        is_matrix && !self.is_whole(spec) && !self.holds_integers(spec, expert) && lies_by_row()
    }

    /// Rows `rows` of a parameter that is one matrix, or of one expert, in the type of the file. The pages that they lie in are
    /// let go of: a model that is packed from a map is not in memory twice.
    ///
    /// # Errors
    /// [`Error::Format`] if a tensor is missing, has another shape or too few rows.
    pub(crate) fn rows(&self, spec: &ParamSpec, expert: Option<usize>, rows: Range<usize>) -> Result<Tensor> {
        let (mut first, mut parts) = (0, Vec::new());
        for FilePart { name, shape, place } in self.parts_of(spec, expert)? {
            let (shard, info) = self.found(&name, &shape)?;
            let (whole, shape) = match place {
                None => (shard.data(info), shape.as_slice()),
                Some(StackPlace { index, .. }) => (shard.bytes_of(&name, index)?, &shape[1..]),
            };
            let (count, inner) = (shape[0], shape[1..].iter().product::<usize>());
            let own = rows.start.clamp(first, first + count) - first..rows.end.clamp(first, first + count) - first;
            first += count;
            if own.is_empty() {
                continue;
            }
            let bytes = info.dtype.bitsize() / 8 * inner;
            if own.start == 0 {
                shard.will_need(whole);
            }
            let data = &whole[own.start * bytes..own.end * bytes];
            let dtype = shard.dtype(&name, info.dtype)?;
            parts.push(Tensor::from_raw_buffer(data, dtype, &[own.len(), inner], &Device::Cpu)?);
            shard.let_go(data);
        }
        match parts.as_slice() {
            [one] if rows.end <= first => Ok(one.clone()),
            [_, ..] if rows.end <= first => Ok(Tensor::cat(&parts, 0)?),
            _ => Err(Error::Argument(format!("rows {rows:?} are not among the {first} of {}", spec.name))),
        }
    }
}
