//! Checkpoints that ranks of one layout write and ranks of another read: weights and moments of a PR-MoE, bit by bit; the same model
//! as one folder, whoever wrote it; and every fault such a folder can have.

use crate::golden::fixtures;
use crate::toy::{self, Toy};
use candle_core::{DType, Device, Tensor};
use moe_core::{CounterRng, ParamSpec};
use moe_models::gpt::{Gpt, GptConfig};
use moe_models::train::checkpoint::{CheckpointStore, FileCheck, TrainerState, read_state, verify};
use moe_models::train::shards::{
    Kind, MomentsPart, PartReport, Reader, Save, SavingRank, Tensors, WeightsPart, WritePlan, export, finish, tensors,
    write_part,
};
use moe_models::train::{Silent, Trainer};
use moe_models::{Family, Model};
use moe_parallel::dims::{ExpertOrder, part};
use moe_parallel::{Extent, ParallelDims, Placement};
use proptest::prelude::*;
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::AtomicBool;

/// Families that publish stacks.
const STACKED: [&str; 3] = ["granitemoe", "gpt_oss", "llama4_text"];
const SAVE: Save = Save { step: 12, id: 0x5eed };
/// Not trained, so without moments.
const FROZEN: &str = "model.embed_positions.weight";

/// Ranks, and whether those that hold the same part divide its moments.
#[derive(Debug, Clone, Copy)]
struct Layout {
    name: &'static str,
    dims: ParallelDims,
    divided: bool,
}

fn layouts() -> Vec<Layout> {
    let layout = |name, (dp, tp, ep, slices), divided| {
        let dims = ParallelDims::new(dp, tp, ep, slices);
        Layout { name, dims, divided }
    };
    let order = |layout: Layout, order| Layout { dims: layout.dims.with_expert_order(order), ..layout };
    vec![
        layout("one rank", (1, 1, 1, 1), false),
        layout("dp 2", (2, 1, 1, 1), false),
        layout("dp 3", (3, 1, 1, 1), false),
        layout("dp 4, divided", (4, 1, 1, 1), true),
        layout("ep 2 x dp 2", (4, 1, 2, 1), false),
        layout("ep 4, divided", (4, 1, 4, 1), true),
        layout("tp 2", (1, 2, 1, 1), false),
        layout("tp 2 x ep 2", (2, 2, 2, 1), false),
        layout("expert_slices 2", (2, 1, 1, 2), false),
        layout("tp 2 x dp 2, divided", (2, 2, 1, 1), true),
        layout("ep 3", (3, 1, 3, 1), false),
        layout("8 ranks mixed, divided", (4, 2, 4, 2), true),
        order(layout("ep 2, data first, divided", (4, 1, 2, 1), true), ExpertOrder::DataFirst),
        order(layout("ep 2 within tp 2", (2, 2, 2, 1), true), ExpertOrder::WithinTensor),
    ]
}

fn layout(name: &str) -> Layout {
    layouts().into_iter().find(|layout| layout.name == name).unwrap()
}

type Any = Model<Box<dyn Family>>;

/// A model with its weights and moments.
struct State {
    model: Any,
    /// Of each kind, parameter by parameter, whole.
    values: [Vec<Tensor>; 3],
}

