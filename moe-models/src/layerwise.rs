//! [`LayerwisePass`]: a folder's model run over a text layer by layer, one layer's weights in memory at a time: for who changes
//! each layer by what those before it, changed already, make of the text.

use crate::blocks::{Norm, Rotaries};
use crate::config::Multipliers;
use crate::decoder::{Backend, Embeddings};
use crate::hf::quantization::refuse_quantized;
use crate::layer::{Layer, LayerPass, Stream};
use crate::params::ParamSource;
use crate::{DecoderConfig, Error, Family, ModelSource, PackedForms, Precision, QuantFormat, Result, TokenBatch};
use candle_core::{Device, Tensor};
use moe_core::Ops;
use moe_core::ops::{ObservedOps, ProductObserver};
use moe_kernels::KernelOps;
use moe_kernels::quantized::IntegerMatrix;
use moe_parallel::Placement;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

/// How far the sequences have come. Everything computes in f32, token by token as in [`crate::Pass::Eval`].
#[derive(Debug)]
pub struct LayerwisePass {
    config: DecoderConfig,
    source: ParamSource,
    /// Of each batch, and the length of its sequences: what the next layer reads.
    streams: Vec<(Stream, usize)>,
    next: usize,
}

impl LayerwisePass {
    /// The sequences of `batches` before the first layer of the model in a folder or GGUF file.
    ///
    /// # Errors
    /// If a file is missing, damaged, or does not fit the configuration; if the weights are quantized; if the ids do not fit the
    /// model.
    pub fn open(path: &Path, batches: &[TokenBatch]) -> Result<Self> {
        let source = ModelSource::open(path)?;
        let (family, quantization) = source.family::<Box<dyn Family>>()?;
        refuse_quantized(source.quantized_form(quantization.as_ref()), &source.config_path())?;
        let config = family.decoder()?;
        let (table, checkpoint) = (Arc::new(config.params()), source.checkpoint(&family)?);
        checkpoint.check(&table)?;
        let source = ParamSource::checkpoint(table, Arc::new(checkpoint), Placement::WHOLE);
        let vb = source.clone().builder(&Device::Cpu);
        let embeddings = Embeddings::new(&config, &vb.pp("model"), &ops(Precision::F32))?;
        let embed =
            |batch: &TokenBatch| Ok((embeddings.sequences(&config, &batch.input_ids, batch.seq_len)?, batch.seq_len));
        let streams = batches.iter().map(embed).collect::<Result<Vec<_>>>()?;
        Ok(Self { config, source, streams, next: 0 })
    }

    /// What the model is made of.
    pub fn config(&self) -> &DecoderConfig {
        &self.config
    }

    /// The layer before which the sequences stand, counted from 0; the number of layers at the end.
    pub fn next_layer(&self) -> usize {
        self.next
    }

    /// Whether that layer has the parameter `name`, an expert's own of a stack.
    pub fn is_next(&self, name: &str) -> bool {
        self.next < self.config.layers.len() && name.starts_with(&format!("model.layers.{}.", self.next))
    }

    /// Runs the next layer as it is in the folder, shown to `observer`, and stays before it.
    ///
    /// # Errors
    /// [`Error::Argument`] at the end; those of `observer`; if the layer cannot be read.
    pub fn observe(&self, observer: Arc<dyn ProductObserver>) -> Result<()> {
        let layer = self.layer(self.source.clone(), Arc::new(ObservedOps::new(ops(Precision::F32), observer)))?;
        for (stream, seq_len) in &self.streams {
            layer.sequences(stream.clone(), LayerPass::infer(self.next, *seq_len))?;
        }
        Ok(())
    }

    /// Runs the next layer with `integers` of `format` in the place of the matrices that have their names (an expert's its own), and
    /// goes on behind it. Inputs of these products are quantized, as they are when a folder of integers is run.
    ///
    /// # Errors
    /// [`Error::Argument`] at the end; if integers do not fit the layer, or it cannot be read.
    pub fn advance(&mut self, format: QuantFormat, integers: HashMap<String, IntegerMatrix>) -> Result<()> {
        let forms = PackedForms::from(Precision::F32).with_stored(format);
        let layer = self.layer(self.source.clone().with_integers(integers), ops(forms))?;
        for (stream, seq_len) in &mut self.streams {
            let (next, _) = layer.sequences(stream.clone(), LayerPass::infer(self.next, *seq_len))?;
            *stream = next;
        }
        self.next += 1;
        Ok(())
    }

    /// What the output layer would see of each batch now, `[batch * seq_len, d_model]`: at the end what it sees.
    ///
    /// # Errors
    /// If the norm cannot be read.
    pub fn hidden(&self) -> Result<Vec<Tensor>> {
        let vb = self.source.clone().builder(&Device::Cpu);
        let norm = Norm::new(&self.config.norm, vb.pp("model.norm"), ops(Precision::F32))?;
        let hidden = |(stream, _): &(Stream, usize)| {
            let [_, normed] = stream.clone().normed(&norm)?;
            Multipliers::apply(self.config.multipliers.output, normed)
        };
        self.streams.iter().map(hidden).collect()
    }

    fn layer(&self, source: ParamSource, ops: Arc<dyn Ops>) -> Result<Layer> {
        let Some(config) = self.config.layers.get(self.next) else {
            return Err(Error::Argument(format!("all {} layers have been run", self.next)));
        };
        let vb = source.builder(&Device::Cpu).pp("model.layers").pp(self.next);
        let mut rotaries = Rotaries::new(self.config.max_seq_len);
        let layer = Layer::new(self.next, config, vb, Backend::alone(&ops), &mut rotaries)?;
        Ok(layer.with_residual(self.config.multipliers.residual))
    }
}

fn ops(forms: impl Into<PackedForms>) -> Arc<dyn Ops> {
    Arc::new(KernelOps::packing(forms))
}
