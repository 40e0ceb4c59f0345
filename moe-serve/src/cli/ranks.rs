//! A server over ranks: rank 0 listens and plans, the others run their parts of its steps.

use super::serve::ServeArgs;
use crate::Error;
use crate::api::Server;
use crate::engine::{RankReplicas, follow};
use anyhow::{Context, Result, bail};
use moe_models::cli::ranks::{Process, Seat, World};
use moe_parallel::all_to_all::RouteChoice;
use moe_parallel::comm::Communicator;
use moe_parallel::comm::thread::ThreadWorld;
use moe_parallel::{Collectives, Mesh, ParallelDims};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::oneshot;

/// Seconds after which a rank that does not answer ends the server.
const COMM_TIMEOUT_S: f64 = 30.0;

/// Serves on the ranks that there are.
pub(super) fn run(args: &ServeArgs) -> Result<()> {
    let timeout = args.ranks.timeout(COMM_TIMEOUT_S)?;
    match World::start(&args.ranks, COMM_TIMEOUT_S)? {
        World::One => {
            args.ranks.check_one_rank()?;
            args.serve_alone()
        }
        World::Threads(ranks) => on_threads(args, ranks, timeout),
        World::Process(process) => as_process(args, process, timeout),
    }
}

/// Threads of this process: they end together.
fn on_threads(args: &ServeArgs, ranks: usize, timeout: Duration) -> Result<()> {
    if args.ranks.max_restarts() > 0 {
        bail!("--max-restarts is for ranks that are processes: threads of one process end together");
    }
    tracing::info!("ranks: {ranks} threads of this process");
    let ranks_per_node = args.ranks.ranks_per_node().unwrap_or(ranks);
    let results = ThreadWorld::new(ranks).with_timeout(timeout).run(|comm| {
        let seat = Seat { comm: Some(comm), ranks_per_node, ranks_of_process: ranks };
        serve_rank(args, &seat, args.ranks.serving_dims(ranks)?, timeout, &Arc::default())
    });
    // Why rank 0 could not go on is said by the one that knows.
    let heard = |error: &anyhow::Error| matches!(error.downcast_ref(), Some(Error::EngineLost(_)));
    results.into_iter().filter_map(Result::err).min_by_key(heard).map_or(Ok(()), Err)
}

/// One of several processes.
fn as_process(args: &ServeArgs, mut process: Process, timeout: Duration) -> Result<()> {
    let told_to_stop = Arc::new(AtomicBool::new(false));
    if process.comm.rank() > 0 {
        // Launchers pass signals on to all; rank 0 says when it is time to leave.
        let told = Arc::clone(&told_to_stop);
        ctrlc::set_handler(move || told.store(true, Ordering::Relaxed)).context("cannot listen for signals")?;
    }
    let mut dims = args.ranks.serving_dims(process.comm.size())?;
    let mut restarts = 0;
    loop {
        let first = process.comm.rank() == 0;
        if first {
            tracing::info!("ranks: {}", process.found);
        }
        let error = match serve_rank(args, &process.seat(), dims, timeout, &told_to_stop) {
            Ok(()) => return process.finish(),
            Err(error) => error,
        };
        let is_last = restarts == args.ranks.max_restarts() || told_to_stop.load(Ordering::Relaxed);
        if process.comm.fault().is_none() || is_last {
            return Err(error);
        }
        restarts += 1;
        if first {
            let of = args.ranks.max_restarts();
            tracing::error!("{error:#}; restart {restarts} of {of} without the ranks that are gone");
        }
        let ranks = process.comm.size();
        process = match process.shrink() {
            Ok(smaller) => smaller,
            // Why it had to be comes first.
            Err(why) => return Err(error.context(format!("the ranks that are left of {ranks} cannot go on: {why}"))),
        };
        dims = args.ranks.dims_of_the_left(process.comm.size())?;
    }
}

/// Serves until a signal comes, which sets `told_to_stop`, or a rank fails.
fn serve_rank(
    args: &ServeArgs,
    seat: &Seat,
    dims: ParallelDims,
    timeout: Duration,
    told_to_stop: &Arc<AtomicBool>,
) -> Result<()> {
    let comm: Arc<dyn Communicator> = seat.comm.clone().context("a rank of several has a communicator")?;
    let mesh =
        Arc::new(Mesh::new(Arc::clone(&comm), dims, seat.ranks_per_node, args.ranks.exchange(RouteChoice::BySize))?);
    let model = args.told(args.model.load_over(args.served_model_name.clone(), &mesh)?);
    let config = args.config()?;
    let (kv_cache_bytes, max_sequences) = (config.kv_cache_bytes, config.scheduling.max_sequences);
    if comm.rank() > 0 {
        return Ok(follow(mesh, model.lm, kv_cache_bytes, max_sequences)?);
    }
    tracing::info!(
        "dp {} x tp {}, experts over {} ranks, {} slices of each, all-to-all {}",
        dims.dp,
        dims.tp,
        dims.ep,
        dims.expert_slices,
        mesh.exchange().route
    );
    for (ep, times) in mesh.route_times() {
        tracing::info!("all-to-all over {ep} ranks: {times}");
    }
    let replicas = RankReplicas::new(mesh, Arc::clone(&model.lm), kv_cache_bytes, max_sequences, timeout)?;
    let name = model.name.clone();
    let (server, engine) = Server::over(model, config, Box::new(replicas))?;
    // The kernels of a rank run on its own thread, and so does the engine; the network has its threads.
    let (ended, engine_ended) = oneshot::channel::<()>();
    std::thread::scope(|scope| {
        let listening = scope.spawn(|| {
            let ended = async {
                engine_ended.await.ok();
            };
            args.listen(server, &name, ended, told_to_stop)
        });
        let worked = engine.run();
        drop(ended);
        let listened = listening.join().unwrap_or_else(|_| bail!("the network's thread panicked"));
        worked?;
        listened
    })
}
