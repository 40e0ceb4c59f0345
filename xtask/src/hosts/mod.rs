//! [`Hosts`]: hosts that are network namespaces of this machine, with a network between them that is as slow as is asked for.
//!
//! Each host has one TUN device, whose packets a thread of this process forwards (`wire.rs` says when). So the network has a
//! delay and a rate, but processors and memory are this machine's, and shared. Needs root. Whatever was made is removed when
//! the value is dropped, with the processes that still run there; a program that is killed leaves it behind, and the next one
//! says so.

mod command;
mod tun;
mod wire;

pub(crate) use command::{Args, run};
pub(crate) use wire::Link;

use crate::shell;
use anyhow::{Context, Result, bail, ensure};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use wire::Wires;

/// Of the hosts' addresses; host `h` has `.h+1`.
const NETWORK: &str = "10.77.0";
/// Large, so that there are few packets to forward.
const PACKET_BYTES: usize = 65_000;
/// As hosts of a cluster are set up: room for several of the large packets from the beginning, and no guessing at the network's rate,
/// which a host that shares its cores with others gets wrong. With the system's own settings (131 KB, BBR) 217 MB between 4 hosts
/// took 1.1 s where the network cost no time (2026-11-26).
const TCP_SETTINGS: [(&str, &str); 3] =
    [("tcp_rmem", "4096 4194304 16777216"), ("tcp_wmem", "4096 4194304 16777216"), ("tcp_congestion_control", "reno")];
/// How long a signal goes unnoticed.
const LOOK: Duration = Duration::from_millis(50);

/// See the module.
#[derive(Debug)]
pub(crate) struct Hosts {
    /// Those that were made.
    names: Vec<String>,
    /// For the start agent and the list of hosts.
    folder: PathBuf,
    forwarder: Option<JoinHandle<io::Result<()>>>,
    stop: Arc<AtomicBool>,
}

impl Hosts {
    /// What is missing on this machine, each with the package of Debian's that has it.
    pub(crate) fn missing() -> Vec<String> {
        let mut missing = Vec::new();
        for (program, package) in [("ip", "iproute2"), ("unshare", "util-linux"), ("mpirun", "openmpi-bin")] {
            if Command::new(program).arg("--version").output().is_err() {
                missing.push(format!("`{program}` (apt-get install {package})"));
            }
        }
        let root = fs::metadata("/proc/self").is_ok_and(|of| std::os::unix::fs::MetadataExt::uid(&of) == 0);
        if !root {
            missing.push("the rights of root, to make network namespaces (sudo)".into());
        }
        if !Path::new("/dev/net/tun").exists() {
            missing
                .push("/dev/net/tun (modprobe tun; a container needs the device and the capability NET_ADMIN)".into());
        }
        missing
    }

    /// Refuses a machine that lacks something.
    pub(crate) fn check() -> Result<()> {
        let missing = Self::missing();
        ensure!(missing.is_empty(), "emulated hosts need {}", missing.join("; "));
        Ok(())
    }

    /// Makes `count` hosts; `folder` gets some small files.
    pub(crate) fn new(count: usize, link: Link, folder: &Path) -> Result<Self> {
        ensure!((1..=200).contains(&count), "hosts must be 1 to 200, got {count}");
        interruption()?;
        let stop = Arc::new(AtomicBool::new(false));
        let mut hosts = Self { names: Vec::new(), folder: folder.to_owned(), forwarder: None, stop };
        fs::create_dir_all(folder)?;
        let names: Vec<String> = (0..count).map(|host| format!("moe-host{host}")).collect();
        let mut table = String::from("127.0.0.1 localhost\n");
        names.iter().enumerate().for_each(|(host, name)| table += &format!("{NETWORK}.{} {name}\n", host + 1));
        let mut devices = Vec::new();
        for (host, name) in names.into_iter().enumerate() {
            hosts.make(host, name, &table, &mut devices)?;
        }
        let (wires, stop) = (Wires::new(count, link), Arc::clone(&hosts.stop));
        hosts.forwarder =
            Some(thread::Builder::new().name("forwarder".into()).spawn(move || forward(&devices, wires, &stop))?);
        Ok(hosts)
    }

