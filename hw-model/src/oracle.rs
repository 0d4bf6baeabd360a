//! The oracle: sees every access of every device, and knows what is really mapped.
//!
//! It keeps a [shadow](crate::shadow) of each space's page table, changed by the memory itself when pages really change,
//! and compares each access with it, before and after the access is performed: the frame, the rights, and that the page
//! has not changed since the device installed its entry. A mismatch is a *stale access*. A device whose entries were
//! shot down in time has none, whatever happens to its memory; so there is nothing to tolerate and no false alarm.
//!
//! It shares no code and no data with the registry and the engine that it judges: addresses, ranges and rights are all that
//! it imports of the core.
//!
//! # What the check after the access proves
//! The memory withdraws a page from the shadow before its frame can be freed, and a fence stands on either side: between
//! access and second check here, after the withdrawal there. An access that passes the second check was therefore performed
//! before the frame had another owner. An access that began in time and ended too late is found as well
//! ([`FindingKind::StaleAfter`]): a purge was acknowledged while it was still in flight.
//!
//! # Cost and locks
//! A check is two loads of identifiers and one of the entry, twice, one fence, and one count on a cache line that few
//! threads share. It takes no lock and waits for nothing. Only what is wrong is recorded under a lock, in a list that
//! is allocated beforehand and does not grow; the count goes on when it is full.

use std::fmt;

use shootdown::{Addr, Frame, Range, Rights};
use shootdown_primitive::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
use shootdown_primitive::sync::{Mutex, MutexGuard, PoisonError};
use shootdown_primitive::thread;
use shootdown_primitive::time::{Duration, Instant};

use crate::error::ModelError;
pub use crate::shadow::Stamp;
use crate::shadow::{Behind, Shadow};

/// How many spaces can be watched at a time. Their number is the low part of a space's identifier.
const SPACES: usize = 1 << SPACE_BITS;
const SPACE_BITS: u32 = 12;

/// Serial numbers of spaces, in all oracles of the process; identifiers are never used twice. They begin far from those that
/// a memory without an oracle counts up from 1.
static SERIAL: AtomicU64 = AtomicU64::new(1 << 20);

/// How many findings are kept in full.
const KEPT: usize = 256;

/// Counters of accesses; threads are spread over them.
const SHARDS: usize = 16;

/// One access of a device to memory, within one 4 KiB page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Access {
    /// The device's number.
    pub device: u32,
    /// The number of the device's context that accesses.
    pub context: u32,
    /// The space, as [`shootdown::Memory::id`] names it.
    pub space: u64,
    /// The virtual address of the first byte.
    pub addr: Addr,
    /// Bytes; they do not pass the end of the 4 KiB page.
    pub len: u32,
    /// Whether memory is written.
    pub write: bool,
    /// The 4 KiB frame that holds `addr`, as the device's TLB entry has it.
    pub frame: Frame,
    /// When that entry was installed.
    pub stamp: Stamp,
}

/// What is wrong with an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[non_exhaustive]
pub enum FindingKind {
    /// The page was gone, or another, before the access began.
    StaleBefore,
    /// The page went, or became another, while the access was in flight.
    StaleAfter,
    /// The page is right, but does not allow this access, or not any more.
    Rights,
    /// There is no such frame. Nothing was accessed.
    NoFrame,
    /// Nobody has the frame that an unmapped access names. Nothing was accessed.
    FreeFrame,
}

/// A wrong access. Its `Display` is a sentence.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Finding {
    /// The access.
    pub access: Access,
    /// What is wrong with it.
    pub kind: FindingKind,
    /// What was mapped at the address when it was noticed: the frame and its rights; `None` for nothing.
    pub mapped: Option<(Frame, Rights)>,
    /// Whether the space still existed then.
    pub space_exists: bool,
    /// The name of the thread that performed the access, if it has one.
    pub thread: Option<String>,
    /// When it was noticed, counted from the making of the oracle.
    pub at: Duration,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Access {
            device,
            context,
            space,
            addr,
            len,
            frame,
            ..
        } = self.access;
        let verb = if self.access.write { "wrote" } else { "read" };
        write!(
            f,
            "device {device}, context {context} {verb} {len} bytes at {addr} of space {space:#x} in frame {:#x} ",
            frame.0
        )?;
        f.write_str(match self.kind {
            FindingKind::StaleBefore => "through a stale translation",
            FindingKind::StaleAfter => {
                "through a translation that became stale while the access was in flight"
            }
            FindingKind::Rights => "without the right to do so",
            FindingKind::NoFrame => "which does not exist",
            FindingKind::FreeFrame => "which is free",
        })?;
        match self.mapped {
            _ if !self.space_exists => f.write_str(": the space is gone")?,
            None => f.write_str(": nothing is mapped there")?,
            Some((now, rights)) if now == frame => match self.kind {
                FindingKind::Rights => write!(f, ": the page is mapped for {}", in_words(rights))?,
                _ => f.write_str(": the frame came there anew since the entry was installed")?,
            },
            Some((now, _)) => write!(f, ": frame {:#x} is mapped there", now.0)?,
        }
        write!(f, "; noticed at {:.6} s", self.at.as_secs_f64())?;
        if let Some(thread) = &self.thread {
            write!(f, " by thread {thread}")?;
        }
        Ok(())
    }
}

