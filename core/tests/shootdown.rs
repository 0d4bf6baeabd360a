//! The protocol over fake devices and real memory of this process.

mod support;

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use shootdown::{
    Addr, AddressSpace, Cause, FaultError, Gather, Health, InsertError, InvalidateError, Issued,
    Kind, Map, MapError, Notifier, Op, Outcome, PageSize, Range, Rights, Scope, UnregisterError,
    Unregistered,
};
use support::{Counting, fake, on, short, space};

fn store(at: Addr, value: u64) {
    // SAFETY: the test mapped the page for writing.
    unsafe { (at.get() as *mut u64).write_volatile(value) }
}

fn load(at: Addr) -> u64 {
    // SAFETY: the test mapped the page.
    unsafe { (at.get() as *const u64).read_volatile() }
}

#[test]
fn an_unmap_runs_the_handler_and_flushes_the_clipped_range() {
    let space = space();
    let (device, log) = fake("one");
    let buffer = space.map(Map::anonymous(16 << 12)).unwrap();
    let counting = Arc::new(Counting::default());
    let part = Range::new(buffer.start(), 4 << 12).unwrap();
    let registration = space
        .register(part, counting.clone(), &on(&device))
        .unwrap();
    space.unmap(buffer).unwrap();
    assert_eq!(
        (counting.starts.load(SeqCst), counting.ends.load(SeqCst)),
        (1, 1)
    );
    let log = log.log.lock().unwrap();
    assert_eq!(log.len(), 1);
    assert_eq!(log[0].tag, 7);
    assert_eq!(
        log[0].scope,
        Scope::Pages {
            range: part,
            page_size: PageSize::FourKiB
        }
    );
    assert_eq!(registration.unregister().unwrap(), Unregistered::Released);
    assert_eq!(counting.releases.load(SeqCst), 1);
}

#[test]
fn all_devices_are_dispatched_before_any_is_waited_for() {
    let space = space();
    let devices: Vec<_> = (0..8).map(|nth| fake(&format!("device {nth}"))).collect();
    let buffer = space.map(Map::anonymous(1 << 12)).unwrap();
    let registrations: Vec<_> = devices
        .iter()
        .map(|(device, _)| {
            space
                .register(buffer, Arc::new(Counting::default()), &on(device))
                .unwrap()
        })
        .collect();
    space.discard(buffer).unwrap();
    let records = space.records();
    let at = |kind| {
        records
            .iter()
            .position(|record| record.kind == kind)
            .unwrap()
    };
    assert!(at(Kind::Start) < at(Kind::Quiesced) && at(Kind::Quiesced) < at(Kind::Dispatched));
    assert!(at(Kind::Dispatched) < at(Kind::Flushed) && at(Kind::Flushed) < at(Kind::End));
    for (device, behaviour) in &devices {
        assert_eq!(behaviour.dispatched.load(SeqCst), 1, "one doorbell");
        assert_eq!(device.stats().flush_ops, 1);
    }
    drop(registrations);
}

/// Looks at the newest record when it is asked what to flush.
struct Looks {
    space: AddressSpace,
    newest: Mutex<Vec<Kind>>,
}

impl Notifier for Looks {
    fn flush<'o>(&self, _: &Op<'o>, gather: Gather<'o>) -> Issued<'o> {
        let newest = self.space.records().last().map(|record| record.kind);
        self.newest.lock().unwrap().extend(newest);
        gather.all()
    }
}

/// Of an invalidation that hangs the newest record says where.
#[test]
fn that_all_have_quiesced_is_recorded_before_any_is_asked_what_to_flush() {
    let space = space();
    let (device, _) = fake("a");
    let buffer = space.map(Map::anonymous(1 << 12)).unwrap();
    let looks = Arc::new(Looks {
        space: space.clone(),
        newest: Mutex::default(),
    });
    let alone = space.register(buffer, looks.clone(), &on(&device)).unwrap();
    space.discard(buffer).unwrap();
    let other = Arc::new(Counting::default());
    let beside = space.register(buffer, other, &on(&device)).unwrap();
    space.discard(buffer).unwrap();
    drop((alone, beside));
    assert_eq!(*looks.newest.lock().unwrap(), [Kind::Quiesced; 2]);
}

