//! The flight recorder: what happened last, for the author whose device has eaten a page.
//!
//! A ring of fixed-size records in memory set aside beforehand, one ring for each thread that has a home of its own, and a few for the
//! others, so that threads do not share a counter. Writing one takes no lock and allocates nothing. A reader may meet a record that is being
//! overwritten; it sees that by the record's number and leaves it out. Records carry the processor's own counter, which costs
//! half a clock, and become times when they are read. An invalidation that reaches no device is over in less time than reading the
//! counter takes, and so is a phase that awaits nothing: of such records only every eighth does, and the others take over the time of
//! the one before. The record of the start of one that reaches no device becomes that of its end, if nothing was recorded between
//! the two. `tracing` is fed from the ring, outside the shootdown path: all of it by
//! [`AddressSpace::drain`](crate::AddressSpace::drain), the newest part by itself after something went wrong. Invalidations that
//! hit nothing are not recorded.

use std::alloc::{Layout, handle_alloc_error};
use std::fmt;
use std::mem::ManuallyDrop;
use std::time::Duration;

use memmap2::MmapMut;

use crate::home::{HOMES, home};
use crate::primitive::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use crate::primitive::{Instant, now, ticks};
use crate::source::own_call;

/// Shards of threads without a home of their own.
const SHARED: usize = 4;
/// Models have none: they would only add states.
const SHARDS: usize = if cfg!(loom) { 0 } else { HOMES + SHARED };
/// How many records without a time of their own there are at most between two that have one.
const TIMED: u64 = 8;
/// Records that a dump shows.
const DUMPED: usize = 64;
#[cfg(not(loom))]
const RECORDS: usize = 512; // All of a shard stays in the first cache, with room for others.
#[cfg(loom)]
const RECORDS: usize = 1;

/// What happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[non_exhaustive]
#[repr(u8)]
pub enum Kind {
    /// An invalidation started: operation, first address, last address.
    Start,
    /// All handlers have quiesced: operation.
    Quiesced,
    /// All devices have been dispatched to: operation.
    Dispatched,
    /// All devices have acknowledged: operation.
    Flushed,
    /// It is over: operation, 0 changed, 1 unchanged, 2 quarantined.
    End,
    /// A non-blocking one was refused by a handler: operation, registration.
    Refused,
    /// A deadline was missed: operation, 0 drain, 1 flush, 2 full flush, 3 reset, 4 unload of a context.
    Deadline,
    /// A device was put into quarantine: operation.
    Quarantine,
    /// A handler panicked: operation, registration.
    Panicked,
    /// A registration was inserted: registration, first address, last address.
    Insert,
    /// One was given up: registration, place.
    Unregister,
    /// `release` was run: registration.
    Release,
    /// The context of a segment was unloaded: operation, first address of the segment.
    Unload,
    /// An invalidation that reached no device has come and gone, and the pages have changed: operation, first address, last address.
    /// It is what has become of its [`Kind::Start`], where nothing was recorded on its shard meanwhile.
    Passed,
}

impl Kind {
    const ALL: [Kind; 14] = [
        Self::Start,
        Self::Quiesced,
        Self::Dispatched,
        Self::Flushed,
        Self::End,
        Self::Refused,
        Self::Deadline,
        Self::Quarantine,
        Self::Panicked,
        Self::Insert,
        Self::Unregister,
        Self::Release,
        Self::Unload,
        Self::Passed,
    ];
}

/// One record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Record {
    /// Since the address space was made. Of an invalidation that reached no device, and of a phase that had nothing to wait for, it is when
    /// something happened on its shard shortly before, as reading a clock would cost more than all the rest.
    pub at: Duration,
    /// The shard: threads differ, mostly.
    pub shard: usize,
    /// What happened.
    pub kind: Kind,
    /// The operation, or the registration.
    pub subject: u64,
    /// As the kind says.
    pub a: u64,
    /// As the kind says.
    pub b: u64,
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:>12.3} us  shard {}  {:<10} {:#x}  {:#x} {:#x}",
            self.at.as_secs_f64() * 1e6,
            self.shard,
            format!("{:?}", self.kind),
            self.subject,
            self.a,
            self.b,
        )
    }
}

