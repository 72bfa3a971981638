//! The `gemrun` command.

fn main() {}
