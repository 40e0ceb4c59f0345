//! [`Folder`]: the files of a checkpoint, and the tensors of those that every slice of the model has.

use super::torch_file::{StoredTensor, TorchFile};
use crate::hf::is_plain_name;
use crate::{Error, Result};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Names the newest checkpoint of a run.
const LATEST: &str = "latest";
const STATES: &str = "_model_states.pt";
/// Most slices of a model; more than any has.
const MOST_SLICES: usize = 4096;

/// A checkpoint's files.
#[derive(Debug)]
pub(super) struct Folder {
    pub(super) dir: PathBuf,
    /// Of each slice: everything but experts.
    pub(super) slices: Vec<Slice>,
    /// Where each expert lies.
    experts: BTreeSet<ExpertFile>,
}

/// The file of one slice of the model, and its tensors that are no experts.
#[derive(Debug)]
pub(super) struct Slice {
    pub(super) file: Arc<TorchFile>,
    pub(super) tensors: BTreeMap<String, StoredTensor>,
}

/// A file of one expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ExpertFile {
    /// Which of the MoE layers; `None` in DeepSpeed's first format, where the file holds the expert of every layer.
    pub(super) moe_layer: Option<usize>,
    pub(super) expert: usize,
    /// Which slice of the model wrote it.
    pub(super) slice: usize,
}

impl ExpertFile {
    /// What DeepSpeed calls it.
    pub(super) fn name(&self) -> String {
        let layer = self.moe_layer.map_or_else(String::new, |layer| format!("layer_{layer}_"));
        format!("{layer}expert_{}_mp_rank_{:02}{STATES}", self.expert, self.slice)
    }

    fn parse(name: &str) -> Option<Self> {
        let (expert, slice) = name.strip_suffix(STATES)?.split_once("_mp_rank_")?;
        let (layer, expert) = expert.rsplit_once("expert_")?;
        let moe_layer = match layer {
            "" => None,
            layer => Some(layer.strip_prefix("layer_")?.strip_suffix('_')?.parse().ok()?),
        };
        let file = Self { moe_layer, expert: expert.parse().ok()?, slice: slice.parse().ok()? };
        (file.name() == name).then_some(file)
    }
}

fn slice_name(slice: usize) -> String {
    format!("mp_rank_{slice:02}{STATES}")
}

impl Folder {
    /// The checkpoint `tag` in `from`; without a tag the one that its file `latest` names, or `from` itself if it is one.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::Format`] naming the file that is missing or damaged; [`Error::Argument`] for a tag that is a path.
    pub(super) fn open(from: &Path, tag: Option<&str>) -> Result<Self> {
        let dir = find(from, tag)?;
        let names = names_in(&dir)?;
        refuse_other_formats(&dir, &names)?;
        let first = open_slice(&dir, 0)?;
        let root = first.file.pickle().root();
        let told = |key| first.file.pickle().entry(root, key).and_then(|value| first.file.pickle().size(value));
        let count =
            told("mp_world_size").unwrap_or_else(|| (0..).take_while(|&s| names.contains(&slice_name(s))).count());
        if !(1..=MOST_SLICES).contains(&count) {
            return Err(first.file.error(format!("mp_world_size must be from 1 to {MOST_SLICES}, got {count}")));
        }
        if names.contains(&slice_name(count)) {
            let reason = format!(
                "is there, but {} is of {count} slices (mp_world_size); remove what is left of another run",
                slice_name(0)
            );
            return Err(Error::format(dir.join(slice_name(count)), reason));
        }
        let step = told("global_steps");
        let mut slices = vec![first];
        for slice in 1..count {
            let next = open_slice(&dir, slice)?;
            let pickle = next.file.pickle();
            let own = pickle.entry(pickle.root(), "global_steps").and_then(|value| pickle.size(value));
            if own != step {
                let reason = format!("is of step {own:?}, {} of {step:?}; copy the checkpoint again", slice_name(0));
                return Err(next.file.error(reason));
            }
            slices.push(next);
        }
        let experts = names.iter().filter_map(|name| ExpertFile::parse(name)).collect();
        Ok(Self { dir, slices, experts })
    }

    /// The files of an expert of MoE layer `moe_layer`: of the one slice that wrote it whole, or of each slice its own.
    ///
    /// # Errors
    /// [`Error::Format`] naming a file that is missing.
    pub(super) fn expert(&self, moe_layer: usize, expert: usize) -> Result<Vec<ExpertFile>> {
        let of = |moe_layer| {
            let files = (0..self.slices.len()).map(move |slice| ExpertFile { moe_layer, expert, slice });
            files.filter(|file| self.experts.contains(file)).collect::<Vec<_>>()
        };
        let found = [Some(moe_layer), None].map(of).into_iter().find(|found| !found.is_empty()).unwrap_or_default();
        if found.len() == 1 || found.len() == self.slices.len() {
            return Ok(found);
        }
        let is_missing = |slice: &usize| !found.iter().any(|file| file.slice == *slice);
        let slice = (0..self.slices.len()).find(is_missing).unwrap_or(0);
        let file = ExpertFile { moe_layer: Some(moe_layer), expert, slice };
        let reason = "is missing: every expert has a file, which the rank that held it wrote; copy those of all nodes";
        Err(Error::format(self.dir.join(file.name()), reason))
    }

