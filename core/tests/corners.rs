//! Corners: where a callback, a drop or a dead device meets the rest of the space. Each was a defect once.

mod support;

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use shootdown::{
    AddressSpace, Cause, Completion, CutOffFailed, Deadlines, Device, DeviceContext, DeviceTlb,
    Drain, ExitError, FlushCommand, Health, InvalidateError, Issue, Limits, Map, MapError,
    Notifier, NotifierLock, Op, Outcome, PageSizes, ProcessMemory, Range, Refused, Registration,
    ResetError, Rights, Segment, Share, Ticket, UnloadFailed, Unregistered, WouldBlock,
};
use support::{Counting, fake, on, short, space};

/// Runs `f` on a thread of its own: a deadlock fails the test.
fn within(seconds: u64, f: impl FnOnce() + Send + 'static) {
    let (tx, rx) = mpsc::channel();
    thread::spawn(move || {
        f();
        let _ = tx.send(());
    });
    match rx.recv_timeout(Duration::from_secs(seconds)) {
        Ok(()) => {}
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("a deadlock"),
        Err(_) => panic!("it panicked"),
    }
}

struct Ctx {
    device: Device,
    hook: Box<dyn Fn() + Send + Sync>,
    on_drop: Box<dyn Fn() + Send + Sync>,
}
impl DeviceContext for Ctx {
    fn device(&self) -> &Device {
        &self.device
    }
    fn unload(&self, _: &Op<'_>) -> Result<(), UnloadFailed> {
        (self.hook)();
        Ok(())
    }
}
impl Drop for Ctx {
    fn drop(&mut self) {
        (self.on_drop)()
    }
}

impl Ctx {
    fn new(device: &Device) -> Arc<Self> {
        Self::acting(device, || (), || ())
    }

    fn acting(
        device: &Device,
        hook: impl Fn() + Send + Sync + 'static,
        on_drop: impl Fn() + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            device: device.clone(),
            hook: Box::new(hook),
            on_drop: Box::new(on_drop),
        })
    }
}

/// A share of a registration of `range` on `device`.
fn share(
    space: &AddressSpace,
    range: Range,
    handler: Arc<dyn Notifier>,
    device: &Device,
) -> Arc<Share> {
    Arc::new(space.share(1, || (range, handler, on(device))).unwrap())
}

fn plain() -> Arc<Counting> {
    Arc::new(Counting::default())
}

#[derive(Default)]
struct Hooks {
    quiesce: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    end: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    release: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    cut_fails: AtomicBool,
    not_drained: AtomicBool,
}
fn fire(h: &Mutex<Option<Box<dyn FnOnce() + Send>>>) {
    let f = h.lock().unwrap().take();
    if let Some(f) = f {
        f()
    }
}
impl Notifier for Hooks {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        fire(&self.quiesce);
        Ok(if self.not_drained.load(SeqCst) {
            op.drain()
        } else {
            op.idle()
        })
    }
    fn drained(&self, _: &Op<'_>) -> bool {
        false
    }
    fn cut_off(&self, op: &Op<'_>) -> Result<(), CutOffFailed> {
        if self.cut_fails.load(SeqCst) {
            Err(CutOffFailed { range: op.range() })
        } else {
            Ok(())
        }
    }
    fn end(&self, _: &Op<'_>, _: Outcome) {
        fire(&self.end)
    }
    fn release(&self) {
        fire(&self.release)
    }
}
fn put(h: &Mutex<Option<Box<dyn FnOnce() + Send>>>, f: impl FnOnce() + Send + 'static) {
    *h.lock().unwrap() = Some(Box::new(f));
}

#[test]
fn a_segment_dropped_by_its_own_unload_does_not_wait_for_its_own_span() {
    within(5, || {
        let space = space();
        let (device, _b) = fake("d");
        let share = share(&space, Range::ALL, plain(), &device);
        let slot: Arc<Mutex<Option<Segment>>> = Arc::default();
        let s2 = slot.clone();
        let ctx = Arc::new(Ctx {
            device,
            hook: Box::new(move || drop(s2.lock().unwrap().take())),
            on_drop: Box::new(|| ()),
        });
        let seg = space.map_segment(4096, None, ctx, share).unwrap();
        let range = seg.range();
        *slot.lock().unwrap() = Some(seg);
        space.unmap(range).unwrap();
    });
}

