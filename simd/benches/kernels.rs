//! Speed of every kernel this CPU can run, beside what the CPU could do at best. Pick some by name:
//! `cargo bench -p gemrun-simd --bench kernels -- 'memory.*q4_0'`.
//!
//! *cache*: one token and 64 tokens, weights that stay in the second-level cache, in weights times tokens a second.
//! *prompt*: 64 tokens, a matrix of 12288 rows of 1536, in multiply-adds a second; `peak` is the ISA's int8 arithmetic in
//! registers. *memory*: one token, 256 MB of weights, matrices of as many rows, in bytes a second, on one and on two threads, and as a
//! share of `read`: as many bytes read just before and nothing else, in the faster of several ways. Criterion measures one after
//! another: on a busy machine repeat, and compare ratios.

use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use gemrun_simd::{Acts, ActsBuf, Format, Isa, KERNELS, Kernel, Layout, Rows, Tile, measure, ops};

#[path = "../tests/common/mod.rs"]
mod common;
use common::{Rng, weights};

/// Columns of most matrices of the smallest model.
const COLS: usize = 1536;

/// Rows of its largest ones but for the embeddings.
const ROWS: usize = 12_288;

/// Formats of the files people have; the others are measured in the cache only.
const HOT: [Format; 9] = [
    Format::Q4_0,
    Format::Q8_0,
    Format::Q6K,
    Format::Q4K,
    Format::Q5K,
    Format::F16,
    Format::W2C,
    Format::W4C,
    Format::W8C,
];

fn supported() -> impl Iterator<Item = &'static dyn Kernel> {
    KERNELS.iter().copied().filter(|k| k.supported())
}

/// Those of [`HOT`] formats with vectors.
fn hot() -> impl Iterator<Item = &'static dyn Kernel> {
    supported().filter(|k| HOT.contains(&k.format()) && k.isa() != Isa::Scalar)
}

/// Rows of weights in a kernel's order of bytes, and activations for them.
struct Product {
    kernel: &'static dyn Kernel,
    bytes: Vec<u8>,
    /// Where in `bytes` they start: with a cache line, as in a file.
    start: usize,
    scale: Vec<f32>,
    x: Vec<f32>,
    buf: ActsBuf,
}

impl Product {
    fn new(kernel: &'static dyn Kernel, rows: usize, tokens: usize, rng: &mut Rng) -> Product {
        let format = kernel.format();
        // A few rows over and over: random numbers for all of them would take longer than the measurement.
        let few = weights(format, rows.min(512), COLS, rng, Rng::byte);
        let mut bytes = few.repeat(rows.div_ceil(512));
        bytes.truncate(rows * format.row_bytes(COLS).expect("whole blocks"));
        if kernel.layout() == Layout::Interleaved {
            let eight = 8 * bytes.len() / rows;
            let from = bytes.clone();
            let groups = from.chunks_exact(eight).zip(bytes.chunks_exact_mut(eight));
            groups.for_each(|(from, to)| format.interleave(from, to));
        }
        let end = bytes.len();
        bytes.resize(end + 63, 0);
        let start = bytes.as_ptr().align_offset(64);
        bytes.copy_within(..end, start);
        bytes.truncate(start + end);
        let scale = if format.is_channel() { vec![0.01; rows] } else { Vec::new() };
        let x: Vec<f32> = (0..tokens * COLS).map(|_| rng.unit()).collect();
        let mut buf = ActsBuf::default();
        match format.is_channel() {
            true => buf.quantize_static(ops(Isa::best()), &x, COLS, 0.01),
            false => buf.quantize(ops(Isa::best()), &x, COLS),
        };
        Product { kernel, bytes, start, scale, x, buf }
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    fn acts(&self) -> Acts<'_> {
        match self.kernel.format().is_channel() {
            true => self.buf.acts_per_token(&self.x, COLS),
            false => self.buf.acts(&self.x, COLS),
        }
    }

    /// The product, `rows` rows at a time as the threads of a forward pass claim them.
    fn run(&self, bytes: &[u8], rows: usize, out: &mut [f32]) {
        let x = self.acts();
        let row_bytes = self.kernel.format().row_bytes(COLS).expect("whole blocks");
        for (i, bytes) in bytes.chunks(rows * row_bytes).enumerate() {
            let first = i * rows;
            let rows = bytes.len() / row_bytes;
            let scale = if self.scale.is_empty() { &[][..] } else { &self.scale[first..first + rows] };
            self.kernel.matmul(Rows { bytes, scale }, &x, &mut Tile::whole(&mut out[..x.tokens * rows], rows));
        }
    }
}

