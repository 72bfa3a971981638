//! Choosing the next token from the logits.
//!
//! The order is fixed: never-sampled tokens are masked, then repetition penalty, top-k, top-p, min-p, temperature,
//! draw. Every cut keeps a prefix of the tokens sorted by logit (equal logits by token id), so one sorted list of
//! candidates is all the state there is. The arithmetic is our own (f64, `libm`, sums in list order) and the random
//! number is a function of (seed, position), not of how many were drawn before: one seed gives one text on every
//! machine, and a chat that is taken up again continues as if it had never stopped. There is no cleverness beyond
//! these five parameters.

use std::collections::HashSet;
use std::hash::{BuildHasher, Hasher};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The repetition penalty looks at this many of the newest tokens, prompt included.
pub const PENALTY_WINDOW: usize = 64;

/// What a user can set about sampling.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Logits are divided by it before the draw; 0 takes the likeliest token and draws nothing.
    pub temperature: f32,
    /// Keep the `top_k` likeliest tokens; 0 keeps all.
    pub top_k: usize,
    /// Keep the fewest tokens whose probabilities (at temperature 1) sum to at least this; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least this many times as likely (at temperature 1) as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Logits of the last [`PENALTY_WINDOW`] tokens are divided by it where positive and multiplied where negative;
    /// 1 changes nothing.
    pub repeat_penalty: f32,
    /// Selects the sequence of random numbers.
    pub seed: u64,
}

