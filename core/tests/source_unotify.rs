//! unotify: foreign calls, raw ones included, wait until the devices are flushed. Each test in a process of its own, as a filter
//! is permanent.

#[path = "support/child.rs"]
mod child;
#[path = "support/foreign.rs"]
mod foreign;
mod support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use child::in_child;
use foreign::*;
use shootdown::*;
use support::*;

/// A space over real memory, watched or not, with a mapping, a device and a registration.
struct Rig {
    space: AddressSpace,
    watched: Option<Watched>,
    buffer: Range,
    handler: Arc<Handler>,
    behaviour: Arc<Behaviour>,
    registration: Registration,
}

/// Counts, and does what the test says.
#[derive(Default)]
struct Handler {
    starts: AtomicU64,
    changed: AtomicU64,
    unchanged: AtomicU64,
    /// Milliseconds that `quiesce` takes.
    slow: AtomicU64,
    inside: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Notifier for Handler {
    fn quiesce<'o>(&self, op: &Op<'o>) -> Result<Drain<'o>, WouldBlock> {
        self.starts.fetch_add(1, SeqCst);
        thread::sleep(Duration::from_millis(self.slow.load(SeqCst)));
        if let Some(inside) = self.inside.lock().unwrap().take() {
            inside();
        }
        Ok(op.idle())
    }

    fn end(&self, _: &Op<'_>, outcome: Outcome) {
        let counter = match outcome {
            Outcome::Changed => &self.changed,
            _ => &self.unchanged,
        };
        counter.fetch_add(1, SeqCst);
    }
}

impl Handler {
    fn counts(&self) -> [u64; 3] {
        [&self.starts, &self.changed, &self.unchanged].map(|one| one.load(SeqCst))
    }
}

fn rig(watch: bool) -> Rig {
    let memory = Arc::new(ProcessMemory::reserve(1 << 30).unwrap());
    let arena = memory.arena();
    let space = AddressSpace::managed(memory, short());
    let unotify = || space.watch(Arc::new(Unotify::new()), arena).unwrap();
    let watched = watch.then(unotify);
    let buffer = space.map(Map::anonymous(16 * PAGE)).unwrap();
    touch(buffer);
    let (device, behaviour) = fake("device");
    let handler = Arc::new(Handler::default());
    let registration = space
        .register(buffer, handler.clone(), &on(&device))
        .unwrap();
    Rig {
        space,
        watched,
        buffer,
        handler,
        behaviour,
        registration,
    }
}

/// Whether the handler has run and the device has acknowledged when a raw munmap returns.
fn is_a_barrier(rig: &Rig) -> bool {
    rig.handler.slow.store(5, SeqCst);
    let part = page(rig.buffer, 3);
    let result = munmap(part);
    // No waiting here: what counts is what is so at the return.
    let counts = rig.handler.counts();
    assert_eq!(result, Ok(0));
    assert!(!is_mapped(part), "it was unmapped");
    let log = rig.behaviour.log.lock().unwrap();
    let flushed = log.iter().any(|command| match command.scope {
        Scope::Pages { range, .. } => range.overlaps(part),
        _ => true,
    });
    counts == [1, 1, 0] && flushed && rig.behaviour.polls.load(SeqCst) > 0
}

#[test]
fn a_raw_munmap_returns_when_the_device_has_acknowledged() {
    if in_child("a_raw_munmap_returns_when_the_device_has_acknowledged") {
        assert!(is_a_barrier(&rig(true)));
    }
}

#[test]
fn without_a_source_the_same_check_fails() {
    assert!(!is_a_barrier(&rig(false)));
}

#[test]
fn the_self_test_sees_what_is_declared() {
    if !in_child("the_self_test_sees_what_is_declared") {
        return;
    }
    let rig = rig(true);
    for tried in rig.watched.as_ref().unwrap().self_test() {
        match &tried.seen {
            Seen::Told(seen) => assert_eq!(*seen, tried.declares, "{}", tried.operation),
            Seen::NotTried(reason) => {
                let expected = [
                    Operation::Brk,
                    Operation::Fork,
                    Operation::MigratePages,
                    Operation::OtherProcess,
                ];
                assert!(
                    expected.contains(&tried.operation),
                    "{}: {reason}",
                    tried.operation
                );
            }
            _ => unreachable!(),
        }
    }
}