#[test]
fn discard_protect_and_remap_do_what_they_say_to_real_memory() {
    let space = space();
    let buffer = space.map(Map::anonymous(4 << 12)).unwrap();
    store(buffer.start(), 42);
    space.protect(buffer, Rights::READ).unwrap();
    assert_eq!(load(buffer.start()), 42);
    space.protect(buffer, Rights::READ_WRITE).unwrap();
    let to = Addr::new(buffer.start().get() + (64 << 12));
    let moved = space.remap(buffer, to).unwrap();
    assert_eq!(load(moved.start()), 42);
    assert!(matches!(
        space.unmap(buffer),
        Err(MapError::NotMapped { .. })
    ));
    space.discard(moved).unwrap();
    assert_eq!(load(moved.start()), 0);
    space.unmap(moved).unwrap();
}

#[test]
fn a_refused_try_ends_for_whoever_was_started_and_changes_nothing() {
    let space = space();
    let buffer = space.map(Map::anonymous(1 << 12)).unwrap();
    store(buffer.start(), 1);
    let (first, second) = (Arc::new(Counting::default()), Arc::new(Counting::default()));
    second.refuses.store(true, SeqCst);
    let _one = space.register(buffer, first.clone(), &[]).unwrap();
    let _two = space.register(buffer, second.clone(), &[]).unwrap();
    let error = space.try_unmap(buffer).unwrap_err();
    assert!(
        matches!(
            error,
            MapError::Invalidate(InvalidateError::WouldBlock { .. })
        ),
        "{error}"
    );
    for one in [&first, &second] {
        assert_eq!(
            one.starts.load(SeqCst),
            one.ends.load(SeqCst),
            "balanced (R13)"
        );
        assert_eq!(one.unchanged.load(SeqCst), 1);
    }
    assert_eq!(load(buffer.start()), 1);
    space.unmap(buffer).unwrap();
}

#[test]
fn a_lost_completion_is_recovered_by_a_wider_flush() {
    let space = space();
    let (device, behaviour) = fake("loses range flushes");
    behaviour.loses_ranges.store(true, SeqCst);
    let buffer = space.map(Map::anonymous(1 << 12)).unwrap();
    let _registration = space
        .register(buffer, Arc::new(Counting::default()), &on(&device))
        .unwrap();
    space.unmap(buffer).unwrap();
    assert_eq!(device.health(), Health::Healthy);
    let stats = device.stats();
    assert_eq!(
        (
            stats.timeouts,
            stats.recovered_by_flush,
            stats.recovered_by_reset
        ),
        (1, 1, 0)
    );
}

#[test]
fn a_device_that_is_reset_lets_the_pages_go() {
    let space = space();
    let (device, behaviour) = fake("answers to reset only");
    behaviour.loses_all.store(true, SeqCst);
    behaviour.resets.store(true, SeqCst);
    let buffer = space.map(Map::anonymous(1 << 12)).unwrap();
    let _registration = space
        .register(buffer, Arc::new(Counting::default()), &on(&device))
        .unwrap();
    space.unmap(buffer).unwrap();
    assert_eq!(device.stats().recovered_by_reset, 1);
}

#[test]
fn a_dead_device_quarantines_the_pages_and_is_not_waited_for_twice() {
    let space = space();
    let (device, behaviour) = fake("dead");
    behaviour.loses_all.store(true, SeqCst);
    let buffer = space.map(Map::anonymous(2 << 12)).unwrap();
    let page = Range::new(buffer.start(), 1 << 12).unwrap();
    let other = Range::new(buffer.start().get() + (1 << 12), 1 << 12).unwrap();
    store(page.start(), 5);
    let counting = Arc::new(Counting::default());
    let registration = space
        .register(buffer, counting.clone(), &on(&device))
        .unwrap();
    let error = space.unmap(page).unwrap_err();
    assert!(
        matches!(
            error,
            MapError::Invalidate(InvalidateError::Quarantined { .. })
        ),
        "{error}"
    );
    assert_eq!(device.health(), Health::Quarantined);
    assert_eq!(space.quarantined_bytes(), 1 << 12);
    assert_eq!(
        load(page.start()),
        5,
        "the page stays where a late write may hit it"
    );
    let taken = space
        .map(Map::anonymous(1 << 12).at(page.start()))
        .unwrap_err();
    assert!(matches!(taken, MapError::InQuarantine { .. }), "{taken}");
    assert_ne!(
        space.map(Map::anonymous(1 << 12)).unwrap().start(),
        page.start()
    );

    let polls = behaviour.polls.load(SeqCst);
    assert!(space.unmap(other).is_err());
    assert_eq!(behaviour.polls.load(SeqCst), polls, "not waited for again");
    assert!(
        registration.begin(other, Duration::from_secs(1)).is_err(),
        "nothing is installed in it"
    );

    behaviour.loses_all.store(false, SeqCst);
    device.recover(Duration::from_secs(1)).unwrap();
    space.drain().unwrap();
    assert_eq!(space.quarantined_bytes(), 0);
    assert_eq!(
        space.map(Map::anonymous(1 << 12).at(page.start())).unwrap(),
        page
    );
    assert_eq!(counting.starts.load(SeqCst), counting.ends.load(SeqCst));
}

