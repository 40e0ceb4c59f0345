//! [`Index`]: what lies where in the files that ranks wrote, and whether it makes up a model. Reads no file but its own.

use super::super::checkpoint::FileCheck;
use super::super::files::write_synced;
use crate::hf::{RANKS_INDEX, StackPlace, WeightForm, is_plain_name};
use crate::{Error, Result};
use moe_core::ParamSpec;
use moe_parallel::tensor_box::{TilingFault, checked_volume, tiling_fault};
use moe_parallel::{Placement, TensorBox};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::path::Path;

/// The form described in the module's text.
const VERSION: u32 = 1;

/// What values are of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The parameter itself.
    Weight,
    /// AdamW's first moment.
    ExpAvg,
    /// AdamW's second moment.
    ExpAvgSq,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Weight, Self::ExpAvg, Self::ExpAvgSq];
}

/// As in the index.
impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Weight => "weight",
            Self::ExpAvg => "exp_avg",
            Self::ExpAvgSq => "exp_avg_sq",
        })
    }
}

/// One save: what its files have in common, and those of no other have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Save {
    /// Optimizer steps done.
    pub step: u64,
    /// A number that rank 0 chooses anew for each save, and tells the others. One that comes again costs no more than a less exact
    /// message about a file of another save: the index has checksums too.
    pub id: u64,
}

impl Save {
    /// What files say of it besides tensors.
    pub(super) fn metadata(&self) -> [(&'static str, String); 2] {
        [("save", format!("{:016x}", self.id)), ("step", self.step.to_string())]
    }
}

/// A tensor of the model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorInfo {
    /// Over all ranks; of one expert.
    pub shape: Vec<usize>,
    /// Whether it is trained: frozen ones have no moments.
    pub trained: bool,
}

/// The tensors of a model, experts singly, by name.
pub type Tensors = BTreeMap<String, TensorInfo>;

/// The tensors that these parameters are made of; `trains` tells by the name of a parameter whether it is trained.
pub fn tensors(specs: &[ParamSpec], trains: impl Fn(&str) -> bool) -> Tensors {
    let of = |spec: &ParamSpec| {
        let trained = trains(&spec.name);
        let info = move |unit: moe_parallel::Extent| (unit.name, TensorInfo { shape: unit.shape, trained });
        Placement::WHOLE.extents(spec).into_iter().map(info)
    };
    specs.iter().flat_map(of).collect()
}

/// A box of a tensor, and where it lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// What of the tensor.
    pub kind: Kind,
    /// The tensor, as [`Tensors`] names it.
    pub name: String,
    /// First index of the box along each dimension.
    pub start: Vec<usize>,
    /// Its indices along each dimension.
    pub size: Vec<usize>,
    /// Name of a file in the folder.
    pub file: String,
    /// Name of the tensor in that file, which is the box.
    pub tensor: String,
    /// The box's place in that tensor, where it holds all experts of a layer, as a family publishes them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub place: Option<StackPlace>,
}

impl Entry {
    /// The box.
    pub(super) fn tensor_box(&self) -> TensorBox {
        TensorBox { start: self.start.clone(), size: self.size.clone() }
    }
}

/// The content of `checkpoint.index.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Index {
    version: u32,
    pub(super) save: Save,
    /// In what form.
    pub(super) weights: WeightForm,
    /// Of the model.
    pub(super) tensors: Tensors,
    /// That ranks wrote.
    pub(super) files: Vec<FileCheck>,
    pub(super) entries: Vec<Entry>,
}

impl Index {
    pub(super) fn new(save: Save, weights: WeightForm, tensors: Tensors) -> Self {
        Self { version: VERSION, save, weights, tensors, files: Vec::new(), entries: Vec::new() }
    }

    /// Reads and checks the index of a folder.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; as [`Index::check`].
    pub(super) fn read(dir: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Head {
            version: u32,
        }
        let path = dir.join(RANKS_INDEX);
        let json = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
        let damaged = |e| Error::format(&path, format!("not a whole index of a checkpoint: {e}"));
        let Head { version } = serde_json::from_slice(&json).map_err(damaged)?;
        if version != VERSION {
            let reason = format!(
                "version {version} is not {VERSION}, the one that this program knows; use the program that wrote it"
            );
            return Err(Error::format(path, reason));
        }
        let index: Self = serde_json::from_slice(&json).map_err(damaged)?;
        index.check(&path)?;
        Ok(index)
    }

