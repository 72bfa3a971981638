//! `gemrun selftest`: whether this CPU computes what every other CPU computes.
//!
//! Three comparisons, bit for bit: the scalar kernels with digests recorded in the program, every other kernel this CPU
//! can run with the scalar one, and the demo model's logits over threads, prompt chunks and instruction sets with a
//! recorded SHA-256. What differs first is named, and the command ends with 10. `gemrun_simd::selftest` makes the data
//! of the kernels; here it is run and reported.

use std::io::Write;
use std::time::Instant;

use clap::Args;
use gemrun::forward::{State, Want, forward};
use gemrun::gguf::Gguf;
use gemrun::kv::KvType;
use gemrun::model::Model;
use gemrun::registry;
use gemrun::team::Team;
use gemrun::weight::Numerics;
use gemrun::{Error, Kind};
use gemrun_simd::selftest::{Cases, check_ops, check_scalar_ops};
use gemrun_simd::{Choice, Format, Isa, KERNELS, ops};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::Result;
use super::open::{self, KernelName, check_threads};
use super::terminal::Style;

/// Check that this CPU computes what every other one does
#[derive(Args)]
#[command(
    after_help = "Every kernel this CPU can run is compared with the scalar one, bit for bit, and the demo model's logits \
    with those of other machines. --kernel and --threads narrow it down. Ends with 0 if all is well, with 10 if not.\n\n\
    Example: gemrun selftest"
)]
pub struct Selftest {
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Threads to compute logits with [default: 1, 2, 3 and 8, one after the other]
    #[arg(short, long, value_name = "N", env = "GEMRUN_THREADS", hide_env_values = true)]
    threads: Option<usize>,
    #[command(flatten)]
    kernel: KernelName,
}

/// What the demo model reads: more tokens than a chunk of 64 and than its sliding window.
const TEXT: &str = "What is gemrun? A small program that runs Gemma 4 on the processor of a computer. The same file and \
    the same words give the same bits on every machine: one thread or eight, a whole prompt or pieces of it, whatever \
    the instructions are called.";

/// SHA-256 of its logits on TEXT: `gemrun eval logits demo --kv f16` on the tokens with `<bos>` writes a file that has it.
///
/// It changes only with the demo model or with the definition of a result, and so belongs in the change log.
const LOGITS_HASH: &str = "d134ebb987b8ef454d8d1398aaa26433dc5f52dfa39f8e8a50fb5031020ce15a";

/// Thread counts and prompt chunks of the logits; the last chunk length takes the whole text.
const THREADS: [usize; 4] = [1, 2, 3, 8];
const CHUNKS: [usize; 4] = [1, 7, 64, 256];

/// One comparison.
struct Check {
    /// `q4_0/avx2`, `ops/avx2`, `logits/avx2 -t 3 --batch 7`.
    name: String,
    isa: Isa,
    /// What differs, if anything does.
    wrong: Option<String>,
}

impl Check {
    fn new(name: impl Into<String>, isa: Isa, outcome: std::result::Result<(), String>) -> Check {
        Check { name: name.into(), isa, wrong: outcome.err() }
    }
}

/// All of them.
struct Report {
    kernels: Vec<Check>,
    ops: Vec<Check>,
    logits: Vec<Check>,
    /// SHA-256 of the logits as the kernels in use give them.
    logits_hash: String,
    isa: Isa,
    seconds: f64,
}

impl Selftest {
    pub fn run(self) -> Result {
        let start = Instant::now();
        let choice = self.kernel.choice()?;
        let threads = match self.threads {
            Some(threads) => vec![check_threads(threads)?],
            None => THREADS.to_vec(),
        };
        let isas: Vec<Isa> = Isa::ALL.into_iter().filter(|isa| *isa <= choice.isa && isa.supported()).collect();
        let (kernels, ops) = (kernels(&choice), vector_operations(&isas));
        let (logits, logits_hash) = logits(&choice, &isas, &threads)?;
        let isa = choice.isa;
        let report = Report { kernels, ops, logits, logits_hash, isa, seconds: start.elapsed().as_secs_f64() };
        let mut out = std::io::stdout().lock();
        if self.json {
            writeln!(out, "{:#}", report.json())?;
        } else {
            report.text(Style::stdout(), &mut out)?;
        }
        out.flush()?;
        Ok(report.verdict()?)
    }
}

