//! One thread of the run: maps memory, has the devices work on it, checks what they did, and takes it away again.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use shootdown::{
    Addr, AddressSpace, InvalidateError, Map, MapError, MemoryError, PageSize, Range, Rights,
};
use shootdown_gru::{Atomic, Element, GruError, Instruction, MissMode, Segment, SegmentOptions};

use shootdown_pta::Queue;

use crate::churn;
use crate::foreign::Stranger;
use crate::shared::{Shared, is_quarantine};

/// What one thread has measured.
pub(crate) struct Measured {
    pub(crate) shootdown: Histogram<u64>,
    pub(crate) unregister: Histogram<u64>,
    pub(crate) foreign: Histogram<u64>,
    pub(crate) findings: Vec<String>,
}

/// For latencies in nanoseconds, up to a minute; longer ones count as that. As large, and as resident, from the start as it ever
/// is: one that grows with the longest latency so far, or page by page with their variety, looks like a leak for minutes.
pub(crate) fn histogram() -> Histogram<u64> {
    let histogram = Histogram::new_with_bounds(1, 60_000_000_000, 3);
    let mut histogram = histogram.expect("valid bounds and precision");
    histogram.reset();
    histogram
}

/// Words that a segment must have room for: what one instruction moves.
pub(crate) const CHUNK: u32 = 64;
/// Control blocks that a segment must have: what is at work at the same time.
pub(crate) const BLOCKS: usize = 8;

pub(crate) struct Worker<'s> {
    pub(crate) shared: &'s Shared,
    /// Its number among the threads.
    pub(crate) nth: u64,
    pub(crate) rng: SmallRng,
    pub(crate) segments: Vec<Segment>,
    /// Of an accelerator.
    queue: Option<Queue>,
    /// Makes foreign calls for this thread.
    pub(crate) stranger: Option<Stranger>,
    wanted: usize,
    pub(crate) measured: Measured,
    rounds: u64,
    /// The segment that worked last, and where.
    recent: Option<(usize, Addr)>,
    /// A device was lost in this round. What it was at work on it may go on with, if it survived.
    lost: bool,
    /// Changes that were refused, or failed.
    pub(crate) refused: u64,
    /// Ranges that could not be unmapped because a part of them is in quarantine, and will be given back there.
    left: Vec<Range>,
}

impl<'s> Worker<'s> {
    pub(crate) fn new(
        shared: &'s Shared,
        (nth, seed): (u64, u64),
        segments: usize,
        stranger: Option<Stranger>,
    ) -> Self {
        Self {
            shared,
            nth,
            rng: SmallRng::seed_from_u64(seed),
            segments: Vec::new(),
            queue: None,
            stranger,
            wanted: segments,
            measured: Measured {
                shootdown: histogram(),
                unregister: histogram(),
                foreign: histogram(),
                findings: Vec::new(),
            },
            rounds: 0,
            recent: None,
            lost: false,
            refused: 0,
            left: Vec::new(),
        }
    }

    pub(crate) fn run(mut self) -> Measured {
        // Relaxed: a flag that carries nothing else.
        while !self.shared.stop.load(Ordering::Relaxed) {
            self.round();
            self.rounds += 1;
        }
        self.measured
    }

    pub(crate) fn find(&mut self, what: String) {
        if self.measured.findings.len() < 8 {
            self.measured.findings.push(what);
        }
    }

    /// What the workload provokes on purpose, or a dead device brings about, is no finding.
    pub(crate) fn expect(&mut self, what: &str, result: Result<(), MapError>) -> bool {
        let Err(error) = result else {
            return true;
        };
        self.refused += 1;
        match error {
            MapError::Memory(MemoryError::OutOfFrames { .. } | MemoryError::OutOfVmas { .. })
            | MapError::NoRoom { .. } => {}
            // It will be so until the device has been recovered.
            error if is_quarantine(&error) => thread::sleep(Duration::from_millis(1)),
            error => self.find(format!("{what}: {error}")),
        }
        false
    }

