//! The bytes of a file, mapped: pages come from disk when they are read, and are shared with every process that maps them.
#![allow(unsafe_code)] // A map is the one thing here that the compiler cannot check.

use crate::{Error, Result};
use std::borrow::Cow;
use std::fs::File;
use std::path::Path;

/// Bytes of a file or of a program.
#[derive(Debug)]
pub(crate) enum Bytes {
    Mapped(memmap2::Mmap),
    Held(Cow<'static, [u8]>),
}

impl Bytes {
    /// Maps a file.
    pub(crate) fn map(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        // SAFETY: files of models and of tokens are written whole under another name and renamed, so that nothing this
        // workspace does changes a file that is mapped. Another program that truncates one ends this process with SIGBUS, as with every reader of
        // maps; values that change are plain numbers, checked nowhere and trusted nowhere.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        Ok(Self::Mapped(map))
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Held(bytes) => bytes,
        }
    }
}
