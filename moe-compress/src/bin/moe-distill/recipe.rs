//! [`Distilling`]: what `moe-distill` adds to a training run.

use crate::args::{Described, DistillArgs, Settings};
use anyhow::{Context, Result, bail, ensure};
use moe_compress::distill::Following;
use moe_compress::kept::TargetsConfig;
use moe_compress::teacher::TeacherFolder;
use moe_compress::{KdSchedule, KeptTargets, Student, StudentPlan};
use moe_core::ParamSpec;
use moe_models::cli::train::{ModelArgs, Recipe, TrainArgs};
use moe_models::gpt::{Gpt, GptConfig};
use moe_models::train::checkpoint::CheckpointStore;
use moe_models::train::{FolderFiles, TokenizerChoice, TrainConfig, tokenizer};
use moe_models::{DecoderConfig, Family};
use moe_parallel::Mesh;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokenizers::Tokenizer;

pub(crate) struct Distilling {
    teacher: TeacherFolder,
    settings: Settings,
    /// For targets that are kept.
    cache: PathBuf,
}

impl Distilling {
    /// As the arguments say, and the run that they resume.
    pub(crate) fn new(args: &DistillArgs, train: &TrainArgs) -> Result<Self> {
        ensure!(!train.evaluates(), "--evaluate needs no teacher; ask moe-train, or moe-eval");
        let teacher = TeacherFolder::open(&args.teacher)?;
        let mut resumed = if train.resume { Settings::read(&train.out)? } else { None };
        // A run that was ended before its first checkpoint begins anew, for as long as is asked for now.
        if let Some(settings) = resumed.as_mut().filter(|_| !has_checkpoint(&train.out)) {
            settings.train_tokens = None;
        }
        let model = &train.model;
        let student =
            Described { whole: model.names_a_model() || model.describes_weights(), init_from: model.init_from() };
        let settings = args.settings(teacher.fingerprint(), student, resumed.as_ref())?;
        if let Some(k) = settings.top_k {
            let vocab_size = teacher.config().vocab_size;
            ensure!(
                (1..=vocab_size).contains(&k),
                "--kd-top-k must be 1 to {vocab_size}, the teacher's entries, got {k}"
            );
        }
        if let Some(share) = settings.drop_depth {
            StudentPlan::new(teacher.config(), share, settings.keep_layers).context("--drop-depth")?;
        }
        let cache = settings.cache.clone().unwrap_or_else(|| train.out.join("teacher-targets"));
        Ok(Self { teacher, settings, cache })
    }

    /// What the schedule's share is of. A run that is resumed for more tokens does not begin to follow again.
    fn scheduled_tokens(&self, config: &TrainConfig) -> u64 {
        self.settings.train_tokens.unwrap_or(config.train_tokens)
    }

    /// The student that is the teacher without some of its layers.
    fn plan(&self) -> Result<StudentPlan> {
        match self.settings.drop_depth {
            Some(share) => Ok(StudentPlan::new(self.teacher.config(), share, self.settings.keep_layers)?),
            None => bail!("a student that model flags describe keeps no layers of its teacher"),
        }
    }
}

impl Recipe for Distilling {
    type Family = GptConfig;
    type Model = Student<GptConfig>;

    /// The vocabulary is the teacher's.
    fn shape(&self, args: &ModelArgs, seq_length: Option<usize>, tokenizer: Option<&Tokenizer>) -> Result<GptConfig> {
        let teacher = self.teacher.config();
        tokenizer.map_or(Ok(()), |tokenizer| tokenizer::check_fits(tokenizer, teacher.vocab_size))?;
        let shape = match self.settings.drop_depth {
            None if args.names_a_model() => args.config(seq_length)?,
            None => args.changed(teacher.clone(), seq_length)?,
            Some(_) if self.settings.from_teacher => args.changed(self.plan()?.config, None)?,
            // Positions past the training length would never be trained.
            Some(_) => args.changed(self.plan()?.config, seq_length)?,
        };
        Ok(GptConfig { vocab_size: teacher.vocab_size, eos_token_id: teacher.eos_token_id, ..shape })
    }

    fn tokenizer(&self, args: &ModelArgs, _: usize) -> Result<TokenizerChoice> {
        ensure!(!args.asks_for_tokenizer(), "a student has its teacher's tokenizer; drop --tokenizer and --vocab-size");
        let path = self.teacher.dir().join("tokenizer.json");
        if let Some(dir) = args.init_from() {
            let of = |path: &Path| tokenizer::to_json(&tokenizer::load(path)?);
            ensure!(
                of(&dir.join("tokenizer.json"))? == of(&path)?,
                "--init-from {} has another tokenizer than --teacher {}: its weights know other ids; give weights of the teacher's \
                 tokenizer",
                dir.display(),
                self.teacher.dir().display()
            );
        }
        Ok(TokenizerChoice::File(path))
    }