/// A record's words: number, ticks or 0, kind and subject, a, b.
type Words = [AtomicU64; 5];

/// A shard's.
type Ring = [Words; RECORDS];

/// A kind is above its subject: neither operations nor registrations have more than 56 bits.
const KIND_SHIFT: u32 = 56;
const SUBJECT: u64 = (1 << KIND_SHIFT) - 1;

/// The record of a start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Started(u64);

impl Started {
    /// Of none.
    pub(crate) const NOTHING: Self = Self(u64::MAX);
}

#[repr(align(128))]
struct Shard {
    next: AtomicU64,
    /// The first number that `publish` has not had.
    published: AtomicU64,
}

/// The rings of all shards, in pages of their own, which come when they are first written to: most shards are never used.
struct Rings(ManuallyDrop<MmapMut>);

impl Rings {
    fn new() -> Self {
        let layout = Layout::new::<[Ring; SHARDS]>();
        // Models have no shards, and pages are of some length.
        let pages = MmapMut::map_anon(layout.size().max(1));
        Self(ManuallyDrop::new(
            pages.unwrap_or_else(|_| handle_alloc_error(layout)),
        ))
    }

    #[inline]
    fn of(&self, shard: usize) -> &Ring {
        assert!(shard < SHARDS);
        // SAFETY: inside of the pages, as aligned as its words, as those begin at a page; they live as long as this does and are written to
        // by nothing else; atomics, for which the 0 that they begin with is a value like any other.
        unsafe { &*self.0.as_ptr().cast::<Ring>().add(shard) }
    }
}

impl Drop for Rings {
    fn drop(&mut self) {
        let args = [self.0.as_ptr().addr(), self.0.len(), 0, 0, 0, 0];
        // By the gate: no source is to stop this, and a supervisor may be who drops the space.
        // SAFETY: mapped by `new`, and not used any more. There is nothing that could be done about an error.
        let _ = unsafe { own_call(libc::SYS_munmap, args) };
    }
}

pub(crate) struct Recorder {
    epoch: Instant,
    /// The processor's counter at that time.
    epoch_ticks: u64,
    shards: [Shard; SHARDS],
    rings: Rings,
    /// Something went wrong since the last dump.
    dump_wanted: AtomicBool,
}

impl Recorder {
    pub(crate) fn new() -> Self {
        let shard = |_| Shard {
            next: AtomicU64::new(0),
            published: AtomicU64::new(0),
        };
        Self {
            epoch: now(),
            epoch_ticks: ticks(),
            shards: std::array::from_fn(shard),
            rings: Rings::new(),
            dump_wanted: AtomicBool::new(false),
        }
    }

    /// Writes a record.
    pub(crate) fn record(&self, kind: Kind, subject: u64, a: u64, b: u64) {
        self.write(true, kind, [subject, a, b]);
    }

    /// Writes a record of what is quicker than a look at the time, if it `is_quick`.
    #[inline]
    pub(crate) fn record_quick(
        &self,
        is_quick: bool,
        kind: Kind,
        subject: u64,
        a: u64,
        b: u64,
    ) -> Started {
        self.write(!is_quick, kind, [subject, a, b])
    }

    /// Makes the record of a start that of the whole; false where it has to stay: if something was recorded since, which lies between the
    /// two, if `publish` has had it, or if other threads write to its shard.
    #[inline]
    pub(crate) fn passed(&self, started: Started) -> bool {
        let home = home();
        let Some(shard) = self.shards.get(home).filter(|_| home < HOMES) else {
            return false;
        };
        // Relaxed: `next` is this thread's own, and who publishes just now may have met the start.
        let is_last = started.0.checked_add(1) == Some(shard.next.load(Ordering::Relaxed));
        if !is_last || shard.published.load(Ordering::Relaxed) > started.0 {
            return false;
        }
        let [_, _, word, ..] = &self.rings.of(home)[started.0 as usize % RECORDS];
        // Relaxed: written by this thread alone, and whoever reads it finds the one or the other.
        let subject = word.load(Ordering::Relaxed) & SUBJECT;
        let passed = (Kind::Passed as u64) << KIND_SHIFT;
        word.store(passed | subject, Ordering::Relaxed);
        true
    }

