//! A Jinja interpreter for sources nobody vouches for: minijinja with a meter on everything that can grow.
//!
//! minijinja counts instructions, but one instruction can double a string, so counting them bounds neither memory nor
//! time. Before a template runs, its compiled instructions are therefore rewritten: after each one that produces a
//! value the value is weighed, and what it weighs is taken from a budget that depends on the size of the input. Text
//! only leaves through a formatter that pays as well. No loader, no clock unless asked for, and only the filters that
//! chat templates use: there is nothing here to reach the machine with.
//!
//! minijinja exposes its compiler without a promise of stability, which is why its version is pinned.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use minijinja::machinery::{
    CodeGenerator, Instruction, Instructions, Token, eval, make_string_output, parse, tokenize,
};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Value, ValueKind, ValueOrKwargs};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Output, State, filters, functions, tests};
use minijinja_contrib::pycompat;

/// Calls of macros inside each other (each counts 4 in minijinja's measure, and the outermost level counts too).
const CALL_DEPTH: usize = 32;
/// Lists in lists in lists. Values are freed recursively, so this bounds the stack.
const NESTING: usize = 64;
/// Bytes of text that weigh as much as one list element or map entry.
const BYTES_PER_UNIT: usize = 64;

/// How much a rendering may do.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// Instructions, those of the meter included.
    pub(super) steps: u64,
    /// Weight of all values taken in hand, in units.
    pub(super) units: u64,
    /// Weight of one value, in units.
    pub(super) value_units: u64,
    /// Bytes of the rendered text.
    pub(super) output: usize,
}

/// Why a rendering ended without a text.
pub(super) enum Failure {
    /// The template called `raise_exception`: it does not like the messages.
    Raised(String),
    /// The template is broken, or asks for too much; with the line in its source where known.
    Broken(String, Option<usize>),
}

/// Syntax errors of `source`, found without running it.
pub(super) fn check(source: &str) -> Result<(), Failure> {
    compile(source).map(drop)
}

/// The text `source` makes of `variables`.
pub(super) fn render(source: &str, variables: Value, limits: Limits) -> Result<String, Failure> {
    let meter = Arc::new(Meter::new(limits));
    let environment = environment(&meter);
    let (main, blocks) = compile(source)?;
    let mut text = String::new();
    let result =
        eval(&environment, &main, variables, &blocks, &mut make_string_output(&mut text), AutoEscape::None).map(drop);
    match (result, meter.raised.get()) {
        (Ok(()), _) if text.len() > limits.output => {
            Err(Failure::Broken(format!("prints {} bytes: expected at most {}", text.len(), limits.output), None))
        }
        (Ok(()), _) => Ok(text),
        (Err(_), Some(message)) => Err(Failure::Raised(message.clone())),
        (Err(e), None) => Err(failure(&e)),
    }
}

fn failure(error: &Error) -> Failure {
    let mut innermost = error;
    while let Some(source) = std::error::Error::source(innermost).and_then(|e| e.downcast_ref::<Error>()) {
        innermost = source;
    }
    let what = match innermost.kind() {
        ErrorKind::OutOfFuel => "runs too long".to_string(),
        kind => innermost.detail().map_or_else(|| kind.to_string(), str::to_string),
    };
    Failure::Broken(what, innermost.line().or(error.line()))
}

type Blocks<'s> = std::collections::BTreeMap<&'s str, Instructions<'s>>;

/// Parses, compiles and puts the meter in.
fn compile(source: &str) -> Result<(Instructions<'_>, Blocks<'_>), Failure> {
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|e| failure(&e))?;
    scan(source, &syntax)?;
    let tree = parse(source, NAME, syntax).map_err(|e| failure(&e))?;
    let mut generator = CodeGenerator::new(NAME, source);
    generator.compile_stmt(&tree);
    let (main, blocks) = generator.finish();
    let blocks = blocks.into_iter().map(|(name, block)| (name, metered(&block, source))).collect();
    Ok((metered(&main, source), blocks))
}

const NAME: &str = "chat template";

/// Levels of an expression's syntax tree, and `elif`s: parser, compiler and destructors recurse on them.
const MAX_LEVELS: usize = 1024;
/// Words, numbers and signs between `{{ }}` and `{% %}`; published templates have some 4,000.
const MAX_TOKENS: usize = 1 << 17;