#[test]
fn a_late_unmap_of_a_segment_leaves_a_new_mapping_alone() {
    within(20, || {
        let space = space();
        let (device, _b) = fake("d");
        let share = share(&space, Range::ALL, plain(), &device);
        let ctx = Ctx::new(&device);
        let seg = space.map_segment(4096, None, ctx, share).unwrap();
        let range = seg.range();
        let guard = space.lock_write().unwrap();
        let t = thread::spawn(move || drop(seg)); // waits for the map lock
        thread::sleep(Duration::from_millis(500));
        guard.unmap(range).unwrap();
        let new = guard.map(Map::anonymous(4096)).unwrap();
        assert_eq!(new, range, "same addresses");
        drop(guard);
        t.join().unwrap();
        space
            .protect(new, Rights::READ)
            .expect("the new mapping is still there");
    });
}

struct PanicTlb(AtomicBool);
impl DeviceTlb for PanicTlb {
    fn limits(&self) -> Limits {
        Limits {
            entry_sizes: PageSizes::all(),
            pages_per_command: 1024,
            commands_per_batch: 8,
            full_flush_cost: 4,
        }
    }
    fn issue(&self, _: FlushCommand) -> Issue {
        assert!(!self.0.swap(false, SeqCst), "planned");
        Issue::Queued
    }
    fn dispatch(&self) -> Ticket {
        Ticket(0)
    }
    fn poll(&self, _: Ticket) -> Completion {
        Completion::Done
    }
}

#[test]
fn a_tlb_that_panics_is_quarantined_and_nothing_hangs() {
    within(5, || {
        let space = space();
        let device = Device::new("p", PanicTlb(AtomicBool::new(true)));
        let handler = plain();
        let _r = space
            .register(Range::ALL, handler.clone(), &on(&device))
            .unwrap();
        let m = space.map(Map::anonymous(4096)).unwrap();
        assert!(matches!(
            space.unmap(m),
            Err(MapError::Invalidate(InvalidateError::Quarantined { .. }))
        ));
        assert_eq!(device.health(), Health::Quarantined);
        assert_eq!(
            handler.ends.load(SeqCst),
            1,
            "and nothing was said to have changed"
        );
        assert!(matches!(space.unmap(m), Err(MapError::InQuarantine { .. })));
        assert!(matches!(space.exit(), Err(ExitError::Reached { .. })));
    });
}

#[test]
fn an_insertion_inside_release_takes_effect() {
    within(10, || {
        let space = space();
        let first = Arc::new(Hooks::default());
        let reg = space
            .register(Range::new(0x1000u64, 0x1000).unwrap(), first.clone(), &[])
            .unwrap();
        let prepared = space
            .prepare(Range::new(0x2000u64, 0x1000).unwrap(), plain(), &[])
            .unwrap();
        let slot: Arc<Mutex<Option<Registration>>> = Arc::default();
        let s2 = slot.clone();
        put(&first.release, move || {
            *s2.lock().unwrap() = Some(prepared.insert().unwrap());
        });
        assert_eq!(reg.unregister(), Ok(Unregistered::Released));
        let new = slot.lock().unwrap().take().unwrap();
        let sp = space.clone();
        let r = thread::spawn(move || {
            let r = new
                .begin(
                    Range::new(0x2000u64, 0x1000).unwrap(),
                    Duration::from_secs(1),
                )
                .map(drop);
            std::mem::forget(new);
            r.is_ok()
        })
        .join()
        .unwrap();
        let (tx, rx) = mpsc::channel();
        thread::spawn(move || {
            sp.exit().unwrap();
            let _ = tx.send(());
        });
        let exited = rx.recv_timeout(Duration::from_secs(2)).is_ok();
        assert!(r && exited, "begin ok {r}, exit returned {exited}");
    });
}

