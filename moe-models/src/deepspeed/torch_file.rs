//! [`TorchFile`]: a file of `torch.save`, mapped. A zip archive of a pickle and of the bytes of each storage, uncompressed.
//!
//! Where entries lie is what the `zip` crate says; every range is checked against the file, and nothing is allocated by a size that
//! the file names before it is known to be there.

use super::pickle::{Id, Pickle, Value};
use crate::fields::Checked;
use crate::hf::Bytes;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Cursor;
use std::ops::Range;
use std::path::{Path, PathBuf};
use zip::{CompressionMethod, ZipArchive};

/// A file that was opened.
#[derive(Debug)]
pub(super) struct TorchFile {
    path: PathBuf,
    bytes: Bytes,
    /// The bytes of each entry, by its name below the archive's one folder.
    entries: HashMap<String, Range<usize>>,
    pickle: Pickle,
}

/// A tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct StoredTensor {
    pub(super) dtype: DType,
    pub(super) shape: Vec<usize>,
    /// Its bytes in the file, row by row.
    bytes: Range<usize>,
}

const PICKLE: &str = "data.pkl";
/// Longest name of a tensor.
const MOST_NAME: usize = 1024;
/// Letters of all names of a file.
const MOST_NAMES: usize = 1 << 26;
/// Most dimensions that a tensor of weights may have.
const MOST_DIMENSIONS: usize = 8;

