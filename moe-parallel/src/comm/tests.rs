//! The conformance suite, on threads; and what only that engine does.

use super::thread::{Clock, FaultPlan, Injection, Moment, ThreadWorld};
use super::*;
use crate::Error;
use crate::testing::conformance;
use std::time::Duration;

#[test]
fn threads_conform() {
    for size in [1, 2, 3, 5, 8] {
        ThreadWorld::new(size).run(|comm| conformance(&*comm));
        ThreadWorld::new(size).with_clock(Clock::Virtual).run(|comm| conformance(&*comm));
    }
}

/// A rank that waits for another must not hold up the kernels of a third: their threads are not those of one pool.
#[test]
fn every_rank_has_a_kernel_pool_of_its_own() {
    for (world, threads) in [(ThreadWorld::new(3).with_kernel_threads(2), 2), (ThreadWorld::new(64), 1)] {
        let ran_on = world.run(|comm| {
            assert_eq!(rayon::current_num_threads(), threads);
            // All threads of this rank's pool at once, while the other ranks' are at the same.
            let ids = std::sync::Mutex::new(Vec::new());
            let meeting = std::sync::Barrier::new(threads);
            rayon::scope(|scope| {
                for _ in 0..threads {
                    scope.spawn(|_| {
                        meeting.wait();
                        ids.lock().unwrap().push(std::thread::current().id());
                    });
                }
            });
            comm.barrier(SITE).unwrap();
            ids.into_inner().unwrap()
        });
        let mut all: Vec<String> = ran_on.iter().flatten().map(|id| format!("{id:?}")).collect();
        let count = all.len();
        all.sort();
        all.dedup();
        assert_eq!((all.len(), count), (count, threads * ran_on.len()));
    }
}

#[test]
fn stamps_survive_the_wire() {
    let stamp = Stamp { context: u64::MAX, sequence: 7, kind: Kind::InterNode, site: Site::layer(Phase::Backward, 3) };
    for stamp in [stamp, Stamp { site: Site::new(Phase::Save), ..stamp }] {
        assert_eq!(Stamp::from_bytes(&stamp.to_bytes()), Some(stamp));
    }
    assert_eq!(Stamp::from_bytes(&[255; Stamp::BYTES]), None);
    assert_eq!(Stamp::from_bytes(&[0; 3]), None);
}

const SITE: Site = Site::layer(Phase::Forward, 2);
const TIMEOUT: Duration = Duration::from_secs(5);

/// What every rank of a run returns, with the fault of those that fail.
fn faults(world: &ThreadWorld, body: impl Fn(&dyn Communicator) -> crate::Result<()> + Sync) -> Vec<Option<Fault>> {
    timed_faults(world, body).into_iter().map(|(fault, _)| fault).collect()
}

/// The same with the time at which each rank returned.
fn timed_faults(
    world: &ThreadWorld,
    body: impl Fn(&dyn Communicator) -> crate::Result<()> + Sync,
) -> Vec<(Option<Fault>, Duration)> {
    let fault = |e: Error| e.fault().cloned().unwrap_or_else(|| panic!("not a fault: {e}"));
    world.run_timed(|comm| body(&*comm).err().map(fault))
}

#[test]
fn ranks_in_different_collectives_are_named_on_all_ranks() {
    for clock in [Clock::System, Clock::Virtual] {
        let world = ThreadWorld::new(4).with_clock(clock).with_timeout(TIMEOUT);
        let found = faults(&world, |comm| {
            if comm.rank() == 2 {
                comm.all_gather(SITE, &[1.0f32]).map(drop)?;
            } else {
                comm.all_reduce(SITE, &[1.0f32], Reduction::Sum).map(drop)?;
            }
            comm.barrier(SITE)
        });
        let text = found[0].as_ref().unwrap().to_string();
        assert!(found.iter().all(|f| f == &found[0]), "{found:?}");
        assert!(matches!(found[0].as_ref().unwrap().cause, Cause::Diverged { .. }), "{text}");
        for part in ["all-gather", "all-reduce", "layer 2", "forward pass", "rank 2"] {
            assert!(text.contains(part), "{text}");
        }
    }
}

#[test]
fn ranks_in_different_groups_end_at_the_deadline_with_what_the_missing_do() {
    let world = ThreadWorld::new(4).with_clock(Clock::Virtual).with_timeout(TIMEOUT);
    let found = faults(&world, |comm| {
        let pair = comm.split(SITE, comm.rank() as u64 / 2, 0)?;
        if comm.rank() == 1 { comm.barrier(SITE) } else { pair.barrier(Site::layer(Phase::Backward, 1)) }?;
        comm.barrier(SITE)
    });
    assert!(found.iter().all(|f| f.is_some() && f == &found[0]), "{found:?}");
    let text = found[0].as_ref().unwrap().to_string();
    assert!(text.contains("no message within 5.0 s") && text.contains("last seen in barrier"), "{text}");
}

#[test]
fn a_rank_that_leaves_is_named_at_once() {
    let world = ThreadWorld::new(3).with_timeout(Duration::from_secs(600));
    let found = faults(&world, |comm| if comm.rank() == 1 { Ok(()) } else { comm.barrier(SITE) });
    assert_eq!(found[1], None);
    for rank in [0, 2] {
        assert_eq!(found[rank].as_ref().unwrap().cause, Cause::Left { peer: 1 });
    }
}

