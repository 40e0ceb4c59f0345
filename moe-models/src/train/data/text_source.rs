//! A source's bytes, identified by their hash and read as a stream of characters, as often as needed. Never holds a file
//! whole; knows nothing of documents.

use super::source::{Origin, SourceSpec};
use crate::{Error, Result};
use lzma_rust2::XzReader;
use std::borrow::Cow;
use std::fs::File;
use std::io::{BufReader, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes read at once.
const CHUNK_BYTES: usize = 64 << 10;

/// One source of text, found readable, with the hash of its content.
#[derive(Debug)]
pub struct TextSource {
    /// The source's name.
    pub name: String,
    /// The user's weight, if any.
    pub weight: Option<f64>,
    path: PathBuf,
    /// `None`: the bytes come from the file at `path` whenever they are read.
    held: Option<Cow<'static, [u8]>>,
    stored_bytes: u64,
    hash: blake3::Hash,
}

/// What the endings of a file's name say about its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TextFormat {
    /// One JSON object per line; otherwise text with separators.
    pub(crate) jsonl: bool,
    pub(crate) xz: bool,
}

impl TextSource {
    /// Reads `source` once, for its hash, telling `progress` the bytes read and the bytes in all from time to time.
    ///
    /// What is no plain file, such as a pipe, can be read only once and is held in memory.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read.
    pub fn open(source: &SourceSpec, progress: &mut dyn FnMut(u64, u64)) -> Result<Self> {
        let path = source.path();
        let io = |e| Error::io(&path, e);
        let held = match &source.origin {
            Origin::Embedded { bytes, .. } => Some(Cow::Borrowed(*bytes)),
            Origin::File(file) if std::fs::metadata(file).map_err(io)?.is_file() => None,
            Origin::File(file) => Some(Cow::Owned(std::fs::read(file).map_err(io)?)),
        };
        let total = match &held {
            Some(bytes) => bytes.len() as u64,
            None => std::fs::metadata(&path).map_err(io)?.len(),
        };
        let (name, weight) = (source.name.clone(), source.weight);
        let mut opened = Self { name, weight, path, held, stored_bytes: 0, hash: blake3::Hash::from([0; 32]) };
        (opened.stored_bytes, opened.hash) = opened.hash_content(total, progress)?;
        Ok(opened)
    }

    fn hash_content(&self, total: u64, progress: &mut dyn FnMut(u64, u64)) -> Result<(u64, blake3::Hash)> {
        let read = AtomicU64::new(0);
        let mut content = self.content(&read)?;
        let mut buffer = vec![0; 1 << 20];
        while content.read(&mut buffer).map_err(|e| Error::io(&self.path, e))? > 0 {
            progress(read.load(Ordering::Relaxed), total);
        }
        Ok((read.load(Ordering::Relaxed), content.hasher.finalize()))
    }

    /// The path, or the embedded name, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes as they are stored: compressed ones, if the file is compressed.
    pub fn stored_bytes(&self) -> u64 {
        self.stored_bytes
    }

    /// Hash of the bytes as they are stored.
    pub(crate) fn hash(&self) -> &blake3::Hash {
        &self.hash
    }

    pub(crate) fn format(&self) -> TextFormat {
        let name = self.path.to_string_lossy().to_ascii_lowercase();
        let plain = name.strip_suffix(".xz");
        TextFormat { jsonl: plain.unwrap_or(&name).ends_with(".jsonl"), xz: plain.is_some() }
    }

    /// The text from its beginning. Adds to `read` the stored bytes that have been read.
    pub(crate) fn characters<'a>(&'a self, read: &'a AtomicU64) -> Result<Characters<'a>> {
        let content = self.content(read)?;
        let stream = if self.format().xz {
            // As the `xz` program does, a file of several streams is read to its end.
            Stream::Xz(Box::new(XzReader::new(BufReader::with_capacity(CHUNK_BYTES, content), true)))
        } else {
            Stream::Plain(Box::new(content))
        };
        Ok(Characters { source: self, stream, buffer: vec![0; CHUNK_BYTES], filled: 0, given: 0, offset: 0 })
    }

