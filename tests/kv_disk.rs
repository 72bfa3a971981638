//! A cache on the disk: what is restored continues with the bits of a run that never stopped, and no damaged byte goes unnoticed.

#![cfg(unix)]

mod common;
mod oracle;

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use common::{raw_gguf, run};
use gemrun::forward::{State, Want, forward};
use gemrun::gguf::Gguf;
use gemrun::kv::KvType;
use gemrun::kv::disk::{self, Key, Saved};
use gemrun::model::Model;
use gemrun::team::Team;
use gemrun::weight::Numerics;
use oracle::synth::{self, Spec};
use xxhash_rust::xxh3::xxh3_64;

const KINDS: [KvType; 4] = [KvType::F32, KvType::F16, KvType::Int8, KvType::Mixed];

/// Sliding and global layers, owners and sharers; a window of 24 positions.
fn spec(seed: u64) -> Spec {
    let small = Spec { dim: 64, ff: 64, ff_shared: 64, window: 24, ..Spec::per_layer(seed) };
    Spec { layers: "SFSF", shared: 2, ..small }.all_in("Q8_0")
}

/// The model of a spec, with static scales for its cache or without.
fn model(spec: &Spec, scales: bool) -> Gguf {
    let gguf = Gguf::from_bytes("small.gguf", synth::gguf(spec)).unwrap();
    if !scales {
        return gguf;
    }
    let mut parts = raw_gguf::File::of(&gguf);
    parts.set_kv_scales(&[(8, 0.03, 0.02), (4, 0.5, 0.4), (8, 0.02, 0.03), (4, 0.4, 0.5)]);
    Gguf::from_bytes("small.gguf", parts.bytes()).unwrap()
}

/// Random numbers, the same in every run.
struct Random(Vec<u32>);

impl Random {
    fn new(seed: u64) -> Random {
        Random(synth::tokens(&Spec { seed, vocab: 1 << 20, ..spec(seed) }, 4000))
    }

    fn below(&mut self, limit: usize) -> usize {
        self.0.pop().unwrap() as usize % limit
    }
}

/// A conversation that is extended, cut back, saved, and restored at random, each time into a cache of another chunk length and
/// so another ring. Whatever it went through, its logits are those of one run from the beginning.
#[test]
fn continuing_is_never_having_stopped() {
    const LEN: usize = 1200;
    // Integers by the largest magnitude, then by static scales.
    for (i, kind) in KINDS.into_iter().chain([KvType::Int8, KvType::Mixed]).enumerate() {
        let spec = spec(40 + i as u64);
        let gguf = model(&spec, i >= KINDS.len());
        let tokens = synth::tokens(&spec, LEN);
        let expected = run::logits(&gguf, &tokens, run::Way { kv: kind, ..run::INT8 });
        let model = Model::load(&gguf, &Numerics::default()).unwrap();
        let (window, folder, mut random) = (model.config.window, tempfile::tempdir().unwrap(), Random::new(i as u64));
        let mut state = State::new(&model, kind, LEN, 64).unwrap();
        let key = Key::new("small", &state.kv);
        let mut saved = Saved::empty(folder.path(), &key, &state.kv);
        let (mut marks, mut restored, mut marked, mut cut) = (Vec::new(), 0, 0, 0);
        Team::new(1).unwrap().enter(|team| {
            for _ in 0..100 {
                let first = state.kv.len();
                let add = (1 + random.below(state.batch())).min(LEN - first);
                let logits = forward(&model, team, &mut state, &tokens[first..first + add], Want::All).unwrap();
                let rows = first * spec.vocab..(first + add) * spec.vocab;
                assert!(logits == &expected[rows], "{kind:?}: positions from {first}");
                if random.below(3) == 0 {
                    marks.push(state.kv.len());
                }
                match random.below(10) {
                    0 | 1 => saved.update(&state.kv, &tokens, &marks, window).unwrap(),
                    2 => {
                        let most = state.kv.len() - random.below(state.kv.len().min(100));
                        cut += usize::from(state.truncate(&model, most) == most);
                        marks.retain(|mark| *mark <= state.kv.len());
                    }
                    3 | 4 => {
                        // As another process would, from a file that may be behind or ahead of what was held.
                        let batch = 1 + random.below(100);
                        state = State::new(&model, kind, LEN, batch).unwrap();
                        let Some(found) = Saved::open(folder.path(), &key, &state.kv).unwrap() else { continue };
                        let all = found.tokens().len();
                        let most = if random.below(2) == 0 { all } else { random.below(all + 1) };
                        let len = found.reach(most, window);
                        marked += usize::from(most < all && len > 0);
                        state.kv = found.restore(&state.kv, len, window).unwrap();
                        assert_eq!(state.kv.len(), len);
                        marks.retain(|mark| *mark <= len);
                        (saved, restored) = (found, restored + usize::from(len > 0));
                    }
                    _ => {}
                }
                if state.kv.len() == LEN {
                    state.truncate(&model, 0);
                    marks.clear();
                }
            }
        });
        println!("{kind:?}: {restored} times restored, {marked} of them in the middle, {cut} times cut back");
        assert!(restored > 8 && marked > 2 && cut > 2, "{kind:?}: {restored}, {marked}, {cut}");
    }
}

