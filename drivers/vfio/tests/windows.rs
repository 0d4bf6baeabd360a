//! Windows: in which order things happen, and what stays true when they fail. The IOMMU is a fake here; what a kernel says is
//! provoked in a kernel, in a virtual machine.

mod support;

use std::sync::atomic::Ordering::SeqCst;

use shootdown::{
    Cause, DeviceError, DmaWindow, InvalidateError, Map, MapError, Range, Rights, Unregistered,
};
use shootdown_vfio::{Operation, Window, WindowError, WindowOptions};
use support::{Event, REFUSED, SECOND, open, options, page, pages, rig};

#[test]
fn work_is_stopped_and_drained_then_the_iommu_is_told_then_the_pages_go() {
    let rig = rig(1);
    let memory = pages(&rig, 4);
    let window = open(&rig, memory, 4096);
    rig.log.take();
    rig.work.in_flight.store(3, SeqCst);
    rig.space.unmap(memory).unwrap();
    let iova = window.iova();
    assert_eq!(
        rig.log.take(),
        [
            Event::Stop(iova),
            Event::Drained,
            Event::Unmap(iova),
            Event::Pages(memory),
            Event::Resume(iova),
        ]
    );
    assert!(!window.is_mapped(page(memory, 0)).unwrap());
}

#[test]
fn a_page_takes_its_granule_along_and_a_touch_brings_the_rest_back_at_the_same_iova() {
    let rig = rig(1);
    let memory = pages(&rig, 64);
    let window = open(&rig, memory, 16 << 12);
    assert_eq!(rig.endpoints[0].granules(), 4);
    rig.log.take();
    for (change, cause) in [("discard", Cause::Discard), ("protect", Cause::Protect)] {
        match change {
            "discard" => rig.space.discard(page(memory, 20)).unwrap(),
            _ => rig
                .space
                .protect(page(memory, 20), Rights::READ_WRITE)
                .unwrap(),
        }
        let granule = Range::new(window.iova().start().get() + (16 << 12), 16 << 12).unwrap();
        let events = rig.log.take();
        assert!(events.contains(&Event::Unmap(granule)), "{events:?}");
        assert_eq!(rig.endpoints[0].granules(), 3);
        assert!(window.is_mapped(page(memory, 15)).unwrap());
        assert!(!window.is_mapped(page(memory, 31)).unwrap());
        let found = rig.iommu.attribute(granule.last()).unwrap();
        assert_eq!(found.operation, Operation::CutOff(cause));
        assert_eq!(
            (found.window, found.part, found.memory),
            (window.id(), granule, memory)
        );
        let touched = window.with_mapped(page(memory, 31), SECOND, |iova| iova);
        assert_eq!(
            touched.unwrap(),
            page(window.iova(), 31),
            "the same IOVA as before"
        );
        assert_eq!(rig.log.take(), [Event::Map(granule)]);
    }
    assert_eq!(rig.memory.violations.load(SeqCst), 0);
}

#[test]
fn the_last_granule_may_be_short() {
    let rig = rig(1);
    let memory = pages(&rig, 5);
    let window = open(&rig, memory, 4 << 12);
    assert_eq!(rig.endpoints[0].granules(), 2);
    rig.log.take();
    rig.space.discard(page(memory, 4)).unwrap();
    let last = page(window.iova(), 4);
    assert!(rig.log.take().contains(&Event::Unmap(last)));
    assert!(window.is_mapped(page(memory, 3)).unwrap());
    window.touch(memory, SECOND).unwrap();
    assert!(window.is_mapped(memory).unwrap());
}

#[test]
fn sixty_four_mebibytes_in_small_granules_are_one_unmap() {
    let rig = rig(1);
    let memory = pages(&rig, 16 << 10);
    let _window = open(&rig, memory, 4096);
    assert_eq!(rig.endpoints[0].granules(), 16 << 10);
    rig.log.take();
    rig.space.unmap(memory).unwrap();
    let events = rig.log.take();
    let unmaps = events.iter().filter(|one| matches!(one, Event::Unmap(_)));
    assert_eq!(unmaps.count(), 1);
    assert_eq!(rig.endpoints[0].granules(), 0);
}

