//! Who makes a call, and whether it means the same when a supervisor makes it.
//!
//! A supervisor has its callers' memory and, as a rule, whatever else they have. But a thread may have descriptors, a directory or
//! rights of its own, by `unshare` and raw system calls, and a child between vfork and exec has. Then a supervisor borrows the
//! descriptor; what it cannot borrow, its caller does himself.

use std::cell::Cell;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use super::SUPERVISORS;
use super::call::Call;
use crate::source::gate;

/// Who makes a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Caller {
    /// A supervisor: its handler waits for this very call.
    Supervisor,
    /// A thread of this process that is known to have been one before it made this call. While it waits it does not end by itself, and is
    /// killed, by a signal or an exec, with its process only, and the supervisors with that.
    Own,
    /// A thread of this process, or another process with its memory: between vfork and exec.
    InThisMemory,
    Other,
}

/// The supervisors' numbers: there before anything is received.
static THREADS: [AtomicU32; SUPERVISORS] = [const { AtomicU32::new(0) }; SUPERVISORS];

/// This thread is a supervisor.
pub(super) fn supervises(nth: usize) {
    THREADS[nth].store(own_thread(), Ordering::Relaxed);
}

fn is_supervisor(thread: u32) -> bool {
    let mut all = THREADS.iter().map(|one| one.load(Ordering::Relaxed));
    all.any(|one| one == thread)
}

/// Who is known to a supervisor.
pub(super) struct Known {
    /// The number of this process, and of its first thread; nobody else's while the process lives, and the supervisor in it, also when that
    /// thread has ended.
    process: u32,
    /// Other threads of this process that it has seen make calls; no supervisors.
    threads: [Cell<u32>; 16],
}

impl Known {
    pub(super) fn new() -> Self {
        Self {
            process: std::process::id(),
            threads: Default::default(),
        }
    }

    /// Who makes a call, by the number of the thread.
    ///
    /// The number may have been another process's when the call was received, and a thread's of this one by now, if the caller was killed
    /// meanwhile. Numbers are given out in turn. For that to happen to one that was a thread's here before, it would have to
    /// be given out twice, once to that process and once back, between two calls, and the second time since this was received.
    pub(super) fn caller(&self, thread: u32) -> Caller {
        // Without a question, which is a system call.
        if thread == self.process {
            return Caller::Own;
        }
        let known = &self.threads[thread as usize % self.threads.len()];
        if is_of_this_process(thread) {
            if known.get() == thread {
                Caller::Own
            } else if is_supervisor(thread) {
                Caller::Supervisor
            } else {
                known.set(thread);
                Caller::InThisMemory
            }
        } else {
            known.take();
            match shares(thread, KCMP_VM) {
                true => Caller::InThisMemory,
                false => Caller::Other,
            }
        }
    }
}

// Of `kcmp`.
const KCMP_VM: i32 = 1;
const KCMP_FILES: i32 = 2;
const KCMP_FS: i32 = 3;

/// Whether a thread has the same of this as the one that asks. False also where the kernel does not say.
fn shares(thread: u32, what: i32) -> bool {
    // SAFETY: numbers only.
    unsafe { libc::syscall(libc::SYS_kcmp, own_thread(), thread, what, 0, 0) == 0 }
}

pub(super) fn own_thread() -> u32 {
    // SAFETY: no arguments.
    unsafe { libc::syscall(libc::SYS_gettid) as u32 }
}

/// Whether a thread is one of this process. Its clock of processor time is known to those only: of the questions that tell, the
/// cheapest.
fn is_of_this_process(thread: u32) -> bool {
    // `CPUCLOCK_PERTHREAD_MASK`, `CPUCLOCK_SCHED` of `include/linux/posix-timers_types.h`.
    const OF_A_THREAD: i32 = 4;
    const PROCESSOR_TIME: i32 = 2;
    let clock = !(thread as i32) << 3 | OF_A_THREAD | PROCESSOR_TIME;
    let args = [clock as usize, 0, 0, 0, 0, 0];
    // SAFETY: numbers only; nothing is written to where nothing is.
    unsafe { gate::own_call(libc::SYS_clock_getres, args) }.is_ok()
}

/// How a supervisor can make a call in the place of its caller.
#[derive(Debug)]
pub(super) enum StandIn {
    AsItIs,
    /// With this descriptor instead of the caller's own.
    With(OwnedFd),
    /// It cannot.
    Not,
}

