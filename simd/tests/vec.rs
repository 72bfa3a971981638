//! The f32 functions: every ISA against the scalar instance bit for bit, and the scalar instance against f64.

mod common;

use std::ops::Range;

use common::{Rng, same};
use gemrun_simd::half::{f16_to_f32, f32_to_f16};
use gemrun_simd::vec::{KEYS, PANEL, line_groups};
use gemrun_simd::{ActsBuf, Isa, Tile, Tiles, ops, selftest, vec};

/// Every function on every supported ISA for lengths around the 8 of a vector, the 32 lanes, and beyond.
#[test]
fn every_isa_agrees_with_the_scalar_one() {
    for (what, f) in selftest::FUNCTIONS {
        for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
            for n in (0..200).chain([255, 256, 257, 1536, 6145]) {
                let want = f(ops(Isa::Scalar), n, &mut Rng(n as u64));
                let got = f(ops(isa), n, &mut Rng(n as u64));
                assert_eq!(want.len(), got.len());
                for (i, (want, got)) in want.iter().zip(&got).enumerate() {
                    assert!(same(*want, *got), "{what}/{}: {n} elements, {i}: {got}, expected {want}", isa.name());
                }
            }
        }
    }
}

#[test]
fn halves_are_stored_alike_for_every_kind_of_number() {
    let odd = [f32::NAN, f32::INFINITY, -f32::INFINITY, 65504.0, 65520.0, -1e9, 1e-8, -6e-8, 0.0, -0.0, 2.5, 1e-40];
    for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
        for shift in 0..odd.len() {
            let x: Vec<f32> = (0..37).map(|i| odd[(i + shift) % odd.len()]).collect();
            let mut out = vec![0; x.len()];
            ops(isa).store_f16(&mut out, &x);
            for (x, h) in x.iter().zip(&out) {
                assert!(same(f16_to_f32(*h), f16_to_f32(f32_to_f16(*x))), "{}: {x} became {h:#06x}", isa.name());
            }
        }
    }
}

#[test]
fn activations_agree() {
    let mut rng = Rng(7);
    for groups in [1, 2, 3, 7, 48, 191] {
        let n = 32 * groups;
        let mut x = rng.values(n);
        for (i, odd) in [f32::NAN, f32::INFINITY, f32::MAX, 1e-31, 1e-45, -0.0].into_iter().enumerate() {
            // A group each, where there are enough.
            if groups > 7 {
                x[64 * i..64 * i + 32].fill(0.0);
                x[64 * i + 5] = odd;
            }
        }
        let (mut a, mut b) = (ActsBuf::default(), ActsBuf::default());
        let want = a.quantize(ops(Isa::Scalar), &x, n);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
            let got = b.quantize(ops(isa), &x, n);
            assert_eq!(want.q, got.q);
            assert_eq!(want.sums, got.sums);
            assert!(want.scale.iter().zip(got.scale).all(|(a, b)| same(*a, *b)), "{}", isa.name());
        }
        for (g, x) in x.chunks(32).enumerate() {
            let q = &want.q[32 * g..][..32];
            assert!(q.iter().all(|q| *q != -128));
            for h in 0..2 {
                let sum: i32 = q[16 * h..][..16].iter().map(|q| *q as i32).sum();
                assert_eq!(want.sums[2 * g + h] as i32, sum);
            }
            let amax = x.iter().fold(0f32, |m, x| m.max(x.abs()));
            let scale = want.scale[g];
            if x.iter().any(|x| !x.is_finite()) {
                assert!(!scale.is_finite(), "a damaged group must stay damaged");
            } else if amax < 1e-30 {
                assert!(scale == 0.0 && q.iter().all(|q| *q == 0));
            } else {
                // Within half a unit of the scale, and a little for the choice of scale.
                for (x, q) in x.iter().zip(q) {
                    assert!((x - *q as f32 * scale).abs() <= 0.75 * amax / 120.0, "{x} became {q} × {scale}");
                }
            }
        }
    }
}

/// A group whose values are whole multiples of amax/127 loses nothing but the rounding of the scale.
#[test]
fn whole_multiples_stay_whole() {
    let x: Vec<f32> = (0..32).map(|i| if i == 9 { 127.0 } else { (i * 8 % 127) as f32 }).collect();
    let mut buf = ActsBuf::default();
    let acts = buf.quantize(ops(Isa::best()), &x, 32);
    for (x, q) in x.iter().zip(acts.q) {
        assert_eq!(*x, *q as f32);
    }
    assert!((acts.scale[0] - 1.0).abs() < 1e-6);
}

