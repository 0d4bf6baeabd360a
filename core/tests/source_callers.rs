//! unotify: a call that the supervisor makes means what its caller meant, whoever that is and whatever becomes of him. Each test in
//! a process of its own, as a filter is permanent.

#[path = "support/child.rs"]
mod child;
#[path = "support/foreign.rs"]
mod foreign;
mod support;

use std::ffi::CString;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Barrier, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use child::in_child;
use foreign::*;
use shootdown::*;
use support::short;

type Hook = Box<dyn Fn() + Send + Sync>;

/// Counts, and does what the test says.
#[derive(Default)]
struct Handler {
    starts: AtomicU64,
    ends: AtomicU64,
    /// Milliseconds that `quiesce` takes.
    slow: AtomicU64,
    inside: Mutex<Option<Arc<Hook>>>,
    at_end: Mutex<Option<Arc<Hook>>>,
}

fn run(hook: &Mutex<Option<Arc<Hook>>>) {
    let hook = hook.lock().unwrap().clone();
    if let Some(hook) = hook {
        hook();
    }
}

impl Notifier for Handler {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        self.starts.fetch_add(1, SeqCst);
        thread::sleep(Duration::from_millis(self.slow.load(SeqCst)));
        run(&self.inside);
        Ok(op.idle())
    }

    fn end(&self, _: &Op<'_>, _: Outcome) {
        run(&self.at_end);
        self.ends.fetch_add(1, SeqCst);
    }
}

struct Rig {
    space: AddressSpace,
    arena: Range,
    buffer: Range,
    handler: Arc<Handler>,
    _watched: Watched,
    _registration: Registration,
}

fn rig_over(memory: Arc<dyn Memory>) -> Rig {
    let arena = memory.arena();
    let space = AddressSpace::managed(memory, short());
    let _watched = space.watch(Arc::new(Unotify::new()), arena).unwrap();
    let buffer = space.map(Map::anonymous(16 * PAGE)).unwrap();
    touch(buffer);
    let handler = Arc::new(Handler::default());
    let _registration = space.register(buffer, handler.clone(), &[]).unwrap();
    Rig {
        space,
        arena,
        buffer,
        handler,
        _watched,
        _registration,
    }
}

fn rig() -> Rig {
    rig_over(Arc::new(ProcessMemory::reserve(1 << 30).unwrap()))
}

impl Handler {
    fn starts(&self) -> u64 {
        self.starts.load(SeqCst)
    }
}

/// A memfd of two pages.
fn file() -> usize {
    // SAFETY: a name, and a descriptor of this test.
    let fd = unsafe { libc::memfd_create(c"file".as_ptr(), 0) } as usize;
    raw(libc::SYS_ftruncate, [fd, 2 * PAGE as usize, 0, 0, 0, 0]).unwrap();
    fd
}

fn size(fd: usize) -> i64 {
    // SAFETY: the structure is filled by the kernel.
    unsafe {
        let mut about: libc::stat = std::mem::zeroed();
        assert_eq!(libc::fstat(fd as i32, &mut about), 0);
        about.st_size
    }
}

/// Maps two pages of a file over what is watched.
fn map_file(at: Range, fd: usize) {
    let flags = (libc::MAP_SHARED | libc::MAP_FIXED) as usize;
    let args = [start(at), 2 * PAGE as usize, 3, flags, fd, 0];
    assert_eq!(raw(libc::SYS_mmap, args), Ok(start(at)));
}

fn truncate(fd: usize, len: u64) -> Result<usize, i32> {
    raw(libc::SYS_ftruncate, [fd, len as usize, 0, 0, 0, 0])
}

