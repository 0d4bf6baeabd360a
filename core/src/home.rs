//! Where a thread is at home: in what it has alone it counts and records by a load and a store, and in what all share it begins to look
//! where no other does.
//!
//! A thread takes a number when it is first asked for one, and there are [`HOMES`] that one thread has at a time. When they have all been
//! given out a newcomer takes over that of a thread that has ended: so there are as many as threads live, not as
//! ever were. Nobody says when a thread ends: that would need a destructor, which allocates where it is registered, in a path which may
//! not. Who looks for a home asks the kernel instead.

#[cfg(not(loom))]
use crate::primitive::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Homes of one thread each; further numbers are any thread's. Under the checker all threads are at home at the same place, which is where
/// they meet.
pub(crate) const HOMES: usize = if cfg!(loom) { 0 } else { 64 };

/// The number of this thread. Below [`HOMES`] it is that of no other for as long as this one lives; and what the one wrote who had it
/// before this one has seen. Neither allocates nor registers a destructor, on first use either.
#[cfg(not(loom))]
#[inline]
pub(crate) fn home() -> usize {
    use std::cell::Cell;
    crate::primitive::thread_local! {
        static HOME: Cell<usize> = const { Cell::new(usize::MAX) };
    }
    HOME.with(|home| {
        if home.get() == usize::MAX {
            home.set(settle());
        }
        home.get()
    })
}

#[cfg(loom)]
pub(crate) fn home() -> usize {
    0
}

/// Process and thread, as the kernel counts them, that have a home. After a fork those of the parent are none of the child's: of them one lives
/// on, and nobody knows which.
#[cfg(not(loom))]
static OWNERS: [AtomicU64; HOMES] = [const { AtomicU64::new(0) }; HOMES];

#[cfg(not(loom))]
#[cold]
fn settle() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    // Relaxed: the number orders nothing.
    let fresh = NEXT.fetch_add(1, Ordering::Relaxed);
    // The threads of a simulation are none of the kernel's, and their steps may not depend on its numbers.
    if cfg!(sim) {
        return fresh;
    }
    // SAFETY: no arguments, no memory; always succeeds.
    let thread = unsafe { libc::syscall(libc::SYS_gettid) } as u32;
    let process = std::process::id();
    let this = u64::from(process) << 32 | u64::from(thread);
    if let Some(owner) = OWNERS.get(fresh) {
        owner.store(this, Ordering::Relaxed);
        return fresh;
    }
    let free = OWNERS.iter().position(|owner| {
        // Relaxed: what a thread did is over when the kernel does not know it any more, and whoever asks it comes after that.
        let last = owner.load(Ordering::Relaxed);
        last >> 32 == u64::from(process)
            && has_ended(process, last as u32)
            && (owner.compare_exchange(last, this, Ordering::Relaxed, Ordering::Relaxed)).is_ok()
    });
    free.unwrap_or(fresh)
}

/// Whether this process has no thread of this number.
#[cfg(not(loom))]
fn has_ended(process: u32, thread: u32) -> bool {
    // SAFETY: no signal is sent.
    let said = unsafe { libc::syscall(libc::SYS_tgkill, process, thread, 0) };
    said == -1 && std::io::Error::last_os_error().raw_os_error() == Some(libc::ESRCH)
}