#[test]
fn a_panicking_handler_does_not_keep_the_others_from_running() {
    let space = space();
    let (device, _) = fake("whose handler panics");
    let buffer = space.map(Map::anonymous(1 << 12)).unwrap();
    let (bad, good) = (Arc::new(Counting::default()), Arc::new(Counting::default()));
    bad.panics.store(true, SeqCst);
    let _bad = space.register(buffer, bad.clone(), &on(&device)).unwrap();
    let _good = space.register(buffer, good.clone(), &[]).unwrap();
    let error = space.unmap(buffer).unwrap_err();
    assert!(matches!(
        error,
        MapError::Invalidate(InvalidateError::HandlerPanicked { changed: false, .. })
    ));
    assert_eq!((good.starts.load(SeqCst), good.ends.load(SeqCst)), (1, 1));
    assert_eq!(device.health(), Health::Quarantined);
    assert_eq!(space.quarantined_bytes(), 1 << 12);
}

#[test]
fn an_external_invalidation_drives_the_same_handlers_without_memory() {
    let space = AddressSpace::without_memory(short());
    let counting = Arc::new(Counting::default());
    let top = Range::new(u64::MAX - 0xfff, 0x1000).unwrap();
    let registration = space.register(top, counting.clone(), &[]).unwrap();
    let guard = space
        .begin_invalidation(Range::ALL, Cause::External)
        .unwrap();
    assert_eq!(counting.starts.load(SeqCst), 1);
    assert_eq!(counting.ends.load(SeqCst), 0);
    assert_eq!(
        registration.unregister().unwrap(),
        Unregistered::Deferred,
        "its own use is open"
    );
    assert_eq!(counting.releases.load(SeqCst), 0);
    guard.end(Outcome::Unchanged).unwrap();
    assert_eq!(counting.unchanged.load(SeqCst), 1);
    assert_eq!(
        counting.releases.load(SeqCst),
        1,
        "the last to leave completed it"
    );
    assert!(matches!(
        space.map(Map::anonymous(4096)),
        Err(MapError::NoMemory)
    ));
}

#[test]
fn bad_input_is_a_typed_error_and_changes_nothing() {
    let space = space();
    let buffer = space.map(Map::anonymous(4 << 12)).unwrap();
    let arena_end = Range::new(buffer.start(), 1 << 40).unwrap();
    let odd = Range::new(buffer.start(), 100).unwrap();
    assert!(matches!(
        space.map(Map::anonymous(0)),
        Err(MapError::Range(_))
    ));
    assert!(matches!(
        space.map(Map::anonymous(100)),
        Err(MapError::Misaligned { .. })
    ));
    assert!(matches!(
        space.map(Map::anonymous(1 << 40)),
        Err(MapError::NoRoom { .. })
    ));
    assert!(matches!(
        space.map(Map::anonymous(1 << 21).page_size(PageSize::TwoMiB)),
        Err(MapError::Memory(_))
    ));
    assert!(matches!(space.unmap(odd), Err(MapError::Misaligned { .. })));
    assert!(matches!(
        space.unmap(arena_end),
        Err(MapError::OutsideArena { .. })
    ));
    let more = Range::new(buffer.start(), 8 << 12).unwrap();
    match space.unmap(more) {
        Err(MapError::NotMapped { hole, .. }) => assert_eq!(Some(hole), buffer.end()),
        other => panic!("{other:?}"),
    }
    assert!(matches!(
        space.remap(buffer, buffer.start()),
        Err(MapError::Occupied { .. })
    ));
    space.unmap(buffer).unwrap();
}

#[test]
fn a_second_unregister_is_an_error_and_one_after_exit_is_not() {
    let space = space();
    let range = Range::new(0x1000u64, 0x1000).unwrap();
    let counting = Arc::new(Counting::default());
    let twice = space.register(range, counting.clone(), &[]).unwrap();
    let late = space.register(range, counting.clone(), &[]).unwrap();
    assert_eq!(twice.unregister().unwrap(), Unregistered::Released);
    assert_eq!(
        twice.unregister(),
        Err(UnregisterError::AlreadyUnregistered { range })
    );
    let prepared = space.prepare(range, counting.clone(), &[]);
    space.exit().unwrap();
    assert_eq!(late.unregister().unwrap(), Unregistered::AlreadyGone);
    assert!(matches!(
        prepared.unwrap().insert(),
        Err(InsertError::Exiting { .. })
    ));
    assert!(matches!(
        space.map(Map::anonymous(4096)),
        Err(MapError::Exiting)
    ));
    assert_eq!(counting.releases.load(SeqCst), 2, "once each");
    assert_eq!(space.registrations(), 0);
}

