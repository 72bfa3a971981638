//! The GGUF reader and writer against each other, against files made by other programs, and against damaged files.
//!
//! `GEMRUN_FUZZ_SECONDS` sets how long the random damage goes on (3 by default); a failing file is printed.

mod common;

use std::path::{Path, PathBuf};
use std::time::Instant;

use common::damage::{self, EXTREMES, Rng, injure, put};
use common::examine::{examine, open_damaged, rewrite};
use common::{golden, raw_gguf};
use gemrun::gguf::write::Writer;
use gemrun::gguf::{Gguf, Type, Value};
use proptest::prelude::*;

/// A file of the reference data, or `None` (with a note) where that is not checked out.
fn shared(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(path);
    if !path.exists() {
        println!("skipped: no {}", path.display());
        return None;
    }
    Some(path)
}

#[test]
fn the_real_vocabulary_opens_in_milliseconds_and_is_rewritten_byte_for_byte() {
    let Some(path) = shared("vocab/ggml-vocab-gemma-4.gguf") else { return };
    let bytes = std::fs::read(&path).unwrap();
    let start = Instant::now();
    let file = Gguf::open(&path).unwrap();
    let took = start.elapsed();
    println!("opened in {took:?}");
    assert!(took.as_millis() < 250, "{took:?}");

    assert_eq!(file.name(), "ggml-vocab-gemma-4.gguf");
    assert_eq!(file.string("tokenizer.ggml.model").unwrap(), Some("gemma4"));
    let tokens = file.array("tokenizer.ggml.tokens").unwrap().unwrap();
    assert_eq!((tokens.elem(), tokens.len()), (Type::Str, 262_144));
    assert_eq!(tokens.strings().unwrap().count(), 262_144);
    assert_eq!(tokens.strings().unwrap().nth(2), Some(&b"<bos>"[..]));
    assert_eq!(file.array("tokenizer.ggml.merges").unwrap().unwrap().strings().unwrap().count(), 514_906);
    let types = file.array("tokenizer.ggml.token_type").unwrap().unwrap();
    assert!(types.ints().unwrap().all(|t| (1..=6).contains(&t)));
    assert!(types.floats().is_err() && tokens.ints().is_err());
    assert!(file.header_bytes().len() <= bytes.len());
    assert!(bytes.starts_with(&rewrite(&file)));
}

#[test]
fn files_of_the_reference_writer_are_rewritten_byte_for_byte() {
    let files = [("a_eseries", "q4_0-pure"), ("b_dense", "q4_0-pure"), ("c_moe", "q4_k_m"), ("a_eseries", "bf16")];
    for (model, kind) in files {
        let Some(path) = golden::path(model, &format!("{model}-{kind}.gguf")) else { continue };
        let file = Gguf::open(&path).unwrap();
        assert!(file.tensors().len() > 30);
        let t = file.tensor("blk.0.attn_q.weight").unwrap();
        assert_eq!((t.n_dims, t.shape()), (2, &[256, 128][..]));
        assert_eq!(file.bytes(t).len() as u64, t.bytes);
        file.bytes(t).advise_random();
        file.bytes(t).willneed();
        file.bytes(t).page_in();
        assert_eq!(file.bytes(t).missing(512), 0, "just read");
        assert!(file.tensor("blk.0.attn_q").is_none());
        assert_eq!(std::fs::read(&path).unwrap(), rewrite(&file), "{}", path.display());
    }
}

