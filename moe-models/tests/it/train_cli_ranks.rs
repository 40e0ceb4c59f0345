//! `moe-train` over ranks from outside: threads, processes over TCP, restarts without a rank that was killed or stopped, and what it
//! says to impossible layouts.

use crate::train_cli::{SMALL, folder, moe_train, succeed};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Losses of a run by step.
fn losses(run: &Path) -> BTreeMap<u64, f64> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap_or_default();
    // The last line may be under way.
    let records = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    records.filter_map(|r| Some((r["step"].as_u64()?, r["train/loss"].as_f64()?))).collect()
}

/// Arguments of all runs here: 12 steps of 4 micro-batches, without dropout so that ranks and one rank compare in f32.
fn arguments<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let rest = ["--global-batch-size", "8", "--precision", "f32", "--train-tokens", "1536", "--save-interval", "2"];
    let own = ["--out", out, "--attention-dropout", "0", "--hidden-dropout", "0"];
    let small = SMALL
        .chunks(2)
        .filter(|pair| !["--global-batch-size", "--attention-dropout", "--hidden-dropout"].contains(&pair[0]));
    small.flatten().copied().chain(rest).chain(own).chain(more.iter().copied()).collect()
}

#[track_caller]
fn assert_close(got: &BTreeMap<u64, f64>, want: &BTreeMap<u64, f64>) {
    assert_eq!(want.len(), 12);
    assert!(got.keys().eq(want.keys()), "{got:?}");
    for (step, loss) in got {
        assert!((loss - want[step]).abs() < 1e-4 * want[step], "step {step}: {loss}, want {}", want[step]);
    }
}

/// Started on four threads, resumed with tensor slicing and coordinated rows, ended and exported by one.
#[test]
fn threads_of_any_layout_make_one_run() {
    let dir = folder();
    succeed(&moe_train(dir.path(), &arguments("one", &["--export", "one-model"])).output().unwrap());
    let stations: [&[&str]; 3] = [
        &["--ranks", "4", "--ep", "4", "--exit-interval", "4"],
        &["--ranks", "4", "--tp", "2", "--ep", "2", "--coordination", "tokens", "--exit-interval", "8"],
        &["--export", "many-model"],
    ];
    let mut said = Vec::new();
    for station in stations {
        said.push(succeed(&moe_train(dir.path(), &arguments("many", station)).output().unwrap()));
    }
    assert_close(&losses(&dir.path().join("many")), &losses(&dir.path().join("one")));
    for part in ["4 threads", "dp 4 x tp 1, ep 4", "rank 3:", "experts 1..2 of 2, 3..4 of 4"] {
        assert!(said[0].contains(part), "{part}: {}", said[0]);
    }
    assert!(said[1].contains("dp 2 x tp 2, ep 2") && said[1].contains("resuming from"), "{}", said[1]);
    for file in ["config.json", "tokenizer.json"] {
        let of = |model: &str| std::fs::read(dir.path().join(model).join(file)).unwrap();
        assert_eq!(of("one-model"), of("many-model"), "{file}");
    }
}

/// Processes as torchrun starts them.
struct Job {
    processes: Vec<Child>,
}

impl Job {
    fn start(dir: &Path, ranks: usize, arguments: &[&str]) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let start = |rank: usize| {
            let mut command = moe_train(dir, arguments);
            let numbers = [("RANK", rank), ("WORLD_SIZE", ranks), ("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", ranks)];
            command.envs(numbers.map(|(name, number)| (name, number.to_string())));
            command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
            command.stdout(Stdio::null()).stderr(std::fs::File::create(dir.join(format!("rank-{rank}.log"))).unwrap());
            command.spawn().unwrap()
        };
        Self { processes: (0..ranks).map(start).collect() }
    }

    fn signal(&self, rank: usize, signal: &str) {
        let id = self.processes[rank].id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
    }

    /// Waits until these have ended well.
    #[track_caller]
    fn succeed(&mut self, dir: &Path, ranks: &[usize]) {
        for &rank in ranks {
            let status = self.processes[rank].wait().unwrap();
            let log = || std::fs::read_to_string(dir.join(format!("rank-{rank}.log"))).unwrap();
            assert!(status.success(), "rank {rank}: {status}\n{}", log());
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        for process in &mut self.processes {
            let _ended = process.kill();
            let _known = process.wait();
        }
    }
}

