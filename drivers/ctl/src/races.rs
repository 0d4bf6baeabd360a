//! Steps that meet on purpose: a miss that is being served and a change of its page, a segment that goes and its work in flight.
//! All of it is legal, and without a planted bug nothing comes of it.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use rand::Rng;
use shootdown::{Addr, AddressSpace, ExitError, Map, MapError, PageSize, Range, Rights};
use shootdown_gru::{Element, GruError, Instruction, Segment, Status};
use shootdown_hw_model::ModelMemory;

use crate::shared::{PATIENCE, is_quarantine};
use crate::worker::{BLOCKS, CHUNK, Worker};

/// Changes of one page beside a sweep, at most; it is over after a few where misses are served at once.
const CHANGES: usize = 64;
const SMALL: u64 = PageSize::FourKiB.bytes();

/// How the page under a sweep changes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Change {
    Discard,
    Protect,
    Unmap,
    Remap,
}

/// Goes over the whole buffer from its first byte on, with at least one access a page.
fn sweep(buffer: Range, page: PageSize, change: Change, value: u64) -> Instruction {
    let len = buffer.len() as u64;
    match change {
        Change::Discard | Change::Protect => {
            // More accesses where there are few pages, and so few misses.
            let count = match page {
                PageSize::FourKiB => len / SMALL,
                PageSize::SixtyFourKiB => 1024,
                PageSize::TwoMiB => 512,
            };
            let stride = len / 8 / count;
            Instruction::vset(buffer.start(), value, Element::Double, count as u32)
                .stride(stride as i64)
        }
        // The address may be another thread's before the sweep ends, so it only reads.
        Change::Unmap | Change::Remap => {
            let count = match page {
                PageSize::FourKiB => len / SMALL,
                _ => u64::from(CHUNK) * 8,
            };
            Instruction::vload(buffer.start(), 0, Element::Byte, count as u32)
                .stride((len / count) as i64)
        }
    }
}

/// Work that goes on for milliseconds if nobody stops it: the same words again and again.
fn start_long_work(segment: &Segment, buffer: Range) {
    for cb in 0..BLOCKS.min(segment.control_blocks()) {
        let page = buffer.start().get() + cb as u64 * SMALL;
        let set = Instruction::vset(Addr::new(page), !0, Element::Double, 1 << 16).stride(0);
        // A device that was lost has nothing in flight.
        let _ = segment.submit(cb, &set);
    }
}

/// A buffer, the page of it that changes while a segment goes over it, and how.
struct Beside<'a> {
    space: &'a AddressSpace,
    segment: &'a Segment,
    buffer: Range,
    size: PageSize,
    target: Range,
    change: Change,
}

