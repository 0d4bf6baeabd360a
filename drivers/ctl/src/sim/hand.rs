//! One thread of a simulation: carries out its operations, and checks what the devices did.
//!
//! The memory of a buffer is this thread's own, and so is what is in it. A sweep that writes is waited for before its buffer goes,
//! as its addresses may be another thread's afterwards; in a space of its own, and when its segment goes first, it is not.

mod work;

use std::collections::BTreeMap;
use std::sync::Arc;

use shootdown::{
    Addr, AddressSpace, ExitError, Map, MapError, MemoryError, PageSize, Range, Rights,
};
use shootdown_gru::{GruError, Segment};
use shootdown_hw_model::ModelMemory;
use shootdown_primitive::sync::atomic::Ordering;

use super::program::{Number, Operation, Step};
use crate::churn;
use crate::shared::{Shared, is_quarantine};
use crate::worker::{BLOCKS, histogram};

const SMALL: u64 = PageSize::FourKiB.bytes();

/// Bytes of the arena of a space of one's own.
const ARENA: u64 = 2 << 20;

/// What a control block is at work on.
#[derive(Clone, Copy)]
struct Work {
    buffer: Number,
    writes: bool,
}

struct Held {
    segment: Segment,
    space: Option<Number>,
    work: [Option<Work>; BLOCKS],
}

#[derive(Clone, Copy)]
struct Buffer {
    range: Range,
    space: Option<Number>,
    /// A device that was lost may go on with it, or a page is read-only: what is in it is not checked.
    tainted: bool,
}

/// A thread.
pub(super) struct Hand {
    shared: Arc<Shared>,
    spaces: BTreeMap<Number, Arc<AddressSpace>>,
    segments: BTreeMap<Number, Held>,
    buffers: BTreeMap<Number, Buffer>,
    /// What went wrong.
    findings: Vec<String>,
}

/// What operation `number` writes.
fn value(number: Number) -> u64 {
    0x5d5d_0000_0000_0000 | u64::from(number)
}