impl State {
    /// A PR-MoE of two expert counts, all sizes odd.
    fn get() -> &'static Self {
        static STATE: OnceLock<State> = OnceLock::new();
        STATE.get_or_init(|| {
            let mut config = GptConfig::preset("tiny-pr-moe").unwrap();
            (config.vocab_size, config.max_seq_len, config.num_layers) = (37, 11, 4);
            (config.d_model, config.num_heads, config.d_ff) = (15, 3, 13);
            config.moe.as_mut().unwrap().num_experts = vec![4, 8];
            Self::of(Any::new(Box::new(config), 5, &Device::Cpu).unwrap())
        })
    }

    fn of(model: Any) -> Self {
        let weights = model.params().iter().map(|(_, var)| var.as_tensor().detach()).collect();
        let mut rng = CounterRng::new(9, 0);
        let mut moments = || {
            let tensor = |spec: &ParamSpec| {
                let mut values: Vec<f32> = (0..spec.elem_count()).map(|_| rng.normal_f64() as f32).collect();
                // Bits that arithmetic would not keep.
                values[0] = f32::from_bits(0x7fa0_0001);
                values[spec.elem_count() / 2] = -0.0;
                Tensor::from_vec(values, spec.shape.as_slice(), &Device::Cpu).unwrap()
            };
            model.table().specs().iter().map(tensor).collect::<Vec<_>>()
        };
        let values = [weights, moments(), moments()];
        Self { model, values }
    }

    fn specs(&self) -> &[ParamSpec] {
        self.model.table().specs()
    }

    fn tensors(&self) -> Tensors {
        tensors(self.specs(), |name| name != FROZEN)
    }

    /// What a rank holds of a parameter, cut from the whole.
    fn local(&self, kind: Kind, param: usize, placement: &Placement) -> Vec<f32> {
        let whole = self.values[kind as usize][param].clone();
        placement.local(&self.specs()[param], whole).unwrap().flatten_all().unwrap().to_vec1().unwrap()
    }
}

/// One parameter on one rank.
struct Part {
    param: usize,
    extents: Vec<Extent>,
    weights: Vec<f32>,
    writes: Vec<Range<usize>>,
    /// Elements whose moments this rank has, and those it writes.
    owned: Vec<Range<usize>>,
    owned_writes: Vec<Range<usize>>,
    /// Packed.
    moments: [Vec<f32>; 2],
}

/// What each rank of a layout holds.
fn parts(state: &State, layout: &Layout) -> Vec<Vec<Part>> {
    let plan = WritePlan::new(state.specs(), state.model.config().names(), layout.dims).unwrap();
    let ranks: Vec<Placement> =
        (0..layout.dims.world_size()).map(|rank| Placement::new(layout.dims, rank).unwrap()).collect();
    let mut holders: HashMap<String, Vec<usize>> = HashMap::new();
    for (rank, spec) in ranks.iter().flat_map(|rank| state.specs().iter().map(move |spec| (rank, spec))) {
        for extent in rank.extents(spec) {
            holders.entry(extent.key()).or_default().push(rank.rank());
        }
    }
    let of = |placement: &Placement, param: usize| {
        let (rank, extents) = (placement.rank(), placement.extents(&state.specs()[param]));
        let writes = plan.ranges(rank, &extents);
        let (mut owned, mut start) = (Vec::new(), 0);
        for extent in &extents {
            let (holders, count) = (&holders[&extent.key()], extent.elements());
            let index = holders.iter().position(|holder| *holder == rank).unwrap();
            let own = if layout.divided { part(count, index, holders.len()) } else { 0..count };
            owned.push(start + own.start..start + own.end);
            start += count;
        }
        let owned_writes = if layout.divided { owned.clone() } else { writes.clone() };
        let packed = |kind| {
            let local = state.local(kind, param, placement);
            owned.iter().flat_map(|range| &local[range.clone()]).copied().collect()
        };
        let (weights, moments) =
            (state.local(Kind::Weight, param, placement), [Kind::ExpAvg, Kind::ExpAvgSq].map(packed));
        Part { param, extents, weights, writes, owned, owned_writes, moments }
    };
    ranks.iter().map(|rank| (0..state.specs().len()).map(|param| of(rank, param)).collect()).collect()
}

/// Writes the files of one rank; its report as another rank gets it.
fn write_rank(state: &State, dir: &Path, part: SavingRank, own: &[Part]) -> PartReport {
    let weights = own.iter().map(|p| WeightsPart {
        spec: &state.specs()[p.param],
        extents: &p.extents,
        values: &p.weights,
        writes: &p.writes,
    });
    let trained = own.iter().filter(|p| state.specs()[p.param].name != FROZEN);
    let moments = trained.map(|p| MomentsPart {
        extents: &p.extents,
        owned: &p.owned,
        exp_avg: &p.moments[0],
        exp_avg_sq: &p.moments[1],
        writes: &p.owned_writes,
    });
    let (weights, moments): (Vec<_>, Vec<_>) = (weights.collect(), moments.collect());
    let report = write_part(dir, part, state.model.config().names(), &weights, &moments).unwrap();
    PartReport::from_words(part.rank, &report.to_words().unwrap()).unwrap()
}

