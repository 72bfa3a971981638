//! Static activation scales for a model that has none.
//!
//! The one idea: run a text through the model, remember how large the inputs of every matrix get, and try a few scales. The
//! largest magnitude loses nothing to clipping; a quantile of the magnitudes clips a few outliers and rounds all others more
//! finely. Which is better differs from one kind of matrix to another, and is decided on text that was not looked at before: by
//! how far the model's predictions move from those it makes with a scale for each 32 values.
//!
//! The scales are written to a small GGUF file of their own, which names the model by a digest of its header:
//!
//! ```text
//! general.architecture        gemrun-static
//! static.version              1
//! static.source.sha256        of the model's header
//! static.input_scale.{role}   one for each layer, 0 where the layer has no such matrix
//! static.kl                   what the scales cost on the text, in nats a token
//! ```

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::config::ROLES;
use crate::gguf::Gguf;
use crate::gguf::write::Writer;
use crate::kv::KvType;
use crate::model::Model;
use crate::new_file::NewFile;
use crate::sample::LogProbs;
use crate::team::Team;
use crate::weight::Numerics;
use crate::windows::predict;
use crate::{Error, Result};

const ARCHITECTURE: &str = "gemrun-static";
const VERSION: u32 = 1;

/// Shares of the magnitudes that are not clipped.
pub const QUANTILES: [f64; 3] = [1.0, 0.9999, 0.999];

/// Tokens of held-out text to decide by, at most: their logits are kept.
const HELD_OUT: usize = 128;

/// What was chosen and what it costs.
pub struct Calibrated {
    /// For each of [`ROLES`], the quantile of its magnitudes that becomes 127.
    pub quantiles: [f64; ROLES.len()],
    /// (roles, layers) what a unit of the rounded input is worth; 0 where a layer has no such matrix.
    pub scales: Vec<Vec<f32>>,
    /// Mean divergence of the predictions on held-out text from those with dynamic scales, in nats a token.
    pub kl: f64,
    /// Perplexity of the held-out text with static scales.
    pub ppl: f64,
    /// The same with dynamic scales.
    pub ppl_dynamic: f64,
    /// Tokens of held-out text.
    pub held_out: usize,
}

/// Hears how much is done of how much there is.
pub type Progress<'p> = dyn FnMut(usize, usize) + 'p;

/// Chooses scales for `gguf` by `windows` of text, of which the last fifth is held out.
///
/// # Errors
/// [`Kind::Unsupported`](crate::Kind) if the file has static scales already; [`Kind::Usage`](crate::Kind) if there are fewer than
/// two windows.
pub fn calibrate(
    gguf: &Gguf,
    numerics: &Numerics,
    team: &mut Team,
    windows: &[Vec<u32>],
    progress: &mut Progress,
) -> Result<Calibrated> {
    let mut model = Model::load(gguf, numerics)?;
    if model.config.srq.is_some() {
        return Err(Error::unsupported(format!("{}: has static scales already", gguf.name())));
    }
    if windows.len() < 2 {
        let error = "text: too short: expected at least two windows, one of them to judge the scales by";
        return Err(Error::usage(error));
    }
    let (seen, held_out) = windows.split_at(windows.len() - windows.len().div_ceil(5));
    let mut left = HELD_OUT;
    let mut judges = Vec::new();
    for window in held_out {
        let tokens = window.len().saturating_sub(1).min(left);
        left -= tokens;
        judges.push(&window[..tokens + 1]);
    }

    // One step for each window, and one for each choice of scales.
    let trials = 1 + (QUANTILES.len() - 1) * (1 + ROLES.len());
    let (mut done, total) = (0, seen.len() + 1 + trials);
    let mut step = || {
        done += 1;
        progress(done, total);
    };

    let layers = model.layers.len();
    let mut inputs = Vec::new(); // (role, layer, magnitudes)
    for il in 0..layers {
        for (role, weight) in model.layer_weights(il) {
            inputs.push((role, il, weight.observe()));
        }
    }
    for window in seen {
        each_row(gguf, &model, team, &[window], &mut |_, _| {})?;
        step();
    }
    let scales_of = |role: &str, quantile: f64| {
        let mut scales = vec![0.0; layers];
        for (_, il, seen) in inputs.iter().filter(|(known, ..)| *known == role) {
            scales[*il] = (seen.quantile(quantile) / 127.0).max(1e-30);
        }
        scales
    };

    let dynamic = Model::load(gguf, numerics)?;
    let mut expected = Vec::new();
    let mut nll = 0.0;
    each_row(gguf, &dynamic, team, &judges, &mut |row, target| {
        nll -= LogProbs::new(row).of(target);
        expected.push(row.to_vec());
    })?;
    let tokens = expected.len();
    let ppl_dynamic = libm::exp(nll / tokens as f64);
    drop(dynamic);
    step();

    let mut trial = |quantiles: &[f64; ROLES.len()]| -> Result<Calibrated> {
        let scales: Vec<Vec<f32>> = ROLES.iter().zip(quantiles).map(|(role, &q)| scales_of(role, q)).collect();
        let numerics = Numerics { input_scales: Arc::new(by_name(&scales)), ..numerics.clone() };
        let model = Model::load(gguf, &numerics)?;
        let (mut kl, mut nll, mut rows) = (0.0, 0.0, expected.iter());
        each_row(gguf, &model, team, &judges, &mut |row, target| {
            let found = LogProbs::new(row);
            kl += rows.next().map_or(0.0, |row| LogProbs::new(row).kl_from(&found));
            nll -= found.of(target);
        })?;
        let n = tokens as f64;
        let (kl, ppl) = (kl / n, libm::exp(nll / n));
        step();
        Ok(Calibrated { quantiles: *quantiles, scales, kl, ppl, ppl_dynamic, held_out: tokens })
    };
    let mut best = trial(&[QUANTILES[0]; ROLES.len()])?;
    let mut try_it = |best: &mut Calibrated, quantiles: [f64; ROLES.len()]| -> Result<()> {
        let found = trial(&quantiles)?;
        if found.kl < best.kl {
            *best = found;
        }
        Ok(())
    };
    for quantile in &QUANTILES[1..] {
        try_it(&mut best, [*quantile; ROLES.len()])?;
    }
    for role in 0..ROLES.len() {
        let now = best.quantiles[role];
        for quantile in QUANTILES.into_iter().filter(|&quantile| quantile != now) {
            let mut quantiles = best.quantiles;
            quantiles[role] = quantile;
            try_it(&mut best, quantiles)?;
        }
    }
    Ok(best)
}

