//! Properties that frames tell: of the mapping, and of what happens to it below the device.

use std::sync::Arc;
use std::time::Duration;

use shootdown::{Addr, AddressSpace, Deadlines, Map, PageSize, Range, Rights};
use shootdown_hw_model::{Bus, ModelMemory};

use crate::device::{Fault, Mirror, User};

pub(crate) const PAGE: u64 = 4096;

/// Physical memory, and a space.
pub(crate) struct Rig {
    pub(crate) bus: Bus,
    pub(crate) memory: Arc<ModelMemory>,
    pub(crate) space: AddressSpace,
}

pub(crate) fn rig() -> Rig {
    let bus = Bus::new(16 << 10).unwrap();
    let memory = ModelMemory::new(&bus, 32 << 20).unwrap();
    let space = AddressSpace::managed(memory.clone(), Deadlines::default());
    Rig { bus, memory, space }
}

impl Rig {
    pub(crate) fn map(&self, pages: u64) -> Range {
        self.space.map(Map::anonymous(pages * PAGE)).unwrap()
    }

    /// No access was stale.
    pub(crate) fn clean(&self) {
        let findings = self.bus.oracle().findings();
        assert!(findings.is_empty(), "{}", findings[0]);
    }
}

/// The CPU's side of a word.
pub(crate) fn cpu(at: Addr) -> *mut u64 {
    at.get() as *mut u64
}

pub(crate) fn get(at: Addr) -> u64 {
    // SAFETY: the tests give addresses that are mapped for reading.
    unsafe { cpu(at).read_volatile() }
}

pub(crate) fn set(at: Addr, value: u64) {
    // SAFETY: the tests give addresses that are mapped for writing, and are no Rust object's.
    unsafe { cpu(at).write_volatile(value) };
}

pub(crate) fn page(of: Range, nth: u64) -> Range {
    part(of, nth..nth + 1)
}

pub(crate) fn part(of: Range, pages: std::ops::Range<u64>) -> Range {
    let start = of.start().get() + pages.start * PAGE;
    Range::new(start, (pages.end - pages.start) * PAGE).unwrap()
}

/// What the device finds at `at`.
pub(crate) fn seen(user: &impl User, at: Addr) -> Result<u64, Fault> {
    user.load(at).map(|()| user.buffer())
}

/// Pages that are zero since the CPU has read them, that nobody has touched, and with data.
pub(crate) fn a_read_of_a_page_costs_one_fault_whatever_is_in_it<M: Mirror>() {
    let rig = rig();
    let device = M::attach(&rig.bus, 0);
    let user = device.open(&rig.space);
    let range = rig.map(12);
    for nth in 0..4 {
        assert_eq!(get(page(range, nth).start()), 0);
        set(page(range, 8 + nth).start(), 100 + nth);
    }
    for (kind, pages) in [("zero", 0..4), ("untouched", 4..8), ("data", 8..12)] {
        let before = device.faults();
        for nth in pages.clone() {
            let expected = if kind == "data" { 92 + nth } else { 0 };
            let at = page(range, nth).start();
            assert_eq!(seen(&user, at), Ok(expected), "{kind}");
            assert_eq!(seen(&user, Addr::new(at.get() + 8)), Ok(0), "{kind}");
        }
        assert_eq!(device.faults() - before, 4, "{kind} pages");
    }
    rig.clean();
}

pub(crate) fn writes_after_protect_fault_and_change_nothing<M: Mirror>() {
    let rig = rig();
    let device = M::attach(&rig.bus, 0);
    let user = device.open(&rig.space);
    let range = rig.map(2);
    let (own, beside) = (page(range, 0), page(range, 1));
    user.fill(range, 5).unwrap();
    rig.space.protect(own, Rights::READ).unwrap();
    assert_eq!(user.fill(own, 6), Err(Fault(own.start())));
    assert_eq!(user.add(own.start(), 1), Err(Fault(own.start())));
    assert_eq!(seen(&user, own.start()), Ok(5), "reading is allowed");
    // Through the entry that the read has brought.
    assert_eq!(user.fill(own, 6), Err(Fault(own.start())));
    assert_eq!(get(own.start()), 5);
    user.fill(beside, 7).unwrap();
    rig.space.protect(own, Rights::READ_WRITE).unwrap();
    user.fill(own, 8).unwrap();
    assert_eq!((get(own.start()), get(beside.start())), (8, 7));
    rig.clean();
}

