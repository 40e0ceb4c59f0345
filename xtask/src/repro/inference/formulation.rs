//! The original's formulation and ours as ranks grow: the paper's figures 10 and 11, and its claim about the kernels.

use super::claims::{Cases, Claim, by_case, digits, listed, ranks_named, rises, where_holds};
use super::data::{Data, Part, Step};
use super::models::MOE;
use super::place::{Cluster, Place};
use crate::plot::{Curve, Panel};
use anyhow::Result;
use std::fmt::Write as _;

/// The original's layer takes at least 4 rows an expert, its inference module 1.
const MIN_CAPACITIES: &str = "4,1";
pub(super) const OURS: &str = "ours";
/// The better of the original's two.
pub(super) const ORIGINAL: &str = "original, capacity 1";
const FORMS: [&str; 3] = [OURS, ORIGINAL, "original, capacity 4"];
const GBITS: f64 = 10.0;

/// One rank a host as long as there are as many cores.
pub(super) const CLUSTERS: [Cluster; 4] =
    [Cluster::new(1, 1), Cluster::new(2, 1), Cluster::new(2, 2), Cluster::new(4, 2)];

/// GPUs, ms a token, tokens/s a GPU; PyTorch-MoE and DeepSpeed-MoE.
///
/// # Source
/// Paper figure 10 (52B), read from its vector chart: errors up to 0.5 ms.
const FIGURE_10: [(usize, [f64; 2], [f64; 2]); 4] = [
    (8, [56.5, 27.4], [141.0, 292.0]),
    (16, [49.7, 19.2], [159.0, 416.0]),
    (32, [46.0, 14.4], [172.0, 542.0]),
    (64, [43.9, 12.7], [181.0, 619.0]),
];
/// Parameters, ms a token of both, and the paper's gain.
///
/// # Source
/// Paper figure 11, likewise: errors up to 2 ms.
const FIGURE_11: [(&str, [f64; 2], f64); 4] = [
    ("107B", [57.6, 10.7], 5.5),
    ("349B", [139.0, 23.9], 5.9),
    ("1.05T", [174.0, 24.9], 7.2),
    ("2.0T", [332.0, 47.0], 7.3),
];

pub(super) fn clusters(place: &Place) -> &'static [Cluster] {
    if place.size.smoke { &CLUSTERS[..2] } else { &CLUSTERS }
}

pub(super) fn run(place: &Place) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    for &cluster in clusters(place) {
        steps.extend(place.steps(Part::Formulation, &MOE, cluster, GBITS, &["--min-capacity", MIN_CAPACITIES])?);
    }
    Ok(steps)
}

fn find<'a>(data: &'a Data, form: &str, ranks: usize) -> Option<&'a Step> {
    data.of(Part::Formulation).find(|step| step.is(&MOE, form, ranks))
}

/// A value of each number of ranks, of one form.
fn series(data: &Data, form: &str, value: impl Fn(&Step) -> f64) -> Cases {
    let of = |ranks| Some((ranks_named(ranks), data.span(find(data, form, ranks)?, &value)));
    data.ranks_of(Part::Formulation).into_iter().filter_map(of).collect()
}

/// How many times one of the original's forms takes as long as ours.
fn gains(data: &Data, form: &str, value: impl Fn(&Step) -> f64) -> Cases {
    let pair = |ranks| {
        let gain = data.ratio([find(data, form, ranks)?, find(data, OURS, ranks)?], &value);
        Some((ranks_named(ranks), gain))
    };
    data.ranks_of(Part::Formulation).into_iter().filter_map(pair).collect()
}

