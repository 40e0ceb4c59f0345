//! Exchanges over emulated hosts: two ranks on each, under Open MPI's `mpirun`, beside MPI's own all-to-all.

use super::rows::{Row, crossover, distinct};
use super::{build, missing_libclang, missing_programs};
use crate::bench::peers::split_output;
use crate::bench::{header, keep};
use crate::hosts::{Hosts, Link};
use crate::plot::{Curve, Panel, draw_panels};
use crate::shell::root;
use anyhow::Result;
use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

#[derive(clap::Args)]
#[command(next_help_heading = "With `parallel hosts`")]
pub(super) struct Network {
    /// From one host to another, one way.
    #[arg(long, requires = "parts", value_name = "US", default_value_t = 100)]
    delay_us: u64,
    /// Of each host's line, out and in.
    #[arg(long, requires = "parts", value_name = "GBITS", default_value_t = 1.0, value_parser = positive)]
    gbits: f64,
    /// What a packet takes of a line, beside its bytes.
    #[arg(long, requires = "parts", value_name = "US", default_value_t = 0)]
    packet_us: u64,
}

fn positive(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|&value| value > 0.0 && f64::is_finite(value)).ok_or_else(|| "must be more than 0".into())
}

const HOSTS: [usize; 3] = [2, 3, 4];
const RANKS_PER_HOST: usize = 2;

pub(super) fn missing() -> Vec<String> {
    let programs = missing_programs(&[("mpicc", "libopenmpi-dev")]);
    Hosts::missing().into_iter().chain(programs).chain(missing_libclang()).collect()
}

/// Up to which size each form gains over the flat one.
fn crossovers(rows: &[Row]) -> String {
    let mut text = String::from(
        "\ntimes as fast as flat           at fewest bytes   at most      until bytes\nhosts  load      form\n",
    );
    let cases = distinct(rows.iter().filter(|row| row.form != "flat").map(|row| (row.ranks, &row.load, &row.name)));
    for (ranks, load, name) in cases {
        let of = rows.iter().filter(|row| (row.ranks, &row.load, &row.name) == (ranks, load, name));
        let gains: Vec<(usize, f64)> = of.filter_map(|row| Some((row.bytes, row.gain(rows)?))).collect();
        let (Some((_, first)), Some((_, last))) = (gains.first(), gains.last()) else { continue };
        let until = match crossover(&gains) {
            Some(bytes) => format!("{bytes:.0}"),
            None if *first >= 1.0 => "all".into(),
            None => "none".into(),
        };
        // Writing to a string cannot fail.
        let _ =
            writeln!(text, "{:>5}  {load:<9} {name:<15} {first:>14.2} {last:>9.2} {until:>16}", ranks / RANKS_PER_HOST);
    }
    text
}

/// Each form's time against the flat one's: the times themselves span three orders of magnitude.
fn draw(rows: &[Row], out: &Path) -> Result<()> {
    let mut panels = Vec::new();
    for (ranks, load) in distinct(rows.iter().map(|row| (row.ranks, &row.load))) {
        let here = || rows.iter().filter(move |row| (row.ranks, &row.load) == (ranks, load));
        let curve = |name: &String| {
            let points = here().filter(|row| row.name == *name);
            let points = points.filter_map(|row| Some((row.bytes as f64, 100.0 / row.gain(rows)?)));
            Curve { name: name.clone(), points: points.collect() }
        };
        let title = format!("{} hosts, {load}", ranks / RANKS_PER_HOST);
        panels.push(Panel { title, curves: distinct(here().map(|row| &row.name)).into_iter().map(curve).collect() });
    }
    draw_panels(&panels, ["bytes of a pair of ranks", "% of the flat form's time"], out)
}

pub(super) fn run(settings: &Network, out: &Path) -> Result<()> {
    build("exchange", |build| build)?;
    let link = Link {
        delay: Duration::from_micros(settings.delay_us),
        bits_per_second: settings.gbits * 1e9,
        packet: Duration::from_micros(settings.packet_us),
    };
    let mut rows: Vec<Row> = Vec::new();
    let mut text = format!(
        "{}network: {} us one way, {} Gbit/s a host out and in, {} us a packet; {RANKS_PER_HOST} ranks a host, all on this \
         machine's cores\n\n",
        header()?,
        settings.delay_us,
        settings.gbits,
        settings.packet_us
    );
    for count in HOSTS {
        let hosts = Hosts::new(count, link, &root().join("target/hosts"))?;
        let mut mpirun = hosts.mpirun(RANKS_PER_HOST)?;
        mpirun.arg(root().join("target/release/examples/exchange"));
        mpirun.args(["--ranks-per-node", &RANKS_PER_HOST.to_string(), "--tensor-ranks", "2", "--json"]);
        let (json, table) = split_output(&hosts.output(&mut mpirun)?)?;
        rows.extend(json.into_iter().map(serde_json::from_value).collect::<Result<Vec<_>, _>>()?);
        let _ = writeln!(text, "{count} hosts: {table}");
    }
    text += &crossovers(&rows);
    draw(&rows, &out.join("parallel-hosts.svg"))?;
    std::fs::write(out.join("parallel-hosts.json"), serde_json::to_string_pretty(&rows)?)?;
    keep(&out.join("parallel-hosts.txt"), &text)
}
