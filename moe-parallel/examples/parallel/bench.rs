//! The bench that every rank runs, over whatever communicator: forms of one exchange of rows, timed in turns.
//!
//! See `form.rs` for what is compared. Counts are known beforehand, results are checked before anything is timed, and a time is
//! the median over the repetitions of the time of the rank that took longest, from a common barrier on.

use crate::form::{Form, Layout, sent};
use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use moe_parallel::all_to_all::{AllToAll, Counts, Direction, Nodes, Plan};
use moe_parallel::comm::{Group, Reduction};
use moe_parallel::{Collectives, Communicator, Phase, Site};
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::sync::Arc;

/// Exchanges of rows over many ranks, timed.
#[derive(Parser)]
pub(crate) struct Args {
    /// Consecutive ranks of a node.
    #[arg(long, default_value_t = 2)]
    ranks_per_node: usize,
    /// Consecutive ranks of a tensor group, for the coordinated forms.
    #[arg(long, value_delimiter = ',', default_value = "2")]
    tensor_ranks: Vec<usize>,
    /// Bytes of a pair of ranks, in the mean.
    #[arg(long, value_delimiter = ',', default_value = "64,256,1024,4096,16384,65536,262144,1048576")]
    bytes: Vec<usize>,
    /// Which rank's experts have how many rows.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "balanced,skewed")]
    loads: Vec<Load>,
    /// Only these.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "flat,hierarchical,coordinated,both,library")]
    forms: Vec<Choice>,
    /// Most repetitions of each.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    repetitions: u32,
    /// Fewer repetitions, but at least eleven, where they would take longer.
    #[arg(long, default_value_t = 1.5)]
    seconds: f64,
    /// Print a line of JSON for each time too.
    #[arg(long)]
    json: bool,
    /// The ranks are this many threads instead of the processes of an MPI job.
    #[arg(long)]
    pub(crate) threads: Option<usize>,
}

/// What can be timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Choice {
    Flat,
    Hierarchical,
    Coordinated,
    Both,
    /// MPI's own all-to-all, where the ranks are processes.
    Library,
}

impl Choice {
    fn form(self) -> Option<Form> {
        match self {
            Self::Flat => Some(Form::Flat),
            Self::Hierarchical => Some(Form::Hierarchical),
            Self::Coordinated => Some(Form::Coordinated),
            Self::Both => Some(Form::Both),
            Self::Library => None,
        }
    }
}

/// How rows are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Load {
    /// The experts of every rank have as many.
    Balanced,
    /// Those of one rank have half of all.
    Skewed,
}

impl Load {
    fn name(self) -> &'static str {
        match self {
            Self::Balanced => "balanced",
            Self::Skewed => "skewed",
        }
    }

    /// Values that each rank sends to the experts of each of `ranks`, `each` in the mean.
    fn spread(self, ranks: usize, each: usize) -> Vec<usize> {
        let all = ranks * each;
        let others = |all: usize| (0..ranks - 1).map(move |rank| moe_parallel::dims::part(all, rank, ranks - 1).len());
        match self {
            Self::Skewed if ranks > 1 => std::iter::once(all / 2).chain(others(all - all / 2)).collect(),
            Self::Balanced | Self::Skewed => vec![each; ranks],
        }
    }
}

/// What the bench runs on.
pub(crate) struct Engine {
    pub(crate) comm: Arc<dyn Communicator>,
    /// Seconds since whenever.
    pub(crate) now: fn() -> f64,
    /// Returns when all ranks have come here.
    pub(crate) meet: fn(&dyn Communicator) -> Result<()>,
    /// The largest of all ranks, for each value.
    pub(crate) largest: fn(&dyn Communicator, &[f64]) -> Result<Vec<f64>>,
    pub(crate) library: Option<Library>,
}

/// Another's all-to-all: sends the values in parts of the first counts, receives parts of the second.
pub(crate) type Library = fn(&[f32], &[usize], &[usize]) -> Result<Vec<f32>>;

impl Engine {
    /// With the communicator's own collectives, and no other's beside.
    pub(crate) fn new(comm: Arc<dyn Communicator>, now: fn() -> f64) -> Self {
        let largest = |comm: &dyn Communicator, values: &[f64]| Ok(comm.all_reduce(SITE, values, Reduction::Max)?);
        Self { comm, now, meet: |comm| Ok(comm.barrier(SITE)?), largest, library: None }
    }
}

const SITE: Site = Site::layer(Phase::Forward, 0);

/// A form over the ranks it is among.
struct Way {
    form: Form,
    layout: Layout,
    exchange: Arc<AllToAll>,
    /// Who gathers, on the coordinated forms.
    tensor_group: Option<Arc<dyn Communicator>>,
}

