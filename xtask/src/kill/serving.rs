//! Servers over ranks, of which one is killed or stopped for good: while they load, without requests, reading prompts, generating.
//! No request may hang, and every process ends within the deadline.

use super::job::{HARD_LIMIT, Job, Launch, are_all, draw, free_port, send};
use super::{Args, Engine, Signal, Victim};
use crate::shell::{self, cargo, root};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

const RANKS: usize = 4;
/// After which a rank that does not answer ends the server.
const DEADLINE: Duration = Duration::from_secs(3);
/// How much later all has ended, with more ranks than cores.
const MARGIN: Duration = Duration::from_secs(4);
/// After which the others end if a rank is stopped while MPI starts, however short `--comm-timeout` is.
const MPI_START: Duration = Duration::from_secs(60);
/// Requests under way at any time.
const CLIENTS: usize = 6;

/// What the server does when the signal comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Moment {
    Load,
    Idle,
    Prompts,
    Tokens,
}

impl Moment {
    const ALL: [Self; 4] = [Self::Load, Self::Idle, Self::Prompts, Self::Tokens];

    fn name(self) -> &'static str {
        match self {
            Self::Load => "load",
            Self::Idle => "idle",
            Self::Prompts => "prefill",
            Self::Tokens => "decode",
        }
    }

    /// The body of a request that keeps the server at it.
    fn request(self, number: usize) -> Option<String> {
        let (prompt, max_tokens) = match self {
            Self::Load | Self::Idle => return None,
            Self::Prompts => (230, 1),
            Self::Tokens => (8, 200),
        };
        // Each client has its own, so that none is found among what is kept.
        let ids: Vec<String> = (0..prompt).map(|at| (1 + draw(number as u64, at) % 4000).to_string()).collect();
        Some(format!(
            r#"{{"prompt": [{}], "max_tokens": {max_tokens}, "ignore_eos": true, "stream": true}}"#,
            ids.join(",")
        ))
    }
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// All its tokens came.
    Finished,
    /// With an error of the server.
    Told,
    /// Its connection was closed.
    Closed,
    /// Nobody listened.
    Refused,
}

/// How the requests of some runs ended that were under way when the signal came, and the slowest times after
/// it: until the last request and the last process had ended, or the server answered again.
#[derive(Default)]
struct Tally {
    finished: usize,
    told: usize,
    closed: usize,
    /// Servers that answered again.
    back: u64,
    slowest_request: f64,
    slowest_process: f64,
}

/// Runs everything and prints a table.
pub(super) fn run(args: &Args) -> Result<()> {
    let build = ["build", "--release", "--package", "moe-serve", "--bin", "moe-serve"];
    let features: &[&str] = if args.engine == Engine::Mpi { &["--features", "moe-serve/mpi"] } else { &[] };
    shell::run(cargo(&build).args(features))?;
    let bench = Bench::new(args)?;
    let times = args.times.unwrap_or(20);
    println!("rank      signal  moment   runs  back  finished  told  closed  slowest request, s  slowest process, s");
    for &victim in &args.victims {
        for &signal in &args.signals {
            for moment in Moment::ALL {
                let mut tally = Tally::default();
                let rank = victim.name();
                for number in 0..times {
                    let seed = args.seed + number;
                    bench
                        .one(victim, signal, moment, seed, &mut tally)
                        .with_context(|| format!("{rank}, {}, {}, seed {seed}", signal.name(), moment.name()))?;
                }
                let Tally { back, finished, told, closed, slowest_request, slowest_process } = tally;
                println!(
                    "{rank:<8}  {:<6}  {:<7}  {times:>4}  {back:>4}  {finished:>8}  {told:>4}  {closed:>6}  {slowest_request:>18.1}  {slowest_process:>18.1}",
                    signal.name(),
                    moment.name()
                );
            }
        }
    }
    println!("no request and no process hung; the deadline was {} s", DEADLINE.as_secs());
    Ok(())
}

/// What all runs share.
struct Bench<'a> {
    args: &'a Args,
    folder: PathBuf,
    /// From start to answer.
    load: Duration,
}

impl<'a> Bench<'a> {
    fn new(args: &'a Args) -> Result<Self> {
        let folder = root().join("target/kill-serving");
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::create_dir_all(&folder)?;
        fs::copy(root().join("target/release/moe-serve"), folder.join("moe-serve"))?;
        let mut bench = Self { args, folder, load: Duration::ZERO };
        let (mut job, port) = bench.start("calm")?;
        let begun = Instant::now();
        bench.wait_until_ready(port, &job)?;
        bench.load = begun.elapsed();
        // What is asked here is answered.
        for moment in [Moment::Prompts, Moment::Tokens] {
            let body = moment.request(0).unwrap_or_default();
            ensure!(ask(port, &body, HARD_LIMIT)? == End::Finished, "a request without a signal has failed");
        }
        bench.end(&mut job)?;
        Ok(bench)
    }

