//! Handle operations: write the fields, start, poll until the handle is idle, for so long and no longer.
//!
//! A dead chiplet is a typed error after the deadline, never a hang and never a panic (R20).

use shootdown_primitive::sync::atomic::{AtomicU64, Ordering};
use shootdown_primitive::time::{Duration, Instant};
use shootdown_primitive::{hint, thread};

use shootdown::Registers;

use crate::error::GruError;
use crate::layout::{cch, start, status, tfh};

/// Waits longer and longer: first on the processor, as hardware answers within microseconds, then asleep.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    round: u32,
}

impl Backoff {
    pub(crate) fn wait(&mut self) {
        match self.round {
            0..=32 => hint::spin_loop(),
            33..=64 => thread::yield_now(),
            _ => thread::sleep(Duration::from_micros(50)),
        }
        self.round = self.round.saturating_add(1);
    }
}

/// What handles are told to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Operation {
    Allocate,
    Start,
    InterruptSync,
    Deallocate,
    WriteOnly,
    WriteRestart,
    UserPolling,
    FaultException,
    /// Of a TLB-global handle, which is not waited for here.
    Purge,
}

impl Operation {
    pub(crate) const ALL: [Self; 9] = [
        Self::Allocate,
        Self::Start,
        Self::InterruptSync,
        Self::Deallocate,
        Self::WriteOnly,
        Self::WriteRestart,
        Self::UserPolling,
        Self::FaultException,
        Self::Purge,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Allocate => "ALLOCATE of a context",
            Self::Start => "START of a context",
            Self::InterruptSync => "INTERRUPT_SYNC of a context",
            Self::Deallocate => "DEALLOCATE of a context",
            Self::WriteOnly => "WRITE_ONLY of a fault",
            Self::WriteRestart => "WRITE_RESTART of a fault",
            Self::UserPolling => "USER_POLLING_MODE of a fault",
            Self::FaultException => "EXCEPTION of a fault",
            Self::Purge => "TLBINV of a purge",
        }
    }

    fn opcode(self) -> u64 {
        match self {
            Self::Allocate => cch::ALLOCATE,
            Self::Start => cch::START,
            Self::InterruptSync => cch::INTERRUPT_SYNC,
            Self::Deallocate => cch::DEALLOCATE,
            Self::WriteOnly => tfh::WRITE_ONLY,
            Self::WriteRestart => tfh::WRITE_RESTART,
            Self::UserPolling => tfh::USER_POLLING,
            Self::FaultException => tfh::EXCEPTION,
            Self::Purge => crate::layout::tgh::INVALIDATE,
        }
    }
}

/// How often one operation was done, and how long it took. Relaxed throughout: nothing is concluded from it.
#[derive(Debug, Default)]
pub(crate) struct Timing {
    count: AtomicU64,
    nanos: AtomicU64,
    max: AtomicU64,
    failed: AtomicU64,
}

impl Timing {
    pub(crate) fn record(&self, took: Duration) {
        let nanos = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.count.fetch_add(1, Ordering::Relaxed);
        self.nanos.fetch_add(nanos, Ordering::Relaxed);
        self.max.fetch_max(nanos, Ordering::Relaxed);
    }

    #[cfg(test)]
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Adds what another has measured.
    pub(crate) fn add(&self, other: &Self) {
        let sums = [
            (&self.count, &other.count),
            (&self.nanos, &other.nanos),
            (&self.failed, &other.failed),
        ];
        for (sum, more) in sums {
            sum.fetch_add(more.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        let max = other.max.load(Ordering::Relaxed);
        self.max.fetch_max(max, Ordering::Relaxed);
    }

    fn read(&self, operation: Operation) -> OperationStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let count = get(&self.count);
        OperationStats {
            name: operation.name(),
            count,
            average: get(&self.nanos).checked_div(count).unwrap_or(0),
            max: get(&self.max),
            failed: get(&self.failed),
        }
    }

    fn fail(&self) {
        self.failed.fetch_add(1, Ordering::Relaxed);
    }
}

/// What has been measured of one operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct OperationStats {
    /// The operation.
    pub name: &'static str,
    /// How often it ended well.
    pub count: u64,
    /// How long it took on average, in nanoseconds.
    pub average: u64,
    /// How long it took at most, in nanoseconds.
    pub max: u64,
    /// How often it ended with an exception, or not in time.
    pub failed: u64,
}

/// All operations of the driver's handles.
#[derive(Debug, Default)]
pub(crate) struct Timings([Timing; Operation::ALL.len()]);

impl Timings {
    pub(crate) fn of(&self, operation: Operation) -> &Timing {
        &self.0[operation as usize]
    }

    /// What has been measured, with the purges of `chiplets`, which are timed by themselves.
    pub(crate) fn read<'c>(
        &self,
        chiplets: impl Iterator<Item = &'c Timing>,
    ) -> Vec<OperationStats> {
        let purges = Timing::default();
        chiplets.for_each(|one| purges.add(one));
        let timing = |operation| match operation {
            Operation::Purge => &purges,
            _ => self.of(operation),
        };
        let all = Operation::ALL.into_iter();
        all.map(|operation| timing(operation).read(operation))
            .collect()
    }
}

/// Starts `operation` of the handle at `base`, with the other `bits` of its first word, and waits for its end.
///
/// # Errors
/// The handle's exception, [`GruError::HandleTimeout`] after `deadline`, or the chiplet is gone.
pub(crate) fn run(
    registers: &dyn Registers,
    timings: &Timings,
    base: u64,
    operation: Operation,
    bits: u64,
    deadline: Duration,
) -> Result<(), GruError> {
    let what = operation.name();
    let begun = Instant::now();
    let result = (|| {
        registers.write(base, start(operation.opcode()) | bits)?;
        let mut backoff = Backoff::default();
        loop {
            let dw0 = registers.read(base)?;
            match status::of(dw0) {
                status::IDLE => return Ok(()),
                status::EXCEPTION => {
                    let cause = status::cause(dw0);
                    return Err(GruError::HandleException { what, cause });
                }
                _ if begun.elapsed() >= deadline => {
                    return Err(GruError::HandleTimeout { what, deadline });
                }
                _ => backoff.wait(),
            }
        }
    })();
    match result {
        Ok(()) => timings.of(operation).record(begun.elapsed()),
        Err(_) => timings.of(operation).fail(),
    }
    result
}
