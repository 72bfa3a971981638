//! Where a file's bytes live: a memory map, the program itself, or a buffer; and the SIGBUS handler maps need.
//!
//! A mapped file that is truncated while in use (or sits on a failing disk) kills the process with SIGBUS on the next
//! read. The handler turns that into one line on stderr and exit code 5. It may only call async-signal-safe
//! functions, so every map registers its address range and its finished message in a fixed table of atomics beforehand:
//! the handler looks up the faulting address, writes the message and leaves. A fault elsewhere is handed on.
//!
//! `unsafe` in `gguf` is confined to this file: `mmap` itself, and installing the handler.

use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::path::Path;
use std::time::SystemTime;

use memmap2::Mmap;

use crate::error::{Error, Result};

/// The bytes of a file.
pub(crate) enum Source {
    Mapped(Mapping),
    Static(&'static [u8]),
    Owned(Vec<u8>),
}

impl Source {
    /// Maps the regular file at `path`, which must have at least `min_bytes` and is expected to be `what`, "a GGUF file". Never
    /// blocks on pipes or devices.
    pub(crate) fn open(path: &Path, name: &str, min_bytes: u64, what: &str) -> Result<Source> {
        let mut options = OpenOptions::new();
        options.read(true);
        #[cfg(unix)]
        {
            use std::os::unix::fs::OpenOptionsExt;
            // Without O_NONBLOCK opening a pipe waits for a writer. O_CLOEXEC is std's default.
            options.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC);
        }
        let file = options.open(path).map_err(|e| Error::io(path, &e))?;
        let meta = file.metadata().map_err(|e| Error::io(path, &e))?;
        if meta.is_dir() {
            return Err(Error::invalid(format!("{name}: is a directory: expected {what}")));
        }
        if !meta.is_file() {
            return Err(Error::invalid(format!("{name}: is a pipe or a device: expected {what}")));
        }
        if meta.len() < min_bytes {
            return Err(Error::invalid(format!(
                "{name}: the file has {} bytes: expected {what} of at least {min_bytes}",
                meta.len()
            )));
        }
        Mapping::new(&file, name, meta.modified().ok()).map(Source::Mapped).map_err(|e| Error::io(path, &e))
    }

    /// When the file was last changed, as of its opening; `None` for what is not a file.
    pub(super) fn modified(&self) -> Option<SystemTime> {
        match self {
            Source::Mapped(mapping) => mapping.modified,
            Source::Static(_) | Source::Owned(_) => None,
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Source::Mapped(mapping) => &mapping.map,
            Source::Static(bytes) => bytes,
            Source::Owned(bytes) => bytes,
        }
    }

    /// Expect scattered reads in `range`.
    pub(super) fn advise_random(&self, range: Range<usize>) {
        #[cfg(unix)]
        self.advise(memmap2::Advice::Random, range);
        #[cfg(not(unix))]
        let _ = range;
    }

    /// Expect reads in `range` soon.
    pub(super) fn willneed(&self, range: Range<usize>) {
        #[cfg(unix)]
        self.advise(memmap2::Advice::WillNeed, range);
        #[cfg(not(unix))]
        let _ = range;
    }

    /// Reads `range` into memory now, as far as it is not there. A hint, too: what cannot be read shows when it is used.
    pub(super) fn page_in(&self, range: Range<usize>) {
        #[cfg(target_os = "linux")]
        self.advise(memmap2::Advice::PopulateRead, range);
        #[cfg(not(target_os = "linux"))]
        self.willneed(range);
    }

    /// Lets go of the pages of `range`: the system keeps them in its cache, but they are no longer this process's memory, until
    /// they are read again.
    pub(crate) fn let_go(&self, range: Range<usize>) {
        #[cfg(target_os = "linux")]
        if let Source::Mapped(mapping) = self {
            // SAFETY: the map is of a file, shared and read-only, so whoever reads these bytes, even now, gets the file's.
            // A hint: errors do not matter.
            let _ = unsafe {
                mapping.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, range.start, range.len())
            };
        }
        #[cfg(not(target_os = "linux"))]
        let _ = range;
    }

    /// Whether the page at `at` is in memory; `true` where the system does not tell.
    pub(super) fn resident(&self, at: usize) -> bool {
        #[cfg(target_os = "linux")]
        if let Source::Mapped(mapping) = self {
            // SAFETY: asks for a number.
            let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(0);
            if page > 0 && at < mapping.map.len() {
                let start = mapping.map.as_ptr().wrapping_add(at.saturating_sub(at.checked_rem(page).unwrap_or(0)));
                let mut here = 0;
                // SAFETY: one page of the map, whose start is at a page's, and one byte for the answer.
                let asked = unsafe { libc::mincore(start.cast_mut().cast(), 1, &raw mut here) };
                return asked != 0 || here & 1 == 1;
            }
        }
        let _ = at;
        true
    }

    #[cfg(unix)]
    fn advise(&self, advice: memmap2::Advice, range: Range<usize>) {
        if let Source::Mapped(mapping) = self {
            // Only a hint: a kernel that refuses it costs speed, nothing else.
            let _ = mapping.map.advise_range(advice, range.start, range.len());
        }
    }
}