#[test]
fn typed_access_names_file_key_and_types() {
    let mut w = Writer::new();
    w.metadata("n", -3_i16).metadata("f", 1.5_f64).metadata("b", true).metadata("s", &b"\xff"[..]);
    w.array("u", &[u64::MAX]).array("x", &[1.0_f32, 2.0]);
    let file = Gguf::from_bytes("t.gguf", w.to_vec().unwrap()).unwrap();
    let error = |e: gemrun::Error| e.to_string();
    assert_eq!(file.uint("absent").unwrap(), None);
    assert_eq!(file.float("f").unwrap(), Some(1.5));
    assert_eq!(file.boolean("b").unwrap(), Some(true));
    assert_eq!(error(file.uint("n").unwrap_err()), "t.gguf: key n: is -3: expected 0 or more");
    assert_eq!(error(file.uint("b").unwrap_err()), "t.gguf: key b: is of type bool: expected an integer");
    assert_eq!(error(file.float("n").unwrap_err()), "t.gguf: key n: is of type i16: expected a float");
    assert_eq!(error(file.boolean("x").unwrap_err()), "t.gguf: key x: is of type array of f32: expected a bool");
    assert_eq!(error(file.string("s").unwrap_err()), "t.gguf: key s: is not UTF-8 at byte 0: expected UTF-8 text");
    assert_eq!(error(file.array("s").unwrap_err()), "t.gguf: key s: is of type string: expected an array");
    let array = |key| file.array(key).unwrap().unwrap();
    assert_eq!(
        array("u").ints().err().map(error).as_deref(),
        Some("t.gguf: key u: element 0 is too large: expected at most 9223372036854775807")
    );
    assert_eq!(
        array("x").strings().err().map(error).as_deref(),
        Some("t.gguf: key x: is an array of f32: expected an array of string")
    );
    assert_eq!(array("x").floats().unwrap().collect::<Vec<_>>(), [1.0, 2.0]);
    assert_eq!(array("u").values().collect::<Vec<_>>(), [Value::U64(u64::MAX)]);
}

/// A valid file with a header of about 1 kB that has every type of value and tensors of several formats.
fn small() -> raw_gguf::File {
    let mut w = Writer::new();
    w.metadata("general.architecture", "gemma4").metadata("general.alignment", 64_u32);
    w.metadata("a.u8", 200_u8).metadata("a.i8", -5_i8).metadata("a.u16", 60_000_u16).metadata("a.i16", -3_i16);
    w.metadata("a.u32", 7_u32).metadata("a.i32", -7_i32).metadata("a.u64", u64::MAX).metadata("a.i64", i64::MIN);
    w.metadata("a.f32", 0.5_f32).metadata("a.f64", -1e300).metadata("a.bool", true);
    w.strings("tokenizer.ggml.tokens", ["<pad>", "<eos>", "", "\u{2581}the", "<0x0A>"]);
    w.array("tokenizer.ggml.token_type", &[3, 3, 1, 1, 6]).array("pattern", &[true, false]);
    w.array("floats", &[1.5_f32, f32::NAN]).array("longs", &[1_u64, u64::MAX]).array::<i16>("empty", &[]);
    for (name, type_id, dims, bytes) in [
        ("token_embd.weight", 2, &[64, 5][..], 180),
        ("blk.0.attn_q.weight", 8, &[32, 2, 2], 136),
        ("blk.0.attn_norm.weight", 0, &[5], 20),
        ("v.tower.weight", 17, &[256, 1, 1, 1], 74),
        ("blk.0.scale", 30, &[1, 2, 3, 1], 12),
    ] {
        w.tensor(name, type_id, dims, (0..bytes).map(|i| i as u8).collect::<Vec<u8>>());
    }
    raw_gguf::File::of(&Gguf::from_bytes("small.gguf", w.to_vec().unwrap()).unwrap())
}

#[test]
fn the_loose_parts_make_the_same_file() {
    let bytes = small().bytes();
    let file = Gguf::from_bytes("small.gguf", bytes.clone()).unwrap();
    examine(&file);
    assert_eq!(rewrite(&file), bytes);
    println!("{} bytes, {} of them header", bytes.len(), file.header_bytes().len());
}

#[test]
fn every_truncation_is_refused() {
    let bytes = small().bytes();
    let file = Gguf::from_bytes("small.gguf", bytes.clone()).unwrap();
    let last = file.tensors().last().unwrap();
    // The padding after the last tensor may be missing.
    let end = (file.data_start() + last.offset + last.bytes) as usize;
    for len in 0..bytes.len() {
        let result = open_damaged(bytes[..len].to_vec());
        assert_eq!(result.is_ok(), len >= end, "{len} bytes");
    }
    let message = open_damaged(bytes[..end - 5].to_vec()).unwrap_err().to_string();
    let offset = last.offset;
    assert_eq!(
        message,
        format!("x.gguf: tensor blk.0.scale: needs 12 bytes at offset {offset}, file ends 5 bytes short")
    );
}

