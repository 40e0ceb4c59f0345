//! [`KeptFile`]: the packed weights of a model in one file, mapped: a start that finds it packs nothing.
//!
//! ```text
//! magic [8]  header's bytes u64  header (JSON: key, and of each weight its name, shape, form and stretches)  stretches, each at a
//! multiple of 64
//! ```
//!
//! The key is a hash of what tells the weights from others: the versions of what is packed and of what reads the model's files, the
//! forms asked for, the model's configuration, and of each file of weights its name, length, times of change and some of its bytes.
//! Another key is another file; old ones are not removed. A change to a file of weights that keeps all of that is not seen, nor is one of
//! a packed file that keeps its length: nothing is read whole at a start. Pages of a mapped file are small ones, which reading pays for (`moe-kernels`' own weights lie in huge
//! pages); in turn processes that serve the same model share them.

use super::file::{remove_abandoned, try_write_atomically};
use super::map::Bytes;
use crate::{Error, Result};
use moe_core::Weight;
use moe_kernels::{KeptWeights, LAYOUT, PackedForms, PackedMatrices, PackedStack, SharedBytes, WeightFormat};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

const MAGIC: [u8; 8] = *b"moe-pack";
/// What of a model's files comes to which weights. To be raised whenever the same files come to give others: where decoding, rounding,
/// the order of rows, or the names of parameters change.
const READING: u32 = 1;
const ENDING: &str = ".packed";
/// Bytes before the header.
const HEAD: usize = 16;
/// What each stretch begins at a multiple of.
const LINE: usize = 64;
/// The first and the last bytes of a file that its hash sees, and how much of it between them, in so many places.
const SEEN: u64 = 4096;
const PLACES: u64 = 64;

#[derive(Debug, Serialize, Deserialize)]
struct Header {
    key: String,
    weights: BTreeMap<String, Entry>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Entry {
    dims: Vec<usize>,
    format: WeightFormat,
    /// Where each stretch begins, counted from the end of the header, and its length.
    sections: Vec<(usize, usize)>,
}

/// Where the packed weights of a model are kept, under a name that is theirs alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeptPath {
    path: PathBuf,
    key: String,
}

