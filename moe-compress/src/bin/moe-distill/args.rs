//! Arguments about teacher and student, and the record of them in the run's folder.

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use moe_compress::{KdSchedule, KeptLayers};
use moe_core::ops::Distillation;
use moe_models::cli::train::STUDENT_RECORD as RECORD;
use moe_models::hf::write_atomically;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// A run that is resumed has its own settings: those that are given again must be the same.
#[derive(Debug, Args)]
#[command(next_help_heading = "Teacher and student")]
pub(crate) struct DistillArgs {
    /// Model folder to learn from. The student has its vocabulary and tokenizer.
    #[arg(long, value_name = "DIR", alias = "load-teacher")]
    pub(crate) teacher: PathBuf,
    /// Share of the teacher's layers that the student does without [default: 0.125]. Flags of routing and losses (--topk, --moe-...) change
    /// this student; flags that name a model or describe its weights say what the student is instead, without a name beginning with the
    /// teacher's shape.
    #[arg(long, value_name = "SHARE")]
    drop_depth: Option<f64>,
    /// Which layers are kept, of dense ones and of those with experts each [default: evenly].
    #[arg(long, value_enum)]
    keep_layers: Option<KeptArg>,
    /// Where the student's weights come from [default: scratch].
    #[arg(long, value_enum)]
    init: Option<InitArg>,
    /// How long the student follows the teacher: for the first part of training (the paper's Mixture-of-Students), all of it, or
    /// not at all [default: staged].
    #[arg(long, value_enum)]
    kd: Option<KdArg>,
    /// Share of the training tokens after which a staged student learns from text alone [default: 0.7].
    #[arg(long, value_name = "SHARE")]
    kd_stop: Option<f64>,
    /// What the divergence from the teacher counts beside the cross-entropy [default: 1].
    #[arg(long, value_name = "ALPHA", alias = "kd-beta-ce")]
    kd_weight: Option<f64>,
    /// What logits are divided by before they are compared [default: 1].
    #[arg(long, value_name = "T")]
    kd_temp: Option<f64>,
    /// Learn from so many of the teacher's likeliest entries of each token alone, and keep them on disk (8 bytes each), where runs
    /// that see the same sequences find them. For a run of one rank.
    #[arg(long, value_name = "K")]
    kd_top_k: Option<usize>,
    /// Folder for them, which runs may share [default: teacher-targets in --out].
    #[arg(long, value_name = "DIR")]
    kd_cache: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KeptArg {
    /// Evenly spaced, the first and the last among them.
    Evenly,
    /// The first ones.
    First,
    /// The last ones.
    Last,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum InitArg {
    /// Drawn anew, as the paper's.
    Scratch,
    /// The teacher's, of the layers that are kept.
    Teacher,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum KdArg {
    Staged,
    Full,
    None,
}

/// What a run was started with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Settings {
    /// Over the teacher's configuration and weights.
    pub(crate) teacher: String,
    /// `None`: the model flags said what the student is.
    pub(crate) drop_depth: Option<f64>,
    pub(crate) keep_layers: KeptLayers,
    pub(crate) from_teacher: bool,
    /// The folder of other weights that it began with. It may have gone since.
    #[serde(default)]
    pub(crate) init_from: Option<PathBuf>,
    pub(crate) schedule: KdSchedule,
    /// What the schedule's share is of; `None` before a run has begun.
    #[serde(default)]
    pub(crate) train_tokens: Option<u64>,
    pub(crate) weight: f64,
    pub(crate) temperature: f64,
    /// Entries of the teacher that count; `None`: all.
    pub(crate) top_k: Option<usize>,
    /// Where those are kept, if not beside the run. Another place changes nothing but the time it takes.
    #[serde(default)]
    pub(crate) cache: Option<PathBuf>,
}

impl Settings {
    pub(crate) fn how(&self) -> Distillation {
        Distillation { weight: self.weight, temperature: self.temperature }
    }

    /// Those of the run in `out`, if it has any.
    pub(crate) fn read(out: &Path) -> Result<Option<Self>> {
        let path = out.join(RECORD);
        match std::fs::read(&path) {
            Ok(json) => {
                Ok(Some(serde_json::from_slice(&json).with_context(|| format!("{} is damaged", path.display()))?))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    pub(crate) fn write(&self, out: &Path) -> Result<()> {
        let json = serde_json::to_string_pretty(self)?;
        Ok(write_atomically(&out.join(RECORD), |file| file.write_all(json.as_bytes()))?)
    }

    /// Refuses to go on with a run that was started with others.
    pub(crate) fn check_continues(&self, out: &Path) -> Result<()> {
        let Some(saved) = Self::read(out)? else {
            bail!("{} holds a run that has no teacher ({RECORD} is missing); resume it with moe-train", out.display());
        };
        let differs = self.differs(&saved);
        ensure!(
            differs.is_empty(),
            "the run in {} was started with another teacher or other settings; give the same, or start a new run\n{}",
            out.display(),
            differs.join("\n")
        );
        Ok(())
    }

    /// What is asked for and was not what a run was started with, by the flags.
    fn differs(&self, saved: &Self) -> Vec<String> {
        let mut differs = Vec::new();
        let mut compare = |flag: &str, asked: String, saved: String| {
            if asked != saved {
                differs.push(format!("{flag}: asked for {asked}, started with {saved}"));
            }
        };
        compare("--teacher (over its weights)", self.teacher.clone(), saved.teacher.clone());
        compare("--drop-depth", told(self.drop_depth), told(saved.drop_depth));
        compare("--keep-layers", format!("{:?}", self.keep_layers), format!("{:?}", saved.keep_layers));
        compare("--init teacher", self.from_teacher.to_string(), saved.from_teacher.to_string());
        compare("--kd, --kd-stop", format!("{:?}", self.schedule), format!("{:?}", saved.schedule));
        compare("--kd-weight", self.weight.to_string(), saved.weight.to_string());
        compare("--kd-temp", self.temperature.to_string(), saved.temperature.to_string());
        compare("--kd-top-k", told(self.top_k), told(saved.top_k));
        differs
    }
}

/// A value that may be none, in words.
fn told(value: Option<impl ToString>) -> String {
    value.map_or("none".into(), |value| value.to_string())
}

/// What the model flags say of the student.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Described<'a> {
    /// What it is, in the place of the teacher without some layers.
    pub(crate) whole: bool,
    /// Where its weights come from.
    pub(crate) init_from: Option<&'a Path>,
}

impl DistillArgs {
    /// The settings asked for, or else those of the run that is resumed, or else the defaults.
    pub(crate) fn settings(
        &self,
        fingerprint: &str,
        student: Described<'_>,
        resumed: Option<&Settings>,
    ) -> Result<Settings> {
        for (flag, given) in
            [("--drop-depth", self.drop_depth.is_some()), ("--keep-layers", self.keep_layers.is_some())]
        {
            ensure!(
                !(given && student.whole),
                "{flag} is for a student that is its teacher without some layers; drop it, or the flags that name a model or describe its \
                 weights"
            );
        }
        ensure!(
            self.init.is_none() || student.init_from.is_none(),
            "--init and --init-from both say where the student's weights come from; drop one of them"
        );
        let base = resumed.cloned().unwrap_or_else(|| Settings {
            teacher: fingerprint.to_owned(),
            drop_depth: (!student.whole).then_some(0.125),
            keep_layers: KeptLayers::Evenly,
            from_teacher: false,
            init_from: None,
            schedule: KdSchedule::STAGED,
            train_tokens: None,
            weight: Distillation::default().weight,
            temperature: Distillation::default().temperature,
            top_k: None,
            cache: None,
        });
        let cache = self.kd_cache.as_deref().map(std::path::absolute).transpose().context("reading --kd-cache")?;
        let settings = Settings {
            teacher: fingerprint.to_owned(),
            drop_depth: if student.whole { None } else { self.drop_depth.or(base.drop_depth) },
            keep_layers: self.keep_layers.map_or(base.keep_layers, |kept| match kept {
                KeptArg::Evenly => KeptLayers::Evenly,
                KeptArg::First => KeptLayers::First,
                KeptArg::Last => KeptLayers::Last,
            }),
            from_teacher: self.init.map_or(base.from_teacher, |init| init == InitArg::Teacher),
            init_from: student.init_from.map(Path::to_owned).or(base.init_from),
            schedule: self.schedule(base.schedule)?,
            train_tokens: base.train_tokens,
            weight: self.kd_weight.unwrap_or(base.weight),
            temperature: self.kd_temp.unwrap_or(base.temperature),
            top_k: self.kd_top_k.or(base.top_k),
            cache: cache.or(base.cache),
        };
        ensure!(
            self.kd_cache.is_none() || settings.top_k.is_some(),
            "--kd-cache is for entries of the teacher that are kept; give --kd-top-k too, or drop it"
        );
        ensure!(
            !settings.from_teacher || settings.drop_depth.is_some(),
            "--init teacher is for a student that keeps layers of its teacher; drop the flags that describe a model"
        );
        settings.schedule.validate().context("--kd-stop")?;
        Distillation { temperature: 1.0, ..settings.how() }.validate().context("--kd-weight")?;
        settings.how().validate().context("--kd-temp")?;
        let unused = [
            ("--kd-weight", self.kd_weight.is_some()),
            ("--kd-temp", self.kd_temp.is_some()),
            ("--kd-top-k", self.kd_top_k.is_some()),
        ];
        if let (KdSchedule::None, Some((flag, _))) = (settings.schedule, unused.iter().find(|(_, given)| *given)) {
            bail!("{flag} has no effect on a student that does not follow its teacher; drop it, or --kd none");
        }
        Ok(settings)
    }

    fn schedule(&self, base: KdSchedule) -> Result<KdSchedule> {
        let stop = |default: f64| self.kd_stop.unwrap_or(default);
        match (self.kd, base) {
            (Some(KdArg::Full | KdArg::None), _) | (None, KdSchedule::Full | KdSchedule::None)
                if self.kd_stop.is_some() =>
            {
                bail!("--kd-stop is the end of the staged schedule; give --kd staged, or drop --kd-stop")
            }
            (Some(KdArg::Full), _) => Ok(KdSchedule::Full),
            (Some(KdArg::None), _) => Ok(KdSchedule::None),
            (Some(KdArg::Staged) | None, KdSchedule::Staged { stop: of_run }) => {
                Ok(KdSchedule::Staged { stop: stop(of_run) })
            }
            (Some(KdArg::Staged), _) => Ok(KdSchedule::Staged { stop: stop(KdSchedule::STOP) }),
            (None, other) => Ok(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Program {
        #[command(flatten)]
        distill: DistillArgs,
    }

    fn settings(words: &[&str]) -> Settings {
        resumed(words, None)
    }

    fn resumed(words: &[&str], run: Option<&Settings>) -> Settings {
        let program = Program::parse_from([&["moe-distill", "--teacher", "t"], words].concat());
        program.distill.settings("fingerprint", Described::default(), run).unwrap()
    }

    #[test]
    fn what_is_not_said_again_is_the_runs_own() {
        let run = settings(&["--kd-stop", "0.5", "--kd-temp", "2"]);
        for words in [&[][..], &["--kd", "staged"], &["--kd-temp", "2", "--kd-stop", "0.5"]] {
            assert_eq!(resumed(words, Some(&run)), run, "{words:?}");
        }
        let full = settings(&["--kd", "full"]);
        assert_eq!(resumed(&["--kd", "staged"], Some(&full)).schedule, KdSchedule::STAGED);
    }

    /// As ranks do that begin again without one that has died: they have read no record.
    #[test]
    fn a_process_goes_on_with_the_run_that_it_began() {
        let dir = tempfile::tempdir().unwrap();
        let own = settings(&[]);
        assert!(own.check_continues(dir.path()).unwrap_err().to_string().contains("moe-train"));
        Settings { train_tokens: Some(1000), ..own.clone() }.write(dir.path()).unwrap();
        own.check_continues(dir.path()).unwrap();
        let other = settings(&["--kd", "full"]);
        let text = other.check_continues(dir.path()).unwrap_err().to_string();
        assert!(text.contains("other settings") && text.contains("--kd, --kd-stop: asked for Full"), "{text}");
        assert!(!text.contains("--kd-temp"), "{text}");
    }
}
