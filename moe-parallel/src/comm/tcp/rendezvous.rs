//! How the processes of a job find each other, from the address of rank 0 on.
//!
//! Rank 0 waits for all others and tells each where all are, and the job's cookie. Then each connects to those of lower rank,
//! and is connected to by those of higher; the connection with rank 0 stays (`mesh.rs`). What is not of this job, whatever it
//! sends or does not send, is dropped or turned away. A process of this job that cannot be right ends it, with the reason on both
//! sides.

use super::TcpConfig;
use super::channel::{Channel, Frame, Kind};
use super::door::{Door, Visitor, refuse};
use super::hello::{Cookie, Guest, Hello, Purpose, Refusal, Table, VERSION};
use super::link::{MOST_CONTROL_BYTES, Peer};
use super::mesh::{Half, Mesh, Result, Time, dial_at, hello};
use crate::comm::pace::Pace;
use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// The connections of this process with all others, by rank; rank 0 has its listener from `open`.
pub(super) fn connect(config: &TcpConfig, open: impl FnOnce() -> Result<TcpListener>) -> Result<Vec<Option<Peer>>> {
    let time = Time { start: Instant::now(), timeout: config.timeout };
    match (config.size, config.rank) {
        (1, _) => Ok(vec![None]),
        (_, 0) => Host::new(config, open()?, time)?.gather(),
        _ => join(config, time)?.connect(),
    }
}

/// The listener of rank 0, like the first address of `master` at which there can be one.
pub(super) fn listen(config: &TcpConfig) -> Result<TcpListener> {
    let mut failed = no_address(config);
    for address in resolve(&config.master)? {
        let address = SocketAddr::new(listen_ip(config, address.ip()), address.port());
        match TcpListener::bind(address) {
            Ok(listener) => return Ok(listener),
            Err(error) => failed = format!("{error} ({address})"),
        }
    }
    let master = &config.master;
    Err(format!(
        "rank 0 cannot listen for `master` {master}: {failed}; if another program has the port, choose another on all ranks"
    ))
}

fn no_address(config: &TcpConfig) -> String {
    format!("`master` {:?} has no address", config.master)
}

/// Where to listen, to be reached like an address or from it.
fn listen_ip(config: &TcpConfig, like: IpAddr) -> IpAddr {
    config.listen.unwrap_or(match like {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    })
}

fn resolve(master: &str) -> Result<Vec<SocketAddr>> {
    let found = master.to_socket_addrs().map(Iterator::collect);
    found.map_err(|error| {
        format!("`master` {master:?} has no address: {error}; it is the host of rank 0 and a port, host:port")
    })
}

/// Rank 0, to which all others come.
struct Host<'a> {
    config: &'a TcpConfig,
    door: Door,
    /// By rank.
    places: Vec<Option<Joined>>,
    time: Time,
}

struct Joined {
    channel: Channel,
    listens: SocketAddr,
    frames: VecDeque<Frame>,
}

impl<'a> Host<'a> {
    fn new(config: &'a TcpConfig, listener: TcpListener, time: Time) -> Result<Self> {
        let door = Door::new(listener).map_err(|error| format!("rank 0 cannot listen: {error}"))?;
        Ok(Self { config, door, places: (0..config.size).map(|_| None).collect(), time })
    }

    /// Waits for all, and connects.
    fn gather(mut self) -> Result<Vec<Option<Peer>>> {
        // 1. All come. If they do not, those that have hear why.
        if let Err(why) = self.wait() {
            self.places.iter_mut().flatten().for_each(|joined| refuse(&mut joined.channel, true, &why));
            return Err(why);
        }

        // 2. Each is told where all are.
        let cookie = Cookie::random();
        let others = self.places.iter().flatten().map(|joined| joined.listens).collect();
        let bytes = Table { cookie, others }.encode();
        for joined in self.places.iter_mut().flatten() {
            joined.channel.send(Frame { kind: Kind::Table, epoch: 0, bytes: bytes.clone() });
        }

        // 3. Each connects once more.
        let half = |joined: Option<Joined>| match joined {
            Some(Joined { channel, frames, .. }) => Half { control: Some(channel), data: None, frames },
            None => Half::default(),
        };
        let halves = self.places.into_iter().map(half).collect();
        Mesh { config: self.config, cookie, door: self.door, halves, asked: Vec::new(), time: self.time }.complete()
    }

