//! uffd: what the kernel tells of unmapped and discarded pages, late.

#[path = "support/child.rs"]
mod child;
#[path = "support/foreign.rs"]
mod foreign;
mod support;

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use child::in_child;
use foreign::*;
use shootdown::*;
use support::*;

/// One at a time: the events are of this process.
static ONE: Mutex<()> = Mutex::new(());

#[derive(Default)]
struct Handler {
    starts: AtomicU64,
    ends: AtomicU64,
    slow: AtomicU64,
    inside: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Notifier for Handler {
    fn needs(&self) -> Needs {
        Needs::TOLERATES_FAULTS
    }

    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        self.starts.fetch_add(1, SeqCst);
        thread::sleep(Duration::from_millis(self.slow.load(SeqCst)));
        let inside = self.inside.lock().unwrap().take();
        if let Some(inside) = inside {
            inside();
        }
        Ok(op.idle())
    }

    fn end(&self, _: &Op<'_>, _: Outcome) {
        self.ends.fetch_add(1, SeqCst);
    }
}

struct Rig {
    space: AddressSpace,
    watched: Watched,
    buffer: Range,
    handler: Arc<Handler>,
    _registration: Registration,
}

fn rig() -> Rig {
    let memory = Arc::new(ProcessMemory::reserve(1 << 30).unwrap());
    let arena = memory.arena();
    let space = AddressSpace::managed(memory, short());
    let watched = space.watch(Arc::new(Uffd::new()), arena).unwrap();
    let buffer = space.map(Map::anonymous(256 * PAGE)).unwrap();
    touch(buffer);
    let handler = Arc::new(Handler::default());
    let _registration = space.register(buffer, handler.clone(), &[]).unwrap();
    Rig {
        space,
        watched,
        buffer,
        handler,
        _registration,
    }
}