/// [`predict`] of several windows, as `eval` computes them.
fn each_row(
    gguf: &Gguf,
    model: &Model,
    team: &mut Team,
    windows: &[impl AsRef<[u32]>],
    each: &mut dyn FnMut(&[f32], u32),
) -> Result<()> {
    let way = (KvType::F32, model.batch());
    let mut windows = windows.iter().map(AsRef::as_ref).filter(|window| window.len() > 1);
    windows.try_for_each(|window| predict(gguf.name(), model, team, way, window, &mut *each))
}

/// Scales (roles, layers) by the names of the matrices.
fn by_name(scales: &[Vec<f32>]) -> BTreeMap<String, f32> {
    let all = ROLES.iter().zip(scales).flat_map(|(role, scales)| {
        scales.iter().enumerate().map(move |(il, &scale)| (format!("blk.{il}.{role}"), scale))
    });
    all.filter(|(_, scale)| *scale > 0.0).collect()
}

/// Writes the scales for `gguf` to the file `path`, in place of what had that name.
///
/// # Errors
/// [`Kind::Other`](crate::Kind) if the file cannot be written.
pub fn write(path: &Path, gguf: &Gguf, calibrated: &Calibrated) -> Result<()> {
    let mut writer = Writer::new();
    writer.metadata("general.architecture", ARCHITECTURE);
    writer.metadata("static.version", VERSION);
    writer.array("static.source.sha256", &digest(gguf));
    for (role, scales) in ROLES.iter().zip(&calibrated.scales) {
        writer.array(&format!("static.input_scale.{role}"), scales);
    }
    writer.metadata("static.kl", calibrated.kl);
    let bytes = writer.to_vec()?;
    let mut file = NewFile::create(path)?;
    file.write_all(&bytes).map_err(|e| Error::io(path, &e))?;
    file.finish()
}

/// Reads the scales that [`write`] wrote for `gguf`, by the names of its matrices.
///
/// # Errors
/// [`Kind::Invalid`](crate::Kind) if the file is damaged or belongs to another model, and what opening it can end with.
pub fn read(path: &Path, gguf: &Gguf) -> Result<BTreeMap<String, f32>> {
    let file = Gguf::open(path)?;
    let wrong = |what: &str, expected: &str| Error::invalid(format!("{}: {what}: expected {expected}", file.name()));
    if file.string("general.architecture")? != Some(ARCHITECTURE) {
        return Err(wrong("not a file of static scales", "what gemrun calibrate writes"));
    }
    if file.uint("static.version")? != Some(VERSION.into()) {
        return Err(Error::unsupported(format!("{}: static.version: expected {VERSION}", file.name())));
    }
    let source = file.array("static.source.sha256")?.map(|array| array.raw());
    if source != Some(&digest(gguf)[..]) {
        return Err(wrong("made for another model", &format!("scales for {}", gguf.name())));
    }
    let mut all = Vec::new();
    for role in ROLES {
        let key = format!("static.input_scale.{role}");
        let array = file.array(&key)?.ok_or_else(|| wrong(&format!("{key} is missing"), "a scale for each layer"))?;
        let scales: Vec<f32> = array.floats()?.collect();
        if let Some(bad) = scales.iter().find(|&&scale| scale != 0.0 && !(1e-30..=f32::MAX).contains(&scale)) {
            return Err(wrong(&format!("{key}: {bad}"), "0 or a positive number"));
        }
        all.push(scales);
    }
    Ok(by_name(&all))
}

fn digest(gguf: &Gguf) -> [u8; 32] {
    Sha256::digest(gguf.header_bytes()).into()
}
