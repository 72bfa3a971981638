//! Words in lines: styled text for a terminal, broken between words where its width ends.
//!
//! Text appears as it comes, one word late: whether a word fits is known when it has ended. Nothing is drawn twice, so
//! nothing flickers, and a window that changes its size meets the next words. Characters are as wide as Unicode says:
//! two columns for ideographs and emoji, none for accents and joiners.

use unicode_segmentation::UnicodeSegmentation;
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

/// How characters look: any of the constants, added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look(u8);

impl Look {
    pub const PLAIN: Look = Look(0);
    pub const BOLD: Look = Look(1);
    pub const ITALIC: Look = Look(2);
    pub const CODE: Look = Look(4);
    pub const FAINT: Look = Look(8);

    pub fn and(self, other: Look) -> Look {
        Look(self.0 | other.0)
    }

    /// The escape sequence that sets exactly this.
    fn pen(self) -> String {
        let codes = [(Look::BOLD, ";1"), (Look::FAINT, ";2"), (Look::ITALIC, ";3"), (Look::CODE, ";36")];
        let set: String = codes.iter().filter(|(look, _)| self.0 & look.0 != 0).map(|(_, code)| *code).collect();
        format!("\x1b[0{set}m")
    }
}

/// Lines narrower than this are not worth breaking.
const NARROWEST: usize = 16;

/// Breaks text into lines.
pub struct Wrap {
    /// Columns of a line; `None` leaves lines to the terminal.
    columns: Option<usize>,
    /// Where the cursor stands.
    column: usize,
    /// Spaces that will stand in front of the next word, unless it begins a line.
    gap: usize,
    word: Vec<(char, Look)>,
    /// What further lines of a broken one begin with.
    margin: String,
    /// Whether this line is left to the terminal.
    whole: bool,
    pen: Look,
    out: String,
}

impl Wrap {
    pub fn new() -> Wrap {
        Wrap {
            columns: None,
            column: 0,
            gap: 0,
            word: Vec::new(),
            margin: String::new(),
            whole: false,
            pen: Look::PLAIN,
            out: String::new(),
        }
    }

    /// The width of lines from here on.
    pub fn set_columns(&mut self, columns: Option<usize>) {
        self.columns = columns.filter(|&columns| columns >= NARROWEST);
    }

    pub fn columns(&self) -> Option<usize> {
        self.columns
    }

    /// Until the line ends, broken lines go on behind `margin`.
    pub fn set_margin(&mut self, margin: String) {
        self.margin = margin;
    }

    /// Until the line ends, it is not broken.
    pub fn keep_whole(&mut self) {
        self.whole = true;
    }

    /// One more character.
    pub fn put(&mut self, c: char, look: Look) {
        match c {
            '\n' => {
                self.end_word();
                self.gap = 0;
                self.out.push('\n');
                self.column = 0;
                self.margin.clear();
                self.whole = false;
            }
            ' ' if !self.whole => {
                self.end_word();
                self.gap += 1;
            }
            '\t' => {
                self.end_word();
                self.spaces();
                self.set_pen(Look::PLAIN);
                self.out.push('\t');
                self.column = (self.column / 8 + 1) * 8;
            }
            _ => {
                if self.word.last().is_some_and(|&(last, _)| may_break(last, c)) {
                    self.end_word();
                }
                self.word.push((c, look));
            }
        }
    }

    /// The word has ended: it goes on this line or the next.
    pub fn end_word(&mut self) {
        let word = std::mem::take(&mut self.word);
        if word.is_empty() {
            return;
        }
        let text: String = word.iter().map(|(c, _)| c).collect();
        let width = text.width();
        let columns = self.columns.filter(|_| !self.whole).unwrap_or(usize::MAX);
        let margin = self.margin.width().min(columns / 2);
        if self.column > margin && self.column + self.gap + width > columns {
            self.next_line();
        }
        self.spaces();
        let mut looks = word.iter().map(|&(_, look)| look);
        for piece in text.graphemes(true) {
            let width = piece.width();
            if self.column > margin && self.column + width > columns {
                self.next_line(); // in the middle of a word longer than a line
            }
            for c in piece.chars() {
                let look = looks.next().unwrap_or(Look::PLAIN);
                self.set_pen(look);
                self.out.push(c);
            }
            self.column += width;
        }
    }

    fn spaces(&mut self) {
        if self.gap > 0 {
            self.set_pen(Look::PLAIN);
            self.out.extend(std::iter::repeat_n(' ', self.gap));
            self.column += std::mem::take(&mut self.gap);
        }
    }

    fn next_line(&mut self) {
        self.gap = 0;
        self.out.push('\n');
        // A margin that leaves no room is none.
        let fits = self.margin.width() <= self.columns.unwrap_or(0) / 2;
        self.column = 0;
        if fits && !self.margin.is_empty() {
            self.set_pen(Look::FAINT);
            self.out.push_str(&self.margin);
            self.column = self.margin.width();
        }
    }

    fn set_pen(&mut self, look: Look) {
        if self.pen != look {
            self.out.push_str(&look.pen());
            self.pen = look;
        }
    }

