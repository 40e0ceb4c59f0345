//! Ranks that are processes over TCP, of which one is killed or stopped at any moment.
//!
//! A rank is this very test program, started with the one test that is [`rank`] and with the variables that launchers set.

use moe_parallel::comm::tcp::{TcpConfig, TcpWorld};
use moe_parallel::comm::{Communicator, Reduction};
use moe_parallel::{Collectives, Error, Phase, Result, Site};
use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

const RANKS: usize = 4;
/// Of every operation.
const TIMEOUT: Duration = Duration::from_millis(1500);
/// After this a job is a hang.
const HARD_LIMIT: Duration = Duration::from_secs(30);
const SITE: Site = Site::layer(Phase::Forward, 2);

#[test]
#[ignore = "what the other tests here start as a process"]
fn rank() {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse().ok());
    let (Some(rank), Some(size)) = (number("RANK"), number("WORLD_SIZE")) else { return };
    let master = ["MASTER_ADDR", "MASTER_PORT"].map(|name| std::env::var(name).expect("a launcher sets it")).join(":");
    let config = TcpConfig { rank, size, master, job: "faults".into(), timeout: TIMEOUT, listen: None };
    println!("\nrank {rank} ends: {}", live(&config).map_or_else(|error| error.to_string(), |()| "well".into()));
}

/// Works until a rank fails, and goes on with the others.
fn live(config: &TcpConfig) -> Result<()> {
    let (world, comm) = TcpWorld::start(config)?;
    comm.barrier(SITE)?;
    println!("\nrank {} begins: now", config.rank);
    let fault = loop {
        if let Err(error) = work(&*comm) {
            break error;
        }
    };
    println!("\nrank {} fails: {fault}", config.rank);
    if fault.fault().is_none() {
        return Err(fault);
    }
    let (world, comm) = world.shrink()?;
    println!("\nrank {} is left: {:?}", config.rank, world.origins());
    (0..20).try_for_each(|_| work(&*comm))?;
    world.finish()
}

/// What a training step might do.
fn work(comm: &dyn Communicator) -> Result<()> {
    let (counts, values) = (vec![40_000; comm.size()], vec![comm.rank() as f32; 40_000 * comm.size()]);
    let got = comm.all_to_all_v(SITE, &values, &counts, &counts)?;
    let sum = comm.all_reduce(SITE.backward(), &[1.0f32; 1000], Reduction::Sum)?;
    let right = got.chunks(40_000).enumerate().all(|(rank, part)| part.iter().all(|&v| v == rank as f32))
        && sum.iter().all(|&sum| sum == comm.size() as f32);
    if !right {
        return Err(Error::Engine("the values are wrong".into()));
    }
    comm.barrier(SITE.backward())
}

/// A job's processes, which end with it.
struct Job {
    children: Vec<Child>,
    lines: Receiver<(usize, String)>,
    /// What was printed.
    told: Vec<Told>,
    start: Instant,
}

/// What a rank does, and the rest of its line.
type Told = (usize, String, String);

impl Drop for Job {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ended_already = child.kill();
            let _status = child.wait();
        }
    }
}

impl Job {
    fn start() -> Self {
        let port = free_port();
        let (sender, lines) = mpsc::channel();
        let children = (0..RANKS).map(|rank| start_rank(rank, port, &sender)).collect();
        Self { children, lines, told: Vec::new(), start: Instant::now() }
    }

    /// What a rank prints next of itself; nothing once all have ended.
    fn next(&mut self) -> Option<Told> {
        loop {
            let left = HARD_LIMIT.checked_sub(self.start.elapsed()).expect("the job hangs");
            let (rank, line) = match self.lines.recv_timeout(left) {
                Ok(line) => line,
                Err(mpsc::RecvTimeoutError::Disconnected) => return None,
                Err(mpsc::RecvTimeoutError::Timeout) => panic!("the job hangs"),
            };
            let told = line.strip_prefix(&format!("rank {rank} ")).and_then(|line| line.split_once(": "));
            if let Some((what, rest)) = told {
                self.told.push((rank, what.into(), rest.into()));
                return self.told.last().cloned();
            }
        }
    }

    /// What the ranks but one say of themselves, once they all have: the same.
    fn all_but(&mut self, victim: usize, what: &str) -> String {
        loop {
            let said = self.told.iter().filter(|(rank, does, _)| *rank != victim && does == what);
            let said: Vec<_> = said.map(|(_, _, rest)| rest).collect();
            if said.len() == RANKS - 1 {
                assert!(said.iter().all(|rest| *rest == said[0]), "{said:?}");
                return said[0].clone();
            }
            assert!(self.next().is_some(), "they have ended, and not all {what}: {:?}", self.told);
        }
    }