/// A read-only map of a whole file, known to the SIGBUS handler while it lives.
pub(crate) struct Mapping {
    map: Mmap,
    modified: Option<SystemTime>,
    #[cfg(unix)]
    slot: Option<usize>,
}

impl Mapping {
    fn new(file: &File, name: &str, modified: Option<SystemTime>) -> std::io::Result<Mapping> {
        // SAFETY: the map is read-only and private to this value. Another process may still write to the file: the
        // bytes may then change under a reader. All reads of it treat the bytes as plain integers, every length read
        // from it is copied out before it is checked, and a shrinking file ends in the SIGBUS handler.
        let map = unsafe { Mmap::map(file)? };
        #[cfg(unix)]
        let slot = sigbus::register(map.as_ptr().addr()..map.as_ptr().addr().saturating_add(map.len()), name);
        #[cfg(not(unix))]
        let _ = name;
        Ok(Mapping {
            map,
            modified,
            #[cfg(unix)]
            slot,
        })
    }
}

#[cfg(unix)]
impl Drop for Mapping {
    fn drop(&mut self) {
        // Before the addresses can belong to anything else.
        if let Some(slot) = self.slot {
            sigbus::unregister(slot);
        }
    }
}

#[cfg(unix)]
mod sigbus {
    use std::ops::Range;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};

    use crate::error::printable;

    /// Files watched at a time. A program has one or two open; a further one would merely die of the bare signal.
    const SLOTS: usize = 32;
    /// Longest message: a file name of 255 bytes and the words around it.
    const LINE: usize = 400;
    /// Exit code of a damaged file.
    const EXIT_INVALID: libc::c_int = 5;

    /// One watched range and its message. `start` is 0 while the slot means nothing; it is published last.
    struct Slot {
        taken: AtomicBool,
        start: AtomicUsize,
        end: AtomicUsize,
        line: [AtomicU8; LINE],
        line_len: AtomicUsize,
    }

    static TABLE: [Slot; SLOTS] = [const {
        Slot {
            taken: AtomicBool::new(false),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            line: [const { AtomicU8::new(0) }; LINE],
            line_len: AtomicUsize::new(0),
        }
    }; SLOTS];

    /// What SIGBUS did before us; set once. Rust's own handler (stack overflow) on most systems.
    static PREVIOUS: OnceLock<libc::sigaction> = OnceLock::new();

    /// Whether a thread is already ending the process: several may meet the missing page at the same moment.
    static ENDING: AtomicBool = AtomicBool::new(false);

    /// Watches `range`; `None` when the table is full.
    pub(super) fn register(range: Range<usize>, name: &str) -> Option<usize> {
        install();
        let free = |s: &Slot| s.taken.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed).is_ok();
        let (index, slot) = TABLE.iter().enumerate().find(|(_, s)| free(s))?;
        let mut line = format!("error: {}: the file was truncated or cannot be read while in use", printable(name));
        while line.len() >= LINE {
            line.pop();
        }
        line.push('\n');
        for (to, from) in slot.line.iter().zip(line.bytes()) {
            to.store(from, Ordering::Relaxed);
        }
        slot.line_len.store(line.len(), Ordering::Relaxed);
        slot.end.store(range.end, Ordering::Relaxed);
        slot.start.store(range.start, Ordering::Release);
        Some(index)
    }

    /// Frees a slot that `register` returned.
    pub(super) fn unregister(index: usize) {
        if let Some(slot) = TABLE.get(index) {
            slot.start.store(0, Ordering::Release);
            slot.taken.store(false, Ordering::Release);
        }
    }

    /// Installs the handler, the first time.
    fn install() {
        PREVIOUS.get_or_init(|| {
            let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_sigbus;
            // SAFETY: a zeroed sigaction is a valid one (default action, empty mask).
            let (mut new, mut old): (libc::sigaction, libc::sigaction) = unsafe { std::mem::zeroed() };
            new.sa_sigaction = handler as libc::sighandler_t;
            new.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            // SAFETY: both point to live values; the handler has the signature SA_SIGINFO asks for.
            unsafe { libc::sigaction(libc::SIGBUS, &new, &mut old) };
            old
        });
    }

    extern "C" fn on_sigbus(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo; si_addr is set for faults.
        let address = unsafe { (*info).si_addr() }.addr();
        for slot in &TABLE {
            let start = slot.start.load(Ordering::Acquire);
            if start == 0 || !(start..slot.end.load(Ordering::Relaxed)).contains(&address) {
                continue;
            }
            if ENDING.swap(true, Ordering::AcqRel) {
                // Never returns: the first thread ends this one too.
                loop {
                    // SAFETY: pause is async-signal-safe.
                    unsafe { libc::pause() };
                }
            }
            let mut line = [0_u8; LINE];
            for (to, from) in line.iter_mut().zip(&slot.line) {
                *to = from.load(Ordering::Relaxed);
            }
            let len = slot.line_len.load(Ordering::Relaxed).min(LINE);
            // SAFETY: write and _exit are async-signal-safe; `len` bytes of `line` are initialised.
            unsafe {
                libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), len);
                libc::_exit(EXIT_INVALID);
            }
        }
        // Not ours: put back what was there. The fault repeats on return; a signal that was sent is sent again.
        // SAFETY: sigaction and raise are async-signal-safe; a zeroed sigaction is the default action.
        unsafe {
            let default: libc::sigaction = std::mem::zeroed();
            libc::sigaction(libc::SIGBUS, PREVIOUS.get().unwrap_or(&default), std::ptr::null_mut());
            if (*info).si_code <= 0 {
                libc::raise(signal);
            }
        }
    }
}

