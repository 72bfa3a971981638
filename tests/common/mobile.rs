//! The reference data of a mobile checkpoint: `../shared/golden-mobile`.

use super::npy::Npy;
use super::{argmax, kl, max_abs_difference};
use gemrun::convert::{Options, Target, convert};
use gemrun::gguf::Gguf;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A checkpoint and what other implementations computed with it.
pub struct Golden {
    folder: PathBuf,
    info: serde_json::Value,
}

/// `None` with a note on stderr where the data is absent.
pub fn golden() -> Option<Golden> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/golden-mobile/public");
    match std::fs::read(folder.join("ref/info.json")) {
        Ok(info) => Some(Golden { folder, info: serde_json::from_slice(&info).unwrap() }),
        Err(_) => {
            eprintln!("note: skipped, there is no ../shared/golden-mobile");
            None
        }
    }
}

/// How alike the logits of two implementations are.
#[derive(Debug)]
pub struct Agreement {
    /// Share of rows whose largest difference is below 1e-3.
    pub same_rows: f64,
    /// Share of rows with the same likeliest token.
    pub same_best: f64,
    /// Mean divergence of the distributions.
    pub kl: f64,
    /// Root mean square of the difference, relative to that of the expected logits.
    pub distance: f64,
}

/// Of rows as long as the last dimension of `expected`.
pub fn agreement(expected: &Npy, ours: &[f32]) -> Agreement {
    assert_eq!(expected.values.len(), ours.len());
    let rows = || expected.rows().zip(ours.chunks_exact(*expected.shape.last().unwrap()));
    let n = rows().count() as f64;
    let share = |same: &dyn Fn(&[f32], &[f32]) -> bool| rows().filter(|(p, q)| same(p, q)).count() as f64 / n;
    Agreement {
        same_rows: share(&|p, q| max_abs_difference(p.iter().copied(), q.iter().copied()) < 1e-3),
        same_best: share(&|p, q| argmax(p) == argmax(q)),
        kl: rows().map(|(p, q)| kl(p, q)).sum::<f64>() / n,
        distance: relative(ours, &expected.values),
    }
}

/// The root mean square of the difference, relative to that of `exact`.
pub fn relative(ours: &[f32], exact: &[f32]) -> f64 {
    let squares = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>();
    let difference = squares(&mut ours.iter().zip(exact).map(|(a, b)| a - b));
    (difference / squares(&mut exact.iter().copied())).sqrt()
}

impl Golden {
    /// The checkpoint, converted in both ways.
    pub fn files(&self) -> [(&'static str, Gguf); 2] {
        /// Both files, made once; as bytes, so that no file is left behind.
        static FILES: OnceLock<[Vec<u8>; 2]> = OnceLock::new();
        let [native, stock] = FILES.get_or_init(|| {
            let folder = std::env::temp_dir().join(format!("gemrun-mobile-{}", std::process::id()));
            std::fs::create_dir_all(&folder).unwrap();
            let files = [Target::Native, Target::Stock].map(|target| {
                let out = folder.join("out.gguf");
                let options = Options { target: Some(target), overwrite: true, ..Options::default() };
                convert(&self.folder.join("model"), &out, &options, &mut |_, _| std::ops::ControlFlow::Continue(()))
                    .unwrap();
                std::fs::read(out).unwrap()
            });
            std::fs::remove_dir_all(folder).unwrap();
            files
        });
        let open = |name, bytes: &Vec<u8>| Gguf::from_bytes(name, bytes.clone()).unwrap();
        [("native", open("native.gguf", native)), ("stock", open("stock.gguf", stock))]
    }

    /// A reference array.
    pub fn array(&self, name: &str) -> Npy {
        Npy::read(&std::fs::read(self.folder.join(format!("ref/{name}.npy"))).unwrap())
    }

    /// The reference's sequence of 1, 7, 64 or 200 tokens.
    pub fn tokens(&self, len: usize) -> Vec<u32> {
        ids(&self.info["sequences"][len.to_string()]["ids"])
    }

    /// How well `logits` of the short sequences agree with the array `name`, their first tokens left out.
    pub fn short(&self, name: &str, logits: impl Fn(&[u32]) -> Vec<f32>) -> Agreement {
        let short: serde_json::Value =
            serde_json::from_slice(&std::fs::read(self.folder.join("ref/short.json")).unwrap()).unwrap();
        let all = self.array(name); // (sequences, tokens, vocab)
        let [sequences, tokens, vocab] = all.shape[..] else { panic!("{:?}", all.shape) };
        let (mut expected, mut ours) = (Vec::new(), Vec::new());
        for (i, ids_of) in short["ids"].as_array().unwrap()[..sequences].iter().enumerate() {
            expected.extend(&all.values[(i * tokens + 1) * vocab..(i + 1) * tokens * vocab]);
            ours.extend(&logits(&ids(ids_of))[vocab..]);
        }
        agreement(&Npy { shape: vec![expected.len() / vocab, vocab], values: expected }, &ours)
    }
}

fn ids(value: &serde_json::Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}
