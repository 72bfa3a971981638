//! The f32 functions: every ISA against the scalar instance bit for bit, and the scalar instance against f64.

mod common;

use common::{Rng, same};
use gemrun_simd::half::{f16_to_f32, f32_to_f16};
use gemrun_simd::{ActsBuf, Isa, ops, selftest, vec};

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
        let h: Vec<u16> = y.iter().map(|y| f32_to_f16(*y)).collect();
        let want = x.iter().zip(&h).map(|(x, h)| *x as f64 * f16_to_f32(*h) as f64).sum();
        close(ops.dot_f16(&x, &h), want, 1e-5 * size + 1e-12, "dot_f16");

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
