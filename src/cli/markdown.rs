//! Markdown on a terminal, while it comes.
//!
//! Headings, lists, quotes, rules, fenced code, emphasis and code spans are recognised; everything else, tables and
//! links among it, is shown as it is written. What has been shown is never changed, so a marker is held back until it is
//! certain what it is: the beginning of a line for a few characters, emphasis and code spans until they close, but not
//! beyond their line and not longer than [`HOLD`]. Text that only looks like a marker loses nothing.
//!
//! One character is taken at a time, so what is seen does not depend on how the text was cut into pieces. Control
//! characters must have been made harmless before.

use super::wrap::{Look, Wrap};

/// Bytes of a line held back, at most, to find where emphasis or code ends.
const HOLD: usize = 160;
/// Columns of a rule.
const RULE: usize = 40;

/// Where the next character stands.
enum State {
    /// At the beginning of a line: what has come of it says not yet what it is.
    Start,
    /// In a line of text, shown so.
    Text(Look),
    /// At the beginning of a line of code that ends with so many of these characters.
    Fence(char, usize),
    /// In a line of code.
    Code(char, usize),
}

/// What a line turns out to be.
#[derive(Debug, PartialEq)]
enum Line {
    Blank,
    Heading(usize),
    /// A list item: spaces in front, and bytes of what marks it, space included.
    Item(usize, usize),
    Quote(usize),
    Rule,
    Fence(char, usize),
    Table,
    Text,
}

/// Shows one answer.
pub struct Markdown {
    wrap: Wrap,
    state: State,
    /// What is held back of the line.
    held: String,
    /// The character in front of it.
    before: char,
    /// What lines broken in two go on behind.
    margin: String,
    /// Whether there are better characters than ASCII's for bullets and bars.
    unicode: bool,
}

impl Markdown {
    /// `unicode`: whether the terminal shows more than ASCII.
    pub fn new(unicode: bool) -> Markdown {
        let (wrap, held, margin) = (Wrap::new(), String::new(), String::new());
        Markdown { wrap, state: State::Start, held, before: ' ', margin, unicode }
    }

    /// What to write for the next piece of text on a terminal that is `columns` wide.
    pub fn push(&mut self, text: &str, columns: Option<usize>) -> String {
        self.wrap.set_columns(columns);
        text.chars().for_each(|c| self.take(c));
        self.wrap.take()
    }

    /// What to write at the end.
    pub fn finish(&mut self) -> String {
        match self.state {
            State::Start => self.begin(true),
            State::Text(look) => self.inline(look, true),
            State::Fence(fence, count) if !self.held.is_empty() => self.code_line(fence, count, true),
            State::Fence(..) | State::Code(..) => {}
        }
        self.wrap.end_word();
        self.state = State::Start;
        self.wrap.take()
    }

    /// Whether the cursor stands at the beginning of a line.
    pub fn is_fresh(&self) -> bool {
        self.held.is_empty() && self.wrap.is_fresh()
    }

    fn take(&mut self, c: char) {
        match self.state {
            State::Start if c == '\n' => {
                self.begin(true);
                self.end_line();
            }
            State::Start => {
                self.held.push(c);
                self.begin(false);
            }
            State::Text(look) if c == '\n' => {
                self.inline(look, true);
                self.end_line();
            }
            State::Text(look) => {
                self.held.push(c);
                self.inline(look, false);
            }
            State::Fence(fence, count) if c == '\n' => {
                self.code_line(fence, count, true);
                self.wrap.put('\n', Look::PLAIN);
            }
            State::Fence(fence, count) => {
                self.held.push(c);
                self.code_line(fence, count, false);
            }
            State::Code(fence, count) => {
                self.wrap.put(c, Look::CODE);
                if c == '\n' {
                    self.wrap.keep_whole();
                    self.state = State::Fence(fence, count);
                } else {
                    self.wrap.end_word();
                }
            }
        }
    }

    fn end_line(&mut self) {
        self.wrap.put('\n', Look::PLAIN);
        self.margin.clear();
        match self.state {
            State::Fence(..) => self.wrap.keep_whole(),
            _ => self.state = State::Start,
        }
    }

