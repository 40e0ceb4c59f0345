//! The conformance suite over TCP, on threads of this process; ranks that fail, strangers at the door, smaller worlds.

use super::channel::{Channel, Frame, Kind};
use super::hello::{Cookie, Guest, Hello, Purpose, Refusal, Table, VERSION};
use super::*;
use crate::comm::engine::Transfer;
use crate::comm::{Cause, Collectives, Fault, Phase, Reduction, Site};
use crate::testing::{conformance, run_over_tcp};
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

const SITE: Site = Site::layer(Phase::Forward, 2);
/// Where none is waited for.
const LONG: Duration = Duration::from_secs(60);
/// Where one is, and other tests run meanwhile.
const SHORT: Duration = Duration::from_millis(1500);

#[test]
fn ranks_over_tcp_conform() {
    for size in [1, 2, 3, 5] {
        run_over_tcp(size, LONG, |world, comm| {
            conformance(&*comm);
            world.finish().expect("all leave");
        });
    }
}

/// More than connections hold on the way, from all to all at once.
#[test]
fn large_messages_cross() {
    run_over_tcp(3, LONG, |world, comm| {
        let counts = [4_000_000; 3];
        let values: Vec<u32> = (0..12_000_000).map(|i| i ^ comm.rank() as u32).collect();
        let got = comm.all_to_all_v(SITE, &values, &counts, &counts).expect("all to all");
        let from = 4_000_000 * comm.rank() as u32;
        let sent = |rank: u32| (from..from + 4_000_000).map(move |i| i ^ rank);
        assert!(got.into_iter().eq((0..3).flat_map(sent)));
        world.finish().expect("all leave");
    });
}

/// What every rank returns; all leave then.
fn faults(
    size: usize,
    timeout: Duration,
    body: impl Fn(&dyn Communicator) -> crate::Result<()> + Sync,
) -> Vec<Option<Fault>> {
    run_over_tcp(size, timeout, |_world, comm| body(&*comm).err().map(fault_of))
}

fn fault_of(error: Error) -> Fault {
    error.fault().cloned().unwrap_or_else(|| panic!("not a fault: {error}"))
}

#[test]
fn ranks_that_do_something_else_are_named_on_all() {
    let found = faults(4, LONG, |comm| {
        if comm.rank() == 2 {
            comm.all_gather(SITE, &[1.0f32]).map(drop)?;
        } else {
            comm.all_reduce(SITE, &[1.0f32], Reduction::Sum).map(drop)?;
        }
        comm.barrier(SITE)
    });
    assert!(found.iter().all(|fault| fault == &found[0]), "{found:?}");
    assert!(matches!(found[0].as_ref().unwrap().cause, Cause::Diverged { .. }), "{found:?}");

    let found = faults(2, LONG, |comm| comm.all_gather(SITE, &vec![0u32; 1 + comm.rank()]).map(drop));
    assert!(found[0] == found[1] && matches!(found[0].as_ref().unwrap().cause, Cause::Size { .. }), "{found:?}");
}

#[test]
fn a_rank_that_leaves_or_is_killed_is_named_at_once() {
    let start = Instant::now();
    let found = faults(3, LONG, |comm| if comm.rank() == 1 { Ok(()) } else { comm.barrier(SITE) });
    assert_eq!(found[1], None);
    assert!(found[0] == found[2] && found[0].as_ref().unwrap().cause == Cause::Left { peer: 1 }, "{found:?}");

    let vanishes = |size: usize| {
        run_over_tcp(size, LONG, |world, comm| {
            let first = comm.barrier(SITE);
            if comm.rank() == size - 1 {
                world.0.vanish();
                return None;
            }
            // Its last message is heard, though nothing comes after it. (Among more, the fault of one may end it on another.)
            assert!(first.is_ok() || size > 2);
            first.and_then(|()| comm.barrier(SITE.backward())).err().map(fault_of)
        })
    };
    assert_eq!(vanishes(2)[0].as_ref().unwrap().cause, Cause::Left { peer: 1 });
    let found = vanishes(4);
    let cause = Cause::Left { peer: 3 };
    assert!(found[..3].iter().all(|f| f == &found[0] && f.as_ref().unwrap().cause == cause), "{found:?}");
    assert!(start.elapsed() < LONG / 4);
}