#[test]
fn every_change_of_one_byte_of_the_header_is_refused_or_harmless() {
    let bytes = small().bytes();
    let header = Gguf::from_bytes("small.gguf", bytes.clone()).unwrap().header_bytes().len();
    let mut accepted = 0;
    for at in 0..header {
        for value in 0..=255 {
            let mut damaged = bytes.clone();
            damaged[at] = value;
            accepted += usize::from(open_damaged(damaged).is_ok());
        }
    }
    println!("{accepted} of {} accepted", header * 256);
    // Most bytes are text, which may be anything valid; the structure may not.
    assert!(accepted > 0 && accepted < header * 256 / 3);
}

#[test]
fn extreme_values_in_any_two_integers_are_refused_or_harmless() {
    let (bytes, fields) = small().bytes_and_fields();
    assert!(fields.len() > 60, "{}", fields.len());
    for (i, &a) in fields.iter().enumerate() {
        for &b in &fields[i..] {
            for x in EXTREMES {
                // All values against all would take minutes; each meets the nastiest and a neighbour.
                for y in [u64::MAX, 1 << 62, x] {
                    let mut damaged = bytes.clone();
                    put(&mut damaged, a, x);
                    put(&mut damaged, b, y);
                    let _ = open_damaged(damaged);
                }
            }
        }
    }
}

#[test]
fn random_damage_is_refused_or_harmless() {
    let (bytes, fields) = small().bytes_and_fields();
    let (mut runs, mut accepted) = (0_u64, 0_u64);
    let end = Instant::now() + damage::time();
    while Instant::now() < end {
        for _ in 0..256 {
            let mut damaged = bytes.clone();
            injure(&mut damaged, &fields, &mut Rng(runs));
            let shown = damaged.clone();
            match std::panic::catch_unwind(|| open_damaged(damaged).is_ok()) {
                Ok(ok) => accepted += u64::from(ok),
                Err(panic) => {
                    println!("seed {runs}: {shown:02x?}");
                    std::panic::resume_unwind(panic);
                }
            }
            runs += 1;
        }
    }
    println!("{runs} files, {accepted} accepted");
    assert!(accepted > 0 && accepted < runs);
}

/// What the writer is given, in a form proptest can make.
#[derive(Debug, Clone)]
enum Meta {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    Str(Vec<u8>),
    U8s(Vec<u8>),
    I8s(Vec<i8>),
    U16s(Vec<u16>),
    I16s(Vec<i16>),
    U32s(Vec<u32>),
    I32s(Vec<i32>),
    U64s(Vec<u64>),
    I64s(Vec<i64>),
    F32s(Vec<f32>),
    F64s(Vec<f64>),
    Bools(Vec<bool>),
    Strs(Vec<Vec<u8>>),
}

impl Meta {
    fn put(&self, w: &mut Writer<'_>, key: &str) {
        match self {
            Meta::U8(x) => w.metadata(key, *x),
            Meta::I8(x) => w.metadata(key, *x),
            Meta::U16(x) => w.metadata(key, *x),
            Meta::I16(x) => w.metadata(key, *x),
            Meta::U32(x) => w.metadata(key, *x),
            Meta::I32(x) => w.metadata(key, *x),
            Meta::U64(x) => w.metadata(key, *x),
            Meta::I64(x) => w.metadata(key, *x),
            Meta::F32(x) => w.metadata(key, *x),
            Meta::F64(x) => w.metadata(key, *x),
            Meta::Bool(x) => w.metadata(key, *x),
            Meta::Str(x) => w.metadata(key, &x[..]),
            Meta::U8s(x) => w.array(key, x),
            Meta::I8s(x) => w.array(key, x),
            Meta::U16s(x) => w.array(key, x),
            Meta::I16s(x) => w.array(key, x),
            Meta::U32s(x) => w.array(key, x),
            Meta::I32s(x) => w.array(key, x),
            Meta::U64s(x) => w.array(key, x),
            Meta::I64s(x) => w.array(key, x),
            Meta::F32s(x) => w.array(key, x),
            Meta::F64s(x) => w.array(key, x),
            Meta::Bools(x) => w.array(key, x),
            Meta::Strs(x) => w.strings(key, x),
        };
    }

