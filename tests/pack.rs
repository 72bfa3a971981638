//! Packed copies: the same bits as the file they were made from, never used for another, never half written.
//!
//! Small models are packed into stores of their own. What is damaged here is the copy; damaged models have their own suite.

mod common;
mod oracle;

use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, SystemTime};

use common::golden;
use common::run::{self, EXACT, INT8, Way};
use gemrun::Kind;
use gemrun::gguf::Gguf;
use gemrun::kv::KvType;
use gemrun::model::Model;
use gemrun::pack::{self, Found, Packed};
use gemrun::weight::{Act, Numerics};
use gemrun_simd::interleave::ROWS;
use gemrun_simd::{Format, Isa, Layout, find};
use oracle::synth::{self, Experts, Spec};
use sha2::{Digest, Sha256};

/// A model's file and a store, in a directory of their own.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new(model: &[u8]) -> Place {
        let place = Place { folder: tempfile::tempdir().unwrap() };
        fs::write(place.model(), model).unwrap();
        place
    }

    fn of(spec: &Spec) -> Place {
        Place::new(&synth::gguf(spec))
    }

    fn model(&self) -> PathBuf {
        self.folder.path().join("model.gguf")
    }

    fn store(&self) -> PathBuf {
        self.folder.path().join("home")
    }

    fn source(&self) -> Gguf {
        Gguf::open(&self.model()).unwrap()
    }

    fn try_pack(&self, source: &Gguf, progress: &mut pack::Progress) -> gemrun::Result<PathBuf> {
        let names = Model::load(source, &Numerics::default()).unwrap().interleavable().to_vec();
        pack::write(&self.store(), source, &names, progress)
    }

    fn pack(&self) -> PathBuf {
        self.try_pack(&self.source(), &mut go_on).unwrap()
    }

    fn found(&self) -> Found {
        pack::find(&self.store(), &self.source())
    }

    fn copy(&self) -> Packed {
        match self.found() {
            Found::Copy(packed) => packed,
            Found::Nothing => panic!("no copy"),
            Found::Unusable(error) => panic!("{error}"),
        }
    }

    /// Why the copy there is cannot be used.
    fn trouble(&self) -> String {
        match self.found() {
            Found::Unusable(error) => error.to_string(),
            Found::Nothing => panic!("no copy"),
            Found::Copy(_) => panic!("the copy is used"),
        }
    }

    /// Names of everything in the directory of copies.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(pack::directory(&self.store())).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn gemrun(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gemrun"));
        for variable in ["GEMRUN_THREADS", "GEMRUN_KERNEL", "NO_COLOR"] {
            command.env_remove(variable);
        }
        let command = command.args(arguments).stdin(Stdio::null()).current_dir(self.folder.path());
        command.env("GEMRUN_HOME", self.store()).output().unwrap()
    }
}

