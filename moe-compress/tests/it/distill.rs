//! Students as models: the loss of a step that follows, of one that does not, and what cannot be a student.

use crate::teacher::{VOCAB, folder, shape, write_teacher};
use candle_core::{Device, Tensor};
use moe_compress::distill::Following;
use moe_compress::kept::TargetsConfig;
use moe_compress::teacher::TeacherFolder;
use moe_compress::{KdSchedule, KeptTargets, Student, StudentPlan};
use moe_core::ops::Distillation;
use moe_core::testing::values;
use moe_models::Precision;
use moe_models::gpt::{Gpt, GptConfig, IGNORED};
use moe_models::train::TrainModel;
use moe_models::train::model::{Pass, TokenBatch, TrainPass};
use std::path::Path;

fn batch() -> TokenBatch {
    let ids = |salt: usize| (0..32).map(|i| ((i * i + salt * i) % VOCAB) as u32).collect::<Vec<_>>();
    let mut target_ids = ids(3);
    target_ids[5] = IGNORED;
    TokenBatch { input_ids: ids(1), target_ids, batch: 2, seq_len: 16 }
}

fn following(dir: &Path, schedule: KdSchedule, how: Distillation) -> Following {
    let teacher = TeacherFolder::open(dir).unwrap().load(Precision::F32, None).unwrap();
    Following { teacher, how, schedule, train_tokens: 1000, kept: None }
}

/// Another width and other heads than the teacher's.
fn narrow() -> GptConfig {
    let mut config = StudentPlan::new(&shape(), 0.25, Default::default()).unwrap().config;
    (config.d_model, config.num_heads, config.d_ff) = (12, 3, 24);
    config
}

/// Mean over the counted targets of `-ln q(target)` and of `T^2 KL(p || q)`, from whole logits.
fn by_hand(student: &Tensor, teacher: &Tensor, targets: &[u32], t: f64) -> [f64; 2] {
    let rows = |logits: &Tensor| values(logits).chunks(VOCAB).map(<[f64]>::to_vec).collect::<Vec<_>>();
    let probs = |row: &[f64], t: f64| {
        let sum: f64 = row.iter().map(|z| (z / t).exp()).sum();
        row.iter().map(|z| (z / t).exp() / sum).collect::<Vec<f64>>()
    };
    let (mut sums, mut counted) = ([0.0; 2], 0.0);
    for ((z, of), &target) in rows(student).iter().zip(&rows(teacher)).zip(targets) {
        if target == IGNORED {
            continue;
        }
        let (p, q) = (probs(of, t), probs(z, t));
        sums[0] -= probs(z, 1.0)[target as usize].ln();
        sums[1] += t * t * p.iter().zip(&q).map(|(p, q)| p * (p / q).ln()).sum::<f64>();
        counted += 1.0;
    }
    sums.map(|sum| sum / counted)
}

#[test]
fn a_step_that_follows_adds_the_divergence_from_the_teacher_in_evaluation_mode() {
    let dir = folder();
    let of = dir.path().join("teacher");
    let how = Distillation { weight: 0.6, temperature: 2.0 };
    for config in [narrow(), StudentPlan::new(&shape(), 0.25, Default::default()).unwrap().config] {
        let model = Gpt::new(config, 1, &Device::Cpu).unwrap();
        let plain = Gpt::new(model.config().clone(), 1, &Device::Cpu).unwrap();
        let student = Student::new(model, following(&of, KdSchedule::STAGED, how)).unwrap();
        let batch = batch();
        let pass = |tokens| Pass::Train(TrainPass { seed: 9, tokens, ..TrainPass::default() });
        let alone = plain.loss(&batch, pass(0)).unwrap();
        let got = student.loss(&batch, pass(699)).unwrap();

        let logits = |decoder: &moe_models::Decoder, pass| {
            let (hidden, _) = decoder.hidden(&batch.input_ids, 16, pass).unwrap();
            decoder.head().logits(&hidden.detach()).unwrap()
        };
        let teacher = TeacherFolder::open(&of).unwrap().load(Precision::F32, None).unwrap();
        let teacher = logits(teacher.decoder(), Pass::Eval);
        let [lm, kl] = by_hand(&logits(plain.training_decoder(), pass(0)), &teacher, &batch.target_ids, 2.0);
        assert!(
            (got.parts.lm - lm).abs() < 1e-4 && (got.parts.kd - 0.6 * kl).abs() < 1e-4,
            "{:?} {lm} {kl}",
            got.parts
        );
        assert!(kl > 0.1, "the teacher has an opinion: {kl}");
        assert_eq!(got.parts.lm as f32, alone.parts.lm as f32);
        assert_eq!(got.parts.aux(), alone.parts.aux());
        let total = f64::from(got.loss.to_scalar::<f32>().unwrap());
        assert!((total - got.parts.total()).abs() < 1e-5);

        // After the switch, and in evaluation, it is the model alone.
        for (pass, want) in [(pass(700), &alone), (Pass::Eval, &plain.loss(&batch, Pass::Eval).unwrap())] {
            let got = student.loss(&batch, pass).unwrap();
            assert_eq!(got.loss.to_scalar::<f32>().unwrap(), want.loss.to_scalar::<f32>().unwrap());
            assert_eq!(got.parts, want.parts);
        }
    }
}

