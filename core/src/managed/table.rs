//! The table of mappings, and the spans that operations have claimed in it.

use std::collections::BTreeMap;
use std::ops::Bound;

use super::MapError;
use super::change::Change;
use crate::addr::{Addr, PageSize, PageSizes, Range};
use crate::events::Events;
use crate::memory::{Memory, Rights};
use crate::primitive::{Arc, Mutex};
use crate::registration::Inner;
use crate::segment::SegmentInner;
use crate::tlb::{Device, Health};

/// What becomes of quarantined pages once no device can reach them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Then {
    Unmap,
    Keep,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum State {
    Mapped,
    Quarantined { then: Then },
}

#[derive(Clone, Debug)]
pub(super) struct Vma {
    pub(super) last: Addr,
    /// What its borders keep to, as long as no page is cut.
    pub(super) page: PageSize,
    /// The sizes that its pages have.
    pub(super) sizes: PageSizes,
    pub(super) rights: Rights,
    pub(super) state: State,
    /// These are addresses of a segment, with no memory behind them.
    pub(super) segment: Option<Arc<SegmentInner>>,
}

impl Vma {
    pub(super) fn is_of(&self, segment: &Arc<SegmentInner>) -> bool {
        matches!(&self.segment, Some(one) if Arc::ptr_eq(one, segment)) || planted!("r14")
    }
}

/// A range in quarantine, and what it waits for.
#[derive(Debug)]
pub(super) struct Sick {
    pub(super) range: Range,
    /// Devices that did not acknowledge: until they are recovered.
    pub(super) devices: Vec<Device>,
    /// Registrations whose handlers failed with no device to answer for them: only they can say that it is over, by another try.
    pub(super) registrations: Vec<Arc<Inner>>,
    /// Nothing can tell any more that the pages are out of reach.
    pub(super) for_good: bool,
}

impl Sick {
    fn may_be_tried(&self) -> bool {
        let healthy = |device: &Device| device.health() == Health::Healthy;
        !self.for_good
            && self.devices.iter().all(healthy)
            && !self
                .registrations
                .iter()
                .any(|one| one.word.load().is_detached())
    }
}

/// What an operation finds in its range.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Those that are not over.
    pub(super) segments: Vec<Arc<SegmentInner>>,
    /// There is memory, not only segments.
    pub(super) memory: bool,
    /// Pages of it are large, or were: others may be cutting them.
    pub(super) large: bool,
}

#[derive(Debug, Default)]
pub(super) struct Mappings {
    pub(super) by_start: BTreeMap<Addr, Vma>,
    pub(super) spans: Vec<Range>,
    pub(super) sick: Vec<Sick>,
    /// No free address lies below.
    pub(super) hint: u64,
    /// Exit has begun: no span is claimed any more.
    pub(super) closed: bool,
}

#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) arena: Option<Range>,
    pub(super) mappings: Mutex<Mappings>,
}

impl Mappings {
    pub(super) fn overlapping(&self, range: Range) -> impl Iterator<Item = (Range, &Vma)> {
        let first = self.by_start.range(..=range.start()).next_back();
        // Mostly there is but that one.
        let is_all = first.is_some_and(|(_, vma)| vma.last >= range.last());
        let behind = (
            Bound::Excluded(range.start()),
            Bound::Included(range.last()),
        );
        let others = (!is_all).then(|| self.by_start.range(behind));
        let all = first.into_iter().chain(others.into_iter().flatten());
        all.filter_map(move |(start, vma)| {
            let whole = Range::inclusive(*start, vma.last).ok()?;
            whole.overlaps(range).then_some((whole, vma))
        })
    }

    pub(super) fn is_claimed(&self, range: Range) -> bool {
        self.spans.iter().any(|span| span.overlaps(range))
    }