    fn start(&self, name: &str) -> Result<(Job, u16)> {
        let port = free_port()?;
        // The mark of its processes: no other has this port.
        let mark = format!("--port={port}");
        let deadline = DEADLINE.as_secs().to_string();
        let arguments = [mark.as_str(), "--ep", "4", "--comm-timeout", &deadline, "--max-restarts", self.restarts()];
        let arguments = arguments.map(String::from);
        let launch = Launch { engine: self.args.engine, prefix: self.args.prefix.as_deref(), ranks: RANKS };
        let job = launch.start(&self.folder.join("moe-serve"), &arguments, &self.folder.join(name), &mark)?;
        Ok((job, port))
    }

    fn restarts(&self) -> &'static str {
        if self.args.restarts { "1" } else { "0" }
    }

    /// Within this all has to be over.
    fn limit(&self, signal: Signal, moment: Moment) -> Duration {
        let stays = signal == Signal::Stop || self.args.prefix.is_some();
        let starts = self.args.engine == Engine::Mpi && moment == Moment::Load && stays;
        let again = if self.args.restarts { self.load + DEADLINE } else { Duration::ZERO };
        MARGIN + again + if starts { MPI_START } else { DEADLINE }
    }

    /// Waits until all processes have ended but for `stopped`, or until the server answers again; whether it does.
    fn wait_until_back(&self, port: u16, job: &mut Job, stopped: Option<usize>) -> Result<bool> {
        let begun = Instant::now();
        let body = Moment::Tokens.request(0).unwrap_or_default();
        loop {
            let ended = job.ended()?;
            if are_all(&ended, stopped) {
                return Ok(false);
            }
            // Whatever is answered after the signal is answered without the rank: each step needs all.
            // A rank 0 that is being stopped may still say that it is ready.
            if is_ready(port) && matches!(ask(port, &body, DEADLINE), Ok(End::Finished)) {
                return Ok(true);
            }
            ensure!(begun.elapsed() < HARD_LIMIT, "it hangs: {ended:?}; see {}", job.out.display());
            sleep(Duration::from_millis(20));
        }
    }

    fn wait_until_ready(&self, port: u16, job: &Job) -> Result<()> {
        let begun = Instant::now();
        while !is_ready(port) {
            ensure!(begun.elapsed() < HARD_LIMIT, "it is not ready; see {}", job.out.display());
            sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Whatever is left of a job is killed.
    fn end(&self, job: &mut Job) -> Result<()> {
        for rank in 0..RANKS {
            if let Some(id) = job.rank_id(rank)? {
                send(Signal::Kill, id)?;
            }
        }
        (0..RANKS).try_for_each(|rank| job.wait_for(rank))
    }

    /// One server with a signal.
    fn one(&self, victim: Victim, signal: Signal, moment: Moment, seed: u64, tally: &mut Tally) -> Result<()> {
        let (mut job, port) = self.start("run")?;
        let victim = match victim {
            Victim::Follower => 1 + (draw(seed, 1) % (RANKS as u64 - 1)) as usize,
            Victim::First => 0,
        };
        let share = draw(seed, 2) as f64 / u64::MAX as f64;
        if moment == Moment::Load {
            job.wait_until_started(victim)?;
        } else {
            self.wait_until_ready(port, &job)?;
        }
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let clients = (0..CLIENTS).filter_map(|client| moment.request(client + CLIENTS * seed as usize));
            let clients: Vec<_> = clients.map(|body| scope.spawn(|| keep_asking(port, body, &over))).collect();
            let wait = if moment == Moment::Load { self.load } else { Duration::from_millis(800) };
            sleep(wait.mul_f64(share));
            let id = job.rank_id(victim)?.with_context(|| format!("rank {victim} has ended before its signal"))?;
            let begun = Instant::now();
            send(signal, id)?;
            over.store(true, Ordering::Relaxed);

            // A stopped rank stays, unless a launcher ends it.
            let stays = (signal == Signal::Stop && self.args.engine == Engine::Tcp).then_some(victim);
            let back = if self.args.restarts { self.wait_until_back(port, &mut job, stays) } else { Ok(false) };
            let ended = if matches!(back, Ok(true)) { job.ended() } else { job.wait(stays) };
            let seconds = begun.elapsed().as_secs_f64();
            let stopped_listening = signal == Signal::Stop && victim == 0;
            // What it has not answered it cannot: its connections close when it is gone.
            let closed = self.end(&mut job);
            for client in clients {
                let (at, end) = client.join().unwrap_or_else(|_| unreachable!("a client does not panic"))?;
                let seconds = at.duration_since(begun).as_secs_f64();
                match end {
                    End::Finished => tally.finished += 1,
                    End::Told => tally.told += 1,
                    End::Closed => tally.closed += 1,
                    End::Refused => {}
                }
                if !stopped_listening {
                    tally.slowest_request = tally.slowest_request.max(seconds);
                }
            }
            tally.slowest_process = tally.slowest_process.max(seconds);
            let ended = ended?;
            closed?;
            tally.back += u64::from(back?);
            // A rank 0 that cannot go on, as where its port is still taken, says so and dismisses those that could.
            let mut others = ended.iter().enumerate().filter(|(rank, _)| *rank != victim);
            let is_told = self.args.restarts && others.any(|(_, ended)| *ended == Some(false));
            // A launcher that lets others go on says nothing of those that did not.
            let says_nothing = self.args.engine == Engine::Mpi && self.args.prefix.is_some();
            let is_told = is_told || says_nothing;
            ensure!(is_told || !ended.contains(&Some(true)), "a process has ended as if all were well: {ended:?}");
            let slowest = tally.slowest_process.max(tally.slowest_request);
            ensure!(
                slowest < self.limit(signal, moment).as_secs_f64(),
                "it took {slowest:.1} s; see {}",
                job.out.display()
            );
            Ok(())
        })
    }
}

