//! The worker threads, and the only place that starts any.
//!
//! One driver walks the layers and owns every buffer; the rows of a big matrix product or the heads of attention fan
//! out through [`Team::run`], which hands out chunk numbers from one counter. Claiming, instead of an equal split, is
//! what makes slow cores and busy machines harmless: a fast thread simply takes more chunks. Which thread computes a
//! chunk never changes its bits.
//!
//! ```text
//! driver:  enter ─► run: publish job, open ─► claim chunks ─► close ─► wait until no one is inside ─► … ─► leave
//! helper:  spin ──► see open ─► step inside ─► still open? claim chunks ─► step outside ─► spin (then park) …
//! ```
//!
//! Helpers are awake only inside [`Team::enter`], which is called once per reply: at the prompt they use no CPU.
//! This file knows nothing of matrices or models.

use std::any::Any;
use std::cell::UnsafeCell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

use gemrun_simd::{ActsMut, Tile, Tiles};

use crate::{Error, Kind, Result};

/// More threads than any board or laptop has cores; a typing error above it is refused.
pub const MAX_THREADS: usize = 256;

/// Polls of the gate before a waiting helper offers its core to others, and before it sleeps: a region follows
/// another within microseconds while a reply is computed, so a helper that sleeps at once would pay a wake-up each time.
const SPINS_BEFORE_YIELD: u32 = 2_000;
const YIELDS_BEFORE_PARK: u32 = 200;

/// A driver and `threads - 1` helpers.
pub struct Team {
    threads: usize,
    /// Where helpers live; absent with one thread.
    pool: Option<rayon::ThreadPool>,
    gate: Gate,
}

type Job<'a> = dyn Fn(usize) + Sync + 'a;

/// What driver and helpers share about the region in progress.
struct Gate {
    /// Odd while a region is open. Even in between.
    epoch: AtomicUsize,
    /// Helpers that may be looking at `job`.
    inside: AtomicUsize,
    /// The next chunk to claim, and how many there are.
    next: AtomicUsize,
    chunks: AtomicUsize,
    /// The region's job. Written by the driver only while the gate is closed and nobody is inside.
    job: UnsafeCell<Option<*const Job<'static>>>,
    /// Set when the reply is over: helpers go home.
    dismissed: AtomicBool,
    /// The first panic of a helper, passed on to the driver.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Sleeping helpers wait here; `asleep` counts them so that the driver rings only when somebody sleeps.
    asleep: AtomicUsize,
    bed: Mutex<()>,
    bell: Condvar,
}

// SAFETY: `job` is the only field that is not Sync by itself. It is written by the driver alone, between regions,
// when `inside` is zero and the epoch is even; helpers read it only after they counted themselves into `inside` and
// saw the epoch odd, and the driver waits for `inside` to return to zero before it writes again.
unsafe impl Sync for Gate {}
// SAFETY: the raw pointer in `job` is dereferenced only within the region it was published for.
unsafe impl Send for Gate {}

impl Team {
    /// A team of `threads` including the calling thread.
    pub fn new(threads: usize) -> Result<Team> {
        if !(1..=MAX_THREADS).contains(&threads) {
            return Err(Error::usage(format!("threads: {threads}: expected 1 to {MAX_THREADS}")));
        }
        let pool = match threads {
            1 => None,
            _ => {
                let builder = rayon::ThreadPoolBuilder::new().num_threads(threads - 1);
                let pool = builder.thread_name(|i| format!("team-{}", i + 1)).build();
                Some(pool.map_err(|e| Error::new(Kind::Other, format!("cannot start {threads} threads: {e}")))?)
            }
        };
        let gate = Gate {
            epoch: AtomicUsize::new(0),
            inside: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            chunks: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            dismissed: AtomicBool::new(true),
            panic: Mutex::new(None),
            asleep: AtomicUsize::new(0),
            bed: Mutex::new(()),
            bell: Condvar::new(),
        };
        Ok(Team { threads, pool, gate })
    }

    /// Threads of this team, the driver included.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Runs `f` on the calling thread with the helpers awake. Takes the team by `&mut`, so there is one driver.
    pub fn enter<R>(&mut self, f: impl FnOnce(&Team) -> R) -> R {
        let Some(pool) = &self.pool else { return f(self) };
        let team = &*self;
        team.gate.dismissed.store(false, Ordering::SeqCst);
        pool.in_place_scope(|scope| {
            for _ in 1..team.threads {
                scope.spawn(|_| team.gate.help());
            }
            // Also on a panic of `f`: the scope would otherwise wait for helpers for ever.
            let _dismiss = Dismiss(&team.gate);
            f(team)
        })
    }

