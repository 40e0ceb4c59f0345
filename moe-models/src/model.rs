//! [`Model`]: a family's configuration and its parameters as variables, for training, checkpoints and evaluation; and the
//! packed form of a model, for inference alone.

use crate::batch::{LossOutput, Pass, TokenBatch};
use crate::families::{Family, ReadFamily};
use crate::hf::quantization::{QuantizationConfig, read_config};
use crate::hf::{self, Checkpoint, KeptPath};
use crate::integer_part::IntegerPart;
use crate::opened::Opened;
use crate::params::{ParamSource, ParamTable};
use crate::{Decoder, DecoderConfig, DropoutConfig, Error, ModelSource, Recompute, Result};
use candle_core::{DType, Device, Tensor, Var};
use moe_core::{CandleOps, Ops, ParamSpec, WeightUse};
use moe_kernels::{KeptWeights, KernelOps, PackedForms, Precision};
use moe_parallel::{Mesh, Placement};
use std::borrow::Cow;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tracing::{debug, debug_span, warn};

/// A model of family `F`, with its weights.
#[derive(Debug)]
pub struct Model<F = Box<dyn Family>> {
    family: F,
    table: Arc<ParamTable>,
    variables: Vec<(String, Var)>,
    /// Those of the variables that training changes.
    trainable: Vec<(String, Var)>,
    /// The others as the training decoder reads them: the same memory, without gradients.
    frozen: Vec<Tensor>,
    precision: Precision,
    /// Over the variables: gradients of the trainable ones are recorded.
    training: Decoder,
    /// Over the same memory, detached.
    inference: Decoder,
    device: Device,
    /// Where this is one rank's part.
    mesh: Option<Arc<Mesh>>,
}

/// What a model is made of besides its values.
struct Blueprint<F> {
    family: F,
    config: DecoderConfig,
    table: Arc<ParamTable>,
    mesh: Option<Arc<Mesh>>,
    device: Device,
}

impl<F: Family> Blueprint<F> {
    fn new(family: F, mesh: Option<Arc<Mesh>>, device: &Device) -> Result<Self> {
        let config = family.decoder()?;
        let table = Arc::new(config.params());
        Ok(Self { family, config, table, mesh, device: device.clone() })
    }

    /// A model whose parameters begin with these values, and all that gradients can change are trainable.
    fn of_values(self, value: impl Fn(&ParamSpec) -> Result<Tensor>) -> Result<Model<F>> {
        let variable = |spec: &ParamSpec| Ok((spec.name.clone(), Var::from_tensor(&value(spec)?)?));
        let variables = self.table.specs().iter().map(variable).collect::<Result<Vec<_>>>()?;
        let trained = |name: &str| self.table.get(name).is_none_or(|spec| spec.trained);
        let trainable = variables.iter().filter(|(name, _)| trained(name)).cloned().collect();
        self.assemble(variables, trainable, Precision::F32)
    }

    /// One rank's part, whose values `source` gives.
    fn of_source(self, source: impl FnOnce(Arc<ParamTable>, Placement) -> ParamSource) -> Result<Model<F>> {
        let placement = self.mesh.as_ref().map_or(Placement::WHOLE, |mesh| mesh.placement());
        let source = source(Arc::clone(&self.table), placement);
        self.of_values(|spec| Ok(source.part(spec, &Device::Cpu)?.to_dtype(DType::F32)?))
    }