    #[inline]
    fn write(&self, timed: bool, kind: Kind, [subject, a, b]: [u64; 3]) -> Started {
        let home = home();
        let own = home < HOMES;
        let nth = if own { home } else { HOMES + home % SHARED };
        let Some(shard) = self.shards.get(nth) else {
            return Started::NOTHING;
        };
        // Relaxed: only makes the place unique.
        let number = if own {
            let number = shard.next.load(Ordering::Relaxed);
            shard.next.store(number + 1, Ordering::Relaxed);
            number
        } else {
            shard.next.fetch_add(1, Ordering::Relaxed)
        };
        let timed = timed || number.is_multiple_of(TIMED);
        let at = if timed { ticks() } else { 0 };
        let words = &self.rings.of(nth)[number as usize % RECORDS];
        let what = (kind as u64) << KIND_SHIFT | subject & SUBJECT;
        // As a sequence lock: the number is taken away, the words written, the number set. The fence, with the one in
        // `records`, keeps the words behind the first store; Release keeps them before the last.
        words[0].store(0, Ordering::Relaxed);
        fence(Ordering::Release);
        for (word, value) in words[1..].iter().zip([at, what, a, b]) {
            word.store(value, Ordering::Relaxed);
        }
        words[0].store(number + 1, Ordering::Release);
        Started(number)
    }

    /// Asks for a dump, by the first thread that is outermost: in the shootdown path nothing may be written.
    pub(crate) fn want_dump(&self) {
        // Relaxed: a flag that carries nothing else; the records have their own order.
        self.dump_wanted.store(true, Ordering::Relaxed);
    }

    /// Writes the newest records as one `tracing` warning, if something went wrong.
    pub(crate) fn dump_if_wanted(&self, space: u64) {
        if !self.dump_wanted.swap(false, Ordering::Relaxed) {
            return;
        }
        let records = self.records();
        let newest = &records[records.len().saturating_sub(DUMPED)..];
        let lines: String = newest.iter().map(|record| format!("\n{record}")).collect();
        tracing::warn!(
            space,
            "a deadline was missed or a handler panicked; the flight recorder's newest records:{lines}"
        );
    }

    /// Gives `tracing` the records that it has not had. Allocates; never in the shootdown path.
    pub(crate) fn publish(&self, space: u64) {
        for record in self.unpublished() {
            let Record {
                at,
                kind,
                subject,
                a,
                b,
                ..
            } = record;
            tracing::debug!(space, ?at, ?kind, subject, a, b);
        }
    }

    /// What `publish` has not had, the oldest first. Two at once may both get a record.
    fn unpublished(&self) -> Vec<Record> {
        let published = |shard: &Shard| shard.published.load(Ordering::Relaxed);
        let had: Vec<_> = self.shards.iter().map(published).collect();
        let fresh = |(number, record): (u64, Record)| {
            let published = &self.shards[record.shard].published;
            // Where threads share a shard numbers and times may differ in their order.
            published.fetch_max(number + 1, Ordering::Relaxed);
            (number >= had[record.shard]).then_some(record)
        };
        self.read().into_iter().filter_map(fresh).collect()
    }

    /// All records that are whole, the oldest first.
    pub(crate) fn records(&self) -> Vec<Record> {
        self.read().into_iter().map(|(_, record)| record).collect()
    }