fn go_on(_: u64, _: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// A small model in which several formats interleave.
fn spec() -> Spec {
    let formats = vec![("token_embd", "Q6_K"), ("ffn_down", "Q4_K"), ("attn_k", "Q8_0"), ("proj", "F16"), ("", "Q4_0")];
    Spec { dim: 256, ff: 256, ff_shared: 256, layers: "SFS", shared: 1, formats, ..Spec::per_layer(5) }
}

/// Writes over some bytes, and leaves the time of change as it was.
fn overwrite(path: &Path, at: u64, bytes: &[u8]) {
    let mut file = File::options().write(true).open(path).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(bytes).unwrap();
    file.set_modified(modified).unwrap();
}

fn bits(logits: Vec<f32>) -> Vec<u32> {
    logits.into_iter().map(f32::to_bits).collect()
}

fn layouts(model: &Model) -> Vec<Layout> {
    let mut weights = vec![&model.output];
    for layer in &model.layers {
        weights.extend([&layer.attn_q, &layer.attn_output, &layer.ffn_gate, &layer.ffn_up, &layer.ffn_down]);
        weights.extend(layer.attn_kv.iter().map(|kv| &kv.attn_k));
        weights.extend(layer.attn_kv.iter().filter_map(|kv| kv.attn_v.as_ref()));
        weights.extend(layer.moe.iter().flat_map(|m| &m.experts).flat_map(|e| [&e.gate, &e.up, &e.down]));
    }
    weights.into_iter().map(|weight| weight.kernel().layout()).collect()
}

// The same bits.

#[test]
fn golden_models_give_the_same_bits() {
    for (name, kind) in golden::QUANTISED {
        let Some(file) = golden::path(name, &format!("{name}-{kind}.gguf")) else { continue };
        let place = Place::new(&fs::read(file).unwrap());
        place.pack();
        let (source, packed, tokens) = (place.source(), place.copy(), golden::tokens(name, 64));
        let model = Model::load_packed(&source, Some(&packed), &Numerics::default()).unwrap();
        assert!(model.packed() && layouts(&model).contains(&Layout::Interleaved));
        if kind == "q4_0-pure" {
            assert!(layouts(&model).iter().all(|layout| *layout == Layout::Interleaved), "{name}");
        }
        let usual = Way { kv: KvType::F16, ..INT8 };
        let expected = bits(run::logits(&source, &tokens, usual));
        for isa in Isa::ALL.into_iter().filter(|isa| isa.supported()) {
            for (batch, threads) in [(64, 2), (1, 1), (7, 3)] {
                let way = Way { isa: Some(isa), batch, threads, ..usual };
                let found = bits(run::logits_packed(&source, Some(&packed), &tokens, way));
                assert!(found == expected, "{name} {kind} {way:?}");
            }
        }
    }
}

#[test]
fn the_demo_gives_the_same_bits() {
    let place = Place::new(gemrun::registry::DEMO);
    place.pack();
    let (source, packed) = (place.source(), place.copy());
    let tokens: Vec<u32> = (0..40).map(|i| i * 37 % 2048).collect();
    let found = run::logits_packed(&source, Some(&packed), &tokens, INT8);
    assert!(bits(found) == bits(run::logits(&source, &tokens, INT8)));
}

/// Fused tensors, experts, vocabularies that eight does not divide, heads of their own.
#[test]
fn models_of_many_shapes_give_the_same_bits() {
    let mut interleaved = 0;
    for seed in 0..24 {
        let format = ["Q4_0", "Q8_0", "IQ4_NL"][seed as usize % 3];
        let spec = Spec::random(seed).all_in(format);
        let place = Place::of(&spec);
        place.pack();
        let (source, packed, tokens) = (place.source(), place.copy(), synth::tokens(&spec, 9));
        let way = Way { batch: 4, threads: 2, ..INT8 };
        let found = bits(run::logits_packed(&source, Some(&packed), &tokens, way));
        assert!(found == bits(run::logits(&source, &tokens, way)), "{spec:?}");
        let model = Model::load_packed(&source, Some(&packed), &Numerics::default()).unwrap();
        interleaved += usize::from(layouts(&model).iter().all(|layout| *layout == Layout::Interleaved));
        assert_eq!(model.output.kernel().layout() == Layout::Interleaved, spec.vocab.is_multiple_of(ROWS));
        place.copy().check(&source, &mut go_on).unwrap();
    }
    assert!((1..24).contains(&interleaved), "{interleaved} models without a matrix in its own order");
}

#[test]
fn parts_that_would_cut_eight_rows_stay_in_the_order_of_the_file() {
    for (ff, whole) in [(36, false), (32, true)] {
        let experts = Experts { count: 4, used: 2, ff, fused_gate_up: true, output_scale: true };
        let spec = Spec { experts: Some(experts), ..Spec::moe(3) }.all_in("Q4_0");
        let place = Place::of(&spec);
        place.pack();
        let (source, packed, tokens) = (place.source(), place.copy(), synth::tokens(&spec, 9));
        let model = Model::load_packed(&source, Some(&packed), &Numerics::default()).unwrap();
        let expert = &model.layers[0].moe.as_ref().unwrap().experts[1];
        for weight in [&expert.gate, &expert.up] {
            assert_eq!(weight.kernel().layout() == Layout::Interleaved, whole, "{ff} rows");
        }
        let found = bits(run::logits_packed(&source, Some(&packed), &tokens, INT8));
        assert!(found == bits(run::logits(&source, &tokens, INT8)), "{ff}");
    }
}

#[test]
fn float_activations_and_named_kernels_read_the_file_itself() {
    let place = Place::of(&spec());
    place.pack();
    let (source, packed, tokens) = (place.source(), place.copy(), synth::tokens(&spec(), 9));
    let load = |numerics| Model::load_packed(&source, Some(&packed), &numerics).unwrap();
    assert!(!load(Numerics { act: Act::Float, ..Numerics::default() }).packed());
    let exact = bits(run::logits_packed(&source, Some(&packed), &tokens, EXACT));
    assert!(exact == bits(run::logits(&source, &tokens, EXACT)));

    let named = |kernel| load(Numerics { kernel: find(kernel).unwrap(), ..Numerics::default() });
    let of_file = named("q4_0/scalar");
    assert_eq!(of_file.layers[0].attn_q.kernel().name(), "q4_0/scalar");
    assert_eq!(of_file.layers[0].ffn_down.kernel().layout(), Layout::Interleaved);
    let of_copy = named("q4_0x8/scalar");
    assert_eq!(of_copy.layers[0].attn_q.kernel().name(), "q4_0x8/scalar");
}

// What is in a copy.

/// The matrices a token is multiplied by and nothing else, each eight rows at a time.
#[test]
fn a_copy_holds_the_matrices_interleaved() {
    let place = Place::of(&Spec { redundant_kv: true, ..spec() });
    let path = place.pack();
    assert!(path.starts_with(pack::directory(&place.store())));
    assert_eq!(place.names(), ["lock", path.file_name().unwrap().to_str().unwrap()]);
    let (source, copy) = (place.source(), Gguf::open(&path).unwrap());
    assert_eq!(copy.string("general.architecture").unwrap(), Some("gemrun-pack"));
    let recorded = copy.string("pack.source.path").unwrap().map(PathBuf::from);
    assert_eq!(recorded, Some(fs::canonicalize(place.model()).unwrap()));
    assert_eq!(copy.uint("pack.source.bytes").unwrap(), Some(source.file_bytes()));

    let names: Vec<&str> = copy.tensors().iter().map(|tensor| &*tensor.name).collect();
    for name in ["token_embd.weight", "blk.0.attn_q.weight", "blk.1.attn_k.weight", "blk.2.ffn_down.weight"] {
        assert!(names.contains(&name), "{name}");
    }
    // The table, a float matrix, keys of a layer that uses another's.
    for name in ["per_layer_token_embd.weight", "per_layer_model_proj.weight", "blk.2.attn_k.weight"] {
        assert!(source.tensor(name).is_some() && !names.contains(&name), "{name}");
    }
    for tensor in copy.tensors().iter().filter(|tensor| tensor.name != "pack.sha256") {
        let own = source.tensor(&tensor.name).unwrap();
        assert_eq!((own.type_id, own.dims), (tensor.type_id, tensor.dims));
        assert!((copy.data_start() + tensor.offset).is_multiple_of(65_536));
        let (format, bytes) = (Format::from_ggml(tensor.type_id).unwrap(), copy.bytes(tensor));
        let eight = ROWS * format.row_bytes(tensor.dims[0] as usize).unwrap();
        let mut rows = vec![0; bytes.len()];
        bytes.chunks(eight).zip(rows.chunks_mut(eight)).for_each(|(from, to)| format.deinterleave(from, to));
        assert!(rows == *source.bytes(own), "{}", tensor.name);
    }
    let digests = copy.bytes(copy.tensor("pack.sha256").unwrap());
    assert_eq!(digests[..32], Sha256::digest(fs::read(place.model()).unwrap())[..]);
}

/// If this digest changes, copies that people have are read in another order than they were written: give `LAYOUT` in
/// `pack.rs` the next number, and only then record the new digest.
#[test]
fn the_order_of_bytes_has_a_number() {
    let place = Place::of(&spec());
    let copy = Gguf::open(&place.pack()).unwrap();
    let mut hash = Sha256::new();
    copy.tensors().iter().filter(|t| t.name != "pack.sha256").for_each(|t| hash.update(&*copy.bytes(t)));
    let digest: String = hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!((copy.uint("pack.layout").unwrap(), &*digest), (Some(2), "00273a0e3d16b677"));
}

// Not used for what it does not fit.

#[test]
fn a_copy_follows_its_model_wherever_it_is_moved() {
    let place = Place::of(&spec());
    place.pack();
    let moved = place.folder.path().join("other name.gguf");
    fs::rename(place.model(), &moved).unwrap();
    let source = Gguf::open(&moved).unwrap();
    assert!(matches!(pack::find(&place.store(), &source), Found::Copy(_)));
    // Packed again under its new name, it has one copy.
    place.try_pack(&source, &mut go_on).unwrap();
    assert_eq!(place.names().len(), 2, "{:?}", place.names());
    assert!(matches!(pack::find(&place.store(), &source), Found::Copy(_)));
}

#[test]
fn a_changed_model_is_not_packed_any_more() {
    let place = Place::of(&spec());
    let path = place.pack();
    let changed =
        format!("{}: model.gguf has changed since it was packed", path.file_name().unwrap().to_str().unwrap());

    // Another time.
    let file = File::options().write(true).open(place.model()).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    file.set_modified(modified + Duration::from_nanos(1_000)).unwrap();
    assert_eq!(place.trouble(), changed);
    file.set_modified(modified).unwrap();
    place.copy();
    // Another size.
    let bytes = fs::read(place.model()).unwrap();
    fs::write(place.model(), [&bytes[..], &[0]].concat()).unwrap();
    assert_eq!(place.trouble(), changed);
    // Another model in its place; packing it replaces the copy.
    fs::write(place.model(), synth::gguf(&Spec { seed: 6, ..spec() })).unwrap();
    assert_eq!(place.trouble(), changed);
    let renewed = place.pack();
    assert!(renewed != path && !path.exists());
    place.copy();
}

/// Same size, same shapes, same time: what unpacking an archive may give. Each has its own copy.
#[test]
fn models_that_differ_in_weights_only_are_told_apart() {
    let place = Place::of(&spec());
    let path = place.pack();
    let modified = fs::metadata(place.model()).unwrap().modified().unwrap();
    let other = place.folder.path().join("other.gguf");
    fs::write(&other, synth::gguf(&Spec { seed: 6, ..spec() })).unwrap();
    File::options().write(true).open(&other).unwrap().set_modified(modified).unwrap();
    let source = Gguf::open(&other).unwrap();
    assert!(source.file_bytes() == place.source().file_bytes() && source.tensors() == place.source().tensors());
    assert!(matches!(pack::find(&place.store(), &source), Found::Nothing));
    place.try_pack(&source, &mut go_on).unwrap();
    let Found::Copy(copy) = pack::find(&place.store(), &source) else { panic!("no copy") };
    copy.check(&source, &mut go_on).unwrap();
    place.copy().check(&place.source(), &mut go_on).unwrap();

    fs::rename(&other, place.model()).unwrap();
    fs::remove_file(pack::directory(&place.store()).join(copy.name())).unwrap();
    let name = path.file_name().unwrap().to_str().unwrap();
    assert_eq!(place.trouble(), format!("{name}: model.gguf has changed since it was packed"));
}

/// Every byte of the header, one after another, and every byte of the digests of source and header.
#[test]
fn a_damaged_header_is_never_used() {
    let place = Place::of(&Spec { layers: "SF", shared: 0, ..spec() });
    let path = place.pack();
    let copy = Gguf::open(&path).unwrap();
    let header = copy.header_bytes().to_vec();
    let digests = copy.data_start() + copy.tensor("pack.sha256").unwrap().offset;
    for (at, &byte) in header.iter().enumerate() {
        for flip in [1, 0x80] {
            overwrite(&path, at as u64, &[byte ^ flip]);
            // The record of where the source was is all that makes a copy known once its key is damaged.
            assert!(!matches!(place.found(), Found::Copy(_)), "byte {at} ^ {flip:#x}");
        }
        overwrite(&path, at as u64, &[byte]);
    }
    place.copy();
    overwrite(&path, digests + 40, &[0; 2]);
    assert!(place.trouble().ends_with(": header: damaged"));
}

#[test]
fn a_copy_cut_short_is_never_used() {
    let place = Place::of(&spec());
    let path = place.pack();
    let bytes = fs::read(&path).unwrap();
    let copy = Gguf::open(&path).unwrap();
    let digests = copy.tensor("pack.sha256").unwrap();
    let end = (copy.data_start() + digests.offset + digests.bytes) as usize;
    drop(copy);
    for len in [0, 1, 23, 24, 100, 1000, 65_535, 65_536, 100_000, end / 2, end - 97, end - 96, end - 1] {
        fs::write(&path, &bytes[..len]).unwrap();
        assert!(place.trouble().starts_with("model-"), "{len}");
        // And not by way of the program.
        let run = place.gemrun(&["run", "model.gguf", "--raw", "the", "-n", "2", "--stats", "-s", "1"]);
        let stderr = String::from_utf8(run.stderr).unwrap();
        assert!(run.status.success() && stderr.contains("note: packed copy not used: model-"), "{len}: {stderr}");
        assert!(stderr.contains(": renew it with gemrun pack model.gguf\n") && stderr.contains("\"packed\":false"));
    }
}

/// A header that fits its digest and says something else: read as far as it goes, and used only if nothing a product needs
/// is different.
#[test]
fn a_forged_header_does_no_harm() {
    let place = Place::of(&Spec { layers: "SF", shared: 0, ..spec() });
    let path = place.pack();
    let (original, source) = (fs::read(&path).unwrap(), place.source());
    let copy = Gguf::open(&path).unwrap();
    let (header, start) = (copy.header_bytes().len(), copy.data_start() as usize);
    let digest = start + copy.tensor("pack.sha256").unwrap().offset as usize + 32;
    drop(copy);
    let (mut used, mut refused) = (0, 0);
    for at in 0..header {
        for flip in [1, 2, 0x10, 0x80] {
            let mut forged = original.clone();
            forged[at] ^= flip;
            let hash: [u8; 32] = Sha256::digest(&forged[..start]).into();
            forged[digest..digest + 32].copy_from_slice(&hash);
            overwrite(&path, 0, &forged[..start]);
            overwrite(&path, digest as u64, &hash);
            match pack::find(&place.store(), &source) {
                Found::Copy(packed) => {
                    used += 1;
                    Model::load_packed(&source, Some(&packed), &Numerics::default()).unwrap();
                }
                Found::Nothing | Found::Unusable(_) => refused += 1,
            }
        }
    }
    assert!(used > 100 && refused > 1000, "{used} used, {refused} refused");
}

#[test]
fn damaged_data_is_found_when_looked_for() {
    let place = Place::of(&spec());
    let path = place.pack();
    let (copy, source) = (Gguf::open(&path).unwrap(), place.source());
    place.copy().check(&source, &mut go_on).unwrap();
    let last = copy.tensors().iter().rev().nth(1).unwrap();
    for at in [copy.data_start() + 3000, copy.data_start() + last.offset + last.bytes - 1] {
        let byte = fs::read(&path).unwrap()[at as usize];
        overwrite(&path, at, &[!byte]);
        let error = place.copy().check(&source, &mut go_on).unwrap_err();
        assert_eq!((error.kind(), error.to_string().ends_with(": data: damaged")), (Kind::Invalid, true), "{error}");
        overwrite(&path, at, &[byte]);
    }
    place.copy().check(&source, &mut go_on).unwrap();
    // A change of the model that neither its time nor the samples in its key show.
    overwrite(&place.model(), source.file_bytes() - 1, &[0x55]);
    let error = place.copy().check(&source, &mut go_on).unwrap_err();
    assert_eq!(error.to_string(), "model.gguf: is not the file that was packed");
}

#[test]
fn files_that_are_no_copies_are_left_alone() {
    let place = Place::of(&spec());
    let path = place.pack();
    let other = path.with_file_name("other.gguf");
    fs::write(&other, synth::gguf(&spec())).unwrap();
    fs::write(path.with_file_name("notes.gguf"), "my notes").unwrap();
    fs::create_dir(path.with_file_name("folder.gguf")).unwrap();
    place.copy();
    assert_eq!(pack::remove(&place.store(), &place.model()).unwrap(), [path]);
    assert_eq!(place.names(), ["folder.gguf", "lock", "notes.gguf", "other.gguf"]);
    assert!(matches!(place.found(), Found::Nothing));
}

// Written completely or not at all.

#[test]
fn an_interrupt_at_any_moment_leaves_the_store_as_it_was() {
    let place = Place::of(&spec());
    let source = place.source();
    let mut steps = 0;
    place
        .try_pack(&source, &mut |_, _| {
            steps += 1;
            ControlFlow::Continue(())
        })
        .unwrap();
    assert!(steps > 10);
    for earlier in [true, false] {
        let before = place.names();
        assert_eq!(before.len(), 1 + usize::from(earlier));
        for stop in 0..steps {
            let mut step = 0;
            let error = place.try_pack(&source, &mut |done, total| {
                assert!(done <= total && total == source.file_bytes());
                step += 1;
                if step > stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            });
            assert_eq!(error.unwrap_err().exit_code(), 130);
            assert_eq!(place.names(), before, "stopped at {stop}");
        }
        match earlier {
            true => place.copy().check(&source, &mut go_on).unwrap(),
            false => assert!(matches!(place.found(), Found::Nothing)),
        }
        pack::remove(&place.store(), &place.model()).unwrap();
    }
}

/// What a killed process leaves has no name that is looked for, and goes with the next packing.
#[test]
fn what_is_left_half_written_is_not_a_copy() {
    let place = Place::of(&spec());
    let path = place.pack();
    fs::rename(&path, path.with_extension("part")).unwrap();
    assert!(matches!(place.found(), Found::Nothing));
    fs::write(path.with_file_name("other.part"), "half a").unwrap();
    place.pack();
    assert_eq!(place.names(), ["lock", path.file_name().unwrap().to_str().unwrap()]);
    place.copy();
    fs::write(path.with_file_name("other.part"), "half a").unwrap();
    assert_eq!(pack::remove(&place.store(), &place.model()).unwrap(), [path]);
    assert_eq!(place.names(), ["lock"]);
}

/// The same with real signals. Holes at the end of the model make the work long enough to be stopped.
#[cfg(unix)]
#[test]
fn signals_leave_no_copy() {
    let place = Place::of(&spec());
    File::options().write(true).open(place.model()).unwrap().set_len(64 << 30).unwrap();
    for (signal, code) in [("-KILL", None), ("-TERM", None), ("-INT", Some(130))] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_gemrun"));
        command.args(["pack", "model.gguf"]).env("GEMRUN_HOME", place.store()).current_dir(place.folder.path());
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let unfinished = |name: &String| name.starts_with("model-") && name.ends_with(".part");
        let path = loop {
            if let Some(name) = place.names().into_iter().find(unfinished) {
                break pack::directory(&place.store()).join(name);
            }
            assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
            std::thread::sleep(Duration::from_millis(2));
        };
        let kill = Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap();
        assert!(kill.success());
        assert_eq!(child.wait().unwrap().code(), code, "{signal}");
        assert!(!place.names().iter().any(|name| name.ends_with(".gguf")), "{signal}");
        assert!(matches!(place.found(), Found::Nothing));
        assert_eq!(path.exists(), code.is_none());
        if path.exists() {
            fs::rename(&path, path.with_file_name("left.part")).unwrap();
        }
    }
    assert_eq!(place.names(), ["lock"], "what was left goes with the next");
}

