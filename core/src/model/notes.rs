//! What slots remember for the faults that ask.

use std::sync::Arc as StdArc;

use loom::thread;

use super::check;
use crate::addr::Range;
use crate::notes::{Note, Notes};

/// R9: a torn note could clear a fault that was disturbed.
#[test]
fn a_note_is_read_as_it_was_written_or_not_at_all() {
    let note = |number: u64| Note {
        registration: number,
        number,
        range: Range::new(number << 12, number << 12).unwrap(),
    };
    check(3, move || {
        let notes = StdArc::new(Notes::<1>::new());
        notes.write(note(1));
        let writer = {
            let notes = notes.clone();
            thread::spawn(move || notes.write(note(2)))
        };
        for read in notes.read() {
            let whole = read == note(1) || read == note(2);
            assert!(whole, "a torn note: {read:?}");
        }
        writer.join().unwrap();
    });
}
