//! Checkpoints that ranks write and read hold no second copy of the model. A binary of its own, with one test: it counts what the
//! whole process allocates. Mapped files are not counted: their pages can be had again.

use candle_core::{DType, Device};
use moe_models::Family;
use moe_models::gpt::{Gpt, GptConfig};
use moe_models::train::shards::{
    MomentsPart, Reader, Save, SavingRank, WeightsPart, WritePlan, export, finish, tensors, write_part,
};
use moe_parallel::{Extent, ParallelDims, Placement};
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

/// The largest tensor, the embedding.
const LARGEST: usize = 8192 * 256 * size_of::<f32>();
/// What buffers, headers and the index may take.
const SMALL: usize = 3 << 20;

/// The most that `run` holds at once.
fn peak<R>(run: impl FnOnce() -> R) -> (usize, R) {
    let before = ALLOCATOR.current_usage();
    ALLOCATOR.reset_peak_usage();
    let result = run();
    (ALLOCATOR.peak_usage() - before, result)
}

#[test]
fn one_tensor_is_in_memory_at_a_time() {
    let mut config = GptConfig::preset("tiny-dense").unwrap();
    (config.vocab_size, config.max_seq_len, config.d_model, config.num_heads, config.d_ff) = (8192, 64, 256, 4, 512);
    let model = Gpt::new(config, 1, &Device::Cpu).unwrap();
    let (specs, dir) = (model.table().specs(), tempfile::tempdir().unwrap());
    let plan = WritePlan::new(specs, model.config().names(), ParallelDims::SINGLE).unwrap();
    let extents: Vec<Vec<Extent>> = specs.iter().map(|spec| Placement::WHOLE.extents(spec)).collect();
    let read = |param: usize| model.params()[param].1.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let values: Vec<Vec<f32>> = (0..specs.len()).map(read).collect();
    assert!(values.iter().map(Vec::len).sum::<usize>() * size_of::<f32>() > 2 * LARGEST);
    let writes: Vec<_> = extents.iter().map(|extents| plan.ranges(0, extents)).collect();
    let each = || extents.iter().zip(&values).zip(&writes);
    let weights = specs.iter().zip(each());
    let weights = weights.map(|(spec, ((extents, values), writes))| WeightsPart { spec, extents, values, writes });
    let weights = weights.collect::<Vec<_>>();
    let moments = each().map(|((extents, values), owned)| MomentsPart {
        extents,
        owned,
        exp_avg: values,
        exp_avg_sq: values,
        writes: owned,
    });
    let (moments, save) = (moments.collect::<Vec<_>>(), Save { step: 1, id: 1 });
    let part = SavingRank { save, rank: 0, ranks: 1 };
    let names = model.config().names();
    let (most, report) = peak(|| write_part(dir.path(), part, names, &weights, &moments).unwrap());
    assert!(most < SMALL, "{most} bytes to write weights and moments");
    std::fs::write(dir.path().join("config.json"), model.config().to_json(DType::F32).unwrap()).unwrap();
    let (most, _) = peak(|| finish(dir.path(), save, &[report], tensors(specs, |_| true)).unwrap());
    assert!(most < SMALL, "{most} bytes to finish");

    let mut buffer = vec![0.0; LARGEST / size_of::<f32>()];
    let (most, _) = peak(|| {
        let reader = Reader::open(dir.path()).unwrap();
        reader.verify(0..reader.files().len()).unwrap();
        for (extents, want) in extents.iter().zip(&values) {
            let got = &mut buffer[..want.len()];
            reader.read_weights(extents, got).unwrap();
            assert!(got == want);
        }
    });
    assert!(most < SMALL, "{most} bytes to read");

    let out = dir.path().join("out");
    let (most, ()) = peak(|| export(dir.path(), &out, DType::BF16).unwrap());
    assert!(most < LARGEST + SMALL, "{most} bytes to export");
}
