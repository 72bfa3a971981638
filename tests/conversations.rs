//! A conversation that is stopped and restored after every step says what one says that never stopped; and what happens to either when
//! the context is full.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::atomic::AtomicBool;

use gemrun::gguf::Gguf;
use gemrun::kv::KvType;
use gemrun::model::Model;
use gemrun::registry;
use gemrun::sample::Sampling;
use gemrun::session::{Event, Options, Overflow, Reply, Session};
use gemrun::template::Template;
use gemrun::tokenizer::Tokenizer;

/// A model that is part of the program.
struct Loaded {
    model: Model,
    tokenizer: Tokenizer,
    template: Template,
}

impl Loaded {
    fn new(name: &str) -> Loaded {
        let gguf = Gguf::from_static(name, registry::embedded(name).unwrap()).unwrap();
        Loaded {
            model: Model::load(&gguf, &Default::default()).unwrap(),
            tokenizer: Tokenizer::from_gguf(&gguf).unwrap(),
            template: Template::from_gguf(&gguf).unwrap(),
        }
    }

    fn session(&self, kv: KvType, context: usize, overflow: Overflow) -> Session<'_> {
        let options = Options {
            context,
            batch: 32,
            kv,
            threads: 1,
            sampling: Sampling { temperature: 1.0, seed: 5, ..Sampling::default() },
            ignore_stops: true,
            think: false,
            think_budget: None,
            tools: Vec::new(),
            schema: None,
            system: Some("You are the assistant of a lighthouse keeper.".into()),
            overflow,
        };
        let mut session = Session::new(&self.model, &self.tokenizer, Some(self.template.clone()), options).unwrap();
        session.identify("demo", Vec::new());
        session
    }
}

#[derive(Clone, Copy)]
enum Step {
    Say(&'static str),
    Again,
    Instead(&'static str),
    Undo,
}

/// Does it; the reply, and what was noted on the way.
fn step(session: &mut Session, step: Step, limit: usize) -> (Option<Reply>, Vec<String>) {
    let (interrupt, mut notes) = (AtomicBool::new(false), Vec::new());
    let mut on = |event: Event| {
        if let Event::Note(note) = event {
            notes.push(note.to_string());
        }
        ControlFlow::Continue(())
    };
    let reply = match step {
        Step::Say(message) => Some(session.reply(message, limit, &interrupt, &mut on)),
        Step::Again => session.regenerate(limit, &interrupt, &mut on),
        Step::Instead(message) => Some(session.instead(message, limit, &interrupt, &mut on)),
        Step::Undo => {
            session.undo();
            None
        }
    };
    (reply.map(Result::unwrap), notes)
}

/// The session of another process that goes on with the same conversation.
fn continued<'m>(loaded: &'m Loaded, session: &Session, folder: &Path, kv: KvType) -> Session<'m> {
    let options = session.options();
    let mut next = loaded.session(kv, options.context, options.overflow);
    next.set_history(session.history().to_vec());
    let (turns, summary) = session.left_out();
    next.leave_out(turns, summary.map(str::to_string));
    next.set_seed(options.sampling.seed);
    let tokens = next.keep_in(folder).unwrap();
    assert!(tokens > 0 && next.take_notes().is_empty());
    next
}

/// Every step by a new session from the disk, against one that never stops; with turns longer than what sliding layers keep, taken
/// back and answered anew, and with a context that is too small for all of them.
#[test]
fn stopping_changes_nothing() {
    use Step::{Again, Instead, Say, Undo};
    let steps = [
        Say("What is gemrun?"),
        Say("Tell me a long story about a lamp"),
        Again,
        Undo,
        Say("Another one"),
        Instead("A third one"),
        Say("And who are you?"),
        Undo,
        Undo,
        Say("What was I asking?"),
        Say("Go on"),
        Say("Go on, please"),
        Again,
        Say("And the end?"),
    ];
    for (name, kv) in [("demo", KvType::Int8), ("demo-mobile", KvType::Mixed)] {
        let loaded = Loaded::new(name);
        let folder = tempfile::tempdir().unwrap();
        let mut whole = loaded.session(kv, 500, Overflow::Shift);
        let mut stopped = loaded.session(kv, 500, Overflow::Shift);
        stopped.keep_in(folder.path()).unwrap();
        let (mut reused, mut computed, mut shifts) = (0, 0, 0);
        for (i, next) in steps.into_iter().enumerate() {
            let (expected, notes) = step(&mut whole, next, 100);
            let (reply, same_notes) = step(&mut stopped, next, 100);
            assert_eq!(notes, same_notes, "{name} {kv:?}: step {i}");
            shifts += notes.len();
            assert_eq!(whole.history(), stopped.history(), "{name} {kv:?}: step {i}");
            assert_eq!(whole.left_out(), stopped.left_out(), "{name} {kv:?}: step {i}");
            if let (Some(expected), Some(reply)) = (expected, reply) {
                assert_eq!((expected.answer, expected.end), (reply.answer, reply.end), "{name} {kv:?}: step {i}");
                reused += reply.usage.reused;
                computed += reply.usage.prompt - reply.usage.reused;
            }
            stopped.save().unwrap();
            stopped = continued(&loaded, &stopped, folder.path(), kv);
        }
        println!("{name} {kv:?}: {reused} prompt tokens reused, {computed} computed, {shifts} shifts");
        assert!(
            shifts > 0 && whole.left_out().0 > 0 && reused > 3 * computed,
            "{name}: {reused}, {computed}, {shifts}"
        );
    }
}

