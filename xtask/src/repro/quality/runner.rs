//! Runs what is missing: a few runs of one thread side by side, each once the models it needs are there.

use super::experiment::{Job, file_name};
use super::found::{read_all, shown};
use super::record::Record;
use crate::shell::{self, cargo, root};
use anyhow::{Context, Result, bail, ensure};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Where runs and their records lie.
pub(super) struct Place {
    pub(super) runs: PathBuf,
    pub(super) records: PathBuf,
}

/// What is trained and validated on.
pub(super) struct Text {
    pub(super) data: Vec<String>,
    pub(super) valid: Vec<String>,
}

impl Text {
    /// Names of sources and their sizes, without the folders they lie in; none for the excerpt in the repository.
    ///
    /// # Errors
    /// If a source cannot be read.
    pub(super) fn described(&self) -> Result<Vec<String>> {
        let of = |what: &'static str, sources: &[String]| {
            let describe = move |source: &String| {
                let (path, weight) = split_weight(source);
                let bytes = bytes_of(path).with_context(|| format!("cannot read {source}"))?;
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                let weight = weight.map_or(String::new(), |weight| format!(" of weight {weight}"));
                Ok(format!("{what}{name}, {bytes} bytes{weight}"))
            };
            sources.iter().map(describe).collect::<Result<Vec<_>>>()
        };
        Ok([of("", &self.data)?, of("validated on ", &self.valid)?].concat())
    }
}

/// The path and the weight of a source as `moe-train --data` takes it: `PATH` or `PATH=WEIGHT`.
fn split_weight(source: &str) -> (&Path, Option<&str>) {
    match source.rsplit_once('=') {
        Some((path, weight)) if weight.parse::<f64>().is_ok() => (Path::new(path), Some(weight)),
        _ => (Path::new(source), None),
    }
}

/// Of a file, or of all files in a folder.
fn bytes_of(path: &Path) -> std::io::Result<u64> {
    if !path.is_dir() {
        return Ok(path.metadata()?.len());
    }
    std::fs::read_dir(path)?.map(|entry| bytes_of(&entry?.path())).sum()
}

impl Place {
    /// Refuses to put records of this text beside others of these experiments that were made of another.
    ///
    /// # Errors
    /// Naming both texts.
    pub(super) fn check_text<'a>(&self, experiments: impl Iterator<Item = &'a String>, text: &[String]) -> Result<()> {
        for record in experiments.map(|id| read_all(&self.records, id)).collect::<Result<Vec<_>>>()?.iter().flatten() {
            ensure!(
                record.data == text,
                "{} in {} was trained on {}, these runs would be on {}: give the same --data and --valid, or another --records",
                record.name(),
                self.records.display(),
                shown(&record.data),
                shown(text)
            );
        }
        Ok(())
    }

    /// Refuses to take records for runs that are trained in another way by now.
    ///
    /// # Errors
    /// Naming the record.
    pub(super) fn check_runs(&self, jobs: &[Job]) -> Result<()> {
        for job in jobs.iter().filter(|job| self.is_done(job)) {
            let path = Record::path(&self.records, &job.experiment, &job.name());
            let record = Record::read(&path)?;
            ensure!(
                record.flags == job.flags && record.train_tokens == job.train_tokens,
                "{} was made with other flags than its experiment has now: remove it, or set them back",
                path.display()
            );
        }
        Ok(())
    }

    /// Notes what the models in the folder of runs are trained on, or refuses another text than they were: they are teachers, and
    /// what others start from.
    ///
    /// # Errors
    /// Naming both texts.
    pub(super) fn keep_text(&self, text: &[String]) -> Result<()> {
        let path = self.runs.join("text.json");
        if path.exists() {
            let noted: Vec<String> = serde_json::from_slice(&std::fs::read(&path)?)
                .with_context(|| format!("{} is damaged", path.display()))?;
            ensure!(
                noted == text,
                "models in {} were trained on {}, these runs would be on {}: give the same --data and --valid, or another --out",
                self.runs.display(),
                shown(&noted),
                shown(text)
            );
            return Ok(());
        }
        std::fs::create_dir_all(&self.runs).with_context(|| format!("cannot make {}", self.runs.display()))?;
        let unfinished = path.with_extension("unfinished");
        std::fs::write(&unfinished, serde_json::to_string(text)?)?;
        Ok(std::fs::rename(unfinished, path)?)
    }

    fn folder(&self, experiment: &str, name: &str) -> PathBuf {
        self.runs.join(experiment).join(name)
    }

    /// The model that a run has ended with.
    fn model(&self, experiment: &str, name: &str) -> PathBuf {
        self.folder(experiment, name).join("model")
    }

    pub(super) fn is_done(&self, job: &Job) -> bool {
        Record::path(&self.records, &job.experiment, &job.name()).exists()
    }

    fn needed(&self, job: &Job) -> impl Iterator<Item = (String, String)> {
        job.needs().map(|(experiment, run)| (experiment.clone(), file_name(run, job.seed)))
    }

    /// Of a run whose own model must be there for another: it may be gone although the record is not.
    fn is_missing_for_others(&self, job: &Job, jobs: &[Job]) -> bool {
        let own = (job.experiment.clone(), job.name());
        let waits = |other: &Job| !self.is_done(other) && self.needed(other).any(|needed| needed == own);
        !self.model(&own.0, &own.1).exists() && jobs.iter().any(waits)
    }

    /// The runs to do, in their order.
    pub(super) fn missing<'a>(&self, jobs: &'a [Job]) -> Vec<&'a Job> {
        jobs.iter().filter(|job| !self.is_done(job) || self.is_missing_for_others(job, jobs)).collect()
    }
}

