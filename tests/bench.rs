//! `gemrun bench`: what it counts, and comparisons with other programs. The other program is a script that speaks as much
//! of llama-bench's language as is asked of it, or fails in a way a program can fail.
#![cfg(unix)]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// A run of the program, away from the user's settings.
fn gemrun(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gemrun"));
    command.args(arguments).stdin(Stdio::null()).env("GEMRUN_HOME", "/nonexistent");
    command.env_remove("GEMRUN_THREADS").env_remove("GEMRUN_KERNEL").output().unwrap()
}

fn ok(output: Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// The one line of a failure with `code`, which leaves standard output empty.
fn error(output: Output, code: i32) -> String {
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), output.stdout.len(), stderr.lines().count()), (Some(code), 0, 1), "{stderr}");
    stderr.trim_end().strip_prefix("error: ").unwrap().to_string()
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

/// A folder with the demo model as a file and a program.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/demo.gguf");
        std::fs::copy(demo, folder.0.path().join("demo.gguf")).unwrap();
        folder
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_string()
    }

    /// Writes an executable script; `NAME=PATH` for it.
    fn script(&self, name: &str, body: &str) -> String {
        let path = PathBuf::from(self.path(name));
        std::fs::write(&path, format!("#!/bin/sh\n{body}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        format!("{name}={}", path.display())
    }

    /// Measures very little of the demo model.
    fn bench(&self, more: &[&str]) -> Output {
        let model = self.path("demo.gguf");
        gemrun(
            &[&["bench", &model, "-p", "6", "-n", "3", "-t", "1", "-r", "2", "--no-warmup", "--no-limits"], more]
                .concat(),
        )
    }
}

/// Prints what llama-bench would, from its own command line, at `$speed` tokens a second, and writes that line down.
const HONEST: &str = r#"
echo "$@" >> "$0.log"
while [ $# -gt 0 ]; do
    case $1 in
        -p) p=$2; shift ;; -n) n=$2; shift ;; -d) d=$2; shift ;; -t) t=$2; shift ;;
    esac
    shift
done
echo "loading" >&2
echo "[{\"build_commit\": \"abc\", \"build_number\": 7, \"n_prompt\": $p, \"n_gen\": $n, \"n_depth\": $d,"
echo "\"n_threads\": $t, \"avg_ts\": $speed, \"samples_ts\": [$speed]}]"
"#;

#[test]
fn a_comparison() {
    let folder = Folder::new();
    let one = folder.script("one", &format!("speed=0.5{HONEST}"));
    let two = folder.script("two", &format!("speed=4{HONEST}"));
    let chart = folder.path("chart.svg");
    let flags = ["--vs", &one, "--vs", &two, "-d", "0,4", "--chart", &chart, "-o"];
    let results = json(&ok(folder.bench(&[&flags[..], &["json"]].concat())));
    let results = results.as_array().unwrap();
    assert_eq!(results.len(), 4);
    for result in results {
        let samples: Vec<f64> =
            result["samples_ts"].as_array().unwrap().iter().map(|sample| sample.as_f64().unwrap()).collect();
        assert_eq!(samples.len(), 2);
        for (name, speed) in [("one", 0.5), ("two", 4.0)] {
            let vs = &result["vs"][name];
            assert_eq!((vs["median_ts"].as_f64(), vs["build"].as_str()), (Some(speed), Some("7 (abc)")));
            // Of two runs the median is the mean.
            let ratio = (samples[0] + samples[1]) / 2.0 / speed;
            assert!((vs["ratio"].as_f64().unwrap() / ratio - 1.0).abs() < 1e-9, "{result}");
        }
        let start = result["test"] == "pp6" && result["n_depth"] == 0;
        for of in [result, &result["vs"]["two"]] {
            assert_eq!(of["time_to_first_token_s"].as_f64().is_some_and(|seconds| seconds > 0.0), start, "{result}");
        }
        #[cfg(target_os = "linux")]
        assert!(result["peak_rss_bytes"].as_u64().unwrap() > 1 << 20, "{result}");
    }
    let svg = std::fs::read_to_string(&chart).unwrap();
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"), "{svg}");

    // Every test twice, then two starts of the prompt without anything in the cache.
    let model = folder.path("demo.gguf");
    let log = std::fs::read_to_string(folder.path("one.log")).unwrap();
    let line =
        |p, n, d| format!("-m {model} -p {p} -n {n} -d {d} -t 1 -r 1 -o json --no-warmup -fa 1 -ctk f16 -ctv f16");
    let [a, b, c, d] = [line(6, 0, 0), line(0, 3, 0), line(6, 0, 4), line(0, 3, 4)];
    assert_eq!(log.lines().collect::<Vec<_>>(), [&a[..], &a, &a, &a, &b, &b, &c, &c, &d, &d]);

    let markdown = ok(folder.bench(&["--vs", &one]));
    assert!(markdown.contains("| threads | test | | gemrun | one | ratio |"), "{markdown}");
    assert!(markdown.contains("one: build 7 (abc)"), "{markdown}");
    let csv = ok(folder.bench(&["--vs", &one, "--vs", &two, "-o", "csv"]));
    assert_eq!(csv.lines().count(), 7, "{csv}");
}