    /// Calls `f(0)`, `f(1)`, … `f(chunks - 1)`, each once, in any order and on any thread of the team; returns when all are
    /// done. Outside of [`Team::enter`] everything runs on the calling thread.
    pub fn run(&self, chunks: usize, f: &Job<'_>) {
        if chunks <= 1 || self.gate.dismissed.load(Ordering::Relaxed) {
            (0..chunks).for_each(f);
            return;
        }
        self.gate.run(chunks, f);
    }

    /// Splits each matrix of `outs` — (values, row length) — by columns, at multiples of `unit`, and calls `f(which matrix,
    /// columns, tile)` for each tile; the tiles of all matrices form one region.
    ///
    /// Whoever begins a tile waits for memory once, so they are as large as they can be: the first of each thread has half of what
    /// would be its equal share, the next half of what is left, and so on, down to some `least` units.
    pub fn tiles<const N: usize>(
        &self,
        outs: [(&mut [f32], usize); N],
        unit: usize,
        least: usize,
        f: impl Fn(usize, Range<usize>, Tile<'_>) + Sync,
    ) {
        // All matrices lie on one line of units.
        let mut units = 0;
        let matrices = outs.map(|(out, row)| {
            let first = units;
            units += if out.is_empty() { 0 } else { row.div_ceil(unit) };
            (first..units, Tiles::new(out, row))
        });
        let halvings = Halvings::new(units, self.threads, least);
        self.run(halvings.parts(), &|part| {
            let part = halvings.part(part);
            for (which, (here, tiles)) in matrices.iter().enumerate() {
                let (start, end) = (part.start.max(here.start), part.end.min(here.end));
                if start < end {
                    let columns = unit * (start - here.start)..(unit * (end - here.start)).min(tiles.rows());
                    // SAFETY: every part is handed out once, and they cover disjoint columns of a matrix.
                    let tile = unsafe { tiles.tile(columns.clone()) };
                    f(which, columns, tile);
                }
            }
        });
    }

    /// Splits `out`, a matrix of lines of `row` values, into rectangles of at most `height` lines and `width` columns and calls
    /// `f(lines, columns, rectangle)` for each, as one region.
    pub fn grid(
        &self,
        out: &mut [f32],
        row: usize,
        height: usize,
        width: usize,
        f: impl Fn(Range<usize>, Range<usize>, Tile<'_>) + Sync,
    ) {
        let matrix = Tiles::new(out, row);
        let (down, across) = (matrix.tokens().div_ceil(height), row.div_ceil(width));
        self.run(down * across, &|chunk| {
            let (top, left) = (chunk / across * height, chunk % across * width);
            let (lines, columns) = (top..(top + height).min(matrix.tokens()), left..(left + width).min(row));
            // SAFETY: every chunk number is handed out once, and the rectangles are disjoint.
            let tile = unsafe { matrix.part(lines.clone(), columns.clone()) };
            f(lines, columns, tile);
        });
    }

    /// Shares `units` units of work out in consecutive parts of at least `least` units: calls `f(units of the part, its piece of
    /// `pieces`)` for each, as one region.
    pub fn share<S: Split>(&self, units: usize, least: usize, pieces: S, f: impl Fn(Range<usize>, S) + Sync) {
        /// More parts than this would not balance better on any number of threads that has so little to do.
        const MOST: usize = 64;
        let parts = (units / least.max(1)).min(4 * self.threads).clamp(1, MOST);
        if parts == 1 || self.threads == 1 {
            f(0..units, pieces);
            return;
        }
        let start = |part: usize| part * units / parts;
        let mut rest = Some(pieces);
        let pieces: [Mutex<Option<S>>; MOST] = std::array::from_fn(|part| {
            let piece = match rest.take() {
                Some(all) if part + 1 < parts => {
                    let (piece, others) = all.split_at(start(part + 1) - start(part));
                    rest = Some(others);
                    Some(piece)
                }
                last => last,
            };
            Mutex::new(piece)
        });
        self.run(parts, &|part| {
            let piece = pieces[part].lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(piece) = piece {
                f(start(part)..start(part + 1), piece);
            }
        });
    }
}

/// Work cut into parts that become smaller: round after round as many as there are threads, together half of what is left. As many
/// slow cores as fast ones, which take three times as long, are done with their first parts when all is done.
struct Halvings {
    units: usize,
    threads: usize,
    rounds: usize,
}

impl Halvings {
    /// Parts of about `least` units in the end; one thread takes all at once.
    fn new(units: usize, threads: usize, least: usize) -> Halvings {
        let share = units / threads / least.max(1);
        let rounds = if threads == 1 || share == 0 { 1 } else { 1 + share.ilog2() as usize };
        Halvings { units, threads, rounds }
    }

    fn parts(&self) -> usize {
        if self.rounds == 1 { self.units.min(self.threads) } else { self.rounds * self.threads }
    }

    /// The units of a part.
    fn part(&self, part: usize) -> Range<usize> {
        let (round, i) = (part / self.threads, part % self.threads);
        let after = |rounds: usize| if rounds == self.rounds { 0 } else { self.units >> rounds };
        let (left, left_then) = (after(round), after(round + 1));
        let (start, n) = (self.units - left, left - left_then);
        let parts = self.parts().min(self.threads);
        start + n * i / parts..start + n * (i + 1) / parts
    }
}

/// What [`Team::share`] can cut in pieces.
pub trait Split: Sized + Send {
    /// The first `units` units, and the others.
    fn split_at(self, units: usize) -> (Self, Self);
}

/// Lines of a matrix: its values, and how many a line has.
pub struct Lines<'a>(pub &'a mut [f32], pub usize);

impl Split for Lines<'_> {
    fn split_at(self, units: usize) -> (Self, Self) {
        let (first, others) = self.0.split_at_mut(units * self.1);
        (Lines(first, self.1), Lines(others, self.1))
    }
}

