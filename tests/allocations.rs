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

#[test]
fn a_generated_token_allocates_nothing() {
    let golden = golden::MODELS.iter().filter_map(|name| {
        let file = golden::path(name, &format!("{name}-q4_0-pure.gguf"))?;
        Some((*name, file, golden::tokens(name, 64)))
    });
    let mobile = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/demo-mobile.gguf");
    for (name, file, tokens) in golden.chain([("demo-mobile", mobile, (300..364).collect())]) {
        let gguf = Gguf::open(&file).unwrap();
        let model = Model::load(&gguf, &Numerics { act: Act::Int8, ..Numerics::default() }).unwrap();
        for (threads, kv) in [(1, KvType::F16), (2, KvType::F16), (2, KvType::Int8), (1, KvType::Mixed)] {
            let mut state = State::new(&model, kv, 2 * BLOCK, tokens.len()).unwrap();
            Team::new(threads).unwrap().enter(|team| {
                // What a thread makes for itself when it first helps: on a busy machine that may be late, so all are waited for.
                let all = Barrier::new(threads);
                team.run(threads, &|_| {
                    all.wait();
                });
                // The prompt fills a block of the cache; the token after it opens the next one.
                forward(&model, team, &mut state, &tokens, Want::Last).unwrap();
                // The others make room for what they need when they first do some kind of work, which may be late, too: a few times.
                let mut late = 4 * (threads - 1);
                for (at, token) in tokens.iter().take(BLOCK / 2).enumerate() {
                    let before = ALLOCATIONS.load(Ordering::Relaxed);
                    forward(&model, team, &mut state, &[*token], Want::Last).unwrap();
                    let made = ALLOCATIONS.load(Ordering::Relaxed) - before;
                    if made > 0 && at > 0 {
                        assert!(late > 0, "{name}, {threads} threads: token {at}: {made} allocations");
                        late -= 1;
                    }
                }
            });
        }
    }
}
