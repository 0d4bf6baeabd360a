//! From the stop of the device's work to its resumption nothing is allocated or freed: the thread that unmaps may hold the
//! allocator's lock (R18). The allocator of this test aborts when it is.

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use shootdown::{Map, Range, WouldBlock};
use shootdown_vfio::{DeviceWork, InFlight, Window, WindowOptions};
use support::rig;

thread_local! {
    static ARMED: Cell<bool> = const { Cell::new(false) };
    static CAUGHT: Cell<u64> = const { Cell::new(0) };
}

struct Watching;

fn check() {
    if ARMED.get() {
        CAUGHT.set(CAUGHT.get() + 1);
    }
}

// SAFETY: everything is passed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        check();
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        check();
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

/// Arms the allocator for as long as it is stopped.
struct Arming {
    allocates: bool,
}

impl DeviceWork for Arming {
    fn stop(&self, _: Range, _: bool) -> Result<InFlight, WouldBlock> {
        ARMED.set(true);
        Ok(InFlight::Work)
    }
    fn drained(&self, _: Range) -> bool {
        if self.allocates {
            drop(std::hint::black_box(Box::new(7_u64)));
        }
        true
    }
    fn resume(&self, _: Range) {
        ARMED.set(false);
    }
}

/// How often the allocator was called while work was stopped.
fn run(allocates: bool, stuck: bool) -> u64 {
    let rig = rig(2);
    let memory = rig.space.map(Map::anonymous(64 << 12)).unwrap();
    let options = WindowOptions {
        granule: 4096,
        deadline: Duration::from_secs(1),
        ..WindowOptions::default()
    };
    let work = Arc::new(Arming { allocates });
    let window = Window::open(&rig.iommu, &rig.space, memory, work, options).unwrap();
    CAUGHT.set(0);
    let part = |first: u64, count: u64| {
        Range::new(memory.start().get() + (first << 12), count << 12).unwrap()
    };
    rig.endpoints[1].stuck.store(stuck, SeqCst);
    assert_eq!(rig.space.discard(part(3, 1)).is_err(), stuck);
    assert_eq!(rig.space.unmap(part(8, 40)).is_err(), stuck);
    ARMED.set(false);
    rig.endpoints[1].stuck.store(false, SeqCst);
    let caught = CAUGHT.get();
    drop(window);
    ARMED.set(false);
    caught
}

#[test]
fn neither_a_cut_off_nor_one_that_fails_allocates() {
    assert_eq!(run(false, false), 0);
    assert_eq!(run(false, true), 0);
}

#[test]
fn the_allocator_sees_a_handler_that_does() {
    assert!(run(true, false) > 0);
}
