//! [`Wires`]: when a packet arrives that was sent from one host to another. Pure: clock and packets are the caller's.
//!
//! Each host has one line out and one line in, as fast as each other, to a switch that is never busy. No packet is lost.

use std::collections::BTreeMap;
use std::time::Duration;

/// What lies between two hosts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Link {
    /// From the end of sending to the arrival.
    pub(crate) delay: Duration,
    pub(crate) bits_per_second: f64,
    /// A packet's share of a line beside its bytes.
    pub(crate) packet: Duration,
}

impl Link {
    fn occupied(&self, bytes: usize) -> Duration {
        self.packet + Duration::from_secs_f64(bytes as f64 * 8.0 / self.bits_per_second)
    }
}

/// Packets on their way.
#[derive(Debug)]
pub(super) struct Wires {
    link: Link,
    /// When the line of each host is free, out and in.
    out_free: Vec<Duration>,
    in_free: Vec<Duration>,
    /// By time of arrival and order of sending: receiver and packet.
    packets: BTreeMap<(Duration, u64), (usize, Vec<u8>)>,
    sent: u64,
}

impl Wires {
    pub(super) fn new(hosts: usize, link: Link) -> Self {
        let free = vec![Duration::ZERO; hosts];
        Self { link, out_free: free.clone(), in_free: free, packets: BTreeMap::new(), sent: 0 }
    }

    /// Takes a packet.
    pub(super) fn send(&mut self, from: usize, to: usize, packet: Vec<u8>, now: Duration) {
        let occupied = self.link.occupied(packet.len());
        self.out_free[from] = self.out_free[from].max(now) + occupied;
        // The first byte is in while the last is not yet out, so a line that is free takes no time of its own.
        self.in_free[to] = (self.out_free[from] + self.link.delay).max(self.in_free[to] + occupied);
        self.packets.insert((self.in_free[to], self.sent), (to, packet));
        self.sent += 1;
    }

    /// A packet that has arrived, and where.
    pub(super) fn arrived(&mut self, now: Duration) -> Option<(usize, Vec<u8>)> {
        let first = self.packets.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }

    /// When the next one arrives.
    pub(super) fn next(&self) -> Option<Duration> {
        self.packets.keys().next().map(|&(at, _)| at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// 1000 bytes take 8 ms and 2 ms beside.
    fn wires() -> Wires {
        Wires::new(3, Link { delay: ms(100), bits_per_second: 1e6, packet: ms(2) })
    }

    #[track_caller]
    fn arrives(wires: &mut Wires, at: Duration, to: usize) {
        assert_eq!(wires.next(), Some(at));
        assert_eq!(wires.arrived(at - Duration::from_nanos(1)), None);
        assert_eq!(wires.arrived(at).map(|(to, _)| to), Some(to));
    }

    #[test]
    fn packets_queue_for_their_line_out() {
        let mut wires = wires();
        wires.send(0, 1, vec![0; 1000], ms(5));
        wires.send(0, 2, vec![0; 1000], ms(5));
        wires.send(0, 1, vec![0; 1000], ms(50));
        arrives(&mut wires, ms(115), 1);
        arrives(&mut wires, ms(125), 2);
        arrives(&mut wires, ms(160), 1);
        assert_eq!((wires.next(), wires.arrived(ms(1000))), (None, None));
    }

    #[test]
    fn packets_queue_for_their_line_in() {
        let mut wires = wires();
        wires.send(0, 2, vec![0; 1000], ms(0));
        wires.send(1, 2, vec![0; 1000], ms(0));
        arrives(&mut wires, ms(110), 2);
        arrives(&mut wires, ms(120), 2);
    }
}
