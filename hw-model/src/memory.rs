//! Process memory over the model's frames: real mappings, a page table, and an oracle that is told.
//!
//! A [`ModelMemory`] is an address space's phase 5. Its arena is reserved once; in it, pages are shared mappings of
//! [frames](crate::Physical), so that application code loads and stores as ever, and everything else is inaccessible.
//! Its own page table says which frame is where, for [`Memory::translate`].
//!
//! # The order of a change
//! 1. *refuse*: frames are taken and zeroed and kernel mappings reserved, or the call fails and nothing has happened;
//! 2. large pages that the range cuts are split into 4 KiB pages;
//! 3. *withdraw*: the oracle's shadow first, then the page table. Who accesses the pages now is found out;
//! 4. the kernel's mappings change: one system call for what is taken away, one (and its `madvise`) for each run of
//!    consecutive frames that is put in place;
//! 5. the old frames are freed. Not earlier: until step 4 is done the CPU reaches them;
//! 6. *publish*: the shadow first, then the page table, so that a device cannot find a page that the oracle does not know.
//!
//! When a system call of step 4 fails, what it and its predecessors did is undone, and the pages are put back in both
//! tables with their old epochs: nothing has changed. (A page that was split stays split.) The kernel can refuse the
//! undoing only if it refuses to put back what was there a moment ago, with mappings still reserved for it; then there
//! is no state left that could be called correct, and the thread panics.
//!
//! # Locks
//! Each of the leaf locks named in the crate's table is taken for moments, none across a system call. Disjoint ranges change
//! in parallel. Only [`Memory::map`], which may, allocates; discard takes its frames as a chain through the
//! allocator's own arrays.
//!
//! # Child processes
//! They inherit none of the pages (`MADV_DONTFORK`): the parent's devices and notifiers could not follow them there.

mod arena;
mod kernel;
mod page_table;
#[cfg(test)]
mod tests;
mod touch;
mod vma;

use std::io::ErrorKind;
use std::sync::Arc;

use shootdown::{
    Addr, Exclusion, Frame, Memory, MemoryError, PageSize, PageSizes, Range, Rights, Touched,
    Translation,
};

use self::arena::Arena;
use self::kernel::Kernel;
use self::page_table::{Backing, Entry, PageTable, Run, runs};
use self::touch::Sight;
pub use self::vma::VmaBudget;
use crate::bus::Bus;
use crate::error::ModelError;
use crate::physical::{Blocks, Physical};
use crate::shadow::Shadow;

/// The kernel's mappings that a memory has when nothing is mapped: arena, page table, shadow.
const OWN_MAPPINGS: u64 = 3;

/// Process memory whose pages are frames of a [`Bus`]. Pages of 4 KiB, 64 KiB and 2 MiB; the larger ones have
/// consecutive, aligned frames, and are split when they are cut.
///
/// When it is dropped, all its pages go: the arena is unmapped, its frames are freed, and every later access of a device to it
/// is stale. No reference into the arena may be left by then.
pub struct ModelMemory {
    bus: Bus,
    arena: Arena,
    table: PageTable,
    budget: Arc<VmaBudget>,
    id: u64,
    /// Asked in every walk, where others change the memory too.
    kernel: Option<Kernel>,
    touches: Sight,
}

impl ModelMemory {
    /// A memory with an arena of `arena_bytes`, rounded up to 2 MiB, nothing of which is mapped. Its kernel mappings
    /// count against [`VmaBudget::process`]. May wait (system calls).
    ///
    /// # Errors
    /// [`ModelError::Arena`], [`ModelError::TooManySpaces`], [`ModelError::Memory`] (out of VMAs), [`ModelError::System`].
    pub fn new(bus: &Bus, arena_bytes: u64) -> Result<Arc<Self>, ModelError> {
        Self::with_budget(bus, arena_bytes, VmaBudget::process())
    }

    /// The same, with a budget of kernel mappings of the caller's.
    ///
    /// # Errors
    /// As [`ModelMemory::new`].
    pub fn with_budget(
        bus: &Bus,
        arena_bytes: u64,
        budget: Arc<VmaBudget>,
    ) -> Result<Arc<Self>, ModelError> {
        Self::with(bus, Arena::reserve, arena_bytes, budget, None)
    }

