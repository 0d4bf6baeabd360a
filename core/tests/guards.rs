//! Guards that no other test leans on, each with the failure that it stands against. The catalogue's numbers name the races.

mod support;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use shootdown::{
    Addr, AddressSpace, Cause, Completion, Deadlines, Device, DeviceContext, DeviceTlb, ExitError,
    FlushCommand, InvalidateError, Issue, Limits, Map, MapError, NotifierLock, Op, Outcome,
    PageSizes, ProcessMemory, Range, RangeError, Scope, Target, Ticket, UnloadFailed,
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

struct Unloads(Device);

impl DeviceContext for Unloads {
    fn device(&self) -> &Device {
        &self.0
    }
    fn unload(&self, _: &Op<'_>) -> Result<(), UnloadFailed> {
        Ok(())
    }
}

/// R14: the addresses of a segment that is over belong to whoever has mapped them since.
#[test]
fn the_handle_of_a_segment_that_is_over_leaves_alone_what_is_mapped_there_now() {
    let space = space();
    let (device, _) = fake("of the segment");
    let handler = Arc::new(Counting::default());
    let share = space
        .share(1, || (Range::ALL, handler.clone(), on(&device)))
        .unwrap();
    let context = Arc::new(Unloads(device));
    let segment = space
        .map_segment(4 << 12, None, context, Arc::new(share))
        .unwrap();
    let range = segment.range();
    space.unmap(range).unwrap();
    let newcomer = space
        .map(Map::anonymous(4 << 12).at(range.start()))
        .unwrap();
    store(newcomer.start(), 7);
    drop(segment);
    space.discard(newcomer).expect("it is still mapped");
    assert_eq!(load(newcomer.start()), 0);
}

/// R14: a fault that was begun on the old mapping may have read its translation. However many invalidations ago that mapping
/// went, nothing is installed.
#[test]
fn a_fault_of_an_old_mapping_installs_nothing_in_the_new_one() {
    let space = space();
    let lock = NotifierLock::new(());
    let buffer = space.map(Map::anonymous(1 << 12)).unwrap();
    let registration = space
        .register(Range::ALL, Arc::new(Counting::default()), &[])
        .unwrap();
    let mut fault = registration.begin(buffer, Duration::from_secs(1)).unwrap();
    space.unmap(buffer).unwrap();
    let anew = space.map(Map::anonymous(1 << 12).at(buffer.start()));
    assert_eq!(anew.unwrap(), buffer);
    for _ in 0..32 {
        let other = space.map(Map::anonymous(1 << 12)).unwrap();
        space.unmap(other).unwrap();
    }
    assert!(fault.retry(&lock.lock()), "the mapping is another one");
    fault.again().unwrap();
    assert!(!fault.retry(&lock.lock()));
}

/// R19: more commands than a batch has room for become one that covers them all.
#[test]
fn a_batch_that_overflows_covers_every_tag() {
    let space = AddressSpace::without_memory(short());
    let (device, behaviour) = fake("with many tags");
    let page = Range::new(0x1000u64, 0x1000).unwrap();
    let registrations: Vec<_> = (0..20)
        .map(|tag| {
            let target = Target {
                device: device.clone(),
                tag,
            };
            space
                .register(page, Arc::new(Counting::default()), &[target])
                .unwrap()
        })
        .collect();
    let open = space.begin_invalidation(page, Cause::External).unwrap();
    open.end(Outcome::Changed).unwrap();
    let log = behaviour.log.lock().unwrap();
    let covered = |tag| {
        log.iter()
            .any(|command| command.scope == Scope::Device || command.tag == tag)
    };
    let lost: Vec<u64> = (0..20).filter(|tag| !covered(*tag)).collect();
    assert!(lost.is_empty(), "tags {lost:?} were not flushed");
    drop(registrations);
}

/// R19: where the pools have no room for all that an invalidation hits it is refused as a whole; nobody is passed over.
#[test]
fn an_invalidation_without_room_is_refused_and_passes_nobody_over() {
    // More than any slot has room for by itself.
    const REGISTRATIONS: usize = 40;
    let space = AddressSpace::without_memory(short());
    let page = Range::new(0x1000u64, 0x1000).unwrap();
    let handlers: Vec<_> = (0..REGISTRATIONS)
        .map(|_| Arc::new(Counting::default()))
        .collect();
    let registrations: Vec<_> = handlers
        .iter()
        .map(|one| space.register(page, one.clone(), &[]).unwrap())
        .collect();
    let (opened, is_opened) = mpsc::channel();
    let mut begun = 0;
    thread::scope(|scope| {
        let mut closers = Vec::new();
        // A thread may have one open.
        loop {
            let (closer, close) = mpsc::channel::<()>();
            let (opened, space) = (opened.clone(), &space);
            scope.spawn(
                move || match space.try_begin_invalidation(page, Cause::External) {
                    Ok(open) => {
                        opened.send(true).unwrap();
                        let _ = close.recv();
                        open.end(Outcome::Unchanged).unwrap();
                    }
                    Err(InvalidateError::WouldBlock { .. }) => opened.send(false).unwrap(),
                    Err(other) => panic!("{other}"),
                },
            );
            closers.push(closer);
            if !is_opened.recv().unwrap() {
                break;
            }
            begun += 1;
        }
        drop(closers);
    });
    for handler in &handlers {
        assert_eq!(handler.starts.load(SeqCst), begun, "passed over");
        assert_eq!(handler.ends.load(SeqCst), begun);
    }
    assert!((1..60).contains(&begun), "the pools were not what ran out");
    drop(registrations);
}

/// The same with the room for devices, of which one handler names many; and one that may wait does so, and takes nothing meanwhile.
#[test]
fn an_invalidation_without_room_for_its_devices_waits_for_it() {
    const DEVICES: usize = 20;
    let deadlines = Deadlines {
        room: Duration::from_secs(10),
        ..short()
    };
    let space = AddressSpace::without_memory(deadlines);
    let page = Range::new(0x1000u64, 0x1000).unwrap();
    let devices: Vec<_> = (0..DEVICES).map(|nth| fake(&format!("{nth}"))).collect();
    let targets: Vec<_> = devices.iter().flat_map(|(device, _)| on(device)).collect();
    let handler = Arc::new(Counting::default());
    let _registration = space.register(page, handler.clone(), &targets).unwrap();
    let mut begun = 0;
    thread::scope(|scope| {
        let mut closers = Vec::new();
        let (opened, is_opened) = mpsc::channel();
        loop {
            let (closer, close) = mpsc::channel::<()>();
            let (opened, space) = (opened.clone(), &space);
            scope.spawn(move || {
                let open = space.try_begin_invalidation(page, Cause::External);
                opened.send(open.is_ok()).unwrap();
                if let Ok(open) = open {
                    let _ = close.recv();
                    open.end(Outcome::Changed).unwrap();
                }
            });
            closers.push(closer);
            if !is_opened.recv().unwrap() {
                break;
            }
            begun += 1;
        }
        let waits = scope.spawn(|| {
            let open = space.begin_invalidation(page, Cause::External);
            open.unwrap().end(Outcome::Changed).unwrap();
        });
        thread::sleep(Duration::from_millis(50));
        assert!(!waits.is_finished(), "there is no room");
        drop(closers);
        waits.join().unwrap();
    });
    begun += 1;
    assert!((2..60).contains(&begun), "the pools were not what ran out");
    assert_eq!(handler.starts.load(SeqCst), begun, "passed over");
    assert_eq!(handler.ends.load(SeqCst), begun);
    for (_, behaviour) in &devices {
        assert_eq!(behaviour.dispatched.load(SeqCst), begun, "each time");
    }
}

/// Accepts a flush of pages and never acknowledges it; asked for more it says that nothing is cached.
struct Denies;

impl DeviceTlb for Denies {
    fn limits(&self) -> Limits {
        Limits {
            entry_sizes: PageSizes::all(),
            pages_per_command: 1024,
            commands_per_batch: 8,
            full_flush_cost: 4,
        }
    }
    fn issue(&self, command: FlushCommand) -> Issue {
        match command.scope {
            Scope::Pages { .. } => Issue::Queued,
            Scope::Tag | Scope::Device => Issue::NothingCached,
        }
    }
    fn dispatch(&self) -> Ticket {
        Ticket(0)
    }
    fn poll(&self, _: Ticket) -> Completion {
        Completion::Pending
    }
}

/// R20: that nothing is cached now says nothing of a flush that was accepted before, and of the accesses that it stands for.
#[test]
fn nothing_cached_does_not_answer_for_a_flush_that_was_lost() {
    let space = space();
    let device = Device::new("denies", Denies);
    let buffer = space.map(Map::anonymous(1 << 12)).unwrap();
    let _registration = space
        .register(buffer, Arc::new(Counting::default()), &on(&device))
        .unwrap();
    let error = space.unmap(buffer).expect_err("nobody acknowledged");
    assert!(
        matches!(
            error,
            MapError::Invalidate(InvalidateError::Quarantined { .. })
        ),
        "{error}"
    );
    assert_eq!(space.quarantined_bytes(), 1 << 12);
}

/// R20: what a dead device may reach outlives the space, and everybody else who knew of it.
#[test]
fn pages_in_quarantine_outlive_their_space() {
    let memory = Arc::new(ProcessMemory::reserve(1 << 20).unwrap());
    let left = Arc::downgrade(&memory);
    let space = AddressSpace::managed(memory, short());
    let (device, behaviour) = fake("dead");
    behaviour.loses_all.store(true, SeqCst);
    let buffer = space.map(Map::anonymous(1 << 12)).unwrap();
    store(buffer.start(), 5);
    let registration = space
        .register(buffer, Arc::new(Counting::default()), &on(&device))
        .unwrap();
    space.unmap(buffer).unwrap_err();
    let told = space.exit();
    assert!(matches!(told, Err(ExitError::Reached { .. })), "{told:?}");
    drop((registration, space));
    assert!(left.upgrade().is_some(), "the pages are gone");
    assert_eq!(load(buffer.start()), 5);

    let memory = Arc::new(ProcessMemory::reserve(1 << 20).unwrap());
    let gone = Arc::downgrade(&memory);
    let space = AddressSpace::managed(memory, short());
    space.map(Map::anonymous(1 << 12)).unwrap();
    drop(space);
    assert!(gone.upgrade().is_none(), "nothing else is kept");
}

/// R22: whoever shoots down is told by an error; nothing unwinds through it.
#[test]
fn a_panic_of_a_handler_does_not_unwind_into_the_caller() {
    let space = AddressSpace::without_memory(short());
    let page = Range::new(0x1000u64, 0x1000).unwrap();
    let handler = Arc::new(Counting::default());
    let registration = space.register(page, handler.clone(), &[]).unwrap();
    handler.panics.store(true, SeqCst);
    let begin = AssertUnwindSafe(|| space.begin_invalidation(page, Cause::External).map(drop));
    let told = catch_unwind(begin);
    // Whatever came of it, exit calls the handler once more.
    handler.panics.store(false, SeqCst);
    assert!(
        matches!(
            told,
            Ok(Err(InvalidateError::HandlerPanicked { changed: false, .. }))
        ),
        "{told:?}"
    );
    assert_eq!(handler.ends.load(SeqCst), 1, "balanced");
    drop(registration);
}

/// R23: no bytes are not "everything", and what passes 2^64 is not what is left when it wraps.
#[test]
fn a_range_is_never_empty_and_never_wraps() {
    let start = Addr::new(0x1000);
    assert_eq!(Range::new(start, 0), Err(RangeError::Empty { start }));
    let top = Addr::new(u64::MAX - 0xfff);
    assert_eq!(Range::new(top, 0x1000).unwrap().end(), None);
    assert_eq!(
        Range::new(top, 0x1001),
        Err(RangeError::Overflow {
            start: top,
            len: 0x1001
        })
    );
    let space = space();
    let keep = space.map(Map::anonymous(1 << 12)).unwrap();
    let nothing = space.remap(keep, Addr::new(u64::MAX - 0xfff));
    assert!(nothing.is_err());
    assert!(matches!(
        space.map(Map::anonymous(0)),
        Err(MapError::Range(RangeError::Empty { .. }))
    ));
}

/// R25: until it is inserted a driver may still be setting up what its handler reads.
#[test]
fn what_is_prepared_is_not_called_before_it_is_inserted() {
    let space = AddressSpace::without_memory(short());
    let page = Range::new(0x1000u64, 0x1000).unwrap();
    let handler = Arc::new(Counting::default());
    let prepared = space.prepare(page, handler.clone(), &[]).unwrap();
    let shoot = || {
        let open = space.begin_invalidation(page, Cause::External).unwrap();
        open.end(Outcome::Changed).unwrap();
    };
    shoot();
    assert_eq!(handler.starts.load(SeqCst), 0, "called before it was ready");
    let _registration = prepared.insert().unwrap();
    shoot();
    assert_eq!(handler.starts.load(SeqCst), 1);
}

/// R27: the kernel refuses to discard a page that is locked in memory.
#[test]
fn a_system_call_that_fails_is_told_as_nothing_changed() {
    let space = space();
    let (device, _) = fake("one");
    let buffer = space.map(Map::anonymous(1 << 12)).unwrap();
    let data = buffer.start().get() as *mut libc::c_void;
    // SAFETY: the test has mapped the page.
    let locked = unsafe { libc::mlock(data, 4096) };
    assert_eq!(locked, 0, "one page may be locked by anybody");
    store(buffer.start(), 3);
    let handler = Arc::new(Counting::default());
    let _registration = space
        .register(buffer, handler.clone(), &on(&device))
        .unwrap();
    let error = space.discard(buffer).unwrap_err();
    assert!(
        matches!(error, MapError::Invalidate(InvalidateError::Change(_))),
        "{error}"
    );
    assert_eq!(load(buffer.start()), 3);
    assert_eq!(handler.ends.load(SeqCst), 1);
    assert_eq!(handler.unchanged.load(SeqCst), 1, "told that it changed");
    // SAFETY: as above.
    assert_eq!(unsafe { libc::munlock(data, 4096) }, 0);
    space.discard(buffer).unwrap();
    assert_eq!(handler.unchanged.load(SeqCst), 1);
}

/// Whether a child that is forked now has a page at `at`. The system call reads it there, and says so.
fn child_has(at: Addr) -> bool {
    let mut pipe = [0; 2];
    // SAFETY: the array has room for two descriptors.
    assert_eq!(unsafe { libc::pipe(pipe.as_mut_ptr()) }, 0);
    // SAFETY: the child calls nothing but system calls, and ends by one.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: the kernel checks the address, and answers EFAULT where nothing is mapped.
        let written = unsafe { libc::write(pipe[1], at.get() as *const libc::c_void, 8) };
        // SAFETY: ends the child without running the destructors of this process.
        unsafe { libc::_exit(i32::from(written == 8)) };
    }
    let mut status = -1;
    // SAFETY: the argument is writable and lives through the call; the descriptors are ours.
    unsafe {
        assert_eq!(libc::waitpid(child, &raw mut status, 0), child);
        libc::close(pipe[0]);
        libc::close(pipe[1]);
    }
    libc::WEXITSTATUS(status) == 1
}

/// R30: a child neither shares nor copies pages that a device writes: it does not have them.
#[test]
fn a_child_does_not_have_the_pages() {
    let space = space();
    let buffer = space.map(Map::anonymous(2 << 12)).unwrap();
    store(buffer.start(), 1);
    let own = Box::new(1u64);
    assert!(child_has(Addr::new(&raw const *own as u64)), "the control");
    assert!(!child_has(buffer.start()));
    let to = Addr::new(buffer.start().get() + (16 << 12));
    let moved = space.remap(buffer, to).unwrap();
    assert_eq!(load(moved.start()), 1);
    assert!(!child_has(moved.start()), "moved pages");
}