impl Default for Sampling {
    /// What Google recommends for Gemma 4: temperature 1, top-k 64, top-p 0.95. Seed 0.
    fn default() -> Sampling {
        Sampling { temperature: 1.0, top_k: 64, top_p: 0.95, min_p: 0.0, repeat_penalty: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// An error that names the first value outside its range.
    pub fn check(&self) -> Result<()> {
        let range = |name: &str, value: f32, ok: bool, expected: &str| match ok {
            true => Ok(()),
            false => Err(Error::usage(format!("{name}: {value}: expected {expected}"))),
        };
        let finite = |value: f32, low: f32| value.is_finite() && value >= low;
        range("temp", self.temperature, finite(self.temperature, 0.0), "a number of at least 0")?;
        range("top-p", self.top_p, (0.0..=1.0).contains(&self.top_p), "a number from 0 to 1")?;
        range("min-p", self.min_p, (0.0..=1.0).contains(&self.min_p), "a number from 0 to 1")?;
        let penalty = self.repeat_penalty;
        range("repeat-penalty", penalty, finite(penalty, f32::MIN_POSITIVE), "a number above 0")
    }
}

/// A seed from the operating system's random source, below 2^32 so that it is easily typed again.
pub fn random_seed() -> u64 {
    // Each `RandomState` holds keys the standard library seeds from the system.
    let mut hasher = std::collections::hash_map::RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    hasher.finish() >> 32
}

/// Which tokens one draw may pick, besides those that never are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Allowed<'a> {
    /// Any.
    All,
    /// Any but these.
    Without(&'a [u32]),
    /// Those whose bit is set: of token `id`, bit `id % 32` of word `id / 32`.
    Among(&'a [u32]),
}

/// Picks tokens; holds the buffers for it.
pub struct Sampler {
    sampling: Sampling,
    /// Ids that are never picked.
    masked: Vec<u32>,
    /// The logits of one position after mask and penalty. (vocab)
    logits: Vec<f32>,
    /// Candidates as [`key`]s, likeliest first.
    keys: Vec<u64>,
    /// `exp(logit - largest)` of the candidates.
    weights: Vec<f64>,
}

impl Sampler {
    /// A sampler that never picks a token of `masked`. Errors where a value of `sampling` is out of range.
    pub fn new(sampling: Sampling, masked: impl IntoIterator<Item = u32>) -> Result<Sampler> {
        sampling.check()?;
        let mut masked: Vec<u32> = masked.into_iter().collect();
        masked.sort_unstable();
        masked.dedup();
        Ok(Sampler { sampling, masked, logits: Vec::new(), keys: Vec::new(), weights: Vec::new() })
    }

    /// The parameters in use.
    pub fn sampling(&self) -> &Sampling {
        &self.sampling
    }

    /// How many of the largest logits decide what [`Sampler::sample`] returns; `None` if all do.
    pub fn deciding(&self, allowed: Allowed) -> Option<usize> {
        let Sampling { temperature, top_k, repeat_penalty, .. } = self.sampling;
        let keep = if temperature == 0.0 { 1 } else { top_k };
        let without = match allowed {
            Allowed::All => 0,
            Allowed::Without(tokens) => tokens.len(),
            Allowed::Among(_) => return None, // the likeliest of those may be anywhere in the order
        };
        (keep > 0 && repeat_penalty == 1.0).then_some(keep.saturating_add(self.masked.len() + without))
    }

    /// Replaces the seed, e.g. for another try at the same reply.
    pub fn set_seed(&mut self, seed: u64) {
        self.sampling.seed = seed;
    }

    /// The token for `position`, one of `allowed`, given the `logits` (vocab) of the position before it and the tokens
    /// so far.
    ///
    /// Logits that are not finite are an error: they come from a damaged file, and no token can be trusted.
    pub fn sample(&mut self, logits: &[f32], tokens: &[u32], position: usize, allowed: Allowed) -> Result<u32> {
        if !all_finite(logits) {
            return Err(Error::invalid(format!("non-finite logits at position {position}: damaged model file?")));
        }
        self.logits.clear();
        // Adding zero turns -0 into 0, so that equal logits have equal bits.
        self.logits.extend(logits.iter().map(|logit| logit + 0.0));
        self.penalize(&tokens[tokens.len().saturating_sub(PENALTY_WINDOW)..]);
        let without = if let Allowed::Without(tokens) = allowed { tokens } else { &[] };
        for &id in self.masked.iter().chain(without) {
            if let Some(logit) = self.logits.get_mut(id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        if let Allowed::Among(bits) = allowed {
            for (id, logit) in self.logits.iter_mut().enumerate() {
                if bits.get(id / 32).is_none_or(|word| word >> (id % 32) & 1 == 0) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }

        let keep = if self.sampling.temperature == 0.0 { 1 } else { self.sampling.top_k };
        largest(&self.logits, keep, &mut self.keys);
        if self.keys.is_empty() {
            return Err(Error::invalid("no token of the vocabulary is allowed here: nothing can be sampled"));
        }
        if self.keys.len() == 1 {
            return Ok(id(self.keys[0]));
        }
        self.cut();
        Ok(self.draw(position))
    }

    /// Repetition penalty on each distinct token of `recent`.
    fn penalize(&mut self, recent: &[u32]) {
        let penalty = self.sampling.repeat_penalty;
        if penalty == 1.0 {
            return;
        }
        for id in recent.iter().collect::<HashSet<_>>() {
            if let Some(logit) = self.logits.get_mut(*id as usize) {
                // A tiny penalty could overflow; the clamp keeps the order and stays finite.
                let scaled = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
                *logit = scaled.clamp(f32::MIN, f32::MAX) + 0.0;
            }
        }
    }

    /// Top-p and min-p: both shorten the sorted list, both at temperature 1.
    fn cut(&mut self) {
        let (top_p, min_p) = (f64::from(self.sampling.top_p), f64::from(self.sampling.min_p));
        self.weigh(1.0);
        let mut kept = self.keys.len();
        if top_p < 1.0 {
            let goal = top_p * self.weights.iter().sum::<f64>();
            let mut sum = 0.0;
            let reached = self.weights.iter().position(|weight| {
                sum += weight;
                sum >= goal
            });
            kept = reached.map_or(kept, |last| last + 1);
        }
        // The first weight is 1, so weights are already relative to the likeliest token.
        kept = self.weights[..kept].iter().position(|&weight| weight < min_p).unwrap_or(kept).max(1);
        self.keys.truncate(kept);
    }

    /// One of the remaining candidates, with probability proportional to `exp(logit / temperature)`.
    fn draw(&mut self, position: usize) -> u32 {
        self.weigh(f64::from(self.sampling.temperature));
        let goal = uniform(self.sampling.seed, position as u64) * self.weights.iter().sum::<f64>();
        let mut sum = 0.0;
        let drawn = self.weights.iter().position(|weight| {
            sum += weight;
            sum > goal
        });
        id(self.keys[drawn.unwrap_or(self.keys.len() - 1)])
    }

    /// Fills `weights` for the candidates: `exp((logit - largest) / temperature)`.
    fn weigh(&mut self, temperature: f64) {
        let largest = f64::from(logit(self.keys[0]));
        let weight = |&key: &u64| libm::exp((f64::from(logit(key)) - largest) / temperature);
        self.weights.clear();
        self.weights.extend(self.keys.iter().map(weight));
    }
}

/// Whether no logit is infinite or NaN.
pub fn all_finite(logits: &[f32]) -> bool {
    // Without an early exit per element the loop vectorises.
    logits.chunks(4096).all(|chunk| chunk.iter().fold(true, |finite, logit| finite & logit.is_finite()))
}

/// The likeliest token; of equally likely ones the lowest id. `None` without logits.
pub fn argmax(logits: &[f32]) -> Option<u32> {
    let mut keys = Vec::new();
    largest(logits, 1, &mut keys);
    keys.first().map(|&key| id(key))
}

/// The log-probabilities of one position.
pub struct LogProbs<'a> {
    logits: &'a [f32],
    /// `ln Σ exp(logit)`.
    log_sum: f64,
}

impl LogProbs<'_> {
    /// Of a row of logits.
    pub fn new(logits: &[f32]) -> LogProbs<'_> {
        let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum: f64 = logits.iter().map(|&logit| libm::exp(f64::from(logit) - largest)).sum();
        LogProbs { logits, log_sum: largest + libm::log(sum) }
    }

    /// That of `token`, in nats.
    pub fn of(&self, token: u32) -> f64 {
        f64::from(self.logits[token as usize]) - self.log_sum
    }

    /// Σ p (ln p − ln q), with `self` as p; rounding can make it a hair negative where both are equal.
    pub fn kl_from(&self, q: &LogProbs) -> f64 {
        let terms = self.logits.iter().zip(q.logits).map(|(&p_logit, &q_logit)| {
            let p = f64::from(p_logit) - self.log_sum;
            libm::exp(p) * (p - (f64::from(q_logit) - q.log_sum))
        });
        terms.sum::<f64>().max(0.0)
    }
}

/// A token and its logit in one integer whose ascending order is: larger logits first, then smaller ids.
fn key(logit: f32, id: u32) -> u64 {
    let bits = logit.to_bits();
    // Flipping the sign bit of positive floats and all bits of negative ones makes their order that of integers.
    let ascending = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
    u64::from(!ascending) << 32 | u64::from(id)
}

fn id(key: u64) -> u32 {
    key as u32
}

fn logit(key: u64) -> f32 {
    let ascending = !((key >> 32) as u32);
    f32::from_bits(if ascending >> 31 == 1 { ascending & !(1 << 31) } else { !ascending })
}

/// Fills `keys` with the `count` largest logits (0: all), sorted, leaving out those at minus infinity.
///
/// Nothing is sorted but the result: candidates are collected in a buffer twice the size, and whenever it is full
/// the worse half is dropped and its best logit becomes the bar for the rest.
fn largest(logits: &[f32], count: usize, keys: &mut Vec<u64>) {
    keys.clear();
    let mut bar = f32::NEG_INFINITY;
    let capacity = if count == 0 { usize::MAX } else { count.saturating_mul(2).max(64) };
    for (chunk, first) in logits.chunks(32).zip((0u32..).step_by(32)) {
        // Ids ascend, so a logit equal to the bar has lost its tie already.
        if !chunk.iter().fold(false, |any, &logit| any | (logit > bar)) {
            continue;
        }
        for (&logit, id) in chunk.iter().zip(first..) {
            if logit > bar {
                keys.push(key(logit, id));
                if keys.len() == capacity {
                    let (_, &mut last, _) = keys.select_nth_unstable(count - 1);
                    keys.truncate(count);
                    bar = self::logit(last);
                }
            }
        }
    }
    keys.sort_unstable();
    if count > 0 {
        keys.truncate(count);
    }
}

/// A number in [0, 1) with 53 random bits for (seed, position).
///
/// The seed is hashed into the start of a Weyl sequence, the position steps along it, and the same hash is taken of
/// where it lands: every position has its number without any before it being drawn.
pub fn uniform(seed: u64, position: u64) -> f64 {
    /// 2^64 divided by the golden ratio: multiples of it are spread as evenly as possible.
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    let start = mix(seed.wrapping_add(STEP));
    let bits = mix(start.wrapping_add(position.wrapping_add(1).wrapping_mul(STEP)));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood, 2014): a bijection under which each input bit flips each
/// output bit about half of the time.
fn mix(x: u64) -> u64 {
    let x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_of_known_distributions() {
        let (even, odd) = ([3.0, 3.0], [0.0, libm::logf(3.0)]); // 1/2 1/2 and 1/4 3/4
        let (p, q) = (LogProbs::new(&even), LogProbs::new(&odd));
        assert!((p.of(0) - 0.5f64.ln()).abs() < 1e-7);
        assert!((q.of(1) - 0.75f64.ln()).abs() < 1e-7);
        let kl = 0.5 * (0.5f64 / 0.25).ln() + 0.5 * (0.5f64 / 0.75).ln();
        assert!((p.kl_from(&q) - kl).abs() < 1e-7, "{}", p.kl_from(&q));
        assert_eq!(p.kl_from(&p), 0.0);
    }
    use proptest::prelude::*;

    fn sampler(sampling: Sampling) -> Sampler {
        Sampler::new(sampling, []).unwrap()
    }

    /// The same rules over a full sort with plain tuples.
    fn naive(sampling: &Sampling, masked: &[u32], logits: &[f32], tokens: &[u32], position: usize) -> u32 {
        let recent = &tokens[tokens.len().saturating_sub(64)..];
        let mut list: Vec<(f32, u32)> = (0u32..)
            .zip(logits)
            .map(|(id, &logit)| match recent.contains(&id) {
                true if logit > 0.0 => (logit / sampling.repeat_penalty, id),
                true => (logit * sampling.repeat_penalty, id),
                false => (logit, id),
            })
            .filter(|(_, id)| !masked.contains(id))
            .collect();
        list.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap().then(a.1.cmp(&b.1)));
        if sampling.temperature == 0.0 {
            return list[0].1;
        }
        if sampling.top_k > 0 {
            list.truncate(sampling.top_k);
        }
        let top = f64::from(list[0].0);
        let weights: Vec<f64> = list.iter().map(|(logit, _)| libm::exp(f64::from(*logit) - top)).collect();
        let total: f64 = weights.iter().sum();
        let (mut sum, mut kept) = (0.0, 0);
        while kept < list.len() && (kept == 0 || sum < f64::from(sampling.top_p) * total || sampling.top_p == 1.0) {
            sum += weights[kept];
            kept += 1;
        }
        list.truncate(kept);
        let mut nth = 0;
        list.retain(|_| {
            nth += 1;
            nth == 1 || weights[nth - 1] >= f64::from(sampling.min_p)
        });
        let weights: Vec<f64> =
            list.iter().map(|(l, _)| libm::exp((f64::from(*l) - top) / f64::from(sampling.temperature))).collect();
        let goal = uniform(sampling.seed, position as u64) * weights.iter().sum::<f64>();
        let mut sum = 0.0;
        for (weight, (_, id)) in weights.iter().zip(&list) {
            sum += weight;
            if sum > goal {
                return *id;
            }
        }
        list.last().unwrap().1
    }

    #[test]
    fn keys_sort_by_logit_then_id_and_round_trip() {
        let logits = [f32::MAX, 3.5, 1e-40, 0.0, -1e-40, -2.0, f32::MIN];
        for pair in logits.windows(2) {
            assert!(key(pair[0], 9) < key(pair[1], 0), "{pair:?}");
        }
        for (id_in, &l) in (0..).zip(&logits) {
            assert_eq!((logit(key(l, id_in)), id(key(l, id_in))), (l, id_in));
        }
        assert!(key(1.0, 3) < key(1.0, 4));
    }

    #[test]
    fn greedy_takes_the_first_of_equal_maxima() {
        let mut greedy = sampler(Sampling { temperature: 0.0, ..Sampling::default() });
        assert_eq!(greedy.sample(&[0.0, 2.0, -1.0, 2.0], &[], 0, Allowed::All).unwrap(), 1);
        assert_eq!(greedy.sample(&[-0.0, 0.0], &[], 0, Allowed::All).unwrap(), 0);
        assert_eq!(argmax(&[]), None);
    }

    #[test]
    fn masked_tokens_are_never_drawn() {
        let mut sampler =
            Sampler::new(Sampling { top_k: 0, top_p: 1.0, ..Sampling::default() }, [1, 1, 70_000]).unwrap();
        for position in 0..1000 {
            assert_ne!(sampler.sample(&[0.0, 9.0, 0.0], &[], position, Allowed::All).unwrap(), 1);
        }
        let mut nothing_left = Sampler::new(Sampling::default(), [0, 1]).unwrap();
        assert_eq!(nothing_left.sample(&[0.0, 1.0], &[], 0, Allowed::All).unwrap_err().exit_code(), 5);
    }

    #[test]
    fn a_draw_can_be_narrowed() {
        let logits: Vec<f32> = (0..70).map(|i| i as f32 / 10.0).collect();
        let mut sampler =
            Sampler::new(Sampling { top_k: 3, top_p: 1.0, temperature: 9.0, ..Sampling::default() }, [68]).unwrap();
        let mut seen = |allowed: Allowed| -> Vec<u32> {
            let drawn: HashSet<u32> = (0..500).map(|p| sampler.sample(&logits, &[], p, allowed).unwrap()).collect();
            let mut drawn: Vec<u32> = drawn.into_iter().collect();
            drawn.sort_unstable();
            drawn
        };
        // Top-k counts what may be drawn.
        assert_eq!(seen(Allowed::All), [66, 67, 69]);
        assert_eq!(seen(Allowed::Without(&[67, 66])), [64, 65, 69]);
        // Bits 1, 31, 33 and 68; words that are missing allow nothing.
        assert_eq!(seen(Allowed::Among(&[1 << 31 | 2, 2, 1 << 4])), [1, 31, 33]);
        assert_eq!(seen(Allowed::Among(&[1])), [0]);
        assert_eq!(sampler.deciding(Allowed::All), Some(4));
        assert_eq!(sampler.deciding(Allowed::Without(&[67, 66])), Some(6));
        assert_eq!(sampler.deciding(Allowed::Among(&[1])), None);
        assert_eq!(sampler.sample(&logits, &[], 0, Allowed::Among(&[])).unwrap_err().exit_code(), 5);
    }

    #[test]
    fn non_finite_logits_name_the_position() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut logits = vec![0.0; 5000];
            logits[4999] = bad;
            let error = sampler(Sampling::default()).sample(&logits, &[], 17, Allowed::All).unwrap_err();
            assert_eq!(error.exit_code(), 5);
            assert_eq!(error.to_string(), "non-finite logits at position 17: damaged model file?");
        }
    }