    /// Unmaps a range of a space: whether it is not this thread's any more. In quarantine it is the space's, which unmaps it
    /// once the device has been recovered.
    pub(crate) fn unmap_in(
        &mut self,
        space: &AddressSpace,
        range: Range,
        call: impl FnOnce(&AddressSpace) -> Result<(), MapError>,
    ) -> bool {
        let mut quarantined = false;
        let mut refused = false;
        let gone = self.shoot_in(space, "unmap", |space| {
            let result = call(space);
            quarantined = matches!(
                result,
                Err(MapError::Invalidate(InvalidateError::Quarantined { .. }))
            );
            refused = matches!(result, Err(MapError::InQuarantine { .. }));
            result
        });
        // A space of its own ends soon, and all of it goes then.
        if refused && space.id() == self.shared.space.id() {
            self.left.push(range);
        }
        gone || quarantined
    }

    pub(crate) fn unmap(&mut self, range: Range) -> bool {
        self.unmap_in(&self.shared.space, range, |space| space.unmap(range))
    }

    /// Unmaps what could not be unmapped before.
    fn unmap_left(&mut self) {
        for range in std::mem::take(&mut self.left) {
            self.unmap(range);
        }
    }

    pub(crate) fn shoot(
        &mut self,
        what: &str,
        call: impl FnOnce(&AddressSpace) -> Result<(), MapError>,
    ) -> bool {
        self.shoot_in(&self.shared.space, what, call)
    }

    /// As [`Self::shoot`], in another space than the one that all threads share.
    pub(crate) fn shoot_in(
        &mut self,
        space: &AddressSpace,
        what: &str,
        call: impl FnOnce(&AddressSpace) -> Result<(), MapError>,
    ) -> bool {
        let begun = Instant::now();
        let result = call(space);
        let nanos = begun.elapsed().as_nanos() as u64;
        self.measured.shootdown.saturating_record(nanos);
        self.shared.shootdowns.fetch_add(1, Ordering::Relaxed);
        self.expect(what, result)
    }

    fn round(&mut self) {
        self.lost = false;
        self.recent = None;
        self.unmap_left();
        while self.segments.len() < self.wanted {
            let options = self.segment_options();
            match self.shared.gru.segment_with(&self.shared.space, options) {
                Ok(segment) => self.segments.push(segment),
                Err(_) if !self.segments.is_empty() => break,
                Err(error) => {
                    if !self.shared.is_lost(&error) {
                        self.find(format!("no segment: {error}"));
                    }
                    // It may be over soon; the next round tries again.
                    thread::sleep(Duration::from_millis(1));
                    return;
                }
            }
        }
        let (page, pages) = match self.rng.random_range(0..10) {
            0 => (PageSize::TwoMiB, 1),
            1 | 2 => (PageSize::SixtyFourKiB, 2),
            _ => (PageSize::FourKiB, self.rng.random_range(2..=16)),
        };
        let buffer = match self
            .shared
            .space
            .map(Map::anonymous(pages * page.bytes()).page_size(page))
        {
            Ok(buffer) => buffer,
            Err(error) => {
                self.expect("map", Err(error));
                return;
            }
        };
        for _ in 0..self.rng.random_range(2..10) {
            self.work(buffer);
        }
        if self.accelerates() {
            let queue = self.queue.take();
            let queue = queue.or_else(|| self.queue(&self.shared.space));
            self.queue = queue.filter(|queue| self.lost || self.accelerate(queue, buffer));
        }
        self.change(buffer);
        self.foreign(buffer);
        self.end(buffer);
        if self.rounds % 8 == 1 {
            self.fault_beside_change();
        }
        if self.rounds % 16 == 3 {
            self.churn();
        }
        if self.rounds % 32 == 7 {
            self.end_a_segment();
        }
        if self.rounds % 16 == 9 {
            self.short_lived_space();
        }
        if self.rounds % 16 == 13 {
            self.services();
        }
    }

    /// What the next segment is made with: misses are resolved in all ways.
    fn segment_options(&mut self) -> SegmentOptions {
        let misses = match self.rng.random_range(0..4) {
            0 => MissMode::UserPolling,
            1 => MissMode::FaultMapPolled,
            _ => MissMode::FaultMap,
        };
        SegmentOptions {
            control_blocks: BLOCKS,
            data_bytes: CHUNK as usize * 8,
            misses,
            ..shootdown_gru::Config::default().segment
        }
    }

