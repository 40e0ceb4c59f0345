//! The file a tokenised source is kept in: written as a stream, mapped when it is whole. Says nothing of where such files
//! lie ([`super::cache`] does).
//!
//! A header of [`HEADER_BYTES`], all numbers little-endian, then one record per token:
//!
//! ```text
//! magic [8]  version u32  id_bytes u32  tokens u64  key [32]  checksum [32]
//! id u16 or u32 (id_bytes)  bytes of text the token stands for u16   ... tokens times
//! ```
//!
//! An id and its bytes lie side by side, so that a file can be written in one pass without knowing how long it will be.
//! The checksum is BLAKE3 over the records and then the header before it.

use crate::hf::Bytes;
use crate::{Error, Result};
use std::io::{Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::PathBuf;

const MAGIC: [u8; 8] = *b"moe-tok\n";
/// To be raised whenever the layout changes, or the same text and tokenizer come to give other ids.
pub(crate) const VERSION: u32 = 2;
const HEADER_BYTES: usize = 88;
/// Where the checksum lies in the header.
const CHECKSUM: Range<usize> = 56..88;
/// Records gathered before they are written.
const BUFFER_BYTES: usize = 1 << 20;
/// Bytes between two calls that tell the progress of a check.
const CHECKED_BYTES: usize = 16 << 20;

/// What a file of tokens was made from; see [`super::packer::Packer::key`].
pub(crate) type Key = blake3::Hash;

/// The width of an id in a file: the narrowest that holds the vocabulary.
fn id_bytes(vocab_size: usize) -> usize {
    if vocab_size <= 1 << 16 { 2 } else { 4 }
}

/// Appends tokens to a file.
pub(crate) struct TokenWriter<W> {
    out: W,
    /// For messages.
    path: PathBuf,
    key: Key,
    id_bytes: usize,
    tokens: u64,
    buffer: Vec<u8>,
    hasher: blake3::Hasher,
}

impl<W: Write + Seek> TokenWriter<W> {
    /// A writer to `out`, which is empty and called `path`, for ids below `vocab_size`.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be written to.
    pub(crate) fn new(out: W, path: PathBuf, key: Key, vocab_size: usize) -> Result<Self> {
        let (buffer, hasher) = (Vec::with_capacity(BUFFER_BYTES), blake3::Hasher::new());
        let mut writer = Self { out, path, key, id_bytes: id_bytes(vocab_size), tokens: 0, buffer, hasher };
        // No header until the end: a file that was not finished has none.
        writer.out.write_all(&[0; HEADER_BYTES]).map_err(|e| Error::io(&writer.path, e))?;
        Ok(writer)
    }

    /// Appends a token. `id` is below the vocabulary size the writer was made for, so the narrowing loses nothing.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written to.
    pub(crate) fn push(&mut self, id: u32, text_bytes: u16) -> Result<()> {
        debug_assert!(self.id_bytes == 4 || id <= u32::from(u16::MAX));
        self.buffer.extend_from_slice(&id.to_le_bytes()[..self.id_bytes]);
        self.buffer.extend_from_slice(&text_bytes.to_le_bytes());
        self.tokens += 1;
        if self.buffer.len() + 6 > BUFFER_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        self.hasher.update(&self.buffer);
        self.out.write_all(&self.buffer).map_err(|e| Error::io(&self.path, e))?;
        self.buffer.clear();
        Ok(())
    }

    /// Writes what is left, and the header.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written to.
    pub(crate) fn finish(mut self) -> Result<W> {
        self.flush()?;
        let mut header = Vec::with_capacity(HEADER_BYTES);
        header.extend_from_slice(&MAGIC);
        header.extend_from_slice(&VERSION.to_le_bytes());
        header.extend_from_slice(&(self.id_bytes as u32).to_le_bytes());
        header.extend_from_slice(&self.tokens.to_le_bytes());
        header.extend_from_slice(self.key.as_bytes());
        header.extend_from_slice(self.hasher.update(&header).finalize().as_bytes());
        debug_assert_eq!(header.len(), HEADER_BYTES);
        let written = self.out.seek(SeekFrom::Start(0)).and_then(|_| self.out.write_all(&header));
        written.and_then(|()| self.out.flush()).map_err(|e| Error::io(&self.path, e))?;
        Ok(self.out)
    }
}

/// The tokens of a whole, checked file. Nothing of it is held but what the system keeps of a mapped file.
#[derive(Debug)]
pub(crate) struct TokenFile {
    bytes: Bytes,
    id_bytes: usize,
    tokens: usize,
}

impl TokenFile {
    /// Checks that `bytes` are a whole file made from `key`, reading all of them once; tells `progress` the bytes read and
    /// the bytes in all.
    ///
    /// # Errors
    /// What is wrong with it, for a message.
    pub(crate) fn check(
        bytes: Bytes,
        key: &Key,
        progress: &mut dyn FnMut(u64, u64),
    ) -> std::result::Result<Self, &'static str> {
        let all = bytes.as_ref();
        let (header, records) = all.split_at_checked(HEADER_BYTES).ok_or("is shorter than its header")?;
        if header[..8] != MAGIC || header[8..12] != VERSION.to_le_bytes() {
            return Err("is not a file of tokens of this version");
        }
        let id_bytes = match u32::from_le_bytes([header[12], header[13], header[14], header[15]]) {
            2 => 2,
            4 => 4,
            _ => return Err("has ids of an unknown width"),
        };
        let tokens = records.len() / (id_bytes + 2);
        if header[16..24] != (tokens as u64).to_le_bytes() || records.len() % (id_bytes + 2) != 0 {
            return Err("does not have the length that its header says");
        }
        if header[24..CHECKSUM.start] != *key.as_bytes() {
            return Err("was made from another text or with another tokenizer");
        }
        let (mut hasher, mut done) = (blake3::Hasher::new(), 0);
        for part in records.chunks(CHECKED_BYTES) {
            hasher.update(part);
            done += part.len() as u64;
            progress(done, records.len() as u64);
        }
        if hasher.update(&header[..CHECKSUM.start]).finalize().as_bytes()[..] != header[CHECKSUM] {
            return Err("does not match its checksum");
        }
        Ok(Self { bytes, id_bytes, tokens })
    }

    /// Tokens in the file.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// The ids of `range`.
    pub(crate) fn ids(&self, range: Range<usize>) -> impl Iterator<Item = u32> {
        let wide = self.id_bytes == 4;
        self.records(range).map(move |record| {
            let high = if wide { [record[2], record[3]] } else { [0; 2] };
            u32::from_le_bytes([record[0], record[1], high[0], high[1]])
        })
    }

    /// Bytes of text each token of `range` stands for.
    pub(crate) fn text_bytes(&self, range: Range<usize>) -> impl Iterator<Item = u16> {
        let at = self.id_bytes;
        self.records(range).map(move |record| u16::from_le_bytes([record[at], record[at + 1]]))
    }

    fn records(&self, range: Range<usize>) -> std::slice::ChunksExact<'_, u8> {
        let width = self.id_bytes + 2;
        let records = &self.bytes.as_ref()[HEADER_BYTES..];
        records[range.start * width..range.end * width].chunks_exact(width)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn key(of: &str) -> Key {
        blake3::hash(of.as_bytes())
    }

    fn written(tokens: &[(u32, u16)], vocab_size: usize) -> Vec<u8> {
        let mut writer = TokenWriter::new(Cursor::new(Vec::new()), "t".into(), key("a"), vocab_size).unwrap();
        tokens.iter().for_each(|&(id, bytes)| writer.push(id, bytes).unwrap());
        writer.finish().unwrap().into_inner()
    }

    fn check(bytes: Vec<u8>) -> std::result::Result<TokenFile, &'static str> {
        TokenFile::check(Bytes::Held(bytes.into()), &key("a"), &mut |_, _| ())
    }

    #[test]
    fn tokens_come_back_in_either_width() {
        for (vocab_size, width) in [(1 << 16, 4), ((1 << 16) + 1, 6)] {
            // More than the writer's buffer and more than a step of the check hold.
            let tokens: Vec<(u32, u16)> =
                (0..3_000_000u32).map(|i| (i.wrapping_mul(40_503) % vocab_size as u32, (i % 65_536) as u16)).collect();
            let bytes = written(&tokens, vocab_size);
            assert_eq!(bytes.len(), HEADER_BYTES + width * tokens.len());
            let file = check(bytes).unwrap();
            assert_eq!(file.tokens(), tokens.len());
            assert!(file.ids(0..tokens.len()).eq(tokens.iter().map(|t| t.0)));
            assert!(file.text_bytes(5..77).eq(tokens[5..77].iter().map(|t| t.1)));
        }
        assert_eq!(check(written(&[], 10)).unwrap().tokens(), 0);
    }

    #[test]
    fn any_change_is_noticed() {
        let whole = written(&[(1, 2), (3, 4), (5, 6)], 10);
        check(whole.clone()).unwrap();
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1 << (at % 8);
            assert!(check(flipped).is_err(), "byte {at}");
            assert!(check(whole[..at].to_vec()).is_err(), "cut at {at}");
        }
        assert!(check([whole.clone(), vec![0; 4]].concat()).is_err());
        let other = TokenFile::check(Bytes::Held(whole.into()), &key("b"), &mut |_, _| ());
        assert!(other.unwrap_err().contains("another text"));
    }

    #[test]
    fn a_file_that_was_not_finished_is_none() {
        let mut writer = TokenWriter::new(Cursor::new(Vec::new()), "t".into(), key("a"), 10).unwrap();
        writer.push(1, 1).unwrap();
        writer.flush().unwrap();
        assert!(check(writer.out.into_inner()).is_err());
    }
}
