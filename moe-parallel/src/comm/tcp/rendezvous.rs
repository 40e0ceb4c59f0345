//! How the processes of a job find each other, from the address of rank 0 on.
//!
//! Rank 0 waits for all others and tells each where all are, and the job's cookie. Then each connects to those of lower rank,
//! and is connected to by those of higher; the connection with rank 0 stays. What is not of this job, whatever it sends or does
//! not send, is dropped or turned away. A process of this job that cannot be right ends it, with the reason on both sides.

use super::TcpConfig;
use super::channel::{Channel, Frame, Kind};
use super::door::{Door, Visitor, refuse};
use super::hello::{Cookie, Guest, Hello, Purpose, Refusal, Table, VERSION};
use super::link::{MOST_BYTES, MOST_CONTROL_BYTES, Peer};
use crate::comm::pace::Pace;
use std::collections::VecDeque;
use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// Errors are texts, which name what to change.
type Result<T> = std::result::Result<T, String>;

/// Since the start.
#[derive(Clone, Copy)]
struct Time {
    start: Instant,
    timeout: Duration,
}

impl Time {
    fn left(self) -> Duration {
        self.timeout.saturating_sub(self.start.elapsed())
    }

    fn is_over(self) -> bool {
        self.left().is_zero()
    }
}

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