    /// A memory that others change too, by system calls of their own. What [`Memory`]'s methods are told meanwhile is what the
    /// model knows: whoever makes a foreign call tells the memory when it has returned, by the same change, called on the
    /// memory itself: [`Memory::unmap`] after a `munmap` or a `mmap` over it, and so on. From then on the oracle counts the
    /// old pages as gone. A walk finds the page gone at once, as it also asks the kernel.
    ///
    /// The arena lies where the kernel places nothing by itself, so that a hole in it stays one until the memory is told.
    ///
    /// # Errors
    /// As [`ModelMemory::new`]; [`ModelError::System`] on a kernel that cannot be asked what is mapped: PROCMAP_QUERY, Linux
    /// 6.11.
    pub fn open_to_others(bus: &Bus, arena_bytes: u64) -> Result<Arc<Self>, ModelError> {
        let kernel = Kernel::new(bus.physical().fd()).map_err(|error| ModelError::System {
            call: "PROCMAP_QUERY (Linux 6.11)",
            bytes: arena_bytes,
            errno: error.kind(),
        })?;
        let budget = VmaBudget::process();
        Self::with(bus, Arena::reserve_aside, arena_bytes, budget, Some(kernel))
    }

    /// A memory of its own with the same addresses, as a process has that was forked off: a device reaches either at an address by the
    /// PASID, or ASID, that it is given. Nothing of it is mapped; what a fork leaves in it is the caller's to copy. This process has
    /// it elsewhere, see [`ModelMemory::view`].
    ///
    /// # Errors
    /// As [`ModelMemory::new`].
    pub fn twin(&self) -> Result<Arc<Self>, ModelError> {
        let bytes = self.arena().len() as u64;
        let reserve = |_| Arena::reserve_twin(&self.arena);
        Self::with(&self.bus, reserve, bytes, Arc::clone(&self.budget), None)
    }

    /// Where this process has what is at `addr` for devices: there, but in a [twin](ModelMemory::twin).
    pub fn view(&self, addr: Addr) -> Addr {
        self.arena.view(addr)
    }

    fn with(
        bus: &Bus,
        reserve: impl FnOnce(u64) -> Result<Arena, ModelError>,
        arena_bytes: u64,
        budget: Arc<VmaBudget>,
        kernel: Option<Kernel>,
    ) -> Result<Arc<Self>, ModelError> {
        let reservation = budget.reserve(OWN_MAPPINGS)?;
        let arena = reserve(arena_bytes)?;
        let table = PageTable::new(arena.range()).map_err(|error| ModelError::System {
            call: "mmap",
            bytes: arena_bytes,
            errno: error.kind(),
        })?;
        let id = bus.oracle().add_space(arena.range())?;
        reservation.settle(OWN_MAPPINGS as i64);
        Ok(Arc::new(Self {
            bus: bus.clone(),
            arena,
            table,
            budget,
            id,
            kernel,
            touches: Sight::default(),
        }))
    }

    fn physical(&self) -> &Physical {
        self.bus.physical()
    }

    fn shadow(&self) -> &Shadow {
        self.bus.oracle().shadow(self.id)
    }

    /// Addresses outside the arena belong to the rest of the process: no call reaches them, whatever it is given.
    fn check(&self, call: &'static str, range: Range, page: PageSize) -> Result<(), MemoryError> {
        if self.arena().contains(range) && range.is_aligned(page) {
            return Ok(());
        }
        Err(MemoryError::System {
            call,
            range,
            errno: ErrorKind::InvalidInput,
        })
    }

    /// Whether nothing of `range` is mapped.
    fn check_vacant(&self, call: &'static str, range: Range) -> Result<(), MemoryError> {
        if self.table.backed(range).next().is_none() {
            return Ok(());
        }
        Err(MemoryError::System {
            call,
            range,
            errno: ErrorKind::AlreadyExists,
        })
    }

    /// Steps 2 and 3.
    fn withdraw(&self, range: Range) {
        self.table.split_ends(range);
        self.shadow().withdraw(range);
        self.table.withdraw(range);
    }

    /// The change failed: back to how it was before [`ModelMemory::withdraw`].
    fn restore(&self, range: Range) {
        self.shadow().restore(range);
        self.table.restore(range);
    }

    /// The addresses of a run.
    fn range_of(&self, run: Run) -> Range {
        self.table.range_of(run.first.page, run.pages)
    }

    /// Maps the run's frames at its pages, for the CPU, and calls `replaced` once they have taken the place of what was there.
    fn place(&self, run: Run, replaced: impl FnOnce()) -> Result<(), MemoryError> {
        let range = self.range_of(run);
        let fd = self.physical().fd();
        self.arena
            .map(fd, range, run.first.frame, run.first.rights)?;
        replaced();
        self.arena.keep_from_children(range)
    }

    /// Frees the frames behind `range`, which nothing reaches any more.
    fn free_frames_of(&self, range: Range) {
        for run in self.table.runs(range) {
            self.physical()
                .give_back(run.first.frame..run.first.frame + run.pages);
        }
    }

