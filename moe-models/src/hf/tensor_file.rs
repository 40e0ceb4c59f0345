//! [`TensorFile`]: one safetensors file, its header read; and [`write_header`], for a file that is written tensor by tensor.

use super::map::Bytes;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::Serialize;
use serde::ser::{SerializeMap, Serializer};
use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

/// Bytes in which a file says how long its header is; headers are padded to a multiple.
const LEN_BYTES: usize = size_of::<u64>();

/// One safetensors file.
#[derive(Debug)]
pub(crate) struct TensorFile {
    path: PathBuf,
    bytes: Bytes,
    /// Where the tensors begin.
    start: usize,
    header: Metadata,
}

impl TensorFile {
    /// The file of this content; `path` is its name for messages.
    ///
    /// # Errors
    /// [`Error::Format`] unless header and tensors fill it exactly, which is found before anything of a size it names is
    /// allocated.
    pub(crate) fn new(path: PathBuf, bytes: Bytes) -> Result<Self> {
        match read_header(bytes.as_ref()) {
            Ok((start, header)) => Ok(Self { path, bytes, start, header }),
            Err(reason) => {
                let reason =
                    format!("not a whole safetensors file: {reason}; the file may be truncated, copy it again");
                Err(Error::format(path, reason))
            }
        }
    }

    /// The file, mapped.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; as [`TensorFile::new`].
    pub(crate) fn open(path: PathBuf) -> Result<Self> {
        let bytes = Bytes::map(&path)?;
        Self::new(path, bytes)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The names of its tensors.
    pub(crate) fn names(&self) -> impl Iterator<Item = String> + use<> {
        self.header.tensors().into_keys().collect::<Vec<_>>().into_iter()
    }

    /// What the header says of a tensor.
    pub(crate) fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.header.info(name)
    }

    /// What the header says besides tensors.
    pub(crate) fn metadata(&self, key: &str) -> Option<&str> {
        self.header.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// The bytes of a tensor, little-endian.
    pub(crate) fn data(&self, info: &TensorInfo) -> &[u8] {
        let (from, to) = info.data_offsets;
        &self.bytes.as_ref()[self.start + from..self.start + to]
    }

    /// Tells the system that this part of [`Self::data`] is not going to be read again soon.
    pub(crate) fn let_go(&self, data: &[u8]) {
        self.bytes.let_go(data);
    }

    /// Tells the system that this part of [`Self::data`] is going to be read.
    pub(crate) fn will_need(&self, data: &[u8]) {
        self.bytes.will_need(data);
    }

    /// A tensor, copied.
    ///
    /// # Errors
    /// [`Error::Format`] if it is missing or of a type that weights do not have.
    pub(crate) fn tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        let Some(info) = self.info(name) else {
            return Err(Error::format(&self.path, format!("tensor {name} is missing")));
        };
        Ok(Tensor::from_raw_buffer(self.data(info), self.dtype(name, info.dtype)?, &info.shape, device)?)
    }

    /// The part of a tensor at `index` of its first dimension, copied.
    ///
    /// # Errors
    /// As [`TensorFile::tensor`]; [`Error::Format`] if it has no such part.
    pub(crate) fn slice(&self, name: &str, index: usize, device: &Device) -> Result<Tensor> {
        let bytes = self.bytes_of(name, index)?;
        let Some(info) = self.info(name) else {
            return Err(Error::format(&self.path, format!("tensor {name} is missing")));
        };
        Ok(Tensor::from_raw_buffer(bytes, self.dtype(name, info.dtype)?, &info.shape[1..], device)?)
    }

    /// The bytes of the part of a tensor at `index` of its first dimension.
    ///
    /// # Errors
    /// [`Error::Format`] if there is no such tensor or part.
    pub(crate) fn bytes_of(&self, name: &str, index: usize) -> Result<&[u8]> {
        let Some(info) = self.info(name) else {
            return Err(Error::format(&self.path, format!("tensor {name} is missing")));
        };
        let Some(&count) = info.shape.first().filter(|count| index < **count) else {
            let reason = format!("tensor {name} {:?} has no part {index} along its first dimension", info.shape);
            return Err(Error::format(&self.path, reason));
        };
        let data = self.data(info);
        let bytes = data.len() / count;
        Ok(&data[index * bytes..][..bytes])
    }

    /// The type of a tensor of weights.
    ///
    /// # Errors
    /// [`Error::Format`] for a type that weights do not have.
    pub(crate) fn dtype(&self, name: &str, dtype: Dtype) -> Result<DType> {
        match dtype {
            Dtype::F32 => Ok(DType::F32),
            Dtype::BF16 => Ok(DType::BF16),
            Dtype::F16 => Ok(DType::F16),
            other => Err(Error::format(&self.path, format!("tensor {name} must be f32, bf16 or f16, got {other:?}"))),
        }
    }
}

/// Where the tensors of a file begin, and its header.
///
/// `SafeTensors::read_metadata` does the same, but adds up sizes that a file may name without a check for overflow.
fn read_header(bytes: &[u8]) -> std::result::Result<(usize, Metadata), String> {
    let cut = || format!("it ends after {} bytes, inside of its header", bytes.len());
    let (len, rest) = bytes.split_first_chunk::<LEN_BYTES>().ok_or_else(cut)?;
    let header = usize::try_from(u64::from_le_bytes(*len)).ok().and_then(|len| rest.get(..len)).ok_or_else(cut)?;
    // Refuses tensors that overlap, leave gaps, or are not as long as their shapes say.
    let metadata: Metadata = serde_json::from_slice(header).map_err(|e| e.to_string())?;
    let (want, got) = (metadata.data_len(), rest.len() - header.len());
    if want != got {
        return Err(format!("its header tells of {want} bytes of tensors, but there are {got}"));
    }
    Ok((LEN_BYTES + header.len(), metadata))
}