fn in_words(rights: Rights) -> &'static str {
    match (
        rights.contains(Rights::READ),
        rights.contains(Rights::WRITE),
    ) {
        (true, true) => "reading and writing",
        (true, false) => "reading only",
        (false, true) => "writing only",
        (false, false) => "no access",
    }
}

/// A counter that shares its cache line (two of them, as they are fetched in pairs) with nothing.
#[repr(align(128))]
struct Shard(AtomicU64);

/// Watches every access of the devices on one bus.
pub struct Oracle {
    shadows: Box<[Shadow]>,
    /// Held to add and to drop a space.
    membership: Mutex<()>,
    accesses: [Shard; SHARDS],
    stale: AtomicU64,
    /// The first [`KEPT`] findings. Leaf lock.
    findings: Mutex<Vec<Finding>>,
    start: Instant,
}

impl Oracle {
    /// An oracle that watches no space yet.
    pub(crate) fn new() -> Self {
        Self {
            shadows: (0..SPACES).map(|_| Shadow::new()).collect(),
            membership: Mutex::new(()),
            accesses: [const { Shard(AtomicU64::new(0)) }; SHARDS],
            stale: AtomicU64::new(0),
            findings: Mutex::new(Vec::with_capacity(KEPT)),
            start: Instant::now(),
        }
    }

    /// The stamp for a TLB entry that a device installs now, for a page of any size of `space` that holds `addr`. Call it
    /// when the entry is written, not when the miss was noticed. Neither locks nor waits.
    pub fn stamp(&self, space: u64, addr: Addr) -> Stamp {
        let shadow = self.shadow(space);
        match shadow.at(space, addr) {
            // A stamp that agrees with nothing: whatever the slot is used for later, `at` refuses this space.
            Behind::NoSpace => Stamp::default(),
            _ => shadow.stamp(),
        }
    }

    /// The first findings, the oldest first; [`Oracle::stale_accesses`] says how many there were. Allocates.
    pub fn findings(&self) -> Vec<Finding> {
        self.kept().clone()
    }

    /// How many accesses were wrong, in any way.
    pub fn stale_accesses(&self) -> u64 {
        // Relaxed: a statistic; exact once the devices are quiet.
        self.stale.load(Ordering::Relaxed)
    }

    /// How many accesses were checked.
    pub fn accesses(&self) -> u64 {
        // Relaxed: as above.
        self.accesses
            .iter()
            .map(|shard| shard.0.load(Ordering::Relaxed))
            .sum()
    }

    /// Begins to watch a space, nothing of which is mapped: its identifier. May wait (system call).
    pub(crate) fn add_space(&self, arena: Range) -> Result<u64, ModelError> {
        let _members = self.members();
        let pages = arena.pages(shootdown::PageSize::FourKiB);
        let slot = (self.shadows.iter())
            .position(|shadow| shadow.is_free_for(pages))
            .ok_or(ModelError::TooManySpaces { limit: SPACES })?;
        // Relaxed: only uniqueness counts.
        let id = SERIAL.fetch_add(1, Ordering::Relaxed) << SPACE_BITS | slot as u64;
        self.shadows[slot]
            .open(id, arena)
            .map_err(|error| ModelError::System {
                call: "mmap",
                bytes: pages * size_of::<u64>() as u64,
                errno: error.kind(),
            })?;
        Ok(id)
    }

    /// The space is going: from when this returns, every access to it is stale. Its frames are freed afterwards.
    pub(crate) fn drop_space(&self, space: u64) {
        let _members = self.members();
        self.shadow(space).close();
    }