/// Writes the state as the ranks of a layout, one after the other.
fn write(state: &State, layout: &Layout, save: Save, dir: &Path) -> Vec<FileCheck> {
    let ranks = layout.dims.world_size();
    let write = |(rank, own): (usize, Vec<Part>)| write_rank(state, dir, SavingRank { save, rank, ranks }, &own);
    let reports: Vec<PartReport> = parts(state, layout).into_iter().enumerate().map(write).collect();
    std::fs::write(dir.join("config.json"), state.model.config().to_json(DType::F32).unwrap()).unwrap();
    finish(dir, save, &reports, state.tensors()).unwrap()
}

fn written(layout: &Layout) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write(State::get(), layout, SAVE, dir.path());
    dir
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Reads everything as the ranks of a layout, and compares it with what they hold.
fn check_reading(state: &State, layout: &Layout, reader: &Reader, what: &str) {
    reader.check(&state.tensors()).unwrap();
    for (rank, own) in parts(state, layout).into_iter().enumerate() {
        for part in own {
            let name = &state.specs()[part.param].name;
            let mut weights = vec![f32::NAN; part.weights.len()];
            reader.read_weights(&part.extents, &mut weights).unwrap();
            assert!(bits(&weights) == bits(&part.weights), "{what}: {name} on rank {rank}");
            for (kind, want) in [Kind::ExpAvg, Kind::ExpAvgSq].into_iter().zip(&part.moments) {
                let mut moments = vec![f32::NAN; want.len()];
                let read = reader.read(kind, &part.extents, &part.owned, &mut moments);
                if name == FROZEN {
                    let text = if want.is_empty() { "frozen".to_owned() } else { read.unwrap_err().to_string() };
                    assert!(text.contains("frozen"), "{text}");
                    continue;
                }
                read.unwrap();
                assert!(bits(&moments) == bits(want), "{what}: {kind} of {name} on rank {rank}");
            }
        }
    }
}

/// Written by every layout, read by every layout.
#[test]
fn any_layout_reads_what_any_layout_wrote() {
    let (state, layouts) = (State::get(), layouts());
    for from in &layouts {
        let dir = written(from);
        let reader = Reader::open(dir.path()).unwrap();
        reader.verify(0..reader.files().len()).unwrap();
        assert_eq!(reader.save(), SAVE);
        for to in &layouts {
            check_reading(state, to, &reader, &format!("from {} to {}", from.name, to.name));
        }
    }
}

/// Whoever wrote it: a folder that anyone opens where no matrix is split, with the bits of the model; else one that says what to
/// do; and always the same export, which is that of the model itself.
fn check_model(state: &State, layout: &Layout) {
    let dir = tempfile::tempdir().unwrap();
    write(state, layout, SAVE, dir.path());
    std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
    let loaded = Any::load(dir.path(), &Device::Cpu);
    let spread = layout.dims.ep > 1 && state.model.config().names().has_stacks();
    if layout.dims.tp == 1 && layout.dims.expert_slices == 1 && !spread {
        let loaded = loaded.unwrap();
        for (param, (name, var)) in loaded.params().iter().enumerate() {
            let got = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let want = state.local(Kind::Weight, param, &Placement::WHOLE);
            assert!(bits(&got) == bits(&want), "{}: {name}", layout.name);
        }
    } else {
        let text = loaded.unwrap_err().to_string();
        assert!(text.contains("split matrices") && text.contains("export"), "{}: {text}", layout.name);
    }
    for dtype in [DType::F32, DType::BF16] {
        let (plain, out) = (tempfile::tempdir().unwrap(), dir.path().join(format!("out-{dtype:?}")));
        state.model.save(plain.path(), dtype).unwrap();
        export(dir.path(), &out, dtype).unwrap();
        for file in ["model.safetensors", "config.json", "generation_config.json"] {
            let [got, want] = [out.as_path(), plain.path()].map(|dir| std::fs::read(dir.join(file)).unwrap());
            assert!(got == want, "{}: {file} as {dtype:?}", layout.name);
        }
        assert_eq!(std::fs::read_dir(&out).unwrap().count(), 4, "the tokenizer comes along");
        let again = export(dir.path(), &out, dtype).unwrap_err().to_string();
        assert!(again.contains("not an empty folder"), "{again}");
    }
    let text = export(dir.path(), &dir.path().join("u8"), DType::U8).unwrap_err().to_string();
    assert!(text.contains("f32, bf16 or f16") && !dir.path().join("u8").exists(), "{text}");
}

