//! Damaged, hostile and unusual files through the program itself.
//!
//! Every case is a small valid model with exactly one thing changed, given to `gemrun show`, `gemrun run` and (templates)
//! `gemrun template`. A file is either refused by one line on stderr that names the culprit, with the documented exit
//! code, or it works. Nothing may panic, die of a signal, take a second of processor time or 200 MB of memory, or send
//! an escape character to the terminal.
//!
//! Random damage goes on for `GEMRUN_FUZZ_SECONDS`, 3 by default: `GEMRUN_FUZZ_SECONDS=3600 cargo test --release
//! --test bad_files random` for a long look.

mod common;
mod oracle;
#[path = "common/small.rs"]
mod small;

use common::damage::{self, Draw, EXTREMES, Rng, contradict, injure, put};

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use common::raw_gguf::{self as raw, Pair, ty};
use gemrun::gguf::Gguf;
use raw::File as Parts;
use small::{base, experts, parts, spec, use_model};

const USAGE: i32 = 2;
const INVALID: i32 = 5;
const UNSUPPORTED: i32 = 6;

const F32: u32 = 0;
const F16: u32 = 1;
const Q4_0: u32 = 2;
const IQ2_XS: u32 = 17;
const I8: u32 = 24;
const F64: u32 = 28;

/// How one run of the program ended.
struct Outcome {
    status: ExitStatus,
    stdout: Vec<u8>,
    stderr: String,
    hung: bool,
    cpu: Duration,
    peak_bytes: u64,
}

/// Runs `gemrun` and measures it; it is killed after 20 s.
#[allow(clippy::zombie_processes, reason = "`ended` waits for it")]
fn gemrun(dir: &Path, args: &[&str]) -> Outcome {
    let (out, err) = (dir.join("stdout"), dir.join("stderr"));
    let mut command = Command::new(env!("CARGO_BIN_EXE_gemrun"));
    command.args(args).current_dir(dir).env("GEMRUN_HOME", dir.join("home"));
    command.stdin(Stdio::null()).stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap());
    let mut child = command.spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut hung = false;
    let (status, usage) = loop {
        if let Some(ended) = ended(child.id()) {
            break ended;
        }
        if !hung && Instant::now() > deadline {
            hung = true;
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    let time = |t: libc::timeval| Duration::from_secs(t.tv_sec as u64) + Duration::from_micros(t.tv_usec as u64);
    Outcome {
        status,
        stdout: fs::read(out).unwrap(),
        stderr: String::from_utf8(fs::read(err).unwrap()).unwrap(),
        hung,
        cpu: time(usage.ru_utime) + time(usage.ru_stime),
        peak_bytes: usage.ru_maxrss as u64 * if cfg!(target_os = "macos") { 1 } else { 1024 },
    }
}

/// The status and resource usage of a child that has ended. `Child::wait` does not tell the latter.
fn ended(pid: u32) -> Option<(ExitStatus, libc::rusage)> {
    let mut status = 0;
    // SAFETY: a zeroed rusage is valid, and both pointers are to live values of the right type. The child is ours and
    // nobody else waits for it.
    unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        let got = libc::wait4(pid as libc::pid_t, &mut status, libc::WNOHANG, &mut usage);
        assert!(got >= 0, "wait4 failed");
        (got != 0).then(|| (ExitStatus::from_raw(status), usage))
    }
}

impl Outcome {
    /// What no file may cause.
    fn never(&self) -> Result<(), String> {
        let err = |what: String| Err(format!("{what}; stderr: {}", self.stderr.trim_end()));
        if self.hung {
            return err("hangs".into());
        }
        if let Some(signal) = self.status.signal() {
            return err(format!("dies of signal {signal}"));
        }
        if self.stderr.contains("panicked") || self.status.code() == Some(101) {
            return err("panics".into());
        }
        if self.cpu > Duration::from_secs(1) {
            return err(format!("takes {:?}", self.cpu));
        }
        if self.peak_bytes > 200 << 20 {
            return err(format!("takes {} MB", self.peak_bytes >> 20));
        }
        if self.stdout.contains(&0x1b) || self.stderr.contains('\x1b') {
            return err("sends an escape character".into());
        }
        Ok(())
    }

    /// Refused with `code` and one line that has `words` in it.
    fn refused(&self, code: i32, words: &[&str]) -> Result<(), String> {
        self.never()?;
        let err = |what: String| Err(format!("{what}; stderr: {}", self.stderr.trim_end()));
        if self.status.code() != Some(code) {
            return err(format!("exit code {:?} instead of {code}", self.status.code()));
        }
        let Some(line) = self.stderr.strip_suffix('\n') else { return err("no line on stderr".into()) };
        if line.contains('\n') || !line.starts_with("error: ") {
            return err("not one error line".into());
        }
        if line.len() > 1000 {
            return err(format!("an error line of {} bytes", line.len()));
        }
        match words.iter().find(|word| !line.contains(**word)) {
            Some(word) => err(format!("the line lacks {word:?}")),
            None => Ok(()),
        }
    }

    fn works(&self) -> Result<(), String> {
        self.never()?;
        match self.status.code() {
            Some(0) => Ok(()),
            code => Err(format!("exit code {code:?}; stderr: {}", self.stderr.trim_end())),
        }
    }
}

fn show(dir: &Path) -> Outcome {
    gemrun(dir, &["show", "bad.gguf"])
}

fn run(dir: &Path) -> Outcome {
    gemrun(dir, &["run", "bad.gguf", "the", "--raw", "-n", "1", "--temp", "0", "-c", "64"])
}

fn chat(dir: &Path) -> Outcome {
    gemrun(dir, &["run", "bad.gguf", "the", "-n", "1", "--temp", "0", "-c", "64"])
}

fn template(dir: &Path) -> Outcome {
    fs::write(dir.join("messages.json"), r#"[{"role": "user", "content": "the"}]"#).unwrap();
    gemrun(dir, &["template", "bad.gguf", "--messages", "messages.json"])
}

/// One defect: its name, the exit code, words of the error line, and how to make it.
struct Case {
    name: &'static str,
    code: i32,
    words: &'static [&'static str],
    bytes: Vec<u8>,
}

#[derive(Default)]
struct Cases(Vec<Case>);

