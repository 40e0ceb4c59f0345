//! [`DataCache`]: where tokenised sources are kept. Each is a file of its own, named after all that its tokens depend on, so
//! none is ever out of date; a file that is damaged is made anew.

use super::packed::PackedSource;
use super::packer::Packer;
use super::text_source::TextSource;
use super::token_file::{Key, TokenFile};
use crate::hf::{Bytes, Unfinished, remove_abandoned};
use crate::train::files::create_dir;
use crate::train::observer::{Event, Observer, Progress};
use crate::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

const ENDING: &str = ".tokens";

/// Where tokenised sources are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataCache {
    /// In files of this folder, which are mapped when they are read; the next run finds them again. The folder may be
    /// shared by runs side by side, and any file in it may be deleted while no run uses it.
    Folder(PathBuf),
    /// In memory.
    Memory,
}

impl DataCache {
    /// The tokens of `source`: those that are kept, or else new ones.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be read or written to; as [`Packer::pack`]; as reading `source`.
    pub(crate) fn pack(
        &self,
        packer: &Packer,
        source: &TextSource,
        observer: &mut dyn Observer,
    ) -> Result<PackedSource> {
        let key = packer.key(source);
        let file = match self {
            Self::Folder(dir) => Folder { dir, key }.tokens(packer, source, observer)?,
            Self::Memory => {
                observer.event(&tokenising(source));
                let read = AtomicU64::new(0);
                let mut progress = Progress::new(observer);
                packer.pack_in_memory(source.path(), key, source.pieces(&read), &mut || {
                    progress.report(read.load(Ordering::Relaxed), source.stored_bytes());
                })?
            }
        };
        Ok(PackedSource::new(source.name.clone(), source.weight, file))
    }
}

fn tokenising(source: &TextSource) -> Event {
    Event::Preparing { what: format!("tokenising {}", source.name) }
}

/// One file of a folder, there or not.
struct Folder<'a> {
    dir: &'a Path,
    key: Key,
}

impl Folder<'_> {
    fn path(&self) -> PathBuf {
        self.dir.join(format!("{}{ENDING}", self.key))
    }

    fn tokens(&self, packer: &Packer, source: &TextSource, observer: &mut dyn Observer) -> Result<TokenFile> {
        if self.path().try_exists().map_err(|e| Error::io(self.path(), e))? {
            observer.event(&Event::Preparing { what: format!("checking the cached tokens of {}", source.name) });
            match self.open(observer) {
                Err(Error::Format { path, reason }) => {
                    let what = format!("tokenising {} again: {} {reason}", source.name, path.display());
                    observer.event(&Event::Preparing { what });
                }
                whole => return whole,
            }
        } else {
            observer.event(&tokenising(source));
        }
        self.build(packer, source, observer)?;
        // What was written is checked as what is found: one way in, and a disk that loses data is noticed at once.
        self.open(observer)
    }

    /// # Errors
    /// [`Error::Format`] if the file is there and not whole.
    fn open(&self, observer: &mut dyn Observer) -> Result<TokenFile> {
        let (path, mut progress) = (self.path(), Progress::new(observer));
        TokenFile::check(Bytes::map(&path)?, &self.key, &mut |done, total| progress.report(done, total))
            .map_err(|reason| Error::format(path, reason))
    }

    /// Tokenises `source` into the file. Another process that does the same meanwhile writes the same bytes under another
    /// temporary name, so either file may be the one that stays.
    fn build(&self, packer: &Packer, source: &TextSource, observer: &mut dyn Observer) -> Result<()> {
        create_dir(self.dir)?;
        remove_abandoned(self.dir, ENDING)?;
        let path = self.path();
        let unfinished = Unfinished::beside(&path).map_err(|e| Error::io(&path, e))?;
        let (read, mut progress) = (AtomicU64::new(0), Progress::new(observer));
        let mut writer = packer.writer(&unfinished.file, &unfinished.path, self.key)?;
        packer.append(source.pieces(&read), &mut writer, &mut || {
            progress.report(read.load(Ordering::Relaxed), source.stored_bytes());
        })?;
        writer.finish()?;
        // Not flushed to the disk: after a crash of the system the checksum tells whether it got there.
        unfinished.rename(&path).map_err(|e| Error::io(&path, e))
    }
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
