//! Speed of every kernel this CPU can run, in weights a second: one token (decode) and 64 tokens (prompt), with
//! weights that stay in the second-level cache. `cargo bench -p gemrun-simd --bench kernels -- q4_0` picks some.

use std::time::Duration;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use gemrun_simd::{ActsBuf, Isa, KERNELS, Tile, ops};

#[path = "../tests/common/mod.rs"]
mod common;
use common::{Rng, weights};

/// Columns of most matrices of the smallest model.
const COLS: usize = 1536;
/// Bytes of weights: more than a first-level cache, less than a second-level one.
const BYTES: usize = 200_000;

fn kernels(c: &mut Criterion) {
    let mut rng = Rng(1);
    for tokens in [1, 64] {
        let mut group = c.benchmark_group(format!("{tokens} tokens"));
        group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(600));
        for kernel in KERNELS.iter().filter(|k| k.supported()) {
            let rows = BYTES / kernel.format().row_bytes(COLS).expect("whole blocks") / 8 * 8;
            let w = weights(kernel.format(), rows, COLS, &mut rng, Rng::byte);
            let x: Vec<f32> = (0..tokens * COLS).map(|_| rng.unit()).collect();
            let mut buf = ActsBuf::default();
            let x = buf.quantize(ops(Isa::best()), &x, COLS);
            let mut out = vec![0.0; tokens * rows];
            group.throughput(Throughput::Elements((rows * COLS * tokens) as u64));
            group.bench_function(BenchmarkId::from_parameter(kernel.name()), |b| {
                b.iter(|| kernel.matmul((&w[..]).into(), &x, &mut Tile::whole(&mut out, rows)));
            });
        }
        group.finish();
    }
}

criterion_group!(benches, kernels);
criterion_main!(benches);
