//! What processes say to each other before they are ranks of a world, as bytes. What comes may be anything: it is read or refused.

use crate::comm::wire::Reader;
use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Of what is said from here on. A [`Hello`] of any version begins with the version and the job.
pub(super) const VERSION: u32 = 1;
/// Of the name of a job.
pub(super) const MOST_JOB_BYTES: usize = 256;

/// What tells a job's connections from all others: drawn by rank 0, known to its ranks alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cookie([u8; 16]);

impl Cookie {
    /// Of a rank that does not know it yet.
    pub(super) const NONE: Self = Self([0; 16]);

    /// Another each time, which nobody can guess: the standard library's hashers have random keys.
    pub(super) fn random() -> Self {
        let mut cookie = [0; 16];
        cookie.chunks_mut(8).for_each(|half| half.copy_from_slice(&RandomState::new().hash_one(0u8).to_le_bytes()));
        Self(cookie)
    }
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To be one of the job. To rank 0, which keeps it for [`Purpose::Control`].
    Join = 0,
    /// Short messages that must not wait behind others.
    Control = 1,
    /// Parcels.
    Data = 2,
}

/// Who connects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hello {
    pub(super) version: u32,
    pub(super) job: String,
    /// None if its version is another.
    pub(super) guest: Option<Guest>,
}

/// See [`Hello`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Guest {
    pub(super) purpose: Purpose,
    pub(super) rank: usize,
    pub(super) size: usize,
    pub(super) cookie: Cookie,
    /// Where it can be connected to; no address in particular if it listens on all.
    pub(super) listens: SocketAddr,
}

impl Hello {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = self.version.to_le_bytes().to_vec();
        bytes.extend((self.job.len() as u16).to_le_bytes());
        bytes.extend(self.job.as_bytes());
        if let Some(guest) = &self.guest {
            bytes.push(guest.purpose as u8);
            number(&mut bytes, guest.rank);
            number(&mut bytes, guest.size);
            bytes.extend(guest.cookie.0);
            address(&mut bytes, guest.listens);
        }
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        let version = reader.array().map(u32::from_le_bytes)?;
        let len = reader.array().map(u16::from_le_bytes)?.into();
        let job = Some(len).filter(|&len| len <= MOST_JOB_BYTES).and_then(|len| reader.slice(len))?;
        let job = String::from_utf8(job.to_vec()).ok()?;
        if version != VERSION {
            return Some(Self { version, job, guest: None });
        }
        let purpose = reader.byte()?;
        let guest = Guest {
            purpose: [Purpose::Join, Purpose::Control, Purpose::Data]
                .into_iter()
                .find(|&known| known as u8 == purpose)?,
            rank: reader.number()?,
            size: reader.number()?,
            cookie: Cookie(reader.array()?),
            listens: read_address(&mut reader)?,
        };
        reader.0.is_empty().then_some(Self { version, job, guest: Some(guest) })
    }
}

/// Where all ranks are, in their order; rank 0 is where it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Table {
    pub(super) cookie: Cookie,
    pub(super) others: Vec<SocketAddr>,
}

impl Table {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = self.cookie.0.to_vec();
        self.others.iter().for_each(|&other| address(&mut bytes, other));
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader(bytes);
        let (cookie, mut others) = (Cookie(reader.array()?), Vec::new());
        while !reader.0.is_empty() {
            others.push(read_address(&mut reader)?);
        }
        Some(Self { cookie, others })
    }
}

/// Why a guest is turned away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    /// It is of no use to come again.
    pub(super) is_final: bool,
    pub(super) why: String,
}

impl Refusal {
    pub(super) fn encode(&self) -> Vec<u8> {
        [&[u8::from(self.is_final)], self.why.as_bytes()].concat()
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (is_final, why) = bytes.split_first()?;
        Some(Self { is_final: *is_final != 0, why: String::from_utf8(why.to_vec()).ok()? })
    }
}

fn number(bytes: &mut Vec<u8>, value: usize) {
    bytes.extend((value as u64).to_le_bytes());
}

fn address(bytes: &mut Vec<u8>, address: SocketAddr) {
    match address.ip() {
        IpAddr::V4(ip) => {
            bytes.push(4);
            bytes.extend(ip.octets());
        }
        IpAddr::V6(ip) => {
            bytes.push(6);
            bytes.extend(ip.octets());
        }
    }
    bytes.extend(address.port().to_le_bytes());
}

fn read_address(reader: &mut Reader<'_>) -> Option<SocketAddr> {
    let ip = match reader.byte()? {
        4 => Ipv4Addr::from(reader.array::<4>()?).into(),
        6 => Ipv6Addr::from(reader.array::<16>()?).into(),
        _ => return None,
    };
    Some(SocketAddr::new(ip, reader.array().map(u16::from_le_bytes)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello() -> Hello {
        let listens = SocketAddr::from(([10, 1, 2, 3], 65_535));
        let guest = Guest { purpose: Purpose::Data, rank: 3, size: usize::MAX, cookie: Cookie::random(), listens };
        Hello { version: VERSION, job: "größer".into(), guest: Some(guest) }
    }

    #[test]
    fn what_is_said_is_heard() {
        let hello = hello();
        assert_eq!(Hello::decode(&hello.encode()), Some(hello.clone()));
        let other = Hello { version: 7, guest: None, ..hello };
        let later = [&other.encode()[..], b"what a later version adds"].concat();
        assert_eq!(Hello::decode(&later), Some(other));

        let others = vec![SocketAddr::from(([127, 0, 0, 1], 0)), SocketAddr::from((Ipv6Addr::LOCALHOST, 1))];
        let table = Table { cookie: Cookie::random(), others };
        assert_eq!(Table::decode(&table.encode()), Some(table));

        let refusal = Refusal { is_final: true, why: "größer".into() };
        assert_eq!(Refusal::decode(&refusal.encode()), Some(refusal));
    }

    #[test]
    fn parts_are_refused() {
        let bytes = hello().encode();
        assert!((0..bytes.len()).all(|len| Hello::decode(&bytes[..len]).is_none()));
        assert_eq!(Hello::decode(&[&bytes[..], &[0]].concat()), None);
    }

    #[test]
    fn cookies_differ() {
        assert_ne!(Cookie::random(), Cookie::random());
        assert_ne!(Cookie::random(), Cookie::NONE);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            if let Some(hello) = Hello::decode(&bytes).filter(|hello| hello.guest.is_some()) {
                prop_assert_eq!(hello.encode(), bytes.clone());
            }
            if let Some(table) = Table::decode(&bytes) {
                prop_assert_eq!(table.encode(), bytes);
            }
            let _any = Refusal::decode(&[]);
        }
    }
}
