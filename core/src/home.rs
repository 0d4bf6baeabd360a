//! Where a thread is at home: in what it has alone it counts and records by a load and a store, and in what all share it begins to look
//! where no other does.
//!
//! A thread takes a number when it is first asked for one, and there are [`HOMES`] that one thread has at a time. When they have all been
//! given out a newcomer takes over that of a thread that has ended: so there are as many as threads live, not as
//! ever were. Nobody says when a thread ends: that would need a destructor, which allocates where it is registered, in a path which may
//! not. Who looks for a home asks the kernel instead.

/// Homes of one thread each; further numbers are any thread's. Under the checker all threads are at home at the same place, which is where
/// they meet.
pub(crate) const HOMES: usize = if cfg!(loom) { 0 } else { 64 };

#[cfg(loom)]
pub(crate) fn home() -> usize {
    0
}

#[cfg(not(loom))]
pub(crate) use self::taken::home;

#[cfg(not(loom))]
mod taken {
    use std::cell::Cell;

    use memmap2::MmapMut;

    use super::HOMES;
    use crate::primitive::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering};
    use crate::primitive::thread_local;

    /// The number of this thread. Below [`HOMES`] it is that of no other for as long as this one lives; and what the one wrote who had it
    /// before this one has seen. Neither allocates nor registers a destructor, on first use either.
    #[inline]
    pub(crate) fn home() -> usize {
        thread_local! {
            static HOME: Cell<usize> = const { Cell::new(usize::MAX) };
        }
        HOME.with(|home| {
            if home.get() == usize::MAX {
                home.set(settle());
            }
            home.get()
        })
    }

    #[cold]
    fn settle() -> usize {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        // Relaxed: the number orders nothing.
        let fresh = NEXT.fetch_add(1, Ordering::Relaxed);
        // The threads of a simulation are none of the kernel's, and their steps may not depend on its numbers.
        if cfg!(sim) {
            return fresh;
        }
        // Where there is no page for it nobody takes anything over.
        let Some(owners) = owners() else {
            return fresh;
        };
        // SAFETY: no arguments, no memory; always succeeds.
        let this = unsafe { libc::syscall(libc::SYS_gettid) } as u32;
        if let Some(owner) = owners.get(fresh) {
            owner.store(this, Ordering::Relaxed);
            return fresh;
        }
        let process = std::process::id();
        let free = owners.iter().position(|owner| {
            // Relaxed: what a thread did is over when the kernel does not know it any more, and whoever asks it comes after that.
            let last = owner.load(Ordering::Relaxed);
            let (success, failure) = (Ordering::Relaxed, Ordering::Relaxed);
            last != 0
                && has_ended(process, last)
                && (owner.compare_exchange(last, this, success, failure)).is_ok()
        });
        free.unwrap_or(fresh)
    }

    /// Threads that have a home, as the kernel counts them; 0 where nobody has yet.
    type Owners = [AtomicU32; HOMES];

    /// In a page that is zeroes again in a child by fork: one of its parent's threads lives on there, under another number, and with its
    /// home.
    fn owners() -> Option<&'static Owners> {
        static OWNERS: AtomicPtr<Owners> = AtomicPtr::new(std::ptr::null_mut());
        // Acquire, with the Release below: the advice was taken.
        let mut owners = OWNERS.load(Ordering::Acquire);
        if owners.is_null() {
            let page = MmapMut::map_anon(size_of::<Owners>()).ok()?;
            let (at, len) = (page.as_ptr().cast_mut(), page.len());
            // SAFETY: the page of this function's own.
            if unsafe { libc::madvise(at.cast(), len, libc::MADV_WIPEONFORK) } != 0 {
                return None;
            }
            let (success, failure) = (Ordering::AcqRel, Ordering::Acquire);
            match OWNERS.compare_exchange(owners, at.cast(), success, failure) {
                Ok(_) => {
                    // It stays for as long as there are threads.
                    std::mem::forget(page);
                    owners = at.cast();
                }
                Err(others) => owners = others,
            }
        }
        // SAFETY: in a page that stays, and is written to as these atomics alone, for which 0 is a value like any other.
        Some(unsafe { &*owners })
    }

    /// Whether this process has no thread of this number.
    fn has_ended(process: u32, thread: u32) -> bool {
        // SAFETY: no signal is sent.
        let said = unsafe { libc::syscall(libc::SYS_tgkill, process, thread, 0) };
        said == -1 && std::io::Error::last_os_error().raw_os_error() == Some(libc::ESRCH)
    }
}
