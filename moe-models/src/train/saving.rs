//! [`Saving`]: what each rank of a run writes of a checkpoint, and reads of one: of any layout, by boxes of whole tensors.

use super::checkpoint::{CheckpointStore, TrainerState};
use super::division::{Division, Undivided};
use super::folder_files::FolderFiles;
use super::lock::RunLock;
use super::model::{TrainModel, update_rules};
use super::optimizer::{AdamW, Moments, OptimizerState, Owned, Unit, Units};
use super::ranks::{OneRank, Ranks, all_well, exchange};
use super::shards::{
    Kind, MomentsPart, PartReport, Reader, Save, SavingRank, Tensors, WeightsPart, WritePlan, finish, tensors,
    write_part,
};
use crate::{Error, Result};
use candle_core::{CpuStorage, DType, Storage, Var};
use moe_core::{CounterRng, ParamSpec};
use moe_parallel::dims::part;
use moe_parallel::{Extent, Phase, Placement};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::ops::{Deref, Range};
use std::path::{Path, PathBuf};

/// Keeps numbers of saves apart from every other use of the run's seed.
const SAVE_TAG: u64 = 0x7361_7665_0000_0000;

/// What a rank holds of a model.
#[derive(Debug)]
pub struct Saving {
    placement: Placement,
    specs: Vec<ParamSpec>,
    /// Of each parameter in `specs`.
    extents: Vec<Vec<Extent>>,
    /// What this rank writes of each.
    writes: Vec<Vec<Range<usize>>>,
    /// Of each trained parameter, its place in `specs`.
    trained: Vec<usize>,
}

impl Saving {
    /// Of the rank at `placement`, which holds `model`.
    ///
    /// # Errors
    /// [`Error::Argument`] for a trained parameter that the model does not describe, or holds another part of than it should.
    pub fn new<M: TrainModel>(model: &M, placement: Placement) -> Result<Self> {
        let specs = model.specs();
        let extents: Vec<_> = specs.iter().map(|spec| placement.extents(spec)).collect();
        let plan = WritePlan::new(&specs, model.names(), placement.dims())?;
        let writes = extents.iter().map(|extents| plan.ranges(placement.rank(), extents)).collect();
        let by_name: HashMap<&str, usize> = specs.iter().enumerate().map(|(i, spec)| (spec.name.as_str(), i)).collect();
        let place = |name: &String| {
            let unknown = || Error::Argument(format!("the model does not describe its parameter {name}"));
            by_name.get(name.as_str()).copied().ok_or_else(unknown)
        };
        let trained = model.params().iter().map(|(name, _)| place(name)).collect::<Result<Vec<_>>>()?;
        for ((name, var), &spec) in model.params().iter().zip(&trained) {
            let (want, got) = (extents[spec].iter().map(Extent::elements).sum::<usize>(), var.elem_count());
            if want != got {
                let rank = placement.rank();
                return Err(Error::Argument(format!(
                    "rank {rank} of {:?} holds {want} elements of {name}, the model has {got}; build it over the same mesh",
                    placement.dims()
                )));
            }
        }
        Ok(Self { placement, specs, extents, writes, trained })
    }

    /// What trained parameters are counted in.
    ///
    /// # Errors
    /// As [`Units::within`].
    pub fn units(&self) -> Result<Units> {
        let unit = |extent: &Extent| Unit { name: extent.key(), elements: extent.elements() };
        let held: Vec<Vec<Unit>> =
            self.trained.iter().map(|&spec| self.extents[spec].iter().map(unit).collect()).collect();
        let dims = self.placement.dims();
        let mut all = BTreeSet::new();
        for rank in 0..dims.world_size() {
            let placement = Placement::new(dims, rank)?;
            all.extend(self.trained.iter().flat_map(|&spec| placement.extents(&self.specs[spec])).map(|e| unit(&e)));
        }
        Units::within(all.into_iter().collect(), &held)
    }

    /// The tensors of the model.
    fn tensors(&self) -> Tensors {
        let trained: HashSet<&str> = self.trained.iter().map(|&spec| self.specs[spec].name.as_str()).collect();
        tensors(&self.specs, |name| trained.contains(name))
    }

