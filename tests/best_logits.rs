//! The best logits, computed without the others, against all of them.

mod common;

use common::damage::Rng;
use gemrun::gguf::Gguf;
use gemrun::gguf::write::Writer;
use gemrun::team::Team;
use gemrun::weight::{ActsBufs, Numerics, StaticScales, Stored, Weight, acts, multiply, multiply_best};
use gemrun_simd::Format;

const ROWS: usize = 16384;
const COLS: usize = 512;

/// A head of random two-bit weights whose input is not to be rounded.
fn head(rng: &mut Rng, numerics: &Numerics) -> Weight {
    let format = Format::W2C;
    let row_bytes = format.row_bytes(COLS).unwrap();
    let mut writer = Writer::new();
    let bytes: Vec<u8> = (0..ROWS * row_bytes).map(|_| rng.next() as u8).collect();
    writer.tensor("head", 24, &[row_bytes as u64, ROWS as u64], bytes);
    let gguf = Gguf::from_bytes("head", writer.to_vec().unwrap()).unwrap();
    let stored = Stored {
        format,
        bytes: gguf.bytes(gguf.tensor("head").unwrap()),
        packed: None,
        rows: ROWS,
        cols: COLS,
        row_scale: (0..ROWS).map(|_| 0.01 + rng.next() as f32 / u64::MAX as f32 * 0.01).collect(),
        scales: Some(StaticScales::default()),
    };
    Weight::new(stored, numerics)
}

#[test]
fn the_best_are_what_they_are_among_all() {
    let mut rng = Rng(7);
    let numerics = Numerics::default();
    let ops = numerics.ops();
    let weight = head(&mut rng, &numerics);
    for threads in [1, 3] {
        let mut team = Team::new(threads).unwrap();
        let x: Vec<f32> = (0..COLS).map(|_| rng.next() as f32 / u64::MAX as f32 - 0.5).collect();
        let (mut all, mut some) = (vec![0.0; ROWS], vec![0.0; ROWS]);
        for best in [1, 7, 60] {
            team.enter(|team| {
                let mut bufs = ActsBufs::default();
                let [x] = acts(ops, team, &mut bufs, &x, [&weight]);
                multiply(ops, team, [(x, &weight, &mut all)]);
                multiply_best(ops, team, (x, &weight, &mut some), best, &mut Vec::new());
            });
            let mut order: Vec<usize> = (0..ROWS).collect();
            order.sort_by(|&a, &b| all[b].total_cmp(&all[a]));
            for &row in &order[..best] {
                assert_eq!(some[row].to_bits(), all[row].to_bits(), "row {row}, best {best}");
            }
            assert!(some.iter().zip(&all).all(|(some, all)| some == all || *some == f32::MIN));
            let computed = some.iter().filter(|&&y| y != f32::MIN).count();
            println!("best {best}: {computed} of {ROWS} computed in full");
            assert!(computed < ROWS / 2, "{computed}");
        }
    }
}

/// A damaged input is not hidden: every logit says so.
#[test]
fn what_is_not_finite_stays_so() {
    let numerics = Numerics::default();
    let weight = head(&mut Rng(8), &numerics);
    let team = Team::new(1).unwrap();
    let mut x = vec![0.5; COLS];
    x[100] = f32::INFINITY;
    let (mut bufs, mut out) = (ActsBufs::default(), vec![0.0; ROWS]);
    let [x] = acts(numerics.ops(), &team, &mut bufs, &x, [&weight]);
    multiply_best(numerics.ops(), &team, (x, &weight, &mut out), 5, &mut Vec::new());
    assert!(out.iter().all(|y| y.is_nan()));
}