fn close(got: f32, want: f64, tolerance: f64, what: &str) {
    assert!((got as f64 - want).abs() <= tolerance, "{what}: {got}, expected {want}");
}

#[test]
fn against_f64() {
    let ops = ops(Isa::best());
    let mut rng = Rng(8);
    for n in [1, 5, 31, 32, 33, 64, 100, 1536] {
        let (x, y) = (rng.values(n), rng.values(n));
        let pairs = || x.iter().zip(&y).map(|(x, y)| *x as f64 * *y as f64);
        let size: f64 = pairs().map(f64::abs).sum();
        close(ops.dot(&x, &y), pairs().sum(), 1e-5 * size, "dot");

        let r = 1.0 / (x.iter().map(|x| (*x as f64).powi(2)).sum::<f64>() / n as f64 + 1e-6).sqrt();
        let mut out = vec![0.0; n];
        ops.rms_norm(&mut out, &x, Some(&y), 1e-6);
        for i in 0..n {
            let want = x[i] as f64 * r * y[i] as f64;
            close(out[i], want, 1e-6 * want.abs() + 1e-12, "rms_norm");
        }

        let top = x.iter().fold(f64::NEG_INFINITY, |m, x| m.max(*x as f64));
        let total: f64 = x.iter().map(|x| (*x as f64 - top).exp()).sum();
        let mut out = x.clone();
        ops.softmax(&mut out);
        for i in 0..n {
            close(out[i], (x[i] as f64 - top).exp() / total, 1e-6, "softmax");
        }

        let mut out = x.clone();
        ops.gelu_mul(&mut out, &y);
        for i in 0..n {
            let v = x[i] as f64;
            let root = (2.0 / std::f64::consts::PI).sqrt();
            let gelu = 0.5 * v * (1.0 + (root * v * (1.0 + 0.044715 * v * v)).tanh());
            close(out[i], gelu * y[i] as f64, 1e-6 * (v * y[i] as f64).abs() + 1e-12, "gelu_mul");
        }

        let mut out = x.clone();
        ops.softcap(&mut out, 30.0);
        for i in 0..n {
            let want = 30.0 * (x[i] as f64 / 30.0).tanh();
            close(out[i], want, 1e-6 * want.abs() + 1e-30, "softcap");
        }
    }
}

/// A matrix of `rows` rows as panels of sixteen columns, the last filled up with `T`'s default.
fn panels<T: Copy + Default>(matrix: &[T], rows: usize) -> Vec<T> {
    let columns = matrix.len() / rows;
    let column =
        |row: usize, column: usize| matrix[row * columns..][..columns].get(column).copied().unwrap_or_default();
    let panel = |panel: usize| (0..rows * PANEL).map(move |i| column(i / PANEL, panel * PANEL + i % PANEL));
    (0..columns.div_ceil(PANEL)).flat_map(panel).collect()
}

/// Queries (queries, dim) in `order`, as scores take them.
fn in_groups(q: &[f32], order: &[usize]) -> Vec<f32> {
    let dim = order.len();
    let group = |lines: Range<usize>| {
        order.iter().flat_map(move |d| lines.clone().map(move |line| q[line * dim + d])).collect::<Vec<_>>()
    };
    line_groups(0..q.len() / dim).flat_map(group).collect()
}

const SHAPES: [(usize, usize); 12] =
    [(1, 1), (7, 2), (8, 4), (16, 3), (40, 2), (64, 8), (72, 11), (100, 1), (100, 7), (256, 2), (512, 4), (512, 8)];

