//! What may come next in a reply: budgets for thoughts, and answers held to a JSON schema.
//!
//! Before each token a [`Guide`] says which ones may follow, or which one must; after it, it is told which came and
//! where in the format the reply stands now. So it works on tokens, streams, and knows nothing of logits.
//!
//! A thought whose budget is spent is closed with the tokens the template closes thoughts with, and no other is begun.
//! A schema holds for the answer: in front of it the model may think, if thinking is on, and call tools, if it has any.

mod schema;

use std::collections::VecDeque;

use crate::Result;
use crate::channel::Place;
use crate::sample::Allowed;
use crate::tokenizer::Tokenizer;
use schema::Answer;
pub use schema::Schema;

/// What a reply is held to.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rules<'r> {
    /// Tokens of thought at most; then the answer begins.
    pub think_budget: Option<usize>,
    /// What the answer must be.
    pub schema: Option<&'r Schema>,
    /// Whether the model may think in front of an answer with a schema.
    pub think: bool,
    /// Whether the model may call tools in front of an answer with a schema.
    pub tools: bool,
}

/// How the next token is found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Next<'g> {
    /// It is this one.
    Forced(u32),
    /// It is drawn.
    Drawn(Allowed<'g>),
}

/// Follows one reply.
pub struct Guide {
    /// `<|channel>`, if a thought may not begin any more.
    closed: Option<u32>,
    open: Option<u32>,
    call: Option<u32>,
    stops: Vec<u32>,
    /// How a thought begins behind its marker, and how it ends.
    name: Vec<u32>,
    end: Vec<u32>,
    left: Option<usize>,
    think: bool,
    tools: bool,
    place: Place,
    forced: VecDeque<u32>,
    answer: Option<Answer>,
    /// A tool has been called: of an answer with a schema nothing follows.
    called: bool,
    /// What [`Next::Drawn`] borrows.
    bits: Vec<u32>,
}

impl Guide {
    /// At the beginning of a reply that stands at `place`.
    pub fn new(tokenizer: &Tokenizer, place: Place, rules: Rules) -> Guide {
        let open = tokenizer.id_of("<|channel>");
        let mut end = tokenizer.encode("\n", false);
        let close = tokenizer.id_of("<channel|>");
        end.extend(close);
        let mut guide = Guide {
            closed: None,
            open,
            call: tokenizer.id_of("<|tool_call>"),
            stops: tokenizer.stop_tokens().to_vec(),
            name: tokenizer.encode("thought\n", false),
            end,
            // Without the marker that ends a thought there are none to end.
            left: rules.think_budget.filter(|_| close.is_some()),
            think: rules.think,
            tools: rules.tools,
            place,
            forced: VecDeque::new(),
            answer: rules.schema.map(Schema::begin),
            called: false,
            bits: Vec::new(),
        };
        guide.spend(0);
        guide
    }

    /// How the next token is found.
    ///
    /// # Errors
    /// When the schema takes more time or memory than it may.
    pub fn follows(&mut self) -> Result<Next<'_>> {
        if let Some(&token) = self.forced.front() {
            return Ok(Next::Forced(token));
        }
        let Some(answer) = &mut self.answer else {
            return Ok(Next::Drawn(self.closed.as_ref().map_or(Allowed::All, |open| Allowed::Without(slice(open)))));
        };
        let allowed = match self.place {
            // The answer is still to come.
            Place::Name | Place::Thought => Allowed::Without(&self.stops),
            Place::Call => Allowed::All,
            Place::Answer if self.called => {
                self.bits.clear();
                self.stops.iter().chain(&self.call).for_each(|&token| set(&mut self.bits, token));
                Allowed::Among(&self.bits)
            }
            Place::Answer => {
                let begun = answer.begun();
                answer.allowed(&mut self.bits)?;
                if !begun {
                    let open = self.open.filter(|_| self.think && self.closed.is_none());
                    let call = self.call.filter(|_| self.tools);
                    open.iter().chain(&call).for_each(|&token| set(&mut self.bits, token));
                }
                Allowed::Among(&self.bits)
            }
        };
        Ok(Next::Drawn(allowed))
    }

    /// Takes the token that came; the reply stands at `place` now.
    ///
    /// # Errors
    /// As [`Guide::follows`].
    pub fn push(&mut self, token: u32, place: Place) -> Result<()> {
        self.forced.pop_front();
        let before = std::mem::replace(&mut self.place, place);
        match before {
            Place::Answer if self.called || Some(token) == self.call => {}
            Place::Answer if Some(token) == self.open => {
                if self.answer.is_some() {
                    // What follows the marker must be a thought.
                    self.forced.extend(&self.name);
                }
            }
            Place::Answer => {
                if let Some(answer) = &mut self.answer {
                    answer.push(token)?;
                }
            }
            Place::Name => self.spend(0),
            Place::Thought => self.spend(1),
            Place::Call => self.called |= place == Place::Answer,
        }
        Ok(())
    }

    /// Whether the answer is whole and nothing can follow.
    pub fn done(&self) -> bool {
        self.place == Place::Answer && self.answer.as_ref().is_some_and(Answer::done)
    }

    /// Takes `tokens` of thought off the budget and ends what it does not cover.
    fn spend(&mut self, tokens: usize) {
        let Some(left) = &mut self.left else { return };
        *left = left.saturating_sub(tokens);
        if *left == 0 {
            self.closed = self.open;
            if self.place == Place::Thought && self.forced.is_empty() {
                self.forced.extend(&self.end);
            }
        }
    }
}

fn slice(token: &u32) -> &[u32] {
    std::slice::from_ref(token)
}

/// Sets the bit of `token`.
fn set(bits: &mut Vec<u32>, token: u32) {
    let word = token as usize / 32;
    if bits.len() <= word {
        bits.resize(word + 1, 0);
    }
    bits[word] |= 1 << (token % 32);
}
