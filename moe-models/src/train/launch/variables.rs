//! [`find`]: which launcher has started this process, as which of how many, from the variables it has set.

use crate::{Error, Result};
use std::fmt;

/// What starts the processes of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Launcher {
    /// `torchrun`, and whatever sets its variables.
    Torchrun,
    /// `deepspeed`.
    DeepSpeed,
    /// `mpirun` of Open MPI.
    OpenMpi,
    /// `srun`.
    Slurm,
    /// An indexed job of Kubernetes.
    Kubernetes,
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Torchrun => "torchrun",
            Self::DeepSpeed => "deepspeed",
            Self::OpenMpi => "mpirun",
            Self::Slurm => "srun",
            Self::Kubernetes => "Kubernetes",
        })
    }
}

/// One of the processes of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launched {
    /// Who has started it.
    pub launcher: Launcher,
    /// Which process.
    pub rank: usize,
    /// Of how many.
    pub size: usize,
    /// Processes on this machine, where the launcher says so.
    pub local_size: Option<usize>,
    /// Where rank 0 can be reached, `host:port`, where that is known.
    pub master: Option<String>,
    /// The same on all processes of the run.
    pub job: String,
    /// What this was read from, for people: `NAME=value`.
    pub read: Vec<String>,
}

/// The variables of each launcher. Those in the first pair say which process of how many; all launchers whose pair is there are
/// candidates, the first one wins.
struct Names {
    launcher: Launcher,
    rank: &'static str,
    size: &'static str,
    local_size: Option<&'static str>,
    /// Also has to be there.
    needs: &'static [&'static str],
    /// Any of these names the job.
    job: &'static [&'static str],
}

/// In their order of precedence.
const LAUNCHERS: [Names; 5] = [
    Names {
        launcher: Launcher::Torchrun,
        rank: "RANK",
        size: "WORLD_SIZE",
        local_size: Some("LOCAL_WORLD_SIZE"),
        needs: &["LOCAL_WORLD_SIZE"],
        job: &["TORCHELASTIC_RUN_ID"],
    },
    Names {
        launcher: Launcher::DeepSpeed,
        rank: "RANK",
        size: "WORLD_SIZE",
        local_size: Some("LOCAL_SIZE"),
        needs: &[],
        job: &[],
    },
    Names {
        launcher: Launcher::OpenMpi,
        rank: "OMPI_COMM_WORLD_RANK",
        size: "OMPI_COMM_WORLD_SIZE",
        local_size: Some("OMPI_COMM_WORLD_LOCAL_SIZE"),
        needs: &[],
        job: &["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"],
    },
    Names {
        launcher: Launcher::Slurm,
        rank: "SLURM_PROCID",
        size: "SLURM_NTASKS",
        local_size: None,
        // A batch script is process 0 of its job without being one of a step.
        needs: &["SLURM_STEP_ID"],
        job: &["SLURM_JOB_ID"],
    },
    Names {
        launcher: Launcher::Kubernetes,
        rank: "JOB_COMPLETION_INDEX",
        size: "WORLD_SIZE",
        local_size: None,
        needs: &[],
        job: &[],
    },
];

/// First and number of the ports that a job's number is turned into.
const PORTS: (u64, u64) = (15_000, 20_000);