    /// Refuses a file of an expert that the model does not have: `counts` are those of its MoE layers.
    ///
    /// # Errors
    /// [`Error::Format`] naming it.
    pub(super) fn refuse_more(&self, counts: &[usize]) -> Result<()> {
        let most = counts.iter().copied().max().unwrap_or(0);
        let is_known = |file: &&ExpertFile| {
            let experts = file.moe_layer.map_or(most, |layer| counts.get(layer).copied().unwrap_or(0));
            file.expert < experts && file.slice < self.slices.len()
        };
        match self.experts.iter().find(|file| !is_known(file)) {
            Some(file) => {
                let reason = format!("is of none of the model's experts, {counts:?} in its MoE layers; remove it");
                Err(Error::format(self.dir.join(file.name()), reason))
            }
            None => Ok(()),
        }
    }
}

fn find(from: &Path, tag: Option<&str>) -> Result<PathBuf> {
    let latest = from.join(LATEST);
    let tag = match tag {
        Some(tag) if is_plain_name(tag) => tag.to_owned(),
        Some(tag) => {
            return Err(Error::Argument(format!("--tag {tag:?} must be the name of a folder in {}", from.display())));
        }
        None => match std::fs::read(&latest).map(String::from_utf8) {
            Ok(Ok(text)) if is_plain_name(text.trim()) => text.trim().to_owned(),
            Ok(_) => {
                let reason = "must hold the name of a folder beside it; write it, or give --tag";
                return Err(Error::format(latest, reason));
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(from.to_owned()),
            Err(e) => return Err(Error::io(latest, e)),
        },
    };
    let dir = from.join(tag);
    match dir.is_dir() {
        true => Ok(dir),
        false => {
            Err(Error::format(dir, format!("is no folder, though --tag or {LATEST} names it; give another --tag")))
        }
    }
}

fn names_in(dir: &Path) -> Result<BTreeSet<String>> {
    let failed = |e| Error::io(dir, e);
    let entries = std::fs::read_dir(dir).map_err(failed)?;
    entries.map(|entry| Ok(entry.map_err(failed)?.file_name().to_string_lossy().into_owned())).collect()
}

fn refuse_other_formats(dir: &Path, names: &BTreeSet<String>) -> Result<()> {
    let is_pipeline = |name: &&String| name.starts_with("layer_") && name.ends_with("-model_states.pt");
    let is_partitioned = |name: &&String| name.starts_with("zero_pp_rank_") && name.ends_with(STATES);
    if let Some(name) = names.iter().find(is_pipeline) {
        let reason = "is of a pipeline, which is not implemented; save from a run with --no-pipeline-parallel";
        return Err(Error::format(dir.join(name), reason));
    }
    if names.contains(&slice_name(0)) {
        return Ok(());
    }
    if let Some(name) = names.iter().find(is_partitioned) {
        let reason = "is of ZeRO stage 3, which is not implemented; save from a run of stage 0, 1 or 2";
        return Err(Error::format(dir.join(name), reason));
    }
    let reason = format!("is missing; name the folder that holds it, or the one with {LATEST} above it");
    Err(Error::format(dir.join(slice_name(0)), reason))
}

fn open_slice(dir: &Path, slice: usize) -> Result<Slice> {
    let path = dir.join(slice_name(slice));
    if !path.exists() {
        let reason = "is missing: each slice of the model has one; copy those of all nodes";
        return Err(Error::format(path, reason));
    }
    let file = Arc::new(TorchFile::open(&path)?);
    let module = file.pickle().entry(file.pickle().root(), "module");
    let Some(module) = module.filter(|&module| file.pickle().dict(module).is_some()) else {
        return Err(
            file.error("has no dict of tensors under \"module\"; was it saved by DeepSpeed, without a pipeline?")
        );
    };
    let mut tensors = file.tensors(module).map_err(|reason| file.error(reason))?;
    // Megatron-DeepSpeed hands over experts under names by which DeepSpeed does not know them, so that those of the first rank are
    // left here, under ids of their own. Each has a file.
    tensors.retain(|name, _| !name.contains(".deepspeed_experts."));
    Ok(Slice { file, tensors })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_expert_files() {
        let file = ExpertFile { moe_layer: Some(11), expert: 127, slice: 3 };
        assert_eq!(file.name(), "layer_11_expert_127_mp_rank_03_model_states.pt");
        assert_eq!(ExpertFile::parse(&file.name()), Some(file));
        let early = ExpertFile { moe_layer: None, expert: 5, slice: 0 };
        assert_eq!(ExpertFile::parse("expert_5_mp_rank_00_model_states.pt"), Some(early));
        for other in [
            "layer_1_expert_5_mp_rank_0_model_states.pt",
            "layer_1_expert_05_mp_rank_00_model_states.pt",
            "layer_01-model_00-model_states.pt",
            "layer_x_expert_5_mp_rank_00_model_states.pt",
            "mp_rank_00_model_states.pt",
            "expert_5_mp_rank_00_optim_states.pt",
        ] {
            assert_eq!(ExpertFile::parse(other), None, "{other}");
        }
    }
}