/// An open bracket, or a whole tag.
#[derive(Default)]
struct Group {
    /// A call or an index, not a value by itself.
    postfix: bool,
    /// Behind a `*`.
    starred: bool,
    /// Holds a string or a list that is not the operand of a call or an index.
    textual: bool,
    /// Operators since the last comma, and the deepest group among them.
    operators: usize,
    deepest: usize,
    /// Levels of the deepest item before the last comma.
    levels: usize,
}

impl Group {
    fn end_item(&mut self) {
        self.levels = self.levels.max(self.operators + self.deepest);
        (self.operators, self.deepest) = (0, 0);
    }
}

/// Refuses, before the parser sees it, a source that is nested too deeply or multiplies constant texts.
///
/// The parser limits brackets and blocks in each other, but not chains of operators, which are as deep to everything
/// that walks the tree. The compiler computes constants, so `'a' * 100000000` is a hundred megabytes before anything
/// is metered. Sources with other errors pass: the parser says it better.
fn scan(source: &str, syntax: &SyntaxConfig) -> Result<(), Failure> {
    let mut groups = vec![Group::default()];
    let mut operators = 0; // in all open groups
    let (mut tokens, mut elifs) = (0, 0);
    let mut before = Token::BlockEnd;
    let mut text = false;
    for token in tokenize(source, false, syntax.clone()) {
        let Ok((token, span)) = token else { break };
        let refuse = |what: &str| Err(Failure::Broken(what.to_string(), Some(span.start_line.into())));
        let star = matches!(before, Token::Mul);
        let closed_text = std::mem::take(&mut text); // the token before closed a bracket with text in it
        let Some(group) = groups.last_mut() else { break };
        match &token {
            Token::VariableStart | Token::BlockStart => {
                groups = vec![Group::default()];
                operators = 0;
            }
            Token::TemplateData(_)
            | Token::VariableEnd
            | Token::BlockEnd
            | Token::Int(_)
            | Token::Int128(_)
            | Token::Float(_) => {}
            Token::Str(_) | Token::String(_) => {
                if star {
                    return refuse("multiplies a text");
                }
                group.textual = true;
            }
            Token::ParenOpen | Token::BracketOpen | Token::BraceOpen => {
                let postfix = match before {
                    Token::Ident(name) => !KEYWORDS.contains(&name),
                    Token::ParenClose | Token::BracketClose | Token::BraceClose | Token::Str(_) | Token::String(_) => {
                        true
                    }
                    _ => false,
                };
                let textual = !matches!(token, Token::ParenOpen);
                groups.push(Group { postfix, starred: star, textual, ..Group::default() });
            }
            Token::ParenClose | Token::BracketClose | Token::BraceClose => {
                let Some(mut closed) = groups.pop() else { break };
                let Some(outer) = groups.last_mut() else { break };
                operators -= closed.operators;
                closed.end_item();
                outer.deepest = outer.deepest.max(closed.levels + 1);
                if closed.postfix {
                    outer.operators += 1;
                    operators += 1;
                } else if closed.textual {
                    if closed.starred {
                        return refuse("multiplies a text or a list");
                    }
                    outer.textual = true;
                    text = true;
                }
            }
            Token::Mul if matches!(before, Token::Str(_) | Token::String(_)) => return refuse("multiplies a text"),
            Token::Mul if closed_text => return refuse("multiplies a text or a list"),
            Token::Comma | Token::Colon => {
                operators -= group.operators;
                group.end_item();
            }
            Token::Ident(name) if !KEYWORDS.contains(name) => {}
            _ => {
                if matches!(token, Token::Ident("elif")) {
                    elifs += 1;
                }
                group.operators += 1;
                operators += 1;
            }
        }
        tokens += usize::from(!matches!(token, Token::TemplateData(_)));
        let levels = groups.last().map_or(0, |group| group.operators + group.deepest);
        if levels.max(operators + groups.len()).max(elifs) > MAX_LEVELS {
            return refuse("is nested too deeply");
        }
        if tokens > MAX_TOKENS {
            return refuse("is too long");
        }
        before = token;
    }
    Ok(())
}

/// Words that stand between values.
const KEYWORDS: [&str; 14] =
    ["and", "call", "do", "elif", "else", "filter", "for", "if", "in", "is", "not", "or", "set", "with"];