#[test]
fn a_model_that_changes_meanwhile_is_an_error() {
    let place = Place::of(&spec());
    let source = place.source();
    let error = place.try_pack(&source, &mut |_, _| {
        let file = File::options().write(true).open(place.model()).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        ControlFlow::Continue(())
    });
    assert_eq!(error.unwrap_err().to_string(), "model.gguf: changed while it was packed");
    assert_eq!(place.names(), ["lock"]);
}

#[test]
fn one_packs_at_a_time() {
    let place = Place::of(&spec());
    let source = place.source();
    let mut second = None;
    place
        .try_pack(&source, &mut |_, _| {
            second.get_or_insert_with(|| place.gemrun(&["pack", "model.gguf"]));
            ControlFlow::Continue(())
        })
        .unwrap();
    let second = second.unwrap();
    let stderr = String::from_utf8(second.stderr).unwrap();
    assert_eq!((second.status.code(), stderr.lines().count()), (Some(1), 1), "{stderr}");
    assert!(stderr.ends_with("packed: another gemrun is packing: try again when it is done\n"), "{stderr}");
    place.copy().check(&source, &mut go_on).unwrap();
}

// The command.

/// Standard output and standard error of a run that ends with `code`.
fn ended(output: Output, code: i32) -> (String, String) {
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    (String::from_utf8(output.stdout).unwrap(), stderr)
}

