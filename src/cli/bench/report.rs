//! What was measured, and its three forms: JSON for programs, CSV for tables, Markdown for people and for pasting.
//!
//! The one idea: everything derived (medians, shares of a limit, ratios) is computed here, from plain figures, so that all
//! forms and the picture say the same. Speeds are derived from medians. A ratio is gemrun's figure divided by the other
//! program's; that of speeds is the median of the ratios of runs that followed each other.

use std::collections::BTreeMap;
use std::io::{Result, Write};

use serde_json::{Value, json};

use super::Test;

/// Measurements of one quantity, at least one.
#[derive(Debug, Clone)]
pub struct Samples(pub Vec<f64>);

impl Samples {
    pub fn average(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len() as f64
    }

    /// Sample standard deviation.
    pub fn deviation(&self) -> f64 {
        let (mean, n) = (self.average(), self.0.len());
        let squares: f64 = self.0.iter().map(|sample| (sample - mean).powi(2)).sum();
        if n < 2 { 0.0 } else { (squares / (n - 1) as f64).sqrt() }
    }

    pub fn median(&self) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
    }

    /// The median of the ratios of samples taken one after the other.
    fn ratio(&self, other: &Samples) -> f64 {
        Samples(self.0.iter().zip(&other.0).map(|(a, b)| a / b).collect()).median()
    }
}

/// What one program did in one test.
pub struct Figures {
    /// Tokens a second.
    pub speeds: Samples,
    /// The most memory resident, in bytes.
    pub peak_rss: Option<u64>,
    /// Seconds from start to the first token of an answer to the test's prompt: in a comparison those of a whole process,
    /// otherwise of loading and one prompt.
    pub first_token: Option<f64>,
}

/// Another program's figures.
pub struct Other {
    pub name: String,
    /// What it says of itself.
    pub build: Option<String>,
    pub figures: Figures,
}

/// One test.
pub struct Measured {
    pub test: Test,
    /// Bytes of weights a token has to read, on average.
    pub bytes_per_token: f64,
    /// Multiply-adds a token cannot do without, on average.
    pub multiply_adds: f64,
    /// gemrun's.
    pub figures: Figures,
    pub others: Vec<Other>,
}

/// What this computer gives at best.
pub struct Limits {
    pub threads: usize,
    /// Bytes a second that can be read.
    pub read: f64,
    /// Multiply-adds of bytes a second; `None` where nobody knows how to measure.
    pub int8: Option<f64>,
}

/// Everything there is to say.
pub struct Report {
    /// The file's name, printable.
    pub model: String,
    pub kv: &'static str,
    pub isa: &'static str,
    /// By format.
    pub kernels: BTreeMap<&'static str, &'static str>,
    /// Whether a packed copy was read.
    pub packed: bool,
    /// Of the minute before.
    pub load_average: Option<f64>,
    pub rows: Vec<Measured>,
    /// For each number of threads, unless left out.
    pub limits: Vec<Limits>,
}

const MIB: f64 = (1 << 20) as f64;

impl Measured {
    /// Gigabytes of weights read a second.
    fn gigabytes(&self, figures: &Figures) -> f64 {
        self.bytes_per_token * figures.speeds.median() / 1e9
    }

    /// Billions of multiply-adds a second.
    fn gmacs(&self, figures: &Figures) -> f64 {
        self.multiply_adds * figures.speeds.median() / 1e9
    }
}

/// gemrun's divided by the other's, if both are known.
fn ratio(ours: Option<f64>, theirs: Option<f64>) -> Option<f64> {
    Some(ours? / theirs.filter(|theirs| *theirs > 0.0)?)
}

/// An unknown number is an empty cell.
fn cell(number: Option<f64>, digits: usize) -> String {
    number.map_or(String::new(), |number| format!("{number:.digits$}"))
}

impl Report {
    fn limits(&self, row: &Measured) -> Option<&Limits> {
        self.limits.iter().find(|limits| limits.threads == row.test.threads)
    }

    /// Share of the read bandwidth.
    fn of_read(&self, row: &Measured, figures: &Figures) -> Option<f64> {
        Some(row.gigabytes(figures) * 1e9 / self.limits(row)?.read)
    }

    /// Share of the int8 arithmetic.
    fn of_int8(&self, row: &Measured, figures: &Figures) -> Option<f64> {
        Some(row.gmacs(figures) * 1e9 / self.limits(row)?.int8?)
    }

