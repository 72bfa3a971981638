//! Every kernel against the canonical order written out naively, bit for bit, and against f64.
//!
//! The naive version shares only `Block::group` with the kernels, and that is checked in `formats.rs`
//! against values of another implementation.

mod common;

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Mutex;

use common::{Rng, same, weights};
use gemrun_simd::format::{self, Block};
use gemrun_simd::{Acts, ActsBuf, Format, Isa, KERNELS, Kernel, Layout, Rows, Tile, Tiles, dequant, find, ops, select};

/// One output of a block format: groups in order, integer sums in i64, one f32 accumulator.
fn naive<B: Block>(row: &[u8], a: &[i8], da: &[f32]) -> f32 {
    let per_block = B::FORMAT.block_elems() / 32;
    let mut acc = 0f32;
    for (k, (a, da)) in a.chunks(32).zip(da).enumerate() {
        let block = &row[k / per_block * B::FORMAT.block_bytes()..][..B::FORMAT.block_bytes()];
        let w = B::group(block, k % per_block);
        let product = |i: usize| w.s[i / 16] as i64 * w.q[i] as i64 * a[i] as i64;
        let isum: i64 = (0..32).map(product).sum();
        let msum: i64 = (0..32).map(|i| w.m[i / 16] as i64 * a[i] as i64).sum();
        assert!(isum.abs() < 1 << 24 && msum.abs() < 1 << 24, "{}: not exact in f32", B::FORMAT);
        acc = (isum as f32).mul_add(w.d * da, acc);
        if B::MINIMA {
            acc = (msum as f32).mul_add(-(w.dmin * da), acc);
        } else {
            assert_eq!(msum, 0, "{}: has minima", B::FORMAT);
        }
    }
    acc
}

/// One output of a float format: 32 strided lanes, then halves added until one is left.
fn naive_float(row: &[f32], x: &[f32]) -> f32 {
    let mut lanes = vec![0f32; 32];
    for (i, (w, x)) in row.iter().zip(x).enumerate() {
        lanes[i % 32] = w.mul_add(*x, lanes[i % 32]);
    }
    while lanes.len() > 1 {
        let high = lanes.split_off(lanes.len() / 2);
        lanes.iter_mut().zip(high).for_each(|(l, h)| *l += h);
    }
    lanes[0]
}

/// One output of a channel-wise format: one integer sum, one rounding, one multiplication.
fn naive_channel<B: Block>(row: &[u8], a: &[i8], scale: f32) -> f32 {
    let groups = 0..B::FORMAT.block_elems() / 32;
    let blocks = row.chunks(B::FORMAT.block_bytes());
    let weights = blocks.flat_map(|block| groups.clone().flat_map(|g| B::weights(block, g)));
    let isum: i64 = weights.zip(a).map(|(q, a)| q as i64 * *a as i64).sum();
    assert!(i32::try_from(isum).is_ok());
    isum as f32 * scale
}

/// A row's scale, for formats that have one.
fn row_scale(r: usize) -> f32 {
    0.001 + r as f32 / 977.0
}

/// Activations as `format` reads them: channel-wise formats by one scale, small enough that some of `x` between −1 and 1
/// become −128 and 127.
fn quantize<'a>(buf: &'a mut ActsBuf, format: Format, x: &'a [f32], cols: usize) -> Acts<'a> {
    let ops = ops(Isa::best());
    if format.is_channel() { buf.quantize_static(ops, x, cols, 0.0073) } else { buf.quantize(ops, x, cols) }
}