#[test]
fn a_thread_with_files_of_its_own_changes_its_own() {
    if !in_child("a_thread_with_files_of_its_own_changes_its_own") {
        return;
    }
    let rig = rig();
    let (process, own) = (file(), file());
    map_file(page(rig.buffer, 4), own);
    let before = rig.handler.starts();
    let told = thread::scope(|scope| {
        let caller = scope.spawn(|| {
            // SAFETY: numbers only; from here on descriptors are this thread's.
            unsafe {
                assert_eq!(libc::unshare(libc::CLONE_FILES), 0);
                assert_eq!(libc::dup2(own as i32, process as i32), process as i32);
            }
            assert_eq!(truncate(process, PAGE), Ok(0));
            rig.handler.starts()
        });
        caller.join().unwrap()
    });
    assert_eq!(
        size(process),
        2 * PAGE as i64,
        "the process's file is as it was"
    );
    assert_eq!(size(own), PAGE as i64);
    assert_eq!(told, before + 1, "and it was told of");
}

struct Directory(std::path::PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let name = format!("shootdown-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("file"), [1; 8192]).unwrap();
        Self(path)
    }

    fn len(&self) -> u64 {
        std::fs::metadata(self.0.join("file")).unwrap().len()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_thread_with_a_directory_of_its_own_truncates_there() {
    if !in_child("a_thread_with_a_directory_of_its_own_truncates_there") {
        return;
    }
    let _rig = rig();
    let (process, own) = (Directory::new("process"), Directory::new("own"));
    std::env::set_current_dir(&process.0).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: numbers only; from here on the directory is this thread's.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_FS) }, 0);
            std::env::set_current_dir(&own.0).unwrap();
            let name = c"file".as_ptr() as usize;
            assert_eq!(raw(libc::SYS_truncate, [name, 0, 0, 0, 0, 0]), Ok(0));
        });
    });
    assert_eq!([process.len(), own.len()], [8192, 0]);
}

#[test]
fn a_thread_without_rights_gets_none() {
    if !in_child("a_thread_without_rights_gets_none") {
        return;
    }
    // SAFETY: no arguments.
    if unsafe { libc::geteuid() } != 0 {
        eprintln!("SKIPPED: only root can give up rights");
        return;
    }
    let _rig = rig();
    let directory = Directory::new("rights");
    let path = directory.0.join("file");
    std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    let path = CString::new(path.to_str().unwrap()).unwrap();
    let truncate =
        |path: &CString| raw(libc::SYS_truncate, [path.as_ptr() as usize, 0, 0, 0, 0, 0]);
    let result = thread::scope(|scope| {
        let caller = scope.spawn(|| {
            // Of this thread alone: the C library's function would do it for all.
            raw(
                libc::SYS_setresuid,
                [usize::MAX, 65534, usize::MAX, 0, 0, 0],
            )
            .unwrap();
            truncate(&path)
        });
        caller.join().unwrap()
    });
    assert_eq!(result, Err(libc::EACCES));
    assert_eq!(directory.len(), 8192);
    assert_eq!(truncate(&path), Ok(0), "who has them can");
}

/// Runs `work` in another process with this one's memory, and files of its own; its number.
fn same_memory(work: extern "C" fn(*mut libc::c_void) -> i32, argument: usize) -> i32 {
    let stack = Box::leak(vec![0u8; 1 << 16].into_boxed_slice());
    // SAFETY: the stack stays; the child makes system calls only.
    let child = unsafe {
        let top = stack.as_mut_ptr().add(stack.len()).cast();
        let flags = libc::CLONE_VM | libc::SIGCHLD;
        libc::clone(work, top, flags, argument as *mut libc::c_void)
    };
    assert!(child > 0);
    child
}

fn wait_for(child: i32) -> i32 {
    let mut status = 0;
    // SAFETY: a child of this test.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    status
}