impl Cases {
    /// The base model with its parts changed.
    fn parts(
        &mut self,
        name: &'static str,
        code: i32,
        words: &'static [&'static str],
        change: impl FnOnce(&mut Parts),
    ) {
        let mut parts = base();
        change(&mut parts);
        self.0.push(Case { name, code, words, bytes: parts.bytes() });
    }

    /// The same with the model that has experts.
    fn moe(&mut self, name: &'static str, code: i32, words: &'static [&'static str], change: impl FnOnce(&mut Parts)) {
        let mut parts = experts();
        change(&mut parts);
        self.0.push(Case { name, code, words, bytes: parts.bytes() });
    }

    /// The base model's bytes changed.
    fn bytes(&mut self, name: &'static str, code: i32, words: &'static [&'static str], bytes: impl Into<Vec<u8>>) {
        self.0.push(Case { name, code, words, bytes: bytes.into() });
    }

    /// Runs every case through every command; all failures at once.
    fn check(self, commands: &[fn(&Path) -> Outcome]) {
        let dir = tempfile::tempdir().unwrap();
        let mut failures = Vec::new();
        for case in &self.0 {
            fs::write(dir.path().join("bad.gguf"), &case.bytes).unwrap();
            for (i, command) in commands.iter().enumerate() {
                let words: Vec<&str> = ["bad.gguf"].iter().chain(case.words).copied().collect();
                if let Err(what) = command(dir.path()).refused(case.code, &words) {
                    failures.push(format!("{} (command {i}): {what}", case.name));
                }
            }
        }
        let (cases, failed) = (self.0.len(), failures.len());
        assert!(failures.is_empty(), "{failed} failures in {cases} cases:\n{}", failures.join("\n"));
        println!("{cases} files refused");
    }
}

#[test]
fn the_undamaged_models_work() {
    let dir = tempfile::tempdir().unwrap();
    for bytes in [base().bytes(), experts().bytes()] {
        fs::write(dir.path().join("bad.gguf"), bytes).unwrap();
        for command in [show, run, chat, template] {
            command(dir.path()).works().unwrap();
        }
    }
}

#[test]
fn damaged_containers_are_refused() {
    let mut cases = Cases::default();
    let whole = base().bytes();
    let file = Gguf::from_bytes("base.gguf", whole.clone()).unwrap();
    let header = file.header_bytes().len();
    let last = file.tensors().iter().max_by_key(|t| t.offset).unwrap();
    let end = (file.data_start() + last.offset + last.bytes) as usize;

    // Sizes and the fixed part of the header.
    cases.bytes("empty file", INVALID, &["0 bytes", "expected a GGUF file"], *b"");
    cases.bytes("magic only", INVALID, &["4 bytes"], *b"GGUF");
    cases.bytes("one byte less than a header", INVALID, &["23 bytes"], &whole[..23]);
    cases.parts("wrong magic", INVALID, &["does not start with GGUF"], |f| f.magic = *b"GGML");
    cases.parts("lower-case magic", INVALID, &["does not start with GGUF"], |f| f.magic = *b"gguf");
    cases.bytes("not a model at all", INVALID, &["does not start with GGUF"], "just some text, and more of it\n");
    cases.parts("version 0", INVALID, &["version 0"], |f| f.version = 0);
    cases.parts("version 1", INVALID, &["version 1"], |f| f.version = 1);
    cases.parts("version 4", UNSUPPORTED, &["version 4"], |f| f.version = 4);
    cases.parts("a later version", UNSUPPORTED, &["version 2147483647"], |f| f.version = 0x7fff_ffff);
    cases.parts("big-endian version 3", INVALID, &["big-endian"], |f| f.version = 3 << 24);
    for (name, n) in [
        ("tensor count -1", u64::MAX),
        ("tensor count 2^63", 1 << 63),
        ("tensor count 2^55", 1 << 55),
        ("tensor count 65537", 65_537),
        ("tensor count that wraps times the entry size", u64::MAX / 33 + 2),
    ] {
        cases.parts(name, INVALID, &["header", "tensors"], |f| f.n_tensors = Some(n));
    }
    cases.parts("more tensors than fit", INVALID, &["declares 65536 tensors"], |f| {
        f.n_tensors = Some(65_536);
        f.tensors.truncate(1);
        f.tensors[0].data.clear();
    });
    cases.parts("one tensor too many", INVALID, &["tensor"], |f| f.n_tensors = Some(f.tensors.len() as u64 + 1));
    for (name, n) in [
        ("key count -1", u64::MAX),
        ("key count 2^62", 1 << 62),
        ("key count 65537", 65_537),
        ("key count that wraps times the pair size", u64::MAX / 14 + 2),
    ] {
        cases.parts(name, INVALID, &["header", "metadata keys"], |f| f.n_pairs = Some(n));
    }
    cases.parts("one key too many", INVALID, &["number"], |f| f.n_pairs = Some(f.pairs.len() as u64 + 1));
    cases.parts("one key too few", INVALID, &["tensor"], |f| f.n_pairs = Some(f.pairs.len() as u64 - 1));

    // Keys.
    cases.parts("empty key", INVALID, &["a key of 0 bytes"], |f| f.pair("general.name").key.clear());
    cases.parts("key of 64 KiB", INVALID, &["a key of 65536 bytes"], |f| {
        f.pair("general.name").key = vec![b'k'; 65_536];
    });
    for (name, n) in [
        ("key length 2^64 - 1", u64::MAX),
        ("key length 2^64 - 40", u64::MAX - 39),
        ("key length 2^63", 1 << 63),
        ("key length 2^32", 1 << 32),
    ] {
        cases.parts(name, INVALID, &["metadata key number 1", "bytes"], |f| f.pair("general.name").key_len = Some(n));
    }
    cases.parts("key that is not UTF-8", INVALID, &["UTF-8"], |f| f.pair("general.name").key = b"a\xff".into());
    cases.parts("key twice", INVALID, &["gemma4.block_count", "twice"], |f| {
        let copy = f.pair("gemma4.block_count").clone();
        f.pairs.push(copy);
    });
    cases.parts("escape characters in a key", INVALID, &["\\u{1b}[2J", "is an array of arrays"], |f| {
        let value = raw::array(ty::ARRAY, 1, &[0; 64]);
        f.pairs.push(Pair { key: b"\x1b[2J".into(), key_len: None, ty: ty::ARRAY, value });
    });

    // Values.
    for (name, id) in [("value type 13", 13), ("value type -1", u32::MAX), ("value type 256", 256)] {
        cases.parts(name, INVALID, &["general.name", "unknown value type"], |f| f.pair("general.name").ty = id);
    }
    for (name, n) in [
        ("string length 2^64 - 1", u64::MAX),
        ("string length 2^64 - 8", u64::MAX - 7),
        ("string length 2^63", 1 << 63),
        ("string length beyond the file", 1 << 30),
    ] {
        cases.parts(name, INVALID, &["general.name", "needs", "short"], |f| {
            f.pair("general.name").value[..8].copy_from_slice(&n.to_le_bytes());
        });
    }
    for (name, n) in [
        ("array length 2^64 - 1", u64::MAX),
        ("array length 2^62", 1 << 62),
        ("array length 2^61", 1 << 61),
        ("array length beyond the file", 1 << 28),
    ] {
        cases.parts(name, INVALID, &["tokenizer.ggml.token_type", "elements of type i32"], |f| {
            f.pair("tokenizer.ggml.token_type").value[4..12].copy_from_slice(&n.to_le_bytes());
        });
    }
    cases.parts("length of a string in an array", INVALID, &["tokenizer.ggml.tokens", "short"], |f| {
        f.pair("tokenizer.ggml.tokens").value[12..20].copy_from_slice(&(u64::MAX - 11).to_le_bytes());
    });
    for (name, id) in [("element type 13", 13), ("element type -1", u32::MAX)] {
        cases.parts(name, INVALID, &["tokenizer.ggml.merges", "unknown element type"], |f| {
            f.pair("tokenizer.ggml.merges").value = raw::array(id, 1 << 60, &[]);
        });
    }
    cases.parts("array of arrays", INVALID, &["x.nested", "array of arrays"], |f| {
        f.set("x.nested", ty::ARRAY, raw::array(ty::ARRAY, 1, &raw::i32s(&[1])));
    });
    cases.parts("arrays nested 100,000 deep", INVALID, &["x.nested", "array of arrays"], |f| {
        f.set("x.nested", ty::ARRAY, raw::array(ty::ARRAY, 1, &[]).repeat(100_000));
    });
    cases.parts("a bool of 2", INVALID, &["x.bool", "expected 0 or 1"], |f| f.set("x.bool", ty::BOOL, [2]));
    cases.parts("a bool of 255 in an array", INVALID, &["gemma4.attention.sliding_window_pattern", "bool"], |f| {
        *f.pair("gemma4.attention.sliding_window_pattern").value.last_mut().unwrap() = 255;
    });

    // Alignment.
    for (name, n) in [
        ("alignment 0", 0_u32),
        ("alignment 1", 1),
        ("alignment 13", 13),
        ("alignment 48", 48),
        ("alignment 131072", 131_072),
        ("alignment 2^31", 1 << 31),
        ("alignment 2^32 - 1", u32::MAX),
    ] {
        cases.parts(name, INVALID, &["general.alignment", "power of two"], |f| f.set_u32("general.alignment", n));
    }
    cases.parts("alignment as i32", INVALID, &["general.alignment", "u32"], |f| {
        f.set("general.alignment", ty::I32, 32_i32.to_le_bytes());
    });
    cases.parts("alignment as u64", INVALID, &["general.alignment", "u32"], |f| {
        f.set("general.alignment", ty::U64, 32_u64.to_le_bytes());
    });
    cases.parts("alignment as text", INVALID, &["general.alignment", "u32"], |f| f.set_str("general.alignment", "32"));

    // The tensor table.
    cases.parts("tensor name empty", INVALID, &["a tensor name of 0 bytes"], |f| f.tensors[3].name.clear());
    cases.parts("tensor name of 64 bytes", INVALID, &["a tensor name of 64 bytes"], |f| {
        f.tensors[3].name = vec![b'n'; 64]
    });
    cases.parts("tensor name not UTF-8", INVALID, &["tensor number 3", "UTF-8"], |f| {
        f.tensors[3].name = b"\xc3(".into()
    });
    cases.parts("tensor name twice", INVALID, &["token_embd.weight", "twice"], |f| {
        f.tensors[3].name = f.tensors[0].name.clone()
    });
    cases.parts("escape characters in a tensor name", INVALID, &["\\u{1b}[31m", "dimensions"], |f| {
        f.tensors[3].name = b"\x1b[31mred".into();
        f.tensors[3].n_dims = Some(9);
    });
    for (name, n) in [("0 dimensions", 0), ("5 dimensions", 5), ("2^32 - 1 dimensions", u32::MAX)] {
        cases.parts(name, INVALID, &["tensor token_embd.weight", "dimensions"], |f| {
            f.tensor("token_embd.weight").n_dims = Some(n);
        });
    }
    for (name, dims) in [
        ("a dimension of 0", &[64, 0][..]),
        ("all dimensions 0", &[0, 0]),
        ("first dimension 0", &[0, 512]),
        ("a third dimension of 0", &[64, 512, 0]),
    ] {
        cases.parts(name, INVALID, &["token_embd.weight", "no dimension of 0"], |f| {
            f.tensor("token_embd.weight").dims = dims.into();
        });
    }
    for (name, type_id, dims) in [
        ("elements that wrap to 0", F32, &[1 << 32, 1 << 32][..]),
        ("elements 2^80", F32, &[1 << 40, 1 << 40]),
        ("bytes that wrap to the right size", F32, &[64 + (1 << 62)]),
        ("dimension -1", I8, &[u64::MAX, 2]),
        ("blocks that wrap", Q4_0, &[1 << 63, 64]),
        ("four dimensions of 2^16", I8, &[1 << 16, 1 << 16, 1 << 16, 1 << 16]),
    ] {
        cases.parts(name, INVALID, &["x.weight", "does not fit 64 bits"], |f| {
            f.push_tensor("x.weight", dims, type_id, vec![0; 256])
        });
    }
    cases.parts("two tensors of 2^63 - 64 bytes", INVALID, &["x.weight", "short"], |f| {
        f.push_tensor("x.weight", &[(1 << 63) - 64], I8, vec![]);
        f.push_tensor("y.weight", &[(1 << 63) - 64], I8, vec![]);
    });
    cases.parts("a size that padding would wrap", INVALID, &["x.weight", "short"], |f| {
        f.push_tensor("x.weight", &[u64::MAX - 3], I8, vec![]);
    });
    for (name, id) in [
        ("dropped type 4", 4),
        ("dropped type 31", 31),
        ("dropped type 36", 36),
        ("type 43", 43),
        ("type 1000", 1000),
        ("type -1", u32::MAX),
    ] {
        cases.parts(name, UNSUPPORTED, &["output_norm.weight", "unknown type id"], |f| {
            f.tensor("output_norm.weight").type_id = id;
        });
    }
    cases.parts("rows that are not whole blocks", INVALID, &["rows of 33", "Q4_0"], |f| {
        f.push_tensor("x.weight", &[33, 2], Q4_0, vec![0; 64]);
    });
    cases.parts("rows of an eighth of a block", INVALID, &["rows of 32", "IQ2_XS"], |f| {
        f.push_tensor("x.weight", &[32, 8], IQ2_XS, vec![0; 74]);
    });

    // Where the data is.
    for (name, offset) in [("offset 4", 4), ("offset 16", 16), ("offset 2^64 - 1", u64::MAX)] {
        cases.parts(name, INVALID, &["output_norm.weight", "multiple of 32"], |f| {
            f.tensor("output_norm.weight").offset = Some(offset);
        });
    }
    for (name, offset) in
        [("offset beyond the file", 1 << 30), ("offset 2^63", 1 << 63), ("offset that wraps", u64::MAX - 31)]
    {
        cases.parts(name, INVALID, &["output_norm.weight", "needs 256 bytes", "short"], |f| {
            f.tensor("output_norm.weight").offset = Some(offset);
        });
    }
    cases.parts("two tensors at one place", INVALID, &["overlaps", "token_embd.weight"], |f| {
        f.tensor("output_norm.weight").offset = Some(0);
    });
    cases.parts(
        "a tensor in the middle of another",
        INVALID,
        &["output_norm.weight", "overlaps tensor token_embd.weight"],
        |f| {
            f.tensor("output_norm.weight").offset = Some(4096);
        },
    );
    cases.parts("offsets for an alignment the file does not have", INVALID, &["multiple of 4096"], |f| {
        f.set_u32("general.alignment", 4096);
    });

    // Downloads cut short.
    cases.bytes("cut in the metadata", INVALID, &["key", "bytes left"], &whole[..header / 4]);
    cases.bytes("cut in the tensor table", INVALID, &["tensor", "short"], &whole[..header - 7]);
    cases.bytes("cut before the data", INVALID, &["tensor", "short"], &whole[..header]);
    cases.bytes("cut in the middle", INVALID, &["tensor", "short"], &whole[..whole.len() / 2]);
    cases.bytes("the last byte missing", INVALID, &["tensor", "file ends 1 bytes short"], &whole[..end - 1]);

    // Other files that end in .gguf all the same, and long things in error lines.
    cases.bytes(
        "safetensors",
        INVALID,
        &["does not start with GGUF"],
        b"\x10\0\0\0\0\0\0\0{\"a\": [1, 2]}     ".to_vec(),
    );
    cases.bytes("a zip archive", INVALID, &["does not start with GGUF"], [&b"PK\x03\x04"[..], &[0; 60]].concat());
    cases.bytes("zeros", INVALID, &["does not start with GGUF"], vec![0; 4096]);
    cases.bytes(
        "a git-lfs pointer",
        INVALID,
        &["does not start with GGUF"],
        "version https://git-lfs.github.com/spec/v1\n",
    );
    cases.bytes("nothing but a header", INVALID, &["general.architecture", "missing"], {
        [&b"GGUF"[..], &3_u32.to_le_bytes(), &[0; 16]].concat()
    });
    cases.parts("no tensors", INVALID, &["tensor token_embd.weight", "missing"], |f| f.n_tensors = Some(0));
    cases.parts("no keys", INVALID, &["tensor general.architecture"], |f| f.n_pairs = Some(0));
    cases.parts("a long key with a value of no type", INVALID, &["key kkkk", " ... ", "unknown value type 77"], |f| {
        *f.pair("general.name") = Pair { key: vec![b'k'; 65_535], key_len: None, ty: 77, value: vec![] };
    });
    cases.parts("a long key of escapes, twice", INVALID, &["\\u{1b}", "twice"], |f| {
        let pair = Pair { key: vec![0x1b; 60_000], key_len: None, ty: ty::U8, value: vec![0] };
        f.pairs.extend([pair.clone(), pair]);
    });
    cases.parts("offsets one byte apart", INVALID, &["output_norm.weight", "multiple of 32"], |f| {
        f.tensor("output_norm.weight").offset = Some(1);
    });
    cases.parts("a tensor that reaches into the next", INVALID, &["overlaps"], |f| {
        f.tensor("output_norm.weight").dims = vec![72];
    });
    cases.parts("the last tensor a row too long", INVALID, &["x.weight", "short"], |f| {
        f.push_tensor("x.weight", &[32, 9], Q4_0, vec![0; 8 * 18]);
    });
    cases.parts("a count of values in place of their bytes", INVALID, &["token_type", "2097152 elements"], |f| {
        f.pair("tokenizer.ggml.token_type").value[4..12].copy_from_slice(&(1_u64 << 21).to_le_bytes());
    });
    cases.parts("a type of 2^16 in an array", INVALID, &["unknown element type 65536"], |f| {
        f.pair("tokenizer.ggml.tokens").value[..4].copy_from_slice(&(1_u32 << 16).to_le_bytes());
    });

    cases.check(&[show, run]);
}

#[test]
fn impossible_hyper_parameters_are_refused() {
    let mut cases = Cases::default();
    cases.parts("no architecture", INVALID, &["general.architecture"], |f| f.remove("general.architecture"));
    cases.parts("architecture is a number", INVALID, &["general.architecture", "u32"], |f| {
        f.set_u32("general.architecture", 4)
    });
    cases.parts("another architecture", UNSUPPORTED, &["llama", "gemma4"], |f| {
        f.set_str("general.architecture", "llama")
    });
    cases.parts("an architecture with escapes", UNSUPPORTED, &["\\u{1b}]0;x\\u{7}"], |f| {
        f.set_str("general.architecture", "\x1b]0;x\x07\r\n");
    });
    cases.parts("an architecture that is not UTF-8", INVALID, &["general.architecture", "UTF-8"], |f| {
        f.set_str("general.architecture", b"\xffgemma4");
    });
    cases.parts("one file of a split model", UNSUPPORTED, &["split.count"], |f| {
        f.set("split.count", 2, 3_u16.to_le_bytes());
    });

    for key in [
        "gemma4.block_count",
        "gemma4.context_length",
        "gemma4.embedding_length",
        "gemma4.feed_forward_length",
        "gemma4.attention.head_count",
        "gemma4.attention.sliding_window",
        "gemma4.attention.sliding_window_pattern",
        "gemma4.attention.layer_norm_rms_epsilon",
        "gemma4.attention.key_length",
        "gemma4.attention.key_length_swa",
    ] {
        cases.parts(key, INVALID, Box::leak(Box::new([key, "missing"])), |f| f.remove(key));
    }
    for key in [
        "gemma4.block_count",
        "gemma4.context_length",
        "gemma4.embedding_length",
        "gemma4.feed_forward_length",
        "gemma4.attention.head_count",
        "gemma4.attention.head_count_kv",
        "gemma4.attention.sliding_window",
        "gemma4.attention.key_length",
        "gemma4.attention.value_length",
        "gemma4.attention.key_length_swa",
        "gemma4.attention.value_length_swa",
        "gemma4.rope.dimension_count",
        "gemma4.rope.dimension_count_swa",
    ] {
        let words: &'static [&'static str] = Box::leak(Box::new([key]));
        cases.parts("0 as a key below", INVALID, words, |f| f.set_u32(key, 0));
        cases.parts("2^32 - 1 as a key below", if key.ends_with("context_length") { 0 } else { INVALID }, words, |f| {
            f.set_u32(key, u32::MAX)
        });
        cases.parts("-1 as a key below", INVALID, words, |f| f.set(key, ty::I32, (-1_i32).to_le_bytes()));
        cases.parts("2^63 as a key below", INVALID, words, |f| f.set(key, ty::U64, (1_u64 << 63).to_le_bytes()));
        cases.parts("text as a key below", INVALID, words, |f| f.set_str(key, "4"));
        cases.parts("a float as a key below", INVALID, words, |f| f.set_f32(key, 4.0));
        cases.parts("a bool as a key below", INVALID, words, |f| f.set(key, ty::BOOL, [1]));
        cases.parts("an array of no use as a key below", INVALID, words, |f| {
            f.set(key, ty::ARRAY, raw::strings(&["4"]))
        });
    }
    // A context of 2^32 - 1 is a boast, not a defect; nothing is allocated for it. And a window so large never closes.
    let boast = |case: &Case| {
        case.name.starts_with("2^32 - 1")
            && matches!(case.words[0], "gemma4.context_length" | "gemma4.attention.sliding_window")
    };
    cases.0.retain(|case| !boast(case));

    for key in ["gemma4.feed_forward_length", "gemma4.attention.head_count", "gemma4.attention.head_count_kv"] {
        let words: &'static [&'static str] = Box::leak(Box::new([key]));
        cases.parts("too few layers in an array", INVALID, words, |f| f.set(key, ty::ARRAY, raw::i32s(&[1, 1, 1])));
        cases.parts("too many layers in an array", INVALID, words, |f| f.set(key, ty::ARRAY, raw::i32s(&[1; 5])));
        cases.parts("no layers in an array", INVALID, words, |f| f.set(key, ty::ARRAY, raw::i32s(&[])));
        cases.parts("a negative in an array", INVALID, words, |f| f.set(key, ty::ARRAY, raw::i32s(&[1, 1, -1, 1])));
        cases.parts("a zero in an array", INVALID, words, |f| f.set(key, ty::ARRAY, raw::i32s(&[1, 1, 0, 1])));
    }
    let pattern = "gemma4.attention.sliding_window_pattern";
    cases.parts("pattern too short", INVALID, &["sliding_window_pattern", "3"], |f| {
        f.set(pattern, ty::ARRAY, raw::array(ty::BOOL, 3, &[1, 0, 1]))
    });
    cases.parts("pattern too long", INVALID, &["sliding_window_pattern", "5"], |f| {
        f.set(pattern, ty::ARRAY, raw::array(ty::BOOL, 5, &[1, 0, 1, 0, 1]))
    });
    cases.parts("pattern of integers", INVALID, &["sliding_window_pattern", "bool"], |f| {
        f.set(pattern, ty::ARRAY, raw::i32s(&[1, 0, 1, 0]))
    });
    cases.parts("pattern a number", INVALID, &["sliding_window_pattern", "array"], |f| f.set_u32(pattern, 2));
    cases.parts("more layers than tensors", INVALID, &["sliding_window_pattern"], |f| {
        f.set_u32("gemma4.block_count", 5)
    });
    cases.parts("heads not divisible by their keys", INVALID, &["head_count_kv"], |f| {
        f.set_u32("gemma4.attention.head_count", 3);
        f.set_u32("gemma4.attention.head_count_kv", 2);
    });
    cases.parts("another number of heads", INVALID, &["tensor blk.0.attn_q.weight", "shape"], |f| {
        f.set_u32("gemma4.attention.head_count", 4)
    });
    cases.parts("more heads than believable", INVALID, &["head_count"], |f| {
        f.set_u32("gemma4.attention.head_count", 1 << 20)
    });
    cases.parts("another width", INVALID, &["tensor", "shape"], |f| f.set_u32("gemma4.embedding_length", 32));
    cases.parts("odd width", INVALID, &["tensor", "shape"], |f| f.set_u32("gemma4.embedding_length", 63));
    cases.parts("odd head", INVALID, &["key_length"], |f| {
        f.set_u32("gemma4.attention.key_length", 63);
        f.set_u32("gemma4.attention.value_length", 63);
    });
    cases.parts("values of another width than keys", INVALID, &["value_length"], |f| {
        f.set_u32("gemma4.attention.value_length", 32)
    });
    cases.parts("the same in sliding layers", INVALID, &["value_length_swa"], |f| {
        f.set_u32("gemma4.attention.value_length_swa", 16)
    });
    cases.parts("odd rotation", INVALID, &["rope.dimension_count"], |f| f.set_u32("gemma4.rope.dimension_count", 31));
    cases.parts("rotation beyond the head", INVALID, &["rope.dimension_count"], |f| {
        f.set_u32("gemma4.rope.dimension_count", 128)
    });
    cases.parts("odd rotation in sliding layers", INVALID, &["rope.dimension_count_swa"], |f| {
        f.set_u32("gemma4.rope.dimension_count_swa", 17)
    });
    cases.parts("rotation beyond the head in sliding layers", INVALID, &["rope.dimension_count_swa"], |f| {
        f.set_u32("gemma4.rope.dimension_count_swa", 64)
    });
    let shared = "gemma4.attention.shared_kv_layers";
    cases.parts("all layers share", INVALID, &["shared_kv_layers"], |f| f.set_u32(shared, 4));
    cases.parts("more layers share than there are", INVALID, &["shared_kv_layers"], |f| f.set_u32(shared, 5));
    cases.parts("sharing with a layer of the other kind", INVALID, &["shared_kv_layers", "global"], |f| {
        f.set_u32(shared, 3)
    });
    cases.parts("2^32 - 1 layers share", INVALID, &["shared_kv_layers"], |f| f.set_u32(shared, u32::MAX));
    cases.parts("fewer layers share than have no keys", INVALID, &["blk.2.attn_k"], |f| f.set_u32(shared, 1));
    for key in [
        "gemma4.rope.freq_base",
        "gemma4.rope.freq_base_swa",
        "gemma4.final_logit_softcapping",
        "gemma4.attention.layer_norm_rms_epsilon",
    ] {
        let words: &'static [&'static str] = Box::leak(Box::new([key]));
        for (name, x) in
            [("NaN", f32::NAN), ("infinity", f32::INFINITY), ("-infinity", f32::NEG_INFINITY), ("-1", -1.0)]
        {
            cases.parts(name, INVALID, words, |f| f.set_f32(key, x));
        }
        cases.parts("NaN as f64", INVALID, words, |f| f.set(key, ty::F64, f64::NAN.to_le_bytes()));
        cases.parts("f64 beyond f32", INVALID, words, |f| f.set(key, ty::F64, 1e300_f64.to_le_bytes()));
        cases.parts("an integer for a float", INVALID, words, |f| f.set_u32(key, 1));
        if !key.ends_with("epsilon") {
            cases.parts("zero for a float", INVALID, words, |f| f.set_f32(key, 0.0));
        }
    }
    cases.parts("per-layer embedding of another width", INVALID, &["per_layer_token_embd.weight"], |f| {
        f.set_u32("gemma4.embedding_length_per_layer_input", 64);
    });
    cases.parts("per-layer embedding of 2^32 - 1", INVALID, &["embedding_length_per_layer_input"], |f| {
        f.set_u32("gemma4.embedding_length_per_layer_input", u32::MAX);
    });

    for architecture in ["", "gemma4\0", "Gemma4", "gemma3n", "gemma4 ", "clip"] {
        cases.parts("almost the architecture", UNSUPPORTED, &["general.architecture"], |f| {
            f.set_str("general.architecture", architecture)
        });
    }
    cases.parts("an architecture of a mebibyte", UNSUPPORTED, &["general.architecture", " ... ", "gemma4"], |f| {
        f.set_str("general.architecture", vec![0; 1 << 20])
    });
    cases.parts("an architecture of more", INVALID, &["general.architecture", "2097152 bytes"], |f| {
        f.set_str("general.architecture", vec![0; 2 << 20])
    });
    cases.parts("several architectures", INVALID, &["general.architecture", "array of string"], |f| {
        f.set("general.architecture", ty::ARRAY, raw::strings(&["gemma4"]))
    });
    // Nothing may be sized by these before a tensor confirms them.
    for (key, value) in [
        ("gemma4.feed_forward_length", 1 << 20),
        ("gemma4.embedding_length", 1 << 20),
        ("gemma4.embedding_length_per_layer_input", 1 << 20),
        ("gemma4.attention.head_count", 1024),
        ("gemma4.attention.head_count_kv", 2),
    ] {
        cases.parts("more than the tensors have", INVALID, &["tensor", "expected shape"], |f| f.set_u32(key, value));
    }
    for kind in ["", "_swa"] {
        cases.parts("heads of 2^20", INVALID, &["tensor blk.", "expected shape"], |f| {
            f.set_u32(&format!("gemma4.attention.key_length{kind}"), 1 << 20);
            f.set_u32(&format!("gemma4.attention.value_length{kind}"), 1 << 20);
        });
    }
    cases.parts("512 layers", INVALID, &["tensor", "expected shape"], |f| {
        f.set_u32("gemma4.block_count", 512);
        let pattern: Vec<u8> = (0..512).map(|il| u8::from(il % 2 == 0)).collect();
        f.set("gemma4.attention.sliding_window_pattern", ty::ARRAY, raw::array(ty::BOOL, 512, &pattern));
        f.set_u32("gemma4.attention.shared_kv_layers", 0);
        for key in ["feed_forward_length", "attention.head_count", "attention.head_count_kv"] {
            f.set_u32(
                &format!("gemma4.{key}"),
                if key.starts_with('f') { 64 } else { 2 - u32::from(key.ends_with("kv")) },
            );
        }
    });
    cases.parts("sharing layers with other heads", INVALID, &["head_count_kv", "shares"], |f| {
        f.set("gemma4.attention.head_count_kv", ty::ARRAY, raw::i32s(&[1, 1, 2, 1]));
    });
    cases.parts("layers as 64-bit integers beyond i64", INVALID, &["head_count", "too large"], |f| {
        f.set("gemma4.attention.head_count", ty::ARRAY, raw::array(ty::U64, 4, &[0xff; 32]));
    });
    cases.parts("layers as floats", INVALID, &["feed_forward_length", "array of f32"], |f| {
        f.set("gemma4.feed_forward_length", ty::ARRAY, raw::array(ty::F32, 4, &[0; 16]));
    });
    for (key, value) in [("temp", f32::NAN), ("temp", -1.0), ("top_p", 1.5), ("min_p", f32::INFINITY)] {
        cases.parts("a recommended sampling nobody can follow", INVALID, &["general.sampling"], |f| {
            f.set_f32(&format!("general.sampling.{key}"), value)
        });
    }
    cases.parts("recommended top-k of -1", INVALID, &["general.sampling.top_k"], |f| {
        f.set("general.sampling.top_k", ty::I32, (-1_i32).to_le_bytes())
    });
    cases.parts("a recommended temperature in words", INVALID, &["general.sampling.temp"], |f| {
        f.set_str("general.sampling.temp", "warm")
    });
    cases.moe("1024 experts, all used", INVALID, &["tensor", "expected shape"], |f| {
        f.set_u32("gemma4.expert_count", 1024);
        f.set_u32("gemma4.expert_used_count", 1024);
    });
    cases.moe("experts 2^20 wide", INVALID, &["tensor", "expected shape"], |f| {
        f.set_u32("gemma4.expert_feed_forward_length", 1 << 20)
    });
    cases.moe("experts of layers that are not there", INVALID, &["expert_feed_forward_length"], |f| {
        f.set("gemma4.expert_feed_forward_length", ty::ARRAY, raw::i32s(&[32, 32, 32]))
    });

    for key in ["gemma4.expert_count", "gemma4.expert_used_count", "gemma4.expert_feed_forward_length"] {
        let words: &'static [&'static str] = Box::leak(Box::new(["expert"]));
        cases.moe("0 experts in some sense", INVALID, words, |f| f.set_u32(key, 0));
        cases.moe("2^32 - 1 experts in some sense", INVALID, words, |f| f.set_u32(key, u32::MAX));
        cases.moe("experts are text", INVALID, words, |f| f.set_str(key, "2"));
        cases.moe("experts are negative", INVALID, words, |f| f.set(key, ty::I32, (-2_i32).to_le_bytes()));
    }
    cases.moe("more experts used than there are", INVALID, &["expert_used_count"], |f| {
        f.set_u32("gemma4.expert_used_count", 5)
    });
    cases.moe("no number of experts used", INVALID, &["expert_used_count"], |f| f.remove("gemma4.expert_used_count"));
    cases.moe("no number of experts", INVALID, &["expert"], |f| f.remove("gemma4.expert_count"));
    cases.moe("no width of experts", INVALID, &["expert_feed_forward_length"], |f| {
        f.remove("gemma4.expert_feed_forward_length")
    });
    cases.moe("experts of another number", INVALID, &["tensor", "shape"], |f| f.set_u32("gemma4.expert_count", 8));

    cases.check(&[show, run]);
}

