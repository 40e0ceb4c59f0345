//! Exchanges on a cluster that SimGrid simulates, beside a simple model of their latency. `xtask/simgrid/README.md` tells of
//! the simulation.

use super::rows::Row;
use super::{build, missing_libclang, missing_programs};
use crate::bench::peers::split_output;
use crate::bench::{header, keep};
use crate::shell::{command, output, root};
use anyhow::{Result, ensure};
use serde_json::json;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

#[derive(clap::Args)]
#[command(next_help_heading = "With `parallel simulated`")]
pub(super) struct Cluster {
    /// Numbers of ranks, 8 on a node.
    #[arg(long, requires = "parts", value_name = "P", value_delimiter = ',', default_value = "16,32,64,128")]
    sim_ranks: Vec<usize>,
    /// Bytes of a pair of ranks.
    #[arg(long, requires = "parts", value_name = "BYTES", value_delimiter = ',', default_value = "64")]
    sim_bytes: Vec<usize>,
    /// What a message costs its sender, and its receiver.
    #[arg(long, requires = "parts", value_name = "NS", default_value_t = 300)]
    message_ns: u64,
    /// Latency of a node's link to the switch; between nodes there are two.
    #[arg(long, requires = "parts", value_name = "NS", default_value_t = 1000)]
    link_ns: u64,
    /// Latency of the switch.
    #[arg(long, requires = "parts", value_name = "NS", default_value_t = 500)]
    switch_ns: u64,
    /// Latency inside a node.
    #[arg(long, requires = "parts", value_name = "NS", default_value_t = 200)]
    node_ns: u64,
    /// Rate of a node's link, in each direction.
    #[arg(long, requires = "parts", value_name = "GB/S", default_value_t = 10.0)]
    link_gbytes: f64,
    /// Rate inside a node.
    #[arg(long, requires = "parts", value_name = "GB/S", default_value_t = 20.0)]
    node_gbytes: f64,
    /// Simulated time that a look for a message takes if there is none; a fifth of it for one at a message under way, of which
    /// there are many. Shorter is more exact, and takes longer.
    #[arg(long, requires = "parts", value_name = "NS", default_value_t = 10)]
    poll_ns: u64,
}

const RANKS_PER_NODE: usize = 8;
const TENSOR_RANKS: [usize; 3] = [2, 4, 8];

/// Whether SimGrid multiplies latencies and rates.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Factors {
    /// As measured by its authors.
    Measured,
    One,
}

impl Factors {
    fn name(self) -> &'static str {
        match self {
            Self::Measured => "SMPI's factors",
            Self::One => "factors 1",
        }
    }

    /// Of the latency of messages of up to 256 bytes: SimGrid 3.32, `smpi/lat-factor`.
    fn latency(self) -> f64 {
        match self {
            Self::Measured => 2.01467,
            Self::One => 1.0,
        }
    }
}

pub(super) fn missing() -> Vec<String> {
    let mut missing =
        missing_programs(&[("smpirun", "libsimgrid-dev"), ("mpicc", "libopenmpi-dev"), ("clang", "clang")]);
    if !Path::new("/usr/include/smpi/mpi.h").exists() {
        missing.push("`/usr/include/smpi/mpi.h` (apt-get install libsimgrid-dev)".into());
    }
    missing.extend(missing_libclang());
    missing
}

/// Where it is built and run.
fn folder() -> PathBuf {
    root().join("target/simgrid")
}

impl Cluster {
    /// SimGrid's description of the nodes and their links.
    fn platform(&self, nodes: usize) -> String {
        format!(
            r#"<?xml version='1.0'?>
<!DOCTYPE platform SYSTEM "https://simgrid.org/simgrid.dtd">
<platform version="4.1">
  <cluster id="cluster" prefix="node" suffix="" radical="0-{last}" speed="10Gf" core="{RANKS_PER_NODE}"
           bw="{link}GBps" lat="{link_ns}ns" bb_bw="1000GBps" bb_lat="{switch_ns}ns" sharing_policy="SPLITDUPLEX"
           loopback_bw="{node}GBps" loopback_lat="{node_ns}ns"/>
</platform>
"#,
            last = nodes.saturating_sub(1),
            link = self.link_gbytes,
            link_ns = self.link_ns,
            switch_ns = self.switch_ns,
            node = self.node_gbytes,
            node_ns = self.node_ns,
        )
    }