    /// Finds out what the line is, if that can be known; `end`: nothing more comes of it.
    fn begin(&mut self, end: bool) {
        let Some(line) = Line::of(&self.held, end) else { return };
        let held = std::mem::take(&mut self.held);
        let mut look = Look::PLAIN;
        let rest = match line {
            Line::Blank => "",
            Line::Heading(marker) => {
                look = Look::BOLD;
                held[marker..].trim_start()
            }
            Line::Item(indent, marker) => {
                let sign = &held[indent..indent + marker];
                let bullet = if self.unicode && sign.len() == 2 { "• " } else { sign };
                self.show(&" ".repeat(indent), Look::PLAIN);
                self.show(bullet, Look::PLAIN);
                self.margin.push_str(&" ".repeat(indent + marker));
                &held[indent + marker..]
            }
            Line::Quote(marker) => {
                let bar = if self.unicode { "│ " } else { "> " };
                self.show(bar, Look::FAINT);
                self.margin.push_str(bar);
                self.wrap.set_margin(self.margin.clone());
                // In a quote there are lines of every kind.
                self.held = held[marker..].to_string();
                return self.begin(end);
            }
            Line::Rule => {
                let columns = self.wrap.columns().unwrap_or(RULE).min(RULE);
                let line = if self.unicode { "─" } else { "-" };
                self.show(&line.repeat(columns - self.margin.chars().count().min(columns)), Look::FAINT);
                ""
            }
            Line::Fence(fence, count) => {
                self.show(&held, Look::FAINT);
                self.state = State::Fence(fence, count);
                return;
            }
            Line::Table => {
                self.wrap.keep_whole();
                &held
            }
            Line::Text => {
                let indent = held.len() - held.trim_start().len();
                self.margin.push_str(&" ".repeat(indent));
                &held
            }
        };
        self.wrap.set_margin(self.margin.clone());
        self.held = rest.to_string();
        self.before = ' ';
        self.state = State::Text(look);
        self.inline(look, end);
    }

    fn show(&mut self, text: &str, look: Look) {
        text.chars().for_each(|c| self.wrap.put(c, look));
    }

    /// Shows of the held text what is certain.
    fn inline(&mut self, look: Look, end: bool) {
        let wrap = &mut self.wrap;
        let (shown, before) = inline(&self.held, self.before, look, end, &mut |c, look| wrap.put(c, look));
        self.held.drain(..shown);
        self.before = before;
    }

    /// The held beginning of a line of code, or the fence that ends the code.
    fn code_line(&mut self, fence: char, count: usize, end: bool) {
        let line = self.held.trim_start_matches(' ');
        let bare = line.trim_end();
        let closes = bare.chars().all(|c| c == fence) && bare.chars().count() >= count;
        if end && closes {
            let held = std::mem::take(&mut self.held);
            self.show(&held, Look::FAINT);
            self.state = State::Start;
        } else if end || !may_close(line, fence) {
            let held = std::mem::take(&mut self.held);
            self.show(&held, Look::CODE);
            self.wrap.end_word();
            self.state = if end { State::Fence(fence, count) } else { State::Code(fence, count) };
            if end {
                self.wrap.keep_whole();
            }
        }
    }
}

/// Whether a line of code that begins with `line` may be the fence.
fn may_close(line: &str, fence: char) -> bool {
    line.trim_end_matches(' ').chars().all(|c| c == fence)
}

