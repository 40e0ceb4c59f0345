//! [`Plan`]: where in a checkpoint each parameter of ours is, checked before anything is written.

use super::arguments::QkvOrder;
use super::folder::{ExpertFile, Folder, Slice};
use super::names::{self, Arranged, MoeName, Theirs};
use super::shape::Shape;
use super::source::{Form, Part, Source};
use super::torch_file::{StoredTensor, TorchFile};
use crate::gpt::GptConfig;
use crate::params::ParamTable;
use crate::{Error, Result};
use candle_core::DType;
use moe_core::ParamSpec;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// Where every parameter is, an expert by itself.
#[derive(Debug)]
pub(super) struct Plan(HashMap<(String, Option<usize>), Source>);

/// A file of experts, and what of it nobody has taken.
#[derive(Debug)]
struct Opened {
    file: Arc<TorchFile>,
    tensors: BTreeMap<String, StoredTensor>,
}

/// The files of a checkpoint while tensors are taken out of them.
#[derive(Debug)]
struct Files {
    folder: Folder,
    experts: BTreeMap<ExpertFile, Opened>,
    /// Layers with experts.
    moe_layers: Vec<usize>,
}

impl Plan {
    /// # Errors
    /// [`Error::Format`] naming the file, and in it the tensor that is missing, has another shape, or is not known.
    pub(super) fn new(folder: Folder, shape: &Shape, table: &ParamTable, order: QkvOrder) -> Result<Self> {
        let (moe_layers, counts): (Vec<usize>, Vec<usize>) = shape.config.moe_layers().into_iter().unzip();
        folder.refuse_more(&counts)?;
        let mut files = Files { folder, experts: BTreeMap::new(), moe_layers };
        let mut sources = HashMap::new();
        for spec in table.specs() {
            let experts = if spec.is_stacked() { (0..spec.shape[0]).map(Some).collect() } else { vec![None] };
            for expert in experts {
                let Some(theirs) = names::theirs(&spec.name, expert, shape.moe_name) else {
                    return Err(Error::Config(format!("{} has no name in DeepSpeed's checkpoints", spec.name)));
                };
                let form = form(&theirs, &shape.config, shape.moe_name, order);
                let parts = if form == Form::Zeros { vec![] } else { files.take(&theirs, expert)? };
                let source = Source { name: theirs.name, parts, form };
                source.check(own_shape(spec, expert))?;
                sources.insert((spec.name.clone(), expert), source);
            }
        }
        files.refuse_left()?;
        Ok(Self(sources))
    }

    /// The type of all tensors; f32, which holds the values of each, if there are several.
    pub(super) fn dtype(&self) -> DType {
        let mut dtypes = self.0.values().flat_map(|source| &source.parts).map(|part| part.tensor.dtype);
        let first = dtypes.next().unwrap_or(DType::F32);
        if dtypes.all(|dtype| dtype == first) { first } else { DType::F32 }
    }

    /// A parameter's values, or those of one expert of it, in our order.
    ///
    /// # Errors
    /// [`Error::Format`] if copies of it differ; [`Error::Config`] for a parameter of another model.
    pub(super) fn values(&self, spec: &ParamSpec, expert: Option<usize>) -> Result<Vec<f32>> {
        let Some(source) = self.0.get(&(spec.name.clone(), expert)) else {
            return Err(Error::Config(format!("{} is no parameter of the model that is imported", spec.name)));
        };
        Ok(source.values(own_shape(spec, expert))?.flatten_all()?.to_vec1()?)
    }
}

/// The shape of a parameter, or of one expert of it.
fn own_shape(spec: &ParamSpec, expert: Option<usize>) -> &[usize] {
    &spec.shape[usize::from(expert.is_some())..]
}

fn form(theirs: &Theirs, config: &GptConfig, moe: MoeName, order: QkvOrder) -> Form {
    match theirs.arranged {
        Arranged::Whole => Form::Whole,
        Arranged::Along(dim) => Form::Along(dim),
        Arranged::ByHead => Form::Heads { order, head_dim: config.d_model / config.num_heads },
        Arranged::Coefficients if moe == MoeName::Layer => Form::Whole,
        Arranged::Coefficients => Form::Swapped,
        Arranged::CoefficientBias if moe == MoeName::Layer => Form::Whole,
        Arranged::CoefficientBias => Form::Zeros,
    }
}

impl Files {
    /// Takes a tensor out of every file that has it.
    fn take(&mut self, theirs: &Theirs, expert: Option<usize>) -> Result<Vec<Part>> {
        let moe_layer = self.moe_layers.iter().position(|&layer| Some(layer) == theirs.layer_of_expert);
        let (Some(moe_layer), Some(expert)) = (moe_layer, expert) else {
            let take = |Slice { file, tensors }: &mut Slice| match tensors.remove(&theirs.name) {
                Some(tensor) => Ok(Part { file: file.clone(), tensor }),
                None => Err(file.error(format!("has no tensor {}", theirs.name))),
            };
            return self.folder.slices.iter_mut().map(take).collect();
        };
        let mut parts = Vec::new();
        for expert in self.folder.expert(moe_layer, expert)? {
            let Opened { file, tensors } = self.opened(expert)?;
            let Some(tensor) = tensors.remove(&theirs.name) else {
                let reason = format!("has no tensor {}; is it the file of another expert?", theirs.name);
                return Err(file.error(reason));
            };
            parts.push(Part { file: file.clone(), tensor });
        }
        Ok(parts)
    }

    fn opened(&mut self, expert: ExpertFile) -> Result<&mut Opened> {
        use std::collections::btree_map::Entry;
        match self.experts.entry(expert) {
            Entry::Occupied(opened) => Ok(opened.into_mut()),
            Entry::Vacant(place) => {
                let file = Arc::new(TorchFile::open(&self.folder.dir.join(expert.name()))?);
                let tensors = file.tensors(file.pickle().root()).map_err(|reason| file.error(reason))?;
                Ok(place.insert(Opened { file, tensors }))
            }
        }
    }

    /// Refuses what nobody has taken.
    fn refuse_left(&self) -> Result<()> {
        let slices = self.folder.slices.iter().map(|slice| (&slice.file, &slice.tensors));
        let experts = self.experts.values().map(|opened| (&opened.file, &opened.tensors));
        let mut left = slices.chain(experts).filter_map(|(file, tensors)| Some((file, tensors.keys().next()?)));
        match left.next() {
            Some((file, name)) => Err(file.error(format!("{name} is not implemented: no model of this family has it"))),
            None => Ok(()),
        }
    }
}