fn expected(format: Format, row: &[u8], row_scale: f32, x: &Acts, t: usize) -> f32 {
    let n = x.cols;
    if format.is_float() {
        let mut w = vec![0.0; n];
        format.unpack_row(row, &mut w);
        return naive_float(&w, &x.x[t * n..][..n]);
    }
    let a = &x.q[t * n..][..n];
    let da = if format.is_channel() { &[] } else { &x.scale[t * n / 32..][..n / 32] };
    match format {
        Format::F32 | Format::F16 | Format::BF16 => unreachable!(),
        Format::Q4_0 => naive::<format::Q4_0>(row, a, da),
        Format::Q4_1 => naive::<format::Q4_1>(row, a, da),
        Format::Q5_0 => naive::<format::Q5_0>(row, a, da),
        Format::Q5_1 => naive::<format::Q5_1>(row, a, da),
        Format::Q8_0 => naive::<format::Q8_0>(row, a, da),
        Format::Q2K => naive::<format::Q2K>(row, a, da),
        Format::Q3K => naive::<format::Q3K>(row, a, da),
        Format::Q4K => naive::<format::Q4K>(row, a, da),
        Format::Q5K => naive::<format::Q5K>(row, a, da),
        Format::Q6K => naive::<format::Q6K>(row, a, da),
        Format::Iq4Nl => naive::<format::Iq4Nl>(row, a, da),
        Format::Iq4Xs => naive::<format::Iq4Xs>(row, a, da),
        Format::Tq1_0 => naive::<format::Tq1_0>(row, a, da),
        Format::Tq2_0 => naive::<format::Tq2_0>(row, a, da),
        Format::Mxfp4 => naive::<format::Mxfp4>(row, a, da),
        Format::Q1_0 => naive::<format::Q1_0>(row, a, da),
        Format::Q2_0 => naive::<format::Q2_0>(row, a, da),
        Format::W2C => naive_channel::<format::W2C>(row, a, row_scale * x.scale[t]),
        Format::W4C => naive_channel::<format::W4C>(row, a, row_scale * x.scale[t]),
        Format::W8C => naive_channel::<format::W8C>(row, a, row_scale * x.scale[t]),
        Format::Q4_0C => naive_channel::<format::Q4_0C>(row, a, row_scale * x.scale[t]),
        Format::Q8_0C => naive_channel::<format::Q8_0C>(row, a, row_scale * x.scale[t]),
        Format::Tq2_0C => naive_channel::<format::Tq2_0C>(row, a, row_scale * x.scale[t]),
    }
}

/// The kernels that have run.
static RAN: Mutex<BTreeSet<&str>> = Mutex::new(BTreeSet::new());

/// Whether to run it. Miri, to which plain Rust is a thousand times slower, is asked only about intrinsics.
fn runs(kernel: &dyn Kernel) -> bool {
    kernel.supported() && !(cfg!(miri) && (kernel.isa() == Isa::Scalar || kernel.format().is_float()))
}

/// Runs every supported kernel of `format` on the rows, from an unaligned address and into a tile with
/// canaries around it, and compares each output with the naive version.
fn check(format: Format, w: &[u8], x: &Acts, what: &str) {
    let row_bytes = format.row_bytes(x.cols).unwrap();
    let n_rows = w.len() / row_bytes;
    let want: Vec<f32> = (0..x.tokens)
        .flat_map(|t| (0..n_rows).map(move |r| (t, r)))
        .map(|(t, r)| expected(format, &w[r * row_bytes..][..row_bytes], row_scale(r), x, t))
        .collect();
    let mut shifted = vec![0xa5; w.len() + 1];
    shifted[1..].copy_from_slice(w);
    let scale: Vec<f32> = (0..n_rows).map(row_scale).collect();
    const CANARY: f32 = 1.25e-33;
    for kernel in KERNELS.iter().filter(|k| k.format() == format && runs(**k)) {
        if kernel.layout() == Layout::Interleaved && !n_rows.is_multiple_of(8) {
            continue;
        }
        let mut w = w.to_vec();
        if kernel.layout() == Layout::Interleaved {
            for (w, out) in shifted[1..].chunks_exact(8 * row_bytes).zip(w.chunks_exact_mut(8 * row_bytes)) {
                format.interleave(w, out);
            }
        }
        let mut shifted = shifted.clone();
        shifted[1..].copy_from_slice(&w);
        for w in [&w[..], &shifted[1..]] {
            // Two rows before and three after the tile belong to others.
            let stride = n_rows + 5;
            let mut out = vec![CANARY; x.tokens * stride];
            // SAFETY: the only tile.
            let mut tile = unsafe { Tiles::new(&mut out, stride).tile(2..2 + n_rows) };
            kernel.matmul(rows(format, w, &scale), x, &mut tile);
            RAN.lock().unwrap().insert(kernel.name());
            for (i, got) in out.iter().enumerate() {
                let (t, r) = (i / stride, (i % stride).wrapping_sub(2));
                let want = if r < n_rows { want[t * n_rows + r] } else { CANARY };
                assert!(
                    same(*got, want),
                    "{} {what}: {n_rows} rows, {} cols, token {t} of {}, row {r}: {got} ({:#x}), expected {want} ({:#x})",
                    kernel.name(),
                    x.cols,
                    x.tokens,
                    got.to_bits(),
                    want.to_bits()
                );
            }
        }
    }
}