/// Asks again and again until the signal has come; when and how the last request ended.
fn keep_asking(port: u16, body: String, over: &AtomicBool) -> Result<(Instant, End)> {
    loop {
        let end = ask(port, &body, HARD_LIMIT)?;
        if over.load(Ordering::Relaxed) || end != End::Finished {
            return Ok((Instant::now(), end));
        }
    }
}

/// A connection on which nothing is waited for longer than `patience`.
fn connect(port: u16, patience: Duration) -> std::io::Result<TcpStream> {
    let stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(patience))?;
    Ok(stream)
}

/// Whether requests are taken.
fn is_ready(port: u16) -> bool {
    let status = || -> std::io::Result<String> {
        // A process that is stopped takes connections and answers nothing.
        let mut stream = connect(port, Duration::from_secs(1))?;
        stream.write_all(b"GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    };
    status().is_ok_and(|text| text.starts_with("HTTP/1.1 200"))
}

/// Sends a request for a stream of tokens and reads it to its end.
fn ask(port: u16, body: &str, patience: Duration) -> Result<End> {
    let mut stream = match connect(port, patience) {
        Ok(stream) => stream,
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => return Ok(End::Refused),
        Err(error) => return Err(error).context("cannot connect"),
    };
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    let mut bytes = Vec::new();
    let sent = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body.as_bytes()));
    match sent.and_then(|()| stream.read_to_end(&mut bytes)) {
        Ok(_) => {}
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            return Err(error).context("a request hangs");
        }
        // The process is gone.
        Err(_) => return Ok(End::Closed),
    }
    let text = String::from_utf8_lossy(&bytes);
    Ok(match () {
        () if text.contains("data: [DONE]") && !text.contains("\"error\"") => End::Finished,
        () if text.contains("\"error\"") => End::Told,
        () => End::Closed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    /// Answers one connection with this.
    fn answering(text: &'static str) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            // All of it, or closing would throw the answer away.
            let (mut request, mut byte) = (Vec::new(), [0]);
            while !request.ends_with(if request.starts_with(b"GET") { b"\r\n\r\n" } else { b"}" }) {
                stream.read_exact(&mut byte).unwrap();
                request.push(byte[0]);
            }
            stream.write_all(text.as_bytes()).unwrap();
        });
        port
    }

    #[test]
    fn ends_are_told_apart() {
        let body = Moment::Tokens.request(3).unwrap();
        assert!(serde_json::from_str::<serde_json::Value>(&body).unwrap()["prompt"].as_array().unwrap().len() == 8);
        for (text, want) in [
            ("HTTP/1.1 200 OK\r\n\r\ndata: {\"choices\": []}\n\ndata: [DONE]\n\n", End::Finished),
            ("HTTP/1.1 200 OK\r\n\r\ndata: {\"error\": {}}\n\ndata: [DONE]\n\n", End::Told),
            ("HTTP/1.1 503 Service Unavailable\r\n\r\n{\"error\": {}}", End::Told),
            ("HTTP/1.1 200 OK\r\n\r\ndata: {\"choices\": []}\n\n", End::Closed),
        ] {
            assert_eq!(ask(answering(text), &body, HARD_LIMIT).unwrap(), want, "{text}");
        }
        assert!(is_ready(answering("HTTP/1.1 200 OK\r\n\r\n")));
        assert!(!is_ready(answering("HTTP/1.1 503 Service Unavailable\r\n\r\n")));
        let nobody = free_port().unwrap();
        assert!(!is_ready(nobody));
        assert_eq!(ask(nobody, &body, HARD_LIMIT).unwrap(), End::Refused);
    }
}
