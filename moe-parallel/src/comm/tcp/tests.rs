//! The conformance suite over TCP, on threads of this process; ranks that fail, strangers at the door, smaller worlds.

use super::channel::{Channel, Frame, Kind};
use super::hello::{Cookie, Guest, Hello, Purpose, Table, VERSION};
use super::*;
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
const SHORT: Duration = Duration::from_millis(1200);

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

    let found = run_over_tcp(4, LONG, |world, comm| {
        // Its last message is heard, though nothing comes after it.
        comm.barrier(SITE).unwrap();
        if comm.rank() == 3 {
            world.0.vanish();
            return None;
        }
        comm.barrier(SITE.backward()).err().map(fault_of)
    });
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

/// The ranks that are left are `origins`, and do what all did before.
fn go_on(world: &TcpWorld, comm: &dyn Communicator, origins: &[usize]) {
    assert_eq!(world.origins(), origins);
    let got = comm.all_gather(SITE, &[origins[comm.rank()] as u64]).expect("they gather");
    assert!(got.iter().map(|&rank| rank as usize).eq(origins.iter().copied()));
    conformance(comm);
}

#[test]
fn survivors_of_deaths_go_on() {
    for (first, second) in [(0, 2), (3, 4), (1, 0)] {
        run_over_tcp(5, LONG, |world, comm| {
            let (mut world, mut comm) = (world, comm);
            let mut left: Vec<usize> = (0..5).collect();
            for victim in [first, second] {
                // Large messages are half sent when the victim dies: they do not end up in the smaller world.
                let (values, counts) = (vec![1.0f32; 500_000 * left.len()], vec![500_000; left.len()]);
                let under_way = comm.start_all_to_all_v(SITE, &values, &counts, &counts);
                if world.origins()[comm.rank()] == victim {
                    return world.0.vanish();
                }
                let ended = under_way.and_then(|parts| parts.wait()).and_then(|_| comm.barrier(SITE));
                assert_eq!(
                    fault_of(ended.unwrap_err()).cause,
                    Cause::Left { peer: left.iter().position(|&r| r == victim).unwrap() }
                );
                left.retain(|&rank| rank != victim);
                (world, comm) = world.shrink().expect("a smaller world");
                go_on(&world, &*comm, &left);
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

/// A rank that comes and dies before all are connected ends the job; strangers at the doors of the others do not.
#[test]
fn a_rank_that_dies_while_ranks_connect_is_named() {
    let (config, listener) = host(3, LONG);
    let one = TcpConfig { rank: 1, ..config.clone() };
    let listens = SocketAddr::from(([127, 0, 0, 1], 9));
    let guest = Guest { purpose: Purpose::Join, rank: 2, size: 3, cookie: Cookie::NONE, listens };
    let hello = |guest| Frame {
        kind: Kind::Hello,
        epoch: 0,
        bytes: Hello { version: VERSION, job: config.job.clone(), guest: Some(guest) }.encode(),
    };
    let connect = |address: &str| Channel::over(TcpStream::connect(address).unwrap(), 1 << 20).unwrap();
    let ended = thread::scope(|scope| {
        let job = scope.spawn(|| starts((config.clone(), listener), &[one]));
        let mut two = connect(&config.master);
        two.send(hello(guest));
        let table = Table::decode(&next(&mut two).expect("where all are").bytes).unwrap();
        let door = SocketAddr::from(([127, 0, 0, 1], table.others[0].port())).to_string();
        let mut web = TcpStream::connect(&door).unwrap();
        web.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let mut stranger = connect(&door);
        stranger.send(hello(Guest { purpose: Purpose::Data, cookie: Cookie::random(), ..guest }));
        assert_eq!(next(&mut stranger), None, "it is turned away");
        let mut late = connect(&door);
        late.send(hello(guest));
        assert!(next(&mut late).is_some_and(|frame| frame.kind == Kind::Refused));
        let mut data = connect(&door);
        data.send(hello(Guest { purpose: Purpose::Data, cookie: table.cookie, ..guest }));
        assert!(next(&mut data).is_some_and(|frame| frame.kind == Kind::Accepted));
        drop(two);
        job.join().unwrap()
    });
    let named =
        |end: &std::result::Result<(), String>| end.as_ref().is_err_and(|text| text.contains("rank 2 has ended"));
    assert!(ended.iter().all(named), "{ended:?}");
}

#[test]
fn processes_that_cannot_be_right_end_the_job_on_both_sides() {
    let (master, listener) = host(3, LONG);
    let one = TcpConfig { rank: 1, ..master.clone() };
    for (others, why) in [
        (vec![one.clone(), one.clone()], "two processes are started as rank 1"),
        (vec![one.clone(), TcpConfig { rank: 2, size: 4, ..one.clone() }], "is started as one of 4"),
        (vec![one.clone(), TcpConfig { rank: 0, ..one.clone() }], "rank 0 cannot listen"),
    ] {
        let listener = listener.try_clone().unwrap();
        // Where the master's port is taken rank 0 finds out; the others are told when it leaves.
        let host = TcpConfig { timeout: SHORT, ..master.clone() };
        let others: Vec<_> = others.into_iter().map(|other| TcpConfig { timeout: SHORT, ..other }).collect();
        let ended = starts((host, listener), &others);
        assert!(ended.iter().all(|end| end.is_err()), "{ended:?}");
        let says = |index: usize| ended[index].as_ref().is_err_and(|text| text.contains(why));
        assert!(says(2), "{ended:?}");
        assert!(why.contains("listen") || (says(0) && says(1)), "{ended:?}");
    }

    let listens = SocketAddr::from(([127, 0, 0, 1], 9));
    let guest = Guest { purpose: Purpose::Join, rank: 1, size: 3, cookie: Cookie::NONE, listens };
    let bytes = Hello { version: 9, job: master.job.clone(), guest: Some(guest) }.encode();
    let mut other = Channel::over(TcpStream::connect(&master.master).unwrap(), 1 << 20).unwrap();
    other.send(Frame { kind: Kind::Hello, epoch: 0, bytes });
    let text = starts((master, listener), &[]).remove(0).unwrap_err();
    assert!(text.contains("speaks version 9"), "{text}");
    assert_eq!(next(&mut other).map(|frame| frame.kind), Some(Kind::Refused));
}

#[test]
fn who_is_missing_is_named() {
    let timeout = Duration::from_millis(400);
    let (config, listener) = host(4, timeout);
    let two = TcpConfig { rank: 2, timeout: LONG, ..config.clone() };
    let ended = starts((config.clone(), listener), &[two]);
    for text in ended.into_iter().map(|end| end.unwrap_err()) {
        assert!(text.contains("ranks [1, 3] of 4") && text.contains(&config.master), "{text}");
    }

    // Nobody is at that port any more.
    let text = TcpWorld::start(&TcpConfig { rank: 1, ..config.clone() }).unwrap_err().to_string();
    assert!(text.contains("rank 0") && text.contains(&config.master), "{text}");
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

/// A frame is the same however its bytes are cut.
#[test]
fn frames_come_in_pieces() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let mut from = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let mut to = Channel::over(listener.accept().unwrap().0, 10_000).unwrap();
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