/// Rows with these scales, if `format` has any.
fn rows<'a>(format: Format, bytes: &'a [u8], scale: &'a [f32]) -> Rows<'a> {
    Rows { bytes, scale: if format.is_channel() { scale } else { &[] } }
}

fn random_activations(rng: &mut Rng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.unit()).collect()
}

/// Row lengths in groups of 32, of which each format takes those it can.
const GROUPS: [usize; 14] = [
    1,  // one block of the small formats
    2,  // Q2_0's block
    3,  // odd
    4,  // Q1_0's block
    5,  //
    7,  //
    8,  // one super-block
    9,  //
    24, // three super-blocks
    31, // one less than a panel's chunk
    32, // exactly a chunk
    33, // one group in the next chunk
    40, // one super-block in the next chunk
    72, // 2304: two chunks and a bit
];

/// Rows around the eight and sixteen in lanes and their streams; tokens around the four at a time and the change of path.
const SHAPES: [(usize, usize); 17] = [
    (1, 1),
    (7, 2),
    (8, 4),
    (9, 5),
    (15, 6),
    (16, 7),
    (17, 9),
    (3, 8),
    (2, 12),
    (1, 13),
    (5, 0),
    (0, 3),
    (16, 1),
    (64, 1),
    (72, 2),
    (136, 1),
    (24, 6),
];

/// Under Miri: one row length a format, and a shape for each path.
const FEW_SHAPES: [(usize, usize); 5] = [(1, 1), (8, 5), (16, 9), (24, 1), (64, 1)];

#[test]
fn all_shapes() {
    let mut buf = ActsBuf::default();
    let (lengths, shapes) = if cfg!(miri) { (1, &FEW_SHAPES[..]) } else { (GROUPS.len(), &SHAPES[..]) };
    for format in Format::ALL {
        let mut rng = Rng(format as u64);
        if !KERNELS.iter().any(|k| k.format() == format && runs(*k)) {
            continue;
        }
        let fits = |cols: &usize| format.row_bytes(*cols).is_some();
        for cols in GROUPS.map(|g| 32 * g).into_iter().filter(fits).take(lengths) {
            for &(rows, tokens) in shapes {
                let w = weights(format, rows, cols, &mut rng, Rng::byte);
                let x = random_activations(&mut rng, tokens * cols);
                check(format, &w, &quantize(&mut buf, format, &x, cols), "random");
            }
        }
    }
    every_kernel_ran();
}

/// Says which kernels have run, all that this CPU can run. `GEMRUN_EXPECT_ISA=neon_dot,neon` says which ISAs must be among
/// them, lest a machine's tests pass because it runs less than it should.
fn every_kernel_ran() {
    let ran = RAN.lock().unwrap();
    let list: Vec<&str> = ran.iter().copied().collect();
    // Past the test harness, which would swallow it.
    let _ = writeln!(std::io::stderr(), "{} kernels ran: {}", list.len(), list.join(" "));
    for kernel in KERNELS {
        assert_eq!(ran.contains(kernel.name()), runs(*kernel), "{}", kernel.name());
    }
    let expected = std::env::var("GEMRUN_EXPECT_ISA").unwrap_or_default();
    for isa in expected.split(',').filter(|isa| !isa.is_empty()) {
        let of = |name: &str| name.rsplit_once('/').is_some_and(|(_, ran)| ran == isa);
        assert!(ran.iter().any(|name| of(name)), "no kernel of {isa} ran: {expected} expected");
    }
}

