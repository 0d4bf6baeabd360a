//! Granules: where things are, in half a word, counted from a base of a node's own.

use super::node::FANOUT;
use crate::addr::Range;

pub(super) const PAGE_SHIFT: u32 = 12;

/// First and last page.
pub(super) type Pages = (u64, u64);

pub(super) fn pages(range: Range) -> Pages {
    let page = |addr: u64| addr >> PAGE_SHIFT;
    (page(range.start().get()), page(range.last().get()))
}

/// Which pages a node's granules are.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Scale {
    /// The first page of granule 0.
    base: u64,
    /// Pages of a granule, as a power of two.
    pub(super) shift: u32,
}

impl Scale {
    pub(super) const PAGES: Self = Self { base: 0, shift: 0 };

    /// The finest that has room for these pages, and for as much as possible on both sides.
    pub(super) fn of((first, last): Pages) -> Self {
        let mut shift = 0;
        while (last - first) >> shift >= i32::MAX as u64 / 2 {
            shift += 1;
        }
        let room = ((i32::MAX as u64) << shift) - (last - first);
        Self {
            base: first.saturating_sub(room / 2),
            shift,
        }
    }

    /// The granule of a page; what lies outside of all counts as in the outermost.
    #[inline]
    pub(super) fn granule(self, page: u64) -> i32 {
        let granule = page.saturating_sub(self.base) >> self.shift;
        i32::try_from(granule).unwrap_or(i32::MAX)
    }

    /// The first and the last of these pages; -1 for a last one before all.
    #[inline]
    pub(super) fn granules(self, (first, last): Pages) -> (i32, i32) {
        let last = match last < self.base {
            true => -1,
            false => self.granule(last),
        };
        (self.granule(first), last)
    }

    /// The same, of a page that it holds.
    #[inline]
    pub(super) fn granule_within(self, page: u64) -> i32 {
        debug_assert!(self.holds((page, page)));
        ((page - self.base) >> self.shift) as i32
    }

    #[inline]
    pub(super) fn holds(self, (first, last): Pages) -> bool {
        first >= self.base && (last - self.base) >> self.shift < i32::MAX as u64
    }

    #[inline]
    pub(super) fn pages(self, first: i32, last: i32) -> Pages {
        let start = |granule: i32| self.base + ((granule as u64) << self.shift);
        (start(first), start(last + 1) - 1)
    }
}

/// A bit for each of the words that is more than `than`.
#[cfg(any(not(target_arch = "x86_64"), loom))]
pub(super) fn above(words: &[i32; FANOUT], than: i32) -> u32 {
    let bit = |at: usize| u32::from(words[at] > than) << at;
    (0..FANOUT).fold(0, |all, at| all | bit(at))
}

/// The same, four at a time, which compilers do not find.
#[cfg(all(target_arch = "x86_64", not(loom)))]
#[inline]
pub(super) fn above(words: &[i32; FANOUT], than: i32) -> u32 {
    use std::arch::x86_64::*;
    const _: () = assert!(FANOUT == 16);
    // SAFETY: every processor of the architecture has these instructions; and what is loaded, for which no alignment is asked, are four
    // of sixteen each time.
    unsafe {
        let than = _mm_set1_epi32(than);
        let four = |at: usize| _mm_loadu_si128(words.as_ptr().add(at).cast());
        let above = |at: usize| _mm_cmpgt_epi32(four(at), than);
        let lower = _mm_packs_epi32(above(0), above(4));
        let upper = _mm_packs_epi32(above(8), above(12));
        _mm_movemask_epi8(_mm_packs_epi16(lower, upper)) as u32
    }
}
