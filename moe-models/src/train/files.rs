//! Small file habits shared by the trainer: checksums, and folders that are whole or absent. Single files are replaced by
//! [`crate::hf::write_atomically`].

pub(crate) use crate::hf::TEMPORARY_PREFIX;
use crate::{Error, Result};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// Entry `[n][b]`: what the byte `b` adds to the checksum when `n` bytes follow it.
const CRC32C_TABLES: [[u32; 256]; 8] = crc32c_tables();

const fn crc32c_tables() -> [[u32; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut i = 0;
    while i < 256 {
        let mut value = i as u32;
        let mut bit = 0;
        while bit < 8 {
            value = if value & 1 == 1 { value >> 1 ^ 0x82f6_3b78 } else { value >> 1 };
            bit += 1;
        }
        tables[0][i] = value;
        i += 1;
    }
    let mut i = 256;
    while i < 8 * 256 {
        let before = tables[i / 256 - 1][i % 256];
        tables[i / 256][i % 256] = before >> 8 ^ tables[0][(before & 0xff) as usize];
        i += 1;
    }
    tables
}

/// CRC32C (Castagnoli) of bytes that come one stretch after the other.
///
/// # Source
/// Eight bytes at a time: Kounavis and Berry, "A Systematic Approach to Building High Performance Software-Based CRC
/// Generators" (2005).
#[derive(Debug, Clone)]
pub(crate) struct Crc32c(u32);

impl Default for Crc32c {
    fn default() -> Self {
        Self(!0)
    }
}

impl Crc32c {
    /// Goes on with `bytes`.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        let (eights, rest) = bytes.as_chunks::<8>();
        for eight in eights {
            let word = u64::from_le_bytes(*eight) ^ u64::from(self.0);
            let bytes = word.to_le_bytes().into_iter().zip(CRC32C_TABLES.iter().rev());
            self.0 = bytes.fold(0, |crc, (byte, table)| crc ^ table[usize::from(byte)]);
        }
        for &byte in rest {
            self.0 = self.0 >> 8 ^ CRC32C_TABLES[0][((self.0 ^ u32::from(byte)) & 0xff) as usize];
        }
    }

    /// The checksum.
    pub(crate) fn finish(&self) -> u32 {
        !self.0
    }
}

/// CRC32C of `bytes`.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    let mut crc = Crc32c::default();
    crc.update(bytes);
    crc.finish()
}

/// Size and CRC32C of a file, which is read as a stream.
pub(crate) fn checksum(path: &Path) -> Result<(u64, u32)> {
    let failed = |e| Error::io(path, e);
    let mut file = File::open(path).map_err(failed)?;
    let (mut buffer, mut bytes, mut crc) = (vec![0; 1 << 20], 0, Crc32c::default());
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok((bytes, crc.finish())),
            Ok(read) => {
                crc.update(&buffer[..read]);
                bytes += read as u64;
            }
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(failed(e)),
        }
    }
}

/// Creates `dir` and its parents.
pub(crate) fn create_dir(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))
}

/// Flushes a file or a folder's entries to the disk.
pub(crate) fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|f| f.sync_all()).map_err(|e| Error::io(path, e))
}

/// Removes a file, or a folder with all that is in it.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let removed = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    removed.map_err(|e| Error::io(path, e))
}

/// Gives `from` the name `to`.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).map_err(|e| Error::io(from, e))
}

/// Writes `bytes` to a new file at `path` and flushes it to the disk.
pub(crate) fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    File::create(path)
        .and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()))
        .map_err(|e| Error::io(path, e))
}

/// Prefix of a whole folder that was moved aside for another one (see [`commit_dir`]).
pub(crate) const REPLACED_PREFIX: &str = ".tmp-replaced-";
/// Prefix of what is being deleted: never whole, never wanted.
pub(crate) const REMOVED_PREFIX: &str = ".tmp-removed-";

/// `path` with `prefix` before its name.
pub(crate) fn sibling(prefix: &str, path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{prefix}{name}"))
}

/// Deletes the folder `dir`. Renamed first: an interrupted removal must not leave a folder that looks whole.
pub(crate) fn remove_dir_at_once(dir: &Path) -> Result<()> {
    let doomed = sibling(REMOVED_PREFIX, dir);
    rename(dir, &doomed)?;
    remove(&doomed)
}