#[test]
fn a_child_in_this_memory_is_a_foreign_caller_with_files_of_its_own() {
    if !in_child("a_child_in_this_memory_is_a_foreign_caller_with_files_of_its_own") {
        return;
    }
    static FILES: [AtomicI64; 2] = [AtomicI64::new(0), AtomicI64::new(0)];
    extern "C" fn work(_: *mut libc::c_void) -> i32 {
        let [process, own] = [&FILES[0], &FILES[1]].map(|one| one.load(SeqCst));
        // SAFETY: descriptors of this child.
        unsafe {
            libc::syscall(libc::SYS_dup2, own, process);
            libc::syscall(libc::SYS_ftruncate, process, PAGE) as i32
        }
    }
    let rig = rig();
    let (process, own) = (file(), file());
    FILES[0].store(process as i64, SeqCst);
    FILES[1].store(own as i64, SeqCst);
    map_file(page(rig.buffer, 4), own);
    let before = rig.handler.starts();
    // At the end the file is as it will be: else the device may have its page again, and nobody tells.
    let seen = Arc::new(AtomicI64::new(0));
    let at_end = seen.clone();
    *rig.handler.at_end.lock().unwrap() = Some(Arc::new(Box::new(move || {
        at_end.store(size(own), SeqCst);
    })));
    assert_eq!(wait_for(same_memory(work, 0)), 0);
    assert_eq!(size(process), 2 * PAGE as i64);
    assert_eq!(size(own), PAGE as i64);
    assert_eq!(rig.handler.starts(), before + 1);
    assert_eq!(
        seen.load(SeqCst),
        PAGE as i64,
        "the end came after the change"
    );
}

#[test]
fn the_call_of_a_caller_that_was_killed_is_not_made() {
    if !in_child("the_call_of_a_caller_that_was_killed_is_not_made") {
        return;
    }
    static PART: AtomicU64 = AtomicU64::new(0);
    extern "C" fn work(_: *mut libc::c_void) -> i32 {
        // SAFETY: what is watched is the parent's; its test wants this.
        unsafe { libc::syscall(libc::SYS_munmap, PART.load(SeqCst), PAGE) as i32 }
    }
    let rig = rig();
    let part = page(rig.buffer, 4);
    PART.store(part.start().get(), SeqCst);
    rig.handler.slow.store(200, SeqCst);
    let child = same_memory(work, 0);
    while rig.handler.starts() == 0 {
        thread::yield_now();
    }
    // SAFETY: the child has not been waited for.
    unsafe { libc::kill(child, libc::SIGKILL) };
    assert_eq!(wait_for(child), libc::SIGKILL);
    while rig.handler.ends.load(SeqCst) == 0 {
        thread::yield_now();
    }
    // By now somebody may have mapped something else there.
    thread::sleep(Duration::from_millis(20));
    assert!(is_mapped(part));
}

#[test]
fn two_handlers_that_make_watched_calls_at_once_are_told_so() {
    if !in_child("two_handlers_that_make_watched_calls_at_once_are_told_so") {
        return;
    }
    let rig = rig();
    let (both, told) = (Barrier::new(2), Arc::new(AtomicU64::new(0)));
    let (count, other) = (told.clone(), page(rig.buffer, 12));
    *rig.handler.inside.lock().unwrap() = Some(Arc::new(Box::new(move || {
        both.wait();
        let refused = munmap(other) == Err(libc::EDEADLK);
        count.fetch_add(u64::from(refused), SeqCst);
    })));
    let [one, two] = [page(rig.buffer, 1), page(rig.buffer, 2)];
    thread::scope(|scope| {
        for part in [one, two] {
            scope.spawn(move || assert_eq!(munmap(part), Ok(0)));
        }
    });
    *rig.handler.inside.lock().unwrap() = None;
    assert_eq!(told.load(SeqCst), 2);
    assert!(is_mapped(other));
}

/// Were all supervisors inside handlers there would be none to tell them.
#[test]
fn one_supervisor_is_always_left_to_receive() {
    if !in_child("one_supervisor_is_always_left_to_receive") {
        return;
    }
    let rig = rig();
    let (inside, told) = (AtomicU64::new(0), Arc::new(AtomicU64::new(0)));
    let (count, other) = (told.clone(), page(rig.buffer, 12));
    *rig.handler.inside.lock().unwrap() = Some(Arc::new(Box::new(move || {
        inside.fetch_add(1, SeqCst);
        while inside.load(SeqCst) < 2 {
            thread::yield_now();
        }
        // Meanwhile the third is received.
        thread::sleep(Duration::from_millis(30));
        let refused = munmap(other) == Err(libc::EDEADLK);
        count.fetch_add(u64::from(refused), SeqCst);
    })));
    thread::scope(|scope| {
        for nth in 1..4 {
            let part = page(rig.buffer, nth);
            scope.spawn(move || assert_eq!(munmap(part), Ok(0)));
        }
    });
    *rig.handler.inside.lock().unwrap() = None;
    assert_eq!(told.load(SeqCst), 3);
    assert!(is_mapped(other));
}