/// A copy of `code` with the meter's filters in it. Jumps are moved to where their targets went.
fn metered<'s>(code: &Instructions<'s>, source: &'s str) -> Instructions<'s> {
    use Instruction as I;
    let weigh = |out: &mut Vec<I<'s>>| out.push(I::ApplyFilter(WEIGH, Some(1), !0));
    let glance = |out: &mut Vec<I<'s>>| out.push(I::ApplyFilter(GLANCE, Some(1), !0));
    let mut groups: Vec<Vec<I<'s>>> = Vec::new();
    while let Some(instruction) = code.get(groups.len() as u32) {
        let mut group = Vec::with_capacity(1);
        match instruction {
            // Literal text goes the way of all other text.
            I::EmitRaw(text) => group.extend([I::LoadConst(Value::from(*text)), I::Emit]),
            I::Lookup(_) | I::GetAttr(_) | I::GetItem => {
                group.push(instruction.clone());
                glance(&mut group);
            }
            I::Add
            | I::Mul
            | I::StringConcat
            | I::Eq
            | I::Ne
            | I::Gt
            | I::Gte
            | I::Lt
            | I::Lte
            | I::In
            | I::CompareAndPreserve(_) => {
                weigh(&mut group);
                group.push(I::Swap);
                weigh(&mut group);
                group.push(I::Swap);
                if matches!(instruction, I::Mul) {
                    let factor = I::ApplyFilter(FACTOR, Some(1), !0);
                    group.extend([factor.clone(), I::Swap, factor, I::Swap]);
                }
                group.push(instruction.clone());
                if matches!(instruction, I::Add | I::Mul | I::StringConcat) {
                    weigh(&mut group);
                }
            }
            // The namespace lies on top of the value.
            I::SetAttr(_) => {
                group.extend([I::Swap, I::ApplyFilter(KEEP, Some(1), !0), I::Swap, instruction.clone()]);
            }
            // `loop.cycle()` panics in minijinja, `loop.changed(x)` compares at no charge; no chat template uses them.
            I::CallMethod("cycle" | "changed", count) => group.push(I::CallMethod("(unknown)", *count)),
            I::Slice
            | I::BuildList(_)
            | I::BuildTuple(_)
            | I::BuildMap(_)
            | I::EndCapture
            | I::ApplyFilter(..)
            | I::CallFunction(..)
            | I::CallMethod(..)
            | I::CallObject(_) => {
                group.push(instruction.clone());
                weigh(&mut group);
            }
            _ => group.push(instruction.clone()),
        }
        groups.push(group);
    }

    let mut starts = Vec::with_capacity(groups.len() + 1);
    starts.push(0);
    for group in &groups {
        starts.push(starts[starts.len() - 1] + group.len() as u32);
    }
    let moved = |target: &mut u32| {
        if let Some(&start) = starts.get(*target as usize) {
            *target = start;
        }
    };
    let mut out = Instructions::new(NAME, source);
    for (at, group) in groups.into_iter().enumerate() {
        for mut instruction in group {
            match &mut instruction {
                I::Iterate(target)
                | I::Jump(target)
                | I::JumpIfFalse(target)
                | I::JumpIfFalseOrPop(target)
                | I::JumpIfTrueOrPop(target)
                | I::BuildMacro(_, target, _) => moved(target),
                _ => {}
            }
            match (code.get_span(at as u32), code.get_line(at as u32)) {
                (Some(span), _) => out.add_with_span(instruction, span),
                (None, Some(line)) => out.add_with_line(instruction, line as u16),
                (None, None) => out.add(instruction),
            };
        }
    }
    out
}

/// Filter names that no source can spell.
const WEIGH: &str = "(weigh)";
const GLANCE: &str = "(glance)";
const KEEP: &str = "(keep)";
const FACTOR: &str = "(factor)";

/// The budget of one rendering.
struct Meter {
    limits: Limits,
    units: AtomicU64, // left
    raised: OnceLock<String>,
    /// Of the two factors of a multiplication the first that was looked at: its size, and whether it is a number.
    factor: Mutex<Option<(u64, bool)>>,
}

impl Meter {
    fn new(limits: Limits) -> Meter {
        Meter { limits, units: AtomicU64::new(limits.units), raised: OnceLock::new(), factor: Mutex::new(None) }
    }