    /// The slot in which `space` is, or was.
    pub(crate) fn shadow(&self, space: u64) -> &Shadow {
        &self.shadows[space as usize % SPACES]
    }

    /// Performs the access, which needs the rights `needed`, and checks it before and after.
    pub(crate) fn watch<R>(
        &self,
        access: &Access,
        needed: Rights,
        perform: impl FnOnce() -> R,
    ) -> R {
        self.count();
        let shadow = self.shadow(access.space);
        // The acquire load of the entry keeps the access after it.
        let before = shadow.at(access.space, access.addr);
        let wrong = judge(before, access, needed, FindingKind::StaleBefore);
        if let Some(kind) = wrong {
            self.record(access, kind, before);
            return perform();
        }
        let result = perform();
        // SeqCst: pairs with the fence in `Shadow::withdraw`; acquire alone would let a store of the access sink below
        // the check.
        fence(Ordering::SeqCst);
        let after = shadow.at(access.space, access.addr);
        if let Some(kind) = judge(after, access, needed, FindingKind::StaleAfter) {
            self.record(access, kind, after);
        }
        result
    }

    /// Records an access to a frame that does not exist.
    pub(crate) fn no_such_frame(&self, access: &Access) {
        self.count();
        let behind = self.shadow(access.space).at(access.space, access.addr);
        self.record(access, FindingKind::NoFrame, behind);
    }

    /// Counts an access through no translation, and records it if its frame is not `owned`, which it returns.
    pub(crate) fn watch_unmapped(&self, access: &Access, owned: bool) -> bool {
        self.count();
        if !owned {
            self.record(access, FindingKind::FreeFrame, Behind::NoSpace);
        }
        owned
    }

    fn count(&self) {
        thread_local! {
            static SHARD: usize = {
                static NEXT: AtomicUsize = AtomicUsize::new(0);
                // Relaxed: any spread will do.
                NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS
            };
        }
        // A thread that is ending has no number any more; it may use anybody's.
        let shard = SHARD.try_with(|shard| *shard).unwrap_or(0);
        // Relaxed: a statistic.
        self.accesses[shard].0.fetch_add(1, Ordering::Relaxed);
    }

    #[cold]
    fn record(&self, access: &Access, kind: FindingKind, behind: Behind) {
        // Relaxed: a statistic; whoever wants the finding itself takes the lock.
        self.stale.fetch_add(1, Ordering::Relaxed);
        let mut kept = self.kept();
        if kept.len() == KEPT {
            return;
        }
        kept.push(Finding {
            access: *access,
            kind,
            mapped: match behind {
                Behind::Frame { frame, rights, .. } => Some((frame, rights)),
                Behind::Nothing | Behind::NoSpace => None,
            },
            space_exists: behind != Behind::NoSpace,
            thread: thread::current().name().map(str::to_owned),
            at: self.start.elapsed(),
        });
    }