#[test]
fn a_failing_call_says_why_and_nothing_changed() {
    if !in_child("a_failing_call_says_why_and_nothing_changed") {
        return;
    }
    let rig = rig(true);
    // No room to grow in place.
    let first = page(rig.buffer, 0);
    let args = [start(first), PAGE as usize, 2 * PAGE as usize, 0, 0, 0];
    assert_eq!(raw(libc::SYS_mremap, args), Err(libc::ENOMEM));
    assert_eq!(rig.handler.counts(), [1, 0, 1]);
    // Refused by its arguments: nobody is bothered.
    let args = [start(first) + 1, PAGE as usize, 0, 0, 0, 0];
    assert_eq!(raw(libc::SYS_munmap, args), Err(libc::EINVAL));
    assert_eq!(rig.handler.counts(), [1, 0, 1]);
    // A remapping that is not shared.
    let args = [start(first), PAGE as usize, 0, 0, 0, 0];
    assert_eq!(raw(libc::SYS_remap_file_pages, args), Err(libc::EINVAL));
    assert!(is_mapped(first));
}

#[test]
fn signals_neither_end_the_wait_nor_repeat_the_call() {
    if !in_child("signals_neither_end_the_wait_nor_repeat_the_call") {
        return;
    }
    extern "C" fn count(_: i32) {
        SIGNALS.fetch_add(1, SeqCst);
    }
    static SIGNALS: AtomicU64 = AtomicU64::new(0);
    // SAFETY: the handler only counts; no SA_RESTART, so that a wait which can be interrupted is.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = count as *const () as usize;
        libc::sigaction(libc::SIGUSR1, &action, std::ptr::null_mut());
    }
    let rig = rig(true);
    rig.handler.slow.store(30, SeqCst);
    let part = page(rig.buffer, 5);
    let (sender, receiver) = mpsc::channel();
    let caller = thread::spawn(move || {
        // SAFETY: no arguments.
        sender.send(unsafe { libc::pthread_self() }).unwrap();
        munmap(part)
    });
    let thread = receiver.recv().unwrap();
    for _ in 0..10 {
        thread::sleep(Duration::from_millis(2));
        // SAFETY: the thread is not joined yet.
        unsafe { libc::pthread_kill(thread, libc::SIGUSR1) };
    }
    assert_eq!(caller.join().unwrap(), Ok(0), "not EINTR");
    assert_eq!(rig.handler.counts(), [1, 1, 0], "performed once");
    assert!(SIGNALS.load(SeqCst) > 0, "the signals came, late");
}

#[test]
fn children_are_left_alone() {
    if !in_child("children_are_left_alone") {
        return;
    }
    let rig = rig(true);
    rig.handler.slow.store(50, SeqCst);
    let part = page(rig.buffer, 7);
    let caller = thread::spawn(move || munmap(part));
    thread::sleep(Duration::from_millis(10));
    // A fork during the wait: its calls at the same addresses are its own.
    // SAFETY: the child makes system calls only.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // The arena is not in the child: it makes a mapping there, and takes it away.
        let mapped = map_fixed(part);
        let gone = munmap(part) == Ok(0) && !is_mapped(part);
        // SAFETY: ends the child.
        unsafe { libc::_exit(i32::from(!(mapped && gone))) };
    }
    let mut status = 0;
    // SAFETY: the child just made.
    unsafe { libc::waitpid(child, &mut status, 0) };
    assert_eq!(status, 0, "what a child does is its own");
    assert_eq!(caller.join().unwrap(), Ok(0));
    assert_eq!(rig.handler.counts(), [1, 1, 0]);
    // By way of vfork and exec.
    let status = std::process::Command::new("true").status().unwrap();
    assert!(status.success());
    let shell = "f=$(mktemp) && echo text > $f && : > $f && rm $f";
    let status = std::process::Command::new("sh")
        .args(["-c", shell])
        .status();
    assert!(status.unwrap().success(), "also where it truncates");
    assert_eq!(rig.handler.counts(), [1, 1, 0]);
}