#[test]
fn the_command_packs_checks_and_drops() {
    let place = Place::of(&spec());
    let line = |arguments: &[&str], code| ended(place.gemrun(arguments), code).1;
    let packed = |arguments: &[&str]| {
        let all = [&["run", "model.gguf", "--raw", "the", "-n", "8", "-s", "1", "--stats"], arguments].concat();
        let (text, stats) = ended(place.gemrun(&all), 0);
        let stats: serde_json::Value = serde_json::from_str(&stats).unwrap();
        (text, stats["packed"].as_bool().unwrap(), stats["kernels"]["Q4_0"].as_str().unwrap().contains("x8"))
    };
    let none = format!("error: model.gguf: no packed copy in {}\n", place.store().display());
    assert_eq!(line(&["pack", "model.gguf", "--check"], 3), none);
    assert_eq!(line(&["pack", "model.gguf", "--drop"], 3), none);
    let (text, copy, kernel) = packed(&[]);
    assert_eq!((copy, kernel), (false, false));

    let (path, message) = ended(place.gemrun(&["pack", "model.gguf"]), 0);
    assert!(message.starts_with("model.gguf: packed ") && message.ends_with("gemrun reads the copy from now on\n"));
    assert!(Path::new(path.trim_end()).is_file(), "{path}");
    assert_eq!(packed(&[]), (text.clone(), true, true));
    assert_eq!(packed(&["--no-packed"]), (text.clone(), false, false));
    assert!(line(&["pack", "model.gguf", "--check"], 0).ends_with(": as it was packed\n"));

    // A second time: the same file stays.
    let before = fs::metadata(path.trim_end()).unwrap().modified().unwrap();
    assert_eq!(ended(place.gemrun(&["pack", "model.gguf"]), 0), (path.clone(), "model.gguf: packed already\n".into()));
    assert_eq!(fs::metadata(path.trim_end()).unwrap().modified().unwrap(), before);
    // Unless it is damaged.
    overwrite(Path::new(path.trim_end()), 70_000, &[1, 2, 3]);
    assert!(line(&["pack", "model.gguf", "--check"], 5).ends_with(": data: damaged\n"));
    assert!(line(&["pack", "model.gguf"], 0).contains(": data: damaged: packing again\n"));
    assert!(line(&["pack", "model.gguf", "--check"], 0).ends_with(": as it was packed\n"));

    // The copy of a file that is gone can be dropped.
    fs::rename(place.model(), place.folder.path().join("kept")).unwrap();
    assert_eq!(line(&["pack", "model.gguf", "--drop"], 0), format!("removed {path}"));
    assert_eq!(place.names(), ["lock"]);
}

