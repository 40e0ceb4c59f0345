//! The engine over ranks: the same tokens as on one, and an end for everybody when a rank fails.

use crate::engine::{Answer, config, gpt, random_jobs, run, submit, wait};
use candle_core::Device;
use moe_kernels::KernelOps;
use moe_models::{CausalLm, Decoder, LayerExperts, Pages, ParamSource, Precision};
use moe_parallel::all_to_all::{Route, RouteChoice};
use moe_parallel::comm::Communicator;
use moe_parallel::comm::thread::{Clock, FaultPlan, Injection, ThreadWorld};
use moe_parallel::{Collectives, Coordination, ExchangeConfig, Mesh, ParallelDims};
use moe_serve::engine::{
    CancelFlag, Engine, FinishReason, Flow, Job, Listener, PromptOutput, RankReplicas, ReplicaOutput, ReplicaStep,
    Replicas, SampledToken, SchedulingConfig, SpeculationConfig, follow,
};
use moe_serve::{Error, Result};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const KV_CACHE_BYTES: usize = 1 << 20;

/// Nobody listens.
struct Deaf;

impl Listener for Deaf {
    fn prompt(&mut self, _: usize, _: PromptOutput) {}
    fn token(&mut self, _: usize, _: SampledToken) -> Flow {
        Flow::Continue
    }
    fn experts(&mut self, _: usize, _: Vec<LayerExperts>) {}
    fn finished(&mut self, _: usize, _: FinishReason) {}
    fn done(&mut self, _: Result<()>) {}
}

/// A rank's part of the model whose whole the other tests have.
fn part(
    comm: Arc<dyn Communicator>,
    dims: ParallelDims,
    exchange: ExchangeConfig,
) -> Result<(Arc<Mesh>, Arc<dyn CausalLm>)> {
    let model = gpt();
    let (table, decoder) = (Arc::new(model.table().clone()), model.decoder_config().clone());
    let mesh = Arc::new(Mesh::new(comm, dims, 2, exchange)?);
    let vb = ParamSource::initial(table, 3, mesh.placement()).builder(&Device::Cpu);
    let ops = Arc::new(KernelOps::packing(Precision::F32));
    let lm = Decoder::over(decoder, vb, ops, &mesh)?;
    Ok((mesh, Arc::new(lm)))
}

/// Replicas whose every step is looked at: from a row a token is drawn where it is, or it travels, as was asked.
struct Watched {
    replicas: RankReplicas,
    /// Rows that tokens were drawn from, and rows that travelled.
    rows: Arc<[AtomicUsize; 2]>,
}

impl Replicas for Watched {
    fn pages(&self) -> Vec<Pages> {
        self.replicas.pages()
    }
    fn run(&mut self, steps: &[ReplicaStep]) -> Result<Vec<ReplicaOutput>> {
        let outputs = self.replicas.run(steps)?;
        for (ReplicaStep { step, draws }, output) in steps.iter().zip(&outputs) {
            assert_eq!(draws.len(), step.logit_rows().len());
            assert!(draws.iter().map(Option::is_some).eq(output.drawn.iter().map(Option::is_some)));
            let drawn = draws.iter().flatten().count();
            assert_eq!(output.logits.dims()[0], draws.len() - drawn);
            self.rows[0].fetch_add(drawn, Ordering::Relaxed);
            self.rows[1].fetch_add(draws.len() - drawn, Ordering::Relaxed);
        }
        Ok(outputs)
    }
    fn draws(&self) -> bool {
        self.replicas.draws()
    }
    fn idle_limit(&self) -> Option<Duration> {
        self.replicas.idle_limit()
    }
    fn idle(&mut self) -> Result<()> {
        self.replicas.idle()
    }
    fn has_failed(&self) -> bool {
        self.replicas.has_failed()
    }
}

/// The answers of all jobs, which rank 0 has before it works; `None` of the others.
fn serve(
    comm: Arc<dyn Communicator>,
    dims: ParallelDims,
    exchange: ExchangeConfig,
    jobs: &[(Job, usize)],
    scheduling: &SchedulingConfig,
    timeout: Duration,
    rows: &Arc<[AtomicUsize; 2]>,
) -> (Result<()>, Option<Vec<Answer>>) {
    let max_sequences = scheduling.max_sequences;
    let rank = comm.rank();
    let (mesh, lm) = match part(comm, dims, exchange) {
        Ok(part) => part,
        Err(error) => return (Err(error), None),
    };
    if rank > 0 {
        return (follow(mesh, lm, KV_CACHE_BYTES, max_sequences), None);
    }
    let replicas = match RankReplicas::new(mesh, Arc::clone(&lm), KV_CACHE_BYTES, max_sequences, timeout) {
        Ok(replicas) => Watched { replicas, rows: Arc::clone(rows) },
        Err(error) => return (Err(error), None),
    };
    let config = config(lm.as_ref(), jobs.len(), scheduling.clone(), KV_CACHE_BYTES);
    let (engine, work) = Engine::over(Box::new(replicas), lm.as_ref(), config, Arc::new(())).expect("possible");
    assert!(engine.is_ready());
    let answers: Vec<_> = jobs.iter().map(|job| submit(&engine, job)).collect();
    engine.close();
    let result = work.run();
    assert!(!engine.is_ready() && !engine.is_alive());
    assert!(matches!(engine.submit(Job::default(), Box::new(Deaf), CancelFlag::default()), Err(Error::ShuttingDown)));
    (result, Some(answers.into_iter().map(wait).collect()))
}

