//! [`Parcel`]: the bytes of one message, with room for its header in front, so that an engine sends them as they are.

use super::{Element, Stamp};

/// A message.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Parcel(Vec<u8>);

/// Bytes in front of the payload.
pub(crate) const HEADER: usize = Stamp::BYTES;

impl Parcel {
    /// An empty message with room for `bytes`.
    pub fn with_capacity(bytes: usize) -> Self {
        let mut all = Vec::with_capacity(HEADER + bytes);
        all.resize(HEADER, 0);
        Self(all)
    }

    /// A message of these values.
    pub fn of<T: Element>(values: &[T]) -> Self {
        let mut parcel = Self::with_capacity(size_of_val(values));
        parcel.push(values);
        parcel
    }

    /// Appends values.
    pub fn push<T: Element>(&mut self, values: &[T]) {
        T::write(values, &mut self.0);
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
        self.0.get(HEADER..).unwrap_or(&[])
    }

    /// Writes the header.
    pub(crate) fn stamped(mut self, stamp: Stamp) -> Self {
        if self.0.len() < HEADER {
            self.0.resize(HEADER, 0);
        }
        self.0[..HEADER].copy_from_slice(&stamp.to_bytes());
        self
    }

    /// The header.
    pub(crate) fn stamp(&self) -> Option<Stamp> {
        Stamp::from_bytes(&self.0)
    }

    /// Header and payload, as they travel.
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.0
    }

    /// A message that has arrived.
    pub(crate) fn from_bytes(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }
}