#[test]
fn a_cut_off_that_fails_quarantines_the_pages_and_says_so() {
    let rig = rig(1);
    let memory = pages(&rig, 2);
    let window = open(&rig, memory, 4096);
    rig.endpoints[0].stuck.store(true, SeqCst);
    let error = rig.space.unmap(memory).unwrap_err();
    assert!(
        matches!(error, MapError::Invalidate(InvalidateError::NotDrained { range, .. }) if range == memory),
        "{error}"
    );
    assert!(rig.endpoints[0].reaches(memory), "and the pages are there");
    assert_eq!(rig.space.quarantined_bytes(), memory.len() as u64);
    let found = rig.iommu.attribute(window.iova().start()).unwrap();
    assert_eq!(found.operation, Operation::CutOffFailed(Cause::Unmap));
    // Closing it fails as long as the IOMMU does, and then no more.
    let error = window.close().unwrap_err();
    assert!(
        matches!(&error, WindowError::Device(error) if *error == REFUSED),
        "{error}"
    );
    assert_eq!(rig.space.registrations(), 1);
    rig.endpoints[0].stuck.store(false, SeqCst);
    assert_eq!(window.close().unwrap(), Unregistered::Released);
    assert!(!rig.endpoints[0].reaches(memory));
}

/// Whoever keeps pages in quarantine may take them away later without asking anybody.
#[test]
fn what_is_in_quarantine_is_not_mapped_again() {
    let rig = rig(1);
    let memory = pages(&rig, 8);
    let window = open(&rig, memory, 2 << 12);
    rig.endpoints[0].stuck.store(true, SeqCst);
    assert!(rig.space.discard(page(memory, 3)).is_err());
    rig.endpoints[0].stuck.store(false, SeqCst);
    let touched = window.touch(memory, SECOND);
    let granule = page(memory, 2).hull(page(memory, 3));
    assert!(
        matches!(touched, Err(WindowError::Quarantined { granule: found }) if found == granule),
        "{touched:?}"
    );
    window.touch(page(memory, 4), SECOND).unwrap();
    // A page beside it is no reason to let go of it; all of its granule is.
    rig.space.discard(page(memory, 2)).unwrap();
    assert!(window.touch(page(memory, 2), SECOND).is_err());
}

#[test]
fn a_window_that_cannot_be_unmapped_keeps_its_memory_registered_when_it_is_dropped() {
    let rig = rig(1);
    let memory = pages(&rig, 2);
    let window = open(&rig, memory, 4096);
    let iova = window.iova();
    rig.endpoints[0].stuck.store(true, SeqCst);
    drop(window);
    assert_eq!(rig.space.registrations(), 1);
    assert!(rig.space.unmap(memory).is_err());
    assert!(rig.endpoints[0].reaches(memory));
    // Its IOVA is nobody's, not even when the space has ended.
    assert!(matches!(
        rig.space.exit(),
        Err(shootdown::ExitError::Reached { .. })
    ));
    let memory = std::sync::Arc::new(shootdown::ProcessMemory::reserve(1 << 20).unwrap());
    let other = shootdown::AddressSpace::managed(memory, shootdown::Deadlines::default());
    let wanted = WindowOptions {
        at: Some(iova.start()),
        ..options(4096)
    };
    let memory = other.map(Map::anonymous(4096)).unwrap();
    let refused = Window::open(&rig.iommu, &other, memory, rig.work.clone(), wanted);
    assert!(matches!(refused, Err(WindowError::NoIova { .. })));
}

#[test]
fn a_window_whose_closing_failed_maps_nothing_any_more() {
    let rig = rig(1);
    let memory = pages(&rig, 2);
    let window = open(&rig, memory, 4096);
    rig.space.discard(page(memory, 0)).unwrap();
    rig.endpoints[0].stuck.store(true, SeqCst);
    assert!(window.close().is_err());
    rig.endpoints[0].stuck.store(false, SeqCst);
    assert!(matches!(
        window.touch(memory, SECOND),
        Err(WindowError::Closed { .. })
    ));
    assert!(!rig.endpoints[0].reaches(page(memory, 0)));
}

#[test]
fn a_map_that_one_endpoint_refuses_is_taken_back_from_the_others() {
    let rig = rig(3);
    let memory = pages(&rig, 1);
    let iova = Range::new(0x10000, 4096).unwrap();
    rig.endpoints[2].maps_left.store(0, SeqCst);
    let mapped = rig.iommu.map(iova, memory, Rights::READ);
    assert_eq!(mapped, Err(REFUSED));
    assert!(rig.endpoints.iter().all(|one| !one.reaches(memory)));
    assert_eq!(rig.iommu.unmap(iova), Err(DeviceError::NotMapped { iova }));
}

#[test]
fn opening_is_all_or_nothing() {
    let rig = rig(2);
    let memory = pages(&rig, 8);
    rig.endpoints[1].maps_left.store(5, SeqCst);
    let refused = Window::open(
        &rig.iommu,
        &rig.space,
        memory,
        rig.work.clone(),
        options(4096),
    );
    assert!(matches!(refused, Err(WindowError::Device(error)) if error == REFUSED));
    for endpoint in &rig.endpoints {
        assert_eq!(endpoint.granules(), 0);
    }
    assert_eq!(rig.space.registrations(), 0);
    rig.endpoints[1].maps_left.store(u64::MAX, SeqCst);
    let window = open(&rig, memory, 4096);
    assert!(rig.endpoints.iter().all(|one| one.granules() == 8));
    rig.space.unmap(memory).unwrap();
    assert!(rig.endpoints.iter().all(|one| one.granules() == 0));
    drop(window);
}