    fn pay(&self, units: u64) -> Result<(), Error> {
        let left = self.units.load(Relaxed).checked_sub(units);
        self.units.store(left.ok_or_else(|| too_much("takes too much memory or time"))?, Relaxed);
        Ok(())
    }

    /// Pays for a text or a list by its length, but not for what is in it, and one unit for anything else.
    fn glance(&self, value: &Value) -> Result<(), Error> {
        let units = match value.as_str() {
            Some(text) => text.len() / BYTES_PER_UNIT,
            None => value.len().unwrap_or(0) / 8,
        };
        self.pay(1 + units as u64)
    }

    /// Refuses a multiplication that would make too long a text or list before it is made. Called for both factors.
    fn factor(&self, value: &Value) -> Result<(), Error> {
        let number = value.kind() == ValueKind::Number;
        let size = match value.as_str() {
            Some(text) => text.len() as u64,
            None if number => u64::try_from(value.clone()).unwrap_or(0), // texts cannot be repeated that often anyway
            None => value.len().unwrap_or(0) as u64,
        };
        let mut first = self.factor.lock().unwrap_or_else(PoisonError::into_inner);
        match first.take() {
            None => *first = Some((size, number)),
            Some((_, true)) if number => {}
            Some((other, _)) if size.saturating_mul(other) / BYTES_PER_UNIT as u64 > self.limits.value_units => {
                return Err(too_much("makes too large a value"));
            }
            Some(_) => {}
        }
        Ok(())
    }

    /// Pays for a value that a namespace is to hold. A namespace outlives the turns of a loop: with another one,
    /// a macro or a loop in it, a template could build rings and chains that end the stack of whatever walks them.
    fn keep(&self, value: &Value) -> Result<(), Error> {
        fn plain(value: &Value) -> bool {
            match value.kind() {
                ValueKind::Seq | ValueKind::Iterable => {
                    value.try_iter().is_ok_and(|mut items| items.all(|item| plain(&item)))
                }
                ValueKind::Map => {
                    let name = value.as_object().map_or("", |object| object.type_name());
                    !["Namespace", "Macro", "Loop", "Module"].iter().any(|type_name| name.contains(type_name))
                        && value.try_iter().is_ok_and(|mut keys| {
                            keys.all(|key| plain(&key) && value.get_item(&key).is_ok_and(|item| plain(&item)))
                        })
                }
                ValueKind::Plain => false,
                _ => true,
            }
        }
        self.weigh(value)?;
        if plain(value) { Ok(()) } else { Err(too_much("keeps something other than data in a namespace")) }
    }

    /// Pays for a value and all that is in it, each time it is in it.
    fn weigh(&self, value: &Value) -> Result<(), Error> {
        let mut left = self.limits.value_units;
        self.weigh_within(value, &mut left, NESTING)
    }

    fn weigh_within(&self, value: &Value, left: &mut u64, depth: usize) -> Result<(), Error> {
        let own = 1 + (value.as_str().map_or(0, str::len) / BYTES_PER_UNIT) as u64;
        *left = left.checked_sub(own).ok_or_else(|| too_much("makes too large a value"))?;
        self.pay(own)?;
        if !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map) {
            return Ok(());
        }
        let depth = depth.checked_sub(1).ok_or_else(|| too_much("nests values too deeply"))?;
        let map = value.kind() == ValueKind::Map;
        let Ok(items) = value.try_iter() else { return Ok(()) };
        for item in items {
            self.weigh_within(&item, left, depth)?;
            if map && let Ok(entry) = value.get_item(&item) {
                self.weigh_within(&entry, left, depth)?;
            }
        }
        Ok(())
    }

    /// What `filter(args)` may at most print, for the two that multiply.
    fn weigh_call(&self, name: &str, args: &[Value]) -> Result<(), Error> {
        for value in args {
            self.weigh(value)?;
        }
        let len = |i: usize| args.get(i).and_then(Value::as_str).map_or(0, str::len);
        let bytes = match name {
            "replace" => (len(0) / len(1).max(1) + 1).saturating_mul(len(2)),
            "join" => {
                let (items, glue) = if args.first().is_some_and(|v| v.as_str().is_some()) { (1, 0) } else { (0, 1) };
                args.get(items).and_then(Value::len).unwrap_or(0).saturating_mul(len(glue))
            }
            _ => 0,
        };
        let units = (bytes / BYTES_PER_UNIT) as u64;
        if units > self.limits.value_units {
            return Err(too_much("makes too large a value"));
        }
        self.pay(units)
    }
}