impl Line {
    /// What a line that begins with `line` is; `None` if that is not certain yet. `end`: this is all of it.
    fn of(line: &str, end: bool) -> Option<Line> {
        let body = line.trim_start_matches(' ');
        let indent = line.len() - body.len();
        let Some(first) = body.chars().next() else {
            return if end {
                Some(Line::Blank)
            } else if indent > 60 {
                Some(Line::Text)
            } else {
                None
            };
        };
        let run = body.len() - body.trim_start_matches(first).len();
        let rest = &body[run..];
        match first {
            '#' if run > 6 => Some(Line::Text),
            '#' if rest.is_empty() && !end => None,
            '#' if rest.starts_with(' ') => Some(Line::Heading(indent + run)),
            '`' | '~' if rest.is_empty() && !end => None,
            '`' | '~' if run >= 3 => match end {
                false if rest.len() < HOLD => None,
                true if first == '~' || !rest.contains('`') => Some(Line::Fence(first, run)),
                _ => Some(Line::Text),
            },
            '-' | '*' | '_' | '+' => {
                let bare = body.chars().all(|c| c == first || c == ' ');
                if bare && !end && body.len() < HOLD {
                    return None;
                }
                let count = body.chars().filter(|&c| c == first).count();
                if bare && count >= 3 && first != '+' {
                    return Some(Line::Rule);
                }
                match first != '_' && run == 1 && rest.starts_with(' ') {
                    true => Some(Line::Item(indent, 2)),
                    false => Some(Line::Text),
                }
            }
            '0'..='9' => {
                let digits = body.len() - body.trim_start_matches(|c: char| c.is_ascii_digit()).len();
                let mut rest = body[digits..].chars();
                match (rest.next(), rest.next()) {
                    _ if digits > 9 => Some(Line::Text),
                    (None, _) | (Some('.' | ')'), None) if !end => None,
                    (Some('.' | ')'), Some(' ')) => Some(Line::Item(indent, digits + 2)),
                    _ => Some(Line::Text),
                }
            }
            '>' => match body[1..].chars().next() {
                None if !end => None,
                Some(' ') => Some(Line::Quote(indent + 2)),
                _ => Some(Line::Quote(indent + 1)),
            },
            '|' => Some(Line::Table),
            _ => Some(Line::Text),
        }
    }
}

/// Where something ends.
enum Found {
    At(usize),
    No,
    /// Not in what has come, but more may come.
    NotYet,
}

/// Shows what is certain of `text`, which stands behind `before`; how many bytes that was, and the last character.
/// `end`: nothing follows.
fn inline(text: &str, mut before: char, look: Look, end: bool, show: &mut dyn FnMut(char, Look)) -> (usize, char) {
    let mut at = 0;
    while let Some(c) = text[at..].chars().next() {
        let rest = &text[at..];
        let run = rest.len() - rest.trim_start_matches(c).len();
        let marked = matches!(c, '`' | '*' | '_');
        if (marked && run == rest.len() || c == '\\' && rest.len() == 1) && !end {
            break;
        }
        match c {
            '\\' if rest[1..].starts_with(|next: char| next.is_ascii_punctuation()) => {
                before = rest.as_bytes()[1].into();
                show(before, look);
                at += 2;
            }
            '`' | '*' | '_' => {
                let inside = &rest[run..];
                let found = match c {
                    '`' => code_end(inside, run, end),
                    _ if run <= 3 && !before.is_alphanumeric() && !inside.starts_with(char::is_whitespace) => {
                        emphasis_end(inside, c, run, end)
                    }
                    _ => Found::No,
                };
                match found {
                    Found::NotYet if rest.len() < HOLD => break,
                    Found::At(length) => {
                        let inside = &inside[..length];
                        if c == '`' {
                            // One space on each side is padding.
                            let padded = inside.strip_prefix(' ').and_then(|inside| inside.strip_suffix(' '));
                            let code = padded.filter(|code| !code.trim().is_empty()).unwrap_or(inside);
                            code.chars().for_each(|c| show(c, look.and(Look::CODE)));
                        } else {
                            let emphasis = [Look::ITALIC, Look::BOLD, Look::BOLD.and(Look::ITALIC)][run - 1];
                            inline(inside, c, look.and(emphasis), true, show);
                        }
                        at += run + length + run;
                    }
                    Found::No | Found::NotYet => {
                        (0..run).for_each(|_| show(c, look));
                        at += run;
                    }
                }
                before = c;
            }
            _ => {
                show(c, look);
                before = c;
                at += c.len_utf8();
            }
        }
    }
    (at, before)
}

/// The end of a code span: a run of `count` backticks.
fn code_end(text: &str, count: usize, end: bool) -> Found {
    let mut at = 0;
    while let Some(found) = text[at..].find('`') {
        at += found;
        let run = text[at..].len() - text[at..].trim_start_matches('`').len();
        if at + run == text.len() && !end {
            return Found::NotYet;
        }
        if run == count {
            return Found::At(at);
        }
        at += run;
    }
    if end { Found::No } else { Found::NotYet }
}

