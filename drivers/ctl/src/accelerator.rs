//! The page-table accelerators of a run: a second kind of device on the same memory. They do not fail on purpose.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use rand::Rng;
use serde::Serialize;
use shootdown::{AddressSpace, Range};
use shootdown_hw_model::{Bus, pta};
use shootdown_pta::{Command, Config, Pta, PtaError, Queue};

use crate::run::RunError;
use crate::shared::PATIENCE;
use crate::worker::Worker;

/// What has been counted of them.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Report {
    pub(crate) accelerators: u64,
    pub(crate) commands: u64,
    pub(crate) page_requests: u64,
    pub(crate) request_retries: u64,
    pub(crate) requests_resolved: u64,
    pub(crate) request_batches: u64,
    pub(crate) pages_around: u64,
    pub(crate) queues_opened: u64,
    pub(crate) pasid_flushes: u64,
    pub(crate) invalidations: u64,
    pub(crate) deadlines_missed: u64,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "  page-table accelerators: {}; {} commands, {} page requests ({} begun anew), {} invalidations ({} deadlines missed),",
            self.accelerators,
            self.commands,
            self.page_requests,
            self.request_retries,
            self.invalidations,
            self.deadlines_missed
        )?;
        writeln!(
            f,
            "               faults: {} in {} batches, {} filled around; {} queues, {} flushes before PASIDs came back",
            self.requests_resolved,
            self.request_batches,
            self.pages_around,
            self.queues_opened,
            self.pasid_flushes
        )
    }
}

/// The devices, with their driver.
#[derive(Default)]
pub(crate) struct Accelerators(Vec<(Arc<pta::Pta>, Arc<Pta>)>);

impl Accelerators {
    /// So many, called `first` and on in findings.
    pub(crate) fn new(bus: &Bus, first: u32, count: u32, threads: u64) -> Result<Self, RunError> {
        let one = |nth: u32| {
            let model = pta::PtaConfig {
                device: first + nth,
                tlb_entries: 256,
                latency: pta::Latency {
                    invalidate: Duration::from_micros(3),
                    ..pta::Latency::default()
                },
                // One for the space of all, one for each that a thread makes: they come back often.
                pasids: (threads as usize + 1).min(pta::layout::PASIDS - 1),
                ..pta::PtaConfig::default()
            };
            let model = pta::Pta::new(bus, model)?;
            let (registers, interrupts) = (model.clone(), model.clone());
            let name = format!("pta{nth}");
            let driver = Pta::probe(&name, registers, interrupts, Config::default())?;
            Ok((model, driver))
        };
        (0..count).map(one).collect::<Result<_, _>>().map(Self)
    }

    /// The driver of the one that thread `nth` uses.
    fn of(&self, nth: u64) -> Option<&Arc<Pta>> {
        let count = self.0.len() as u64;
        let nth = nth.checked_rem(count)?;
        self.0.get(nth as usize).map(|(_, driver)| driver)
    }

    /// What they have counted, unless there is none.
    pub(crate) fn report(&self) -> Option<Report> {
        let mut report = Report {
            accelerators: self.0.len() as u64,
            ..Report::default()
        };
        for (model, driver) in &self.0 {
            let (counts, stats, device) = (model.counts(), driver.stats(), driver.device().stats());
            report.commands += counts.commands;
            report.page_requests += stats.requests;
            report.request_retries += stats.request_retries;
            report.requests_resolved += stats.requests_resolved;
            report.request_batches += stats.request_batches;
            report.pages_around += stats.pages_around;
            report.queues_opened += stats.queues_opened;
            report.pasid_flushes += stats.pasid_flushes;
            report.invalidations += counts.invalidations;
            report.deadlines_missed += device.timeouts;
        }
        (report.accelerators > 0).then_some(report)
    }
}

/// The slot that works while memory goes.
const BESIDE: usize = 1;

impl Worker<'_> {
    /// A queue for `space`; `None` if there are no accelerators, or no queue or PASID is free.
    pub(crate) fn queue(&mut self, space: &AddressSpace) -> Option<Queue> {
        let driver = self.shared.accelerators.of(self.nth)?;
        match driver.queue(space) {
            Ok(queue) => Some(queue),
            Err(PtaError::NoQueue { .. } | PtaError::NoPasid { .. }) => None,
            Err(error) => {
                self.accelerator_failed(error, "no queue");
                None
            }
        }
    }

    /// What a device that was lost, or another that fails on purpose and holds up its faults, brings about is no finding.
    fn accelerator_failed(&mut self, error: PtaError, what: &str) {
        let lost = matches!(error, PtaError::QueueLost | PtaError::Timeout { .. });
        if !lost && !self.shared.faulty {
            self.find(format!("accelerator: {what}: {error}"));
        }
    }

    /// An accelerator fills, copies, compares and adds in `buffer`, the CPU checks. Whether it goes on.
    pub(crate) fn accelerate(&mut self, queue: &Queue, buffer: Range) -> bool {
        let (at, count) = self.part(buffer);
        let (to, most) = self.part(buffer);
        let range =
            |count: u32| Range::new(at, u64::from(count) * 8).expect("a part has a word at least");
        let (word, value): (u64, u64) = (self.rng.random(), self.rng.random());
        let less = count.min(most);
        let from = range(less);
        // Apart from each other, or the copy overwrites what it has yet to read.
        let apart = Range::new(to, from.len() as u64).is_ok_and(|to| !to.overlaps(range(count)));
        let run = |command| queue.run(0, &command, PATIENCE);
        let done = run(Command::Fill {
            range: range(count),
            word,
        })
        .and_then(|_| {
            if apart {
                run(Command::Copy { from, to })?;
                return run(Command::Compare {
                    with: from,
                    other: to,
                });
            }
            Ok(u64::MAX)
        })
        .and_then(|differs| Ok((differs, run(Command::AtomicAdd { at, value })?)));
        match done {
            Ok((differs, before)) => {
                self.matches(at, 1, word.wrapping_add(value), "an addition");
                if apart {
                    self.matches(to, less, word, "an accelerator's copy");
                }
                if differs != u64::MAX || before != word {
                    self.shared.data_mismatches.fetch_add(1, Ordering::Relaxed);
                    self.find(format!(
                        "accelerator: a copy differs at byte {differs:#x}, or {before:#x} was found, not {word:#x}"
                    ));
                }
                true
            }
            Err(error) => {
                self.accelerator_failed(error, "a command");
                false
            }
        }
    }

    /// It begins to read all of `buffer`, which is about to go.
    pub(crate) fn accelerate_beside(queue: &Queue, buffer: Range) -> Result<(), PtaError> {
        queue.submit(BESIDE, &Command::Checksum { range: buffer })
    }

    /// That ends, with a sum or with a fault. Whether the queue goes on.
    pub(crate) fn settle_accelerator(&mut self, queue: &Queue) -> bool {
        match queue.wait(BESIDE, PATIENCE) {
            Ok(_) | Err(PtaError::PageFault { .. }) => true,
            Err(error) => {
                self.accelerator_failed(error, "a sum beside an unmap");
                false
            }
        }
    }
}
