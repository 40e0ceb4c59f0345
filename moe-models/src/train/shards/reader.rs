//! [`Reader`]: a checkpoint that ranks wrote, for any rank of any layout.

use super::super::checkpoint::FileCheck;
use super::index::{Entry, Index, Kind, Save, TensorInfo, Tensors};
use super::part::{check_ranges, count, overlaps, units};
use crate::hf::{Layout, RANKS_INDEX, StackPlace, TensorFile};
use crate::{Error, Result};
use moe_parallel::Extent;
use moe_parallel::extent::Piece;
use moe_parallel::tensor_box::{Place, for_each_run};
use safetensors::Dtype;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The files of a checkpoint, mapped: values are read where they are asked for.
#[derive(Debug)]
pub struct Reader {
    dir: PathBuf,
    index: Index,
    /// As the index lists them.
    files: Vec<TensorFile>,
    located: HashMap<String, Located>,
}

/// The entries of a tensor by kind: number in the index, and number of the file.
type Located = [Vec<(usize, usize)>; Kind::ALL.len()];

impl Reader {
    /// Opens the checkpoint in a folder, of which it reads what the index names and nothing else. Everything is checked but the
    /// values: [`Reader::verify`] reads those.
    ///
    /// # Errors
    /// [`Error::Io`] for a missing file; [`Error::Format`] for an index that is damaged or does not make up the model, naming kind,
    /// tensor, box and files; for a file that is cut, altered in its size or header, or of another save.
    pub fn open(dir: &Path) -> Result<Self> {
        let index = Index::read(dir)?;
        let open = |check| open_file(dir, check, index.save);
        let files = index.files.iter().map(open).collect::<Result<Vec<_>>>()?;
        let located = locate(&index, &files)?;
        Ok(Self { dir: dir.to_owned(), index, files, located })
    }

    /// Which save it is.
    pub fn save(&self) -> Save {
        self.index.save
    }

    /// The tensors of the model.
    pub fn tensors(&self) -> &Tensors {
        &self.index.tensors
    }

    /// The files that ranks wrote.
    pub fn files(&self) -> &[FileCheck] {
        &self.index.files
    }

    /// Reads some of the [`Reader::files`], those of these numbers, and compares them with their checksums. Ranks that share the
    /// files among them have soon read all.
    ///
    /// # Errors
    /// [`Error::Format`] for one that was altered; [`Error::Argument`] for a number that no file has.
    pub fn verify(&self, files: Range<usize>) -> Result<()> {
        let Some(checks) = self.files().get(files.clone()) else {
            let count = self.files().len();
            return Err(Error::Argument(format!("files {files:?} are not among the {count} of this checkpoint")));
        };
        checks.iter().try_for_each(|check| check.verify(&self.dir))
    }

    /// Refuses the checkpoint of another model, or of one of which other tensors are trained.
    ///
    /// # Errors
    /// [`Error::Format`] naming a tensor that is missing, too much, of another shape, or trained here and not there.
    pub fn check(&self, tensors: &Tensors) -> Result<()> {
        self.check_shapes(tensors)?;
        for ((name, now), then) in tensors.iter().zip(self.tensors().values()) {
            if now.trained != then.trained {
                let told = |info: &TensorInfo| if info.trained { "trained" } else { "frozen" };
                let (now, then) = (told(now), told(then));
                return self
                    .refuse(&format!("{name} is {now} now, but was {then} when this was saved; freeze the same"));
            }
        }
        Ok(())
    }

    /// Refuses the checkpoint of another model.
    pub(super) fn check_shapes(&self, tensors: &Tensors) -> Result<()> {
        for (name, TensorInfo { shape: want, .. }) in tensors {
            let got = self.shape(name)?;
            if got != want {
                return self.refuse(&format!("{name} has shape {got:?} here, the model's is {want:?}"));
            }
        }
        match self.tensors().keys().find(|name| !tensors.contains_key(*name)) {
            Some(name) => self.refuse(&format!("{name} does not belong to the configured model")),
            None => Ok(()),
        }
    }

