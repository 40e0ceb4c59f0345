//! Checkpoints under every fault: unwritable folder, full disk, cut and altered files, missing pieces.

use crate::toy::{Toy, config, corpus};
use candle_core::Device;
use moe_models::gpt::Gpt;
use moe_models::train::checkpoint::{CheckpointStore, read_state, verify};
use moe_models::train::export::export;
use moe_models::train::saving::{load_optimizer, save_whole};
use moe_models::train::{Event, Silent, TrainConfig, Trainer};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

fn finished_run(dir: &Path, config: &TrainConfig) -> Trainer<Toy> {
    let (corpus, tokenizer) = corpus(config);
    let mut trainer = Trainer::new(Toy::new(3), config.clone(), corpus, tokenizer, dir).unwrap();
    trainer.run(&AtomicBool::new(false), &mut Silent).unwrap();
    trainer
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn a_checkpoint_holds_what_it_should_and_reads_back() {
    let dir = tempfile::tempdir().unwrap();
    let trainer = finished_run(dir.path(), &config());
    let folder = dir.path().join("step-00000012");
    assert_eq!(
        names(&folder),
        [
            "checkpoint.index.json",
            "config.json",
            "model.safetensors",
            "optimizer.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
            "trainer_state.json"
        ]
    );
    assert_eq!(std::fs::read_to_string(dir.path().join("latest")).unwrap(), "step-00000012");
    let state = read_state(&folder).unwrap();
    verify(&folder, &state).unwrap();
    assert_eq!((state.step, state.tokens), (12, 576));
    assert_eq!(state.data_position.drawn.iter().sum::<u64>(), 72);
    let optimizer = load_optimizer(&folder, &state, trainer.model()).unwrap();
    assert_eq!(&optimizer, trainer.optimizer());
    assert_eq!(Toy::load(&folder).bits(), trainer.model().bits());
}

#[test]
fn the_last_two_and_the_best_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    // A rate this large makes the loss rise again, so that an early checkpoint stays the best.
    let config = TrainConfig { lr: 3.0, min_lr: Some(3.0), save_interval: 2, lr_warmup_tokens: Some(500), ..config() };
    let trainer = finished_run(dir.path(), &config);
    let store = CheckpointStore::open(dir.path(), 2).unwrap();
    let best = read_state(&dir.path().join("step-00000012")).unwrap().best.unwrap();
    assert!(best.step < 9, "the test wants an early best, got step {}", best.step);
    assert_eq!(store.steps().unwrap(), [best.step, 10, 12]);
    assert_eq!(trainer.best_checkpoint().unwrap(), store.folder(best.step));
    assert_eq!(read_state(&store.folder(best.step)).unwrap().valid_loss, Some(best.valid_loss));
}

#[test]
fn a_full_disk_leaves_the_earlier_checkpoints_and_no_rest() {
    let dir = tempfile::tempdir().unwrap();
    let config = config();
    let (corpus, tokenizer) = corpus(&config);
    let mut trainer = Trainer::new(Toy::new(3), config, corpus, tokenizer, dir.path()).unwrap();
    let stop = AtomicBool::new(false);
    let mut saved = Vec::new();
    // The first run ends after step 4's checkpoint; then the disk fills.
    let mut observer = |event: &Event| {
        if let Event::Saved { step, .. } = event {
            saved.push(*step);
            stop.store(true, Ordering::Relaxed);
        }
    };
    trainer.run(&stop, &mut observer).unwrap();
    assert_eq!(saved, [4]);
    trainer.model().disk_full.store(true, Ordering::Relaxed);
    let message = trainer.run(&AtomicBool::new(false), &mut Silent).unwrap_err().to_string();
    assert!(message.contains("config.json") && message.contains("storage"), "{message}");
    assert_eq!(names(dir.path()), ["best", "latest", "metrics.jsonl", "run.lock", "step-00000004", "tensorboard"]);
    let folder = dir.path().join("step-00000004");
    verify(&folder, &read_state(&folder).unwrap()).unwrap();
}

