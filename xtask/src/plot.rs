//! `cargo xtask plot`: the losses of one or more runs, from their `metrics.jsonl`, as an SVG.

use anyhow::{Context, Result, ensure};
use plotters::prelude::*;
use std::path::{Path, PathBuf};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Folders of runs (each with a `metrics.jsonl`), or such files.
    #[arg(required = true)]
    runs: Vec<PathBuf>,
    /// The tag to plot.
    #[arg(long, default_value = "valid/bits_per_byte")]
    tag: String,
    /// Where the picture goes.
    #[arg(long, default_value = "runs/plot.svg")]
    out: PathBuf,
}

/// One line of a plot.
pub(crate) struct Curve {
    pub(crate) name: String,
    /// Millions of tokens, value.
    pub(crate) points: Vec<(f64, f64)>,
}

/// The values of `tag` in a run.
pub(crate) fn read_curve(run: &Path, tag: &str) -> Result<Curve> {
    let file = if run.is_dir() { run.join("metrics.jsonl") } else { run.to_path_buf() };
    let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let mut points = Vec::new();
    for line in text.lines() {
        let record: serde_json::Value = serde_json::from_str(line).with_context(|| format!("{}", file.display()))?;
        if let (Some(tokens), Some(value)) = (record["tokens"].as_f64(), record[tag].as_f64()) {
            points.push((tokens / 1e6, value));
        }
    }
    ensure!(!points.is_empty(), "{} has no values of {tag}", file.display());
    // A file of another name than a run's has one of its own.
    let name = match run.file_stem() {
        Some(stem) if run.is_file() && stem != "metrics" => Some(stem),
        _ if run.is_file() => run.parent().and_then(Path::file_name),
        _ => run.file_name(),
    };
    let name = name.map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(Curve { name, points })
}

/// One picture of several beside each other.
pub(crate) struct Panel {
    pub(crate) title: String,
    pub(crate) curves: Vec<Curve>,
}

/// Draws panels in up to two columns, both axes logarithmic.
pub(crate) fn draw_panels(panels: &[Panel], [x_name, y_name]: [&str; 2], out: &Path) -> Result<()> {
    let columns = panels.len().clamp(1, 2);
    let rows = panels.len().div_ceil(columns).max(1);
    let area = SVGBackend::new(out, (550 * columns as u32, 460 * rows as u32)).into_drawing_area();
    area.fill(&WHITE)?;
    // One colour per name, in whatever panel it stands.
    let mut names: Vec<&str> = Vec::new();
    for curve in panels.iter().flat_map(|p| &p.curves) {
        if !names.contains(&curve.name.as_str()) {
            names.push(&curve.name);
        }
    }
    for (panel, area) in panels.iter().zip(area.split_evenly((rows, columns))) {
        let points = || panel.curves.iter().flat_map(|c| &c.points);
        let bounds = |of: fn(&(f64, f64)) -> f64| {
            points().map(of).fold((f64::MAX, f64::MIN), |(low, high), v| (low.min(v), high.max(v)))
        };
        let ((left, right), (low, high)) = (bounds(|p| p.0), bounds(|p| p.1));
        let mut chart = ChartBuilder::on(&area)
            .caption(&panel.title, ("sans-serif", 20))
            .margin(12)
            .x_label_area_size(40)
            .y_label_area_size(72)
            .build_cartesian_2d((left * 0.9..right * 1.1).log_scale(), (low * 0.8..high * 1.25).log_scale())?;
        chart
            .configure_mesh()
            .x_desc(x_name)
            .y_desc(y_name)
            .y_labels(24)
            .x_label_formatter(&|v| format!("{v:.0}"))
            .y_label_formatter(&|v| format!("{v:.0}"))
            .light_line_style(WHITE)
            .draw()?;
        for curve in &panel.curves {
            let color = Palette99::pick(names.iter().position(|n| *n == curve.name).unwrap_or_default()).to_rgba();
            chart
                .draw_series(LineSeries::new(curve.points.iter().copied(), color.stroke_width(2)).point_size(3))?
                .label(&curve.name)
                .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], color.stroke_width(2)));
        }
        // Where curves that rise, or fall, leave room.
        let falls = |curve: &&Curve| {
            let ends = curve.points.first().zip(curve.points.last());
            ends.is_some_and(|(first, last)| last.1 < first.1)
        };
        let mostly_fall = 2 * panel.curves.iter().filter(falls).count() > panel.curves.len();
        let corner = if mostly_fall { SeriesLabelPosition::UpperRight } else { SeriesLabelPosition::LowerRight };
        chart
            .configure_series_labels()
            .position(corner)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .draw()?;
    }
    area.present()?;
    Ok(())
}

/// Draws the curves.
pub(crate) fn draw(curves: &[Curve], title: &str, out: &Path) -> Result<()> {
    if let Some(parent) = out.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let all = || curves.iter().flat_map(|c| &c.points);
    let x_max = all().map(|p| p.0).fold(0.0, f64::max);
    let (low, high) = all().fold((f64::MAX, f64::MIN), |(l, h), p| (l.min(p.1), h.max(p.1)));
    let margin = ((high - low) * 0.05).max(1e-6);
    let area = SVGBackend::new(out, (900, 560)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption(title, ("sans-serif", 22))
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..x_max, low - margin..high + margin)?;
    chart.configure_mesh().x_desc("million tokens").y_desc(title).light_line_style(WHITE).draw()?;
    for (index, curve) in curves.iter().enumerate() {
        let color = Palette99::pick(index).to_rgba();
        chart
            .draw_series(LineSeries::new(curve.points.iter().copied(), color.stroke_width(2)))?
            .label(&curve.name)
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], color.stroke_width(2)));
    }
    chart.configure_series_labels().background_style(WHITE.mix(0.8)).border_style(BLACK.mix(0.3)).draw()?;
    area.present()?;
    Ok(())
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let curves = args.runs.iter().map(|run| read_curve(run, &args.tag)).collect::<Result<Vec<_>>>()?;
    draw(&curves, &args.tag, &args.out)?;
    println!("{}", args.out.display());
    Ok(())
}