    /// Reads a parameter's values into `values`, which has all elements of these extents.
    ///
    /// # Errors
    /// As [`Reader::read`].
    pub fn read_weights(&self, extents: &[Extent], values: &mut [f32]) -> Result<()> {
        let all = 0..super::part::elements(extents);
        self.read(Kind::Weight, extents, std::slice::from_ref(&all), values)
    }

    /// Reads some elements of a parameter of which a rank holds these extents: those of `ranges`, ascending, into `values`, range by
    /// range. No other bytes of the files are touched.
    ///
    /// # Errors
    /// [`Error::Argument`] for ranges that are no ascending elements of the parameter, or as many values as they are not;
    /// [`Error::Format`] for a tensor that the checkpoint lacks, has in another shape, or has no moments of.
    pub fn read(&self, kind: Kind, extents: &[Extent], ranges: &[Range<usize>], values: &mut [f32]) -> Result<()> {
        check_ranges(extents, "to be read", ranges)?;
        let (want, got) = (count(ranges), values.len());
        if want != got {
            return Err(Error::Argument(format!("{want} values of a parameter are read into {got}")));
        }
        let mut rest = values;
        for range in ranges {
            for (extent, unit) in units(extents) {
                for own in overlaps(std::slice::from_ref(range), &unit) {
                    let (values, others) = std::mem::take(&mut rest).split_at_mut(own.len());
                    rest = others;
                    self.read_run(kind, extent, own.start - unit.start..own.end - unit.start, values)?;
                }
            }
        }
        Ok(())
    }

    /// Reads elements `flat` of a part.
    fn read_run(&self, kind: Kind, extent: &Extent, flat: Range<usize>, values: &mut [f32]) -> Result<()> {
        let Extent { name, shape: want, .. } = extent;
        let got = self.shape(name)?;
        if got != want {
            return self.refuse(&format!("{name} has shape {got:?} here, the model's is {want:?}"));
        }
        let entries = self.located.get(name).map_or(&[][..], |located| &located[kind as usize]);
        if entries.is_empty() {
            return self.refuse(&format!("there is no {kind} of {name}; is the same frozen as when this was saved?"));
        }
        let shape = extent.local_shape();
        let mut target = Target { shape: &shape, first: flat.start, values, filled: 0 };
        for piece in extent.boxes(flat) {
            for &(entry, file) in entries {
                target.fill(&piece, &self.index.entries[entry], &self.files[file]);
            }
        }
        // Entries cover the whole, so what is left lies outside of it.
        match target.filled == target.values.len() {
            true => Ok(()),
            false => Err(Error::Argument(format!("{:?} of {name} is not inside of {want:?}", extent.dims))),
        }
    }

    fn shape(&self, name: &str) -> Result<&Vec<usize>> {
        match self.index.tensors.get(name) {
            Some(info) => Ok(&info.shape),
            None => self.refuse(&format!("{name} is missing; this is the checkpoint of another model")),
        }
    }

    fn refuse<T>(&self, reason: &str) -> Result<T> {
        Err(Error::format(self.dir.join(RANKS_INDEX), reason))
    }
}

/// A run of elements of a rank's part.
struct Target<'a> {
    /// Of the part.
    shape: &'a [usize],
    /// The first element.
    first: usize,
    values: &'a mut [f32],
    /// How many of the values are there.
    filled: usize,
}

