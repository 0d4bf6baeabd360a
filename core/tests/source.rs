//! What a driver needs and what watches its space, compared. The source here is a fake, as a third party would write one.

mod support;

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use shootdown::*;
use support::*;

/// Tells what the test has it tell.
struct Fake {
    declares: fn(Operation) -> Sees,
    sinks: Mutex<Vec<Arc<Sink>>>,
    settled: AtomicU64,
    renewed: Mutex<Vec<Range>>,
}

impl Fake {
    fn new(declares: fn(Operation) -> Sees) -> Arc<Self> {
        Arc::new(Self {
            declares,
            sinks: Mutex::default(),
            settled: AtomicU64::new(0),
            renewed: Mutex::default(),
        })
    }
}

impl Source for Fake {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn declares(&self, operation: Operation) -> Sees {
        (self.declares)(operation)
    }

    fn start(&self, sinks: &[Arc<Sink>]) -> Result<(), SourceError> {
        self.sinks.lock().unwrap().extend_from_slice(sinks);
        Ok(())
    }

    fn stop(&self, sink: &Arc<Sink>) {
        self.sinks
            .lock()
            .unwrap()
            .retain(|one| !Arc::ptr_eq(one, sink));
    }

    fn settle(&self) {
        self.settled.fetch_add(1, SeqCst);
    }

    fn renew(&self, range: Range) {
        self.renewed.lock().unwrap().push(range);
    }
}

/// A driver that needs what the test says.
struct Driver(Needs, Operations);

impl Notifier for Driver {
    fn needs(&self) -> Needs {
        self.0
    }

    fn operations(&self) -> Operations {
        self.1
    }
}

fn register(space: &AddressSpace, needs: Needs, operations: Operations) -> Result<(), InsertError> {
    let range = Range::new(0x10_0000u64, 0x1000).unwrap();
    register_at(space, range, needs, operations)
}

fn register_at(
    space: &AddressSpace,
    range: Range,
    needs: Needs,
    operations: Operations,
) -> Result<(), InsertError> {
    let driver = Arc::new(Driver(needs, operations));
    space.register(range, driver, &[]).map(|_| ())
}

fn shortfall(result: Result<(), InsertError>) -> Shortfall {
    match result {
        Err(InsertError::Uncovered(shortfall)) => shortfall,
        other => panic!("{other:?}"),
    }
}

#[test]
fn without_a_source_only_those_are_refused_who_ask_for_one() {
    let space = AddressSpace::without_memory(short());
    let needs = Needs::BEFORE_AND_BARRIER;
    register(&space, needs, Operations::CALLS).unwrap();
    let refused = shortfall(register(&space, needs | Needs::FOREIGN, Operations::CALLS));
    assert_eq!(refused.would_do, Some("unotify"));
    assert_eq!(refused.operation, Operation::Munmap);
    assert_eq!(refused.sees, Sees::empty());
    assert!(
        refused.to_string().contains("the source unotify would do"),
        "{refused}"
    );
    // Nothing sees what an io_uring does as a barrier.
    let refused = shortfall(register(&space, needs | Needs::FOREIGN, Operations::all()));
    assert_eq!(refused.would_do, None);
    assert!(
        refused.to_string().contains("tolerates faults"),
        "{refused}"
    );
    let tolerant = needs | Needs::FOREIGN | Needs::TOLERATES_FAULTS;
    register(&space, tolerant, Operations::all()).unwrap();
}

#[test]
fn a_source_that_is_not_seen_to_do_what_it_declares_does_not_count() {
    let space = AddressSpace::without_memory(short());
    let all = Range::new(0u64, 1 << 40).unwrap();
    let fake = Fake::new(|_| Sees::TOLD | Sees::BEFORE | Sees::BARRIER);
    let watched = space.watch(fake.clone(), all).unwrap();
    let refused = shortfall(register(&space, Needs::BEFORE, Operations::MUNMAP));
    assert_eq!(refused.sees, Sees::empty(), "it told of nothing");
    let munmap = watched
        .self_test()
        .iter()
        .find(|one| one.operation == Operation::Munmap);
    assert_eq!(munmap.unwrap().seen, Seen::Told(Sees::empty()));
    // What could not be tried is taken at its word.
    register(&space, Needs::BEFORE_AND_BARRIER, Operations::BRK).unwrap();
    let refused = shortfall(register(&space, Needs::END, Operations::BRK));
    assert_eq!(refused.operation, Operation::Brk);
    assert_eq!(fake.sinks.lock().unwrap().len(), 1, "the self-test is over");
    watched.stop().map_err(|(_, error)| error).unwrap();
    assert!(fake.sinks.lock().unwrap().is_empty());
    register(&space, Needs::END, Operations::CALLS).unwrap();
}

