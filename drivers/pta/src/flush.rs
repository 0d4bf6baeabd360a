//! The device TLB, for the framework: commands, one doorbell, completions that are numbers.
//!
//! A doorbell's number is answered when everything that was queued before it is done. Numbers come back in any order, late, twice, or
//! never, and numbers may come that nobody rang with: only one that is waited for, and is used once, counts. A flush of
//! the whole device does what the earlier ones were asked for, so its answer counts for those too; the last place is kept for one.

use shootdown_primitive::sync::{Arc, PoisonError};
use shootdown_primitive::time::{Duration, Instant};

use shootdown::{
    Completion, DeviceError, DeviceTlb, FlushCommand, Issue, Limits, PageSize, PageSizes,
    ResetError, Scope, Ticket,
};

use crate::device::{Backoff, Core};
use crate::layout::{PASID, RESET, invalidate};

/// Doorbells that can wait for their answers.
const PLACES: usize = 32;

/// A doorbell that is not answered.
#[derive(Clone, Copy)]
struct Waiting {
    number: u64,
    whole: bool,
}

/// Doorbells. Locked for register accesses only, so that no device can hold the lock up.
#[derive(Default)]
pub(crate) struct Flushes {
    last: u64,
    waiting: [Option<Waiting>; PLACES],
    /// What the next doorbell begins, and whether the whole device is among it.
    queued: Option<bool>,
}

impl Flushes {
    fn free(&self) -> usize {
        self.waiting.iter().filter(|one| one.is_none()).count()
    }

    fn forget(&mut self, is_over: impl Fn(&Waiting) -> bool) {
        for place in &mut self.waiting {
            *place = place.take().filter(|one| !is_over(one));
        }
    }

    /// A number has come back.
    fn completed(&mut self, number: u64) {
        let of = |one: &&Waiting| one.number == number;
        let Some(&Waiting { whole, .. }) = self.waiting.iter().flatten().find(of) else {
            return;
        };
        self.forget(|one| one.number == number || whole && one.number < number);
    }
}

fn queue(core: &Core, command: FlushCommand) -> Result<bool, DeviceError> {
    let mut flushes = core.flushes();
    let whole = command.scope == Scope::Device;
    let needed = if whole { 1 } else { 2 };
    if flushes.free() < needed || core.registers.read(invalidate::QUEUE)? == 0 {
        return Ok(false);
    }
    let pasid = PASID.of(command.tag);
    let what = match command.scope {
        Scope::Device => invalidate::SCOPE.of(invalidate::EVERYTHING),
        Scope::Tag => invalidate::SCOPE.of(invalidate::ONE_PASID) | pasid,
        Scope::Pages { range, page_size } => {
            let (address, huge) = (range.start().get(), page_size == PageSize::TwoMiB);
            core.registers.write(invalidate::ADDRESS, address)?;
            invalidate::SCOPE.of(invalidate::PAGES)
                | invalidate::HUGE.of(huge.into())
                | invalidate::COUNT.of(range.pages(page_size) - 1)
                | pasid
        }
    };
    core.registers.write(invalidate::QUEUE, what)?;
    flushes.queued = Some(whole || flushes.queued.unwrap_or(false));
    Ok(true)
}

fn ring(core: &Core) -> Result<u64, DeviceError> {
    let mut flushes = core.flushes();
    // Somebody else has rung for what this thread had queued; or nothing could be queued.
    if let Some(whole) = flushes.queued
        && let Some(place) = flushes.waiting.iter().position(Option::is_none)
    {
        let number = flushes.last + 1;
        core.registers.write(invalidate::DOORBELL, number)?;
        flushes.waiting[place] = Some(Waiting { number, whole });
        (flushes.last, flushes.queued) = (number, None);
    }
    Ok(flushes.last)
}

fn is_answered(core: &Core, number: u64) -> Result<bool, DeviceError> {
    let mut flushes = core.flushes();
    // A device that is gone answers with all ones for ever.
    for _ in 0..4 * PLACES {
        match core.registers.read(invalidate::COMPLETION)? {
            0 => break,
            number => flushes.completed(number),
        }
    }
    let mut waiting = flushes.waiting.iter().flatten();
    Ok(waiting.all(|one| one.number > number))
}

/// The device TLB.
pub(crate) struct Tlb(pub(crate) Arc<Core>);

impl Tlb {
    /// Empties it, of one PASID or of all: whether the device has acknowledged that in time. Outside of the shootdown path.
    pub(crate) fn empty(&self, tag: Option<u64>, deadline: Duration) -> bool {
        let scope = if tag.is_some() {
            Scope::Tag
        } else {
            Scope::Device
        };
        let tag = tag.unwrap_or(0);
        let (begun, mut backoff) = (Instant::now(), Backoff::default());
        while self.issue(FlushCommand { tag, scope }) == Issue::Busy {
            if begun.elapsed() >= deadline {
                return false;
            }
            // What is under way makes room when it is answered.
            let ticket = self.dispatch();
            self.poll(ticket);
            backoff.wait();
        }
        let ticket = self.dispatch();
        loop {
            match self.poll(ticket) {
                Completion::Done => return true,
                Completion::Pending if begun.elapsed() < deadline => backoff.wait(),
                _ => return false,
            }
        }
    }
}

impl DeviceTlb for Tlb {
    fn limits(&self) -> Limits {
        Limits {
            entry_sizes: PageSizes::FOUR_KIB | PageSizes::TWO_MIB,
            pages_per_command: invalidate::MOST,
            commands_per_batch: 4,
            full_flush_cost: 4,
        }
    }

    fn issue(&self, command: FlushCommand) -> Issue {
        match queue(&self.0, command) {
            Ok(true) => Issue::Queued,
            // A device that is gone has no room either: the engine's deadlines lead to the reset, which says so.
            Ok(false) | Err(_) => Issue::Busy,
        }
    }

    fn dispatch(&self) -> Ticket {
        // A ticket that nothing answers where the doorbell could not be rung.
        Ticket(ring(&self.0).unwrap_or(u64::MAX))
    }

    fn poll(&self, ticket: Ticket) -> Completion {
        if ticket.0 == u64::MAX || self.0.is_dead() {
            return Completion::Failed;
        }
        match is_answered(&self.0, ticket.0) {
            Ok(true) => Completion::Done,
            Ok(false) => Completion::Pending,
            Err(_) => Completion::Failed,
        }
    }

    fn reset(&self, deadline: Duration) -> Result<(), ResetError> {
        let core = &*self.0;
        // Another's reset takes no longer than its own deadline.
        let _one = core.reset.lock().unwrap_or_else(PoisonError::into_inner);
        core.begin_reset();
        let gone = |_| ResetError::Timeout { deadline };
        let (begun, mut backoff) = (Instant::now(), Backoff::default());
        core.registers.write(RESET, 1).map_err(gone)?;
        while core.registers.read(RESET).map_err(gone)? != 0 {
            if begun.elapsed() >= deadline {
                return Err(ResetError::Timeout { deadline });
            }
            backoff.wait();
        }
        let mut flushes = core.flushes();
        flushes.forget(|_| true);
        flushes.queued = None;
        core.end_reset();
        Ok(())
    }
}