#[test]
fn any_layout_makes_the_same_model() {
    layouts().iter().for_each(|layout| check_model(State::get(), layout));
}

/// A family that publishes a parameter as two tensors.
#[test]
fn weights_lie_under_published_names() {
    let state = State::of(Any::load(&fixtures().join("qwen3_moe"), &Device::Cpu).unwrap());
    for name in ["one rank", "dp 3", "ep 2 x dp 2", "tp 2 x dp 2, divided", "8 ranks mixed, divided"] {
        check_model(&state, &layout(name));
    }
    let dir = tempfile::tempdir().unwrap();
    write(&state, &layout("ep 2 x dp 2"), SAVE, dir.path());
    let reader = Reader::open(dir.path()).unwrap();
    check_reading(&state, &layout("tp 2 x ep 2"), &reader, "under published names");
    let index = std::fs::read_to_string(dir.path().join("model.safetensors.index.json")).unwrap();
    assert!(index.contains("experts.0.gate_proj.weight") && index.contains("experts.0.up_proj.weight"), "{index}");
}

/// Families that publish all experts of a layer as one tensor: that tensor, where a rank has all of them; else experts singly,
/// until they are exported.
#[test]
fn stacks_of_experts_are_written_whole_or_in_parts() {
    for family in STACKED {
        let state = State::of(Any::load(&fixtures().join(family), &Device::Cpu).unwrap());
        for name in ["one rank", "dp 3", "ep 2 x dp 2", "tp 2 x dp 2, divided", "8 ranks mixed, divided"] {
            check_model(&state, &layout(name));
        }
        for (from, to) in [("dp 3", "tp 2 x ep 2"), ("ep 2 x dp 2", "dp 3"), ("one rank", "8 ranks mixed, divided")] {
            let dir = tempfile::tempdir().unwrap();
            write(&state, &layout(from), SAVE, dir.path());
            let reader = Reader::open(dir.path()).unwrap();
            check_reading(&state, &layout(to), &reader, &format!("{family} from {from} to {to}"));
        }
    }
}

/// An index whose places of experts are wrong.
#[test]
fn places_that_experts_do_not_have_are_refused() {
    let state = State::of(Any::load(&fixtures().join(STACKED[0]), &Device::Cpu).unwrap());
    let edited = |change: fn(&mut serde_json::Value)| {
        let dir = tempfile::tempdir().unwrap();
        write(&state, &layout("one rank"), SAVE, dir.path());
        edit_index(dir.path(), |json| {
            change(entries(json).iter_mut().find(|entry| entry["place"]["index"] == 2).unwrap());
        });
        Reader::open(dir.path()).unwrap_err().to_string()
    };
    says(&edited(|entry| entry["place"]["index"] = 1.into()), &["is in two entries"]);
    says(&edited(|entry| entry["place"]["index"] = 99.into()), &["must be F32 [100, "]);
    says(&edited(|entry| entry["place"]["index"] = u64::MAX.into()), &["must be F32"]);
    says(&edited(|entry| entry["place"]["layout"] = "sideways".into()), &["sideways"]);
    says(&edited(|entry| entry["size"][0] = 1.into()), &["only all of an expert"]);
}

/// Ranks of one layout write the same bytes each time, and no rank writes much more than its share.
#[test]
fn writing_is_shared_and_repeatable() {
    let layout = layout("dp 4, divided");
    let (one, two) = (written(&layout), written(&layout));
    let reader = Reader::open(one.path()).unwrap();
    let total: u64 = reader.files().iter().map(|file| file.bytes).sum();
    assert_eq!(reader.files().len(), 8);
    for file in reader.files() {
        assert!(file.bytes < total / 4, "{} of {total}", file.bytes);
        let [first, second] = [&one, &two].map(|dir| std::fs::read(dir.path().join(&file.name)).unwrap());
        assert!(first == second, "{}", file.name);
    }
}