    /// With their numbers in their shards.
    fn read(&self) -> Vec<(u64, Record)> {
        // What a tick is, by all that have passed.
        let (time, passed) = (
            self.epoch.elapsed(),
            ticks().saturating_sub(self.epoch_ticks),
        );
        let tick = time.as_secs_f64() / passed.max(1) as f64;
        let mut records = Vec::new();
        for (nth, shard) in self.shards.iter().enumerate() {
            // Relaxed: what is written meanwhile may be left out. Pages that were never written to are not looked at.
            let used = RECORDS.min(shard.next.load(Ordering::Relaxed) as usize);
            let ring = &self.rings.of(nth)[..used];
            let mut own: Vec<_> = ring.iter().filter_map(whole).collect();
            own.sort_unstable_by_key(|(number, _)| *number);
            let time = |(_, words): &(u64, [u64; 4])| Some(words[0]).filter(|at| *at > 0);
            let mut last = own.iter().find_map(time).unwrap_or(self.epoch_ticks);
            for one in own {
                last = time(&one).unwrap_or(last);
                let (number, [_, what, a, b]) = one;
                let (kind, subject) = ((what >> KIND_SHIFT) as usize, what & SUBJECT);
                let since = last.saturating_sub(self.epoch_ticks) as f64;
                records.extend(Kind::ALL.get(kind).map(|kind| {
                    let record = Record {
                        at: Duration::from_secs_f64(since * tick),
                        shard: nth,
                        kind: *kind,
                        subject,
                        a,
                        b,
                    };
                    (number, record)
                }));
            }
        }
        // Stable: those of a shard stay in their order.
        records.sort_by_key(|(_, record)| record.at);
        records
    }
}