/// A mark behind which the conversation went on for many windows can be returned to, at once or by another process.
#[test]
fn marks_stay_reachable() {
    let (spec, kind) = (spec(50), KvType::F16);
    let gguf = model(&spec, false);
    let tokens = synth::tokens(&spec, 1400);
    let expected = run::logits(&gguf, &tokens[..400], run::Way { kv: kind, ..run::INT8 });
    let model = Model::load(&gguf, &Numerics::default()).unwrap();
    let (window, folder) = (model.config.window, tempfile::tempdir().unwrap());
    let mut state = State::new(&model, kind, 1400, 64).unwrap();
    let key = Key::new("small", &state.kv);
    let mut saved = Saved::empty(folder.path(), &key, &state.kv);
    // What remains when turns in the middle are left out.
    let other: Vec<u32> = tokens[..150].iter().chain(&tokens[700..800]).copied().collect();
    let expected_other = run::logits(&gguf, &other, run::Way { kv: kind, ..run::INT8 });
    Team::new(1).unwrap().enter(|team| {
        for chunk in tokens.chunks(50) {
            forward(&model, team, &mut state, chunk, Want::Nothing).unwrap();
            saved.update(&state.kv, &tokens, &[150, 300, 310], window).unwrap();
        }
        // The ring has forgotten it, the file has not; the mark at 310 is too close to the one before to be worth it.
        assert_eq!(state.kv.reach(300, window), 0);
        assert_eq!((saved.reach(299, window), saved.reach(320, window), saved.reach(500, window)), (299, 320, 320));
        for mark in [150, 300] {
            assert_eq!(saved.reach(mark, window), mark);
            state.kv = saved.restore(&state.kv, mark, window).unwrap();
            let logits = forward(&model, team, &mut state, &tokens[mark..mark + 50], Want::All).unwrap();
            assert!(logits == &expected[mark * spec.vocab..(mark + 50) * spec.vocab]);
        }
        state.kv = saved.restore(&state.kv, 150, window).unwrap();
        for first in [150, 200] {
            let logits = forward(&model, team, &mut state, &other[first..first + 50], Want::All).unwrap();
            assert!(logits == &expected_other[first * spec.vocab..(first + 50) * spec.vocab]);
        }
    });
}

/// A small saved cache and the cache it is of.
struct Small {
    folder: tempfile::TempDir,
    model: Model,
    tokens: Vec<u32>,
    state: State,
    key: Key,
    saved: Saved,
}

impl Small {
    fn new(kind: KvType) -> Small {
        let spec = Spec { heads: 1, kv_heads_sliding: 1, kv_heads_full: 1, head_dim_full: 32, ..spec(60) };
        let model = Model::load(&model(&spec, false), &Numerics::default()).unwrap();
        let tokens = synth::tokens(&spec, 200);
        let state = State::new(&model, kind, 200, 50).unwrap();
        let key = Key::new("small", &state.kv);
        let folder = tempfile::tempdir().unwrap();
        let saved = Saved::empty(folder.path(), &key, &state.kv);
        let mut small = Small { folder, model, tokens, state, key, saved };
        small.extend(70);
        small
    }

    /// Computes up to `len` tokens and saves.
    fn extend(&mut self, len: usize) {
        let Small { model, tokens, state, saved, .. } = self;
        Team::new(1).unwrap().enter(|team| {
            for chunk in tokens[state.kv.len()..len].chunks(50) {
                forward(model, team, state, chunk, Want::Nothing).unwrap();
            }
        });
        saved.update(&state.kv, tokens, &[20], model.config.window).unwrap();
    }

    /// What the files give: how many tokens, and the logits of the one that follows.
    fn restore(&self) -> gemrun::Result<(usize, Vec<f32>)> {
        let mut state = State::new(&self.model, self.state.kv.kind(), 200, 50)?;
        let window = self.model.config.window;
        let Some(saved) = Saved::open(self.folder.path(), &self.key, &state.kv)? else { return Ok((0, Vec::new())) };
        let len = saved.reach(usize::MAX, window);
        state.kv = saved.restore(&state.kv, len, window)?;
        let next = &self.tokens[len..len + 1];
        let logits = Team::new(1)?
            .enter(|team| forward(&self.model, team, &mut state, next, Want::Last).map(<[f32]>::to_vec))?;
        Ok((len, logits))
    }

    /// Reads all that is there, and nothing more.
    fn check(&self) -> gemrun::Result<()> {
        let (kv, window) = (&self.state.kv, self.model.config.window);
        let saved = Saved::open(self.folder.path(), &self.key, kv)?.expect("files");
        saved.restore(kv, saved.reach(usize::MAX, window), window).map(drop)
    }

    fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let entries = fs::read_dir(self.folder.path()).unwrap().map(|entry| entry.unwrap().path());
        let mut files: Vec<_> = entries.map(|path| (path.clone(), fs::read(path).unwrap())).collect();
        files.sort();
        files
    }
}

