//! The fuzzing targets without a fuzzer: every input that was kept, then mutations of them at random for
//! `GEMRUN_FUZZ_SECONDS` (3 by default) a target. An input that fails is printed; `cargo fuzz` digs deeper
//! (`tests/fuzz/Cargo.toml`).

#[path = "fuzz/src/lib.rs"]
mod targets;

use std::fs;
use std::panic::{catch_unwind, resume_unwind};
use std::path::Path;
use std::time::Instant;

use targets::common::damage::{self, Draw, Rng, injure};
use targets::common::raw_gguf::Field;

fn drive(target: &str, run: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target);
    let mut kept: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    kept.sort();
    let mut kept: Vec<Vec<u8>> = kept.iter().map(|path| fs::read(path).unwrap()).collect();
    assert!(kept.len() > 3, "{} holds inputs", folder.display());
    if cfg!(miri) {
        // It takes seconds for what takes microseconds.
        kept.sort_by_key(Vec::len);
        kept.truncate(6);
    }
    let try_out = |input: &[u8]| {
        if let Err(panic) = catch_unwind(|| run(input)) {
            println!("{target} fails on {input:02x?}");
            resume_unwind(panic);
        }
    };
    kept.iter().for_each(|input| try_out(input));
    let (mut runs, end) = (0, Instant::now() + damage::time());
    while Instant::now() < end {
        let rng = &mut Rng(runs);
        let mut input = kept[rng.below(kept.len())].clone();
        if rng.below(4) == 0 {
            let other = &kept[rng.below(kept.len())];
            input.truncate(rng.below(input.len() + 1));
            input.extend_from_slice(&other[rng.below(other.len() + 1)..]);
        }
        input.resize(input.len().max(8), 0);
        let fields: Vec<Field> =
            (0..4).map(|_| Field { at: rng.below(input.len()), width: 1 << rng.below(4) }).collect();
        injure(&mut input, &fields, rng);
        try_out(&input);
        runs += 1;
    }
    println!("{target}: {} kept inputs, {runs} mutations", kept.len());
}

#[test]
fn gguf() {
    drive("gguf", targets::gguf::run);
}

#[test]
fn tokenizer() {
    drive("tokenizer", targets::tokenizer::run);
}

#[test]
fn template() {
    drive("template", targets::template::run);
}

#[test]
fn output() {
    drive("output", targets::output::run);
}

#[test]
fn kernels() {
    drive("kernels", targets::kernels::run);
}
