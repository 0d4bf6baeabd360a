//! The allocator of this program: the system's, and it counts while it is watched.
//!
//! The thread that changes memory may hold the allocator's lock, so nothing on the way of a shootdown may allocate or free.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// Calls of this thread since it began to watch; `None` while it does not.
    static CALLS: Cell<Option<u64>> = const { Cell::new(None) };
}

struct Watched;

#[global_allocator]
static ALLOCATOR: Watched = Watched;

fn count() {
    // A thread that ends has no such cell any more, and is not watched.
    let _ = CALLS.try_with(|calls| calls.set(calls.get().map(|count| count + 1)));
}

/// From here on calls of this thread are counted.
pub(crate) fn watch() {
    CALLS.set(Some(0));
}

/// How many there were; `None` if it was not watched.
pub(crate) fn watched() -> Option<u64> {
    CALLS.take()
}

// SAFETY: everything is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Watched {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count();
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(at, layout) }
    }
}
