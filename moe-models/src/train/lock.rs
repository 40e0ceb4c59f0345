//! [`RunLock`]: one process at a time in a run's folder. Protects from accidents, not from programs that do not ask.

use super::files::create_dir;
use crate::{Error, Result};
use std::fs::{File, TryLockError};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

const LOCK_FILE: &str = "run.lock";

/// The right to write to a run's folder, until it is dropped or the process ends, however it ends.
///
/// The system's lock on a file of the folder, so there is none left over from a process that was killed. The file stays and
/// holds the process id of the last holder: removing it would let two processes lock two files of one name.
#[derive(Debug)]
pub struct RunLock {
    dir: PathBuf,
    _file: File,
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
        Ok(Self { dir: dir.to_owned(), _file: file })
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
}
