//! The rules of the house that a compiler does not enforce: who may import whom, who may be unsafe, who may know a
//! foreign crate. `ARCHITECTURE.md` gives the reasons.
//!
//! Sources are read as words: comments and the text of strings are dropped, what is left is cut into identifiers.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// Modules of the library, lowest level first. A module uses those of lower levels only.
const LEVELS: &[&[&str]] = &[
    &["error"],
    &["gguf", "team", "new_file", "lock"],
    &["weight", "machine"],
    &["config"],
    &["pack"],
    &["ops", "kv", "model"],
    &["attend"],
    &["tokenizer", "sample", "forward"],
    &["template", "channel", "windows", "fit"],
    &["calibrate", "guide"],
    &["session", "registry", "convert", "chats", "facts"],
    &["lib"],
];

/// Crates with a single user: a file, or a folder with the file beside it.
const OWNED: &[(&str, &str)] = &[
    ("rayon", "team"),
    ("memmap2", "gguf"),
    ("rustix", "machine"),
    ("minijinja", "template"),
    ("minijinja_contrib", "template"),
    ("tokenizers", "tokenizer"),
    ("toml", "registry"),
    ("serde_ignored", "registry"),
    ("ureq", "registry"),
    ("safetensors", "convert"),
    ("fancy_regex", "convert"),
    ("llguidance", "guide"),
    ("clap", "cli"),
    ("rustyline", "cli"),
    ("indicatif", "cli"),
    ("signal_hook", "cli"),
    ("toml_edit", "cli"),
    ("clap_complete", "cli"),
    ("clap_mangen", "cli"),
];

const UNSAFE: [&str; 3] = ["gguf.rs", "gguf/map.rs", "team.rs"];

/// The sources below `folder`, by path relative to it.
fn sources(folder: &str) -> BTreeMap<String, String> {
    fn read(folder: &Path, prefix: &str, into: &mut BTreeMap<String, String>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() && name == "target" {
                continue; // what `cargo fuzz` built
            } else if path.is_dir() {
                read(&path, &format!("{prefix}{name}/"), into);
            } else if name.ends_with(".rs") {
                into.insert(format!("{prefix}{name}"), fs::read_to_string(&path).unwrap());
            }
        }
    }
    let mut files = BTreeMap::new();
    read(&Path::new(env!("CARGO_MANIFEST_DIR")).join(folder), "", &mut files);
    assert!(files.len() > 3, "{folder} holds sources");
    files
}

/// `gguf` for `gguf.rs` and `gguf/map.rs`.
fn module(file: &str) -> &str {
    file.split(['/', '.']).next().unwrap()
}

/// The code without comments and the insides of strings. Lifetimes and characters need no care: neither contains a
/// quotation mark here but `'"'`.
fn code(source: &str) -> String {
    let mut out = String::new();
    let mut rest = source;
    while let Some(at) = rest.find(['"', '/', '\'']) {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let skip = match rest.as_bytes() {
            [b'/', b'/', ..] => rest.find('\n').unwrap_or(rest.len()),
            [b'\'', b'"', b'\'', ..] => 3,
            [b'\'', b'\\', _, b'\'', ..] => 4,
            [b'"', ..] => {
                let hashes = out.len() - out.trim_end_matches('#').len();
                if hashes > 0 && out.trim_end_matches('#').ends_with('r') {
                    let close = format!("\"{}", "#".repeat(hashes));
                    1 + rest[1..].find(&close).unwrap() + close.len()
                } else {
                    let mut escaped = false;
                    let end = rest[1..].find(|c| {
                        let end = c == '"' && !escaped;
                        escaped = c == '\\' && !escaped;
                        end
                    });
                    2 + end.unwrap()
                }
            }
            _ => {
                out.push_str(&rest[..1]);
                rest = &rest[1..];
                continue;
            }
        };
        rest = &rest[skip..];
    }
    out + rest
}

/// The identifiers in `code`, in order.
fn words(code: &str) -> Vec<&str> {
    code.split(|c: char| !c.is_alphanumeric() && c != '_').filter(|word| !word.is_empty()).collect()
}