#[test]
fn what_a_failed_map_could_not_take_back_is_visited_by_the_cut_off() {
    let rig = rig(2);
    let memory = pages(&rig, 2);
    let window = open(&rig, memory, 4096);
    rig.space.discard(page(memory, 1)).unwrap();
    rig.endpoints[1].maps_left.store(0, SeqCst);
    rig.endpoints[0].stuck.store(true, SeqCst);
    assert!(window.touch(memory, SECOND).is_err());
    assert!(!window.is_mapped(page(memory, 1)).unwrap());
    assert!(rig.endpoints[0].reaches(page(memory, 1)), "not taken back");
    rig.endpoints[0].stuck.store(false, SeqCst);
    // A touch does not take it for mapped everywhere (R26) ...
    let error = window.touch(memory, SECOND).unwrap_err();
    assert!(matches!(
        error,
        WindowError::Device(DeviceError::Overlap { .. })
    ));
    // ... and the cut-off does not forget it.
    rig.space.discard(page(memory, 1)).unwrap();
    assert!(!rig.endpoints[0].reaches(page(memory, 1)));
    window.touch(memory, SECOND).unwrap();
    assert_eq!(rig.memory.violations.load(SeqCst), 0);
}

#[test]
fn an_endpoint_that_fails_does_not_keep_the_others_from_being_cut_off() {
    let rig = rig(3);
    let memory = pages(&rig, 2);
    let _window = open(&rig, memory, 4096);
    rig.endpoints[1].stuck.store(true, SeqCst);
    assert!(rig.space.unmap(memory).is_err());
    let reached: Vec<bool> = rig
        .endpoints
        .iter()
        .map(|one| one.reaches(memory))
        .collect();
    assert_eq!(reached, [false, true, false]);
}

#[test]
fn a_change_that_failed_leaves_the_part_to_be_touched() {
    let rig = rig(1);
    let memory = pages(&rig, 4);
    let window = open(&rig, memory, 4096);
    rig.memory.fails.store(true, SeqCst);
    assert!(rig.space.unmap(page(memory, 2)).is_err());
    assert!(!window.is_mapped(page(memory, 2)).unwrap());
    let found = rig.iommu.attribute(page(window.iova(), 2).start()).unwrap();
    assert_eq!(found.operation, Operation::Unchanged(Cause::Unmap));
    assert_eq!(rig.work.stops.load(SeqCst), rig.work.resumes.load(SeqCst));
    window.touch(memory, SECOND).unwrap();
    assert!(window.is_mapped(memory).unwrap());
}

#[test]
fn a_refused_operation_resumes_nothing_that_it_did_not_stop() {
    let rig = rig(1);
    let memory = pages(&rig, 4);
    let window = open(&rig, memory, 4096);
    rig.work.refuses.store(true, SeqCst);
    for _ in 0..200 {
        assert!(rig.space.try_unmap(memory).is_err());
    }
    assert_eq!(rig.work.resumes.load(SeqCst), 0);
    assert!(window.is_mapped(memory).unwrap());
    rig.work.refuses.store(false, SeqCst);
    // A doorbell in another thread: its lock is not waited for.
    let (ringing, rung) = (std::sync::Barrier::new(2), std::sync::Barrier::new(2));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let ring = |_| {
                ringing.wait();
                rung.wait();
            };
            window.with_mapped(memory, SECOND, ring).unwrap();
        });
        ringing.wait();
        assert!(rig.space.try_unmap(memory).is_err());
        rung.wait();
    });
    assert_eq!(rig.work.resumes.load(SeqCst), 0);
    rig.space.try_unmap(memory).unwrap();
    assert_eq!(
        (rig.work.stops.load(SeqCst), rig.work.resumes.load(SeqCst)),
        (1, 1)
    );
}

#[test]
fn closing_stops_unmaps_and_only_then_unregisters() {
    let rig = rig(1);
    let memory = pages(&rig, 4);
    let window = open(&rig, memory, 4096);
    let iova = window.iova();
    rig.log.take();
    rig.work.in_flight.store(2, SeqCst);
    assert_eq!(window.close().unwrap(), Unregistered::Released);
    assert_eq!(
        rig.log.take(),
        [Event::Stop(iova), Event::Drained, Event::Unmap(iova)]
    );
    assert!(window.touch(memory, SECOND).is_err());
    // The memory is the caller's, and its IOVA can be had again.
    rig.space.unmap(memory).unwrap();
    assert_eq!(rig.log.take(), [Event::Pages(memory)]);
    let again = WindowOptions {
        at: Some(iova.start()),
        ..options(4096)
    };
    let other = pages(&rig, 4);
    Window::open(&rig.iommu, &rig.space, other, rig.work.clone(), again).unwrap();
}

