//! [`Student`]: a model that follows a teacher while it trains. To [`moe_models::train::Trainer`] it is a model like others.

use crate::kept::{KeptTargets, TopTargets};
use crate::schedule::KdSchedule;
use crate::teacher::Teacher;
use crate::{Error, Result};
use candle_core::{DType, Tensor, Var};
use moe_core::ParamSpec;
use moe_core::ops::{Distillation, SoftTargets};
use moe_models::hf::NameTable;
use moe_models::train::model::{LossOutput, LossParts, Pass, TokenBatch, TrainModel};
use moe_models::train::optimizer::UpdateRule;
use moe_models::{DropoutConfig, Family, Model, Precision, Recompute};
use std::path::Path;

/// What a student follows and how long.
#[derive(Debug)]
pub struct Following {
    /// The teacher.
    pub teacher: Teacher,
    /// How far it counts.
    pub how: Distillation,
    /// Which steps.
    pub schedule: KdSchedule,
    /// Tokens of the whole training, which the schedule divides.
    pub train_tokens: u64,
    /// Where what the teacher says is kept, for a student that learns from its likeliest entries alone.
    pub kept: Option<KeptTargets>,
}

/// A model and what it follows.
#[derive(Debug)]
pub struct Student<F> {
    model: Model<F>,
    following: Option<Following>,
}

/// What the teacher says of a batch.
enum Said {
    /// All of it, behind its output layer.
    Hidden(Tensor),
    /// The likeliest entries.
    Top(TopTargets),
}

impl<F: Family> Student<F> {
    /// A student. It may differ from its teacher in everything but the vocabulary.
    ///
    /// # Errors
    /// [`Error::Argument`] for another vocabulary, sequences longer than the teacher's, or a weight, temperature or schedule that
    /// means nothing.
    pub fn new(model: Model<F>, following: Following) -> Result<Self> {
        following.how.validate().map_err(|e| Error::Argument(e.to_string()))?;
        following.schedule.validate()?;
        let (own, of) = (model.decoder_config(), following.teacher.decoder().config());
        if own.vocab_size != of.vocab_size {
            return Err(Error::Argument(format!(
                "the student's vocabulary has {} entries and the teacher's {}; both need the same, with one tokenizer",
                own.vocab_size, of.vocab_size
            )));
        }
        if own.max_seq_len > of.max_seq_len {
            return Err(Error::Argument(format!(
                "the student's sequences have up to {} tokens and the teacher's {}; train the student on shorter ones",
                own.max_seq_len, of.max_seq_len
            )));
        }
        Ok(Self { model, following: Some(following) })
    }

    /// One that follows nobody, and needs no teacher in memory.
    pub fn alone(model: Model<F>) -> Self {
        Self { model, following: None }
    }

    /// The model.
    pub fn model(&self) -> &Model<F> {
        &self.model
    }

    /// What it follows, if anything.
    pub fn following(&self) -> Option<&Following> {
        self.following.as_ref()
    }

    /// The model alone.
    pub fn into_model(self) -> Model<F> {
        self.model
    }

    /// The loss of a training pass that follows the teacher.
    fn distilled(&self, following: &Following, batch: &TokenBatch, pass: Pass) -> moe_models::Result<LossOutput> {
        let Following { teacher, how, kept, .. } = following;
        // The teacher comes first: no message of the student's pass is under way while ranks meet in its layers.
        let said = match kept {
            None => Said::Hidden(teacher.hidden(batch).map_err(Error::into_model)?),
            Some(kept) => Said::Top(kept.of(teacher, batch).map_err(Error::into_model)?),
        };
        let decoder = self.model.training_decoder();
        decoder.loss_by(batch, pass, |hidden| {
            let soft = match &said {
                Said::Hidden(of_teacher) => teacher.decoder().head().soft_targets(of_teacher)?,
                Said::Top(TopTargets { k, ids, probs }) => SoftTargets::TopK { k: *k, ids, probs },
            };
            let loss = decoder.head().distillation(hidden, &batch.target_ids, soft, *how)?;
            let parts = LossParts { lm: loss.cross_entropy, kd: loss.kd, ..LossParts::default() };
            Ok((loss.loss, parts))
        })
    }
}

impl<F: Family> TrainModel for Student<F> {
    fn vocab_size(&self) -> usize {
        self.model.vocab_size()
    }
    fn max_seq_len(&self) -> usize {
        self.model.max_seq_len()
    }
    fn params(&self) -> &[(String, Var)] {
        TrainModel::params(&self.model)
    }
    fn update_rule(&self, name: &str, shape: &[usize]) -> UpdateRule {
        self.model.update_rule(name, shape)
    }
    fn weights(&self) -> &[(String, Var)] {
        self.model.weights()
    }
    fn specs(&self) -> Vec<ParamSpec> {
        self.model.specs()
    }
    fn names(&self) -> NameTable {
        self.model.names()
    }
    fn description(&self) -> moe_models::Result<String> {
        let of = |of: &Following| {
            let teacher = of.teacher.decoder().config();
            format!("{:?} {:?} {} {teacher:?}", of.how, of.schedule, of.train_tokens)
        };
        Ok(self.model.description()? + &self.following.as_ref().map(of).unwrap_or_default())
    }
    fn frozen(&self) -> &[Tensor] {
        self.model.frozen()
    }
    fn selection_biases(&self) -> Vec<(usize, &Var)> {
        self.model.selection_biases()
    }
    fn grad_group(&self, name: &str) -> String {
        self.model.grad_group(name)
    }
    fn precision(&self) -> Precision {
        self.model.precision()
    }
    fn recompute(&self) -> Recompute {
        self.model.recompute()
    }
    fn dropout(&self) -> DropoutConfig {
        self.model.dropout()
    }

    /// While the schedule says so, training passes follow the teacher; everything else is the model's own.
    fn loss(&self, batch: &TokenBatch, pass: Pass) -> moe_models::Result<LossOutput> {
        match (&self.following, pass) {
            (Some(of), Pass::Train(at)) if of.schedule.follows(at.tokens, of.train_tokens) => {
                self.distilled(of, batch, pass)
            }
            _ => self.model.loss(batch, pass),
        }
    }

    fn save_config(&self, dir: &Path, dtype: DType) -> moe_models::Result<()> {
        self.model.save_config(dir, dtype)
    }
}