pub(crate) fn without_access_a_read_faults_and_its_buffer_stays<M: Mirror>() {
    let rig = rig();
    let device = M::attach(&rig.bus, 0);
    let user = device.open(&rig.space);
    let own = rig.map(1);
    user.fill(own, 5).unwrap();
    assert_eq!(seen(&user, own.start()), Ok(5));
    user.set_buffer(77);
    rig.space.protect(own, Rights::empty()).unwrap();
    assert_eq!(user.load(own.start()), Err(Fault(own.start())));
    assert_eq!(user.fill(own, 6), Err(Fault(own.start())));
    assert_eq!(user.buffer(), 77);
    rig.space.protect(own, Rights::READ).unwrap();
    assert_eq!(get(own.start()), 5);
    assert_eq!(seen(&user, own.start()), Ok(5));
    rig.clean();
}

pub(crate) fn a_huge_page_is_one_entry_and_a_partial_unmap_splits_it<M: Mirror>() {
    let rig = rig();
    let device = M::attach(&rig.bus, 0);
    let user = device.open(&rig.space);
    let huge = Map::anonymous(2 << 20).page_size(PageSize::TwoMiB);
    let huge = rig.space.map(huge).unwrap();
    let before = device.faults();
    user.fill(huge, 3).unwrap();
    assert_eq!(device.faults() - before, 1);
    assert_eq!(device.entries(&user, huge), [huge]);
    let hole = part(huge, 200..203);
    for nth in 0..512 {
        set(page(huge, nth).start(), nth);
    }
    rig.space.unmap(hole).unwrap();
    assert_eq!(device.entries(&user, huge), [], "none spans the hole");
    let before = device.faults();
    for nth in (0..200).chain(203..512) {
        let at = page(huge, nth).start();
        assert_eq!((seen(&user, at), get(at)), (Ok(nth), nth));
    }
    assert_eq!(device.faults() - before, 509, "small pages now");
    for nth in 200..203 {
        let at = page(huge, nth).start();
        assert_eq!(user.load(at), Err(Fault(at)));
    }
    let survivors = device.entries(&user, huge);
    assert!(survivors.iter().all(|one| one.len() == u128::from(PAGE)));
    rig.clean();
}

pub(crate) fn map_read_unmap_rounds_are_never_stale<M: Mirror>() {
    let rig = rig();
    let device = M::attach(&rig.bus, 0);
    let user = device.open(&rig.space);
    let neighbour = ModelMemory::new(&rig.bus, 2 << 20).unwrap();
    let neighbour = AddressSpace::managed(neighbour, Deadlines::default());
    let range = rig.map(4);
    rig.space.unmap(range).unwrap();
    for round in 0..200 {
        let map = Map::anonymous(4 * PAGE).at(range.start());
        rig.space.map(map).unwrap();
        let at = page(range, round % 4).start();
        assert_eq!(seen(&user, at), Ok(0), "new pages are zeroed");
        set(at, round + 1);
        assert_eq!(seen(&user, at), Ok(round + 1));
        // Somebody else's, in whose frames these were.
        rig.space.unmap(range).unwrap();
        let other = neighbour.map(Map::anonymous(4 * PAGE)).unwrap();
        set(page(other, round % 4).start(), 1 << 40);
        assert_eq!(user.load(at), Err(Fault(at)));
        neighbour.unmap(other).unwrap();
    }
    rig.clean();
}

pub(crate) fn an_unmap_during_an_operation_fails_it_where_it_was_or_not_at_all<M: Mirror>() {
    const PAGES: u64 = 64;
    let rig = rig();
    let device = M::attach(&rig.bus, 0);
    let user = device.open(&rig.space);
    let (mut failed, mut done) = (0, 0);
    for round in 1..=60 {
        let range = rig.map(PAGES);
        let (kept, gone) = (part(range, 0..PAGES / 2), part(range, PAGES / 2..PAGES));
        let said = std::thread::scope(|scope| {
            let operation = scope.spawn(|| user.fill(range, round));
            std::thread::sleep(Duration::from_micros(round * 20));
            rig.space.unmap(gone).unwrap();
            operation.join().unwrap()
        });
        // The half that stays was written, as the other comes after it.
        for nth in 0..PAGES / 2 {
            let at = page(kept, nth).start();
            assert_eq!(get(at), round, "{said:?}");
            assert_eq!(get(Addr::new(at.get() + PAGE - 8)), round, "{said:?}");
        }
        match said {
            Ok(()) => done += 1,
            Err(Fault(at)) => {
                assert!(gone.holds(at), "{at} has not been unmapped");
                failed += 1;
            }
        }
        // Nothing was written to whom the frames belong now.
        let other = rig.map(PAGES / 2);
        for nth in 0..PAGES / 2 {
            assert_eq!(get(page(other, nth).start()), 0);
        }
        rig.space.unmap(other).unwrap();
        rig.space.unmap(kept).unwrap();
    }
    assert!(failed > 0, "{done} operations were never met by an unmap");
    rig.clean();
}

