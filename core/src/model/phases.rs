//! Issue, doorbell, acknowledgement: two threads over one device.

use std::sync::Arc as StdArc;
use std::time::Duration;

use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

use super::{Probe, Tally, check, page, space};
use crate::addr::PageSizes;
use crate::notifier::{Cause, Outcome};
use crate::tlb::{Completion, DeviceTlb, FlushCommand, Issue, Limits, ResetError, Ticket};
use crate::{AddressSpace, Device, Target};

/// What driver and device share.
struct Registers {
    issued: AtomicUsize,
    /// The doorbell: how many of those the device has been told of.
    rung: AtomicUsize,
    done: AtomicUsize,
    looked: AtomicUsize,
    /// The entries of the device's TLB.
    entries: Tally,
}

impl Registers {
    /// The device: the first look at it finds it at work, the next one that it has done all that it had been told of.
    fn work(&self) {
        if self.looked.fetch_add(1, Ordering::Relaxed) > 0 {
            let rung = self.rung.load(Ordering::Acquire);
            self.entries.0.store(0, Ordering::Relaxed);
            self.done.fetch_max(rung, Ordering::Release);
        }
    }
}

struct Tlb(StdArc<Registers>);

impl DeviceTlb for Tlb {
    fn limits(&self) -> Limits {
        Limits {
            entry_sizes: PageSizes::FOUR_KIB,
            pages_per_command: 1,
            commands_per_batch: 1,
            full_flush_cost: 1,
        }
    }

    fn issue(&self, _: FlushCommand) -> Issue {
        self.0.issued.fetch_add(1, Ordering::AcqRel);
        Issue::Queued
    }

    fn dispatch(&self) -> Ticket {
        let issued = self.0.issued.load(Ordering::Acquire);
        self.0.rung.fetch_max(issued, Ordering::AcqRel);
        Ticket(issued as u64)
    }

    fn poll(&self, ticket: Ticket) -> Completion {
        self.0.work();
        if self.0.done.load(Ordering::Acquire) as u64 >= ticket.0 {
            Completion::Done
        } else {
            Completion::Pending
        }
    }

    fn reset(&self, _: Duration) -> Result<(), ResetError> {
        Err(ResetError::Unsupported)
    }
}

/// R21: whoever rings the doorbell for it, a flush counts when the device has acknowledged it, and not before.
#[test]
fn pages_change_after_the_acknowledgement_of_their_flush() {
    check(2, || {
        let (space, probe) = (space(), Probe::new());
        let registers = StdArc::new(Registers {
            issued: AtomicUsize::new(0),
            rung: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            looked: AtomicUsize::new(0),
            entries: Tally(AtomicUsize::new(1)),
        });
        let target = Target {
            device: Device::new("modelled", Tlb(registers.clone())),
            tag: 0,
        };
        let registration = space.register(page(1), probe, &[target]).unwrap();
        let change = |space: &AddressSpace, registers: &Registers| {
            let open = space.begin_invalidation(page(1), Cause::External).unwrap();
            assert_eq!(registers.entries.get(), 0, "an entry is left");
            open.end(Outcome::Changed).unwrap();
        };
        let other = {
            let (space, registers) = (space.clone(), registers.clone());
            thread::spawn(move || change(&space, &registers))
        };
        change(&space, &registers);
        other.join().unwrap();
        registration.unregister().unwrap();
    });
}