    /// All other programs, with the first build each told of.
    pub fn others(&self) -> &[Other] {
        self.rows.first().map_or(&[], |row| &row.others)
    }

    /// One object for each test.
    pub fn json(&self) -> Value {
        let row = |row: &Measured| {
            let (test, figures) = (row.test, &row.figures);
            let mut result = json!({
                "model": self.model,
                "test": test.name(),
                "n_prompt": test.prompt,
                "n_gen": test.generate,
                "n_depth": test.depth,
                "n_threads": test.threads,
                "avg_ts": figures.speeds.average(),
                "stddev_ts": figures.speeds.deviation(),
                "median_ts": figures.speeds.median(),
                "samples_ts": figures.speeds.0,
                "bytes_per_token": row.bytes_per_token,
                "gb_per_s": row.gigabytes(figures),
                "multiply_adds_per_token": row.multiply_adds,
                "gmac_per_s": row.gmacs(figures),
                "limits": self.limits(row).map(|limits| json!({
                    "read_gb_per_s": limits.read / 1e9,
                    "int8_gmac_per_s": limits.int8.map(|int8| int8 / 1e9),
                })),
                "of_read": self.of_read(row, figures),
                "of_int8": self.of_int8(row, figures),
                "time_to_first_token_s": figures.first_token,
                "peak_rss_bytes": figures.peak_rss,
                "kernel": self.kernels,
                "isa": self.isa,
                "packed": self.packed,
                "kv": self.kv,
                "load_average": self.load_average,
                "build_commit": env!("CARGO_PKG_VERSION"),
            });
            if !row.others.is_empty() {
                let others = row.others.iter().map(|other| (other.name.clone(), self.other_json(row, other)));
                result["vs"] = Value::Object(others.collect());
            }
            result
        };
        self.rows.iter().map(row).collect()
    }

    fn other_json(&self, row: &Measured, other: &Other) -> Value {
        let (ours, theirs) = (&row.figures, &other.figures);
        let bytes = |figures: &Figures| figures.peak_rss.map(|bytes| bytes as f64);
        json!({
            "build": other.build,
            "avg_ts": theirs.speeds.average(),
            "stddev_ts": theirs.speeds.deviation(),
            "median_ts": theirs.speeds.median(),
            "samples_ts": theirs.speeds.0,
            "ratio": ours.speeds.ratio(&theirs.speeds),
            "of_read": self.of_read(row, theirs),
            "of_int8": self.of_int8(row, theirs),
            "time_to_first_token_s": theirs.first_token,
            "time_to_first_token_ratio": ratio(ours.first_token, theirs.first_token),
            "peak_rss_bytes": theirs.peak_rss,
            "peak_rss_ratio": ratio(bytes(ours), bytes(theirs)),
        })
    }

    /// One line for each test and program.
    pub fn csv(&self, out: &mut impl Write) -> Result<()> {
        writeln!(
            out,
            "model,test,n_prompt,n_gen,n_depth,n_threads,avg_ts,stddev_ts,median_ts,bytes_per_token,gb_per_s,peak_rss_bytes,kv,\
             multiply_adds_per_token,gmac_per_s,of_read,of_int8,time_to_first_token_s,program,ratio"
        )?;
        let quoted = |text: &str| format!("\"{}\"", text.replace('"', "\"\""));
        for row in &self.rows {
            let others = row.others.iter().map(|other| (&other.name[..], &other.figures));
            for (program, figures) in [("gemrun", &row.figures)].into_iter().chain(others) {
                let (test, speeds) = (row.test, &figures.speeds);
                let ratio = (program != "gemrun").then(|| row.figures.speeds.ratio(speeds));
                let cells = [
                    quoted(&self.model),
                    test.name(),
                    test.prompt.to_string(),
                    test.generate.to_string(),
                    test.depth.to_string(),
                    test.threads.to_string(),
                    format!("{:.4}", speeds.average()),
                    format!("{:.4}", speeds.deviation()),
                    format!("{:.4}", speeds.median()),
                    format!("{:.0}", row.bytes_per_token),
                    format!("{:.4}", row.gigabytes(figures)),
                    figures.peak_rss.map_or(String::new(), |bytes| bytes.to_string()),
                    self.kv.to_string(),
                    format!("{:.0}", row.multiply_adds),
                    format!("{:.4}", row.gmacs(figures)),
                    cell(self.of_read(row, figures), 4),
                    cell(self.of_int8(row, figures), 4),
                    cell(figures.first_token, 3),
                    quoted(program),
                    cell(ratio, 4),
                ];
                writeln!(out, "{}", cells.join(","))?;
            }
        }
        Ok(())
    }

