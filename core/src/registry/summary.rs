//! Where there is an entry at all: what makes an invalidation that hits nothing cheap, however many there are.
//!
//! Addresses are divided as a page table does it, with 6 bits a level: a *granule* of level 0 is a page of 4 KiB, one of the next
//! level 64 of those. A *word* has one bit for each of 64 granules that lie side by side. An entry is covered by
//! the fewest granules that are aligned to their size, so by two words a level at most, and their bits are set. A range
//! overlaps an entry, to the page, if a bit of the granules that it lies in is set on any level: for a few pages that is one word
//! for each level that is in use, whose position follows from the address.
//!
//! The words are in two open-addressed tables, found by level and address: those of pages in one, of which there are many, and those of
//! larger granules in the other, which are few. Walks read them beside a writer: a cell's key is set once,
//! its bits are stored as a whole. A table that is full of words, or of words that were, is replaced by another, by one
//! store. Nothing in them is ever too little for an entry that a walk has to find:
//! * bits are set before the insertion returns, so before the fence by which newcomers and walks meet (R8);
//! * they are taken away when it is no longer in the tree, and only where no other entry is counted. Where entries overlap the writer counts
//!   them, for each bit of the word; where they do not it keeps nothing.
//!
//! A walk that reads too much only goes to the tree for nothing.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::addr::Range;
use crate::primitive::atomic::{AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use crate::primitive::prefetch;

const PAGE_SHIFT: u32 = 12;
const LEVEL_SHIFT: u32 = 6;
const LEVELS: u32 = 9;
/// Words of a level that are looked at for one range; larger ones go to the tree.
const LOOKED_AT: u64 = 4;
/// Cells of a table at least: of pages.
const LEAST: usize = if cfg!(loom) { 4 } else { 64 };
/// Of what is larger. Mostly there are a few words of it, and what a walk asks for is not there: with room enough it meets no other one,
/// which no processor foresees.
const LEAST_LARGE: usize = if cfg!(loom) { 4 } else { 512 };

/// Cells of a table that is not likely to be in a cache nearby, of which a core has its own.
const FAR: usize = 1 << 14;

/// Level and place of a word; never 0. Words that lie side by side have keys that do, see [`spread`].
fn key(level: u32, word: u64) -> u64 {
    u64::from(level + 1) << 56 | word
}

/// Where the search for a key begins.
#[inline]
fn place(key: u64, cells: usize) -> usize {
    // Of 2^64 each cell has its part: so tables need not be powers of two.
    ((u128::from(spread(key)) * cells as u128) >> 64) as usize
}

/// Bits of granules, in one word.
fn mask(first: u64, last: u64) -> u64 {
    (u64::MAX << (first % 64)) & (u64::MAX >> (63 - last % 64))
}

/// Shows words and bits of the granules that cover `range`.
fn cover(range: Range, mut show: impl FnMut(u32, u64, u64)) {
    let mut first = range.start().get() >> PAGE_SHIFT;
    let mut last = range.last().get() >> PAGE_SHIFT;
    for level in 0..LEVELS {
        let (left, right) = (first / 64, last / 64);
        if left == right {
            show(level, left, mask(first, last));
            return;
        }
        // The ends stay here, whole words go up. There are words in between, or none: `right` is after `left`.
        let ends = (!first.is_multiple_of(64), last % 64 != 63);
        if ends.0 {
            show(level, left, mask(first, 63));
        }
        if ends.1 {
            show(level, right, mask(0, last));
        }
        let (next, end) = (left + u64::from(ends.0), right + u64::from(!ends.1));
        if next == end {
            return;
        }
        (first, last) = (next, end - 1);
    }
    unreachable!("the last level has one word");
}

#[derive(Debug)]
#[repr(align(16))]
struct Cell {
    /// 0 while it is empty.
    key: AtomicU64,
    bits: AtomicU64,
}

#[derive(Debug)]
struct Table {
    cells: Box<[Cell]>,
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
    fn find(&self, key: u64) -> &Cell {
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
    fn may_hit(&self, level: u32, range: Range) -> bool {
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

/// Words in a table that can be replaced.
#[derive(Debug)]
struct Tier {
    /// From `Box::into_raw`; never null.
    table: AtomicPtr<Table>,
    /// Where its cells are, or were, and how many: for those who may not look at the table yet.
    cells: AtomicPtr<Cell>,
    len: AtomicUsize,
    /// Cells that it has at least.
    least: usize,
}

impl Tier {
    fn new(least: usize) -> Self {
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
    fn expect(&self, key: u64) {
        let len = self.len.load(Ordering::Relaxed);
        // What is smaller is near.
        if len >= FAR {
            // Relaxed: if these are of two tables, another line comes for nothing.
            prefetch(
                self.cells
                    .load(Ordering::Relaxed)
                    .wrapping_add(place(key, len)),
            );
        }
    }

    #[inline]
    fn table(&self) -> &Table {
        // Acquire, with the Release in `grow`: the cells are complete.
        let table = self.table.load(Ordering::Acquire);
        // SAFETY: from `Box::into_raw`. The caller is a walk that began before it was replaced, so that the parent has not freed it yet;
        // or the writer, who alone replaces it.
        unsafe { &*table }
    }

    /// Another table, with the words that have bits and room for a third more. Gives back the old one, and how many those are.
    fn grow(&self) -> (Old, usize) {
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

/// What walks see.
#[derive(Debug)]
pub(super) struct Summary {
    /// Words of pages.
    pages: Tier,
    /// Words of what is larger: there are few, so that looking for one that is not there mostly stays in the cache.
    large: Tier,
    /// Levels that have a word in `large`.
    levels: AtomicU64,
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

/// The table's own hash: the keys are nobody's input.
#[derive(Debug, Default)]
struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes
            .iter()
            .for_each(|byte| self.write_u64(u64::from(*byte)));
    }

    fn write_u64(&mut self, key: u64) {
        // What a map of the standard library looks at is at both ends.
        self.0 = spread(self.0 ^ key).rotate_left(32);
    }
}

/// Spreads keys over 2^64: the upper bits of the product depend on all of theirs, and come first. By 2^64 the factor is a number whose
/// continued fraction ends in ones, as the golden section's: so many keys in a row as there are lie nearly evenly, and seldom two at one
/// place. Words of an arena are such. Of 3^11 numbers it is that under which keys at other even distances meet least too, which they do
/// in heaps under the golden section.
fn spread(key: u64) -> u64 {
    key.wrapping_mul(0xc8b2_d5c1_098e_5917)
}

/// What the writer knows besides.
#[derive(Debug, Default)]
pub(super) struct Marks {
    /// Cells that have a key, in the current tables.
    used: [usize; 2],
    /// Words that are marked, by level, as often as they are.
    words: [usize; LEVELS as usize],
    /// Of words in which entries overlap: how many for each bit.
    counts: HashMap<u64, Box<[u32; 64]>, BuildHasherDefault<Spread>>,
    /// Replaced: walks may see them.
    pub(super) unlinked: Vec<Old>,
}

impl Summary {
    pub(super) fn new() -> Self {
        Self {
            pages: Tier::new(LEAST),
            large: Tier::new(LEAST_LARGE),
            levels: AtomicU64::new(0),
        }
    }

    fn tier(&self, level: u32) -> &Tier {
        if level == 0 { &self.pages } else { &self.large }
    }

    /// A walk for `range` is going to begin.
    #[inline]
    pub(super) fn expect(&self, range: Range) {
        let word = range.start().get() >> (PAGE_SHIFT + LEVEL_SHIFT);
        self.pages.expect(key(0, word));
    }

    /// Whether an entry may overlap `range`. Inside of a walk.
    #[inline]
    pub(super) fn may_hit(&self, range: Range) -> bool {
        if self.pages.table().may_hit(0, range) {
            return true;
        }
        // Acquire, as for the bits.
        let mut levels = self.levels.load(Ordering::Acquire);
        while levels != 0 {
            let level = levels.trailing_zeros();
            levels &= levels - 1;
            if self.large.table().may_hit(level, range) {
                return true;
            }
        }
        false
    }

    /// An entry of `range` is about to be published.
    pub(super) fn mark(&self, marks: &mut Marks, range: Range) {
        cover(range, |level, word, mask| {
            let key = key(level, word);
            let tier = self.tier(level);
            let used = &mut marks.used[usize::from(level > 0)];
            let mut table = tier.table();
            let mut cell = table.find(key);
            if cell.key.load(Ordering::Relaxed) == 0 {
                if (*used + 1) * 8 > table.cells.len() * 5 {
                    let old;
                    (old, *used) = tier.grow();
                    marks.unlinked.push(old);
                    table = tier.table();
                    cell = table.find(key);
                }
                *used += 1;
            }
            let words = &mut marks.words[level as usize];
            if level > 0 && *words == 0 {
                // Only the writer writes. Release, with the walk's Acquire.
                let levels = self.levels.load(Ordering::Relaxed);
                self.levels.store(levels | 1 << level, Ordering::Release);
            }
            *words += 1;
            let bits = cell.bits.load(Ordering::Relaxed);
            if bits & mask != 0 || !marks.counts.is_empty() && marks.counts.contains_key(&key) {
                let counts = marks.counts.entry(key).or_insert_with(|| {
                    Box::new(std::array::from_fn(|bit| (bits >> bit) as u32 & 1))
                });
                each(mask, |bit| counts[bit] += 1);
            }
            cell.bits.store(bits | mask, Ordering::Release);
            cell.key.store(key, Ordering::Release);
        });
    }

    /// An entry of `range` is no longer in the tree.
    pub(super) fn unmark(&self, marks: &mut Marks, range: Range) {
        cover(range, |level, word, mask| {
            let key = key(level, word);
            let cell = self.tier(level).table().find(key);
            let bits = cell.bits.load(Ordering::Relaxed);
            let mut gone = mask;
            if !marks.counts.is_empty()
                && !planted!("r10-count")
                && let Some(counts) = marks.counts.get_mut(&key)
            {
                each(mask, |bit| {
                    counts[bit] -= 1;
                    gone &= !(u64::from(counts[bit] > 0) << bit);
                });
                if counts.iter().all(|count| *count <= 1) {
                    marks.counts.remove(&key);
                }
            }
            // Release: who finds them gone sees what was done before.
            cell.bits.store(bits & !gone, Ordering::Release);
            let words = &mut marks.words[level as usize];
            *words -= 1;
            if level > 0 && *words == 0 {
                // As above: nobody has a bit of this level any more.
                let levels = self.levels.load(Ordering::Relaxed);
                self.levels.store(levels & !(1 << level), Ordering::Release);
            }
        });
    }
}

/// Shows the numbers of the bits of `mask`.
fn each(mut mask: u64, mut show: impl FnMut(usize)) {
    while mask != 0 {
        show(mask.trailing_zeros() as usize);
        mask &= mask - 1;
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range() -> impl Strategy<Value = Range> {
        let len = (0u32..64, any::<u64>()).prop_map(|(shift, len)| len >> shift);
        (any::<u64>(), len)
            .prop_map(|(start, len)| Range::inclusive(start, start.saturating_add(len)).unwrap())
    }

    /// Hugging the borders of granules, where mistakes are.
    fn near() -> impl Strategy<Value = Range> {
        let edge = (0u32..9, 0u64..4, -2i64..3).prop_map(|(level, nth, off)| {
            let shift = PAGE_SHIFT + level * LEVEL_SHIFT;
            let at = nth.checked_shl(shift).unwrap_or(0);
            at.wrapping_add_signed(off << PAGE_SHIFT)
        });
        (edge.clone(), edge).prop_map(|(a, b)| Range::inclusive(a.min(b), a.max(b)).unwrap())
    }

    fn pages(range: Range) -> (u64, u64) {
        (range.start().get() >> 12, range.last().get() >> 12)
    }

    proptest! {
        #[test]
        fn the_granules_cover_the_pages_of_a_range_and_no_other(range in prop_oneof![range(), near()]) {
            let mut runs = Vec::new();
            let mut words = 0;
            cover(range, |level, word, mask| {
                words += 1;
                let shift = level * LEVEL_SHIFT;
                each(mask, |bit| {
                    let first = (word * 64 + bit as u64) << shift;
                    runs.push((first, first + ((1 << shift) - 1)));
                });
            });
            prop_assert!(words <= 2 * LEVELS);
            runs.sort_unstable();
            let gapless = runs.windows(2).all(|two| two[0].1 + 1 == two[1].0);
            prop_assert!(gapless);
            prop_assert_eq!((runs[0].0, runs[runs.len() - 1].1), pages(range));
        }

        #[test]
        fn it_agrees_with_a_naive_list_to_the_page(
            steps in prop::collection::vec((any::<bool>(), prop_oneof![range(), near()], any::<usize>()), 1..120),
            asked in prop::collection::vec(prop_oneof![range(), near()], 1..40),
        ) {
            let (summary, mut marks) = (Summary::new(), Marks::default());
            let mut naive: Vec<Range> = Vec::new();
            for (insert, range, nth) in steps {
                if insert || naive.is_empty() {
                    summary.mark(&mut marks, range);
                    naive.push(range);
                } else {
                    let gone = naive.swap_remove(nth % naive.len());
                    summary.unmark(&mut marks, gone);
                }
            }
            for range in asked {
                let (first, last) = pages(range);
                let hit = naive.iter().any(|one| {
                    let (from, to) = pages(*one);
                    from <= last && to >= first
                });
                let told = summary.may_hit(range);
                prop_assert!(told || !hit, "{range} is overlapped");
                // Large ones are not looked for.
                prop_assert!(!told || hit || last - first > 64, "{range} is not overlapped");
            }
            naive.into_iter().for_each(|range| summary.unmark(&mut marks, range));
            prop_assert!(marks.counts.is_empty());
            prop_assert_eq!(summary.levels.load(Ordering::Relaxed), 0);
            prop_assert!(!summary.may_hit(Range::new(0u64, 1u64 << 12).unwrap()));
        }
    }

    /// Of the words of `count` entries that lie `distance` words apart, those that are not where they are looked for first.
    fn displaced(distance: u64, count: u64) -> f64 {
        let (summary, mut marks) = (Summary::new(), Marks::default());
        for nth in 0..count {
            let start = (nth * distance) << (PAGE_SHIFT + LEVEL_SHIFT);
            summary.mark(&mut marks, Range::new(start, 1u64 << PAGE_SHIFT).unwrap());
        }
        let cells = &summary.pages.table().cells;
        let is_displaced = |(at, cell): &(usize, &Cell)| {
            let key = cell.key.load(Ordering::Relaxed);
            key != 0 && place(key, cells.len()) != *at
        };
        cells.iter().enumerate().filter(is_displaced).count() as f64 / count as f64
    }

    #[test]
    fn words_at_even_distances_seldom_meet() {
        let counts = [50, 100, 200, 400, 1_000, 2_500, 5_000, 10_000, 30_000];
        for count in counts.into_iter().chain([60_000, 100_000, 300_000]) {
            let share = displaced(1, count);
            assert!(share < 0.02, "{share} of {count} in a row");
        }
        let distances = [
            2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512, 1024, 4096,
        ];
        let shares = distances
            .iter()
            .flat_map(|distance| counts.map(|count| displaced(*distance, count)));
        let mean = shares.sum::<f64>() / (distances.len() * counts.len()) as f64;
        assert!(mean < 0.1, "{mean}");
    }

    #[test]
    fn words_that_come_and_go_do_not_make_it_grow_for_ever() {
        let (summary, mut marks) = (Summary::new(), Marks::default());
        for nth in 0..100_000u64 {
            let range = Range::new(nth << 20, 1u64 << 16).unwrap();
            summary.mark(&mut marks, range);
            assert!(summary.may_hit(range));
            summary.unmark(&mut marks, range);
            assert!(!summary.may_hit(range));
        }
        assert_eq!(summary.pages.table().cells.len(), LEAST);
    }
}