impl Way {
    fn new(form: Form, layout: Layout, comm: &Arc<dyn Communicator>) -> Result<Self> {
        let (rank, coordinated) = (comm.rank(), form.is_coordinated());
        // All ranks know the layout, so groups are made without asking. Each has a context of its own; the world's is 0.
        let group = |kind: usize, color: usize, members: Vec<usize>| {
            let kind = 2 * usize::from(form == Form::Both) + kind;
            let context = 1 + (layout.tensor_ranks * 4 + kind) * layout.ranks + color;
            comm.over(Group::new(context as u64, members, comm.group().world_rank()))
        };
        let (index, of) = (rank % layout.tensor_ranks, rank / layout.tensor_ranks);
        let among = if coordinated { group(0, index, form.members(layout, rank)) } else { Arc::clone(comm) };
        let tensor_group = coordinated.then(|| group(1, of, layout.tensor_group(rank)));
        let nodes = Nodes::uniform(among.group().members(), layout.ranks_per_node);
        Ok(Self { form, layout, exchange: Arc::new(AllToAll::new(among, nodes, form.route())?), tensor_group })
    }

    fn name(&self) -> String {
        let name = self.form.name();
        if self.form.is_coordinated() { format!("{name} {}", self.layout.tensor_ranks) } else { name.into() }
    }

    /// Ready to run: `spread` are the values of each rank's experts for each rank.
    fn prepare(&self, spread: &[usize], tokens_of: impl Fn(usize) -> usize) -> Prepared<'_> {
        let members = self.exchange.comm().group().members();
        let sends: Vec<Vec<usize>> = members.iter().map(|&member| vec![spread[member]]).collect();
        let place = self.exchange.comm().rank();
        let all = vec![sends; members.len()];
        let plan = self.exchange.plan(&Counts::of(&all, place, self.form.route(), self.exchange.nodes()));
        let input =
            members.iter().flat_map(|&to| values(members[place], tokens_of(to), spread[members[place]])).collect();
        let gathered = (0..self.layout.tensor_ranks)
            .map(|index| self.form.members(self.layout, index).iter().map(|&member| spread[member]).sum());
        Prepared { way: self, plan: Arc::new(plan), input, gathered: gathered.collect() }
    }
}

/// What the experts of rank `from` made of some tokens.
fn values(from: usize, tokens: usize, count: usize) -> impl Iterator<Item = f32> {
    (0..count).map(move |at| (from * 7919 + tokens * 104_729 + at * 31) as f32)
}

/// A form, and what it moves.
struct Prepared<'a> {
    way: &'a Way,
    plan: Arc<Plan>,
    input: Vec<f32>,
    /// Values that each tensor rank has before they are gathered.
    gathered: Vec<usize>,
}

impl Prepared<'_> {
    /// All that experts made of this rank's tokens, by the experts' ranks.
    fn run(&self, spread: &[usize]) -> Result<Vec<f32>> {
        let own = self.way.exchange.run(&self.plan, Direction::Back, SITE, &self.input, 1)?;
        let Some(group) = &self.way.tensor_group else { return Ok(own) };
        let parts = group.start_all_gather_v(SITE, &own, &self.gathered)?.wait_parts()?;
        let mut rest: Vec<&[f32]> = parts.iter().map(Vec::as_slice).collect();
        let mut all = Vec::with_capacity(spread.iter().sum());
        for (rank, &count) in spread.iter().enumerate() {
            let rest = &mut rest[rank % parts.len()];
            let (head, tail) = rest.split_at(count);
            all.extend_from_slice(head);
            *rest = tail;
        }
        Ok(all)
    }
}

/// Something to time.
struct Entry<'a> {
    name: String,
    /// None for the library's.
    way: Option<&'a Way>,
    run: Box<dyn Fn() -> Result<Vec<f32>> + 'a>,
}

/// The ways that were asked for.
fn ways(args: &Args, comm: &Arc<dyn Communicator>) -> Result<Vec<Way>> {
    let layout = |tensor_ranks| Layout { ranks: comm.size(), ranks_per_node: args.ranks_per_node, tensor_ranks };
    args.tensor_ranks.iter().try_for_each(|&tensor_ranks| layout(tensor_ranks).check())?;
    let plain = [Form::Flat, Form::Hierarchical].map(|form| (form, 1));
    let coordinated = args.tensor_ranks.iter().flat_map(|&l| [Form::Coordinated, Form::Both].map(|form| (form, l)));
    let wanted = plain
        .into_iter()
        .chain(coordinated)
        .filter(|(form, _)| args.forms.iter().any(|choice| choice.form() == Some(*form)));
    wanted.map(|(form, tensor_ranks)| Way::new(form, layout(tensor_ranks), comm)).collect()
}