/// The number and the other words of a record that is nobody's who writes just now.
fn whole(words: &Words) -> Option<(u64, [u64; 4])> {
    let number = words[0].load(Ordering::Acquire);
    let rest = std::array::from_fn(|word| words[word + 1].load(Ordering::Relaxed));
    fence(Ordering::Acquire);
    let is_whole = number != 0 && words[0].load(Ordering::Relaxed) == number;
    is_whole.then(|| (number - 1, rest))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_full_ring_keeps_the_newest_records() {
        let recorder = Recorder::new();
        let last = RECORDS as u64 * 2;
        (0..=last).for_each(|n| recorder.record(Kind::Start, n, 0, 0));
        let records = recorder.records();
        assert_eq!(records.len(), RECORDS);
        assert_eq!(records.last().map(|record| record.subject), Some(last));
    }

    #[test]
    fn every_kind_is_read_back_as_it_was_written() {
        let recorder = Recorder::new();
        Kind::ALL
            .iter()
            .for_each(|kind| recorder.record(*kind, 1, 2, 3));
        let kinds: Vec<_> = recorder
            .records()
            .iter()
            .map(|record| record.kind)
            .collect();
        assert_eq!(kinds, Kind::ALL);
    }

    #[test]
    fn what_has_no_time_of_its_own_stays_in_its_order_and_each_is_published_once() {
        let recorder = Recorder::new();
        for n in 0..100 {
            recorder.record_quick(n % 10 != 3, Kind::Start, n, 0, 0);
        }
        let subjects =
            |records: &[Record]| records.iter().map(|one| one.subject).collect::<Vec<_>>();
        let records = recorder.records();
        assert_eq!(subjects(&records), (0..100).collect::<Vec<_>>());
        assert!(records.is_sorted_by_key(|one| one.at));
        let times: std::collections::HashSet<_> = records.iter().map(|one| one.at).collect();
        assert!(
            (20..30).contains(&times.len()),
            "every eighth, and one in ten: {}",
            times.len()
        );
        assert_eq!(subjects(&recorder.unpublished()), subjects(&records));
        recorder.record(Kind::End, 100, 0, 0);
        assert_eq!(subjects(&recorder.unpublished()), [100]);
    }

    #[test]
    fn a_start_becomes_what_has_passed_unless_something_lies_between() {
        let recorder = Recorder::new();
        let own = home() < HOMES;
        let kinds = || -> Vec<_> {
            let whole = |one: &Record| (one.kind, one.subject, one.a, one.b);
            recorder.records().iter().map(whole).collect()
        };
        let start = |subject| recorder.record_quick(true, Kind::Start, subject, 1, 2);
        assert!(!recorder.passed(Started::NOTHING), "nothing has started");
        let first = start(7);
        assert_eq!(recorder.passed(first), own);
        let kind = if own { Kind::Passed } else { Kind::Start };
        let mut all = vec![(kind, 7, 1, 2)];
        assert_eq!(kinds(), all);
        // Its phases would follow what says that it is over.
        let second = start(8);
        recorder.record(Kind::Quiesced, 8, 0, 0);
        assert!(!recorder.passed(second) && !recorder.passed(first));
        all.extend([(Kind::Start, 8, 1, 2), (Kind::Quiesced, 8, 0, 0)]);
        assert_eq!(kinds(), all);
        (0..RECORDS as u64).for_each(|nth| recorder.record(Kind::Insert, nth, 0, 0));
        assert!(!recorder.passed(second), "it was overwritten");
        let is_insert = |one: &Record| one.kind == Kind::Insert;
        assert!(recorder.records().iter().all(is_insert));
    }

    #[test]
    fn only_who_has_a_shard_of_its_own_changes_a_record() {
        let recorder = Recorder::new();
        let all = std::sync::Barrier::new(2 * SHARDS);
        let turn = std::sync::Mutex::new(());
        let begin_and_pass = || {
            // One after the other: each one's record is the last of its shard.
            let passed = {
                let _turn = turn.lock().unwrap();
                recorder.passed(recorder.record_quick(true, Kind::Start, 7, 1, 2))
            };
            // All of them live until now. Whoever failed before would keep the others waiting.
            all.wait();
            assert_eq!(passed, home() < HOMES);
        };
        std::thread::scope(|scope| {
            (0..2 * SHARDS).for_each(|_| {
                scope.spawn(begin_and_pass);
            });
        });
    }

    #[test]
    fn no_number_is_given_twice_where_threads_share() {
        // For longer than a thread is left to run.
        const TIMES: u64 = 100_000;
        let recorder = Recorder::new();
        let all = std::sync::Barrier::new(HOMES + 4 * SHARED);
        let record = || {
            let times = if home() < HOMES { 1 } else { TIMES };
            all.wait();
            (0..times).for_each(|nth| recorder.record(Kind::Insert, nth, 0, 0));
            all.wait();
            times
        };
        let given: u64 = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..HOMES + 4 * SHARED)
                .map(|_| scope.spawn(record))
                .collect();
            let joined = threads.into_iter().map(|thread| thread.join().unwrap());
            joined.sum()
        });
        let next = |shard: &Shard| shard.next.load(Ordering::Relaxed);
        assert_eq!(recorder.shards.iter().map(next).sum::<u64>(), given);
    }

    #[test]
    fn a_start_that_was_published_is_followed_by_its_end() {
        let recorder = Recorder::new();
        let started = recorder.record_quick(true, Kind::Start, 7, 1, 2);
        assert_eq!(recorder.unpublished().len(), 1);
        assert!(
            !recorder.passed(started),
            "whoever has had the start waits for an end"
        );
        assert_eq!(recorder.records()[0].kind, Kind::Start);
    }

    #[test]
    fn of_threads_that_share_a_shard_the_later_number_may_be_the_earlier_record() {
        let recorder = Recorder::new();
        recorder.shards[HOMES].next.store(2, Ordering::Relaxed);
        for (nth, after) in [(0, 2000), (1, 1000)] {
            let at = recorder.epoch_ticks + after;
            let words = [nth + 1, at, (Kind::Start as u64) << KIND_SHIFT | nth, 0, 0];
            for (word, value) in recorder.rings.of(HOMES)[nth as usize].iter().zip(words) {
                word.store(value, Ordering::Relaxed);
            }
        }
        let subjects = |records: Vec<Record>| -> Vec<_> {
            records.into_iter().map(|one| one.subject).collect()
        };
        assert_eq!(subjects(recorder.unpublished()), [1, 0]);
        assert_eq!(subjects(recorder.unpublished()), []);
    }
}