#[test]
fn impossible_scales_of_keys_and_values_are_refused() {
    const GOOD: [(u8, f32, f32); 4] = [(8, 0.03, 0.02), (4, 0.5, 0.0), (0, 0.0, 0.0), (4, 1.0, 1.0)];
    let mut cases = Cases::default();
    let mut with = |name, code, words: &[&'static str], change: &dyn Fn(&mut Parts)| {
        let words: &'static [&'static str] = Box::leak(words.to_vec().into());
        cases.parts(name, code, words, |f| {
            f.set_kv_scales(&GOOD);
            change(f);
        });
    };
    with("a version to come", UNSUPPORTED, &["srq.version", "2"], &|f| f.set_u32("gemma4.srq.version", 2));
    with("a version in words", INVALID, &["srq.version"], &|f| f.set_str("gemma4.srq.version", "1"));
    with("another scheme", UNSUPPORTED, &["srq.scheme", "w8a16\\u{1b}"], &|f| {
        f.set_str("gemma4.srq.scheme", "w8a16\x1b");
    });
    with("another way to round", UNSUPPORTED, &["srq.round", "half_away"], &|f| {
        f.set_str("gemma4.srq.round", "half_away");
    });
    with("another range", UNSUPPORTED, &["srq.qmin", "-127"], &|f| {
        f.set("gemma4.srq.qmin", ty::I32, (-127i32).to_le_bytes());
    });
    for key in ["scheme", "round", "qmin", "qmax", "kv.k_scale", "kv.v_scale", "kv.bits"] {
        with(key, INVALID, &["srq", "missing"], &|f| f.remove(&format!("gemma4.srq.{key}")));
    }
    for bits in [0, 2, 7, 9, 255] {
        with("bits of another number", INVALID, &["srq.kv.bits"], &|f| {
            f.set("gemma4.srq.kv.bits", ty::ARRAY, raw::array(ty::U8, 4, &[8, bits, 0, 0]));
        });
    }
    for key in ["gemma4.srq.kv.k_scale", "gemma4.srq.kv.v_scale"] {
        for scale in [-1.0, f32::NAN, f32::INFINITY, -f32::INFINITY, 1e-40, f32::MIN_POSITIVE] {
            let floats: Vec<u8> = [1.0, scale, 0.0, 0.0].into_iter().flat_map(f32::to_le_bytes).collect();
            with("a scale that is none", INVALID, &["_scale"], &|f| {
                f.set(key, ty::ARRAY, raw::array(ty::F32, 4, &floats));
            });
        }
        with("scales of too few layers", INVALID, &["_scale", "4 layers"], &|f| {
            f.set(key, ty::ARRAY, raw::array(ty::F32, 3, &[0; 12]));
        });
        with("scales as integers", INVALID, &["_scale"], &|f| f.set(key, ty::ARRAY, raw::i32s(&[1, 1, 1, 1])));
        with("one scale for all", INVALID, &["_scale"], &|f| f.set_f32(key, 1.0));
    }
    cases.check(&[show, run]);

    // What is not to be refused: shared layers that say nothing of use, scales so large that all becomes 0.
    let mut parts = base();
    parts.set_kv_scales(&[(8, f32::MAX, 1e30), (4, 1e-30, f32::MAX), (5, 3.0, 0.0), (8, 1.0, 1.0)]);
    assert_eq!(works("scales of every size", &parts.bytes(), &[show, run]), Vec::<String>::new());
}