/// Makes an empty folder under the temporary name of `dir`, which [`commit_dir`] gives its own name; what is there under it, of
/// an interrupted save, is removed. Until then [`abort_dir`] removes it again.
pub(crate) fn begin_dir(dir: &Path) -> Result<PathBuf> {
    let temporary = sibling(TEMPORARY_PREFIX, dir);
    if temporary.exists() {
        remove(&temporary)?;
    }
    create_dir(&temporary)?;
    Ok(temporary)
}

/// Flushes the folder under the temporary name of `dir` and gives it the name `dir`. A folder `dir` that exists stays in place until
/// the new one is on the disk, and is then removed. On an error the new one stays where it is.
///
/// Two renames change an old and a new one, and a crash between the two leaves no folder `dir`, but both under temporary names.
/// [`recover_swapped`] puts the old one back then.
pub(crate) fn commit_dir(dir: &Path) -> Result<()> {
    let (filled, aside) = (sibling(TEMPORARY_PREFIX, dir), sibling(REPLACED_PREFIX, dir));
    sync_tree(&filled)?;
    if !dir.exists() {
        rename(&filled, dir)?;
        return sync_parent(dir);
    }
    rename(dir, &aside)?;
    rename(&filled, dir).inspect_err(|_| _ = rename(&aside, dir))?;
    // On the disk before the old one goes.
    sync_parent(dir)?;
    remove_dir_at_once(&aside)
}

/// Removes the folder under the temporary name of `dir`, if it is there. Called where something else has failed, which is what
/// matters: one that cannot be removed is left, and never taken for whole.
pub(crate) fn abort_dir(dir: &Path) {
    let _ = std::fs::remove_dir_all(sibling(TEMPORARY_PREFIX, dir));
}

/// Fills a folder under a temporary name by `fill`, flushes it, and gives it the name `dir`, in place of a folder that has it. On any
/// error nothing is left of the new one.
pub(crate) fn replace_dir(dir: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let filled = begin_dir(dir).and_then(|temporary| fill(&temporary)).and_then(|()| commit_dir(dir));
    filled.inspect_err(|_| abort_dir(dir))
}

/// As [`replace_dir`]; but an existing folder at `dir` is an error.
pub(crate) fn create_dir_atomically(dir: &Path, fill: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if dir.exists() {
        return Err(Error::io(dir, std::io::Error::from(std::io::ErrorKind::AlreadyExists)));
    }
    replace_dir(dir, fill)
}

/// Deals with `aside`, which [`commit_dir`] moved out of the place `dir` before a crash: back to its place if there is no
/// whole folder, deleted otherwise. `is_whole` tells a whole folder.
pub(crate) fn recover_swapped(aside: &Path, dir: &Path, is_whole: impl Fn(&Path) -> bool) -> Result<()> {
    if is_whole(dir) || !is_whole(aside) {
        return remove_dir_at_once(aside);
    }
    if dir.exists() {
        remove_dir_at_once(dir)?;
    }
    rename(aside, dir)?;
    sync_parent(dir)
}

/// Flushes the entry of `path` in its folder.
fn sync_parent(path: &Path) -> Result<()> {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).map_or(Ok(()), sync)
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
    fn crc32c_is_the_same_in_parts() {
        let bytes: Vec<u8> = (0..100u8).map(|i| i.wrapping_mul(37)).collect();
        for cut in 0..=bytes.len() {
            let mut crc = Crc32c::default();
            crc.update(&bytes[..cut]);
            crc.update(&bytes[cut..]);
            assert_eq!(crc.finish(), crc32c(&bytes), "cut at {cut}");
        }
    }

    #[test]
    fn files_have_the_checksum_of_their_bytes() {
        let root = tempfile::tempdir().unwrap();
        for len in [0, 1, (1 << 20) - 1, 1 << 20, (1 << 21) + 3] {
            let bytes: Vec<u8> = (0..len).map(|i| (i * 7 % 251) as u8).collect();
            let path = root.path().join(len.to_string());
            std::fs::write(&path, &bytes).unwrap();
            assert_eq!(checksum(&path).unwrap(), (len, crc32c(&bytes)));
        }
        assert!(checksum(&root.path().join("none")).unwrap_err().to_string().contains("none"));
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