    fn assemble(
        self,
        variables: Vec<(String, Var)>,
        trainable: Vec<(String, Var)>,
        precision: Precision,
    ) -> Result<Model<F>> {
        let Self { family, config, table, mesh, device } = self;
        let ops = plain_ops(precision, &device)?;
        let build = |source: ParamSource| match &mesh {
            None => Decoder::new(config.clone(), source.builder(&device), Arc::clone(&ops)),
            Some(mesh) => {
                let vb = source.at(mesh.placement()).builder(&device);
                Decoder::over(config.clone(), vb, Arc::clone(&ops), mesh)
            }
        };
        let trains: HashSet<&str> = trainable.iter().map(|(name, _)| name.as_str()).collect();
        let mut frozen = Vec::new();
        let mut read = |name: &str, var: &Var| {
            if trains.contains(name) {
                return var.as_tensor().clone();
            }
            frozen.push(var.detach());
            frozen[frozen.len() - 1].clone()
        };
        let tensors: Vec<_> = variables.iter().map(|(name, var)| (name.clone(), read(name, var))).collect();
        let training = build(ParamSource::tensors(Arc::clone(&table), tensors))?;
        let inference = build(ParamSource::detached(Arc::clone(&table), &variables))?;
        Ok(Model { family, table, variables, trainable, frozen, precision, training, inference, device, mesh })
    }
}

impl<F: Family> Model<F> {
    /// A fresh model; the same seed gives the same weights.
    ///
    /// # Errors
    /// [`Error::Config`] if the configuration is not valid.
    pub fn new(family: F, seed: u64, device: &Device) -> Result<Self> {
        Blueprint::new(family, None, device)?.of_values(|spec| Ok(spec.initial(seed, device)?))
    }

    /// One rank's part of a fresh model, on the CPU: the values that one rank would have. Called by all ranks of `mesh`, as are
    /// passes; ranks of one tensor group run the same tokens.
    ///
    /// # Errors
    /// As [`Model::new`], and [`Decoder::over`].
    pub fn new_over(family: F, seed: u64, mesh: Arc<Mesh>) -> Result<Self> {
        let blueprint = Blueprint::new(family, Some(mesh), &Device::Cpu)?;
        blueprint.of_source(|table, placement| ParamSource::initial(table, seed, placement))
    }

    /// A model on the CPU, or one rank's part of it, whose parameters `value` gives: of each a rank's part, f32. With a mesh, called
    /// by all its ranks.
    ///
    /// # Errors
    /// As [`Model::new_over`]; those of `value`.
    pub fn of_parts(
        family: F,
        mesh: Option<Arc<Mesh>>,
        value: impl Fn(&ParamSpec, Placement) -> Result<Tensor>,
    ) -> Result<Self> {
        let placement = mesh.as_ref().map_or(Placement::WHOLE, |mesh| mesh.placement());
        Blueprint::new(family, mesh, &Device::Cpu)?.of_values(|spec| value(spec, placement))
    }

    /// A model with the weights of a checkpoint.
    ///
    /// # Errors
    /// [`Error::Format`] if the checkpoint is another model's.
    pub fn from_checkpoint(family: F, checkpoint: &Checkpoint, device: &Device) -> Result<Self> {
        let blueprint = Blueprint::new(family, None, device)?;
        checkpoint.check(&blueprint.table)?;
        blueprint.of_values(|spec| Ok(checkpoint.tensor(spec, device)?.to_dtype(DType::F32)?))
    }

    /// One rank's part of a model with the weights of a checkpoint, of which only this part is read. Called by all ranks.
    ///
    /// # Errors
    /// As [`Model::from_checkpoint`], and [`Decoder::over`].
    pub fn from_checkpoint_over(family: F, checkpoint: Arc<Checkpoint>, mesh: Arc<Mesh>) -> Result<Self> {
        let blueprint = Blueprint::new(family, Some(mesh), &Device::Cpu)?;
        checkpoint.check(&blueprint.table)?;
        blueprint.of_source(|table, placement| ParamSource::checkpoint(table, checkpoint, placement))
    }

    /// The same model with its matrix products in `precision`; sums, softmax, norms and the router stay f32. A new model
    /// computes in f32.
    ///
    /// # Errors
    /// [`Error::Argument`] for a precision that the device has no operations for.
    pub fn with_precision(self, precision: Precision) -> Result<Self> {
        let trainable = self.trainable.clone();
        self.reassembled(trainable, precision)
    }