/// Changes a folder that 4 ranks wrote, 2 of them each half of the experts; what opening and verifying it then say.
fn faulty(change: impl FnOnce(&Path)) -> String {
    let dir = written(&layout("ep 2 x dp 2"));
    change(dir.path());
    let opened = Reader::open(dir.path()).and_then(|reader| reader.verify(0..reader.files().len()));
    opened.unwrap_err().to_string()
}

fn edit_index(dir: &Path, change: impl FnOnce(&mut serde_json::Value)) {
    let path = dir.join("checkpoint.index.json");
    let mut json = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut json);
    std::fs::write(&path, serde_json::to_vec(&json).unwrap()).unwrap();
}

fn entries(json: &mut serde_json::Value) -> &mut Vec<serde_json::Value> {
    json["entries"].as_array_mut().unwrap()
}

#[track_caller]
fn says(text: &str, parts: &[&str]) {
    parts.iter().for_each(|part| assert!(text.contains(part), "{text:?} should name {part:?}"));
}

const FILE: &str = "model-00002-of-00004.safetensors";

#[test]
fn missing_and_damaged_files_are_named() {
    says(&faulty(|dir| std::fs::remove_file(dir.join(FILE)).unwrap()), &[FILE]);
    says(&faulty(|dir| std::fs::remove_file(dir.join("checkpoint.index.json")).unwrap()), &["checkpoint.index.json"]);
    let bytes = |dir: &Path| std::fs::read(dir.join(FILE)).unwrap();
    for keep in [0, 7, 100] {
        let cut = |dir: &Path| std::fs::write(dir.join(FILE), &bytes(dir)[..keep]).unwrap();
        says(&faulty(cut), &[FILE, "damaged: expected", &format!("found {keep}")]);
    }
    let flip = |dir: &Path| {
        let mut bytes = bytes(dir);
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(dir.join(FILE), bytes).unwrap();
    };
    says(&faulty(flip), &[FILE, "checksum differs"]);
    let longer = |dir: &Path| {
        let mut bytes = bytes(dir);
        bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        std::fs::write(dir.join(FILE), bytes).unwrap();
    };
    says(&faulty(longer), &[FILE, "inside of its header"]);
    let garbage = |dir: &Path| std::fs::write(dir.join("checkpoint.index.json"), [0xff; 40]).unwrap();
    says(&faulty(garbage), &["checkpoint.index.json", "not a whole index"]);
}

/// A rank that was alone in keeping its experts, an entry twice, a tensor that is not where it should be.
#[test]
fn parts_that_do_not_make_up_the_model_are_named() {
    let experts_of_one_rank = |dir: &Path| {
        edit_index(dir, |json| entries(json).retain(|entry| !entry["name"].as_str().unwrap().contains("experts.3.")));
    };
    says(&faulty(experts_of_one_rank), &["exp", "experts.3.", "is in no file", "a rank's part is missing"]);
    let doubled = |dir: &Path| {
        edit_index(dir, |json| {
            let mut other = entries(json)[0].clone();
            let first = entries(json).iter().find(|e| e["file"] != other["file"] && e["kind"] == "weight").unwrap();
            (other["file"], other["tensor"]) = (first["file"].clone(), "elsewhere".into());
            entries(json).push(other);
        });
    };
    says(&faulty(doubled), &["weight of", "model-00001-of-00004.safetensors", FILE, "which is right is unknown"]);
    let again = |dir: &Path| {
        edit_index(dir, |json| {
            let first = entries(json)[0].clone();
            entries(json).push(first)
        })
    };
    says(&faulty(again), &["is in two entries"]);
    let renamed = |dir: &Path| edit_index(dir, |json| entries(json)[0]["tensor"] = "nowhere".into());
    says(&faulty(renamed), &["weight of", "tensor nowhere is missing", "model-0000"]);
    let outside = |dir: &Path| edit_index(dir, |json| entries(json)[0]["start"][0] = 1.into());
    says(&faulty(outside), &["weight of", "is not inside of"]);
    let away = |dir: &Path| edit_index(dir, |json| json["files"][0]["name"] = "../model".into());
    says(&faulty(away), &["../model", "not the name of a file"]);
    let frozen = |dir: &Path| edit_index(dir, |json| json["tensors"][FROZEN]["trained"] = true.into());
    says(&faulty(frozen), &["exp_avg of", FROZEN, "no other part of it is"]);
    let newer = |dir: &Path| edit_index(dir, |json| json["version"] = 9.into());
    says(&faulty(newer), &["version 9"]);
}