    fn wait(&mut self) -> Result<()> {
        let mut pace = Pace::new();
        loop {
            let is_over = self.time.is_over();
            for visitor in self.door.look() {
                self.receive(visitor)?;
            }
            self.forget_gone();
            let missing: Vec<_> = (1..self.places.len()).filter(|&rank| self.places[rank].is_none()).collect();
            if missing.is_empty() {
                return Ok(());
            }
            if is_over {
                return Err(self.are_missing(&missing));
            }
            pace.rest();
        }
    }

    /// Those that have gone again may come again.
    fn forget_gone(&mut self) {
        for place in &mut self.places {
            let joined = place.take().and_then(|mut joined| {
                joined.channel.read(&mut joined.frames).ok()?;
                (!joined.channel.has_ended()).then_some(joined)
            });
            *place = joined;
        }
    }

    fn are_missing(&self, missing: &[usize]) -> String {
        let (master, seconds) = (&self.config.master, self.time.timeout.as_secs_f64());
        format!(
            "ranks {missing:?} of {} have not come to rank 0 at {master} within {seconds:.1} s; their errors say why, if they were started",
            self.places.len()
        )
    }

    /// Takes one in, or turns it away; an error if that ends the job.
    fn receive(&mut self, mut visitor: Visitor) -> Result<()> {
        match self.judge(&visitor.hello) {
            Ok(guest) => {
                let ip = guest.listens.ip();
                let ip = if ip.is_unspecified() { visitor.from } else { ip };
                let listens = SocketAddr::new(ip, guest.listens.port());
                self.places[guest.rank] = Some(Joined { channel: visitor.channel, listens, frames: visitor.frames });
                Ok(())
            }
            Err(Refusal { is_final, why }) => {
                refuse(&mut visitor.channel, is_final, &why);
                if is_final { Err(format!("a process at {} came to rank 0: {why}", visitor.from)) } else { Ok(()) }
            }
        }
    }

    /// The guest, if it is one to be taken in.
    fn judge(&self, hello: &Hello) -> std::result::Result<Guest, Refusal> {
        let (job, size) = (&self.config.job, self.config.size);
        let refusal = |is_final, why| Err(Refusal { is_final, why });
        if hello.job != *job {
            return refusal(false, format!("job {job:?} meets here, not {:?}", hello.job));
        }
        let Some(guest) = hello.guest else {
            let theirs = hello.version;
            return refusal(
                true,
                format!("it speaks version {theirs}, but rank 0 speaks {VERSION}; run one build on all ranks"),
            );
        };
        let Guest { rank, size: theirs, .. } = guest;
        if guest.purpose != Purpose::Join {
            return refusal(false, "the ranks have not come together yet".into());
        }
        if theirs != size {
            return refusal(true, format!("rank {rank} is started as one of {theirs}, but rank 0 as one of {size}"));
        }
        if rank >= size {
            return refusal(true, format!("rank {rank} is none of {size}"));
        }
        if rank == 0 || self.places[rank].is_some() {
            return refusal(true, format!("two processes are started as rank {rank}"));
        }
        Ok(guest)
    }
}

/// Why an attempt to join has failed.
enum Failed {
    /// It may succeed later.
    Now(String),
    ForGood(String),
}

/// Comes to rank 0, which may be started later, and hears where all are.
fn join(config: &TcpConfig, time: Time) -> Result<Connecting<'_>> {
    const AGAIN: Duration = Duration::from_millis(50);
    let (rank, master) = (config.rank, &config.master);
    loop {
        let failed = match attempt(config, time) {
            Ok(joined) => return Ok(joined),
            Err(Failed::ForGood(why)) => return Err(format!("rank {rank} at rank 0, {master}: {why}")),
            Err(Failed::Now(why)) => why,
        };
        if time.is_over() {
            let seconds = time.timeout.as_secs_f64();
            return Err(format!(
                "rank {rank} has not come together with rank 0 within {seconds:.1} s: {failed}; `master` ({master}) must be where rank 0 can be reached"
            ));
        }
        std::thread::sleep(AGAIN.min(time.left()));
    }
}

