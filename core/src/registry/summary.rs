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

mod table;
#[cfg(all(test, not(loom)))]
mod tests;

pub(super) use self::table::Old;
use self::table::{Tier, key, spread};
use crate::addr::Range;
use crate::primitive::atomic::{AtomicU64, Ordering};

const PAGE_SHIFT: u32 = 12;
const LEVEL_SHIFT: u32 = 6;
const LEVELS: u32 = 9;
/// Words of a level that are looked at for one range; larger ones go to the tree.
const LOOKED_AT: u64 = 4;
/// Cells of a table at least: of pages.
const LEAST: usize = if cfg!(loom) { 4 } else { 64 };
/// Of what is larger. Mostly there are a few words of it, and what a walk asks for is not there: with room enough it meets no other one,
/// which no processor foresees.
const LEAST_LARGE: usize = if cfg!(loom) { 4 } else { 256 };

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
