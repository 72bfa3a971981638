//! Runs one kernel a number of times on fixed data, for whatever counts instructions: `count KERNEL TOKENS TIMES COLS`.
//!
//! The difference of two numbers of times is the kernel alone; of two numbers of columns, its inner loop alone.
//! `benches/count.sh` runs it under emulation.

use gemrun_simd::selftest::{Rng, weights};
use gemrun_simd::{ActsBuf, Isa, KERNELS, Rows, Tile, ops};

/// Rows for eight groups of eight twice.
const ROWS: usize = 128;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [name, numbers @ ..] = &args[..] else { panic!("expected KERNEL TOKENS TIMES COLS") };
    let kernel = KERNELS.iter().find(|k| k.name() == name && k.supported()).expect("a kernel of this CPU");
    let numbers: Vec<usize> = numbers.iter().map(|n| n.parse().expect("a number")).collect();
    let [tokens, times, cols] = numbers[..] else { panic!("expected KERNEL TOKENS TIMES COLS") };
    let (format, mut rng) = (kernel.format(), Rng(1));
    // Random bytes are as good in one order as in the other.
    let w = weights(format, ROWS, cols, &mut rng, Rng::byte);
    let scale = vec![0.01; if format.is_channel() { ROWS } else { 0 }];
    let x: Vec<f32> = (0..tokens * cols).map(|_| rng.unit()).collect();
    let (mut buf, ops) = (ActsBuf::default(), ops(Isa::Scalar));
    let x = match format {
        f if f.is_channel() => buf.quantize_static(ops, &x, cols, 0.01),
        _ => buf.quantize(ops, &x, cols),
    };
    let mut out = vec![0.0; tokens * ROWS];
    for _ in 0..times {
        kernel.matmul(Rows { bytes: &w, scale: &scale }, &x, &mut Tile::whole(&mut out, ROWS));
    }
}
