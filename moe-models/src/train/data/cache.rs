//! [`DataCache`]: where tokenised sources are kept. Each is a file of its own, named after all that its tokens depend on, so
//! none is ever out of date; a file that is damaged is made anew.

use super::packed::PackedSource;
use super::packer::Packer;
use super::text_source::TextSource;
use super::token_file::{Key, TokenFile};
use crate::hf::Bytes;
use crate::train::files::{TEMPORARY_PREFIX, create_dir, rename};
use crate::train::observer::{Event, Observer, Progress};
use crate::{Error, Result};
use std::fs::File;
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
        remove_abandoned(self.dir)?;
        let unfinished = Unfinished::create(self.dir, &self.key)?;
        let (read, mut progress) = (AtomicU64::new(0), Progress::new(observer));
        let mut writer = packer.writer(&unfinished.file, &unfinished.path, self.key)?;
        packer.append(source.pieces(&read), &mut writer, &mut || {
            progress.report(read.load(Ordering::Relaxed), source.stored_bytes());
        })?;
        writer.finish()?;
        // Not flushed to the disk: after a crash of the system the checksum tells whether it got there.
        rename(&unfinished.path, &self.path())
    }
}

/// A file under a name of its own, which is gone when this is dropped, unless the file has been renamed. Locked, so that
/// others can tell it from one whose process was killed.
struct Unfinished {
    path: PathBuf,
    file: File,
}

impl Unfinished {
    fn create(dir: &Path, key: &Key) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        loop {
            let (process, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
            let path = dir.join(format!("{TEMPORARY_PREFIX}{process}-{count}-{key}{ENDING}"));
            let file = match File::create_new(&path) {
                Ok(file) => file,
                // Of an earlier process with the same id, or of one in another container.
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(Error::io(path, e)),
            };
            // Where files cannot be locked, nobody takes this one for abandoned either.
            let _ = file.lock();
            // Between the two lines above another process may have.
            if path.try_exists().map_err(|e| Error::io(&path, e))? {
                return Ok(Self { path, file });
            }
        }
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Not there after a success; a leftover is removed by the next one who builds.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Deletes what processes that were killed have left unfinished in `dir`.
fn remove_abandoned(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let path = entry.map_err(|e| Error::io(dir, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(TEMPORARY_PREFIX) && name.ends_with(ENDING) {
            // One that is gone, locked or not ours to open is none of our business. The lock is held until the file is gone:
            // whoever has just created it waits for the lock, and then sees that it is.
            if let Ok(file) = File::open(&path)
                && file.try_lock().is_ok()
            {
                let _ = std::fs::remove_file(&path);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "cache_tests.rs"]
mod tests;