impl KeptPath {
    /// In the folder `cache`, which is made if it is not there, for the model of this `config.json` and these files of weights, with
    /// weights in `forms`.
    ///
    /// # Errors
    /// [`Error::Io`] if the folder cannot be made, or a file of the model cannot be read.
    pub(crate) fn of(cache: &Path, config: &[u8], weights: &[PathBuf], forms: &PackedForms) -> Result<Self> {
        std::fs::create_dir_all(cache).map_err(|e| Error::io(cache, e))?;
        let key = key(READING, config, weights, forms)?;
        Ok(Self { path: cache.join(format!("{key}{ENDING}")), key })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The file, if it is there and whole; one that is not will be written anew.
    pub(crate) fn open(&self) -> Option<KeptFile> {
        let bytes = Bytes::map(&self.path).ok()?;
        let (head, rest) = bytes.as_ref().split_at_checked(HEAD)?;
        let len = usize::try_from(u64::from_le_bytes(head[8..].try_into().ok()?)).ok()?;
        let header: Header = serde_json::from_slice(rest.get(..len)?).ok()?;
        let start = (HEAD + len).next_multiple_of(LINE);
        let is_ours = head[..8] == MAGIC && header.key == self.key;
        let mut end =
            header.weights.values().flat_map(|entry| &entry.sections).map(|&(first, len)| first.checked_add(len));
        let end = end.try_fold(0, |most, end| Some(most.max(end?)))?.checked_add(start)?;
        let is_whole = bytes.as_ref().len() == end;
        (is_ours && is_whole).then(|| KeptFile {
            bytes: Arc::new(bytes),
            start,
            weights: header.weights.into_iter().collect(),
        })
    }

    /// Writes what of `weights` can be kept: packed, with nothing beside them, under a name of their own. What starts that were
    /// killed have left of such files is removed.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be written.
    pub(crate) fn write(&self, weights: &[&Weight]) -> Result<()> {
        self.path.parent().map_or(Ok(()), |cache| remove_abandoned(cache, ENDING))?;
        let mut kept: BTreeMap<String, Option<Arc<PackedStack>>> = BTreeMap::new();
        let mut entries = BTreeMap::new();
        for weight in weights {
            let Some(packed) = PackedMatrices::of(weight)? else { continue };
            let dims = match weight {
                Weight::Packed(packed) => packed.dims().to_vec(),
                Weight::Tensor(_) => continue,
            };
            // A name that is there twice is that of matrices which a layer has made of others.
            let stack = (!packed.has_table() && !kept.contains_key(packed.name())).then(|| packed.matrices());
            entries.insert(packed.name().to_owned(), (dims, packed.format()));
            kept.insert(packed.name().to_owned(), stack);
        }
        let stacks: BTreeMap<String, Arc<PackedStack>> =
            kept.into_iter().filter_map(|(name, stack)| Some((name, stack?))).collect();
        let mut at = 0;
        let entry = |(name, stack): (&String, &Arc<PackedStack>)| {
            let (dims, format) = entries[name].clone();
            let sections = stack.sections().into_iter().map(|section| {
                let first = at;
                at = (first + section.len()).next_multiple_of(LINE);
                (first, section.len())
            });
            (name.clone(), Entry { dims, format, sections: sections.collect() })
        };
        let header = Header { key: self.key.clone(), weights: stacks.iter().map(entry).collect() };
        try_write_atomically(&self.path, |out| write_file(out, &header, &stacks).map_err(|e| Error::io(&self.path, e)))
    }
}

fn write_file(
    out: &mut dyn Write,
    header: &Header,
    stacks: &BTreeMap<String, Arc<PackedStack>>,
) -> std::io::Result<()> {
    let header = serde_json::to_vec(header)?;
    out.write_all(&MAGIC)?;
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    // What fills up to a multiple comes before a stretch, so that the file ends with the last one.
    let mut behind = HEAD + header.len();
    for section in stacks.values().flat_map(|stack| stack.sections()) {
        let filled = behind.next_multiple_of(LINE);
        out.write_all(&[0; LINE][..filled - behind])?;
        out.write_all(section)?;
        behind = filled + section.len();
    }
    Ok(())
}

/// The key of packed weights, with the version of what reads files.
fn key(reading: u32, config: &[u8], weights: &[PathBuf], forms: &PackedForms) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(format!("{LAYOUT} {reading} {forms:?}").as_bytes());
    hasher.update(config);
    for path in weights {
        see(path, &mut hasher).map_err(|e| Error::io(path, e))?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

/// What tells a file from others: its name, its length, when it was changed, and its bytes here and there. The second time is that of
/// the file's entry, which no program sets: it sees what puts the first one back. Neither the entry's number nor the device's: some
/// file systems give others after each start of the machine.
fn see(path: &Path, hasher: &mut blake3::Hasher) -> std::io::Result<()> {
    let mut file = File::open(path)?;
    let metadata = file.metadata()?;
    let changed = metadata.modified()?.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_nanos());
    hasher.update(path.file_name().unwrap_or_default().as_encoded_bytes());
    let entry = (metadata.ctime(), metadata.ctime_nsec());
    hasher.update(format!(" {} {changed} {entry:?} ", metadata.len()).as_bytes());
    for place in 0..=PLACES {
        file.seek(SeekFrom::Start(metadata.len().saturating_sub(SEEN) / PLACES * place))?;
        let mut bytes = Vec::with_capacity(SEEN as usize);
        Read::by_ref(&mut file).take(SEEN).read_to_end(&mut bytes)?;
        hasher.update(&bytes);
    }
    Ok(())
}

/// Packed weights in a mapped file.
#[derive(Debug)]
pub(crate) struct KeptFile {
    bytes: Arc<Bytes>,
    start: usize,
    weights: HashMap<String, Entry>,
}

impl KeptWeights for KeptFile {
    fn find(&self, name: &str, dims: &[usize]) -> Option<PackedMatrices> {
        let entry = self.weights.get(name).filter(|entry| entry.dims == dims)?;
        let &[.., out, inner] = dims else { return None };
        let bytes = |&(first, len): &(usize, usize)| {
            SharedBytes::new(self.bytes.clone(), self.start + first..self.start + first + len)
        };
        let sections: Vec<SharedBytes> = entry.sections.iter().map(bytes).collect::<Option<_>>()?;
        PackedMatrices::of_stack(name, dims, PackedStack::of_sections(entry.format, [out, inner], &sections)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_kernels::Precision;

    #[test]
    fn the_key_sees_who_reads_and_what_was_changed_between_the_bytes_it_looks_at() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let mut bytes = vec![7; 1 << 20];
        std::fs::write(&path, &bytes).unwrap();
        let time = std::fs::metadata(&path).unwrap().modified().unwrap();
        let key = |reading| key(reading, b"{}", std::slice::from_ref(&path), &Precision::F32.into()).unwrap();
        let first = key(READING);
        assert_eq!(first, key(READING));
        assert_ne!(first, key(READING + 1));
        // Later than the clock's grain, in a place that is not looked at, and with the old time.
        std::thread::sleep(std::time::Duration::from_millis(20));
        bytes[SEEN as usize + 1] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
        assert_ne!(first, key(READING));
    }
}
