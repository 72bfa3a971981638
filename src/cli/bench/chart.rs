//! The result as a picture: horizontal bars in groups, a group for each test, and for comparisons one each for the time to
//! the first token and for memory.
//!
//! The one idea: a small SVG written by hand, with the numbers in plain text beside the bars and colours that follow the
//! reader's choice of light or dark. Bars are to scale within a group and start at zero. No scripts, no fonts, no links.

use std::fmt::Write;

use super::report::{Figures, Measured, Report};

/// Widths and heights, in pixels.
const WIDTH: usize = 720;
const LABEL: usize = 150;
const BAR: usize = 440;
const LINE: usize = 24;
const TITLE: usize = 34;
const MARGIN: usize = 20;

/// Bars that belong together.
struct Group {
    title: String,
    /// Program and figure.
    bars: Vec<(String, f64)>,
    /// Digits after the point of figures below ten.
    digits: usize,
}

/// The whole file.
pub fn svg(report: &Report) -> String {
    let groups = groups(report);
    let lines: usize = groups.iter().map(|group| group.bars.len()).sum();
    let height = 2 * MARGIN + TITLE + groups.len() * TITLE + lines * LINE;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         role=\"img\" aria-label=\"Benchmark of {0}\">\n{STYLE}<rect class=\"page\" width=\"{WIDTH}\" height=\"{height}\" rx=\"6\"/>\n\
         <text class=\"title\" x=\"{MARGIN}\" y=\"{1}\">{0}</text>\n",
        escaped(&report.model),
        MARGIN + 14
    );
    let mut y = MARGIN + TITLE;
    for group in &groups {
        // Writing to a string cannot fail.
        let _ = writeln!(out, "<text class=\"group\" x=\"{MARGIN}\" y=\"{}\">{}</text>", y + 16, escaped(&group.title));
        y += TITLE - 8;
        let most = group.bars.iter().map(|(_, figure)| *figure).fold(f64::MIN_POSITIVE, f64::max);
        for (name, figure) in &group.bars {
            let class = if name == "gemrun" { "ours" } else { "other" };
            let width = (figure / most * BAR as f64).max(1.0);
            let digits = if *figure < 10.0 { group.digits } else { group.digits.min(1) };
            let _ = writeln!(
                out,
                "<text class=\"name\" x=\"{}\" y=\"{}\">{}</text>\
                 <rect class=\"{class}\" x=\"{LABEL}\" y=\"{}\" width=\"{width:.1}\" height=\"{}\" rx=\"2\"/>\
                 <text x=\"{:.1}\" y=\"{}\">{figure:.*}</text>",
                LABEL - 10,
                y + 15,
                escaped(&shortened(name)),
                y + 3,
                LINE - 8,
                (LABEL + 8) as f64 + width,
                y + 15,
                digits
            );
            y += LINE;
        }
        y += 8;
    }
    out + "</svg>\n"
}

const STYLE: &str = "<style>\n\
    text { font: 13px system-ui, -apple-system, 'Segoe UI', sans-serif; fill: #1f2328 }\n\
    .title { font-size: 15px; font-weight: 600 } .group { fill: #59636e } .name { text-anchor: end }\n\
    .page { fill: #ffffff; stroke: #d1d9e0 } .ours { fill: #1f883d } .other { fill: #8c959f }\n\
    @media (prefers-color-scheme: dark) {\n\
    text { fill: #e6edf3 } .group { fill: #9198a1 } .page { fill: #0d1117; stroke: #3d444d }\n\
    .ours { fill: #3fb950 } .other { fill: #6e7681 }\n\
    }\n</style>\n";

fn groups(report: &Report) -> Vec<Group> {
    let mut groups: Vec<Group> =
        report.rows.iter().map(|row| group(row, title(row), 2, |figures| Some(figures.speeds.median()))).collect();
    if !report.others().is_empty() {
        for row in &report.rows {
            let title = format!(
                "seconds to the first token after a prompt of {}{}; less is better",
                row.test.prompt,
                threads(row)
            );
            groups.push(group(row, title, 2, |figures| figures.first_token));
        }
        let peak = |row: &&Measured| row.figures.peak_rss;
        if let Some(row) = report.rows.iter().max_by_key(peak) {
            let title = format!("MiB of memory at most, {}{}; less is better", row.test.label(), threads(row));
            groups.push(group(row, title, 0, |figures| figures.peak_rss.map(|bytes| bytes as f64 / (1 << 20) as f64)));
        }
    }
    groups.retain(|group| !group.bars.is_empty());
    groups
}

fn group(row: &Measured, title: String, digits: usize, figure: fn(&Figures) -> Option<f64>) -> Group {
    let others = row.others.iter().map(|other| (other.name.clone(), figure(&other.figures)));
    let all = [("gemrun".to_string(), figure(&row.figures))].into_iter().chain(others);
    Group { title, bars: all.filter_map(|(name, figure)| Some((name, figure?))).collect(), digits }
}

fn title(row: &Measured) -> String {
    let depth = match row.test.depth {
        0 => String::new(),
        depth => format!(" after {depth}"),
    };
    let what = match row.test.prompt {
        0 => format!("generating {}", row.test.generate),
        prompt => format!("reading a prompt of {prompt}"),
    };
    format!("tokens a second, {what}{depth}{}", threads(row))
}

fn threads(row: &Measured) -> String {
    if row.test.threads == 1 { ", 1 thread".to_string() } else { format!(", {} threads", row.test.threads) }
}

/// A name that fits before its bar.
fn shortened(name: &str) -> String {
    const MOST: usize = 18;
    if name.chars().count() <= MOST { name.to_string() } else { name.chars().take(MOST - 1).chain(['…']).collect() }
}

/// As the text of an element, or an attribute in double quotes.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comparison_as_a_picture() {
        let svg = svg(&super::super::report::tests::example());
        // Longest bars are as wide as there is room; the others to scale.
        for bar in
            ["class=\"ours\" x=\"150\" y=\"83\" width=\"440.0\"", "class=\"other\" x=\"150\" y=\"107\" width=\"127.7\""]
        {
            assert!(svg.contains(bar), "{bar}: {svg}");
        }
        assert!(svg.contains(">a &amp; &quot;b&quot;.gguf</text>") && svg.contains(">a&lt;b</text>"), "{svg}");
        assert!(
            svg.contains(">31.0</text>")
                && svg.contains(">4.25</text>")
                && svg.contains(">6.00</text>")
                && svg.contains(">4100</text>"),
            "{svg}"
        );
        insta::assert_snapshot!(svg);
    }

    #[test]
    fn long_names_are_cut() {
        assert_eq!(shortened("llama.cpp"), "llama.cpp");
        assert_eq!(shortened(&"ä".repeat(19)), "ä".repeat(17) + "…");
    }
}
