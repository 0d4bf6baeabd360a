//! A supervisor neither allocates nor frees from its first callback on (R18): its caller may hold the allocator's lock. Its
//! allocations end this program.

#[path = "support/child.rs"]
mod child;
#[path = "support/foreign.rs"]
mod foreign;
mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use child::in_child;
use foreign::*;
use shootdown::*;
use support::*;

thread_local! {
    /// This thread may never again allocate or free. Constant and without a destructor: reading it never allocates.
    static SERVES: Cell<bool> = const { Cell::new(false) };
}

/// Somebody holds the allocator's lock.
static HELD: AtomicBool = AtomicBool::new(false);

struct Trap;

#[global_allocator]
static TRAP: Trap = Trap;

fn check(text: &[u8]) {
    while HELD.load(SeqCst) {
        // SAFETY: no arguments.
        unsafe { libc::sched_yield() };
    }
    if SERVES.get() {
        // SAFETY: the text is as long as said.
        unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
        std::process::abort();
    }
}

// SAFETY: every call goes to the system's allocator with the arguments unchanged, or does not return.
unsafe impl GlobalAlloc for Trap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        check(b"in the shootdown path: an allocation of who is waited for\n");
        // SAFETY: the caller's promise, passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        check(b"in the shootdown path: a free of who is waited for\n");
        // SAFETY: the caller's promise, passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

/// Marks the thread that calls it, for good.
#[derive(Default)]
struct Handler {
    calls: AtomicU64,
    allocates: AtomicBool,
    /// The exit that follows calls handlers on the test's own thread.
    over: AtomicBool,
    gives_up: Mutex<Option<Registration>>,
    inserts: Mutex<Option<Prepared>>,
    kept: Mutex<Option<Registration>>,
}

impl Notifier for Handler {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        if !self.over.load(SeqCst) {
            SERVES.set(true);
        }
        self.calls.fetch_add(1, SeqCst);
        if self.allocates.load(SeqCst) {
            drop(std::hint::black_box(Box::new(1)));
        }
        if let Some(registration) = &*self.gives_up.lock().unwrap() {
            let _ = registration.unregister();
        }
        if let Some(prepared) = self.inserts.lock().unwrap().take() {
            *self.kept.lock().unwrap() = prepared.insert().ok();
        }
        Ok(op.idle())
    }
}

/// Frees what it holds when it is released.
struct Released(Mutex<Vec<u8>>, Arc<AtomicU64>);

impl Notifier for Released {
    fn release(&self) {
        self.0.lock().unwrap().shrink_to_fit();
        self.1.fetch_add(1, SeqCst);
    }
}

struct Rig {
    space: AddressSpace,
    _watched: Watched,
    buffer: Range,
    handler: Arc<Handler>,
    behaviour: Arc<Behaviour>,
    _registration: Registration,
}

fn rig() -> Rig {
    let memory = Arc::new(ProcessMemory::reserve(1 << 30).unwrap());
    let arena = memory.arena();
    let space = AddressSpace::managed(memory, short());
    let _watched = space.watch(Arc::new(Unotify::new()), arena).unwrap();
    let buffer = space.map(Map::anonymous(64 * PAGE)).unwrap();
    touch(buffer);
    let (device, behaviour) = fake("device");
    let handler = Arc::new(Handler::default());
    let _registration = space
        .register(buffer, handler.clone(), &on(&device))
        .unwrap();
    Rig {
        space,
        _watched,
        buffer,
        handler,
        behaviour,
        _registration,
    }
}

