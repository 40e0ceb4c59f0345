//! [`Value`]: a value of a GGUF file's metadata; [`Reader`]: bytes taken one after the other, none past the end.

use crate::fields::Checked;
use serde_json::json;
use std::ops::Range;

/// The header of a file, from some place on.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    /// Where it stands.
    pub(super) fn at(&self) -> usize {
        self.at
    }

    pub(super) fn take(&mut self, count: u64) -> Checked<&'a [u8]> {
        let left = self.bytes.len() - self.at;
        match usize::try_from(count).ok().filter(|&count| count <= left) {
            Some(count) => {
                self.at += count;
                Ok(&self.bytes[self.at - count..self.at])
            }
            None => Err(format!(
                "it ends after {} bytes, inside of its header, of which {count} bytes more belong to one value",
                self.bytes.len()
            )),
        }
    }

    fn array<const N: usize>(&mut self) -> Checked<[u8; N]> {
        let bytes = self.take(N as u64)?;
        Ok(bytes.try_into().unwrap_or([0; N]))
    }

    pub(super) fn u32(&mut self) -> Checked<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(super) fn u64(&mut self) -> Checked<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub(super) fn text(&mut self) -> Checked<&'a str> {
        let len = self.u64()?;
        let at = self.at;
        std::str::from_utf8(self.take(len)?).map_err(|_| format!("the text at byte {at} of its header is not UTF-8"))
    }
}

/// A value of metadata.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Unsigned(u64),
    Signed(i64),
    /// The number that the file's f32 is written as in decimal, which is what it was made of.
    Float(f64),
    Bool(bool),
    Text(String),
    Array(ArrayAt),
}

/// An array, still where it lies in the file.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ArrayAt {
    /// The number of its values' type.
    pub(super) kind: u32,
    pub(super) len: usize,
    range: Range<usize>,
}

/// Numbers of the types of values.
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// Bytes of a value of this type, where all have as many.
fn size_of_kind(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

impl Value {
    /// The next value of a file.
    pub(super) fn read(reader: &mut Reader<'_>) -> Checked<Self> {
        let kind = reader.u32()?;
        match kind {
            ARRAY => Ok(Self::Array(ArrayAt::read(reader)?)),
            _ => Self::of_kind(kind, reader),
        }
    }

    fn of_kind(kind: u32, reader: &mut Reader<'_>) -> Checked<Self> {
        Ok(match kind {
            0 => Self::Unsigned(u8::from_le_bytes(reader.array()?).into()),
            1 => Self::Signed(i8::from_le_bytes(reader.array()?).into()),
            2 => Self::Unsigned(u16::from_le_bytes(reader.array()?).into()),
            3 => Self::Signed(i16::from_le_bytes(reader.array()?).into()),
            4 => Self::Unsigned(reader.u32()?.into()),
            5 => Self::Signed(i32::from_le_bytes(reader.array()?).into()),
            6 => {
                let value = f32::from_le_bytes(reader.array()?);
                Self::Float(value.to_string().parse().unwrap_or(value.into()))
            }
            7 => Self::Bool(reader.array::<1>()? != [0]),
            TEXT => Self::Text(reader.text()?.to_owned()),
            10 => Self::Unsigned(reader.u64()?),
            11 => Self::Signed(i64::from_le_bytes(reader.array()?)),
            12 => Self::Float(f64::from_le_bytes(reader.array()?)),
            ARRAY => return Err("an array of arrays is not implemented".into()),
            other => return Err(format!("there is no type {other} of values")),
        })
    }

    /// As a value of JSON, the form in which configurations are read; `None` for what has none: an array, or a number that is none.
    pub(super) fn to_json(&self) -> Option<serde_json::Value> {
        match self {
            Self::Unsigned(value) => Some(json!(value)),
            Self::Signed(value) => Some(json!(value)),
            Self::Float(value) => value.is_finite().then(|| json!(value)),
            Self::Bool(value) => Some(json!(value)),
            Self::Text(value) => Some(json!(value)),
            Self::Array(_) => None,
        }
    }
}

impl ArrayAt {
    /// Goes through the array, so that everything in it is known to be there; keeps none of it.
    fn read(reader: &mut Reader<'_>) -> Checked<Self> {
        let (kind, count) = (reader.u32()?, reader.u64()?);
        let start = reader.at();
        match size_of_kind(kind) {
            Some(size) => drop(reader.take(count.saturating_mul(size))?),
            None if kind == TEXT => {
                for _ in 0..count {
                    reader.text()?;
                }
            }
            None => drop(Value::of_kind(kind, reader)?),
        }
        let len = usize::try_from(count).map_err(|e| e.to_string())?;
        Ok(Self { kind, len, range: start..reader.at() })
    }

    /// The values, one after the other; `bytes` are those of the file.
    pub(super) fn values<'a>(&self, bytes: &'a [u8]) -> impl Iterator<Item = Checked<Value>> + use<'a> {
        let mut reader = Reader::new(&bytes[self.range.clone()]);
        let kind = self.kind;
        (0..self.len).map(move |_| Value::of_kind(kind, &mut reader))
    }

    /// The texts, if it is an array of texts.
    pub(super) fn texts<'a>(&self, bytes: &'a [u8]) -> Checked<Vec<&'a str>> {
        if self.kind != TEXT {
            return Err(format!("must be an array of texts, got one of type {}", self.kind));
        }
        let mut reader = Reader::new(&bytes[self.range.clone()]);
        (0..self.len).map(|_| reader.text()).collect()
    }
}
