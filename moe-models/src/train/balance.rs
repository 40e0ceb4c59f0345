//! Balance of experts without a loss: the biases by which routers choose move after each step, by the loads of its global batch.

use super::model::{LayerLoad, TrainModel};
use crate::{Error, Result};
use candle_core::Tensor;
use moe_core::updated_selection_bias;

/// Moves every selection bias of `model` by `speed`: up for experts that were asked for less than the mean of their layer in
/// `layers`, down for those asked for more. Loads are those of all ranks, so that each moves its copy alike. No product reads these
/// biases, so none has a rounded copy.
///
/// # Errors
/// [`Error::Argument`] for a layer whose load is not known.
pub(super) fn move_selection_biases<M: TrainModel>(model: &M, layers: &[LayerLoad], speed: f64) -> Result<()> {
    if speed == 0.0 {
        return Ok(());
    }
    for (layer, bias) in model.selection_biases() {
        let Some(LayerLoad { load, .. }) = layers.iter().find(|load| load.layer == layer) else {
            return Err(Error::Argument(format!("the pass told no load of layer {layer}, whose bias is to be moved")));
        };
        let moved = updated_selection_bias(&bias.to_vec1()?, &load.tokens_per_expert, speed as f32)?;
        bias.set(&Tensor::new(moved, bias.device())?)?;
    }
    Ok(())
}
