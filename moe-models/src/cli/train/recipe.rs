//! [`Recipe`]: what a program that trains adds to a plain run. [`Plain`] adds nothing.

use super::model_args::ModelArgs;
use crate::Family;
use crate::gpt::{Gpt, GptConfig};
use crate::hf::Checkpoint;
use crate::train::{TokenizerChoice, TrainConfig, TrainModel};
use anyhow::Result;
use candle_core::Device;
use moe_parallel::Mesh;
use std::path::Path;
use std::sync::Arc;
use tokenizers::Tokenizer;

/// How a run's model comes to be, and what is trained with it. One value serves all ranks of a process.
pub trait Recipe: Sync {
    /// What is trained: a model of the family, and what its loss needs beside it.
    type Model: TrainModel;

    /// The model asked for; its vocabulary is still to be fitted to the tokenizer.
    ///
    /// # Errors
    /// If the arguments describe no model.
    fn shape(&self, args: &ModelArgs, seq_length: Option<usize>) -> Result<GptConfig> {
        args.config(seq_length)
    }

    /// Fits the model asked for to the tokenizer.
    ///
    /// # Errors
    /// If the tokenizer has entries that the model has not.
    fn fit(&self, args: &ModelArgs, shape: &mut GptConfig, tokenizer: &Tokenizer) -> Result<()> {
        args.fit_to(shape, tokenizer)
    }

    /// Where the tokenizer of a model of `vocab_size` comes from.
    ///
    /// # Errors
    /// If the arguments ask for one that the recipe cannot have.
    fn tokenizer(&self, args: &ModelArgs, vocab_size: usize) -> Result<TokenizerChoice> {
        Ok(args.tokenizer_choice(vocab_size))
    }

    /// A model at the beginning of a run, or a rank's part of it: of the weights that the arguments name, or of fresh ones.
    ///
    /// # Errors
    /// If it cannot be made.
    fn initial(&self, args: &ModelArgs, shape: &GptConfig, seed: u64, mesh: Option<Arc<Mesh>>) -> Result<Gpt> {
        let Some(dir) = args.init_from() else {
            return Ok(match mesh {
                None => Gpt::new(shape.clone(), seed, &Device::Cpu)?,
                Some(mesh) => Gpt::new_over(shape.clone(), seed, mesh)?,
            });
        };
        let checkpoint = Checkpoint::open(dir, shape.names())?;
        Ok(match mesh {
            None => Gpt::from_checkpoint(shape.clone(), &checkpoint, &Device::Cpu)?,
            Some(mesh) => Gpt::from_checkpoint_over(shape.clone(), Arc::new(checkpoint), mesh)?,
        })
    }

    /// Called on one rank once everything is ready, before the run in the folder `out` begins or is `resumed`.
    ///
    /// # Errors
    /// If the run in the folder is of another recipe.
    fn enter(&self, out: &Path, resumed: bool) -> Result<()>;

    /// What is trained, of a model that follows `config`. Called by all ranks.
    ///
    /// # Errors
    /// If what the recipe needs beside the model cannot be had.
    fn complete(&self, model: Gpt, config: &TrainConfig, mesh: Option<Arc<Mesh>>) -> Result<Self::Model>;

    /// Models that ranks hold beside the one that is trained, for inference alone.
    fn beside(&self) -> Vec<GptConfig> {
        Vec::new()
    }

    /// What people should know, a line each.
    fn describe(&self, config: &TrainConfig) -> Vec<String> {
        let _ = config;
        Vec::new()
    }
}

/// A model alone.
#[derive(Debug, Clone, Copy)]
pub struct Plain;

impl Recipe for Plain {
    type Model = Gpt;

    fn enter(&self, _: &Path, _: bool) -> Result<()> {
        Ok(())
    }

    fn complete(&self, model: Gpt, _: &TrainConfig, _: Option<Arc<Mesh>>) -> Result<Gpt> {
        Ok(model)
    }
}