fn attempt(config: &TcpConfig, time: Time) -> std::result::Result<Connecting<'_>, Failed> {
    // 1. A connection, and a door for the others.
    let stream = dial(config, time).map_err(Failed::Now)?;
    let now = |error: std::io::Error| Failed::Now(format!("the connection fails: {error}"));
    let (local, master) = (stream.local_addr().map_err(now)?, stream.peer_addr().map_err(now)?);
    if local == master {
        return Err(Failed::Now("nobody listens there".into()));
    }
    let ip = listen_ip(config, local.ip());
    let door = TcpListener::bind((ip, 0)).and_then(Door::new);
    let no_door = |error| Failed::ForGood(format!("this rank cannot listen at {ip}: {error}; change `listen`"));
    let door = door.map_err(no_door)?;
    let listens = door.address().map_err(no_door)?;

    // 2. The answer, which comes when all are there.
    let mut channel = Channel::over(stream, MOST_CONTROL_BYTES).map_err(now)?;
    channel.send(hello(config, Purpose::Join, Cookie::NONE, listens));
    let (mut frames, mut pace) = (VecDeque::new(), Pace::new());
    let answer = loop {
        channel.flush();
        channel.read(&mut frames).map_err(Failed::Now)?;
        match frames.pop_front() {
            Some(frame) => break frame,
            None if channel.has_ended() => return Err(Failed::Now("it has ended the connection".into())),
            None if time.is_over() => {
                return Err(Failed::Now("it has not answered: other ranks may be missing".into()));
            }
            None => pace.rest(),
        }
    };
    let table = Table::decode(&answer.bytes).filter(|table| table.others.len() == config.size - 1);
    match (answer.kind, table, Refusal::decode(&answer.bytes)) {
        (Kind::Table, Some(table), _) => Ok(Connecting {
            config,
            door,
            rank_0: Half { control: Some(channel), data: None, frames },
            master,
            table,
            time,
        }),
        (Kind::Refused, _, Some(Refusal { is_final: true, why })) => Err(Failed::ForGood(why)),
        (Kind::Refused, _, Some(Refusal { is_final: false, why })) => Err(Failed::Now(why)),
        _ => Err(Failed::Now("it gives an answer that cannot be read".into())),
    }
}

/// A connection to rank 0, at any of its addresses.
fn dial(config: &TcpConfig, time: Time) -> Result<TcpStream> {
    /// At an address that does not answer, for there may be others.
    const MOST: Duration = Duration::from_secs(5);
    let mut last = no_address(config);
    for address in resolve(&config.master)? {
        match dial_at(address, time.left().min(MOST)) {
            Ok(stream) => return Ok(stream),
            Err(why) => last = why,
        }
    }
    Err(last)
}

/// A rank that knows where all are.
struct Connecting<'a> {
    config: &'a TcpConfig,
    door: Door,
    rank_0: Half,
    master: SocketAddr,
    table: Table,
    time: Time,
}

impl Connecting<'_> {
    /// Connects to the lower ranks, and is connected to by the higher.
    fn connect(self) -> Result<Vec<Option<Peer>>> {
        let Self { config, door, rank_0, master, table, time } = self;
        let mut halves: Vec<_> = (0..config.size).map(|_| Half::default()).collect();
        halves[0] = rank_0;
        let mut mesh = Mesh { config, cookie: table.cookie, door, halves, asked: Vec::new(), time };
        let dialled = (|| {
            mesh.ask(0, Purpose::Data, master)?;
            for (rank, listens) in (1..config.rank).zip(table.others) {
                // A rank on the host of rank 0 may have been seen at an address that means something there alone.
                let ip = if listens.ip().is_loopback() { master.ip() } else { listens.ip() };
                let address = SocketAddr::new(ip, listens.port());
                mesh.ask(rank, Purpose::Control, address)?;
                mesh.ask(rank, Purpose::Data, address)?;
            }
            Ok(())
        })();
        match dialled {
            Ok(()) => mesh.complete(),
            Err(why) => Err(mesh.fail(why)),
        }
    }
}