#[test]
fn tokens_are_those_of_one_rank() {
    compare_with_one_rank(60);
}

/// Run by hand: `cargo test -p moe-serve --test it -- --ignored --nocapture five_hundred`.
#[test]
#[ignore = "takes minutes"]
fn five_hundred_requests_are_answered_as_by_one_rank() {
    compare_with_one_rank(500);
}

fn compare_with_one_rank(requests: usize) {
    let jobs = random_jobs(requests, 4);
    let lm: Arc<dyn CausalLm> = Arc::new(gpt().into_packed().expect("packs"));
    let (want, _, _) = run(&lm, &jobs, SchedulingConfig::default(), KV_CACHE_BYTES, true);
    let speculation = SpeculationConfig { num_tokens: 3, min_ngram: 1, max_ngram: 3 };
    let small =
        SchedulingConfig { max_batch_tokens: 24, max_sequences: 12, speculation, ..SchedulingConfig::default() };
    let (mut compared, rows) = (0, Arc::new([const { AtomicUsize::new(0) }; 2]));
    for (dims, route, coordination, scheduling) in [
        (ParallelDims::new(2, 1, 2, 1), Route::Flat.into(), Coordination::None, SchedulingConfig::default()),
        (ParallelDims::new(4, 1, 4, 1), Route::Hierarchical.into(), Coordination::None, small.clone()),
        (ParallelDims::new(4, 1, 4, 1), RouteChoice::BySize, Coordination::None, small.clone()),
        (ParallelDims::new(4, 1, 1, 1), Route::Flat.into(), Coordination::None, SchedulingConfig::default()),
        (ParallelDims::new(2, 2, 4, 1), Route::Hierarchical.into(), Coordination::ByDestination, small.clone()),
        (ParallelDims::new(4, 1, 2, 2), Route::Flat.into(), Coordination::None, small),
    ] {
        let timeout = Duration::from_secs(60);
        let exchange = ExchangeConfig { route, coordination };
        let mut results = ThreadWorld::new(4.min(dims.dp * dims.tp))
            .with_timeout(timeout)
            .run(|comm| serve(comm, dims, exchange, &jobs, &scheduling, timeout, &rows));
        assert!(results.iter().all(|(result, _)| result.is_ok()), "{dims:?}: {results:?}");
        let got = results.remove(0).1.expect("rank 0 has the answers");
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert_eq!(got.error, want.error, "{dims:?}: job {i}");
            // Split matrices are summed in another order, so a draw may fall otherwise.
            if dims.tp == 1 && dims.expert_slices == 1 {
                assert_eq!(got, want, "{dims:?}: job {i}");
                compared += got.choices.values().map(|told| told.tokens.len()).sum::<usize>();
            }
        }
    }
    let [drawn, travelled] = [0, 1].map(|i| rows[i].load(Ordering::Relaxed));
    println!(
        "{requests} requests, {compared} tokens over ranks are those of one; {drawn} drawn where the logits were, {travelled} rows of logits"
    );
    assert!(compared > 25 * requests, "{compared}");
    assert!(drawn > 200 && travelled > 200, "{drawn} {travelled}");
}

/// Seeded faults in virtual time: a rank dies, sticks or is late, at whatever operation. Every job is answered, with its tokens or
/// with what happened, and every rank comes back.
fn faults(seeds: std::ops::Range<u64>) {
    let dims = ParallelDims::new(4, 1, 4, 1);
    let exchange = ExchangeConfig { route: Route::Flat.into(), coordination: Coordination::None };
    let jobs = random_jobs(6, 8);
    let scheduling = SchedulingConfig { max_batch_tokens: 32, max_sequences: 4, ..SchedulingConfig::default() };
    let timeout = Duration::from_secs(30);
    let mut ends: BTreeMap<&str, usize> = BTreeMap::new();
    let mut want: Option<Vec<Answer>> = None;
    for seed in seeds {
        let plan = if want.is_none() { FaultPlan::none() } else { FaultPlan::seeded(seed, 4, 600, timeout) };
        let timed = ThreadWorld::new(4)
            .with_timeout(timeout)
            .with_clock(Clock::Virtual)
            .with_faults(plan)
            .run_timed(|comm| serve(comm, dims, exchange, &jobs, &scheduling, timeout, &Arc::default()));
        let failed = timed.iter().any(|((result, _), _)| result.is_err());
        let answers = timed.into_iter().next().and_then(|((_, answers), _)| answers);
        match (&want, answers) {
            (None, answers) => {
                assert!(!failed);
                want = answers;
                *ends.entry("without a fault").or_default() += 1;
            }
            // A rank failed before anything was served.
            (Some(_), None) => *ends.entry("before it began").or_default() += 1,
            (Some(want), Some(answers)) => {
                for (i, (got, want)) in answers.iter().zip(want).enumerate() {
                    match &got.error {
                        None => assert_eq!(got, want, "seed {seed}: job {i}"),
                        Some(error) => {
                            assert!(
                                failed && error.contains("the model cannot be run any more"),
                                "seed {seed}: {error}"
                            );
                        }
                    }
                }
                let lost = answers.iter().any(|answer| answer.error.is_some());
                *ends.entry(if lost { "while serving" } else { "all answered" }).or_default() += 1;
            }
        }
    }
    println!("{ends:?}");
    assert!(ends.get("while serving").is_some_and(|&count| count > 0), "{ends:?}");
}

