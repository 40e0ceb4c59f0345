//! One size of model: our rows beside those of other programs.

use serde_json::Value;
use std::fmt::Write as _;

/// What was measured of one size.
pub(super) struct Section {
    /// Our table as the bench printed it.
    pub(super) table: String,
    /// The model, the work of a step, and the machine's ceilings around the rows.
    pub(super) model: Value,
    pub(super) ours: Vec<Value>,
    pub(super) peers: Vec<Value>,
}

impl Section {
    /// Our fastest row with the type and the router of a peer, if both have been measured.
    fn our_best(&self, peer: &Value) -> Option<(&Value, f64)> {
        let same = |row: &&Value| ["type", "router"].iter().all(|key| row[*key] == peer[*key]);
        let theirs = speed(peer)?;
        let measured = self.ours.iter().filter(same).filter_map(|row| Some((row, speed(row)?)));
        measured.max_by(|a, b| a.1.total_cmp(&b.1)).map(|(row, ours)| (row, ours / theirs))
    }

    /// Our table, the peers', and ours against each peer.
    pub(super) fn text(&self) -> String {
        let mut text = self.table.clone();
        if !self.peers.is_empty() {
            let _ = write!(text, "\n{:<23}{:<6}{:<10}", "peer", "type", "router");
            for column in ["tokens/s", "best", "step, ms", "forward", "backward", "optimizer"] {
                let _ = write!(text, "{column:>10}");
            }
            for column in ["GFLOP/s", "of peak", "dropped", "peak, MB", "import", "ours, t/s", "batches"] {
                let _ = write!(text, "{column:>10}");
            }
            let _ = writeln!(text, "{:>8}", "ratio");
        }
        for peer in &self.peers {
            let _ = writeln!(text, "{}", self.line(peer));
        }
        text
    }

    fn line(&self, peer: &Value) -> String {
        let [name, kind, router] = ["peer", "type", "router"].map(|key| word(peer, key));
        let mut line = format!("{name:<23}{kind:<6}{router:<10}");
        if let Some(reason) = peer["failed"].as_str() {
            let _ = write!(line, "  failed: {reason}");
            return line;
        }
        let _ = write!(line, "{:>10.0}{:>10.0}", number(peer, "tokens_per_second"), number(peer, "best"));
        for key in ["step_ms", "forward_ms", "backward_ms", "optimizer_ms"] {
            let _ = write!(line, "{:>10.1}", number(peer, key));
        }
        let gflops = number(&self.model, "flops") / number(peer, "step_ms") / 1e6;
        let share = gflops / number(&self.model["peak_gflops"], kind);
        let _ = write!(line, "{gflops:>10.1}{:>9.1}%{:>9.1}%", 100.0 * share, 100.0 * number(peer, "drop_rate"));
        let _ = write!(line, "{:>10.0}{:>10.0}", number(peer, "peak_mb"), number(peer, "imports_mb"));
        let _ = match self.our_best(peer) {
            Some((row, ratio)) => {
                let (ours, batches) = (number(row, "tokens_per_second"), word(row, "batches"));
                write!(line, "{ours:>10.0}{batches:>10}{ratio:>7.2}x")
            }
            None => write!(line, "{:>10}{:>10}{:>8}", "-", "-", "-"),
        };
        line
    }

    /// The ratios of the table.
    pub(super) fn ratios_json(&self) -> Vec<Value> {
        let ratio = |peer: &Value| {
            let (row, ratio) = self.our_best(peer)?;
            Some(serde_json::json!({
                "size": peer["size"], "peer": peer["peer"], "type": peer["type"], "router": peer["router"],
                "batches": row["batches"], "ratio": ratio,
            }))
        };
        self.peers.iter().filter_map(ratio).collect()
    }
}

fn word<'a>(row: &'a Value, key: &str) -> &'a str {
    row[key].as_str().unwrap_or_default()
}

fn number(row: &Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or(f64::NAN)
}

/// Median tokens per second of a row that has been measured.
fn speed(row: &Value) -> Option<f64> {
    row["tokens_per_second"].as_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours(kind: &str, router: &str, batches: &str, speed: f64) -> Value {
        serde_json::json!({ "type": kind, "router": router, "batches": batches, "tokens_per_second": speed })
    }

    fn peer(name: &str, router: &str, speed: f64) -> Value {
        let mut row = ours("bf16", router, "", speed);
        row["peer"] = name.into();
        row["step_ms"] = 100.0.into();
        row
    }

    fn section(ours: Vec<Value>, peers: Vec<Value>) -> Section {
        let model = serde_json::json!({ "flops": 2e9, "peak_gflops": { "bf16": 80.0 } });
        Section { table: "table\n".into(), model, ours, peers }
    }

    #[test]
    fn our_fastest_row_of_the_same_work_is_set_beside_each_peer() {
        let rows = vec![
            ours("bf16", "capacity", "1x8", 3000.0),
            ours("bf16", "capacity", "2x4", 4000.0),
            ours("bf16", "dropless", "1x8", 1500.0),
            ours("f32", "dropless", "2x4", 9000.0),
        ];
        let peers = vec![peer("drops", "capacity", 1000.0), peer("keeps", "dropless", 1000.0), peer("other", "", 1.0)];
        let section = section(rows, peers);
        let text = section.text();
        let line = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
        assert!(line("drops").ends_with("4.00x") && line("drops").contains("2x4"), "{text}");
        assert!(line("keeps").ends_with("1.50x") && line("keeps").contains("1x8"), "{text}");
        assert!(line("keeps").contains("20.0     25.0%"), "2 GFLOP in 0.1 s of 80 a second: {text}");
        assert!(line("other").ends_with('-'), "{text}");
        let ratios = section.ratios_json();
        assert_eq!((ratios.len(), ratios[1]["ratio"].as_f64()), (2, Some(1.5)));
    }

    #[test]
    fn rows_that_failed_are_told_and_compared_with_nothing() {
        let failed = |mut row: Value| {
            row.as_object_mut().unwrap().remove("tokens_per_second");
            row["failed"] = "no memory".into();
            row
        };
        let rows = vec![failed(ours("bf16", "dropless", "1x8", 0.0))];
        let section = section(rows, vec![peer("alone", "dropless", 1.0), failed(peer("broken", "dropless", 0.0))]);
        let text = section.text();
        assert!(text.lines().any(|line| line.starts_with("alone") && line.ends_with('-')), "{text}");
        assert!(text.lines().any(|line| line.starts_with("broken") && line.ends_with("failed: no memory")), "{text}");
        assert!(section.ratios_json().is_empty());
    }

    #[test]
    fn without_peers_the_table_stays_as_it_is() {
        assert_eq!(section(vec![ours("bf16", "dropless", "1x8", 1.0)], Vec::new()).text(), "table\n");
    }
}
