//! One space's page table on the device: a mirror of what the space maps, written page by page as the device asks for it.
//!
//! The driver keeps a copy of what it has written, so that an invalidation reads nothing from the device, and a device that is gone
//! cannot mislead it. Under the driver's lock nothing is allocated: tables come from [`Spares`], which are filled before.

use shootdown_primitive::sync::Arc;

use shootdown::{Addr, DeviceError, PageSize, Range, Rights, Translation};

use crate::device::Core;
use crate::layout::table::{ENTRIES, LEAF, LEVELS, NUMBER, READ, TABLE, WRITE, entry, index, span};
use crate::layout::{ENABLE, pasid_entry};

/// Entries of the copy: nothing, a page, or the place of a table in [`Mirror::tables`], plus two.
const NOTHING: u16 = 0;
const PAGE: u16 = 1;
const CHILD: u16 = 2;

const ROOT: usize = 0;

struct Table {
    /// In local memory.
    number: u64,
    entries: [u16; ENTRIES],
}

/// Tables for what the next entries may need.
#[derive(Default)]
pub(crate) struct Spares([Option<Box<Table>>; LEVELS as usize - 1]);

impl Spares {
    /// Takes as many as the entries of one table of pages can need: whether there is one now at least.
    pub(crate) fn fill(&mut self, core: &Core) -> bool {
        for spare in self.0.iter_mut().filter(|spare| spare.is_none()) {
            *spare = core.take_table().map(|number| {
                Box::new(Table {
                    number,
                    entries: [NOTHING; ENTRIES],
                })
            });
        }
        self.0.iter().any(Option::is_some)
    }

    pub(crate) fn give_back(self, core: &Core) {
        for spare in self.0.into_iter().flatten() {
            core.give_table(spare.number);
        }
    }
}

/// The page table of one space.
pub(crate) struct Mirror {
    core: Arc<Core>,
    /// The root first. There is room for all that the device has.
    #[expect(
        clippy::vec_box,
        reason = "the room for them is had beforehand, for pointers only"
    )]
    tables: Vec<Box<Table>>,
    /// Those that are not linked.
    free: Vec<u16>,
    /// The reset after which it was loaded.
    epoch: Option<u64>,
}

/// No table is left for an entry.
pub(crate) struct NoTable;

impl Mirror {
    /// One that is empty; `None` if there is no table for its root.
    pub(crate) fn new(core: &Arc<Core>) -> Option<Self> {
        let room = core.table_limit as usize;
        let (mut tables, mut spares) = (Vec::with_capacity(room), Spares::default());
        spares.fill(core);
        let root = spares.0.iter_mut().find_map(Option::take);
        spares.give_back(core);
        tables.push(root?);
        Some(Self {
            core: Arc::clone(core),
            tables,
            free: Vec::with_capacity(room),
            epoch: None,
        })
    }

    fn write(&self, table: usize, index: usize, word: u64) -> Result<(), DeviceError> {
        let at = entry(self.tables[table].number, index);
        self.core.registers.write(at, word)
    }

    /// Has the device walk it for `pasid`, empty, unless it does so since the last reset.
    pub(crate) fn load(&mut self, pasid: u64, space: u64, epoch: u64) -> Result<(), DeviceError> {
        if self.epoch == Some(epoch) {
            return Ok(());
        }
        self.recycle()?;
        let registers = &self.core.registers;
        registers.write(pasid_entry(pasid) + 8, space)?;
        let root = NUMBER.of(self.tables[ROOT].number);
        registers.write(pasid_entry(pasid), root | ENABLE.of(1))?;
        self.epoch = Some(epoch);
        Ok(())
    }

    /// Removes every entry for a page that overlaps `range`: how many. Neither allocates nor frees.
    pub(crate) fn clear(&mut self, range: Range) -> Result<u64, DeviceError> {
        self.clear_in(ROOT, LEVELS - 1, 0, range)
    }

