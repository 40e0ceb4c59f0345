//! Times the token step of a model whose ranks are threads of this process or processes that a launcher has started: each replica
//! has some sequences, and each sequence gets one token. What every part of the pass takes, what travels between ranks, what a rank
//! holds; beside it the formulation that the paper starts from, over the same weights. `cargo xtask repro inference` runs it over
//! emulated hosts.
//!
//! ```text
//! cargo run --release -p moe-models --example inference -- --model FOLDER --ranks 2 --min-capacity 4,1
//! ```

mod counted;
mod measure;
mod original;
mod phases;

use anyhow::{Context, Result, ensure};
use candle_core::{Device, Tensor};
use clap::Parser;
use counted::Counted;
use measure::{Measured, RankRecord};
use moe_core::{CounterRng, Ops};
use moe_kernels::KernelOps;
use moe_models::cli::ranks::{RankArgs, Seat, World};
use moe_models::cli::{PrecisionArg, choose_kernels};
use moe_models::{
    CachedSequence, CausalLm, Decoder, Family, KvPool, LogitsOf, ModelSource, PagedStep, ParamSource, PoolConfig,
    Precision, SequenceStep,
};
use moe_parallel::all_to_all::Route;
use moe_parallel::comm::Reduction;
use moe_parallel::comm::thread::ThreadWorld;
use moe_parallel::{Collectives, Communicator, Mesh, Phase, Site};
use original::Original;
use phases::Phases;
use serde_json::json;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

// What the programs use: fresh pages for every buffer would cost more than the kernels.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Seconds after which a rank that does not answer ends all.
const TIMEOUT_S: f64 = 120.0;
/// Steps that do not count.
const WARM_UP: usize = 4;
const LEAST_STEPS: usize = 12;
const MOST_STEPS: usize = 400;
const SITE: Site = Site::new(Phase::Serve);

/// Times the token step of a model over ranks.
#[derive(Debug, Parser)]
struct Args {
    /// Folder of the model.
    #[arg(long)]
    model: PathBuf,
    #[command(flatten)]
    ranks: RankArgs,
    /// Sequences of each replica of the dense layers.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    sequences: u32,
    /// Tokens of each sequence, the new one among them.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..))]
    context: u32,
    /// Also the original's formulation, whose experts take so many rows of a rank at least; one form for each.
    #[arg(long, value_name = "ROWS", value_delimiter = ',')]
    min_capacity: Vec<usize>,
    /// What the matrix products read.
    #[arg(long, value_enum, default_value = "bf16")]
    precision: PrecisionArg,
    /// Time for the steps of all forms.
    #[arg(long, default_value_t = 4.0)]
    seconds: f64,
}

/// A way to compute the step: logits, and tokens that found their expert full.
struct Form<'a> {
    name: String,
    run: Box<Run<'a>>,
}

type Run<'a> = dyn Fn(&PagedStep, &KvPool) -> Result<(Tensor, u64)> + 'a;

fn main() -> Result<()> {
    let args = Args::parse();
    choose_kernels()?;
    let phases = Phases::listen()?;
    let text = match World::start(&args.ranks, TIMEOUT_S)? {
        World::One => {
            args.ranks.check_one_rank()?;
            on_threads(&args, &phases, 1)?
        }
        World::Threads(ranks) => on_threads(&args, &phases, ranks)?,
        World::Process(process) => {
            let text = rank(&args, &phases, &process.seat())?;
            process.finish()?;
            text
        }
    };
    print!("{text}");
    Ok(())
}

fn on_threads(args: &Args, phases: &Phases, ranks: usize) -> Result<String> {
    let ranks_per_node = args.ranks.ranks_per_node().unwrap_or(ranks);
    let texts = ThreadWorld::new(ranks).run(|comm| {
        let seat = Seat { comm: Some(comm), ranks_per_node, ranks_of_process: ranks };
        rank(args, phases, &seat)
    });
    texts.into_iter().collect::<Result<Vec<_>>>().map(|texts| texts.into_iter().next().unwrap_or_default())
}

