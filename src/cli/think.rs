//! Whether and how long a model thinks before it answers.
//!
//! `auto` measures how fast this model runs here and now, and leaves thinking off where a usual thought would take
//! longer than people like to wait. It is not the default: what the model says would depend on the speed of the machine.

use clap::{Args, ValueEnum};
use gemrun::session::Session;

use super::Result;
use super::terminal::eprintln_quietly;

/// Flags on thinking.
#[derive(Args)]
pub struct Thinking {
    /// Let the model think before it answers; auto: if it is fast enough here for a thought within half a minute
    /// [default: off, or as the conversation had it]
    #[arg(long, value_name = "WHEN")]
    think: Option<When>,
    /// End a thought after N tokens and begin the answer
    #[arg(long, value_name = "N")]
    think_budget: Option<usize>,
    /// Do not show what it thinks
    #[arg(long)]
    hide_thinking: bool,
}

/// `--think`, and `/think`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum When {
    On,
    Off,
    Auto,
}

/// Tokens of a usual thought.
const USUAL: usize = 400;
/// Seconds to wait for an answer to begin.
const PATIENCE: f64 = 30.0;

impl Thinking {
    pub fn on(&self) -> bool {
        self.think == Some(When::On)
    }

    pub fn budget(&self) -> Option<usize> {
        self.think_budget
    }

    pub fn hidden(&self) -> bool {
        self.hide_thinking
    }

    /// Turns thinking on or off in `session`, if asked to. What `auto` decides is said.
    pub fn settle(&self, session: &mut Session) -> Result {
        match self.think {
            None => {}
            Some(When::Auto) => {
                let said = auto(session)?;
                eprintln_quietly(format_args!("note: {said}; --think on or off decides otherwise"));
            }
            Some(when) => session.set_think(when == When::On),
        }
        Ok(())
    }
}

/// Measures, turns thinking on or off, and tells why.
pub fn auto(session: &mut Session) -> Result<String> {
    let speed = session.decode_speed()?;
    let (on, said) = decide(speed, session.options().think_budget);
    session.set_think(on);
    Ok(said)
}

/// Whether to think at `speed` tokens a second.
fn decide(speed: f64, budget: Option<usize>) -> (bool, String) {
    let tokens = budget.map_or(USUAL, |budget| budget.min(USUAL));
    let seconds = tokens as f64 / speed;
    let on = seconds <= PATIENCE;
    let state = if on { "on" } else { "off" };
    let said = format!("thinking is {state}: at {speed:.1} tok/s a thought of {tokens} tokens takes {seconds:.0} s");
    (on, said)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_a_minute_is_the_limit() {
        let on = |speed, budget| decide(speed, budget).0;
        assert!(on(400.0 / 30.0, None) && !on(13.3, None));
        assert!(on(7.0, Some(200)) && !on(7.0, Some(100_000)) && on(1e-9, Some(0)));
        assert!(!on(0.0, None));
        let (_, said) = decide(5.0, None);
        assert_eq!(said, "thinking is off: at 5.0 tok/s a thought of 400 tokens takes 80 s");
    }
}
