//! The shootdown path neither allocates nor frees (R18): the allocator of this program aborts where it does.
//!
//! The thread that shoots down may hold the heap's lock: `free` itself unmaps. So from start to end of an invalidation the
//! allocator is *armed* for the thread that runs it: an allocation or a free by that thread then prints its kind and size and ends
//! the process. It is armed around the whole of begin and of end ([`shoot`]). Where more happens on the way out, as a release
//! or a dump of the flight recorder, or before the start, as in the managed operations, it is armed by the handlers: from the
//! first one's `quiesce` to the last one's `end`. That the trap works is shown in a child process that walks into it. A
//! panicking handler is left out: a panic may allocate, nothing else may.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use shootdown::{
    AddressSpace, Cause, Device, DeviceContext, Drain, ExitError, Gather, Health, InvalidateError,
    Issued, Map, MapError, Notifier, NotifierLock, Op, Outcome, PageSize, Prepared, Range,
    Registration, Rights, Scope, Target, UnloadFailed, Unregistered, WouldBlock,
};
use support::{Behaviour, fake, on, short, space};

thread_local! {
    /// How often this thread has armed the allocator. Constant and without a destructor: reading it never allocates.
    static ARMED: Cell<u32> = const { Cell::new(0) };
}

/// The system's allocator, with a trap in front.
struct Trap;

#[global_allocator]
static TRAP: Trap = Trap;

impl Trap {
    fn check(kind: &str, size: usize) {
        if ARMED.get() == 0 {
            return;
        }
        // Text in a buffer on the stack, as a formatter could allocate.
        let mut text = [0u8; 96];
        let mut len = 0;
        let mut digits = [0u8; 20];
        let mut first = digits.len();
        let mut rest = size;
        loop {
            first -= 1;
            digits[first] = b'0' + (rest % 10) as u8;
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        let parts: [&[u8]; 5] = [
            b"in the shootdown path: ",
            kind.as_bytes(),
            b" of ",
            &digits[first..],
            b" bytes\n",
        ];
        for part in parts {
            text[len..len + part.len()].copy_from_slice(part);
            len += part.len();
        }
        // SAFETY: the buffer is `len` bytes long at least; writing to standard error has no other precondition.
        unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), len) };
        std::process::abort();
    }
}

// SAFETY: every call goes to the system's allocator with the arguments unchanged, or does not return.
unsafe impl GlobalAlloc for Trap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::check("an allocation", layout.size());
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::check("an allocation", layout.size());
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Self::check("a reallocation", size);
        // SAFETY: the caller's promise, passed on.
        unsafe { System.realloc(at, layout, size) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        Self::check("a free", layout.size());
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

fn arm() {
    ARMED.set(ARMED.get() + 1);
}

fn disarm() {
    ARMED.set(ARMED.get() - 1);
}

/// Runs `call` with the allocator armed. What it returns is dropped by the caller, after that.
fn armed<T>(call: impl FnOnce() -> T) -> T {
    arm();
    let result = call();
    disarm();
    result
}

/// Runs `call`, which is not part of a shootdown, between a begin and an end.
fn between<T>(call: impl FnOnce() -> T) -> T {
    let armed = ARMED.replace(0);
    let result = call();
    ARMED.set(armed);
    result
}

/// A handler that arms from `quiesce` to `end`, and otherwise behaves as the test says.
#[derive(Default)]
struct Handler {
    /// Says so often that its work is not done yet; for ever if that is the largest number.
    busy: AtomicU64,
    refuses: AtomicBool,
    allocates: bool,
    lock: NotifierLock<u64>,
    /// Unregistered inside `quiesce`. Kept for the test to drop.
    gives_up: Mutex<Option<Registration>>,
    gave_up: Mutex<Option<Unregistered>>,
    /// Inserted inside `quiesce`.
    inserts: Mutex<Option<Prepared>>,
    inserted: Mutex<Option<Registration>>,
    starts: AtomicU64,
    ends: AtomicU64,
    releases: AtomicU64,
}

impl Notifier for Handler {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        arm();
        self.starts.fetch_add(1, SeqCst);
        if self.allocates {
            drop(std::hint::black_box(Box::new(op.id())));
        }
        if self.refuses.load(SeqCst) && !op.may_block() {
            return Err(WouldBlock);
        }
        *self.lock.lock_for(op)? += 1;
        let gives_up = self.gives_up.lock().unwrap();
        if let Some(registration) = &*gives_up {
            let result = registration.unregister().unwrap();
            *self.gave_up.lock().unwrap() = Some(result);
        }
        if let Some(prepared) = self.inserts.lock().unwrap().take() {
            *self.inserted.lock().unwrap() = Some(prepared.insert().unwrap());
        }
        Ok(op.drain())
    }

    fn drained(&self, _: &Op<'_>) -> bool {
        match self.busy.load(SeqCst) {
            0 => true,
            u64::MAX => false,
            left => {
                self.busy.store(left - 1, SeqCst);
                false
            }
        }
    }

    fn flush<'o>(&self, _: &Op<'o>, gather: Gather<'o>) -> Issued<'o> {
        gather.all()
    }

    fn end(&self, _: &Op<'_>, _: Outcome) {
        self.ends.fetch_add(1, SeqCst);
        disarm();
    }

    fn release(&self) {
        self.releases.fetch_add(1, SeqCst);
    }
}