/// Attention's two products by plain loops, for every number of queries, in both ways of storing the cache.
#[test]
fn attention_against_plain_loops() {
    let mut rng = Rng(9);
    for (dim, queries) in SHAPES {
        // Keys as (dim, KEYS), values as (KEYS, dim).
        let (q, keys) = (rng.values(queries * dim), rng.values(dim * KEYS));
        let halves: Vec<u16> = keys.iter().map(|k| f32_to_f16(*k)).collect();
        let rounded: Vec<f32> = halves.iter().map(|h| f16_to_f32(*h)).collect();
        let weights = rng.values(queries * KEYS);
        let order = vec::key_order(dim);
        let grouped = in_groups(&q, &order);
        for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
            let ops = ops(isa);
            for (half, keys) in [(false, &keys), (true, &rounded)] {
                let mut out = vec![0.0; queries * KEYS];
                let mut tile = Tile::whole(&mut out, KEYS);
                if half {
                    ops.scores_f16(&mut tile, &grouped, &panels(&halves, dim))
                } else {
                    ops.scores_f32(&mut tile, &grouped, &panels(keys, dim))
                }
                for (i, got) in out.iter().enumerate() {
                    let mut key = vec![0.0; dim];
                    order.iter().enumerate().for_each(|(row, &d)| key[d] = keys[row * KEYS + i % KEYS]);
                    let want = ops.dot(&q[i / KEYS * dim..][..dim], &key);
                    assert_eq!(*got, want, "{}: {queries} queries, {dim} dimensions", isa.name());
                }
                let (halves, floats) = (panels(&halves, KEYS), panels(keys, KEYS));
                let mut whole = vec![0.5; queries * dim];
                let mut tile = Tile::whole(&mut whole, dim);
                let weigh = |tile: &mut Tile, panels: Range<usize>, positions: Range<usize>| {
                    let (weights, panels) = (&weights[positions.start..], panels.start * KEYS..panels.end * KEYS);
                    match half {
                        true => ops.weigh_f16(tile, weights, KEYS, &halves[panels], positions),
                        false => ops.weigh_f32(tile, weights, KEYS, &floats[panels], positions),
                    }
                };
                let columns = dim.next_multiple_of(PANEL);
                weigh(&mut tile, 0..columns, 0..KEYS);
                for (i, got) in whole.iter().enumerate() {
                    let mut want = 0.5f32;
                    for p in 0..KEYS {
                        want = weights[i / dim * KEYS + p].mul_add(keys[p * dim + i % dim], want);
                    }
                    assert_eq!(*got, want, "{}: {queries} queries, {dim} dimensions: {i}", isa.name());
                }
                // In any split of positions and panels.
                let mut parts = vec![0.5; queries * dim];
                let middle = columns / 3 / PANEL * PANEL;
                for panels in [0..middle, middle..columns].into_iter().filter(|panels| !panels.is_empty()) {
                    let tiles = Tiles::new(&mut parts, dim);
                    // SAFETY: the only tile there is.
                    let mut tile = unsafe { tiles.tile(panels.start..panels.end.min(dim)) };
                    for positions in [0..1, 1..40, 40..40, 40..KEYS] {
                        weigh(&mut tile, panels.clone(), positions);
                    }
                }
                assert_eq!(whole, parts, "{}: {queries} queries, {dim} dimensions", isa.name());
            }
        }
    }
}

/// Rows of sixteen integers as nibbles.
fn packed(rows: &[i8]) -> Vec<u8> {
    let row = |row: &[i8; PANEL]| -> [u8; PANEL / 2] { std::array::from_fn(|i| (row[i] & 15 | row[i + 8] << 4) as u8) };
    rows.as_chunks().0.iter().flat_map(row).collect()
}