#[test]
#[cfg_attr(miri, ignore)] // shapes in abundance
fn every_row_count_and_token_count() {
    let mut buf = ActsBuf::default();
    let mut rng = Rng(1);
    for format in Format::ALL {
        for rows in 1..=17 {
            for tokens in 1..=9 {
                let w = weights(format, rows, 256, &mut rng, Rng::byte);
                let x = random_activations(&mut rng, tokens * 256);
                check(format, &w, &quantize(&mut buf, format, &x, 256), "random");
            }
        }
    }
}

#[test]
fn long_rows() {
    let mut buf = ActsBuf::default();
    let mut rng = Rng(2);
    for format in Format::ALL {
        for cols in [6144, 12288, 65536] {
            for tokens in [1, 7] {
                let w = weights(format, 3, cols, &mut rng, Rng::byte);
                let x = random_activations(&mut rng, tokens * cols);
                check(format, &w, &quantize(&mut buf, format, &x, cols), "random");
            }
        }
    }
}

/// Weights of all the same byte or alternating extremes meet activations that are ±127 throughout, one
/// alone, or zero: what saturates, wraps or loses a sign shows here.
#[test]
fn extreme_values() {
    // 0x80 is −128 in Q8_0 and in the scales of Q6_K; 0x88, 0x77 are −8 and 7, or the ends of the tables.
    let fills = [0x00, 0xff, 0x80, 0x7f, 0x81, 0x88, 0x77, 0x0f, 0xf0, 0x55, 0xaa];
    type Pattern = fn(usize) -> f32;
    let patterns: [(&str, Pattern); 6] = [
        ("all 127", |_| 1.0),
        ("all -127", |_| -1.0),
        ("alternating", |i| if i % 2 == 0 { 1.0 } else { -1.0 }),
        ("pairs alternating", |i| if i % 4 < 2 { -1.0 } else { 1.0 }),
        ("one hot", |i| if i % 97 == 13 { -1.0 } else { 0.0 }),
        ("zero", |_| 0.0),
    ];
    let mut buf = ActsBuf::default();
    for format in Format::ALL {
        let mut rng = Rng(3);
        for fill in fills {
            for flip in [0x00, 0xff] {
                let mut odd = false;
                let w = weights(format, 24, 512, &mut rng, |_| {
                    odd = !odd;
                    if odd { fill } else { fill ^ flip }
                });
                for (what, pattern) in patterns {
                    for tokens in [1, 7] {
                        let x: Vec<f32> = (0..tokens * 512).map(pattern).collect();
                        let x = quantize(&mut buf, format, &x, 512);
                        check(format, &w, &x, &format!("bytes {fill:#x} ^ {flip:#x}, activations {what}"));
                    }
                }
            }
        }
    }
}

/// Damaged weights: any bytes at all, so scales may be subnormal, infinite or NaN; and activations too.
#[test]
fn any_bytes_and_non_finite_activations() {
    let mut buf = ActsBuf::default();
    let mut rng = Rng(4);
    for format in Format::ALL {
        for bad in [1.0, f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-39, -0.0] {
            for tokens in [1, 7] {
                let w: Vec<u8> = (0..9 * format.row_bytes(512).unwrap()).map(|_| rng.byte()).collect();
                let mut x = random_activations(&mut rng, tokens * 512);
                x[17] = bad;
                check(format, &w, &quantize(&mut buf, format, &x, 512), &format!("activation {bad}"));
                if !bad.is_finite() {
                    let mut out = vec![0.0; tokens * 9];
                    let x = quantize(&mut buf, format, &x, 512);
                    select(format, Isa::best()).matmul(rows(format, &w, &[1.0; 9]), &x, &mut Tile::whole(&mut out, 9));
                    assert!(out[..9].iter().all(|y| !y.is_finite()), "{format}: {bad} was lost");
                }
            }
        }
    }
}

