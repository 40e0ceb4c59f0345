//! [`CounterRng`]: random numbers that are a pure function of a seed, a stream and a position.
//!
//! Every random draw of the workspace (initialisation, routing noise, shuffling, sampling) comes from here; there is no
//! global generator, so a draw can be repeated by anyone who knows its three coordinates.

/// Philox4x32-10: a counter-based generator.
///
/// # Source
/// Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". The key is the seed; the upper half of the counter
/// is the stream, the lower half counts blocks of four numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CounterRng {
    seed: u64,
    stream: u64,
    block: u64,
    buffer: [u32; 4],
    used: usize,
}

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let wide_0 = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let wide_1 = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (wide_1 >> 32) as u32 ^ counter[1] ^ key[0],
            wide_1 as u32,
            (wide_0 >> 32) as u32 ^ counter[3] ^ key[1],
            wide_0 as u32,
        ];
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

impl CounterRng {
    /// The generator of `seed` at the start of `stream`. Streams of one seed are independent.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self { seed, stream, block: 0, buffer: [0; 4], used: 4 }
    }

    /// The same generator `numbers` draws of 32 bits further on than at the start.
    #[must_use]
    pub fn skipping(self, numbers: u64) -> Self {
        let mut further = Self { block: numbers / 4, used: 4, ..self };
        for _ in 0..numbers % 4 {
            further.next_u32();
        }
        further
    }

    /// The next 32 random bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            let counter =
                [self.block as u32, (self.block >> 32) as u32, self.stream as u32, (self.stream >> 32) as u32];
            self.buffer = philox(counter, [self.seed as u32, (self.seed >> 32) as u32]);
            self.block += 1;
            self.used = 0;
        }
        self.used += 1;
        self.buffer[self.used - 1]
    }

    /// The next 64 random bits.
    pub fn next_u64(&mut self) -> u64 {
        u64::from(self.next_u32()) | u64::from(self.next_u32()) << 32
    }

    /// Uniform in `[0, 1)`, 24 bits.
    pub fn uniform_f32(&mut self) -> f32 {
        (self.next_u32() >> 8) as f32 / (1 << 24) as f32
    }

    /// Uniform in `[0, 1)`, 53 bits.
    pub fn uniform_f64(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal (Box-Muller).
    pub fn normal_f64(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform_f64()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform_f64()).cos()
    }

    /// Standard Gumbel: `-ln(-ln(u))`, `u` kept inside `(0, 1)`.
    pub fn gumbel_f32(&mut self) -> f32 {
        let u = (f64::from(self.next_u32()) + 0.5) / 4_294_967_296.0;
        -(-u.ln()).ln() as f32
    }

    /// Uniform in `0..n`, without bias (Lemire's rejection). Returns 0 for `n` 0 or 1.
    pub fn below(&mut self, n: u32) -> u32 {
        if n <= 1 {
            return 0;
        }
        let threshold = n.wrapping_neg() % n;
        loop {
            let wide = u64::from(self.next_u32()) * u64::from(n);
            if wide as u32 >= threshold {
                return (wide >> 32) as u32;
            }
        }
    }

    /// Mixes coordinates (step, layer, micro-batch ...) into one seed or stream number.
    pub fn mix(seed: u64, coordinates: &[u64]) -> u64 {
        coordinates.iter().fold(seed, |state, &c| {
            let out = philox([c as u32, (c >> 32) as u32, 0x6d6f_655f, 0], [state as u32, (state >> 32) as u32]);
            u64::from(out[0]) | u64::from(out[1]) << 32
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known-answer vectors of the authors' Random123 library (kat_vectors, philox4x32 10 rounds).
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn streams_differ_and_repeat() {
        let draw = |seed, stream| {
            (0..8).map(|_| 0).scan(CounterRng::new(seed, stream), |r, _| Some(r.next_u32())).collect::<Vec<_>>()
        };
        assert_eq!(draw(1, 2), draw(1, 2));
        for skipped in [0, 3, 4, 6] {
            assert_eq!(CounterRng::new(1, 2).skipping(skipped).next_u32(), draw(1, 2)[skipped as usize]);
        }
        assert_ne!(draw(1, 2), draw(1, 3));
        assert_ne!(draw(1, 2), draw(2, 2));
        assert_ne!(CounterRng::mix(1, &[2, 3]), CounterRng::mix(1, &[3, 2]));
    }

    #[test]
    fn moments() {
        let mut rng = CounterRng::new(7, 0);
        let n = 20_000;
        let (mut sum, mut squares, mut gumbel) = (0.0, 0.0, 0.0);
        for _ in 0..n {
            let x = rng.normal_f64();
            sum += x;
            squares += x * x;
            gumbel += f64::from(rng.gumbel_f32());
        }
        assert!((sum / n as f64).abs() < 0.03);
        assert!((squares / n as f64 - 1.0).abs() < 0.05);
        assert!((gumbel / n as f64 - 0.5772).abs() < 0.05, "the mean of a Gumbel is Euler's constant");
        let mut seen = [0u32; 3];
        (0..3000).for_each(|_| seen[rng.below(3) as usize] += 1);
        assert!(seen.iter().all(|&c| (900..1100).contains(&c)), "{seen:?}");
    }
}