fn eventually(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn the_self_test_sees_what_is_declared_and_no_barrier() {
    let _one = ONE.lock();
    let rig = rig();
    for tried in rig.watched.self_test() {
        let Seen::Told(seen) = &tried.seen else {
            continue;
        };
        assert!(seen.contains(tried.declares), "{}: {seen}", tried.operation);
        assert!(
            !tried.counts().contains(Sees::BARRIER),
            "{}",
            tried.operation
        );
        if tried.operation == Operation::Munmap {
            assert!(!seen.contains(Sees::BEFORE), "the pages are gone by then");
        }
    }
}

#[test]
fn a_driver_that_needs_a_barrier_is_refused() {
    let _one = ONE.lock();
    let rig = rig();
    let refused = rig
        .space
        .register(rig.buffer, Arc::new(Counting::default()), &[]);
    let Err(InsertError::Uncovered(shortfall)) = refused else {
        panic!("{refused:?}");
    };
    assert_eq!(shortfall.operation, Operation::Munmap);
    assert_eq!(shortfall.would_do, Some("unotify"));
    assert_eq!(
        shortfall.to_string(),
        format!(
            "{} is not watched well enough: of munmap the driver needs before+barrier, and what watches the space gives \
             \"late+end\"; the source unotify would do, or `needs` that ask for less",
            rig.buffer
        )
    );
}

#[test]
fn a_driver_that_needs_less_is_not_refused() {
    struct Late(Needs, Operations);
    impl Notifier for Late {
        fn needs(&self) -> Needs {
            self.0
        }
        fn operations(&self) -> Operations {
            self.1
        }
    }
    let _one = ONE.lock();
    let rig = rig();
    let register = |needs, operations| {
        let driver = Arc::new(Late(needs, operations));
        rig.space.register(rig.buffer, driver, &[]).map(drop)
    };
    let moves = Operations::MUNMAP | Operations::MAP_FIXED | Operations::MREMAP_MOVE;
    assert_eq!(register(Needs::END, moves), Ok(()));
    assert_eq!(
        register(Needs::empty(), moves | Operations::DONTNEED),
        Ok(())
    );
    let refused = register(Needs::END, moves | Operations::DONTNEED).unwrap_err();
    assert!(
        refused
            .to_string()
            .contains("of madvise DONTNEED the driver needs"),
        "{refused}"
    );
    let unseen = register(Needs::empty(), Operations::MPROTECT).unwrap_err();
    assert!(
        unseen.to_string().contains("the source unotify would do"),
        "{unseen}"
    );
}

#[test]
fn foreign_changes_are_told_and_own_ones_once() {
    let _one = ONE.lock();
    let rig = rig();
    let told = |nth| eventually("told", || rig.handler.ends.load(SeqCst) >= nth);
    assert_eq!(munmap(page(rig.buffer, 0)), Ok(0));
    told(1);
    let dontneed = [start(page(rig.buffer, 1)), PAGE as usize, 4, 0, 0, 0];
    assert_eq!(raw(libc::SYS_madvise, dontneed), Ok(0));
    told(2);
    // What is mapped over it is watched in its turn.
    for nth in 3..6 {
        assert!(map_fixed(page(rig.buffer, 2)));
        told(nth);
    }
    assert_eq!(rig.handler.starts.load(SeqCst), 5);
    rig.space.unmap(page(rig.buffer, 3)).unwrap();
    rig.space.discard(page(rig.buffer, 4)).unwrap();
    let again = rig
        .space
        .map(Map::anonymous(PAGE).at(page(rig.buffer, 3).start()))
        .unwrap();
    assert_eq!(rig.handler.starts.load(SeqCst), 7, "not told a second time");
    // And the new mapping is watched.
    touch(again);
    assert_eq!(munmap(again), Ok(0));
    told(8);
    assert_eq!(rig.handler.starts.load(SeqCst), 8);
}

#[test]
fn a_handler_may_unmap_what_is_watched_and_holds_nobody_up() {
    if !in_child("a_handler_may_unmap_what_is_watched_and_holds_nobody_up") {
        return;
    }
    let rig = rig();
    let own = page(rig.buffer, 9);
    let (inside, is_inside) = mpsc::channel();
    let (go, may_go) = mpsc::channel();
    *rig.handler.inside.lock().unwrap() = Some(Box::new(move || {
        // Somebody has to read that, and it is not this thread.
        assert_eq!(munmap(own), Ok(0));
        inside.send(()).unwrap();
        may_go.recv().unwrap();
    }));
    let parts: Vec<Range> = (0..5).map(|nth| page(rig.buffer, nth)).collect();
    assert_eq!(munmap(parts[0]), Ok(0));
    is_inside.recv_timeout(Duration::from_secs(20)).unwrap();
    for part in &parts[1..] {
        assert_eq!(munmap(*part), Ok(0));
    }
    // One thread tells, the other reads.
    assert_eq!(rig.handler.ends.load(SeqCst), 0);
    go.send(()).unwrap();
    eventually("told", || rig.handler.ends.load(SeqCst) == 6);
    // The one that was busy reads when this one is.
    let (inside, is_inside) = mpsc::channel();
    *rig.handler.inside.lock().unwrap() = Some(Box::new(move || {
        assert_eq!(munmap(page(rig.buffer, 10)), Ok(0));
        inside.send(()).unwrap();
    }));
    assert_eq!(munmap(page(rig.buffer, 5)), Ok(0));
    is_inside.recv_timeout(Duration::from_secs(20)).unwrap();
    eventually("told", || rig.handler.ends.load(SeqCst) == 8);
    rig.watched.stop().map_err(|(_, refused)| refused).unwrap();
}

#[test]
fn late_news_are_not_told_to_whoever_comes_after() {
    let _one = ONE.lock();
    let rig = rig();
    // The server is busy with the first; the second waits in its queue, and its range is mapped again.
    rig.handler.slow.store(50, SeqCst);
    assert_eq!(munmap(page(rig.buffer, 0)), Ok(0));
    assert_eq!(munmap(page(rig.buffer, 1)), Ok(0));
    assert!(map_fixed(page(rig.buffer, 1)));
    let newcomer = Arc::new(Handler::default());
    let _new = rig
        .space
        .register(page(rig.buffer, 1), newcomer.clone(), &[])
        .unwrap();
    thread::sleep(Duration::from_millis(150));
    assert_eq!(
        newcomer.starts.load(SeqCst),
        0,
        "its own mapping is untouched"
    );
    rig.handler.slow.store(0, SeqCst);
    assert_eq!(munmap(page(rig.buffer, 1)), Ok(0));
    eventually("its own end is told", || newcomer.ends.load(SeqCst) == 1);
}

#[test]
fn more_than_the_queue_holds_flushes_everything() {
    let _one = ONE.lock();
    let rig = rig();
    rig.handler.slow.store(400, SeqCst);
    assert_eq!(munmap(page(rig.buffer, 0)), Ok(0));
    eventually("the server is busy", || {
        rig.handler.starts.load(SeqCst) == 1
    });
    let witness = Arc::new(Handler::default());
    // Inserted without waiting for the server: inside a callback nobody waits.
    let prepared = rig
        .space
        .prepare(page(rig.buffer, 200), witness.clone(), &[])
        .unwrap();
    let open = rig
        .space
        .begin_invalidation(page(rig.buffer, 255), Cause::External);
    let _late = prepared.insert().unwrap();
    drop(open);
    for _ in 0..1100 {
        assert_eq!(
            raw(
                libc::SYS_madvise,
                [start(page(rig.buffer, 1)), PAGE as usize, 4, 0, 0, 0]
            ),
            Ok(0)
        );
    }
    rig.handler.slow.store(0, SeqCst);
    eventually("everything", || witness.ends.load(SeqCst) >= 1);
}

#[test]
fn a_release_may_unmap_what_is_watched() {
    struct Unmaps(Range, Arc<AtomicU64>);
    impl Notifier for Unmaps {
        fn needs(&self) -> Needs {
            Needs::TOLERATES_FAULTS
        }
        fn release(&self) {
            assert_eq!(munmap(self.0), Ok(0));
            self.1.fetch_add(1, SeqCst);
        }
    }
    struct GivesUp(Mutex<Option<Registration>>);
    impl Notifier for GivesUp {
        fn needs(&self) -> Needs {
            Needs::TOLERATES_FAULTS
        }
        fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
            if let Some(other) = self.0.lock().unwrap().take() {
                other.unregister().unwrap();
            }
            Ok(op.idle())
        }
    }
    let _one = ONE.lock();
    let rig = rig();
    let released = Arc::new(AtomicU64::new(0));
    let unmaps = Arc::new(Unmaps(page(rig.buffer, 9), released.clone()));
    let other = rig
        .space
        .register(page(rig.buffer, 8), unmaps, &[])
        .unwrap();
    let gives_up = Arc::new(GivesUp(Mutex::new(Some(other))));
    let _mine = rig
        .space
        .register(page(rig.buffer, 7), gives_up, &[])
        .unwrap();
    assert_eq!(munmap(page(rig.buffer, 7)), Ok(0));
    eventually("released on the server's thread", || {
        released.load(SeqCst) == 1
    });
}

