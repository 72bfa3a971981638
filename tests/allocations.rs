//! Generating a token allocates no memory: everything was made room for before.
//!
//! The allocator of this program counts. Threads other than the test's own count as well, so there is one test.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::golden;
use gemrun::forward::{State, Want, forward};
use gemrun::gguf::Gguf;
use gemrun::kv::{BLOCK, KvType};
use gemrun::model::Model;
use gemrun::team::Team;
use gemrun::weight::{Act, Numerics};
use gemrun_simd::{ActsBuf, Format, Isa, KERNELS, Rows, Tile, ops};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all is the system's allocator but for the counter.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One two-bit row, longer than any of the models here, by a kernel of this CPU's that has vectors.
fn multiply_a_long_row() {
    const COLS: usize = 1 << 14;
    let Some(kernel) = KERNELS.iter().find(|k| k.format() == Format::W2C && k.isa() != Isa::Scalar && k.supported())
    else {
        return;
    };
    let x = vec![0.0; COLS];
    let mut buf = ActsBuf::default();
    buf.quantize_static(ops(Isa::best()), &x, COLS, 1.0);
    let row = Rows { bytes: &[0; COLS / 4], scale: &[1.0] };
    kernel.matmul(row, &buf.acts_per_token(&x, COLS), &mut Tile::whole(&mut [0.0], 1));
}

/// What a thread makes for itself when it begins, when it first helps and when it first multiplies rows of one scale, it has made
/// after this: on a busy machine that may be late, so all are waited for.
fn everybody_multiplies(team: &Team) {
    let all = Barrier::new(team.threads());
    team.run(team.threads(), &|_| {
        all.wait();
        multiply_a_long_row();
    });
}

#[test]
fn a_generated_token_allocates_nothing() {
    let golden = golden::MODELS.iter().filter_map(|name| {
        let file = golden::path(name, &format!("{name}-q4_0-pure.gguf"))?;
        Some((*name, file, golden::tokens(name, 64)))
    });
    let mobile = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/demo-mobile.gguf");
    // For the whole test: a thread that ends may allocate, and does so when it likes.
    let mut teams = [1, 2].map(|threads| Team::new(threads).unwrap());
    // Also those of the team whose turn is later: a thread that begins allocates as well.
    teams.iter_mut().for_each(|team| team.enter(everybody_multiplies));
    for (name, file, tokens) in golden.chain([("demo-mobile", mobile, (300..364).collect())]) {
        let gguf = Gguf::open(&file).unwrap();
        let model = Model::load(&gguf, &Numerics { act: Act::Int8, ..Numerics::default() }).unwrap();
        for (threads, kv) in [(1, KvType::F16), (2, KvType::F16), (2, KvType::Int8), (1, KvType::Mixed)] {
            let mut state = State::new(&model, kv, 2 * BLOCK, tokens.len()).unwrap();
            teams[threads - 1].enter(|team| {
                everybody_multiplies(team);
                // The prompt fills a block of the cache; the token after it opens the next one.
                forward(&model, team, &mut state, &tokens, Want::Last).unwrap();
                for (at, token) in tokens.iter().take(BLOCK / 2).enumerate() {
                    let before = ALLOCATIONS.load(Ordering::Relaxed);
                    forward(&model, team, &mut state, &[*token], Want::Last).unwrap();
                    let made = ALLOCATIONS.load(Ordering::Relaxed) - before;
                    assert!(made == 0 || at == 0, "{name}, {threads} threads: token {at}: {made} allocations");
                }
            });
        }
    }
}