#[test]
fn wrong_tensors_are_refused() {
    let mut cases = Cases::default();
    for name in [
        "token_embd.weight",
        "output_norm.weight",
        "rope_freqs.weight",
        "per_layer_token_embd.weight",
        "per_layer_model_proj.weight",
        "per_layer_proj_norm.weight",
        "blk.0.attn_norm.weight",
        "blk.0.attn_q.weight",
        "blk.0.attn_k.weight",
        "blk.0.attn_v.weight",
        "blk.3.attn_output.weight",
        "blk.1.attn_q_norm.weight",
        "blk.1.attn_k_norm.weight",
        "blk.2.post_attention_norm.weight",
        "blk.2.ffn_norm.weight",
        "blk.3.ffn_gate.weight",
        "blk.3.ffn_up.weight",
        "blk.3.ffn_down.weight",
        "blk.3.post_ffw_norm.weight",
        "blk.3.inp_gate.weight",
        "blk.3.proj.weight",
        "blk.3.post_norm.weight",
    ] {
        let words: &'static [&'static str] = Box::leak(Box::new([name]));
        cases.parts("a tensor is missing", INVALID, words, |f| f.tensors.retain(|t| t.name != name.as_bytes()));
        cases.parts("a tensor has one row or value too few", INVALID, words, |f| {
            *f.tensor(name).dims.last_mut().unwrap() -= 1;
        });
        cases.parts("a tensor has a dimension too many", INVALID, words, |f| {
            let t = f.tensor(name);
            t.dims.resize(3, 1);
            t.dims[2] = 2;
            t.data.extend_from_within(..);
        });
        if name.ends_with("norm.weight") {
            cases.parts("a norm of f64", INVALID, words, |f| {
                let t = f.tensor(name);
                t.type_id = F64;
                t.data.extend_from_within(..);
            });
            cases.parts("a norm of f16", INVALID, words, |f| f.tensor(name).type_id = F16);
            cases.parts("a norm of Q4_0", INVALID, words, |f| {
                let t = f.tensor(name);
                t.type_id = Q4_0;
                t.dims[0] = t.dims[0].next_multiple_of(32);
            });
            for (what, x) in [("NaN in a norm", f32::NAN), ("infinity in a norm", f32::INFINITY)] {
                cases.parts(what, INVALID, words, |f| f.tensor(name).data[4..8].copy_from_slice(&x.to_le_bytes()));
            }
        } else if name != "rope_freqs.weight" {
            cases.parts("a matrix of I8", UNSUPPORTED, words, |f| {
                let t = f.tensor(name);
                t.type_id = I8;
                t.data.resize(t.dims.iter().product::<u64>() as usize, 1);
            });
            cases.parts("a matrix of F64", UNSUPPORTED, words, |f| {
                let t = f.tensor(name);
                t.type_id = F64;
                t.data.resize(t.dims.iter().product::<u64>() as usize * 8, 0);
            });
        }
    }
    cases.parts("a transposed matrix", INVALID, &["blk.0.attn_q.weight", "shape"], |f| {
        let mut spec = spec();
        spec.heads = 4;
        *f = parts(&spec);
        f.tensor("blk.0.attn_q.weight").dims.reverse();
    });
    cases.parts("an embedding with fewer rows than tokens", INVALID, &["token_embd.weight"], |f| {
        f.tensor("token_embd.weight").dims[1] -= 32;
    });
    cases.parts("fewer tokens than rows", INVALID, &["token_embd.weight"], |f| {
        f.remove("tokenizer.ggml.token_type");
        let file = Gguf::from_bytes("b", base().bytes()).unwrap();
        let tokens: Vec<&[u8]> = file.array("tokenizer.ggml.tokens").unwrap().unwrap().strings().unwrap().collect();
        f.set("tokenizer.ggml.tokens", ty::ARRAY, raw::strings(&tokens[..500]));
    });
    for (name, x) in
        [("rotation divisor 0", 0.0), ("rotation divisor NaN", f32::NAN), ("rotation divisor -1", -1.0_f32)]
    {
        cases.parts(name, INVALID, &["rope_freqs.weight"], |f| {
            f.tensor("rope_freqs.weight").data[..4].copy_from_slice(&x.to_le_bytes())
        });
    }
    cases.parts("a layer scale of two values", INVALID, &["blk.1.layer_output_scale.weight"], |f| {
        let t = f.tensor("blk.1.layer_output_scale.weight");
        t.dims = vec![2];
        t.data.extend_from_within(..);
    });
    cases.parts("a layer scale of NaN", INVALID, &["blk.1.layer_output_scale.weight"], |f| {
        f.tensor("blk.1.layer_output_scale.weight").data.copy_from_slice(&f32::NAN.to_le_bytes());
    });
    cases.parts("an output matrix of the wrong shape", INVALID, &["output.weight"], |f| {
        f.push_tensor("output.weight", &[64, 10], F32, vec![0; 64 * 10 * 4]);
    });
    cases.parts("fused q, k and v of the wrong shape", INVALID, &["blk.0.attn_qkv.weight"], |f| {
        f.push_tensor("blk.0.attn_qkv.weight", &[64, 10], F32, vec![0; 64 * 10 * 4]);
    });
    cases.parts("a scale nobody applies", UNSUPPORTED, &["blk.0.attn_q.scale"], |f| {
        f.push_tensor("blk.0.attn_q.scale", &[1], F32, 2_f32.to_le_bytes().into());
    });
    cases.parts("two matrices under each other's names", INVALID, &["blk.0.attn_q.weight", "shape"], |f| {
        f.tensor("blk.0.attn_q.weight").name = b"x".into();
        f.tensor("blk.0.attn_k.weight").name = b"blk.0.attn_q.weight".into();
        f.tensor("x").name = b"blk.0.attn_k.weight".into();
    });
    cases.parts("a name in capitals", INVALID, &["blk.0.ffn_up.weight", "missing"], |f| {
        f.tensor("blk.0.ffn_up.weight").name = b"blk.0.FFN_UP.weight".into();
    });
    cases.parts("integers for a norm", INVALID, &["output_norm.weight", "I32"], |f| {
        f.tensor("output_norm.weight").type_id = 26
    });
    cases.parts("a layer scale of infinity", INVALID, &["blk.0.layer_output_scale.weight"], |f| {
        f.tensor("blk.0.layer_output_scale.weight").data.copy_from_slice(&f32::INFINITY.to_le_bytes());
    });
    cases.moe("a router scale of NaN", INVALID, &["blk.0.ffn_gate_inp.scale"], |f| {
        f.tensor("blk.0.ffn_gate_inp.scale").data[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    cases.moe("an expert's scale of NaN", INVALID, &["blk.1.ffn_down_exps.scale"], |f| {
        f.tensor("blk.1.ffn_down_exps.scale").data[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    cases.moe("a router of the wrong shape", INVALID, &["blk.0.ffn_gate_inp.weight"], |f| {
        f.tensor("blk.0.ffn_gate_inp.weight").dims[1] -= 1;
    });
    cases.moe("experts of the wrong shape", INVALID, &["blk.0.ffn_down_exps.weight"], |f| {
        f.tensor("blk.0.ffn_down_exps.weight").dims[2] -= 1;
    });
    cases.moe("no experts", INVALID, &["blk.0.ffn_gate_exps.weight"], |f| {
        f.tensors.retain(|t| t.name != b"blk.0.ffn_gate_up_exps.weight");
    });
    cases.check(&[show, run]);
}

#[test]
fn broken_vocabularies_are_refused() {
    const TOKENS: &str = "tokenizer.ggml.tokens";
    const TYPES: &str = "tokenizer.ggml.token_type";
    const SCORES: &str = "tokenizer.ggml.scores";
    let mut cases = Cases::default();
    let file = Gguf::from_bytes("b", base().bytes()).unwrap();
    let tokens: Vec<Vec<u8>> = file.array(TOKENS).unwrap().unwrap().strings().unwrap().map(<[u8]>::to_vec).collect();
    let with = |id: usize, text: &[u8]| {
        let mut tokens = tokens.clone();
        tokens[id] = text.to_vec();
        raw::strings(&tokens)
    };

    cases.parts("no tokenizer model", INVALID, &["tokenizer.ggml.model"], |f| f.remove("tokenizer.ggml.model"));
    for model in ["llama", "gpt2", "bert", "t5", "no_vocab", "\x1b[31m"] {
        cases.parts("another tokenizer", UNSUPPORTED, &["tokenizer.ggml.model"], |f| {
            f.set_str("tokenizer.ggml.model", model)
        });
    }
    cases.parts("tokenizer model a number", INVALID, &["tokenizer.ggml.model"], |f| {
        f.set_u32("tokenizer.ggml.model", 1)
    });
    cases.parts("no tokens", INVALID, &[TOKENS], |f| f.remove(TOKENS));
    cases.parts("an empty vocabulary", INVALID, &[TOKENS], |f| f.set(TOKENS, ty::ARRAY, raw::strings::<&str>(&[])));
    cases
        .parts("tokens are numbers", INVALID, &[TOKENS, "i32"], |f| f.set(TOKENS, ty::ARRAY, raw::i32s(&vec![1; 512])));
    cases.parts("tokens are one string", INVALID, &[TOKENS], |f| f.set_str(TOKENS, "a b c"));
    cases.parts("one token", INVALID, &[], |f| f.set(TOKENS, ty::ARRAY, raw::strings(&["<bos>"])));
    for (name, len) in [("types too short", 511), ("types too long", 513), ("no types in the array", 0)] {
        cases.parts(name, INVALID, &[TYPES], |f| f.set(TYPES, ty::ARRAY, raw::i32s(&vec![1; len])));
    }
    cases.parts("types are floats", INVALID, &[TYPES], |f| {
        f.set(TYPES, ty::ARRAY, raw::array(ty::F32, 512, &vec![0; 2048]));
    });
    cases.parts("types are strings", INVALID, &[TYPES], |f| f.set(TYPES, ty::ARRAY, raw::strings(&vec!["1"; 512])));
    cases.parts("types are one number", INVALID, &[TYPES], |f| f.set_u32(TYPES, 1));
    for (name, len) in [("scores too short", 511), ("scores too long", 600)] {
        cases.parts(name, INVALID, &[SCORES], |f| {
            f.set(SCORES, ty::ARRAY, raw::array(ty::F32, len, &vec![0; len as usize * 4]))
        });
    }
    cases.parts("scores stored as bytes", INVALID, &[SCORES], |f| {
        f.set(SCORES, ty::ARRAY, raw::array(ty::U8, 512, &[0; 512]))
    });
    cases.parts("no merges", INVALID, &["tokenizer.ggml.merges"], |f| f.remove("tokenizer.ggml.merges"));
    cases.parts("merges are numbers", INVALID, &["tokenizer.ggml.merges"], |f| {
        f.set("tokenizer.ggml.merges", ty::ARRAY, raw::i32s(&[1, 2]))
    });
    for name in ["bos", "eos", "unknown", "padding", "mask", "eot"] {
        let key: &'static str = Box::leak(format!("tokenizer.ggml.{name}_token_id").into());
        let words: &'static [&'static str] = Box::leak(Box::new([key]));
        cases.parts("a special id one beyond the vocabulary", INVALID, words, |f| f.set_u32(key, 512));
        cases.parts("a special id of 2^32 - 1", INVALID, words, |f| f.set_u32(key, u32::MAX));
        cases.parts("a special id of -1", INVALID, words, |f| f.set(key, ty::I32, (-1_i32).to_le_bytes()));
        cases.parts("a special id as text", INVALID, words, |f| f.set_str(key, "<bos>"));
    }
    let suppress = "tokenizer.ggml.suppress_tokens";
    cases.parts("a suppressed id beyond the vocabulary", INVALID, &["suppress_tokens"], |f| {
        f.set(suppress, ty::ARRAY, raw::i32s(&[5, 512]))
    });
    cases.parts("a negative suppressed id", INVALID, &["suppress_tokens"], |f| {
        f.set(suppress, ty::ARRAY, raw::i32s(&[-1]))
    });
    cases
        .parts("suppressed texts", INVALID, &["suppress_tokens"], |f| f.set(suppress, ty::ARRAY, raw::strings(&["a"])));
    for text in ["<0x-1>", "<0x1>", "<0xGG>", "<0x100>", "<0x>", "0x41", "<0x 1>", "<0x+1>", ""] {
        let value = with(300, text.as_bytes());
        cases.parts("a byte token that is none", INVALID, &[TOKENS, "300"], move |f| f.set(TOKENS, ty::ARRAY, value));
    }
    let long = with(500, &vec![b'x'; 1 << 20]);
    cases.parts("a token of 1 MiB", INVALID, &[TOKENS, "500"], |f| f.set(TOKENS, ty::ARRAY, long));
    let nameless = with(2, b"x");
    cases.parts("no beginning of text", INVALID, &["<bos>"], |f| {
        f.set(TOKENS, ty::ARRAY, nameless);
        f.remove("tokenizer.ggml.bos_token_id");
    });
    for (name, change) in [("a special id as float", 0_u8), ("a special id as bool", 1), ("a special id as array", 2)] {
        cases.parts(name, INVALID, &["tokenizer.ggml.bos_token_id"], |f| match change {
            0 => f.set_f32("tokenizer.ggml.bos_token_id", 2.0),
            1 => f.set("tokenizer.ggml.bos_token_id", ty::BOOL, [1]),
            _ => f.set("tokenizer.ggml.bos_token_id", ty::ARRAY, raw::i32s(&[2])),
        });
    }
    cases.parts("a special id of 2^63", INVALID, &["tokenizer.ggml.eos_token_id"], |f| {
        f.set("tokenizer.ggml.eos_token_id", ty::U64, (1_u64 << 63).to_le_bytes())
    });
    cases.parts("suppressed ids as floats", INVALID, &["suppress_tokens"], |f| {
        f.set(suppress, ty::ARRAY, raw::array(ty::F32, 1, &[0; 4]))
    });
    cases.parts("one suppressed id, not in an array", INVALID, &["suppress_tokens"], |f| f.set_u32(suppress, 5));
    cases.parts("merges are one string", INVALID, &["tokenizer.ggml.merges"], |f| {
        f.set_str("tokenizer.ggml.merges", "a b")
    });
    cases.parts("scores are strings", INVALID, &[SCORES], |f| f.set(SCORES, ty::ARRAY, raw::strings(&vec!["0"; 512])));
    cases.parts("twice the tokens", INVALID, &["token_embd.weight", "1024"], |f| {
        let twice: Vec<_> = tokens.iter().chain(&tokens).collect();
        f.set(TOKENS, ty::ARRAY, raw::strings(&twice));
        f.remove(TYPES);
    });
    let model = vec![b'g'; 1 << 20];
    cases.parts("a tokenizer with a long name", UNSUPPORTED, &["tokenizer.ggml.model"], |f| {
        f.set_str("tokenizer.ggml.model", model)
    });
    cases.check(&[show, run]);
}

#[test]
fn hostile_templates_are_refused() {
    let mut cases = Cases::default();
    let mut bad = |name, text: &str| {
        cases.parts(name, INVALID, &["chat_template"], |f| f.set_str("tokenizer.chat_template", text));
    };
    bad("unclosed tag", "{% if true");
    bad("unclosed block", "{% for m in messages %}x");
    bad("unknown tag", "{% explode %}");
    bad("a stray end", "{% endfor %}");
    bad("unclosed string", "{{ 'x }}");
    bad("an unknown filter", "{{ messages|explode }}");
    bad("an unknown function", "{{ explode() }}");
    bad("a wild index", "{{ messages[999999999999999999].content.x.y }}");
    bad("an index of a number", "{{ (1).x.y.z[0] }}");
    bad("an endless range", "{% for i in range(1000000000) %}{% endfor %}");
    bad(
        "nested loops",
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}x{% endfor %}{% endfor %}{% endfor %}",
    );
    bad(
        "a huge output",
        "{% for a in range(99999) %}{{ 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' * 99 }}{% endfor %}",
    );
    bad("a huge string", "{{ 'x' * 9999999999 }}");
    bad(
        "doubling",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    );
    bad(
        "doubling a list",
        "{% set ns = namespace(x=[1, 2]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}",
    );
    bad("a macro without end", "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}");
    bad(
        "two macros without end",
        "{% macro f(n) %}{{ g(n) }}{% endmacro %}{% macro g(n) %}{{ f(n) ~ f(n) }}{% endmacro %}{{ f(1) }}",
    );
    bad("deep parentheses", &format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000)));
    bad("deep lists", &format!("{{{{ {}1{} }}}}", "[".repeat(100_000), "]".repeat(100_000)));
    bad("deep blocks", &format!("{}{}", "{% if true %}".repeat(50_000), "{% endif %}".repeat(50_000)));
    bad("a long chain of operators", &format!("{{{{ 1{} }}}}", "+1".repeat(400_000)));
    bad("a long chain of negations", &format!("{{{{ {}1 }}}}", "not ".repeat(200_000)));
    bad("a long chain of minus signs", &format!("{{{{ {}1 }}}}", "-".repeat(200_000)));
    bad("a long chain of filters", &format!("{{{{ 'a'{} }}}}", "|upper".repeat(100_000)));
    bad("an include", "{% include '/etc/passwd' %}");
    bad("an import", "{% import 'x' as y %}");
    bad("padding by a filter", "{{ 'x'|center(9999999999) }}");
    bad("an indent by a filter", "{{ 'x\ny'|indent(9999999999) }}");
    bad("a format", "{{ '%9999999999d'|format(1) }}");
    bad("a million replacements", "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}");
    bad("a method that repeats", "{{ ('x' * 100000).replace('x', 'y' * 100000) }}");
    bad("a method that pads", "{{ 'x'.ljust(9999999999) }}");
    bad("more than a mebibyte of source", &"x".repeat((1 << 20) + 1));
    // What the template says about the messages is the request's fault.
    cases.parts("raise_exception", USAGE, &["chat_template", "no \\u{1b}[31m thanks"], |f| {
        f.set_str("tokenizer.chat_template", "{{ raise_exception('no \x1b[31m thanks') }}")
    });
    cases.parts("a template that is no text", INVALID, &["chat_template"], |f| f.set_u32("tokenizer.chat_template", 1));
    cases.parts("a template that is not UTF-8", INVALID, &["chat_template"], |f| {
        f.set_str("tokenizer.chat_template", b"{{ \xff }}")
    });
    cases.check(&[template, chat]);
}

/// A file that works, whatever it looks like, in the commands named.
fn works(name: &str, bytes: &[u8], commands: &[fn(&Path) -> Outcome]) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("bad.gguf"), bytes).unwrap();
    let outcomes = commands.iter().map(|command| command(dir.path()).works()).enumerate();
    outcomes.filter_map(|(i, result)| Some(format!("{name} (command {i}): {}", result.err()?))).collect()
}

