//! The kinds of models beside the dense one of their quality: the paper's figures 12 to 15.

use super::claims::{Cases, Claim, Span, agreed, by_case, digits, ranks_named, where_holds};
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
fn ratios(data: &Data, [first, second]: [&Model; 2], value: impl Fn(&Step) -> f64) -> Cases {
    let ratio = |ranks| {
        let ratio = data.ratio([find(data, first, ranks)?, find(data, second, ranks)?], &value);
        Some((ranks_named(ranks), ratio))
    };
    data.ranks_of(Part::Kinds).into_iter().filter_map(ratio).collect()
}

pub(super) fn section(data: &Data) -> String {
    let mut text = String::from(
        "\n## Kinds of models (figures 12 to 15)\n\nThe paper's figure 14 (read from its chart); of figures 12, 13 \
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
         M | weights and pages of a rank, MB | memory of a rank, MB |\n|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for ranks in data.ranks_of(Part::Kinds) {
        for model in ALL {
            let Some(step) = find(data, model, ranks) else { continue };
            let _ = writeln!(
                text,
                "| {ranks} | {} | {} | {} | {:.0} | {:.0} | {:.1} | {:.2} | {:.1} | {:.0} | {:.0} |",
                model.name,
                model.published,
                digits(step.step_ms),
                step.rate() / ranks as f64,
                step.rate() / ranks.min(data.cores) as f64,
                step.parameters / 1e6,
                step.active_parameters / 1e6,
                step.held_parameters / 1e6,
                step.planned_bytes / 1e6,
                step.resident_bytes / 1e6,
            );
        }
    }
    text
}

/// How many times the parameters of PR-MoE + MoS on half as many ranks are in those of the MoE, of a rank.
fn on_half_the_ranks(data: &Data) -> Cases {
    let pair = |ranks: usize| {
        let half = ranks.is_multiple_of(2).then_some(ranks / 2)?;
        let ratio = data.ratio([find(data, &MOE, ranks)?, find(data, &MOS, half)?], |step| step.held_parameters);
        Some((format!("{half} instead of {ranks}"), ratio))
    };
    data.ranks_of(Part::Kinds).into_iter().filter_map(pair).collect()
}

/// What the paper says about this.
pub(super) fn claims(data: &Data) -> Vec<Claim> {
    let step_ms = |step: &Step| step.step_ms;
    // The same ranks and cores for both, so a step of the dense model has as many tokens.
    let [moe, mos] = [&MOE, &MOS].map(|model| ratios(data, [&DENSE, model], step_ms));
    let original = |ranks| {
        let original = data.of(Part::Formulation).find(|step| step.is(&MOE, ORIGINAL, ranks))?;
        Some((ranks_named(ranks), data.ratio([find(data, &DENSE, ranks)?, original], step_ms)))
    };
    let original: Cases = data.ranks_of(Part::Kinds).into_iter().filter_map(original).collect();
    let reversed = |(case, gain): &(String, Span)| {
        let ours = moe.iter().find(|ours| ours.0 == *case)?.1;
        let (surely, perhaps) = (gain.high < 1.0 && ours.low > 1.0, gain.low < 1.0 && ours.high > 1.0);
        Some((case.clone(), agreed(surely, perhaps)))
    };
    let at_least = |says: &str, published: &str, ratios: Cases, least: f64| Claim {
        says: says.into(),
        published: published.into(),
        here: by_case(&ratios, "x"),
        shows: where_holds(&ratios, |ratio| ratio >= least),
    };
    vec![
        Claim {
            says: "the original's form of the MoE takes more time than the dense model of its quality on the same ranks, and ours \
                   less"
                .into(),
            published: "0.50x (27.8 against 55.3 ms), then 2.24x (12.4 ms)".into(),
            here: format!("{}; then {}", by_case(&original, "x"), by_case(&moe, "x")),
            shows: original.iter().filter_map(reversed).collect(),
        },
        at_least("the MoE takes less time than the dense model on the same ranks", "2.24x", moe.clone(), 1.0),
        at_least("PR-MoE + MoS takes 2.4 times less than it", "2.4x; 4.5x at 1.5T against 175B", mos, 2.4),
        at_least(
            "PR-MoE takes no more time than the MoE",
            "27.7 against 35.7 ms at 2.4B",
            ratios(data, [&MOE, &PR_MOE], step_ms),
            1.0,
        ),
        at_least(
            "the student takes no more time than its PR-MoE",
            "21 of 24 layers",
            ratios(data, [&PR_MOE, &MOS], step_ms),
            1.0,
        ),
        at_least(
            "PR-MoE + MoS has at least 1.9 times fewer parameters than the MoE",
            "1.9x at 1.3B",
            ratios(data, [&MOE, &MOS], |step| step.parameters).into_iter().take(1).collect(),
            1.9,
        ),
        at_least(
            "PR-MoE + MoS fits on half the ranks: each then holds no more than one of the MoE's",
            "16 GPUs instead of 32",
            on_half_the_ranks(data),
            1.0,
        ),
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
    use super::super::claims::tests::verdicts;
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
        assert_eq!(verdicts(&claims(&measured([3.0, 3.0, 2.0, 5.0]))), "+++++++");
        assert_eq!(verdicts(&claims(&measured([3.0, 4.0, 4.5, 10.0]))), "-+---++");
        assert_eq!(verdicts(&claims(&data(Vec::new()))), "???????");
    }

    #[test]
    fn every_kind_has_a_row() {
        let text = section(&measured([3.0, 3.0, 2.0, 5.0]));
        for part in [
            "| PyTorch-MoE, 52B | 55.3 | 146 |",
            "| 2 | PR-MoE-64/128 + MoS | 1.3B+PR-MoE+L21+MoS | 2.00 | 4000 | 4000 | 100.0 | 5.00 | 50.0 | 90 | 100 |",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(panels(&measured([1.0; 4])).len(), 2);
    }
}
