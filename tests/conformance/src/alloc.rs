//! The allocator that sees what the shootdown path does. The only unsafe code of this crate.
//!
//! A thread is *armed* by the kit's own handlers, which stand before and after the driver's in each operation; what it allocates or
//! frees until it is disarmed was done by a callback or a device TLB. Hardware does not use the heap: models, and the kit, step
//! [`outside`].

use std::alloc::{GlobalAlloc, Layout, System};
use std::backtrace::Backtrace;
use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// A global allocator that hands everything on to the system's. With it the kit sees callbacks that allocate:
///
/// ```
/// #[global_allocator]
/// static WATCHED: conformance::Watched = conformance::Watched;
/// # fn main() {}
/// ```
#[derive(Clone, Copy, Debug, Default)]
pub struct Watched;

/// The allocator of this program is [`Watched`].
static INSTALLED: AtomicBool = AtomicBool::new(false);

thread_local! {
    static ARMED: Cell<bool> = const { Cell::new(false) };
    /// What this thread did first while it was armed, not yet told.
    static FOUND: Cell<Option<(&'static str, usize)>> = const { Cell::new(None) };
}

/// Where the first one was found, of each thread; told with [`FOUND`].
static WHERE: Mutex<Option<Backtrace>> = Mutex::new(None);

fn note(what: &'static str, bytes: usize) {
    // Relaxed: a flag that carries nothing else.
    if !INSTALLED.load(Ordering::Relaxed) {
        INSTALLED.store(true, Ordering::Relaxed);
    }
    // A panic may allocate, and while it is printed no backtrace can be taken.
    if !ARMED.get() || FOUND.get().is_some() || std::thread::panicking() {
        return;
    }
    FOUND.set(Some((what, bytes)));
    outside(|| {
        let trace = Backtrace::force_capture();
        *WHERE.lock().unwrap_or_else(PoisonError::into_inner) = Some(trace);
    });
}

// SAFETY: hands everything on to the system's allocator.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        note("allocated", layout.size());
        // SAFETY: as the caller guarantees.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        note("freed", layout.size());
        // SAFETY: as the caller guarantees.
        unsafe { System.dealloc(at, layout) }
    }
}

/// Calls `f` with the allocator looking away: for models of hardware that are called in the shootdown path.
pub fn outside<R>(f: impl FnOnce() -> R) -> R {
    let armed = ARMED.replace(false);
    let result = f();
    ARMED.set(armed);
    result
}

pub(crate) fn is_installed() -> bool {
    INSTALLED.load(Ordering::Relaxed)
}

/// From here on this thread is in the shootdown path, or not any more.
pub(crate) fn arm(armed: bool) {
    ARMED.set(armed && is_installed());
}

/// What this thread did first while it was armed, and where.
pub(crate) fn found() -> Option<String> {
    let (what, bytes) = FOUND.take()?;
    let trace = WHERE.lock().unwrap_or_else(PoisonError::into_inner).take();
    let trace = trace.map(|trace| trace.to_string()).unwrap_or_default();
    Some(format!("{bytes} bytes were {what}{}", place(&trace)))
}

/// The frames of a backtrace from the allocation on, as far as they say anything about the driver.
fn place(trace: &str) -> String {
    let ours = |line: &str| {
        [
            "conformance::alloc",
            "std::",
            "core::",
            "alloc::",
            "__rust",
            "__rdl",
        ]
        .iter()
        .any(|one| line.contains(one))
    };
    let frames = trace
        .lines()
        .filter_map(|line| line.trim_start().split_once(": "))
        .filter(|(number, _)| number.parse::<u32>().is_ok())
        .map(|(_, name)| name)
        .filter(|name| !ours(name))
        .take_while(|name| !name.contains("shootdown::engine"));
    let frames: String = frames
        .take(6)
        .map(|name| format!("\n      by {name}"))
        .collect();
    frames
}