/// A tensor that is going to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TensorHeader {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
}

impl TensorHeader {
    /// Size.
    pub(crate) fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }

    /// The order of tensors in a file: wide types first, so that each value lies where its type may; then names.
    pub(crate) fn order(&self, other: &Self) -> Ordering {
        (other.dtype.bitsize().cmp(&self.dtype.bitsize())).then_with(|| self.name.cmp(&other.name))
    }
}

/// Writes what comes before the tensors of a file, which follow in this order: [`TensorHeader::order`], so that a file does not
/// depend on who lists them. `metadata` are pairs of names and texts.
pub(crate) fn write_header(
    out: &mut (impl Write + ?Sized),
    metadata: &[(&str, String)],
    tensors: &[TensorHeader],
) -> std::io::Result<()> {
    debug_assert!(tensors.is_sorted_by(|a, b| a.order(b) == Ordering::Less), "in order, none twice");
    let mut json = serde_json::to_vec(&Header { metadata, tensors })?;
    json.resize(json.len().next_multiple_of(LEN_BYTES), b' ');
    out.write_all(&(json.len() as u64).to_le_bytes())?;
    out.write_all(&json)
}

/// Values that are converted at a time.
const CHUNK: usize = 1 << 14;

/// Writes values as `dtype`, little-endian: bf16 and f16 rounded, anything else as they are, f32.
pub(crate) fn write_values(out: &mut (impl Write + ?Sized), values: &[f32], dtype: Dtype) -> std::io::Result<()> {
    let mut bytes = Vec::with_capacity(size_of::<f32>() * values.len().min(CHUNK));
    for chunk in values.chunks(CHUNK) {
        bytes.clear();
        match dtype {
            Dtype::BF16 => bytes.extend(chunk.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes())),
            Dtype::F16 => bytes.extend(chunk.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes())),
            _ => bytes.extend(chunk.iter().flat_map(|value| value.to_le_bytes())),
        }
        out.write_all(&bytes)?;
    }
    Ok(())
}

struct Header<'a> {
    metadata: &'a [(&'a str, String)],
    tensors: &'a [TensorHeader],
}

impl Serialize for Header<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(1 + self.tensors.len()))?;
        map.serialize_entry("__metadata__", &self.metadata.iter().map(|(k, v)| (*k, v)).collect::<BTreeMap<_, _>>())?;
        let mut offset = 0;
        for tensor in self.tensors {
            let data_offsets = (offset, offset + tensor.bytes());
            let info = TensorInfo { dtype: tensor.dtype, shape: tensor.shape.clone(), data_offsets };
            map.serialize_entry(&tensor.name, &info)?;
            offset = data_offsets.1;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use safetensors::tensor::TensorView;

    fn tensors() -> Vec<TensorHeader> {
        let header =
            |name: &str, dtype, shape: &[usize]| TensorHeader { name: name.into(), dtype, shape: shape.to_vec() };
        vec![
            header("a.\"quoted\"", Dtype::F32, &[2, 3]),
            header("b", Dtype::F32, &[]),
            header("c", Dtype::F32, &[0, 4]),
        ]
    }

    fn file(bytes: Vec<u8>) -> Result<TensorFile> {
        TensorFile::new("it.safetensors".into(), Bytes::Held(bytes.into()))
    }

    /// The bytes that the library for such files writes of the same tensors.
    #[test]
    fn files_are_those_of_the_library() {
        let data: Vec<u8> = (0..28).collect();
        let mut ours = Vec::new();
        write_header(&mut ours, &[("format", "pt".into())], &tensors()).unwrap();
        ours.extend(&data);
        let mut rest = data.as_slice();
        let views = tensors().into_iter().map(|tensor| {
            let (own, others) = rest.split_at(tensor.bytes());
            rest = others;
            (tensor.name, TensorView::new(tensor.dtype, tensor.shape, own).unwrap())
        });
        let metadata = Some([("format".to_owned(), "pt".to_owned())].into());
        assert_eq!(ours, safetensors::serialize(views.collect::<Vec<_>>(), metadata).unwrap());
        let read = file(ours).unwrap();
        assert_eq!(read.metadata("format"), Some("pt"));
        assert_eq!(read.data(read.info("b").unwrap()), &data[24..]);
        assert_eq!(read.names().count(), 3);
    }

    /// A file of two tensors so long that their sizes have no sum, and a header that is longer than memory.
    #[test]
    fn sizes_that_overflow_are_refused() {
        let eighth = usize::MAX / 8;
        let tensor = |n: usize| {
            format!(
                "\"{n}\":{{\"dtype\":\"U8\",\"shape\":[{eighth}],\"data_offsets\":[{},{}]}}",
                n * eighth,
                (n + 1) * eighth
            )
        };
        let last = format!("\"8\":{{\"dtype\":\"U8\",\"shape\":[7],\"data_offsets\":[{},{}]}}", 8 * eighth, usize::MAX);
        let json = format!("{{{},{last}}}", (0..8).map(tensor).collect::<Vec<_>>().join(","));
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend(json.as_bytes());
        let text = file(bytes).unwrap_err().to_string();
        assert!(text.contains("bytes of tensors, but there are 0"), "{text}");
        for len in [u64::MAX, 1 << 40, 9] {
            let text = file([&len.to_le_bytes()[..], b"{}      "].concat()).unwrap_err().to_string();
            assert!(text.contains("it.safetensors") && text.contains("inside of its header"), "{text}");
        }
    }
}