    /// The value read back is this one.
    fn is(&self, value: Value<'_>) -> bool {
        fn all<'a, T: Copy + PartialEq>(value: Value<'a>, want: &[T], get: fn(Value<'a>) -> Option<T>) -> bool {
            let Value::Array(array) = value else { return false };
            array.len() == want.len() && array.values().map(get).eq(want.iter().map(|&x| Some(x)))
        }
        macro_rules! get {
            ($variant:ident) => {
                |v| if let Value::$variant(x) = v { Some(x) } else { None }
            };
        }
        let floats = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let doubles = |x: &[f64]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        match (self, value) {
            (Meta::U8(a), Value::U8(b)) => *a == b,
            (Meta::I8(a), Value::I8(b)) => *a == b,
            (Meta::U16(a), Value::U16(b)) => *a == b,
            (Meta::I16(a), Value::I16(b)) => *a == b,
            (Meta::U32(a), Value::U32(b)) => *a == b,
            (Meta::I32(a), Value::I32(b)) => *a == b,
            (Meta::U64(a), Value::U64(b)) => *a == b,
            (Meta::I64(a), Value::I64(b)) => *a == b,
            (Meta::F32(a), Value::F32(b)) => a.to_bits() == b.to_bits(),
            (Meta::F64(a), Value::F64(b)) => a.to_bits() == b.to_bits(),
            (Meta::Bool(a), Value::Bool(b)) => *a == b,
            (Meta::Str(a), Value::Str(b)) => a == b,
            (Meta::U8s(a), b) => all(b, a, get!(U8)),
            (Meta::I8s(a), b) => all(b, a, get!(I8)),
            (Meta::U16s(a), b) => all(b, a, get!(U16)),
            (Meta::I16s(a), b) => all(b, a, get!(I16)),
            (Meta::U32s(a), b) => all(b, a, get!(U32)),
            (Meta::I32s(a), b) => all(b, a, get!(I32)),
            (Meta::U64s(a), b) => all(b, a, get!(U64)),
            (Meta::I64s(a), b) => all(b, a, get!(I64)),
            (Meta::Bools(a), b) => all(b, a, get!(Bool)),
            (Meta::F32s(a), b) => all(b, &floats(a), |v| if let Value::F32(x) = v { Some(x.to_bits()) } else { None }),
            (Meta::F64s(a), b) => all(b, &doubles(a), |v| if let Value::F64(x) = v { Some(x.to_bits()) } else { None }),
            (Meta::Strs(a), Value::Array(b)) => b.strings().unwrap().eq(a.iter().map(|x| &x[..])),
            _ => false,
        }
    }
}

fn list<T: Arbitrary + 'static>() -> impl Strategy<Value = Vec<T>> {
    proptest::collection::vec(any::<T>(), 0..6)
}

fn meta() -> impl Strategy<Value = Meta> {
    let f32s = any::<u32>().prop_map(f32::from_bits);
    let f64s = any::<u64>().prop_map(f64::from_bits);
    let text = || proptest::collection::vec(any::<u8>(), 0..20);
    let scalars = prop_oneof![
        any::<u8>().prop_map(Meta::U8),
        any::<i8>().prop_map(Meta::I8),
        any::<u16>().prop_map(Meta::U16),
        any::<i16>().prop_map(Meta::I16),
        any::<u32>().prop_map(Meta::U32),
        any::<i32>().prop_map(Meta::I32),
        any::<u64>().prop_map(Meta::U64),
        any::<i64>().prop_map(Meta::I64),
        f32s.clone().prop_map(Meta::F32),
        f64s.clone().prop_map(Meta::F64),
        any::<bool>().prop_map(Meta::Bool),
        text().prop_map(Meta::Str),
    ];
    let arrays = prop_oneof![
        list().prop_map(Meta::U8s),
        list().prop_map(Meta::I8s),
        list().prop_map(Meta::U16s),
        list().prop_map(Meta::I16s),
        list().prop_map(Meta::U32s),
        list().prop_map(Meta::I32s),
        list().prop_map(Meta::U64s),
        list().prop_map(Meta::I64s),
        list().prop_map(Meta::Bools),
        proptest::collection::vec(f32s, 0..6).prop_map(Meta::F32s),
        proptest::collection::vec(f64s, 0..6).prop_map(Meta::F64s),
        proptest::collection::vec(text(), 0..6).prop_map(Meta::Strs),
    ];
    prop_oneof![scalars, arrays]
}