fn watched() -> Range {
    Range::new(0x10_0000u64, 16 << 12).unwrap()
}

fn external() -> AddressSpace {
    AddressSpace::without_memory(short())
}

fn register(space: &AddressSpace, targets: &[Target]) -> (Arc<Handler>, Registration) {
    let handler = Arc::new(Handler::default());
    let registration = space.register(watched(), handler.clone(), targets).unwrap();
    (handler, registration)
}

/// An invalidation from begin to the return of end, armed throughout.
fn shoot(space: &AddressSpace) -> Result<(), InvalidateError> {
    armed(|| {
        space
            .begin_invalidation(watched(), Cause::External)
            .and_then(|open| open.end(Outcome::Changed))
    })
}

/// The same, armed by the handlers alone.
fn shoot_phases(space: &AddressSpace) -> Result<(), InvalidateError> {
    let result = space
        .begin_invalidation(watched(), Cause::External)
        .and_then(|open| open.end(Outcome::Changed));
    assert_eq!(ARMED.get(), 0, "whoever got quiesce got end");
    result
}

/// One that must not wait, armed throughout.
fn try_shoot(space: &AddressSpace) -> Result<(), InvalidateError> {
    armed(|| {
        space
            .try_begin_invalidation(watched(), Cause::External)
            .and_then(|open| open.end(Outcome::Changed))
    })
}

fn balanced(handler: &Handler, starts: u64) {
    assert_eq!(handler.starts.load(SeqCst), starts);
    assert_eq!(handler.ends.load(SeqCst), starts, "balanced (R13)");
}

#[test]
fn what_hits_nothing_and_what_hits_one_does_not_allocate() {
    let space = external();
    shoot(&space).unwrap();
    let (device, _) = fake("one");
    let (handler, _registration) = register(&space, &on(&device));
    shoot(&space).unwrap();
    try_shoot(&space).unwrap();
    balanced(&handler, 2);
}

#[test]
fn the_first_shootdown_of_a_thread_does_not_allocate() {
    let space = external();
    let (device, _) = fake("one");
    let (handler, _registration) = register(&space, &on(&device));
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| shoot(&space).unwrap());
        }
    });
    balanced(&handler, 4);
}

#[test]
fn forty_hits_over_several_devices_do_not_allocate() {
    let space = external();
    let devices: Vec<_> = (0..5).map(|nth| fake(&format!("device {nth}"))).collect();
    let registered: Vec<_> = (0..40)
        .map(|nth| {
            let one = Target {
                device: devices[nth % 5].0.clone(),
                tag: nth as u64,
            };
            let another = Target {
                device: devices[(nth + 1) % 5].0.clone(),
                tag: nth as u64,
            };
            register(&space, &[one, another])
        })
        .collect();
    shoot(&space).unwrap();
    try_shoot(&space).unwrap();
    for (handler, _) in &registered {
        balanced(handler, 2);
    }
    for (device, _) in &devices {
        assert_eq!(device.stats().dispatches, 2, "one doorbell each time");
    }
}