/// The end of emphasis: a run of `count` markers behind a word, outside of code.
fn emphasis_end(text: &str, marker: char, count: usize, end: bool) -> Found {
    let mut at = 0;
    let mut before = ' ';
    while let Some(c) = text[at..].chars().next() {
        let rest = &text[at..];
        let run = rest.len() - rest.trim_start_matches(c).len();
        match c {
            '\\' => at += 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            '`' => match code_end(&rest[run..], run, end) {
                Found::At(length) => at += run + length + run,
                Found::No => at += run,
                Found::NotYet => return Found::NotYet,
            },
            _ if c == marker => {
                if at + run == text.len() && !end {
                    return Found::NotYet;
                }
                let follows = rest[run..].chars().next();
                if run == count && !before.is_whitespace() && !follows.is_some_and(char::is_alphanumeric) {
                    return Found::At(at);
                }
                at += run;
            }
            _ => at += c.len_utf8(),
        }
        before = c;
    }
    if end { Found::No } else { Found::NotYet }
}

#[cfg(test)]
mod tests {
    use super::super::wrap::tests::{screen, text};
    use super::*;
    use proptest::prelude::*;

    fn shown(said: &str, columns: usize) -> String {
        let mut markdown = Markdown::new(true);
        let out = markdown.push(said, Some(columns));
        out + &markdown.finish()
    }

    fn lines(said: &str) -> Vec<String> {
        text(&screen(&shown(said, 40)))
    }

    /// `look` of each stretch of the screen: bold b, faint f, italic i, code c.
    fn looks(said: &str) -> String {
        let mut out = String::new();
        let mut now = String::new();
        for (c, look) in screen(&shown(said, 200)).concat() {
            if look != now {
                let names = look.split(';').map(|code| match code {
                    "1" => "b",
                    "2" => "f",
                    "3" => "i",
                    "36" => "c",
                    _ => "",
                });
                out += &format!("<{}>", names.collect::<String>());
                now = look;
            }
            out.push(c);
        }
        out
    }

    #[test]
    fn spans() {
        for (said, seen) in [
            ("a **b c** d", "a <b>b<> <b>c<> d"),
            ("*i* _i_ ***x***", "<i>i<> <i>i<> <bi>x"),
            ("**b *i* `c*`**.", "<b>b<> <bi>i<> <bc>c*<>."),
            ("`**`, ``a`b``, ` `` `", "<c>**<>, <c>a`b<>, <c>``"),
            ("2 * 3 * 4 = 24", "2 * 3 * 4 = 24"),
            ("2*3*4, snake_case_name, a**b**c", "2*3*4, snake_case_name, a**b**c"),
            ("*args and **kwargs", "*args and **kwargs"),
            ("\\*a\\* \\x \\", "*a* \\x \\"),
            ("**a", "**a"),
            ("`a", "`a"),
            ("**a\nb**", "**ab**"),
            ("# A *b*", "<b>A<> <bi>b"),
            ("(**a**)", "(<b>a<>)"),
            ("****", "────────────────────────────────────────"),
            ("a ****", "a ****"),
            ("**“a”** **b**", "<b>“a”<> <b>b"),
        ] {
            assert_eq!(looks(said).trim_start_matches("<f>"), seen, "{said}");
        }
    }

    #[test]
    fn blocks() {
        assert_eq!(lines("# T\n\ntext\n"), ["T", "", "text", ""]);
        assert_eq!(lines("- a\n* b\n+ c\n  - d\n1. e\n10) f"), ["• a", "• b", "• c", "  • d", "1. e", "10) f"]);
        assert_eq!(lines("-5\n#tag\n2024 was\n3.14\n+1"), ["-5", "#tag", "2024 was", "3.14", "+1"]);
        assert_eq!(lines("---\n***\n- - -\n--"), [&"─".repeat(40), &"─".repeat(40), &"─".repeat(40), "--"]);
        assert_eq!(lines("> a\n>b\n> - c"), ["│ a", "│ b", "│ • c"]);
        assert_eq!(lines("```py\nif *a*:\n    # b\n```\n*c*"), ["```py", "if *a*:", "    # b", "```", "c"]);
        assert_eq!(lines("````\n```\n````\nx"), ["````", "```", "````", "x"]);
        assert_eq!(lines("~~~\n`"), ["~~~", "`"]);
        assert_eq!(lines("```code``` is inline"), ["code is inline"]);
        let long = "| a | a cell that is long enough to leave the screen |";
        assert_eq!(lines(long), [long]);
        let code = format!("```\n{}\n", "long ".repeat(20));
        assert_eq!(lines(&code)[1], "long ".repeat(20));
    }