impl Split for ActsMut<'_> {
    fn split_at(self, units: usize) -> (Self, Self) {
        ActsMut::split_at(self, units)
    }
}

impl<A: Split, B: Split> Split for (A, B) {
    fn split_at(self, units: usize) -> (Self, Self) {
        let ((a, others_a), (b, others_b)) = (self.0.split_at(units), self.1.split_at(units));
        ((a, b), (others_a, others_b))
    }
}

struct Dismiss<'a>(&'a Gate);

impl Drop for Dismiss<'_> {
    fn drop(&mut self) {
        self.0.dismissed.store(true, Ordering::SeqCst);
        self.0.ring();
    }
}

impl Gate {
    fn run(&self, chunks: usize, f: &Job<'_>) {
        let job: *const Job<'_> = f;
        // SAFETY: only the lifetime changes. The pointer is used by helpers that are `inside`, and this function does
        // not return before `inside` is zero with the gate closed.
        let job: *const Job<'static> = unsafe { std::mem::transmute(job) };
        // SAFETY: the gate is closed and nobody is inside, see the impl of Sync.
        unsafe { *self.job.get() = Some(job) };
        self.next.store(0, Ordering::Relaxed);
        self.chunks.store(chunks, Ordering::Relaxed);
        self.epoch.fetch_add(1, Ordering::SeqCst); // open
        if self.asleep.load(Ordering::SeqCst) > 0 {
            self.ring();
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| self.claim(chunks, f)));
        self.next.store(chunks, Ordering::Relaxed); // after a panic nobody claims more
        self.epoch.fetch_add(1, Ordering::SeqCst); // close
        let mut polls = 0;
        while self.inside.load(Ordering::SeqCst) != 0 {
            polls += 1;
            if polls < SPINS_BEFORE_YIELD { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        if let Err(panic) = outcome {
            resume_unwind(panic);
        }
        let panic = self.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    fn claim(&self, chunks: usize, f: &Job<'_>) {
        loop {
            let chunk = self.next.fetch_add(1, Ordering::Relaxed);
            if chunk >= chunks {
                return;
            }
            f(chunk);
        }
    }

    /// A helper's life during one reply.
    fn help(&self) {
        let mut done = 0; // the last epoch worked on
        let mut polls = 0_u32;
        loop {
            let epoch = self.epoch.load(Ordering::SeqCst);
            if epoch % 2 == 1 && epoch != done {
                self.inside.fetch_add(1, Ordering::SeqCst);
                // Either the driver sees this helper inside and waits for it, or this helper sees the gate closed.
                if self.epoch.load(Ordering::SeqCst) == epoch {
                    self.work();
                }
                self.inside.fetch_sub(1, Ordering::SeqCst);
                (done, polls) = (epoch, 0);
            } else if self.dismissed.load(Ordering::SeqCst) {
                return;
            } else {
                polls += 1;
                if polls < SPINS_BEFORE_YIELD {
                    std::hint::spin_loop();
                } else if polls < SPINS_BEFORE_YIELD + YIELDS_BEFORE_PARK {
                    std::thread::yield_now();
                } else {
                    self.sleep(epoch);
                    polls = 0;
                }
            }
        }
    }

    fn work(&self) {
        // SAFETY: this helper is inside an open region, so the driver neither writes `job` nor lets it dangle.
        let job = unsafe { *self.job.get() };
        let Some(job) = job else { return };
        let chunks = self.chunks.load(Ordering::Relaxed);
        // SAFETY: as above; the closure is Sync.
        let f = unsafe { &*job };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| self.claim(chunks, f))) {
            self.next.store(chunks, Ordering::Relaxed);
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
    }

    /// Sleeps until the epoch moves on from `seen` or the team is dismissed.
    fn sleep(&self, seen: usize) {
        let mut bed = self.bed.lock().unwrap_or_else(PoisonError::into_inner);
        self.asleep.fetch_add(1, Ordering::SeqCst);
        while self.epoch.load(Ordering::SeqCst) == seen && !self.dismissed.load(Ordering::SeqCst) {
            bed = self.bell.wait(bed).unwrap_or_else(PoisonError::into_inner);
        }
        self.asleep.fetch_sub(1, Ordering::SeqCst);
    }

    fn ring(&self) {
        drop(self.bed.lock().unwrap_or_else(PoisonError::into_inner));
        self.bell.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_chunk_runs_once_on_any_number_of_threads() {
        // An interpreter takes its time.
        let (rounds, runs) = if cfg!(miri) { (3, 3) } else { (20, 50) };
        for threads in [1, 2, 3, 8] {
            let mut team = Team::new(threads).unwrap();
            for round in 0..rounds {
                let counts: Vec<_> = (0..round * 7).map(|_| AtomicUsize::new(0)).collect();
                team.enter(|team| {
                    for _ in 0..runs {
                        team.run(counts.len(), &|i| {
                            counts[i].fetch_add(1, Ordering::Relaxed);
                        });
                    }
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == runs), "{threads} threads, round {round}");
            }
        }
    }

    #[test]
    fn a_helper_that_slept_is_woken() {
        let mut team = Team::new(2).unwrap();
        team.enter(|team| {
            for _ in 0..3 {
                std::thread::sleep(std::time::Duration::from_millis(30));
                let hits = AtomicUsize::new(0);
                team.run(64, &|_| {
                    hits.fetch_add(1, Ordering::Relaxed);
                });
                assert_eq!(hits.into_inner(), 64);
            }
        });
    }

    #[test]
    fn a_panic_in_a_chunk_reaches_the_driver_and_the_team_lives_on() {
        let mut team = Team::new(3).unwrap();
        let caught = catch_unwind(AssertUnwindSafe(|| {
            team.enter(|team| team.run(100, &|i| assert_ne!(i, 57, "chunk")));
        }));
        assert!(caught.is_err());
        let hits = AtomicUsize::new(0);
        team.enter(|team| {
            team.run(100, &|_| {
                hits.fetch_add(1, Ordering::Relaxed);
            });
        });
        assert_eq!(hits.into_inner(), 100);
    }

    #[test]
    fn tiles_cover_every_column_of_every_matrix_once() {
        for (threads, unit, least) in [(1, 4, 1), (2, 4, 1), (2, 1, 2), (3, 16, 1), (5, 1, 1)] {
            let mut team = Team::new(threads).unwrap();
            let (mut a, mut b, mut none) = (vec![0.0; 3 * 10], vec![0.0; 2 * 7], []);
            team.enter(|team| {
                let outs = [(&mut a[..], 10), (&mut none[..], 5), (&mut b[..], 7)];
                team.tiles(outs, unit, least, |which, columns, mut tile| {
                    assert!(columns.start % unit == 0 && tile.rows() == columns.len());
                    for t in 0..[3, 0, 2][which] {
                        for (value, column) in tile.row(t).iter_mut().zip(columns.clone()) {
                            *value += (100 * which + 10 * t + column) as f32;
                        }
                    }
                });
            });
            for t in 0..3 {
                (0..10).for_each(|c| assert_eq!(a[t * 10 + c], (10 * t + c) as f32));
            }
            for t in 0..2 {
                (0..7).for_each(|c| assert_eq!(b[t * 7 + c], (200 + 10 * t + c) as f32));
            }
        }
    }

    #[test]
    fn halvings_cover_every_unit_once_and_become_smaller() {
        for threads in [1, 2, 3, 8, 256] {
            for (units, least) in [(0, 1), (1, 1), (7, 2), (160, 1), (160, 20), (16_384, 4), (1_000_003, 64)] {
                let halvings = Halvings::new(units, threads, least);
                let parts: Vec<_> = (0..halvings.parts()).map(|part| halvings.part(part)).collect();
                let ends = parts.iter().fold(0, |at, part| {
                    assert_eq!(part.start, at, "{units} units, {threads} threads, {parts:?}");
                    part.end
                });
                assert_eq!(ends, units);
                // Cuts lie at whole units, and the last round is as large as the one before it.
                assert!(parts.iter().zip(parts.iter().skip(threads)).all(|(a, b)| b.len() <= a.len() + 1), "{parts:?}");
                assert!(parts.len() <= threads || parts.last().unwrap().len() < 2 * least + 2, "{parts:?}");
            }
        }
    }

    /// When the last of cores of such speeds is done, if each claims a part as soon as it can; 1 would be ideal.
    fn longest(halvings: &Halvings, speeds: &[f64]) -> f64 {
        let mut busy_until = vec![0.0; speeds.len()];
        for part in 0..halvings.parts() {
            let next = (0..speeds.len()).min_by(|&a, &b| f64::total_cmp(&busy_until[a], &busy_until[b])).unwrap();
            busy_until[next] += halvings.part(part).len() as f64 / speeds[next];
        }
        let ideal = halvings.units as f64 / speeds.iter().sum::<f64>();
        busy_until.into_iter().fold(0.0, f64::max) / ideal
    }

    #[test]
    fn slow_and_busy_cores_are_not_waited_for() {
        for (speeds, most) in [
            (&[1.0, 1.0][..], 1.001),
            (&[1.0, 0.5], 1.02),
            (&[1.0, 1.0, 1.0, 0.45], 1.02),
            (&[1.0, 1.0, 1.0, 1.0, 0.34, 0.34, 0.34, 0.34], 1.03),
            (&[0.34, 0.34, 0.34, 0.34, 1.0, 1.0, 1.0, 1.0], 1.03),
            (&[1.0, 1.0, 0.34, 0.34, 0.34, 0.34, 0.34, 0.34], 1.03),
        ] {
            let longest = longest(&Halvings::new(12_288, speeds.len(), 20), speeds);
            assert!(longest < most, "{speeds:?}: {longest}");
        }
    }

    #[test]
    fn every_unit_is_shared_out_once() {
        for threads in [1, 2, 5] {
            let mut team = Team::new(threads).unwrap();
            for (units, least) in [(0, 1), (1, 1), (7, 1), (7, 3), (100, 8), (1000, 1)] {
                let (mut a, mut b) = (vec![0.0; units * 3], vec![0.0; units]);
                team.enter(|team| {
                    team.share(
                        units,
                        least,
                        (Lines(&mut a, 3), Lines(&mut b, 1)),
                        |range, (Lines(a, _), Lines(b, _))| {
                            assert!(
                                range.len() >= least.min(units) && a.len() == 3 * b.len() && b.len() == range.len()
                            );
                            for ((a, b), unit) in a.chunks_exact_mut(3).zip(b).zip(range) {
                                a.iter_mut().for_each(|a| *a += unit as f32);
                                *b += unit as f32;
                            }
                        },
                    );
                });
                assert!((0..3 * units).all(|i| a[i] == (i / 3) as f32), "{threads} threads, {units} units");
                assert!((0..units).all(|i| b[i] == i as f32), "{threads} threads, {units} units");
            }
        }
    }

    #[test]
    fn a_grid_covers_every_value_once() {
        let mut team = Team::new(2).unwrap();
        for (lines, row, height, width) in [(5, 10, 2, 4), (1, 7, 3, 7), (9, 1, 9, 1), (0, 3, 1, 1)] {
            let mut out = vec![0.0; lines * row];
            team.enter(|team| {
                team.grid(&mut out, row, height, width, |lines, columns, mut tile| {
                    for (i, line) in lines.clone().enumerate() {
                        assert_eq!(tile.row(i).len(), columns.len());
                        tile.row(i).iter_mut().zip(columns.clone()).for_each(|(v, c)| *v += (line * row + c) as f32);
                    }
                });
            });
            assert!(out.iter().enumerate().all(|(i, v)| *v == i as f32), "{lines} x {row}");
        }
    }

    #[test]
    fn thread_counts_are_checked() {
        assert!(Team::new(0).is_err() && Team::new(MAX_THREADS + 1).is_err());
    }
}