/// The launcher of this process, whose variables `variable` reads. `None` if none has started it.
///
/// # Errors
/// [`Error::Config`] for a variable that is there without its partner, or is not what it should be.
///
/// # Source
/// The variables of torchrun, deepspeed, Open MPI, Slurm and Kubernetes' indexed jobs, in this order.
pub fn find(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Launched>> {
    let get = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
    let there = |names: &&Names| get(names.rank).is_some() && names.needs.iter().all(|name| get(name).is_some());
    let Some(names) = LAUNCHERS.iter().find(|names| there(names)) else {
        return match get("WORLD_SIZE").filter(|size| size.trim() != "1") {
            Some(size) => Err(lonely("WORLD_SIZE", &size, "RANK")),
            None => Ok(None),
        };
    };
    let mut read = Vec::new();
    let mut take = |name: &str| {
        let value = get(name);
        read.extend(value.iter().map(|value| format!("{name}={value}")));
        value
    };
    let number = |name: &str, text: &str| {
        let wrong = || Error::Config(format!("{name} must be a number of processes or one of them, got {text:?}"));
        text.trim().parse::<usize>().map_err(|_| wrong())
    };
    let rank_text = take(names.rank).unwrap_or_default();
    let size_text = take(names.size).ok_or_else(|| lonely(names.rank, &rank_text, names.size))?;
    let (rank, size) = (number(names.rank, &rank_text)?, number(names.size, &size_text)?);
    if rank >= size {
        let (rank_name, size_name) = (names.rank, names.size);
        return Err(Error::Config(format!("{rank_name}={rank} is not one of {size_name}={size} processes")));
    }
    let local_size = match names.local_size.and_then(|name| Some((name, take(name)?))) {
        Some((name, text)) => Some(number(name, &text)?).filter(|&local| local > 0),
        None => None,
    };
    let local_size = match names.launcher {
        Launcher::Slurm => take("SLURM_STEP_TASKS_PER_NODE").and_then(|text| tasks_of_each_node(&text)),
        _ => local_size,
    };
    let job = names.job.iter().find_map(|name| take(name));
    // Steps of one job may run side by side.
    let job = match (names.launcher, job) {
        (Launcher::Slurm, Some(job)) => Some(format!("{job}.{}", take("SLURM_STEP_ID").unwrap_or_default())),
        (_, job) => job,
    };
    let master = master(names.launcher, size, local_size, job.as_deref(), &mut take)?;
    let job = job.unwrap_or_else(|| "moe-train".into());
    Ok(Some(Launched { launcher: names.launcher, rank, size, local_size, master, job, read }))
}

fn lonely(name: &str, value: &str, partner: &str) -> Error {
    Error::Config(format!(
        "{name}={value} says that this is one of several processes, but {partner} is not set; set both, unset {name}, or give \
         --ranks"
    ))
}

/// Where rank 0 can be reached.
fn master(
    launcher: Launcher,
    size: usize,
    local_size: Option<usize>,
    job: Option<&str>,
    take: &mut impl FnMut(&str) -> Option<String>,
) -> Result<Option<String>> {
    let (address, port) = (take("MASTER_ADDR"), take("MASTER_PORT"));
    let number = |text: &str| {
        let wrong = || Error::Config(format!("MASTER_PORT must be a port from 1 to 65535, got {text:?}"));
        text.trim().parse::<u16>().ok().filter(|&port| port > 0).ok_or_else(wrong)
    };
    let port = port.as_deref().map(number).transpose()?;
    // torchrun's own store has the port it tells of.
    let store = take("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|used| used.eq_ignore_ascii_case("true"));
    let port = if store { port.map(|port| port.checked_add(1).unwrap_or(port - 1)) } else { port };
    let host = match address {
        Some(address) => Some(address),
        None if launcher == Launcher::Slurm => {
            let list = take("SLURM_STEP_NODELIST").or_else(|| take("SLURM_NODELIST"));
            list.map(|list| first_host(&list))
        }
        None => local_size.filter(|&local| local == size).map(|_| "127.0.0.1".into()),
    };
    let of_job = |job: &str| {
        let hash = job
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3));
        (PORTS.0 + hash % PORTS.1) as u16
    };
    let port = port.or_else(|| job.map(of_job));
    Ok(host
        .zip(port)
        .map(|(host, port)| if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }))
}

/// The tasks of each node of a list as Slurm writes it, `4(x2),3`; `None` if nodes differ.
fn tasks_of_each_node(list: &str) -> Option<usize> {
    let counts = list.split(',').map(|part| part.split('(').next().unwrap_or_default().trim().parse::<usize>().ok());
    let counts = counts.collect::<Option<Vec<_>>>()?;
    let first = counts.first().copied().filter(|&count| count > 0)?;
    counts.iter().all(|&count| count == first).then_some(first)
}