    fn signal(&self, rank: usize, signal: &str) {
        let kill = format!("kill -{signal} {}", self.children[rank].id());
        assert!(Command::new("sh").args(["-c", &kill]).status().expect("a shell").success());
    }
}

/// A port that the system does not give to others meanwhile: none of those it chooses itself.
fn free_port() -> u16 {
    use std::sync::atomic::{AtomicU16, Ordering};
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = (std::process::id() % 1000) as u16 * 10;
    loop {
        let port = 12_000 + (first + NEXT.fetch_add(1, Ordering::Relaxed)) % 10_000;
        if TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok() {
            return port;
        }
    }
}

fn start_rank(rank: usize, port: u16, to: &Sender<(usize, String)>) -> Child {
    let mut command = Command::new(std::env::current_exe().expect("this program"));
    command.args(["--exact", "tcp::rank", "--ignored", "--nocapture"]).stdout(Stdio::piped()).stderr(Stdio::null());
    let variables = [("RANK", rank.to_string()), ("WORLD_SIZE", RANKS.to_string()), ("MASTER_PORT", port.to_string())];
    command.envs(variables).env("MASTER_ADDR", "127.0.0.1");
    let mut child = command.spawn().expect("a process");
    let lines = BufReader::new(child.stdout.take().expect("its output")).lines();
    let to = to.clone();
    std::thread::spawn(move || {
        lines
            .map_while(std::result::Result::ok)
            .map(|line| to.send((rank, line)))
            .take_while(|sent| sent.is_ok())
            .count()
    });
    child
}

/// One rank is killed or stopped, at a moment that follows from the seed: the others return one error, which names it, and go on.
fn check(seed: u64) {
    let mut rng = moe_core::CounterRng::new(seed, 0);
    let mut below = |most: u64| rng.next_u64() % most;
    let victim = below(RANKS as u64) as usize;
    let (moment, stops) = (Duration::from_micros(below(100_000)), seed.is_multiple_of(2));
    println!("seed {seed}: rank {victim} is {} after {moment:?}", if stops { "stopped" } else { "killed" });

    let mut job = Job::start();
    for _ in 0..RANKS {
        let told = job.next();
        assert!(told.as_ref().is_some_and(|(_, what, _)| what == "begins"), "{told:?}");
    }
    std::thread::sleep(moment);
    job.signal(victim, if stops { "STOP" } else { "KILL" });
    let fault = job.all_but(victim, "fails");
    // Others may be missing too, where the finder was an operation ahead.
    let named = if stops { format!("rank {victim}, last seen in") } else { format!("rank {victim} has left") };
    assert!(fault.contains(&named), "{fault}");
    let left: Vec<usize> = (0..RANKS).filter(|&rank| rank != victim).collect();
    assert_eq!(job.all_but(victim, "is left"), format!("{left:?}"));
    if stops {
        // It wakes up while the others work, who do not notice.
        job.signal(victim, "CONT");
    }
    assert_eq!(job.all_but(victim, "ends"), "well");
    while job.next().is_some() {}
    let woken =
        |(rank, what, rest): &Told| *rank == victim && what == "ends" && rest.contains("gone on without this rank");
    assert!(!stops || job.told.iter().any(woken), "{:?}", job.told);
}

/// The same before the ranks have come together, perhaps: the others end, well or not.
fn check_start(seed: u64) {
    let mut rng = moe_core::CounterRng::new(seed, 1);
    let (victim, moment) = (rng.next_u64() as usize % RANKS, Duration::from_micros(rng.next_u64() % 60_000));
    println!("seed {seed}: rank {victim} is killed {moment:?} after it was started");
    let mut job = Job::start();
    std::thread::sleep(moment);
    job.signal(victim, "KILL");
    while job.next().is_some() {}
    let ended = |rank: usize| job.told.iter().any(|(teller, what, _)| *teller == rank && what == "ends");
    assert!((0..RANKS).all(|rank| rank == victim || ended(rank)), "{:?}", job.told);
}

/// Several jobs at a time: a stopped rank is waited for.
fn check_all(seeds: std::ops::Range<u64>, check: fn(u64)) {
    const LANES: u64 = 3;
    std::thread::scope(|scope| {
        for lane in 0..LANES {
            let seeds = seeds.clone();
            scope.spawn(move || seeds.filter(|seed| seed / 2 % LANES == lane).for_each(check));
        }
    });
}

#[test]
fn a_process_that_is_killed_or_stopped_is_gone_on_without() {
    check_all(0..10, check);
}

#[test]
fn a_process_that_is_killed_at_the_start_hangs_no_other() {
    check_all(0..6, check_start);
}

#[test]
#[ignore = "takes minutes"]
fn a_hundred_processes_are_killed_or_stopped() {
    check_all(1000..1100, check);
    check_all(1000..1050, check_start);
}
