//! Which IOVAs a window gets: late reuse.
//!
//! A DMA that is in flight, or that a broken device makes long after, lands wherever its IOVA leads by then. So a range that was
//! given back is handed out again as late as possible: while there are addresses that nobody has had, those; then what was
//! given back first (R36). In a *sanitizing* run never: a late DMA faults instead of hitting.

use std::collections::VecDeque;

use shootdown::{Addr, Range};

/// Whether IOVAs are handed out again.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Reuse {
    /// As late as possible.
    #[default]
    Late,
    /// Never: every late DMA faults. A window that is closed costs its addresses for good.
    Never,
}

#[derive(Debug)]
pub(crate) struct Iovas {
    /// Never handed out.
    fresh: VecDeque<Range>,
    /// Given back; the oldest first.
    freed: VecDeque<Range>,
    reuse: Reuse,
}

/// Messages of interrupts are written here: never memory. Source: Intel SDM, volume 3, 11.11.
const MSI_WINDOW: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);

/// The parts of `ranges` that windows may be given.
fn usable(ranges: impl IntoIterator<Item = Range>) -> impl Iterator<Item = Range> {
    // Not the first page either: a descriptor of zeroes faults.
    let forbidden = [(0, 0xfff), MSI_WINDOW];
    ranges.into_iter().flat_map(move |range| {
        let mut left = vec![range];
        for (start, last) in forbidden {
            let hole = Range::inclusive(start, last).expect("a hole is not empty");
            left = left
                .into_iter()
                .flat_map(|one| without(one, hole))
                .collect();
        }
        left
    })
}

/// What is left of `range` on both sides of `hole`.
fn without(range: Range, hole: Range) -> impl Iterator<Item = Range> {
    let below = hole.start().get().checked_sub(1);
    let below =
        below.and_then(|last| Range::inclusive(range.start(), last.min(range.last().get())).ok());
    let above = hole.end();
    let above = above.and_then(|end| Range::inclusive(end.max(range.start()), range.last()).ok());
    [below, above].into_iter().flatten()
}

/// The same addresses, each once: whoever tells ranges may tell one in two of them.
fn disjoint(ranges: impl IntoIterator<Item = Range>) -> Vec<Range> {
    let mut sorted: Vec<Range> = ranges.into_iter().collect();
    sorted.sort_by_key(|range| range.start());
    let mut each: Vec<Range> = Vec::new();
    for range in sorted {
        match each.last_mut() {
            Some(before) if before.overlaps(range) => *before = before.hull(range),
            _ => each.push(range),
        }
    }
    each
}

/// The first place in `range` for `len` bytes, aligned to `align` and nowhere above `last`.
fn place(range: Range, len: u64, align: u64, last: Addr) -> Option<Range> {
    let start = range.start().get().checked_next_multiple_of(align)?;
    let found = Range::new(start, len).ok()?;
    (range.contains(found) && found.last() <= last).then_some(found)
}

/// Takes `found` out of entry `at`; the rest stays where it is in the order.
fn take(list: &mut VecDeque<Range>, at: usize, found: Range) {
    let Some(range) = list.remove(at) else { return };
    for (nth, rest) in without(range, found).enumerate() {
        list.insert(at + nth, rest);
    }
}

impl Iovas {
    pub(crate) fn new(ranges: impl IntoIterator<Item = Range>, reuse: Reuse) -> Self {
        Self {
            fresh: usable(disjoint(ranges)).collect(),
            freed: VecDeque::new(),
            reuse,
        }
    }

    /// Whether addresses are handed out once only.
    pub(crate) fn is_sanitizing(&self) -> bool {
        self.reuse == Reuse::Never
    }

    /// `len` bytes at a multiple of `align`, a power of two, not above `last`.
    pub(crate) fn allocate(&mut self, len: u64, align: u64, last: Addr) -> Option<Range> {
        self.take_first(|range| place(range, len, align, last))
    }

    /// Exactly this range, if it is free.
    pub(crate) fn allocate_at(&mut self, wanted: Range) -> Option<Range> {
        self.take_first(|range| range.contains(wanted).then_some(wanted))
    }

    fn take_first(&mut self, fits: impl Fn(Range) -> Option<Range>) -> Option<Range> {
        let first = |list: &VecDeque<Range>| {
            let mut entries = list.iter().enumerate();
            entries.find_map(|(at, range)| Some((at, fits(*range)?)))
        };
        if let Some((at, found)) = first(&self.fresh) {
            take(&mut self.fresh, at, found);
            return Some(found);
        }
        let oldest = first(&self.freed).or_else(|| {
            self.merge();
            first(&self.freed)
        });
        let (at, found) = oldest?;
        take(&mut self.freed, at, found);
        Some(found)
    }

    pub(crate) fn free(&mut self, range: Range) {
        if planted!("r36") {
            // As soon as possible.
            return self.fresh.push_front(range);
        }
        if self.reuse == Reuse::Late {
            self.freed.push_back(range);
        }
    }