/// Files of an earlier save in the folder: not read if the index does not name them, and noticed if they lie in the place of others.
#[test]
fn files_of_another_save_are_noticed() {
    let earlier = tempfile::tempdir().unwrap();
    write(State::get(), &layout("ep 2 x dp 2"), Save { step: 8, id: 0xbad }, earlier.path());
    let stale = |dir: &Path| _ = std::fs::copy(earlier.path().join(FILE), dir.join(FILE)).unwrap();
    let text = faulty(|dir| {
        stale(dir);
        let check = |json: &mut serde_json::Value| {
            let file = json["files"].as_array_mut().unwrap().iter_mut().find(|file| file["name"] == FILE).unwrap();
            file["bytes"] = std::fs::metadata(dir.join(FILE)).unwrap().len().into();
        };
        edit_index(dir, check);
    });
    says(&text, &[FILE, "belongs to another save", "0000000000000bad", "0000000000005eed"]);

    let dir = written(&layout("dp 2"));
    stale(dir.path());
    std::fs::write(dir.path().join("optimizer-00003-of-00004.safetensors"), "stale").unwrap();
    let reader = Reader::open(dir.path()).unwrap();
    check_reading(State::get(), &layout("one rank"), &reader, "beside stale files");
    Gpt::load(dir.path(), &Device::Cpu).unwrap();
}

#[test]
fn checkpoints_of_other_models_are_refused() {
    let dir = written(&layout("dp 2"));
    let reader = Reader::open(dir.path()).unwrap();
    let refused = |change: &dyn Fn(&mut Tensors), part: &str| {
        let mut tensors = State::get().tensors();
        change(&mut tensors);
        says(&reader.check(&tensors).unwrap_err().to_string(), &["checkpoint.index.json", part]);
    };
    let any = |tensors: &Tensors| tensors.keys().next().unwrap().clone();
    refused(&|t| _ = t.remove(&any(t)), "does not belong to the configured model");
    refused(&|t| _ = t.insert("more".into(), t[FROZEN].clone()), "more is missing");
    refused(&|t| t.get_mut(FROZEN).unwrap().shape[0] += 1, "has shape [11, 15] here, the model's is [12, 15]");
    refused(&|t| t.get_mut(FROZEN).unwrap().trained = true, "is trained now, but was frozen");
    let unknown = [Extent::whole("none", &[2])];
    says(&reader.read_weights(&unknown, &mut [0.0; 2]).unwrap_err().to_string(), &["none is missing"]);
    let other = [Extent::whole(FROZEN, &[2])];
    says(&reader.read_weights(&other, &mut [0.0; 2]).unwrap_err().to_string(), &["has shape [11, 15] here"]);
    let outside = [Extent {
        name: FROZEN.into(),
        shape: vec![11, 15],
        dims: vec![Some(0..1).into_iter().collect(), Some(14..16).into_iter().collect()],
    }];
    says(&reader.read_weights(&outside, &mut [0.0; 2]).unwrap_err().to_string(), &["is not inside of [11, 15]"]);
    says(&reader.read_weights(&other, &mut [0.0; 3]).unwrap_err().to_string(), &["2 values", "into 3"]);
}