    /// Step 6 for the run's pages, which are part of pages of the size that `size` gives for what was there before.
    fn publish(&self, run: Run, size: impl Fn(u64, Entry) -> PageSize) -> i64 {
        let range = self.range_of(run);
        let Backing {
            page: first,
            frame,
            rights,
        } = run.first;
        self.shadow().publish(range, Frame(frame), rights);
        self.table.commit(range, |page, old| {
            Entry::new(frame + (page - first), size(page, old), rights)
        })
    }

    /// Zeroed frames to replace those behind `range`: as many, and for pages that stay large as large.
    fn replacements(&self, range: Range) -> Result<Blocks<'_>, MemoryError> {
        let mut blocks = self.physical().blocks();
        let mut sizes = (self.table.backed(range))
            .map(|(page, entry)| self.table.size_within(range, page, entry))
            .peekable();
        while let Some(size) = sizes.next() {
            let mut frames = 1;
            while sizes.next_if_eq(&size).is_some() {
                frames += 1;
            }
            blocks.extend(frames, order(size))?;
        }
        Ok(blocks)
    }
}

impl Memory for ModelMemory {
    fn id(&self) -> u64 {
        self.id
    }

    fn arena(&self) -> Range {
        self.arena.range()
    }

    fn page_sizes(&self) -> PageSizes {
        PageSizes::all()
    }

    fn map(&self, range: Range, page: PageSize, rights: Rights) -> Result<(), MemoryError> {
        self.check("mmap", range, page)?;
        self.check_vacant("mmap", range)?;
        let mut blocks = self.physical().blocks();
        blocks.extend(range.pages(PageSize::FourKiB), order(page))?;
        let first = self.table.page_of(range.start());
        let fresh = || {
            runs(
                blocks
                    .iter()
                    .flatten()
                    .zip(first..)
                    .map(|(frame, page)| Backing {
                        page,
                        frame,
                        rights,
                    }),
            )
        };
        // One mapping a run, and one for what is cut off of the arena behind them.
        let reservation = self.budget.reserve(fresh().count() as u64 + 1)?;
        blocks.zero();
        if let Err(error) = fresh().try_for_each(|run| self.place(run, || ())) {
            undo(self.arena.cut(range));
            return Err(error);
        }
        let difference = fresh().map(|run| self.publish(run, |_, _| page)).sum();
        blocks.keep();
        reservation.settle(difference);
        Ok(())
    }

    fn unmap(&self, range: Range) -> Result<(), MemoryError> {
        self.check("munmap", range, PageSize::FourKiB)?;
        let reservation = self.budget.reserve(self.table.open_ends(range))?;
        self.withdraw(range);
        if let Err(error) = self.arena.cut(range) {
            self.restore(range);
            return Err(error);
        }
        self.free_frames_of(range);
        self.shadow().forget(range);
        reservation.settle(self.table.commit(range, |_, _| Entry::EMPTY));
        Ok(())
    }

    fn discard(&self, range: Range) -> Result<(), MemoryError> {
        self.check("madvise", range, PageSize::FourKiB)?;
        let blocks = self.replacements(range)?;
        let fresh = || {
            let frames = blocks.iter().flatten();
            runs(
                frames
                    .zip(self.table.backed(range))
                    .map(|(frame, (page, entry))| Backing {
                        page,
                        frame,
                        rights: entry.rights(),
                    }),
            )
        };
        // Old and new mappings exist side by side while they are replaced one by one.
        let needed = fresh().count() as u64 + 1 + self.table.open_ends(range);
        let reservation = self.budget.reserve(needed)?;
        blocks.zero();
        self.withdraw(range);
        let first = self.table.page_of(range.start());
        let mut replaced = 0;
        let placed = fresh()
            .try_for_each(|run| self.place(run, || replaced = run.first.page + run.pages - first));
        if let Err(error) = placed {
            if replaced > 0 {
                let replaced = self.table.range_of(first, replaced);
                undo(
                    self.table
                        .runs(replaced)
                        .try_for_each(|run| self.place(run, || ())),
                );
            }
            self.restore(range);
            return Err(error);
        }
        self.free_frames_of(range);
        // The entries still name the old frames until their run is published; pages and rights stay the same.
        let difference = fresh()
            .map(|run| self.publish(run, |_, old| old.size()))
            .sum();
        blocks.keep();
        reservation.settle(difference);
        Ok(())
    }

