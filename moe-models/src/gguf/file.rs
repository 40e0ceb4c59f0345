//! [`GgufFile`]: one GGUF file, mapped, its header read; what its metadata says, by key.

use super::header::{Header, TensorAt};
use super::value::Value;
use crate::fields::{Checked, Fields};
use crate::hf::Bytes;
use crate::{Error, Result};
use serde_json::Map;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A file of tensors and metadata.
#[derive(Debug)]
pub(super) struct GgufFile {
    path: PathBuf,
    bytes: Bytes,
    header: Header,
}

impl GgufFile {
    /// The file, mapped.
    ///
    /// # Errors
    /// As [`GgufFile::new`]; [`Error::Io`] if it cannot be read.
    pub(super) fn open(path: &Path) -> Result<Self> {
        Self::new(path.to_owned(), Bytes::map(path)?)
    }

    /// The file of this content; `path` is its name for messages.
    ///
    /// # Errors
    /// [`Error::Format`] for a header that is damaged, or says what is not implemented.
    pub(super) fn new(path: PathBuf, bytes: Bytes) -> Result<Self> {
        match Header::read(bytes.as_ref()) {
            Ok(header) => Ok(Self { path, bytes, header }),
            Err(reason) => Err(Error::format(path, format!("not a GGUF file that can be read: {reason}"))),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// A refusal of this file.
    pub(super) fn refused(&self, reason: impl Into<String>) -> Error {
        Error::format(&self.path, reason)
    }

    pub(super) fn tensors(&self) -> &BTreeMap<String, TensorAt> {
        &self.header.tensors
    }

    pub(super) fn tensor(&self, name: &str) -> Option<&TensorAt> {
        self.header.tensors.get(name)
    }

    /// The bytes of a tensor.
    pub(super) fn data(&self, tensor: &TensorAt) -> &[u8] {
        &self.bytes.as_ref()[tensor.start..tensor.start + tensor.bytes]
    }

    /// Tells the system that this part of a tensor's bytes is going to be read.
    pub(super) fn will_need(&self, data: &[u8]) {
        self.bytes.will_need(data);
    }

    /// Tells the system that this part of a tensor's bytes is not going to be read again soon.
    pub(super) fn let_go(&self, data: &[u8]) {
        self.bytes.let_go(data);
    }

    /// Those of the rows `rows` of a tensor, counted over all its dimensions but the last, in this order.
    pub(super) fn rows(&self, tensor: &TensorAt, rows: impl IntoIterator<Item = usize>) -> Cow<'_, [u8]> {
        let (data, size) = (self.data(tensor), tensor.row_bytes());
        Cow::Owned(rows.into_iter().flat_map(|row| &data[row * size..][..size]).copied().collect())
    }

    /// The value of a key.
    pub(super) fn value(&self, key: &str) -> Option<&Value> {
        self.header.metadata.get(key)
    }

    /// Keys that begin so, without that beginning.
    pub(super) fn keys<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = &'a str> {
        self.header.metadata.keys().filter_map(move |key| key.strip_prefix(prefix))
    }

    /// A text; `None` if there is none.
    pub(super) fn text(&self, key: &str) -> Checked<Option<&str>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(other) => Err(format!("{key} must be a text, got {other:?}")),
        }
    }

    /// A number of 0 or more; `None` if there is none.
    pub(super) fn count(&self, key: &str) -> Checked<Option<u64>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Unsigned(count)) => Ok(Some(*count)),
            Some(&Value::Signed(count)) if count >= 0 => Ok(Some(count as u64)),
            Some(other) => Err(format!("{key} must be a number of 0 or more, got {other:?}")),
        }
    }

    /// Yes or no; `None` if there is neither.
    pub(super) fn flag(&self, key: &str) -> Checked<Option<bool>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(format!("{key} must be true or false, got {other:?}")),
        }
    }

    /// Texts; `None` if there are none.
    pub(super) fn texts(&self, key: &str) -> Checked<Option<Vec<&str>>> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Array(array)) => {
                array.texts(self.bytes.as_ref()).map(Some).map_err(|reason| format!("{key} {reason}"))
            }
            Some(other) => Err(format!("{key} must be an array of texts, got {other:?}")),
        }
    }

    /// Numbers, at most `most` of them; `None` if there are none. How many there are is looked at before any is read.
    pub(super) fn numbers(&self, key: &str, most: usize) -> Checked<Option<Vec<f64>>> {
        let number = |value| match value {
            Value::Unsigned(value) => Ok(value as f64),
            Value::Signed(value) => Ok(value as f64),
            Value::Float(value) => Ok(value),
            other => Err(format!("{key} must be an array of numbers, got one with {other:?}")),
        };
        match self.value(key) {
            None => Ok(None),
            Some(Value::Array(array)) if array.len > most => {
                Err(format!("{key} has {} entries for {most} tokens", array.len))
            }
            Some(Value::Array(array)) => {
                array.values(self.bytes.as_ref()).map(|value| number(value?)).collect::<Checked<_>>().map(Some)
            }
            Some(other) => Err(format!("{key} must be an array of numbers, got {other:?}")),
        }
    }

    /// The keys that begin with `at` and a dot, to be taken one by one.
    pub(super) fn fields(&self, at: &str) -> Checked<Fields> {
        let prefix = format!("{at}.");
        let mut fields = Map::new();
        for name in self.keys(&prefix) {
            let key = format!("{prefix}{name}");
            let json = self.value(&key).and_then(Value::to_json);
            let json = json.ok_or_else(|| format!("{key} must be one finite value; nothing else is implemented"))?;
            fields.insert(name.to_owned(), json);
        }
        Fields::of(&fields.into(), at)
    }
}