/// What a rank finds above the engine ends all of them.
#[test]
fn a_rank_that_fails_tells_the_others() {
    let cause = Cause::Engine("out of memory".into());
    let found = faults(&ThreadWorld::new(3).with_timeout(Duration::from_secs(600)), |comm| {
        if comm.rank() == 1 {
            let stamp = comm.group().stamp(Kind::Barrier, SITE);
            return Err(comm.fail(stamp, cause.clone()).into());
        }
        comm.barrier(SITE)
    });
    for fault in found.iter().flatten() {
        assert_eq!((fault.rank, &fault.cause), (1, &cause));
    }
    assert_eq!(found.iter().flatten().count(), 3);
}

#[test]
fn other_sizes_than_agreed_are_named() {
    let world = ThreadWorld::new(2).with_timeout(TIMEOUT);
    let found = faults(&world, |comm| comm.all_gather(SITE, &vec![0u32; 1 + comm.rank()]).map(drop));
    assert!(found.iter().flatten().all(|f| matches!(f.cause, Cause::Size { .. })), "{found:?}");
}

/// A slow message within the deadline is waited for; a later one is a fault that names its sender.
#[test]
fn late_messages() {
    for (by, ends) in [(TIMEOUT / 2, true), (TIMEOUT * 2, false)] {
        let plan = FaultPlan::none().with(1, 0, Injection::Delay(by));
        let world = ThreadWorld::new(3).with_clock(Clock::Virtual).with_timeout(TIMEOUT).with_faults(plan);
        let found = faults(&world, |comm| comm.barrier(SITE).and_then(|()| comm.barrier(SITE)));
        assert_eq!(found.iter().all(Option::is_none), ends, "{found:?}");
        if !ends {
            assert!(found.iter().flatten().all(|f| f.ranks() == [1]), "{found:?}");
        }
    }
}

/// Steps of every kind over the world and over two layers of groups, as a training step has them.
fn steps(comm: &dyn Communicator) -> crate::Result<()> {
    let pair = comm.split(Site::new(Phase::Start), comm.rank() as u64 / 2, 0)?;
    for layer in 0..3 {
        let site = Site::layer(Phase::Forward, layer);
        let first =
            comm.start_all_to_all_v(site, &vec![1.0f32; comm.size()], &vec![1; comm.size()], &vec![1; comm.size()])?;
        pair.all_reduce(site, &[layer], Reduction::Max)?;
        first.wait()?;
        pair.all_gather(site.backward(), &[comm.rank() as u32])?;
        comm.all_reduce(site.backward(), &vec![0.5f32; 3000], Reduction::Sum)?;
    }
    comm.barrier(Site::new(Phase::Update))
}
/// Operations of one rank in [`steps`] but for the last, which nothing follows in which it could be found. (Two ranks reduce
/// in one operation instead of two.)
fn operations(size: usize) -> u64 {
    1 + 3 * if size == 2 { 4 } else { 5 }
}

/// 2,000 plans: every survivor returns the one fault, within a deadline and a second of the world's start (all steps without a
/// fault take less than that second), or nobody fails.
#[test]
fn two_thousand_fault_plans_end_in_one_typed_error() {
    let mut outcomes = [0; 2];
    for seed in 0..2000 {
        let size = [2, 4, 8][seed as usize % 3];
        let plan = FaultPlan::seeded(seed, size, operations(size), TIMEOUT);
        let world = ThreadWorld::new(size).with_clock(Clock::Virtual).with_timeout(TIMEOUT).with_faults(plan.clone());
        let timed = timed_faults(&world, steps);
        let found: Vec<_> = timed.iter().map(|(fault, _)| fault.clone()).collect();
        let (victim, _, injection) = plan.injections()[0];
        let harmless = matches!(injection, Injection::Delay(by) if by < TIMEOUT);
        let survivors: Vec<_> = found.iter().enumerate().filter(|(r, _)| *r != victim).map(|(_, f)| f).collect();
        if survivors.iter().all(|f| f.is_none()) {
            assert!(harmless || matches!(injection, Injection::Drop | Injection::Delay(_)), "seed {seed}: {plan:?}");
            assert!(!matches!(injection, Injection::Kill(Moment::Before) | Injection::Stop), "seed {seed}: {plan:?}");
        } else {
            assert!(!harmless, "seed {seed}: {plan:?} {found:?}");
            assert!(survivors.iter().all(|f| f.is_some() && f == &survivors[0]), "seed {seed}: {plan:?} {found:?}");
        }
        for (rank, (_, ended)) in timed.iter().enumerate().filter(|(rank, _)| *rank != victim) {
            assert!(*ended <= TIMEOUT + Duration::from_secs(1), "seed {seed}: rank {rank} at {ended:?}, {plan:?}");
        }
        outcomes[usize::from(!survivors.iter().all(|f| f.is_none()))] += 1;
        if seed % 50 == 0 {
            assert_eq!(faults(&world, steps), found, "seed {seed} replays");
        }
    }
    assert!(outcomes[1] > 1500, "{outcomes:?}");
}

#[test]
fn errors_keep_their_fault_through_the_tensor_library() {
    let stamp = Stamp { context: 0, sequence: 1, kind: Kind::Barrier, site: SITE };
    let fault = Fault { rank: 3, stamp, cause: Cause::Left { peer: 1 } };
    let candle = candle_core::Error::from(Error::from(fault.clone()));
    let core = moe_core::Error::from(Error::Candle(candle.bt()));
    assert_eq!(Error::from(core).fault(), Some(&fault));
}
