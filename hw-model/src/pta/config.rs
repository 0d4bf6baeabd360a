//! What a device is told when it is built: sizes, latencies, faults that it injects, bugs that it has.

use shootdown_primitive::time::Duration;

/// How long things take. Zero, the default, means: as fast as the model can.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Latency {
    /// A translation, from the reading of the page table to the entry in the device TLB.
    pub walk: Duration,
    /// An access of at most a page, from the reading of its entries to its end.
    pub access: Duration,
    /// An invalidation, from its doorbell to the removal of the entries.
    pub invalidate: Duration,
    /// A reset.
    pub reset: Duration,
}

/// Hardware faults, drawn from a seed. A probability is in 0.0..=1.0, for each doorbell of invalidations unless it says otherwise;
/// the default is a healthy device.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct FaultPlan {
    /// Seed of all draws.
    pub seed: u64,
    /// Probability of a lost completion: the entries go, and nobody is told.
    pub lost: f64,
    /// Probability that the invalidation never begins.
    pub stuck: f64,
    /// Probability that it is late.
    pub late: f64,
    /// How late.
    pub late_by: Duration,
    /// The most by which one takes longer, at random, so that later ones overtake it.
    pub jitter: Duration,
    /// Probability of a completion that comes twice.
    pub duplicated: f64,
    /// How long after the first time.
    pub duplicate_after: Duration,
    /// Probability of completions for numbers that nobody has rung with, while this one takes `late_by`.
    pub unissued: f64,
    /// Probability, for each page request, that it never reaches the ring.
    pub request_lost: f64,
    /// Probability, for each write of 1 to the reset register but the first, which whoever attaches makes, that it is not heeded: the
    /// register reads 1 until one is.
    pub survives_reset: f64,
}

bitflags::bitflags! {
    /// Bugs of the model that can be switched on, to prove that a test would find them.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
    pub struct Plant: u32 {
        /// A translation that an invalidation has covered since the page table was read is installed all the same (race R16).
        const STALE_FILL = 1;
        /// An invalidation does not wait for accesses that have read an entry before.
        const NO_DRAIN = 2;
    }
}

/// How a device is built.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct PtaConfig {
    /// The device number in the oracle's findings.
    pub device: u32,
    /// Entries of the device TLB, at least 16.
    pub tlb_entries: usize,
    /// Tables that local memory has room for, at least 1.
    pub tables: usize,
    /// PASIDs that work, from 1 on.
    pub pasids: usize,
    /// Entries of the page-request ring, of which one stays free: 2 to [`REQUESTS`](super::layout::REQUESTS).
    pub requests: usize,
    /// How long a page request waits for its answer.
    pub request_timeout: Duration,
    /// How long things take.
    pub latency: Latency,
    /// What goes wrong.
    pub faults: FaultPlan,
    /// What is wrong with the model.
    pub plants: Plant,
}

impl Default for PtaConfig {
    fn default() -> Self {
        Self {
            device: 0,
            tlb_entries: 512,
            tables: 1024,
            pasids: super::layout::PASIDS - 1,
            requests: 32,
            request_timeout: Duration::from_secs(2),
            latency: Latency::default(),
            faults: FaultPlan::default(),
            plants: Plant::empty(),
        }
    }
}