/// The kernels `choice` allows, those of one format after another so that the scalar products are made once.
fn kernels(choice: &Choice) -> Vec<Check> {
    let allowed = |name: &str, isa: Isa| match choice.only {
        Some(only) => only.name() == name,
        None => isa <= choice.isa && isa.supported(),
    };
    let mut checks = Vec::new();
    for format in Format::ALL {
        let kernels = KERNELS.iter().filter(|k| k.format() == format && allowed(k.name(), k.isa()));
        let mut cases = None;
        for kernel in kernels {
            let cases = cases.get_or_insert_with(|| Cases::new(format));
            let scalar = if kernel.isa() == Isa::Scalar { cases.check_scalar() } else { Ok(()) };
            checks.push(Check::new(kernel.name(), kernel.isa(), scalar.and_then(|()| cases.check(*kernel))));
        }
    }
    checks.sort_by_key(|check| check.isa);
    checks
}

/// The f32 arithmetic around the kernels.
fn vector_operations(isas: &[Isa]) -> Vec<Check> {
    let outcome = |isa| if isa == Isa::Scalar { check_scalar_ops() } else { check_ops(ops(isa)) };
    isas.iter().map(|&isa| Check::new(format!("ops/{}", isa.name()), isa, outcome(isa))).collect()
}

/// The demo model's logits on each instruction set, and their hash on the best one.
///
/// The scalar kernels' are compared with the recorded hash, all others with the scalar kernels'. The instruction set in
/// use goes through every combination of threads and chunks (the slow scalar one through each thread count and each chunk
/// once), the others through a chunk of one token and one of some.
fn logits(choice: &Choice, isas: &[Isa], threads: &[usize]) -> gemrun::Result<(Vec<Check>, String)> {
    let gguf = Gguf::from_static("demo", registry::DEMO)?;
    let tokenizer = open::tokenizer(&gguf)?;
    let tokens = tokenizer.encode_with_bos(TEXT, false);
    let load = |kernel| Model::load(&gguf, &Numerics { kernel, ..Numerics::default() });

    let mut checks = Vec::new();
    let scalar = load(Choice { isa: Isa::Scalar, only: None })?;
    let reference = compute(&scalar, &tokens, threads[0], CHUNKS[3])?;
    let mut used = hash(&reference);
    let recorded = if used == LOGITS_HASH {
        Ok(())
    } else {
        Err(format!("sha256 {used}, expected {LOGITS_HASH}, the same on every machine"))
    };
    checks.push(Check::new(way(Isa::Scalar, threads[0], CHUNKS[3]), Isa::Scalar, recorded));
    for &isa in isas {
        let each = || CHUNKS.iter().zip(threads.iter().cycle()).map(|(&chunk, &threads)| (threads, chunk));
        let ways: Vec<(usize, usize)> = if isa != choice.isa {
            // The scalar reference has been one way already.
            each().take(if isa == Isa::Scalar { 1 } else { 2 }).collect()
        } else if isa == Isa::Scalar {
            each().collect()
        } else {
            CHUNKS.iter().flat_map(|&chunk| threads.iter().map(move |&threads| (threads, chunk))).collect()
        };
        let model = load(if isa == choice.isa { *choice } else { Choice { isa, only: None } })?;
        for (threads, chunk) in ways {
            let logits = compute(&model, &tokens, threads, chunk)?;
            let vocab = model.config.vocab;
            let different = logits.iter().zip(&reference).position(|(got, want)| got.to_bits() != want.to_bits());
            let outcome = different.map_or(Ok(()), |at| {
                let (got, want) = (logits[at], reference[at]);
                Err(format!("token {}, logit {}: {got}, expected {want}", at / vocab, at % vocab))
            });
            if isa == choice.isa {
                used = hash(&logits);
            }
            checks.push(Check::new(way(isa, threads, chunk), isa, outcome));
        }
    }
    Ok((checks, used))
}