    /// The teacher's.
    fn files(&self, _: &ModelArgs, tokenizer_json: String) -> Result<FolderFiles> {
        Ok(FolderFiles::of_folder(tokenizer_json, self.teacher.dir())?)
    }

    fn initial(&self, args: &ModelArgs, shape: GptConfig, seed: u64, mesh: Option<Arc<Mesh>>) -> Result<Gpt> {
        if !self.settings.from_teacher {
            return args.initial(shape, seed, mesh);
        }
        let plan = self.plan()?;
        let placement = mesh.as_ref().map_or(moe_parallel::Placement::WHOLE, |mesh| mesh.placement());
        let values = self.teacher.values(placement)?;
        let of_teacher = |spec: &ParamSpec, _| {
            let name = plan.name_in_teacher(&spec.name).ok_or_else(|| {
                moe_models::Error::Config(format!("the teacher has no parameter for the student's {}", spec.name))
            })?;
            values(&ParamSpec { name, ..spec.clone() })
        };
        Ok(Gpt::of_parts(shape, mesh, of_teacher)?)
    }

    fn enter(&self, out: &Path, config: &TrainConfig, resumed: bool) -> Result<()> {
        match resumed {
            true => self.settings.check_continues(out),
            false => Settings { train_tokens: Some(config.train_tokens), ..self.settings.clone() }.write(out),
        }
    }

    fn complete(&self, model: Gpt, config: &TrainConfig, mesh: Option<Arc<Mesh>>) -> Result<Self::Model> {
        if self.settings.schedule == KdSchedule::None {
            return Ok(Student::alone(model));
        }
        let teacher = self.teacher.load(config.precision, mesh.as_deref())?;
        let (how, schedule) = (self.settings.how(), self.settings.schedule);
        let keep = |k: usize| -> Result<KeptTargets> {
            ensure!(
                mesh.is_none(),
                "--kd-top-k is for one rank: ranks ask their teacher together, and would not all have to"
            );
            let vocab_size = self.teacher.config().vocab_size;
            let (seq_len, precision) = (config.seq_len(), config.precision);
            let of = TargetsConfig { vocab_size, seq_len, k, temperature: how.temperature, precision };
            Ok(KeptTargets::open(&self.cache, self.teacher.fingerprint(), of)?)
        };
        let kept = self.settings.top_k.map(keep).transpose()?;
        let train_tokens = self.scheduled_tokens(config);
        Ok(Student::new(model, Following { teacher, how, schedule, train_tokens, kept })?)
    }

    fn beside(&self) -> Result<Vec<DecoderConfig>> {
        match self.settings.schedule {
            KdSchedule::None => Ok(Vec::new()),
            _ => Ok(vec![self.teacher.config().decoder()?]),
        }
    }

    fn describe(&self, config: &TrainConfig) -> Vec<String> {
        let Settings { schedule, weight, temperature, from_teacher, init_from, .. } = &self.settings;
        let count = self.teacher.config().parameter_count();
        let start = match init_from {
            Some(dir) => format!("starting from the weights in {}", dir.display()),
            None if *from_teacher => "starting from its weights".into(),
            None => "starting from scratch".into(),
        };
        let mut lines = vec![format!(
            "teacher: {} of {} parameters, {} layers; {start}",
            self.teacher.dir().display(),
            count.total,
            self.teacher.config().num_layers
        )];
        let total = config.total_steps();
        lines.push(match schedule {
            KdSchedule::None => "following it in no step".into(),
            KdSchedule::Full => {
                format!("following it in all {total} steps, weight {weight}, temperature {temperature}")
            }
            KdSchedule::Staged { .. } => {
                let scheduled = self.scheduled_tokens(config);
                let follows = |step: &u64| schedule.follows(step * config.tokens_per_step(), scheduled);
                let steps = (0..total).take_while(follows).count();
                format!(
                    "following it in the first {steps} of {total} steps, weight {weight}, temperature {temperature}"
                )
            }
        });
        if let Some(k) = self.settings.top_k {
            lines.push(format!(
                "from its {k} likeliest entries, {} bytes a token, kept in {}",
                8 * k,
                self.cache.display()
            ));
        }
        lines
    }
}

/// Whether a run's folder has a checkpoint to go on from. What is wrong with one shows when it is read.
fn has_checkpoint(out: &Path) -> bool {
    CheckpointStore::read_only(out, 1).latest().map_or(true, |latest| latest.is_some())
}
