//! [`Teacher`]: the model that a student follows, for inference alone.

use crate::{Error, Result};
use candle_core::Tensor;
use moe_core::ParamSpec;
use moe_core::tape;
use moe_models::families::AnyFamily;
use moe_models::gpt::GptConfig;
use moe_models::hf::Checkpoint;
use moe_models::train::model::TokenBatch;
use moe_models::{Decoder, Family, ParamSource, Pass, Precision, ReadFamily};
use moe_parallel::{Mesh, Placement};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A model folder that students learn from.
#[derive(Debug, Clone)]
pub struct TeacherFolder {
    dir: PathBuf,
    config: GptConfig,
    /// Over its configuration and weights.
    fingerprint: String,
}

/// A teacher in memory, or a rank's part of one.
#[derive(Debug)]
pub struct Teacher {
    decoder: Decoder,
}

impl TeacherFolder {
    /// The model in `dir`. All of it is read once, for its fingerprint.
    ///
    /// # Errors
    /// If it is not a model of the family, or a file cannot be read.
    pub fn open(dir: &Path) -> Result<Self> {
        let config = match AnyFamily::read_file(&dir.join("config.json"))? {
            AnyFamily::Gpt(config) => config,
            AnyFamily::Published(config) => {
                return Err(Error::Argument(format!(
                    "the teacher in {} is a {}; students are taught by models of this project's own (moe_gpt)",
                    dir.display(),
                    config.model_type()
                )));
            }
        };
        Ok(Self { dir: dir.to_owned(), config, fingerprint: fingerprint(dir)? })
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The teacher's shape.
    pub fn config(&self) -> &GptConfig {
        &self.config
    }

    /// The same for the same configuration and weights.
    pub fn fingerprint(&self) -> &str {
        &self.fingerprint
    }

    /// The teacher, or the part of it that a rank of `mesh` holds: weights packed in `precision` as they are read. Called by all
    /// ranks.
    ///
    /// # Errors
    /// If the folder cannot be read or the mesh cannot hold the teacher.
    pub fn load(&self, precision: Precision, mesh: Option<&Mesh>) -> Result<Teacher> {
        let decoder = match mesh {
            None => Decoder::load(&self.dir, precision)?,
            Some(mesh) => Decoder::load_over(&self.dir, precision, mesh)?,
        };
        Ok(Teacher { decoder })
    }

    /// Gives a rank's part of the teacher's parameters, f32.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn values(&self, placement: Placement) -> Result<impl Fn(&ParamSpec) -> moe_models::Result<Tensor>> {
        let checkpoint = Arc::new(Checkpoint::of_family(&self.dir, &self.config)?);
        let table = Arc::new(self.config.decoder()?.params());
        checkpoint.check(&table)?;
        let source = ParamSource::checkpoint(table, checkpoint, placement);
        Ok(move |spec: &ParamSpec| {
            let part = source.part(spec, &candle_core::Device::Cpu)?;
            Ok(part.to_dtype(candle_core::DType::F32)?)
        })
    }
}

/// Of `config.json` and every file of weights.
fn fingerprint(dir: &Path) -> Result<String> {
    let mut names: Vec<PathBuf> = std::fs::read_dir(dir)
        .map_err(|e| moe_models::Error::io(dir, e))?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.extension().is_some_and(|ext| ext == "safetensors"))
        .collect();
    if names.is_empty() {
        return Err(Error::Argument(format!(
            "{} holds no weights (*.safetensors); name a model folder",
            dir.display()
        )));
    }
    names.sort();
    names.insert(0, dir.join("config.json"));
    let mut hasher = blake3::Hasher::new();
    for path in names {
        let file = std::fs::File::open(&path).map_err(|e| moe_models::Error::io(&path, e))?;
        hasher.update_reader(file).map_err(|e| moe_models::Error::io(&path, e))?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}

impl Teacher {
    /// What its output layer sees of whole sequences, in evaluation mode: nothing is drawn and nothing dropped, and no gradient is
    /// kept.
    ///
    /// # Errors
    /// If the ids do not fit the teacher.
    ///
    /// # Source
    /// Differs from Megatron-DeepSpeed, whose teacher stays in training mode, with dropout and capacity.
    pub fn hidden(&self, batch: &TokenBatch) -> Result<Tensor> {
        let (hidden, _) = tape::paused(|| self.decoder.hidden(&batch.input_ids, batch.seq_len, Pass::Eval))?;
        Ok(hidden)
    }

    /// The decoder.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }
}
