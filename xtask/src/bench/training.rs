//! Our training steps beside those of other programs, measured in the same run.

use super::peers::Measured;
use anyhow::Result;
use serde_json::Value;
use std::fmt::Write as _;
use std::path::PathBuf;

/// Our training steps and the peers'.
pub(super) struct Comparison(Measured);

impl Comparison {
    /// Reads our bench's output and runs the peers of each environment with the same arguments.
    pub(super) fn new(printed: &str, venvs: &[PathBuf], arguments: &[String]) -> Result<Self> {
        Ok(Self(Measured::new(printed, "moe-models/benches/peers.py", venvs, arguments)?))
    }

    /// Our fastest row with the type and the router of a peer.
    fn our_best(&self, peer: &Value) -> Option<&Value> {
        let same = |row: &&Value| ["type", "router"].iter().all(|key| row[*key] == peer[*key]);
        self.0.ours.iter().filter(same).max_by(|a, b| speed(a).total_cmp(&speed(b)))
    }

    /// Each peer with our speed over its own, where we have a row of the same work.
    fn ratios(&self) -> impl Iterator<Item = (&Value, Option<(&Value, f64)>)> {
        self.0.peers.iter().map(|peer| (peer, self.our_best(peer).map(|row| (row, speed(row) / speed(peer)))))
    }

    /// The bench's table, and ours against each peer.
    pub(super) fn text(&self) -> String {
        let mut text = self.0.head();
        if !self.0.peers.is_empty() {
            let _ = write!(text, "{:<18}{:<6}{:<10}", "peer", "type", "router");
            for column in ["tokens/s", "best", "step, ms", "forward", "backward", "optimizer"] {
                let _ = write!(text, "{column:>10}");
            }
            let _ = writeln!(text, "{:>11}{:>7}{:>8}", "ours, t/s", "batch", "ratio");
        }
        for (peer, ours) in self.ratios() {
            let _ = write!(text, "{:<18}{:<6}{:<10}", word(peer, "peer"), word(peer, "type"), word(peer, "router"));
            let _ = write!(text, "{:>10.0}{:>10.0}", speed(peer), number(peer, "best"));
            for key in ["step_ms", "forward_ms", "backward_ms", "optimizer_ms"] {
                let _ = write!(text, "{:>10.1}", number(peer, key));
            }
            let _ = match ours {
                Some((row, ratio)) => writeln!(text, "{:>11.0}{:>7}{ratio:>7.2}x", speed(row), word(row, "batches")),
                None => writeln!(text, "{:>11}{:>7}{:>8}", "-", "-", "-"),
            };
        }
        text
    }

    /// Every row, and the ratios.
    pub(super) fn json(&self) -> Result<String> {
        let ratios = self.ratios().filter_map(|(peer, ours)| {
            ours.map(|(row, ratio)| {
                let [peer, kind, router, batches] =
                    [&peer["peer"], &peer["type"], &peer["router"], &row["batches"]].map(Value::clone);
                serde_json::json!({ "peer": peer, "type": kind, "router": router, "batches": batches, "ratio": ratio })
            })
        });
        let mut all = self.0.json();
        all["ratios"] = ratios.collect();
        Ok(serde_json::to_string_pretty(&all)?)
    }
}

fn word<'a>(row: &'a Value, key: &str) -> &'a str {
    row[key].as_str().unwrap_or_default()
}

fn number(row: &Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or(f64::NAN)
}

/// Median tokens per second.
fn speed(row: &Value) -> f64 {
    number(row, "tokens_per_second")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_fastest_row_of_the_same_work_is_set_beside_each_peer() {
        let row = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        let ours = |kind: &str, router: &str, batches: &str, speed: f64| {
            let mut row = serde_json::json!({ "type": kind, "router": router, "batches": batches });
            row["tokens_per_second"] = speed.into();
            row
        };
        let peer = |name: &str, router: &str, speed: f64| {
            let mut row = ours("bf16", router, "", speed);
            row["peer"] = name.into();
            row
        };
        let comparison = Comparison(Measured {
            table: "table\n".into(),
            ours: vec![
                ours("bf16", "capacity", "1x8", 3000.0),
                ours("bf16", "capacity", "2x4", 4000.0),
                ours("bf16", "dropless", "1x8", 1500.0),
                ours("f32", "dropless", "2x4", 9000.0),
            ],
            peers: vec![peer("drops", "capacity", 1000.0), peer("keeps", "dropless", 1000.0), peer("other", "", 1.0)],
            setup: vec![row(r#"{"torch": "2.15.0"}"#)],
        });
        let text = comparison.text();
        let line = |name: &str| text.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
        assert!(text.starts_with("table\n") && text.contains("2.15.0"), "{text}");
        assert!(line("drops").ends_with("4.00x") && line("drops").contains("2x4"), "{text}");
        assert!(line("keeps").ends_with("1.50x") && line("keeps").contains("1x8"), "{text}");
        assert!(line("other").ends_with('-'), "{text}");
        let json = row(&comparison.json().unwrap());
        let lengths = ["ours", "peers", "setup", "ratios"].map(|key| json[key].as_array().unwrap().len());
        assert_eq!((lengths, json["ratios"][1]["ratio"].as_f64()), ([4, 3, 1, 2], Some(1.5)));
    }

    #[test]
    fn without_peers_the_table_stays_as_it_is() {
        let comparison = Comparison::new("head\njson {\"type\": \"bf16\"}\n", &[], &[]).unwrap();
        assert_eq!((comparison.text().as_str(), comparison.0.ours.len()), ("head\n", 1));
    }
}
