//! A fake device, to be held by the test: it logs what it is told and acknowledges as the test says.
#![allow(dead_code, reason = "each test file uses its own part of this module")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use shootdown::{
    AddressSpace, Completion, Deadlines, Device, DeviceTlb, FlushCommand, Issue, Limits, Notifier,
    Op, Outcome, PageSizes, ProcessMemory, ResetError, Scope, Target, Ticket, WouldBlock,
};

/// What a [`FakeTlb`] does.
#[derive(Default)]
pub(crate) struct Behaviour {
    /// Never acknowledges range flushes.
    pub(crate) loses_ranges: AtomicBool,
    /// Never acknowledges anything.
    pub(crate) loses_all: AtomicBool,
    /// Has a reset.
    pub(crate) resets: AtomicBool,
    /// Commands, in order.
    pub(crate) log: Mutex<Vec<FlushCommand>>,
    pub(crate) issued: AtomicU64,
    pub(crate) dispatched: AtomicU64,
    pub(crate) polls: AtomicU64,
}

pub(crate) struct FakeTlb(pub(crate) Arc<Behaviour>);

impl DeviceTlb for FakeTlb {
    fn limits(&self) -> Limits {
        Limits {
            entry_sizes: PageSizes::all(),
            pages_per_command: 1024,
            commands_per_batch: 8,
            full_flush_cost: 4,
        }
    }

    fn issue(&self, command: FlushCommand) -> Issue {
        let mut log = self.0.log.lock().unwrap();
        assert!(
            log.len() < log.capacity(),
            "the test made room for its commands"
        );
        log.push(command);
        self.0.issued.fetch_add(1, Ordering::SeqCst);
        Issue::Queued
    }

    fn dispatch(&self) -> Ticket {
        self.0.dispatched.fetch_add(1, Ordering::SeqCst);
        Ticket(self.0.issued.load(Ordering::SeqCst))
    }

    fn poll(&self, _: Ticket) -> Completion {
        self.0.polls.fetch_add(1, Ordering::SeqCst);
        let whole =
            matches!(self.0.log.lock().unwrap().last(), Some(last) if last.scope == Scope::Device);
        let lost = self.0.loses_all.load(Ordering::SeqCst)
            || self.0.loses_ranges.load(Ordering::SeqCst) && !whole;
        if lost {
            Completion::Pending
        } else {
            Completion::Done
        }
    }

    fn reset(&self, _: Duration) -> Result<(), ResetError> {
        if self.0.resets.load(Ordering::SeqCst) {
            Ok(())
        } else {
            Err(ResetError::Unsupported)
        }
    }
}

pub(crate) fn fake(name: &str) -> (Device, Arc<Behaviour>) {
    let behaviour = Arc::new(Behaviour {
        log: Mutex::new(Vec::with_capacity(1024)),
        ..Behaviour::default()
    });
    (Device::new(name, FakeTlb(behaviour.clone())), behaviour)
}

/// Deadlines that a test can wait for.
pub(crate) fn short() -> Deadlines {
    Deadlines {
        drain: Duration::from_millis(20),
        flush: Duration::from_millis(20),
        full_flush: Duration::from_millis(20),
        reset: Duration::from_millis(20),
        room: Duration::from_millis(200),
        ..Deadlines::default()
    }
}

pub(crate) fn space() -> AddressSpace {
    let memory = ProcessMemory::reserve(1 << 30).unwrap();
    AddressSpace::managed(Arc::new(memory), short())
}

pub(crate) fn on(device: &Device) -> Vec<Target> {
    vec![Target {
        device: device.clone(),
        tag: 7,
    }]
}

/// A handler that counts its calls, and does what the test put into its hook.
#[derive(Default)]
pub(crate) struct Counting {
    pub(crate) starts: AtomicU64,
    pub(crate) ends: AtomicU64,
    pub(crate) releases: AtomicU64,
    pub(crate) unchanged: AtomicU64,
    pub(crate) refuses: AtomicBool,
    pub(crate) panics: AtomicBool,
}

impl Notifier for Counting {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<shootdown::Drain<'o>, WouldBlock> {
        self.starts.fetch_add(1, Ordering::SeqCst);
        if self.panics.load(Ordering::SeqCst) {
            panic!("planned");
        }
        if self.refuses.load(Ordering::SeqCst) && !op.may_block() {
            return Err(WouldBlock);
        }
        Ok(op.idle())
    }

    fn end(&self, _: &Op<'_>, outcome: Outcome) {
        self.ends.fetch_add(1, Ordering::SeqCst);
        self.unchanged
            .fetch_add(u64::from(outcome == Outcome::Unchanged), Ordering::SeqCst);
    }

    fn release(&self) {
        self.releases.fetch_add(1, Ordering::SeqCst);
    }
}
