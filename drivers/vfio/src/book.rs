//! What one IOMMU has mapped, by its own account: runs of granules.
//!
//! It follows what the kernel did, never what was asked for. Unmapping edits it without allocating: the room was made
//! beforehand, and a run that is cut in the middle takes a place of that room. Neighbouring granules of one size are one
//! run, so that it stays small and quick where granules are many.

use shootdown::Range;

/// Granules of one size side by side.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Run {
    start: u64,
    last: u64,
    /// The size of each in bytes, less one: a granule of all 2^64 bytes has a size too.
    granule: u64,
}

impl Run {
    fn range(self) -> Range {
        Range::inclusive(self.start, self.last).expect("a run is not empty")
    }

    /// The granule that `at` lies inside of, not at the start of.
    fn cut_at(self, at: u64) -> Option<Range> {
        if at <= self.start || at > self.last {
            return None;
        }
        let size = self.granule.checked_add(1)?;
        let into = (at - self.start) % size;
        (into != 0).then(|| {
            let start = at - into;
            Range::inclusive(start, start + self.granule).expect("a granule is not empty")
        })
    }
}

/// What is mapped, sorted by IOVA.
#[derive(Debug)]
pub(crate) struct Book {
    runs: Vec<Run>,
    granules: u64,
    most: u64,
}

/// What an unmap of a range comes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Inside {
    Nothing,
    /// The range begins or ends inside this granule.
    Cuts(Range),
    /// So many bytes.
    Bytes(u64),
}

impl Book {
    /// Room for `most` granules; it costs address space, and memory only as far as it is used.
    pub(crate) fn new(most: u64) -> Self {
        Self {
            runs: Vec::with_capacity(usize::try_from(most).unwrap_or(usize::MAX / 64)),
            granules: 0,
            most,
        }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.granules == self.most
    }

    pub(crate) fn most(&self) -> u64 {
        self.most
    }

    pub(crate) fn granules(&self) -> u64 {
        self.granules
    }

    /// The runs that overlap `range`.
    fn overlapping(&self, range: Range) -> std::ops::Range<usize> {
        let first = self
            .runs
            .partition_point(|run| run.last < range.start().get());
        let end = self
            .runs
            .partition_point(|run| run.start <= range.last().get());
        first..end.max(first)
    }

    pub(crate) fn inside(&self, range: Range) -> Inside {
        let runs = &self.runs[self.overlapping(range)];
        let after = range.end().map(shootdown::Addr::get);
        let cut = |run: &Run| {
            run.cut_at(range.start().get())
                .or_else(|| after.and_then(|after| run.cut_at(after)))
        };
        if let Some(cut) = runs.iter().find_map(cut) {
            return Inside::Cuts(cut);
        }
        let bytes: u128 = runs
            .iter()
            .filter_map(|run| run.range().intersect(range))
            .map(Range::len)
            .sum();
        match u64::try_from(bytes) {
            Ok(0) => Inside::Nothing,
            // All 2^64 bytes cannot be told in 64 bits; no IOMMU translates so many.
            bytes => Inside::Bytes(bytes.unwrap_or(u64::MAX)),
        }
    }

    /// `iova` has been mapped as one granule. There is room.
    pub(crate) fn add(&mut self, iova: Range) {
        debug_assert_eq!(self.inside(iova), Inside::Nothing);
        let granule = iova.last().get() - iova.start().get();
        let at = self.overlapping(iova).start;
        self.granules += 1;
        let before = at.checked_sub(1).filter(|before| {
            let run = self.runs[*before];
            run.granule == granule && run.last.checked_add(1) == Some(iova.start().get())
        });
        let after = self.runs.get(at).is_some_and(|run| {
            run.granule == granule && iova.end().is_some_and(|end| end.get() == run.start)
        });
        match (before, after) {
            (Some(before), true) => {
                self.runs[before].last = self.runs[at].last;
                self.runs.remove(at);
            }
            (Some(before), false) => self.runs[before].last = iova.last().get(),
            (None, true) => self.runs[at].start = iova.start().get(),
            (None, false) => self.runs.insert(
                at,
                Run {
                    start: iova.start().get(),
                    last: iova.last().get(),
                    granule,
                },
            ),
        }
    }

