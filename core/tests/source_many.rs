//! 100 000 registrations in one arena: no kernel mapping is split for them, and each is told, whichever source watches.

#[path = "support/child.rs"]
mod child;
#[path = "support/foreign.rs"]
mod foreign;
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};

use child::in_child;
use foreign::*;
use shootdown::*;
use support::*;

const REGISTRATIONS: u64 = 100_000;

/// Which of the pages of a buffer its handlers were told of.
struct Told {
    buffer: Range,
    pages: Vec<AtomicU8>,
}

struct Handler(Arc<Told>);

impl Notifier for Handler {
    fn needs(&self) -> Needs {
        Needs::TOLERATES_FAULTS
    }

    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        let page = (op.range().start().get() - self.0.buffer.start().get()) / PAGE;
        self.0.pages[page as usize].store(1, Relaxed);
        Ok(op.idle())
    }
}

/// The kernel's mappings of the range.
fn mappings(range: Range) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let overlaps = |line: &&str| {
        let (start, end) = line.split(' ').next().unwrap().split_once('-').unwrap();
        let address = |text| u64::from_str_radix(text, 16).unwrap();
        address(start) <= range.last().get() && range.start().get() < address(end)
    };
    maps.lines().filter(overlaps).count()
}

/// How many of the registrations were told when every page was discarded by somebody else.
fn told(source: Option<Arc<dyn Source>>) -> u64 {
    let memory = Arc::new(ProcessMemory::reserve(1 << 30).unwrap());
    let arena = memory.arena();
    let space = AddressSpace::managed(memory, short());
    let watched = source.map(|source| space.watch(source, arena).unwrap());
    // Every second page is registered.
    let buffer = space.map(Map::anonymous(2 * REGISTRATIONS * PAGE)).unwrap();
    let told = Arc::new(Told {
        buffer,
        pages: (0..2 * REGISTRATIONS).map(|_| AtomicU8::new(0)).collect(),
    });
    let before = mappings(arena);
    let mut registrations = Vec::new();
    for nth in 0..REGISTRATIONS {
        let handler = Arc::new(Handler(told.clone()));
        let registered = space.register(page(buffer, 2 * nth), handler, &[]);
        registrations.push(registered.unwrap());
    }
    assert_eq!(mappings(arena), before, "a registration splits no mapping");
    // Of the 65 530 that a kernel allows by default.
    assert!(before < 16, "{before}");
    for nth in 0..REGISTRATIONS {
        let advice = libc::MADV_DONTNEED as usize;
        let args = [start(page(buffer, 2 * nth)), PAGE as usize, advice, 0, 0, 0];
        raw(libc::SYS_madvise, args).unwrap();
    }
    // A source that is late tells on the way.
    drop(watched);
    let count = |parity: usize| {
        let pages = told.pages.iter().skip(parity).step_by(2);
        pages.filter(|one| one.load(Relaxed) != 0).count() as u64
    };
    assert_eq!(count(1), 0, "nobody is registered there");
    count(0)
}

fn check(test: &str, source: fn() -> Arc<dyn Source>) {
    if in_child(test) {
        let told = told(Some(source()));
        assert_eq!(told, REGISTRATIONS, "each event is told");
    }
}

#[test]
fn unotify_loses_no_event_of_100_000_registrations() {
    check("unotify_loses_no_event_of_100_000_registrations", || {
        Arc::new(Unotify::new())
    });
}

#[test]
fn uffd_loses_no_event_of_100_000_registrations() {
    check("uffd_loses_no_event_of_100_000_registrations", || {
        Arc::new(Uffd::new())
    });
}

#[test]
fn without_a_source_none_of_them_is_told() {
    assert_eq!(told(None), 0);
}