#[test]
fn a_source_stops_while_calls_wait() {
    if !in_child("a_source_stops_while_calls_wait") {
        return;
    }
    let mut rig = rig(true);
    rig.handler.slow.store(60, SeqCst);
    let callers: Vec<_> = (0..6)
        .map(|nth| page(rig.buffer, nth))
        .map(|part| thread::spawn(move || munmap(part)))
        .collect();
    while rig.handler.counts()[0] == 0 {
        thread::yield_now();
    }
    rig.watched
        .take()
        .unwrap()
        .stop()
        .map_err(|(_, error)| error)
        .unwrap();
    let [starts, changed, _] = rig.handler.counts();
    assert_eq!(starts, changed, "what had begun is over");
    assert!(starts >= 1);
    for caller in callers {
        assert_eq!(caller.join().unwrap(), Ok(0), "nobody hangs, nobody fails");
    }
    assert_eq!(rig.handler.counts()[0], starts, "nothing is told any more");
    assert_eq!(
        munmap(page(rig.buffer, 9)),
        Ok(0),
        "the filter stays and serves"
    );
    assert_eq!(rig.handler.counts()[0], starts);
    // Watched anew, more often than there are places.
    let arena = rig.buffer;
    let unotify = Arc::new(Unotify::new());
    for _ in 0..9 {
        drop(rig.space.watch(unotify.clone(), arena).unwrap());
    }
    let _watched = rig.space.watch(unotify.clone(), arena).unwrap();
    // What was unmapped while nobody watched is nobody's: the page that the self-test tries its calls on may lie there.
    let starts = rig.handler.counts()[0];
    assert_eq!(munmap(page(rig.buffer, 10)), Ok(0));
    assert_eq!(rig.handler.counts()[0], starts + 1);
    let elsewhere = Range::new(0x1000_0000u64, PAGE).unwrap();
    assert!(matches!(
        rig.space.watch(unotify, elsewhere),
        Err(SourceError::Elsewhere { .. })
    ));
}

#[test]
fn a_device_that_does_not_acknowledge_keeps_its_pages() {
    if !in_child("a_device_that_does_not_acknowledge_keeps_its_pages") {
        return;
    }
    let rig = rig(true);
    rig.behaviour.loses_all.store(true, SeqCst);
    let part = page(rig.buffer, 2);
    assert_eq!(munmap(part), Err(libc::EBUSY));
    assert!(is_mapped(part), "the device may still reach it");
    let before = Instant::now();
    assert!(!map_fixed(part), "nor is it replaced");
    assert!(
        before.elapsed() < Duration::from_millis(15),
        "a dead device is not waited for twice"
    );
}

#[test]
fn a_handler_that_makes_a_watched_call_is_told_so() {
    if !in_child("a_handler_that_makes_a_watched_call_is_told_so") {
        return;
    }
    let rig = rig(true);
    let told = Arc::new(AtomicBool::new(false));
    let (flag, other) = (told.clone(), page(rig.buffer, 12));
    *rig.handler.inside.lock().unwrap() = Some(Box::new(move || {
        flag.store(munmap(other) == Err(libc::EDEADLK), SeqCst);
    }));
    assert_eq!(munmap(page(rig.buffer, 1)), Ok(0));
    assert!(told.load(SeqCst));
    assert!(is_mapped(other));
}