impl TorchFile {
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::Format`] if it is no such file, or damaged.
    pub(super) fn open(path: &Path) -> Result<Self> {
        Self::of(path.to_owned(), Bytes::map(path)?)
    }

    /// A file of this content.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub(super) fn of(path: PathBuf, bytes: Bytes) -> Result<Self> {
        let read = || {
            let entries = entries(bytes.as_ref())?;
            let pickle = entries.get(PICKLE).ok_or_else(|| format!("it has no {PICKLE}; {AGAIN}"))?;
            let pickle = Pickle::read(&bytes.as_ref()[pickle.clone()])?;
            let order = entries.get("byteorder").map(|range| &bytes.as_ref()[range.clone()]);
            match order {
                None | Some(b"little") => Ok((entries, pickle)),
                Some(_) => Err("its numbers are big-endian; save it on a little-endian machine".to_owned()),
            }
        };
        match read() {
            Ok((entries, pickle)) => Ok(Self { path, bytes, entries, pickle }),
            Err(reason) => Err(Error::format(path, format!("not a whole file of torch.save: {reason}; copy it again"))),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn pickle(&self) -> &Pickle {
        &self.pickle
    }

    /// An [`Error::Format`] of this file.
    pub(super) fn error(&self, reason: impl Into<String>) -> Error {
        Error::format(&self.path, reason)
    }

    /// The tensors of a dict and of the dicts in it, whose names are joined with dots, as `state_dict` does.
    ///
    /// # Errors
    /// For what is neither, a tensor that is damaged or of a type that weights do not have, and two of one name.
    pub(super) fn tensors(&self, dict: Id) -> Checked<BTreeMap<String, StoredTensor>> {
        let (mut tensors, mut seen, mut left) = (BTreeMap::new(), HashSet::new(), vec![(String::new(), dict)]);
        // Joined names may be far longer than the keys in the file.
        let mut letters = 0;
        while let Some((prefix, dict)) = left.pop() {
            if !seen.insert(dict) {
                return Err(format!("the dict {prefix:?} is there twice"));
            }
            for &(key, value) in self.pickle.dict(dict).unwrap_or_default() {
                let key = self.pickle.text(key).ok_or_else(|| format!("{prefix:?} has a key that is no text"))?;
                let name = format!("{prefix}{key}");
                if name.len() > MOST_NAME {
                    return Err(format!("a name has more than {MOST_NAME} letters, as no tensor's has"));
                }
                letters += name.len();
                if letters > MOST_NAMES {
                    return Err(format!("the names of its tensors have more than {MOST_NAMES} letters together"));
                }
                if self.pickle.dict(value).is_some() {
                    left.push((format!("{name}."), value));
                    continue;
                }
                let tensor = self.tensor(value).map_err(|reason| format!("{name}: {reason}"))?;
                if tensors.insert(name.clone(), tensor).is_some() {
                    return Err(format!("{name} is there twice"));
                }
            }
        }
        Ok(tensors)
    }

    fn tensor(&self, id: Id) -> Checked<StoredTensor> {
        let mut made = self.made(id)?;
        // Of a parameter: the tensor in it.
        if let (("torch._utils", "_rebuild_parameter"), &[inner, ..]) = made {
            made = self.made(inner)?;
        }
        match made {
            (("torch._utils", "_rebuild_tensor_v2"), &[storage, offset, shape, stride, ..]) => {
                self.rebuilt(storage, offset, [shape, stride])
            }
            ((module, name), _) => Err(format!("it is made by {module}.{name}, which is not implemented")),
        }
    }

    /// Which function makes a value, and of what.
    fn made(&self, id: Id) -> Checked<((&str, &str), &[Id])> {
        let Value::Made { callable, arguments, .. } = self.pickle.get(id) else {
            return Err("it is no tensor".into());
        };
        let callable = self.pickle.global(*callable).ok_or("it is no tensor")?;
        Ok((callable, self.pickle.tuple(*arguments).unwrap_or_default()))
    }

    fn rebuilt(&self, storage: Id, offset: Id, shape_and_stride: [Id; 2]) -> Checked<StoredTensor> {
        let [shape, stride] = shape_and_stride.map(|id| self.sizes(id));
        let (shape, stride) = (shape?, stride?);
        let outside = match self.pickle.get(storage) {
            Value::Outside(outside) => self.pickle.tuple(*outside).unwrap_or_default(),
            _ => &[],
        };
        let &[_, class, key, ..] = outside else { return Err("its storage is not one of torch.save's".into()) };
        let (Some((_, class)), Some(key)) = (self.pickle.global(class), self.pickle.text(key)) else {
            return Err("its storage has no type or no name".into());
        };
        let dtype = match class {
            "FloatStorage" => DType::F32,
            "BFloat16Storage" => DType::BF16,
            "HalfStorage" => DType::F16,
            other => return Err(format!("it must be of float32, bfloat16 or float16, got a {other}")),
        };
        let mut packed = 1usize;
        for (&size, &stride) in shape.iter().zip(&stride).rev() {
            if size > 1 && stride != packed {
                return Err(format!("its strides {stride} are not those of rows; save it contiguous"));
            }
            packed = packed.checked_mul(size).ok_or_else(|| format!("no file can hold the shape {shape:?}"))?;
        }
        let held =
            self.entries.get(&format!("data/{key}")).ok_or_else(|| format!("its bytes, data/{key}, are missing"))?;
        let width = dtype.size_in_bytes();
        let start = self.pickle.size(offset).and_then(|offset| offset.checked_mul(width));
        let end = packed.checked_mul(width).and_then(|bytes| start?.checked_add(bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= held.len() => {
                Ok(StoredTensor { dtype, shape, bytes: held.start + start..held.start + end })
            }
            _ => Err(format!("the shape {shape:?} is more than the {} bytes of data/{key}", held.len())),
        }
    }

    fn sizes(&self, tuple: Id) -> Checked<Vec<usize>> {
        let sizes = self.pickle.tuple(tuple).filter(|sizes| sizes.len() <= MOST_DIMENSIONS);
        let sizes = sizes.and_then(|sizes| sizes.iter().map(|&size| self.pickle.size(size)).collect());
        sizes.ok_or_else(|| "its shape is not a tuple of some sizes".into())
    }

    /// A tensor's values, copied: f32.
    ///
    /// # Errors
    /// candle's.
    pub(super) fn floats(&self, tensor: &StoredTensor) -> Result<Tensor> {
        let bytes = &self.bytes.as_ref()[tensor.bytes.clone()];
        let copied = Tensor::from_raw_buffer(bytes, tensor.dtype, &tensor.shape, &Device::Cpu)?;
        self.bytes.let_go(bytes);
        Ok(copied.to_dtype(DType::F32)?)
    }
}

/// What helps where a file is damaged.
const AGAIN: &str = "copy it again";

fn again(reason: impl ToString) -> String {
    format!("{}; {AGAIN}", reason.to_string())
}

/// Where the entries of an archive lie, without the name of the folder that all of them are in.
fn entries(bytes: &[u8]) -> Checked<HashMap<String, Range<usize>>> {
    let mut archive = ZipArchive::new(Cursor::new(bytes)).map_err(|e| match bytes {
        // What torch.save wrote before 1.6, and still does if it is asked to.
        [0x80, 0x02, ..] => "it is a bare pickle, as PyTorch wrote until 1.6; load it and save it again".to_owned(),
        _ => again(e),
    })?;
    if archive.has_duplicate_names() {
        return Err(again("two entries have one name"));
    }
    let mut entries = HashMap::new();
    for index in 0..archive.len() {
        let entry = archive.by_index_raw(index).map_err(again)?;
        let name = entry.name().map_err(again)?.into_owned();
        if entry.compression() != CompressionMethod::Stored || entry.encrypted() {
            return Err(format!("{name:?} is compressed, as torch.save never does; {AGAIN}"));
        }
        let start = entry.data_start().and_then(|start| usize::try_from(start).ok());
        let end = usize::try_from(entry.size()).ok().and_then(|len| start?.checked_add(len));
        let (Some(start), Some(end)) = (start, end.filter(|&end| end <= bytes.len())) else {
            return Err(format!("{name:?} lies past the end of the file; {AGAIN}"));
        };
        let (_, below) = name.split_once('/').ok_or_else(|| format!("{name:?} lies in no folder; {AGAIN}"))?;
        if entries.insert(below.to_owned(), start..end).is_some() {
            return Err(format!("two entries are called {below:?}; {AGAIN}"));
        }
    }
    Ok(entries)
}