#[test]
fn unusual_files_work() {
    const TOKENS: &str = "tokenizer.ggml.tokens";
    let mut failures = Vec::new();
    let mut good = |name: &str, change: &dyn Fn(&mut Parts)| {
        let mut parts = base();
        change(&mut parts);
        failures.extend(works(name, &parts.bytes(), &[show, run]));
    };
    good("version 2", &|f| f.version = 2);
    good("unknown keys", &|f| {
        f.set_str("gemma4.vision.something", "new");
        f.set("x.numbers", ty::ARRAY, raw::array(ty::U64, 3, &[7; 24]));
        f.set("x.nothing", ty::ARRAY, raw::array(ty::F64, 0, &[]));
    });
    good("unknown tensors in formats nobody multiplies with", &|f| {
        f.push_tensor("v.blk.0.attn_q.weight", &[256, 2], IQ2_XS, vec![9; 148]);
        f.push_tensor("a.conv.weight", &[3, 5], F64, vec![0; 120]);
        f.push_tensor("mm.table", &[7], I8, vec![1; 7]);
    });
    good("a gap between tensors", &|f| {
        f.push_tensor("gap", &[4096], I8, vec![0; 4096]);
        let last = f.tensors.len() - 1;
        f.tensors[last].dims = vec![1];
    });
    good("alignment 4096", &|f| {
        f.set_u32("general.alignment", 4096);
        f.alignment = 4096;
    });
    good("alignment 8", &|f| {
        f.set_u32("general.alignment", 8);
        f.alignment = 8;
    });
    good("tensors in another order", &|f| f.tensors.reverse());
    good("keys in another order", &|f| f.pairs.reverse());
    good("integers of other widths", &|f| {
        f.set("gemma4.block_count", ty::U64, 4_u64.to_le_bytes());
        f.set("gemma4.attention.head_count", ty::U8, [2]);
        f.set("gemma4.attention.head_count_kv", ty::ARRAY, raw::array(ty::U32, 4, &[1, 0, 0, 0].repeat(4)));
        f.set("gemma4.rope.freq_base", ty::F64, 1e6_f64.to_le_bytes());
    });
    good("a boast of a context", &|f| f.set_u32("gemma4.context_length", u32::MAX));
    good("a window that never closes", &|f| f.set_u32("gemma4.attention.sliding_window", u32::MAX));
    good("a name with escapes", &|f| f.set_str("general.name", "\x1b[31mred\x1b]0;title\x07\n\u{202e}"));
    good("a name that is not UTF-8", &|f| f.set_str("general.name", b"\xff\xfe"));
    good("a name that is a number", &|f| f.set_u32("general.name", 7));
    good("a description of a megabyte", &|f| f.set_str("general.description", vec![b'x'; 1 << 20]));
    good("a file that says BOS is not needed", &|f| f.set("tokenizer.ggml.add_bos_token", ty::BOOL, [0]));
    good("optional keys left out", &|f| {
        f.remove("gemma4.final_logit_softcapping");
        f.remove("gemma4.rope.freq_base_swa");
        f.remove("gemma4.rope.dimension_count_swa");
        f.remove("tokenizer.ggml.unknown_token_id");
    });
    good("scores", &|f| f.set("tokenizer.ggml.scores", ty::ARRAY, raw::array(ty::F32, 512, &[0; 2048])));
    good("strange merges", &|f| {
        f.set(
            "tokenizer.ggml.merges",
            ty::ARRAY,
            raw::strings(&["", " ", "x", "a  b", "no such", "t he extra", "\u{2581} t"]),
        );
    });
    good("no merges in the array", &|f| f.set("tokenizer.ggml.merges", ty::ARRAY, raw::strings::<&str>(&[])));
    good("no chat template", &|f| f.remove("tokenizer.chat_template"));

    let file = Gguf::from_bytes("b", base().bytes()).unwrap();
    let tokens: Vec<Vec<u8>> = file.array(TOKENS).unwrap().unwrap().strings().unwrap().map(<[u8]>::to_vec).collect();
    for (name, text) in [
        ("a token twice", &b"\xe2\x96\x81the"[..]),
        ("an empty token", b""),
        ("a token with NUL", b"a\0b"),
        ("a token that is not UTF-8", b"\xff\xc0"),
        ("a token with escapes", b"\x1b[31m"),
        ("a marker twice", b"<bos>"),
    ] {
        good(name, &|f| {
            let mut tokens = tokens.clone();
            tokens[200] = text.to_vec();
            f.set(TOKENS, ty::ARRAY, raw::strings(&tokens));
        });
    }

    let mut bytes = base().bytes();
    bytes.extend([0xaa; 5000]);
    failures.extend(works("bytes after the data", &bytes, &[show, run]));
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn what_cannot_be_run_is_shown_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let mut only_vocabulary = base();
    only_vocabulary.tensors.clear();
    let mut unsupported = base();
    unsupported.set_str("general.architecture", "llama");
    for (parts, code, words) in
        [(only_vocabulary, INVALID, "token_embd.weight"), (unsupported, UNSUPPORTED, "llama is not supported")]
    {
        fs::write(dir.path().join("bad.gguf"), parts.bytes()).unwrap();
        let outcome = gemrun(dir.path(), &["show", "bad.gguf", "--json"]);
        outcome.refused(code, &["bad.gguf", words]).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&outcome.stdout).unwrap();
        assert_eq!(json["tensors"].as_array().unwrap().len(), parts.tensors.len());
        gemrun(dir.path(), &["tokenize", "bad.gguf", "the"]).works().unwrap();
    }
}