/// A list instead of something that would compute one: else each use of it would cost again, and chains of them would
/// be walked recursively.
fn at_hand(value: Value) -> Value {
    match value.kind() {
        ValueKind::Iterable => value.try_iter().map(|items| items.collect::<Vec<Value>>().into()).unwrap_or(value),
        _ => value,
    }
}

fn too_much(what: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}

/// Everything a template can call, and nothing else.
fn environment(meter: &Arc<Meter>) -> Environment<'static> {
    let mut env = Environment::empty();
    env.set_fuel(Some(meter.limits.steps));
    env.set_recursion_limit(4 * CALL_DEPTH + NESTING);
    env.set_auto_escape_callback(|_| AutoEscape::None);

    let own = meter.clone();
    env.set_formatter(move |out: &mut Output<'_>, _: &mut State<'_, '_>, value: &Value| {
        own.weigh(value)?;
        let text = python_text(value);
        let text = value.as_str().unwrap_or(&text);
        out.write_str(text).map_err(Error::from)
    });
    let own = meter.clone();
    env.add_filter(WEIGH, move |value: ValueOrKwargs| own.weigh(&value).map(|()| at_hand(value.into_value())));
    let own = meter.clone();
    env.add_filter(FACTOR, move |value: Value| own.factor(&value).map(|()| value));
    let own = meter.clone();
    env.add_filter(KEEP, move |value: Value| own.keep(&value).map(|()| value));
    let own = meter.clone();
    env.add_filter(GLANCE, move |value: ValueOrKwargs| own.glance(&value).map(|()| value.into_value()));

    let text = |f: fn(&str) -> String| Value::from_function(move |value: Value| f(&python_text(&value)));
    let all_filters = [
        ("abs", Value::from_function(filters::abs)),
        ("attr", Value::from_function(filters::attr)),
        ("bool", Value::from_function(filters::bool)),
        ("capitalize", Value::from_function(filters::capitalize)),
        ("count", Value::from_function(filters::length)),
        ("d", Value::from_function(filters::default)),
        ("default", Value::from_function(filters::default)),
        ("dictsort", Value::from_function(filters::dictsort)),
        ("first", Value::from_function(filters::first)),
        ("float", Value::from_function(filters::float)),
        ("int", Value::from_function(filters::int)),
        ("items", Value::from_function(filters::items)),
        ("join", Value::from_function(filters::join)),
        ("last", Value::from_function(filters::last)),
        ("length", Value::from_function(filters::length)),
        ("lines", Value::from_function(filters::lines)),
        ("list", Value::from_function(filters::list)),
        ("lower", text(str::to_lowercase)),
        ("map", Value::from_function(filters::map)),
        ("max", Value::from_function(filters::max)),
        ("min", Value::from_function(filters::min)),
        ("reject", Value::from_function(filters::reject)),
        ("rejectattr", Value::from_function(filters::rejectattr)),
        ("replace", Value::from_function(filters::replace)),
        ("reverse", Value::from_function(filters::reverse)),
        ("round", Value::from_function(filters::round)),
        ("safe", Value::from_function(|value: Value| value)),
        ("select", Value::from_function(filters::select)),
        ("selectattr", Value::from_function(filters::selectattr)),
        ("sort", Value::from_function(filters::sort)),
        ("split", Value::from_function(filters::split)),
        ("string", text(str::to_string)),
        ("sum", Value::from_function(filters::sum)),
        ("title", Value::from_function(filters::title)),
        ("tojson", Value::from_function(python_json)),
        (
            "trim",
            Value::from_function(|value: Value, chars: Option<String>| {
                // Python also strips the four separators U+001C to U+001F.
                let strip = |c: char| match &chars {
                    Some(chars) => chars.contains(c),
                    None => c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c),
                };
                python_text(&value).trim_matches(strip).to_string()
            }),
        ),
        ("unique", Value::from_function(filters::unique)),
        ("upper", text(str::to_uppercase)),
    ];
    for (name, filter) in all_filters {
        let own = meter.clone();
        env.add_filter(name, move |state: &mut State<'_, '_>, args: Rest<ValueOrKwargs>| {
            let args = args.into_values();
            own.weigh_call(name, &args)?;
            filter.call(state, &args)
        });
    }

    const METHODS: [&str; 27] = [
        "capitalize",
        "count",
        "endswith",
        "find",
        "get",
        "isalnum",
        "isalpha",
        "isdigit",
        "islower",
        "isnumeric",
        "isspace",
        "isupper",
        "items",
        "join",
        "keys",
        "lower",
        "lstrip",
        "replace",
        "rfind",
        "rstrip",
        "split",
        "splitlines",
        "startswith",
        "strip",
        "title",
        "upper",
        "values",
    ];
    let own = meter.clone();
    env.set_unknown_method_callback(move |state, value, method, args| {
        if !METHODS.contains(&method) {
            return Err(Error::from(ErrorKind::UnknownMethod));
        }
        if value.kind() == ValueKind::String || method == "count" {
            let all: Vec<Value> = std::iter::once(value).chain(args).cloned().collect();
            own.weigh_call(method, &all)?;
        }
        pycompat::unknown_method_callback(state, value, method, args)
    });

    env.add_test("boolean", tests::is_boolean);
    env.add_test("defined", tests::is_defined);
    env.add_test("divisibleby", tests::is_divisibleby);
    env.add_test("endingwith", tests::is_endingwith);
    env.add_test("even", tests::is_even);
    env.add_test("false", tests::is_false);
    env.add_test("float", tests::is_float);
    env.add_test("integer", tests::is_integer);
    env.add_test("iterable", tests::is_iterable);
    env.add_test("lower", tests::is_lower);
    env.add_test("mapping", tests::is_mapping);
    env.add_test("none", tests::is_none);
    env.add_test("number", tests::is_number);
    env.add_test("odd", tests::is_odd);
    env.add_test("sequence", tests::is_sequence);
    env.add_test("startingwith", tests::is_startingwith);
    env.add_test("string", tests::is_string);
    env.add_test("true", tests::is_true);
    env.add_test("undefined", tests::is_undefined);
    env.add_test("upper", tests::is_upper);
    for name in ["eq", "equalto", "==", "ne", "!=", "in"] {
        let own = meter.clone();
        env.add_test(name, move |a: &Value, b: &Value| -> Result<bool, Error> {
            own.weigh(a)?;
            own.weigh(b)?;
            match name {
                "in" => Ok(b.as_str().zip(a.as_str()).map_or_else(
                    || b.try_iter().is_ok_and(|mut items| items.any(|item| item == *a)),
                    |(b, a)| b.contains(a),
                )),
                "ne" | "!=" => Ok(a != b),
                _ => Ok(a == b),
            }
        });
    }

    env.add_function("dict", functions::dict);
    env.add_function("namespace", functions::namespace);
    env.add_function("range", functions::range);
    env.add_function("strftime_now", |format: &str| date(format, std::time::SystemTime::now()));
    let own = meter.clone();
    env.add_function("raise_exception", move |message: Value| -> Result<Value, Error> {
        own.weigh(&message)?;
        let _ = own.raised.set(python_text(&message));
        Err(too_much("raised an exception"))
    });
    env
}