    #[test]
    fn a_repeated_token_loses_to_its_rival_until_it_leaves_the_window() {
        let sampling = Sampling { temperature: 0.0, repeat_penalty: 1.5, ..Sampling::default() };
        let mut tokens = vec![1];
        assert_eq!(sampler(sampling).sample(&[2.0, 2.5], &tokens, 1, Allowed::All).unwrap(), 0);
        assert_eq!(sampler(sampling).sample(&[-2.0, -1.5], &tokens, 1, Allowed::All).unwrap(), 0);
        tokens.extend([2; PENALTY_WINDOW]);
        assert_eq!(sampler(sampling).sample(&[2.0, 2.5], &tokens, 65, Allowed::All).unwrap(), 1);
    }

    #[test]
    fn parameters_out_of_range_are_named() {
        let bad = [
            (Sampling { temperature: -0.1, ..Default::default() }, "temp: -0.1: expected a number of at least 0"),
            (Sampling { temperature: f32::NAN, ..Default::default() }, "temp: NaN: expected a number of at least 0"),
            (Sampling { top_p: 1.5, ..Default::default() }, "top-p: 1.5: expected a number from 0 to 1"),
            (Sampling { min_p: -1.0, ..Default::default() }, "min-p: -1: expected a number from 0 to 1"),
            (Sampling { repeat_penalty: 0.0, ..Default::default() }, "repeat-penalty: 0: expected a number above 0"),
        ];
        for (sampling, message) in bad {
            assert_eq!(sampling.check().unwrap_err().to_string(), message);
        }
    }