/// A run under way.
struct Running<'a> {
    job: &'a Job,
    process: Child,
    folder: PathBuf,
    /// What it took of a processor before this start, in seconds: it may have been cut off.
    before: f64,
    noted: Instant,
}

/// How often it is noted what a run has taken.
const NOTED_EVERY: Duration = Duration::from_secs(5);

impl<'a> Running<'a> {
    fn start(job: &'a Job, place: &Place, text: &Text) -> Result<Self> {
        let folder = place.folder(&job.experiment, &job.name());
        let process = start(job, place, text)?;
        let before = match std::fs::read_to_string(folder.join(SECONDS)) {
            Ok(text) => {
                text.trim().parse().with_context(|| format!("{SECONDS} in {} is no number", folder.display()))?
            }
            Err(_) => 0.0,
        };
        Ok(Self { job, process, folder, before, noted: Instant::now() })
    }

    /// Processor time of the run in seconds. `None` once it has ended.
    fn seconds(&self) -> Option<f64> {
        // User and system time are 11 and 12 fields after the program's name.
        Some(self.before + seconds_of(&self.process.id().to_string(), 11).ok()?)
    }

    /// Writes down what it has taken so far, now and then.
    fn note(&mut self) -> Result<()> {
        if self.noted.elapsed() >= NOTED_EVERY
            && let Some(seconds) = self.seconds()
        {
            let unfinished = self.folder.join(format!("{SECONDS}.unfinished"));
            std::fs::write(&unfinished, seconds.to_string())?;
            std::fs::rename(unfinished, self.folder.join(SECONDS))?;
            self.noted = Instant::now();
        }
        Ok(())
    }
}

/// The file in a run's folder that says how many seconds of a processor it has taken.
const SECONDS: &str = "seconds";

