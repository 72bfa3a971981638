//! The command line as scripts see it: exit codes, error lines, what goes to which stream, the shape of JSON.
//!
//! Every test runs the program itself, on the built-in demo model or on a file made for the purpose.

use std::io::{Read, Write};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use sha2::{Digest, Sha256};

/// A run of the program, away from the user's settings.
fn gemrun(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_gemrun"));
    command.args(arguments).stdin(Stdio::null());
    for variable in ["GEMRUN_THREADS", "GEMRUN_KERNEL", "NO_COLOR"] {
        command.env_remove(variable);
    }
    command.env("GEMRUN_HOME", "/nonexistent");
    command
}

fn run(arguments: &[&str]) -> Output {
    gemrun(arguments).output().unwrap()
}

/// Runs with `input` piped in.
fn piped(arguments: &[&str], input: &[u8]) -> Output {
    let mut command = gemrun(arguments);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // A program that refuses its arguments does not read its input.
    let _ = child.stdin.take().unwrap().write_all(input);
    child.wait_with_output().unwrap()
}

/// Standard output of a success.
fn ok(output: Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// The message of a failure with `code`: one line on standard error, nothing on standard output.
fn error(output: Output, code: i32) -> String {
    let (stdout, message) = shown_with_error(output, code);
    assert_eq!(stdout, "", "{message}");
    message
}

/// Standard output and the message of a failure with `code`.
fn shown_with_error(output: Output, code: i32) -> (String, String) {
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    let message = stderr.trim_end().strip_prefix("error: ").unwrap_or_else(|| panic!("{stderr}"));
    (String::from_utf8(output.stdout).unwrap(), message.to_string())
}

fn json(output: Output) -> Value {
    serde_json::from_str(&ok(output)).unwrap()
}

fn keys(value: &Value) -> Vec<&str> {
    value.as_object().unwrap().keys().map(String::as_str).collect()
}

#[test]
fn exit_codes_and_error_lines() {
    let folder = tempfile::tempdir().unwrap();
    let broken = folder.path().join("broken.gguf");
    std::fs::write(&broken, "this is not a GGUF file, whatever its name says").unwrap();
    let broken = broken.to_str().unwrap();
    let cases: &[(&[&str], i32, &str)] = &[
        (&["fly"], 2, "unrecognized subcommand 'fly'; see --help"),
        (&["show"], 2, "the following required arguments were not provided: <MODEL>; see --help"),
        (&["run", "demo", "x", "--temp", "-1"], 2, "temp: -1: expected a number of at least 0"),
        (&["run", "demo", "x", "--top-p", "7"], 2, "top-p: 7: expected a number from 0 to 1"),
        (&["run", "demo", "x", "-t", "0"], 2, "threads: 0: expected 1 to 256"),
        (&["run", "demo", "x", "-t", "257"], 2, "threads: 257: expected 1 to 256"),
        (&["run", "demo", "x", "--batch", "0"], 2, "batch: 0: expected 1 to 4096"),
        (&["run", "demo", "x", "-c", "0"], 2, "context: 0: expected 1 to 2048, what the model was made for"),
        (&["run", "demo", "x", "-c", "2049"], 2, "context: 2049: expected 1 to 2048, what the model was made for"),
        (&["run", "demo", "  "], 2, "prompt: empty: expected text"),
        (&["run", "demo"], 2, "prompt: empty: expected text"),
        (&["run", "missing.gguf", "x"], 3, "missing.gguf: no such file or directory"),
        (
            &["run", "dem", "x"],
            3,
            "dem: no such model or file: did you mean demo? known names: 12b, 26b-a4b, 31b, demo, demo-mobile, e2b, e2b-mobile, e2b-s, e2b-ud, e4b, e4b-mobile, e4b-s; or give a path",
        ),
        (&["show", "31b"], 3, "31b: not downloaded: gemrun pull 31b (17.65 GB)"),
        (&["show", broken], 5, "broken.gguf: header: does not start with GGUF: expected a GGUF file"),
        (&["detokenize", "demo", "2048"], 2, "token id 2048: expected less than 2048, the vocabulary of demo"),
        (
            &["eval", "logits", "demo", "--tokens", "2,2048", "-o", "/nonexistent/x"],
            2,
            "token id 2048: expected less than 2048, the vocabulary of demo",
        ),
        (
            &["eval", "logits", "demo", "--tokens", "2,3", "-o", "/nonexistent/x"],
            3,
            "/nonexistent/x: no such file or directory",
        ),
        (&["eval", "ppl", "demo", "--file", "/nonexistent"], 3, "/nonexistent: no such file or directory"),
        (&["eval", "ppl", "demo", "--file", "/dev/null"], 2, "/dev/null: empty: expected text"),
        #[cfg(target_os = "linux")]
        (&["eval", "ppl", "demo", "--file", "/dev/zero"], 2, "/dev/zero: too long: expected at most 256 MiB of text"),
        (&["bench", "demo", "-p", "4000"], 2, "4000 tokens with depth: expected at most 2048, the model's context"),
        (&["bench", "demo", "-r", "0"], 2, "repetitions: 0: expected 1 to 1000"),
    ];
    for (arguments, code, message) in cases {
        assert_eq!(error(run(arguments), *code), *message, "{arguments:?}");
    }
}

#[test]
fn an_unknown_kernel_lists_what_there_is() {
    let flag = error(run(&["run", "demo", "x", "--kernel", "abacus"]), 6);
    assert!(flag.starts_with("kernel: abacus: ") && flag.contains("scalar"), "{flag}");
    let variable = error(gemrun(&["run", "demo", "x"]).env("GEMRUN_KERNEL", "abacus").output().unwrap(), 6);
    assert_eq!(variable, flag);
    // An empty variable is as good as none, and a flag beats it.
    ok(gemrun(&["run", "demo", "x", "-n", "1"]).env("GEMRUN_KERNEL", "").output().unwrap());
    ok(gemrun(&["run", "demo", "x", "-n", "1", "--kernel", "scalar"]).env("GEMRUN_KERNEL", "abacus").output().unwrap());
    assert_eq!(
        error(gemrun(&["run", "demo", "x"]).env("GEMRUN_THREADS", "999").output().unwrap(), 2),
        "threads: 999: expected 1 to 256"
    );
}

#[test]
fn bare_gemrun_says_what_to_type() {
    let text = ok(run(&[]));
    assert!(text.starts_with("gemrun ") && text.contains("gemrun run demo"), "{text}");
    assert!(!text.contains('\x1b'), "colours in a pipe: {text:?}");
}

#[test]
fn input_that_is_not_utf8_is_refused_at_its_byte() {
    let expected = "standard input: byte 3 is not UTF-8: expected UTF-8 text";
    assert_eq!(error(piped(&["run", "demo"], b"abc\xff"), 2), expected);
    assert_eq!(error(piped(&["run", "demo", "x"], b"abc\xff"), 2), expected);
    assert_eq!(error(piped(&["tokenize", "demo", "-"], b"abc\xff"), 2), expected);
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let mut command = gemrun(&["run", "demo"]);
        command.arg(std::ffi::OsStr::from_bytes(b"a\xfe"));
        assert_eq!(error(command.output().unwrap(), 2), "prompt: byte 1 is not UTF-8: expected UTF-8 text");
    }
}

