//! Small file habits shared by the trainer: checksums, and writes that are whole or absent.

use crate::{Error, Result};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

const CRC32C_TABLE: [u32; 256] = crc32c_table();

const fn crc32c_table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut value = i as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 1 { value >> 1 ^ 0x82f6_3b78 } else { value >> 1 };
            bit += 1;
        }
        table[i] = value;
        i += 1;
    }
    table
}

/// CRC32C (Castagnoli) of `bytes`.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &b| crc >> 8 ^ CRC32C_TABLE[((crc ^ u32::from(b)) & 0xff) as usize])
}

/// Creates `dir` and its parents.
pub(crate) fn create_dir(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))
}

/// Flushes a file or a folder's entries to the disk.
pub(crate) fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|f| f.sync_all()).map_err(|e| Error::io(path, e))
}

/// Writes `bytes` to a new file at `path` and flushes it to the disk.
pub(crate) fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    File::create(path)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .map_err(|e| Error::io(path, e))
}

/// Replaces the file at `path`: readers see the old content or the new, never a part.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = temporary_sibling(path);
    let written = write_synced(&temporary, bytes)
        .and_then(|()| std::fs::rename(&temporary, path).map_err(|e| Error::io(path, e)));
    if written.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

/// Prefix of every unfinished file and folder; whatever carries it may be deleted.
pub(crate) const TEMPORARY_PREFIX: &str = ".tmp-";

/// `.tmp-NAME` beside `path`.
pub(crate) fn temporary_sibling(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{TEMPORARY_PREFIX}{name}"))
}

/// Fills a folder under a temporary name by `fill`, flushes it, and gives it its final name. On any error nothing is
/// left under either name. An existing folder at `dir` is an error.
pub(crate) fn create_dir_atomically(dir: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if dir.exists() {
        return Err(Error::io(dir, std::io::Error::from(std::io::ErrorKind::AlreadyExists)));
    }
    let temporary = temporary_sibling(dir);
    if temporary.exists() {
        std::fs::remove_dir_all(&temporary).map_err(|e| Error::io(&temporary, e))?;
    }
    let made = create_dir(&temporary)
        .and_then(|()| fill(&temporary))
        .and_then(|()| sync_tree(&temporary))
        .and_then(|()| std::fs::rename(&temporary, dir).map_err(|e| Error::io(dir, e)));
    if made.is_err() {
        let _ = std::fs::remove_dir_all(&temporary);
        return made;
    }
    match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync(parent),
        _ => Ok(()),
    }
}

fn sync_tree(dir: &Path) -> Result<()> {
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        sync(&entry.map_err(|e| Error::io(dir, e))?.path())?;
    }
    sync(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_known_answers() {
        // RFC 3720 B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn a_failed_folder_leaves_nothing() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("out");
        let failed = create_dir_atomically(&dir, |d| {
            write_synced(&d.join("half"), b"x")?;
            Err(Error::Config("stop".into()))
        });
        assert!(failed.is_err());
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
        create_dir_atomically(&dir, |d| write_synced(&d.join("whole"), b"x")).unwrap();
        assert!(dir.join("whole").exists());
        assert!(create_dir_atomically(&dir, |_| Ok(())).is_err(), "an existing folder is not replaced");
    }
}