#[test]
fn more_devices_than_are_found_by_their_keys_do_not_allocate() {
    let space = external();
    let devices: Vec<_> = (0..1100).map(|_| fake("one of many").0).collect();
    let target = |device: &Device| Target {
        device: device.clone(),
        tag: 7,
    };
    let all: Vec<_> = devices.iter().map(target).collect();
    // The same ones, which the later are to meet where the first has put them: there is no room for them twice.
    let registered: Vec<_> = (0..4).map(|_| register(&space, &all)).collect();
    shoot(&space).unwrap();
    try_shoot(&space).unwrap();
    shoot(&space).unwrap();
    for (handler, _) in &registered {
        balanced(handler, 3);
    }
    for device in &devices {
        let (stats, sizes) = (device.stats(), PageSize::ALL.len() as u64);
        let flushed = (stats.dispatches, stats.flush_ops, stats.full_flushes);
        assert_eq!(flushed, (3, 3 * sizes, 0), "once each time");
    }
}

#[test]
fn a_batch_that_overflows_into_a_full_flush_does_not_allocate() {
    let space = external();
    let (device, behaviour) = fake("with many tags");
    let targets: Vec<_> = (0..20)
        .map(|tag| Target {
            device: device.clone(),
            tag,
        })
        .collect();
    let (handler, _registration) = register(&space, &targets);
    shoot(&space).unwrap();
    balanced(&handler, 1);
    let log = behaviour.log.lock().unwrap();
    assert_eq!(log.len(), 1, "everything in one command");
    assert_eq!(log[0].scope, Scope::Device);
}

#[test]
fn a_refusal_does_not_allocate() {
    let space = external();
    let (device, _) = fake("one");
    let registered: Vec<_> = (0..3).map(|_| register(&space, &on(&device))).collect();
    registered[1].0.refuses.store(true, SeqCst);
    let error = try_shoot(&space).unwrap_err();
    assert!(
        matches!(error, InvalidateError::WouldBlock { .. }),
        "{error}"
    );
    let held = registered[0].0.lock.lock();
    thread::scope(|scope| {
        let contended = scope.spawn(|| try_shoot(&space).unwrap_err());
        assert!(matches!(
            contended.join().unwrap(),
            InvalidateError::WouldBlock { .. }
        ));
    });
    drop(held);
    shoot(&space).unwrap();
    for (handler, _) in &registered {
        let starts = handler.starts.load(SeqCst);
        balanced(handler, starts);
    }
}

#[test]
fn work_in_flight_that_ends_and_that_does_not_is_waited_for_without_allocating() {
    let space = external();
    let (device, behaviour) = fake("that is reset");
    behaviour.resets.store(true, SeqCst);
    let (handler, registration) = register(&space, &on(&device));
    handler.busy.store(600, SeqCst);
    shoot_phases(&space).unwrap();
    handler.busy.store(u64::MAX, SeqCst);
    shoot_phases(&space).unwrap();
    assert!(device.stats().resets > 0);
    registration.unregister().unwrap();

    let (without_device, _registration) = register(&space, &[]);
    without_device.busy.store(u64::MAX, SeqCst);
    let error = shoot_phases(&space).unwrap_err();
    assert!(
        matches!(error, InvalidateError::NotDrained { .. }),
        "{error}"
    );
    balanced(&without_device, 1);
    without_device.busy.store(0, SeqCst);
}

/// A registration on a device that behaves badly, and what its shootdown came to.
fn shoot_bad(
    space: &AddressSpace,
    set: impl FnOnce(&Behaviour),
) -> (Device, Result<(), InvalidateError>) {
    let (device, behaviour) = fake("bad");
    let (healthy, _) = fake("good");
    set(&behaviour);
    let (handler, _bad) = register(space, &on(&device));
    let (other, _good) = register(space, &on(&healthy));
    let result = shoot_phases(space);
    balanced(&handler, 1);
    balanced(&other, 1);
    (device, result)
}

