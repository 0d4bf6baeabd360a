//! Every atomic, lock, thread-local and yield of this crate goes through this module: those of `shootdown_primitive` by default (the
//! standard library's; a simulation's under `--cfg sim`), the model checker's under `--cfg loom`, so that the checker runs the
//! code that ships.
//!
//! Locks are the standard library's on purpose. On Linux they are one futex word each and never allocate, neither when they
//! are made nor when they are waited for; a lock that parks its waiters in a table of its own allocates for each new thread, which
//! the shootdown path may not. Poisoning is ignored: whoever panics under a lock here is contained by the engine, and what the lock
//! protects is changed in steps that each leave it whole.

use std::mem::ManuallyDrop;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc as StdArc;

pub(crate) use shootdown_primitive::time::{Duration, Instant};

#[cfg(not(loom))]
mod imp {
    pub(crate) use shootdown_primitive::sync::{Arc, Condvar, Mutex, MutexGuard, atomic};
    pub(crate) use shootdown_primitive::{hint, thread, thread_local};
}

#[cfg(loom)]
mod imp {
    pub(crate) use loom::sync::{Arc, Condvar, Mutex, MutexGuard};
    pub(crate) use loom::{hint, thread, thread_local};

    pub(crate) mod atomic {
        pub(crate) use loom::sync::atomic::*;
    }
}

pub(crate) use imp::{Arc, MutexGuard, atomic, hint, thread, thread_local};

/// A mutex without poisoning.
#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(imp::Mutex<T>);

impl<T> Mutex<T> {
    #[cfg(not(loom))]
    pub(crate) const fn new(value: T) -> Self {
        Self(imp::Mutex::new(value))
    }

    /// Not `const`: the checker numbers its objects when they are made.
    #[cfg(loom)]
    pub(crate) fn new(value: T) -> Self {
        Self(imp::Mutex::new(value))
    }

    /// Waits for the holder.
    #[inline]
    #[cfg_attr(sim, track_caller)]
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        match self.0.lock() {
            Ok(guard) => guard,
            Err(poisoned) => poisoned.into_inner(),
        }
    }

    /// `None` if it is held.
    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        use std::sync::TryLockError;
        match self.0.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

/// A condition variable for [`Mutex`].
#[derive(Debug, Default)]
pub(crate) struct Condvar(imp::Condvar);

impl Condvar {
    pub(crate) fn new() -> Self {
        Self(imp::Condvar::new())
    }

    /// Lets the lock go, sleeps until it is notified or for no reason at all, and takes the lock again.
    #[cfg_attr(sim, track_caller)]
    pub(crate) fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        match self.0.wait(guard) {
            Ok(guard) => guard,
            Err(poisoned) => poisoned.into_inner(),
        }
    }

    /// As [`Condvar::wait`], for `timeout` at most. The caller looks at the clock, as it must anyway.
    ///
    /// Under the checker time stands still and `timeout` never passes: a wake-up that is lost is then a deadlock, which
    /// the checker reports, where a timeout would have papered over it.
    #[cfg_attr(sim, track_caller)]
    pub(crate) fn wait_timeout<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        timeout: Duration,
    ) -> MutexGuard<'a, T> {
        match self.0.wait_timeout(guard, timeout) {
            Ok((guard, _)) => guard,
            Err(poisoned) => poisoned.into_inner().0,
        }
    }

    /// Wakes every waiter.
    pub(crate) fn notify_all(&self) {
        self.0.notify_all();
    }
}

/// The clock. The checker has none; nothing that it explores may depend on it.
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// A counter of the processor that only orders and spaces records: the same on all its cores where it is invariant, as on everything
/// that has an IOMMU. Nothing is concluded from it.
#[cfg(not(sim))]
pub(crate) fn ticks() -> u64 {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: reads a counter, and nothing else.
    #[allow(unused_unsafe, reason = "safe in newer compilers than the stated one")]
    unsafe {
        std::arch::x86_64::_rdtsc()
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        static EPOCH: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        EPOCH.get_or_init(Instant::now).elapsed().as_nanos() as u64
    }
}

/// In a simulation its clock is the counter.
#[cfg(sim)]
pub(crate) fn ticks() -> u64 {
    shootdown_primitive::sim::so_far().nanoseconds
}

/// A number of the calling thread, as the kernel knows it.
#[cfg(not(sim))]
#[inline]
pub(crate) fn kernel_thread() -> u64 {
    use std::cell::Cell;
    std::thread_local! {
        static THREAD: Cell<u64> = const { Cell::new(0) };
    }
    THREAD.with(|thread| {
        if thread.get() == 0 {
            // SAFETY: no arguments, no memory; always succeeds.
            thread.set(unsafe { libc::syscall(libc::SYS_gettid) } as u64);
        }
        thread.get()
    })
}