/// The integer product is that of the rounded activations: against f64, within the rounding of one f32
/// accumulator and of the activations themselves.
#[test]
fn close_to_f64() {
    let mut buf = ActsBuf::default();
    let mut rng = Rng(5);
    let cols = 1536;
    for format in Format::ALL {
        let w = weights(format, 8, cols, &mut rng, Rng::byte);
        let x = random_activations(&mut rng, 7 * cols);
        // No activation is clipped: the bound below knows only of rounding.
        let acts = match format.is_channel() {
            true => buf.quantize_static(ops(Isa::best()), &x, cols, 1.0 / 127.0),
            false => buf.quantize(ops(Isa::best()), &x, cols),
        };
        let step = |i: usize| acts.scale[if format.is_channel() { i / cols } else { i / 32 }];
        for kernel in [select(format, Isa::best()), dequant(format, Isa::best()), dequant(format, Isa::Scalar)] {
            let mut out = vec![0.0; 7 * 8];
            kernel.matmul(rows(format, &w, &[1.0; 8]), &acts, &mut Tile::whole(&mut out, 8));
            for (i, got) in out.iter().enumerate() {
                let (t, r) = (i / 8, i % 8);
                let mut row = vec![0.0; cols];
                format.unpack_row(&w[r * w.len() / 8..][..w.len() / 8], &mut row);
                let (mut want, mut size, mut rounding) = (0f64, 0f64, 0f64);
                for (k, w) in row.iter().enumerate() {
                    want += *w as f64 * x[t * cols + k] as f64;
                    size += (*w as f64 * x[t * cols + k] as f64).abs();
                    rounding += (*w as f64 * step(t * cols + k) as f64).powi(2) / 12.0;
                }
                let float = format.is_float() || kernel.name().ends_with("/float");
                let bound = 1e-5 * size + if float { 0.0 } else { 6.0 * rounding.sqrt() };
                assert!((*got as f64 - want).abs() < bound, "{}: {got}, expected {want} ± {bound}", kernel.name());
            }
        }
    }
}

#[test]
fn unpacked_kernels_agree_bit_for_bit() {
    let mut rng = Rng(6);
    for format in Format::ALL {
        let w = weights(format, 5, 768, &mut rng, Rng::byte);
        let x = random_activations(&mut rng, 3 * 768);
        let run = |isa| {
            let mut out = vec![0.0; 3 * 5];
            let w = rows(format, &w, &[1.0; 5]);
            dequant(format, isa).matmul(w, &Acts::float(&x, 768), &mut Tile::whole(&mut out, 5));
            out.iter().map(|y| y.to_bits()).collect::<Vec<_>>()
        };
        let mut row = vec![0.0; 768];
        format.unpack_row(&w[..w.len() / 5], &mut row);
        assert_eq!(run(Isa::Scalar)[0], naive_float(&row, &x[..768]).to_bits(), "{format}");
        assert_eq!(run(Isa::Scalar), run(Isa::best()), "{format}");
    }
}

/// Block formats with kernels for every ISA.
const HOT: [Format; 8] =
    [Format::Q4_0, Format::Q8_0, Format::Q6K, Format::Q4K, Format::Q5K, Format::W2C, Format::W4C, Format::W8C];

