//! A page table: one word a 4 KiB page, whatever the page's size.
//!
//! | bits | |
//! |---|---|
//! | 0 | present: `translate` shows it |
//! | 1 | backed: the frame belongs to this page |
//! | 2-3 | rights |
//! | 4-5 | size of the page that it is part of: 0 for 4 KiB, 1 for 64 KiB, 2 for 2 MiB |
//! | 12-63 | the 4 KiB frame |
//!
//! A page that is backed and not present is on its way out, or about to be put back because the change failed.
//!
//! # Who writes
//! Disjoint ranges are changed by several threads at once, one thread a page. Two things reach over the end of a range:
//! splitting a large page, whose other parts may be in somebody else's hands at this moment, and counting at which
//! borders the kernel must keep two mappings apart. Both are done under the lock `borders`, as are stores of new
//! entries. All other changes are single read-modify-write operations, which do not undo a split that happens meanwhile.
//!
//! Once a large page is split, its parts are 4 KiB pages; who cuts it next finds it split. A new large page cannot come to
//! be there before all parts are gone, so nobody splits that one by mistake.

use shootdown::{Addr, Frame, PageSize, Range, Rights, Translation};
use shootdown_primitive::sync::atomic::{AtomicU64, Ordering};
use shootdown_primitive::sync::{Mutex, MutexGuard, PoisonError};

use crate::table::Table;

const BASE_PAGE: PageSize = PageSize::FourKiB;

/// The word of a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Entry(u64);

impl Entry {
    /// Nothing.
    pub(super) const EMPTY: Self = Self(0);

    const PRESENT: u64 = 1;
    const BACKED: u64 = 1 << 1;
    const RIGHTS_SHIFT: u32 = 2;
    const SIZE_SHIFT: u32 = 4;
    const SIZE_MASK: u64 = 3 << Self::SIZE_SHIFT;
    const FRAME_SHIFT: u32 = 12;

    /// A mapped page, or a 4 KiB part of one.
    pub(super) fn new(frame: u64, size: PageSize, rights: Rights) -> Self {
        let size = match size {
            PageSize::FourKiB => 0,
            PageSize::SixtyFourKiB => 1,
            PageSize::TwoMiB => 2,
        };
        Self(
            frame << Self::FRAME_SHIFT
                | size << Self::SIZE_SHIFT
                | u64::from(rights.bits()) << Self::RIGHTS_SHIFT
                | Self::BACKED
                | Self::PRESENT,
        )
    }

    pub(super) fn is_backed(self) -> bool {
        self.0 & Self::BACKED != 0
    }

    pub(super) fn frame(self) -> u64 {
        self.0 >> Self::FRAME_SHIFT
    }

    pub(super) fn rights(self) -> Rights {
        Rights::from_bits_truncate((self.0 >> Self::RIGHTS_SHIFT) as u8)
    }

    pub(super) fn size(self) -> PageSize {
        match (self.0 & Self::SIZE_MASK) >> Self::SIZE_SHIFT {
            0 => PageSize::FourKiB,
            1 => PageSize::SixtyFourKiB,
            _ => PageSize::TwoMiB,
        }
    }

    /// Whether the kernel keeps two mappings where `self` is followed by `next`.
    fn is_apart_from(self, next: Self) -> bool {
        match (self.is_backed(), next.is_backed()) {
            (true, true) => self.frame() + 1 != next.frame() || self.rights() != next.rights(),
            (left, right) => left != right,
        }
    }
}

/// What is behind a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Backing {
    /// The page's number in the arena.
    pub(super) page: u64,
    pub(super) frame: u64,
    pub(super) rights: Rights,
}

/// Pages with consecutive frames and equal rights: what one mapping can hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Run {
    pub(super) first: Backing,
    pub(super) pages: u64,
}

/// Joins backings, in order of their pages, to the longest runs.
pub(super) fn runs(mut backings: impl Iterator<Item = Backing>) -> impl Iterator<Item = Run> {
    let mut pending: Option<Run> = None;
    std::iter::from_fn(move || {
        for next in backings.by_ref() {
            match &mut pending {
                Some(Run { first, pages })
                    if next.page == first.page + *pages
                        && next.frame == first.frame + *pages
                        && next.rights == first.rights =>
                {
                    *pages += 1;
                }
                _ => {
                    let run = pending.replace(Run {
                        first: next,
                        pages: 1,
                    });
                    if run.is_some() {
                        return run;
                    }
                }
            }
        }
        pending.take()
    })
}

