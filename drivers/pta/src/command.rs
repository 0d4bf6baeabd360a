//! Commands, as the device takes them.

use shootdown::{Addr, Range};

use crate::layout::slot;

/// A command. All addresses are of the process.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Command {
    /// Copies bytes, the first ones first.
    Copy {
        /// Where from.
        from: Range,
        /// Where to.
        to: Addr,
    },
    /// Fills with a word, of which the first byte goes to the first address.
    Fill {
        /// Where.
        range: Range,
        /// With what.
        word: u64,
    },
    /// Compares: the offset of the first byte that differs, or `u64::MAX`.
    Compare {
        /// What.
        with: Range,
        /// With what, as long.
        other: Addr,
    },
    /// Adds up the bytes, each times its offset plus one, modulo 2^64.
    Checksum {
        /// Of what.
        range: Range,
    },
    /// Adds to a word, atomically: what was there.
    AtomicAdd {
        /// Where, a multiple of 8.
        at: Addr,
        /// What is added, modulo 2^64.
        value: u64,
    },
    /// Faults pages in and waits for them, without an access.
    Touch {
        /// Which.
        range: Range,
        /// They have to be writable.
        write: bool,
    },
}

impl Command {
    /// The words of a slot, up to the operand.
    pub(crate) fn words(&self) -> [u64; 5] {
        let start = |range: &Range| range.start().get();
        // A length of 2^64 is one that the device refuses as well.
        let len = |range: &Range| u64::try_from(range.len()).unwrap_or(u64::MAX);
        let (opcode, source, destination, length, operand) = match self {
            Self::Copy { from, to } => (1, start(from), to.get(), len(from), 0),
            Self::Fill { range, word } => (2, 0, start(range), len(range), *word),
            Self::Compare { with, other } => (3, start(with), other.get(), len(with), 0),
            Self::Checksum { range } => (4, start(range), 0, len(range), 0),
            Self::AtomicAdd { at, value } => (5, 0, at.get(), 8, *value),
            Self::Touch { range, write } => {
                let opcode = 6 | slot::FOR_WRITE.of((*write).into());
                (opcode, 0, start(range), len(range), 0)
            }
        };
        let command = opcode | slot::STATUS.of(slot::ACTIVE);
        [command, source, destination, length, operand]
    }
}