    /// Writes it into a folder.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written.
    pub(super) fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join(RANKS_INDEX);
        let json = serde_json::to_vec(self).map_err(|e| Error::format(&path, format!("cannot be written: {e}")))?;
        write_synced(&path, &json)
    }

    /// Refuses an index whose entries do not make up every tensor once, or name what there is not.
    ///
    /// # Errors
    /// [`Error::Format`] at `path`, naming kind, tensor, box and files.
    pub(super) fn check(&self, path: &Path) -> Result<()> {
        let refuse = |reason: String| Err(Error::format(path, reason));
        let mut files = HashSet::new();
        for FileCheck { name, .. } in &self.files {
            if !is_plain_name(name) {
                return refuse(format!("{name:?} is not the name of a file in this folder"));
            }
            if !files.insert(name.as_str()) {
                return refuse(format!("file {name} is listed twice"));
            }
        }
        let uncountable =
            |shape: &[usize]| checked_volume(shape).and_then(|n| n.checked_mul(size_of::<f32>())).is_none();
        if let Some((name, info)) = self.tensors.iter().find(|(_, info)| uncountable(&info.shape)) {
            return refuse(format!("{name} has the impossible shape {:?}", info.shape));
        }
        let mut places = HashSet::new();
        for entry in &self.entries {
            self.check_entry(entry, &files).or_else(refuse)?;
            if !places.insert((&entry.file, &entry.tensor, entry.place.map(|place| place.index))) {
                return refuse(format!("tensor {} of {} is in two entries", entry.tensor, entry.file));
            }
        }
        self.check_cover().or_else(refuse)
    }

    /// The reason to refuse an entry by itself.
    fn check_entry(&self, entry: &Entry, files: &HashSet<&str>) -> std::result::Result<(), String> {
        let Entry { kind, name, file, .. } = entry;
        let Some(info) = self.tensors.get(name) else {
            return Err(format!("{kind} of {name}: the model has no such tensor"));
        };
        if *kind != Kind::Weight && !info.trained {
            return Err(format!("{kind} of {name}: a tensor that is not trained has none"));
        }
        if !entry.tensor_box().fits(&info.shape) {
            let (start, size, shape) = (&entry.start, &entry.size, &info.shape);
            return Err(format!("{kind} of {name}: a box at {start:?} of size {size:?} is not inside of {shape:?}"));
        }
        if let Some(StackPlace { layout, .. }) = entry.place {
            let (tensor, shape) = (&entry.tensor, &info.shape);
            if entry.tensor_box() != TensorBox::whole(shape) {
                return Err(format!("{kind} of {name}: only all of an expert can be a part of {tensor}"));
            }
            if !layout.fits(shape) {
                return Err(format!("{kind} of {name}: {shape:?} has no two halves of rows that could take turns"));
            }
        }
        if !files.contains(file.as_str()) {
            return Err(format!("{kind} of {name}: {file} is not one of the files of this index"));
        }
        Ok(())
    }

    /// The reason to refuse entries, each of which is well by itself.
    fn check_cover(&self) -> std::result::Result<(), String> {
        let mut entries: HashMap<(Kind, &str), Vec<&Entry>> = HashMap::new();
        for entry in &self.entries {
            entries.entry((entry.kind, &entry.name)).or_default().push(entry);
        }
        for (name, info) in &self.tensors {
            for kind in Kind::ALL.into_iter().filter(|kind| *kind == Kind::Weight || info.trained) {
                let entries = entries.get(&(kind, name.as_str())).map_or(&[][..], Vec::as_slice);
                let boxes: Vec<TensorBox> = entries.iter().map(|entry| entry.tensor_box()).collect();
                if let Some(fault) = tiling_fault(&TensorBox::whole(&info.shape), &boxes) {
                    return Err(format!("{kind} of {name} {:?}: {}", info.shape, told(&fault, entries)));
                }
            }
        }
        Ok(())
    }
}

fn told(fault: &TilingFault, entries: &[&Entry]) -> String {
    match fault {
        TilingFault::Missing(part) => {
            let files: BTreeSet<&str> = entries.iter().map(|entry| entry.file.as_str()).collect();
            let others = match files.is_empty() {
                true => "and no other part of it is".to_owned(),
                false => format!("other parts are in {}", files.into_iter().collect::<Vec<_>>().join(", ")),
            };
            format!("{part} is in no file, {others}; a rank's part is missing, so take another checkpoint")
        }
        TilingFault::Doubled { boxes: [first, second], common } => {
            let (first, second) = (entries[*first], entries[*second]);
            let place = |entry: &Entry| format!("{} as {}", entry.file, entry.tensor);
            format!(
                "{common} is in {} and in {}; which is right is unknown, so take another checkpoint",
                place(first),
                place(second)
            )
        }
    }
}
