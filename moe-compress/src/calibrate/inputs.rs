//! [`LayerInputs`]: the second moments of what each matrix of a layer is multiplied with.

use super::SecondMoments;
use candle_core::{Tensor, TensorId};
use moe_core::ops::ProductObserver;
use moe_core::ops::host::to_f32_vec;
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Adds up what a pass shows of one layer.
#[derive(Debug, Default)]
pub struct LayerInputs(Mutex<Gathered>);

#[derive(Debug, Default)]
struct Gathered {
    moments: LayerMoments,
    /// The tensor that was shown last, and whose moments it went to.
    last: Option<(TensorId, usize)>,
}

/// The moments of one layer, by the names of its matrices.
#[derive(Debug, Default)]
pub struct LayerMoments {
    /// Matrices with the same inputs share theirs.
    of_matrix: HashMap<String, usize>,
    moments: Vec<SecondMoments>,
}

impl LayerInputs {
    /// What has been shown until now.
    pub fn take(&self) -> LayerMoments {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner)).moments
    }
}

impl LayerMoments {
    /// A number for the inputs of a matrix, the same for all matrices that share them; `None` if none was shown.
    pub fn inputs_of(&self, matrix: &str) -> Option<usize> {
        self.of_matrix.get(matrix).copied()
    }

    /// The moments of the inputs of this number.
    ///
    /// # Panics
    /// If there is no such number.
    pub fn moments(&self, inputs: usize) -> &SecondMoments {
        &self.moments[inputs]
    }

    /// Size in memory.
    pub fn bytes(&self) -> usize {
        self.moments.iter().map(SecondMoments::bytes).sum()
    }
}

impl ProductObserver for LayerInputs {
    fn observe(&self, matrix: &str, inputs: &Tensor) -> moe_core::Result<()> {
        let mut gathered = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Gathered { moments: LayerMoments { of_matrix, moments }, last } = &mut *gathered;
        let seen = last.filter(|(id, _)| *id == inputs.id()).map(|(_, at)| at);
        let at = *of_matrix.entry(matrix.to_owned()).or_insert(seen.unwrap_or(moments.len()));
        if seen == Some(at) {
            return Ok(());
        }
        if at == moments.len() {
            moments.push(SecondMoments::new(inputs.dims().last().copied().unwrap_or(0)));
        }
        moments[at].add(&to_f32_vec(inputs)?).map_err(|e| moe_core::Error::Input(format!("{matrix}: {e}")))?;
        *last = Some((inputs.id(), at));
        Ok(())
    }
}