/// The kernel does not know those of a simulation.
#[cfg(sim)]
pub(crate) fn kernel_thread() -> u64 {
    0
}

/// A full fence, where the last thing that this thread did is a read-modify-write. On x86 that instruction
/// is one: it drains the store buffer, and what follows is read after it; only the compiler has to be held back. The
/// memory model of the language promises less, and so do other processors and the checker: there it is a fence.
#[inline]
pub(crate) fn fence_after_rmw() {
    if cfg!(all(target_arch = "x86_64", not(loom), not(miri))) {
        std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
    } else {
        atomic::fence(atomic::Ordering::SeqCst);
    }
}

/// Calls what is a driver's; `None` if it panicked. Whatever the payload does where it is dropped goes no further either: one that panics
/// there too is left where it is.
pub(crate) fn contain<R>(call: impl FnOnce() -> R) -> Option<R> {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    let payload = match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => return Some(result),
        Err(payload) => payload,
    };
    if let Err(another) = catch_unwind(AssertUnwindSafe(|| drop(payload))) {
        std::mem::forget(another);
    }
    None
}

/// What is a driver's, where whoever drops the last count is not its owner and has more to do: a panic of that drop goes no further.
pub(crate) struct Contained<T>(ManuallyDrop<T>);

impl<T> Contained<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(ManuallyDrop::new(value))
    }
}

impl<T> Deref for Contained<T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> Drop for Contained<T> {
    fn drop(&mut self) {
        // SAFETY: dropped once, here, and not used any more.
        contain(|| unsafe { ManuallyDrop::drop(&mut self.0) });
    }
}

/// A count of what is called often: where it lies is worked out once, for which an `Arc` of a trait asks the table of its type each time.
pub(crate) struct Direct<T: ?Sized>(NonNull<T>);

// SAFETY: it is an `Arc<T>`, as `into_raw` left it.
unsafe impl<T: ?Sized> Send for Direct<T> where StdArc<T>: Send {}
// SAFETY: as above.
unsafe impl<T: ?Sized> Sync for Direct<T> where StdArc<T>: Sync {}

impl<T: ?Sized> Direct<T> {
    pub(crate) fn new(value: StdArc<T>) -> Self {
        // SAFETY: where the value of an `Arc` lies is not null.
        Self(unsafe { NonNull::new_unchecked(StdArc::into_raw(value).cast_mut()) })
    }
}

impl<T: ?Sized> Deref for Direct<T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: alive by the count that this holds; nobody has it exclusively.
        unsafe { self.0.as_ref() }
    }
}

impl<T: ?Sized> Drop for Direct<T> {
    fn drop(&mut self) {
        // SAFETY: from `into_raw`, whose count is given back once.
        drop(unsafe { StdArc::from_raw(self.0.as_ptr()) });
    }
}

/// What writers of registrations write all the time, in a line of the cache of its own: what lies beside it invalidations read, and would
/// have to fetch again each time. Two lines, as processors fetch them in pairs.
#[repr(align(128))]
#[derive(Debug)]
pub(crate) struct Line<T>(pub(crate) T);

impl<T> Deref for Line<T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        &self.0
    }
}

/// Asks for the line at `at`, which need not be anything: where a wait for it would come later, and alone.
#[inline]
pub(crate) fn prefetch<T>(at: *const T) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: every processor of the architecture has it, and no address is a wrong one.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = at;
}

/// What to do while another thread, or a device, finishes something that is normally short: spin, each round twice as long
/// as the one before; then give the processor to others; then, as it is not short at all, take naps.
#[derive(Debug)]
pub(crate) struct Backoff {
    round: u32,
}

impl Backoff {
    /// 2^6 - 1 spins in all, well under a microsecond: about what a round trip to another core costs.
    const SPIN_ROUNDS: u32 = if cfg!(sim) { 1 } else { 6 };
    /// Few where a round that changes nothing is a waste: in a simulation nobody is faster by it.
    const YIELD_ROUNDS: u32 = if cfg!(sim) { 4 } else { 500 };
    const NAP: Duration = Duration::from_micros(20);

    pub(crate) const fn new() -> Self {
        Self { round: 0 }
    }

    /// Whether the quick part is over: only from then on is a clock worth reading.
    pub(crate) fn is_slow(&self) -> bool {
        cfg!(loom) || self.round >= Self::SPIN_ROUNDS
    }

    /// Waits a little. Under the checker it always yields, which tells it that another thread must run first.
    pub(crate) fn wait(&mut self) {
        if cfg!(loom) || (Self::SPIN_ROUNDS..Self::YIELD_ROUNDS).contains(&self.round) {
            thread::yield_now();
        } else if self.round < Self::SPIN_ROUNDS {
            (0..1 << self.round).for_each(|_| hint::spin_loop());
        } else {
            shootdown_primitive::thread::sleep(Self::NAP);
        }
        self.round = self.round.saturating_add(1);
    }
}