#[test]
fn pages_wait_for_every_device_that_did_not_acknowledge() {
    within(10, || {
        let space = space();
        let (a, ba) = fake("a");
        let (b, bb) = fake("b");
        let _ra = space.register(Range::ALL, plain(), &on(&a)).unwrap();
        let hb = Arc::new(Hooks::default());
        let rb = space.register(Range::ALL, hb.clone(), &on(&b)).unwrap();
        put(&hb.end, move || drop(rb));
        let m = space.map(Map::anonymous(4096)).unwrap();
        ba.loses_all.store(true, SeqCst);
        bb.loses_all.store(true, SeqCst);
        space.unmap(m).unwrap_err();
        assert!(a.health() == Health::Quarantined && b.health() == Health::Quarantined);
        ba.loses_all.store(false, SeqCst);
        a.recover(Duration::from_millis(20)).unwrap();
        space.drain().unwrap();
        assert_eq!(b.health(), Health::Quarantined);
        assert_eq!(space.quarantined_bytes(), 4096, "b may still reach them");
    });
}

#[test]
fn a_cut_off_that_failed_is_not_forgotten_beside_a_sick_device() {
    within(10, || {
        let space = space();
        let (a, ba) = fake("a");
        let _ra = space.register(Range::ALL, plain(), &on(&a)).unwrap();
        let hb = Arc::new(Hooks::default());
        hb.cut_fails.store(true, SeqCst);
        let rb = space.register(Range::ALL, hb.clone(), &[]).unwrap();
        let m = space.map(Map::anonymous(4096)).unwrap();
        ba.loses_all.store(true, SeqCst);
        space.unmap(m).unwrap_err();
        drop(rb);
        ba.loses_all.store(false, SeqCst);
        a.recover(Duration::from_millis(20)).unwrap();
        space.drain().unwrap();
        assert_eq!(
            space.quarantined_bytes(),
            4096,
            "a DMA mapping is still there"
        );
    });
}

#[test]
fn what_a_callback_put_off_runs_also_where_the_invalidation_fails() {
    within(10, || {
        let space = space();
        let h = Arc::new(Hooks::default());
        h.cut_fails.store(true, SeqCst);
        let page = Range::new(0x1000u64, 0x1000).unwrap();
        let registration = space.register(page, h.clone(), &[]).unwrap();
        put(&h.end, move || drop(registration));
        space.begin_invalidation(page, Cause::External).unwrap_err();
        assert_eq!(space.stats().releases, 1);
    });
}

#[test]
fn a_hole_that_was_too_small_once_is_found_again() {
    let memory = ProcessMemory::reserve(4 * 4096).unwrap();
    let space = AddressSpace::managed(Arc::new(memory), short());
    let one = space.map(Map::anonymous(4096)).unwrap();
    let _two = space.map(Map::anonymous(4096)).unwrap();
    space.unmap(one).unwrap();
    let _big = space.map(Map::anonymous(2 * 4096)).unwrap();
    let again = space.map(Map::anonymous(4096));
    assert!(again.is_ok(), "{}", again.unwrap_err());
}

#[test]
fn the_last_owner_may_go_inside_a_callback() {
    within(5, || {
        let space = space();
        let (device, _b) = fake("d");
        let h = Arc::new(Hooks::default());
        let share = share(&space, Range::ALL, h.clone(), &device);
        let ctx = Ctx::new(&device);
        let seg = space.map_segment(4096, None, ctx, share).unwrap();
        let exited = space.pin();
        put(&h.end, move || drop(space));
        assert_eq!(seg.unmap().unwrap(), Unregistered::AlreadyGone);
        assert!(exited.is_exiting() && seg.is_over());
    });
}

#[test]
fn work_of_a_dead_device_is_not_waited_for_twice() {
    let deadlines = Deadlines {
        drain: Duration::from_millis(300),
        ..short()
    };
    let space = AddressSpace::managed(
        Arc::new(ProcessMemory::reserve(1 << 20).unwrap()),
        deadlines,
    );
    let (a, _) = fake("a");
    let h = Arc::new(Hooks::default());
    h.not_drained.store(true, SeqCst);
    let _r = space.register(Range::ALL, h, &on(&a)).unwrap();
    for nth in 0..3 {
        let m = space.map(Map::anonymous(4096)).unwrap();
        let t = Instant::now();
        space.unmap(m).unwrap_err();
        let took = t.elapsed();
        assert!(
            nth == 0 || took < Duration::from_millis(250),
            "waited for a dead device again: {took:?}"
        );
    }
}

