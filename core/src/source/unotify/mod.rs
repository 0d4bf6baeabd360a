//! unotify: seccomp hands the calls of others to a supervisor, which shoots down, performs the call, and answers.
//!
//! A filter ([`filter`]) on every thread of the process stops the calls that can change what is watched; calls elsewhere in the address
//! space are not touched. The caller sleeps in the kernel. A supervisor thread receives the call, runs the phases of the
//! invalidation up to the change, makes the call itself in the same process, tells the handlers how it ended, and only then answers with the
//! result, or the errno: a full barrier, also for raw system calls and code that is linked statically.
//!
//! # What is on which thread
//! The filter is installed for all threads at once (TSYNC), the supervisors among them, and inherited by those that come later. What exempts
//! the supervisors' calls is not the thread, which a filter cannot see, but the place that they come from: the [`gate`]. The
//! supervisors wait for calls before the filter exists: the start of a thread allocates, on both sides, while somebody who holds the
//! allocator's lock may be waiting for it. There are three. One receives and serves; where a call lasts longer than one to two
//! milliseconds another takes over, so that two run handlers then, and the third receives what comes meanwhile, and tells a handler
//! that makes a call which a supervisor would have to serve EDEADLK. Calls that take less are served one after the other.
//!
//! # Whose call it is
//! A supervisor makes the call that its caller meant. A thread may have descriptors, a directory, a user of its own (`unshare`, raw
//! system calls), and a child between vfork and exec has descriptors of its own. Descriptors are borrowed (`pidfd_getfd`). Where the kernel
//! forbids that, forbids the comparison (`kcmp`), or directory or rights differ, the caller makes the call himself when the
//! invalidation has ended: before, but no barrier. The self-test sees where that is so for all. Another process's thread that is killed
//! meanwhile is not represented: its call is not made. A thread of this process is killed with the supervisors only.
//!
//! # Arenas
//! What lies in the arena of a managed space is unmapped, moved away or detached by others as they like, but its addresses stay
//! reserved: the space counts them as mapped until it unmaps them itself, and nobody else is to be given them. A supervisor
//! reserves where it would unmap, so there is no moment between. Three calls leave one, in which somebody else's `mmap` may be given
//! them: an `mremap` that moves *and* grows; one that moves what the kernel does not move with `MREMAP_DONTUNMAP` (huge pages, memory
//! of devices, and before Linux 5.13 all that is not private and anonymous); and `shmdt`.
//!
//! # What it does not see
//! * What is no call of a thread of this process: other processes that change a file, whatever an io_uring does, and what the kernel does
//!   by itself: copies on write after a fork, merging (KSM), compaction, reclaim. A vfork child is this process, a fork's is not.
//! * `open` with `O_TRUNC`. It would have to be stopped by path, and a program that this one has started could not truncate any
//!   more once this one is gone. Nor direct writes (`O_DIRECT`) to a file, and what else a file system does to its pages.
//! * `PAGEMAP_SCAN` with write protection; tagged addresses, where a processor ignores their upper bits.
//! * A mapping that another thread makes of a file while this one truncates it, in a place where nothing was mapped.
//!
//! The [`Operations`](crate::Operations) of these that have a name are tried by the self-test, and a driver that lists one is refused.
//!
//! # What stays
//! A filter is permanent, and a process has one listener. So the supervisors live as long as the process; a source that is stopped
//! takes its range from their list, and what is handed over for nobody is performed as it is. Programs that the process starts inherit
//! the filter: their calls are let go on while this process lives. Later, and at once in what this process itself becomes by
//! `exec`, the calls that the filter stops fail with ENOSYS: those that lie at the same addresses, and those that a filter cannot
//! tell by address (`ftruncate`, `truncate`, punching `fallocate`, discarding `process_madvise`, `migrate_pages`, `move_pages`, two requests
//! to a userfaultfd). Programs of another architecture, 32-bit ones too, get ENOSYS for every call. A child that was not forked by the C
//! library's `fork` keeps the listener, and when its parent is gone waits for itself where its calls are stopped.
//!
//! # Signals (R35)
//! A caller that was interrupted after its call was performed would make it again, on what is a new mapping by then. So the filter is
//! only installed where the kernel lets a caller be killed but not interrupted once its call was received (WAIT_KILLABLE_RECV,
//! Linux 5.19). Before that, for the moment until a supervisor has received it, it may be interrupted: nothing has happened yet, and
//! the call is made anew, or fails with EINTR where the signal's handler does not restart calls (no `SA_RESTART`).