impl StandIn {
    #[inline]
    pub(super) fn find(call: &Call, thread: u32) -> Self {
        match call.nr {
            // Addresses only.
            libc::SYS_munmap => Self::AsItIs,
            _ => Self::find_for(call, thread),
        }
    }

    #[inline(never)]
    fn find_for(call: &Call, thread: u32) -> Self {
        if call.takes_path() && !shares(thread, KCMP_FS)
            || call.asks_for_rights() && !has_rights_of_this(thread)
        {
            return Self::Not;
        }
        match call.descriptor() {
            Some(fd) if !shares(thread, KCMP_FILES) => match borrow(thread, fd) {
                Some(fd) => Self::With(fd),
                None => Self::Not,
            },
            _ => Self::AsItIs,
        }
    }
}

/// A thread's descriptor.
#[cold]
fn borrow(thread: u32, fd: usize) -> Option<OwnedFd> {
    const PIDFD_THREAD: i32 = libc::O_EXCL;
    // Other threads than a process's first can be named since Linux 6.9.
    let process = [PIDFD_THREAD, 0].into_iter().find_map(|flags| {
        // SAFETY: numbers only.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, thread, flags) };
        // SAFETY: opened just now.
        (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as i32) })
    })?;
    // SAFETY: numbers only.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0) };
    // SAFETY: made just now.
    (fd >= 0).then(|| unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// What `/proc/PID/status` tells of a thread.
struct Status {
    text: [u8; 4096],
    len: usize,
}

impl Status {
    fn read(thread: u32) -> Option<Self> {
        let mut path = [0u8; 32];
        // Too short to be cut; the rest stays zero.
        write!(&mut path[..31], "/proc/{thread}/status").ok()?;
        let flags = libc::O_RDONLY | libc::O_CLOEXEC;
        // SAFETY: the path ends with a nul.
        let fd = unsafe { libc::open(path.as_ptr().cast(), flags) };
        if fd < 0 {
            return None;
        }
        // SAFETY: opened just now.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut text = [0u8; 4096];
        // SAFETY: the buffer is as long as said.
        let read = unsafe { libc::read(fd.as_raw_fd(), text.as_mut_ptr().cast(), text.len()) };
        let len = usize::try_from(read).ok()?;
        Some(Self { text, len })
    }

    fn line(&self, name: &[u8]) -> Option<&[u8]> {
        let mut lines = self.text[..self.len].split_inclusive(|byte| *byte == b'\n');
        lines.find(|line| line.starts_with(name) && line.ends_with(b"\n"))
    }
}

/// Whether a thread may do what this one may. Apart: it has a large frame.
#[cold]
#[inline(never)]
fn has_rights_of_this(thread: u32) -> bool {
    let (Some(one), Some(other)) = (Status::read(own_thread()), Status::read(thread)) else {
        return false;
    };
    let lines: [&[u8]; 4] = [b"Uid:", b"Gid:", b"Groups:", b"CapEff:"];
    lines
        .into_iter()
        .all(|name| one.line(name).is_some() && one.line(name) == other.line(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_has_what_its_process_has_until_it_parts_with_it() {
        let here = own_thread();
        let same = move |thread| [KCMP_FILES, KCMP_FS].map(|what| shares(thread, what));
        let parted = std::thread::spawn(move || {
            assert!(has_rights_of_this(here));
            let known = Known::new();
            // The first thread, whatever was seen of it; one that is not the first.
            assert_eq!(known.caller(std::process::id()), Caller::Own);
            let twice = [(); 2].map(|()| known.caller(own_thread()));
            assert_eq!(twice, [Caller::InThisMemory, Caller::Own]);
            // A process that has nothing to do with this one; then the number is a thread's here anew.
            known.threads[1].set(1);
            assert_eq!(known.caller(1), Caller::Other);
            assert_eq!(known.threads[1].get(), 0);
            assert_eq!(same(here), [true, true]);
            // SAFETY: numbers only.
            let parted = unsafe { libc::unshare(libc::CLONE_FS | libc::CLONE_FILES) };
            assert_eq!(parted, 0);
            assert_eq!(same(here), [false, false]);
        });
        parted.join().unwrap();
        assert!(!has_rights_of_this(1 << 30), "nobody has that number");
    }
}