#[test]
fn what_a_thread_has_put_off_is_not_left_to_another() {
    within(10, || {
        let space = space();
        let (device, _b) = fake("d");
        let elsewhere = Range::new(0x1000u64, 4096).unwrap();
        let share = share(&space, elsewhere, plain(), &device);
        let ctx = Ctx::new(&device);
        let seg = space.map_segment(4096, None, ctx, share).unwrap();
        let range = seg.range();
        let other = space
            .register(Range::new(0x9000u64, 4096).unwrap(), plain(), &[])
            .unwrap();
        let open = space
            .begin_invalidation(Range::new(0x5000u64, 1).unwrap(), Cause::External)
            .unwrap();
        drop(other); // queued on this thread
        let sp = space.clone();
        let mapped = thread::spawn(move || {
            drop(seg);
            sp.map(Map::anonymous(4096).at(range.start()))
                .map_err(|e| e.to_string())
        })
        .join()
        .unwrap();
        drop(open);
        assert!(
            mapped.is_ok(),
            "after drop(segment) with nothing held: {}",
            mapped.unwrap_err()
        );
    });
}

#[test]
fn a_fault_may_wait_for_ever() {
    within(10, || {
        let space = space();
        let page = Range::new(0x1000u64, 4096).unwrap();
        let r = space.register(page, plain(), &[]).unwrap();
        let open = space.begin_invalidation(page, Cause::External).unwrap();
        thread::scope(|s| {
            let t = s.spawn(|| {
                let _ = r.begin(page, Duration::MAX).map(drop);
            });
            thread::sleep(Duration::from_millis(200));
            drop(open);
            t.join().expect("begin panicked");
        });
    });
}

#[test]
fn a_context_may_unmap_when_it_is_dropped_by_drain() {
    within(5, || {
        let space = space();
        let (device, b) = fake("d");
        let buffer = space.map(Map::anonymous(4096)).unwrap();
        let share = share(&space, Range::ALL, plain(), &device);
        let sp = space.clone();
        let ctx = Arc::new(Ctx {
            device: device.clone(),
            hook: Box::new(|| ()),
            on_drop: Box::new(move || {
                let _ = sp.unmap(buffer);
            }),
        });
        let seg = space.map_segment(4096, None, ctx, share).unwrap();
        b.loses_all.store(true, SeqCst);
        seg.unmap().unwrap_err();
        drop(seg);
        b.loses_all.store(false, SeqCst);
        device.recover(Duration::from_millis(20)).unwrap();
        space.drain().unwrap();
    });
}

#[test]
fn a_context_may_unmap_when_it_is_dropped_by_exit() {
    within(5, || {
        let space = space();
        let (device, _b) = fake("d");
        let buffer = space.map(Map::anonymous(4096)).unwrap();
        let share = share(&space, Range::ALL, plain(), &device);
        let sp = space.clone();
        let slot: Arc<Mutex<Option<Segment>>> = Arc::default();
        let s2 = slot.clone();
        let ctx = Arc::new(Ctx {
            device: device.clone(),
            hook: Box::new(move || drop(s2.lock().unwrap().take())),
            on_drop: Box::new(move || {
                let _ = sp.unmap(buffer);
            }),
        });
        *slot.lock().unwrap() = Some(space.map_segment(4096, None, ctx, share).unwrap());
        space.exit().unwrap();
    });
}

