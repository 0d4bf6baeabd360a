//! Words of memory that a device may write at the same time. The only unsafe code of this crate.

use shootdown::Range;

/// Part of a mapping that the self check made: it lies in the address space until the check unmaps it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Words(Range);

impl Words {
    /// # Safety
    /// `range` is mapped for reading and writing while this value is used to do either, begins at a multiple of 8, is a
    /// multiple of 8 bytes long, and no reference to it exists.
    pub(crate) unsafe fn new(range: Range) -> Self {
        debug_assert!(range.start().get().is_multiple_of(8) && range.len().is_multiple_of(8));
        Self(range)
    }

    fn places(self) -> impl Iterator<Item = *mut u64> {
        let first = self.0.start().get() as *mut u64;
        let count = (self.0.len() / 8) as usize;
        (0..count).map(move |nth| first.wrapping_add(nth))
    }

    /// Stores `word(n)` in the n-th word.
    pub(crate) fn fill(self, word: impl Fn(u64) -> u64) {
        for (nth, place) in (0..).zip(self.places()) {
            // SAFETY: the promise of `new`; volatile, as the device reads it.
            unsafe { place.write_volatile(word(nth)) };
        }
    }

    /// The number of the first word for which `wrong` says so.
    pub(crate) fn find(self, wrong: impl Fn(u64, u64) -> bool) -> Option<u64> {
        (0..).zip(self.places()).find_map(|(nth, place)| {
            // SAFETY: the promise of `new`; volatile, as the device writes it.
            let word = unsafe { place.read_volatile() };
            wrong(nth, word).then_some(nth)
        })
    }
}