/// The first host of a list as Slurm writes it: `gpu[03-05,9],login` begins with `gpu03`.
fn first_host(list: &str) -> String {
    let Some((prefix, rest)) = list.split_once('[').filter(|(prefix, _)| !prefix.contains(',')) else {
        return list.split(',').next().unwrap_or(list).trim().to_owned();
    };
    let (inside, after) = rest.split_once(']').unwrap_or((rest, ""));
    let number = inside.split([',', '-']).next().unwrap_or_default();
    let suffix = after.split(',').next().unwrap_or_default();
    format!("{}{number}{suffix}", prefix.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Option<Launched>> {
        find(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned()))
    }

    const TORCH: [(&str, &str); 6] = [
        ("RANK", "3"),
        ("WORLD_SIZE", "8"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("MASTER_ADDR", "10.0.0.7"),
        ("MASTER_PORT", "29500"),
    ];
    const MPI: [(&str, &str); 5] = [
        ("OMPI_COMM_WORLD_RANK", "1"),
        ("OMPI_COMM_WORLD_SIZE", "4"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
        ("PMIX_NAMESPACE", "123@1"),
    ];
    const SLURM: [(&str, &str); 6] = [
        ("SLURM_PROCID", "2"),
        ("SLURM_NTASKS", "6"),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_JOB_ID", "4711"),
        ("SLURM_NODELIST", "gpu[03-05,9],login"),
        ("SLURM_STEP_TASKS_PER_NODE", "2(x3)"),
    ];

    #[track_caller]
    fn check(variables: &[(&str, &str)], launcher: Launcher, (rank, size): (usize, usize), master: Option<&str>) {
        let found = of(variables).unwrap().unwrap();
        assert_eq!((found.launcher, found.rank, found.size), (launcher, rank, size), "{found:?}");
        match master {
            Some(master) => assert!(found.master.as_deref().unwrap().starts_with(master), "{found:?}"),
            None => assert_eq!(found.master, None),
        }
    }

    #[test]
    fn every_launcher_is_known_by_its_variables() {
        assert_eq!(of(&[]).unwrap(), None);
        assert_eq!(of(&[("WORLD_SIZE", "1"), ("SLURM_NTASKS", "4")]).unwrap(), None);
        check(&TORCH, Launcher::Torchrun, (3, 8), Some("10.0.0.7:29500"));
        assert_eq!(of(&TORCH).unwrap().unwrap().local_size, Some(2));
        let deepspeed: Vec<_> =
            TORCH.iter().map(|&(n, v)| if n == "LOCAL_WORLD_SIZE" { ("LOCAL_SIZE", v) } else { (n, v) }).collect();
        check(&deepspeed, Launcher::DeepSpeed, (3, 8), Some("10.0.0.7:29500"));
        check(&MPI, Launcher::OpenMpi, (1, 4), Some("127.0.0.1:"));
        check(&SLURM, Launcher::Slurm, (2, 6), Some("gpu03:"));
        let pods = [("JOB_COMPLETION_INDEX", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "::1"), ("MASTER_PORT", "7")];
        check(&pods, Launcher::Kubernetes, (0, 2), Some("[::1]:7"));
        // A batch script outside of any step.
        let batch: Vec<_> = SLURM.into_iter().filter(|(n, _)| *n != "SLURM_STEP_ID").collect();
        assert_eq!(of(&batch).unwrap(), None);
    }

    /// torchrun listens at the port it names, so ranks meet at the next one.
    #[test]
    fn the_port_of_torchruns_store_is_left_alone() {
        let with = |port: &'static str| {
            let all: Vec<_> = TORCH.iter().map(|&(n, v)| if n == "MASTER_PORT" { (n, port) } else { (n, v) }).collect();
            [all, vec![("TORCHELASTIC_USE_AGENT_STORE", "True")]].concat()
        };
        check(&with("29500"), Launcher::Torchrun, (3, 8), Some("10.0.0.7:29501"));
        check(&with("65535"), Launcher::Torchrun, (3, 8), Some("10.0.0.7:65534"));
    }

    #[test]
    fn precedence_is_that_of_the_list() {
        let all: Vec<_> = [&TORCH[..], &MPI, &SLURM].concat();
        check(&all, Launcher::Torchrun, (3, 8), Some("10.0.0.7:29500"));
        let two: Vec<_> = [&SLURM[..], &MPI].concat();
        check(&two, Launcher::OpenMpi, (1, 4), Some("127.0.0.1:"));
        let found = of(&two).unwrap().unwrap();
        assert!(found.read.contains(&"OMPI_COMM_WORLD_SIZE=4".to_owned()), "{found:?}");
    }

    /// All processes of a job find the same place.
    #[test]
    fn a_job_has_one_port() {
        let other: Vec<_> = SLURM.iter().map(|&(n, v)| if n == "SLURM_PROCID" { (n, "0") } else { (n, v) }).collect();
        assert_eq!(of(&other).unwrap().unwrap().master, of(&SLURM).unwrap().unwrap().master);
        // Another step of the job has another.
        let step: Vec<_> = SLURM.iter().map(|&(n, v)| if n == "SLURM_STEP_ID" { (n, "1") } else { (n, v) }).collect();
        let [one, other] = [&SLURM[..], &step].map(|variables| of(variables).unwrap().unwrap());
        assert!(one.job != other.job && one.master != other.master, "{one:?} {other:?}");
        // Several machines, and nobody says which is the first.
        let two: Vec<_> =
            MPI.iter().map(|&(n, v)| if n == "OMPI_COMM_WORLD_LOCAL_SIZE" { (n, "2") } else { (n, v) }).collect();
        check(&two, Launcher::OpenMpi, (1, 4), None);
    }

    #[test]
    fn tasks_of_slurms_nodes() {
        assert_eq!(of(&SLURM).unwrap().unwrap().local_size, Some(2));
        for (list, want) in
            [("4", Some(4)), ("4(x2),4", Some(4)), ("4(x2),3", None), ("", None), ("0(x2)", None), ("x", None)]
        {
            assert_eq!(tasks_of_each_node(list), want, "{list}");
        }
    }

    #[test]
    fn hosts_of_slurms_lists() {
        for (list, want) in [
            ("a", "a"),
            ("a,b", "a"),
            ("n[1-3]", "n1"),
            ("n[08,2-3]-ib,x", "n08-ib"),
            ("x,n[1-2]", "x"),
            ("", ""),
            ("n[", "n"),
        ] {
            assert_eq!(first_host(list), want, "{list}");
        }
    }

    #[test]
    fn halves_and_nonsense_are_refused_by_name() {
        for (variables, part) in [
            (&[("RANK", "0")][..], "WORLD_SIZE is not set"),
            (&[("WORLD_SIZE", "4")], "RANK is not set"),
            (&[("RANK", "4"), ("WORLD_SIZE", "4")], "RANK=4 is not one of WORLD_SIZE=4"),
            (&[("RANK", "x"), ("WORLD_SIZE", "4")], "RANK must be"),
            (&[("RANK", "0"), ("WORLD_SIZE", "-1")], "WORLD_SIZE must be"),
            (&[("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "h"), ("MASTER_PORT", "0")], "MASTER_PORT must be"),
        ] {
            let message = of(variables).unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        }
    }
}