#[test]
fn a_segment_dropped_in_a_callback_waits_until_the_span_is_given_back() {
    within(6, || {
        let space = space();
        let (device, _b) = fake("d");
        let h = Arc::new(Hooks::default());
        let data = space.map(Map::anonymous(4096)).unwrap();
        let share = share(&space, Range::ALL, h.clone(), &device);
        let ctx = Ctx::new(&device);
        let seg = space.map_segment(4096, None, ctx, share).unwrap();
        // The handler of an unmap of unrelated data drops a segment handle; meanwhile a guard waits for that unmap's span.
        let (tx, rx) = mpsc::channel::<()>();
        put(&h.quiesce, move || {
            drop(seg);
            tx.send(()).unwrap();
            thread::sleep(Duration::from_millis(500));
        });
        let sp = space.clone();
        let t = thread::spawn(move || sp.unmap(data));
        rx.recv().unwrap();
        let guard = space.lock_write().unwrap();
        assert!(matches!(guard.unmap(data), Err(MapError::NotMapped { .. })));
        drop(guard);
        t.join().unwrap().unwrap();
    });
}

#[test]
fn a_reset_that_takes_too_long_is_named() {
    struct Slow;
    impl DeviceTlb for Slow {
        fn limits(&self) -> Limits {
            Limits {
                entry_sizes: PageSizes::all(),
                pages_per_command: 1024,
                commands_per_batch: 8,
                full_flush_cost: 4,
            }
        }
        fn issue(&self, _: FlushCommand) -> Issue {
            Issue::Queued
        }
        fn dispatch(&self) -> Ticket {
            Ticket(0)
        }
        fn poll(&self, _: Ticket) -> Completion {
            Completion::Pending
        }
        fn reset(&self, _: Duration) -> Result<(), ResetError> {
            thread::sleep(Duration::from_millis(600));
            Ok(())
        }
    }
    let deadlines = Deadlines {
        callback: Duration::from_millis(100),
        ..short()
    };
    let space = AddressSpace::managed(
        Arc::new(ProcessMemory::reserve(1 << 20).unwrap()),
        deadlines,
    );
    let _r = space
        .register(Range::ALL, plain(), &on(&Device::new("slow", Slow)))
        .unwrap();
    let m = space.map(Map::anonymous(4096)).unwrap();
    space.unmap(m).unwrap();
    assert_eq!(space.stats().overdue, 1, "a reset that took 600 ms");
}

#[test]
fn synchronize_does_not_wait_for_callbacks_that_begin_later() {
    within(6, || {
        let space = space();
        let page = Range::new(0x1000u64, 4096).unwrap();
        let r = space.register(page, plain(), &[]).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let mut held = Vec::new();
        for _ in 0..2 {
            let (space, stop) = (space.clone(), stop.clone());
            held.push(thread::spawn(move || {
                while !stop.load(SeqCst) {
                    let open = space.begin_invalidation(page, Cause::External).unwrap();
                    thread::sleep(Duration::from_millis(20));
                    drop(open);
                }
            }));
            thread::sleep(Duration::from_millis(10));
        }
        let (tx, rx) = mpsc::channel();
        thread::spawn(move || {
            let _ = r.synchronize().unwrap();
            let _ = tx.send(());
            std::mem::forget(r);
        });
        let ok = rx.recv_timeout(Duration::from_secs(2)).is_ok();
        stop.store(true, SeqCst);
        assert!(
            ok,
            "each invalidation takes 20 ms; synchronize had not returned after 2 s"
        );
    });
}

#[test]
fn many_segments_of_a_dead_device_may_be_dropped_at_once() {
    let space = space();
    let (device, _b) = fake("d");
    let elsewhere = Range::new(0x1000u64, 4096).unwrap();
    let share = share(&space, elsewhere, plain(), &device);
    struct Bad(Device);
    impl DeviceContext for Bad {
        fn device(&self) -> &Device {
            &self.0
        }
        fn unload(&self, _: &Op<'_>) -> Result<(), UnloadFailed> {
            Err(UnloadFailed { reason: "planned" })
        }
    }
    let ctx = Arc::new(Bad(device));
    let n = 800;
    let all: Vec<_> = (0..n)
        .map(|_| {
            space
                .map_segment(4096, None, ctx.clone(), share.clone())
                .unwrap()
        })
        .collect();
    let guard = space.lock_write().unwrap();
    drop(all);
    drop(guard);
    assert_eq!(space.stats().quarantined, n, "each was tried");
}