/// What rank 0 prints; nothing on the others.
fn rank(args: &Args, phases: &Phases, seat: &Seat) -> Result<String> {
    let comm: Arc<dyn Communicator> = seat.comm.clone().context("every rank here has a communicator")?;
    let counted = Arc::new(Counted::new(comm, seat.ranks_per_node));
    let world: Arc<dyn Communicator> = Arc::clone(&counted) as _;
    let dims = args.ranks.serving_dims(world.size())?;
    let mesh = Mesh::new(Arc::clone(&world), dims, seat.ranks_per_node, args.ranks.exchange(Route::Flat.into()))?;

    // 1. Ours, and what it takes; then the original over the same weights.
    let precision = Precision::from(args.precision);
    let ours = Decoder::load_over(&args.model, precision, &mesh)?;
    let mut workload = Workload::new(args, &ours, dims.dense(world.rank()).dp_rank)?;
    ours.run(&workload.next_step()?, &workload.pool)?;
    let record = RankRecord::new(&ours, &workload.pool, &mesh.placement(), seat.ranks_of_process)?;
    let originals = args.min_capacity.iter().map(|&rows| original(args, &mesh, precision, rows));
    let originals = originals.collect::<Result<Vec<_>>>()?;
    let mut forms = vec![Form {
        name: "ours".into(),
        run: Box::new(|step, pool| Ok((CausalLm::run(&ours, step, pool)?.logits, 0))),
    }];
    for (original, rows) in originals.iter().zip(&args.min_capacity) {
        let run = Box::new(|step: &PagedStep, pool: &KvPool| original.run(step, pool));
        forms.push(Form { name: format!("original, capacity {rows}"), run });
    }
    check(&forms, &workload.next_step()?, &workload.pool)?;

    // 2. Steps of all forms in turns, so that all meet the same minutes.
    let mut measured = Measured::new(forms.len());
    let mut round = |keep: bool| -> Result<f64> {
        let step = workload.next_step()?;
        let begun = Instant::now();
        for (index, form) in forms.iter().enumerate() {
            world.barrier(SITE)?;
            let run = || Ok((form.run)(&step, &workload.pool)?.1);
            let sample = measure::sample(phases, &counted, seat.ranks_of_process, run)?;
            if keep {
                measured.keep(index, sample);
            }
        }
        Ok(begun.elapsed().as_secs_f64())
    };
    let mut warm = f64::INFINITY;
    for _ in 0..WARM_UP {
        warm = warm.min(round(false)?);
    }
    let longest = world.all_reduce(SITE, &[warm], Reduction::Max)?[0];
    for _ in 0..((args.seconds / longest) as usize).clamp(LEAST_STEPS, MOST_STEPS) {
        round(true)?;
    }

    // 3. One line for each form.
    let head = json!({
        "ranks": world.size(), "ranks_per_node": seat.ranks_per_node, "dp": dims.dp, "tp": dims.tp, "ep": dims.ep,
        "route": mesh.exchange().route.to_string(),
        "coordination": format!("{:?}", mesh.exchange().coordination),
        "sequences": args.sequences, "context": args.context, "precision": format!("{precision:?}").to_lowercase(),
    });
    let names: Vec<&str> = forms.iter().map(|form| form.name.as_str()).collect();
    measured.lines(&*world, &head, &names, &record)
}

/// The sequences of a replica, each of which has all tokens but the last.
struct Workload {
    pool: KvPool,
    cached: Vec<CachedSequence>,
    vocab_size: u32,
    rng: CounterRng,
}

impl Workload {
    /// Reads the prompts. Called by all ranks; those of a tensor group have the same.
    fn new(args: &Args, lm: &Decoder, dp_rank: usize) -> Result<Self> {
        let (len, sequences) = (args.context as usize, args.sequences as usize);
        ensure!(len <= lm.max_seq_len(), "--context must be at most the model's {}, got {len}", lm.max_seq_len());
        let pool = lm.new_pool(PoolConfig::for_tokens(sequences, len))?;
        let cached = (0..sequences).map(|_| pool.sequence()).collect();
        let rng = CounterRng::new(1, dp_rank as u64);
        let mut workload = Self { pool, cached, vocab_size: lm.vocab_size() as u32, rng };
        for index in 0..sequences {
            let token_ids = &workload.ids(len - 1);
            let step = SequenceStep { sequence: &mut workload.cached[index], token_ids, logits: LogitsOf::None };
            lm.forward(&mut [step], &workload.pool)?;
        }
        Ok(workload)
    }

