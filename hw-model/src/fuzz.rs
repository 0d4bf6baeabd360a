//! What holds for whatever bytes: a function for each fuzz target of `tests/fuzz`, defined beside what it looks at.

pub use crate::gru::fuzz::{control_block, registers as gru_registers};

#[cfg(test)]
#[path = "../../tests/fuzz/replay.rs"]
mod replay;

#[cfg(test)]
mod tests {
    use super::replay::replay;

    #[test]
    fn the_corpus_of_control_blocks_holds() {
        replay("gru_control_block", 256, super::control_block);
    }

    #[test]
    fn the_corpus_of_registers_holds() {
        replay("gru_registers", 64, super::gru_registers);
    }
}