    /// What is in `range`; refuses what is not mapped as a whole, or not as `change` needs it.
    pub(super) fn check(&self, range: Range, change: Change) -> Result<Found, MapError> {
        let mut next = range.start();
        let mut found = Found::default();
        for (whole, vma) in self.overlapping(range) {
            if whole.start() > next {
                return Err(MapError::NotMapped { range, hole: next });
            }
            if vma.state != State::Mapped && change != Change::Recover {
                return Err(MapError::InQuarantine {
                    range,
                    quarantined: whole,
                });
            }
            found.large |= vma.sizes != PageSizes::FOUR_KIB;
            match &vma.segment {
                Some(_) if !change.unmaps() => {
                    return Err(MapError::Segment {
                        range,
                        segment: whole,
                    });
                }
                Some(segment) if !segment.is_over() => found.segments.push(segment.clone()),
                Some(_) => {}
                None => found.memory = true,
            }
            match whole.last().checked_add(1) {
                Some(after) if whole.last() < range.last() => next = after,
                _ => return Ok(found),
            }
        }
        Err(MapError::NotMapped { range, hole: next })
    }

    /// Whether the range is one whole mapping, as mostly.
    fn is_one(&self, range: Range) -> bool {
        let first = self.by_start.get(&range.start());
        first.is_some_and(|vma| vma.last == range.last())
    }

    /// Cuts mappings at both ends of the range.
    pub(super) fn split(&mut self, range: Range) {
        if self.is_one(range) {
            return;
        }
        for at in [Some(range.start()), range.end()].into_iter().flatten() {
            if let Some((start, vma)) = self.by_start.range_mut(..at).next_back()
                && vma.last >= at
                && *start < at
            {
                let rest = vma.clone();
                vma.last = Addr::new(at.get() - 1);
                self.by_start.insert(at, rest);
            }
        }
    }

    /// The large pages of which `range` holds a part and not all: one at each end.
    fn cut(&self, range: Range) -> [Option<Range>; 2] {
        [Some(range.start()), range.end()].map(|at| {
            let at = at?;
            let (_, vma) = self.by_start.range(..=at).next_back()?;
            let cut = vma.last >= at && !at.is_aligned(vma.page) && vma.segment.is_none();
            cut.then(|| Range::page(at, vma.page))
        })
    }

    /// Makes the pages that a change of `range` will cut mappings of their own.
    pub(super) fn set_apart(&mut self, range: Range) {
        for whole in self.cut(range).into_iter().flatten() {
            self.split(whole);
        }
    }

    /// A change of `range` is about to cut large pages, which [`Mappings::set_apart`] has seen: from here on they may be small ones, and
    /// who changes another part of them meanwhile has to flush those too. Does not allocate.
    pub(super) fn cutting(&mut self, range: Range) {
        for whole in self.cut(range).into_iter().flatten() {
            self.each(whole, |(_, vma)| vma.sizes |= PageSizes::FOUR_KIB);
        }
    }

    /// It has cut them: they are small ones.
    pub(super) fn has_cut(&mut self, range: Range) {
        for whole in self.cut(range).into_iter().flatten() {
            self.each(whole, |(_, vma)| {
                vma.page = PageSize::FourKiB;
                vma.sizes = PageSizes::FOUR_KIB;
            });
        }
    }

    pub(super) fn each(&mut self, range: Range, edit: impl FnMut((&Addr, &mut Vma))) {
        self.by_start
            .range_mut(range.start()..=range.last())
            .for_each(edit);
    }

    /// Takes mappings out: those of segments, the last count of which they may hold, and whose context's drop may want this table: to be
    /// dropped unlocked. Of the others nothing is left.
    #[must_use = "to be dropped when the table is not locked"]
    pub(super) fn remove(&mut self, range: Range) -> Vec<Vma> {
        self.hint = self.hint.min(range.start().get());
        if self.is_one(range) {
            let gone = self.by_start.remove(&range.start());
            return Vec::from_iter(gone.filter(|vma| vma.segment.is_some()));
        }
        let gone = self
            .by_start
            .extract_if(range.start()..=range.last(), |_, _| true);
        let of_segments = gone.filter(|(_, vma)| vma.segment.is_some());
        of_segments.map(|(_, vma)| vma).collect()
    }

    /// A free range: the first from the hint on, or the first of all, as a hole below the hint may have been too small for
    /// somebody else only.
    pub(super) fn find(&self, len: u64, page: PageSize, arena: Range) -> Option<Range> {
        let start = arena.start().get();
        self.find_from(self.hint.max(start), len, page, arena)
            .or_else(|| self.find_from(start, len, page, arena))
    }