#[test]
fn a_model_that_computes_nonsense_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let mut parts = base();
    // Every scale of a matrix is NaN.
    parts
        .tensor("blk.1.ffn_down.weight")
        .data
        .chunks_exact_mut(18)
        .for_each(|block| block[..2].copy_from_slice(&[0, 0x7e]));
    fs::write(dir.path().join("bad.gguf"), parts.bytes()).unwrap();
    show(dir.path()).works().unwrap();
    let check = gemrun(dir.path(), &["show", "bad.gguf", "--check-data"]);
    check.refused(INVALID, &["bad.gguf", "tensor blk.1.ffn_down.weight", "row 0", "not finite"]).unwrap();
    for command in [run, chat] {
        command(dir.path()).refused(INVALID, &["bad.gguf", "non-finite logits at position"]).unwrap();
    }
}

#[test]
fn numbers_too_large_to_compute_with_end_in_one_line_or_an_answer() {
    let dir = tempfile::tempdir().unwrap();
    let fill = |f: &mut Parts, name: &str, x: f32| {
        f.tensor(name).data.chunks_exact_mut(4).for_each(|value| value.copy_from_slice(&x.to_le_bytes()));
    };
    type Change<'a> = (&'a str, &'a dyn Fn(&mut Parts));
    let changes: [Change; 14] = [
        ("norms of 1e38", &|f| fill(f, "blk.0.attn_norm.weight", 1e38)),
        ("norms of 0", &|f| fill(f, "blk.1.ffn_norm.weight", 0.0)),
        ("norms of -0", &|f| fill(f, "output_norm.weight", -0.0)),
        ("a layer scale of 0", &|f| fill(f, "blk.0.layer_output_scale.weight", 0.0)),
        ("a layer scale of 1e38", &|f| fill(f, "blk.0.layer_output_scale.weight", 1e38)),
        ("rotation divisors of 1e-45", &|f| fill(f, "rope_freqs.weight", 1e-45)),
        ("rotation divisors of 1e38", &|f| fill(f, "rope_freqs.weight", 1e38)),
        ("a rotation base of 1e38", &|f| f.set_f32("gemma4.rope.freq_base", 1e38)),
        ("a rotation base of 1e-45", &|f| f.set_f32("gemma4.rope.freq_base_swa", 1e-45)),
        ("a cap of 1e-45", &|f| f.set_f32("gemma4.final_logit_softcapping", 1e-45)),
        ("a cap of 1e38", &|f| f.set_f32("gemma4.final_logit_softcapping", 1e38)),
        ("an epsilon of 0", &|f| f.set_f32("gemma4.attention.layer_norm_rms_epsilon", 0.0)),
        ("an epsilon of 3e38", &|f| f.set_f32("gemma4.attention.layer_norm_rms_epsilon", 3e38)),
        ("an embedding of zeros and no epsilon", &|f| {
            f.tensor("token_embd.weight").data.fill(0);
            f.set_f32("gemma4.attention.layer_norm_rms_epsilon", 0.0);
        }),
    ];
    for (name, change) in changes {
        let mut parts = base();
        change(&mut parts);
        fs::write(dir.path().join("bad.gguf"), parts.bytes()).unwrap();
        show(dir.path()).works().unwrap_or_else(|e| panic!("{name}: {e}"));
        for command in [run, chat] {
            let outcome = command(dir.path());
            if outcome.works().is_err() {
                outcome.refused(INVALID, &["bad.gguf", "non-finite"]).unwrap_or_else(|e| panic!("{name}: {e}"));
            }
        }
    }
}

