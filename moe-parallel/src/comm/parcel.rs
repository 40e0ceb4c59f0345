//! [`Parcel`]: the bytes of one message, with room for its header in front, so that an engine sends them as they are.

use super::{Element, Stamp};
use std::time::Instant;

/// A message.
#[derive(Debug, Clone, Default)]
pub struct Parcel {
    bytes: Vec<u8>,
    arrived: Option<Instant>,
}

/// Of what they say, whenever they came.
impl PartialEq for Parcel {
    fn eq(&self, other: &Self) -> bool {
        self.bytes == other.bytes
    }
}

impl Eq for Parcel {}

/// Bytes in front of the payload.
pub(crate) const HEADER: usize = Stamp::BYTES;

impl Parcel {
    /// An empty message with room for `bytes`.
    pub fn with_capacity(bytes: usize) -> Self {
        let mut all = Vec::with_capacity(HEADER + bytes);
        all.resize(HEADER, 0);
        Self { bytes: all, arrived: None }
    }

    /// A message of these values.
    pub fn of<T: Element>(values: &[T]) -> Self {
        let mut parcel = Self::with_capacity(size_of_val(values));
        parcel.push(values);
        parcel
    }

    /// Appends values.
    pub fn push<T: Element>(&mut self, values: &[T]) {
        T::write(values, &mut self.bytes);
    }

    /// The values of a message that holds nothing else.
    pub fn values<T: Element>(&self) -> Vec<T> {
        let mut values = vec![T::ZERO; self.payload().len() / size_of::<T>()];
        T::read(self.payload(), &mut values);
        values
    }

    /// Copies the values into `to`, which is as long as they are.
    pub fn read<T: Element>(&self, to: &mut [T]) {
        T::read(self.payload(), to);
    }

    /// Bytes without the header.
    pub fn payload(&self) -> &[u8] {
        self.bytes.get(HEADER..).unwrap_or(&[])
    }

    /// Writes the header.
    pub(crate) fn stamped(mut self, stamp: Stamp) -> Self {
        if self.bytes.len() < HEADER {
            self.bytes.resize(HEADER, 0);
        }
        self.bytes[..HEADER].copy_from_slice(&stamp.to_bytes());
        self
    }

    /// The header.
    pub(crate) fn stamp(&self) -> Option<Stamp> {
        Stamp::from_bytes(&self.bytes)
    }

    /// Header and payload, as they travel.
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// A message that has arrived.
    pub(crate) fn from_bytes(bytes: Vec<u8>) -> Self {
        Self { bytes, arrived: None }.arriving()
    }

    /// The same message, which has arrived now.
    pub(crate) fn arriving(self) -> Self {
        Self { arrived: Some(Instant::now()), ..self }
    }

    /// When it arrived on this machine, whoever waited for it then.
    pub fn arrived(&self) -> Option<Instant> {
        self.arrived
    }
}
