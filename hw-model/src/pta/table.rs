//! Page tables in local memory, which software writes and the device walks.
//!
//! An entry counts as installed when software writes it, or links the table that it is in: that is when it gets its stamp. So an entry
//! that was left behind is found stale whenever the device comes to walk it.

use shootdown::{Addr, Frame, Range, Rights};

use super::layout::{ADDRESSES, ENTRIES, LEAF, LEVELS, NUMBER, READ, TABLE, WRITE, span};
use super::tlb::{Key, TlbEntry};
use crate::oracle::{Oracle, Stamp};

#[derive(Clone, Copy, Default)]
struct Entry {
    word: u64,
    stamp: Stamp,
}

struct Table {
    /// The address space that it is linked for; 0 while it is not.
    space: u64,
    /// The first address that it translates.
    base: u64,
    level: u32,
    entries: Box<[Entry; ENTRIES]>,
}

/// What an entry says.
enum Says {
    Nothing,
    Table(usize),
    Page,
}

impl Table {
    fn unlinked() -> Self {
        Self {
            space: 0,
            base: 0,
            level: 0,
            entries: Box::new([Entry::default(); ENTRIES]),
        }
    }

    fn address(&self, index: usize) -> u64 {
        self.base + ((index as u64) << span(self.level))
    }

    fn says(&self, index: usize) -> Says {
        let word = self.entries[index].word;
        let rights = READ.get(word) | WRITE.get(word);
        match self.level {
            1.. if TABLE.get(word) == 1 => Says::Table(NUMBER.get(word) as usize),
            0 if rights == 1 => Says::Page,
            1 if rights == 1 && LEAF.get(word) == 1 => Says::Page,
            _ => Says::Nothing,
        }
    }

    /// The page that an entry at `index` is for, as long as it is one.
    fn page(&self, index: usize) -> Option<Range> {
        matches!(self.says(index), Says::Page)
            .then(|| Range::new(self.address(index), 1 << span(self.level)).ok())
            .flatten()
    }
}

/// Local memory.
pub(super) struct Tables(Vec<Table>);

impl Tables {
    pub(super) fn new(count: usize) -> Self {
        Self((0..count).map(|_| Table::unlinked()).collect())
    }

    pub(super) fn read(&self, table: usize, index: usize) -> u64 {
        let table = self.0.get(table);
        table.map_or(u64::MAX, |table| table.entries[index].word)
    }

    pub(super) fn write(&mut self, table: usize, index: usize, word: u64, oracle: &Oracle) {
        let Some(place) = self.0.get_mut(table) else {
            return;
        };
        place.entries[index].word = word;
        self.installed(table, index, oracle);
    }

    /// The entry was written, or its table linked.
    fn installed(&mut self, table: usize, index: usize, oracle: &Oracle) {
        let place = &mut self.0[table];
        let (space, address) = (place.space, place.address(index));
        match place.says(index) {
            Says::Nothing => {}
            Says::Page => place.entries[index].stamp = oracle.stamp(space, Addr::new(address)),
            Says::Table(child) => {
                let level = place.level - 1;
                self.link(child, space, address, level, oracle);
            }
        }
    }

    fn link(&mut self, table: usize, space: u64, base: u64, level: u32, oracle: &Oracle) {
        let Some(place) = self.0.get_mut(table).filter(|_| space != 0) else {
            return;
        };
        (place.space, place.base, place.level) = (space, base, level);
        for index in 0..ENTRIES {
            self.installed(table, index, oracle);
        }
    }

    /// The table is the root of a space's page table.
    pub(super) fn root(&mut self, table: usize, space: u64, oracle: &Oracle) {
        self.link(table, space, 0, LEVELS - 1, oracle);
    }

    /// The page that software would install by writing `word`.
    pub(super) fn would_install(&self, table: usize, index: usize, word: u64) -> Option<Range> {
        let place = self.0.get(table).filter(|place| place.space != 0)?;
        let leaf = place.level == 0 || place.level == 1 && LEAF.get(word) == 1;
        let rights = READ.get(word) | WRITE.get(word);
        if !leaf || rights == 0 || TABLE.get(word) == 1 && place.level > 0 {
            return None;
        }
        Range::new(place.address(index), 1 << span(place.level)).ok()
    }

    /// The entry behind `addr`, as an entry of the device TLB.
    pub(super) fn walk(&self, root: usize, pasid: u64, addr: u64) -> Option<TlbEntry> {
        let mut table = self.0.get(root).filter(|_| addr < ADDRESSES)?;
        for level in (0..LEVELS).rev() {
            let index = (addr >> span(level)) as usize % ENTRIES;
            // A table that is linked at two levels is what it was linked as last.
            if table.level != level {
                return None;
            }
            match table.says(index) {
                Says::Nothing => return None,
                Says::Table(child) => table = self.0.get(child)?,
                Says::Page => {
                    let Entry { word, stamp } = table.entries[index];
                    let allowed = |field: super::layout::Field, rights| {
                        if field.get(word) == 1 {
                            rights
                        } else {
                            Rights::empty()
                        }
                    };
                    return Some(TlbEntry {
                        key: Key::of(pasid, level == 1, addr),
                        frame: Frame(NUMBER.get(word)),
                        rights: allowed(READ, Rights::READ) | allowed(WRITE, Rights::WRITE),
                        stamp,
                    });
                }
            }
        }
        None
    }

    /// A page of `part` that the tables of `space` have an entry for.
    pub(super) fn maps(&self, space: u64, part: Range) -> Option<Range> {
        let own = self.0.iter().filter(|table| table.space == space);
        own.flat_map(|table| (0..ENTRIES).filter_map(|index| table.page(index)))
            .find(|page| page.overlaps(part))
    }

    /// A table that is not linked any more has no space.
    pub(super) fn forget(&mut self, space: u64) {
        for table in self.0.iter_mut().filter(|table| table.space == space) {
            table.space = 0;
        }
    }

    /// All zeros.
    pub(super) fn clear(&mut self) {
        for table in &mut self.0 {
            table.entries.fill(Entry::default());
            (table.space, table.base, table.level) = (0, 0, 0);
        }
    }
}
