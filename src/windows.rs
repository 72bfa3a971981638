//! A text as a model predicts it: cut into windows, each begun with `<bos>`, so that every token is predicted exactly once and
//! from nothing before its window.

use crate::forward::{State, Want, forward};
use crate::kv::KvType;
use crate::model::Model;
use crate::sample::all_finite;
use crate::team::Team;
use crate::{Error, Result};

/// `bos` and the next `ctx - 1` tokens, until all are used.
pub fn windows(tokens: &[u32], ctx: usize, bos: u32) -> impl Iterator<Item = Vec<u32>> {
    tokens.chunks(ctx - 1).map(move |chunk| [&[bos], chunk].concat())
}

/// Calls `each` with the logits before each token of `window` but the first, and that token. `file` is the model's name.
///
/// # Errors
/// [`Kind::Invalid`](crate::Kind) if logits are not finite, and those of [`forward`].
pub fn predict(
    file: &str,
    model: &Model,
    team: &mut Team,
    (kv, batch): (KvType, usize),
    window: &[u32],
    mut each: impl FnMut(&[f32], u32),
) -> Result<()> {
    let (inputs, targets) = (&window[..window.len() - 1], &window[1..]);
    let mut state = State::new(model, kv, inputs.len(), batch)?;
    team.enter(|team| {
        for (inputs, targets) in inputs.chunks(batch).zip(targets.chunks(batch)) {
            let position = state.kv.len();
            let logits = forward(model, team, &mut state, inputs, Want::All)?;
            for ((row, &target), position) in logits.chunks(model.config.vocab).zip(targets).zip(position..) {
                if !all_finite(row) {
                    let error = format!("{file}: non-finite logits at position {position}: damaged model file?");
                    return Err(Error::invalid(error));
                }
                each(row, target);
            }
        }
        Ok(())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_predict_each_token_once() {
        let tokens = [10, 11, 12, 13, 14];
        let cut: Vec<_> = windows(&tokens, 3, 2).collect();
        assert_eq!(cut, [vec![2, 10, 11], vec![2, 12, 13], vec![2, 14]]);
    }
}
