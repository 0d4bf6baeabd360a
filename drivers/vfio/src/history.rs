//! What happened to which IOVAs, so that an IOMMU fault has a name.

use std::fmt;
use std::time::{Duration, Instant};

use shootdown::{Addr, Cause, Range};

/// What was done last to a part of a window.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Operation {
    /// It was mapped.
    Mapped,
    /// It was taken away before its pages changed.
    CutOff(Cause),
    /// It was to be taken away, and may still be mapped: the pages are in quarantine.
    CutOffFailed(Cause),
    /// The change for which it was taken away did not happen; it stays away until it is touched.
    Unchanged(Cause),
    /// The window was closed.
    Closed,
    /// The window was closed, and may still be mapped.
    CloseFailed,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mapped => f.write_str("mapped"),
            Self::CutOff(cause) => write!(f, "cut off for {cause}"),
            Self::CutOffFailed(cause) => write!(f, "not cut off for {cause}: the IOMMU refused"),
            Self::Unchanged(cause) => write!(f, "cut off for {cause}, which then failed"),
            Self::Closed => f.write_str("closed"),
            Self::CloseFailed => f.write_str("not closed: the IOMMU refused"),
        }
    }
}

/// Which window an IOVA belongs, or belonged, to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Attribution {
    /// The number of the window.
    pub window: u64,
    /// Its IOVAs.
    pub iova: Range,
    /// Its memory.
    pub memory: Range,
    /// The part that the last operation was on.
    pub part: Range,
    /// The last operation.
    pub operation: Operation,
    /// How long ago that was.
    pub ago: Duration,
}

impl fmt::Display for Attribution {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "window {} (IOVA {} of memory {}): {} was {} {:.1} ms ago",
            self.window,
            self.iova,
            self.memory,
            self.part,
            self.operation,
            self.ago.as_secs_f64() * 1000.0
        )
    }
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    pub(crate) window: u64,
    pub(crate) iova: Range,
    pub(crate) memory: Range,
    pub(crate) part: Range,
    pub(crate) operation: Operation,
    pub(crate) at: Instant,
}

/// A ring of the last operations. It allocates when it is made, and never again.
#[derive(Debug)]
pub(crate) struct History {
    entries: Vec<Entry>,
    next: usize,
}

/// Operations that are remembered.
const ENTRIES: usize = 1024;

impl History {
    pub(crate) fn new() -> Self {
        Self {
            entries: Vec::with_capacity(ENTRIES),
            next: 0,
        }
    }

    pub(crate) fn record(&mut self, entry: Entry) {
        if self.entries.len() < ENTRIES {
            self.entries.push(entry);
        } else {
            self.entries[self.next] = entry;
        }
        self.next = (self.next + 1) % ENTRIES;
    }

    /// The last operation on `iova`.
    pub(crate) fn last(&self, iova: Addr) -> Option<Attribution> {
        let (newer, older) = self.entries.split_at(self.next.min(self.entries.len()));
        let mut newest_first = newer.iter().rev().chain(older.iter().rev());
        let entry = newest_first.find(|entry| entry.part.holds(iova))?;
        Some(Attribution {
            window: entry.window,
            iova: entry.iova,
            memory: entry.memory,
            part: entry.part,
            operation: entry.operation,
            ago: entry.at.elapsed(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_of_more_operations_than_it_holds_is_found() {
        let mut history = History::new();
        let range = |nth: u64| Range::new((nth % 7 + 1) << 12, 0x1000).unwrap();
        for nth in 0..3000 {
            history.record(Entry {
                window: nth,
                iova: range(nth),
                memory: range(nth),
                part: range(nth),
                operation: Operation::Mapped,
                at: Instant::now(),
            });
            let found = history.last(range(nth).start()).unwrap();
            assert_eq!(found.window, nth);
            if nth > 7 {
                assert_eq!(history.last(range(nth - 3).last()).unwrap().window, nth - 3);
            }
        }
        assert_eq!(history.last(Addr::new(0)), None);
    }
}
