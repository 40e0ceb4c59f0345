//! [`Experiment`]: what is run, from a file; [`Job`]: one run of it with one seed.

use super::claims::Claim;
use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::path::Path;

/// A question, and the runs that answer it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Experiment {
    /// The file's name without its ending.
    #[serde(skip)]
    pub(super) id: String,
    pub(super) title: String,
    /// What the paper says.
    pub(super) published: String,
    /// How our setup differs.
    pub(super) differences: String,
    seeds: Vec<u64>,
    train_tokens: u64,
    /// Share of a run's tokens in which the learning rate rises.
    warmup_share: f64,
    /// Of every run.
    flags: Vec<String>,
    pub(super) run: Vec<Run>,
    /// Runs compared seed by seed, the first minus the second: of this experiment, or of another (`experiment/run`).
    #[serde(default)]
    pub(super) pairs: Vec<[String; 2]>,
    /// The run whose model these runs were cut from: the report then tells how much of what the cut has cost they win back.
    pub(super) recovery_of: Option<String>,
    /// Losses, of which the report tells what it takes to come to them.
    #[serde(default)]
    pub(super) reach: Vec<Reach>,
    /// What is said of it.
    #[serde(default)]
    pub(super) claim: Vec<Claim>,
}

/// A loss, and the runs that show what it takes to come to it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Reach {
    pub(super) title: String,
    /// What the paper has saved.
    pub(super) published: String,
    /// The run whose last loss it is.
    pub(super) goal: String,
    /// Runs of one model on several numbers of tokens.
    pub(super) by: Vec<String>,
}

/// A model and how it is trained.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Run {
    pub(super) name: String,
    #[serde(default)]
    flags: Vec<String>,
    /// Instead of the experiment's.
    train_tokens: Option<u64>,
    /// The same.
    seeds: Option<Vec<u64>>,
    /// The run of this experiment or of another (`experiment/run`) whose model of the same seed is the teacher.
    pub(super) teacher: Option<String>,
    /// The same for the model that is trained further.
    pub(super) made_of: Option<String>,
    /// What `moe-compress` is told beside folders, to make another of that model first; nothing: it is trained as it is.
    #[serde(default)]
    made_by: Vec<String>,
    /// About how long it takes, one thread.
    pub(super) minutes: f64,
}

/// One run with one seed.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Job {
    pub(super) experiment: String,
    pub(super) run: String,
    pub(super) seed: u64,
    pub(super) train_tokens: u64,
    pub(super) flags: Vec<String>,
    /// Of its teacher: experiment and run.
    pub(super) teacher: Option<(String, String)>,
    pub(super) made_of: Option<(String, String)>,
    pub(super) made_by: Vec<String>,
    pub(super) minutes: f64,
}

/// Tokens and evaluations of a run that only shows that all is well.
const SMOKE_TOKENS: u64 = 8 * 2048;

impl Experiment {
    /// Those named, or all, in the order of their names.
    pub(super) fn read_all(folder: &Path, names: &[String], smoke: bool) -> Result<Vec<Self>> {
        let mut ids: Vec<String> = std::fs::read_dir(folder)
            .with_context(|| format!("cannot read {}", folder.display()))?
            .flatten()
            .filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".toml")?.to_owned()))
            .collect();
        ids.sort();
        if let Some(unknown) = names.iter().find(|name| !ids.contains(name)) {
            bail!("no experiment {unknown:?}; there are {}", ids.join(", "));
        }
        ids.retain(|id| names.is_empty() || names.contains(id));
        let read = |id: String| {
            let path = folder.join(format!("{id}.toml"));
            let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
            Self::parse(&text, id, smoke).with_context(|| format!("{}", path.display()))
        };
        ids.into_iter().map(read).collect()
    }

    pub(super) fn parse(text: &str, id: String, smoke: bool) -> Result<Self> {
        let mut own = Self { id, ..toml::from_str(text)? };
        if smoke {
            own.seeds.truncate(1);
            own.train_tokens = SMOKE_TOKENS;
            own.run.iter_mut().for_each(|run| (run.train_tokens, run.seeds) = (None, None));
        }
        ensure!(own.run.iter().all(|run| !own.seeds_of(run).is_empty()), "seeds is empty");
        let sources = own.run.iter().flat_map(|run| [&run.teacher, &run.made_of]).flatten();
        let unknown = own.compared().chain(sources).find(|name| own.place_of(name).is_none());
        ensure!(unknown.is_none(), "{unknown:?} is no run; a run of another experiment is called experiment/run");
        own.claim.iter().try_for_each(|claim| claim.check(&own))?;
        Ok(own)
    }

    /// The runs that the report compares.
    fn compared(&self) -> impl Iterator<Item = &String> {
        let reach = self.reach.iter().flat_map(|reach| std::iter::once(&reach.goal).chain(&reach.by));
        let claimed = self.claim.iter().flat_map(Claim::runs);
        self.pairs.iter().flatten().chain(&self.recovery_of).chain(reach).chain(claimed)
    }

    /// The experiments whose records the report sets side by side: this one's, and others'.
    pub(super) fn beside(&self) -> BTreeSet<String> {
        let others = self.compared().filter_map(|name| Some(self.place_of(name)?.0));
        others.chain([self.id.clone()]).collect()
    }

    /// Experiment and run that a name stands for: a run of this experiment, else `experiment/run`.
    pub(super) fn place_of(&self, name: &str) -> Option<(String, String)> {
        if self.run.iter().any(|run| run.name == name) {
            return Some((self.id.clone(), name.to_owned()));
        }
        let (experiment, run) = name.split_once('/')?;
        (experiment != self.id).then(|| (experiment.to_owned(), run.to_owned()))
    }

    /// Seed by seed, so that pairs are complete early.
    pub(super) fn jobs(&self) -> Vec<Job> {
        let of = |name: &Option<String>| name.as_ref().and_then(|name| self.place_of(name));
        let job = |run: &Run, seed: u64| {
            let train_tokens = run.train_tokens.unwrap_or(self.train_tokens);
            let warmup = ["--lr-warmup-tokens".to_owned(), format!("{:.0}", self.warmup_share * train_tokens as f64)];
            Job {
                experiment: self.id.clone(),
                run: run.name.clone(),
                seed,
                train_tokens,
                flags: self.flags.iter().chain(&run.flags).cloned().chain(warmup).collect(),
                teacher: of(&run.teacher),
                made_of: of(&run.made_of),
                made_by: run.made_by.clone(),
                minutes: run.minutes,
            }
        };
        let mut seeds: Vec<u64> = self.run.iter().flat_map(|run| self.seeds_of(run)).copied().collect();
        seeds.sort_unstable();
        seeds.dedup();
        let of_seed =
            |seed| self.run.iter().filter(move |run| self.seeds_of(run).contains(&seed)).map(move |run| job(run, seed));
        seeds.into_iter().flat_map(of_seed).collect()
    }

    fn seeds_of<'a>(&'a self, run: &'a Run) -> &'a [u64] {
        run.seeds.as_ref().unwrap_or(&self.seeds)
    }
}

