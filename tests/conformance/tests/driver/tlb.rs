// Part of a driver for the kit's accelerator, as an author would write it, and as the kit's own tests break it. No inner documentation:
// the crate's documentation includes this file as it is.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use conformance::Accelerator;
use shootdown::{
    Completion, DeviceTlb, FlushCommand, Issue, Limits, PageSizes, ResetError, Scope, Ticket,
};

/// What is wrong with the driver. A driver of one's own has none of this.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Bug {
    None,
    ClaimsNothingCached,
    NarrowsTooFar,
    FlushNotAwaited,
    DrainedLies,
    RetryNotChecked,
    BeginTooSmall,
    NotBegun,
    QuiesceWithoutTheLock,
    BlockedAfterRefusal,
    WaitsInATry,
    ContextNotUnloaded,
    NeverGivenUp,
    AllocatesInQuiesce,
    WaitsForAllWork,
    Panics,
    NeverReturns,
    CountsCompletions,
    TakesTheLastCompletion,
    ResetNotAwaited,
}

/// Flushes under way at a time.
const DOORBELLS: usize = 32;
/// Commands of the whole device are remembered as such.
const WHOLE: u64 = 1 << 63;

/// The doorbells that have not been answered: 0 for none, else its number, and whether it flushes the whole device. A later one of
/// the whole device does what the earlier ones were asked for, so its answer counts for them.
struct Doorbells {
    last: AtomicU64,
    waiting: [AtomicU64; DOORBELLS],
    /// Commands are queued, doorbells rung and completions taken by one thread at a time. Held for register accesses only.
    queued: Mutex<Queued>,
    counted: AtomicU64,
}

/// What the next doorbell begins.
#[derive(Clone, Copy, Default)]
struct Queued {
    any: bool,
    /// A command for the whole device.
    whole: bool,
}

impl Doorbells {
    fn queued(&self) -> MutexGuard<'_, Queued> {
        self.queued.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn free(&self) -> impl Iterator<Item = &AtomicU64> {
        self.waiting
            .iter()
            .filter(|slot| slot.load(Ordering::Acquire) == 0)
    }
}

pub(crate) struct Core {
    pub(crate) hardware: Arc<Accelerator>,
    pub(crate) contexts: AtomicU64,
    doorbells: Doorbells,
    pub(crate) bug: Bug,
}

impl Core {
    pub(crate) fn new(hardware: Arc<Accelerator>, bug: Bug) -> Self {
        Self {
            hardware,
            contexts: AtomicU64::new(1),
            doorbells: Doorbells {
                last: AtomicU64::new(0),
                waiting: [const { AtomicU64::new(0) }; DOORBELLS],
                queued: Mutex::new(Queued::default()),
                counted: AtomicU64::new(0),
            },
            bug,
        }
    }

    fn take_completions(&self) {
        let _one = self.doorbells.queued();
        while let Some(number) = self.hardware.completion() {
            match self.bug {
                Bug::CountsCompletions => {
                    self.doorbells.counted.fetch_add(1, Ordering::AcqRel);
                }
                // Out of order they are not the sum of what came before.
                Bug::TakesTheLastCompletion
                    if number <= self.doorbells.last.load(Ordering::Acquire) =>
                {
                    self.doorbells.counted.fetch_max(number, Ordering::AcqRel);
                }
                _ => {}
            }
            let waiting = &self.doorbells.waiting;
            let of = |slot: &&AtomicU64| {
                let word = slot.load(Ordering::Acquire);
                number != 0 && word & !WHOLE == number
            };
            // A number that nobody waits for is a second answer, or an answer to nothing.
            let Some(slot) = waiting.iter().find(of) else {
                continue;
            };
            if slot.swap(0, Ordering::AcqRel) & WHOLE != 0 {
                self.forget(number);
            }
        }
    }

    /// Doorbells before `number` need no answer any more.
    fn forget(&self, number: u64) {
        for slot in &self.doorbells.waiting {
            let word = slot.load(Ordering::Acquire);
            if word & !WHOLE < number {
                let _ = slot.compare_exchange(word, 0, Ordering::AcqRel, Ordering::Relaxed);
            }
        }
    }
}

/// The device's TLB, for the framework.
pub(crate) struct Tlb(pub(crate) Arc<Core>);

impl DeviceTlb for Tlb {
    fn limits(&self) -> Limits {
        Limits {
            entry_sizes: PageSizes::all(),
            pages_per_command: 512,
            commands_per_batch: 4,
            full_flush_cost: 4,
        }
    }

    fn issue(&self, command: FlushCommand) -> Issue {
        let Core {
            hardware,
            doorbells,
            ..
        } = &*self.0;
        let mut queued = doorbells.queued();
        let whole = command.scope == Scope::Device;
        // The last free one is kept for a flush of the whole device.
        let needed = if whole { 1 } else { 2 };
        if doorbells.free().take(needed).count() < needed || !hardware.queue(command) {
            return Issue::Busy;
        }
        queued.any = true;
        queued.whole |= whole;
        Issue::Queued
    }

    fn dispatch(&self) -> Ticket {
        let Core {
            hardware,
            doorbells,
            ..
        } = &*self.0;
        let mut queued = doorbells.queued();
        let last = doorbells.last.load(Ordering::Acquire);
        // Somebody else has rung for what this thread had queued; or all are taken, and so nothing could be queued.
        let Some(slot) = doorbells.free().next().filter(|_| queued.any) else {
            return Ticket(last);
        };
        let number = last + 1;
        slot.store(
            number | if queued.whole { WHOLE } else { 0 },
            Ordering::Release,
        );
        doorbells.last.store(number, Ordering::Release);
        *queued = Queued::default();
        hardware.ring(number);
        Ticket(number)
    }

    fn poll(&self, ticket: Ticket) -> Completion {
        let Core { doorbells, bug, .. } = &*self.0;
        self.0.take_completions();
        let waits = |slot: &AtomicU64| {
            let number = slot.load(Ordering::Acquire) & !WHOLE;
            number != 0 && number <= ticket.0
        };
        let done = match bug {
            Bug::FlushNotAwaited => true,
            Bug::CountsCompletions | Bug::TakesTheLastCompletion => {
                doorbells.counted.load(Ordering::Acquire) >= ticket.0
            }
            _ => !doorbells.waiting.iter().any(waits),
        };
        if done {
            Completion::Done
        } else {
            Completion::Pending
        }
    }

    fn reset(&self, deadline: Duration) -> Result<(), ResetError> {
        let Core {
            hardware,
            bug,
            doorbells,
            ..
        } = &*self.0;
        let before = doorbells.last.load(Ordering::Acquire);
        hardware.reset();
        *doorbells.queued() = Queued::default();
        let begun = Instant::now();
        while hardware.is_resetting() && *bug != Bug::ResetNotAwaited {
            if begun.elapsed() >= deadline {
                return Err(ResetError::Timeout { deadline });
            }
            std::thread::sleep(Duration::from_micros(50));
        }
        self.0.forget(before + 1);
        Ok(())
    }
}
