//! [`ExpertUse`]: what the experts of a layer do on a text.

use crate::{Error, Result};
use moe_core::{DROPPED, DispatchTable, ExpertObserver, ExpertRows, Routing};
use moe_models::Decoder;
use moe_models::train::model::TokenBatch;
use std::sync::{Mutex, PoisonError};

/// What the experts of one layer have done.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertUse {
    /// The layer, counted from 0.
    pub layer: usize,
    /// Rows of each expert.
    pub rows: Vec<u64>,
    /// Of each expert, the sum over its rows of the combine weight times the norm of its output.
    pub contributions: Vec<f64>,
}

impl ExpertUse {
    fn new(layer: usize, num_experts: usize) -> Self {
        Self { layer, rows: vec![0; num_experts], contributions: vec![0.0; num_experts] }
    }

    /// Share of the layer's rows of each expert; 0 of a layer that has seen none.
    pub fn frequencies(&self) -> Vec<f64> {
        let all: u64 = self.rows.iter().sum();
        self.rows.iter().map(|&rows| rows as f64 / all.max(1) as f64).collect()
    }

    /// Mean of combine weight times norm of the output over the rows of each expert; 0 of one that has seen none.
    ///
    /// # Source
    /// REAP (2510.13999), equation 9: router-weighted expert activation.
    pub fn saliencies(&self) -> Vec<f64> {
        self.contributions.iter().zip(&self.rows).map(|(sum, &rows)| sum / rows.max(1) as f64).collect()
    }
}

/// Runs a model over `batches` and adds up what its experts do, layer by layer.
///
/// # Errors
/// If a batch does not fit the model; [`Error::Argument`] naming an expert whose outputs are not finite.
pub fn measure(decoder: &Decoder, batches: &[TokenBatch]) -> Result<Vec<ExpertUse>> {
    let layers = decoder.config().moe_layers();
    let usage = Mutex::new(layers.iter().map(|&(layer, experts)| ExpertUse::new(layer, experts)).collect::<Vec<_>>());
    for batch in batches {
        decoder.observe(&batch.input_ids, batch.seq_len, |layer| Adding { layer, usage: &usage })?;
    }
    let usage = usage.into_inner().unwrap_or_else(PoisonError::into_inner);
    for of in &usage {
        if let Some(expert) = of.contributions.iter().position(|sum| !sum.is_finite()) {
            return Err(Error::Argument(format!(
                "layer {}: the outputs of expert {expert} are not finite on this text; its weights are damaged, or too large",
                of.layer
            )));
        }
    }
    Ok(usage)
}

/// Adds what the experts of one layer do.
#[derive(Debug)]
struct Adding<'a> {
    layer: usize,
    usage: &'a Mutex<Vec<ExpertUse>>,
}

impl ExpertObserver for Adding<'_> {
    fn observe(&self, routing: &Routing, outputs: &ExpertRows) -> moe_core::Result<()> {
        let table = DispatchTable::new(routing);
        let weights: Vec<f32> = routing.combine_weights.flatten_all()?.to_vec1()?;
        let norms: Vec<f32> = outputs.rows.sqr()?.sum(1)?.sqrt()?.to_vec1()?;
        let mut usage = self.usage.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(own) = usage.iter_mut().find(|own| own.layer == self.layer) else { return Ok(()) };
        for (row, &choice) in table.row_choices.iter().enumerate() {
            let expert = routing.expert_ids[choice as usize];
            if expert == DROPPED {
                continue;
            }
            own.rows[expert as usize] += 1;
            own.contributions[expert as usize] += f64::from(weights[choice as usize] * norms[row]);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};
    use moe_core::{ExpertLoad, RouterLosses};

    /// Three tokens with two of three experts each, one choice dropped.
    #[test]
    fn weights_times_norms_by_hand() {
        let weights: [f32; 6] = [0.75, 0.25, 0.5, 0.0, 0.125, 0.875];
        let routing = Routing {
            num_tokens: 3,
            num_experts: 3,
            top_k: 2,
            expert_ids: vec![0, 2, 2, DROPPED, 2, 0],
            slots: vec![0, 0, 1, 0, 2, 1],
            combine_weights: Tensor::from_slice(&weights, (3, 2), &Device::Cpu).unwrap(),
            capacity: None,
            load: ExpertLoad::default(),
            losses: RouterLosses::default(),
        };
        // Norms 5 and 1 of expert 0, 13, 2 and 10 of expert 2.
        let rows: [[f32; 2]; 5] = [[3.0, 4.0], [0.0, 1.0], [5.0, 12.0], [2.0, 0.0], [6.0, 8.0]];
        let outputs = ExpertRows { rows: Tensor::new(&rows, &Device::Cpu).unwrap(), offsets: vec![0, 2, 2, 5] };
        let usage = Mutex::new(vec![ExpertUse::new(1, 3), ExpertUse::new(4, 3)]);
        Adding { layer: 4, usage: &usage }.observe(&routing, &outputs).unwrap();
        let [other, own] = usage.into_inner().unwrap().try_into().unwrap();
        assert_eq!(other, ExpertUse::new(1, 3));
        assert_eq!(own.rows, [2, 0, 3]);
        assert_eq!(own.contributions, [0.75 * 5.0 + 0.875, 0.0, 0.25 * 13.0 + 0.5 * 2.0 + 0.125 * 10.0]);
        assert_eq!(own.saliencies(), [(3.75 + 0.875) / 2.0, 0.0, 5.5 / 3.0]);
    }
}