/// Of one call: every range of it for every space that is watched there.
#[test]
fn more_than_there_is_room_for_is_everything() {
    if !in_child("more_than_there_is_room_for_is_everything") {
        return;
    }
    let rig = rig();
    let second = AddressSpace::without_memory(short());
    let _watched = second.watch(Arc::new(Unotify::new()), rig.arena).unwrap();
    let handler = Arc::new(Handler::default());
    let _registration = second.register(rig.buffer, handler.clone(), &[]).unwrap();
    let vectors: [[usize; 2]; 16] =
        std::array::from_fn(|nth| [start(page(rig.buffer, nth as u64)), PAGE as usize]);
    let process = std::process::id() as usize;
    let own = raw(libc::SYS_pidfd_open, [process, 0, 0, 0, 0, 0]).unwrap();
    let (at, pageout) = (vectors.as_ptr() as usize, libc::MADV_PAGEOUT as usize);
    let args = [own, at, vectors.len(), pageout, 0, 0];
    assert_eq!(raw(libc::SYS_process_madvise, args), Ok(16 * PAGE as usize));
    for told in [rig.handler, handler] {
        assert_eq!(told.starts(), 8 + 1, "what there is room for, then all");
        assert_eq!(told.ends.load(SeqCst), 8 + 1);
    }
}

#[test]
fn many_callers_at_once_are_all_served() {
    if !in_child("many_callers_at_once_are_all_served") {
        return;
    }
    let rig = rig();
    rig.handler.slow.store(5, SeqCst);
    thread::scope(|scope| {
        for nth in 0..16 {
            let part = page(rig.buffer, nth);
            scope.spawn(move || assert_eq!(munmap(part), Ok(0)));
        }
    });
    assert_eq!(rig.handler.starts(), 16);
}

#[test]
fn a_process_without_descriptors_is_refused_or_served_and_never_hangs() {
    if !in_child("a_process_without_descriptors_is_refused_or_served_and_never_hangs") {
        return;
    }
    let memory = Arc::new(ProcessMemory::reserve(1 << 30).unwrap());
    let arena = memory.arena();
    let space = AddressSpace::managed(memory, short());
    let buffer = space.map(Map::anonymous(16 * PAGE)).unwrap();
    touch(buffer);
    // SAFETY: numbers and a structure of this frame.
    unsafe {
        let limit = libc::rlimit {
            rlim_cur: 64,
            rlim_max: 64,
        };
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &limit), 0);
    }
    // SAFETY: a descriptor of this test's own.
    let mut taken: Vec<i32> = std::iter::from_fn(|| match unsafe { libc::dup(2) } {
        -1 => None,
        fd => Some(fd),
    })
    .collect();
    let mut refused = 0;
    let watched = loop {
        match space.watch(Arc::new(Unotify::new()), arena) {
            Ok(watched) => break watched,
            Err(SourceError::System { .. } | SourceError::NotAvailable { .. }) => refused += 1,
            Err(other) => panic!("{other}"),
        }
        // SAFETY: one of those above.
        unsafe { libc::close(taken.pop().expect("some are enough")) };
    };
    assert!(refused > 0);
    // Of what takes a descriptor to look at its caller the self-test has seen that it is no barrier here.
    struct Unmaps(AtomicU64);
    impl Notifier for Unmaps {
        fn operations(&self) -> Operations {
            Operations::MUNMAP
        }
        fn end(&self, _: &Op<'_>, _: Outcome) {
            self.0.fetch_add(1, SeqCst);
        }
    }
    let handler = Arc::new(Unmaps(AtomicU64::new(0)));
    let _registration = space.register(buffer, handler.clone(), &[]).unwrap();
    let (done, over) = mpsc::channel();
    thread::spawn(move || done.send(munmap(page(buffer, 1))));
    let result = over.recv_timeout(Duration::from_secs(10));
    assert_eq!(result, Ok(Ok(0)), "refused {refused} times");
    assert_eq!(handler.0.load(SeqCst), 1);
    // How many descriptors there were at each of its steps depends on when those of the refused ones were closed.
    let is_barrier = |one: &Tried| one.counts().contains(Sees::BEFORE | Sees::BARRIER);
    let calls = |one: &&Tried| Operations::CALLS.each().any(|call| call == one.operation);
    let covered = watched.self_test().iter().filter(calls).all(is_barrier);
    match space.register(buffer, Arc::new(Handler::default()), &[]) {
        Err(InsertError::Uncovered(shortfall)) => {
            assert!(!covered);
            assert_eq!(shortfall.would_do, None, "what watches it would not do");
        }
        other => assert!(covered && other.is_ok(), "{other:?}"),
    }
    drop(watched);
}

