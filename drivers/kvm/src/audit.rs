//! The auditor: what the kernel has invalidated, and nobody had told the space.
//!
//! It has two books. One is the kernel's: the [stream](crate::Stream) of what really happened to the address space of this process. The other
//! is the framework's: as an [`Observer`] it notes when pages *may* change, from when every device has acknowledged until the
//! change is over. An invalidation of the kernel that lies in no such time, or only in part, has been missed: a device could go on
//! through what it had cached. A source that is told late has missed it too.
//!
//! Where a mapping is cut inside of 2 MiB the kernel splits the huge page that could be there, and first invalidates all of it, whether it is
//! there or not: the pages stay where they are. So an invalidation of one such piece is covered by a change that cuts it.
//!
//! Both books have a fixed size. Where one overflows the audit is *incomplete*, and says so.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use shootdown::{AddressSpace, Observed, Observer, PageSize, Range};
use thiserror::Error;

use crate::clock;
use crate::error::KvmError;
use crate::stream::{News, Stream, Unmapped};

/// Changes that the framework's book holds at most.
const CHANGES: usize = 1 << 14;
/// Misses that are kept in full.
const KEPT: usize = 64;
/// How long a change stays in the book once it is over: an invalidation from before then has been read.
const STAYS: u64 = 50_000_000;
/// How long the auditor sleeps at most.
const NAP: Duration = Duration::from_millis(5);
/// By so much the clock of the kernel's records may differ, in nanoseconds.
const SLACK: u64 = 1000;

/// Why there is no audit.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AuditError {
    /// The kernel does not tell.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The space has another observer.
    #[error(transparent)]
    Observed(#[from] Observed),
    /// No thread could be started.
    #[error("the auditor's thread could not be started: {0}")]
    Thread(std::io::Error),
}

/// An invalidation that nothing had covered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Missed {
    /// What of it was watched and not covered.
    pub range: Range,
    /// When, from the start of the audit.
    pub at: Duration,
    /// Whose thread made it; 0 for the kernel's own.
    pub process: u32,
    /// Which thread.
    pub thread: u32,
    /// What that thread is called, if it was still there.
    pub name: Option<String>,
}

impl std::fmt::Display for Missed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            range,
            at,
            process,
            thread,
            name,
        } = self;
        let seconds = at.as_secs_f64();
        write!(f, "{range} was invalidated at {seconds:.6} s by ")?;
        match process {
            0 => write!(f, "the kernel")?,
            own if *own == std::process::id() => write!(f, "thread {thread}")?,
            process => write!(f, "process {process}")?,
        }
        if let Some(name) = name {
            write!(f, " ({name})")?;
        }
        f.write_str(", and nobody had told the space")
    }
}

/// What an audit came to.
#[derive(Clone, Default, PartialEq, Eq, Debug)]
pub struct Audit {
    /// Invalidations of what was watched that the kernel has made.
    pub seen: u64,
    /// Those by threads of this process that nothing had covered.
    pub missed: u64,
    /// Those by others: another process, or the kernel for reasons of its own. They share the memory, or use the same addresses.
    pub missed_of_others: u64,
    /// The first of both.
    pub first: Vec<Missed>,
    /// Invalidations, and changes of the framework, that did not fit the books: with any the audit is incomplete.
    pub lost: u64,
}

/// A time in which pages of a range may change.
#[derive(Clone, Copy)]
struct Change {
    range: Range,
    begun: u64,
    /// `u64::MAX` until it is over.
    ended: u64,
}

/// The framework's book.
struct Book {
    changes: Mutex<Vec<Change>>,
    lost: AtomicU64,
}

impl Book {
    fn new() -> Self {
        Self {
            changes: Mutex::new(Vec::with_capacity(CHANGES)),
            lost: AtomicU64::new(0),
        }
    }

