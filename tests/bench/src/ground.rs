//! What is measured on: ranges, queries, handlers, devices.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use iset::IntervalMap;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use shootdown::{
    AddressSpace, Completion, Deadlines, Device, DeviceTlb, FlushCommand, Issue, Limits, Notifier,
    PageSizes, Range, Registration, Target, Ticket,
};

const PAGE: u64 = 1 << 12;
/// One range of 64 KiB in each stretch of this length.
const STRIDE: u64 = 256 << 10;
const BASE: u64 = 1 << 40;
const QUERIES: usize = 1 << 16;
const LARGE: u64 = 7;

/// `count` ranges of 64 KiB at random places, seven of them replaced by large ones.
#[derive(Debug)]
pub struct Ground {
    /// In random order.
    pub ranges: Vec<Range>,
    seed: u64,
}

impl Ground {
    /// The same for the same count.
    pub fn new(count: usize) -> Self {
        let seed = count as u64;
        let mut rng = SmallRng::seed_from_u64(seed);
        let area = count as u64 * STRIDE;
        let large = (area / 64).max(1 << 20);
        let mut ranges: Vec<Range> = (0..count as u64)
            .map(|nth| {
                if nth < LARGE {
                    let at = rng.random_range(0..area / PAGE) * PAGE;
                    return Range::new(BASE + at, large).expect("a range of the ground");
                }
                let at = nth * STRIDE + rng.random_range(0..=48) * PAGE;
                Range::new(BASE + at, 64u64 << 10).expect("a range of the ground")
            })
            .collect();
        use rand::seq::SliceRandom;
        ranges.shuffle(&mut rng);
        Self { ranges, seed }
    }

    /// Pages of the area that hit so many ranges.
    pub fn queries(&self, hits: usize) -> Vec<Range> {
        let index = self.iset();
        let mut rng = SmallRng::seed_from_u64(self.seed + 1);
        let pages = self.ranges.len() as u64 * STRIDE / PAGE;
        let mut queries = Vec::with_capacity(QUERIES);
        while queries.len() < QUERIES {
            let start = BASE + rng.random_range(0..pages) * PAGE;
            if index.iter(start..start + PAGE).count() == hits {
                queries.push(Range::new(start, PAGE).expect("a page of the ground"));
            }
        }
        queries
    }

    /// The ranges in a bare interval map.
    pub fn iset(&self) -> IntervalMap<u64, u64> {
        let mut index = IntervalMap::new();
        for (nth, range) in self.ranges.iter().enumerate() {
            index.force_insert(interval(*range), nth as u64);
        }
        index
    }

    /// The ranges registered, each with the same handler that does nothing.
    pub fn space(&self) -> (AddressSpace, Vec<Registration>) {
        let space = AddressSpace::without_memory(Deadlines::default());
        let handler = Arc::new(Empty);
        let registrations = self
            .ranges
            .iter()
            .map(|range| {
                space
                    .register(*range, handler.clone(), &[])
                    .expect("a registration")
            })
            .collect();
        (space, registrations)
    }
}

/// As iset wants it.
pub fn interval(range: Range) -> std::ops::Range<u64> {
    range.start().get()..range.last().get() + 1
}

/// A handler that does nothing.
#[derive(Debug)]
pub struct Empty;

impl Notifier for Empty {}

/// A TLB that is flushed so long after its doorbell. Passive: it only looks at the clock when it is asked.
#[derive(Debug)]
pub struct Tlb {
    latency: Duration,
    epoch: Instant,
    /// When the newest flush is done, in nanoseconds since the epoch.
    done: AtomicU64,
}

impl Tlb {
    /// With this latency; without one no clock is read.
    pub fn new(latency: Duration) -> Self {
        Self {
            latency,
            epoch: Instant::now(),
            done: AtomicU64::new(0),
        }
    }

    /// A device with such a TLB, as a registration names it.
    pub fn target(latency: Duration) -> Target {
        Target {
            device: Device::new("passive", Self::new(latency)),
            tag: 0,
        }
    }
}

impl DeviceTlb for Tlb {
    fn limits(&self) -> Limits {
        Limits {
            entry_sizes: PageSizes::FOUR_KIB,
            pages_per_command: 512,
            commands_per_batch: 8,
            full_flush_cost: 8,
        }
    }

    fn issue(&self, _: FlushCommand) -> Issue {
        Issue::Queued
    }

    fn dispatch(&self) -> Ticket {
        if self.latency.is_zero() {
            return Ticket(0);
        }
        let done = (self.epoch.elapsed() + self.latency).as_nanos() as u64;
        self.done.store(done, Relaxed);
        Ticket(done)
    }

    fn poll(&self, ticket: Ticket) -> Completion {
        if self.latency.is_zero() || self.epoch.elapsed().as_nanos() as u64 >= ticket.0 {
            Completion::Done
        } else {
            Completion::Pending
        }
    }
}