    fn content<'a>(&'a self, read: &'a AtomicU64) -> Result<Content<'a>> {
        let bytes: Box<dyn Read + Send + 'a> = match &self.held {
            Some(bytes) => Box::new(bytes.as_ref()),
            None => Box::new(File::open(&self.path).map_err(|e| Error::io(&self.path, e))?),
        };
        Ok(Content { bytes, read, hasher: blake3::Hasher::new() })
    }
}

/// Counts and hashes the stored bytes that pass.
struct Content<'a> {
    bytes: Box<dyn Read + Send + 'a>,
    read: &'a AtomicU64,
    hasher: blake3::Hasher,
}

impl Read for Content<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.bytes.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        self.read.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

enum Stream<'a> {
    Plain(Box<Content<'a>>),
    Xz(Box<XzReader<BufReader<Content<'a>>>>),
}

/// The text of a source in chunks of whole characters.
pub(crate) struct Characters<'a> {
    source: &'a TextSource,
    stream: Stream<'a>,
    buffer: Vec<u8>,
    /// Bytes in `buffer`.
    filled: usize,
    /// Bytes of `buffer` that the last chunk consisted of; the rest is the beginning of a character.
    given: usize,
    /// Bytes of text before `buffer`.
    offset: u64,
}

impl Characters<'_> {
    /// The next characters; none at the end.
    ///
    /// # Errors
    /// [`Error::Io`] if the source cannot be read; [`Error::Format`] for broken xz data, or for bytes that are not UTF-8
    /// with their offset in the text.
    pub(crate) fn next_chunk(&mut self) -> Result<&str> {
        self.buffer.copy_within(self.given..self.filled, 0);
        self.offset += self.given as u64;
        self.filled -= self.given;
        self.given = 0;
        while self.given == 0 {
            let count = self.fill()?;
            match std::str::from_utf8(&self.buffer[..self.filled]) {
                Ok(_) => self.given = self.filled,
                Err(e) if e.error_len().is_none() && count > 0 => self.given = e.valid_up_to(),
                Err(e) => return Err(self.not_utf8(e)),
            }
            if count == 0 {
                break;
            }
        }
        std::str::from_utf8(&self.buffer[..self.given]).map_err(|e| self.not_utf8(e))
    }

    fn fill(&mut self) -> Result<usize> {
        let path = &self.source.path;
        loop {
            let room = &mut self.buffer[self.filled..];
            let count = match &mut self.stream {
                Stream::Plain(content) => content.read(room),
                Stream::Xz(xz) => xz.read(room),
            };
            match (count, &self.stream) {
                (Ok(count), _) => {
                    self.filled += count;
                    return Ok(count);
                }
                (Err(e), _) if e.kind() == ErrorKind::Interrupted => {}
                (Err(e), Stream::Plain(_)) => return Err(Error::io(path, e)),
                (Err(e), Stream::Xz(_)) => return Err(Error::format(path, format!("not a whole xz file: {e}"))),
            }
        }
    }

    fn not_utf8(&self, error: std::str::Utf8Error) -> Error {
        let offset = self.offset + error.valid_up_to() as u64;
        Error::format(&self.source.path, format!("not UTF-8 text: the first bad byte is at offset {offset}"))
    }

    /// Called at the end, checks that the bytes read were those of the source's hash.
    ///
    /// # Errors
    /// [`Error::Format`] if the file was changed meanwhile: what was read may be half of one content and half of another.
    pub(crate) fn finish(self) -> Result<()> {
        let content = match self.stream {
            Stream::Plain(content) => *content,
            Stream::Xz(xz) => xz.into_inner().into_inner(),
        };
        if content.hasher.finalize() != self.source.hash {
            let reason = "the file was changed while it was read; start again when it is complete";
            return Err(Error::format(&self.source.path, reason));
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "text_source_tests.rs"]
pub(super) mod tests;
