//! Phase 5 runs while the application may hold its allocator's lock: only `map` may allocate.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use shootdown::{Memory, PageSize, Range, Rights};
use shootdown_hw_model::{Bus, ModelMemory};

/// The system's allocator, counting what each thread asks of it.
struct Counting;

thread_local! {
    static CALLS: Cell<u64> = const { Cell::new(0) };
}

// SAFETY: everything is handed on to the system's allocator; counting neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.set(CALLS.get() + 1);
        // SAFETY: the caller's promise is the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        CALLS.set(CALLS.get() + 1);
        // SAFETY: `at` came from the system's allocator, with this layout.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn unmap_discard_protect_and_remap_do_not_allocate() {
    let bus = Bus::new(8192).unwrap();
    let memory = ModelMemory::new(&bus, 64 << 20).unwrap();
    let base = memory.arena().start().get();
    let range = |page: u64, pages: u64| Range::new(base + page * 4096, pages * 4096).unwrap();
    memory
        .map(range(0, 1024), PageSize::TwoMiB, Rights::READ_WRITE)
        .unwrap();
    memory
        .map(range(1024, 1000), PageSize::FourKiB, Rights::READ_WRITE)
        .unwrap();

    let before = CALLS.get();
    for _ in 0..3 {
        memory.protect(range(500, 600), Rights::READ).unwrap();
        memory.discard(range(0, 2024)).unwrap();
        memory.discard(range(7, 1)).unwrap();
        memory.remap(range(100, 900), range(4096, 900)).unwrap();
        memory.remap(range(4096, 900), range(100, 900)).unwrap();
    }
    assert!(memory.discard(range(0, 2024)).is_ok());
    memory.unmap(range(3, 1)).unwrap();
    memory.unmap(range(0, 2048)).unwrap();
    assert_eq!(CALLS.get() - before, 0);
    assert_eq!(bus.physical().free_frames(), bus.physical().total());
}