    /// Whether an accelerator takes part in this round.
    fn accelerates(&self) -> bool {
        self.rounds % 4 == 2
    }

    /// A part of the buffer: whole double words.
    pub(crate) fn part(&mut self, buffer: Range) -> (Addr, u32) {
        let words = (buffer.len() / 8) as u64;
        let count = self.rng.random_range(1..=u64::from(CHUNK).min(words));
        let first = self.rng.random_range(0..=words - count);
        (Addr::new(buffer.start().get() + first * 8), count as u32)
    }

    /// One of the thread's segments; none while there is none.
    pub(crate) fn any_segment(&mut self) -> Option<usize> {
        let count = self.segments.len();
        (count > 0).then(|| self.rng.random_range(0..count))
    }

    /// What became of `what` on segment `nth`, which goes if its device was lost: a new one is made in the next round.
    pub(crate) fn lose(&mut self, nth: usize, error: GruError, what: &str) {
        if self.shared.is_lost(&error) {
            self.lost = true;
            drop(self.segments.swap_remove(nth));
        } else {
            self.find(format!("{what}: {error}"));
        }
    }

    /// Runs instructions on segment `nth`; false if one did not end well.
    fn device(&mut self, nth: usize, instructions: &[Instruction]) -> bool {
        match self.shared.run_together(&self.segments[nth], instructions) {
            Ok(()) => true,
            Err(error) => {
                self.lose(nth, error, "an instruction");
                false
            }
        }
    }

    pub(crate) fn matches(&mut self, at: Addr, count: u32, want: u64, who: &str) {
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
        self.shared
            .bytes_verified
            .fetch_add(u64::from(count) * 8, Ordering::Relaxed);
    }

    /// The device sets, copies and counts, the CPU checks. Not once one was lost, which may go on.
    pub(crate) fn work(&mut self, buffer: Range) {
        let Some(nth) = self.any_segment().filter(|_| !self.lost) else {
            return;
        };
        let (at, count) = self.part(buffer);
        self.recent = Some((nth, at));
        let value: u64 = self.rng.random();
        if !self.device(nth, &[Instruction::vset(at, value, Element::Double, count)]) {
            return;
        }
        self.matches(at, count, value, "a vset");
        // They may overlap: it is the same value everywhere.
        let copies = [self.part(buffer), self.part(buffer)].map(|(to, most)| (to, most.min(count)));
        let copy = |(nth, (to, count)): (u16, (Addr, u32))| {
            Instruction::bcopy(at, to, nth * CHUNK as u16 * 8, Element::Double, count)
        };
        if !self.device(nth, &[copy((0, copies[0])), copy((1, copies[1]))]) {
            return;
        }
        for (to, count) in copies {
            self.matches(to, count, value, "a copy");
        }
        for turn in 0..self.rng.random_range(0..6u64) {
            let increment = Instruction::atomic(at, Atomic::Increment, Element::Double);
            if !self.device(nth, &[increment; BLOCKS]) {
                return;
            }
            let want = value.wrapping_add((turn + 1) * BLOCKS as u64);
            self.matches(at, 1, want, "increments");
        }
    }

    /// Discard, protect, remap.
    fn change(&mut self, buffer: Range) {
        let pages = buffer.pages(PageSize::FourKiB);
        let first = self.rng.random_range(0..pages);
        let some = self.rng.random_range(1..=(pages - first).min(16));
        let page = PageSize::FourKiB.bytes();
        let part = Range::new(buffer.start().get() + first * page, some * page)
            .expect("pages of the buffer");
        match self.rng.random_range(0..3) {
            0 => {
                if self.shoot("discard", |space| space.discard(part)) {
                    self.matches(part.start(), (part.len() / 8) as u32, 0, "a discard");
                    self.work(part);
                }
            }
            1 => {
                if self.shoot("protect", |space| space.protect(part, Rights::READ))
                    && self.shoot("protect", |space| space.protect(part, Rights::READ_WRITE))
                {
                    self.work(part);
                }
            }
            _ => self.remap(),
        }
    }

