//! The picture of a step against the number of experts.

use crate::plot::{Curve, Panel, draw_panels};
use anyhow::Result;
use serde_json::Value;
use std::path::Path;

/// What is drawn of each row.
const CURVES: [(&str, &str); 4] = [
    ("step", "step_ms"),
    ("rest of the step", "rest_ms"),
    ("experts' bytes at read speed", "traffic_ms"),
    ("optimizer", "optimizer_ms"),
];

/// Draws the rows; without any, nothing.
pub(super) fn draw(rows: &[Value], out: &Path) -> Result<()> {
    let curve = |(name, key): (&str, &str)| {
        let points = rows.iter().filter_map(|row| Some((row["growth"].as_f64()?, row[key].as_f64()?)));
        // The axes are logarithmic.
        Curve { name: name.into(), points: points.filter(|(_, ms)| *ms > 0.0).collect() }
    };
    if rows.is_empty() {
        return Ok(());
    }
    let title = "a step, by experts in each of two layers".into();
    draw_panels(&[Panel { title, curves: CURVES.map(curve).into() }], ["experts", "ms"], out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_curve_is_named_and_the_axes_have_numbers() {
        let row = |experts: u32, ms: f64| serde_json::json!({"growth": experts, "step_ms": ms, "rest_ms": ms / 2.0, "traffic_ms": -1.0, "optimizer_ms": 9.0});
        let out = std::env::temp_dir().join(format!("growth-{}.svg", std::process::id()));
        draw(&[row(8, 1500.0), row(64, 3000.0)], &out).unwrap();
        let svg = std::fs::read_to_string(&out).unwrap();
        std::fs::remove_file(&out).unwrap();
        for label in ["10", "1000", "experts", "optimizer", "rest of the step"] {
            assert!(svg.lines().any(|line| line.trim() == label), "{label} is not in the picture");
        }
    }
}