/// What follows `crate::`, including each name of `crate::{a::X, b}`.
fn uses(code: &str) -> Vec<&str> {
    let mut found = Vec::new();
    for (at, prefix) in code.match_indices("crate::") {
        let rest = &code[at + prefix.len()..];
        let Some(list) = rest.strip_prefix('{') else {
            found.extend(words(rest).first());
            continue;
        };
        let mut depth = 1;
        let mut first = true;
        for (i, c) in list.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                ',' if depth == 1 => first = true,
                c if first && depth == 1 && !c.is_whitespace() => {
                    found.extend(words(&list[i..]).first());
                    first = false;
                }
                _ => {}
            }
            if depth == 0 {
                break;
            }
        }
    }
    found
}

#[test]
fn the_reader_of_sources_reads() {
    let source = "use crate::{Error, a::{b, c}, d}; // crate::e\nlet s = \"crate::f\\\"\"; crate::g::h(r#\"\"unsafe\"\"#, '\"', '\\'');";
    assert_eq!(uses(&code(source)), ["Error", "a", "d", "g"]);
    assert!(!words(&code(source)).contains(&"unsafe"));
    assert_eq!(words("a + 'c' c_d<'e>"), ["a", "c", "c_d", "e"]);
}

#[test]
fn imports_point_down() {
    let level = |name: &str| LEVELS.iter().position(|level| level.contains(&name));
    for (file, source) in sources("src") {
        let own = module(&file);
        if ["main", "cli"].contains(&own) {
            continue; // the program: uses the library from outside
        }
        let own_level = level(own).unwrap_or_else(|| panic!("{file}: module {own} has no level"));
        for used in uses(&code(&source)) {
            // `Error`, `Kind` and `Result` are the error module's, known to all.
            let is_module = used.starts_with(char::is_lowercase);
            if is_module && used != own {
                let used_level =
                    level(used).unwrap_or_else(|| panic!("{file}: uses crate::{used}, which has no level"));
                assert!(used_level < own_level, "{file} uses crate::{used}, which is not below it");
            }
        }
    }
}

#[test]
fn the_library_does_not_know_the_program() {
    for (file, source) in sources("src") {
        if !["main", "cli"].contains(&module(&file)) {
            let code = code(&source);
            assert!(!words(&code).contains(&"cli"), "{file} names cli");
            for print in ["print!", "println!", "eprint!", "eprintln!", "stdout()", "stderr()", "process::exit"] {
                assert!(!code.contains(print), "{file}: the library does not talk to people, found {print}");
            }
        }
    }
}

#[test]
fn foreign_crates_have_one_owner() {
    for (file, source) in sources("src") {
        let code = code(&source);
        for (name, owner) in OWNED {
            // As a path only: `tokenizers` may be a local name elsewhere.
            let named = code
                .match_indices(&format!("{name}::"))
                .any(|(at, _)| !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':'));
            assert!(!named || module(&file) == *owner, "{file} uses {name}, which belongs to {owner}");
        }
    }
}

#[test]
fn unsafe_stays_where_it_is() {
    for (file, source) in sources("src") {
        let found = words(&code(&source)).contains(&"unsafe");
        assert!(!found || UNSAFE.contains(&file.as_str()), "{file} contains unsafe code");
    }
}

#[test]
fn the_forward_pass_names_no_format_no_instruction_set_and_no_file() {
    let source = &sources("src")["forward.rs"];
    for word in words(&code(source)) {
        let low = word.to_lowercase();
        let forbidden = ["Format", "Isa", "Kernel", "Gguf", "gguf", "rayon", "cfg", "std_detect"].contains(&word)
            || ["avx", "neon", "sse", "q4_", "q8_", "q6_", "bf16"].iter().any(|part| low.contains(part));
        assert!(!forbidden, "forward.rs names {word}");
    }
}

#[test]
fn simd_knows_no_files_models_or_threads() {
    for (file, source) in sources("simd/src") {
        let code = code(&source);
        for path in ["std::fs", "std::thread", "std::io", "gemrun::", "rayon::", "serde"] {
            assert!(!code.contains(path), "simd/src/{file} uses {path}");
        }
    }
}

#[test]
fn every_file_says_what_it_is() {
    for folder in ["src", "simd/src", "tests"] {
        for (file, source) in sources(folder) {
            assert!(source.starts_with("//! "), "{folder}/{file} does not open with what it is");
        }
    }
}