    /// What this rank writes of the moments of each trained parameter. Where ranks that hold the same part divide them, each
    /// writes its own; of parts that several such groups hold, the group of the first rank that holds it.
    fn moment_writes(&self, division: &dyn Division) -> Result<Vec<Vec<Range<usize>>>> {
        let divided = (0..self.trained.len()).any(|param| division.divides(param).is_some());
        let dims = self.placement.dims();
        let mut first_holder: HashMap<String, usize> = HashMap::new();
        for rank in (0..dims.world_size()).rev().filter(|_| divided) {
            let placement = Placement::new(dims, rank)?;
            for &spec in &self.trained {
                first_holder.extend(placement.extents(&self.specs[spec]).into_iter().map(|e| (e.key(), rank)));
            }
        }
        let of = |(param, &spec): (usize, &usize)| {
            let Some(group) = division.divides(param) else { return self.writes[spec].clone() };
            let (mut ranges, mut start) = (Vec::new(), 0);
            for extent in &self.extents[spec] {
                let unit = start..start + extent.elements();
                start = unit.end;
                if first_holder.get(&extent.key()).is_some_and(|first| group.contains(first)) {
                    let within = |range: &Range<usize>| range.start.max(unit.start)..range.end.min(unit.end);
                    ranges.extend(division.owned().ranges(param).iter().map(within).filter(|range| !range.is_empty()));
                }
            }
            ranges
        };
        Ok(self.trained.iter().enumerate().map(of).collect())
    }

    /// Writes a checkpoint, all ranks together. Rank 0 gives the folder its name once every part is on the disk; on an error nothing
    /// is left of it, and those before are untouched. A fault leaves what is written by then, since some ranks may write still: the
    /// folder has no name of its own, and is removed when the store is opened next.
    ///
    /// # Errors
    /// [`Error::Io`] and the model's errors if something cannot be written on any rank; as [`Ranks`].
    pub(super) fn save<M: TrainModel>(&self, saved: &Saved<'_, M>) -> Result<PathBuf> {
        let Saved { ranks, store, state, .. } = *saved;
        let first = ranks.rank() == 0;
        let begin = || saved.check_lock().and_then(|()| store.begin(state.step)).map(drop);
        all_well(ranks, Phase::Save, if first { begin() } else { Ok(()) })?;
        let filled = self.fill(saved);
        // What another process has taken over is its own.
        let ours = |error: &Error| error.fault().is_none() && !matches!(error, Error::InUse { .. });
        if first && filled.as_ref().is_err_and(ours) {
            store.abort(state.step);
        }
        filled.map(|()| store.folder(state.step))
    }

    fn fill<M: TrainModel>(&self, saved: &Saved<'_, M>) -> Result<()> {
        let Saved { ranks, store, state, model, .. } = *saved;
        let (first, dir) = (ranks.rank() == 0, store.unfinished(state.step));
        let dims = self.placement.dims();
        let numbers = [dims.dp, dims.tp, dims.ep, dims.expert_slices].map(|n| n as u64);
        let id = CounterRng::mix(state.config.seed ^ SAVE_TAG ^ state.step, &numbers);
        let save = Save { step: state.step, id };
        let own = || {
            if first {
                model.save_config(&dir, DType::F32)?;
                saved.files.write(model.max_seq_len(), &dir)?;
            }
            self.write(&dir, save, saved)?.to_words()
        };
        let reports = exchange(ranks, Phase::Save, own())?;
        let end = || {
            let read = |(rank, words): (usize, &Vec<u64>)| PartReport::from_words(rank, words);
            let reports = reports.iter().enumerate().map(read).collect::<Result<Vec<_>>>()?;
            let checks = finish(&dir, save, &reports, self.tensors())?;
            saved.check_lock()?;
            store.commit(state, checks).map(drop)
        };
        all_well(ranks, Phase::Save, if first { end() } else { Ok(()) })
    }

    /// This rank's files.
    fn write<M: TrainModel>(&self, dir: &Path, save: Save, saved: &Saved<'_, M>) -> Result<PartReport> {
        let Saved { model, division, moments, .. } = *saved;
        let memory = model.weights().iter().map(|(_, var)| Memory::of(var)).collect::<Result<Vec<_>>>()?;
        let weights: Vec<WeightsPart<'_>> = (0..self.specs.len())
            .map(|i| WeightsPart {
                spec: &self.specs[i],
                extents: &self.extents[i],
                values: memory[i].values(),
                writes: &self.writes[i],
            })
            .collect();
        let writes = self.moment_writes(division)?;
        let moments: Vec<MomentsPart<'_>> = (self.trained.iter().enumerate().zip(moments))
            .map(|((param, &spec), moments)| MomentsPart {
                extents: &self.extents[spec],
                owned: division.owned().ranges(param),
                exp_avg: &moments.exp_avg,
                exp_avg_sq: &moments.exp_avg_sq,
                writes: &writes[param],
            })
            .collect();
        let by = SavingRank { save, rank: self.placement.rank(), ranks: self.placement.dims().world_size() };
        write_part(dir, by, model.names(), &weights, &moments)
    }