    /// Runs the forms one by one, for SMPI searches all that a rank has sent before at every look for a message.
    fn simulate(&self, ranks: usize, factors: Factors) -> Result<Vec<Row>> {
        let coordinated =
            TENSOR_RANKS.into_iter().flat_map(|tensor| ["coordinated", "both"].map(|form| (form, tensor)));
        let mut rows = Vec::new();
        for (form, tensor) in [("flat", 1), ("hierarchical", 1)].into_iter().chain(coordinated).chain([("library", 1)])
        {
            let (json, _) = split_output(&output(&mut self.smpirun(ranks, factors, form, tensor)?)?)?;
            rows.extend(json.into_iter().map(serde_json::from_value).collect::<Result<Vec<Row>, _>>()?);
        }
        Ok(rows)
    }

    fn smpirun(&self, ranks: usize, factors: Factors, form: &str, tensor_ranks: usize) -> Result<Command> {
        let folder = folder();
        let nodes = ranks.div_ceil(RANKS_PER_NODE);
        fs::write(folder.join("platform.xml"), self.platform(nodes))?;
        let hosts: String = (0..nodes).map(|node| format!("node{node}:{RANKS_PER_NODE}\n")).collect();
        fs::write(folder.join("hosts"), hosts)?;
        let mut smpirun =
            command("smpirun", &["-np", &ranks.to_string(), "-platform", "platform.xml", "-hostfile", "hosts"]);
        // It leaves files where it runs if it fails.
        smpirun.current_dir(&folder).arg(format!("--cfg=smpi/tmpdir:{}", folder.display()));
        smpirun.args(["--log=root.thresh:warning", "--cfg=smpi/simulate-computation:no"]);
        let seconds = |ns: f64| format!("{:e}", ns * 1e-9);
        for cost in ["ois", "os", "or"] {
            smpirun.arg(format!("--cfg=smpi/{cost}:0:{}:0", seconds(self.message_ns as f64)));
        }
        smpirun.arg(format!("--cfg=smpi/iprobe:{}", seconds(self.poll_ns as f64)));
        smpirun.arg(format!("--cfg=smpi/test:{}", seconds(self.poll_ns as f64 / 5.0)));
        smpirun.arg("--cfg=smpi/grow-injected-times:no");
        if factors == Factors::One {
            smpirun.args(["--cfg=smpi/lat-factor:0:1", "--cfg=smpi/bw-factor:0:1"]);
        }
        smpirun.arg(folder.join("release/examples/libsimulated.so"));
        let bytes: Vec<String> = self.sim_bytes.iter().map(ToString::to_string).collect();
        smpirun.args(["--ranks-per-node", &RANKS_PER_NODE.to_string(), "--tensor-ranks", &tensor_ranks.to_string()]);
        smpirun.args(["--bytes", &bytes.join(","), "--loads", "balanced", "--forms", form]);
        // The same every time.
        smpirun.args(["--repetitions", "1", "--json"]);
        Ok(smpirun)
    }

    /// The model: every message costs a rank once as its sender and once as the receiver of one like it, and every step a
    /// latency.
    fn model(&self, row: &Row, factors: Factors) -> Option<f64> {
        let messages = (row.intra_node_messages? + row.inter_node_messages?) as f64;
        let inter = 2 * self.link_ns + self.switch_ns;
        let among_nodes = if row.inter_node_messages? > 0 { inter } else { 0 };
        // The flat forms wait for the slowest of their messages, the hierarchical ones for the steps one after the other.
        let inside = match row.form.as_str() {
            "hierarchical" => 1,
            // Nothing moves inside the node before the tensor ranks gather where they are the whole node.
            "both" => 1 + u64::from(row.intra_node_messages? >= row.tensor_ranks?),
            "coordinated" => u64::from(row.tensor_ranks? > 1),
            _ => u64::from(among_nodes == 0),
        };
        let latency = (among_nodes + inside * self.node_ns) as f64 * factors.latency();
        Some((messages * 2.0 * self.message_ns as f64 + latency) * 1e-9)
    }
}

/// Simulated times and modelled ones, and the gains of both over the flat form.
fn compared(settings: &Cluster, rows: &[Row], factors: Factors) -> String {
    let mut text = String::from("    p    bytes  form            messages  simulated us   gain    model us   gain\n");
    let flat_model = |of: &Row| {
        let flat = rows.iter().find(|row| (row.ranks, row.bytes, row.form.as_str()) == (of.ranks, of.bytes, "flat"))?;
        settings.model(flat, factors)
    };
    for row in rows {
        let number = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.2}"));
        let messages = row.intra_node_messages.zip(row.inter_node_messages).map(|(intra, inter)| intra + inter);
        let model = settings.model(row, factors);
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{:>5} {:>8}  {:<15} {:>8} {:>13.2} {:>6} {:>11} {:>6}",
            row.ranks,
            row.bytes,
            row.name,
            messages.map_or("-".into(), |messages| messages.to_string()),
            row.median_seconds * 1e6,
            number(row.gain(rows)),
            number(model.map(|seconds| seconds * 1e6)),
            number(flat_model(row).zip(model).map(|(flat, model)| flat / model)),
        );
    }
    text
}