#[test]
fn it_stops_while_events_are_pending() {
    let _one = ONE.lock();
    let rig = rig();
    rig.handler.slow.store(20, SeqCst);
    let buffer = rig.buffer;
    let others: Vec<_> = (0..8)
        .map(|nth| thread::spawn(move || munmap(page(buffer, nth))))
        .collect();
    eventually("it has begun", || rig.handler.starts.load(SeqCst) > 0);
    rig.watched.stop().map_err(|(_, error)| error).unwrap();
    let told = rig.handler.starts.load(SeqCst);
    assert_eq!(rig.handler.ends.load(SeqCst), told);
    for other in others {
        assert_eq!(other.join().unwrap(), Ok(0), "nobody hangs");
    }
    assert_eq!(munmap(page(rig.buffer, 20)), Ok(0));
    thread::sleep(Duration::from_millis(20));
    assert_eq!(
        rig.handler.starts.load(SeqCst),
        told,
        "and nothing is told any more"
    );
}

#[test]
fn registrations_split_no_mapping() {
    let _one = ONE.lock();
    let rig = rig();
    let mappings = || {
        std::fs::read_to_string("/proc/self/maps")
            .unwrap()
            .lines()
            .count()
    };
    let before = mappings();
    let handler = Arc::new(Handler::default());
    let many: Vec<_> = (0..100_000)
        .map(|nth| page(rig.buffer, nth))
        .map(|range| rig.space.register(range, handler.clone(), &[]).unwrap())
        .collect();
    // The allocator has some of its own.
    assert!(mappings() < before + 40, "{before}, then {}", mappings());
    assert_eq!(munmap(page(rig.buffer, 17)), Ok(0));
    eventually("who is there is told", || handler.ends.load(SeqCst) == 1);
    assert_eq!(many.len(), 100_000);
}