#[test]
fn an_exec_during_the_wait_takes_place() {
    let before = Instant::now();
    if !in_child("an_exec_during_the_wait_takes_place") {
        assert!(
            before.elapsed() < Duration::from_secs(30),
            "it did not wait"
        );
        return;
    }
    let rig = rig();
    rig.handler.slow.store(100_000, SeqCst);
    for nth in 0..3 {
        let part = page(rig.buffer, nth);
        thread::spawn(move || munmap(part));
    }
    while rig.handler.starts() < 2 {
        thread::yield_now();
    }
    thread::sleep(Duration::from_millis(10));
    let text = c"test result: ok. 1 passed (by exec)";
    let args = [c"echo".as_ptr(), text.as_ptr(), std::ptr::null()];
    // SAFETY: the strings end with a nul, the list with a null.
    unsafe { libc::execvp(c"echo".as_ptr(), args.as_ptr()) };
    panic!("{}", std::io::Error::last_os_error());
}

/// Memory whose discards take as long as the test wants.
struct Slow {
    inner: ProcessMemory,
    inside: AtomicBool,
    go: AtomicBool,
}

impl Memory for Slow {
    fn id(&self) -> u64 {
        self.inner.id()
    }
    fn arena(&self) -> Range {
        self.inner.arena()
    }
    fn page_sizes(&self) -> PageSizes {
        self.inner.page_sizes()
    }
    fn map(&self, range: Range, page: PageSize, rights: Rights) -> Result<(), MemoryError> {
        self.inner.map(range, page, rights)
    }
    fn unmap(&self, range: Range) -> Result<(), MemoryError> {
        self.inner.unmap(range)
    }
    fn discard(&self, range: Range) -> Result<(), MemoryError> {
        // As memory does that has never heard of the source: it is known by its thread, and not told twice.
        let args = [start(range), range.len() as usize, 4, 0, 0, 0];
        raw(libc::SYS_madvise, args).unwrap();
        self.inside.store(true, SeqCst);
        while !self.go.load(SeqCst) {
            thread::yield_now();
        }
        Ok(())
    }
    fn protect(&self, range: Range, rights: Rights) -> Result<(), MemoryError> {
        self.inner.protect(range, rights)
    }
    fn remap(&self, from: Range, to: Range) -> Result<(), MemoryError> {
        self.inner.remap(from, to)
    }
    fn translate(&self, addr: Addr) -> Option<Translation> {
        self.inner.translate(addr)
    }
}

#[test]
fn an_operation_of_the_space_hides_no_foreign_one_of_the_same_range() {
    if !in_child("an_operation_of_the_space_hides_no_foreign_one_of_the_same_range") {
        return;
    }
    let memory = Arc::new(Slow {
        inner: ProcessMemory::reserve(1 << 30).unwrap(),
        inside: AtomicBool::new(false),
        go: AtomicBool::new(false),
    });
    let rig = rig_over(memory.clone());
    let part = page(rig.buffer, 3);
    thread::scope(|scope| {
        scope.spawn(|| rig.space.discard(part).unwrap());
        while !memory.inside.load(SeqCst) {
            thread::yield_now();
        }
        assert_eq!(rig.handler.starts(), 1, "its own call is told once");
        // Whoever discards ends its invalidation, and the device may have the page again, before this is made.
        assert_eq!(munmap(part), Ok(0));
        memory.go.store(true, SeqCst);
    });
    assert_eq!(rig.handler.starts(), 2);
}

