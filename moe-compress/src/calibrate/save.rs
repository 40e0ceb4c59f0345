//! [`save_calibrated`]: from a folder of floats to one of calibrated integers, layer by layer.

use super::{Factor, LayerInputs, LayerMoments, SecondMoments, quantize};
use crate::{Error, Result};
use moe_core::ops::ProductObserver;
use moe_kernels::quantized::{IntegerMatrix, QuantFormat};
use moe_models::hf::quantization::{MatrixToQuantize, nearest, save};
use moe_models::{LayerwisePass, TokenBatch};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

/// Whether moments say enough to calibrate by: from as many tokens on as there are inputs. With fewer they say nothing of some
/// directions, and integers that put their errors there may change the outputs of other text more than the nearest ones. Of a
/// tiny PR-MoE of width 128, trained on 3 million tokens, the matrices that read the norms have 0.5 of the nearest's error on other
/// text, and 0.9 at most, calibrated on 128 tokens; on 64 they have 0.8, and up to 1.3.
fn is_enough(moments: &SecondMoments) -> bool {
    moments.tokens() >= moments.width()
}

/// What became of one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CalibratedLayer {
    /// The layer, counted from 0.
    pub layer: usize,
    /// Its matrices, those of experts not counted.
    pub matrices: usize,
    /// Those of them that were rounded to the nearest, because they got fewer tokens than they have inputs or are not multiplied with as
    /// they are.
    pub nearest_matrices: usize,
    /// Its experts.
    pub experts: usize,
    /// Those of them with a matrix that was rounded to the nearest, because it got fewer tokens than it has inputs.
    pub nearest_experts: usize,
    /// Bytes of the moments of its inputs, the most there is of them at a time.
    pub moment_bytes: usize,
}

/// What became of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Calibration {
    /// Tokens of the text.
    pub tokens: usize,
    /// Every layer, in order.
    pub layers: Vec<CalibratedLayer>,
}

/// Writes the model in the folder `from` with its matrices in `format` into the new folder `to`, as
/// [`moe_models::hf::quantization::save`] does, with integers that change least of what the matrices make of their inputs on
/// `batches`; an expert's inputs are the tokens that are routed to it. A matrix that gets fewer tokens than it has inputs, or that is
/// not multiplied with as it is (`kv_b_proj` of latent attention, which is taken apart), is rounded to the nearest. Tells
/// `observer` of each layer that is done.
///
/// # Errors
/// [`Error::Argument`] for no batch, or inputs that are not finite; as there; if a batch does not fit the model.
pub fn save_calibrated(
    from: &Path,
    to: &Path,
    format: QuantFormat,
    batches: &[TokenBatch],
    observer: &mut dyn FnMut(&CalibratedLayer),
) -> Result<Calibration> {
    let tokens = batches.iter().map(|batch| batch.input_ids.len()).sum();
    if tokens == 0 {
        return Err(Error::Argument("a calibration needs tokens; give a text".into()));
    }
    let mut calibrator = Calibrator {
        pass: LayerwisePass::open(from, batches)?,
        format,
        layer: None,
        calibration: Calibration { tokens, layers: Vec::new() },
        observer,
    };
    save(from, to, format, |matrix| calibrator.quantize(matrix).map_err(Error::into_model))?;
    calibrator.finish_layer()?;
    Ok(calibrator.calibration)
}

/// Quantizes matrices in the order of the model, and runs the layers before each.
struct Calibrator<'a> {
    pass: LayerwisePass,
    format: QuantFormat,
    layer: Option<Layer>,
    calibration: Calibration,
    observer: &'a mut dyn FnMut(&CalibratedLayer),
}

/// The layer at hand.
#[derive(Default)]
struct Layer {
    moments: LayerMoments,
    /// The factor used last, of the inputs of this number.
    factor: Option<(usize, Factor)>,
    /// What has been quantized: of each parameter, the rows so far, in order.
    done: BTreeMap<String, Vec<IntegerMatrix>>,
    matrices: usize,
    nearest_matrices: usize,
    experts: BTreeSet<usize>,
    nearest_experts: BTreeSet<usize>,
}

impl Calibrator<'_> {
    fn quantize(&mut self, matrix: &MatrixToQuantize<'_>) -> Result<IntegerMatrix> {
        while !self.pass.is_next(matrix.parameter) {
            let done = self.finish_layer()?;
            self.pass.advance(self.format, done)?;
        }
        let layer = match &mut self.layer {
            Some(layer) => layer,
            None => {
                let inputs = Arc::new(LayerInputs::default());
                self.pass.observe(Arc::clone(&inputs) as Arc<dyn ProductObserver>)?;
                self.layer.insert(Layer { moments: inputs.take(), ..Layer::default() })
            }
        };
        layer.quantize(matrix)
    }

    /// Tells of the layer at hand, if there is one; its integers by parameter.
    fn finish_layer(&mut self) -> Result<HashMap<String, IntegerMatrix>> {
        let Some(layer) = self.layer.take() else { return Ok(HashMap::new()) };
        let done = CalibratedLayer {
            layer: self.pass.next_layer(),
            matrices: layer.matrices,
            nearest_matrices: layer.nearest_matrices,
            experts: layer.experts.len(),
            nearest_experts: layer.nearest_experts.len(),
            moment_bytes: layer.moments.bytes(),
        };
        (self.observer)(&done);
        self.calibration.layers.push(done);
        layer.done.into_iter().map(|(name, rows)| Ok((name, below_each_other(self.format, &rows)?))).collect()
    }
}

impl Layer {
    fn quantize(&mut self, matrix: &MatrixToQuantize<'_>) -> Result<IntegerMatrix> {
        let inputs = self.moments.inputs_of(matrix.parameter);
        let inputs = inputs.filter(|&inputs| is_enough(self.moments.moments(inputs)));
        self.experts.extend(matrix.expert);
        self.matrices += usize::from(matrix.expert.is_none());
        let integers = match inputs {
            Some(inputs) => quantize(matrix.format, matrix.values, matrix.shape, self.factor(inputs, matrix)?)?,
            None => {
                self.nearest_experts.extend(matrix.expert);
                self.nearest_matrices += usize::from(matrix.expert.is_none());
                nearest(matrix)?
            }
        };
        self.done.entry(matrix.parameter.to_owned()).or_default().push(integers.clone());
        Ok(integers)
    }

    fn factor(&mut self, inputs: usize, matrix: &MatrixToQuantize<'_>) -> Result<&Factor> {
        let of_others = self.factor.take().filter(|(of, _)| *of == inputs);
        let factor = match of_others {
            Some((_, factor)) => factor,
            None => Factor::new(self.moments.moments(inputs))
                .map_err(|e| Error::Argument(format!("{}: {e}", matrix.parameter)))?,
        };
        Ok(&self.factor.insert((inputs, factor)).1)
    }
}

/// One matrix of the rows of several.
fn below_each_other(format: QuantFormat, parts: &[IntegerMatrix]) -> Result<IntegerMatrix> {
    if let [only] = parts {
        return Ok(only.clone());
    }
    let out = parts.iter().map(|part| part.shape()[0]).sum();
    let inner = parts.first().map_or(0, |part| part.shape()[1]);
    let integers = parts.iter().flat_map(|part| part.integers().iter().copied()).collect();
    let scales = parts.iter().flat_map(|part| part.scales().iter().copied()).collect();
    Ok(IntegerMatrix::new(format, [out, inner], integers, scales).map_err(moe_models::Error::from)?)
}