    fn protect(&self, range: Range, rights: Rights) -> Result<(), MemoryError> {
        self.check("mprotect", range, PageSize::FourKiB)?;
        let reservation = self.budget.reserve(self.table.open_ends(range))?;
        self.table.split_ends(range);
        // The oracle first: an access that the new rights forbid is wrong from here on. The page table last: it knows the
        // old rights in case that the kernel refuses.
        self.shadow().protect(range, rights);
        // A call for each stretch of mapped pages with equal rights, whatever the frames.
        let stretches = || {
            runs(self.table.backed(range).map(|(page, entry)| Backing {
                page,
                frame: page,
                rights: entry.rights(),
            }))
        };
        let changed =
            stretches().try_for_each(|run| self.arena.protect(self.range_of(run), rights));
        if let Err(error) = changed {
            for run in stretches() {
                let (range, old) = (self.range_of(run), run.first.rights);
                undo(self.arena.protect(range, old));
                self.shadow().protect(range, old);
            }
            return Err(error);
        }
        reservation.settle(self.table.commit(range, |_, entry| {
            if entry.is_backed() {
                Entry::new(entry.frame(), entry.size(), rights)
            } else {
                entry
            }
        }));
        Ok(())
    }

    fn remap(&self, from: Range, to: Range) -> Result<(), MemoryError> {
        self.check("mremap", from, PageSize::FourKiB)?;
        self.check("mremap", to, PageSize::FourKiB)?;
        if from.len() != to.len() || from.overlaps(to) {
            return Err(MemoryError::System {
                call: "mremap",
                range: to,
                errno: ErrorKind::InvalidInput,
            });
        }
        self.check_vacant("mremap", to)?;
        let (source, target) = (
            self.table.page_of(from.start()),
            self.table.page_of(to.start()),
        );
        let moved = || {
            self.table.runs(from).map(move |mut run| {
                run.first.page = run.first.page - source + target;
                run
            })
        };
        let needed = moved().count() as u64 + 1 + self.table.open_ends(from);
        let reservation = self.budget.reserve(needed)?;
        self.withdraw(from);
        // For a moment the CPU reaches the frames at both places: a store to the old one is not lost.
        if let Err(error) = moved()
            .try_for_each(|run| self.place(run, || ()))
            .and_then(|()| self.arena.cut(from))
        {
            undo(self.arena.cut(to));
            self.restore(from);
            return Err(error);
        }
        let size = |page: u64, _| {
            let size = self.table.get(page - target + source).size();
            // A large page stays one where its new address is aligned to it.
            match source.abs_diff(target) % (1 << order(size)) {
                0 => size,
                _ => PageSize::FourKiB,
            }
        };
        let difference: i64 = moved().map(|run| self.publish(run, size)).sum();
        self.shadow().forget(from);
        reservation.settle(difference + self.table.commit(from, |_, _| Entry::EMPTY));
        Ok(())
    }

    fn translate(&self, addr: Addr) -> Option<Translation> {
        let mut found = self.table.translate(addr)?;
        if let Some(kernel) = &self.kernel {
            found.rights &= kernel.rights(&found)?;
        }
        Some(found)
    }

    fn walk(&self, range: Range, found: &mut dyn FnMut(Translation)) {
        self.table.walk(range, &mut |mut one| {
            if let Some(kernel) = &self.kernel {
                let Some(rights) = kernel.rights(&one) else {
                    return;
                };
                one.rights &= rights;
            }
            found(one);
        });
    }

    fn exclude(&self, range: Range, touched: Touched) -> Result<Box<dyn Exclusion>, MemoryError> {
        let call = "UFFDIO_REGISTER";
        self.check(call, range, PageSize::FourKiB)?;
        if self.table.backed(range).count() as u64 != range.pages(PageSize::FourKiB) {
            let errno = ErrorKind::NotFound;
            return Err(MemoryError::System { call, range, errno });
        }
        let touches = self.touches.get(&self.budget, range)?;
        let view = Range::new(self.view(range.start()), range.len() as u64);
        let view = view.expect("as long as another, where this process has it");
        let taken = touches.watch((range, view), touched, || self.arena.forget(range))?;
        Ok(Box::new(taken))
    }
}

impl Drop for ModelMemory {
    fn drop(&mut self) {
        self.bus.oracle().drop_space(self.id);
        self.budget
            .give_back(OWN_MAPPINGS - 1 + self.table.mappings());
        // Frames that the CPU could still reach are never given to anybody else; they count as leaked then.
        if self.arena.cut(self.arena()).is_ok() {
            self.free_frames_of(self.arena());
        }
    }
}

/// log2 of the 4 KiB frames of a page.
fn order(page: PageSize) -> u32 {
    page.shift() - PageSize::FourKiB.shift()
}

/// See the module: there is no way on from here.
fn undo(result: Result<(), MemoryError>) {
    if let Err(error) = result {
        panic!("the kernel does not take back a change of mappings that failed half-way: {error}");
    }
}
