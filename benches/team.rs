//! What sharing a region of work out costs: `Team` with many chunks claimed from a counter, the same with one equal part
//! for each thread, and rayon's parallel iterator, entered from outside (as a library would) and from inside its pool.
//!
//! A region is so much work in all, whatever the number of threads; less its share of a thread, the time is overhead.
//! `cargo bench --bench team`

use std::hint::black_box;
use std::time::Instant;

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use gemrun::team::Team;
use rayon::prelude::*;

/// Chunks of a region where they are claimed.
const CHUNKS: usize = 32;

/// Work of a known length that no compiler removes.
fn work(steps: usize) {
    let mut x = 1.0f32;
    for _ in 0..steps {
        x = black_box(x).mul_add(0.999, 0.5);
    }
    black_box(x);
}

fn regions(c: &mut Criterion) {
    let most = std::thread::available_parallelism().map_or(1, usize::from);
    for (name, steps) in [("empty", 0), ("short", 8 << 10), ("long", 128 << 10)] {
        let mut group = c.benchmark_group(format!("region/{name}"));
        for threads in [1, 2, 4, 8].into_iter().filter(|&threads| threads <= most.max(2)) {
            Team::new(threads).unwrap().enter(|team| {
                let each = |chunks: usize| move |_: usize| work(steps / chunks);
                group.bench_function(BenchmarkId::new("claimed", threads), |b| {
                    b.iter(|| team.run(CHUNKS, &each(CHUNKS)));
                });
                group.bench_function(BenchmarkId::new("equal parts", threads), |b| {
                    b.iter(|| team.run(threads, &each(threads)));
                });
            });
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let each = || (0..CHUNKS).into_par_iter().with_max_len(1).for_each(|_| work(steps / CHUNKS));
            group.bench_function(BenchmarkId::new("rayon from outside", threads), |b| b.iter(|| pool.install(each)));
            group.bench_function(BenchmarkId::new("rayon from inside", threads), |b| {
                b.iter_custom(|n| {
                    pool.install(|| {
                        let start = Instant::now();
                        (0..n).for_each(|_| each());
                        start.elapsed()
                    })
                });
            });
        }
        group.finish();
    }
}

criterion_group!(benches, regions);
criterion_main!(benches);
