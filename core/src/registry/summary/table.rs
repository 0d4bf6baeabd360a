//! Words in an open-addressed table that is replaced when it is full.

use super::{LEVEL_SHIFT, LOOKED_AT, PAGE_SHIFT, mask};
use crate::addr::Range;
use crate::primitive::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use crate::primitive::prefetch;

/// Cells of a table that is not likely to be in a cache nearby, of which a core has its own.
const FAR: usize = 1 << 14;

/// Level and place of a word; never 0. Words that lie side by side have keys that do, see [`spread`].
pub(super) fn key(level: u32, word: u64) -> u64 {
    u64::from(level + 1) << 56 | word
}

/// Where the search for a key begins.
#[inline]
pub(super) fn place(key: u64, cells: usize) -> usize {
    // Of 2^64 each cell has its part: so tables need not be powers of two.
    ((u128::from(spread(key)) * cells as u128) >> 64) as usize
}

/// Spreads keys over 2^64: the upper bits of the product depend on all of theirs, and come first. By 2^64 the factor is a number whose
/// continued fraction ends in ones, as the golden section's: so many keys in a row as there are lie nearly evenly, and seldom two at one
/// place. Words of an arena are such. Of 3^11 numbers it is that under which keys at other even distances meet least too, which they do
/// in heaps under the golden section.
pub(super) fn spread(key: u64) -> u64 {
    key.wrapping_mul(0xc8b2_d5c1_098e_5917)
}

#[derive(Debug)]
#[repr(align(16))]
pub(super) struct Cell {
    /// 0 while it is empty.
    pub(super) key: AtomicU64,
    pub(super) bits: AtomicU64,
}

#[derive(Debug)]
pub(super) struct Table {
    pub(super) cells: Box<[Cell]>,
}

impl Table {
    fn new(cells: usize) -> Box<Self> {
        let mut room = Vec::with_capacity(cells);
        huge_pages(&room);
        room.extend((0..cells).map(|_| Cell {
            key: AtomicU64::new(0),
            bits: AtomicU64::new(0),
        }));
        Box::new(Self {
            cells: room.into_boxed_slice(),
        })
    }

    /// The cell of `key`, or the empty one where it would be.
    #[inline]
    pub(super) fn find(&self, key: u64) -> &Cell {
        let cells = self.cells.len();
        let mut at = place(key, cells);
        loop {
            let cell = &self.cells[at];
            // Acquire, with the Release that sets it: the bits go with it.
            let found = cell.key.load(Ordering::Acquire);
            if found == key || found == 0 {
                return cell;
            }
            at += 1;
            if at == cells {
                at = 0;
            }
        }
    }

    #[inline]
    fn bits(&self, key: u64) -> u64 {
        // Acquire: who finds bits taken away sees what its entry left behind. An empty cell has none.
        self.find(key).bits.load(Ordering::Acquire)
    }

    /// Whether an entry may have marked granules of this level in `range`.
    #[inline]
    pub(super) fn may_hit(&self, level: u32, range: Range) -> bool {
        let shift = PAGE_SHIFT + level * LEVEL_SHIFT;
        let (first, last) = (range.start().get() >> shift, range.last().get() >> shift);
        if first / 64 == last / 64 {
            return self.bits(key(level, first / 64)) & mask(first, last) != 0;
        }
        self.some_may_hit(level, first, last)
    }

    /// The same for granules in several words.
    #[inline(never)]
    fn some_may_hit(&self, level: u32, first: u64, last: u64) -> bool {
        let (left, right) = (first / 64, last / 64);
        right - left >= LOOKED_AT
            || (left..=right).any(|word| {
                let first = if word == left { first } else { 0 };
                let last = if word == right { last } else { 63 };
                self.bits(key(level, word)) & mask(first, last) != 0
            })
    }
}