#[test]
fn a_failed_replacement_keeps_the_old_folder() {
    let dir = tempfile::tempdir().unwrap();
    let trainer = finished_run(dir.path(), &config());
    let folder = dir.path().join("step-00000012");
    let state = read_state(&folder).unwrap();
    let store = CheckpointStore::open(dir.path(), 2).unwrap();
    save_whole(&store, trainer.model(), trainer.optimizer(), "{}", &state).unwrap();
    assert_eq!(std::fs::read_to_string(folder.join("tokenizer.json")).unwrap(), "{}", "replaced");
    trainer.model().disk_full.store(true, Ordering::Relaxed);
    save_whole(&store, trainer.model(), trainer.optimizer(), "[]", &state).unwrap_err();
    assert_eq!(std::fs::read_to_string(folder.join("tokenizer.json")).unwrap(), "{}", "still the old one");
    assert!(names(dir.path()).iter().all(|n| !n.starts_with('.')), "{:?}", names(dir.path()));
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for name in names(from) {
        std::fs::copy(from.join(&name), to.join(&name)).unwrap();
    }
}

/// Every state in which a crash can leave a folder while a checkpoint in it is replaced. Old and new differ in their
/// tokenizer.
#[test]
fn a_crash_at_any_point_of_a_replacement_loses_nothing() {
    const PLACE: &str = "step-00000012";
    const ASIDE: &str = ".tmp-replaced-step-00000012";
    const FILLED: &str = ".tmp-step-00000012";
    const DOOMED: &str = ".tmp-removed-.tmp-replaced-step-00000012";
    let source = tempfile::tempdir().unwrap();
    let trainer = finished_run(source.path(), &config());
    let old = source.path().join(PLACE);
    let state = read_state(&old).unwrap();
    let renewed = tempfile::tempdir().unwrap();
    let store = CheckpointStore::open(renewed.path(), 2).unwrap();
    let new = save_whole(&store, trainer.model(), trainer.optimizer(), "{}", &state).unwrap();
    let half = |dir: &Path| {
        copy(&new, dir);
        std::fs::remove_file(dir.join("trainer_state.json")).unwrap();
        std::fs::remove_file(dir.join("optimizer.safetensors")).unwrap();
    };
    type Fill<'a> = &'a dyn Fn(&Path);
    let (old_at, new_at): (Fill, Fill) = (&|dir| copy(&old, dir), &|dir| copy(&new, dir));
    type Crash<'a> = (&'a str, &'a [(&'a str, Fill<'a>)], bool);
    let crashes: [Crash; 7] = [
        ("while the new one is filled", &[(PLACE, old_at), (FILLED, &half)], false),
        ("before the old one is moved", &[(PLACE, old_at), (FILLED, new_at)], false),
        ("between the renames", &[(ASIDE, old_at), (FILLED, new_at)], false),
        ("by a version that moved first", &[(ASIDE, old_at), (FILLED, &half)], false),
        ("by a version that moved first, at once", &[(ASIDE, old_at)], false),
        ("before the old one is removed", &[(ASIDE, old_at), (PLACE, new_at)], true),
        ("while the old one is removed", &[(DOOMED, &half), (PLACE, new_at)], true),
    ];
    for (when, folders, is_new) in crashes {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("latest"), PLACE).unwrap();
        folders.iter().for_each(|(name, fill)| fill(&dir.path().join(name)));
        let store = CheckpointStore::open(dir.path(), 2).unwrap();
        assert_eq!(names(dir.path()), ["latest", PLACE], "{when}");
        let folder = store.latest().unwrap().unwrap();
        let state = read_state(&folder).unwrap();
        verify(&folder, &state).unwrap();
        load_optimizer(&folder, &state, trainer.model()).unwrap();
        let tokenizer = std::fs::read_to_string(folder.join("tokenizer.json")).unwrap();
        assert_eq!(tokenizer == "{}", is_new, "{when}");
    }
}