#[test]
fn one_answer_is_all_that_goes_to_standard_output() {
    let arguments = ["run", "demo", "What is gemrun?", "--seed", "3", "-n", "40"];
    let output = run(&arguments);
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = ok(output);
    assert!(text.ends_with('\n') && text.trim().len() > 3, "{text:?}");

    // The same seed gives the same text, whatever may change the speed.
    for more in [&["-t", "1"][..], &["-t", "3", "--batch", "1"], &["--kernel", "scalar", "--batch", "7"]] {
        assert_eq!(ok(run(&[&arguments[..], more].concat())), text, "{more:?}");
    }
    let others: Vec<String> = (10..14)
        .map(|seed| ok(run(&["run", "demo", "Tell me a story", "-n", "40", "--seed", &seed.to_string()])))
        .collect();
    assert!(others.iter().any(|other| *other != others[0]), "{others:?}");
}

#[test]
fn piped_text_is_the_prompt_or_follows_it() {
    let flags = ["--temp", "0", "-n", "12"];
    let with = |prompt: &[&'static str]| [&["run", "demo"], prompt, &flags].concat();
    let direct = ok(run(&with(&["What is gemrun?"])));
    assert_eq!(ok(piped(&with(&[]), b"What is gemrun?")), direct);
    assert_eq!(ok(piped(&with(&["What is gemrun?"]), b"")), direct);
    let both = ok(run(&with(&["Read this:\n\nWhat is gemrun?"])));
    assert_eq!(ok(piped(&with(&["Read this:"]), b"What is gemrun?")), both);
}

#[test]
fn limits_of_a_reply() {
    let count = |arguments: &[&str]| {
        let output =
            run(&[&["run", "demo", "Once upon a time", "--raw", "--stats", "--ignore-eos"], arguments].concat());
        let stats = String::from_utf8(output.stderr.clone()).unwrap();
        ok(output);
        let line = stats.lines().find(|line| line.starts_with('{')).unwrap_or_else(|| panic!("{stats}"));
        serde_json::from_str::<Value>(line).unwrap()
    };
    let limited = count(&["-n", "7"]);
    assert_eq!((&limited["generated_tokens"], &limited["end"]), (&7.into(), &"length".into()));
    let none = count(&["-n", "0"]);
    assert_eq!((&none["generated_tokens"], &none["end"]), (&0.into(), &"length".into()));
    let full = count(&["-c", "32"]);
    let tokens = |key: &str| full[key].as_u64().unwrap();
    // The token after the last that fits can still be chosen.
    assert_eq!((tokens("prompt_tokens") + tokens("generated_tokens"), &full["end"]), (33, &"context".into()));

    let long = "many words ".repeat(2000);
    let message = error(piped(&["run", "demo", "--raw"], long.as_bytes()), 2);
    assert!(
        message.starts_with("prompt: ") && message.ends_with(" tokens: expected at most 2048, the context"),
        "{message}"
    );
}

#[test]
fn stats_are_one_line_of_json() {
    let output = run(&["run", "demo", "Hello", "--stats", "--seed", "5", "-n", "9", "-t", "2", "--kv", "f16"]);
    let stats = String::from_utf8(output.stderr.clone()).unwrap();
    ok(output);
    assert_eq!(stats.lines().count(), 1, "{stats}");
    let stats: Value = serde_json::from_str(&stats).unwrap();
    assert_eq!((&stats["seed"], &stats["threads"], &stats["kv"]), (&5.into(), &2.into(), &"f16".into()));
    for key in ["prompt_tokens", "reused_tokens", "generated_tokens", "tok_s", "peak_rss_bytes", "model", "kernels"] {
        assert!(!stats[key].is_null(), "{key}: {stats}");
    }
    let parts = ["map", "load", "restore", "tokenize", "prefill", "first_token", "decode", "total"];
    assert_eq!(keys(&stats["seconds"]), parts);
    assert!(stats["seconds"]["total"].as_f64().unwrap() >= stats["seconds"]["first_token"].as_f64().unwrap());
}

#[test]
fn show_as_json() {
    let show = json(run(&["show", "demo", "--json"]));
    let fields = [
        "architecture",
        "name",
        "parameters",
        "file_bytes",
        "hot_bytes",
        "ple_bytes",
        "context_length",
        "metadata",
        "tensors",
    ];
    assert_eq!(keys(&show), fields);
    assert_eq!((&show["architecture"], &show["context_length"]), (&"gemma4".into(), &2048.into()));
    let file = std::fs::metadata(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/demo.gguf")).unwrap();
    assert_eq!(show["file_bytes"], file.len());
    let vocabulary = &show["metadata"]["tokenizer.ggml.tokens"];
    assert_eq!(keys(vocabulary), ["type", "len", "first"]);
    assert_eq!((vocabulary["len"].as_u64(), vocabulary["first"].as_array().unwrap().len()), (Some(2048), 8));
    let tensors = show["tensors"].as_array().unwrap();
    assert!(tensors.iter().all(|tensor| keys(tensor) == ["name", "type", "shape", "offset", "bytes"]));
    let sum: u64 = tensors.iter().map(|tensor| tensor["bytes"].as_u64().unwrap()).sum();
    assert_eq!(sum, show["hot_bytes"].as_u64().unwrap() + show["ple_bytes"].as_u64().unwrap());
    let embedding = tensors.iter().find(|tensor| tensor["name"] == "token_embd.weight").unwrap();
    assert_eq!(embedding["shape"][1], 2048);

    let text = ok(run(&["show", "demo", "--tensors", "--kv", "--check-data"]));
    assert!(text.contains("blk.0.attn_q.weight") && text.contains("gemma4.block_count = "), "{text}");
}

#[test]
fn any_valid_gguf_can_be_shown_and_nothing_in_it_reaches_the_terminal() {
    use gemrun::gguf::write::Writer;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other.gguf");
    let mut writer = Writer::new();
    writer.metadata("general.architecture", "llama");
    writer.metadata("general.name", "evil \x1b]0;title\x07 \u{9b}2J \u{202e}name");
    writer.metadata("llama.bytes", &b"\xff\xfe ok"[..]);
    std::fs::write(&path, writer.to_vec().unwrap()).unwrap();
    for arguments in [&["--json"][..], &["--kv"], &[]] {
        let output = run(&[&["show", path.to_str().unwrap()], arguments].concat());
        let (text, _) = shown_with_error(output, 6);
        let harmful = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
        assert!(!text.contains(harmful), "{text:?}");
    }
    let (text, _) = shown_with_error(run(&["show", path.to_str().unwrap(), "--json"]), 6);
    let show: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(show["name"], "evil \x1b]0;title\x07 \u{9b}2J \u{202e}name");
    assert_eq!(show["metadata"]["llama.bytes"], "\\xff\\xfe ok");
    let message = error(run(&["run", path.to_str().unwrap(), "hi"]), 6);
    assert!(message.contains("llama") && message.contains("expected gemma4"), "{message}");
}

#[test]
fn a_model_that_contradicts_itself_is_shown_with_what_is_wrong() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wrong.gguf");
    let mut bytes = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/demo.gguf")).unwrap();
    let key = b"gemma4.embedding_length";
    let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len() + 4;
    bytes[at] ^= 0x40;
    std::fs::write(&path, bytes).unwrap();
    let (text, message) = shown_with_error(run(&["show", path.to_str().unwrap()]), 5);
    assert!(text.contains("gemma4"), "{text}");
    assert!(message.starts_with("wrong.gguf: tensor "), "{message}");
}

#[test]
fn tokens_round_trip() {
    let text = "Grüße <turn|>\n\tend";
    let ids = json(run(&["tokenize", "demo", text, "--json"]));
    let plain = ok(run(&["tokenize", "demo", text]));
    let listed: Vec<String> = ids.as_array().unwrap().iter().map(Value::to_string).collect();
    assert_eq!(plain, listed.join(" ") + "\n");
    assert!(listed.contains(&"106".into()), "{plain}");
    let words: Vec<&str> = listed.iter().map(String::as_str).collect();
    assert_eq!(ok(run(&[&["detokenize", "demo"], &words[..]].concat())), text);

    assert_eq!(ok(piped(&["tokenize", "demo", "-"], text.as_bytes())), plain);
    assert_eq!(ok(run(&["tokenize", "demo", text, "--bos"])), format!("2 {plain}"));
    assert!(!ok(run(&["tokenize", "demo", text, "--no-special"])).split_whitespace().any(|id| id == "106"));
    assert_eq!(ok(run(&["tokenize", "demo", ""])), "\n");
    assert_eq!(ok(run(&["tokenize", "demo", "", "--json"])), "[]\n");
}

#[test]
fn templates_are_rendered_as_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("chat.json");
    std::fs::write(&file, r#"[{"role": "user", "content": "Hi"}]"#).unwrap();
    let file = file.to_str().unwrap();
    let text = ok(run(&["template", "demo", "--messages", file]));
    assert_eq!(text, "<bos><|turn>user\nHi<turn|>\n<|turn>model\n");
    let text = ok(run(&["template", "demo", "--messages", file, "--no-generation-prompt"]));
    assert_eq!(text, "<bos><|turn>user\nHi<turn|>\n");
    let text = ok(run(&["template", "demo", "--messages", file, "--think", "on"]));
    assert!(text.contains("<|think|>"), "{text}");
    let message = error(piped(&["template", "demo", "--messages", "-"], b"{}"), 2);
    assert!(message.starts_with("-: ") && message.ends_with(": expected a JSON array"), "{message}");
}

#[test]
fn bench_as_json_and_csv() {
    let flags = ["bench", "demo", "-p", "8", "-n", "4", "-d", "0,5", "-t", "1", "-r", "2", "-o"];
    let results = json(run(&[&flags[..], &["json"]].concat()));
    let names: Vec<_> =
        results.as_array().unwrap().iter().map(|r| (r["test"].as_str().unwrap(), &r["n_depth"])).collect();
    let depths = [Value::from(0), Value::from(5)];
    assert_eq!(names, [("pp8", &depths[0]), ("tg4", &depths[0]), ("pp8", &depths[1]), ("tg4", &depths[1])]);
    for result in results.as_array().unwrap() {
        for key in ["n_prompt", "n_gen", "n_threads", "peak_rss_bytes"] {
            assert!(result[key].is_u64(), "{key}: {result}");
        }
        for key in ["avg_ts", "stddev_ts", "median_ts", "bytes_per_token", "gb_per_s"] {
            assert!(result[key].as_f64().is_some_and(|value| value >= 0.0), "{key}: {result}");
        }
        assert!(result["kernel"].is_object() && result["kv"] == "f16", "{result}");
    }
    assert_eq!(ok(run(&[&flags[..], &["csv"]].concat())).lines().count(), 5);
    assert!(ok(run(&[&flags[..], &["md"]].concat())).contains("| tg4 @ d5 |"));
}

#[test]
fn perplexity_and_divergence_as_json() {
    let text = "gemrun runs models.\nOnce upon a time there was a fox.\n".repeat(4);
    let ppl = json(piped(&["eval", "ppl", "demo", "--file", "-", "--ctx", "32", "--json"], text.as_bytes()));
    assert_eq!(keys(&ppl), ["tokens", "nll", "ppl"]);
    let number = |key: &str| ppl[key].as_f64().unwrap();
    assert!((number("ppl") - number("nll").exp()).abs() < 1e-9 * number("ppl"));
    let flags = ["eval", "kl", "demo", "--base", "demo", "--file", "-", "--ctx", "32", "--json"];
    let same = json(piped(&flags, text.as_bytes()));
    assert_eq!(keys(&same), ["tokens", "kl_mean", "kl_p99", "top1", "ppl", "ppl_base"]);
    assert_eq!((same["kl_mean"].as_f64(), same["top1"].as_f64(), &same["ppl"]), (Some(0.0), Some(1.0), &ppl["ppl"]));
    let other = json(piped(&[&flags[..], &["--base-act", "float"]].concat(), text.as_bytes()));
    assert!(other["kl_mean"].as_f64().unwrap() > 0.0 && other["ppl"] != other["ppl_base"], "{other}");
}

#[test]
fn a_self_test_passes_and_its_hash_is_that_of_the_logits() {
    let report = json(run(&["selftest", "--json"]));
    assert_eq!(keys(&report)[..2], ["kernels", "logits_hash"]);
    let kernels = report["kernels"].as_array().unwrap();
    let supported = gemrun_simd::KERNELS.iter().filter(|kernel| kernel.supported());
    for name in supported.map(|kernel| kernel.name()) {
        assert!(kernels.contains(&serde_json::json!({"name": name, "ok": true})), "{name}: {report}");
    }
    assert_eq!((&report["ok"], &report["logits_hash"]), (&true.into(), &report["expected_logits_hash"]));

    // The hash can be had in another way, from the text in the source.
    let source = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli/selftest.rs")).unwrap();
    let text = source.split("const TEXT: &str = \"").nth(1).unwrap().split('"').next().unwrap();
    let text: String = text.split("\\\n").map(str::trim_start).collect();
    let tokens = ok(run(&["tokenize", "demo", "--bos", &text])).trim().replace(' ', ",");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("logits");
    ok(run(&["eval", "logits", "demo", "--tokens", &tokens, "--kv", "f16", "-o", file.to_str().unwrap()]));
    let hash: String = Sha256::digest(std::fs::read(file).unwrap()).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(report["logits_hash"], hash);
}

#[test]
fn a_self_test_keeps_to_the_kernel_and_threads_asked_for() {
    let scalar = json(run(&["selftest", "--json", "--kernel", "scalar", "-t", "2"]));
    let names = |key: &str| -> Vec<&str> {
        scalar[key].as_array().unwrap().iter().map(|check| check["name"].as_str().unwrap()).collect()
    };
    assert!(names("kernels").iter().all(|name| name.ends_with("/scalar")), "{scalar}");
    assert!(names("logits").iter().all(|name| name.starts_with("logits/scalar -t 2 ")), "{scalar}");
    let text =
        ok(gemrun(&["selftest"]).env("GEMRUN_KERNEL", "q4_0/scalar").env("GEMRUN_THREADS", "1").output().unwrap());
    assert!(text.contains("scalar    1 kernel") && text.contains("All bits are right"), "{text}");
    assert!(error(run(&["selftest", "--kernel", "abacus"]), 6).starts_with("kernel: abacus: no such kernel"));
}

#[test]
fn a_closed_pipe_is_a_quiet_success() {
    for arguments in [&["show", "demo", "--json"][..], &["run", "demo", "Tell me a story", "--ignore-eos"], &["--help"]]
    {
        let mut child = gemrun(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let mut stderr = String::new();
        child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        assert_eq!((child.wait().unwrap().code(), stderr.as_str()), (Some(0), ""), "{arguments:?}");
    }
}

#[test]
#[cfg(unix)]
fn an_interrupt_ends_one_answer_with_130() {
    let mut child =
        gemrun(&["run", "demo", "Tell me a story", "--ignore-eos", "--kernel", "scalar", "-t", "1", "--seed", "1"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut first = [0];
    stdout.read_exact(&mut first).unwrap();
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert!(rest.ends_with('\n'), "{rest:?}");
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!(stderr, "");
}

/// A model is weighed before it is run: what it needs, what there is, and a way out.
#[test]
fn what_does_not_fit_is_refused() {
    let asks = |more: &[&str]| run(&[&["run", "demo", "hi", "-n", "2", "--mem-limit"], more].concat());
    let message = error(asks(&["4M"]), 4);
    assert!(message.starts_with("demo: needs ") && message.contains("are available: "), "{message}");
    assert!(message.ends_with("or --allow-paging, where each token waits for the disk"), "{message}");
    ok(asks(&["4M", "--allow-paging"]));
    ok(asks(&["1G"]));
    assert!(error(asks(&["much"]), 2).contains("expected a size such as 3G or 800M"));

    // What bench and eval need is known before they begin, too.
    let out = tempfile::tempdir().unwrap();
    let file = out.path().join("logits");
    let limited = ["--mem-limit", "4M"];
    let logits = ["eval", "logits", "demo", "--tokens", "2,3", "-o", file.to_str().unwrap()];
    error(run(&[logits.as_slice(), &limited].concat()), 4);
    assert!(!file.exists());
    error(run(&[["bench", "demo", "-p", "8", "-n", "0", "-r", "1"].as_slice(), &limited].concat()), 4);
}

/// Settings are defaults: flags and the environment come before them, and what makes no sense is said with the file's name.
#[test]
fn settings() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("config.toml");
    let at_home = |arguments: &[&str]| {
        let mut command = gemrun(arguments);
        command.env("GEMRUN_HOME", home.path());
        command
    };
    let threads = |command: &mut Command| {
        let output = command.args(["run", "demo", "hi", "-n", "1", "--stats"]).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice::<Value>(&output.stderr).unwrap()["threads"].as_u64().unwrap()
    };
    assert!(ok(at_home(&["config"]).output().unwrap()).contains("makes it"));
    ok(at_home(&["config", "threads=3", "system=Be brief.", "allow-paging=true"]).output().unwrap());
    let text = std::fs::read_to_string(&file).unwrap();
    assert_eq!(text, "threads = 3\nsystem = \"Be brief.\"\nallow_paging = true\n");
    assert!(ok(at_home(&["config"]).output().unwrap()).ends_with(&text));
    assert_eq!(threads(&mut at_home(&[])), 3);
    assert_eq!(threads(at_home(&[]).env("GEMRUN_THREADS", "2")), 2);
    let flag =
        at_home(&["run", "demo", "hi", "-n", "1", "--stats", "-t", "1"]).env("GEMRUN_THREADS", "2").output().unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&flag.stderr).unwrap()["threads"], 1);

    // Comments stay, an empty value removes, and nothing is written if a part of it is wrong.
    std::fs::write(&file, "# mine\nthreads = 3 # all\n").unwrap();
    let wrong = error(at_home(&["config", "ctx=4096", "top_k=many"]).output().unwrap(), 5);
    assert!(wrong.contains("config.toml: top_k: invalid value 'many'"), "{wrong}");
    ok(at_home(&["config", "threads=2", "ctx=4096"]).output().unwrap());
    ok(at_home(&["config", "ctx="]).output().unwrap());
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "# mine\nthreads = 2 # all\n");

    let cases = [
        ("threads = \"x\"\n", "threads: invalid value 'x'"),
        ("speed = 11\n", "speed: no such setting"),
        ("json = true\n", "json: no such setting"),
        ("stats = true\n", "stats: no such setting"),
        ("allow_paging = 1\n", "allow_paging: 1: expected true or false"),
        ("[run]\nctx = 1\n", "run: expected a text, a number, true or false"),
        ("a = 1\nb\n", "line 2: "),
    ];
    for (text, expected) in cases {
        std::fs::write(&file, text).unwrap();
        let message = error(at_home(&["show", "demo"]).output().unwrap(), 5);
        assert!(message.contains("config.toml: ") && message.contains(expected), "{message}");
    }
    // A conversation that goes on has settings of its own; what says how to compute holds for it, too.
    std::fs::write(&file, "temp = 0.3\nthreads = 3\n").unwrap();
    let before = at_home(&["run", "demo", "hi", "-n", "1", "--stats"]).output().unwrap();
    assert!(before.status.success());
    let help = ok(at_home(&["run", "--help"]).output().unwrap());
    assert!(help.contains("[default: 0.3]") && help.contains("[default: 3]"), "{help}");
    let continued = ok(at_home(&["run", "-C", "--help"]).output().unwrap());
    assert!(continued.contains("[default: 3]"), "{continued}");

    // Environment variables are settings as well, of the commands that look at them.
    std::fs::write(&file, "hf_endpoint = \"nowhere\"\nchats_budget = \"many\"\n").unwrap();
    let wrong = error(at_home(&["pull", "e2b"]).env_remove("HF_ENDPOINT").output().unwrap(), 2);
    assert_eq!(wrong, "HF_ENDPOINT: nowhere: expected an address such as https://huggingface.co");
    let wrong = error(at_home(&["pull", "e2b"]).env("HF_ENDPOINT", "elsewhere").output().unwrap(), 2);
    assert!(wrong.starts_with("HF_ENDPOINT: elsewhere: "), "{wrong}");
    // What measures is not told by settings what to measure.
    std::fs::write(&file, "ctx = 64\nkv = \"int8\"\n").unwrap();
    let help = ok(at_home(&["eval", "ppl", "--help"]).output().unwrap());
    assert!(help.contains("[default: 512]") && !help.contains("64]"), "{help}");
    assert!(ok(at_home(&["run", "--help"]).output().unwrap()).contains("[default: 64]"));
}