    #[test]
    fn items_and_quotes_are_broken_behind_their_margin() {
        let words = "one two three four five six seven eight nine";
        assert_eq!(lines(&format!("12. {words}")), ["12. one two three four five six seven", "    eight nine"]);
        assert_eq!(lines(&format!("> {words}")), ["│ one two three four five six seven", "│ eight nine"]);
    }

    /// Nothing is held back longer than it must be.
    #[test]
    fn text_appears_as_it_comes() {
        let mut markdown = Markdown::new(true);
        let mut push = |text: &str| text_of(&markdown.push(text, Some(80)));
        assert_eq!(push("Hello wor"), "Hello");
        assert_eq!(push("ld, **it"), " world,");
        assert_eq!(push(" is** "), " it is");
        assert_eq!(push(&format!("**{} ", "x".repeat(HOLD))).len(), HOLD + 5); // with the space and line breaks
        let mut code = Markdown::new(true);
        code.push("```\n", Some(80));
        assert_eq!(text_of(&code.push("let a", Some(80))), "let a");
    }

    fn text_of(out: &str) -> String {
        text(&screen(out)).join("\n")
    }

    /// Text with much of what Markdown knows.
    fn said() -> impl Strategy<Value = String> {
        let token = prop_oneof![
            prop::sample::select(vec![
                "*",
                "**",
                "***",
                "_",
                "`",
                "``",
                "```",
                "~~~",
                "\n",
                "\n\n",
                " ",
                "  ",
                "#",
                "## ",
                "- ",
                "> ",
                "1. ",
                "|",
                "\\",
                "---",
                "\t",
                "word",
                "ü",
                "日本",
                "👍🏽",
                "long-winded-and-unbroken-text"
            ])
            .prop_map(str::to_string),
            any::<char>().prop_filter("harmless", |c| !c.is_control()).prop_map(String::from),
        ];
        prop::collection::vec(token, 0..40).prop_map(|tokens| tokens.concat())
    }

    proptest! {
        /// However the text is cut into pieces, the screen is the same.
        #[test]
        fn any_split_shows_the_same(said in said(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..10), columns in 16usize..60) {
            let mut at: Vec<usize> = cuts.iter().map(|cut| said.floor_char_boundary(cut.index(said.len() + 1))).collect();
            at.extend([0, said.len()]);
            at.sort_unstable();
            let mut markdown = Markdown::new(true);
            let mut out = String::new();
            for cut in at.windows(2) {
                out += &markdown.push(&said[cut[0]..cut[1]], Some(columns));
            }
            out += &markdown.finish();
            prop_assert_eq!(screen(&out), screen(&shown(&said, columns)));
            let pen = out.rfind('\x1b').map_or("\x1b[0m", |at| &out[at..]);
            prop_assert!(pen.starts_with("\x1b[0m"), "the terminal is left with {:?}", pen);
        }

        /// No letter is lost, and no line of text is longer than the screen.
        #[test]
        fn letters_stay_and_lines_fit(said in said(), columns in 16usize..60) {
            use unicode_width::UnicodeWidthStr;
            let letters = |text: &str| text.chars().filter(|c| c.is_alphabetic()).collect::<String>();
            let seen = text(&screen(&shown(&said, columns)));
            prop_assert_eq!(letters(&seen.concat()), letters(&said));
            let whole = said.contains('|') || said.contains("```") || said.contains("~~~") || said.contains('\t');
            for line in &seen {
                prop_assert!(whole || line.width() <= columns, "{:?}", line);
            }
        }
    }
}
