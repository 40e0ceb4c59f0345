//! What travels for a token by each route between hosts, beside the paper's formulas of its section 5.3.

use super::claims::{Cases, Claim, by_case, digits, where_holds};
use super::data::{Data, Part, Step};
use super::models::MOE;
use super::place::{Cluster, Place};
use anyhow::Result;
use std::fmt::Write as _;

/// L: ranks of a tensor group, for all routes alike, so that all move the same tokens.
const TENSOR_RANKS: usize = 2;

/// A way of rows.
struct Way {
    name: &'static str,
    flags: &'static [&'static str],
    /// As the example prints them.
    route: &'static str,
    coordination: &'static str,
    formula: &'static str,
}

const FLAT: Way = Way { name: "flat", flags: &["--route", "flat"], route: "flat", coordination: "None", formula: "p" };
const HIERARCHICAL: Way = Way {
    name: "hierarchical",
    flags: &["--route", "hierarchical"],
    route: "hierarchical",
    formula: "G + p/G",
    ..FLAT
};
const COORDINATED: Way = Way {
    name: "coordinated",
    flags: &["--route", "flat", "--coordination", "destination"],
    coordination: "ByDestination",
    formula: "p/L + L",
    ..FLAT
};
const BOTH: Way = Way {
    name: "both",
    flags: &["--route", "hierarchical", "--coordination", "destination"],
    route: "hierarchical",
    coordination: "ByDestination",
    formula: "G/L + p/G + L",
};
const WAYS: [Way; 4] = [FLAT, HIERARCHICAL, COORDINATED, BOTH];

impl Way {
    fn is(&self, step: &Step) -> bool {
        step.route == self.route && step.coordination == self.coordination
    }

    /// Messages to others of one way there: everyone with everyone, inside a node, between nodes, among ranks of a tensor index.
    fn there(&self, step: &Step) -> usize {
        let (p, g, l) = (step.ranks, step.ranks_per_node, step.tp);
        match self.name {
            "flat" => p - 1,
            "hierarchical" => (g - 1) + (p / g - 1),
            "coordinated" => p / l - 1,
            _ => (g / l).max(1) - 1 + (p / g - 1),
        }
    }

    /// Most messages of a rank for a layer: the counts, the rows there and back, and what a tensor group gathers. Where there is
    /// no row for a rank, there is no message.
    fn most(&self, step: &Step) -> usize {
        let gathered = if self.coordination == "None" { 0 } else { step.tp - 1 };
        3 * self.there(step) + gathered
    }
}

/// A network and a cluster.
type Case = (f64, usize);

fn clusters(place: &Place) -> &'static [Cluster] {
    const ALL: [Cluster; 2] = [Cluster::new(2, 2), Cluster::new(4, 2)];
    if place.size.smoke { &ALL[..1] } else { &ALL }
}

pub(super) fn run(place: &Place) -> Result<Vec<Step>> {
    let gbits: &[f64] = if place.size.smoke { &[10.0] } else { &[1.0, 10.0] };
    let tensor_ranks = TENSOR_RANKS.to_string();
    let mut steps = Vec::new();
    for (gbits, &cluster) in gbits.iter().flat_map(|gbits| clusters(place).iter().map(move |of| (*gbits, of))) {
        for way in &WAYS {
            let flags = [&["--tp", &tensor_ranks], way.flags].concat();
            steps.extend(place.steps(Part::Routes, &MOE, cluster, gbits, &flags)?);
        }
    }
    Ok(steps)
}

fn cases(data: &Data) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for step in data.of(Part::Routes) {
        if !cases.contains(&(step.gbits, step.ranks)) {
            cases.push((step.gbits, step.ranks));
        }
    }
    cases
}

fn find<'a>(data: &'a Data, (gbits, ranks): Case, way: &Way) -> Option<&'a Step> {
    data.of(Part::Routes).find(|step| step.gbits == gbits && step.ranks == ranks && way.is(step))
}

/// What all ranks together send for a token in a layer.
fn of_a_token(step: &Step, of_a_rank: f64) -> f64 {
    of_a_rank * step.ranks as f64 / step.tokens / step.moe_layers as f64
}

/// An exchange and what surrounds it, of a layer.
fn exchange_ms(step: &Step) -> f64 {
    (step.layout_ms + step.all_to_all_ms) / step.moe_layers as f64
}

pub(super) fn section(data: &Data) -> String {
    let mut text = format!(
        "\n## Routes between hosts (section 5.3)\n\nThe paper: of p ranks, G on a node, L of a tensor group, a rank sends O(p) messages flat, \
         O(G + p/G) hierarchically, with twice the volume, O(p/L) + O(L) coordinated with tensor slicing; on 128 GPUs, L = 8, 128 C1 + C2 \
         become 16 C1 + C2.\n\nHere: {} at 1/{} of its width, G = 2, L = {TENSOR_RANKS} for every route, 8 tokens a tensor group, {} us one \
         way. Counted where they are sent, for a layer: the counts of rows, the rows there and back, and what a tensor group gathers. \
         `most` is the sum of these by the plan (flat 3 (p - 1), hierarchical 3 (G - 1 + p/G - 1), coordinated 3 (p/L - 1) + L - 1, both 3 \
         (G/L - 1 + p/G - 1) + L - 1); a rank without rows for another sends it no message. Exchange: layout and all-to-all of a layer, \
         on ranks that share {} cores.\n\n\
         | Gbit/s | hosts | p | route | the paper's order | messages of a rank, mean | of the rank with the most | most, by the plan | \
         messages a token, in nodes | between | bytes a token, in nodes | between | exchange, ms | step, ms |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
        MOE.published, data.narrow, data.delay_us, data.cores,
    );
    for case in cases(data) {
        for (way, step) in WAYS.iter().filter_map(|way| Some((way, find(data, case, way)?))) {
            let layers = step.moe_layers as f64;
            let token = |of_a_rank| of_a_token(step, of_a_rank);
            let _ = writeln!(
                text,
                "| {} | {} | {} | {} | {} | {} | {:.1} | {} | {:.2} | {:.2} | {:.0} | {:.0} | {} | {} |",
                step.gbits,
                step.hosts,
                step.ranks,
                way.name,
                way.formula,
                digits(step.messages() / layers),
                step.most_messages / layers,
                way.most(step),
                token(step.intra_node_messages),
                token(step.inter_node_messages),
                token(step.intra_node_bytes),
                token(step.inter_node_bytes),
                digits(exchange_ms(step)),
                digits(step.step_ms),
            );
        }
    }
    text
}

