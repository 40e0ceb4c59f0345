//! [`Grads`]: gradients as an optimizer reads them: of whole parameters, or of what it owns of them.

use super::owned::Owned;
use crate::{Error, Result};
use candle_core::Var;

/// The gradient of each parameter, row-major.
#[derive(Debug, Clone)]
pub enum Grads<'a> {
    /// All elements, of which those that are owned are read.
    Whole(Vec<&'a [f32]>),
    /// The owned ranges, one after the other.
    Owned(Vec<&'a [f32]>),
}

impl<'a> Grads<'a> {
    /// Of whole parameters.
    pub fn whole<G: AsRef<[f32]>>(grads: &'a [G]) -> Self {
        Self::Whole(grads.iter().map(AsRef::as_ref).collect())
    }

    /// What there is of each parameter.
    pub fn all(&self) -> &[&'a [f32]] {
        match self {
            Self::Whole(grads) | Self::Owned(grads) => grads,
        }
    }

    /// The owned ranges of a parameter.
    pub(super) fn ranges(&self, owned: &Owned, param: usize) -> Vec<&'a [f32]> {
        let ranges = owned.ranges(param).iter();
        match self {
            Self::Whole(grads) => ranges.map(|range| &grads[param][range.clone()]).collect(),
            Self::Owned(grads) => {
                let mut rest = grads[param];
                let next = |len: usize| {
                    let (range, others) = rest.split_at(len);
                    rest = others;
                    range
                };
                ranges.map(std::ops::Range::len).map(next).collect()
            }
        }
    }

    /// Refuses gradients of other sizes than the parameters'.
    pub(super) fn check(&self, owned: &Owned, params: &[(String, Var)]) -> Result<()> {
        for (index, ((name, var), grad)) in params.iter().zip(self.all()).enumerate() {
            let held = owned.units().elements(index);
            let (want, has) = match self {
                Self::Whole(_) => (var.elem_count(), "elements"),
                Self::Owned(_) => (owned.elements(index), "owned elements"),
            };
            if var.elem_count() != held || grad.len() != want {
                return Err(Error::Argument(format!(
                    "{name} has {want} {has}, its gradient {}, its optimizer state {held}",
                    grad.len()
                )));
            }
        }
        Ok(())
    }
}
