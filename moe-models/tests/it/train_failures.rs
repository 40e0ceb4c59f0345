//! A rank that fails by itself, in the middle of what it does together with others: all end at once, with its name and its words,
//! and what was saved before is whole.

use crate::train_faults::{TIMEOUT, config, layout, scratch, unfinished, world};
use crate::train_gpt::{corpus, shape};
use crate::train_ranks::Layout;
use candle_core::{DType, Var};
use moe_core::ParamSpec;
use moe_models::gpt::Gpt;
use moe_models::hf::NameTable;
use moe_models::train::checkpoint::{CheckpointStore, read_state, verify};
use moe_models::train::optimizer::UpdateRule;
use moe_models::train::{RunFolder, Silent, TrainConfig, TrainModel, Trainer, Zero};
use moe_models::{Error, LossOutput, Pass, Precision, Result, TokenBatch};
use moe_parallel::{Collectives, Communicator};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

/// Where a rank fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Before a forward pass of the third step, by a panic.
    BeforePass,
    /// Between its forward and its backward pass.
    InsidePass,
    /// In the validation of step 4.
    Evaluation,
    /// The disk is full when it writes its part of the checkpoint of step 4.
    Part,
    /// The same of the configuration, which rank 0 writes.
    Config,
}

const WORDS: &str = "out of activations";

/// A model that fails.
#[derive(Debug)]
struct Fragile {
    gpt: Gpt,
    /// The file that cannot be written.
    part: PathBuf,
    place: Option<Place>,
}

impl Fragile {
    fn fails(&self, place: Place) -> Result<()> {
        if self.place == Some(place) { Err(Error::Argument(WORDS.into())) } else { Ok(()) }
    }
}

impl TrainModel for Fragile {
    fn vocab_size(&self) -> usize {
        self.gpt.vocab_size()
    }
    fn max_seq_len(&self) -> usize {
        self.gpt.max_seq_len()
    }
    fn params(&self) -> &[(String, Var)] {
        TrainModel::params(&self.gpt)
    }
    fn update_rule(&self, name: &str, shape: &[usize]) -> UpdateRule {
        self.gpt.update_rule(name, shape)
    }
    fn specs(&self) -> Vec<ParamSpec> {
        self.gpt.specs()
    }
    fn names(&self) -> NameTable {
        // A folder in the place of the file.
        if self.place == Some(Place::Part) && self.part.parent().is_some_and(Path::exists) {
            std::fs::create_dir(&self.part).unwrap();
        }
        self.gpt.names()
    }
    fn grad_group(&self, name: &str) -> String {
        self.gpt.grad_group(name)
    }
    fn loss(&self, batch: &TokenBatch, pass: Pass) -> Result<LossOutput> {
        let third = matches!(pass, Pass::Train(pass) if pass.step == 2);
        assert!(!third || self.place != Some(Place::BeforePass), "{WORDS}");
        let output = self.gpt.loss(batch, pass)?;
        match pass {
            Pass::Train(_) if third => self.fails(Place::InsidePass)?,
            Pass::Train(_) => {}
            Pass::Eval => self.fails(Place::Evaluation)?,
        }
        Ok(output)
    }
    fn save_config(&self, dir: &Path, dtype: DType) -> Result<()> {
        if self.part.parent() == Some(dir) && self.place == Some(Place::Config) {
            return Err(Error::io(dir.join("config.json"), std::io::Error::other(WORDS)));
        }
        self.gpt.save_config(dir, dtype)
    }
}

/// A run over the ranks of `layout` in `out`, of which `rank` fails: what each returns.
fn run(layout: Layout, out: &Path, rank: usize, place: Place) -> Vec<(Error, Duration)> {
    let ranks = layout.dims.world_size();
    let name = format!("optimizer-{:05}-of-{ranks:05}.safetensors", rank + 1);
    let part = out.join(".tmp-step-00000004").join(name);
    let one = |comm: Arc<dyn Communicator>| -> Result<()> {
        // A batch of the validation for every rank.
        let config = TrainConfig { eval_iters: 4, ..config() };
        let (corpus, tokenizer) = corpus(&config);
        let mesh = layout.mesh(&comm)?;
        let gpt = Gpt::new_over(shape(), config.seed, Arc::clone(&mesh))?.with_precision(Precision::F32)?;
        let folder = RunFolder::shared(out, layout.ranks(&mesh, gpt.table())?)?;
        let place = (comm.rank() == rank).then_some(place);
        let model = Fragile { gpt, part: part.clone(), place };
        let mut trainer = Trainer::new_in(model, config, corpus, tokenizer, folder)?;
        trainer.run(&AtomicBool::new(false), &mut Silent).map(drop)
    };
    world(layout).run_timed(one).into_iter().map(|(result, at)| (result.unwrap_err(), at)).collect()
}

#[track_caller]
fn check(layout: Layout, rank: usize, place: Place) {
    let dir = scratch();
    let ends = run(layout, dir.path(), rank, place);
    let label = format!("{place:?} of rank {rank} in {layout:?}: {ends:?}");
    // 1. At once, though the deadline is far.
    assert!(ends.iter().all(|(_, at)| *at < TIMEOUT / 100), "{label}");
    // 2. Its own error there, its name and its words elsewhere.
    let own = ends[rank].0.to_string();
    let words = if place == Place::Part { "safetensors" } else { WORDS };
    assert!(ends[rank].0.fault().is_none() && own.contains(words), "{label}");
    assert_eq!(matches!(ends[rank].0, Error::Panic { .. }), place == Place::BeforePass, "{label}");
    for (other, (error, _)) in ends.iter().enumerate().filter(|(other, _)| *other != rank) {
        let text = error.to_string();
        assert!(text.contains(&format!("rank {rank}")) && text.contains(&own), "rank {other} says {text}: {label}");
    }
    // 3. What was saved before, and nothing else.
    let store = CheckpointStore::read_only(dir.path(), 2);
    let saved = store.latest().unwrap();
    assert_eq!(unfinished(dir.path()), Vec::<String>::new(), "{label}");
    if place == Place::Evaluation {
        assert_eq!(saved, None, "{label}");
    } else {
        assert_eq!(saved, Some(store.folder(2)), "{label}");
        verify(&store.folder(2), &read_state(&store.folder(2)).unwrap()).unwrap();
    }
}

/// Layouts whose passes exchange rows or parts of products, and replicas that add gradients up between their passes.
fn layouts() -> [Layout; 7] {
    [
        layout(3, 1, 3, 1, Zero::Off),
        layout(4, 1, 4, 1, Zero::Gradients),
        layout(2, 2, 2, 1, Zero::Moments),
        layout(2, 1, 1, 2, Zero::Off),
        layout(1, 2, 1, 1, Zero::Off),
        layout(2, 1, 1, 1, Zero::Gradients),
        layout(3, 1, 1, 1, Zero::Moments),
    ]
}

#[test]
fn a_failure_inside_of_a_pass_ends_all_ranks_at_once() {
    for layout in layouts() {
        for rank in 0..layout.dims.world_size() {
            for place in [Place::BeforePass, Place::InsidePass, Place::Evaluation] {
                check(layout, rank, place);
            }
        }
    }
}

#[test]
fn a_disk_that_is_full_on_one_rank_ends_all_at_once() {
    for layout in layouts() {
        check(layout, 0, Place::Config);
        for rank in 0..layout.dims.world_size() {
            check(layout, rank, Place::Part);
        }
    }
}