/// A store's folder that ranks fill: whole under its own name, or gone.
#[test]
fn a_folder_that_ranks_fill_is_whole_or_absent() {
    let run = tempfile::tempdir().unwrap();
    let config = toy::config();
    let (corpus, tokenizer) = toy::corpus(&config);
    let mut trainer = Trainer::new(Toy::new(3), config, corpus, tokenizer, run.path()).unwrap();
    trainer.run(&AtomicBool::new(false), &mut Silent).unwrap();
    let toys = read_state(&run.path().join("step-00000012")).unwrap();

    let dir = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(dir.path(), 2).unwrap();
    let save = |step: u64, name: &str| {
        let folder = store.begin(step).unwrap();
        assert_eq!(folder, store.unfinished(step));
        let checks = write(State::get(), &layout(name), Save { step, id: step }, &folder);
        store.commit(&TrainerState { step, best: None, ..toys.clone() }, checks).unwrap()
    };
    for (step, name) in [(2, "dp 3"), (4, "tp 2"), (4, "8 ranks mixed, divided"), (6, "one rank")] {
        let folder = save(step, name);
        assert_eq!(store.latest().unwrap().unwrap(), folder);
        let state = read_state(&folder).unwrap();
        verify(&folder, &state).unwrap();
        assert_eq!(state.files.len(), std::fs::read_dir(&folder).unwrap().count() - 1, "all but the state itself");
        let reader = Reader::open(&folder).unwrap();
        check_reading(State::get(), &layout("ep 3"), &reader, name);
    }
    assert_eq!(store.steps().unwrap(), [4, 6]);
    std::fs::write(store.begin(8).unwrap().join("half"), "x").unwrap();
    store.abort(8);
    assert!(!store.unfinished(8).exists() && store.steps().unwrap() == [4, 6]);
    store.abort(8);
}

/// The files of a small checkpoint.
fn contents() -> &'static Vec<(String, Vec<u8>)> {
    static CONTENTS: OnceLock<Vec<(String, Vec<u8>)>> = OnceLock::new();
    CONTENTS.get_or_init(|| {
        let dir = written(&layout("tp 2"));
        let files = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().path());
        let mut files: Vec<_> = files
            .map(|path| (path.file_name().unwrap().to_str().unwrap().to_owned(), std::fs::read(&path).unwrap()))
            .collect();
        files.sort();
        files
    })
}

/// One change of a file's bytes.
#[derive(Debug, Clone)]
enum Mutation {
    Byte { at: prop::sample::Index, to: u8 },
    Cut { at: prop::sample::Index },
    Insert { at: prop::sample::Index, text: String },
    Length { to: u64 },
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let at = any::<prop::sample::Index>;
    prop_oneof![
        4 => (at(), any::<u8>()).prop_map(|(at, to)| Mutation::Byte { at, to }),
        4 => (at(), "[0-9\\[\\]{},:\"-]").prop_map(|(at, text)| Mutation::Byte { at, to: text.as_bytes()[0] }),
        1 => at().prop_map(|at| Mutation::Cut { at }),
        2 => (at(), "[0-9]{1,20}").prop_map(|(at, text)| Mutation::Insert { at, text }),
        1 => prop_oneof![any::<u64>(), 0u64..20_000].prop_map(|to| Mutation::Length { to }),
    ]
}

fn mutate(bytes: &mut Vec<u8>, mutation: &Mutation) {
    match mutation {
        Mutation::Byte { at, to } if !bytes.is_empty() => {
            let at = at.index(bytes.len());
            bytes[at] = *to;
        }
        Mutation::Cut { at } => bytes.truncate(at.index(bytes.len() + 1)),
        Mutation::Insert { at, text } => {
            let at = at.index(bytes.len() + 1);
            bytes.splice(at..at, text.bytes());
        }
        Mutation::Length { to } if bytes.len() >= 8 => bytes[..8].copy_from_slice(&to.to_le_bytes()),
        _ => {}
    }
}

/// Writes the files with one of them changed; `fitting`: with sizes in the index that agree, so that more than sizes is looked at.
fn write_mutated(dir: &Path, file: usize, mutations: &[Mutation], fitting: bool) {
    for (number, (name, bytes)) in contents().iter().enumerate() {
        let mut bytes = bytes.clone();
        if number == file {
            mutations.iter().for_each(|mutation| mutate(&mut bytes, mutation));
        }
        std::fs::write(dir.join(name), &bytes).unwrap();
    }
    let (name, _) = &contents()[file];
    if fitting && name.ends_with(".safetensors") {
        edit_index(dir, |json| {
            let files = json["files"].as_array_mut().unwrap();
            let check = files.iter_mut().find(|check| check["name"] == name.as_str()).unwrap();
            check["bytes"] = std::fs::metadata(dir.join(name)).unwrap().len().into();
        });
    }
}