#[test]
fn the_doctor_lists_copies_and_their_troubles() {
    let place = Place::of(&spec());
    let doctor = |place: &Place| {
        let report: serde_json::Value =
            serde_json::from_str(&ended(place.gemrun(&["doctor", "--json", "-t", "1"]), 0).0).unwrap();
        let advice: Vec<String> = report["advice"].as_array().unwrap().iter().map(|line| line.to_string()).collect();
        (report["packed"].clone(), advice.into_iter().filter(|line| line.contains("packed copy")).collect::<Vec<_>>())
    };
    assert_eq!(doctor(&place), (serde_json::json!([]), vec![]));

    let path = place.pack();
    let model = fs::canonicalize(place.model()).unwrap();
    let (copies, advice) = doctor(&place);
    let size = fs::metadata(&path).unwrap().len();
    let expected = serde_json::json!([
        {"path": path.to_str(), "bytes": size, "source": model.to_str(), "usable": true, "trouble": null}
    ]);
    assert_eq!((copies, advice), (expected, vec![]));

    fs::write(place.model(), synth::gguf(&Spec { seed: 6, ..spec() })).unwrap();
    fs::write(path.with_file_name("notes.gguf"), "my notes").unwrap();
    let (copies, advice) = doctor(&place);
    assert_eq!((&copies[0]["usable"], &copies[1]["usable"]), (&false.into(), &false.into()));
    assert!(copies[0]["trouble"].as_str().unwrap().ends_with("is not a copy of model.gguf"), "{copies}");
    assert!(advice[0].contains("--drop removes it") && advice[1].contains("notes.gguf takes 0.00 GB"), "{advice:?}");

    fs::remove_file(place.model()).unwrap();
    let (copies, advice) = doctor(&place);
    assert!(copies[0]["trouble"].as_str().unwrap().ends_with("model.gguf: no such file or directory"), "{copies}");
    assert!(advice[0].contains("is gone: gemrun pack "), "{advice:?}");
}