#[test]
fn a_rank_that_is_late_is_named_on_all() {
    let found = faults(3, SHORT, |comm| {
        comm.barrier(SITE)?;
        if comm.rank() == 1 {
            thread::sleep(2 * SHORT);
        }
        comm.barrier(SITE.backward())
    });
    assert!(found.iter().all(|fault| fault == &found[0]), "{found:?}");
    let fault = found[0].as_ref().unwrap();
    assert!(matches!(fault.cause, Cause::Timeout { .. }) && fault.ranks() == [1], "{fault}");
}

/// A fault does not wait behind the megabytes of an operation that it ends.
#[test]
fn a_vote_overtakes_parcels() {
    let found = faults(2, LONG, |comm| {
        let values = vec![0u64; 2_000_000];
        let _under_way = comm.start_all_to_all_v(SITE, &values, &[1_000_000; 2], &[1_000_000; 2])?;
        if comm.rank() == 0 {
            let stamp = comm.group().stamp(crate::comm::Kind::Barrier, SITE);
            return Err(comm.fail(stamp, Cause::Engine("out of memory".into())).into());
        }
        comm.barrier(SITE)
    });
    assert!(found[0] == found[1] && found[0].as_ref().unwrap().rank == 0, "{found:?}");
}

/// The ranks that are left are `origins`, and hear each other.
fn go_on(world: &TcpWorld, comm: &dyn Communicator, origins: &[usize]) {
    assert_eq!(world.origins(), origins);
    let got = comm.all_gather(SITE, &[origins[comm.rank()] as u64]).expect("they gather");
    assert!(got.iter().map(|&rank| rank as usize).eq(origins.iter().copied()));
}

#[test]
fn survivors_of_deaths_go_on() {
    for (first, second) in [(0, 2), (3, 4), (1, 0)] {
        run_over_tcp(5, LONG, |world, comm| {
            let (mut world, mut comm) = (world, comm);
            let mut left: Vec<usize> = (0..5).collect();
            for victim in [first, second] {
                // Large messages are half sent, or wait, when the victim dies: they do not end up in the smaller world.
                let (values, counts) = (vec![1.0f32; 500_000 * left.len()], vec![500_000; left.len()]);
                let under_way = [(); 2].map(|()| comm.start_all_to_all_v(SITE, &values, &counts, &counts));
                if world.origins()[comm.rank()] == victim {
                    return world.0.vanish();
                }
                let ended = under_way.into_iter().try_for_each(|parts| parts?.wait().map(drop));
                let ended = ended.and_then(|()| comm.barrier(SITE));
                assert_eq!(
                    fault_of(ended.unwrap_err()).cause,
                    Cause::Left { peer: left.iter().position(|&r| r == victim).unwrap() }
                );
                left.retain(|&rank| rank != victim);
                (world, comm) = world.shrink().expect("a smaller world");
                go_on(&world, &*comm, &left);
                conformance(&*comm);
            }
            world.finish().expect("all leave");
        });
    }
}

/// One that does not come is left behind; when it does, it is told so.
#[test]
fn a_rank_that_is_stuck_is_left_behind() {
    for victim in [0, 2] {
        let (awake, asleep) = mpsc::channel();
        let asleep = std::sync::Mutex::new(asleep);
        let others: Vec<usize> = (0..4).filter(|&rank| rank != victim).collect();
        run_over_tcp(4, SHORT, |world, comm| {
            comm.barrier(SITE).unwrap();
            if comm.rank() == victim {
                (0..3).for_each(|_| asleep.lock().unwrap().recv_timeout(LONG).expect("the others have gone on"));
                assert!(comm.barrier(SITE.backward()).unwrap_err().fault().is_some());
                let text = world.shrink().map(drop).unwrap_err().to_string();
                assert!(text.contains("without this rank"), "{text}");
                return;
            }
            let fault = fault_of(comm.barrier(SITE.backward()).unwrap_err());
            assert!(matches!(fault.cause, Cause::Timeout { .. }), "{fault}");
            let (world, comm) = world.shrink().expect("a smaller world");
            go_on(&world, &*comm, &others);
            awake.send(()).unwrap();
            go_on(&world, &*comm, &others);
            world.finish().expect("all leave");
        });
    }
}

#[test]
fn a_world_is_shrunk_after_a_fault_only() {
    run_over_tcp(1, LONG, |world, _| {
        assert!(matches!(world.shrink(), Err(Error::Argument(_))));
    });
}

/// Rank 0 of a job, with its listener.
fn host(size: usize, timeout: Duration) -> (TcpConfig, TcpListener) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let master = listener.local_addr().unwrap().to_string();
    (TcpConfig { rank: 0, size, master, job: "job".into(), timeout, listen: None }, listener)
}