    /// Moves a small buffer to where another one has just been.
    fn remap(&mut self) {
        let len = 4 * PageSize::FourKiB.bytes();
        let Ok(from) = self.shared.space.map(Map::anonymous(len)) else {
            return;
        };
        let hole = self.shared.space.map(Map::anonymous(len));
        let old: u64 = self.rng.random();
        // SAFETY: the buffer is this thread's own and mapped for writing.
        unsafe { (from.start().get() as *mut u64).write_volatile(old) };
        self.work(Range::inclusive(from.start().get() + len / 2, from.last()).expect("half of it"));
        let mut now = from;
        if let Ok(hole) = hole
            && self.unmap(hole)
        {
            let mut moved = None;
            self.shoot("remap", |space| match space.remap(from, hole.start()) {
                Ok(to) => {
                    moved = Some(to);
                    Ok(())
                }
                // Another thread has mapped there meanwhile.
                Err(MapError::Occupied { .. }) => Ok(()),
                Err(error) => Err(error),
            });
            if let Some(moved) = moved {
                now = moved;
                self.matches(moved.start(), 1, old, "the CPU");
                self.work(moved);
            }
        }
        self.unmap(now);
    }

    /// Takes the buffer away, often with an instruction in flight, in one piece or in two, with the lock held or not.
    fn end(&mut self, buffer: Range) {
        // Best where the last work was, as that chiplet has its page; the same bytes again and again, until the page goes.
        let count = self.segments.len();
        let there = |(nth, at): &(usize, Addr)| *nth < count && buffer.holds(*at);
        let recent = self.recent.filter(there);
        let again = recent.map(|(_, at)| {
            let bytes = CHUNK * 8;
            Instruction::vload(at, 0, Element::Byte, bytes).stride(0)
        });
        let nth = recent.map(|(nth, _)| nth).or_else(|| self.any_segment());
        let mut blocks = 0;
        if let Some(nth) = nth {
            // In flight when the buffer goes: it ends with the data or an exception, whoever is first. It only reads, as another thread
            // may map the same address before it ends.
            let stride = (buffer.len() / 8) as i64 / i64::from(CHUNK);
            let load =
                Instruction::vload(buffer.start(), 0, Element::Double, CHUNK).stride(stride.max(1));
            let _ = self.segments[nth].submit(0, &load);
            blocks = 1;
            if let Some(again) = again {
                let _ = self.segments[nth].submit(1, &again);
                blocks = 2;
            }
        }
        let queue = self.queue.as_ref().filter(|_| self.accelerates());
        let reads = queue.is_some_and(|queue| Self::accelerate_beside(queue, buffer).is_ok());
        let half = buffer.pages(PageSize::FourKiB) / 2 * PageSize::FourKiB.bytes();
        let whole = match self.rng.random_range(0..4) {
            0 if half > 0 => {
                let lower = Range::new(buffer.start(), half).expect("half of a buffer");
                let upper = Range::inclusive(buffer.start().get() + half, buffer.last())
                    .expect("half of a buffer");
                self.unmap(lower);
                upper
            }
            _ => buffer,
        };
        if self.rng.random_bool(0.25) {
            self.unmap_in(&self.shared.space, whole, |space| {
                space.lock_write()?.unmap(whole)
            });
        } else {
            self.unmap(whole);
        }
        if let Some(nth) = nth
            && let Err(error) = self.shared.settle(&self.segments[nth], blocks)
        {
            self.lose(nth, error, "a load beside an unmap");
        }
        if reads && let Some(queue) = self.queue.take() {
            self.queue = Some(queue).filter(|queue| self.settle_accelerator(queue));
        }
    }

    fn churn(&mut self) {
        let Ok(touch) = self.shared.space.map(Map::anonymous(4096)) else {
            return;
        };
        for nth in 0..5 {
            let range = if self.rng.random_bool(0.5) {
                self.shared.arena
            } else {
                touch
            };
            let releases = &self.shared.releases;
            let latency = &mut self.measured.unregister;
            if let Err(error) =
                churn::turn(&self.shared.space, range, touch, nth, releases, latency)
                && !matches!(
                    &error,
                    churn::ChurnError::Map(MapError::Invalidate(_) | MapError::InQuarantine { .. })
                )
            {
                self.find(format!("registrations: {error}"));
            }
        }
        self.unmap(touch);
    }
}