    fn find_from(&self, mut from: u64, len: u64, page: PageSize, arena: Range) -> Option<Range> {
        loop {
            let start = from.checked_next_multiple_of(page.bytes())?;
            let range = Range::new(start, len).ok()?;
            if !arena.contains(range) {
                return None;
            }
            let mapped = self.overlapping(range).map(|(whole, _)| whole);
            let claimed = self
                .spans
                .iter()
                .copied()
                .filter(|span| span.overlaps(range));
            match mapped.chain(claimed).map(|one| one.last().get()).max() {
                None => return Some(range),
                Some(last) => from = last.checked_add(1)?,
            }
        }
    }
}

impl Table {
    pub(crate) fn new(arena: Option<Range>) -> Self {
        Self {
            arena,
            mappings: Mutex::new(Mappings::default()),
        }
    }

    /// At exit: nothing is claimed from here on; waits until what was claimed is over. The segments that are left.
    pub(crate) fn close(&self, events: &Events) -> Vec<Arc<SegmentInner>> {
        self.mappings.lock().closed = true;
        events.wait(None, || self.mappings.lock().spans.is_empty());
        let mappings = self.mappings.lock();
        let segments = mappings
            .by_start
            .values()
            .filter_map(|vma| vma.segment.as_ref());
        segments.filter(|one| !one.is_over()).cloned().collect()
    }

    /// At exit: everything goes that no device can reach; false if something stays, which then counts as quarantined. If a device may
    /// reach all of the memory, that stays. Segments and sick devices are let go of in any case: they hold the space, and nobody asks
    /// for them any more.
    pub(crate) fn clear(&self, memory: &dyn Memory, reached: bool) -> bool {
        let (mut all, sick) = {
            let mut mappings = self.mappings.lock();
            let all = std::mem::take(&mut mappings.by_start);
            (all, std::mem::take(&mut mappings.sick))
        };
        // Nobody claims anything any more. Neither the memory nor what is dropped finds the table locked.
        let mut everything = !reached;
        all.retain(|start, vma| {
            if let Some(segment) = &vma.segment {
                everything &= segment.is_over();
                return false;
            }
            let whole = Range::inclusive(*start, vma.last);
            let gone = !reached
                && vma.state == State::Mapped
                && whole.is_ok_and(|whole| memory.unmap(whole).is_ok());
            everything &= gone;
            vma.state = State::Quarantined { then: Then::Keep };
            !gone
        });
        drop(sick);
        self.mappings.lock().by_start = all;
        everything
    }

    /// Takes out what was in quarantine and may be out of it.
    pub(super) fn recovered(&self) -> Vec<Sick> {
        let mut mappings = self.mappings.lock();
        let all = std::mem::take(&mut mappings.sick);
        let (well, sick) = all.into_iter().partition(Sick::may_be_tried);
        mappings.sick = sick;
        well
    }

    /// The pieces of `range`, and the sizes of their pages. Takes the table's lock for as long as it calls.
    pub(super) fn pieces(&self, range: Range, each: &mut dyn FnMut(Range, PageSizes)) {
        let mappings = self.mappings.lock();
        for (whole, vma) in mappings.overlapping(range) {
            each(whole, vma.sizes);
        }
    }

    /// The mappings that are left of a segment.
    pub(crate) fn parts_of(&self, segment: &Arc<SegmentInner>) -> Vec<Range> {
        let mappings = self.mappings.lock();
        let overlapping = mappings.overlapping(segment.range);
        overlapping
            .filter(|(_, vma)| vma.is_of(segment))
            .map(|(whole, _)| whole)
            .collect()
    }

    pub(super) fn quarantined(&self) -> u64 {
        let mappings = self.mappings.lock();
        let sick = mappings
            .by_start
            .iter()
            .filter(|(_, vma)| vma.state != State::Mapped && vma.segment.is_none());
        sick.map(|(start, vma)| vma.last.get() - start.get() + 1)
            .sum()
    }
}