    /// A table, and below it what it was measured with.
    pub fn markdown(&self, out: &mut impl Write) -> Result<()> {
        if self.others().is_empty() {
            self.table(out)?
        } else {
            self.comparison(out)?
        }
        writeln!(out)?;
        let kernels: Vec<&str> = self.kernels.values().copied().collect();
        let packed = if self.packed { ", packed copy" } else { "" };
        writeln!(out, "model: {}{packed}, kv {}; kernels: {}", self.model, self.kv, kernels.join(", "))?;
        for limits in &self.limits {
            let threads =
                if limits.threads == 1 { "1 thread".to_string() } else { format!("{} threads", limits.threads) };
            let int8 = limits.int8.map_or(String::new(), |int8| format!(", int8 {:.0} GMAC/s", int8 / 1e9));
            writeln!(out, "at best with {threads}: read {:.1} GB/s{int8}", limits.read / 1e9)?;
        }
        for other in self.others() {
            writeln!(out, "{}: build {}", other.name, other.build.as_deref().unwrap_or("unknown"))?;
        }
        let peak = self.rows.iter().filter_map(|row| row.figures.peak_rss).max();
        let peak = peak.map(|bytes| format!("peak resident memory: {:.0} MiB", bytes as f64 / MIB));
        let load = self.load_average.map(|load| format!("load average before: {load:.2}"));
        let facts: Vec<String> = peak.into_iter().chain(load).collect();
        writeln!(out, "{}", facts.join("; "))
    }

    /// Of gemrun alone.
    fn table(&self, out: &mut impl Write) -> Result<()> {
        writeln!(
            out,
            "| model | threads | kv | test | t/s | median | GB/s | of read | GMAC/s | of int8 | first token, s |"
        )?;
        writeln!(out, "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")?;
        for row in &self.rows {
            let speeds = &row.figures.speeds;
            let cells = [
                self.model.clone(),
                row.test.threads.to_string(),
                self.kv.to_string(),
                row.test.label(),
                format!("{:.2} ± {:.2}", speeds.average(), speeds.deviation()),
                format!("{:.2}", speeds.median()),
                format!("{:.2}", row.gigabytes(&row.figures)),
                share(self.of_read(row, &row.figures)),
                format!("{:.1}", row.gmacs(&row.figures)),
                share(self.of_int8(row, &row.figures)),
                cell(row.figures.first_token, 2),
            ];
            writeln!(out, "| {} |", cells.join(" | "))?;
        }
        Ok(())
    }

    /// Of all programs.
    fn comparison(&self, out: &mut impl Write) -> Result<()> {
        let names: Vec<&str> = self.others().iter().map(|other| &other.name[..]).collect();
        let columns: String = names.iter().map(|name| format!(" {name} | ratio |")).collect();
        writeln!(out, "| threads | test | | gemrun |{columns}")?;
        writeln!(out, "| ---: | ---: | --- | ---: |{}", " ---: | ---: |".repeat(names.len()))?;
        for row in &self.rows {
            let speed =
                |figures: &Figures| Some(format!("{:.2} ± {:.2}", figures.speeds.median(), figures.speeds.deviation()));
            let speeds = |other: &Figures| Some(row.figures.speeds.ratio(&other.speeds));
            self.line(row, "t/s", &speed, &speeds, out)?;
            // What limits the test, of what the weights alone ask for.
            if row.test.prompt == 0 {
                self.line(row, "of read", &|f| self.of_read(row, f).map(|of| share(Some(of))), &|_| None, out)?;
            } else {
                self.line(row, "of int8", &|f| self.of_int8(row, f).map(|of| share(Some(of))), &|_| None, out)?;
            }
            let first = |f: &Figures| f.first_token.map(|seconds| format!("{seconds:.2}"));
            let firsts = |other: &Figures| ratio(row.figures.first_token, other.first_token);
            self.line(row, "first token, s", &first, &firsts, out)?;
            let peak = |f: &Figures| f.peak_rss.map(|bytes| format!("{:.0}", bytes as f64 / MIB));
            let bytes = |f: &Figures| f.peak_rss.map(|bytes| bytes as f64);
            let peaks = |other: &Figures| ratio(bytes(&row.figures), bytes(other));
            self.line(row, "peak MiB", &peak, &peaks, out)?;
        }
        writeln!(
            out,
            "\nt/s: median ± standard deviation; ratio: gemrun's ÷ theirs, of speeds the median of consecutive runs"
        )
    }