mod call;
mod caller;
mod filter;
#[cfg(all(any(test, fuzzing), not(loom)))]
pub(crate) mod fuzz;
mod listener;
mod maps;
mod perform;
mod supervisor;

use std::io;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, OnceLock, PoisonError};

use self::filter::{RANGES, Watch};
use self::maps::Maps;
use self::supervisor::{Supervisor, supervise};
use super::operation::{Operation, Operations, Sees};
use super::service;
use super::{Sink, Source, SourceError, gate};
use crate::addr::Range;

/// Supervisors of a process: all but one may run handlers at a time.
const SUPERVISORS: usize = 3;

/// Seccomp user notification. Opt-in: read the module's notes on what stays. Any number of values stand for the one listener that
/// a process has.
#[derive(Debug, Default)]
pub struct Unotify(());

/// Before, as a barrier, and with an end: whatever threads do by system calls. Not what goes round them.
pub(super) fn declares(operation: Operation) -> Sees {
    if Operations::CALLS.contains(operation.flag()) {
        Sees::TOLD | Sees::BEFORE | Sees::BARRIER | Sees::END
    } else {
        Sees::empty()
    }
}

/// What was installed, once and for all.
struct Installed {
    ranges: Vec<Range>,
    process: u32,
}

static SUPERVISOR: OnceLock<Supervisor> = OnceLock::new();
static INSTALLED: Mutex<Option<Installed>> = Mutex::new(None);
/// What the supervisors wait for.
struct Listener {
    /// Its descriptor.
    fd: Option<i32>,
    /// How many of them do: the start of a thread allocates, and that is over then.
    ready: usize,
}

static LISTENER: (Mutex<Listener>, Condvar) =
    (Mutex::new(Listener { fd: None, ready: 0 }), Condvar::new());
/// What a child by fork has to close.
static INHERITED: AtomicI32 = AtomicI32::new(-1);
/// In the place of a descriptor: there is none to come.
const NONE_COMES: i32 = -1;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Unotify {
    pub(super) const NAME: &'static str = "unotify";

    /// The source. Nothing is installed before it is started.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Source for Unotify {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn declares(&self, operation: Operation) -> Sees {
        declares(operation)
    }

    fn start(&self, sinks: &[Arc<Sink>]) -> Result<(), SourceError> {
        let supervisor = install(sinks)?;
        supervisor.add(sinks)
    }

    fn stop(&self, sink: &Arc<Sink>) {
        if let Some(supervisor) = SUPERVISOR.get() {
            supervisor.remove(sink);
        }
    }
}

/// Installs the filter, or finds that what is installed is enough.
fn install(sinks: &[Arc<Sink>]) -> Result<&'static Supervisor, SourceError> {
    let name = Unotify::NAME;
    let Some(gate) = gate::address() else {
        return Err(SourceError::not_available(
            name,
            "it is written for x86-64 only",
        ));
    };
    let mut installed = lock(&INSTALLED);
    if let Some(installed) = &*installed {
        if installed.process != std::process::id() {
            return Err(SourceError::not_available(
                name,
                format!(
                    "process {} was forked off process {}, whose filter it has for good",
                    std::process::id(),
                    installed.process
                ),
            ));
        }
        for sink in sinks {
            let range = sink.range();
            if !installed.ranges.iter().any(|one| one.contains(range)) {
                return Err(SourceError::Elsewhere {
                    source_name: name,
                    range,
                    watched: installed.ranges[0],
                });
            }
        }
    } else {
        let ranges: Vec<Range> = sinks.iter().map(|sink| sink.range()).collect();
        let limit = RANGES;
        if ranges.len() > limit {
            return Err(SourceError::NoRoom { limit });
        }
        let open = || {
            Maps::open().map_err(|error| SourceError::System {
                call: "the opening of /proc/self/maps",
                error,
            })
        };
        let heap = heap(&open()?);
        let service = service::start()?;
        SUPERVISOR.get_or_init(|| Supervisor::new(service));
        *lock(&LISTENER.0) = Listener { fd: None, ready: 0 };
        for nth in 0..SUPERVISORS {
            let started = open().and_then(|maps| {
                let thread = std::thread::Builder::new().name("shootdown-supervisor".to_owned());
                let started = thread.spawn(move || supervise(nth, &maps));
                started.map_err(|error| SourceError::System {
                    call: "the start of a supervisor",
                    error,
                })
            });
            if let Err(error) = started {
                announce(NONE_COMES);
                return Err(error);
            }
        }
        // Before there is anything to close: a child of whatever moment closes it.
        static FORKS: Once = Once::new();
        // SAFETY: the function is safe to call in a child.
        FORKS.call_once(|| unsafe {
            libc::pthread_atfork(None, None, Some(close_in_child));
        });
        let watch = Watch {
            gate,
            ranges: &ranges,
            heap: ranges.iter().any(|range| range.overlaps(heap)),
        };
        let mut program = watch.program();
        *installed = Some(Installed {
            ranges,
            process: std::process::id(),
        });
        let mut waiting = lock(&LISTENER.0);
        while waiting.ready < SUPERVISORS {
            waiting = LISTENER
                .1
                .wait(waiting)
                .unwrap_or_else(PoisonError::into_inner);
        }
        drop(waiting);
        // From here to the announcement nothing is allocated or freed: somebody may be waiting already.
        match listen(&mut program) {
            Ok(listener) => {
                INHERITED.store(listener, Ordering::Relaxed);
                announce(listener);
            }
            Err(error) => {
                announce(NONE_COMES);
                *installed = None;
                return Err(error);
            }
        }
    }
    Ok(SUPERVISOR
        .get()
        .expect("set before the filter is installed"))
}

