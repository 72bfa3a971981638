//! What several test programs share: golden data, running the engine, measuring differences.

// Each test program uses its own part of this module.
#![allow(dead_code)]

pub mod bytes;
pub mod checkpoint;
pub mod damage;
pub mod examine;
pub mod golden;
pub mod hub;
pub mod mobile;
pub mod npy;
pub mod pieces;
pub mod raw_gguf;
pub mod run;

/// The largest absolute difference of two equally long sequences; NaN counts as infinite.
pub fn max_abs_difference(
    a: impl IntoIterator<Item = impl Into<f64>>,
    b: impl IntoIterator<Item = impl Into<f64>>,
) -> f64 {
    let (mut a, mut b) = (a.into_iter(), b.into_iter());
    let mut max = 0.0f64;
    loop {
        match (a.next(), b.next()) {
            (Some(a), Some(b)) => {
                let difference = (a.into() - b.into()).abs();
                max = max.max(if difference.is_nan() { f64::INFINITY } else { difference });
            }
            (None, None) => return max,
            _ => panic!("the sequences differ in length"),
        }
    }
}

/// The index of the largest value; of equal ones the first.
pub fn argmax(row: &[f32]) -> usize {
    (0..row.len()).rev().max_by(|&i, &j| row[i].total_cmp(&row[j])).unwrap()
}

/// The Kullback-Leibler divergence of the distribution that logits `q` give from the one that `p` give, in nats.
pub fn kl(p: &[f32], q: &[f32]) -> f64 {
    let log_softmax = |row: &[f32]| -> Vec<f64> {
        let max = f64::from(row[argmax(row)]);
        let sum: f64 = row.iter().map(|&v| (f64::from(v) - max).exp()).sum();
        row.iter().map(|&v| f64::from(v) - max - sum.ln()).collect()
    };
    let (p, q) = (log_softmax(p), log_softmax(q));
    p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum()
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
