//! What the owner of a slot has found lately, for others to read: the newest few, each whole or not at all.
//!
//! One writer at a time, and nobody waits: a reader that meets a note which is being overwritten leaves it out.

use crate::addr::{Addr, Range};
use crate::primitive::atomic::{AtomicU64, Ordering, fence};

/// That an invalidation of `range` was the `number`th of `registration`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Note {
    pub(crate) registration: u64,
    pub(crate) number: u64,
    pub(crate) range: Range,
}

#[derive(Debug)]
struct Place {
    /// 0 while it is being written; else never the same twice.
    serial: AtomicU64,
    /// Registration, number, first and last address.
    words: [AtomicU64; 4],
}

/// The newest `N`.
#[derive(Debug)]
pub(crate) struct Notes<const N: usize> {
    written: AtomicU64,
    places: [Place; N],
}

impl<const N: usize> Notes<N> {
    pub(crate) fn new() -> Self {
        let word = || AtomicU64::new(0);
        Self {
            written: word(),
            places: std::array::from_fn(|_| Place {
                serial: word(),
                words: std::array::from_fn(|_| word()),
            }),
        }
    }

    /// By one thread at a time, each ordered after the one before.
    #[inline]
    pub(crate) fn write(&self, note: Note) {
        if N == 0 {
            return;
        }
        let serial = self.written.load(Ordering::Relaxed) + 1;
        self.written.store(serial, Ordering::Relaxed);
        let place = &self.places[serial as usize % N];
        // As a sequence lock: the serial is taken away, the words written, the serial set. The fence, with the one in `read`, keeps the
        // words behind the first store; Release keeps them before the last.
        place.serial.store(0, Ordering::Relaxed);
        if !planted!("r9-note") {
            fence(Ordering::Release);
        }
        let Note {
            registration,
            number,
            range,
        } = note;
        let (start, last) = (range.start().get(), range.last().get());
        let values = [registration, number, start, last];
        for (word, value) in place.words.iter().zip(values) {
            word.store(value, Ordering::Relaxed);
        }
        place.serial.store(serial, Ordering::Release);
    }

    /// Those that are whole, in no order.
    pub(crate) fn read(&self) -> impl Iterator<Item = Note> {
        self.places.iter().filter_map(|place| {
            let serial = place.serial.load(Ordering::Acquire);
            let words = |at: usize| place.words[at].load(Ordering::Relaxed);
            let [registration, number, start, last] = std::array::from_fn(words);
            fence(Ordering::Acquire);
            if serial == 0 || place.serial.load(Ordering::Relaxed) != serial {
                return None;
            }
            let range = Range::inclusive(Addr::new(start), Addr::new(last)).ok()?;
            Some(Note {
                registration,
                number,
                range,
            })
        })
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_newest_are_kept() {
        let notes = Notes::<4>::new();
        let range = Range::new(0u64, 4096).unwrap();
        (1..=10).for_each(|number| {
            notes.write(Note {
                registration: 7,
                number,
                range,
            });
        });
        let mut numbers: Vec<_> = notes.read().map(|note| note.number).collect();
        numbers.sort_unstable();
        assert_eq!(numbers, [7, 8, 9, 10]);
    }
}
