//! Answers by a schema: whatever the model makes of it at a high temperature is valid JSON that fits, by the judgement
//! of another program.

mod common;

use std::ops::ControlFlow;
use std::sync::atomic::AtomicBool;

use common::damage::{Draw, Rng};
use gemrun::gguf::Gguf;
use gemrun::guide::Schema;
use gemrun::kv::KvType;
use gemrun::model::Model;
use gemrun::registry::DEMO;
use gemrun::sample::Sampling;
use gemrun::session::{End, Options, Overflow, Reply, Session};
use gemrun::template::Template;
use gemrun::tokenizer::Tokenizer;
use gemrun::weight::Numerics;
use serde_json::{Map, Value, json};

struct Demo {
    model: Model,
    tokenizer: Tokenizer,
    template: Template,
}

impl Demo {
    fn new() -> Demo {
        let gguf = Gguf::from_bytes("demo", DEMO.to_vec()).unwrap();
        Demo {
            model: Model::load(&gguf, &Numerics::default()).unwrap(),
            tokenizer: Tokenizer::from_gguf(&gguf).unwrap(),
            template: Template::from_gguf(&gguf).unwrap(),
        }
    }

    /// What the demo model answers by `schema`.
    fn reply(&self, schema: &Value, temperature: f32, seed: u64, limit: usize) -> Reply {
        let options = Options {
            context: 2048,
            batch: 64,
            kv: KvType::F32,
            threads: 1,
            sampling: Sampling { temperature, seed, ..Sampling::default() },
            ignore_stops: false,
            think: false,
            overflow: Overflow::Stop,
            think_budget: None,
            tools: Vec::new(),
            schema: Some(Schema::new(&self.tokenizer, schema).unwrap_or_else(|e| panic!("{schema}: {e}"))),
            system: None,
        };
        let mut session = Session::new(&self.model, &self.tokenizer, Some(self.template.clone()), options).unwrap();
        let mut streamed = String::new();
        let mut on = |event: gemrun::session::Event| {
            if let gemrun::session::Event::Answer(text) = event {
                streamed.push_str(text);
            }
            ControlFlow::Continue(())
        };
        let reply = session.reply("What is gemrun?", limit, &AtomicBool::new(false), &mut on).unwrap();
        assert_eq!(streamed, reply.answer);
        reply
    }

    /// The answer by `schema` is whole and fits.
    fn check(&self, schema: &Value, temperature: f32, seed: u64) {
        let reply = self.reply(schema, temperature, seed, usize::MAX);
        assert_eq!(reply.end, End::Stop, "{schema}: {}", reply.answer);
        let value: Value =
            serde_json::from_str(&reply.answer).unwrap_or_else(|e| panic!("{schema}: {}: {e}", reply.answer));
        if let Err(error) = jsonschema::validate(schema, &value) {
            panic!("{schema}: {value}: {error}");
        }
    }
}