#[test]
fn nonsense_is_refused_by_the_kernel_and_by_nobody_else() {
    if !in_child("nonsense_is_refused_by_the_kernel_and_by_nobody_else") {
        return;
    }
    let rig = rig();
    let at = start(rig.arena);
    let (all, most) = (usize::MAX, usize::MAX - 1);
    let calls = [
        (libc::SYS_mremap, [at, all, most, 0, 0, 0]),
        (libc::SYS_mremap, [all & !0xfff, all, most, 1, 0, 0]),
        (libc::SYS_munmap, [at, all, 0, 0, 0, 0]),
        (libc::SYS_mprotect, [at, all - 0x2000, 0, 0, 0, 0]),
        (libc::SYS_mmap, [at, most, 0, 0x10, 0, 0]),
        (libc::SYS_fallocate, [all, 3, all, all, 0, 0]),
        (libc::SYS_ftruncate, [all, all, 0, 0, 0, 0]),
        (libc::SYS_truncate, [at, all, 0, 0, 0, 0]),
        (libc::SYS_shmat, [all, at, 0o40000, 0, 0, 0]),
    ];
    for (nr, args) in calls {
        assert!(raw(nr, args).is_err(), "call {nr}");
    }
    assert_eq!(munmap(page(rig.buffer, 0)), Ok(0), "and service goes on");
}

#[test]
fn what_the_kernel_rounds_is_told_as_it_rounds() {
    if !in_child("what_the_kernel_rounds_is_told_as_it_rounds") {
        return;
    }
    let rig = rig();
    map_file(page(rig.buffer, 4), file());
    let before = rig.handler.starts();
    // The kernel rounds this one's start down.
    let args = [start(page(rig.buffer, 4)) + 8, PAGE as usize, 0, 1, 0, 0];
    assert_eq!(raw(libc::SYS_remap_file_pages, args), Ok(0));
    assert_eq!(rig.handler.starts(), before + 1);
}

/// How often the supervisors have gone to sleep: once for each call, if there is some time between two.
fn naps() -> u64 {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let texts =
        threads.map(|thread| std::fs::read_to_string(thread.unwrap().path().join("status")));
    let texts = texts.map(Result::unwrap);
    let supervisors = texts.filter(|text| text.starts_with("Name:\tshootdown-super"));
    let naps = supervisors.map(|text| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        line.unwrap().trim().parse::<u64>().unwrap()
    });
    naps.sum()
}

#[test]
fn the_space_s_own_operations_go_round_the_supervisors() {
    if !in_child("the_space_s_own_operations_go_round_the_supervisors") {
        return;
    }
    let rig = rig();
    let (space, part) = (&rig.space, page(rig.buffer, 3));
    assert_eq!(munmap(page(rig.buffer, 1)), Ok(0));
    // For a moment one of them looks whether the other is stuck, then all sleep until there is a call.
    let deadline = Instant::now() + Duration::from_secs(10);
    let before = loop {
        let before = naps();
        thread::sleep(Duration::from_millis(50));
        if naps() == before {
            break before;
        }
        assert!(Instant::now() < deadline, "somebody looks for ever");
    };
    for _ in 0..10 {
        space.discard(part).unwrap();
        space.protect(part, Rights::READ).unwrap();
        let to = space.map(Map::anonymous(PAGE)).unwrap();
        space.unmap(to).unwrap();
        space.remap(part, to.start()).unwrap();
        space.remap(to, part.start()).unwrap();
    }
    thread::sleep(Duration::from_millis(20));
    assert_eq!(naps() - before, 0, "nobody was woken");
    let starts = rig.handler.starts();
    assert_eq!(munmap(page(rig.buffer, 2)), Ok(0));
    thread::sleep(Duration::from_millis(20));
    assert!(naps() > before, "a foreign one is served");
    assert_eq!(rig.handler.starts(), starts + 1);
}
