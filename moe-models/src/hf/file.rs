//! Writing files so that a reader never sees half of one.

use crate::{Error, Result};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Prefix of every unfinished file and folder, after which the names of those that are made here go on in their own ways: others'
/// that begin alike are left alone.
pub(crate) const TEMPORARY_PREFIX: &str = ".tmp-";

/// Writes `path` whole: into a temporary file beside it, synced, then renamed over it. A crash can leave the temporary
/// file, whose name begins with `.tmp-`, as that of every unfinished file and folder here. Of several who write the same file at the
/// same time each has its own, and one of them stays.
///
/// # Errors
/// [`Error::Io`] naming the file; the old content is then still there and the temporary file is gone.
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    try_write_atomically(path, |out| write(out).map_err(|e| Error::io(path, e)))
}

/// [`write_atomically`] by a function that has other errors too.
pub(crate) fn try_write_atomically(path: &Path, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let failed = |e| Error::io(path, e);
    let unfinished = Unfinished::beside(path).map_err(failed)?;
    let mut out = BufWriter::new(&unfinished.file);
    write(&mut out)?;
    out.into_inner().map_err(|e| failed(e.into_error()))?.sync_all().map_err(failed)?;
    unfinished.rename(path).map_err(failed)
}

/// A file under a name of its own, which is gone when this is dropped, unless the file has been renamed. Locked, so that
/// others can tell it from one whose process was killed.
#[derive(Debug)]
pub(crate) struct Unfinished {
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    is_renamed: bool,
}

impl Unfinished {
    /// A new and empty file in the folder of `path`, whose name ends like its.
    pub(crate) fn beside(path: &Path) -> std::io::Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        loop {
            let (process, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
            let mut name = std::ffi::OsString::from(format!("{TEMPORARY_PREFIX}{process}-{count}-"));
            name.push(path.file_name().unwrap_or_default());
            let path = path.with_file_name(name);
            let file = match File::create_new(&path) {
                Ok(file) => file,
                // Of an earlier process with the same id, or of one in another container.
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(e),
            };
            // Where files cannot be locked, nobody takes this one for abandoned either.
            let _ = file.lock();
            // Between the two lines above another process may have.
            if path.try_exists()? {
                return Ok(Self { path, file, is_renamed: false });
            }
        }
    }

    /// Gives the file the name `to`, in place of a file that has it.
    pub(crate) fn rename(mut self, to: &Path) -> std::io::Result<()> {
        std::fs::rename(&self.path, to)?;
        // From here on the old name may be another's.
        self.is_renamed = true;
        Ok(())
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.is_renamed {
            // What was to be written has failed; a leftover that cannot be removed either is not worth a second error.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Deletes what processes that were killed have left unfinished in `dir`, of files whose names end with `ending`.
pub(crate) fn remove_abandoned(dir: &Path, ending: &str) -> Result<()> {
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let path = entry.map_err(|e| Error::io(dir, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(TEMPORARY_PREFIX) && name.ends_with(ending) {
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

/// Copies a file, if it is there.
///
/// # Errors
/// [`Error::Io`] naming the file.
pub(crate) fn copy_if_there(from: &Path, to: &Path) -> Result<()> {
    match std::fs::copy(from, to) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(from, e)),
        _ => Ok(()),
    }
}

/// Whether `name` is that of a file in a folder, and leads nowhere else.
pub(crate) fn is_plain_name(name: &str) -> bool {
    Path::new(name).file_name().is_some_and(|file| file == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two containers with one folder, in each of which the writer is process 1, have the same names in the same order.
    #[test]
    fn writers_of_one_file_never_share_their_unfinished_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.packed");
        let first = Unfinished::beside(&path).unwrap();
        let process = std::process::id();
        let count: u64 = {
            let name = first.path.file_name().unwrap().to_str().unwrap();
            name.strip_prefix(&format!(".tmp-{process}-")).unwrap().split('-').next().unwrap().parse().unwrap()
        };
        // Those that this process would take next are there already.
        let taken = |n: u64| dir.path().join(format!(".tmp-{process}-{n}-a.packed"));
        (count + 1..count + 200).for_each(|n| std::fs::write(taken(n), "another's").unwrap());
        write_atomically(&path, |out| out.write_all(b"whole")).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"whole");
        assert!(first.path.exists() && std::fs::read(&first.path).unwrap().is_empty());
        (count + 1..count + 200).for_each(|n| assert_eq!(std::fs::read(taken(n)).unwrap(), b"another's"));

        // What nobody writes to any more goes, what somebody does stays.
        remove_abandoned(dir.path(), ".packed").unwrap();
        let mut left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        left.sort();
        assert_eq!(left, [first.path.clone(), path]);
    }

    #[test]
    fn an_error_leaves_the_old_content_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        std::fs::write(&path, "old").unwrap();
        let failed =
            write_atomically(&path, |out| out.write_all(b"half").and(Err(std::io::ErrorKind::StorageFull.into())));
        assert!(failed.unwrap_err().to_string().contains("a.json"));
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
