//! [`RunLock`]: one process at a time in a run's folder. Protects from accidents, not from programs that do not ask.

use super::files::{create_dir, remove};
use crate::{Error, Result};
use std::fs::{File, Metadata, TryLockError};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

const LOCK_FILE: &str = "run.lock";

/// The right to write to a run's folder, until it is dropped or the process ends, however it ends.
///
/// The system's lock on a file of the folder, so there is none left over from a process that was killed. The file stays and
/// holds the process id of the last holder: removing it would let two processes lock two files of one name.
#[derive(Debug)]
pub struct RunLock {
    dir: PathBuf,
    file: File,
}

impl RunLock {
    /// Locks the folder `dir`, which is created if absent.
    ///
    /// # Errors
    /// [`Error::InUse`] naming the process that holds the lock; [`Error::Io`] if the folder cannot be written to.
    pub fn acquire(dir: &Path) -> Result<Self> {
        create_dir(dir)?;
        let path = dir.join(LOCK_FILE);
        let io = |e| Error::io(&path, e);
        let mut file = File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(in_use(dir, &mut file)),
            Err(TryLockError::Error(e)) => return Err(io(e)),
        }
        file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(io)?;
        Ok(Self { dir: dir.to_owned(), file })
    }

    /// As [`RunLock::acquire`], also from a process that holds the lock and was given up: one that answers no more, say. Should it
    /// wake up, it finds that it has lost the folder ([`RunLock::check`]).
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn take_over(dir: &Path) -> Result<Self> {
        match Self::acquire(dir) {
            Err(Error::InUse { .. }) => {}
            done => return done,
        }
        // The other's lock is on the file, not on its name.
        remove(&dir.join(LOCK_FILE))?;
        Self::acquire(dir)
    }

    /// Refuses to go on where another process has taken the folder over.
    ///
    /// # Errors
    /// [`Error::InUse`] naming that process; [`Error::Io`].
    pub fn check(&self) -> Result<()> {
        let path = self.dir.join(LOCK_FILE);
        let same = |there: &Metadata, ours: &Metadata| (there.dev(), there.ino()) == (ours.dev(), ours.ino());
        let ours = self.file.metadata().map_err(|e| Error::io(&path, e))?;
        match std::fs::metadata(&path) {
            Ok(there) if same(&there, &ours) => Ok(()),
            Ok(_) => Err(in_use(&self.dir, &mut File::open(&path).map_err(|e| Error::io(&path, e))?)),
            Err(e) => Err(Error::io(&path, e)),
        }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

fn in_use(dir: &Path, file: &mut File) -> Error {
    let mut text = String::new();
    let holder = file.read_to_string(&mut text).ok().and_then(|_| text.trim().parse().ok());
    Error::InUse { dir: dir.to_owned(), holder }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_locked_once_at_a_time() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("run");
        let lock = RunLock::acquire(&dir).unwrap();
        assert_eq!(lock.dir(), dir);
        let (error, id) = (RunLock::acquire(&dir).unwrap_err(), std::process::id());
        assert!(
            matches!(&error, Error::InUse { dir: used, holder } if *used == dir && *holder == Some(id)),
            "{error:?}"
        );
        let want = format!(
            "{} is in use by process {id}; wait for that run, end it (kill {id}), or choose another folder",
            dir.display()
        );
        assert_eq!(error.to_string(), want);
        RunLock::acquire(&root.path().join("other")).unwrap();
        drop(lock);
        RunLock::acquire(&dir).unwrap();
    }

    #[test]
    fn the_id_of_an_earlier_holder_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(LOCK_FILE), "4294967295 and more").unwrap();
        let _lock = RunLock::acquire(dir.path()).unwrap();
        let text = std::fs::read_to_string(dir.path().join(LOCK_FILE)).unwrap();
        assert_eq!(text, format!("{}\n", std::process::id()));
    }

    /// What was taken over is not written to by whoever had it before.
    #[test]
    fn a_folder_that_was_taken_over_is_lost_to_its_holder() {
        let dir = tempfile::tempdir().unwrap();
        let stuck = RunLock::acquire(dir.path()).unwrap();
        stuck.check().unwrap();
        let next = RunLock::take_over(dir.path()).unwrap();
        next.check().unwrap();
        let message = stuck.check().unwrap_err().to_string();
        assert!(message.contains("in use") && message.contains(&std::process::id().to_string()), "{message}");
        drop(stuck);
        assert!(matches!(RunLock::acquire(dir.path()), Err(Error::InUse { .. })), "the new lock holds");
        drop(next);
        RunLock::take_over(dir.path()).unwrap().check().unwrap();
    }
}
