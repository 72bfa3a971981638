//! Thoughts and tools in whole conversations. The demo model neither thinks nor calls tools by itself: a template that
//! begins a thought for it, and a history in which a tool was called, make it.

mod common;

use std::ops::ControlFlow;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::AtomicBool;

use common::raw_gguf::File;
use gemrun::gguf::Gguf;
use gemrun::kv::KvType;
use gemrun::model::Model;
use gemrun::registry::DEMO;
use gemrun::sample::Sampling;
use gemrun::session::{End, Event, Options, Overflow, Session};
use gemrun::template::{self, Template};
use gemrun::tokenizer::Tokenizer;
use gemrun::weight::Numerics;
use serde_json::{Value, json};

/// The demo model with another template.
fn with_template(source: &str) -> Vec<u8> {
    let mut file = File::of(&Gguf::from_bytes("demo", DEMO.to_vec()).unwrap());
    file.set_str("tokenizer.chat_template", source);
    file.bytes()
}

const THINKS: &str =
    "{{ bos_token }}<|turn>user\n{{ messages[0]['content'] }}<turn|>\n<|turn>model\n<|channel>thought{{ '\n' }}";

fn options() -> Options {
    Options {
        context: 512,
        batch: 64,
        kv: KvType::F32,
        threads: 1,
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        ignore_stops: false,
        think: true,
        overflow: Overflow::Stop,
        think_budget: None,
        tools: Vec::new(),
        schema: None,
        system: None,
    }
}

fn quiet(_: Event) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// Runs the program; its standard output, and its standard error.
fn run(arguments: &[&str]) -> (String, String) {
    let home = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_gemrun"));
    command.args(arguments).env("GEMRUN_HOME", home.path()).stdin(Stdio::null());
    let Output { status, stdout, stderr } = command.output().unwrap();
    let (stdout, stderr) = (String::from_utf8(stdout).unwrap(), String::from_utf8(stderr).unwrap());
    assert!(status.success(), "{stderr}");
    (stdout, stderr)
}

#[test]
fn thoughts_stay_out_of_standard_output() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("thinks.gguf");
    let bytes = with_template(THINKS);
    std::fs::write(&path, &bytes).unwrap();
    let gguf = Gguf::from_bytes("thinks", bytes).unwrap();
    let model = Model::load(&gguf, &Numerics::default()).unwrap();
    let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
    let path = path.to_str().unwrap();
    let fixed = ["run", path, "What is gemrun?", "--temp", "0", "-n", "40", "--kv", "f32", "-t", "1"];
    for budget in [0, 1, 7, 20] {
        let template = Template::from_gguf(&gguf).unwrap();
        let options = Options { think_budget: Some(budget), ..options() };
        let mut session = Session::new(&model, &tokenizer, Some(template), options).unwrap();
        let reply = session.reply("What is gemrun?", 40, &AtomicBool::new(false), &mut quiet).unwrap();
        assert_eq!(reply.thought.is_empty(), budget == 0, "{reply:?}");
        assert!(!reply.answer.is_empty());
        // What was thought is not said again.
        assert_eq!(session.last_turn()[1], json!({"role": "assistant", "content": reply.answer}));
        for hide in [&[][..], &["--hide-thinking"]] {
            let budget = budget.to_string();
            let (stdout, stderr) = run(&[&fixed[..], &["--think-budget", &budget], hide].concat());
            assert_eq!(stdout, format!("{}\n", reply.answer));
            assert_eq!(stderr, "");
        }
    }
    // A reply that is nothing but thought.
    let short = ["run", path, "What is gemrun?", "--temp", "0", "-n", "3"];
    assert_eq!(run(&short), ("\n".to_string(), String::new()));
}

#[test]
fn auto_decides_and_says_so() {
    let fixed = ["run", "demo", "What is gemrun?", "--temp", "0", "-n", "8"];
    let (auto, said) = run(&[&fixed[..], &["--think", "auto"]].concat());
    assert!(
        said.starts_with("note: thinking is o") && said.contains(" tok/s a thought of 400 tokens takes "),
        "{said}"
    );
    let decided = if said.contains("thinking is on") { "on" } else { "off" };
    // Measuring leaves nothing behind.
    assert_eq!(run(&[&fixed[..], &["--think", decided]].concat()), (auto, String::new()));
}