/// The whole bench; what rank 0 has to print: a table, and a line of JSON for each time if that was asked for.
pub(crate) fn run(args: &Args, engine: &Engine) -> Result<String> {
    let (rank, size) = (engine.comm.rank(), engine.comm.size());
    let ways = ways(args, &engine.comm)?;
    let tokens_of = |rank: usize| rank / args.tensor_ranks.iter().copied().max().unwrap_or(1);

    let mut table =
        format!("{size} ranks, {} a node; us\n{:<9} {:>8} {:>5}", args.ranks_per_node, "load", "bytes", "times");
    let mut lines = String::new();
    ways.iter().for_each(|way| table += &format!(" {:>14}", way.name()));
    let library = engine.library.filter(|_| args.forms.contains(&Choice::Library));
    table += if library.is_some() { "  MPI_Alltoallv\n" } else { "\n" };
    for (&load, &bytes) in args.loads.iter().flat_map(|load| args.bytes.iter().map(move |bytes| (load, bytes))) {
        let spread = &load.spread(size, bytes.div_ceil(size_of::<f32>()).max(1));
        let entry = |way| {
            let prepared = Way::prepare(way, spread, tokens_of);
            Entry { name: way.name(), way: Some(way), run: Box::new(move || prepared.run(spread)) }
        };
        let mut entries: Vec<Entry<'_>> = ways.iter().map(entry).collect();
        entries.extend(library.map(|library| {
            let input: Vec<f32> = (0..size).flat_map(|to| values(rank, tokens_of(to), spread[rank])).collect();
            let run = move || library(&input, &vec![spread[rank]; size], spread);
            Entry { name: "MPI_Alltoallv".into(), way: None, run: Box::new(run) }
        }));
        let want: Vec<f32> = (0..size).flat_map(|from| values(from, tokens_of(rank), spread[from])).collect();
        let times = time(args, engine, &entries, &want)?;

        // Writing to a string cannot fail.
        let _ = write!(table, "{:<9} {bytes:>8} {:>5}", load.name(), times[0].len());
        for (entry, times) in entries.iter().zip(&times) {
            let _ = write!(table, " {:>14.1}", median(times) * 1e6);
            let _ = writeln!(lines, "json {}", row(args, entry, size, (load, bytes), times));
        }
        table.push('\n');
    }
    Ok(if args.json { table + &lines } else { table })
}

/// The times of each entry, in turns so that all meet the same minutes; results are checked first.
fn time(args: &Args, engine: &Engine, entries: &[Entry<'_>], want: &[f32]) -> Result<Vec<Vec<f64>>> {
    let one = |entry: &Entry<'_>| {
        (engine.meet)(&*engine.comm)?;
        let start = (engine.now)();
        let got = (entry.run)()?;
        Ok::<_, anyhow::Error>(((engine.now)() - start, got))
    };
    for entry in entries {
        let (_, got) = one(entry)?;
        ensure!(got == want, "{} gave wrong rows on rank {}", entry.name, engine.comm.rank());
    }
    // The first time made connections; the second tells how often there is time for.
    let mut repetitions = args.repetitions;
    if repetitions > LEAST_REPETITIONS {
        let mine = entries.iter().map(|entry| Ok(one(entry)?.0)).collect::<Result<Vec<f64>>>()?;
        let slowest = (engine.largest)(&*engine.comm, &mine)?.into_iter().fold(0.0, f64::max);
        repetitions = ((args.seconds / slowest) as u32).clamp(LEAST_REPETITIONS, repetitions);
    }
    let mut times = vec![Vec::new(); entries.len()];
    for _ in 0..repetitions {
        for (entry, times) in entries.iter().zip(&mut times) {
            times.push(one(entry)?.0);
        }
    }
    times.iter().map(|times| (engine.largest)(&*engine.comm, times)).collect()
}

const LEAST_REPETITIONS: u32 = 11;

fn median(times: &[f64]) -> f64 {
    let mut times = times.to_vec();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn row(args: &Args, entry: &Entry<'_>, ranks: usize, (load, bytes): (Load, usize), times: &[f64]) -> Value {
    let least = times.iter().copied().fold(f64::INFINITY, f64::min);
    let sent = entry.way.map(|way| sent(way.form, way.layout, 0, 1));
    json!({
        "ranks": ranks,
        "ranks_per_node": args.ranks_per_node,
        "load": load.name(),
        "bytes": bytes,
        "form": entry.way.map_or("library", |way| way.form.name()),
        "name": entry.name,
        "tensor_ranks": entry.way.map(|way| way.layout.tensor_ranks),
        "intra_node_messages": sent.map(|sent| sent.intra_node.messages),
        "inter_node_messages": sent.map(|sent| sent.inter_node.messages),
        "median_seconds": median(times),
        "least_seconds": least,
        "repetitions": times.len(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use moe_parallel::comm::thread::ThreadWorld;
    use std::time::{SystemTime, UNIX_EPOCH};

    fn now() -> f64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
    }

    /// Every form brings every rank the same rows, or `run` fails.
    #[test]
    fn forms_agree_on_threads() {
        let flags = "exchange --ranks-per-node 4 --tensor-ranks 2,4 --bytes 4,60 --repetitions 1 --json";
        let args = Args::parse_from(flags.split(' '));
        let texts = ThreadWorld::new(8).run(|comm| run(&args, &Engine::new(comm, now)).unwrap());
        assert_eq!(texts[0].lines().filter(|line| line.starts_with("json ")).count(), 2 * 2 * 6);
    }

    #[test]
    fn a_layout_that_does_not_divide_is_refused() {
        let args = Args::parse_from(["exchange", "--tensor-ranks", "2"]);
        let refused = ThreadWorld::new(3).run(|comm| run(&args, &Engine::new(comm, now)).unwrap_err());
        assert!(refused[0].to_string().contains("must divide the 3 ranks"));
    }
}