#[test]
fn what_callbacks_put_off_runs_elsewhere_after_the_answer() {
    if !in_child("what_callbacks_put_off_runs_elsewhere_after_the_answer") {
        return;
    }
    struct Last(mpsc::Sender<(String, bool)>, Range);
    impl Notifier for Last {
        fn release(&self) {
            // A release may do anything, also a watched call.
            let unmapped = munmap(self.1) == Ok(0);
            let name = thread::current().name().unwrap_or("").to_owned();
            self.0.send((name, unmapped)).unwrap();
        }
    }
    let rig = rig(true);
    let (sender, receiver) = mpsc::channel();
    let last = Arc::new(Last(sender, page(rig.buffer, 14)));
    let other = rig.space.register(page(rig.buffer, 15), last, &[]).unwrap();
    let newcomer = Arc::new(Counting::default());
    let prepared = rig
        .space
        .prepare(rig.buffer, newcomer.clone(), &[])
        .unwrap();
    let inserted = Arc::new(Mutex::new(None));
    let place = inserted.clone();
    *rig.handler.inside.lock().unwrap() = Some(Box::new(move || {
        assert_eq!(other.unregister(), Ok(Unregistered::Deferred));
        *place.lock().unwrap() = Some(prepared.insert().unwrap());
    }));
    assert_eq!(munmap(page(rig.buffer, 1)), Ok(0));
    let (thread, unmapped) = receiver.recv_timeout(Duration::from_secs(5)).unwrap();
    assert_eq!(thread, "shootdown-service");
    assert!(unmapped);
    // By now the newcomer is visible too: it was handed over with the release, or at its own time soon.
    let deadline = Instant::now() + Duration::from_secs(5);
    for nth in 2.. {
        assert!(Instant::now() < deadline && nth < 12);
        assert_eq!(munmap(page(rig.buffer, nth)), Ok(0));
        if newcomer.starts.load(SeqCst) > 0 {
            break;
        }
    }
}

#[test]
fn the_space_s_own_operations_are_told_once() {
    if !in_child("the_space_s_own_operations_are_told_once") {
        return;
    }
    let rig = rig(true);
    rig.space.unmap(page(rig.buffer, 0)).unwrap();
    assert_eq!(rig.handler.counts(), [1, 1, 0]);
    rig.space.discard(page(rig.buffer, 1)).unwrap();
    rig.space
        .protect(page(rig.buffer, 2), Rights::READ)
        .unwrap();
    assert_eq!(rig.handler.counts(), [3, 3, 0]);
    assert_eq!(rig.registration.unregister(), Ok(Unregistered::Released));
    assert_eq!(munmap(page(rig.buffer, 3)), Ok(0), "with nobody registered");
    rig.space.exit().unwrap();
    assert_eq!(munmap(page(rig.buffer, 4)), Ok(0), "after the exit");
}

#[test]
fn a_truncation_is_told_wherever_the_file_is_mapped() {
    if !in_child("a_truncation_is_told_wherever_the_file_is_mapped") {
        return;
    }
    let rig = rig(true);
    // SAFETY: a name, and a descriptor of this test.
    let fd = unsafe { libc::memfd_create(c"file".as_ptr(), 0) };
    assert_eq!(
        raw(
            libc::SYS_ftruncate,
            [fd as usize, 4 * PAGE as usize, 0, 0, 0, 0]
        ),
        Ok(0)
    );
    let [one, two] = [page(rig.buffer, 4), page(rig.buffer, 8)];
    for (at, offset) in [(one, 0), (two, 3 * PAGE as usize)] {
        let flags = (libc::MAP_SHARED | libc::MAP_FIXED) as usize;
        let args = [start(at), PAGE as usize, 3, flags, fd as usize, offset];
        assert_eq!(raw(libc::SYS_mmap, args), Ok(start(at)));
    }
    assert_eq!(rig.handler.counts(), [2, 2, 0]);
    // Behind the first page.
    assert_eq!(
        raw(
            libc::SYS_ftruncate,
            [fd as usize, PAGE as usize, 0, 0, 0, 0]
        ),
        Ok(0)
    );
    assert_eq!(rig.handler.counts(), [3, 3, 0]);
    assert_eq!(
        raw(libc::SYS_ftruncate, [fd as usize, 0, 0, 0, 0, 0]),
        Ok(0)
    );
    assert_eq!(rig.handler.counts(), [5, 5, 0]);
}