/// Waits until a run has so many steps.
fn wait_for(run: &Path, steps: usize) {
    let begun = Instant::now();
    while losses(run).len() < steps {
        assert!(begun.elapsed() < Duration::from_secs(120), "no step {steps} in {}", run.display());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// One rank is killed, another stopped for good: the run goes on each time, on the ranks that are left, with the same curve.
#[test]
fn processes_go_on_without_ranks_that_die_or_get_stuck() {
    let dir = folder();
    succeed(&moe_train(dir.path(), &arguments("one", &[])).output().unwrap());
    let more = ["--ep", "4", "--comm-timeout", "4", "--max-restarts", "2"];
    let mut job = Job::start(dir.path(), 4, &arguments("many", &more));
    let run = dir.path().join("many");
    wait_for(&run, 3);
    job.signal(2, "-KILL");
    wait_for(&run, 6);
    job.signal(1, "-STOP");
    job.succeed(dir.path(), &[0, 3]);
    assert_close(&losses(&run), &losses(&dir.path().join("one")));
    let log = std::fs::read_to_string(dir.path().join("rank-0.log")).unwrap();
    for part in [
        "torchrun",
        "over TCP",
        "rank 2 has left",
        "restart 1 of 2",
        "another layout is chosen",
        "layout: 3 ranks",
        "resuming from",
    ] {
        assert!(log.contains(part), "{part}:\n{log}");
    }
    // It wakes up, and is told that it was given up.
    job.signal(1, "-CONT");
    let status = job.processes[1].wait().unwrap();
    assert!(!status.success());
}

/// Without restarts every rank ends with the same words, and the checkpoint is whole.
#[test]
fn a_dead_rank_ends_the_run_on_all() {
    let dir = folder();
    // Long enough not to end before the kill.
    let long = |more: &[&'static str]| {
        let mut all = arguments("run", more);
        let tokens = all.iter().position(|argument| *argument == "1536").unwrap();
        all[tokens] = "1536000";
        all
    };
    let mut job = Job::start(dir.path(), 3, &long(&["--ep", "3"]));
    let run = dir.path().join("run");
    wait_for(&run, 3);
    job.signal(1, "-KILL");
    let mut told = Vec::new();
    for rank in [0, 2] {
        assert_eq!(job.processes[rank].wait().unwrap().code(), Some(1));
        let log = std::fs::read_to_string(dir.path().join(format!("rank-{rank}.log"))).unwrap();
        let at = log.find("error: ").unwrap_or_else(|| panic!("rank {rank}: {log}"));
        told.push(log[at..].to_owned());
    }
    assert!(told[0] == told[1] && told[0].contains("rank 1"), "{told:?}");
    let said = succeed(&moe_train(dir.path(), &long(&["--exit-interval", "1"])).output().unwrap());
    assert!(said.contains("resuming from"), "{said}");
}

#[track_caller]
fn refused(more: &[&str], words: &[&str]) {
    let dir = folder();
    let output = moe_train(dir.path(), &arguments("run", more)).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{more:?}: {text}");
    words.iter().for_each(|word| assert!(text.contains(word), "{more:?}: {word}: {text}"));
}

/// Each rank reads the text, and what a pipe has given is gone.
#[test]
fn pipes_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe.txt");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let pipe = pipe.to_str().unwrap();
    refused(&["--ranks", "2", "--valid", pipe], &[pipe, "is no plain file", "give a file"]);
}

#[test]
fn impossible_layouts_are_refused_by_name() {
    refused(&["--ranks", "4", "--dp", "3", "--tp", "2"], &["needs 6 ranks", "there are 4"]);
    refused(&["--ranks", "4", "--tp", "4"], &["num_heads 2", "nearest are"]);
    refused(&["--ranks", "2", "--memory-budget", "1KB"], &["memory budget", "needs"]);
    refused(&["--ranks", "0"], &["--ranks must be at least 1"]);
    refused(&["--ranks", "2", "--zero", "3"], &["--zero", "0..=2"]);
    refused(&["--tp", "2"], &["--tp has no effect on one rank"]);
    refused(&["--ranks", "2", "--max-restarts", "1"], &["--max-restarts", "processes"]);
    refused(&["--ranks", "2", "--comm-timeout", "0"], &["--comm-timeout"]);
    refused(&["--no-overlap"], &["--no-overlap has no effect on one rank"]);
    refused(&["--zero", "1"], &["--zero has no effect on one rank"]);
    refused(&["--ranks", "2", "--ranks-per-node", "0"], &["--ranks-per-node must be at least 1"]);
    refused(&["--ranks", "2", "--ep", "2", "--coordination", "tokens"], &["--coordination", "without tensor groups"]);
}