    fn kept(&self) -> MutexGuard<'_, Vec<Finding>> {
        // The list is whole at any time.
        self.findings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn members(&self) -> MutexGuard<'_, ()> {
        // It guards slots, each of which is changed by one store.
        self.membership
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is wrong with `access` in view of what is behind its page; `stale` names the time.
fn judge(
    behind: Behind,
    access: &Access,
    needed: Rights,
    stale: FindingKind,
) -> Option<FindingKind> {
    if !behind.agrees(access.frame, access.stamp) {
        Some(stale)
    } else if !behind.allows(needed) {
        Some(FindingKind::Rights)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arena() -> Range {
        Range::new(0x20_0000, 0x10_0000).unwrap()
    }

    fn access(oracle: &Oracle, space: u64, frame: u64) -> Access {
        Access {
            device: 3,
            context: 9,
            space,
            addr: Addr::new(0x20_1010),
            len: 64,
            write: false,
            frame: Frame(frame),
            stamp: oracle.stamp(space, Addr::new(0x20_1010)),
        }
    }

    fn kinds(oracle: &Oracle) -> Vec<FindingKind> {
        oracle
            .findings()
            .iter()
            .map(|finding| finding.kind)
            .collect()
    }

    #[test]
    fn an_access_through_a_true_entry_is_not_a_finding() {
        let oracle = Oracle::new();
        let space = oracle.add_space(arena()).unwrap();
        oracle
            .shadow(space)
            .publish(arena(), Frame(4), Rights::READ_WRITE);
        let access = access(&oracle, space, 5);
        assert_eq!(oracle.watch(&access, Rights::READ, || 42), 42);
        assert_eq!((oracle.accesses(), oracle.stale_accesses()), (1, 0));
    }

    #[test]
    fn a_page_that_goes_during_the_access_is_found_after_it() {
        let oracle = Oracle::new();
        let space = oracle.add_space(arena()).unwrap();
        let shadow = oracle.shadow(space);
        shadow.publish(arena(), Frame(4), Rights::READ_WRITE);
        let access = access(&oracle, space, 5);
        oracle.watch(&access, Rights::READ, || shadow.withdraw(arena()));
        oracle.watch(&access, Rights::READ, || ());
        assert_eq!(
            kinds(&oracle),
            [FindingKind::StaleAfter, FindingKind::StaleBefore]
        );
    }

    #[test]
    fn lowered_rights_are_a_finding_only_for_what_they_forbid_and_raised_ones_never() {
        let oracle = Oracle::new();
        let space = oracle.add_space(arena()).unwrap();
        let shadow = oracle.shadow(space);
        shadow.publish(arena(), Frame(4), Rights::READ_WRITE);
        let access = access(&oracle, space, 5);
        shadow.protect(arena(), Rights::READ);
        oracle.watch(&access, Rights::READ, || ());
        assert_eq!(oracle.stale_accesses(), 0);
        oracle.watch(&access, Rights::WRITE, || ());
        assert_eq!(kinds(&oracle), [FindingKind::Rights]);
        shadow.protect(arena(), Rights::READ_WRITE);
        oracle.watch(&access, Rights::WRITE, || ());
        assert_eq!(oracle.stale_accesses(), 1);
    }

    #[test]
    fn every_access_to_a_space_that_is_gone_is_stale_also_when_its_slot_is_used_again() {
        let oracle = Oracle::new();
        let space = oracle.add_space(arena()).unwrap();
        oracle
            .shadow(space)
            .publish(arena(), Frame(4), Rights::READ_WRITE);
        let access = access(&oracle, space, 5);
        oracle.drop_space(space);
        oracle.watch(&access, Rights::READ, || ());
        let next = oracle.add_space(arena()).unwrap();
        assert_ne!(next, space);
        assert_eq!(next as usize % SPACES, space as usize % SPACES);
        oracle
            .shadow(next)
            .publish(arena(), Frame(4), Rights::READ_WRITE);
        oracle.watch(&access, Rights::READ, || ());
        assert_eq!(kinds(&oracle), [FindingKind::StaleBefore; 2]);
        assert!(
            oracle
                .findings()
                .iter()
                .all(|finding| !finding.space_exists)
        );
    }

    #[test]
    fn the_list_of_findings_is_bounded_and_the_count_is_not() {
        let oracle = Oracle::new();
        let access = access(&oracle, 0x1000, 5);
        for _ in 0..KEPT + 10 {
            oracle.watch(&access, Rights::READ, || ());
        }
        assert_eq!(oracle.findings().len(), KEPT);
        assert_eq!(oracle.stale_accesses(), KEPT as u64 + 10);
    }

    #[test]
    fn spaces_without_end_are_a_typed_error() {
        let oracle = Oracle::new();
        let arena = Range::new(0x20_0000, 0x1000).unwrap();
        let ids: Vec<u64> = (0..SPACES)
            .map(|_| oracle.add_space(arena).unwrap())
            .collect();
        assert_eq!(
            oracle.add_space(arena),
            Err(ModelError::TooManySpaces { limit: SPACES })
        );
        oracle.drop_space(ids[17]);
        assert!(oracle.add_space(arena).is_ok());
    }

    #[test]
    fn a_finding_reads_as_a_sentence() {
        let oracle = Oracle::new();
        let space = oracle.add_space(arena()).unwrap();
        oracle
            .shadow(space)
            .publish(arena(), Frame(4), Rights::READ);
        let mut access = access(&oracle, space, 0x2a);
        access.write = true;
        oracle.watch(&access, Rights::WRITE, || ());
        let text = oracle.findings()[0].to_string();
        assert!(
            text.starts_with(&format!(
                "device 3, context 9 wrote 64 bytes at 0x201010 of space {space:#x} in frame 0x2a \
                 through a stale translation: frame 0x5 is mapped there; noticed at "
            )),
            "{text}"
        );
    }
}