#[test]
fn every_kind_of_call_is_served_without_the_allocator() {
    if !in_child("every_kind_of_call_is_served_without_the_allocator") {
        return;
    }
    let rig = rig();
    let released = Arc::new(AtomicU64::new(0));
    let last = Arc::new(Released(
        Mutex::new(Vec::with_capacity(1 << 16)),
        released.clone(),
    ));
    let other = rig.space.register(rig.buffer, last, &[]).unwrap();
    *rig.handler.gives_up.lock().unwrap() = Some(other);
    let newcomer = Arc::new(Counting::default());
    let prepared = rig.space.prepare(rig.buffer, newcomer, &[]).unwrap();
    *rig.handler.inserts.lock().unwrap() = Some(prepared);
    let at = |nth| start(page(rig.buffer, nth));
    let page = PAGE as usize;
    // SAFETY: a name, and a descriptor of this test.
    let fd = unsafe { libc::memfd_create(c"file".as_ptr(), 0) } as usize;
    raw(libc::SYS_ftruncate, [fd, 4 * page, 0, 0, 0, 0]).unwrap();
    let shared = (libc::MAP_SHARED | libc::MAP_FIXED) as usize;
    raw(libc::SYS_mmap, [at(20), 4 * page, 3, shared, fd, 0]).unwrap();
    let id = raw(libc::SYS_shmget, [0, page, 0o1600, 0, 0, 0]).unwrap();
    raw(libc::SYS_shmat, [id, at(30), 0o40000, 0, 0, 0]).unwrap();
    raw(libc::SYS_shmctl, [id, 0, 0, 0, 0, 0]).unwrap();
    let own = raw(
        libc::SYS_pidfd_open,
        [std::process::id() as usize, 0, 0, 0, 0, 0],
    )
    .unwrap();
    let vectors = [at(2), page, at(4), page];
    let path = std::ffi::CString::new(format!("/proc/self/fd/{fd}")).unwrap();
    let fixed = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED) as usize;
    let dontneed = libc::MADV_DONTNEED as usize;
    let calls = [
        (libc::SYS_munmap, [at(0), page, 0, 0, 0, 0]),
        (libc::SYS_mmap, [at(1), page, 3, fixed, usize::MAX, 0]),
        (libc::SYS_madvise, [at(2), page, dontneed, 0, 0, 0]),
        (libc::SYS_mprotect, [at(3), page, 1, 0, 0, 0]),
        (libc::SYS_pkey_mprotect, [at(3), page, 3, usize::MAX, 0, 0]),
        (
            libc::SYS_process_madvise,
            [own, vectors.as_ptr() as usize, 2, dontneed, 0, 0],
        ),
        (libc::SYS_mremap, [at(40), page, page, 3, at(45), 0]),
        (libc::SYS_remap_file_pages, [at(20), page, 0, 2, 0, 0]),
        (libc::SYS_fallocate, [fd, 3, page, page, 0, 0]),
        (libc::SYS_ftruncate, [fd, page, 0, 0, 0, 0]),
        (libc::SYS_truncate, [path.as_ptr() as usize, 0, 0, 0, 0, 0]),
        (libc::SYS_shmdt, [at(30), 0, 0, 0, 0, 0]),
    ];
    for round in 0..4 {
        for (nr, args) in calls {
            let before = rig.handler.calls.load(SeqCst);
            let result = raw(nr, args);
            if round == 0 {
                assert!(result.is_ok(), "call {nr}: {result:?}");
                assert!(
                    rig.handler.calls.load(SeqCst) > before,
                    "call {nr} was told"
                );
            }
        }
    }
    // Errors, and what they escalate to.
    rig.behaviour.loses_all.store(true, SeqCst);
    assert_eq!(munmap(foreign::page(rig.buffer, 50)), Err(libc::EBUSY));
    assert_eq!(munmap(foreign::page(rig.buffer, 51)), Err(libc::EBUSY));
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    while released.load(SeqCst) == 0 {
        assert!(
            std::time::Instant::now() < deadline,
            "released by the service thread"
        );
        std::thread::yield_now();
    }
    rig.handler.over.store(true, SeqCst);
}