/// Integers are widened exactly: they give the bits of the same numbers as f32. Their scales multiply scores last and
/// weights first.
#[test]
fn integers_are_as_good_as_f32() {
    let mut rng = Rng(10);
    for (dim, queries) in SHAPES {
        for bits in [8, 4] {
            // As many of every integer as of another, the lowest included.
            let integers: Vec<i8> = (0..dim * KEYS).map(|_| rng.byte() as i8 >> (8 - bits)).collect();
            let plain: Vec<f32> = integers.iter().map(|q| f32::from(*q)).collect();
            let (keys, plain_keys) = (panels(&integers, dim), panels(&plain, dim));
            let (values, plain_values) = (panels(&integers, KEYS), panels(&plain, KEYS));
            let q = rng.values(queries * dim);
            let weights = rng.values(queries * KEYS);
            for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
                let ops = ops(isa);
                for scale in [vec![1.0; KEYS], rng.values(KEYS)] {
                    let what = format!("{}: int{bits}, {queries} queries, {dim} dimensions", isa.name());
                    let (mut got, mut want) = (vec![0.0; queries * KEYS], vec![0.0; queries * KEYS]);
                    let mut tile = Tile::whole(&mut got, KEYS);
                    match bits {
                        8 => ops.scores_i8(&mut tile, &q, &keys, &scale),
                        _ => ops.scores_i4(&mut tile, &q, &packed(&keys), &scale),
                    }
                    ops.scores_f32(&mut Tile::whole(&mut want, KEYS), &q, &plain_keys);
                    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                        assert!(same(*got, want * scale[i % KEYS]), "{what}: score {i}");
                    }

                    // Some of the positions, and of the panels.
                    for (positions, column) in [(0..KEYS - 2, 0), (17..KEYS, dim / 3 / PANEL * PANEL)] {
                        let width = dim - column;
                        let (mut got, mut want) = (vec![0.5; queries * width], vec![0.5; queries * width]);
                        let mut tile = Tile::whole(&mut got, width);
                        let (w, values) = (&weights[positions.start..], &values[column * KEYS..]);
                        match bits {
                            8 => ops.weigh_i8(&mut tile, w, KEYS, values, &scale, positions.clone()),
                            _ => ops.weigh_i4(&mut tile, w, KEYS, &packed(values), &scale, positions.clone()),
                        }
                        let scaled = |line: usize| w[line * KEYS..].iter().zip(&scale[positions.clone()]);
                        let scaled: Vec<f32> = (0..queries).flat_map(scaled).map(|(w, scale)| w * scale).collect();
                        let plain = &plain_values[column * KEYS..];
                        ops.weigh_f32(&mut Tile::whole(&mut want, width), &scaled, positions.len(), plain, positions);
                        assert!(got.iter().zip(&want).all(|(got, want)| same(*got, *want)), "{what}: sums");
                    }
                }
            }
        }
    }
}

#[test]
fn integers_are_the_nearest_ties_to_even() {
    let x = [0.5, 1.5, -0.5, -1.5, 2.500001, 126.6, 127.5, 1e9, -127.5, -128.5, -1e9, 1e-40, -0.0];
    let q = [0, 2, 0, -2, 3, 127, 127, 127, -128, -128, -128, 0, 0];
    let mut rng = Rng(11);
    for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
        let ops = ops(isa);
        for scale in [1.0, 0.25, 4.0] {
            let mut out = [0; 13];
            ops.store_i8(&mut out, &x.map(|x| x * scale), scale, 127);
            assert_eq!(out, q, "{}: {scale}", isa.name());
            ops.store_i8(&mut out, &x.map(|x| x * scale), scale, 7);
            assert_eq!(out, q.map(|q| q.clamp(-8, 7)), "{}: {scale}", isa.name());
        }
        for n in [1, 31, 100] {
            let (x, mut out) = (rng.values(n), vec![0; n]);
            let amax = ops.amax(&x);
            assert_eq!(amax, x.iter().fold(0f32, |m, x| m.max(x.abs())));
            let scale = if amax > 0.0 { amax / 127.0 } else { 1.0 };
            ops.store_i8(&mut out, &x, scale, 127);
            let nearest = |x: &f32| (x / scale).round_ties_even() as i8;
            assert!(out.iter().all(|q| *q != -128) && out.iter().copied().eq(x.iter().map(nearest)), "{}", isa.name());
        }
        assert!(ops.amax(&[1.0, f32::INFINITY]).is_infinite() && ops.amax(&[f32::NAN, f32::INFINITY]).is_nan());
        assert_eq!(ops.amax(&[]), 0.0);
    }
}

#[test]
fn rope_turns_halves() {
    let mut x = [1.0, 2.0, 3.0, 4.0];
    // A quarter turn of the first pair (1, 3), none of the second (2, 4).
    ops(Isa::best()).rope(&mut x, &[0.0, 1.0], &[1.0, 0.0]);
    assert_eq!(x, [-3.0, 2.0, 1.0, 4.0]);
}

#[test]
fn damage_is_not_hidden() {
    let ops = ops(Isa::best());
    let mut x = vec![1.0; 40];
    x[35] = f32::NAN;
    ops.softmax(&mut x);
    assert!(x.iter().all(|x| x.is_nan()));
    let mut none: [f32; 0] = [];
    ops.softmax(&mut none);
    assert!(vec::exp(f32::NAN).is_nan() && vec::tanh(f32::NAN).is_nan());
}