/// Schemas as people write them.
fn written() -> Vec<Value> {
    let string = json!({"type": "string", "maxLength": 12});
    vec![
        json!({"type": "boolean"}),
        json!({"type": "null"}),
        json!({"const": {"a": [1, "ü\n\"", null]}}),
        json!({"enum": ["red", "green", 3, null, true, ["x"], {"y": 1.5}]}),
        json!({"type": "integer", "minimum": -3, "exclusiveMaximum": 1000}),
        json!({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
        json!({"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100}),
        json!({"type": ["integer", "null"], "minimum": 1, "maximum": 9}),
        json!({"type": "string", "pattern": "^[A-Z]{3}-[0-9]{2,4}$"}),
        json!({"type": "string", "minLength": 5, "maxLength": 9}),
        json!({"type": "string", "format": "date"}),
        json!({"type": "string", "format": "date-time"}),
        json!({"type": "string", "format": "ipv4"}),
        json!({"type": "string", "format": "uuid"}),
        json!({"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 4, "maxItems": 4}),
        json!({"type": "array", "prefixItems": [string, {"type": "boolean"}], "items": false, "minItems": 2}),
        json!({"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1, "maxProperties": 2}),
        json!({"type": "object", "properties": {"id": {"type": "integer", "minimum": 0, "maximum": 65535}, "name": string, "ok": {"type": "boolean"}},
            "required": ["id", "name"], "additionalProperties": false}),
        json!({"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A person", "type": "object",
            "properties": {"first name": string, "über": {"const": "日本"}, "a\"b": {"type": "null"}},
            "required": ["first name", "über", "a\"b"], "additionalProperties": false}),
        json!({"anyOf": [string, {"type": "integer", "minimum": 0, "maximum": 99}, {"type": "array", "items": string, "maxItems": 2}]}),
        json!({"oneOf": [
            {"type": "object", "properties": {"kind": {"const": "circle"}, "r": {"type": "integer", "minimum": 1, "maximum": 9}},
                "required": ["kind", "r"], "additionalProperties": false},
            {"type": "object", "properties": {"kind": {"const": "point"}}, "required": ["kind"], "additionalProperties": false}]}),
        json!({"allOf": [{"type": "object", "properties": {"a": string}, "required": ["a"]}, {"properties": {"b": {"type": "boolean"}}, "required": ["b"]}],
            "additionalProperties": false, "properties": {"a": true, "b": true}}),
        json!({"$defs": {"node": {"type": "object", "properties": {"value": {"type": "integer", "minimum": 0, "maximum": 9},
                "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}}, "required": ["value", "next"], "additionalProperties": false}},
            "$ref": "#/$defs/node"}),
        json!({"definitions": {"point": {"type": "array", "items": {"type": "integer", "minimum": -9, "maximum": 9}, "minItems": 2, "maxItems": 2}},
            "type": "object", "properties": {"from": {"$ref": "#/definitions/point"}, "to": {"$ref": "#/definitions/point"}},
            "required": ["from", "to"], "additionalProperties": false}),
        json!({"type": "object", "patternProperties": {"^x-[a-z]{1,3}$": {"type": "integer", "minimum": 0, "maximum": 9}},
            "additionalProperties": false, "minProperties": 1, "maxProperties": 1}),
    ]
}

/// A schema made up from `rng`, `depth` levels deep at most. `refs`: whether it may name definitions.
fn made_up(rng: &mut Rng, depth: usize, refs: bool) -> Value {
    let kinds = if depth == 0 { 7 } else { 12 };
    match rng.below(kinds) {
        0 => json!({"type": "boolean"}),
        1 => json!({"type": "null"}),
        2 => {
            let low = rng.below(2000) as i64 - 1000;
            json!({"type": "integer", "minimum": low, "maximum": low + rng.below(5000) as i64})
        }
        3 => {
            json!({"type": "number", "minimum": -(rng.below(9) as f64) - 0.5, "exclusiveMaximum": rng.below(900) as f64 + 0.25})
        }
        4 => {
            let low = rng.below(4);
            json!({"type": "string", "minLength": low, "maxLength": low + rng.below(9)})
        }
        5 => {
            let all = [
                json!("a"),
                json!("b c"),
                json!("ü"),
                json!(1),
                json!(-2.5),
                json!(null),
                json!(true),
                json!([]),
                json!({"k": "v"}),
            ];
            let mut some: Vec<Value> = all.into_iter().filter(|_| rng.below(2) == 0).collect();
            some.push(json!("z"));
            json!({"enum": some})
        }
        6 if refs => json!({"$ref": format!("#/$defs/d{}", rng.below(3))}),
        6 => {
            let patterns = ["^[a-f0-9]{4}$", "^(yes|no|maybe)$", "^v[0-9]\\.[0-9]$"];
            json!({"type": "string", "pattern": patterns[rng.below(3)]})
        }
        7 | 8 => {
            let low = rng.below(3);
            json!({"type": "array", "items": made_up(rng, depth - 1, refs), "minItems": low, "maxItems": low + rng.below(3)})
        }
        9 => {
            // What is of one type only can be told apart.
            let mut options = vec![made_up(rng, depth - 1, refs), made_up(rng, depth - 1, refs)];
            options.push(json!({"type": "null"}));
            json!({ "anyOf": options })
        }
        _ => {
            let mut properties = Map::new();
            let mut required = Vec::new();
            for name in ["a", "name", "list of", "ß", "n/m"].into_iter().take(1 + rng.below(5)) {
                properties.insert(name.into(), made_up(rng, depth - 1, refs));
                if rng.below(3) > 0 {
                    required.push(name);
                }
            }
            json!({"type": "object", "properties": properties, "required": required, "additionalProperties": false})
        }
    }
}

/// One of `count` parts of 200 schemas, so that tests share the work.
fn part(part: usize, count: usize) {
    let demo = Demo::new();
    let mut schemas = written();
    let mut rng = Rng(11);
    while schemas.len() < 200 {
        let definitions: Map<String, Value> = (0..3).map(|i| (format!("d{i}"), made_up(&mut rng, 1, false))).collect();
        let mut schema = made_up(&mut rng, 3, true);
        schema["$defs"] = Value::Object(definitions);
        schemas.push(schema);
    }
    for (i, schema) in schemas.iter().enumerate().filter(|(i, _)| i % count == part) {
        demo.check(schema, 1.5, i as u64);
    }
}

#[test]
fn hot_answers_fit_part_1() {
    part(0, 2);
}

#[test]
fn hot_answers_fit_part_2() {
    part(1, 2);
}

#[test]
fn without_bounds_and_without_temperature() {
    let demo = Demo::new();
    demo.check(
        &json!({"type": "object", "properties": {"answer": {"type": "string"}}, "required": ["answer"]}),
        0.0,
        0,
    );
    demo.check(&json!({"type": "array", "items": {"type": "string", "maxLength": 30}, "maxItems": 5}), 0.0, 0);
    demo.check(&json!({"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3}), 0.0, 0);
    demo.check(&json!({"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"], "additionalProperties": false}), 1.0, 5);
}

/// An answer that is cut off says so, and is the beginning of the whole one.
#[test]
fn a_limit_cuts_the_answer() {
    let demo = Demo::new();
    let schema = json!({"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 50, "maxItems": 50});
    let whole = demo.reply(&schema, 1.5, 3, usize::MAX);
    for limit in [1, 2, 20] {
        let cut = demo.reply(&schema, 1.5, 3, limit);
        assert_eq!((cut.end, cut.usage.generated), (End::Length, limit));
        assert!(whole.answer.starts_with(&cut.answer) && !cut.answer.ends_with(']'));
    }
    // Nothing can follow the bracket, so that a limit of exactly the answer's tokens does not cut it.
    let exact = demo.reply(&schema, 1.5, 3, whole.usage.generated);
    assert_eq!((exact.end, exact.answer), (End::Stop, whole.answer));
}
