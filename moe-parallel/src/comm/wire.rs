//! A [`Fault`] as bytes, so that the rank which finds it can tell the others; a [`Reader`] of bytes that may be anything.

use super::{Cause, Fault, Stamp};
use std::time::Duration;

const TIMEOUT: u8 = 0;
const LEFT: u8 = 1;
const DIVERGED: u8 = 2;
const SIZE: u8 = 3;
const KILLED: u8 = 4;
const ENGINE: u8 = 5;

/// The bytes of a fault.
pub(super) fn encode(fault: &Fault) -> Vec<u8> {
    let mut bytes = Vec::new();
    let number = |bytes: &mut Vec<u8>, value: usize| bytes.extend((value as u64).to_le_bytes());
    number(&mut bytes, fault.rank);
    bytes.extend(fault.stamp.to_bytes());
    match &fault.cause {
        Cause::Timeout { missing, after } => {
            bytes.push(TIMEOUT);
            bytes.extend(after.as_secs().to_le_bytes());
            bytes.extend(after.subsec_nanos().to_le_bytes());
            for (rank, last) in missing {
                number(&mut bytes, *rank);
                bytes.push(u8::from(last.is_some()));
                bytes.extend(last.map_or([0; Stamp::BYTES], Stamp::to_bytes));
            }
        }
        Cause::Left { peer } => {
            bytes.push(LEFT);
            number(&mut bytes, *peer);
        }
        Cause::Diverged { peer, theirs } => {
            bytes.push(DIVERGED);
            number(&mut bytes, *peer);
            bytes.extend(theirs.to_bytes());
        }
        Cause::Size { peer, expected, got } => {
            bytes.push(SIZE);
            [*peer, *expected, *got].into_iter().for_each(|value| number(&mut bytes, value));
        }
        Cause::Killed => bytes.push(KILLED),
        Cause::Engine(text) => {
            bytes.push(ENGINE);
            bytes.extend(text.as_bytes());
        }
    }
    bytes
}

/// The fault of these bytes; `None` if they are none.
pub(super) fn decode(bytes: &[u8]) -> Option<Fault> {
    let mut reader = Reader(bytes);
    let (rank, stamp) = (reader.number()?, reader.stamp()?);
    let cause = match reader.byte()? {
        TIMEOUT => {
            let seconds = reader.array().map(u64::from_le_bytes)?;
            let nanoseconds = reader.array().map(u32::from_le_bytes).filter(|&n| n < 1_000_000_000)?;
            let mut missing = Vec::new();
            while !reader.0.is_empty() {
                let (rank, seen) = (reader.number()?, reader.byte()?);
                let last: [u8; Stamp::BYTES] = reader.array()?;
                missing.push((rank, if seen == 0 { None } else { Some(Stamp::from_bytes(&last)?) }));
            }
            Cause::Timeout { missing, after: Duration::new(seconds, nanoseconds) }
        }
        LEFT => Cause::Left { peer: reader.number()? },
        DIVERGED => Cause::Diverged { peer: reader.number()?, theirs: reader.stamp()? },
        SIZE => Cause::Size { peer: reader.number()?, expected: reader.number()?, got: reader.number()? },
        KILLED => Cause::Killed,
        ENGINE => Cause::Engine(String::from_utf8(std::mem::take(&mut reader.0).to_vec()).ok()?),
        _ => return None,
    };
    reader.0.is_empty().then_some(Fault { rank, stamp, cause })
}

/// Bytes that are not yet read.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }

    pub(super) fn byte(&mut self) -> Option<u8> {
        self.array().map(|[byte]| byte)
    }

    pub(super) fn number(&mut self) -> Option<usize> {
        self.array().map(u64::from_le_bytes)?.try_into().ok()
    }

    /// As many bytes.
    pub(super) fn slice(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    fn stamp(&mut self) -> Option<Stamp> {
        self.array::<{ Stamp::BYTES }>().and_then(|bytes| Stamp::from_bytes(&bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::{Kind, Phase, Site};
    use proptest::prelude::*;

    fn every_cause() -> Vec<Fault> {
        let stamp = Stamp { context: u64::MAX, sequence: 9, kind: Kind::Split, site: Site::layer(Phase::Backward, 4) };
        let other = Stamp { site: Site::new(Phase::Save), ..stamp };
        let after = Duration::new(u64::MAX, 999_999_999);
        [
            Cause::Timeout { missing: vec![], after: Duration::ZERO },
            Cause::Timeout { missing: vec![(0, None), (usize::MAX, Some(other))], after },
            Cause::Left { peer: 7 },
            Cause::Diverged { peer: 1, theirs: other },
            Cause::Size { peer: 3, expected: 0, got: usize::MAX },
            Cause::Killed,
            Cause::Engine(String::new()),
            Cause::Engine("größer".into()),
        ]
        .map(|cause| Fault { rank: 5, stamp, cause })
        .into()
    }

    #[test]
    fn faults_survive_the_wire() {
        for fault in every_cause() {
            assert_eq!(decode(&encode(&fault)), Some(fault));
        }
    }

    /// Half a fault is none, but for a text or a list that may end anywhere.
    #[test]
    fn parts_of_faults_are_refused() {
        for fault in every_cause() {
            let bytes = encode(&fault);
            for len in 0..bytes.len() {
                assert_ne!(decode(&bytes[..len]), Some(fault.clone()));
            }
            let open = matches!(fault.cause, Cause::Engine(_));
            assert!(open || decode(&[&bytes[..], &[0]].concat()).is_none(), "{fault}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..120)) {
            if let Some(fault) = decode(&bytes) {
                prop_assert_eq!(decode(&encode(&fault)), Some(fault));
            }
        }
    }
}