/// Completions for every shell, and a page for every command.
#[test]
fn completions_and_pages() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        assert!(ok(run(&["completions", shell])).contains("selftest"), "{shell}");
    }
    assert!(ok(run(&["man"])).starts_with(".ie") && ok(run(&["man", "run"])).contains("top\\-k"));
    assert!(error(run(&["man", "fly"]), 2).starts_with("fly: no such command: expected one of run, "));
    let folder = tempfile::tempdir().unwrap();
    ok(run(&["man", "--dir", folder.path().to_str().unwrap()]));
    let mut pages: Vec<String> =
        folder.path().read_dir().unwrap().map(|page| page.unwrap().file_name().into_string().unwrap()).collect();
    pages.sort();
    assert!(pages.contains(&"gemrun.1".into()) && pages.contains(&"gemrun-eval-ppl.1".into()), "{pages:?}");
}

/// What was measured becomes settings.
#[test]
fn tuning() {
    let home = tempfile::tempdir().unwrap();
    let table = ok(gemrun(&["tune", "demo"]).env("GEMRUN_HOME", home.path()).output().unwrap());
    assert_eq!(table.lines().filter(|line| line.ends_with('*')).count(), 1, "{table}");
    let settings = std::fs::read_to_string(home.path().join("config.toml")).unwrap();
    assert!(settings.contains("threads = ") && settings.contains("cores = \"big\""), "{settings}");
    ok(gemrun(&["run", "demo", "hi", "-n", "1"]).env("GEMRUN_HOME", home.path()).output().unwrap());
}