pub(super) fn run(settings: &Cluster, out: &Path) -> Result<()> {
    for (name, rate) in [("--link-gbytes", settings.link_gbytes), ("--node-gbytes", settings.node_gbytes)] {
        ensure!(rate > 0.0 && rate.is_finite(), "{name} must be more than 0, got {rate}");
    }
    let wrong = settings.sim_ranks.iter().find(|ranks| !ranks.is_multiple_of(RANKS_PER_NODE) || **ranks == 0);
    ensure!(wrong.is_none(), "--sim-ranks must be multiples of the {RANKS_PER_NODE} ranks of a node, got {wrong:?}");
    fs::create_dir_all(folder())?;
    build("simulated", |build| {
        // Small, for every rank loads a copy.
        build.env("CARGO_PROFILE_RELEASE_DEBUG", "0").env("CARGO_PROFILE_RELEASE_STRIP", "true");
        build.env("MPICC", root().join("xtask/simgrid/smpicc")).env("CARGO_TARGET_DIR", folder())
    })?;
    let version = output(&mut command("smpirun", &["-version"]))?;
    let mut text = format!(
        "{}{}\nnodes of {RANKS_PER_NODE} ranks; a message costs sender and receiver {} ns each; between nodes 2 x {} + {} ns, {} \
         GB/s a node in and out;\ninside a node {} ns, {} GB/s; a look for a message in vain {} ns\nmodel: messages x 2 x {} ns, \
         and one latency a step, inside the node or between nodes; bytes cost nothing\n",
        header()?,
        version.lines().next().unwrap_or_default(),
        settings.message_ns,
        settings.link_ns,
        settings.switch_ns,
        settings.link_gbytes,
        settings.node_ns,
        settings.node_gbytes,
        settings.poll_ns,
        settings.message_ns,
    );
    let mut kept = Vec::new();
    for factors in [Factors::Measured, Factors::One] {
        let mut rows: Vec<Row> = Vec::new();
        for &ranks in &settings.sim_ranks {
            rows.extend(settings.simulate(ranks, factors)?);
        }
        let _ = write!(text, "\n{}\n{}", factors.name(), compared(settings, &rows, factors));
        kept.push(json!({ "factors": factors.name(), "rows": rows }));
    }
    fs::write(out.join("parallel-simulated.json"), serde_json::to_string_pretty(&kept)?)?;
    keep(&out.join("parallel-simulated.txt"), &text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Command {
        #[arg(default_value = "simulated")]
        parts: String,
        #[command(flatten)]
        cluster: Cluster,
    }

    #[track_caller]
    fn check(form: &str, tensor_ranks: usize, messages: [usize; 2], nanoseconds: f64) {
        let row = Row {
            ranks: 16,
            ranks_per_node: 8,
            load: "balanced".into(),
            bytes: 64,
            form: form.into(),
            name: form.into(),
            tensor_ranks: Some(tensor_ranks),
            intra_node_messages: Some(messages[0]),
            inter_node_messages: Some(messages[1]),
            median_seconds: 1.0,
            least_seconds: 1.0,
            repetitions: 1,
        };
        let command = Command::parse_from(["bench"]);
        assert_eq!(command.parts, "simulated");
        let model = command.cluster.model(&row, Factors::One).unwrap() * 1e9;
        assert!((model - nanoseconds).abs() < 1e-6, "{form}: {model}");
    }

    /// 600 ns a message, 2500 between nodes, 200 inside.
    #[test]
    fn messages_and_latencies_are_modelled() {
        check("flat", 1, [7, 8], 15.0 * 600.0 + 2500.0);
        check("hierarchical", 1, [7, 1], 8.0 * 600.0 + 200.0 + 2500.0);
        check("coordinated", 2, [4, 4], 8.0 * 600.0 + 2500.0 + 200.0);
        check("both", 2, [4, 1], 5.0 * 600.0 + 2500.0 + 200.0 + 200.0);
        check("both", 8, [7, 1], 8.0 * 600.0 + 2500.0 + 200.0);
        check("flat", 1, [7, 0], 7.0 * 600.0 + 200.0);
    }
}
