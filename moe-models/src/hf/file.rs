//! Writing files so that a reader never sees half of one.

use crate::{Error, Result};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Writes `path` whole: into a temporary file beside it, synced, then renamed over it. A crash can leave the temporary
/// file, whose name begins with `.tmp-`, as that of every unfinished file and folder here.
///
/// # Errors
/// [`Error::Io`] naming the file; the old content is then still there and the temporary file is gone.
pub fn write_atomically(path: &Path, write: impl FnOnce(&mut dyn Write) -> std::io::Result<()>) -> Result<()> {
    try_write_atomically(path, |out| write(out).map_err(|e| Error::io(path, e)))
}

/// [`write_atomically`] by a function that has other errors too.
pub(crate) fn try_write_atomically(path: &Path, write: impl FnOnce(&mut dyn Write) -> Result<()>) -> Result<()> {
    let mut name = std::ffi::OsString::from(format!(".tmp-{}-", std::process::id()));
    name.push(path.file_name().unwrap_or_default());
    let temporary = path.with_file_name(name);
    let failed = |e| Error::io(path, e);
    let result = (|| {
        let mut out = BufWriter::new(File::create(&temporary).map_err(failed)?);
        write(&mut out)?;
        out.into_inner().map_err(|e| failed(e.into_error()))?.sync_all().map_err(failed)?;
        std::fs::rename(&temporary, path).map_err(failed)
    })();
    result.inspect_err(|_| {
        // The write failed; a leftover that cannot be removed either is not worth a second error.
        let _ = std::fs::remove_file(&temporary);
    })
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