#[test]
fn one_value_that_is_not_finite_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let nan = [0x00, 0x7e];
    for (tensor, at, row) in [
        ("token_embd.weight", 40 * 18 * 2, 40),
        ("per_layer_token_embd.weight", 0, 0),
        ("blk.3.ffn_up.weight", 63 * 36 + 18, 63),
    ] {
        for half in [nan, [0x00, 0x7c], [0x00, 0xfc]] {
            let mut parts = base();
            parts.tensor(tensor).data[at..at + 2].copy_from_slice(&half);
            fs::write(dir.path().join("bad.gguf"), parts.bytes()).unwrap();
            let outcome = gemrun(dir.path(), &["show", "bad.gguf", "--check-data"]);
            outcome.refused(INVALID, &[&format!("tensor {tensor}: row {row}: value is not finite")]).unwrap();
            let outcome = run(dir.path());
            if outcome.works().is_err() {
                outcome.refused(INVALID, &["bad.gguf", "non-finite"]).unwrap();
            }
        }
    }
    fs::write(dir.path().join("bad.gguf"), base().bytes()).unwrap();
    gemrun(dir.path(), &["show", "bad.gguf", "--check-data"]).works().unwrap();
}

#[test]
fn a_file_full_of_holes_is_refused_in_no_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.gguf");
    for (elem, len, words) in [
        // A gigabyte of empty strings to walk.
        (ty::STR, 1 << 27, ["x.holes", "header grows"]),
        // Skipped without a look, and too much all the same.
        (ty::U8, 1 << 34, ["x.holes", "header grows"]),
        // Just within the limit: read, and refused for what follows.
        (ty::STR, 15 << 20, ["tensor number 0", "name of 0 bytes"]),
    ] {
        let mut parts = base();
        parts.set("x.holes", ty::ARRAY, raw::array(elem, len, &[]));
        parts.tensors.clear();
        parts.n_tensors = Some(1);
        fs::write(&path, parts.bytes()).unwrap();
        OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 36).unwrap();
        for command in [show, run] {
            command(dir.path()).refused(INVALID, &["bad.gguf", words[0], words[1]]).unwrap();
        }
    }
}

