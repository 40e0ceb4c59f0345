//! The kinds of models beside the dense one of their quality: the paper's figures 12 to 15.

use super::claims::{Claim, all_at_least, digits, listed};
use super::data::{Data, Part, Step};
use super::formulation::{self, ORIGINAL, OURS};
use super::models::{ALL, DENSE, MOE, MOS, Model, PR_MOE};
use super::place::Place;
use crate::plot::{Curve, Panel};
use anyhow::Result;
use std::fmt::Write as _;

const GBITS: f64 = 10.0;

/// Model, ms a token, tokens/s a GPU.
///
/// # Source
/// Paper figure 14, read from its vector chart: errors up to 0.5 ms.
const FIGURE_14: [(&str, f64, f64); 4] = [
    ("PyTorch-MoE, 52B", 55.3, 146.0),
    ("PyTorch, dense 6.7B on one GPU", 27.8, 292.0),
    ("DeepSpeed-MoE, 52B", 12.4, 646.0),
    ("DeepSpeed PR-MoE + MoS, 27B", 11.5, 701.0),
];

pub(super) fn run(place: &Place) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    for &cluster in formulation::clusters(place) {
        for model in ALL {
            steps.extend(place.steps(Part::Kinds, model, cluster, GBITS, &[])?);
        }
    }
    Ok(steps)
}

fn find<'a>(data: &'a Data, model: &Model, ranks: usize) -> Option<&'a Step> {
    data.of(Part::Kinds).find(|step| step.is(model, OURS, ranks))
}

/// The value of one model over that of another, for each number of ranks.
fn ratios(data: &Data, [first, second]: [&Model; 2], value: impl Fn(&Step) -> f64) -> Vec<f64> {
    let ratio = |ranks| Some(value(find(data, first, ranks)?) / value(find(data, second, ranks)?));
    data.ranks_of(Part::Kinds).into_iter().filter_map(ratio).collect()
}

pub(super) fn section(data: &Data) -> String {
    let mut text = String::from(
        "\n## Kinds of models (figures 12 to 15)\n\nThe paper's figure 14 (read from its chart; the MoE on 128 GPUs); of figures 12, 13 \
         and 15 statements alone are known.\n\n| model | ms a token | tokens/s a GPU |\n|---|---|---|\n",
    );
    for (model, ms, rate) in FIGURE_14 {
        let _ = writeln!(text, "| {model} | {ms} | {rate} |");
    }
    let [width, heads, vocabulary] = MOE.sizes(data.narrow);
    let [dense_width, dense_heads, _] = DENSE.sizes(data.narrow);
    let _ = write!(
        text,
        "\nHere: layers, experts and the ratio of the widths are the paper's; width {width} ({heads} heads), of the dense model \
         {dense_width} ({dense_heads} heads), vocabulary {vocabulary}, weights of bf16 drawn at random. The dense model is the one that \
         has the others' quality in the paper; nobody has trained these. 8 tokens a rank, {GBITS} Gbit/s; dense layers are replicas, \
         experts are spread over all ranks.\n\n\
         | ranks | model | of the paper | step, ms | tokens/s a rank | tokens/s a core | parameters, M | of a token, M | held by a rank, \
         M | memory of a rank, MB |\n|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for ranks in data.ranks_of(Part::Kinds) {
        for model in ALL {
            let Some(step) = find(data, model, ranks) else { continue };
            let _ = writeln!(
                text,
                "| {ranks} | {} | {} | {} | {:.0} | {:.0} | {:.1} | {:.2} | {:.1} | {:.0} |",
                model.name,
                model.published,
                digits(step.step_ms),
                step.rate() / ranks as f64,
                step.rate() / ranks.min(data.cores) as f64,
                step.parameters / 1e6,
                step.active_parameters / 1e6,
                step.held_parameters / 1e6,
                step.resident_bytes / 1e6,
            );
        }
    }
    text
}

/// How many times the parameters of PR-MoE + MoS on half as many ranks are in those of the MoE, of a rank.
fn on_half_the_ranks(data: &Data) -> Vec<f64> {
    let pair = |ranks: usize| {
        let half = ranks.is_multiple_of(2).then_some(ranks / 2)?;
        Some(find(data, &MOE, ranks)?.held_parameters / find(data, &MOS, half)?.held_parameters)
    };
    data.ranks_of(Part::Kinds).into_iter().filter_map(pair).collect()
}