impl Job {
    /// Names its folders and files.
    pub(super) fn name(&self) -> String {
        file_name(&self.run, self.seed)
    }

    /// The runs it needs the models of.
    pub(super) fn needs(&self) -> impl Iterator<Item = &(String, String)> {
        self.teacher.iter().chain(&self.made_of)
    }
}

pub(super) fn file_name(run: &str, seed: u64) -> String {
    format!("{}-seed{seed}", run.replace(['/', ' ', ',', '%'], "-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"
        title = "t"
        published = "p"
        differences = "d"
        seeds = [1, 2]
        train_tokens = 100
        warmup_share = 0.1
        flags = ["--a"]
        pairs = [["two", "one"]]
        recovery_of = "one"
        [[run]]
        name = "one"
        minutes = 1.0
        [[run]]
        name = "two"
        flags = ["--b"]
        teacher = "one"
        made_of = "other/three 1/2"
        train_tokens = 50
        seeds = [2, 3]
        minutes = 2.0
        [[reach]]
        title = "r"
        published = "5"
        goal = "one"
        by = ["two"]
        [[claim]]
        says = "better"
        published = "5"
        lower = ["one", "two"]
        [[claim]]
        says = "cheaper"
        published = "5"
        saves = { reach = "r", times = 5.0 }
    "#;

    #[test]
    fn a_file_becomes_jobs() {
        let jobs = Experiment::parse(TEXT, "x".into(), false).unwrap().jobs();
        let names: Vec<String> = jobs.iter().map(Job::name).collect();
        assert_eq!(names, ["one-seed1", "one-seed2", "two-seed2", "two-seed3"]);
        assert_eq!((jobs[2].flags.join(" ").as_str(), jobs[2].train_tokens), ("--a --b --lr-warmup-tokens 5", 50));
        let needs: Vec<_> = jobs[2].needs().cloned().collect();
        assert_eq!(needs, [("x".into(), "one".into()), ("other".into(), "three 1/2".into())]);
        assert_eq!(file_name("three 1/2", 3), "three-1-2-seed3");
        let smoke = Experiment::parse(TEXT, "x".into(), true).unwrap().jobs();
        assert_eq!(smoke.iter().map(|job| job.train_tokens).collect::<Vec<_>>(), [SMOKE_TOKENS; 2]);
    }

    #[test]
    fn files_that_contradict_themselves_are_refused() {
        for (from, to) in [
            ("\"two\", \"one\"", "\"two\", \"none\""),
            ("teacher = \"one\"", "teacher = \"none\""),
            ("recovery_of = \"one\"", "recovery_of = \"none\""),
            ("goal = \"one\"", "goal = \"none\""),
            ("by = [\"two\"]", "by = [\"two\", \"none\"]"),
            ("[1, 2]", "[]"),
            ("lower = [\"one\"", "lower = [\"none\""),
            ("reach = \"r\"", "reach = \"none\""),
            ("saves = {", "wastes = {"),
        ] {
            let text = TEXT.replace(from, to);
            assert!(text != TEXT && Experiment::parse(&text, "x".into(), false).is_err(), "{to}");
        }
    }

    /// The files of the repository.
    #[test]
    fn all_experiments_can_be_read() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("repro/quality");
        let all = Experiment::read_all(&folder, &[], false).unwrap();
        let jobs: Vec<Job> = all.iter().flat_map(Experiment::jobs).collect();
        let mut files: Vec<(String, String)> = jobs.iter().map(|job| (job.experiment.clone(), job.name())).collect();
        files.sort();
        files.dedup();
        assert_eq!(files.len(), jobs.len(), "two runs have one name");
        let is = |job: &Job, (experiment, run): &(String, String)| job.experiment == *experiment && job.run == *run;
        for named in all.iter().flat_map(|e| e.compared().filter_map(|name| e.place_of(name))) {
            assert!(jobs.iter().any(|job| is(job, &named)), "{named:?}");
        }
        for (job, needed) in jobs.iter().flat_map(|job| job.needs().map(move |needed| (job, needed))) {
            assert!(
                jobs.iter().any(|other| is(other, needed) && other.seed == job.seed),
                "{needed:?} of seed {}",
                job.seed
            );
        }
    }
}