#[test]
fn the_command_refuses_what_it_cannot_pack() {
    let place = Place::of(&Spec::dense(1).all_in("F16"));
    let error = |arguments: &[&str], code| {
        let (stdout, stderr) = ended(place.gemrun(arguments), code);
        assert_eq!((&*stdout, stderr.lines().count()), ("", 1), "{stderr}");
        stderr.strip_prefix("error: ").unwrap().trim_end().to_string()
    };
    assert_eq!(error(&["pack", "demo"], 6), "demo: part of the program: expected a file to pack");
    assert_eq!(
        error(&["pack", "model.gguf"], 6),
        "model.gguf: nothing to pack: all its matrices are read best as they lie in the file"
    );
    assert_eq!(error(&["pack", "missing.gguf"], 3), "missing.gguf: no such file or directory");
    assert_eq!(
        error(&["run", "model.gguf", "x", "--raw", "--kernel", "q4_0x8/scalar"], 6),
        "kernel: q4_0x8/scalar: reads packed copies, and none of model.gguf is in use"
    );
    // Where the directory should be, there is a file.
    fs::create_dir_all(place.store()).unwrap();
    fs::write(pack::directory(&place.store()), "").unwrap();
    let quantised = place.folder.path().join("quantised.gguf");
    fs::write(&quantised, synth::gguf(&spec())).unwrap();
    let message = error(&["pack", "quantised.gguf"], 1);
    assert_eq!(message, format!("{}: file exists", pack::directory(&place.store()).display()));
    // A copy is not a model.
    let place = Place::of(&spec());
    let copy = place.pack();
    let (_, stderr) = ended(place.gemrun(&["run", copy.to_str().unwrap(), "x", "--raw"]), 6);
    assert!(stderr.contains("general.architecture: gemrun-pack is not supported"), "{stderr}");
}
