//! Time to build the tokenizer of a GGUF file and to encode and decode text with it.
//!
//! The file is `GEMRUN_BENCH_MODEL`, or the small vocabulary of the tests. Needs no weights.

use std::hint::black_box;
use std::path::PathBuf;

use criterion::{Criterion, criterion_group, criterion_main};
use gemrun::gguf::Gguf;
use gemrun::tokenizer::Tokenizer;

fn tokenizer(c: &mut Criterion) {
    let small = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/golden/tok/merges/vocab.gguf");
    let path = std::env::var_os("GEMRUN_BENCH_MODEL").map_or(PathBuf::from(small), PathBuf::from);
    c.bench_function("open", |b| b.iter(|| Gguf::open(&path).expect("a GGUF file")));
    let gguf = Gguf::open(&path).expect("a GGUF file");
    c.bench_function("build", |b| b.iter(|| Tokenizer::from_gguf(&gguf).expect("a vocabulary")));

    let tokenizer = Tokenizer::from_gguf(&gguf).expect("a vocabulary");
    let prose = include_str!("../src/tokenizer.rs");
    for (name, text) in [("4 KiB of source", &prose[..4096]), ("1 MiB of a", &"a".repeat(1 << 20))] {
        for markers in [true, false] {
            let name = format!("encode {name}{}", if markers { ", markers" } else { "" });
            c.bench_function(&name, |b| b.iter(|| tokenizer.encode(black_box(text), markers)));
        }
    }
    let ids = tokenizer.encode(prose, true);
    c.bench_function("decode source", |b| b.iter(|| tokenizer.decode(black_box(&ids), true)));
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(10).warm_up_time(std::time::Duration::from_millis(500))
        .measurement_time(std::time::Duration::from_secs(2));
    targets = tokenizer
}
criterion_main!(benches);
