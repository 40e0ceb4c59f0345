//! [`NonFinite`]: which numbers of a step were not finite, so that a person knows where to look. Decides nothing.

use super::model::LossParts;
use super::optimizer::Grads;
use crate::Result;
use candle_core::Var;
use std::fmt;

/// What was not finite in a step. Each part names the first of its kind, in the order of the micro-batches or of the
/// model's parameters.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct NonFinite {
    /// A parameter, before the update. If there is one, the rest follows from it.
    pub parameter: Option<String>,
    /// A micro-batch's loss: its index in the step, and the parts of the loss.
    pub loss: Option<NonFiniteLoss>,
    /// A parameter whose gradient, summed over the micro-batches, holds such a value.
    pub gradient: Option<String>,
}

/// A loss that is not finite.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NonFiniteLoss {
    /// Index in the step.
    pub micro_batch: usize,
    /// Total loss, nats per token.
    pub loss: f64,
    /// What it is made of.
    pub parts: LossParts,
}

impl NonFinite {
    /// Looks through parameters and gradients, as far as there are any. Reads everything, so it is for steps that have gone
    /// wrong.
    ///
    /// # Errors
    /// If a parameter's values cannot be read.
    pub fn find(params: &[(String, Var)], grads: &Grads<'_>) -> Result<Self> {
        let mut found = Self::default();
        for ((name, var), grad) in params.iter().zip(grads.all()) {
            if found.parameter.is_none() && any(&var.flatten_all()?.to_vec1::<f32>()?) {
                found.parameter = Some(name.clone());
            }
            if found.gradient.is_none() && any(grad) {
                found.gradient = Some(name.clone());
            }
        }
        Ok(found)
    }
}

fn any(values: &[f32]) -> bool {
    values.iter().any(|x| !x.is_finite())
}

impl fmt::Display for NonFinite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        parts.extend(self.parameter.as_ref().map(|name| format!("parameter {name} is not finite")));
        parts.extend(self.loss.map(|NonFiniteLoss { micro_batch, loss, parts }| {
            let (lm, aux) = (parts.lm, parts.aux());
            format!("the loss of micro-batch {micro_batch} is {loss} (language model {lm}, auxiliary {aux})")
        }));
        parts.extend(self.gradient.as_ref().map(|name| format!("the gradient of {name} is not finite")));
        if parts.is_empty() {
            return f.write_str("a gradient that another rank holds is not finite");
        }
        f.write_str(&parts.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn a_rank_that_holds_nothing_of_it_says_so() {
        assert_eq!(NonFinite::default().to_string(), "a gradient that another rank holds is not finite");
    }

    #[test]
    fn the_first_of_each_kind_is_named() {
        let var = |values: &[f32]| Var::from_slice(values, values.len(), &Device::Cpu).unwrap();
        let params = [("a".to_owned(), var(&[1.0])), ("b".to_owned(), var(&[2.0])), ("c".to_owned(), var(&[f32::NAN]))];
        let grads = [vec![0.5], vec![f32::INFINITY], vec![f32::NAN]];
        let found = NonFinite::find(&params, &Grads::whole(&grads)).unwrap();
        assert_eq!((found.parameter.as_deref(), found.gradient.as_deref()), (Some("c"), Some("b")));
        let loss = NonFiniteLoss {
            micro_batch: 2,
            loss: f64::NAN,
            parts: LossParts { lm: 1.5, load_balance: f64::NAN, router_z: 0.0, kd: 0.0 },
        };
        assert_eq!(
            NonFinite { loss: Some(loss), ..found }.to_string(),
            "parameter c is not finite; the loss of micro-batch 2 is NaN (language model 1.5, auxiliary NaN); the gradient of b is not finite"
        );
        assert_eq!(NonFinite::find(&params[..2], &Grads::whole(&[[0.0], [1.0]])).unwrap(), NonFinite::default());
    }
}