#[test]
fn exit_says_that_a_device_may_still_reach_the_memory() {
    let space = AddressSpace::without_memory(short());
    let (a, b) = fake("a");
    let _r = space.register(Range::ALL, plain(), &on(&a)).unwrap();
    b.loses_all.store(true, SeqCst);
    let e = space.exit();
    assert!(e.is_err());
}

#[test]
fn a_dead_device_is_not_forgotten_with_its_last_registration() {
    let space = space();
    let (a, b) = fake("a");
    let r = space.register(Range::ALL, plain(), &on(&a)).unwrap();
    let one = space.map(Map::anonymous(4096)).unwrap();
    let two = space.map(Map::anonymous(4096)).unwrap();
    b.loses_all.store(true, SeqCst);
    space.unmap(one).unwrap_err();
    r.unregister().unwrap();
    assert!(
        space.unmap(two).is_err(),
        "the dead device may hold an entry for it"
    );
}

#[test]
fn prepare_sets_aside_what_it_says() {
    let space = AddressSpace::without_memory(short());
    let h = plain();
    let all: Vec<_> = (0..700u64)
        .map(|n| {
            space
                .prepare(Range::new(n << 12, 4096).unwrap(), h.clone(), &[])
                .unwrap()
        })
        .collect();
    let _r: Vec<_> = all.into_iter().map(|p| p.insert().unwrap()).collect();
    let e = space
        .begin_invalidation(Range::ALL, Cause::External)
        .map(drop);
    drop(_r);
    assert!(e.is_ok());
}

#[test]
fn recover_says_what_the_reset_said() {
    let space = AddressSpace::without_memory(short());
    let (a, b) = fake("a");
    let _r = space.register(Range::ALL, plain(), &on(&a)).unwrap();
    b.loses_all.store(true, SeqCst);
    let _ = space
        .begin_invalidation(Range::ALL, Cause::External)
        .map(drop);
    assert_eq!(
        a.recover(Duration::from_millis(20)),
        Err(ResetError::Unsupported)
    );
}

#[test]
fn a_segment_that_is_over_is_not_put_where_waiting_is_refused() {
    let space = space();
    let (device, _b) = fake("d");
    let h = plain();
    let share = share(&space, Range::ALL, h.clone(), &device);
    let ctx = Ctx::new(&device);
    let seg = space.map_segment(4096, None, ctx, share).unwrap();
    space.exit().unwrap();
    let lock = NotifierLock::new(());
    let held = lock.lock();
    assert!(matches!(
        seg.unmap(),
        Err(MapError::Refused(Refused::NotifierLockHeld { .. }))
    ));
    drop(held);
    assert_eq!(seg.unmap().unwrap(), Unregistered::AlreadyGone);
}

#[test]
fn what_a_release_puts_off_runs_with_the_thread_that_ran_it() {
    within(10, || {
        // A's release gives up B's registration; A's completion is run by drain, not by leave.
        let (a, b) = (
            AddressSpace::without_memory(short()),
            AddressSpace::without_memory(short()),
        );
        let page = Range::new(0x1000u64, 4096).unwrap();
        let (ha, hb) = (Arc::new(Hooks::default()), plain());
        let ra = a.register(page, ha.clone(), &[]).unwrap();
        let rb = b.register(page, hb.clone(), &[]).unwrap();
        put(&ha.release, move || drop(rb));
        let open = b
            .begin_invalidation(Range::new(0x9000u64, 1).unwrap(), Cause::External)
            .unwrap();
        drop(ra); // completed, queued on this thread
        let a2 = a.clone();
        let t = thread::spawn(move || {
            a2.drain().unwrap();
        }); // the draining thread runs it and ends
        t.join().unwrap();
        drop(open);
        b.drain().ok();
        // and from now on nothing of b is run by whoever leaves
        let h3 = plain();
        let r3 = b.register(page, h3.clone(), &[]).unwrap();
        drop(r3);
        assert_eq!(h3.releases.load(SeqCst), 1, "dropped with nothing held");
    });
}
