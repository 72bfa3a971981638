//! The line of figures under an answer, and `/stats`, which says more.
//!
//! The one idea: the line says what a person wants to know every time (how fast, how long it took to begin, what was spared)
//! and what explains a slow answer: memory at its limit, pages read from the disk, heat. Where the terminal is narrow the
//! least telling parts are left out, so that it stays a line.

use std::time::Duration;

use gemrun::machine::cooling::Cooling;
use gemrun::machine::speed::Measured;
use gemrun::machine::{self, Root};
use gemrun::session::{End, Overflow, Reply};

use super::open::gib;
use super::run::Talk;
use super::terminal;

/// What is compared with its value after the answer.
pub struct Before {
    faults: Option<u64>,
}

/// What is known besides the reply itself.
#[derive(Default)]
struct Around {
    context: usize,
    /// Whether the next message makes room for itself.
    goes_on: bool,
    /// Weights that a token reads.
    bytes_per_token: usize,
    /// Bytes a second that memory gives at best, if it was ever measured.
    bandwidth: Option<f64>,
    resident: Option<u64>,
    /// Pages of the model that had to be read from the disk during the reply.
    faults: u64,
    heat: Option<String>,
    columns: Option<usize>,
}

/// Pages read from the disk for each token that slow an answer down noticeably.
const MANY_FAULTS: u64 = 2;

impl Before {
    /// Now, before a reply.
    pub fn now() -> Before {
        Before { faults: machine::major_faults() }
    }

    /// The line under a reply.
    pub fn line(&self, talk: &Talk, reply: &Reply) -> String {
        let options = talk.session.options();
        let bandwidth = gemrun::registry::home().and_then(|home| Measured::load(&home)?.read(options.threads));
        let faults = machine::major_faults().zip(self.faults).map_or(0, |(now, before)| now.saturating_sub(before));
        let around = Around {
            context: options.context,
            goes_on: options.overflow != Overflow::Stop,
            bytes_per_token: talk.loaded.model.bytes_per_token(),
            bandwidth,
            resident: machine::rss(),
            faults,
            heat: heat(&Cooling::read(&Root::system())),
            columns: terminal::columns(),
        };
        line(reply, &around)
    }
}

/// The parts of the line by how telling they are, most first; as many as there is room for, in the order of reading.
fn line(reply: &Reply, around: &Around) -> String {
    let usage = &reply.usage;
    let mut parts: Vec<(u8, String)> = Vec::new(); // (0 stays, the highest goes first)
    let speed = usage.decode_speed();
    parts.push((
        0,
        match usage.decoded {
            0 => format!("{} tok", usage.generated),
            _ => format!("{} tok, {speed:.1} tok/s", usage.generated),
        },
    ));
    // Of a model that fits in a cache this would say nothing of memory.
    if usage.decoded > 0 && around.bytes_per_token > CACHED {
        let read = speed * around.bytes_per_token as f64;
        let share = around.bandwidth.map(|most| format!(" ({:.0} % of memory's)", 100.0 * read / most));
        parts.push((4, format!("{:.1} GB/s{}", read / 1e9, share.unwrap_or_default())));
    }
    if usage.generated > 0 {
        parts.push((1, format!("first token {:.2} s", usage.first_token.as_secs_f64())));
    }
    parts.push((
        2,
        match usage.reused {
            0 => format!("prompt {} tok", usage.prompt),
            reused => format!("prompt {} tok, {reused} reused", usage.prompt),
        },
    ));
    if let Some(bytes) = around.resident {
        parts.push((5, gib(bytes)));
    }
    parts.extend(around.heat.clone().map(|heat| (3, heat)));
    if around.faults >= MANY_FAULTS * (usage.generated as u64).max(1) {
        parts.push((0, format!("waited for the disk {} times", around.faults)));
    }
    match reply.end {
        End::Stop => {}
        End::Length => parts.push((0, "stopped at the limit of -n".into())),
        End::Context => {
            let hint = if around.goes_on { "" } else { ": /new starts over" };
            parts.push((0, format!("the context of {} tok is full{hint}", around.context)));
        }
        End::Interrupted if usage.generated == 0 => parts.push((0, "stopped, message taken back".into())),
        End::Interrupted => parts.push((0, "stopped".into())),
    }
    let joined = |parts: &[(u8, String)]| {
        let texts: Vec<&str> = parts.iter().map(|(_, text)| text.as_str()).collect();
        format!("[ {} ]", texts.join(" | "))
    };
    while joined(&parts).chars().count() > around.columns.unwrap_or(usize::MAX) {
        let Some(least) = parts.iter().map(|(rank, _)| *rank).max().filter(|rank| *rank > 0) else { break };
        parts.retain(|(rank, _)| *rank != least);
    }
    joined(&parts)
}

/// Bytes that a cache may hold.
const CACHED: usize = 64 << 20;