#[test]
fn a_window_dropped_under_the_map_lock_is_unmapped_before_its_memory_can_go() {
    let rig = rig(1);
    let memory = pages(&rig, 4);
    let window = open(&rig, memory, 4096);
    let guard = rig.space.lock_write().unwrap();
    drop(window);
    guard.unmap(memory).unwrap();
    drop(guard);
    assert_eq!(rig.memory.violations.load(SeqCst), 0);
    assert_eq!(rig.space.registrations(), 0);
}

#[test]
fn exit_takes_the_window_away_before_the_memory() {
    let rig = rig(1);
    let memory = pages(&rig, 4);
    let window = open(&rig, memory, 4096);
    rig.space.exit().unwrap();
    assert_eq!(rig.endpoints[0].granules(), 0);
    assert_eq!(rig.memory.violations.load(SeqCst), 0);
    assert!(window.touch(memory, SECOND).is_err());
    assert_eq!(window.close().unwrap(), Unregistered::AlreadyGone);
}

#[test]
fn bad_options_are_typed_errors_and_leave_nothing() {
    let rig = rig(1);
    let memory = pages(&rig, 4);
    let attempt = |memory, options| {
        Window::open(&rig.iommu, &rig.space, memory, rig.work.clone(), options).unwrap_err()
    };
    for granule in [0, 1, 2048, 5000] {
        assert!(matches!(
            attempt(memory, options(granule)),
            WindowError::Granule { .. }
        ));
    }
    let cut = Range::new(memory.start().get() + 1, 4096).unwrap();
    assert!(matches!(
        attempt(cut, options(4096)),
        WindowError::Misaligned { .. }
    ));
    let too_far = WindowOptions {
        last: 0xfff.into(),
        ..options(4096)
    };
    assert!(matches!(
        attempt(memory, too_far),
        WindowError::NoIova { .. }
    ));
    assert_eq!(rig.space.registrations(), 0);
    let window = open(&rig, memory, 4096);
    let beyond = Range::new(memory.last().get() - 1, 4).unwrap();
    assert!(matches!(
        window.touch(beyond, SECOND),
        Err(WindowError::Outside { .. })
    ));
}

/// R26: the pages go only when every endpoint has been unmapped, by what it did and not by what it said. An endpoint that is not
/// visited, or whose answer is taken for granted, is one that says it unmapped.
fn pages_that_changed_under_the_device(lies: bool) -> u64 {
    let rig = rig(2);
    let memory = pages(&rig, 4);
    let window = open(&rig, memory, 4096);
    rig.endpoints[1].lies.store(lies, SeqCst);
    rig.space.unmap(page(memory, 1)).unwrap();
    let changed = rig.memory.violations.load(SeqCst);
    rig.endpoints[1].lies.store(false, SeqCst);
    drop(window);
    changed
}

#[test]
fn no_page_changes_before_every_endpoint_is_unmapped() {
    assert_eq!(pages_that_changed_under_the_device(false), 0);
}

#[test]
fn an_endpoint_that_says_unmapped_and_is_not_is_found() {
    assert_eq!(pages_that_changed_under_the_device(true), 1);
}

/// R36: a window is closed and another one opened, at the IOVA that was given back if `again`. What a late access of the device at
/// the old IOVA hits.
fn late_access_hits(again: bool) -> Option<Range> {
    let rig = rig(1);
    let window = open(&rig, pages(&rig, 1), 4096);
    let iova = window.iova();
    window.close().unwrap();
    let wanted = WindowOptions {
        at: again.then(|| iova.start()),
        ..options(4096)
    };
    let other = pages(&rig, 1);
    let _other = Window::open(&rig.iommu, &rig.space, other, rig.work.clone(), wanted).unwrap();
    let mapped = rig.endpoints[0].mapped.lock().unwrap();
    let hit = mapped.iter().find(|(one, _)| one.overlaps(iova));
    hit.map(|(_, memory)| *memory)
}

#[test]
fn a_late_access_at_an_iova_that_was_given_back_hits_nothing() {
    assert_eq!(late_access_hits(false), None);
}

#[test]
fn a_late_access_at_an_iova_that_was_reused_at_once_is_found() {
    assert!(late_access_hits(true).is_some());
}