    fn make(&mut self, host: usize, name: String, table: &str, devices: &mut Vec<File>) -> Result<()> {
        let ip = |words: &str| quiet("ip", &words.split(' ').collect::<Vec<_>>());
        ensure!(
            !Path::new("/run/netns").join(&name).exists(),
            "network namespace {name} is there already, of another run or of one that was killed; for the latter: \
             ip netns delete {name}"
        );
        ip(&format!("netns add {name}"))?;
        self.names.push(name.clone());
        let device = format!("moe-wan{host}");
        devices.push(tun::open(&device).with_context(|| format!("cannot make the network device {device}"))?);
        ip(&format!("link set {device} netns {name}"))?;
        ip(&format!("-n {name} addr add {NETWORK}.{}/24 dev {device}", host + 1))?;
        ip(&format!("-n {name} link set {device} mtu {PACKET_BYTES} up"))?;
        ip(&format!("-n {name} link set lo up"))?;
        for (key, value) in TCP_SETTINGS {
            let write = format!("echo {value} > /proc/sys/net/ipv4/{key}");
            quiet("ip", &["netns", "exec", &name, "sh", "-c", &write])?;
        }
        // `ip netns exec` shows these to the host's programs in the place of /etc.
        let etc = etc(&name);
        fs::create_dir_all(&etc)?;
        fs::write(etc.join("hosts"), table).with_context(|| format!("cannot write {}", etc.display()))
    }

    /// Where the others reach the first host.
    pub(crate) fn first_address(&self) -> String {
        format!("{NETWORK}.1")
    }

    /// What a shell of this machine says to run `command` on the first host.
    fn on_first(&self, command: &str) -> String {
        format!("ip netns exec {} {command}", self.names[0])
    }

    /// Open MPI's launcher on the first host, to start `ranks` processes on each. The hosts have names of their own, or Open MPI
    /// would take them for one.
    pub(crate) fn mpirun(&self, ranks: usize) -> Result<Command> {
        const NAMED: &str = "hostname \"$0\"; exec \"$@\"";
        let first = self.names.first().context("there is no host")?;
        let list: String = self.names.iter().map(|name| format!("{name} slots={ranks}\n")).collect();
        let (list_file, agent) = (self.folder.join("hosts"), self.folder.join("start-agent"));
        fs::write(&list_file, list)?;
        fs::write(
            &agent,
            "#!/bin/sh\n# What Open MPI calls in the place of ssh: HOST COMMAND...\n\
             host=$1; shift; exec ip netns exec \"$host\" unshare --uts sh -c \"hostname $host; $*\"\n",
        )?;
        fs::set_permissions(&agent, fs::Permissions::from_mode(0o755))?;
        let mut command = Command::new("ip");
        command.args(["netns", "exec", first, "unshare", "--uts", "sh", "-c", NAMED, first]);
        command.args(["mpirun", "--allow-run-as-root", "-np", &(ranks * self.names.len()).to_string()]);
        command.arg("--hostfile").arg(list_file);
        let network = format!("{NETWORK}.0/24");
        for (key, value) in [
            ("plm_rsh_agent", agent.to_string_lossy().as_ref()),
            ("plm_rsh_no_tree_spawn", "1"),
            ("oob_tcp_if_include", &network),
            ("btl_tcp_if_include", &network),
            ("pml", "ob1"),
            ("btl", "tcp,self,vader"),
            // More ranks than cores.
            ("mpi_yield_when_idle", "1"),
        ] {
            command.args(["--mca", key, value]);
        }
        Ok(command)
    }

    /// Runs a command and returns what it prints; ends it when this program is told to end.
    pub(crate) fn output(&self, command: &mut Command) -> Result<String> {
        let mut child = start(command.stdout(Stdio::piped()))?;
        let mut stdout = child.stdout.take().context("it has no output")?;
        let reader = thread::spawn(move || {
            let mut text = String::new();
            stdout.read_to_string(&mut text).map(|_| text)
        });
        let status = self.wait(&mut child)?;
        let text = reader.join().map_err(|_| anyhow::anyhow!("the reader of the output has panicked"))??;
        ensure!(status.success(), "it failed: {status}\n{text}");
        Ok(text)
    }

    /// Runs a command that prints where this program does; ends it when this program is told to end.
    fn run(&self, command: &mut Command) -> Result<()> {
        let status = self.wait(&mut start(command)?)?;
        ensure!(status.success(), "it failed: {status}");
        Ok(())
    }

