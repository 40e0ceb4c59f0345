//! Both moves against `moe-core`'s, which is checked against one-hot products.

use super::*;
use candle_core::{DType, Var};
use moe_core::ops::{CandleOps, MoeOps};
use moe_core::testing::{assert_close, random, random_var, skewed_expert_ids};

fn table(tokens: usize, experts: usize, top_k: usize, skew: f64, drop: bool) -> Arc<DispatchTable> {
    let mut choice_experts: Vec<u32> = Vec::new();
    for (token, first) in skewed_expert_ids(7, tokens, experts, skew).into_iter().enumerate() {
        for k in 0..top_k {
            let lost = drop && (token + k) % 5 == 0;
            choice_experts.push(if lost { DROPPED } else { (first + k as u32) % experts as u32 });
        }
    }
    let mut order: Vec<usize> = (0..choice_experts.len()).filter(|&c| choice_experts[c] != DROPPED).collect();
    order.sort_by_key(|&c| choice_experts[c]);
    let mut choice_rows = vec![DROPPED; choice_experts.len()];
    order.iter().enumerate().for_each(|(row, &choice)| choice_rows[choice] = row as u32);
    let upto = |e: u32| order.iter().filter(|&&c| choice_experts[c] < e).count();
    Arc::new(DispatchTable {
        num_tokens: tokens,
        top_k,
        row_tokens: order.iter().map(|&c| (c / top_k) as u32).collect(),
        row_choices: order.iter().map(|&c| c as u32).collect(),
        choice_rows,
        expert_offsets: (0..=experts as u32).map(upto).collect(),
    })
}

#[test]
fn moves_and_their_gradients_equal_those_of_the_core() {
    for (tokens, experts, top_k, skew, drop) in [
        (0, 2, 1, 1.0, false),
        (1, 4, 2, 1.0, false),
        (9, 3, 2, 0.5, true),
        (700, 4, 3, 0.1, true),
        (130, 2, 2, 1.0, false),
    ] {
        let table = table(tokens, experts, top_k, skew, drop);
        let label = format!("{tokens} tokens, top {top_k}");
        let x = random_var(1, &[tokens, 21], 1.0, DType::F32);
        let rows = random_var(2, &[table.num_rows(), 21], 1.0, DType::F32);
        let weights = random_var(3, &[tokens, top_k], 1.0, DType::F32);
        let check = |got: Tensor, want: Tensor, vars: &[&Var]| {
            assert_close(&got, &want, 1e-6, &label);
            let factors = random(4, want.dims(), 1.0, DType::F32);
            let backward = |y: Tensor| (y * &factors).unwrap().sum_all().unwrap().backward().unwrap();
            let (got, want) = (backward(got), backward(want));
            for var in vars {
                assert_close(got.get(var).unwrap(), want.get(var).unwrap(), 1e-5, &label);
            }
        };
        check(permute(&x, &table).unwrap(), CandleOps.permute(&x, &table).unwrap(), &[&x]);
        check(
            unpermute(&rows, &weights, &table).unwrap(),
            CandleOps.unpermute(&rows, &weights, &table).unwrap(),
            &[&rows, &weights],
        );
        assert!(permute(&random(5, &[tokens + 1, 4], 1.0, DType::F32), &table).is_err());
        assert!(unpermute(&rows, &random(5, &[tokens, top_k + 1], 1.0, DType::F32), &table).is_err());
    }
}