    fn clear_in(
        &mut self,
        table: usize,
        level: u32,
        base: u64,
        range: Range,
    ) -> Result<u64, DeviceError> {
        let last = base | ((1 << span(level + 1)) - 1);
        let here = Range::inclusive(base, last).ok();
        let Some(part) = here.and_then(|here| here.intersect(range)) else {
            return Ok(0);
        };
        let of = |addr: Addr| index(level, addr.get());
        let mut removed = 0;
        for at in of(part.start())..=of(part.last()) {
            match self.tables[table].entries[at] {
                NOTHING => {}
                PAGE => {
                    // The copy first: what could not be written on a device that is gone comes with its reset.
                    self.tables[table].entries[at] = NOTHING;
                    self.write(table, at, 0)?;
                    removed += 1;
                }
                child => {
                    let base = base + ((at as u64) << span(level));
                    removed += self.clear_in((child - CHILD) as usize, level - 1, base, range)?;
                }
            }
        }
        Ok(removed)
    }

    /// Unlinks a table and all below it, zeroed.
    fn unlink(&mut self, table: usize) -> Result<(), DeviceError> {
        for at in 0..ENTRIES {
            let before = std::mem::replace(&mut self.tables[table].entries[at], NOTHING);
            if before == NOTHING {
                continue;
            }
            self.write(table, at, 0)?;
            if let Some(child) = before.checked_sub(CHILD) {
                self.unlink(child as usize)?;
                self.free.push(child);
            }
        }
        Ok(())
    }

    /// Drops everything: its tables are there for other entries.
    pub(crate) fn recycle(&mut self) -> Result<(), DeviceError> {
        self.unlink(ROOT)
    }

    /// Whether it has a table for every level, if it drops everything.
    pub(crate) fn suffices(&self) -> bool {
        self.tables.len() >= LEVELS as usize
    }

    /// The table below an entry, which is made if it is not there.
    fn child(
        &mut self,
        table: usize,
        at: usize,
        spares: &mut Spares,
    ) -> Result<Result<usize, NoTable>, DeviceError> {
        if let Some(child) = self.tables[table].entries[at].checked_sub(CHILD) {
            return Ok(Ok(child as usize));
        }
        let child = match self.free.pop() {
            Some(free) => free,
            None => {
                let Some(spare) = spares.0.iter_mut().find_map(Option::take) else {
                    return Ok(Err(NoTable));
                };
                self.tables.push(spare);
                (self.tables.len() - 1) as u16
            }
        };
        self.tables[table].entries[at] = child + CHILD;
        let number = NUMBER.of(self.tables[child as usize].number);
        self.write(table, at, number | TABLE.of(1))?;
        Ok(Ok(child as usize))
    }

    /// Whether there is an entry for a page that holds `addr`.
    pub(crate) fn holds(&self, addr: Addr) -> bool {
        let mut table = ROOT;
        for level in (0..LEVELS).rev() {
            match self.tables[table].entries[index(level, addr.get())] {
                NOTHING => return false,
                PAGE => return true,
                child => table = (child - CHILD) as usize,
            }
        }
        false
    }

    /// Writes the entry of one page of 4 KiB or 2 MiB. What it replaces is translated as before, or has been flushed.
    pub(crate) fn install(
        &mut self,
        page: &Translation,
        spares: &mut Spares,
    ) -> Result<Result<(), NoTable>, DeviceError> {
        let huge = page.page_size == PageSize::TwoMiB;
        let (leaf, addr) = (u32::from(huge), page.page.start().get());
        let mut table = ROOT;
        for level in (leaf + 1..LEVELS).rev() {
            table = match self.child(table, index(level, addr), spares)? {
                Ok(child) => child,
                Err(none) => return Ok(Err(none)),
            };
        }
        let at = index(leaf, addr);
        if let Some(below) = self.tables[table].entries[at].checked_sub(CHILD) {
            // Small pages of the past, all of them gone.
            self.unlink(below as usize)?;
            self.free.push(below);
        }
        let allows = |rights: Rights| page.rights.contains(rights).into();
        let word = NUMBER.of(page.frame.0)
            | READ.of(allows(Rights::READ))
            | WRITE.of(allows(Rights::WRITE))
            | LEAF.of(huge.into());
        self.write(table, at, word)?;
        self.tables[table].entries[at] = PAGE;
        self.core.counters.pages_installed.hit();
        Ok(Ok(()))
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        // Of a device that is gone nobody asks for tables again, or only after its reset, which zeroes them.
        let zeroed = self.recycle();
        self.core.note(zeroed);
        for table in &self.tables {
            self.core.give_table(table.number);
        }
    }
}
