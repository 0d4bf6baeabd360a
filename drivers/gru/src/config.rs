//! What the driver is told when it attaches.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use shootdown::{Interrupts, Registers};

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
        /// The sequence of the first 4 KiB of a larger entry's miss is checked, not that of the whole entry (R34).
        const WRONG_RANGE = 8;
        /// ASIDs are handed out anew without a flush (R15).
        const ASID_REUSED = 16;
        /// An unmapped segment's context goes on.
        const CONTEXT_NOT_UNLOADED = 32;
    }
}

/// How the driver attaches.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// For one operation of a context or fault handle, and for the flush when the ASIDs wrap.
    pub handle_deadline: Duration,
    /// For invalidations that a TLB miss has to wait for.
    pub fault_deadline: Duration,
    /// The ASIDs to hand out, each 8 after the one before; hardware has 8..=0xff_fff0. Fewer make them wrap earlier.
    pub asids: RangeInclusive<u32>,
    /// Control blocks of a segment, rounded up to whole allocation units of 2; 1 to 128.
    pub control_blocks: usize,
    /// Data bytes of a segment, rounded up to whole allocation units of 1024; at most 32 KiB.
    pub data_bytes: usize,
    /// What is wrong with the driver.
    pub plants: Plant,
}

impl Default for Config {
    /// Sizes that let all 16 contexts of a chiplet be used.
    fn default() -> Self {
        Self {
            handle_deadline: Duration::from_secs(1),
            fault_deadline: Duration::from_secs(1),
            asids: 8..=0xff_fff0,
            control_blocks: 8,
            data_bytes: 2048,
            plants: Plant::empty(),
        }
    }
}

/// How one chiplet is reached.
pub struct ChipletPorts {
    /// Its name in reports.
    pub name: String,
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