/// Somebody registers with a lock of his driver held, which a release on another thread takes.
#[test]
fn a_registration_waits_for_no_release() {
    struct Locks(Arc<Mutex<()>>, Arc<AtomicU64>);
    impl Notifier for Locks {
        fn needs(&self) -> Needs {
            Needs::TOLERATES_FAULTS
        }
        fn release(&self) {
            self.1.store(1, SeqCst);
            drop(self.0.lock().unwrap());
            self.1.store(2, SeqCst);
        }
    }
    struct GivesUp(Mutex<Option<Registration>>);
    impl Notifier for GivesUp {
        fn needs(&self) -> Needs {
            Needs::TOLERATES_FAULTS
        }
        fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
            if let Some(other) = self.0.lock().unwrap().take() {
                other.unregister().unwrap();
            }
            Ok(op.idle())
        }
    }
    let _one = ONE.lock();
    let rig = rig();
    let step = Arc::new(AtomicU64::new(0));
    let of_driver = Arc::new(Mutex::new(()));
    let locks = Arc::new(Locks(of_driver.clone(), step.clone()));
    let other = rig.space.register(page(rig.buffer, 8), locks, &[]).unwrap();
    let gives_up = Arc::new(GivesUp(Mutex::new(Some(other))));
    let _mine = rig
        .space
        .register(page(rig.buffer, 7), gives_up, &[])
        .unwrap();
    let handler = Arc::new(Handler::default());
    let prepared = rig
        .space
        .prepare(page(rig.buffer, 20), handler, &[])
        .unwrap();
    let (done, over) = std::sync::mpsc::channel();
    let buffer = rig.buffer;
    thread::spawn(move || {
        let guard = of_driver.lock().unwrap();
        assert_eq!(munmap(page(buffer, 7)), Ok(0));
        eventually("the release has begun", || step.load(SeqCst) == 1);
        let registration = prepared.insert().unwrap();
        drop(guard);
        eventually("the release is over", || step.load(SeqCst) == 2);
        done.send(registration).unwrap();
    });
    over.recv_timeout(Duration::from_secs(20))
        .expect("a deadlock");
}

/// Each fork that is told comes with a descriptor for the child's memory.
#[test]
fn a_fork_goes_on_where_no_descriptors_are_left() {
    if !in_child("a_fork_goes_on_where_no_descriptors_are_left") {
        return;
    }
    // Memory of somebody who lets children have it.
    let args = [0, 4 * PAGE as usize, 3, 0x22, usize::MAX, 0];
    let at = raw(libc::SYS_mmap, args).unwrap();
    let buffer = Range::new(at as u64, 4 * PAGE).unwrap();
    touch(buffer);
    let space = AddressSpace::without_memory(short());
    let watched = space.watch(Arc::new(Uffd::new()), buffer).unwrap();
    let handler = Arc::new(Handler::default());
    let _registration = space.register(buffer, handler.clone(), &[]).unwrap();
    let told = watched.self_test().iter();
    let mut told = told.filter(|one| one.operation == Operation::Fork);
    if !told.any(|one| one.declares.contains(Sees::TOLD)) {
        eprintln!("SKIPPED: forks are told to the privileged only");
        return;
    }
    // SAFETY: numbers and a structure of this frame.
    unsafe {
        let limit = libc::rlimit {
            rlim_cur: 64,
            rlim_max: 64,
        };
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &limit), 0);
        while libc::dup(2) >= 0 {}
    }
    let (done, over) = std::sync::mpsc::channel();
    thread::spawn(move || {
        for _ in 0..3 {
            // SAFETY: the child ends at once.
            let child = unsafe { libc::fork() };
            if child == 0 {
                // SAFETY: as above.
                unsafe { libc::_exit(0) };
            }
            // SAFETY: the child just made.
            unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
        }
        done.send(()).unwrap();
    });
    over.recv_timeout(Duration::from_secs(10))
        .expect("the fork hangs");
    eventually("each is told", || handler.ends.load(SeqCst) >= 3);
}