/// Runs what is missing, until nothing is or no run would be over in time.
pub(super) fn run_all(
    jobs: &[Job],
    place: &Place,
    text: &Text,
    side_by_side: usize,
    until: Option<Instant>,
) -> Result<()> {
    for (package, bins) in [("moe-models", &["moe-train"][..]), ("moe-compress", &["moe-distill", "moe-compress"])] {
        let bins = bins.iter().flat_map(|bin| ["--bin", bin]);
        shell::run(cargo(&["build", "--release", "--package", package]).args(bins))?;
    }
    let (mut running, mut failed): (Vec<Running<'_>>, Vec<String>) = (Vec::new(), Vec::new());
    loop {
        while running.len() < side_by_side {
            let Some(job) = next(jobs, place, &running, &failed, until) else { break };
            eprintln!("{}/{}: about {:.0} minutes", job.experiment, job.name(), job.minutes);
            match Running::start(job, place, text) {
                Ok(run) => running.push(run),
                Err(error) => {
                    eprintln!("{}: {error:#}", full_name(job));
                    failed.push(full_name(job));
                }
            }
        }
        if running.is_empty() {
            break;
        }
        sleep(Duration::from_millis(100));
        let mut still = Vec::new();
        for mut run in running {
            let before = seconds_of_children()?;
            match run.process.try_wait()? {
                None => {
                    run.note()?;
                    still.push(run);
                }
                Some(status) => {
                    let minutes = (run.before + seconds_of_children()? - before) / 60.0;
                    let end = if status.success() {
                        finish(run.job, place, text, minutes)
                    } else {
                        Err(anyhow::anyhow!("it failed"))
                    };
                    if let Err(error) = end {
                        eprintln!(
                            "{}/{}: {error:#}; see {}",
                            run.job.experiment,
                            run.job.name(),
                            run.folder.join("log").display()
                        );
                        failed.push(full_name(run.job));
                    }
                }
            }
        }
        running = still;
    }
    ensure!(failed.is_empty(), "these runs failed: {}", failed.join(", "));
    Ok(())
}

fn full_name(job: &Job) -> String {
    format!("{}/{}", job.experiment, job.name())
}

/// Processor time of the children that have been waited for: unlike the clock's, what a run took of it does not depend on what
/// else the machine did.
fn seconds_of_children() -> Result<f64> {
    // User and system time of children are 13 and 14 fields after the program's name.
    seconds_of("self", 13)
}

/// Processor time in two neighbouring fields of what the system says of a process, so many after its name.
fn seconds_of(process: &str, field: usize) -> Result<f64> {
    /// Of Linux, for every processor it runs on.
    const TICKS_PER_SECOND: f64 = 100.0;
    let path = format!("/proc/{process}/stat");
    let stat = std::fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    // The name, in parentheses, may hold anything.
    let (_, fields) = stat.rsplit_once(')').with_context(|| format!("{path} names no program"))?;
    let ticks = fields.split_whitespace().skip(field).take(2).map(str::parse::<f64>).sum::<Result<f64, _>>()?;
    Ok(ticks / TICKS_PER_SECOND)
}

/// The next run that can begin.
fn next<'a>(
    jobs: &'a [Job],
    place: &Place,
    running: &[Running<'_>],
    failed: &[String],
    until: Option<Instant>,
) -> Option<&'a Job> {
    let in_time =
        |job: &Job| until.is_none_or(|until| Instant::now() + Duration::from_secs_f64(job.minutes * 60.0) <= until);
    let is_ready = |job: &Job| place.needed(job).all(|(experiment, name)| place.model(&experiment, &name).exists());
    let is_free = |job: &Job| !running.iter().any(|run| run.job == job) && !failed.contains(&full_name(job));
    place.missing(jobs).into_iter().find(|job| is_free(job) && is_ready(job) && in_time(job))
}

/// Begins a run, or goes on with one that was cut.
fn start(job: &Job, place: &Place, text: &Text) -> Result<Child> {
    let folder = place.folder(&job.experiment, &job.name());
    std::fs::create_dir_all(&folder)?;
    let model_of = |(experiment, run): &(String, String)| place.model(experiment, &file_name(run, job.seed));
    let log = std::fs::File::create(folder.join("log"))?;
    let mut command = Command::new(program(if job.teacher.is_some() { "moe-distill" } else { "moe-train" }));
    if let Some(teacher) = &job.teacher {
        command.arg("--teacher").arg(model_of(teacher));
    }
    if let Some(source) = &job.made_of {
        let (source, made) = (model_of(source), folder.join("made"));
        let unchanged = job.made_by.is_empty();
        // One that a run has not begun with may be of other arguments.
        if made.exists() && !folder.join("latest").exists() {
            std::fs::remove_dir_all(&made)?;
        }
        if !unchanged && !made.exists() {
            make(job, &source, &made, text)?;
        }
        command.arg("--init-from").arg(if unchanged { source } else { made });
    }
    command.args(&job.flags);
    for (flag, sources) in [("--data", &text.data), ("--valid", &text.valid)] {
        sources.iter().for_each(|source| {
            command.args([flag, source]);
        });
    }
    command.args(["--train-tokens", &job.train_tokens.to_string(), "--seed", &job.seed.to_string(), "--resume"]);
    command.arg("--out").arg(&folder).arg("--data-cache").arg(place.runs.join("data-cache"));
    command.arg("--export").arg(folder.join("model")).args(["--export-dtype", "f32"]);
    // A model that was left by a run whose record was not written is made again.
    if folder.join("model").exists() {
        std::fs::remove_dir_all(folder.join("model"))?;
    }
    command.env("RAYON_NUM_THREADS", "1").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    command.spawn().with_context(|| format!("cannot start {}", shell::shown(&command)))
}