/// One change of the index, which stays one that can be parsed.
#[derive(Debug, Clone)]
struct Alteration {
    entry: prop::sample::Index,
    other: prop::sample::Index,
    what: usize,
    number: u64,
}

fn alteration() -> impl Strategy<Value = Alteration> {
    let number = prop_oneof![3 => 0u64..40, 1 => any::<u64>(), 1 => Just(u64::MAX), 1 => Just(1 << 62)];
    let index = any::<prop::sample::Index>;
    (index(), index(), 0usize..10, number).prop_map(|(entry, other, what, number)| Alteration {
        entry,
        other,
        what,
        number,
    })
}

fn alter(json: &mut serde_json::Value, alteration: &Alteration) {
    const FIELDS: [&str; 6] = ["start", "size", "tensor", "name", "kind", "file"];
    let Alteration { entry, other, what, number } = alteration;
    let count = entries(json).len();
    let (entry, other) = (entry.index(count), other.index(count));
    let files = json["files"].as_array().unwrap().len();
    match what {
        0 => entries(json)[entry][FIELDS[other % 2]][0] = (*number).into(),
        1 => json["files"][entry % files][["bytes", "crc32c"][other % 2]] = (number % (1 << 32)).into(),
        2 => _ = entries(json).remove(entry),
        3 => {
            let name = entries(json)[entry]["name"].as_str().unwrap().to_owned();
            json["tensors"][name]["shape"] = serde_json::json!([number, 1]);
        }
        what => {
            let field = FIELDS[what - 4];
            entries(json)[entry][field] = entries(json)[other][field].clone();
        }
    }
}

/// A damaged folder, if it opens, gives the values of the model, unless a checksum or another shape tells.
fn check_damaged(dir: &Path) -> std::result::Result<(), TestCaseError> {
    let state = State::get();
    let Ok(reader) = Reader::open(dir) else { return Ok(()) };
    let whole = reader.verify(0..reader.files().len()).is_ok() && reader.check(&state.tensors()).is_ok();
    for (param, spec) in state.specs().iter().enumerate() {
        for kind in Kind::ALL {
            // Reading is safe, whatever the values.
            let (extents, mut got) = (Placement::WHOLE.extents(spec), vec![0.0; spec.elem_count()]);
            let all = 0..spec.elem_count();
            let read = reader.read(kind, &extents, std::slice::from_ref(&all), &mut got);
            let there = kind == Kind::Weight || spec.name != FROZEN;
            prop_assert!(!whole || read.is_ok() == there, "{kind} of {}", spec.name);
            let same = || bits(&got) == bits(&state.local(kind, param, &Placement::WHOLE));
            prop_assert!(!whole || !there || same(), "{kind} of {}", spec.name);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Any bytes in any file: an error, or the very values; never a panic, nor much memory.
    #[test]
    fn mutated_files_are_refused_or_read_right(
        file in any::<prop::sample::Index>(),
        mutations in prop::collection::vec(mutation(), 1..4),
        fitting in any::<bool>(),
    ) {
        let dir = tempfile::tempdir().unwrap();
        write_mutated(dir.path(), file.index(contents().len()), &mutations, fitting);
        check_damaged(dir.path())?;
    }

    /// Any numbers and names in the index: the same.
    #[test]
    fn altered_indexes_are_refused_or_read_right(alterations in prop::collection::vec(alteration(), 1..4)) {
        let dir = tempfile::tempdir().unwrap();
        contents().iter().for_each(|(name, bytes)| std::fs::write(dir.path().join(name), bytes).unwrap());
        edit_index(dir.path(), |json| alterations.iter().for_each(|alteration| alter(json, alteration)));
        check_damaged(dir.path())?;
    }
}