/// What the start of rank 0 and of the others comes to, as texts; the others come one after the other.
fn starts(host: (TcpConfig, TcpListener), others: &[TcpConfig]) -> Vec<std::result::Result<(), String>> {
    let (config, listener) = host;
    let ended = |started: Result<(TcpWorld, Arc<dyn Communicator>)>| started.map(drop).map_err(|e| e.to_string());
    thread::scope(|scope| {
        let mut threads = vec![scope.spawn(move || ended(TcpWorld::start_with(&config, || Ok(listener))))];
        for other in others {
            thread::sleep(Duration::from_millis(100));
            threads.push(scope.spawn(move || ended(TcpWorld::start(other))));
        }
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// The frame that comes next, if one does.
fn next(channel: &mut Channel) -> Option<Frame> {
    let (mut frames, start) = (VecDeque::new(), Instant::now());
    while frames.is_empty() && !channel.has_ended() && start.elapsed() < LONG {
        channel.read(&mut frames).unwrap();
    }
    frames.pop_front()
}

#[test]
fn strangers_are_turned_away_and_the_job_begins() {
    let (config, listener) = host(2, LONG);
    let listens = SocketAddr::from(([127, 0, 0, 1], 9));
    let guest = Guest { purpose: Purpose::Join, rank: 1, size: 2, cookie: Cookie::NONE, listens };
    let hello = |version, job: &str, guest| {
        let bytes = Hello { version, job: job.into(), guest: Some(guest) }.encode();
        Frame { kind: Kind::Hello, epoch: 0, bytes }
    };
    let knock = || TcpStream::connect(&config.master).unwrap();
    let say = |frame: Frame| {
        let mut channel = Channel::over(knock(), 1 << 20).unwrap();
        channel.send(frame);
        channel
    };

    let mut web = knock();
    web.write_all(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n").unwrap();
    let mut long = knock();
    long.write_all(&[&b"moeT"[..], &[0; 4], &[255; 4], &[16, 0, 0, 0]].concat()).unwrap();
    let _silent = knock();
    let _other_job = say(hello(VERSION, "another", guest));
    let _other_job_and_version = say(hello(9, "another", guest));
    let _too_early = say(hello(VERSION, "job", Guest { purpose: Purpose::Data, ..guest }));
    let _no_hello = say(Frame { kind: Kind::Accepted, epoch: 0, bytes: vec![1; 100] });
    // One of the job that comes, and goes again before the others are there.
    drop(say(hello(VERSION, "job", guest)));

    let other = TcpConfig { rank: 1, ..config.clone() };
    thread::scope(|scope| {
        let begin = |started: Result<(TcpWorld, Arc<dyn Communicator>)>| {
            let (world, comm) = started.unwrap();
            conformance(&*comm);
            world.finish().unwrap();
        };
        let first = &config;
        scope.spawn(move || begin(TcpWorld::start_with(first, || Ok(listener))));
        // The strangers have come before.
        thread::sleep(Duration::from_millis(200));
        scope.spawn(move || begin(TcpWorld::start(&other)));
    });
    for mut stranger in [web, long] {
        assert!(matches!(stranger.read(&mut [0; 8]), Ok(0) | Err(_)), "it gets no answer");
    }
}

/// A rank of a job that is played by a test.
struct Player {
    rank: usize,
    job: TcpConfig,
    table: Table,
    channels: Vec<Channel>,
}

impl Player {
    fn hello(job: &TcpConfig, rank: usize, purpose: Purpose, cookie: Cookie) -> Frame {
        let listens = SocketAddr::from(([127, 0, 0, 1], 9));
        let guest = Guest { purpose, rank, size: job.size, cookie, listens };
        let bytes = Hello { version: VERSION, job: job.job.clone(), guest: Some(guest) }.encode();
        Frame { kind: Kind::Hello, epoch: 0, bytes }
    }

    fn say(to: &str, frame: Frame) -> Channel {
        let mut channel = Channel::over(TcpStream::connect(to).unwrap(), 1 << 20).unwrap();
        channel.send(frame);
        channel
    }

    /// Comes to rank 0; what it hears is read later.
    fn join(job: &TcpConfig, rank: usize) -> Channel {
        Self::say(&job.master, Self::hello(job, rank, Purpose::Join, Cookie::NONE))
    }

    fn new(job: &TcpConfig, rank: usize, mut channel: Channel) -> Self {
        let table = Table::decode(&next(&mut channel).expect("where all are").bytes).unwrap();
        Self { rank, job: job.clone(), table, channels: vec![channel] }
    }

    /// Where a rank listens.
    fn door(&self, rank: usize) -> String {
        let other = |rank: usize| SocketAddr::from(([127, 0, 0, 1], self.table.others[rank].port())).to_string();
        rank.checked_sub(1).map_or_else(|| self.job.master.clone(), other)
    }

    fn connect(&mut self, rank: usize, purpose: Purpose) {
        let hello = Self::hello(&self.job, self.rank, purpose, self.table.cookie);
        let mut channel = Self::say(&self.door(rank), hello);
        assert!(next(&mut channel).is_some_and(|frame| frame.kind == Kind::Accepted));
        self.channels.push(channel);
    }
}

/// A rank that comes and dies before all are connected ends the job; strangers at the doors of the others do not.
#[test]
fn a_rank_that_dies_while_ranks_connect_is_named() {
    let (job, listener) = host(3, LONG);
    let one = TcpConfig { rank: 1, ..job.clone() };
    let ended = thread::scope(|scope| {
        let started = scope.spawn(|| starts((job.clone(), listener), &[one]));
        let mut two = Player::new(&job, 2, Player::join(&job, 2));
        let door = two.door(1);
        let mut web = TcpStream::connect(&door).unwrap();
        web.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let mut stranger = Player::say(&door, Player::hello(&job, 2, Purpose::Data, Cookie::random()));
        assert_eq!(next(&mut stranger), None, "it is turned away");
        let mut late = Player::say(&door, Player::hello(&job, 2, Purpose::Join, Cookie::NONE));
        assert!(next(&mut late).is_some_and(|frame| frame.kind == Kind::Refused));
        two.connect(1, Purpose::Control);
        drop(two);
        started.join().unwrap()
    });
    let named =
        |end: &std::result::Result<(), String>| end.as_ref().is_err_and(|text| text.contains("rank 2 has ended"));
    assert!(ended.iter().all(named), "{ended:?}");
}

/// One that is connected with all may have begun: that it dies then is a fault, which those see that begin later.
#[test]
fn a_rank_that_dies_before_others_are_connected_keeps_none_from_beginning() {
    let (job, listener) = host(4, LONG);
    let one = TcpConfig { rank: 1, ..job.clone() };
    let begin = |started: Result<(TcpWorld, Arc<dyn Communicator>)>| {
        let (_world, comm) = started.unwrap();
        fault_of(comm.barrier(SITE).unwrap_err()).cause
    };
    thread::scope(|scope| {
        let zero = scope.spawn(|| begin(TcpWorld::start_with(&job, || Ok(listener))));
        let one = scope.spawn(|| begin(TcpWorld::start(&one)));
        let (two, three) = (Player::join(&job, 2), Player::join(&job, 3));
        let (mut two, mut three) = (Player::new(&job, 2, two), Player::new(&job, 3, three));
        for player in [&mut two, &mut three] {
            player.connect(0, Purpose::Data);
            player.connect(1, Purpose::Control);
        }
        two.connect(1, Purpose::Data);
        drop(two);
        thread::sleep(Duration::from_millis(100));
        three.connect(1, Purpose::Data);
        let found = [zero, one].map(|rank| rank.join().unwrap());
        assert_eq!(found, [Cause::Left { peer: 2 }, Cause::Left { peer: 2 }]);
    });
}

/// Why the other end is turned away.
fn refusal(channel: &mut Channel) -> String {
    let frame = next(channel).expect("it is told why");
    assert_eq!(frame.kind, Kind::Refused);
    Refusal::decode(&frame.bytes).unwrap().why
}

#[test]
fn processes_that_cannot_be_right_end_the_job_on_all_sides() {
    let (job, listener) = host(3, LONG);
    let listener = || listener.try_clone().unwrap();
    let other = TcpConfig { rank: 2, size: 4, ..job.clone() };
    let ended = starts((job.clone(), listener()), &[other]);
    let why = "rank 2 is started as one of 4";
    assert!(ended.iter().all(|end| end.as_ref().is_err_and(|text| text.contains(why))), "{ended:?}");

    let of_version = |version| {
        let Frame { bytes, .. } = Player::hello(&job, 2, Purpose::Join, Cookie::NONE);
        let bytes = Hello { version, ..Hello::decode(&bytes).unwrap() }.encode();
        Frame { kind: Kind::Hello, epoch: 0, bytes }
    };
    let of = |rank, size| Player::hello(&TcpConfig { size, ..job.clone() }, rank, Purpose::Join, Cookie::NONE);
    for (wrong, why) in [
        (of(1, 3), "two processes are started as rank 1"),
        (of(0, 3), "two processes are started as rank 0"),
        (of(2, 5), "rank 2 is started as one of 5"),
        (of(7, 3), "rank 7 is none of 3"),
        (of_version(9), "speaks version 9"),
    ] {
        let mut one = Player::join(&job, 1);
        let mut wrong = Player::say(&job.master, wrong);
        let text = starts((job.clone(), listener()), &[]).remove(0).unwrap_err();
        assert!(text.contains(why), "{text}");
        assert!(refusal(&mut one).contains(why) && refusal(&mut wrong).contains(why));
    }
}

#[test]
fn who_is_missing_is_named() {
    let (job, listener) = host(4, Duration::from_millis(300));
    let mut two = Player::join(&job, 2);
    let text = starts((job.clone(), listener), &[]).remove(0).unwrap_err();
    assert!(text.contains("ranks [1, 3] of 4") && text.contains(&job.master), "{text}");
    assert_eq!(refusal(&mut two), text);

    // Nobody is at that port any more.
    let text = TcpWorld::start(&TcpConfig { rank: 1, ..job.clone() }).unwrap_err().to_string();
    assert!(text.contains("rank 0") && text.contains(&job.master), "{text}");
}

#[test]
fn impossible_configurations_are_refused() {
    let (config, listener) = host(2, Duration::from_millis(200));
    let error = |config: TcpConfig| TcpWorld::start(&config).unwrap_err().to_string();
    assert!(error(config.clone()).contains(&config.master), "the port is taken: the address is named");
    drop(listener);
    let nowhere = TcpConfig { master: "nowhere".into(), ..config.clone() };
    assert!(error(nowhere.clone()).contains("\"nowhere\""));
    assert!(error(TcpConfig { rank: 1, ..nowhere }).contains("\"nowhere\""));
    assert!(error(TcpConfig { rank: 2, ..config.clone() }).contains("rank 2 is none of 2"));
    assert!(error(TcpConfig { job: "x".repeat(257), ..config.clone() }).contains("257 bytes"));
    assert!(error(TcpConfig { timeout: Duration::ZERO, ..config }).contains("`timeout`"));
}

/// The two ends of a connection.
fn connection() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let from = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (from, listener.accept().unwrap().0)
}

/// What waits is dropped, but for the frame that has begun; those that follow are told to be out when they are.
#[test]
fn frames_that_wait_are_dropped() {
    let (from, to) = connection();
    let (mut from, mut to) = (Channel::over(from, MOST).unwrap(), Channel::over(to, MOST).unwrap());
    const MOST: usize = 32 << 20;
    let frame = |len| Frame { kind: Kind::Meeting, epoch: 0, bytes: vec![7; len] };
    // More than the connection holds, so that the first does not go out at once.
    let mut sent: Vec<_> = [MOST, 1, 2].map(|len| from.send(frame(len))).into();
    assert!(sent.iter_mut().all(|transfer| !transfer.test().unwrap()));
    from.drop_unwritten();
    let mut last = from.send(frame(3));
    assert!(!last.test().unwrap());

    let (mut got, start) = (VecDeque::new(), Instant::now());
    while got.len() < 2 && start.elapsed() < LONG {
        from.flush();
        to.read(&mut got).unwrap();
    }
    assert!(got.iter().map(|frame| frame.bytes.len()).eq([MOST, 3]));
    assert!(last.test().unwrap());
}

/// A frame is the same however its bytes are cut.
#[test]
fn frames_come_in_pieces() {
    let (mut from, to) = connection();
    let mut to = Channel::over(to, 10_000).unwrap();
    let mut record = Vec::new();
    let sent: Vec<_> =
        (0..4u8).map(|i| Frame { kind: Kind::Meeting, epoch: 7, bytes: vec![i; 3000 * usize::from(i)] }).collect();
    for frame in &sent {
        record.extend(
            [&b"moeT"[..], &7u32.to_le_bytes(), &(frame.bytes.len() as u32).to_le_bytes(), &[20, 0, 0, 0]].concat(),
        );
        record.extend(&frame.bytes);
    }
    let mut got = VecDeque::new();
    for piece in record.chunks(1001) {
        from.write_all(piece).unwrap();
        to.read(&mut got).unwrap();
    }
    drop(from);
    let start = Instant::now();
    while !to.has_ended() && start.elapsed() < LONG {
        to.read(&mut got).unwrap();
    }
    assert_eq!(got, sent);
}