/// What the paper says about this.
pub(super) fn claims(data: &Data) -> Vec<Claim> {
    let times = |values: &[f64]| listed(values, "x");
    let step_ms = |step: &Step| step.step_ms;
    // The same ranks and cores for both, so a step of the dense model has as many tokens.
    let moe = ratios(data, [&DENSE, &MOE], step_ms);
    let mos = ratios(data, [&DENSE, &MOS], step_ms);
    let original = |ranks| {
        let original = data.of(Part::Formulation).find(|step| step.is(&MOE, ORIGINAL, ranks))?;
        Some(find(data, &DENSE, ranks)?.step_ms / original.step_ms)
    };
    let original: Vec<f64> = data.ranks_of(Part::Kinds).into_iter().filter_map(original).collect();
    let reverses = all_at_least(&moe, 1.0).zip(all_at_least(&original, 1.0)).map(|(ours, original)| ours && !original);
    let memory = ratios(data, [&MOE, &MOS], |step| step.parameters);
    let half = on_half_the_ranks(data);
    let among = [ratios(data, [&MOE, &PR_MOE], step_ms), ratios(data, [&PR_MOE, &MOS], step_ms)];
    vec![
        Claim {
            says: "the MoE takes less time than the dense model of its quality, on the same ranks".into(),
            published: "2.24x (12.4 against 27.8 ms)".into(),
            here: times(&moe),
            shows: all_at_least(&moe, 1.0),
        },
        Claim {
            says: "in the original's form it takes more, and ours reverses that".into(),
            published: "0.50x (55.3 against 27.8 ms), then 2.24x".into(),
            here: format!("{}, then {}", times(&original), times(&moe)),
            shows: reverses,
        },
        Claim {
            says: "PR-MoE + MoS takes at most 1/2.4 of the dense model's time".into(),
            published: "2.4x; 4.5x at 1.5T against 175B".into(),
            here: times(&mos),
            shows: all_at_least(&mos, 2.4),
        },
        Claim {
            says: "PR-MoE takes no more time than the MoE".into(),
            published: "27.7 against 35.7 ms at 2.4B".into(),
            here: times(&among[0]),
            shows: all_at_least(&among[0], 1.0),
        },
        Claim {
            says: "the student takes no more time than its PR-MoE".into(),
            published: "less by its layers: 21 of 24".into(),
            here: times(&among[1]),
            shows: all_at_least(&among[1], 1.0),
        },
        Claim {
            says: "PR-MoE + MoS has at least 1.9 times fewer parameters than the MoE".into(),
            published: "1.9x at 1.3B".into(),
            here: times(&memory),
            shows: all_at_least(&memory, 1.9),
        },
        Claim {
            says: "PR-MoE + MoS fits on half the ranks: a rank then holds no more than one of the MoE's".into(),
            published: "16 GPUs instead of 32".into(),
            here: times(&half),
            shows: all_at_least(&half, 1.0),
        },
    ]
}

/// Time over ranks, and what a rank holds.
pub(super) fn panels(data: &Data) -> Vec<Panel> {
    let curves = |value: &dyn Fn(&Step) -> f64| {
        let curve = |model: &&Model| {
            let point = |ranks| Some((ranks as f64, value(find(data, model, ranks)?)));
            let points = data.ranks_of(Part::Kinds).into_iter().filter_map(point).collect();
            Curve { name: model.name.into(), points }
        };
        ALL.iter().map(curve).collect()
    };
    vec![
        Panel { title: "a token step, us".into(), curves: curves(&|step| 1e3 * step.step_ms) },
        Panel {
            title: "held by a rank, thousand parameters".into(),
            curves: curves(&|step| step.held_parameters / 1e3),
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::super::data::tests::{data, step};
    use super::*;

    fn measured(ms: [f64; 4]) -> Data {
        let mut steps = Vec::new();
        for ranks in [1, 2] {
            for (model, ms) in ALL.iter().zip(ms) {
                let parameters = if model.name == MOS.name { 100e6 } else { 200e6 };
                let held_parameters = parameters / ranks as f64;
                let model = model.name.into();
                steps.push(Step { model, step_ms: ms, parameters, held_parameters, ..step(Part::Kinds, OURS, ranks) });
            }
            steps.push(Step { step_ms: 9.0, ..step(Part::Formulation, ORIGINAL, ranks) });
        }
        data(steps)
    }

    #[test]
    fn claims_are_told_by_the_figures() {
        let shows = |ms| claims(&measured(ms)).iter().map(|claim| claim.shows).collect::<Vec<_>>();
        assert_eq!(shows([3.0, 3.0, 2.0, 5.0]), [true, true, true, true, true, true, true].map(Some));
        assert_eq!(shows([3.0, 4.0, 4.5, 10.0]), [true, false, false, false, false, true, true].map(Some));
        assert!(claims(&data(Vec::new())).iter().all(|claim| claim.shows.is_none()));
    }

    #[test]
    fn every_kind_has_a_row() {
        let text = section(&measured([3.0, 3.0, 2.0, 5.0]));
        for part in [
            "| PyTorch-MoE, 52B | 55.3 | 146 |",
            "| 2 | PR-MoE-64/128 + MoS | 1.3B+PR-MoE+L21+MoS | 2.00 | 4000 | 4000 | 100.0 | 5.00 | 50.0 | 100 |",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(panels(&measured([1.0; 4])).len(), 2);
    }
}