#[test]
fn programs_that_fail_cost_one_line() {
    let folder = Folder::new();
    let honest = format!("speed=1{HONEST}");
    let faults = [
        ("code", "echo first >&2; echo 'no memory \x1b[31m' >&2; exit 3", "exit status: 3: no memory \\u{1b}[31m"),
        ("silent", "exit 1", "exit status: 1: it said nothing"),
        ("signal", "kill -9 $$", "signal: 9 (SIGKILL): it said nothing"),
        ("garbage", "echo '| model | t/s |'", "its output makes no sense: "),
        ("nothing", "true", "its output makes no sense: "),
        ("empty", "echo '[]'", "0 results in its output: expected one, pp6 with 1 threads"),
        (
            "other",
            &honest.replace("n_gen\\\": $n", "n_gen\\\": 77"),
            "n_gen in its output: 77: expected 0, as asked for",
        ),
        ("stuck", &honest.replace("speed=1", "speed=0"), "avg_ts in its output: missing or not above 0"),
    ];
    for (name, body, expected) in faults {
        let other = folder.script(name, body);
        let message = error(folder.bench(&["--vs", &other]), 1);
        let prefix = format!("{name}: {}: ", folder.path(name));
        let what = message.strip_prefix(&prefix).unwrap_or_else(|| panic!("{message}"));
        assert!(what.starts_with(expected), "{name}: {message}");
    }
}

#[test]
fn programs_that_cannot_be_started() {
    let folder = Folder::new();
    let missing = format!("x={}", folder.path("missing"));
    let message = error(folder.bench(&["--vs", &missing]), 3);
    assert!(message.ends_with("missing: no such program: expected a llama-bench"), "{message}");
    let message = error(folder.bench(&["--vs", "x=surely-no-such-program"]), 3);
    assert_eq!(message, "x: surely-no-such-program: no such program: expected a llama-bench");
    let plain = format!("x={}", folder.path("demo.gguf"));
    let message = error(folder.bench(&["--vs", &plain]), 1);
    assert!(message.starts_with("x: ") && message.ends_with("demo.gguf: permission denied"), "{message}");

    let good = folder.script("good", "true");
    let message = error(folder.bench(&["--vs", &good, "--vs", &good]), 2);
    assert_eq!(message, "--vs: good: expected a name of its own for each program");
    let message = error(gemrun(&["bench", "demo", "--vs", &good]), 2);
    assert_eq!(message, "demo: is part of gemrun: expected a file that other programs can read");
    assert!(error(folder.bench(&["--vs", "nonsense"]), 2).contains("expected NAME=PATH"));
    let nowhere = folder.path("no/chart.svg");
    let output = folder.bench(&["--chart", &nowhere]);
    assert_eq!(output.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&output.stderr).trim_end().ends_with("chart.svg: no such file or directory"));
}