    /// One quantity of one test; nothing if it is not known of gemrun.
    fn line(
        &self,
        row: &Measured,
        what: &str,
        text: &dyn Fn(&Figures) -> Option<String>,
        ratio: &dyn Fn(&Figures) -> Option<f64>,
        out: &mut impl Write,
    ) -> Result<()> {
        let Some(ours) = text(&row.figures) else { return Ok(()) };
        write!(out, "| {} | {} | {what} | {ours} |", row.test.threads, row.test.label())?;
        for other in &row.others {
            let theirs = text(&other.figures).unwrap_or_default();
            write!(out, " {theirs} | {} |", cell(ratio(&other.figures), 2))?;
        }
        writeln!(out)
    }
}

/// `82 %`.
fn share(of: Option<f64>) -> String {
    of.map_or(String::new(), |of| format!("{:.0} %", 100.0 * of))
}

#[cfg(test)]
pub mod tests {
    use super::*;

    #[test]
    fn statistics() {
        let samples = Samples(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!((samples.average(), samples.median()), (2.5, 2.5));
        assert!((samples.deviation() - (5.0f64 / 3.0).sqrt()).abs() < 1e-12);
        let single = Samples(vec![3.0]);
        assert_eq!((single.median(), single.deviation()), (3.0, 0.0));
        // Pairs, not medians: 4/2, 1/1, 3/1, 2/4.
        assert_eq!(samples.ratio(&Samples(vec![2.0, 1.0, 1.0, 4.0])), 1.5);
        assert_eq!(
            (ratio(Some(1.0), Some(0.0)), ratio(None, Some(1.0)), ratio(Some(1.0), Some(4.0))),
            (None, None, Some(0.25))
        );
    }

    /// A comparison of two programs in two tests.
    pub fn example() -> Report {
        let figures = |speeds: [f64; 2], mib: u64, first_token| Figures {
            speeds: Samples(speeds.to_vec()),
            peak_rss: Some(mib << 20),
            first_token,
        };
        let row = |prompt, generate, ours, theirs| Measured {
            test: Test { prompt, generate, depth: 0, threads: 2 },
            bytes_per_token: 1e9,
            multiply_adds: 2e9,
            figures: ours,
            others: vec![Other { name: "a<b".into(), build: Some("7 (abc)".into()), figures: theirs }],
        };
        Report {
            model: "a & \"b\".gguf".into(),
            kv: "f16",
            isa: "avx2",
            kernels: BTreeMap::from([("q4_0", "q4_0/avx2")]),
            packed: true,
            load_average: Some(0.5),
            rows: vec![
                row(512, 0, figures([30.0, 32.0], 1000, Some(1.5)), figures([10.0, 8.0], 4000, Some(6.0))),
                row(0, 64, figures([8.0, 9.0], 1000, None), figures([4.0, 4.5], 4100, None)),
            ],
            limits: vec![Limits { threads: 2, read: 10e9, int8: Some(124e9) }],
        }
    }

    #[test]
    fn a_comparison_in_markdown() {
        let mut text = Vec::new();
        example().markdown(&mut text).unwrap();
        insta::assert_snapshot!(String::from_utf8(text).unwrap());
    }

    #[test]
    fn a_comparison_in_csv() {
        let mut text = Vec::new();
        example().csv(&mut text).unwrap();
        insta::assert_snapshot!(String::from_utf8(text).unwrap());
    }

    #[test]
    fn a_comparison_in_json() {
        let json = example().json();
        let vs = &json[0]["vs"]["a<b"];
        assert_eq!(
            (&vs["ratio"], &vs["peak_rss_ratio"], &vs["time_to_first_token_ratio"]),
            (&json!(3.5), &json!(0.25), &json!(0.25))
        );
        assert_eq!(
            (&json[0]["of_int8"], &json[1]["of_read"], &json[1]["vs"]["a<b"]["of_read"]),
            (&json!(0.5), &json!(0.85), &json!(0.425))
        );
        assert_eq!(json[1]["vs"]["a<b"]["time_to_first_token_ratio"], Value::Null);
    }
}
