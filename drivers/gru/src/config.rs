//! What the driver is told when it attaches.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use shootdown::{Interrupts, Operations, Registers};

use crate::layout::{CBS_PER_UNIT, DATA_PER_UNIT};

bitflags::bitflags! {
    /// Bugs that can be switched on, to prove that a test would find them.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Plant: u32 {
        /// Flush commands of a range are answered without a purge.
        const NO_FLUSH_ON_UNMAP = 1;
        /// A purge counts as acknowledged as soon as it was started.
        const FLUSH_NOT_WAITED = 2;
        /// A translation is installed without the driver lock, whatever happened since it was read (R9). Hardware that
        /// ignores late drop-ins (R16) hides it.
        const RETRY_NOT_CHECKED = 4;
        /// A translation is installed without ever looking at the sequence, so that not even an invalidation in progress is
        /// waited for (R9). No hardware hides it.
        const NOT_BEGUN = 64;
        /// The sequence of the first 4 KiB of a larger entry's miss is checked, not that of the whole entry (R34).
        const WRONG_RANGE = 8;
        /// ASIDs are handed out anew without a flush (R15).
        const ASID_REUSED = 16;
        /// An unmapped segment's context goes on.
        const CONTEXT_NOT_UNLOADED = 32;
        /// A context is unloaded with its pending faults left as they are (R33).
        const FAULTS_NOT_FORCED = 128;
    }
}

/// What keeps a translation that was read before an invalidation from being installed after that invalidation's flush.
///
/// Either way the fault path holds the driver lock from the check of its sequence until the entry is written, and waits before
/// that for invalidations that are in progress.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum LateDropIns {
    /// The driver: `quiesce` waits for the driver lock, so that an entry is either in the TLB before the flush begins or is not
    /// installed. Right for any hardware; the price is that an invalidation waits for the handle of a fault beside it.
    #[default]
    Excluded,
    /// The chiplet: `quiesce` waits for nothing. Right only for hardware that ignores a drop-in if a purge that covers it
    /// arrived between the miss and the write, as the GRU's data sheet says.
    ///
    /// Why that is enough. Under the driver lock the fault path sees the miss pending, then that no invalidation of the entry
    /// has begun since its translation was read, then writes. An invalidation that it does not see begins later, and so its
    /// purge arrives after the miss: before the write, and the drop-in is ignored and the control block misses again; or after
    /// it, and the purge takes the entry. The lock keeps other threads from answering the miss in between, which would leave
    /// the write to a later miss that the purge came before.
    /// - *Preloads* are written while the miss is pending, and were translated after it, as its own entry was.
    /// - *Ranges*: an invalidation is flushed with the page sizes of what is mapped in it, widened to whole pages. The entry
    ///   is a page that was mapped when its translation was read, so the first purge of any part of that page has its size
    ///   and covers it. Purges of an ASID or of the whole chiplet cover everything.
    /// - *Nothing cached*: no purge comes where the space has no context loaded. The fault's own context is in the word of the
    ///   space before it starts; a full fence after the start of the invalidation, before that word is read, and one before the
    ///   sequence is checked make sure that the purge sees the context, or the check the invalidation.
    /// - *ASIDs* are retired only without a loaded context, and a context is not unloaded while a fault of it is being resolved.
    /// - *A reset* forgets the misses, and drop-ins without one are ignored.
    ///
    /// What is left to the sequence: an invalidation whose purge came before the miss and whose pages have not changed yet has
    /// to be waited for, and one whose flush has not seen the context has to be noticed before the write. Whatever else a check
    /// that is left out lets through, such hardware drops.
    IgnoredByHardware,
}

/// Who resolves a segment's TLB misses.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum MissMode {
    /// Its user: a control block that misses says [`Status::CallOs`](crate::Status::CallOs).
    UserPolling,
    /// The chiplet's service thread, which the miss interrupts. Its user where the thread cannot, as the map lock is held.
    #[default]
    FaultMap,
    /// Whoever polls the control block, without an interrupt and without a call. Its user where the map lock is held.
    FaultMapPolled,
}