/// The page table of an arena.
pub(super) struct PageTable {
    arena: Range,
    table: Table,
    /// See the module. Leaf lock; nothing under it waits or allocates.
    borders: Mutex<()>,
}

impl PageTable {
    /// A page table for `arena`, all empty. May wait (system call).
    pub(super) fn new(arena: Range) -> std::io::Result<Self> {
        Ok(Self {
            arena,
            table: Table::new(arena.pages(BASE_PAGE) as usize)?,
            borders: Mutex::new(()),
        })
    }

    /// The number of the page that holds `addr`, an address of the arena.
    pub(super) fn page_of(&self, addr: Addr) -> u64 {
        (addr.get() - self.arena.start().get()) >> BASE_PAGE.shift()
    }

    /// The addresses of `count` pages from `page` on.
    pub(super) fn range_of(&self, page: u64, count: u64) -> Range {
        let start = Addr::new(self.arena.start().get() + (page << BASE_PAGE.shift()));
        let last = Addr::new(start.get() + (count << BASE_PAGE.shift()) - 1);
        Range::inclusive(start, last).unwrap_or(Range::page(start, BASE_PAGE))
    }

    /// The entry of a page.
    pub(super) fn get(&self, page: u64) -> Entry {
        // Acquire: pairs with the release stores of `commit`. Who sees a frame sees it zeroed, mapped and published.
        Entry(self.word(page).load(Ordering::Acquire))
    }

    /// Walks the table. Takes no lock.
    pub(super) fn translate(&self, addr: Addr) -> Option<Translation> {
        let held = self.arena.holds(addr);
        held.then(|| self.shown(self.page_of(addr)))?
    }

    /// Walks the table of all of `range`. Takes no lock.
    pub(super) fn walk(&self, range: Range, found: &mut dyn FnMut(Translation)) {
        let Some(inside) = self.arena.intersect(range) else {
            return;
        };
        let (mut page, last) = (self.page_of(inside.start()), self.page_of(inside.last()));
        while page <= last {
            let shown = self.shown(page);
            if let Some(one) = shown {
                found(one);
            }
            let size = shown.map_or(BASE_PAGE, |one| one.page_size);
            page += frames_of(size) - page % frames_of(size);
        }
    }

    /// What a device may install for `page`, if it is present.
    fn shown(&self, page: u64) -> Option<Translation> {
        let entry = self.get(page);
        if entry.0 & Entry::PRESENT == 0 {
            return None;
        }
        let page_size = entry.size();
        let within = page % frames_of(page_size);
        let addr = self.range_of(page, 1).start();
        Some(Translation {
            page: Range::page(addr, page_size),
            page_size,
            frame: Frame(entry.frame() - within),
            rights: entry.rights(),
        })
    }

    /// The backed pages of `range`, present or not, in order.
    pub(super) fn backed(&self, range: Range) -> impl Iterator<Item = (u64, Entry)> {
        self.pages(range)
            .map(|page| (page, self.get(page)))
            .filter(|(_, entry)| entry.is_backed())
    }

    /// The runs of the backed pages of `range`.
    pub(super) fn runs(&self, range: Range) -> impl Iterator<Item = Run> {
        runs(self.backed(range).map(|(page, entry)| Backing {
            page,
            frame: entry.frame(),
            rights: entry.rights(),
        }))
    }

    /// The size of the page that `entry` of `page` will be part of once `range` is cut out of its neighbourhood.
    pub(super) fn size_within(&self, range: Range, page: u64, entry: Entry) -> PageSize {
        let size = entry.size();
        let whole = Range::page(self.range_of(page, 1).start(), size);
        if range.contains(whole) {
            size
        } else {
            BASE_PAGE
        }
    }

    /// How many of the two ends of `range` lie within one mapping of the kernel's.
    pub(super) fn open_ends(&self, range: Range) -> u64 {
        let pages = self.pages(range);
        [pages.start, pages.end]
            .into_iter()
            .filter(|page| self.is_inner(*page) && !self.is_border(*page))
            .count() as u64
    }