pub(super) fn section(data: &Data) -> String {
    let mut text = String::from(
        "\n## The original's formulation and ours (figures 10 and 11)\n\nThe paper, 52B on 8 to 64 GPUs, 8 tokens a GPU (read from its \
         charts):\n\n| GPUs | PyTorch-MoE, ms a token | DeepSpeed-MoE | times as fast | PyTorch-MoE, tokens/s a GPU | DeepSpeed-MoE \
         |\n|---|---|---|---|---|---|\n",
    );
    for (gpus, [torch, ours], [torch_rate, our_rate]) in FIGURE_10 {
        let _ = writeln!(text, "| {gpus} | {torch} | {ours} | {:.2} | {torch_rate} | {our_rate} |", torch / ours);
    }
    text += "\n| parameters | PyTorch-MoE, ms a token | DeepSpeed-MoE | the paper's gain |\n|---|---|---|---|\n";
    for (size, [torch, ours], gain) in FIGURE_11 {
        let _ = writeln!(text, "| {size} | {torch} | {ours} | {gain}x |");
    }
    let _ = write!(
        text,
        "\nHere, {} at 1/{} of its width, 8 tokens a rank, {GBITS} Gbit/s: one token step in ms, and its parts. `gate` chooses \
         experts; `layout` makes rows of tokens and tokens of rows (masks and einsums, or a table); \
         `all-to-all` hands messages to the network and waits for others'; `rest` is dense layers, norms and the output layer. Dropped: of 100 choices.\n\n\
         | ranks | hosts | form | step, ms | tokens/s a rank | tokens/s a core | gate | layout | all-to-all | experts | attention | \
         rest | an MoE layer, ms | messages of a rank | KB of a rank | dropped |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
        MOE.published, data.narrow
    );
    for ranks in data.ranks_of(Part::Formulation) {
        for step in FORMS.iter().filter_map(|form| find(data, form, ranks)) {
            text += &row(step, data.cores);
        }
    }
    text += "\n| ranks | the original | step | gate and layout | all-to-all | experts | an MoE layer | bytes |\n\
             |---|---|---|---|---|---|---|---|\n";
    for (ranks, form) in
        data.ranks_of(Part::Formulation).into_iter().flat_map(|r| FORMS[1..].iter().map(move |f| (r, f)))
    {
        let (Some(original), Some(ours)) = (find(data, form, ranks), find(data, OURS, ranks)) else { continue };
        let times = |value: &dyn Fn(&Step) -> f64| match value(ours) {
            own if own > 0.0 => format!("{}x", digits(value(original) / own)),
            _ => "-".into(),
        };
        let _ = writeln!(
            text,
            "| {ranks} | {form} | {} | {} | {} | {} | {} | {} |",
            times(&|step| step.step_ms),
            times(&Step::gate_and_layout_ms),
            times(&|step| if step.ranks > 1 { step.all_to_all_ms } else { 0.0 }),
            times(&|step| step.experts_ms),
            times(&Step::layer_ms),
            times(&Step::bytes),
        );
    }
    text
}

fn row(step: &Step, cores: usize) -> String {
    let parts = [step.gate_ms, step.layout_ms, step.all_to_all_ms, step.experts_ms, step.attention_ms, step.rest_ms];
    let choices = step.tokens / step.ranks as f64 * step.moe_layers as f64;
    format!(
        "| {} | {} | {} | {} | {:.0} | {:.0} | {} | {} | {:.0} | {:.1} | {:.1} |\n",
        step.ranks,
        step.hosts,
        step.form,
        digits(step.step_ms),
        step.rate() / step.ranks as f64,
        step.rate() / step.ranks.min(cores) as f64,
        parts.map(digits).join(" | "),
        digits(step.layer_ms()),
        step.messages(),
        step.bytes() / 1e3,
        100.0 * step.dropped / choices.max(1.0),
    )
}