    fn changes(&self) -> MutexGuard<'_, Vec<Change>> {
        // Changed by single pushes and stores.
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What of `part` was not covered when `range` was invalidated, from its first such address on.
    fn uncovered(&self, range: Range, part: Range, at: u64) -> Option<Range> {
        let changes = self.changes();
        let then = changes
            .iter()
            .filter(|one| one.begun <= at + SLACK && at <= one.ended.saturating_add(SLACK));
        let split = range == Range::page(range.start(), PageSize::TwoMiB);
        if split && then.clone().any(|one| one.range.overlaps(range)) {
            return None;
        }
        let mut rest = part;
        loop {
            let covers = then.clone().find(|one| one.range.holds(rest.start()));
            let Some(covers) = covers else {
                return Some(rest);
            };
            let last = covers.range.last();
            if last >= rest.last() {
                return None;
            }
            rest = Range::inclusive(last.get() + 1, rest.last()).ok()?;
        }
    }

    fn forget(&self, before: u64) {
        self.changes().retain(|one| one.ended >= before);
    }
}

impl Observer for Book {
    fn may_change(&self, range: Range) {
        let mut changes = self.changes();
        if changes.len() == changes.capacity() {
            // Relaxed: a count, read when all is over.
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let (begun, ended) = (clock::now(), u64::MAX);
        changes.push(Change {
            range,
            begun,
            ended,
        });
    }

    fn changed(&self, range: Range) {
        let mut changes = self.changes();
        let open = |one: &&mut Change| one.range == range && one.ended == u64::MAX;
        if let Some(change) = changes.iter_mut().find(open) {
            change.ended = clock::now();
        }
    }
}

/// Audits one space, until it is [finished](Auditor::finish).
pub struct Auditor {
    book: Arc<Book>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Audit>,
}

impl std::fmt::Debug for Auditor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auditor").finish_non_exhaustive()
    }
}

impl Auditor {
    /// Audits what happens to `range`, which is usually the arena of the space's memory. A space is audited once.
    ///
    /// # Errors
    /// [`AuditError`].
    pub fn start(space: &AddressSpace, range: Range) -> Result<Self, AuditError> {
        let stream = Stream::open(&[range])?;
        let book = Arc::new(Book::new());
        space.observe(book.clone())?;
        let stop = Arc::new(AtomicBool::new(false));
        let clerk = Clerk::new(stream, book.clone(), range);
        let ended = stop.clone();
        let thread = std::thread::Builder::new().name("shootdown-audit".to_owned());
        let thread = thread.spawn(move || clerk.run(&ended));
        Ok(Self {
            book,
            stop,
            thread: thread.map_err(AuditError::Thread)?,
        })
    }

    /// For whoever changes pages of the space by other means, and has told everybody else.
    pub fn observer(&self) -> Arc<dyn Observer> {
        self.book.clone()
    }

    /// What it has found. What happens afterwards is not looked at.
    pub fn finish(self) -> Audit {
        // Release, with the clerk's Acquire: what has happened so far is read.
        self.stop.store(true, Ordering::Release);
        match self.thread.join() {
            Ok(audit) => audit,
            // It was printed; nothing that it had read is known.
            Err(_) => Audit {
                lost: 1,
                ..Audit::default()
            },
        }
    }
}

/// Compares the books.
struct Clerk {
    stream: Stream,
    book: Arc<Book>,
    range: Range,
    begun: u64,
    audit: Audit,
}

impl Clerk {
    fn new(stream: Stream, book: Arc<Book>, range: Range) -> Self {
        Self {
            stream,
            book,
            range,
            begun: clock::now(),
            audit: Audit {
                first: Vec::with_capacity(KEPT),
                ..Audit::default()
            },
        }
    }

    fn run(mut self, stop: &AtomicBool) -> Audit {
        loop {
            let last = stop.load(Ordering::Acquire);
            let now = clock::now();
            self.look();
            self.book.forget(now.saturating_sub(STAYS));
            if last {
                self.audit.lost += self.book.lost.load(Ordering::Relaxed);
                return self.audit;
            }
            // Not at each record: whoever makes one would wake this thread.
            std::thread::sleep(NAP);
        }
    }