fn quick(group: &mut BenchmarkGroup<'_, WallTime>) {
    group.sample_size(10).warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_millis(600));
}

fn cache(c: &mut Criterion) {
    /// More than a first-level cache, less than a second-level one.
    const BYTES: usize = 200_000;
    let mut rng = Rng(1);
    for tokens in [1, 64] {
        let mut group = c.benchmark_group(format!("cache, {tokens} tokens"));
        quick(&mut group);
        for kernel in supported() {
            let rows = BYTES / kernel.format().row_bytes(COLS).expect("whole blocks") / 64 * 64;
            let product = Product::new(kernel, rows.max(64), tokens, &mut rng);
            let mut out = vec![0.0; tokens * rows.max(64)];
            group.throughput(Throughput::Elements((rows.max(64) * COLS * tokens) as u64));
            group.bench_function(BenchmarkId::from_parameter(kernel.name()), |b| {
                b.iter(|| product.run(product.bytes(), rows.max(64), &mut out));
            });
        }
        group.finish();
    }
}

fn prompt(c: &mut Criterion) {
    const TOKENS: usize = 64;
    let mut group = c.benchmark_group("prompt");
    quick(&mut group);
    for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
        if let Some(products) = measure::int8(isa, 100_000) {
            group.throughput(Throughput::Elements(products));
            group.bench_function(format!("peak/{}", isa.name()), |b| b.iter(|| measure::int8(isa, 100_000)));
        }
    }
    for kernel in hot() {
        let product = Product::new(kernel, ROWS, TOKENS, &mut Rng(2));
        let mut out = vec![0.0; TOKENS * 512];
        group.throughput(Throughput::Elements((ROWS * COLS * TOKENS) as u64));
        group.bench_function(kernel.name(), |b| b.iter(|| product.run(product.bytes(), 512, &mut out)));
    }
    group.finish();
}

/// Calls `f` for each part on a thread of its own, for the first on this one.
fn on_threads<'a, T: Sync + 'a>(mut parts: impl Iterator<Item = &'a [T]>, f: impl Fn(&[T]) + Sync) {
    let f = &f;
    std::thread::scope(|s| {
        let first = parts.next();
        parts.for_each(|part| _ = s.spawn(move || f(part)));
        first.map(f)
    });
}

fn memory(c: &mut Criterion) {
    const BYTES: usize = 256 << 20;
    for threads in [1, 2] {
        // Rows of a thread of a matrix.
        let at_once = ROWS / threads;
        let mut group = c.benchmark_group(format!("memory, {threads} threads"));
        quick(&mut group);
        let lines: Vec<measure::Line> = vec![[1; 8]; BYTES / size_of::<measure::Line>()];
        let read = |way: measure::Way| {
            let start = Instant::now();
            on_threads(lines.chunks(lines.len() / threads), |lines| _ = measure::read(lines, way));
            BYTES as f64 / start.elapsed().as_secs_f64()
        };
        let best = |way| (0..5).map(|_| read(way)).fold(0.0, f64::max);
        let way = measure::WAYS.into_iter().max_by(|&a, &b| best(a).total_cmp(&best(b))).expect("a way");
        for kernel in hot() {
            let row_bytes = kernel.format().row_bytes(COLS).expect("whole blocks");
            let rows = BYTES / row_bytes / ROWS * ROWS;
            let product = Product::new(kernel, rows, 1, &mut Rng(3));
            let bytes = product.bytes().len();
            group.throughput(Throughput::Bytes(bytes as u64));
            let mut shares = Vec::new();
            group.bench_function(kernel.name(), |b| {
                b.iter_custom(|n| {
                    (0..n)
                        .map(|_| {
                            let read = read(way);
                            let start = Instant::now();
                            on_threads(product.bytes().chunks(bytes / threads), |bytes| {
                                product.run(bytes, at_once, &mut vec![0.0; at_once]);
                            });
                            let took = start.elapsed();
                            shares.push(bytes as f64 / took.as_secs_f64() / read);
                            took
                        })
                        .sum()
                });
            });
            shares.sort_by(f64::total_cmp);
            if let Some(median) = shares.get(shares.len() / 2) {
                let (name, n) = (kernel.name(), shares.len());
                println!("{name}, {threads} threads: {:.0} % of read, median of {n}", 100.0 * median);
            }
        }
        group.finish();
    }
}

criterion_group!(benches, cache, prompt, memory);
criterion_main!(benches);
