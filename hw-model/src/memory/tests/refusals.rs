//! What cannot be done is a typed error that names the value, and has changed nothing.

use super::*;
use crate::physical::seal;

#[test]
fn when_frames_run_out_nothing_has_changed() {
    let (bus, memory) = new(24, HUGE);
    let range = map(&memory, 0, 16);
    store(&memory, 5, 55);
    let (before, used) = (look(&memory, range), memory.budget.used());
    assert_eq!(
        memory.discard(range),
        Err(MemoryError::OutOfFrames {
            needed: 16,
            free: 8
        })
    );
    assert_eq!(
        memory.map(pages(&memory, 16, 9), PageSize::FourKiB, Rights::READ),
        Err(MemoryError::OutOfFrames { needed: 9, free: 8 })
    );
    assert_eq!(look(&memory, range), before);
    assert_eq!(
        (bus.physical().free_frames(), memory.budget.used()),
        (8, used)
    );
}

#[test]
fn a_large_page_needs_consecutive_frames() {
    let (bus, memory) = new(2 * HUGE, 4 * HUGE);
    map(&memory, 0, 2 * HUGE);
    for page in (0..2 * HUGE).step_by(2) {
        memory.unmap(pages(&memory, page, 1)).unwrap();
    }
    let free = bus.physical().free_frames();
    for (size, count) in [(PageSize::SixtyFourKiB, 16), (PageSize::TwoMiB, HUGE)] {
        let range = pages(&memory, 2 * HUGE, count);
        assert_eq!(
            memory.map(range, size, Rights::READ),
            Err(MemoryError::OutOfFrames {
                needed: count,
                free
            })
        );
    }
    map(&memory, 2 * HUGE, HUGE);
}

#[test]
fn when_kernel_mappings_run_out_nothing_has_changed() {
    let bus = Bus::new(4 * HUGE).unwrap();
    // Three to begin with; the large page and the small one take three more.
    let memory = ModelMemory::with_budget(&bus, 4 * HUGE * PAGE, VmaBudget::new(6)).unwrap();
    memory
        .map(
            pages(&memory, 0, HUGE),
            PageSize::TwoMiB,
            Rights::READ_WRITE,
        )
        .unwrap();
    map(&memory, 2 * HUGE, 1);
    assert_eq!(memory.budget.used(), 6);
    let everything = memory.arena();
    let (before, free) = (look(&memory, everything), bus.physical().free_frames());
    let hole = pages(&memory, 7, 1);
    let elsewhere = pages(&memory, 3 * HUGE, 1);
    for result in [
        memory.unmap(hole),
        memory.discard(hole),
        memory.protect(hole, Rights::READ),
        memory.remap(hole, elsewhere),
        memory.map(elsewhere, PageSize::FourKiB, Rights::READ),
    ] {
        assert!(
            matches!(
                result,
                Err(MemoryError::OutOfVmas {
                    used: 6,
                    limit: 6,
                    needed: 2..
                })
            ),
            "{result:?}"
        );
    }
    assert_eq!(look(&memory, everything), before);
    assert_eq!(
        (bus.physical().free_frames(), memory.budget.used()),
        (free, 6)
    );
    memory.unmap(everything).unwrap();
    assert_eq!(memory.budget.used(), 3);
}