/// A child that kept the listener would wait for an answer of its own for ever, once its parent is gone.
extern "C" fn close_in_child() {
    let listener = INHERITED.swap(-1, Ordering::Relaxed);
    if listener >= 0 {
        // SAFETY: the child's copy, which nobody in the child uses.
        unsafe { libc::close(listener) };
    }
}

fn announce(listener: i32) {
    lock(&LISTENER.0).fd = Some(listener);
    LISTENER.1.notify_all();
}

/// From the start of the heap to the next mapping: as far as it can grow.
fn heap(maps: &Maps) -> Range {
    // SAFETY: asks only.
    let end = unsafe { gate::own_call(libc::SYS_brk, [0; 6]) }.unwrap_or(0) as u64;
    let (mut first, mut next) = (end, u64::MAX);
    maps.each(|mapping| {
        if mapping.start < end && mapping.end >= end {
            first = mapping.start;
        } else if mapping.start >= end {
            next = next.min(mapping.start);
        }
    });
    Range::inclusive(first, next - 1).unwrap_or(Range::ALL)
}

/// Installs the program on all threads; the listener's descriptor.
fn listen(program: &mut [filter::Insn]) -> Result<i32, SourceError> {
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    let flags = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER
        | libc::SECCOMP_FILTER_FLAG_TSYNC
        | libc::SECCOMP_FILTER_FLAG_TSYNC_ESRCH
        | if planted!("r35") {
            0
        } else {
            libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
        };
    let attempt = || {
        // SAFETY: the program is as long as it says, and lives on.
        let listener = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                flags,
                &raw const program,
            )
        };
        match listener {
            -1 => Err(io::Error::last_os_error()),
            listener => Ok(listener as i32),
        }
    };
    let mut result = attempt();
    if matches!(&result, Err(error) if error.raw_os_error() == Some(libc::EACCES)) {
        // Without privilege the process first gives up gaining any.
        // SAFETY: numbers only.
        unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        result = attempt();
    }
    let unavailable = |reason| SourceError::not_available(Unotify::NAME, reason);
    match result {
        Ok(listener) => {
            // Wakes the supervisor on the caller's processor. Best effort: Linux 6.6.
            // SAFETY: takes the flag as a number.
            unsafe { libc::ioctl(listener, libc::SECCOMP_IOCTL_NOTIF_SET_FLAGS, 1u64) };
            Ok(listener)
        }
        Err(error) => Err(match error.raw_os_error() {
            Some(libc::EINVAL) => unavailable(
                "the kernel lacks killable waits (WAIT_KILLABLE_RECV, Linux 5.19): a caller that a signal interrupts would make its call twice",
            ),
            Some(libc::ENOSYS) => unavailable("the kernel has no seccomp"),
            Some(libc::EBUSY) => unavailable(
                "this process has a listener already, as under a supervising container runtime",
            ),
            Some(libc::ESRCH) => unavailable(
                "some thread has a filter of its own: start the source before others install theirs",
            ),
            _ => SourceError::System {
                call: "seccomp",
                error,
            },
        }),
    }
}
