//! A PR-MoE over up to 8 ranks on threads equals one rank; and what a rank without a partner says.

use crate::equality::{Kind, Reference, check, layouts};
use moe_models::Precision;
use moe_parallel::comm::thread::ThreadWorld;

fn kind(experts: &[usize], top_k: usize, capacity: Option<f64>) -> Kind {
    Kind { experts: experts.to_vec(), top_k, capacity, precision: Precision::F32 }
}

/// Two expert counts in one model, on every layout.
#[test]
fn every_layout_equals_one_rank() {
    let reference = Reference::new(&kind(&[4, 8], 1, Some(1.0)));
    let mut count = 0;
    for world in [1, 2, 3, 4, 6, 8] {
        for layout in layouts(world) {
            ThreadWorld::new(world).run(|comm| check(&comm, &layout, &reference));
            count += 1;
        }
    }
    assert!(count > 60, "{count} layouts");
}

/// Experts that do not divide by the ranks, fewer experts than ranks, several choices, no drops, bf16 products.
#[test]
fn every_kind_of_model_equals_one_rank() {
    let kinds = [
        kind(&[3, 5], 2, None),
        kind(&[5], 3, Some(1.25)),
        Kind { precision: Precision::Bf16, ..kind(&[2, 7], 2, Some(1.0)) },
    ];
    for kind in &kinds {
        let reference = Reference::new(kind);
        for world in [2, 4, 6, 8] {
            // bf16 rounds what split matrices sum: those are held to f32's tolerance in f32 alone.
            let held = |l: &&crate::equality::Layout| {
                kind.precision == Precision::F32 || (l.dims.tp == 1 && l.dims.expert_slices == 1)
            };
            for layout in layouts(world).iter().filter(held).step_by(if world == 8 { 3 } else { 2 }) {
                ThreadWorld::new(world).run(|comm| check(&comm, layout, &reference));
            }
        }
    }
}