/// `value` as Python's `str` prints it, which is what templates are written against.
fn python_text(value: &Value) -> String {
    let mut out = String::new();
    match value.as_str() {
        Some(text) => out.push_str(text),
        None => write_python(&mut out, value),
    }
    out
}

fn write_python(out: &mut String, value: &Value) {
    let mut list = |open: char, close: char, map: bool| {
        out.push(open);
        for (i, item) in value.try_iter().into_iter().flatten().enumerate() {
            if i > 0 {
                out.push_str(", ");
            }
            write_python(out, &item);
            if map {
                out.push_str(": ");
                write_python(out, &value.get_item(&item).unwrap_or_default());
            }
        }
        out.push(close);
    };
    match value.kind() {
        ValueKind::Undefined => {}
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Seq | ValueKind::Iterable => list('[', ']', false),
        ValueKind::Map => list('{', '}', true),
        ValueKind::Number if !value.is_integer() => match f64::try_from(value.clone()) {
            Ok(x) => out.push_str(&python_float(x)),
            Err(_) => out.push_str(&value.to_string()),
        },
        ValueKind::String => {
            let text = value.as_str().unwrap_or_default();
            let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
            out.push(quote);
            for c in text.chars() {
                match c {
                    '\n' => out.push_str("\\n"),
                    '\r' => out.push_str("\\r"),
                    '\t' => out.push_str("\\t"),
                    '\\' => out.push_str("\\\\"),
                    c if c == quote => out.extend(['\\', c]),
                    c => out.push(c),
                }
            }
            out.push(quote);
        }
        _ => out.push_str(&value.to_string()),
    }
}