impl Hand {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            spaces: BTreeMap::new(),
            segments: BTreeMap::new(),
            buffers: BTreeMap::new(),
            findings: Vec::new(),
        }
    }

    /// Carries out `steps`, until something is found, and puts everything back: what it has found.
    pub(super) fn run(mut self, steps: &[Step]) -> Vec<String> {
        for step in steps {
            let oracle = self.shared.bus.oracle();
            let mismatches = self.shared.data_mismatches.load(Ordering::Relaxed);
            if oracle.stale_accesses() + mismatches > 0 || !self.findings.is_empty() {
                break;
            }
            self.step(step.number, step.operation);
        }
        let segments: Vec<_> = self.segments.keys().copied().collect();
        for segment in segments {
            self.settle(segment);
            self.segments.remove(&segment);
        }
        let spaces: Vec<_> = self.spaces.keys().copied().collect();
        spaces.into_iter().for_each(|space| self.exit(space));
        // What is mapped in the shared space goes with it.
        self.findings
    }

    fn find(&mut self, what: String) {
        self.findings.push(what);
    }

    fn space(&self, space: Option<Number>) -> Option<Space> {
        Some(match space {
            None => Space::Shared(self.shared.clone()),
            Some(space) => Space::Own(self.spaces.get(&space)?.clone()),
        })
    }

    fn step(&mut self, number: Number, operation: Operation) {
        match operation {
            Operation::Space => self.make_space(number),
            Operation::Exit { space } => self.exit(space),
            Operation::Segment { space } => self.make_segment(number, space),
            Operation::EndSegment { segment, locked } => self.end_segment(segment, locked),
            Operation::Map { space, size, pages } => {
                if let Some(buffer) =
                    self.map(space, Map::anonymous(pages * size.bytes()).page_size(size))
                {
                    self.buffers.insert(number, buffer);
                }
            }
            Operation::Unmap { buffer, locked } => {
                self.settle_writers(buffer);
                if let Some(buffer) = self.buffers.remove(&buffer) {
                    self.unmap(buffer.space, buffer.range, locked);
                }
            }
            Operation::UnmapHalf { buffer, upper } => self.unmap_half(buffer, upper),
            Operation::Discard { buffer, page } => self.discard(buffer, page),
            Operation::Protect { buffer, page } => self.protect(buffer, page),
            Operation::Remap { buffer } => self.remap(number, buffer),
            Operation::Write {
                segment,
                buffer,
                page,
            } => self.write(number, segment, buffer, page),
            Operation::Count {
                segment,
                buffer,
                page,
            } => self.count(number, segment, buffer, page),
            Operation::Sweep {
                segment,
                buffer,
                page,
                writes,
            } => {
                self.sweep(number, segment, Work { buffer, writes }, page);
            }
            Operation::Settle { segment } => self.settle(segment),
            Operation::Registration { place } => self.registration(number, place),
        }
    }

    /// What the program provokes on purpose, or a dead device brings about, is no finding.
    fn expect(&mut self, what: &str, result: Result<(), MapError>) -> bool {
        match result {
            Ok(()) => return true,
            Err(
                MapError::Memory(MemoryError::OutOfFrames { .. } | MemoryError::OutOfVmas { .. })
                | MapError::NoRoom { .. },
            ) => {}
            Err(error) if self.shared.faulty && is_quarantine(&error) => {}
            Err(error) => self.find(format!("{what}: {error}")),
        }
        false
    }

    /// A segment ended badly: it goes. What it was at work on may be written by it until it is unmapped.
    fn lose(&mut self, number: Number, error: &GruError, what: &str) {
        if !(self.shared.faulty && self.shared.is_lost(error)) {
            self.find(format!("{what}: {error}"));
        }
        if let Some(held) = self.segments.remove(&number) {
            for work in held.work.into_iter().flatten() {
                if let Some(buffer) = self.buffers.get_mut(&work.buffer) {
                    buffer.tainted = true;
                }
            }
        }
    }

    fn make_space(&mut self, number: Number) {
        match ModelMemory::new(&self.shared.bus, ARENA) {
            Ok(memory) => {
                let space = AddressSpace::managed(memory, crate::run::deadlines());
                self.spaces.insert(number, Arc::new(space));
            }
            Err(error) => self.find(format!("no space: {error}")),
        }
    }

    /// With its memory mapped, and its segments at work.
    fn exit(&mut self, number: Number) {
        let Some(space) = self.spaces.remove(&number) else {
            return;
        };
        let shared = self.shared.clone();
        shared.await_health();
        match space.exit() {
            Ok(()) => {}
            // Memory that a dead device may still reach stays.
            Err(ExitError::Reached { .. }) if shared.faulty => {}
            Err(error) => self.find(format!("exit: {error}")),
        }
        self.buffers
            .retain(|_, buffer| buffer.space != Some(number));
        self.segments.retain(|_, held| held.space != Some(number));
        let (stats, sums) = (space.stats(), &shared.short_lived);
        sums.inserts.fetch_add(stats.inserts, Ordering::Relaxed);
        sums.releases.fetch_add(stats.releases, Ordering::Relaxed);
        let left = space.registrations() as u64;
        sums.registrations.fetch_add(left, Ordering::Relaxed);
        shared
            .kept
            .fetch_add(space.quarantined_bytes(), Ordering::Relaxed);
        shared.spaces_exited.fetch_add(1, Ordering::Relaxed);
    }

    fn make_segment(&mut self, number: Number, space: Option<Number>) {
        let Some(of) = self.space(space) else {
            return;
        };
        match self.shared.gru.segment(&of) {
            Ok(segment) => {
                let work = [None; BLOCKS];
                self.segments.insert(
                    number,
                    Held {
                        segment,
                        space,
                        work,
                    },
                );
            }
            // Others have them.
            Err(
                GruError::NoContext { .. }
                | GruError::NoneStealable { .. }
                | GruError::NoAsid { .. }
                | GruError::NoTag { .. },
            ) => {}
            Err(error) if self.shared.faulty && self.shared.is_lost(&error) => {}
            Err(error) => self.find(format!("no segment: {error}")),
        }
    }

    /// With its work in flight.
    fn end_segment(&mut self, number: Number, locked: bool) {
        let Some(held) = self.segments.remove(&number) else {
            return;
        };
        let Some(space) = self.space(held.space) else {
            return;
        };
        let result = if locked {
            match space.lock_write() {
                Ok(guard) => held.segment.unmap_locked(&guard).map(|_| ()),
                Err(refused) => Err(refused.into()),
            }
        } else {
            held.segment.unmap().map(|_| ())
        };
        match result {
            Ok(()) => {}
            Err(error) if self.shared.faulty && self.shared.is_lost(&error) => {
                let works =
                    |buffer: Number| held.work.iter().flatten().any(|work| work.buffer == buffer);
                for (number, buffer) in &mut self.buffers {
                    buffer.tainted |= works(*number);
                }
            }
            Err(error) => self.find(format!("unmap of a segment: {error}")),
        }
        self.shared
            .segments_torn_down
            .fetch_add(1, Ordering::Relaxed);
    }

    fn map(&mut self, space: Option<Number>, what: Map) -> Option<Buffer> {
        let result = self.space(space)?.map(what);
        match result {
            Ok(range) => Some(Buffer {
                range,
                space,
                tainted: false,
            }),
            Err(error) => {
                self.expect("map", Err(error));
                None
            }
        }
    }

    /// Changes memory of `space`: whether it was changed.
    fn change(
        &mut self,
        space: Option<Number>,
        what: &str,
        call: impl FnOnce(&AddressSpace) -> Result<(), MapError>,
    ) -> bool {
        let Some(space) = self.space(space) else {
            return false;
        };
        let result = call(&space);
        self.shared.shootdowns.fetch_add(1, Ordering::Relaxed);
        self.expect(what, result)
    }

    fn unmap(&mut self, space: Option<Number>, range: Range, locked: bool) -> bool {
        self.change(space, "unmap", |space| {
            if locked {
                space.lock_write()?.unmap(range)
            } else {
                space.unmap(range)
            }
        })
    }

    fn unmap_half(&mut self, number: Number, upper: bool) {
        let Some(buffer) = self.buffers.get(&number).copied() else {
            return;
        };
        let lower = buffer.range.pages(PageSize::FourKiB) / 2;
        let Some(middle) = page(buffer.range, lower).filter(|_| lower > 0) else {
            return;
        };
        self.settle_writers(number);
        let first = Range::new(buffer.range.start(), lower * SMALL);
        let second = Range::inclusive(middle.start(), buffer.range.last());
        let (Ok(first), Ok(second)) = (first, second) else {
            return;
        };
        let (goes, stays) = if upper {
            (second, first)
        } else {
            (first, second)
        };
        self.unmap(buffer.space, goes, false);
        // The other half is the space's now, whatever became of it.
        self.buffers.insert(
            number,
            Buffer {
                range: stays,
                ..buffer
            },
        );
    }

    fn discard(&mut self, number: Number, at: u64) {
        let Some((buffer, page)) = self.part(number, at) else {
            return;
        };
        if self.change(buffer.space, "discard", |space| space.discard(page))
            && !self.is_written(number)
            && !buffer.tainted
        {
            self.matches(page.start(), (SMALL / 8) as u32, 0, "a discard");
        }
    }

    fn protect(&mut self, number: Number, at: u64) {
        let Some((buffer, page)) = self.part(number, at) else {
            return;
        };
        for rights in [Rights::READ, Rights::READ_WRITE] {
            if !self.change(buffer.space, "protect", |space| space.protect(page, rights))
                && let Some(buffer) = self.buffers.get_mut(&number)
            {
                buffer.tainted = true;
            }
        }
    }

    fn remap(&mut self, by: Number, number: Number) {
        self.settle_writers(number);
        let Some(buffer) = self.buffers.get(&number).copied() else {
            return;
        };
        let Some(hole) = self.map(buffer.space, Map::anonymous(buffer.range.len() as u64)) else {
            return;
        };
        if !self.unmap(buffer.space, hole.range, false) {
            return;
        }
        if !buffer.tainted {
            let word = buffer.range.start().get() as *mut u64;
            // SAFETY: the buffer is this thread's own and mapped for writing; devices reach it through frames, so volatile.
            unsafe { word.write_volatile(value(by)) };
        }
        let mut moved = None;
        self.change(buffer.space, "remap", |space| {
            match space.remap(buffer.range, hole.range.start()) {
                Ok(to) => moved = Some(to),
                // Another thread has mapped there meanwhile.
                Err(MapError::Occupied { .. }) => {}
                Err(error) => return Err(error),
            }
            Ok(())
        });
        if let Some(range) = moved {
            self.buffers.insert(number, Buffer { range, ..buffer });
            if !buffer.tainted {
                self.matches(range.start(), 1, value(by), "the CPU");
            }
        }
    }

    /// A buffer and 4 KiB of it, if it is still there and so large.
    fn part(&self, number: Number, at: u64) -> Option<(Buffer, Range)> {
        let buffer = *self.buffers.get(&number)?;
        Some((buffer, page(buffer.range, at)?))
    }

    fn registration(&mut self, number: Number, place: usize) {
        let Some(touch) = self.map(None, Map::anonymous(SMALL)) else {
            return;
        };
        let range = if number.is_multiple_of(2) {
            self.shared.arena
        } else {
            touch.range
        };
        let shared = self.shared.clone();
        let turned = churn::turn(
            &shared.space,
            range,
            touch.range,
            place as u64,
            &shared.releases,
            &mut histogram(),
        );
        match turned {
            Ok(()) => {}
            Err(churn::ChurnError::Map(error)) if shared.faulty && is_quarantine(&error) => {}
            Err(error) => self.find(format!("registrations: {error}")),
        }
        self.unmap(None, touch.range, false);
    }

    fn matches(&mut self, at: Addr, count: u32, want: u64, who: &str) {
        for nth in 0..u64::from(count) {
            let word = (at.get() + nth * 8) as *const u64;
            // SAFETY: the buffer is this thread's own and mapped readable; devices write it through frames, so volatile.
            let got = unsafe { word.read_volatile() };
            if got != want {
                self.shared.data_mismatches.fetch_add(1, Ordering::Relaxed);
                self.find(format!(
                    "{:#x} holds {got:#x}, not the {want:#x} that {who} left there",
                    word as u64
                ));
                return;
            }
        }
        let bytes = u64::from(count) * 8;
        self.shared
            .bytes_verified
            .fetch_add(bytes, Ordering::Relaxed);
    }
}

/// The 4 KiB number `at` of `range`.
fn page(range: Range, at: u64) -> Option<Range> {
    let page = Range::new(range.start().get().checked_add(at * SMALL)?, SMALL).ok()?;
    range.contains(page).then_some(page)
}

/// A space, which lives while this does.
enum Space {
    Shared(Arc<Shared>),
    Own(Arc<AddressSpace>),
}

impl std::ops::Deref for Space {
    type Target = AddressSpace;

    fn deref(&self) -> &AddressSpace {
        match self {
            Self::Shared(shared) => &shared.space,
            Self::Own(space) => space,
        }
    }
}
