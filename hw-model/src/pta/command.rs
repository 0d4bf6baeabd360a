//! What the opcodes ask for.

use shootdown::Rights;

use super::layout::{
    ADD, ADDRESSES, CHECKSUM, COMMAND, COMPARE, COPY, DESTINATION, FILL, FOR_WRITE, LENGTH, OPCODE,
    SOURCE, TOUCH,
};

/// What a command needs to be allowed at its source, and at its destination.
pub(super) fn needs(words: &[u64; 8]) -> (Option<Rights>, Option<Rights>) {
    let command = words[COMMAND];
    let touch = if FOR_WRITE.get(command) == 1 {
        Rights::WRITE
    } else {
        Rights::READ
    };
    match OPCODE.get(command) {
        COPY => (Some(Rights::READ), Some(Rights::WRITE)),
        FILL => (None, Some(Rights::WRITE)),
        COMPARE => (Some(Rights::READ), Some(Rights::READ)),
        CHECKSUM => (Some(Rights::READ), None),
        ADD => (None, Some(Rights::READ_WRITE)),
        TOUCH => (None, Some(touch)),
        _ => (None, None),
    }
}

/// Whether the device takes the command.
pub(super) fn is_possible(words: &[u64; 8]) -> bool {
    let (source, destination) = needs(words);
    let len = words[LENGTH];
    let translated = |word: usize| {
        let end = words[word].checked_add(len);
        end.is_some_and(|end| end <= ADDRESSES)
    };
    let word = words[DESTINATION].is_multiple_of(8) && len == 8;
    (source.is_some() || destination.is_some())
        && len > 0
        && (source.is_none() || translated(SOURCE))
        && (destination.is_none() || translated(DESTINATION))
        && (OPCODE.get(words[COMMAND]) != ADD || word)
}
