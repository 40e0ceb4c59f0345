//! Lookup and gradient against candle's `index_select`, to the last bit.

use super::*;
use candle_core::{DType, Var};
use moe_core::testing::{random, random_var};

fn bits(tensor: &Tensor) -> Vec<u32> {
    tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap().into_iter().map(f32::to_bits).collect()
}

/// Ids with many repeats, and some rows that no token names.
fn ids(tokens: usize, vocab: usize) -> Vec<u32> {
    (0..tokens).map(|t| if t % 3 == 0 { 0 } else { (t * 31 % vocab) as u32 }).collect()
}

fn gradient(weight: &Var, y: &Tensor) -> Vec<u32> {
    let factors = random(9, y.dims(), 1.0, DType::F32);
    let grads = (y * factors).unwrap().sum_all().unwrap().backward().unwrap();
    bits(grads.get(weight).unwrap())
}

#[test]
fn rows_and_gradient_are_those_of_index_select() {
    for (tokens, vocab, width) in [(0, 3, 4), (1, 1, 1), (7, 300, 19), (2000, 513, 65), (500, 3, 300)] {
        let weight = random_var(1, &[vocab, width], 1.0, DType::F32);
        let ids = ids(tokens, vocab);
        let got = embedding(&weight, &ids).unwrap();
        let label = format!("{tokens} tokens of {vocab}");
        assert_eq!(got.dims(), [tokens, width], "{label}");
        if tokens > 0 {
            let index = Tensor::new(&ids[..], weight.device()).unwrap();
            let want = weight.index_select(&index, 0).unwrap();
            assert_eq!(bits(&got), bits(&want), "{label}");
            assert_eq!(gradient(&weight, &got), gradient(&weight, &want), "{label}: gradient");
        }
    }
}

#[test]
fn neither_threads_nor_instruction_set_change_a_bit() {
    let (vocab, width) = (700, 70);
    let weight = random(1, &[vocab, width], 1.0, DType::F32).flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let ids = ids(3000, vocab);
    let run = |threads: usize, isa: Isa| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let op = Embedding { ids: ids.clone(), isa };
        pool.install(|| {
            let rows = op.rows(&weight, width);
            let mut sums = vec![0.0; vocab * width];
            op.add_gradient(&rows, vocab, width, &mut sums);
            [rows, sums].map(|v| v.into_iter().map(f32::to_bits).collect::<Vec<_>>())
        })
    };
    let one = run(1, Isa::Portable);
    for isa in Isa::available() {
        for threads in [1, 2, 3, 5] {
            assert_eq!(run(threads, isa), one, "{threads} threads, {isa}");
        }
    }
}

#[test]
fn bad_ids_and_other_types_are_named() {
    let weight = random(1, &[5, 3], 1.0, DType::F32);
    let message = embedding(&weight, &[0, 5]).unwrap_err().to_string();
    assert!(message.contains("id 5") && message.contains("vocabulary of 5"), "{message}");
    let message = embedding(&weight.to_dtype(DType::F64).unwrap(), &[0]).unwrap_err().to_string();
    assert!(message.contains("F64"), "{message}");
}