    /// Everything in `range`, which cuts no granule, has been unmapped.
    pub(crate) fn remove(&mut self, range: Range) {
        let runs = self.overlapping(range);
        for run in &self.runs[runs.clone()] {
            if let Some(part) = run.range().intersect(range) {
                let size = u128::from(run.granule) + 1;
                self.granules -= (part.len() / size) as u64;
            }
        }
        let Some(last) = runs.clone().next_back() else {
            return;
        };
        let left = self.runs[runs.start];
        let left = (left.start < range.start().get()).then(|| Run {
            last: range.start().get() - 1,
            ..left
        });
        let right = self.runs[last];
        let right = (right.last > range.last().get()).then(|| Run {
            start: range.last().get() + 1,
            ..right
        });
        // One run more at most, when one is cut in two; both halves hold a granule, so `most` bounds the runs too.
        self.runs.splice(runs, left.into_iter().chain(right));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn pages(first: u64, count: u64) -> Range {
        Range::new(first << 12, count << 12).unwrap()
    }

    #[test]
    fn granules_side_by_side_are_one_run() {
        let mut book = Book::new(64);
        for nth in [0, 1, 3, 2] {
            book.add(pages(nth, 1));
        }
        assert_eq!(book.runs.len(), 1);
        assert_eq!(book.granules(), 4);
        book.remove(pages(1, 1));
        assert_eq!(book.runs.len(), 2);
        assert_eq!(book.inside(pages(0, 8)), Inside::Bytes(3 << 12));
    }

    #[test]
    fn a_cut_names_the_granule() {
        let mut book = Book::new(64);
        book.add(pages(0, 4));
        book.add(pages(4, 4));
        assert_eq!(book.inside(pages(0, 6)), Inside::Cuts(pages(4, 4)));
        assert_eq!(book.inside(pages(2, 6)), Inside::Cuts(pages(0, 4)));
        assert_eq!(book.inside(pages(4, 4)), Inside::Bytes(4 << 12));
        assert_eq!(book.inside(pages(8, 4)), Inside::Nothing);
    }

    #[test]
    fn a_granule_may_end_at_two_to_the_64() {
        let mut book = Book::new(4);
        let top = Range::inclusive(u64::MAX - 0xfff, u64::MAX).unwrap();
        book.add(top);
        assert_eq!(book.inside(Range::ALL), Inside::Bytes(0x1000));
        book.remove(Range::ALL);
        assert_eq!(book.granules(), 0);
    }

    /// The same with one entry a granule.
    #[derive(Default)]
    struct Naive(BTreeMap<u64, u64>);

    impl Naive {
        fn inside(&self, range: Range) -> Inside {
            let mut bytes = 0;
            for (start, len) in &self.0 {
                let granule = Range::new(*start, *len).unwrap();
                if range.contains(granule) {
                    bytes += len;
                } else if range.overlaps(granule) {
                    return Inside::Cuts(granule);
                }
            }
            if bytes == 0 {
                Inside::Nothing
            } else {
                Inside::Bytes(bytes)
            }
        }
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_list_of_granules(
            steps in proptest::collection::vec((any::<bool>(), 0_u64..40, 0_u32..3, 1_u64..20), 1..80)
        ) {
            let (mut book, mut naive) = (Book::new(64), Naive::default());
            let capacity = book.runs.capacity();
            for (map, first, shift, count) in steps {
                if map {
                    let granule = pages(first, 1 << shift);
                    if naive.0.iter().all(|(start, len)| !Range::new(*start, *len).unwrap().overlaps(granule)) {
                        prop_assert_eq!(book.inside(granule), Inside::Nothing);
                        book.add(granule);
                        naive.0.insert(granule.start().get(), granule.len() as u64);
                    }
                } else {
                    let range = pages(first, count);
                    let inside = naive.inside(range);
                    match (book.inside(range), inside) {
                        (Inside::Cuts(cut), Inside::Cuts(_)) => {
                            prop_assert!(naive.0.contains_key(&cut.start().get()));
                            prop_assert!(cut.overlaps(range) && !range.contains(cut));
                        }
                        (mine, theirs) => {
                            prop_assert_eq!(mine, theirs);
                            book.remove(range);
                            naive.0.retain(|start, _| !range.holds((*start).into()));
                        }
                    }
                }
                prop_assert_eq!(book.granules(), naive.0.len() as u64);
                prop_assert!(book.runs.len() as u64 <= book.granules());
                prop_assert_eq!(book.runs.capacity(), capacity, "nothing is allocated");
            }
        }
    }
}