/// What a student is told changes what it becomes: a student that only follows comes to say what its teacher says.
#[test]
fn following_brings_a_student_to_its_teacher() {
    let dir = folder();
    let how = Distillation { weight: 20.0, temperature: 1.0 };
    let model = Gpt::new(narrow(), 1, &Device::Cpu).unwrap();
    let student = Student::new(model, following(&dir.path().join("teacher"), KdSchedule::Full, how)).unwrap();
    let (batch, mut first) = (batch(), None);
    for step in 0..60 {
        let pass = Pass::Train(TrainPass { seed: step, ..TrainPass::default() });
        let output = student.loss(&batch, pass).unwrap();
        let grads = output.loss.backward().unwrap();
        for (_, var) in TrainModel::params(&student) {
            if let Some(grad) = grads.get(var) {
                var.set(&(var.as_tensor() - (grad * 0.01).unwrap()).unwrap()).unwrap();
            }
        }
        first.get_or_insert(output.parts.kd);
        if step == 59 {
            assert!(output.parts.kd < 0.7 * first.unwrap(), "{} of {first:?}", output.parts.kd);
        }
    }
}

#[test]
fn what_cannot_be_a_student_is_refused() {
    let dir = folder();
    let of = dir.path().join("teacher");
    let refused = |config: GptConfig, following: Following| {
        Student::new(Gpt::new(config, 1, &Device::Cpu).unwrap(), following).unwrap_err().to_string()
    };
    let how = Distillation::default();
    let of = |schedule, how| following(&of, schedule, how);
    for (config, following, part) in [
        (GptConfig { vocab_size: 300, ..narrow() }, of(KdSchedule::Full, how), "vocabulary has 300 entries"),
        (GptConfig { max_seq_len: 17, ..narrow() }, of(KdSchedule::Full, how), "up to 17 tokens"),
        (narrow(), of(KdSchedule::Staged { stop: 1.5 }, how), "share of training"),
        (narrow(), of(KdSchedule::Full, Distillation { weight: f64::NAN, ..how }), "weight of the divergence"),
    ] {
        let text = refused(config, following);
        assert!(text.contains(part), "{text}");
    }
    let empty = tempfile::tempdir().unwrap();
    assert!(TeacherFolder::open(empty.path()).is_err());
    std::fs::copy(dir.path().join("teacher/config.json"), empty.path().join("config.json")).unwrap();
    assert!(TeacherFolder::open(empty.path()).unwrap_err().to_string().contains("holds no weights"));
}

#[test]
fn fingerprints_tell_teachers_apart() {
    let dir = folder();
    let print = |name: &str| TeacherFolder::open(&dir.path().join(name)).unwrap().fingerprint().to_owned();
    let mut other = shape();
    other.init_std = 0.41;
    write_teacher(&other, &dir.path().join("other"));
    write_teacher(&shape(), &dir.path().join("same"));
    assert_eq!(print("teacher"), print("same"));
    assert_ne!(print("teacher"), print("other"));
}

/// All entries kept are the whole distribution; a few are found again, with the same bits, by a run that does not ask the teacher.
#[test]
fn what_the_teacher_says_is_kept() {
    let dir = folder();
    let (of, how) = (dir.path().join("teacher"), Distillation { weight: 0.6, temperature: 2.0 });
    let pass = Pass::Train(TrainPass { seed: 9, ..TrainPass::default() });
    let targets = |k| TargetsConfig { vocab_size: VOCAB, seq_len: 16, k, temperature: 2.0, precision: Precision::F32 };
    let student = |k: Option<usize>| {
        let kept = k.map(|k| KeptTargets::open(&dir.path().join("kept"), "print", targets(k)).unwrap());
        let following = Following { kept, ..following(&of, KdSchedule::Full, how) };
        Student::new(Gpt::new(narrow(), 1, &Device::Cpu).unwrap(), following).unwrap()
    };
    let kd = |student: &Student<GptConfig>, batch: &TokenBatch| student.loss(batch, pass).unwrap().parts.kd;
    let asked = |student: &Student<GptConfig>| student.following().unwrap().kept.as_ref().unwrap().asked();
    let whole = kd(&student(None), &batch());
    assert!((kd(&student(Some(VOCAB)), &batch()) - whole).abs() < 1e-4 * whole);

    let first = student(Some(8));
    let few = kd(&first, &batch());
    assert!(few < whole && few > 0.0 && asked(&first) == 2, "{few} {whole}");
    // A sequence that is new is asked for, one that is not is found.
    let mut other = batch();
    other.input_ids[20] = 7;
    kd(&first, &other);
    assert_eq!(asked(&first), 3);
    let again = student(Some(8));
    assert_eq!((kd(&again, &batch()).to_bits(), asked(&again)), (few.to_bits(), 0));

    // A record that a run has not ended is made again.
    let kept = dir.path().join("kept/print-k8-t2-s16-F32");
    let file = kept.join("0.targets");
    let bytes = std::fs::read(&file).unwrap();
    assert_eq!(bytes.len() as f64, 3.0 * 16.0 * again.following().unwrap().kept.as_ref().unwrap().bytes_per_token());
    std::fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    let cut = student(Some(8));
    kd(&cut, &other);
    assert_eq!(asked(&cut), 1);
    for k in [0, VOCAB + 1] {
        assert!(KeptTargets::open(&kept, "print", targets(k)).unwrap_err().to_string().contains("1 to 262"));
    }
}