#[test]
fn when_the_kernel_refuses_half_way_nothing_has_changed() {
    let (bus, memory) = new(4 * HUGE, 4 * HUGE);
    let range = pages(&memory, 0, 8);
    memory
        .map(pages(&memory, 0, 3), PageSize::FourKiB, Rights::READ)
        .unwrap();
    map(&memory, 3, 5);
    (3..8).for_each(|page| store(&memory, page, page));
    let fresh = access(&bus, &memory, 2, false);
    // From here on the kernel maps these frames for reading only, and does not let that be raised.
    seal(&memory.physical().fd(), libc::F_SEAL_FUTURE_WRITE).unwrap();
    let later = pages(&memory, 20, 1);
    memory.map(later, PageSize::FourKiB, Rights::READ).unwrap();
    let whole = range.hull(later);
    // A page that was once there, and one that has moved away, must not come back either.
    memory.unmap(pages(&memory, 1, 1)).unwrap();
    memory
        .remap(pages(&memory, 0, 1), pages(&memory, 30, 1))
        .unwrap();
    let seen = || {
        let shadow: Vec<_> = (0..4 * HUGE)
            .map(|page| {
                let addr = pages(&memory, page, 1).start();
                memory.shadow().at(memory.id(), addr)
            })
            .collect();
        (
            look(&memory, memory.arena()),
            shadow,
            kernels_view(&memory),
            bus.physical().free_frames(),
            memory.budget.used(),
        )
    };
    let before = seen();
    let refused = |result: Result<(), MemoryError>, failed| {
        assert!(
            matches!(result, Err(MemoryError::System { call, .. }) if call == failed),
            "{result:?}"
        );
        assert!(
            seen() == before,
            "a {failed} that failed left something behind"
        );
    };
    let (write, elsewhere) = (Rights::READ_WRITE, pages(&memory, HUGE, 8));
    refused(memory.discard(range), "mmap");
    refused(memory.remap(range, elsewhere), "mmap");
    refused(memory.map(elsewhere, PageSize::FourKiB, write), "mmap");
    refused(memory.protect(whole, write), "mprotect");
    bus.read(&fresh, &mut [0; 8]);
    assert_eq!(
        bus.oracle().stale_accesses(),
        0,
        "what is put back is what was there"
    );
}

#[test]
fn no_call_reaches_beyond_the_arena_or_maps_twice() {
    let (bus, memory) = new(64, HUGE);
    let range = map(&memory, 0, 2);
    let before = bus.physical().free_frames();
    let beyond = Range::new(memory.arena().last().get() + 1 - PAGE, 2 * PAGE).unwrap();
    let crooked = Range::new(range.start().get() + 1, PAGE).unwrap();
    for bad in [beyond, crooked, Range::ALL] {
        for result in [
            memory.map(bad, PageSize::FourKiB, Rights::READ),
            memory.unmap(bad),
            memory.discard(bad),
            memory.protect(bad, Rights::READ),
            memory.remap(range, bad),
            memory.remap(bad, range),
        ] {
            assert!(matches!(
                result,
                Err(MemoryError::System { errno: ErrorKind::InvalidInput, range, .. }) if range == bad
            ));
        }
    }
    let taken = ErrorKind::AlreadyExists;
    for result in [
        memory.map(range, PageSize::FourKiB, Rights::READ),
        memory.remap(pages(&memory, 4, 2), range),
    ] {
        assert!(matches!(result, Err(MemoryError::System { errno, .. }) if errno == taken));
    }
    let large = memory.map(pages(&memory, 16, 17), PageSize::SixtyFourKiB, Rights::READ);
    assert!(matches!(
        large,
        Err(MemoryError::System {
            errno: ErrorKind::InvalidInput,
            ..
        })
    ));
    assert_eq!(bus.physical().free_frames(), before);
}

#[test]
fn impossible_arenas_are_typed_errors() {
    let bus = Bus::new(1).unwrap();
    for bytes in [0, u64::MAX] {
        let error = ModelMemory::new(&bus, bytes).err().unwrap();
        assert!(matches!(error, ModelError::Arena { bytes: given, .. } if given == bytes));
    }
    let budget = VmaBudget::new(2);
    let error = ModelMemory::with_budget(&bus, PAGE, Arc::clone(&budget))
        .err()
        .unwrap();
    assert!(matches!(
        error,
        ModelError::Memory(MemoryError::OutOfVmas {
            needed: 3,
            used: 0,
            limit: 2
        })
    ));
    assert_eq!(budget.used(), 0);
}