impl Worker<'_> {
    /// Misses on a page are served while this thread changes the page, a small one or 4 KiB of a large one. Then the device
    /// works on what has changed, and the CPU checks it.
    pub(crate) fn fault_beside_change(&mut self) {
        let Some(nth) = self.any_segment() else {
            return;
        };
        let size = match self.rng.random_range(0..8) {
            0 => PageSize::TwoMiB,
            1..=3 => PageSize::SixtyFourKiB,
            _ => PageSize::FourKiB,
        };
        let change = match self.rng.random_range(0..8) {
            0 => Change::Protect,
            1 => Change::Unmap,
            2 => Change::Remap,
            _ => Change::Discard,
        };
        let shared = self.shared;
        let segment = self.segments.swap_remove(nth);
        let result = self.change_beside(&shared.space, &segment, size, change);
        self.segments.push(segment);
        if let Err(error) = result {
            self.lose(self.segments.len() - 1, error, "work beside a change");
        }
    }

    fn change_beside(
        &mut self,
        space: &AddressSpace,
        segment: &Segment,
        size: PageSize,
        change: Change,
    ) -> Result<(), GruError> {
        let pages = match size {
            PageSize::FourKiB => self.rng.random_range(2..=8),
            PageSize::SixtyFourKiB => 2,
            PageSize::TwoMiB => 1,
        };
        let map = Map::anonymous(pages * size.bytes()).page_size(size);
        let buffer = match space.map(map) {
            Ok(buffer) => buffer,
            Err(error) => {
                self.expect("map", Err(error));
                return Ok(());
            }
        };
        let nth = self.rng.random_range(0..buffer.pages(PageSize::FourKiB));
        let start = buffer.start().get() + nth * SMALL;
        let target = Range::new(start, SMALL).expect("a page of it");
        let beside = Beside {
            space,
            segment,
            buffer,
            size,
            target,
            change,
        };
        let (gone, result) = self.sweep_beside(&beside);
        let ends = buffer.start().get() + buffer.len() as u64;
        let left = if gone {
            [(buffer.start().get(), start), (start + SMALL, ends)]
        } else {
            [(buffer.start().get(), ends), (ends, ends)]
        };
        for (from, to) in left {
            if from < to {
                let rest = Range::new(from, to - from).expect("what is left of it");
                self.unmap_in(space, rest, |space| space.unmap(rest));
            }
        }
        result
    }

    /// Whether the target is not mapped there any more, and what became of the work.
    fn sweep_beside(&mut self, beside: &Beside<'_>) -> (bool, Result<(), GruError>) {
        let &Beside {
            space,
            segment,
            buffer,
            size,
            target,
            change,
        } = beside;
        let value: u64 = self.rng.random();
        let whole = sweep(buffer, size, change, value);
        // The first miss is the target's.
        let from = Range::inclusive(target.start(), buffer.last()).expect("ends after it starts");
        let first = match size {
            PageSize::FourKiB => sweep(from, size, change, value),
            _ => whole,
        };
        let mut blocks = 0;
        for instruction in [first, whole, whole] {
            if segment.submit(blocks, &instruction).is_err() {
                break;
            }
            blocks += 1;
        }
        let mut now = Some(target);
        let refused = self.refused;
        match change {
            Change::Unmap => {
                if self.unmap_in(space, target, |space| space.unmap(target)) {
                    now = None;
                }
            }
            Change::Remap => now = Some(self.move_page(space, target)),
            Change::Discard | Change::Protect => {
                for _ in 0..CHANGES {
                    self.change_in_place(space, target, change);
                    let works = |cb| {
                        let status = segment.poll(cb);
                        matches!(status, Ok(Status::Active | Status::CallOs))
                    };
                    if !(0..blocks).any(works) {
                        break;
                    }
                    // Misses are taken up between two changes.
                    thread::sleep(Duration::from_micros(self.rng.random_range(0..100)));
                }
            }
        }
        let mut result = self.shared.settle(segment, blocks);
        if let Some(page) = now
            && result.is_ok()
            // Else it may be read-only, or a device at work on it.
            && self.refused == refused
        {
            let set = Instruction::vset(page.start(), value, Element::Double, CHUNK);
            result = self.shared.run_together(segment, &[set]);
            if result.is_ok() {
                self.matches(page.start(), CHUNK, value, "a vset after a change");
            }
        }
        if let Some(moved) = now.filter(|now| *now != target) {
            self.unmap_in(space, moved, |space| space.unmap(moved));
        }
        (now != Some(target), result)
    }

    fn change_in_place(&mut self, space: &AddressSpace, target: Range, change: Change) {
        if change == Change::Discard {
            self.shoot_in(space, "discard", |space| space.discard(target));
            return;
        }
        for rights in [Rights::READ, Rights::READ_WRITE] {
            self.shoot_in(space, "protect", |space| space.protect(target, rights));
        }
    }

    /// Moves a page to where another one has just been: where it is now.
    fn move_page(&mut self, space: &AddressSpace, page: Range) -> Range {
        let Ok(hole) = space.map(Map::anonymous(SMALL)) else {
            return page;
        };
        let mut now = page;
        if self.unmap_in(space, hole, |space| space.unmap(hole)) {
            self.shoot_in(space, "remap", |space| {
                match space.remap(page, hole.start()) {
                    Ok(to) => now = to,
                    // Another thread has mapped there meanwhile.
                    Err(MapError::Occupied { .. }) => {}
                    Err(error) => return Err(error),
                }
                Ok(())
            });
        }
        now
    }

    /// A segment goes with work in flight, half of the time under the map lock held for write; then the memory goes, and is
    /// used again at once.
    pub(crate) fn end_a_segment(&mut self) {
        let Some(segment) = self.segments.pop() else {
            return;
        };
        let len = BLOCKS as u64 * SMALL;
        let buffer = self.shared.space.map(Map::anonymous(len)).ok();
        if let Some(buffer) = buffer {
            start_long_work(&segment, buffer);
        }
        let locked = self.rng.random_bool(0.5);
        self.unmap_segment(&segment, &self.shared.space, locked);
        self.shared
            .segments_torn_down
            .fetch_add(1, Ordering::Relaxed);
        let Some(buffer) = buffer else {
            return;
        };
        self.unmap(buffer);
        let Ok(again) = self.shared.space.map(Map::anonymous(len)) else {
            return;
        };
        self.work(again);
        self.unmap(again);
    }

    fn unmap_segment(&mut self, segment: &Segment, space: &AddressSpace, locked: bool) {
        let result = if locked {
            match space.lock_write() {
                Ok(guard) => segment.unmap_locked(&guard).map(|_| ()),
                Err(refused) => Err(refused.into()),
            }
        } else {
            segment.unmap().map(|_| ())
        };
        match result {
            Ok(()) | Err(GruError::ContextLost { .. } | GruError::HandleTimeout { .. }) => {}
            Err(GruError::Map(error)) if is_quarantine(&error) => {}
            Err(error) => self.find(format!("unmap of a segment: {error}")),
        }
    }

    /// A space of its own, whose segment is unmapped with work in flight, or which exits with its memory mapped and its segment
    /// at work.
    pub(crate) fn short_lived_space(&mut self) {
        let Ok(memory) = ModelMemory::new(&self.shared.bus, 2 << 20) else {
            return;
        };
        let space = AddressSpace::managed(memory, crate::run::deadlines());
        let Ok(segment) = self.shared.gru.segment(&space) else {
            return;
        };
        let Ok(buffer) = space.map(Map::anonymous(2 * BLOCKS as u64 * SMALL)) else {
            return;
        };
        let value: u64 = self.rng.random();
        let set = Instruction::vset(buffer.start(), value, Element::Double, CHUNK);
        if segment.run(0, &set, PATIENCE).is_ok() {
            self.matches(buffer.start(), CHUNK, value, "a vset in a space of its own");
        }
        let queue = self.queue(&space);
        if let Some(queue) = &queue {
            self.accelerate(queue, buffer);
        }
        // Nobody else changes this space, so misses and changes are not kept apart by the map lock.
        for size in [PageSize::FourKiB, PageSize::SixtyFourKiB] {
            if let Err(error) = self.change_beside(&space, &segment, size, Change::Discard)
                && !self.shared.is_lost(&error)
            {
                self.find(format!("work beside a change: {error}"));
            }
        }
        start_long_work(&segment, buffer);
        if let Some(queue) = &queue {
            // It is at work when the space exits, or is lost already.
            drop(Self::accelerate_beside(queue, buffer));
        }
        match self.rng.random_range(0..4) {
            0 => self.unmap_segment(&segment, &space, false),
            1 => self.unmap_segment(&segment, &space, true),
            _ => {}
        }
        self.shared.await_health();
        match space.exit() {
            // Memory that a dead device may still reach stays.
            Ok(()) | Err(ExitError::Reached { .. }) => {}
            Err(error) => self.find(format!("exit: {error}")),
        }
        let stats = space.stats();
        let sums = &self.shared.short_lived;
        sums.inserts.fetch_add(stats.inserts, Ordering::Relaxed);
        sums.releases.fetch_add(stats.releases, Ordering::Relaxed);
        sums.registrations
            .fetch_add(space.registrations() as u64, Ordering::Relaxed);
        let kept = space.quarantined_bytes();
        self.shared.kept.fetch_add(kept, Ordering::Relaxed);
        self.shared.spaces_exited.fetch_add(1, Ordering::Relaxed);
    }
}