    /// Splits large pages of which `range` holds some parts and not all.
    pub(super) fn split_ends(&self, range: Range) {
        let pages = self.pages(range);
        let _borders = self.borders();
        for page in [pages.start, pages.end - 1] {
            let entry = self.get(page);
            if self.size_within(range, page, entry) != entry.size() {
                let parts = frames_of(entry.size());
                let first = page - page % parts;
                for part in first..first + parts {
                    // Relaxed: the frame and the rights are as they were; nothing is published.
                    self.word(part)
                        .fetch_and(!Entry::SIZE_MASK, Ordering::Relaxed);
                }
            }
        }
    }

    /// Hides the pages of `range` from `translate`; the frames stay noted.
    pub(super) fn withdraw(&self, range: Range) {
        for page in self.pages(range) {
            // Relaxed: a walk that still finds the page is the business of begin and retry.
            self.word(page)
                .fetch_and(!Entry::PRESENT, Ordering::Relaxed);
        }
    }

    /// Shows them again.
    pub(super) fn restore(&self, range: Range) {
        for (page, _) in self.backed(range) {
            // Relaxed: everything behind the page is as it was when it was committed.
            self.word(page).fetch_or(Entry::PRESENT, Ordering::Relaxed);
        }
    }

    /// Replaces each entry of `range` by what `to` makes of the page's number and its entry: by how many the kernel's
    /// mappings have become more, or fewer.
    pub(super) fn commit(&self, range: Range, to: impl Fn(u64, Entry) -> Entry) -> i64 {
        let pages = self.pages(range);
        let _borders = self.borders();
        let before = self.borders_in(pages.clone());
        for page in pages.clone() {
            // Release: pairs with `get`.
            let entry = to(page, self.get(page));
            self.word(page).store(entry.0, Ordering::Release);
        }
        self.borders_in(pages) as i64 - before as i64
    }

    /// How many mappings the kernel has in the whole arena. Nobody changes it meanwhile.
    pub(super) fn mappings(&self) -> u64 {
        self.borders_in(self.pages(self.arena)) + 1
    }

    /// How often one mapping ends and another begins from the first border of `pages` to the last, both included.
    fn borders_in(&self, pages: std::ops::Range<u64>) -> u64 {
        (pages.start..=pages.end)
            .filter(|page| self.is_inner(*page) && self.is_border(*page))
            .count() as u64
    }

    /// Whether the kernel keeps two mappings between `page` and the one before it.
    fn is_border(&self, page: u64) -> bool {
        self.get(page - 1).is_apart_from(self.get(page))
    }

    /// Whether there is a page before `page`, and `page` itself.
    fn is_inner(&self, page: u64) -> bool {
        0 < page && page < self.table.words().len() as u64
    }

    fn pages(&self, range: Range) -> std::ops::Range<u64> {
        let first = self.page_of(range.start());
        first..first + range.pages(BASE_PAGE)
    }

    fn word(&self, page: u64) -> &AtomicU64 {
        &self.table.words()[page as usize]
    }

