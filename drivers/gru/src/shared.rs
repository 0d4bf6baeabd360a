//! Words that processors and chiplets share, in memory of the driver's own.

use shootdown_primitive::sync::atomic::{AtomicU64, Ordering};

use shootdown::{Addr, AddressSpace, Map, Range};

use crate::error::GruError;

/// Zeroed memory of a space that is the driver's own. It goes with that space.
#[derive(Debug)]
pub(crate) struct Shared {
    range: Range,
}

impl Shared {
    /// `bytes` of it, rounded up to pages. `space` is the driver's own: nobody else unmaps anything in it.
    ///
    /// # Errors
    /// As [`AddressSpace::map`].
    pub(crate) fn map(space: &AddressSpace, bytes: u64) -> Result<Self, GruError> {
        let range = space.map(Map::anonymous(bytes.next_multiple_of(4096)))?;
        Ok(Self { range })
    }

    pub(crate) fn range(&self) -> Range {
        self.range
    }

    /// Where the byte at `offset` is.
    pub(crate) fn at(&self, offset: u64) -> Addr {
        Addr::new(self.range.start().get() + offset)
    }

    fn word(&self, offset: u64) -> &AtomicU64 {
        let inside = u128::from(offset) + 8 <= self.range.len();
        assert!(inside && offset.is_multiple_of(8), "a word of the memory");
        let word = self.at(offset).get() as *mut u64;
        // SAFETY: aligned, and inside of a mapping for reading and writing, which lasts: its space is the driver's own, and drops
        // it after this. Processors and chiplets access it atomically only.
        unsafe { AtomicU64::from_ptr(word) }
    }

    /// The word at `offset`, and with it whatever was stored before it.
    pub(crate) fn load(&self, offset: u64) -> u64 {
        // Acquire: of a message, a chiplet stores the first word last.
        self.word(offset).load(Ordering::Acquire)
    }

    pub(crate) fn store(&self, offset: u64, value: u64) {
        // Release: who sees it sees what was read and stored before.
        self.word(offset).store(value, Ordering::Release);
    }
}