#[test]
fn a_lost_completion_and_its_recovery_do_not_allocate() {
    let space = external();
    let (device, result) = shoot_bad(&space, |one| one.loses_ranges.store(true, SeqCst));
    result.unwrap();
    assert_eq!(device.stats().recovered_by_flush, 1);

    let (device, result) = shoot_bad(&space, |one| {
        one.loses_all.store(true, SeqCst);
        one.resets.store(true, SeqCst);
    });
    result.unwrap();
    assert_eq!(device.stats().recovered_by_reset, 1);
}

#[test]
fn quarantine_does_not_allocate_the_first_time_and_later() {
    let space = external();
    let (device, behaviour) = fake("dead");
    behaviour.loses_all.store(true, SeqCst);
    let (handler, _registration) = register(&space, &on(&device));
    for _ in 0..2 {
        let error = shoot_phases(&space).unwrap_err();
        assert!(
            matches!(error, InvalidateError::Quarantined { .. }),
            "{error}"
        );
    }
    assert_eq!(device.health(), Health::Quarantined);
    balanced(&handler, 2);
    behaviour.loses_all.store(false, SeqCst);
    device.recover(short().full_flush).unwrap();
}

#[test]
fn no_room_for_one_more_does_not_allocate() {
    let space = external();
    let (handler, _registration) = register(&space, &[]);
    let (opened, is_opened) = mpsc::channel();
    thread::scope(|scope| {
        let mut closers = Vec::new();
        // A thread may have one open: as many threads as there is room for.
        let refused = loop {
            let (opened, space) = (opened.clone(), &space);
            let (closer, close) = mpsc::channel::<()>();
            scope.spawn(move || {
                let open = armed(|| space.try_begin_invalidation(watched(), Cause::External));
                let (open, error) = match open {
                    Ok(open) => (Some(open), None),
                    Err(error) => (None, Some(error)),
                };
                between(|| {
                    opened.send(error).unwrap();
                    let _ = close.recv();
                });
                if let Some(open) = open {
                    armed(|| open.end(Outcome::Unchanged)).unwrap();
                }
            });
            closers.push(closer);
            if let Some(error) = is_opened.recv().unwrap() {
                break error;
            }
        };
        let full = shoot(&space);
        drop(closers);
        assert!(
            matches!(refused, InvalidateError::WouldBlock { .. }),
            "{refused}"
        );
        assert!(matches!(full, Err(InvalidateError::NoRoom { .. })));
    });
    shoot(&space).unwrap();
    let starts = handler.starts.load(SeqCst);
    balanced(&handler, starts);
}

#[test]
fn the_phases_of_the_managed_operations_do_not_allocate() {
    let space = space();
    let (device, behaviour) = fake("one");
    let buffer = space.map(Map::anonymous(16 << 12)).unwrap();
    let registered: Vec<_> = (0..40)
        .map(|_| {
            let handler = Arc::new(Handler::default());
            let registration = space
                .register(buffer, handler.clone(), &on(&device))
                .unwrap();
            (handler, registration)
        })
        .collect();
    let page = |nth: u64| Range::new(buffer.start().get() + (nth << 12), 1 << 12).unwrap();
    space.discard(page(0)).unwrap();
    space.protect(page(1), Rights::READ).unwrap();
    let away = shootdown::Addr::new(buffer.start().get() + (64 << 12));
    space.remap(page(2), away).unwrap();
    space.unmap(page(3)).unwrap();
    space.lock_write().unwrap().unmap(page(4)).unwrap();

    registered[20].0.refuses.store(true, SeqCst);
    assert!(matches!(
        space.try_unmap(page(5)),
        Err(MapError::Invalidate(InvalidateError::WouldBlock { .. }))
    ));
    behaviour.loses_all.store(true, SeqCst);
    assert!(matches!(
        space.unmap(page(5)),
        Err(MapError::Invalidate(InvalidateError::Quarantined { .. }))
    ));
    for (handler, _) in &registered {
        let starts = handler.starts.load(SeqCst);
        balanced(handler, starts);
    }
    assert_eq!(ARMED.get(), 0);
    // Exit shoots down with the same handlers, and the device is still dead.
    assert!(matches!(space.exit(), Err(ExitError::Reached { .. })));
    assert_eq!(ARMED.get(), 0);
}