    fn borders(&self) -> MutexGuard<'_, ()> {
        // It guards words each of which is whole at any time.
        self.borders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many 4 KiB frames a page of this size has.
fn frames_of(size: PageSize) -> u64 {
    size.bytes() >> BASE_PAGE.shift()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 1 << 30;

    fn table() -> PageTable {
        PageTable::new(Range::new(BASE, 8 << 20).unwrap()).unwrap()
    }

    fn range(page: u64, pages: u64) -> Range {
        Range::new(BASE + page * 4096, pages * 4096).unwrap()
    }

    fn put(table: &PageTable, at: Range, frame: u64, size: PageSize) -> i64 {
        let first = table.page_of(at.start());
        table.commit(at, |page, _| {
            Entry::new(frame + page - first, size, Rights::READ_WRITE)
        })
    }

    #[test]
    fn a_walk_returns_the_whole_page_whatever_its_size() {
        let table = table();
        put(&table, range(512, 512), 1024, PageSize::TwoMiB);
        put(&table, range(16, 16), 48, PageSize::SixtyFourKiB);
        for (page, whole, page_size, frame) in [
            (512 + 77, range(512, 512), PageSize::TwoMiB, 1024),
            (31, range(16, 16), PageSize::SixtyFourKiB, 48),
        ] {
            let found = table.translate(Addr::new(BASE + page * 4096 + 5)).unwrap();
            assert_eq!(
                (found.page, found.page_size, found.frame),
                (whole, page_size, Frame(frame))
            );
        }
        assert_eq!(table.translate(Addr::new(BASE - 1)), None);
        assert_eq!(table.translate(Addr::new(BASE)), None);
    }

    /// One after the other, as a memory walks that has nothing better.
    fn one_by_one(table: &PageTable, part: Range) -> Vec<Translation> {
        let (mut all, mut next) = (Vec::new(), Some(part.start()));
        while let Some(addr) = next.filter(|addr| part.holds(*addr)) {
            let found = table.translate(addr);
            all.extend(found);
            next = found
                .map_or(Range::page(addr, BASE_PAGE), |one| one.page)
                .end();
        }
        all
    }

    #[test]
    fn a_walk_of_a_range_finds_what_walks_of_its_addresses_find() {
        let table = table();
        put(&table, range(512, 512), 1024, PageSize::TwoMiB);
        put(&table, range(16, 16), 48, PageSize::SixtyFourKiB);
        put(&table, range(500, 12), 900, PageSize::FourKiB);
        for part in [
            range(0, 2048),
            range(20, 500),
            range(31, 1),
            range(700, 1),
            Range::ALL,
            Range::new(4096u64, 4096).unwrap(),
        ] {
            let mut all = Vec::new();
            table.walk(part, &mut |one| all.push(one));
            let inside = part.intersect(table.arena);
            let expected = inside.map(|part| one_by_one(&table, part));
            assert_eq!(all, expected.unwrap_or_default(), "{part}");
        }
    }

    #[test]
    fn a_large_page_that_is_cut_becomes_small_pages_with_the_same_frames() {
        let table = table();
        put(&table, range(512, 512), 1024, PageSize::TwoMiB);
        table.split_ends(range(512, 512));
        assert_eq!(table.get(600).size(), PageSize::TwoMiB);
        table.split_ends(range(600, 1));
        for page in 512..1024 {
            let found = table.translate(Addr::new(BASE + page * 4096)).unwrap();
            assert_eq!(
                (found.page_size, found.frame),
                (PageSize::FourKiB, Frame(512 + page))
            );
        }
    }

    #[test]
    fn withdrawn_pages_are_hidden_and_come_back() {
        let table = table();
        put(&table, range(0, 4), 9, PageSize::FourKiB);
        table.withdraw(range(0, 8));
        assert_eq!(table.translate(Addr::new(BASE)), None);
        assert_eq!(table.runs(range(0, 8)).count(), 1);
        table.restore(range(0, 8));
        assert!(table.translate(Addr::new(BASE)).is_some());
        assert_eq!(table.translate(Addr::new(BASE + 4 * 4096)), None);
    }

    #[test]
    fn differences_add_up_to_the_number_of_mappings() {
        let table = table();
        assert_eq!(table.mappings(), 1);
        let mut mappings = 1;
        mappings += put(&table, range(0, 4), 100, PageSize::FourKiB);
        assert_eq!(mappings, 2);
        mappings += put(&table, range(4, 4), 104, PageSize::FourKiB);
        assert_eq!(mappings, 2, "neighbours in frames are one mapping");
        mappings += put(&table, range(8, 4), 300, PageSize::FourKiB);
        assert_eq!(mappings, 3);
        assert_eq!(table.open_ends(range(2, 6)), 1);
        mappings += table.commit(range(2, 1), |_, _| Entry::EMPTY);
        assert_eq!(mappings, 5);
        mappings += table.commit(range(0, 2048), |_, _| Entry::EMPTY);
        assert_eq!(mappings as u64, table.mappings());
        assert_eq!(mappings, 1);
    }

    #[test]
    fn runs_end_where_page_frame_or_rights_do() {
        let backing = |page, frame, rights| Backing {
            page,
            frame,
            rights,
        };
        let (read, write) = (Rights::READ, Rights::READ_WRITE);
        let pages = [
            backing(0, 10, read),
            backing(1, 11, read),
            backing(3, 12, read),
            backing(4, 13, write),
            backing(5, 20, write),
            backing(6, 21, write),
        ];
        let found: Vec<_> = runs(pages.into_iter())
            .map(|run| (run.first.page, run.pages))
            .collect();
        assert_eq!(found, [(0, 2), (3, 1), (4, 1), (5, 2)]);
        assert_eq!(runs(std::iter::empty()).count(), 0);
    }
}