/// Type id, block elements and block bytes of some formats, and up to four dimensions in blocks.
fn tensor() -> impl Strategy<Value = (u32, Vec<u64>, usize)> {
    let formats = prop_oneof![Just((0, 1, 4)), Just((2, 32, 18)), Just((14, 256, 210)), Just((24, 1, 1))];
    (formats, proptest::collection::vec(1_u64..4, 1..=4)).prop_map(|((id, elems, bytes), mut dims)| {
        let blocks: u64 = dims.iter().product();
        dims[0] *= elems;
        (id, dims, blocks as usize * bytes)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_is_written_is_read(
        pairs in proptest::collection::vec(meta(), 0..12),
        tensors in proptest::collection::vec(tensor(), 0..6),
        alignment in prop_oneof![Just(None), (3_u32..=16).prop_map(|log| Some(1_u32 << log))],
        fill in any::<u8>(),
    ) {
        let mut w = Writer::new();
        for (i, meta) in pairs.iter().enumerate() {
            meta.put(&mut w, &format!("key.{i}"));
        }
        if let Some(alignment) = alignment {
            w.metadata("general.alignment", alignment);
        }
        let data = |i: usize, len: usize| (0..len).map(move |k| fill.wrapping_add((i + k) as u8)).collect::<Vec<u8>>();
        for (i, (id, dims, len)) in tensors.iter().enumerate() {
            if i % 2 == 0 {
                w.tensor(&format!("t{i}"), *id, dims, data(i, *len));
            } else {
                let pieces = data(i, *len);
                w.tensor_with(&format!("t{i}"), *id, dims, move |out| {
                    pieces.chunks(7).try_for_each(|piece| out.write_all(piece)).unwrap();
                    Ok(())
                });
            }
        }
        let bytes = w.to_vec().unwrap();
        let file = Gguf::from_bytes("p.gguf", bytes.clone()).unwrap();
        prop_assert_eq!(file.version(), 3);
        prop_assert_eq!(file.alignment(), alignment.map_or(32, u64::from));
        prop_assert_eq!(file.metadata().count(), pairs.len() + usize::from(alignment.is_some()));
        for (i, (meta, (key, value))) in pairs.iter().zip(file.metadata()).enumerate() {
            prop_assert_eq!(key, format!("key.{}", i));
            prop_assert!(meta.is(value), "{:?} became {:?}", meta, value);
        }
        for (i, ((id, dims, len), t)) in tensors.iter().zip(file.tensors()).enumerate() {
            prop_assert_eq!((*id, &dims[..]), (t.type_id, t.shape()));
            prop_assert_eq!(&file.bytes(t)[..], &data(i, *len)[..]);
        }
        examine(&file);
        prop_assert_eq!(rewrite(&file), bytes);
    }
}

#[test]
fn the_writer_refuses_what_the_reader_would() {
    let error = |w: Writer<'_>| w.to_vec().unwrap_err().to_string();
    let mut w = Writer::new();
    w.metadata("a", 1_u8).metadata("a", 2_u8);
    assert_eq!(error(w), "new file: key a: occurs twice: expected unique keys");
    let mut w = Writer::new();
    w.tensor("t", 2, &[33], vec![0; 18]);
    assert_eq!(error(w), "new file: tensor t: has rows of 33 elements: expected a multiple of 32, the block of Q4_0");
    let mut w = Writer::new();
    w.tensor("t", 0, &[4], vec![0; 15]);
    assert_eq!(error(w), "new file: tensor t: has 15 bytes of data: expected 16");
    let mut w = Writer::new();
    w.metadata("general.alignment", 24_u32);
    assert_eq!(error(w), "new file: key general.alignment: is 24: expected a power of two from 8 to 65536");
}

/// Tables are let go of while others may read them: what they hold stays what the file holds.
#[test]
#[cfg(target_os = "linux")]
fn bytes_that_were_let_go_of_are_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("demo.gguf");
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/demo.gguf"), &path).unwrap();
    let file = Gguf::open(&path).unwrap();
    let largest = file.tensors().iter().max_by_key(|tensor| file.bytes(tensor).len()).unwrap();
    let bytes = file.bytes(largest);
    let resident = || -> usize {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let map = maps.split_once(path.to_str().unwrap()).unwrap().1;
        let line = map.lines().find_map(|line| line.strip_prefix("Rss:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().trim().parse::<usize>().unwrap() * 1024
    };
    let before = bytes.to_vec();
    let full = resident();
    assert!(full >= bytes.len(), "{full} of {}", bytes.len());
    bytes.let_go();
    assert!(resident() <= full - bytes.len() + (1 << 13), "{full}, then {}", resident());
    assert!(before == *bytes);
}