/// Temperature, and whether the processor is slowed down, if either is known. A cool processor is no news.
fn heat(cooling: &Cooling) -> Option<String> {
    let flags = cooling.raspberry_pi.map(|flags| flags.now()).unwrap_or_default();
    let slowed = cooling.devices.iter().any(|device| device.slows() && device.state > 0);
    let trouble = match flags.first() {
        Some(flag) => Some(*flag),
        None => slowed.then_some("slowed down"),
    };
    let celsius = cooling.hottest().map(|zone| format!("{:.0} °C", zone.celsius));
    let parts: Vec<String> = celsius.into_iter().chain(trouble.map(str::to_string)).collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// `/stats`.
pub fn stats(talk: &Talk) -> String {
    let (session, totals, model) = (&talk.session, &talk.totals, &talk.loaded.model);
    let options = session.options();
    let seconds = |time: Duration| format!("{:.2} s", time.as_secs_f64());
    let times = talk.loaded.times;
    let mut lines = vec![
        format!(
            "{} messages, {} of {} tokens in the cache ({:.1} MB {})",
            session.messages(),
            session.held(),
            options.context,
            session.cache_bytes() as f64 / 1e6,
            options.kv.name()
        ),
        format!(
            "{} tokens generated at {:.1} tok/s, {} prompt tokens read at {:.1} tok/s, {} reused; seed {}",
            totals.generated,
            totals.decode_speed(),
            totals.prompt - totals.reused,
            totals.prompt_speed(),
            totals.reused,
            options.sampling.seed
        ),
        format!(
            "start: {} to map the file, {} for tokenizer and tensors; first answer after {}, of it {} of template and tokens",
            seconds(times.map),
            seconds(times.load),
            seconds(totals.first_token),
            seconds(totals.tokenize_time)
        ),
        format!(
            "a token reads {:.2} GB with {} {}{}",
            model.bytes_per_token() as f64 / 1e9,
            options.threads,
            if options.threads == 1 { "thread" } else { "threads" },
            if model.packed() { ", from the packed copy" } else { "" }
        ),
    ];
    let memory = [("now", machine::rss()), ("at most", machine::peak_rss())];
    let memory: Vec<String> =
        memory.iter().filter_map(|(when, bytes)| Some(format!("{when} {}", gib((*bytes)?)))).collect();
    if !memory.is_empty() {
        let faults = machine::major_faults().map(|n| format!("; {n} waits for the disk")).unwrap_or_default();
        lines.push(format!("memory {}{faults}", memory.join(", ")));
    }
    let cores = machine::cores::Cores::read(&Root::system());
    let clock = cores.clusters.iter().filter_map(|cluster| cluster.now_khz).max();
    let clock = clock.map(|khz| format!("{:.2} GHz", khz as f64 / 1e6));
    let heat = clock.into_iter().chain(heat(&Cooling::read(&Root::system()))).collect::<Vec<_>>();
    if !heat.is_empty() {
        lines.push(format!("processor {}", heat.join(", ")));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use gemrun::machine::cooling::{Device, Throttled, Zone};
    use gemrun::session::Usage;

    fn reply() -> Reply {
        let usage = Usage {
            prompt: 18,
            reused: 12,
            generated: 42,
            decoded: 41,
            first_token: Duration::from_millis(210),
            decode_time: Duration::from_millis(1300),
            ..Usage::default()
        };
        Reply { answer: String::new(), thought: String::new(), calls: Vec::new(), end: End::Stop, usage }
    }

    fn board() -> Around {
        Around {
            context: 8192,
            bytes_per_token: 800_000_000,
            bandwidth: Some(36e9),
            resident: Some(950 << 20),
            heat: Some("62 °C".into()),
            ..Around::default()
        }
    }

    #[test]
    fn the_line_under_an_answer() {
        let little = Around { context: 8192, ..Around::default() };
        assert_eq!(line(&reply(), &little), "[ 42 tok, 31.5 tok/s | first token 0.21 s | prompt 18 tok, 12 reused ]");
        assert_eq!(
            line(&reply(), &board()),
            "[ 42 tok, 31.5 tok/s | 25.2 GB/s (70 % of memory's) | first token 0.21 s | prompt 18 tok, 12 reused \
             | 950 MiB | 62 °C ]"
        );
        let mut full = reply();
        full.end = End::Context;
        assert!(line(&full, &little).ends_with("| the context of 8192 tok is full: /new starts over ]"));
        let mut stopped = reply();
        (stopped.end, stopped.usage) = (End::Interrupted, Usage { prompt: 9, ..Usage::default() });
        assert_eq!(line(&stopped, &little), "[ 0 tok | prompt 9 tok | stopped, message taken back ]");
    }

    #[test]
    fn a_narrow_terminal_gets_what_matters() {
        let at = |columns| line(&reply(), &Around { columns: Some(columns), ..board() });
        assert_eq!(at(80), "[ 42 tok, 31.5 tok/s | first token 0.21 s | prompt 18 tok, 12 reused | 62 °C ]");
        assert_eq!(at(60), "[ 42 tok, 31.5 tok/s | first token 0.21 s ]");
        assert_eq!(at(10), "[ 42 tok, 31.5 tok/s ]");
        let thrashing = Around { faults: 900, ..board() };
        assert!(line(&reply(), &thrashing).contains("| waited for the disk 900 times"));
    }

    #[test]
    fn heat_is_told() {
        let mut cooling = Cooling::default();
        assert_eq!(heat(&cooling), None);
        cooling.zones.push(Zone { name: "cpu-thermal".into(), celsius: 71.6, passive: None });
        cooling.devices.push(Device { name: "pwm-fan".into(), state: 3, max: 4 });
        assert_eq!(heat(&cooling).as_deref(), Some("72 °C"));
        cooling.devices.push(Device { name: "cpufreq-cpu0".into(), state: 1, max: 4 });
        assert_eq!(heat(&cooling).as_deref(), Some("72 °C, slowed down"));
        cooling.raspberry_pi = Some(Throttled(1));
        assert_eq!(heat(&cooling).as_deref(), Some("72 °C, under-voltage"));
    }
}