    /// This rank's optimizer, which owns `owned`, from a checkpoint of any layout.
    ///
    /// # Errors
    /// As [`Reader::open`], [`Reader::check`] and [`Reader::read`].
    pub fn load<M: TrainModel>(&self, folder: &Path, state: &TrainerState, model: &M, owned: Owned) -> Result<AdamW> {
        let reader = Reader::open(folder)?;
        reader.check(&self.tensors())?;
        let of = |(param, &spec): (usize, &usize)| {
            let read = |kind: Kind| -> Result<Vec<f32>> {
                let mut values = vec![0.0; owned.elements(param)];
                reader.read(kind, &self.extents[spec], owned.ranges(param), &mut values)?;
                Ok(values)
            };
            Ok(Moments { exp_avg: read(Kind::ExpAvg)?, exp_avg_sq: read(Kind::ExpAvgSq)? })
        };
        let moments = self.trained.iter().enumerate().map(of).collect::<Result<_>>()?;
        let (updates, skipped_in_a_row) = (state.optimizer_updates, state.skipped_in_a_row);
        let restored = OptimizerState { moments, updates, skipped_in_a_row };
        AdamW::with_state(state.config.adamw(), owned, update_rules(model), restored)
    }
}

/// The values of a parameter: where they lie, on the CPU.
enum Memory<'a> {
    Lent(Box<dyn Deref<Target = Storage> + 'a>, Range<usize>),
    Copied(Vec<f32>),
}

impl<'a> Memory<'a> {
    fn of(var: &'a Var) -> Result<Self> {
        let (storage, layout) = var.storage_and_layout();
        match (&*storage, layout.contiguous_offsets()) {
            (Storage::Cpu(CpuStorage::F32(_)), Some((start, end))) => Ok(Self::Lent(Box::new(storage), start..end)),
            _ => {
                drop(storage);
                Ok(Self::Copied(var.flatten_all()?.to_vec1()?))
            }
        }
    }

    fn values(&self) -> &[f32] {
        match self {
            Self::Copied(values) => values,
            Self::Lent(storage, range) => match &***storage {
                Storage::Cpu(CpuStorage::F32(values)) => &values[range.clone()],
                _ => &[],
            },
        }
    }
}

/// What a rank saves, and with whom.
#[derive(Debug)]
pub(super) struct Saved<'a, M> {
    pub(super) ranks: &'a dyn Ranks,
    pub(super) store: &'a CheckpointStore,
    /// On the rank that writes the folder of a run.
    pub(super) lock: Option<&'a RunLock>,
    pub(super) model: &'a M,
    pub(super) division: &'a dyn Division,
    /// Of what this rank owns.
    pub(super) moments: &'a [Moments],
    pub(super) files: &'a FolderFiles,
    pub(super) state: &'a TrainerState,
}

impl<M> Saved<'_, M> {
    fn check_lock(&self) -> Result<()> {
        self.lock.map_or(Ok(()), RunLock::check)
    }
}

/// Compares this rank's share of a checkpoint's files with the sizes and checksums in its state; all ranks together compare all.
///
/// # Errors
/// As [`super::checkpoint::verify`], on every rank.
pub(super) fn verify_over(ranks: &dyn Ranks, folder: &Path, state: &TrainerState) -> Result<()> {
    let placement = ranks.placement();
    let share = part(state.files.len(), placement.rank(), placement.dims().world_size());
    all_well(ranks, Phase::Start, state.files[share].iter().try_for_each(|file| file.verify(folder)))
}

/// Writes a checkpoint of a run of one rank.
///
/// # Errors
/// [`Error::Io`] and the model's errors if something cannot be written; nothing is left of it then.
pub fn save_whole<M: TrainModel>(
    store: &CheckpointStore,
    model: &M,
    optimizer: &AdamW,
    tokenizer_json: &str,
    state: &TrainerState,
) -> Result<PathBuf> {
    let (division, moments) = (&Undivided(optimizer.owned().clone()), optimizer.moments());
    let files = &FolderFiles::from(tokenizer_json.to_owned());
    let saved = Saved { ranks: &OneRank, store, lock: None, model, division, moments, files, state };
    Saving::new(model, Placement::WHOLE)?.save(&saved)
}

/// The optimizer of a run of one rank, from a checkpoint of any layout.
///
/// # Errors
/// As [`Saving::load`].
pub fn load_optimizer<M: TrainModel>(folder: &Path, state: &TrainerState, model: &M) -> Result<AdamW> {
    let saving = Saving::new(model, Placement::WHOLE)?;
    saving.load(folder, state, model, Owned::everything(saving.units()?))
}