/// The caller holds the heap's lock: `free` of a chunk that was mapped for it, and `malloc_trim`, are the calls that are stopped.
#[test]
fn a_caller_that_holds_the_allocator_s_lock_is_served() {
    if !in_child("a_caller_that_holds_the_allocator_s_lock_is_served") {
        return;
    }
    // SAFETY: the chunks are this test's own; what is read is not what is freed.
    unsafe {
        // Of its own mapping.
        let chunk = libc::malloc(64 << 20);
        let first = (chunk as u64) & !0xfff;
        // From the heap's end.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 30);
        let end = (libc::sbrk(0) as u64).next_multiple_of(PAGE);
        let mapped = Range::new(first, 64 << 20).unwrap();
        let heap = Range::new(end, 64 << 20).unwrap();
        let space = AddressSpace::without_memory(short());
        let whole = mapped.hull(heap);
        let _watched = space.watch(Arc::new(Unotify::new()), whole).unwrap();
        let handler = Arc::new(Handler::default());
        let _first = space.register(mapped, handler.clone(), &[]).unwrap();
        let _second = space.register(heap, handler.clone(), &[]).unwrap();
        libc::free(chunk);
        assert_eq!(handler.calls.load(SeqCst), 1, "free unmaps");
        let top = libc::malloc(32 << 20);
        libc::memset(top, 1, 32 << 20);
        let grown = libc::sbrk(0) as u64;
        assert!(grown > end, "it is part of the heap");
        libc::free(top);
        let before = handler.calls.load(SeqCst);
        assert_eq!(libc::malloc_trim(0), 1);
        assert!(
            (libc::sbrk(0) as u64) < grown,
            "malloc_trim gives the heap's end back"
        );
        assert!(
            handler.calls.load(SeqCst) > before,
            "and the driver is told"
        );
    }
}

#[test]
fn uffd_starts_beside_somebody_who_holds_the_allocator_s_lock() {
    if !in_child("uffd_starts_beside_somebody_who_holds_the_allocator_s_lock") {
        return;
    }
    const PAGES: u64 = 16384;
    // SAFETY: a new mapping, where the kernel likes.
    let at = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let len = (PAGES * PAGE) as usize;
        libc::mmap(std::ptr::null_mut(), len, 3, flags, -1, 0)
    };
    let whole = Range::new(at as u64, PAGES * PAGE).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for nth in 0..PAGES {
                if over.load(SeqCst) {
                    return;
                }
                HELD.store(true, SeqCst);
                let result = munmap(page(whole, nth));
                HELD.store(false, SeqCst);
                assert_eq!(result, Ok(0));
                std::thread::sleep(std::time::Duration::from_micros(10));
            }
        });
        let space = AddressSpace::without_memory(short());
        for _ in 0..4 {
            let watched = space.watch(Arc::new(Uffd::new()), whole).unwrap();
            watched.stop().map_err(|(_, refused)| refused).unwrap();
        }
        over.store(true, SeqCst);
    });
}

/// A source of somebody else's, who holds the allocator's lock where he tells.
#[derive(Default)]
struct Hook(Mutex<Vec<Arc<Sink>>>);

impl Source for Hook {
    fn name(&self) -> &'static str {
        "hook"
    }
    fn declares(&self, _: Operation) -> Sees {
        Sees::empty()
    }
    fn start(&self, sinks: &[Arc<Sink>]) -> Result<(), SourceError> {
        *self.0.lock().unwrap() = sinks.to_vec();
        Ok(())
    }
    fn stop(&self, sink: &Arc<Sink>) {
        self.0.lock().unwrap().retain(|one| !Arc::ptr_eq(one, sink));
    }
}

fn hooked() -> (AddressSpace, Watched, Arc<Sink>) {
    let space = AddressSpace::without_memory(short());
    let hook = Arc::new(Hook::default());
    let all = Range::new(0u64, 1 << 40).unwrap();
    let watched = space.watch(hook.clone(), all).unwrap();
    let sink = hook.0.lock().unwrap()[0].clone();
    (space, watched, sink)
}

fn two_pages() -> [Range; 2] {
    [0x1000u64, 0x2000].map(|at| Range::new(at, PAGE).unwrap())
}

struct Tolerant<N>(N);

