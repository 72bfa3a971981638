//! What becomes of a conversation that no longer fits in its context.
//!
//! Turns are what is left out, the oldest first and whole, never tokens from the middle of one; the system prompt stays. So many go
//! that the rest fills half of the context, for each time a prompt has to be read anew from behind the system prompt. With
//! [`Overflow::Compact`] the model first sums up what goes, and reads that in its place. Messages are not forgotten, only not shown.

use std::ops::ControlFlow;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use serde_json::{Value, json};

use super::{End, Event, Output, Session};
use crate::{Error, Result};

/// What happens when a conversation no longer fits in its context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overflow {
    /// Nothing: the message is refused.
    Stop,
    /// The oldest turns are left out.
    Shift,
    /// The same, after the model has summed them up for itself.
    Compact,
}

/// The share of the context that must be free for an answer, and the most tokens that means.
const ROOM: (usize, usize) = (8, 512);
/// The share of the context that a summary may take.
const SUMMARY: usize = 8;
/// How the model is asked for a summary.
const ASK: &str = "Sum up our conversation so far for yourself, as notes that let you continue it. Keep names, numbers, decisions, \
                   open questions and what I asked you to remember. Write only the notes.";
/// What stands in front of a summary in the system prompt.
const INTRODUCTION: &str = "Notes on the conversation so far:";

impl Session<'_> {
    /// So many of the first turns are not shown to the model, and what it reads in their place.
    pub fn left_out(&self) -> (usize, Option<&str>) {
        let turns = self.messages[..self.first].iter().filter(|message| is_user(message)).count();
        (turns, self.summary.as_deref())
    }

    /// Shows the model the turns from number `turns` on, and `summary` instead of those before.
    pub fn leave_out(&mut self, turns: usize, summary: Option<String>) {
        let starts = self.turn_starts(0);
        self.first = if turns == 0 { 0 } else { starts.get(turns).copied().unwrap_or(self.messages.len()) };
        self.summary = summary;
    }

    /// The system prompt as the model reads it: with the summary of what was left out.
    pub(super) fn system_message(&self) -> Option<Value> {
        let summary = self.summary.as_ref().map(|summary| format!("{INTRODUCTION}\n{summary}"));
        let parts: Vec<&str> = [self.options.system.as_deref(), summary.as_deref()].into_iter().flatten().collect();
        (!parts.is_empty()).then(|| json!({ "role": "system", "content": parts.join("\n\n") }))
    }

    /// Messages from `first` on at which turns begin.
    fn turn_starts(&self, first: usize) -> Vec<usize> {
        (first..self.messages.len()).filter(|&i| is_user(&self.messages[i])).collect()
    }

    /// The tokens of the prompt. Where they and an answer do not fit in the context, turns are left out.
    pub(super) fn fitting_prompt(
        &mut self,
        limit: usize,
        interrupt: &AtomicBool,
        on: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<(Vec<u32>, Output)> {
        let context = self.options.context;
        let prompt = self.prompt_tokens()?;
        let room = (context / ROOM.0).min(ROOM.1).min(limit);
        let starts = self.turn_starts(self.first);
        if prompt.0.len() + room <= context || self.options.overflow == Overflow::Stop || starts.len() < 2 {
            return Ok(prompt);
        }
        // As many turns go as it takes; the last one, which is to be answered, stays.
        let before = self.first;
        let (mut fewest, mut most) = (1, starts.len() - 1);
        while fewest < most {
            let middle = fewest.midpoint(most);
            self.first = starts[middle];
            match self.prompt_tokens() {
                Ok((tokens, _)) if tokens.len() <= context / 2 => most = middle,
                Ok(_) => fewest = middle + 1,
                Err(error) => {
                    self.first = before;
                    return Err(error);
                }
            }
        }
        self.first = before;
        let turns = if fewest == 1 { "turn is".to_string() } else { format!("{fewest} turns are") };
        let compact = self.options.overflow == Overflow::Compact;
        let action = if compact { "summed up" } else { "left out" };
        if on(Event::Note(&format!("the context is full: the oldest {turns} {action}"))).is_break() {
            return Err(Error::new(crate::Kind::Interrupted, "interrupted"));
        }
        self.go_without(starts[fewest], compact, interrupt, on)?;
        self.prompt_tokens()
    }

    /// Has the model sum up all turns but the last `keep`, and leaves them out; how many. Nothing happens where there are none.
    ///
    /// # Errors
    /// [`crate::Kind::Interrupted`] if it was interrupted.
    pub fn compact(
        &mut self,
        keep: usize,
        interrupt: &AtomicBool,
        on: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<usize> {
        let starts = self.turn_starts(self.first);
        let turns = starts.len().saturating_sub(keep);
        if turns > 0 {
            let end = starts.get(turns).copied().unwrap_or(self.messages.len());
            self.go_without(end, true, interrupt, on)?;
        }
        Ok(turns)
    }

    /// Leaves out messages before `first`, summed up if that is wanted and possible.
    fn go_without(
        &mut self,
        first: usize,
        compact: bool,
        interrupt: &AtomicBool,
        on: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<()> {
        let mut summary = None;
        if compact {
            summary = self.sum_up(first, interrupt, on)?;
            if summary.is_none() {
                self.notes.push("no summary could be made: the turns are left out without one".into());
            }
        }
        (self.first, self.summary) = (first, summary);
        Ok(())
    }

    /// The model's notes on the messages it is shown before `end`; `None` if there is no room for any, or it has nothing to say.
    fn sum_up(
        &mut self,
        end: usize,
        interrupt: &AtomicBool,
        on: &mut dyn FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Option<String>> {
        let start = Instant::now();
        // The same prompt up to here, so that most of it is in the cache; no thoughts, no tools to call, no format.
        let rest = self.messages.split_off(end);
        self.messages.push(json!({ "role": "user", "content": ASK }));
        let (think, schema) = (std::mem::take(&mut self.options.think), self.options.schema.take());
        let prompt = self.prompt_tokens();
        let limit = self.options.context / SUMMARY;
        let reply = match prompt {
            Ok((tokens, _)) if tokens.len() + limit > self.options.context => Ok(None),
            Ok((tokens, output)) => {
                let system = self.system_tokens(&tokens);
                let mut waiting = |event: Event| match event {
                    Event::Prompt { .. } => on(event),
                    _ => ControlFlow::Continue(()),
                };
                self.generate(&tokens, output, system, start, limit, interrupt, &mut waiting).map(Some)
            }
            Err(error) => Err(error),
        };
        self.messages.truncate(end);
        self.messages.extend(rest);
        (self.options.think, self.options.schema) = (think, schema);
        match reply? {
            Some(reply) if reply.end == End::Interrupted => {
                Err(Error::new(crate::Kind::Interrupted, "interrupted: the conversation is as it was"))
            }
            Some(reply) if !reply.answer.trim().is_empty() => Ok(Some(reply.answer.trim().to_string())),
            _ => Ok(None),
        }
    }
}

fn is_user(message: &Value) -> bool {
    message["role"] == "user"
}