    /// The numbers themselves are part of the promise that one seed gives one text.
    #[test]
    fn random_numbers_are_fixed() {
        let drawn: Vec<u64> = [(0, 0), (0, 1), (1, 0), (u64::MAX, u64::MAX)]
            .map(|(seed, position)| (uniform(seed, position) * (1u64 << 53) as f64) as u64)
            .to_vec();
        // The same arithmetic done with Python's integers.
        assert_eq!(drawn, [5_876_733_520_225_071, 6_315_957_190_297_641, 3_316_356_330_981_164, 2_403_545_779_318_817]);
    }

    #[test]
    fn random_numbers_are_uniform_over_positions_and_seeds() {
        for (name, draw) in [
            ("positions", (|i| uniform(42, i)) as fn(u64) -> f64),
            ("seeds", |i| uniform(i, 7)),
            ("both", |i| uniform(i / 256, i % 256)),
        ] {
            let mut bins = [0.0f64; 64];
            let n = 1 << 16;
            (0..n).for_each(|i| bins[(draw(i) * 64.0) as usize] += 1.0);
            let expected = n as f64 / 64.0;
            let chi2: f64 = bins.iter().map(|bin| (bin - expected).powi(2) / expected).sum();
            // 63 degrees of freedom: 99.99 % of uniform sources stay below 113, and a constant below none.
            assert!((20.0..113.0).contains(&chi2), "{name}: chi square {chi2}");
        }
    }

