//! Pairs of fences, each alone: one side must see the other, or the checker finds nobody who wakes the sleeper.

use std::sync::Arc as StdArc;
use std::time::Duration;

use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;

use super::{Probe, check, page, space};
use crate::addr::PageSizes;
use crate::events::Events;
use crate::notifier::Cause;
use crate::tlb::{Completion, DeviceTlb, FlushCommand, Issue, Limits, ResetError, Ticket};
use crate::{Device, Target};

/// Dekker's: the end of something, and whoever waits for it (R4). What has ended is stored without any ordering of its own.
#[test]
fn an_end_and_a_waiter_do_not_miss_each_other() {
    check(3, || {
        let (events, over) = (
            StdArc::new(Events::new()),
            StdArc::new(AtomicBool::new(false)),
        );
        let ending = {
            let (events, over) = (events.clone(), over.clone());
            thread::spawn(move || {
                over.store(true, Ordering::Relaxed);
                events.ended();
            })
        };
        assert!(events.wait(None, || over.load(Ordering::Relaxed)));
        ending.join().unwrap();
    });
}

/// Answers nothing.
struct Dead;

impl DeviceTlb for Dead {
    fn limits(&self) -> Limits {
        Limits {
            entry_sizes: PageSizes::FOUR_KIB,
            pages_per_command: 1,
            commands_per_batch: 1,
            full_flush_cost: 1,
        }
    }
    fn issue(&self, _: FlushCommand) -> Issue {
        Issue::Busy
    }
    fn dispatch(&self) -> Ticket {
        Ticket(0)
    }
    fn poll(&self, _: Ticket) -> Completion {
        Completion::Failed
    }
    fn reset(&self, deadline: Duration) -> Result<(), ResetError> {
        Err(ResetError::Timeout { deadline })
    }
}

/// A registration ends beside an invalidation of its range, with its device in quarantine (R20): the invalidation meets the registration,
/// or what is left of it.
#[test]
fn an_invalidation_meets_a_registration_in_quarantine_or_its_ghost() {
    check(2, || {
        let (space, probe) = (space(), Probe::new());
        let device = Device::new("dead", Dead);
        let targets = [Target {
            device: device.clone(),
            tag: 0,
        }];
        let one = space.register(page(1), probe.clone(), &targets).unwrap();
        device.quarantine();
        let ending = thread::spawn(move || one.unregister().unwrap());
        let met = space.begin_invalidation(page(1), Cause::External);
        assert!(
            met.is_err(),
            "the device may reach what the caller takes for cut off"
        );
        ending.join().unwrap();
    });
}