/// What is unchanged is not read again, though sliding layers have forgotten it.
#[test]
fn taking_back_long_turns_reads_nothing_again() {
    let loaded = Loaded::new("demo");
    let folder = tempfile::tempdir().unwrap();
    let mut session = loaded.session(KvType::F16, 2048, Overflow::Stop);
    session.keep_in(folder.path()).unwrap();
    let say = |session: &mut Session, message, limit| {
        let reply = step(session, Step::Say(message), limit).0.unwrap();
        session.save().unwrap();
        reply
    };
    say(&mut session, "What is gemrun?", 60);
    let long = say(&mut session, "Tell me everything", 700);
    assert_eq!(long.usage.generated, 700);
    let window = loaded.model.config.window;
    assert!(session.held() > 600 + window, "the ring has come round");
    let again = step(&mut session, Step::Again, 10).0.unwrap();
    let new = again.usage.prompt - again.usage.reused;
    assert!(new <= 64, "{new} of {} tokens read again", again.usage.prompt);
    session.undo();
    session.undo();
    let first = say(&mut session, "What is it?", 10);
    let new = first.usage.prompt - first.usage.reused;
    assert!(new <= 64 && first.usage.reused > 5, "{new} of {} tokens read again", first.usage.prompt);
    // Another conversation with the same system prompt begins with it.
    let mut other = loaded.session(KvType::F16, 2048, Overflow::Stop);
    other.identify("demo", vec![folder.path().to_path_buf()]);
    let begun = step(&mut other, Step::Say("Good morning to you"), 4).0.unwrap();
    println!("{} of {} tokens taken from another conversation", begun.usage.reused, begun.usage.prompt);
    assert!(begun.usage.reused >= 12, "{}", begun.usage.reused);
}

#[test]
fn a_full_context_is_announced() {
    let loaded = Loaded::new("demo");
    for overflow in [Overflow::Stop, Overflow::Shift, Overflow::Compact] {
        let mut session = loaded.session(KvType::F16, 400, overflow);
        let mut notes = Vec::new();
        let mut refused = None;
        for i in 0..8 {
            let interrupt = AtomicBool::new(false);
            let mut on = |event: Event| {
                if let Event::Note(note) = event {
                    notes.push(note.to_string());
                }
                ControlFlow::Continue(())
            };
            match session.reply("Tell me about lamps and ships", 60, &interrupt, &mut on) {
                Ok(reply) => assert!(reply.usage.prompt + reply.usage.generated <= 401, "{overflow:?}: {i}"),
                Err(error) => {
                    refused = Some(error.to_string());
                    break;
                }
            }
        }
        let (turns, summary) = session.left_out();
        match overflow {
            Overflow::Stop => {
                assert!(refused.unwrap().contains("expected at most 400, the context") && notes.is_empty());
            }
            Overflow::Shift => {
                assert!(refused.is_none() && turns >= 2 && summary.is_none());
                assert!(notes[0].starts_with("the context is full: the oldest ") && notes[0].ends_with(" left out"));
            }
            Overflow::Compact => {
                assert!(
                    refused.is_none() && turns >= 2 && summary.is_some_and(|s| !s.is_empty()),
                    "{turns} {summary:?}"
                );
                assert!(notes[0].ends_with(" summed up"), "{notes:?}");
                assert_eq!(session.history().len(), 16, "nothing is forgotten");
            }
        }
    }
}

/// A document that was read beforehand costs the question alone.
#[test]
fn a_document_is_read_once() {
    let loaded = Loaded::new("demo-mobile");
    let folder = tempfile::tempdir().unwrap();
    let interrupt = AtomicBool::new(false);
    let document = "The lamp is lit at dusk.\nThe ships see it from afar.\n".repeat(40);
    let mut session = loaded.session(KvType::Mixed, 2000, Overflow::Stop);
    session.keep_in(folder.path()).unwrap();
    let read = session.read_document(&document, &interrupt, &mut |_| ControlFlow::Continue(())).unwrap();
    assert!(read.prompt > 500 && read.generated == 0, "{}", read.prompt);
    session.save().unwrap();
    let ask = |question: &str, folders| {
        let mut session = loaded.session(KvType::Mixed, 2000, Overflow::Stop);
        session.identify("demo", folders);
        let message = gemrun::session::before(&document, question);
        session.reply(&message, 8, &interrupt, &mut |_| ControlFlow::Continue(())).unwrap()
    };
    for question in ["When is the lamp lit?", "Who sees it?"] {
        let (warm, cold) = (ask(question, vec![folder.path().to_path_buf()]), ask(question, Vec::new()));
        assert_eq!((warm.usage.reused, cold.usage.reused), (read.prompt, 0), "{question}");
        assert_eq!(warm.answer, cold.answer);
    }
}
