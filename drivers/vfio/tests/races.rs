//! Windows in use while their pages change.

mod support;

use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use shootdown::{Map, Rights};
use support::{SECOND, open, page, pages, rig};

/// Threads use the window while others change its pages: no page changes while the IOMMU maps it, and every doorbell is rung
/// over pages that are mapped.
#[test]
fn no_page_changes_while_a_device_reaches_it() {
    let rig = rig(2);
    let memory = pages(&rig, 32);
    let window = open(&rig, memory, 4 << 12);
    std::thread::scope(|scope| {
        for thread in 0..2_u64 {
            let (rig, window) = (&rig, &window);
            scope.spawn(move || {
                for nth in 0..400 {
                    let one = page(memory, (nth * 7 + thread * 13) % 32);
                    let ring = |_| rig.endpoints.iter().all(|endpoint| endpoint.reaches(one));
                    // A page that is not there just now is no error of the window.
                    if let Ok(reached) = window.with_mapped(one, SECOND, ring) {
                        assert!(reached);
                    }
                }
            });
            scope.spawn(move || {
                for nth in 0..400 {
                    // Each has pages of its own, every other one, so that they share granules.
                    let one = page(memory, nth * 5 % 16 * 2 + thread);
                    match nth % 3 {
                        0 => rig.space.discard(one).unwrap(),
                        1 => rig.space.protect(one, Rights::READ_WRITE).unwrap(),
                        _ => {
                            rig.space.unmap(one).unwrap();
                            rig.space.map(Map::anonymous(4096).at(one.start())).unwrap();
                        }
                    }
                }
            });
        }
    });
    assert_eq!(rig.memory.violations.load(SeqCst), 0);
    assert_eq!(rig.work.stops.load(SeqCst), rig.work.resumes.load(SeqCst));
    assert!(rig.memory.log.take().len() > 400);
}

/// Users queue for the window's lock: a shootdown overtakes one that has begun, and takes the granule away. Whoever gets the lock
/// then has to see that it was overtaken (R9); and nothing is taken away under whoever has it.
#[test]
fn a_use_that_a_shootdown_has_overtaken_begins_anew() {
    let rig = rig(1);
    let memory = pages(&rig, 1);
    let window = open(&rig, memory, 4096);
    rig.memory.slowness.store(100, SeqCst);
    let done = std::sync::atomic::AtomicBool::new(false);
    let lost = std::sync::atomic::AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                while !done.load(SeqCst) {
                    let ring = |_| {
                        std::thread::sleep(Duration::from_micros(20));
                        rig.endpoints[0].reaches(memory)
                    };
                    let reached = window.with_mapped(memory, SECOND, ring).unwrap();
                    lost.fetch_add(u64::from(!reached), SeqCst);
                }
            });
        }
        for _ in 0..1500 {
            rig.space.discard(memory).unwrap();
        }
        done.store(true, SeqCst);
    });
    assert_eq!(lost.load(SeqCst), 0, "taken away under a user");
    assert_eq!(rig.memory.violations.load(SeqCst), 0);
}

#[test]
fn a_shootdown_does_not_wait_until_all_of_a_large_window_is_mapped() {
    let rig = rig(1);
    let memory = pages(&rig, 4096);
    let window = open(&rig, memory, 4096);
    rig.space.discard(memory).unwrap();
    rig.endpoints[0].slowness.store(50, SeqCst);
    let touched = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            window.touch(memory, SECOND * 60).unwrap();
            touched.store(true, SeqCst);
        });
        while rig.endpoints[0].granules() == 0 {
            std::thread::yield_now();
        }
        rig.space.discard(page(memory, 0)).unwrap();
        assert!(!touched.load(SeqCst), "it waited for all of it");
    });
    // What the shootdown took away behind the touch's back is there again.
    assert!(window.is_mapped(memory).unwrap());
    assert_eq!(rig.memory.violations.load(SeqCst), 0);
}