    #[test]
    fn draws_follow_the_distribution() {
        let logits = [1.0f32, 0.0, 2.0, -1.0];
        for temperature in [0.5f32, 1.0, 2.0] {
            let mut sampler = sampler(Sampling { temperature, top_k: 0, top_p: 1.0, seed: 3, ..Default::default() });
            let n = 40_000;
            let mut counts = [0.0f64; 4];
            for position in 0..n {
                counts[sampler.sample(&logits, &[], position, Allowed::All).unwrap() as usize] += 1.0;
            }
            let weights = logits.map(|logit| libm::exp(f64::from(logit / temperature)));
            let total: f64 = weights.iter().sum();
            let chi2: f64 = counts
                .iter()
                .zip(weights)
                .map(|(count, weight)| (count - n as f64 * weight / total).powi(2) / (n as f64 * weight / total))
                .sum();
            // 3 degrees of freedom, 99.99 %.
            assert!(chi2 < 21.1, "temperature {temperature}: chi square {chi2}");
        }
    }

    #[test]
    fn top_p_keeps_the_fewest_tokens_that_reach_it() {
        // Probabilities 0.5, 0.25, 0.125, ...
        let logits: Vec<f32> = (0..10).map(|i| -(i as f32) * std::f32::consts::LN_2).collect();
        for (top_p, kept) in [(0.0, 1), (0.4, 1), (0.6, 2), (0.8, 3), (0.9, 4), (1.0, 10)] {
            let mut sampler = sampler(Sampling { top_p, top_k: 0, temperature: 50.0, ..Default::default() });
            let seen: HashSet<u32> =
                (0..2000).map(|p| sampler.sample(&logits, &[], p, Allowed::All).unwrap()).collect();
            assert_eq!(seen, (0..kept).collect(), "top-p {top_p}");
        }
    }