/// What a segment has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentOptions {
    /// Control blocks, rounded up to whole allocation units of 2; 1 to 128.
    pub control_blocks: usize,
    /// Data bytes, rounded up to whole allocation units of 1024; at most 32 KiB.
    pub data_bytes: usize,
    /// Who resolves its TLB misses.
    pub misses: MissMode,
    /// Pages of 4 KiB that are installed along with one that a block copy has missed: those that it comes to next, up to so many, to the
    /// end of what it copies, and to the first that is not mapped so. 0: none. More than the TLB has entries for is for nothing, and
    /// while they are installed invalidations of the space wait.
    ///
    /// As Linux has it: a count of eight bits that is set for each context, for block copies and pages of 4 KiB only, each written by
    /// WRITE_ONLY before the miss itself is answered.
    pub preload: u8,
}

impl SegmentOptions {
    /// Allocation units: of control blocks, of data.
    pub(crate) fn units(&self) -> (usize, usize) {
        (
            self.control_blocks.div_ceil(CBS_PER_UNIT),
            self.data_bytes.div_ceil(DATA_PER_UNIT),
        )
    }
}

/// When a context may be stolen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Steal {
    /// For how long a context stays with the segment that it was loaded for.
    pub window: Duration,
    /// After how long who has none tries again.
    pub retry: Duration,
}

impl Default for Steal {
    fn default() -> Self {
        Self {
            window: Duration::from_millis(200),
            retry: Duration::from_millis(20),
        }
    }
}

/// How the driver attaches.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// For one operation of a context or fault handle, and for the flush when the ASIDs wrap.
    pub handle_deadline: Duration,
    /// For a segment that has no context: how long it tries to get one.
    pub load_deadline: Duration,
    /// For invalidations that a TLB miss has to wait for.
    pub fault_deadline: Duration,
    /// The ASIDs to hand out, each 8 after the one before; hardware has 8..=0xff_fff0. Fewer make them wrap earlier.
    pub asids: RangeInclusive<u32>,
    /// The first one to hand out, if it is not the first of all: near their end it makes them wrap soon.
    pub first_asid: Option<u32>,
    /// What a segment has that is not told otherwise.
    pub segment: SegmentOptions,
    /// When a context may be stolen.
    pub steal: Steal,
    /// How late drop-ins are kept out of the TLB.
    pub late_drop_ins: LateDropIns,
    /// What others may do to memory of the spaces: a space whose sources do not tell of one of these in time gets no segment.
    pub foreign: Operations,
    /// What is wrong with the driver.
    pub plants: Plant,
}

impl Default for Config {
    /// Sizes that let all 16 contexts of a chiplet be used.
    fn default() -> Self {
        Self {
            handle_deadline: Duration::from_secs(1),
            load_deadline: Duration::from_secs(5),
            fault_deadline: Duration::from_secs(1),
            asids: 8..=0xff_fff0,
            first_asid: None,
            segment: SegmentOptions {
                control_blocks: 8,
                data_bytes: 2048,
                misses: MissMode::default(),
                preload: 8,
            },
            steal: Steal::default(),
            late_drop_ins: LateDropIns::default(),
            foreign: Operations::CALLS,
            plants: Plant::empty(),
        }
    }
}

/// How one chiplet is reached.
pub struct ChipletPorts {
    /// Its name in reports.
    pub name: String,
    /// The blade that it sits on, as does its neighbour.
    pub blade: u32,
    /// Its window of 128 MiB.
    pub registers: Arc<dyn Registers>,
    /// Its interrupt vectors.
    pub interrupts: Arc<dyn Interrupts>,
}

impl std::fmt::Debug for ChipletPorts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChipletPorts")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}