    /// The same model of which training leaves the parameters alone that `frozen` names (stacked experts by the name of the
    /// stack), and no others but those that no gradient changes: they cost no gradient, no buffer and no moments, and are saved as ever. A checkpoint does not say
    /// what was frozen: who resumes from it freezes the same.
    ///
    /// # Errors
    /// [`Error::Config`] if nothing is left to train.
    pub fn with_frozen(self, frozen: impl Fn(&str) -> bool) -> Result<Self> {
        let trained = |name: &str| self.table.get(name).is_none_or(|spec| spec.trained) && !frozen(name);
        let trainable: Vec<_> = self.variables.iter().filter(|(name, _)| trained(name)).cloned().collect();
        if trainable.is_empty() {
            let count = self.variables.len();
            return Err(Error::Config(format!("all {count} parameters are frozen, which leaves nothing to train")));
        }
        let precision = self.precision;
        self.reassembled(trainable, precision)
    }

    /// The same variables under other decoders.
    fn reassembled(self, trainable: Vec<(String, Var)>, precision: Precision) -> Result<Self> {
        let (config, recompute, dropout) = (self.training.config().clone(), self.recompute(), self.dropout());
        let Self { family, table, variables, mesh, device, .. } = self;
        let model = Blueprint { family, config, table, mesh, device }.assemble(variables, trainable, precision)?;
        model.with_recompute(recompute).with_dropout(dropout)
    }

    /// The same model whose training passes compute again what `recompute` says. The bits are the same.
    #[must_use]
    pub fn with_recompute(self, recompute: Recompute) -> Self {
        Self { training: self.training.with_recompute(recompute), ..self }
    }

    /// What training passes compute again.
    pub fn recompute(&self) -> Recompute {
        self.training.recompute()
    }

    /// The same model whose training passes drop so much; evaluation and inference drop nothing.
    ///
    /// # Errors
    /// [`Error::Config`] for a probability outside `[0, 1)`.
    pub fn with_dropout(self, dropout: DropoutConfig) -> Result<Self> {
        Ok(Self { training: self.training.with_dropout(dropout)?, ..self })
    }

    /// What training passes drop.
    pub fn dropout(&self) -> DropoutConfig {
        self.training.dropout()
    }

    /// The precision of the matrix products.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Which part of the model this is.
    pub fn placement(&self) -> Placement {
        self.mesh.as_ref().map_or(Placement::WHOLE, |mesh| mesh.placement())
    }

    /// The same model for inference alone: weights packed for the kernels, the variables gone.
    ///
    /// # Errors
    /// As [`Model::with_precision`].
    pub fn into_packed(self) -> Result<Decoder> {
        if self.mesh.is_some() {
            return Err(Error::Argument(
                "a rank's part of a model is not packed: load it over the mesh instead".into(),
            ));
        }
        let Self { table, variables, precision, training, inference, device, .. } = self;
        let config = inference.config().clone();
        drop((training, inference));
        packed(config, ParamSource::detached(table, &variables), precision, &device)
    }

    /// Writes `config.json`, `generation_config.json` and `model.safetensors` (in shards past 5 GB) into an existing
    /// folder, under the names the family publishes. Each file is written whole under another name first.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be written.
    pub fn save(&self, dir: &Path, dtype: DType) -> Result<()> {
        hf::save(self, dir, dtype)
    }

    /// The family's configuration.
    pub fn config(&self) -> &F {
        &self.family
    }

    /// What the layers are made of.
    pub fn decoder_config(&self) -> &DecoderConfig {
        self.inference.config()
    }

    /// Every parameter as a description.
    pub fn table(&self) -> &ParamTable {
        &self.table
    }

    /// Every parameter with its name, in the order of the forward pass; experts are stacked.
    pub fn params(&self) -> &[(String, Var)] {
        &self.variables
    }

    /// Those of them that training changes: all, unless some are frozen ([`Model::with_frozen`]).
    pub fn trainable(&self) -> &[(String, Var)] {
        &self.trainable
    }

