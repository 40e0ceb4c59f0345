//! What tests of any engine share.

use crate::comm::tcp::{TcpConfig, TcpWorld};
use crate::comm::{Collectives, Communicator, Phase, Reduction, Site};
use half::bf16;
use std::net::{Ipv4Addr, TcpListener};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Runs `body` on every rank of a job over TCP whose ranks are threads of this process; the results in rank order. Rank 0
/// listens at a port that the system chooses.
///
/// # Panics
/// If the ranks do not come together within `timeout`, which is that of every operation too; if a rank panics, after all have
/// ended.
pub fn run_over_tcp<T: Send>(
    size: usize,
    timeout: Duration,
    body: impl Fn(TcpWorld, Arc<dyn Communicator>) -> T + Sync,
) -> Vec<T> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port of this machine");
    let master = listener.local_addr().expect("its number").to_string();
    let listener = Mutex::new(Some(listener));
    let rank = &|rank| {
        let config = TcpConfig { rank, size, master: master.clone(), job: "test".into(), timeout, listen: None };
        let taken = || listener.lock().unwrap_or_else(PoisonError::into_inner).take();
        let started = TcpWorld::start_with(&config, || taken().ok_or_else(|| "rank 0 is started once".into()));
        let (world, comm) = started.expect("the ranks come together");
        body(world, comm)
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..size).map(|r| scope.spawn(move || rank(r))).collect();
        let ended: Vec<_> = threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
        ended.into_iter().map(|result| result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

/// Holds an engine to the contract of [`Collectives`]: call it on every rank of a world.
///
/// # Panics
/// If a result is wrong or an operation fails.
pub fn conformance(comm: &dyn Communicator) {
    collectives(comm, 1);
    // Groups of groups, with members in an order of their own.
    let site = Site::new(Phase::Start);
    let rank = comm.rank() as u64;
    let halves = comm.split(site, rank % 2, u64::MAX - rank).expect("split");
    let odd_and_even: Vec<usize> = (0..comm.size()).rev().filter(|r| r % 2 == comm.rank() % 2).collect();
    assert_eq!(halves.group().members(), odd_and_even);
    collectives(&*halves, 2);
    let alone = halves.split(site, rank, 0).expect("split");
    assert_eq!(alone.size(), 1);
    collectives(&*alone, 3);
    // Several groups in flight, waited for in another order than they were started in.
    let first = comm.start_all_reduce(site, &[1u32; 5000], Reduction::Sum).expect("start");
    let second = halves.start_all_gather_v(site, &[rank], &vec![1; halves.size()]).expect("start");
    let third = comm.start_all_gather_v(site, &[rank], &vec![1; comm.size()]).expect("start");
    let fourth = comm.start_reduce_scatter(site, &[rank as i64; 7], Reduction::Max).expect("start");
    let fifth = comm.start_broadcast(site, &[rank * 3; 2], comm.size() - 1).expect("start");
    let sixth = comm.start_barrier(site).expect("start");
    sixth.wait().expect("sixth");
    assert_eq!(fifth.wait().expect("fifth"), [3 * (comm.size() as u64 - 1); 2]);
    let part = crate::dims::part(7, comm.rank(), comm.size()).len();
    assert_eq!(fourth.wait().expect("fourth"), vec![comm.size() as i64 - 1; part]);
    assert_eq!(third.wait().expect("third"), (0..comm.size() as u64).collect::<Vec<_>>());
    assert_eq!(second.wait().expect("second").len(), halves.size());
    assert_eq!(first.wait().expect("first"), vec![comm.size() as u32; 5000]);
    // Large messages, more of them than an engine may buffer.
    for _ in 0..3 {
        let counts = vec![100_000; comm.size()];
        let values = vec![rank as f32; 100_000 * comm.size()];
        let got = comm.all_to_all_v(site, &values, &counts, &counts).expect("large");
        assert!(got.chunks(100_000).enumerate().all(|(r, part)| part.iter().all(|&v| v == r as f32)));
    }
    comm.barrier(site).expect("barrier");
}

fn collectives(comm: &dyn Communicator, salt: usize) {
    let site = Site::layer(Phase::Forward, salt as u32);
    let (rank, size) = (comm.rank(), comm.size());
    comm.barrier(site).expect("barrier");

    // From r to s go (r * 5 + s * 3 + salt) % 4 values, so that some pairs exchange nothing.
    let count = |r: usize, s: usize| (r * 5 + s * 3 + salt) % 4;
    let value = |r: usize, s: usize, i: usize| (r * 1000 + s * 10 + i) as u32;
    let from_to = |r: usize, s: usize| (0..count(r, s)).map(move |i| value(r, s, i)).collect::<Vec<_>>();
    let sends: Vec<u32> = (0..size).flat_map(|s| from_to(rank, s)).collect();
    let counts = |f: &dyn Fn(usize) -> usize| (0..size).map(f).collect::<Vec<_>>();
    let (send_counts, receive_counts) = (counts(&|s| count(rank, s)), counts(&|r| count(r, rank)));
    let got = comm.all_to_all_v(site, &sends, &send_counts, &receive_counts).expect("all-to-all-v");
    assert_eq!(got, (0..size).flat_map(|r| from_to(r, rank)).collect::<Vec<_>>());

    let values: Vec<i64> = (0..2 * size).map(|i| (rank * 100 + i) as i64).collect();
    let got = comm.all_to_all(site, &values).expect("all-to-all");
    let want: Vec<i64> = (0..size).flat_map(|r| [0, 1].map(|i| (r * 100 + 2 * rank + i) as i64)).collect();
    assert_eq!(got, want);
    assert!(size == 1 || comm.all_to_all(site, &[0u8]).is_err(), "unequal parts are refused");

    let own: Vec<u8> = vec![rank as u8; rank % 3];
    let got = comm.all_gather_v(site, &own, &counts(&|r| r % 3)).expect("all-gather-v");
    assert_eq!(got, (0..size).flat_map(|r| vec![r as u8; r % 3]).collect::<Vec<_>>());
    assert_eq!(comm.all_gather(site, &[rank as u64]).expect("all-gather"), (0..size as u64).collect::<Vec<_>>());

    // Sums in rank order: the bits of a plain loop, whatever the size.
    for len in [0, 1, 7, 3000] {
        let term = |r: usize, i: usize| ((r * 7919 + i * 104_729) % 1000) as f32 / 7.0 - 50.0;
        let values: Vec<f32> = (0..len).map(|i| term(rank, i)).collect();
        let want: Vec<f32> = (0..len).map(|i| (1..size).fold(term(0, i), |sum, r| sum + term(r, i))).collect();
        let sum = comm.all_reduce(site, &values, Reduction::Sum).expect("all-reduce");
        assert!(sum.iter().zip(&want).all(|(a, b)| a.to_bits() == b.to_bits()), "{len} values");
        let part = comm.reduce_scatter(site, &values, Reduction::Sum).expect("reduce-scatter");
        assert_eq!(part, want[crate::dims::part(len, rank, size)]);
        let most = comm.all_reduce(site, &values, Reduction::Max).expect("maximum");
        let want: Vec<f32> = (0..len).map(|i| (0..size).map(|r| term(r, i)).fold(f32::MIN, f32::max)).collect();
        assert_eq!(most, want);
        // bf16 is summed in f32 and rounded once.
        let halves: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
        let term = |r: usize, i: usize| bf16::from_f32(term(r, i)).to_f32();
        let want: Vec<bf16> =
            (0..len).map(|i| bf16::from_f32((1..size).fold(term(0, i), |sum, r| sum + term(r, i)))).collect();
        assert_eq!(comm.all_reduce(site, &halves, Reduction::Sum).expect("bf16"), want);
    }

    for root in 0..size {
        let mut values = if rank == root { [root as f64, 0.5] } else { [-1.0, -1.0] };
        comm.broadcast(site, &mut values, root).expect("broadcast");
        assert_eq!(values, [root as f64, 0.5]);
    }
    assert!(comm.broadcast(site, &mut [0u8], size).is_err(), "a root that is no rank is refused");
}
