//! Replies held to rules: budgets of thoughts, answers by a schema.

use std::path::Path;

use gemrun::channel::Channel;
use gemrun::guide::{Guide, Next, Rules, Schema};
use gemrun::sample::Allowed;
use gemrun::tokenizer::Tokenizer;
use serde_json::json;

fn tokenizer() -> Tokenizer {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/golden/tok/merges/vocab.gguf");
    Tokenizer::open(&path).unwrap()
}

/// A reply in which the model wants to say `wanted` (markers are markers): the tokens that come of it under `rules`.
/// A wanted token that is not allowed is left out, a forced one counts as wanted if it is; the reply ends where nothing is
/// wanted any more.
fn reply(tokenizer: &Tokenizer, prompt: &str, wanted: &str, rules: Rules) -> String {
    let mut channel = Channel::after(tokenizer, &tokenizer.encode(prompt, true));
    let mut guide = Guide::new(tokenizer, channel.place(), rules);
    let mut wanted = tokenizer.encode(wanted, true).into_iter().peekable();
    let mut said = Vec::new();
    while !guide.done() {
        let token = match guide.follows().unwrap() {
            Next::Forced(token) => {
                wanted.next_if_eq(&token);
                token
            }
            Next::Drawn(allowed) => {
                let Some(token) = wanted.next() else { break };
                if !is_allowed(allowed, token) {
                    continue;
                }
                token
            }
        };
        said.push(token);
        channel.push(tokenizer, token, &mut |_| false);
        guide.push(token, channel.place()).unwrap();
    }
    String::from_utf8(tokenizer.decode(&said, true)).unwrap()
}

fn is_allowed(allowed: Allowed, token: u32) -> bool {
    match allowed {
        Allowed::All => true,
        Allowed::Without(tokens) => !tokens.contains(&token),
        Allowed::Among(bits) => bits.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1),
    }
}

#[test]
fn a_thought_ends_when_its_budget_is_spent() {
    let t = tokenizer();
    let with = |tokens| Rules { think_budget: Some(tokens), ..Rules::default() };
    let wanted = "<|channel>thought\na b c d e<channel|>x<|channel>thought\ny<channel|>z";
    assert_eq!(reply(&t, "", wanted, Rules::default()), wanted);
    assert_eq!(reply(&t, "", wanted, with(100)), wanted);
    let cut = reply(&t, "", "<|channel>thought\nabcdefghijklmnopqrstuvwxyz", with(4));
    assert_eq!(cut, "<|channel>thought\nabc\n<channel|>defghijklmnopqrstuvwxyz");
    let cut = reply(&t, "", wanted, with(3));
    assert!(cut.starts_with("<|channel>thought\na b\n<channel|>"), "{cut}");
    // No thought is begun once it is spent.
    assert_eq!(cut.matches("<|channel>").count(), 1, "{cut}");
    assert_eq!(reply(&t, "", "<|channel>x", with(0)), "x");
    // The prompt may have begun it.
    assert_eq!(reply(&t, "<|channel>thought\n", "x", with(0)), "\n<channel|>x");
}

#[test]
fn a_schema_holds_for_the_answer_only() {
    let t = tokenizer();
    let schema = Schema::new(&t, &json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": false})).unwrap();
    let rules = Rules { schema: Some(&schema), ..Rules::default() };
    assert_eq!(reply(&t, "", "Sure: {\"a\": 12}", rules), "{\"a\": 12}");
    assert_eq!(reply(&t, "", "<|channel>{\"a\": 1}", rules), "{\"a\": 1}");
    assert_eq!(reply(&t, "", "<|tool_call>{\"a\": 1}", rules), "{\"a\": 1}");
    // `<turn|>` where the answer may not end yet, and where it may.
    assert_eq!(reply(&t, "", "{\"a\"<turn|>: 1<turn|>", rules), "{\"a\": 1");
    let think = Rules { think: true, ..rules };
    let thought = "<|channel>thought\nNumbers<channel|>{\"a\": 1}";
    assert_eq!(reply(&t, "", thought, think), thought);
    // What follows the marker is a thought, and it does not end the reply.
    assert_eq!(
        reply(&t, "", "<|channel>x<turn|>y<channel|>so {\"a\": 1}", think),
        "<|channel>thought\nxy<channel|>{\"a\": 1}"
    );
    let budget = Rules { think_budget: Some(1), ..think };
    assert_eq!(reply(&t, "", "<|channel>x{\"a\": 1}", budget), "<|channel>thought\n\n<channel|>{\"a\": 1}");
    let tools = Rules { tools: true, ..rules };
    let call = "<|tool_call>call:f{}<tool_call|>";
    assert_eq!(
        reply(&t, "", &format!("{call}x{{{call}<|tool_response>"), tools),
        format!("{call}{call}<|tool_response>")
    );
}

#[test]
fn a_schema_that_cannot_be_used_is_refused() {
    let t = tokenizer();
    for (schema, what) in [
        (json!([]), "expected a JSON object"),
        (json!(false), "expected a JSON object"),
        (json!({"type": "strin"}), "invalid type: strin"),
        (json!({"type": "string", "minLength": 3, "maxLength": 2}), "unsatisfiable"),
        (json!({"$ref": "#/nowhere"}), "nowhere"),
        (json!({"$ref": "https://example.com/x.json"}), "example.com"),
        (json!({"type": "string", "pattern": "("}), "unclosed group"),
        (json!({"type": "array", "uniqueItems": true}), "uniqueItems"),
        (json!({"not": {"type": "string"}}), "not"),
    ] {
        let error = Schema::new(&t, &schema).map(drop).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        let text = error.to_string();
        assert!(text.starts_with("schema: ") && text.contains(what), "{error}");
    }
}