/// Shortest digits that read back; an exponent of at least two digits below 1e-4 and from 1e16 on.
fn python_float(x: f64) -> String {
    if !x.is_finite() || x == 0.0 || (1e-4..1e16).contains(&x.abs()) {
        return format!("{x:?}").replace("NaN", "nan");
    }
    let text = format!("{x:e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |rest| ('-', rest));
    format!("{digits}e{sign}{exponent:0>2}")
}

/// `tojson` as chat templates expect it: Python's separators, no escaping of non-ASCII or HTML characters.
fn python_json(value: &Value, indent: Option<ValueOrKwargs>) -> Result<String, Error> {
    let indent = match indent {
        Some(arg) => match Kwargs::try_from((*arg).clone()) {
            Ok(named) => named.get::<Option<usize>>("indent").ok().flatten(),
            Err(_) => arg.as_usize(),
        },
        None => None,
    };
    let mut out = String::new();
    write_json(&mut out, value, indent.map(|n| n.min(16)), 0);
    Ok(out)
}

fn write_json(out: &mut String, value: &Value, indent: Option<usize>, level: usize) {
    let map = value.kind() == ValueKind::Map;
    match value.kind() {
        ValueKind::Undefined | ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::String => out.push_str(&serde_json::Value::from(value.as_str().unwrap_or_default()).to_string()),
        ValueKind::Seq | ValueKind::Iterable | ValueKind::Map => {
            out.push(if map { '{' } else { '[' });
            let mut any = false;
            for item in value.try_iter().into_iter().flatten() {
                if any {
                    out.push_str(if indent.is_some() { "," } else { ", " });
                }
                any = true;
                if let Some(n) = indent {
                    let _ = write!(out, "\n{:width$}", "", width = n * (level + 1));
                }
                if map {
                    out.push_str(&serde_json::Value::from(python_text(&item)).to_string());
                    out.push_str(": ");
                    write_json(out, &value.get_item(&item).unwrap_or_default(), indent, level + 1);
                } else {
                    write_json(out, &item, indent, level + 1);
                }
            }
            if let Some(n) = indent.filter(|_| any) {
                let _ = write!(out, "\n{:width$}", "", width = n * level);
            }
            out.push(if map { '}' } else { ']' });
        }
        _ => write_python(out, value),
    }
}

/// `strftime` of a time in UTC, for the directives that chat templates use.
fn date(format: &str, now: std::time::SystemTime) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let seconds = now.duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Count years from March, so that the leap day is the last; 400 years are 146,097 days.
    let since = days + 719_468;
    let (era, day) = (since / 146_097, since % 146_097);
    let of_era = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let of_year = day - (365 * of_era + of_era / 4 - of_era / 100);
    let march = (5 * of_year + 2) / 153;
    let (month, day) = ((march + 2) % 12, of_year - (153 * march + 2) / 5 + 1);
    let year = era * 400 + of_era + u64::from(month < 2);

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let _ = match chars.next() {
            Some('Y') => write!(out, "{year}"),
            Some('y') => write!(out, "{:02}", year % 100),
            Some('m') => write!(out, "{:02}", month + 1),
            Some('d') => write!(out, "{day:02}"),
            Some('e') => write!(out, "{day:2}"),
            Some('H') => write!(out, "{:02}", second / 3600),
            Some('M') => write!(out, "{:02}", second / 60 % 60),
            Some('S') => write!(out, "{:02}", second % 60),
            Some('B') => write!(out, "{}", MONTHS[month as usize]),
            Some('b') => write!(out, "{}", &MONTHS[month as usize][..3]),
            Some('A') => write!(out, "{}", DAYS[(days % 7) as usize]),
            Some('a') => write!(out, "{}", &DAYS[(days % 7) as usize][..3]),
            Some('F') => write!(out, "{year}-{:02}-{day:02}", month + 1),
            Some(other) => write!(out, "{}", if other == '%' { "%".to_string() } else { format!("%{other}") }),
            None => write!(out, "%"),
        };
    }
    out
}
