//! One file of a save, written tensor by tensor from where the values lie; its checksum is taken on the way.

use super::super::checkpoint::FileCheck;
use super::super::files::Crc32c;
use super::index::{Entry, Save};
use crate::hf::{Layout, StackPlace, TensorHeader, write_header, write_values};
use crate::{Error, Result};
use moe_parallel::tensor_box::{Place, for_each_run};
use safetensors::Dtype;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// Bytes that are written, and added to the checksum, at a time.
const BUFFER_BYTES: usize = 1 << 20;

/// A box of values in memory.
#[derive(Debug)]
pub(super) struct Source<'a> {
    /// Of a row-major tensor: from its element `first` on.
    pub(super) values: &'a [f32],
    pub(super) first: usize,
    /// Of that tensor.
    pub(super) shape: Vec<usize>,
    /// Where the box begins in it.
    pub(super) start: Vec<usize>,
}

/// A tensor of a file or one expert's part of one, and its values.
#[derive(Debug)]
pub(super) struct Planned<'a> {
    pub(super) entry: Entry,
    pub(super) source: Source<'a>,
}

/// Writes these tensors into the new file `name` of the folder `dir`, f32, and flushes it to the disk. They are left in the order
/// they have in it.
///
/// # Errors
/// [`Error::Argument`] for two tensors of one name; [`Error::Io`] if the file cannot be written.
pub(super) fn write_file(dir: &Path, name: &str, save: Save, tensors: &mut [Planned<'_>]) -> Result<FileCheck> {
    fn key<'a>(Planned { entry, .. }: &'a Planned<'_>) -> (&'a str, Option<usize>) {
        (&entry.tensor, entry.place.map(|place| place.index))
    }
    tensors.sort_by(|a, b| key(a).cmp(&key(b)));
    if let Some(pair) = tensors.windows(2).find(|pair| key(&pair[0]) == key(&pair[1])) {
        return Err(Error::Argument(format!("{} is given to a checkpoint twice", pair[0].entry.tensor)));
    }
    let path = dir.join(name);
    let write = || {
        let mut out = BufWriter::with_capacity(BUFFER_BYTES, Summed::new(File::create(&path)?));
        write_tensors(&mut out, save, tensors)?;
        let summed = out.into_inner().map_err(std::io::IntoInnerError::into_error)?;
        summed.out.sync_all()?;
        Ok(FileCheck { name: name.to_owned(), bytes: summed.bytes, crc32c: summed.crc.finish() })
    };
    write().map_err(|e| Error::io(&path, e))
}

fn write_tensors(out: &mut impl Write, save: Save, tensors: &[Planned<'_>]) -> std::io::Result<()> {
    let header = |parts: &[Planned<'_>]| {
        let Entry { tensor, size, place, .. } = &parts[0].entry;
        let shape = match place {
            None => size.clone(),
            Some(StackPlace { layout, .. }) => [&[parts.len()], layout.in_files(size).as_slice()].concat(),
        };
        TensorHeader { name: tensor.clone(), dtype: Dtype::F32, shape }
    };
    let headers = tensors.chunk_by(|a, b| a.entry.tensor == b.entry.tensor).map(header);
    let metadata = save.metadata().into_iter().chain([("format", "pt".to_owned())]);
    write_header(out, &metadata.collect::<Vec<_>>(), &headers.collect::<Vec<_>>())?;
    for Planned { entry, source } in tensors {
        if let Some(StackPlace { layout, .. }) = entry.place.filter(|place| place.layout != Layout::Rows) {
            // All of an expert, so its values are all of the source.
            let stored = layout.to_files(source.values.to_vec(), &entry.size);
            write_values(out, &stored, Dtype::F32)?;
            continue;
        }
        let zero = vec![0; entry.size.len()];
        let from = Place { shape: &source.shape, start: &source.start };
        let mut written = Ok(());
        for_each_run(&entry.size, from, Place { shape: &entry.size, start: &zero }, |from, _| {
            if written.is_ok() {
                let values = &source.values[from.start - source.first..from.end - source.first];
                written = write_values(out, values, Dtype::F32);
            }
        });
        written?;
    }
    Ok(())
}

/// Counts and sums up what is written.
#[derive(Debug)]
struct Summed<W> {
    out: W,
    bytes: u64,
    crc: Crc32c,
}

impl<W> Summed<W> {
    fn new(out: W) -> Self {
        Self { out, bytes: 0, crc: Crc32c::default() }
    }
}

impl<W: Write> Write for Summed<W> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.crc.update(&bytes[..written]);
        self.bytes += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}