/// What the paper says about this.
pub(super) fn claims(data: &Data) -> Vec<Claim> {
    let published = listed(&FIGURE_10.map(|(_, [torch, ours], _)| torch / ours), "x");
    let [padded, single] = [FORMS[2], ORIGINAL].map(|form| gains(data, form, |step| step.step_ms));
    let kernels = gains(data, ORIGINAL, Step::gate_and_layout_ms);
    let steps = series(data, OURS, |step| step.step_ms);
    let falling: Cases = steps.iter().map(|(case, ms)| (case.clone(), -*ms)).collect();
    let a_rank = series(data, OURS, |step| step.rate() / step.ranks as f64);
    let a_core = series(data, OURS, |step| step.rate() / step.ranks.min(data.cores) as f64);
    let faster = |says: &str, gains: &Cases| Claim {
        says: says.into(),
        published: format!("{published} on 8 to 64 GPUs, up to 7.3x at 2T"),
        here: by_case(gains, "x"),
        shows: where_holds(gains, |gain| gain > 1.0),
    };
    vec![
        faster("ours takes less time for a token than the original's form with a capacity of 4", &padded),
        faster("the same with a capacity of 1", &single),
        Claim {
            says: "the gain grows with the ranks (capacity 1)".into(),
            published: published.clone(),
            here: by_case(&single, "x"),
            shows: rises(&single),
        },
        Claim {
            says: "gate and layout take at least 6 times less (capacity 1)".into(),
            published: "more than 6x".into(),
            here: by_case(&kernels, "x"),
            shows: where_holds(&kernels, |gain| gain >= 6.0),
        },
        Claim {
            says: "a token takes less time on more ranks".into(),
            published: listed(&FIGURE_10.map(|(_, [_, ours], _)| ours), " ms"),
            here: by_case(&steps, " ms"),
            shows: rises(&falling),
        },
        Claim {
            says: "tokens/s a rank rise with the ranks".into(),
            published: listed(&FIGURE_10.map(|(_, _, [_, ours])| ours), ""),
            here: by_case(&a_rank, ""),
            shows: rises(&a_rank),
        },
        Claim {
            says: format!("the same, a core (of {} that all ranks share)", data.cores),
            published: "as above: a GPU is one rank".into(),
            here: by_case(&a_core, ""),
            shows: rises(&a_core),
        },
    ]
}

/// Time and rate over ranks.
pub(super) fn panels(data: &Data) -> Vec<Panel> {
    let curve = |form: &&str, value: &dyn Fn(&Step) -> f64| {
        let point = |ranks| Some((ranks as f64, value(find(data, form, ranks)?)));
        Curve { name: (*form).into(), points: data.ranks_of(Part::Formulation).into_iter().filter_map(point).collect() }
    };
    let panel = |title: &str, value: &dyn Fn(&Step) -> f64| Panel {
        title: title.into(),
        curves: FORMS.iter().map(|form| curve(form, value)).collect(),
    };
    vec![
        panel("a token step, us", &|step| 1e3 * step.step_ms),
        panel("tokens/s a rank", &|step| step.rate() / step.ranks as f64),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::claims::tests::verdicts;
    use super::super::data::tests::{data, step};
    use super::*;

    fn measured(ours: [f64; 2], original: [f64; 2]) -> Data {
        let of = |form, ranks, ms| Step { step_ms: ms, ..step(Part::Formulation, form, ranks) };
        data(vec![
            of(OURS, 1, ours[0]),
            of(ORIGINAL, 1, original[0]),
            of(OURS, 2, ours[1]),
            of(ORIGINAL, 2, original[1]),
        ])
    }

    #[test]
    fn claims_are_told_by_the_figures() {
        // Faster, more so on more ranks; masks cost no more; a token takes less time.
        assert_eq!(verdicts(&claims(&measured([2.0, 1.0], [4.0, 3.0]))), "?++-+++");
        assert_eq!(verdicts(&claims(&measured([2.0, 5.0], [4.0, 3.0]))), "?~-----");
        assert_eq!(verdicts(&claims(&data(Vec::new()))), "???????");
    }

    #[test]
    fn rows_stand_beside_the_papers() {
        let text = section(&measured([2.0, 1.0], [4.0, 3.0]));
        for part in [
            "| 64 | 43.9 | 12.7 | 3.46 | 181 | 619 |",
            "| 1 | 1 | ours | 2.00 | 4000 | 4000 | 0.100 | 0.100 | 0.200 | 0.400 | 0.100 | 0.100 | 0.067 | 36 | 3.0 | 0.0 |",
            "| 2 | original, capacity 1 | 3.00x | 1.00x | 1.00x | 1.00x | 1.00x | 1.00x |",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert_eq!(panels(&measured([2.0, 1.0], [4.0, 3.0])).len(), 2);
    }
}
