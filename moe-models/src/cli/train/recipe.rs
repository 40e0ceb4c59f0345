//! [`Recipe`]: what a program that trains adds to a plain run. [`Plain`] adds nothing.

use super::model_args::ModelArgs;
use crate::families::AnyFamily;
use crate::train::{FolderFiles, TokenizerChoice, TrainConfig, TrainModel};
use crate::{DecoderConfig, Model, ReadFamily};
use anyhow::{Context, Result, ensure};
use moe_parallel::Mesh;
use std::path::Path;
use std::sync::Arc;
use tokenizers::Tokenizer;

/// In the folder of a run that has a teacher.
pub const STUDENT_RECORD: &str = "distillation.json";

/// How a run's model comes to be, and what is trained with it. One value serves all ranks of a process.
pub trait Recipe: Sync {
    /// What models are.
    type Family: ReadFamily;
    /// What is trained: a model of the family, and what its loss needs beside it.
    type Model: TrainModel;

    /// The model asked for; fitted to the tokenizer, once there is one.
    ///
    /// # Errors
    /// If the arguments describe no model, or one that the tokenizer does not fit.
    fn shape(&self, args: &ModelArgs, seq_length: Option<usize>, tokenizer: Option<&Tokenizer>)
    -> Result<Self::Family>;

    /// Where the tokenizer of a model of `vocab_size` comes from.
    ///
    /// # Errors
    /// If the arguments ask for one that the recipe cannot have.
    fn tokenizer(&self, args: &ModelArgs, vocab_size: usize) -> Result<TokenizerChoice> {
        Ok(args.tokenizer_choice(vocab_size))
    }

    /// The files beside the weights of a new run's checkpoints, with this tokenizer.
    ///
    /// # Errors
    /// If one cannot be read.
    fn files(&self, args: &ModelArgs, tokenizer_json: String) -> Result<FolderFiles> {
        args.folder_files(tokenizer_json)
    }

    /// A model at the beginning of a run, or a rank's part of it: of the weights that the arguments name, or of fresh ones.
    ///
    /// # Errors
    /// If it cannot be made.
    fn initial(
        &self,
        args: &ModelArgs,
        shape: Self::Family,
        seed: u64,
        mesh: Option<Arc<Mesh>>,
    ) -> Result<Model<Self::Family>> {
        args.initial(shape, seed, mesh)
    }

    /// Called on one rank once everything is ready, before the run in the folder `out` begins with this `config`, or is `resumed`.
    ///
    /// # Errors
    /// If the run in the folder is of another recipe.
    fn enter(&self, out: &Path, config: &TrainConfig, resumed: bool) -> Result<()>;

    /// What is trained, of a model that follows `config`. Called by all ranks.
    ///
    /// # Errors
    /// If what the recipe needs beside the model cannot be had.
    fn complete(
        &self,
        model: Model<Self::Family>,
        config: &TrainConfig,
        mesh: Option<Arc<Mesh>>,
    ) -> Result<Self::Model>;

    /// Models that ranks hold beside the one that is trained, for inference alone.
    ///
    /// # Errors
    /// If one of them is none.
    fn beside(&self) -> Result<Vec<DecoderConfig>> {
        Ok(Vec::new())
    }

    /// What people should know, a line each.
    fn describe(&self, config: &TrainConfig) -> Vec<String> {
        let _ = config;
        Vec::new()
    }
}

/// A model alone, of any family.
#[derive(Debug, Clone, Copy)]
pub struct Plain;

impl Recipe for Plain {
    type Family = AnyFamily;
    type Model = Model<AnyFamily>;

    fn shape(&self, args: &ModelArgs, seq_length: Option<usize>, tokenizer: Option<&Tokenizer>) -> Result<AnyFamily> {
        args.family(seq_length, tokenizer)
    }

    fn enter(&self, out: &Path, _: &TrainConfig, resumed: bool) -> Result<()> {
        let record = out.join(STUDENT_RECORD);
        ensure!(
            !resumed || !record.exists(),
            "{} holds a run that has a teacher; resume it with moe-distill, or start a new run in another --out",
            out.display()
        );
        match std::fs::remove_file(&record) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).with_context(|| format!("cannot remove {}, which is of an earlier run", record.display()))
            }
            _ => Ok(()),
        }
    }

    fn complete(&self, model: Model<AnyFamily>, _: &TrainConfig, _: Option<Arc<Mesh>>) -> Result<Model<AnyFamily>> {
        Ok(model)
    }
}
