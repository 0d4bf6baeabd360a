//! 5000 foreign unmaps of a page that a device hammers: no access through an entry whose page is gone, and many without a source.

#[path = "support/child.rs"]
mod child;
#[path = "support/foreign.rs"]
mod foreign;
mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use child::in_child;
use foreign::*;
use shootdown::*;
use support::short;

const UNMAPS: u64 = 5000;

/// A device with a TLB of one entry. Its accesses go through the entry, with the lock held: a flush waits for the one in flight.
struct Tlb {
    page: Range,
    cached: Arc<Mutex<bool>>,
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

    fn issue(&self, command: FlushCommand) -> Issue {
        let hit = match command.scope {
            Scope::Pages { range, .. } => range.overlaps(self.page),
            _ => true,
        };
        if hit {
            *self.cached.lock().unwrap() = false;
        }
        Issue::Queued
    }

    fn dispatch(&self) -> Ticket {
        Ticket(1)
    }

    fn poll(&self, _: Ticket) -> Completion {
        Completion::Done
    }
}

/// Under whose lock the device installs its entry.
#[derive(Default)]
struct Driver(NotifierLock<()>);

impl Notifier for Driver {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        drop(self.0.lock_for(op)?);
        Ok(op.idle())
    }
}

/// How many accesses were made, and how many of them through an entry whose page was gone.
fn storm(watch: bool) -> (u64, u64) {
    let memory = Arc::new(ProcessMemory::reserve(1 << 30).unwrap());
    let arena = memory.arena();
    let space = AddressSpace::managed(memory, short());
    let unotify = || space.watch(Arc::new(Unotify::new()), arena).unwrap();
    let _watched = watch.then(unotify);
    let page = space.map(Map::anonymous(PAGE)).unwrap();
    let cached = Arc::new(Mutex::new(false));
    let tlb = Tlb {
        page,
        cached: cached.clone(),
    };
    let device = Device::new("hammer", tlb);
    let driver = Arc::new(Driver::default());
    let target = Target { device, tag: 0 };
    let registration = space.register(page, driver.clone(), &[target]).unwrap();
    let (stop, accesses, stale) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(SeqCst) {
                let entry = cached.lock().unwrap();
                if *entry {
                    // The page is there for as long as the entry is, or the entry is stale.
                    stale.fetch_add(u64::from(!is_mapped(page)), SeqCst);
                    accesses.fetch_add(1, SeqCst);
                    drop(entry);
                    // A flush gets the lock too.
                    thread::yield_now();
                    continue;
                }
                drop(entry);
                let Ok(fault) = registration.begin(page, Duration::from_secs(1)) else {
                    continue;
                };
                // The walk of the page table.
                let present = is_mapped(page);
                let lock = driver.0.lock();
                if present && !fault.retry(&lock) {
                    *cached.lock().unwrap() = true;
                }
            }
        });
        for _ in 0..UNMAPS {
            assert!(map_fixed(page));
            touch(page);
            // The device has it cached.
            let before = accesses.load(SeqCst);
            while accesses.load(SeqCst) == before {
                thread::yield_now();
            }
            assert_eq!(munmap(page), Ok(0));
            // And the device goes on.
            thread::yield_now();
        }
        stop.store(true, SeqCst);
    });
    (accesses.load(SeqCst), stale.load(SeqCst))
}

#[test]
fn no_access_is_stale_where_foreign_unmaps_wait() {
    if in_child("no_access_is_stale_where_foreign_unmaps_wait") {
        let (accesses, stale) = storm(true);
        eprintln!("unotify: {stale} stale of {accesses} accesses, {UNMAPS} foreign unmaps");
        assert_eq!(stale, 0);
    }
}

#[test]
fn without_a_source_the_same_storm_finds_stale_accesses() {
    let (accesses, stale) = storm(false);
    eprintln!("no source: {stale} stale of {accesses} accesses, {UNMAPS} foreign unmaps");
    assert!(stale > 0);
}