/// A name for logits computed this way, in the letters of the command line.
fn way(isa: Isa, threads: usize, chunk: usize) -> String {
    format!("logits/{} -t {threads} --batch {chunk}", isa.name())
}

/// Logits of every position, (tokens, vocab).
fn compute(model: &Model, tokens: &[u32], threads: usize, chunk: usize) -> gemrun::Result<Vec<f32>> {
    let mut state = State::new(model, KvType::F16, tokens.len(), chunk)?;
    let mut logits = Vec::with_capacity(tokens.len() * model.config.vocab);
    Team::new(threads)?.enter(|team| -> gemrun::Result<()> {
        for chunk in tokens.chunks(chunk) {
            logits.extend(forward(model, team, &mut state, chunk, Want::All)?);
        }
        Ok(())
    })?;
    Ok(logits)
}

/// `1 way`, `2 ways`.
fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// SHA-256 of the values as little-endian bytes, in hex.
fn hash(values: &[f32]) -> String {
    let mut sha = Sha256::new();
    values.iter().for_each(|value| sha.update(value.to_le_bytes()));
    sha.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Report {
    fn checks(&self) -> impl Iterator<Item = &Check> {
        self.kernels.iter().chain(&self.ops).chain(&self.logits)
    }

    fn json(&self) -> serde_json::Value {
        let check = |check: &Check| match &check.wrong {
            None => json!({"name": check.name, "ok": true}),
            Some(wrong) => json!({"name": check.name, "ok": false, "wrong": wrong}),
        };
        json!({
            "kernels": self.kernels.iter().map(check).collect::<Vec<_>>(),
            "logits_hash": self.logits_hash,
            "ok": self.checks().all(|check| check.wrong.is_none()),
            "expected_logits_hash": LOGITS_HASH,
            "isa": self.isa.name(),
            "ops": self.ops.iter().map(check).collect::<Vec<_>>(),
            "logits": self.logits.iter().map(check).collect::<Vec<_>>(),
            "seconds": (self.seconds * 1000.0).round() / 1000.0,
        })
    }

    /// A line for each instruction set and kind of check, one for each check that failed, the hash, the verdict.
    fn text(&self, style: Style, out: &mut impl Write) -> std::io::Result<()> {
        let groups = [("kernels", &self.kernels), ("f32 arithmetic", &self.ops), ("logits", &self.logits)];
        for (what, checks) in groups {
            for isa in Isa::ALL {
                let of_isa = || checks.iter().filter(move |check| check.isa == isa);
                let (total, wrong) = (of_isa().count(), of_isa().filter(|check| check.wrong.is_some()).count());
                let number = match (what, total) {
                    (_, 0) => continue,
                    ("logits", n) => count(n, "way"),
                    ("kernels", n) => count(n, "kernel"),
                    _ => String::new(),
                };
                let end = if wrong == 0 {
                    "ok".to_string()
                } else {
                    format!("{}{wrong} WRONG{}", style.red(), style.plain())
                };
                writeln!(out, "{what:<15} {:<9} {number:<12} {end}", isa.name())?;
                for check in of_isa() {
                    if let Some(wrong) = &check.wrong {
                        writeln!(out, "  {}: {wrong}", check.name)?;
                    }
                }
            }
        }
        writeln!(out, "logits sha256   {}", self.logits_hash)?;
        if self.checks().all(|check| check.wrong.is_none()) {
            let (bold, plain) = (style.bold(), style.plain());
            writeln!(
                out,
                "{bold}All bits are right{plain}: the same as on every other machine. {:.1} s",
                self.seconds
            )?;
        }
        Ok(())
    }

    /// The first check that failed, as an error.
    fn verdict(&self) -> gemrun::Result<()> {
        let mut failed = self.checks().filter_map(|check| Some((&check.name, check.wrong.as_ref()?)));
        let Some((name, wrong)) = failed.next() else { return Ok(()) };
        let more = match failed.count() {
            0 => String::new(),
            n => format!("; and {n} more"),
        };
        Err(Error::new(Kind::SelfTest, format!("selftest: {name}: {wrong}{more}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(wrong: &[&str]) -> Report {
        let outcome =
            |name: &str| if wrong.contains(&name) { Err("token 0, row 8: 1, expected 2".into()) } else { Ok(()) };
        let check = |name: &str, isa| Check::new(name, isa, outcome(name));
        Report {
            kernels: vec![
                check("q4_0/scalar", Isa::Scalar),
                check("q4_0/avx2", Isa::Avx2),
                check("q8_0/avx2", Isa::Avx2),
            ],
            ops: vec![check("ops/avx2", Isa::Avx2)],
            logits: vec![check("logits/avx2", Isa::Avx2)],
            logits_hash: "abc".into(),
            isa: Isa::Avx2,
            seconds: 1.3,
        }
    }

    fn text(report: &Report) -> String {
        let mut out = Vec::new();
        report.text(Style::none(), &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_report_without_faults() {
        let report = report(&[]);
        assert!(report.verdict().is_ok());
        let lines = [
            "kernels         scalar    1 kernel     ok",
            "kernels         avx2      2 kernels    ok",
            "f32 arithmetic  avx2                   ok",
            "logits          avx2      1 way        ok",
            "logits sha256   abc",
            "All bits are right: the same as on every other machine. 1.3 s",
        ];
        assert_eq!(text(&report).lines().collect::<Vec<_>>(), lines);
        let json = report.json();
        assert_eq!(json["kernels"][2], json!({"name": "q8_0/avx2", "ok": true}));
        assert_eq!((&json["ok"], &json["logits_hash"], &json["isa"]), (&json!(true), &json!("abc"), &json!("avx2")));
    }

    #[test]
    fn a_fault_is_named_and_ends_with_10() {
        let faulty = report(&["q4_0/avx2"]);
        let error = faulty.verdict().unwrap_err();
        assert_eq!(error.to_string(), "selftest: q4_0/avx2: token 0, row 8: 1, expected 2");
        assert_eq!(error.exit_code(), 10);
        let lines = [
            "kernels         scalar    1 kernel     ok",
            "kernels         avx2      2 kernels    1 WRONG",
            "  q4_0/avx2: token 0, row 8: 1, expected 2",
            "f32 arithmetic  avx2                   ok",
            "logits          avx2      1 way        ok",
            "logits sha256   abc",
        ];
        assert_eq!(text(&faulty).lines().collect::<Vec<_>>(), lines);
        let json = faulty.json();
        assert_eq!(json["ok"], false);
        assert_eq!(
            json["kernels"][1],
            json!({"name": "q4_0/avx2", "ok": false, "wrong": "token 0, row 8: 1, expected 2"})
        );

        for name in ["ops/avx2", "logits/avx2"] {
            let faulty = report(&[name]);
            assert_eq!((faulty.verdict().unwrap_err().exit_code(), &faulty.json()["ok"]), (10, &json!(false)));
        }
        let error = report(&["q8_0/avx2", "ops/avx2", "logits/avx2"]).verdict().unwrap_err();
        assert_eq!(error.to_string(), "selftest: q8_0/avx2: token 0, row 8: 1, expected 2; and 2 more");
    }

    #[test]
    fn a_choice_narrows_the_kernels() {
        let names = |choice: &str| -> Vec<String> {
            kernels(&gemrun_simd::find(choice).unwrap()).into_iter().map(|check| check.name).collect()
        };
        assert_eq!(names("q4_0/scalar"), ["q4_0/scalar"]);
        let scalar = KERNELS.iter().filter(|kernel| kernel.isa() == Isa::Scalar);
        assert_eq!(names("scalar").len(), scalar.count());
    }
}