    /// The frozen ones, each the very tensor that the training decoder reads.
    pub fn frozen(&self) -> &[Tensor] {
        &self.frozen
    }

    /// The decoder over the variables' memory, without gradients.
    pub fn decoder(&self) -> &Decoder {
        &self.inference
    }

    /// The decoder over the variables, with gradients of the trainable ones.
    pub fn training_decoder(&self) -> &Decoder {
        &self.training
    }

    /// The loss of a batch.
    ///
    /// # Errors
    /// As [`Decoder::loss`].
    pub fn loss(&self, batch: &TokenBatch, pass: Pass) -> Result<LossOutput> {
        match pass {
            Pass::Train(_) => self.training.loss(batch, pass),
            Pass::Eval => self.inference.loss(batch, pass),
        }
    }
}

impl<F: ReadFamily> Model<F> {
    /// Reads a Hugging Face folder, or a GGUF file.
    ///
    /// # Errors
    /// If a file is missing, damaged, or does not fit the configuration; if the weights are quantized.
    pub fn load(path: &Path, device: &Device) -> Result<Self> {
        let (family, checkpoint) = read_plain(path)?;
        Self::from_checkpoint(family, &checkpoint, device)
    }

    /// The same also where the weights are quantized: the variables are then the values that the integers stand for.
    ///
    /// # Errors
    /// If a file is missing, damaged, or does not fit the configuration.
    pub fn load_dequantized(path: &Path, device: &Device) -> Result<Self> {
        let source = ModelSource::open(path)?;
        let (family, quantization) = source.family::<F>()?;
        let checkpoint = source.checkpoint(&family)?;
        let checkpoint = match quantization {
            Some(QuantizationConfig { format, .. }) => checkpoint.with_integers(format),
            None => checkpoint,
        };
        Self::from_checkpoint(family, &checkpoint, device)
    }

    /// One rank's part of the model in a Hugging Face folder or GGUF file, of which only this part is read. Called by all ranks of
    /// `mesh`.
    ///
    /// # Errors
    /// As [`Model::load`], and [`Decoder::over`].
    pub fn load_over(path: &Path, mesh: Arc<Mesh>) -> Result<Self> {
        let (family, checkpoint) = read_plain(path)?;
        Self::from_checkpoint_over(family, Arc::new(checkpoint), mesh)
    }

    /// Reads a model from the contents of `config.json` and `model.safetensors`.
    ///
    /// # Errors
    /// If one of them is damaged or they do not fit each other; if the weights are quantized.
    pub fn from_bytes(config_json: &[u8], weights: impl Into<Cow<'static, [u8]>>, device: &Device) -> Result<Self> {
        let path = Path::new("config.json");
        let (family, quantization) = read_config::<F>(config_json, path)?;
        refuse_quantized(quantization.map(|config| config.format.to_string()), path)?;
        let checkpoint = Checkpoint::from_bytes(weights.into(), &family)?;
        Self::from_checkpoint(family, &checkpoint, device)
    }
}

/// A model whose weights are variables to be, of which [`Model`] has no other use than their values.
pub(crate) fn read_plain<F: ReadFamily>(path: &Path) -> Result<(F, Checkpoint)> {
    let source = ModelSource::open(path)?;
    let family: F = plain_family(&source)?;
    let checkpoint = source.checkpoint(&family)?;
    Ok((family, checkpoint))
}

/// The family of such a model.
pub(crate) fn plain_family<F: ReadFamily>(source: &ModelSource) -> Result<F> {
    let (family, quantization) = source.family()?;
    refuse_quantized(source.quantized_form(quantization.as_ref()), &source.config_path())?;
    Ok(family)
}

fn refuse_quantized(form: Option<String>, path: &Path) -> Result<()> {
    match form {
        None => Ok(()),
        Some(form) => Err(Error::format(
            path,
            format!(
                "the weights are quantized ({form}), and training changes floats: load them for inference (Decoder::load), start \
                 from those they were made of, or take the values that the integers stand for (Model::load_dequantized)"
            ),
        )),
    }
}