    fn look(&mut self) {
        let Self {
            stream,
            book,
            range,
            begun,
            audit,
        } = self;
        stream.drain(|news| match news {
            News::Lost(count) => audit.lost += count,
            News::Unmapped(one) => {
                let Some(part) = one.range.intersect(*range) else {
                    return;
                };
                audit.seen += 1;
                if let Some(missed) = book.uncovered(one.range, part, one.at) {
                    audit.miss(missed, &one, *begun);
                }
            }
        });
    }
}

impl Audit {
    fn miss(&mut self, range: Range, one: &Unmapped, begun: u64) {
        let Unmapped {
            process, thread, ..
        } = *one;
        if process == std::process::id() {
            self.missed += 1;
        } else {
            self.missed_of_others += 1;
        }
        if self.first.len() < KEPT {
            let name = std::fs::read_to_string(format!("/proc/{process}/task/{thread}/comm"));
            self.first.push(Missed {
                range,
                at: Duration::from_nanos(one.at.saturating_sub(begun)),
                process,
                thread,
                name: name.ok().map(|name| name.trim().to_owned()),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(page: u64, pages: u64) -> Range {
        Range::new(page << 12, pages << 12).unwrap()
    }

    fn uncovered(book: &Book, range: Range, at: u64) -> Option<Range> {
        book.uncovered(range, range, at)
    }

    #[test]
    fn what_is_covered_by_several_changes_together_is_covered() {
        let book = Book::new();
        book.may_change(range(10, 2));
        book.may_change(range(12, 4));
        let at = clock::now() + SLACK;
        assert_eq!(uncovered(&book, range(10, 6), at), None);
        assert_eq!(uncovered(&book, range(11, 6), at), Some(range(16, 1)));
        assert_eq!(uncovered(&book, range(9, 2), at), Some(range(9, 2)));
    }

    #[test]
    fn a_huge_page_that_a_change_cuts_is_covered() {
        let book = Book::new();
        book.may_change(range(513, 2));
        let at = clock::now() + SLACK;
        assert_eq!(uncovered(&book, range(512, 512), at), None);
        assert_eq!(
            uncovered(&book, range(1024, 512), at),
            Some(range(1024, 512))
        );
        assert_eq!(uncovered(&book, range(512, 511), at), Some(range(512, 511)));
    }

    #[test]
    fn only_the_time_of_a_change_is_covered() {
        let book = Book::new();
        let before = clock::now() - 2 * SLACK;
        book.may_change(range(1, 1));
        book.changed(range(1, 1));
        let after = clock::now() + 2 * SLACK;
        assert_eq!(uncovered(&book, range(1, 1), before), Some(range(1, 1)));
        assert_eq!(uncovered(&book, range(1, 1), after), Some(range(1, 1)));
        let ended = book.changes()[0].ended;
        assert_eq!(uncovered(&book, range(1, 1), ended), None);
        book.forget(after);
        assert!(book.changes().is_empty());
    }

    #[test]
    fn an_audit_that_has_lost_records_says_so() {
        let _alone = crate::alone();
        let (memory, range) = crate::stream::tests::page();
        let Some(stream) = crate::stream::tests::open(range, 1) else {
            return;
        };
        let clerk = Clerk::new(stream, Arc::new(Book::new()), range);
        (0..1000).for_each(|_| crate::stream::tests::discard(&memory, 1));
        let audit = clerk.run(&AtomicBool::new(true));
        assert!(audit.missed > 0 && audit.lost > 0, "{audit:?}");
        assert_eq!(audit.missed + audit.lost, 1000);
    }

    #[test]
    fn a_full_book_says_that_it_is() {
        let book = Book::new();
        (0..CHANGES as u64 + 3).for_each(|page| book.may_change(range(page + 1, 1)));
        assert_eq!(book.lost.load(Ordering::Relaxed), 3);
        assert_eq!(book.changes().len(), CHANGES);
    }
}
