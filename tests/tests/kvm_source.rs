//! kvm-mmu as a source: it tells of what no other sees, is never taken for a barrier, and what it loses flushes everything.

#[path = "../../core/tests/support/foreign.rs"]
mod foreign;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use foreign::*;
use shootdown::*;
use shootdown_kvm::KvmMmu;

/// Counts what it is told of; while it is slow the reader waits for it.
#[derive(Default)]
struct Handler {
    needs: Option<Needs>,
    told: AtomicU64,
    slow: AtomicBool,
}

impl Notifier for Handler {
    fn needs(&self) -> Needs {
        self.needs.unwrap_or(Needs::TOLERATES_FAULTS)
    }

    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        self.told.fetch_add(1, SeqCst);
        while self.slow.load(SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(op.idle())
    }
}

impl Handler {
    fn await_told(&self) {
        let begun = Instant::now();
        while self.told.load(SeqCst) == 0 {
            assert!(begun.elapsed() < Duration::from_secs(10));
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn what_it_loses_flushes_everything_and_nothing_else_does() {
    let memory = Arc::new(ProcessMemory::reserve(1 << 30).unwrap());
    let arena = memory.arena();
    let space = AddressSpace::managed(memory, Deadlines::default());
    let source = Arc::new(KvmMmu::new());
    let watched = match space.watch(source.clone(), arena) {
        Err(SourceError::NotAvailable { reason, .. }) => return eprintln!("SKIPPED: {reason}"),
        watched => watched.unwrap(),
    };
    // Far from each other: no huge page holds both.
    let buffer = space.map(Map::anonymous(64 << 20)).unwrap();
    let (first, last) = (page(buffer, 0), page(buffer, (64 << 20) / PAGE - 1));
    let (busy, idle) = (Arc::new(Handler::default()), Arc::new(Handler::default()));
    let _busy = space.register(first, busy.clone(), &[]).unwrap();
    let _idle = space.register(last, idle.clone(), &[]).unwrap();
    let discard = || {
        touch(first);
        let advice = libc::MADV_DONTNEED as usize;
        let args = [start(first), PAGE as usize, advice, 0, 0, 0];
        raw(libc::SYS_madvise, args).unwrap();
    };
    (0..100).for_each(|_| discard());
    source.settle();
    assert!(busy.told.load(SeqCst) >= 100);
    assert_eq!(idle.told.load(SeqCst), 0, "nothing has happened there");

    // The reader waits for a handler, and the ring overflows.
    busy.told.store(0, SeqCst);
    busy.slow.store(true, SeqCst);
    discard();
    busy.await_told();
    (0..20_000).for_each(|_| discard());
    busy.slow.store(false, SeqCst);
    source.settle();
    assert!(idle.told.load(SeqCst) > 0, "everything is flushed");
    drop(watched);
}

#[test]
fn it_is_no_barrier() {
    let memory = Arc::new(ProcessMemory::reserve(1 << 30).unwrap());
    let arena = memory.arena();
    let space = AddressSpace::managed(memory, Deadlines::default());
    let _watched = match space.watch(Arc::new(KvmMmu::new()), arena) {
        Err(SourceError::NotAvailable { reason, .. }) => return eprintln!("SKIPPED: {reason}"),
        watched => watched.unwrap(),
    };
    let handler = |needs| {
        let needs = Some(needs);
        Arc::new(Handler {
            needs,
            ..Handler::default()
        })
    };
    let register = |needs| space.register(arena, handler(needs), &[]).map(|_| ());
    match register(Needs::BEFORE_AND_BARRIER) {
        Err(InsertError::Uncovered(shortfall)) => assert_eq!(shortfall.would_do, Some("unotify")),
        other => panic!("{other:?}"),
    }
    register(Needs::TOLERATES_FAULTS).unwrap();
}