#[test]
fn what_loses_now_and_then_is_not_enough() {
    let space = AddressSpace::without_memory(short());
    let all = Range::new(0u64, 1 << 40).unwrap();
    let fake = Fake::new(|_| Sees::TOLD | Sees::BEFORE | Sees::LOSSY);
    let _watched = space.watch(fake, all).unwrap();
    let refused = shortfall(register(&space, Needs::BEFORE, Operations::BRK));
    assert!(refused.sees.contains(Sees::LOSSY));
}

#[test]
fn only_what_is_watched_counts() {
    let space = AddressSpace::without_memory(short());
    let elsewhere = Range::new(1u64 << 30, 0x1000).unwrap();
    let fake = Fake::new(|_| Sees::TOLD | Sees::BEFORE);
    let _watched = space.watch(fake, elsewhere).unwrap();
    let refused = shortfall(register(&space, Needs::BEFORE, Operations::BRK));
    assert_eq!(refused.sees, Sees::empty());
}

#[test]
fn a_driver_that_registers_everything_needs_the_arena_to_be_watched() {
    let memory = Arc::new(ProcessMemory::reserve(1 << 30).unwrap());
    let arena = memory.arena();
    let space = AddressSpace::managed(memory, short());
    let part = Range::new(arena.start(), 1 << 29).unwrap();
    let beyond = Range::new(arena.last().get() - 0xfff, 0x2000).unwrap();
    let all = |range| register_at(&space, range, Needs::BEFORE, Operations::BRK);
    let watch = |range| space.watch(Fake::new(|_| Sees::TOLD | Sees::BEFORE), range);
    let half = watch(part).unwrap();
    shortfall(all(Range::ALL));
    drop(half);
    let _whole = watch(arena).unwrap();
    all(Range::ALL).unwrap();
    shortfall(all(beyond));
}

#[test]
fn a_source_tells_handlers_and_is_told_of_new_mappings() {
    let memory = Arc::new(ProcessMemory::reserve(1 << 30).unwrap());
    let arena = memory.arena();
    let space = AddressSpace::managed(memory, short());
    let fake = Fake::new(|_| Sees::empty());
    let watched = space.watch(fake.clone(), arena).unwrap();
    let buffer = space.map(Map::anonymous(0x4000)).unwrap();
    assert!(fake.renewed.lock().unwrap().contains(&buffer));
    let handler = Arc::new(Tolerant::default());
    let before = fake.settled.load(SeqCst);
    let registration = space.register(buffer, handler.clone(), &[]).unwrap();
    assert_eq!(
        fake.settled.load(SeqCst),
        before + 1,
        "late news come first (R29)"
    );
    let sink = fake.sinks.lock().unwrap()[0].clone();
    let change = sink.begin(Range::ALL, Cause::Unmap).unwrap().unwrap();
    assert_eq!(handler.0.starts.load(SeqCst), 1);
    change.end(Outcome::Unchanged).unwrap();
    assert_eq!(handler.0.unchanged.load(SeqCst), 1);
    sink.lost().unwrap();
    assert_eq!(handler.0.starts.load(SeqCst), 2);
    let outside = Range::new(0u64, 0x1000).unwrap();
    assert!(sink.begin(outside, Cause::Unmap).unwrap().is_none());
    drop(registration);
    drop(watched);
    let misaligned = Range::new(1u64, 0x1000).unwrap();
    assert!(matches!(
        space.watch(fake, misaligned),
        Err(SourceError::Misaligned { .. })
    ));
}

#[derive(Default)]
struct Tolerant(Counting);

impl Notifier for Tolerant {
    fn needs(&self) -> Needs {
        Needs::TOLERATES_FAULTS
    }

    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        self.0.quiesce(op)
    }

    fn end(&self, op: &Op<'_>, outcome: Outcome) {
        self.0.end(op, outcome);
    }
}

#[test]
fn a_source_that_is_dropped_inside_a_callback_stops_elsewhere() {
    let space = AddressSpace::without_memory(short());
    let all = Range::new(0u64, 1 << 40).unwrap();
    let fake = Fake::new(|_| Sees::empty());
    let watched = space.watch(fake.clone(), all).unwrap();
    let open = space.begin_invalidation(all, Cause::External).unwrap();
    let (watched, refused) = watched.stop().unwrap_err();
    assert!(matches!(refused, Refused::InCallback { .. }));
    drop(watched);
    open.end(Outcome::Changed).unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    while !fake.sinks.lock().unwrap().is_empty() {
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    }
}