    fn ids(&mut self, count: usize) -> Vec<u32> {
        (0..count).map(|_| self.rng.below(self.vocab_size)).collect()
    }

    /// Another last token for each sequence: none of them grows.
    fn next_step(&mut self) -> Result<PagedStep> {
        let mut step = PagedStep::default();
        let ids = self.ids(self.cached.len());
        for (sequence, id) in self.cached.iter_mut().zip(ids) {
            step.add(sequence, &[id], LogitsOf::Last, self.pool.pages())?;
        }
        Ok(step)
    }
}

fn original(args: &Args, mesh: &Mesh, precision: Precision, min_capacity: usize) -> Result<Original> {
    ensure!(min_capacity > 0, "--min-capacity must be at least 1");
    let source = ModelSource::open(&args.model)?;
    let (family, _) = source.family::<Box<dyn Family>>()?;
    let config = family.decoder()?;
    let checkpoint = Arc::new(source.checkpoint(&family)?);
    let vb = ParamSource::checkpoint(Arc::new(config.params()), checkpoint, mesh.placement()).builder(&Device::Cpu);
    let ops: Arc<dyn Ops> = Arc::new(KernelOps::packing(precision));
    Original::over(&config, vb, ops, mesh, min_capacity)
}

/// Refuses to time forms that compute something else: rows may differ from the first form's where a token was dropped alone.
fn check(forms: &[Form<'_>], step: &PagedStep, pool: &KvPool) -> Result<()> {
    let (want, _) = (forms[0].run)(step, pool)?;
    let scale = want.abs()?.max_all()?.to_scalar::<f32>()?;
    for form in &forms[1..] {
        let (got, dropped) = (form.run)(step, pool)?;
        let off = (&got - &want)?.abs()?.max(1)?.to_vec1::<f32>()?;
        let differing = off.iter().filter(|off| off.is_nan() || **off > 0.02 * scale).count() as u64;
        ensure!(differing <= dropped, "{}: logits of {differing} tokens differ, and {dropped} were dropped", form.name);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_agree_over_ranks_and_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        write_folder(folder.path());
        let phases = Phases::default();
        for ranks in [1, 2, 4] {
            let flags = format!(
                "inference --model {} --ranks {ranks} --ranks-per-node 2 --min-capacity 4,1 --sequences 8 --context 9 \
                 --seconds 0 --precision f32",
                folder.path().display()
            );
            let text = on_threads(&Args::parse_from(flags.split(' ')), &phases, ranks).unwrap();
            let rows: Vec<serde_json::Value> =
                text.lines().map(|line| serde_json::from_str(line.strip_prefix("json ").unwrap()).unwrap()).collect();
            assert_eq!(rows.len(), 3);
            let of = |row: usize, key: &str| rows[row][key].as_f64().unwrap();
            for row in 0..3 {
                assert_eq!(of(row, "tokens"), 8.0 * ranks as f64);
                assert_eq!(of(row, "intra_node_messages") > 0.0, ranks > 1, "{text}");
                assert_eq!(of(row, "inter_node_messages") > 0.0, ranks > 2, "{text}");
            }
            if ranks > 1 {
                // All rows of all experts travel, whoever has tokens.
                let padded = |rows: usize| (8 - 8 / ranks) * rows * 2 * 2 * 16 * 4;
                let bytes = |row| of(row, "intra_node_bytes") + of(row, "inter_node_bytes");
                assert_eq!([bytes(1), bytes(2)], [padded(4), padded(1)].map(|bytes| bytes as f64));
                assert!(bytes(0) < bytes(1));
            }
        }
    }

    /// Two MoE layers of 8 experts, width 16.
    fn write_folder(folder: &std::path::Path) {
        use moe_models::gpt::{Gpt, GptConfig};
        let mut config = GptConfig::preset("tiny-moe").unwrap();
        (config.vocab_size, config.max_seq_len, config.d_model, config.num_heads, config.d_ff) = (64, 16, 16, 2, 32);
        config.num_layers = 4;
        config.init_std = 0.2;
        config.moe.as_mut().unwrap().num_experts = vec![8, 8];
        Gpt::new(config, 1, &Device::Cpu).unwrap().save(folder, candle_core::DType::F32).unwrap();
    }
}
