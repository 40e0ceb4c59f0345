//! The bytes of a file, mapped: pages come from disk when they are read, and are shared with every process that maps them.
#![allow(unsafe_code)] // A map is the one thing here that the compiler cannot check.

use crate::{Error, Result};
use memmap2::{Advice, UncheckedAdvice};
use std::borrow::Cow;
use std::fs::File;
use std::path::Path;

/// Bytes of a page, or a multiple of them.
const PAGE: usize = 4096;

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

    /// Lets the pages that lie inside of `part`, a part of these bytes, be taken from this process. They come back from the
    /// file when they are read again.
    pub(crate) fn let_go(&self, part: &[u8]) {
        let Self::Mapped(map) = self else { return };
        let first = part.as_ptr().addr() - map.as_ptr().addr();
        let pages = first.next_multiple_of(PAGE)..(first + part.len()) / PAGE * PAGE;
        if pages.is_empty() {
            return;
        }
        // SAFETY: the map is of a file, read only and never written through: pages that are dropped have nothing to lose, and
        // hold the same when they are read again.
        let advised = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, pages.start, pages.len()) };
        // Advice that is not taken costs memory, nothing else.
        let _ = advised;
    }

    /// Lets `part`, a part of these bytes, be read from disk while other work is done.
    pub(crate) fn will_need(&self, part: &[u8]) {
        if let Self::Mapped(map) = self {
            // Advice that is not taken costs time, nothing else.
            let _ = map.advise_range(Advice::WillNeed, part.as_ptr().addr() - map.as_ptr().addr(), part.len());
        }
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