    #[test]
    fn min_p_is_relative_to_the_likeliest() {
        let logits: Vec<f32> = (0..10).map(|i| -(i as f32) * std::f32::consts::LN_2).collect();
        for (min_p, kept) in [(0.0, 10), (0.2, 3), (0.3, 2), (0.6, 1), (1.0, 1)] {
            let sampling = Sampling { min_p, top_p: 1.0, top_k: 0, temperature: 50.0, ..Default::default() };
            let mut sampler = sampler(sampling);
            let seen: HashSet<u32> =
                (0..2000).map(|p| sampler.sample(&logits, &[], p, Allowed::All).unwrap()).collect();
            assert_eq!(seen, (0..kept).collect(), "min-p {min_p}");
        }
    }

    #[test]
    fn selection_equals_a_full_sort() {
        // Ascending, descending, constant and scattered logits, at sizes around the chunk length and far above.
        for n in [1usize, 31, 32, 33, 1000, 20_000] {
            let shapes: [Vec<f32>; 4] = [
                (0..n).map(|i| i as f32).collect(),
                (0..n).map(|i| -(i as f32)).collect(),
                vec![1.0; n],
                (0..n).map(|i| (uniform(1, i as u64) * 100.0) as f32).collect(),
            ];
            for logits in shapes {
                let mut sorted: Vec<u64> = logits.iter().zip(0..).map(|(&logit, id)| key(logit, id)).collect();
                sorted.sort();
                for count in [0, 1, 2, 40, 64, n, n + 1] {
                    let mut keys = vec![7];
                    largest(&logits, count, &mut keys);
                    let expected = if count == 0 { n } else { count.min(n) };
                    assert_eq!(keys, sorted[..expected], "{count} of {n}");
                }
            }
        }
    }