/// Asks for large pages for what is about to be written to `room`, if it is large: most of what a walk of many registrations would pay for a
/// word of it is the way there. Only advice.
fn huge_pages(room: &Vec<Cell>) {
    const HUGE: usize = 2 << 20;
    const PAGE: usize = 1 << PAGE_SHIFT;
    let start = room.as_ptr().addr().next_multiple_of(PAGE);
    let end = room.as_ptr().addr() + room.capacity() * size_of::<Cell>();
    if end.saturating_sub(start) >= HUGE {
        // SAFETY: pages of the vector's own, whose contents stay as they are.
        unsafe {
            libc::madvise(
                start as *mut _,
                (end - start) & !(PAGE - 1),
                libc::MADV_HUGEPAGE,
            )
        };
    }
}

/// A table that was replaced, from `Box::into_raw`. Not a `Box`, which would claim it for itself while walks still read it.
#[derive(Debug)]
pub(crate) struct Old(*mut Table);

impl Drop for Old {
    fn drop(&mut self) {
        // SAFETY: unlinked once, in `grow`; the parent drops it when no walk reads it any more.
        drop(unsafe { Box::from_raw(self.0) });
    }
}

/// Words in a table that can be replaced.
#[derive(Debug)]
pub(super) struct Tier {
    /// From `Box::into_raw`; never null.
    table: AtomicPtr<Table>,
    /// Where its cells are, or were, and how many: for those who may not look at the table yet.
    cells: AtomicPtr<Cell>,
    len: AtomicUsize,
    /// Cells that it has at least.
    least: usize,
}

impl Tier {
    pub(super) fn new(least: usize) -> Self {
        let table = Table::new(least);
        Self {
            cells: AtomicPtr::new(table.cells.as_ptr().cast_mut()),
            len: AtomicUsize::new(table.cells.len()),
            table: AtomicPtr::new(Box::into_raw(table)),
            least,
        }
    }

    /// A walk is going to look for `key`, when it has begun.
    #[inline]
    pub(super) fn expect(&self, key: u64) {
        if let Some(cell) = self.hint(key) {
            prefetch(cell);
        }
    }

    /// Where the search for `key` is going to begin, most likely; `None` where the table is near.
    #[inline]
    pub(super) fn hint(&self, key: u64) -> Option<*const Cell> {
        let len = self.len.load(Ordering::Relaxed);
        // What is smaller is near.
        if len < FAR {
            return None;
        }
        // Relaxed: if these are of two tables, another line comes for nothing.
        let cells = self.cells.load(Ordering::Relaxed);
        Some(cells.wrapping_add(place(key, len)))
    }

    #[inline]
    pub(super) fn table(&self) -> &Table {
        // Acquire, with the Release in `grow`: the cells are complete.
        let table = self.table.load(Ordering::Acquire);
        // SAFETY: from `Box::into_raw`. The caller is a walk that began before it was replaced, so that the parent has not freed it yet;
        // or the writer, who alone replaces it.
        unsafe { &*table }
    }

    /// Another table, with the words that have bits and room for a third more. Gives back the old one, and how many those are.
    pub(super) fn grow(&self) -> (Old, usize) {
        let old = self.table();
        let live = |cell: &&Cell| cell.bits.load(Ordering::Relaxed) != 0;
        let words = old.cells.iter().filter(live).count();
        let room = (words + words / 3 + 2) * 8 / 5;
        let new = Table::new(room.max(self.least));
        for cell in old.cells.iter().filter(live) {
            let key = cell.key.load(Ordering::Relaxed);
            let copy = new.find(key);
            let bits = cell.bits.load(Ordering::Relaxed);
            copy.bits.store(bits, Ordering::Relaxed);
            copy.key.store(key, Ordering::Relaxed);
        }
        self.len.store(new.cells.len(), Ordering::Relaxed);
        let cells = new.cells.as_ptr().cast_mut();
        self.cells.store(cells, Ordering::Relaxed);
        // Release, with the Acquire in `table`. Whoever still reads the old one began before the entry that made it grow is published.
        let old = self.table.swap(Box::into_raw(new), Ordering::Release);
        (Old(old), words)
    }
}

impl Drop for Tier {
    fn drop(&mut self) {
        // SAFETY: from `Box::into_raw`, and `&mut self` means that no walk reads it.
        drop(unsafe { Box::from_raw(self.table.load(Ordering::Relaxed)) });
    }
}