    fn wait(&self, child: &mut Child) -> Result<ExitStatus> {
        let interrupted = interruption()?;
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            if interrupted.load(Ordering::Relaxed) {
                // The launcher ends its processes when it is asked to; those that stay are ended with their hosts.
                let _asked = quiet("kill", &[&child.id().to_string()]);
                thread::sleep(LOOK * 10);
                let _ended = child.kill();
                child.wait()?;
                bail!("interrupted");
            }
            ensure!(
                !self.forwarder.as_ref().is_none_or(JoinHandle::is_finished),
                "the network between the hosts has ended"
            );
            thread::sleep(LOOK);
        }
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        let tell = |what: &str, error: &dyn std::fmt::Display| eprintln!("warning: {what}: {error}");
        for name in &self.names {
            let processes = Command::new("ip").args(["netns", "pids", name]).output();
            let processes = processes.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
            for process in processes.unwrap_or_default().split_whitespace() {
                let _gone = quiet("kill", &["-9", process]);
            }
        }
        // The devices go with the thread that holds them.
        self.stop.store(true, Ordering::Relaxed);
        match self.forwarder.take().map(JoinHandle::join) {
            Some(Ok(Err(error))) => tell("the network between the hosts has ended", &error),
            Some(Err(_)) => eprintln!("warning: the network between the hosts has panicked"),
            Some(Ok(Ok(()))) | None => {}
        }
        for name in &self.names {
            if let Err(error) = quiet("ip", &["netns", "delete", name]) {
                tell("a namespace is left", &error);
            }
            if let Err(error) = fs::remove_dir_all(etc(name)) {
                tell("a folder is left", &error);
            }
        }
    }
}

fn start(command: &mut Command) -> Result<Child> {
    eprintln!("$ {}", shell::shown(command));
    command.stdin(Stdio::null()).spawn().context("cannot start it")
}

fn etc(name: &str) -> PathBuf {
    Path::new("/etc/netns").join(name)
}

/// Runs a small command; its errors are in the error.
fn quiet(program: &str, args: &[&str]) -> Result<()> {
    let output = Command::new(program).args(args).output().with_context(|| format!("cannot start {program}"))?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {} failed: {}", args.join(" "), error.trim());
    Ok(())
}

/// Becomes true when this program is told to end, which it then has to do itself.
fn interruption() -> Result<&'static AtomicBool> {
    static INTERRUPTED: AtomicBool = AtomicBool::new(false);
    static HANDLED: AtomicBool = AtomicBool::new(false);
    if !HANDLED.swap(true, Ordering::Relaxed) {
        ctrlc::set_handler(|| INTERRUPTED.store(true, Ordering::Relaxed)).context("cannot handle Ctrl-C")?;
    }
    Ok(&INTERRUPTED)
}

/// The host a packet is for: by the last byte of its IPv4 destination. None for what the kernel says by itself.
fn receiver(packet: &[u8], hosts: usize) -> Option<usize> {
    const IPV4: u8 = 4;
    let host = usize::from(*packet.get(19)?).checked_sub(1)?;
    (packet[0] >> 4 == IPV4 && host < hosts).then_some(host)
}

/// Carries packets between the devices until it is stopped.
fn forward(devices: &[File], mut wires: Wires, stop: &AtomicBool) -> io::Result<()> {
    tun::hurry()?;
    let start = Instant::now();
    let mut buffer = vec![0; PACKET_BYTES + 1000];
    while !stop.load(Ordering::Relaxed) {
        while let Some((to, packet)) = wires.arrived(start.elapsed()) {
            // A host that takes no more drops packets, as real ones do.
            let _sent = (&devices[to]).write(&packet);
        }
        let next = wires.next().map_or(LOOK, |at| at.saturating_sub(start.elapsed()).min(LOOK));
        let readable = tun::wait(devices, next)?;
        for (from, mut device) in devices.iter().enumerate().filter(|(from, _)| readable[*from]) {
            match device.read(&mut buffer) {
                Ok(bytes) => {
                    if let Some(to) = receiver(&buffer[..bytes], devices.len()) {
                        wires.send(from, to, buffer[..bytes].to_vec(), start.elapsed());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_find_their_host() {
        let mut packet = vec![0; 20];
        packet[0] = 0x45;
        packet[16..].copy_from_slice(&[10, 77, 0, 2]);
        assert_eq!(receiver(&packet, 2), Some(1));
        assert_eq!(receiver(&packet, 1), None);
        packet[0] = 0x60;
        assert_eq!(receiver(&packet, 2), None, "IPv6");
        assert_eq!(receiver(&packet[..19], 2), None);
    }
}