#[test]
fn everybody_hears_of_a_fault() {
    faults(0..40);
}

/// Run by hand, as the requests.
#[test]
#[ignore = "takes minutes"]
fn five_hundred_seeds_of_faults() {
    faults(0..500);
}

#[test]
fn a_server_that_is_idle_stays_whole() {
    let dims = ParallelDims::new(2, 1, 2, 1);
    let exchange = ExchangeConfig::default();
    let timeout = Duration::from_millis(400);
    let jobs = random_jobs(3, 5);
    let results = ThreadWorld::new(2).with_timeout(timeout).run(|comm| -> Result<usize> {
        let rank = comm.rank();
        let (mesh, lm) = part(comm, dims, exchange)?;
        if rank > 0 {
            return follow(mesh, lm, KV_CACHE_BYTES, 8).map(|()| 0);
        }
        let replicas = RankReplicas::new(mesh, Arc::clone(&lm), KV_CACHE_BYTES, 8, timeout)?;
        let scheduling = SchedulingConfig { max_sequences: 8, ..SchedulingConfig::default() };
        let config = config(lm.as_ref(), 8, scheduling, KV_CACHE_BYTES);
        let (engine, work) = Engine::over(Box::new(replicas), lm.as_ref(), config, Arc::new(()))?;
        std::thread::scope(|scope| {
            let asking = scope.spawn(|| {
                let mut answered = 0;
                for job in &jobs {
                    // Longer than the deadline of an exchange.
                    std::thread::sleep(3 * timeout);
                    answered += usize::from(wait(submit(&engine, job)).error.is_none());
                }
                engine.close();
                answered
            });
            work.run()?;
            Ok(asking.join().expect("no panic"))
        })
    });
    assert!(matches!(results[..], [Ok(3), Ok(0)]), "{results:?}");
}

#[test]
fn a_rank_that_leaves_ends_the_start() {
    let dims = ParallelDims::new(2, 1, 2, 1);
    let timeout = Duration::from_millis(300);
    let results = ThreadWorld::new(2).with_timeout(timeout).run(|comm| {
        let rank = comm.rank();
        let (mesh, lm) = part(comm, dims, ExchangeConfig::default()).expect("a part");
        (rank == 0).then(|| RankReplicas::new(mesh, Arc::clone(&lm), KV_CACHE_BYTES, 8, timeout).map(|_| ()))
    });
    assert!(matches!(&results[0], Some(Err(Error::Model(_)))), "{results:?}");
}

#[test]
fn a_rank_that_is_gone_is_missed_without_a_request() {
    let dims = ParallelDims::new(2, 1, 2, 1);
    let timeout = Duration::from_millis(400);
    // Far beyond the operations of the start: the rank stops at a meeting of an idle server.
    let stop = FaultPlan::none().with(1, 60, Injection::Stop);
    let results = ThreadWorld::new(2).with_timeout(timeout).with_faults(stop).run(|comm| -> Result<bool> {
        let rank = comm.rank();
        let (mesh, lm) = part(comm, dims, ExchangeConfig::default())?;
        if rank > 0 {
            return follow(mesh, lm, KV_CACHE_BYTES, 8).map(|()| false);
        }
        let replicas = RankReplicas::new(mesh, Arc::clone(&lm), KV_CACHE_BYTES, 8, timeout)?;
        let scheduling = SchedulingConfig { max_sequences: 8, ..SchedulingConfig::default() };
        let config = config(lm.as_ref(), 8, scheduling, KV_CACHE_BYTES);
        let (engine, work) = Engine::over(Box::new(replicas), lm.as_ref(), config, Arc::new(()))?;
        assert!(engine.is_ready());
        let lost = matches!(work.run(), Err(Error::EngineLost(_)));
        Ok(lost && !engine.is_ready())
    });
    assert!(matches!(results[0], Ok(true)) && results[1].is_err(), "{results:?}");
}