#[test]
fn segments_share_one_registration_and_the_last_put_retires_it() {
    let space = space();
    let counting = Arc::new(Counting::default());
    let make = || {
        let notifier: Arc<dyn Notifier> = counting.clone();
        (Range::ALL, notifier, Vec::new())
    };
    let first = space.share(1, make).unwrap();
    let second = space.share(1, || unreachable!("it is there")).unwrap();
    assert_eq!(first.put().unwrap(), Unregistered::AlreadyGone);
    assert_eq!(space.registrations(), 1);
    let guard = space.lock_write().unwrap();
    assert_eq!(second.put().unwrap(), Unregistered::Quiet);
    assert_eq!(counting.releases.load(SeqCst), 0, "not under the lock");
    drop(guard);
    assert_eq!(counting.releases.load(SeqCst), 1);
    drop((first, second));
    assert_eq!(
        Arc::strong_count(&counting),
        1,
        "nothing keeps a handler that was released"
    );
    let _again = space.share(1, make).unwrap();
    assert_eq!(space.registrations(), 1, "a newcomer makes a new one");
}

#[test]
fn inside_a_callback_a_fault_is_told_to_install_nothing_whatever_its_range() {
    let space = AddressSpace::without_memory(short());
    let page = |nth: u64| Range::new(nth << 12, 1 << 12).unwrap();
    let lock = shootdown::NotifierLock::new(());
    let registration = space
        .register(page(1), Arc::new(Counting::default()), &[])
        .unwrap();
    let mut fault = registration.begin(page(1), Duration::from_secs(1)).unwrap();
    let open = space.begin_invalidation(page(9), Cause::External).unwrap();
    assert!(fault.retry(&lock.lock()));
    assert!(matches!(fault.again(), Err(FaultError::Refused(_))));
    open.end(Outcome::Changed).unwrap();
    assert!(!fault.retry(&lock.lock()));
}

#[test]
fn discard_and_protect_leave_the_map_to_its_readers() {
    let space = space();
    let buffer = space.map(Map::anonymous(2 << 12)).unwrap();
    let reading = space.lock_read().unwrap();
    std::thread::scope(|scope| {
        let changes = scope.spawn(|| {
            space.discard(buffer).unwrap();
            space.try_discard(buffer).unwrap();
            space.protect(buffer, Rights::READ).unwrap();
            space.try_protect(buffer, Rights::READ_WRITE).unwrap();
            space.try_unmap(buffer).unwrap_err()
        });
        assert!(matches!(
            changes.join().unwrap(),
            MapError::WouldBlock { .. }
        ));
    });
    drop(reading);
    space.unmap(buffer).unwrap();
}

#[test]
fn disjoint_unmaps_run_in_parallel() {
    use std::sync::{Condvar, Mutex};
    /// Both handlers meet: they can only if both invalidations are in progress at once.
    #[derive(Default)]
    struct Meets {
        here: Mutex<u32>,
        came: Condvar,
        alone: AtomicU64,
    }
    struct One(Arc<Meets>);
    impl Notifier for One {
        fn cut_off(&self, _: &shootdown::Op<'_>) -> Result<(), shootdown::CutOffFailed> {
            let mut here = self.0.here.lock().unwrap();
            *here += 1;
            self.0.came.notify_all();
            let alone = |here: &mut u32| *here < 2;
            let patience = Duration::from_secs(5);
            let waited = self.0.came.wait_timeout_while(here, patience, alone);
            let alone = waited.unwrap().1.timed_out();
            self.0.alone.fetch_add(u64::from(alone), SeqCst);
            Ok(())
        }
    }
    let space = space();
    let meets = Arc::new(Meets::default());
    let buffers = [(); 2].map(|()| space.map(Map::anonymous(1 << 12)).unwrap());
    let registrations = buffers.map(|buffer| {
        space
            .register(buffer, Arc::new(One(meets.clone())), &[])
            .unwrap()
    });
    std::thread::scope(|scope| {
        for buffer in buffers {
            let space = &space;
            scope.spawn(move || space.unmap(buffer).unwrap());
        }
    });
    for one in registrations {
        one.unregister().unwrap();
    }
    assert_eq!(meets.alone.load(SeqCst), 0, "they ran one by one");
}
