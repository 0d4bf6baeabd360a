//! A flat array of 64-bit entries that costs memory only where it is used.
//!
//! Page table and shadow need one word for every 4 KiB of an arena that is mostly empty. The array is an anonymous
//! mapping, so that its pages appear on first use and can be given back while readers look on.

use shootdown_primitive::sync::atomic::{AtomicU64, Ordering};

use std::io;

use memmap2::{MmapOptions, MmapRaw, UncheckedAdvice};

/// An array of words, all zero at first.
pub(crate) struct Table {
    words: MmapRaw,
    len: usize,
}

impl Table {
    /// An array of `len` words. May wait (system call).
    pub(crate) fn new(len: usize) -> io::Result<Self> {
        let bytes = len
            .checked_mul(size_of::<AtomicU64>())
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let words = MmapOptions::new().len(bytes).no_reserve_swap().map_anon()?;
        Ok(Self {
            words: words.into(),
            len,
        })
    }

    /// The words.
    pub(crate) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page aligned, readable and writable, `len` words long and lives as long as `self`;
        // zero bytes are valid words; nothing but this slice of atomics ever accesses it.
        unsafe { std::slice::from_raw_parts(self.words.as_mut_ptr().cast::<AtomicU64>(), self.len) }
    }

    /// Makes all words zero and gives their memory back. Readers may look on; no writer may be active.
    pub(crate) fn clear(&self) {
        // SAFETY: the mapping is private and anonymous, so its pages read as zeros afterwards: for readers that is a
        // store of zero to each word.
        let dropped = unsafe { self.words.unchecked_advise(UncheckedAdvice::DontNeed) };
        if dropped.is_err() {
            for word in self.words() {
                // Relaxed: whoever clears publishes the array anew afterwards, with its own release.
                word.store(0, Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cleared_words_are_zero_and_usable_again() {
        let table = Table::new(5000).unwrap();
        let words = table.words();
        assert_eq!(words.len(), 5000);
        words[4999].store(7, Ordering::Relaxed);
        table.clear();
        assert_eq!(words[4999].load(Ordering::Relaxed), 0);
        words[0].store(1, Ordering::Relaxed);
        assert_eq!(words[0].load(Ordering::Relaxed), 1);
    }
}
