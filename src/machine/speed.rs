//! Measured speed of memory and arithmetic: ceilings of generation, which reads every weight once a token, and of prompts,
//! which multiply each with many tokens.
//!
//! The one idea: all threads of a team do nothing but read a buffer too large for the caches, or nothing but multiply
//! (`gemrun_simd::measure`). Parts are claimed like tiles of a matrix, so slow cores and busy machines do fewer of them. Of
//! several passes the fastest counts: others on the machine can only take away.

use std::collections::BTreeMap;
use std::hint::black_box;
use std::path::Path;
use std::time::{Duration, Instant};

use gemrun_simd::Isa;
use gemrun_simd::measure::{self, Line};
use serde::{Deserialize, Serialize};

use super::Root;
use crate::Result;
use crate::team::Team;

/// Bytes of the buffer, unless caches are larger or memory is small.
const BUFFER: u64 = 256 << 20;
/// Lines of a part: 4 MB, so that starting is nothing beside reading.
const PART: usize = (4 << 20) / size_of::<Line>();

/// Memory to read from: pages of its own for every byte.
pub struct Buffer(Vec<Line>);

impl Buffer {
    /// A buffer several times as large as the last cache, but not more than a quarter of `available` bytes.
    pub fn new(root: &Root, available: Option<u64>) -> Buffer {
        let caches = root.numbered("sys/devices/system/cpu/cpu0/cache", "index");
        let size = |index: String| kilobytes(&root.line(format!("sys/devices/system/cpu/cpu0/cache/{index}/size"))?);
        let largest = caches.into_iter().filter_map(size).max().unwrap_or(0);
        let bytes = BUFFER.max(4 * largest).min(1 << 30).min(available.map_or(BUFFER / 4, |available| available / 4));
        // Not zero: pages of zeros that nobody has written to are all the same page.
        Buffer(vec![[0x0101_0101_0101_0101; 8]; bytes as usize / size_of::<Line>()])
    }

    /// Its length in bytes.
    pub fn bytes(&self) -> usize {
        self.0.len() * size_of::<Line>()
    }

    /// Bytes a second that `threads` threads read from it together, at best, in passes for `time` altogether.
    ///
    /// # Errors
    /// If there are no such threads.
    pub fn read_bandwidth(&self, threads: usize, time: Duration) -> Result<f64> {
        let parts: Vec<&[Line]> = self.0.chunks(PART).collect();
        let mut best = f64::INFINITY;
        for way in measure::WAYS {
            let read = |part: usize| _ = black_box(measure::read(parts[part], way));
            best = best.min(fastest(threads, time / measure::WAYS.len() as u32, parts.len(), &read)?);
        }
        Ok(self.bytes() as f64 / best)
    }
}

/// Bandwidths that were measured before, in a file of the store.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The processor they were measured on.
    cpu: String,
    /// Bytes a second, by the number of threads.
    read: BTreeMap<usize, f64>,
}

impl Measured {
    const FILE: &str = "bandwidth.json";

    /// What is known of this computer's processor; `None` where nothing is, or the file is another's or makes no sense.
    pub fn load(home: &Path) -> Option<Measured> {
        let text = std::fs::read_to_string(home.join(Measured::FILE)).ok()?;
        let measured: Measured = serde_json::from_str(&text).ok()?;
        (measured.cpu == processor()).then_some(measured)
    }

    /// Remembers `speeds`, (threads, bytes a second), beside what is known: the fastest counts, a busy machine only takes away.
    /// That it cannot be written is no error: it is measured again.
    pub fn save(home: &Path, speeds: &[(usize, f64)]) {
        let mut measured = Measured::load(home).unwrap_or(Measured { cpu: processor(), read: BTreeMap::new() });
        for (threads, speed) in speeds {
            let best = measured.read.entry(*threads).or_default();
            *best = best.max(*speed);
        }
        if let Ok(text) = serde_json::to_string(&measured)
            && home.is_dir()
        {
            let _ = std::fs::write(home.join(Measured::FILE), text);
        }
    }