#[test]
fn tables_are_complete_and_in_order() {
    for format in Format::ALL {
        for isa in Isa::ALL {
            let kernel = select(format, isa);
            assert_eq!(kernel.format(), format);
            assert!(kernel.isa() <= isa && kernel.supported());
            // Every ISA has kernels for what people's files are made of; others make do with the architecture's first.
            if isa.supported() && HOT.contains(&format) {
                assert_eq!(kernel.isa(), isa, "{}", kernel.name());
            }
            let vectors = Isa::ALL.into_iter().any(|other| Isa::Scalar < other && other <= isa && other.supported());
            assert_eq!(kernel.isa() != Isa::Scalar, vectors, "{}", kernel.name());
            assert_eq!(dequant(format, isa).format(), format);
        }
    }
    for kernel in KERNELS {
        let order = if kernel.layout() == Layout::Interleaved { "x8" } else { "" };
        let name = format!("{}{order}/{}", kernel.format().name().to_lowercase(), kernel.isa().name());
        assert_eq!(kernel.name(), name);
        assert_eq!(KERNELS.iter().filter(|k| k.name() == name).count(), 1);
    }
}

#[test]
fn an_isa_is_there_if_all_its_features_are() {
    assert!(Isa::Scalar.supported() && Isa::Scalar.features().is_empty() && Isa::Scalar.of_this_architecture());
    for isa in Isa::ALL {
        assert_eq!(isa.supported(), isa.features().iter().all(|(_, has)| has()), "{}", isa.name());
        assert!(isa.of_this_architecture() || !isa.supported(), "{}", isa.name());
    }
    assert_eq!(Isa::Avx2.of_this_architecture(), cfg!(target_arch = "x86_64"));
    let names: Vec<&str> = Isa::Avx2.features().iter().map(|(name, _)| *name).collect();
    assert!(!Isa::Avx2.of_this_architecture() || names == ["avx2", "fma", "f16c"], "{names:?}");
}

#[test]
fn choices_by_name() {
    let one = find("q4_0/scalar").unwrap();
    assert_eq!(one.kernel(Format::Q4_0).name(), "q4_0/scalar");
    assert_eq!(one.kernel(Format::Q6K).isa(), Isa::best());
    assert_eq!(find("scalar").unwrap().kernel(Format::Q6K).name(), "q6_k/scalar");
    for wrong in ["", "sse", "q4_0", "q4_0/", "Q4_0/scalar", "a\x1bb"] {
        let message = find(wrong).err().unwrap();
        assert!(message.contains("expected one of scalar") && !message.contains('\x1b'), "{message}");
    }
    if !Isa::Avx2.supported() {
        assert!(find("avx2").err().unwrap().contains("no avx2"));
        assert!(find("q4_0/avx2").is_err());
    }
}

/// What a kernel relies on is checked, whatever the kernel.
#[test]
fn misfits_panic() {
    let x = vec![0.5; 64];
    let mut buf = ActsBuf::default();
    let acts = quantize(&mut buf, Format::Q4_0, &x, 64);
    let q4_0 = |k: &&&dyn Kernel| k.format() == Format::Q4_0 && k.layout() == Layout::Gguf && k.supported();
    for kernel in KERNELS.iter().filter(q4_0) {
        let run = |bytes: usize, x: Acts, rows: usize, tokens: usize| {
            let mut out = vec![0.0; rows * tokens];
            let w = vec![0; bytes];
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                kernel.matmul((&w[..]).into(), &x, &mut Tile::whole(&mut out, rows));
            }))
            .is_err()
        };
        let quiet = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| {}));
        let cases = [
            (false, run(36, acts, 1, 1)),
            (true, run(35, acts, 1, 1)),                                     // a byte short
            (true, run(72, acts, 1, 1)),                                     // a row too many
            (true, run(36, acts, 1, 2)),                                     // a token too many
            (true, run(36, Acts::float(&x, 64), 1, 1)),                      // not quantised
            (true, run(36, Acts { tokens: 2, ..acts }, 1, 2)),               // fewer activations than tokens
            (true, run(36, Acts { scale: &acts.scale[1..], ..acts }, 1, 1)), // a scale short
            (true, run(36, Acts { sums: &acts.sums[1..], ..acts }, 1, 1)),   // a sum short
            (true, run(36, Acts { cols: 63, ..acts }, 1, 1)),                // half a block
        ];
        std::panic::set_hook(quiet);
        for (i, (want, got)) in cases.into_iter().enumerate() {
            assert_eq!(want, got, "{} case {i}", kernel.name());
        }
    }
}