pub(crate) fn two_devices_see_the_same_data<M: Mirror>() {
    two_see_the_same::<M, M>();
}

pub(crate) fn two_see_the_same<A: Mirror, B: Mirror>() {
    const EACH: u64 = 200;
    let rig = rig();
    let (first, second) = (A::attach(&rig.bus, 0), B::attach(&rig.bus, 1));
    let (a, b) = (first.open(&rig.space), second.open(&rig.space));
    let range = rig.map(2);
    let at = range.start();
    a.fill(range, 1).unwrap();
    assert_eq!(seen(&b, at), Ok(1));
    b.fill(page(range, 1), 2).unwrap();
    assert_eq!(seen(&a, page(range, 1).start()), Ok(2));
    std::thread::scope(|scope| {
        scope.spawn(|| (0..EACH).for_each(|_| assert!(a.add(at, 1).is_ok())));
        scope.spawn(|| (0..EACH).for_each(|_| assert!(b.add(at, 1).is_ok())));
    });
    assert_eq!(get(at), 1 + 2 * EACH);
    // One unmap is one for both.
    rig.space.unmap(range).unwrap();
    assert_eq!(a.load(at), Err(Fault(at)));
    assert_eq!(b.load(at), Err(Fault(at)));
    rig.clean();
}

pub(crate) fn a_remap_moves_the_data_and_the_old_address_faults<M: Mirror>() {
    let rig = rig();
    let device = M::attach(&rig.bus, 0);
    let user = device.open(&rig.space);
    let range = rig.map(8);
    let (from, to) = (part(range, 0..2), part(range, 4..6));
    for nth in 0..2 {
        user.fill(page(from, nth), 10 + nth).unwrap();
    }
    user.fill(to, 99).unwrap();
    rig.space.unmap(to).unwrap();
    rig.space.remap(from, to.start()).unwrap();
    for nth in 0..2 {
        let (old, new) = (page(from, nth).start(), page(to, nth).start());
        assert_eq!(user.load(old), Err(Fault(old)));
        assert_eq!((seen(&user, new), get(new)), (Ok(10 + nth), 10 + nth));
        user.fill(page(to, nth), 20 + nth).unwrap();
        assert_eq!(get(new), 20 + nth);
    }
    rig.clean();
}

/// The child has the same addresses, and copies of the pages, as a fork makes of private ones that a device may be writing to.
pub(crate) fn spaces_cloned_as_fork_does_keep_private_pages_apart<M: Mirror>() {
    let rig = rig();
    let device = M::attach(&rig.bus, 0);
    let parent = device.open(&rig.space);
    let range = rig.map(4);
    for nth in 0..4 {
        parent.fill(page(range, nth), 10 + nth).unwrap();
    }
    let memory = rig.memory.twin().unwrap();
    let space = AddressSpace::managed(memory.clone(), Deadlines::default());
    let map = Map::anonymous(4 * PAGE).at(range.start());
    assert_eq!(space.map(map).unwrap(), range);
    for nth in 0..4 {
        for word in (0..PAGE).step_by(8) {
            let at = Addr::new(page(range, nth).start().get() + word);
            set(memory.view(at), get(at));
        }
    }
    let child = device.open(&space);
    let at = range.start();
    assert_eq!((seen(&parent, at), seen(&child, at)), (Ok(10), Ok(10)));
    child.fill(page(range, 0), 50).unwrap();
    parent.fill(page(range, 1), 60).unwrap();
    let next = page(range, 1).start();
    assert_eq!((seen(&parent, at), seen(&child, at)), (Ok(10), Ok(50)));
    assert_eq!((seen(&parent, next), seen(&child, next)), (Ok(60), Ok(11)));
    assert_eq!((get(at), get(memory.view(at))), (10, 50));
    // What is unmapped of one is still the other's.
    space.unmap(page(range, 0)).unwrap();
    assert_eq!(child.load(at), Err(Fault(at)));
    assert_eq!(seen(&parent, at), Ok(10));
    rig.space.unmap(page(range, 1)).unwrap();
    assert_eq!(parent.load(next), Err(Fault(next)));
    assert_eq!(seen(&child, next), Ok(11));
    rig.clean();
}