    /// Bytes a second with `threads` threads.
    pub fn read(&self, threads: usize) -> Option<f64> {
        self.read.get(&threads).copied().filter(|speed| *speed > 0.0)
    }
}

/// The processor's name and its best instruction set: generations of one maker's servers may share a name.
fn processor() -> String {
    format!("{}, {}", super::cpu_name(), Isa::best().name())
}

/// Products of bytes that `threads` threads multiply and add in a second, at best, in passes for `time` altogether; `None`
/// where it is not known how to measure an ISA.
///
/// # Errors
/// If there are no such threads.
///
/// # Panics
/// If this CPU lacks the ISA.
pub fn int8_products(isa: Isa, threads: usize, time: Duration) -> Result<Option<f64>> {
    /// A part takes some ten microseconds.
    const ROUNDS: usize = 10_000;
    let Some(products) = measure::int8(isa, ROUNDS) else { return Ok(None) };
    let parts = 64 * threads;
    let seconds = fastest(threads, time, parts, &|_| {
        measure::int8(isa, ROUNDS);
    })?;
    Ok(Some(products as f64 * parts as f64 / seconds))
}

/// Seconds of the fastest of several passes, each of `parts` parts.
fn fastest(threads: usize, time: Duration, parts: usize, part: &(dyn Fn(usize) + Sync)) -> Result<f64> {
    let mut best = f64::INFINITY;
    Team::new(threads)?.enter(|team| {
        let start = Instant::now();
        // The first pass wakes the threads and is not counted.
        for pass in 0.. {
            let pass_start = Instant::now();
            team.run(parts, part);
            if pass > 0 {
                best = best.min(pass_start.elapsed().as_secs_f64());
            }
            if pass > 1 && start.elapsed() > time {
                break;
            }
        }
    });
    Ok(best.max(1e-9))
}

/// `512K`, `32M` in bytes.
fn kilobytes(text: &str) -> Option<u64> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let scale = match unit {
        "K" => 1 << 10,
        "M" => 1 << 20,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_caches() {
        assert_eq!(
            (kilobytes("512K"), kilobytes("32M"), kilobytes("x"), kilobytes("")),
            (Some(524_288), Some(32 << 20), None, None)
        );
    }

    #[test]
    fn bandwidth_is_measured() {
        let root = tempfile::tempdir().unwrap();
        let buffer = Buffer::new(&Root::at(root.path()), Some(64 << 20));
        assert_eq!(buffer.bytes(), 16 << 20);
        for threads in [1, 2] {
            let speed = buffer.read_bandwidth(threads, Duration::ZERO).unwrap();
            assert!((1e6..1e13).contains(&speed), "{speed}");
        }
        assert!(buffer.read_bandwidth(0, Duration::ZERO).is_err());
    }

    #[test]
    fn what_was_measured_is_remembered() {
        let home = tempfile::tempdir().unwrap();
        assert_eq!(Measured::load(home.path()), None);
        Measured::save(home.path(), &[(1, 9e9), (2, 15e9)]);
        Measured::save(home.path(), &[(1, 8e9), (2, 16e9)]);
        let measured = Measured::load(home.path()).unwrap();
        assert_eq!([1, 2, 3].map(|threads| measured.read(threads)), [Some(9e9), Some(16e9), None]);
        std::fs::write(home.path().join(Measured::FILE), r#"{"cpu":"another","read":{"1":5}}"#).unwrap();
        assert_eq!(Measured::load(home.path()), None);
        Measured::save(Path::new("/nonexistent"), &[(1, 1.0)]);
    }

    #[test]
    fn arithmetic_is_measured() {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
            let speed = int8_products(isa, 2, Duration::ZERO).unwrap();
            assert_eq!(speed.is_some(), measure::int8(isa, 1).is_some());
            assert!(speed.is_none_or(|speed| (1e7..1e15).contains(&speed)), "{speed:?}");
        }
    }
}