impl Decoder {
    /// Reads a Hugging Face folder of any family, or a GGUF file, for inference alone: weights are packed as they are read, and no
    /// other form of them is ever whole in memory. In one [`Precision`], or quantized on the way where `forms` say so; a folder that is
    /// quantized keeps the integers it has, and so do Q4_0 tensors of a GGUF file where
    /// [`QuantFormat::INT4`](crate::QuantFormat::INT4) is asked for.
    ///
    /// # Errors
    /// If a file is missing, damaged, or does not fit the configuration; if `forms` ask for other integers than a quantized folder
    /// has.
    pub fn load(path: &Path, forms: impl Into<PackedForms>) -> Result<Self> {
        Self::from_source(&ModelSource::open(path)?, forms)
    }

    /// The same of a model that is opened already.
    ///
    /// # Errors
    /// As [`Decoder::load`].
    pub fn from_source(source: &ModelSource, forms: impl Into<PackedForms>) -> Result<Self> {
        Self::packed_from(Opened::of_source(source, forms.into())?, None)
    }

    /// The same, with the packed weights kept in a file in the folder `cache`: the first start with these files and forms writes it, and
    /// later ones map it and pack nothing. Whether it was there.
    ///
    /// # Errors
    /// As [`Decoder::load`]; [`Error::Io`] if the folder cannot be made.
    pub fn load_kept(path: &Path, forms: impl Into<PackedForms>, cache: &Path) -> Result<(Self, Kept)> {
        Self::from_source_kept(&ModelSource::open(path)?, forms, cache)
    }

    /// The same of a model that is opened already.
    ///
    /// # Errors
    /// As [`Decoder::load_kept`].
    pub fn from_source_kept(source: &ModelSource, forms: impl Into<PackedForms>, cache: &Path) -> Result<(Self, Kept)> {
        let forms = forms.into();
        let kept = KeptPath::of(cache, &source.required("config.json")?, &source.weight_files()?, &forms)?;
        let file = kept.open().map(|file| Arc::new(file) as Arc<dyn KeptWeights>);
        let is_there = file.is_some();
        let decoder = Self::packed_from(Opened::of_source(source, forms)?, file)?;
        if is_there {
            return Ok((decoder, Kept::Found(kept.path().to_owned())));
        }
        let written = match kept.write(&decoder.weights()) {
            Ok(()) => Kept::Written(kept.path().to_owned()),
            Err(error) => Kept::Unwritten(error.to_string()),
        };
        Ok((decoder, written))
    }

    /// One rank's part of the model in a Hugging Face folder or GGUF file, of which only this part is read, packed as it is read.
    /// Called by all ranks of `mesh`, as are passes.
    ///
    /// # Errors
    /// As [`Decoder::load`], and [`Decoder::over`].
    pub fn load_over(path: &Path, forms: impl Into<PackedForms>, mesh: &Mesh) -> Result<Self> {
        Self::from_source_over(&ModelSource::open(path)?, forms, mesh)
    }

    /// The same of a model that is opened already.
    ///
    /// # Errors
    /// As [`Decoder::load_over`].
    pub fn from_source_over(source: &ModelSource, forms: impl Into<PackedForms>, mesh: &Mesh) -> Result<Self> {
        Self::packed_over(Opened::of_source(source, forms.into())?, mesh)
    }

    /// The same from the contents of `config.json` and `model.safetensors`.
    ///
    /// # Errors
    /// As [`Decoder::load_over`].
    pub fn from_bytes_over(
        config_json: &[u8],
        weights: impl Into<Cow<'static, [u8]>>,
        forms: impl Into<PackedForms>,
        mesh: &Mesh,
    ) -> Result<Self> {
        Self::packed_over(Opened::from_bytes(config_json, weights.into(), forms.into())?, mesh)
    }