fn hello(config: &TcpConfig, purpose: Purpose, cookie: Cookie, listens: SocketAddr) -> Frame {
    let guest = Guest { purpose, rank: config.rank, size: config.size, cookie, listens };
    let hello = Hello { version: VERSION, job: config.job.clone(), guest: Some(guest) };
    Frame { kind: Kind::Hello, epoch: 0, bytes: hello.encode() }
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
        while self.places.iter().skip(1).any(Option::is_none) {
            if self.time.is_over() {
                return Err(self.missing());
            }
            for visitor in self.door.look() {
                self.receive(visitor)?;
            }
            pace.rest();
            self.forget_gone();
        }
        Ok(())
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

    fn missing(&self) -> String {
        let missing: Vec<_> = (1..self.places.len()).filter(|&rank| self.places[rank].is_none()).collect();
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

fn dial_at(address: SocketAddr, within: Duration) -> Result<TcpStream> {
    // No time at all is refused.
    TcpStream::connect_timeout(&address, within.max(Duration::from_millis(1)))
        .map_err(|error| format!("cannot connect to {address}: {error}"))
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

/// The connections with another rank, as far as there are any.
#[derive(Default)]
struct Half {
    control: Option<Channel>,
    data: Option<Channel>,
    /// What came over the first.
    frames: VecDeque<Frame>,
}

impl Half {
    fn set(&mut self, purpose: Purpose, channel: Channel) {
        match purpose {
            Purpose::Data => self.data = Some(channel),
            Purpose::Control | Purpose::Join => self.control = Some(channel.widened(MOST_CONTROL_BYTES, 0)),
        }
    }

    fn has(&self, purpose: Purpose) -> bool {
        match purpose {
            Purpose::Data => self.data.is_some(),
            Purpose::Control | Purpose::Join => self.control.is_some(),
        }
    }

    fn into_peer(self) -> Option<Peer> {
        Some(Peer::new(self.data?, self.control?, self.frames))
    }
}

/// A job whose ranks know of each other and connect.
struct Mesh<'a> {
    config: &'a TcpConfig,
    cookie: Cookie,
    door: Door,
    halves: Vec<Half>,
    /// Connections whose other end has not answered yet.
    asked: Vec<(usize, Purpose, Channel)>,
    time: Time,
}

impl Mesh<'_> {
    /// Connects to a rank.
    fn ask(&mut self, rank: usize, purpose: Purpose, address: SocketAddr) -> Result<()> {
        let failed = |why: &dyn Display| {
            format!(
                "rank {} and rank {rank} at {address}: {why}; ranks must reach each other at any port",
                self.config.rank
            )
        };
        let stream = dial_at(address, self.time.left()).map_err(|why| failed(&why))?;
        // Parcels may follow the answer.
        let most = if purpose == Purpose::Data { MOST_BYTES } else { MOST_CONTROL_BYTES };
        let mut channel = Channel::over(stream, most).map_err(|error| failed(&error))?;
        channel.send(hello(self.config, purpose, self.cookie, address));
        self.asked.push((rank, purpose, channel));
        Ok(())
    }

    /// Waits until all connections are there.
    fn complete(mut self) -> Result<Vec<Option<Peer>>> {
        let mut pace = Pace::new();
        while !self.missing().is_empty() {
            if let Err(why) = self.look() {
                return Err(self.fail(why));
            }
            pace.rest();
        }
        Ok(self.halves.into_iter().map(Half::into_peer).collect())
    }

    /// Ranks with which a connection is missing.
    fn missing(&self) -> Vec<usize> {
        let is_whole = |rank: usize| self.halves[rank].has(Purpose::Control) && self.halves[rank].has(Purpose::Data);
        (0..self.halves.len()).filter(|&rank| rank != self.config.rank && !is_whole(rank)).collect()
    }

    fn look(&mut self) -> Result<()> {
        if self.time.is_over() {
            let (rank, missing) = (self.config.rank, self.missing());
            let seconds = self.time.timeout.as_secs_f64();
            return Err(format!("rank {rank} is not connected with ranks {missing:?} within {seconds:.1} s"));
        }
        for visitor in self.door.look() {
            self.admit(visitor);
        }
        self.hear_answers()?;
        self.halves.iter_mut().enumerate().try_for_each(|(rank, half)| watch(rank, half))
    }

    /// Takes a connection of a higher rank; all others are dropped.
    fn admit(&mut self, mut visitor: Visitor) {
        let ours = visitor.hello.guest.filter(|_| visitor.hello.job == self.config.job);
        let Some(Guest { purpose, rank, cookie, .. }) = ours else { return };
        if purpose == Purpose::Join {
            refuse(&mut visitor.channel, true, &format!("all ranks have come; is rank {rank} started twice?"));
        } else if cookie == self.cookie && rank > self.config.rank && rank < self.halves.len() {
            let half = &mut self.halves[rank];
            if !half.has(purpose) {
                visitor.channel.send(Frame { kind: Kind::Accepted, epoch: 0, bytes: Vec::new() });
                half.frames.append(&mut visitor.frames);
                half.set(purpose, visitor.channel);
            }
        }
    }

    /// Keeps the connections that were accepted.
    fn hear_answers(&mut self) -> Result<()> {
        for (rank, purpose, mut channel) in std::mem::take(&mut self.asked) {
            let mut frames = VecDeque::new();
            channel.flush();
            channel.read(&mut frames).map_err(|what| format!("rank {rank}: {what}"))?;
            match frames.pop_front() {
                Some(Frame { kind: Kind::Accepted, .. }) => {
                    self.halves[rank].frames.append(&mut frames);
                    self.halves[rank].set(purpose, channel);
                }
                Some(_) => {
                    return Err(format!("rank {rank} does not accept a connection of rank {}", self.config.rank));
                }
                None if channel.has_ended() => return Err(format!("rank {rank} has ended while the ranks connected")),
                None => self.asked.push((rank, purpose, channel)),
            }
        }
        Ok(())
    }

    /// Tells all others, as far as there are connections, why there will be no job.
    fn fail(mut self, why: String) -> String {
        let controls = self.halves.iter_mut().filter_map(|half| half.control.as_mut());
        controls.for_each(|control| refuse(control, true, &why));
        why
    }
}

/// An error if a rank is gone, or says that there will be no job.
fn watch(rank: usize, half: &mut Half) -> Result<()> {
    let Some(control) = &mut half.control else { return Ok(()) };
    control.flush();
    control.read(&mut half.frames).map_err(|what| format!("rank {rank}: {what}"))?;
    let refused = half.frames.iter().find(|frame| frame.kind == Kind::Refused);
    if let Some(Refusal { why, .. }) = refused.and_then(|frame| Refusal::decode(&frame.bytes)) {
        return Err(format!("rank {rank} says: {why}"));
    }
    if control.has_ended() { Err(format!("rank {rank} has ended while the ranks connected")) } else { Ok(()) }
}
