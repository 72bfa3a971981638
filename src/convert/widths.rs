//! Bit widths by a mobile checkpoint's own account: the map from module names to bits in `quantization_config`.
//!
//! Widths are recorded nowhere beside the tensors, but they show in shapes, since packed rows are shorter. The one idea: the shape
//! decides and the map must agree; a map that says something else, or that is about other modules, is no map of this
//! checkpoint. Names are searched as transformers does: all patterns as one alternation, so that the leftmost
//! match counts and the order of patterns only breaks ties. Published maps have a look-ahead, hence `fancy_regex`.

use std::cell::Cell;

use fancy_regex::Regex;

use super::json::Json;
use crate::{Error, Result};

/// Published maps have eleven patterns.
const MAX_PATTERNS: usize = 1000;

/// The map.
pub(super) struct Widths {
    usual: usize,
    patterns: Vec<(Regex, usize)>,
    /// Modules that are not quantized.
    excluded: Vec<(String, Regex)>,
    asked: Cell<usize>,
    matched: Cell<usize>,
}

impl Widths {
    /// Reads `quantization_config`.
    ///
    /// # Errors
    /// `Unsupported` for another quantization, `Invalid` with the key for what makes no sense.
    pub(super) fn read(quantization: &Json) -> Result<Widths> {
        let method = quantization.need("quant_method")?;
        if method.text()? != "gemma" {
            return Err(method.unsupported("gemma, or no quantization_config"));
        }
        let bits = |holder: &Json, usual: usize| match holder.get("num_bits") {
            Some(bits) => bits.uint(2, 8).and_then(|n| match n {
                2 | 4 | 8 => Ok(n),
                _ => Err(bits.wrong("2, 4 or 8")),
            }),
            None => Ok(usual),
        };
        let compiled = |pattern: &str, value: &Json| {
            Regex::new(pattern).map_err(|_| value.wrong(&format!("a key that is a regular expression, not {pattern}")))
        };
        let usual = bits(quantization, 4)?;
        let map = quantization.get("module_quant_configs").map_or(Ok(Vec::new()), |map| map.entries())?;
        let excluded = quantization.get("modules_to_not_convert").map_or(Ok(Vec::new()), |list| list.list())?;
        if map.len().max(excluded.len()) > MAX_PATTERNS {
            return Err(quantization.wrong(&format!("at most {MAX_PATTERNS} patterns")));
        }
        let patterns = map.iter().map(|(pattern, entry)| Ok((compiled(pattern, entry)?, bits(entry, usual)?)));
        let excluded = excluded.iter().map(|name| {
            let text = name.text()?;
            // From the start to the end of a part of the name, as a pattern or as it is; or at the end.
            Ok((text.to_string(), compiled(&format!(r"^(?:{text})(?:(?<=\.)|(?=\.|$))"), name)?))
        });
        Ok(Widths {
            usual,
            patterns: patterns.collect::<Result<_>>()?,
            excluded: excluded.collect::<Result<_>>()?,
            asked: Cell::new(0),
            matched: Cell::new(0),
        })
    }

    /// The bits of the weights of `module`; `None` if it is not quantized.
    pub(super) fn of(&self, module: &str) -> Result<Option<usize>> {
        let failed = |e: fancy_regex::Error| Error::invalid(format!("config.json: quantization_config: {module}: {e}"));
        for (text, pattern) in &self.excluded {
            if module.ends_with(text) || pattern.is_match(module).map_err(failed)? {
                return Ok(None);
            }
        }
        self.asked.set(self.asked.get().saturating_add(1));
        let mut best: Option<(usize, usize)> = None;
        for (pattern, bits) in &self.patterns {
            if let Some(found) = pattern.find(module).map_err(failed)?
                && best.is_none_or(|(start, _)| found.start() < start)
            {
                best = Some((found.start(), *bits));
            }
        }
        if best.is_some() {
            self.matched.set(self.matched.get().saturating_add(1));
        }
        Ok(Some(best.map_or(self.usual, |(_, bits)| bits)))
    }

    /// Refuses a map that matched nothing it was asked for.
    pub(super) fn check(&self) -> Result<()> {
        if self.matched.get() == 0 && !self.patterns.is_empty() {
            let error = format!(
                "config.json: quantization_config.module_quant_configs: matches none of {} quantized modules: expected this model's map",
                self.asked.get()
            );
            return Err(Error::invalid(error));
        }
        Ok(())
    }
}