    fn packed_over(opened: Opened, mesh: &Mesh) -> Result<Self> {
        let Opened { family, checkpoint, forms, .. } = opened;
        let config = family.decoder()?;
        let table = Arc::new(config.params());
        checkpoint.check(&table)?;
        tell_of_cut_groups(&table, &checkpoint, mesh.placement(), &forms);
        let source = ParamSource::checkpoint(table, Arc::new(checkpoint), mesh.placement());
        Self::over(config, source.builder(&Device::Cpu), Arc::new(KernelOps::packing(forms)), mesh)
    }

    /// The same from the contents of `config.json` and `model.safetensors`.
    ///
    /// # Errors
    /// If one of them is damaged or they do not fit each other, or `forms`.
    pub fn from_bytes(
        config_json: &[u8],
        weights: impl Into<Cow<'static, [u8]>>,
        forms: impl Into<PackedForms>,
    ) -> Result<Self> {
        Self::packed_from(Opened::from_bytes(config_json, weights.into(), forms.into())?, None)
    }

    fn packed_from(opened: Opened, kept: Option<Arc<dyn KeptWeights>>) -> Result<Self> {
        let _load = debug_span!("load").entered();
        let Opened { family, checkpoint, forms, .. } = opened;
        let config = family.decoder()?;
        let table = Arc::new(config.params());
        checkpoint.check(&table)?;
        // Not before the files are known to hold them: a configuration alone may name more than a number counts.
        let parameters = table.elem_count();
        let source = ParamSource::checkpoint(table, Arc::new(checkpoint), Placement::WHOLE);
        let ops = KernelOps::packing(forms);
        let ops = kept.into_iter().fold(ops, KernelOps::with_kept);
        let decoder = Self::new(config, source.builder(&Device::Cpu), Arc::new(ops))?;
        debug!(parameters, ?forms, "weights are packed");
        Ok(decoder)
    }
}

/// Says how many matrices of integers a rank has in another form, because its part begins inside a group.
fn tell_of_cut_groups(table: &ParamTable, checkpoint: &Checkpoint, placement: Placement, forms: &PackedForms) {
    let Some(format) = checkpoint.integer_format() else { return };
    let is_cut = |spec: &&ParamSpec| {
        let expert = spec.is_stacked().then_some(0);
        checkpoint.holds_integers(spec, expert) && IntegerPart::of(placement, spec, format).is_none()
    };
    let cut: Vec<&str> = table.specs().iter().filter(is_cut).map(|spec| spec.name.as_str()).collect();
    if let Some(first) = cut.first() {
        warn!(
            "{} matrices ({first} is the first) are in {format}, and this rank's parts of them begin inside a group: what the integers \
             stand for is kept in {} instead; with other numbers of ranks (tp, expert_slices) the integers may be",
            cut.len(),
            forms.of(WeightUse::Product)
        );
    }
}

/// A file of packed weights, after a model was loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kept {
    /// It was there.
    Found(PathBuf),
    /// It was written for the next start.
    Written(PathBuf),
    /// It could not be written, for this reason (a full disk, say), and nothing is left of it; the model is whole.
    Unwritten(String),
}

/// The backend of a device for weights that stay as they are.
fn plain_ops(precision: Precision, device: &Device) -> Result<Arc<dyn Ops>> {
    match (device, precision) {
        (Device::Cpu, _) => Ok(Arc::new(KernelOps::new(precision))),
        (_, Precision::F32) => Ok(Arc::new(CandleOps)),
        (_, Precision::Bf16) => Err(Error::Argument(format!(
            "there are no operations that read bf16 on {device:?} yet; use precision f32 there, or the CPU"
        ))),
    }
}

fn packed(
    config: DecoderConfig,
    source: ParamSource,
    forms: impl Into<PackedForms>,
    device: &Device,
) -> Result<Decoder> {
    if !device.is_cpu() {
        return Err(Error::Argument(format!("weights are packed for the CPU only, not for {device:?}")));
    }
    Decoder::new(config, source.builder(device), Arc::new(KernelOps::packing(forms)))
}