    proptest! {
        #[test]
        fn equals_the_naive_sampler(
            logits in prop::collection::vec(prop_oneof![-30.0f32..30.0, Just(0.0f32), Just(5.0)], 2..300),
            tokens in prop::collection::vec(0u32..300, 0..100),
            masked in prop::collection::vec(1u32..300, 0..5),
            temperature in prop_oneof![Just(0.0f32), 0.01f32..5.0, Just(1.0)],
            top_k in 0usize..400,
            top_p in prop_oneof![Just(1.0f32), 0.0f32..1.0],
            min_p in prop_oneof![Just(0.0f32), 0.0f32..=1.0],
            repeat_penalty in prop_oneof![Just(1.0f32), 0.5f32..2.0],
            seed: u64,
            position in 0usize..100_000,
        ) {
            let sampling = Sampling { temperature, top_k, top_p, min_p, repeat_penalty, seed };
            let mut sampler = Sampler::new(sampling, masked.clone()).unwrap();
            let token = sampler.sample(&logits, &tokens, position, Allowed::All).unwrap();
            prop_assert_eq!(token, naive(&sampling, &masked, &logits, &tokens, position));
            prop_assert_eq!(token, sampler.sample(&logits, &tokens, position, Allowed::All).unwrap());
        }
    }
}
