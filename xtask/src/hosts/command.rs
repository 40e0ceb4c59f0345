//! `cargo xtask hosts`: any program over MPI on emulated hosts, until it ends or Ctrl-C.

use super::{Hosts, Link};
use crate::shell::root;
use anyhow::Result;
use std::time::Duration;

/// Of the rank at which the others arrive, where they talk over TCP.
const PORT: &str = "29556";

/// Options of `cargo xtask hosts`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Network namespaces of this machine that stand for hosts.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(1..=200))]
    hosts: u8,
    /// Processes on each.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    ranks: u8,
    /// Rate of each host's line, Gbit/s.
    #[arg(long, default_value_t = 10.0, value_parser = positive)]
    gbits: f64,
    /// Between two hosts, one way, microseconds.
    #[arg(long, default_value_t = 50)]
    delay_us: u64,
    /// The program and its arguments, after `--`.
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

fn positive(text: &str) -> Result<f64, String> {
    text.parse()
        .ok()
        .filter(|gbits: &f64| *gbits > 0.0 && gbits.is_finite())
        .ok_or_else(|| "expected more than 0".into())
}

pub(crate) fn run(args: &Args) -> Result<()> {
    Hosts::check()?;
    let delay = Duration::from_micros(args.delay_us);
    let link = Link { delay, bits_per_second: args.gbits * 1e9, packet: Duration::ZERO };
    let hosts = Hosts::new(args.hosts.into(), link, &root().join("target/hosts"))?;
    let mut mpirun = hosts.mpirun(args.ranks.into())?;
    let address = hosts.first_address();
    mpirun.args(["-x", &format!("MASTER_ADDR={address}"), "-x", &format!("MASTER_PORT={PORT}")]);
    mpirun.args(&args.command);
    eprintln!("the first host is {address}; from here: {}", hosts.on_first("COMMAND"));
    hosts.run(&mut mpirun)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn what_follows_is_the_programs() {
        let line = Line::try_parse_from(["hosts", "--hosts", "2", "--", "serve", "--port", "1"]).unwrap().args;
        assert_eq!((line.hosts, line.ranks, line.delay_us), (2, 1, 50));
        assert_eq!(line.command, ["serve", "--port", "1"]);
        for bad in [&["hosts"][..], &["hosts", "--gbits", "0", "--", "a"], &["hosts", "--hosts", "0", "--", "a"]] {
            assert!(Line::try_parse_from(bad).is_err(), "{bad:?}");
        }
    }
}