/// The holes are at the end of the metadata, and what follows them is sound: a file without tensors.
#[test]
fn a_vocabulary_of_holes_is_refused_in_no_time() {
    let dir = tempfile::tempdir().unwrap();
    for (key, elem, len, code, words) in [
        ("tokenizer.ggml.tokens", ty::STR, 15 << 20, INVALID, "64x15728640"),
        ("tokenizer.ggml.tokens", ty::STR, 1 << 21, INVALID, "64x2097152"),
        ("tokenizer.ggml.merges", ty::STR, 15 << 20, INVALID, "tensor token_embd.weight"),
        ("tokenizer.ggml.scores", ty::F32, 30 << 20, INVALID, "token_embd.weight"),
        ("tokenizer.ggml.suppress_tokens", ty::I32, 30 << 20, INVALID, "tokenizer.ggml.suppress_tokens"),
        ("general.name", ty::STR, 120 << 20, INVALID, "token_embd.weight"),
        ("general.architecture", ty::STR, 120 << 20, INVALID, "general.architecture"),
        ("tokenizer.chat_template", ty::STR, 120 << 20, INVALID, "token_embd.weight"),
    ] {
        let mut parts = base();
        parts.tensors.clear();
        parts.pairs.retain(|pair| pair.key != key.as_bytes());
        let long_text = !key.starts_with("tokenizer.ggml");
        match long_text {
            true => parts.set(key, ty::STR, u64::to_le_bytes(len)),
            false => parts.set(key, ty::ARRAY, raw::array(elem, len, &[])),
        }
        let bytes = parts.bytes();
        let holes = if long_text { len } else { len * if elem == ty::STR { 8 } else { 4 } };
        fs::write(dir.path().join("bad.gguf"), &bytes).unwrap();
        let file = OpenOptions::new().write(true).open(dir.path().join("bad.gguf")).unwrap();
        file.set_len(bytes.len() as u64 + holes).unwrap();
        for command in [show, run, |dir: &Path| gemrun(dir, &["tokenize", "bad.gguf", "the"])] {
            let outcome = command(dir.path());
            let result = match outcome.status.code() {
                // The tokenizer does not look at tensors, or has no quarrel with the holes.
                Some(0) => outcome.works(),
                _ if outcome.stderr.contains("tokenizer.ggml") => outcome.refused(code, &["bad.gguf"]),
                _ => outcome.refused(code, &["bad.gguf", words]),
            };
            result.unwrap_or_else(|e| panic!("{key}: {e}"));
        }
    }
}

#[test]
fn random_damage_to_models_never_panics() {
    let bases = [base(), experts()];
    let whole = bases.each_ref().map(Parts::bytes_and_fields);
    bases.iter().for_each(|parts| use_model(parts.bytes()).unwrap());
    let (mut runs, mut worked) = (0_u64, 0_u64);
    let end = Instant::now() + damage::time();
    while Instant::now() < end {
        let mut rng = Rng(runs);
        let which = rng.below(bases.len());
        let bytes = match rng.below(3) {
            0 => {
                let (bytes, fields) = &whole[which];
                let mut bytes = bytes.clone();
                if rng.below(2) == 0 {
                    put(&mut bytes, fields[rng.below(fields.len())], EXTREMES[rng.below(EXTREMES.len())]);
                } else {
                    injure(&mut bytes, fields, &mut rng);
                }
                bytes
            }
            _ => {
                let mut parts = bases[which].clone();
                contradict(&mut parts, &mut rng);
                parts.bytes()
            }
        };
        match std::panic::catch_unwind(|| use_model(bytes)) {
            Ok(Ok(())) => worked += 1,
            Ok(Err(e)) => {
                let line = e.to_string();
                assert!(line.starts_with("x.gguf: ") && !line.chars().any(char::is_control), "seed {runs}: {line}");
            }
            Err(panic) => {
                println!("seed {runs}");
                std::panic::resume_unwind(panic);
            }
        }
        runs += 1;
    }
    println!("{runs} models, {worked} worked");
    assert!(worked > 0 && worked < runs);
}

#[test]
fn special_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| -> PathBuf { dir.path().join(name) };
    fs::create_dir(path("folder.gguf")).unwrap();
    fs::write(path("empty.gguf"), b"").unwrap();
    assert!(Command::new("mkfifo").arg(path("pipe.gguf")).status().unwrap().success());
    std::os::unix::fs::symlink("/dev/zero", path("zero.gguf")).unwrap();
    std::os::unix::fs::symlink("nowhere", path("dangling.gguf")).unwrap();
    for (name, code, words) in [
        ("folder.gguf", INVALID, "is a directory"),
        ("empty.gguf", INVALID, "0 bytes"),
        ("pipe.gguf", INVALID, "pipe or a device"),
        ("zero.gguf", INVALID, "pipe or a device"),
        ("dangling.gguf", 3, "no such file"),
        ("missing.gguf", 3, "no such file"),
    ] {
        for args in [&["show", name][..], &["run", name, "the", "--raw", "-n", "1"]] {
            gemrun(dir.path(), args).refused(code, &[name, words]).unwrap();
        }
    }
}

#[test]
fn special_paths_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| -> PathBuf { dir.path().join(name) };
    std::os::unix::fs::symlink("loop.gguf", path("loop.gguf")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(path("socket.gguf")).unwrap();
    fs::write(path("file.gguf"), base().bytes()).unwrap();
    fs::write(path("red\x1b[31m.gguf"), "not a model, just some text").unwrap();
    fs::write(path("secret.gguf"), base().bytes()).unwrap();
    fs::set_permissions(path("secret.gguf"), fs::Permissions::from_mode(0o000)).unwrap();
    std::os::unix::fs::symlink("file.gguf", path("link.gguf")).unwrap();
    let long = format!("{}.gguf", "x".repeat(5000));
    let mut cases = vec![
        ("loop.gguf", 1, "symbolic link"),
        ("socket.gguf", 1, "socket.gguf"),
        ("file.gguf/", 1, "not a directory"),
        ("file.gguf/x.gguf", 1, "not a directory"),
        (long.as_str(), 1, "too long"),
        ("./", INVALID, "is a directory"),
        ("/dev/null", INVALID, "pipe or a device"),
        ("red\x1b[31m.gguf", INVALID, "red\\u{1b}[31m.gguf"),
        ("no\x1b[31m.gguf", 3, "no\\u{1b}[31m.gguf"),
    ];
    // The superuser may read everything.
    if File::open(path("secret.gguf")).is_err() {
        cases.push(("secret.gguf", 1, "permission denied"));
    }
    for (name, code, words) in cases {
        for args in [&["show", name][..], &["run", name, "the", "--raw", "-n", "1"]] {
            gemrun(dir.path(), args).refused(code, &[words]).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }
    gemrun(dir.path(), &["show", "link.gguf"]).works().unwrap();
}

/// Starts a long answer, waits for its first byte and then does something to the file.
fn while_running(harm: impl FnOnce(&File)) -> (ExitStatus, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bad.gguf");
    let mut parts = base();
    parts.set_u32("gemma4.context_length", 1 << 20);
    fs::write(&path, parts.bytes()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_gemrun"));
    command.args(["run", "bad.gguf", "the", "--raw", "--ignore-eos", "-n", "6000", "-c", "30000", "-t", "2"]);
    command.current_dir(dir.path()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
    harm(&OpenOptions::new().read(true).write(true).open(&path).unwrap());
    let output = child.wait_with_output().unwrap();
    (output.status, String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_file_that_changes_while_in_use_ends_in_one_line() {
    const CUT: &str = "error: bad.gguf: the file was truncated or cannot be read while in use\n";
    for len in [0, 4096] {
        let (status, stderr) = while_running(|file| file.set_len(len).unwrap());
        assert_eq!((status.code(), stderr.as_str()), (Some(INVALID), CUT));
    }
    // All its bytes replaced: the weights become NaN.
    let (status, stderr) = while_running(|mut file| {
        let len = file.metadata().unwrap().len() as usize;
        file.write_all(&vec![0xff; len]).unwrap();
    });
    assert_eq!(status.code(), Some(INVALID), "{stderr}");
    assert!(stderr.starts_with("error: bad.gguf: non-finite logits") && stderr.lines().count() == 1, "{stderr}");
    // One that grows is still the same file.
    let (status, stderr) = while_running(|file| file.set_len(1 << 24).unwrap());
    assert_eq!((status.code(), stderr.as_str()), (Some(0), ""));
}

#[test]
fn every_length_but_the_whole_is_refused() {
    let whole = base().bytes();
    let file = Gguf::from_bytes("x.gguf", whole.clone()).unwrap();
    let last = file.tensors().iter().max_by_key(|t| t.offset).unwrap();
    let (data, end) = (file.data_start() as usize, (file.data_start() + last.offset + last.bytes) as usize);
    // Every one in the header and near the end, a prime step apart between them.
    let lengths = (0..data).step_by(3).chain((data..end).step_by(211)).chain(end - 300..end);
    let mut refused = 0;
    for len in lengths {
        let error = Gguf::from_bytes("x.gguf", whole[..len].to_vec()).map(drop).unwrap_err();
        assert_eq!(error.exit_code(), 5, "{len}: {error}");
        assert!(error.to_string().starts_with("x.gguf: "), "{len}: {error}");
        refused += 1;
    }
    println!("{refused} lengths");
    // What lies between the last tensor and the end of the file is padding.
    Gguf::from_bytes("x.gguf", whole[..end].to_vec()).unwrap();
}

#[test]
fn a_closed_stdout_ends_quietly() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("bad.gguf"), base().bytes()).unwrap();
    let program = env!("CARGO_BIN_EXE_gemrun");
    for command in ["show bad.gguf --tensors --kv", "run bad.gguf the --raw -n 8"] {
        // Nobody reads: the far end of the pipe is closed before the program starts.
        let script = format!("{{ sleep 0.2; \"{program}\" {command}; echo $? >code; }} 2>stderr | true");
        Command::new("sh").args(["-c", &script]).current_dir(dir.path()).status().unwrap();
        let wait = Instant::now();
        while fs::read_to_string(dir.path().join("code")).unwrap_or_default().is_empty() {
            assert!(wait.elapsed() < Duration::from_secs(20), "{command} does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(fs::read_to_string(dir.path().join("code")).unwrap().trim(), "0", "{command}");
        assert_eq!(fs::read_to_string(dir.path().join("stderr")).unwrap(), "", "{command}");
        // No stdout at all.
        let script = format!("exec \"{program}\" {command} >&-");
        let output = Command::new("sh").args(["-c", &script]).current_dir(dir.path()).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code().is_some_and(|code| code < 101) && !stderr.contains("panicked"), "{stderr}");
    }
}