#[test]
fn an_unregister_inside_the_own_callback_does_not_allocate() {
    let space = external();
    let (device, _) = fake("one");
    let handler = Arc::new(Handler::default());
    let registration = space
        .register(watched(), handler.clone(), &on(&device))
        .unwrap();
    *handler.gives_up.lock().unwrap() = Some(registration);
    space
        .begin_invalidation(watched(), Cause::External)
        .unwrap()
        .end(Outcome::Changed)
        .unwrap();
    assert_eq!(
        *handler.gave_up.lock().unwrap(),
        Some(Unregistered::Deferred)
    );
    balanced(&handler, 1);
    assert_eq!(handler.releases.load(SeqCst), 1, "after the end, disarmed");
    drop(handler.gives_up.lock().unwrap().take());
}

#[test]
fn an_insertion_inside_a_callback_does_not_allocate() {
    let space = external();
    let (handler, _registration) = register(&space, &[]);
    let newcomer = Arc::new(Handler::default());
    let prepared = space.prepare(watched(), newcomer.clone(), &[]).unwrap();
    *handler.inserts.lock().unwrap() = Some(prepared);
    space
        .begin_invalidation(watched(), Cause::External)
        .unwrap()
        .end(Outcome::Changed)
        .unwrap();
    balanced(&handler, 1);
    shoot(&space).unwrap();
    balanced(&handler, 2);
    balanced(&newcomer, 1);
}

/// A context that fails so often to unload.
struct Context {
    device: Device,
    fails: AtomicU64,
}

impl DeviceContext for Context {
    fn device(&self) -> &Device {
        &self.device
    }
    fn unload(&self, _: &Op<'_>) -> Result<(), UnloadFailed> {
        assert!(ARMED.get() > 0, "inside of the phases");
        match self.fails.load(SeqCst) {
            0 => Ok(()),
            left => {
                self.fails.store(left - 1, SeqCst);
                Err(UnloadFailed { reason: "planned" })
            }
        }
    }
}

#[test]
fn the_end_of_a_segment_its_reset_and_its_quarantine_do_not_allocate() {
    for (fails, resets, unmapped) in [
        (0, false, true),
        (1, true, true),
        (2, true, false),
        (1, false, false),
    ] {
        let space = space();
        let (device, behaviour) = fake("of the segment");
        behaviour.resets.store(resets, SeqCst);
        let handler = Arc::new(Handler::default());
        let share = space
            .share(1, || (Range::ALL, handler.clone(), on(&device)))
            .unwrap();
        let context = Arc::new(Context {
            device: device.clone(),
            fails: AtomicU64::new(fails),
        });
        let segment = space
            .map_segment(1 << 14, None, context, Arc::new(share))
            .unwrap();
        assert_eq!(segment.unmap().is_ok(), unmapped, "{fails} {resets}");
        balanced(&handler, handler.starts.load(SeqCst));
        assert_eq!(ARMED.get(), 0);
    }
}

#[test]
fn a_handler_that_allocates_ends_the_process() {
    const CHILD: &str = "SHOOTDOWN_TEST_ALLOCATES";
    if std::env::var_os(CHILD).is_some() {
        let space = external();
        let handler = Arc::new(Handler {
            allocates: true,
            ..Handler::default()
        });
        let _registration = space.register(watched(), handler, &[]).unwrap();
        let _ = shoot(&space);
        return;
    }
    let child = Command::new(std::env::current_exe().unwrap())
        .args([
            "a_handler_that_allocates_ends_the_process",
            "--exact",
            "--nocapture",
        ])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stderr);
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&child.status),
        Some(libc::SIGABRT),
        "{said}"
    );
    assert!(
        said.contains("in the shootdown path: an allocation of 8 bytes"),
        "{said}"
    );
}