/// A value of one way over that of another, in every case.
fn ratios(data: &Data, [first, second]: [&Way; 2], value: impl Fn(&Step) -> f64) -> Cases {
    let ratio = |case: Case| {
        let ratio = data.ratio([find(data, case, first)?, find(data, case, second)?], &value);
        Some((format!("{} ranks at {} Gbit/s", case.1, case.0), ratio))
    };
    cases(data).into_iter().filter_map(ratio).collect()
}

/// What the paper says about this.
pub(super) fn claims(data: &Data) -> Vec<Claim> {
    let share = |way: &Way| {
        let shares = data.of(Part::Routes).filter(|step| way.is(step));
        let most = shares.map(|step| step.most_messages / (way.most(step) * step.moe_layers) as f64).reduce(f64::max);
        most.map(|most| (way.name.to_owned(), most.into()))
    };
    let shares: Cases = WAYS.iter().filter_map(share).collect();
    let claim = |says: &str, published: &str, cases: Cases, holds: fn(f64) -> bool| Claim {
        says: says.into(),
        published: published.into(),
        here: by_case(&cases, "x"),
        shows: where_holds(&cases, holds),
    };
    let messages = |way| ratios(data, [way, &FLAT], Step::messages);
    let gain = |way| ratios(data, [&FLAT, way], exchange_ms);
    vec![
        claim(
            "no rank sends more messages than its route's formula says (most of any rank, over the plan's)",
            "p, G + p/G, p/L + L",
            shares,
            |share| share <= 1.0,
        ),
        claim("hierarchical sends fewer messages than flat", "G + p/G of p", messages(&HIERARCHICAL), |of| of < 1.0),
        claim(
            "hierarchical at most doubles the volume",
            "2x",
            ratios(data, [&HIERARCHICAL, &FLAT], Step::bytes),
            |of| of <= 2.0,
        ),
        claim("coordinated sends fewer messages than flat", "p/L + L of p", messages(&COORDINATED), |of| of < 1.0),
        claim(
            "the hierarchical exchange of so few tokens is faster than the flat one",
            "wins where latency dominates",
            gain(&HIERARCHICAL),
            |gain| gain > 1.0,
        ),
        claim("so is the coordinated one", "128 C1 + C2 to 16 C1 + C2", gain(&COORDINATED), |gain| gain > 1.0),
    ]
}

#[cfg(test)]
mod tests {
    use super::super::claims::tests::verdicts;
    use super::super::data::tests::{data, step};
    use super::*;

    fn of(way: &Way, ranks: usize, messages: f64, ms: f64) -> Step {
        Step {
            route: way.route.into(),
            coordination: way.coordination.into(),
            tp: 2,
            dp: ranks / 2,
            tokens: 4.0 * ranks as f64,
            intra_node_messages: 0.0,
            inter_node_messages: messages,
            most_messages: messages,
            all_to_all_ms: ms,
            ..step(Part::Routes, "ours", ranks)
        }
    }

    #[test]
    fn the_most_messages_are_those_of_the_plan() {
        let most = |ranks| WAYS.each_ref().map(|way| way.most(&of(way, ranks, 0.0, 0.0)));
        assert_eq!(most(4), [9, 6, 4, 4]);
        assert_eq!(most(8), [21, 12, 10, 10]);
    }

    #[test]
    fn claims_are_told_by_the_figures() {
        let measured = |hierarchical: f64, coordinated: f64| {
            let of_way = |(way, messages, ms)| of(way, 8, 12.0 * messages, ms);
            let all = [(&FLAT, 20.0, 4.0), (&HIERARCHICAL, hierarchical, 2.0), (&COORDINATED, coordinated, 5.0)];
            data(all.map(of_way).to_vec())
        };
        assert_eq!(verdicts(&claims(&measured(11.0, 9.0))), "+++++-");
        // More than its plan, and than the flat one.
        assert_eq!(verdicts(&claims(&measured(25.0, 9.0))), "~-+++-");
        assert_eq!(verdicts(&claims(&data(Vec::new()))), "??????");
        let text = section(&measured(11.0, 9.0));
        let row = "| 10 | 4 | 8 | hierarchical | G + p/G | 11.0 | 11.0 | 12 | 0.00 | 2.75 | 21 | 42 | 0.175 | 1.00 |";
        assert!(text.contains(row), "{text}");
    }
}