#[cfg(all(test, unix))]
#[allow(clippy::unwrap_used, clippy::arithmetic_side_effects)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::io::Write;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Command, Output};

    use super::*;

    const CHILD: &str = "GEMRUN_TEST_SIGBUS";

    /// Runs one test of this program again, in a process of its own that may die.
    fn in_child(test: &str) -> Output {
        let test = format!("gguf::map::tests::{test}");
        let program = std::env::current_exe().unwrap();
        Command::new(program).args(["--exact", &test, "--nocapture"]).env(CHILD, "1").output().unwrap()
    }

    fn is_child() -> bool {
        std::env::var_os(CHILD).is_some()
    }

    fn file_of(bytes: usize) -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cut \u{1b}[31m.gguf");
        File::create(&path).unwrap().write_all(&vec![1; bytes]).unwrap();
        (dir, path)
    }

    fn sum(bytes: &[u8]) -> u64 {
        bytes.iter().map(|&b| u64::from(std::hint::black_box(b))).sum()
    }

    #[test]
    fn a_file_cut_while_mapped_ends_with_a_line_and_code_5() {
        if !is_child() {
            let output = in_child("a_file_cut_while_mapped_ends_with_a_line_and_code_5");
            assert_eq!(output.status.code(), Some(5), "{output:?}");
            let line = "error: cut \\u{1b}[31m.gguf: the file was truncated or cannot be read while in use\n";
            assert_eq!(String::from_utf8(output.stderr).unwrap(), line);
            return;
        }
        let (_dir, path) = file_of(100_000);
        let (_other_dir, other) = file_of(100_000);
        let first = Source::open(&other, "other.gguf", 1, "a GGUF file").unwrap();
        let source = Source::open(&path, &path.file_name().unwrap().to_string_lossy(), 1, "a GGUF file").unwrap();
        assert_eq!(sum(source.bytes()) + sum(first.bytes()), 200_000);
        OpenOptions::new().write(true).open(&path).unwrap().set_len(50_000).unwrap();
        // Other threads, at the same moment, as in a real run.
        let start = std::sync::Barrier::new(8);
        let beyond = || {
            start.wait();
            sum(source.bytes().get(60_000..).unwrap())
        };
        let total: u64 = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(beyond)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        unreachable!("read {total} beyond the end");
    }

    #[test]
    fn a_fault_in_somebody_elses_map_is_a_plain_signal() {
        if !is_child() {
            let output = in_child("a_fault_in_somebody_elses_map_is_a_plain_signal");
            assert_eq!(output.status.signal(), Some(libc::SIGBUS), "{output:?}");
            return;
        }
        let (_dir, path) = file_of(100_000);
        let ours = Source::open(&path, "ours.gguf", 1, "a GGUF file").unwrap();
        assert_eq!(sum(ours.bytes()), 100_000);
        drop(ours);
        // SAFETY: the test dies of what would be wrong with it.
        let theirs = unsafe { Mmap::map(&File::open(&path).unwrap()).unwrap() };
        OpenOptions::new().write(true).open(&path).unwrap().set_len(0).unwrap();
        let total = sum(&theirs);
        unreachable!("read {total} beyond the end");
    }

    #[test]
    fn slots_are_freed_and_a_full_table_is_no_error() {
        let (_dir, path) = file_of(64);
        for _ in 0..3 {
            let many: Vec<Source> =
                (0..40).map(|_| Source::open(&path, "many.gguf", 1, "a GGUF file").unwrap()).collect();
            assert!(many.iter().all(|s| s.bytes().len() == 64));
        }
    }

    #[test]
    fn only_regular_files_of_some_size_are_opened() {
        let (dir, path) = file_of(10);
        let error =
            |path: &Path| Source::open(path, "f", 24, "a GGUF file").err().map(|e| (e.exit_code(), e.to_string()));
        assert_eq!(error(&path), Some((5, "f: the file has 10 bytes: expected a GGUF file of at least 24".into())));
        assert_eq!(error(dir.path()), Some((5, "f: is a directory: expected a GGUF file".into())));
        assert_eq!(error(Path::new("/dev/zero")), Some((5, "f: is a pipe or a device: expected a GGUF file".into())));
        let missing = dir.path().join("missing");
        assert_eq!(error(&missing).unwrap().0, 3);
        let pipe = dir.path().join("pipe");
        assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        assert_eq!(error(&pipe), Some((5, "f: is a pipe or a device: expected a GGUF file".into())));
    }
}