impl Target<'_> {
    /// Copies what an entry has of a piece.
    fn fill(&mut self, piece: &Piece, entry: &Entry, file: &TensorFile) {
        let stored = entry.tensor_box();
        let (Some(common), Some(info)) = (stored.intersect(&piece.whole), file.info(&entry.tensor)) else { return };
        let in_file = common.start_from(&stored.start);
        let mut here = common.start_from(&piece.whole.start);
        here.iter_mut().zip(&piece.local).for_each(|(index, start)| *index += start);
        let (bytes, _) = file.data(info).as_chunks::<4>();
        let (bytes, layout) = match entry.place {
            None => (bytes, Layout::Rows),
            Some(StackPlace { index, layout }) => {
                let elements = stored.volume();
                (&bytes[index * elements..][..elements], layout)
            }
        };
        let from = Place { shape: &stored.size, start: &in_file };
        for_each_run(&common.size, from, Place { shape: self.shape, start: &here }, |from, to| {
            let to = &mut self.values[to.start - self.first..to.end - self.first];
            self.filled += to.len();
            if layout == Layout::Rows {
                to.iter_mut().zip(&bytes[from]).for_each(|(value, bytes)| *value = f32::from_le_bytes(*bytes));
            } else {
                let bytes = from.map(|element| bytes[layout.index_in_files(element, &stored.size)]);
                to.iter_mut().zip(bytes).for_each(|(value, bytes)| *value = f32::from_le_bytes(bytes));
            }
        });
    }
}

/// Maps a file that the index lists.
fn open_file(dir: &Path, check: &FileCheck, save: Save) -> Result<TensorFile> {
    let path = dir.join(&check.name);
    let got = std::fs::metadata(&path).map_err(|e| Error::io(&path, e))?.len();
    check.same_size(&path, got)?;
    let file = TensorFile::open(path)?;
    for (what, want) in save.metadata() {
        let got = file.metadata(what);
        if got != Some(want.as_str()) {
            let got = got.unwrap_or("none");
            return Err(Error::format(
                file.path(),
                format!(
                    "belongs to another save: its {what} is {got}, that of the index is {want}; take another checkpoint"
                ),
            ));
        }
    }
    Ok(file)
}

/// Finds the tensor of every entry, and refuses a file that has others.
fn locate(index: &Index, files: &[TensorFile]) -> Result<HashMap<String, Located>> {
    let numbers: HashMap<&str, usize> = index.files.iter().map(|file| file.name.as_str()).zip(0..).collect();
    let mut unknown: Vec<HashSet<String>> = files.iter().map(|file| file.names().collect()).collect();
    let mut located: HashMap<String, Located> = HashMap::new();
    for (number, entry) in index.entries.iter().enumerate() {
        // An entry of another file was refused with the index.
        let Some(&file) = numbers.get(entry.file.as_str()) else { continue };
        check_tensor(entry, &files[file])?;
        unknown[file].remove(&entry.tensor);
        located.entry(entry.name.clone()).or_default()[entry.kind as usize].push((number, file));
    }
    for (file, unknown) in files.iter().zip(&unknown) {
        if let Some(tensor) = unknown.iter().min() {
            return Err(Error::format(file.path(), format!("tensor {tensor} is in no entry of {RANKS_INDEX}")));
        }
    }
    Ok(located)
}

fn check_tensor(entry: &Entry, file: &TensorFile) -> Result<()> {
    let Entry { kind, name, tensor, size, .. } = entry;
    let refuse = |reason: String| {
        let part = entry.tensor_box();
        Err(Error::format(file.path(), format!("{kind} of {name} {part}: tensor {tensor} {reason}")))
    };
    let Some(info) = file.info(tensor) else { return refuse("is missing".into()) };
    let want = match entry.place {
        None => size.clone(),
        // As many experts as it has, this one among them.
        Some(StackPlace { index, layout }) => {
            let count = info.shape.first().copied().filter(|count| index < *count).unwrap_or(index.saturating_add(1));
            [&[count], layout.in_files(size).as_slice()].concat()
        }
    };
    if info.dtype != Dtype::F32 || info.shape != want {
        return refuse(format!("must be F32 {want:?}, got {:?} {:?}", info.dtype, info.shape));
    }
    Ok(())
}