impl<N: Fn(bool) + Send + Sync + 'static> Notifier for Tolerant<N> {
    fn needs(&self) -> Needs {
        Needs::TOLERATES_FAULTS
    }
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        self.0(false);
        Ok(op.idle())
    }
    fn end(&self, _: &Op<'_>, _: Outcome) {
        self.0(true);
    }
}

/// Runs `work` on a thread that may neither allocate nor free from here to its end.
fn armed<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let armed = scope.spawn(|| {
            SERVES.set(true);
            let result = work();
            SERVES.set(false);
            result
        });
        armed.join().unwrap()
    })
}

#[test]
fn what_callbacks_put_off_does_not_run_on_the_thread_of_a_source() {
    let (space, _watched, sink) = hooked();
    let released = Arc::new(AtomicU64::new(0));
    struct Frees(Released);
    impl Notifier for Frees {
        fn needs(&self) -> Needs {
            Needs::TOLERATES_FAULTS
        }
        fn release(&self) {
            self.0.release();
        }
    }
    let frees = Released(Mutex::new(Vec::with_capacity(1 << 16)), released.clone());
    let other = space
        .register(Range::ALL, Arc::new(Frees(frees)), &[])
        .unwrap();
    let [page, _] = two_pages();
    let gives_up = Tolerant(move |end: bool| {
        if !end {
            let _ = other.unregister();
        }
    });
    let _mine = space.register(page, Arc::new(gives_up), &[]).unwrap();
    armed(|| {
        let change = sink.begin(page, Cause::Unmap).unwrap().unwrap();
        change.end(Outcome::Changed).unwrap();
    });
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    while released.load(SeqCst) == 0 {
        assert!(
            std::time::Instant::now() < deadline,
            "by the service thread"
        );
        std::thread::yield_now();
    }
}

/// Everybody else has let go of the device when the change that it stood in the way of is refused.
#[test]
fn a_change_that_is_refused_frees_no_device() {
    let (space, _watched, sink) = hooked();
    let [first, second] = two_pages();
    let (device, behaviour) = fake("of which nobody keeps a handle");
    behaviour.loses_all.store(true, SeqCst);
    let plain = Arc::new(Tolerant(|_: bool| {}));
    let named = space.register(first, plain, &on(&device)).unwrap();
    // The end of the second comes when the first has been given back.
    let step = Arc::new(AtomicU64::new(0));
    let at = step.clone();
    let waits = Tolerant(move |end: bool| {
        if end && at.compare_exchange(0, 1, SeqCst, SeqCst).is_ok() {
            while at.load(SeqCst) == 1 {
                std::thread::yield_now();
            }
        }
    });
    let _other = space.register(second, Arc::new(waits), &[]).unwrap();
    let both = first.hull(second);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            while step.load(SeqCst) == 0 {
                std::thread::yield_now();
            }
            behaviour.loses_all.store(false, SeqCst);
            device.recover(short().full_flush).unwrap();
            named.unregister().unwrap();
            drop(named);
            drop(device);
            step.store(2, SeqCst);
        });
        let refused = armed(|| sink.begin(both, Cause::Unmap).map(drop));
        assert!(
            matches!(refused, Err(SinkError::Reached { .. })),
            "{refused:?}"
        );
    });
}

/// The control: the trap does catch.
#[test]
fn a_supervisor_that_allocates_ends_this_program() {
    use std::os::unix::process::ExitStatusExt;
    const CONTROL: &str = "SHOOTDOWN_TEST_CONTROL";
    let name = "a_supervisor_that_allocates_ends_this_program";
    if std::env::var_os(CONTROL).is_some() {
        let rig = rig();
        rig.handler.allocates.store(true, SeqCst);
        let _ = munmap(page(rig.buffer, 0));
        return;
    }
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env(CONTROL, "1")
        .output()
        .unwrap();
    assert_eq!(child.status.signal(), Some(libc::SIGABRT));
    assert!(
        String::from_utf8_lossy(&child.stderr).contains("in the shootdown path: an allocation")
    );
}