/// Every byte changed, every length cut to, in a cache that was saved twice, so that it has dead records, too.
#[test]
fn all_damage_is_noticed() {
    {
        let kind = KvType::Mixed;
        let mut small = Small::new(kind);
        small.extend(75);
        let sound = small.restore().unwrap();
        assert_eq!(sound.0, 75);
        let mut checked = 0;
        for (path, bytes) in small.files() {
            let file = fs::File::options().write(true).open(&path).unwrap();
            let refused = |what: &str| {
                let error = small.check().expect_err(what);
                assert_eq!(error.exit_code(), 5, "{what}: {error}");
            };
            for (at, byte) in bytes.iter().enumerate() {
                file.write_all_at(&[byte ^ 1 << (at % 8)], at as u64).unwrap();
                refused(&format!("{}: byte {at}", path.display()));
                file.write_all_at(&[*byte], at as u64).unwrap();
                checked += 1;
            }
            for len in (0..bytes.len()).rev() {
                file.set_len(len as u64).unwrap();
                refused(&format!("{}: cut to {len}", path.display()));
            }
            fs::remove_file(&path).unwrap();
            assert!(small.check().is_err());
            fs::write(&path, &bytes).unwrap();
            assert_eq!(small.restore().unwrap(), sound);
        }
        println!("{kind:?}: {checked} bytes");
        assert!(checked > 10_000);
        // And it can be saved again.
        let (path, bytes) = &small.files()[0];
        fs::write(path, [&bytes[..40], &[bytes[40] ^ 1], &bytes[41..]].concat()).unwrap();
        let fresh = small.saved.cleared(&small.state.kv);
        small.saved = fresh;
        small.extend(80);
        assert_eq!(small.restore().unwrap().0, 80);
    }
}

/// Whatever part of a save has happened: what is found is what was saved before.
#[test]
fn a_save_happens_or_does_not() {
    let mut small = Small::new(KvType::Int8);
    let (before, old) = (small.files(), small.restore().unwrap());
    small.extend(190);
    let (after, new) = (small.files(), small.restore().unwrap());
    assert_eq!((old.0, new.0), (70, 190));
    let data = |files: &[(PathBuf, Vec<u8>)]| files.iter().find(|(path, _)| path.ends_with("kv.1")).cloned().unwrap();
    let index =
        |files: &[(PathBuf, Vec<u8>)]| files.iter().find(|(path, _)| path.ends_with("kv.index")).cloned().unwrap();
    let ((path, short), (_, long)) = (data(&before), data(&after));
    assert!(long.starts_with(&short) && long.len() > short.len(), "records are appended");
    let (index_path, old_index) = index(&before);
    fs::write(&index_path, &old_index).unwrap();
    for len in (short.len()..=long.len()).step_by(101).chain([long.len()]) {
        fs::write(&path, &long[..len]).unwrap();
        assert_eq!(small.restore().unwrap(), old, "{len} bytes of the data");
    }
    let (_, new_index) = index(&after);
    for len in 0..new_index.len() {
        fs::write(small.folder.path().join("kv.index.part"), &new_index[..len]).unwrap();
        if len % 50 == 0 {
            assert_eq!(small.restore().unwrap(), old, "{len} bytes of the index");
        }
    }
    fs::write(&index_path, &new_index).unwrap();
    assert_eq!(small.restore().unwrap(), new);
}

/// An index that says what it likes, with the right checksum.
#[test]
fn a_forged_index_is_harmless() {
    let small = Small::new(KvType::Mixed);
    let path = small.folder.path().join("kv.index");
    let bytes = fs::read(&path).unwrap();
    let (mut refused, mut accepted) = (0, 0);
    for at in 8..bytes.len() - 8 {
        for value in [0, 1, 64, 255] {
            let mut forged = bytes[..bytes.len() - 8].to_vec();
            forged[at] = value;
            forged.extend(xxh3_64(&forged).to_le_bytes());
            fs::write(&path, &forged).unwrap();
            match small.check() {
                Ok(()) => accepted += 1,
                Err(_) => refused += 1,
            }
        }
    }
    println!("{refused} refused, {accepted} accepted");
    assert!(refused > 300, "{refused} refused, {accepted} accepted");
}

#[test]
fn what_is_of_another_model_is_refused() {
    let small = Small::new(KvType::F16);
    let open = |key: &Key| Saved::open(small.folder.path(), key, &small.state.kv).map(drop);
    open(&small.key).unwrap();
    let error = open(&Key::new("other", &small.state.kv)).unwrap_err();
    assert_eq!(error.to_string(), "kv.index: made by another model, or with other settings");
    let other = State::new(&small.model, KvType::F32, 200, 50).unwrap();
    assert!(Saved::open(small.folder.path(), &Key::new("small", &other.kv), &other.kv).is_err());
    assert!(disk::usage(small.folder.path()).unwrap().0 > 10_000);
    disk::remove(small.folder.path()).unwrap();
    assert!(disk::usage(small.folder.path()).is_none());
    assert_eq!(fs::read_dir(small.folder.path()).unwrap().count(), 0);
    let nothing = Saved::open(Path::new("/nonexistent"), &small.key, &small.state.kv).unwrap();
    assert!(nothing.is_none());
}