/// What is under a temporary name is restored only to the place of a checkpoint; what another program put aside is left.
#[test]
fn other_remains_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    for name in [".tmp-step-00000002", ".tmp-replaced-other", ".tmp-removed-step-00000004"] {
        std::fs::create_dir(dir.path().join(name)).unwrap();
        std::fs::write(dir.path().join(name).join("trainer_state.json"), "{").unwrap();
    }
    std::fs::write(dir.path().join(".tmp-77-latest"), "step-").unwrap();
    CheckpointStore::open(dir.path(), 2).unwrap();
    assert_eq!(names(dir.path()), [".tmp-replaced-other"]);
}

#[test]
fn an_unwritable_folder_is_found_at_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let config = config();
    let (corpus, tokenizer) = corpus(&config);
    let message = Trainer::new(Toy::new(1), config, corpus, tokenizer, &file.join("run")).unwrap_err().to_string();
    assert!(message.contains("file"), "{message}");
}

#[test]
fn damaged_files_are_named() {
    let config = config();
    let dir = tempfile::tempdir().unwrap();
    finished_run(dir.path(), &config);
    let folder = dir.path().join("step-00000012");
    let resume = || {
        let (corpus, tokenizer) = corpus(&config);
        Trainer::resume(Toy::new(1), config.clone(), corpus, tokenizer, dir.path(), &folder).unwrap_err().to_string()
    };
    for name in ["optimizer.safetensors", "model.safetensors", "trainer_state.json", "tokenizer.json"] {
        let path = folder.join(name);
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() / 2]).unwrap();
        let message = resume();
        assert!(message.contains(name), "cut {name}: {message}");
        if name != "trainer_state.json" {
            let mut altered = whole.clone();
            altered[whole.len() / 2] ^= 1;
            std::fs::write(&path, &altered).unwrap();
            let message = resume();
            assert!(message.contains(name) && message.contains("checksum"), "altered {name}: {message}");
        }
        std::fs::write(&path, &whole).unwrap();
    }
}

#[test]
fn resuming_falls_back_to_the_newest_complete_folder() {
    let dir = tempfile::tempdir().unwrap();
    finished_run(dir.path(), &config());
    let store = CheckpointStore::open(dir.path(), 2).unwrap();
    assert_eq!(store.latest().unwrap(), Some(store.folder(12)));
    std::fs::remove_file(store.folder(12).join("optimizer.safetensors")).unwrap();
    assert_eq!(store.latest().unwrap(), Some(store.folder(8)), "12 lacks a file");
    std::fs::write(dir.path().join("latest"), "../elsewhere").unwrap();
    assert_eq!(store.latest().unwrap(), Some(store.folder(8)), "a marker cannot lead out of the folder");
    std::fs::create_dir(dir.path().join(".tmp-step-00000016")).unwrap();
    CheckpointStore::open(dir.path(), 2).unwrap();
    assert!(!dir.path().join(".tmp-step-00000016").exists(), "remains of an interrupted save are removed");
    let empty = tempfile::tempdir().unwrap();
    assert_eq!(CheckpointStore::open(empty.path(), 2).unwrap().latest().unwrap(), None);
}

#[test]
fn export_is_whole_or_absent() {
    let root = tempfile::tempdir().unwrap();
    let model = Gpt::new(crate::train_gpt::shape(), 1, &Device::Cpu).unwrap();
    let out = root.path().join("a/b");
    let unknown = candle_core::DType::U8;
    export(&model, &"{}".to_owned().into(), &out, unknown).unwrap_err();
    assert_eq!(names(&root.path().join("a")), Vec::<String>::new());
    std::fs::create_dir(&out).unwrap();
    export(&model, &"{}".to_owned().into(), &out, candle_core::DType::BF16).unwrap();
    let files =
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    assert_eq!(names(&out), files);
    let message = export(&model, &"{}".to_owned().into(), &out, candle_core::DType::BF16).unwrap_err().to_string();
    assert!(message.contains("not an empty folder"), "{message}");
}