    /// Neighbours become one, as young as the youngest of them.
    fn merge(&mut self) {
        let mut by_start: Vec<(Range, usize)> = self.freed.drain(..).zip(0..).collect();
        by_start.sort_by_key(|(range, _)| range.start());
        let mut merged: Vec<(Range, usize)> = Vec::new();
        for (range, age) in by_start {
            match merged.last_mut() {
                Some((before, of)) if before.end() == Some(range.start()) => {
                    (*before, *of) = (before.hull(range), age.max(*of));
                }
                _ => merged.push((range, age)),
            }
        }
        merged.sort_by_key(|(_, age)| *age);
        self.freed
            .extend(merged.into_iter().map(|(range, _)| range));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TOP: Addr = Addr::new(u64::MAX);

    fn pages(first: u64, count: u64) -> Range {
        Range::new(first << 12, count << 12).unwrap()
    }

    #[test]
    fn neither_the_first_page_nor_the_window_of_interrupts_is_handed_out() {
        let whole = Range::inclusive(0, 0xffff_ffff).unwrap();
        let mut iovas = Iovas::new([whole], Reuse::Never);
        let mut got = Vec::new();
        while let Some(range) = iovas.allocate(1 << 20, 1 << 20, TOP) {
            got.push(range);
        }
        let bad = [
            Range::new(0, 0x1000).unwrap(),
            Range::inclusive(MSI_WINDOW.0, MSI_WINDOW.1).unwrap(),
        ];
        assert!(
            got.iter()
                .all(|one| bad.iter().all(|bad| !bad.overlaps(*one)))
        );
        assert_eq!(got.len(), 4096 - 2);
    }

    #[test]
    fn what_was_freed_first_is_reused_first_and_only_when_nothing_fresh_is_left() {
        let mut iovas = Iovas::new([pages(1, 4)], Reuse::Late);
        let mut next = || iovas.allocate(0x1000, 0x1000, TOP).unwrap();
        let (a, b) = (next(), next());
        iovas.free(b);
        iovas.free(a);
        let mut next = || iovas.allocate(0x1000, 0x1000, TOP).unwrap();
        assert_eq!([next(), next()], [pages(3, 1), pages(4, 1)]);
        assert_eq!([next(), next()], [b, a]);
        assert_eq!(iovas.allocate(0x1000, 0x1000, TOP), None);
    }

    #[test]
    fn what_was_freed_in_pieces_serves_a_larger_window() {
        let mut iovas = Iovas::new([pages(1, 4)], Reuse::Late);
        let all: Vec<_> = (0..4)
            .map(|_| iovas.allocate(0x1000, 0x1000, TOP).unwrap())
            .collect();
        for nth in [2, 0, 3, 1] {
            iovas.free(all[nth]);
        }
        assert_eq!(iovas.allocate(0x4000, 0x1000, TOP), Some(pages(1, 4)));
    }

    #[test]
    fn a_device_that_reaches_few_addresses_gets_those() {
        let mut iovas = Iovas::new([pages(1, 1 << 30)], Reuse::Late);
        let last = Addr::new((1 << 28) - 1);
        let got = iovas.allocate(1 << 20, 0x1000, last).unwrap();
        assert!(got.last() <= last);
        assert_eq!(iovas.allocate(1 << 28, 0x1000, last), None);
    }

    proptest! {
        #[test]
        fn no_two_windows_overlap_and_sanitizing_never_reuses(
            sanitize in any::<bool>(),
            steps in proptest::collection::vec((any::<bool>(), 1_u64..9, 0_u32..3, any::<prop::sample::Index>()), 1..120),
        ) {
            let ranges = [pages(0, 20), pages(32, 40)];
            let mut iovas = Iovas::new(ranges, if sanitize { Reuse::Never } else { Reuse::Late });
            // The naive model: pages that are handed out, those that ever were, and the order in which they came back.
            let (mut live, mut ever, mut returned) = (Vec::<Range>::new(), Vec::<Range>::new(), Vec::<Range>::new());
            for (free, count, shift, which) in steps {
                if free && !live.is_empty() {
                    let range = live.swap_remove(which.index(live.len()));
                    returned.push(range);
                    iovas.free(range);
                    continue;
                }
                let align = 0x1000 << shift;
                let got = iovas.allocate(count << 12, align, TOP);
                let is_free = |range: Range| {
                    let taken = if sanitize { &ever } else { &live };
                    ranges.iter().any(|one| one.contains(range))
                        && !pages(0, 1).overlaps(range)
                        && taken.iter().all(|one| !one.overlaps(range))
                };
                match got {
                    Some(range) => {
                        prop_assert!(is_free(range), "{range} is not free");
                        prop_assert_eq!(range.start().get() % align, 0);
                        prop_assert_eq!(range.len(), u128::from(count << 12));
                        // Reuse only where nothing fresh would have done.
                        if ever.iter().any(|one| one.overlaps(range)) {
                            let fresh = (0..72).map(|page| pages(page, count)).find(|one| {
                                one.start().get() % align == 0
                                    && is_free(*one)
                                    && ever.iter().all(|old| !old.overlaps(*one))
                            });
                            prop_assert_eq!(fresh, None);
                        }
                        live.push(range);
                        ever.push(range);
                    }
                    None => {
                        let room = (0..72).map(|page| pages(page, count))
                            .find(|one| one.start().get() % align == 0 && is_free(*one));
                        // Fresh and given back addresses are not merged: room across their border may stay unseen.
                        if sanitize {
                            prop_assert_eq!(room, None);
                        }
                    }
                }
            }
        }
    }
}