#[test]
fn what_tools_returned_is_part_of_the_turn() {
    let gguf = Gguf::from_bytes("demo", DEMO.to_vec()).unwrap();
    let model = Model::load(&gguf, &Numerics::default()).unwrap();
    let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
    let template = Template::from_gguf(&gguf).unwrap();
    let tools =
        vec![json!({"type": "function", "function": {"name": "weather", "description": "Weather", "parameters":
        {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}})];
    let options = Options { tools: tools.clone(), think: false, ..options() };
    let mut session = Session::new(&model, &tokenizer, Some(template.clone()), options).unwrap();
    let call = |id: &str, city: &str| json!({"id": id, "type": "function", "function": {"name": "weather", "arguments": {"city": city}}});
    let history = vec![
        json!({"role": "user", "content": "Weather?"}),
        json!({"role": "assistant", "tool_calls": [call("call-1", "Bern"), call("call-2", "Rom")]}),
    ];
    let tokens =
        |messages: &[Value]| template.encode(&tokenizer, messages, &tools, template::Options::default()).unwrap();
    let result =
        |id: &str, content: Value| json!({"role": "tool", "tool_call_id": id, "name": "weather", "content": content});

    // The second call has no result: it counts as not run. A list is not taken for parts of a message.
    session.set_history(history.clone());
    let reply = session.reply_to_calls(&[json!([20, 21])], 5, &AtomicBool::new(false), &mut quiet).unwrap();
    let results = [result("call-1", json!({"value": [20, 21]})), result("call-2", json!({"error": "not run"}))];
    let mut expected = [&history[..], &results].concat();
    assert_eq!(reply.usage.prompt, tokens(&expected).len());
    expected.push(json!({"role": "assistant", "content": reply.answer}));
    assert_eq!(session.last_turn(), expected);
    assert_eq!(reply.end, End::Length);

    // Calls nobody ran stand in the conversation as such, whether it was interrupted there or not.
    session.set_history(history.clone());
    let reply = session.reply("And now?", 5, &AtomicBool::new(false), &mut quiet).unwrap();
    let not_run = [result("call-1", json!({"error": "not run"})), result("call-2", json!({"error": "not run"}))];
    let expected = [&history[..], &not_run, &[json!({"role": "user", "content": "And now?"})]].concat();
    assert_eq!(reply.usage.prompt, tokens(&expected).len());
    assert_eq!(session.undo().as_deref(), Some("And now?"));
    assert_eq!(session.last_turn(), history);
}

#[test]
fn flags_that_contradict_themselves_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_string()
    };
    let (good, list, nameless) =
        (write("t.json", "[]"), write("l.json", "{}"), write("n.json", "[{\"function\": {}}]"));
    let (schema, broken) = (write("s.json", "{\"type\": \"strin\"}"), write("b.json", "{"));
    let cases: &[(&[&str], i32, &str)] = &[
        (&["--json-schema", &schema], 2, "s.json: schema: invalid type: strin"),
        (&["--json-schema", &broken], 2, "b.json: EOF while parsing"),
        (&["--json-schema", "/nowhere.json"], 3, "/nowhere.json: no such file"),
        (&["--format", "json", "--ignore-eos"], 2, "ignore-eos: with JSON"),
        (&["--format", "json", "-n", "3"], 1, "answer: cut off by the limit after 3 tokens: the JSON is not whole"),
        (&["--tools", &list], 2, "l.json: invalid type: map"),
        (&["--tools", &nameless], 2, "n.json: tool 1: has no function with a name"),
        (&["--tools", &good, "--tool-cmd", "/nowhere/tool"], 3, "/nowhere/tool: no such file"),
        (&["--tool-cmd", "cat"], 2, "--tools"),
    ];
    for (arguments, code, message) in cases {
        let arguments = [&["run", "demo", "Hi", "--seed", "1"], *arguments].concat();
        let mut command = Command::new(env!("CARGO_BIN_EXE_gemrun"));
        let output = command.args(&arguments).env("GEMRUN_HOME", folder.path()).stdin(Stdio::null()).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), stderr.contains(message)), (Some(*code), true), "{arguments:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}