/// The model that a run starts from.
fn make(job: &Job, from: &Path, to: &Path, text: &Text) -> Result<()> {
    let mut command = Command::new(program("moe-compress"));
    command.args(&job.made_by).arg("--model").arg(from).arg("--out").arg(to).args(["--dtype", "f32"]);
    if job.made_by.first().is_some_and(|what| what != "upcycle") {
        text.data.iter().for_each(|source| {
            command.arg("--data").arg(split_weight(source).0);
        });
    }
    let output = command.stdin(Stdio::null()).output()?;
    if !output.status.success() {
        bail!("{} failed: {}", shell::shown(&command), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn program(name: &str) -> PathBuf {
    root().join("target/release").join(name)
}

/// Keeps what a run has found; its checkpoints go.
fn finish(job: &Job, place: &Place, text: &Text, minutes: f64) -> Result<()> {
    let folder = place.folder(&job.experiment, &job.name());
    let record = Record::of_run(job, &folder, &text.described()?, minutes)?;
    if !place.is_done(job) {
        record.write(&Record::path(&place.records, &job.experiment, &job.name()))?;
    }
    for entry in std::fs::read_dir(&folder)?.flatten() {
        if entry.file_name().to_string_lossy().starts_with("step-") {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    if folder.join("made").exists() {
        std::fs::remove_dir_all(folder.join("made"))?;
    }
    let seconds = folder.join(SECONDS);
    if seconds.exists() {
        std::fs::remove_file(seconds)?;
    }
    eprintln!("{}: {:.4} bits per byte, {minutes:.1} minutes", full_name(job), record.last());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repro::quality::record::tests::record;

    #[test]
    fn sources_may_have_weights() {
        assert_eq!(split_weight("a=b/c.txt=0.5"), (Path::new("a=b/c.txt"), Some("0.5")));
        assert_eq!(split_weight("a=b/c.txt"), (Path::new("a=b/c.txt"), None));
    }

    #[test]
    fn records_of_another_training_are_refused() {
        let records = std::env::temp_dir().join(format!("repro-runs-{}", std::process::id()));
        let job = Job {
            experiment: "x".into(),
            run: "r".into(),
            seed: 1,
            train_tokens: 8,
            flags: vec!["--lr".into(), "1".into()],
            teacher: None,
            made_of: None,
            made_by: Vec::new(),
            minutes: 1.0,
        };
        let place = Place { runs: records.clone(), records };
        place.check_runs(std::slice::from_ref(&job)).unwrap();
        let own = Record { flags: job.flags.clone(), ..record(&[(8, 2.0)]) };
        own.write(&Record::path(&place.records, "x", &job.name())).unwrap();
        place.check_runs(std::slice::from_ref(&job)).unwrap();
        for changed in [Job { train_tokens: 16, ..job.clone() }, Job { flags: vec!["--lr".into(), "2".into()], ..job }]
        {
            let text = place.check_runs(&[changed]).unwrap_err().to_string();
            assert!(text.contains("r-seed1.json was made with other flags"), "{text}");
        }
        std::fs::remove_dir_all(&place.records).unwrap();
    }

    #[test]
    fn processor_time_is_that_of_the_process() {
        let own = || seconds_of(&std::process::id().to_string(), 11).unwrap();
        let (before, begun) = (own(), Instant::now());
        let mut word = 1u64;
        while own() < before + 0.05 {
            (0..100_000).for_each(|_| word = word.rotate_left(7).wrapping_mul(0x9e37_79b9_7f4a_7c15));
            assert!(begun.elapsed() < Duration::from_secs(60), "no time has passed, {word}");
        }
        assert!(seconds_of("no process", 11).unwrap_err().to_string().contains("/proc/no process/stat"));
    }
}