    /// Whether the cursor stands at the beginning of a line, with nothing to come.
    pub fn is_fresh(&self) -> bool {
        self.column == 0 && self.word.is_empty()
    }

    /// What to write next; behind it the terminal is plain.
    pub fn take(&mut self) -> String {
        self.set_pen(Look::PLAIN);
        std::mem::take(&mut self.out)
    }
}

/// Whether a line may end between two characters of a word: beside ideographs and emoji, but not in front of what
/// belongs to the character before, nor in front of closing or behind opening punctuation.
fn may_break(before: char, after: char) -> bool {
    const CLOSING: &str =
        "、。，．・：；？！）］｝〕〉》」』】〙〗〟’”»!?.,:;)]}%…ーぁぃぅぇぉっゃゅょァィゥェォッャュョ々";
    const OPENING: &str = "（［｛〔〈《「『【〘〖〝‘“«([{$";
    let wide = |c: char| c.width() == Some(2);
    (wide(before) || wide(after))
        && after.width() != Some(0)
        && !matches!(after, '\u{1f3fb}'..='\u{1f3ff}')
        && before != '\u{200d}'
        && !CLOSING.contains(after)
        && !OPENING.contains(before)
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// What a terminal shows for `written`: characters with their looks, line by line. Panics at escape sequences other
    /// than those that set a look.
    pub fn screen(written: &str) -> Vec<Vec<(char, String)>> {
        let (mut lines, mut look) = (vec![Vec::new()], String::new());
        let mut rest = written.chars();
        while let Some(c) = rest.next() {
            match c {
                '\x1b' => {
                    assert_eq!(rest.next(), Some('['));
                    look = rest.by_ref().take_while(|&c| c != 'm').collect();
                    assert!(look.chars().all(|c| c.is_ascii_digit() || c == ';'), "{look:?}");
                    look = if look == "0" { String::new() } else { look };
                }
                '\n' => lines.push(Vec::new()),
                c => lines.last_mut().unwrap().push((c, look.clone())),
            }
        }
        lines
    }

    /// The lines of a screen without their looks.
    pub fn text(screen: &[Vec<(char, String)>]) -> Vec<String> {
        screen.iter().map(|line| line.iter().map(|(c, _)| c).collect()).collect()
    }

    fn wrapped(said: &str, columns: usize) -> Vec<String> {
        let mut wrap = Wrap::new();
        wrap.set_columns(Some(columns));
        said.chars().for_each(|c| wrap.put(c, Look::PLAIN));
        wrap.end_word();
        text(&screen(&wrap.take()))
    }

    #[test]
    fn lines_break_between_words() {
        assert_eq!(wrapped("the quick brown fox jumps", 16), ["the quick brown", "fox jumps"]);
        assert_eq!(wrapped("exactly sixteen. yes", 16), ["exactly sixteen.", "yes"]);
        assert_eq!(wrapped("a  b\n\n  c ", 16), ["a  b", "", "  c"]);
        assert_eq!(wrapped("see https://example.com/a/long/path", 16), ["see", "https://example.", "com/a/long/path"]);
        // Too narrow to be worth it.
        assert_eq!(wrapped("the quick brown fox jumps", 15), ["the quick brown fox jumps"]);
    }

    #[test]
    fn wide_characters_take_two_columns() {
        assert_eq!(
            wrapped("日本語の文章は、どこでも改行できる。", 16),
            ["日本語の文章は、", "どこでも改行でき", "る。"]
        );
        // No line begins with a full stop, none ends in an opening bracket.
        assert_eq!(wrapped("一二三四五六七八。九", 16), ["一二三四五六七", "八。九"]);
        assert_eq!(wrapped("一二三四五六七「八」", 16), ["一二三四五六七", "「八」"]);
        assert_eq!(wrapped("eight tea 🍵🍵🍵🍵", 16), ["eight tea 🍵🍵🍵", "🍵"]);
        // A family is one character of two columns, a flag too; a skin tone belongs to its hand.
        let family = "👨\u{200d}👩\u{200d}👧";
        assert_eq!(wrapped(&format!("123456789012 {family}x"), 16), [format!("123456789012 {family}x")]);
        assert_eq!(wrapped("12345678901234 👋🏽 hi", 16), ["12345678901234", "👋🏽 hi"]);
        assert_eq!(wrapped("e\u{301}e\u{301}e\u{301} 123456789012", 16), ["e\u{301}e\u{301}e\u{301} 123456789012"]);
    }

    #[test]
    fn broken_lines_keep_their_margin() {
        let mut wrap = Wrap::new();
        wrap.set_columns(Some(20));
        "- ".chars().for_each(|c| wrap.put(c, Look::PLAIN));
        wrap.set_margin("  ".into());
        "one two three four five six\nseven".chars().for_each(|c| wrap.put(c, Look::PLAIN));
        wrap.end_word();
        assert_eq!(text(&screen(&wrap.take())), ["- one two three four", "  five six", "seven"]);
    }
}