/// The multiplications of a token, counted from the tensors as `show` lists them.
#[test]
fn work_is_counted_from_the_tensors() {
    let golden = |name: &str| {
        let path = format!("tests/data/golden/{name}/{name}-q4_0-pure.gguf");
        Path::new(env!("CARGO_MANIFEST_DIR")).join(path).to_str().unwrap().to_string()
    };
    for (file, shares) in [(golden("a_eseries"), true), (golden("b_dense"), false), (golden("c_moe"), false)] {
        let shown = json(&ok(gemrun(&["show", &file, "--json", "--tensors", "--kv"])));
        let number = |key: &str| shown["metadata"][format!("gemma4.{key}")].as_u64().unwrap_or(0);
        let layers = number("block_count");
        let owners = layers - number("attention.shared_kv_layers");
        assert_eq!(owners < layers, shares);
        let (mut wanted, mut unwanted) = (0, 0);
        for tensor in shown["tensors"].as_array().unwrap() {
            let name = tensor["name"].as_str().unwrap();
            let dims: Vec<u64> = tensor["shape"].as_array().unwrap().iter().map(|d| d.as_u64().unwrap()).collect();
            let mut size: u64 = dims.iter().product();
            if name.contains("_exps.") {
                size = size / number("expert_count") * number("expert_used_count");
            }
            match name.strip_prefix("blk.").map(|rest| rest.split_once('.').unwrap()) {
                Some(_) if dims.iter().filter(|&&d| d > 1).count() < 2 => {} // norms and scales
                Some((layer, part)) => {
                    let layer: u64 = layer.parse().unwrap();
                    let kv = part.starts_with("attn_k.") || part.starts_with("attn_v.");
                    // Layers that share another's cache may carry keys and values that nobody uses.
                    wanted += if kv && layer >= owners { 0 } else { size };
                    unwanted += if layer + 1 < owners || (kv && layer + 1 == owners) { size } else { 0 };
                }
                None if name == "per_layer_model_proj.weight" => {
                    wanted += size;
                    unwanted += size / layers * (owners - 1);
                }
                None if name == "token_embd.weight" => wanted += size,
                None => {}
            }
        }
        let flags =
            ["bench", &file, "-p", "1,5", "-n", "2", "-r", "1", "-t", "1", "--no-warmup", "--no-limits", "-o", "json"];
        let results = json(&ok(gemrun(&flags)));
        let counted = |i: usize| results[i]["multiply_adds_per_token"].as_f64().unwrap();
        assert_eq!((counted(0), counted(2)), (wanted as f64, wanted as f64), "{file}");
        assert_eq!(counted(1), (4 * unwanted + wanted) as f64 / 5.0, "{file}");
    }
}

#[test]
fn limits_are_measured_for_each_number_of_threads() {
    let flags = ["bench", "demo", "-p", "4", "-n", "2", "-t", "1,2", "-r", "1", "--no-warmup", "-o"];
    let results = json(&ok(gemrun(&[&flags[..], &["json"]].concat())));
    for result in results.as_array().unwrap() {
        let read = result["limits"]["read_gb_per_s"].as_f64().unwrap();
        let share = result["gb_per_s"].as_f64().unwrap() / read;
        assert!(read > 0.01 && (result["of_read"].as_f64().unwrap() / share - 1.0).abs() < 1e-9, "{result}");
        if let Some(int8) = result["limits"]["int8_gmac_per_s"].as_f64() {
            let share = result["gmac_per_s"].as_f64().unwrap() / int8;
            assert!((result["of_int8"].as_f64().unwrap() / share - 1.0).abs() < 1e-9, "{result}");
        }
    }
    let markdown = ok(gemrun(&[&flags[..], &["md"]].concat()));
    assert!(markdown.contains("at best with 1 thread: read ") && markdown.contains("at best with 2 threads: read "));
}
