//! Two changes of one large page at a time: each flushes what the other has made of it.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use shootdown::*;

/// Pages of 2 MiB that become small ones when they are cut. Its first protect waits, with the page cut, for a sign.
struct Pages {
    arena: Range,
    is_cut: AtomicBool,
    may_go_on: AtomicBool,
}

impl Memory for Pages {
    fn id(&self) -> u64 {
        7
    }
    fn arena(&self) -> Range {
        self.arena
    }
    fn page_sizes(&self) -> PageSizes {
        PageSizes::all()
    }
    fn map(&self, _: Range, _: PageSize, _: Rights) -> Result<(), MemoryError> {
        Ok(())
    }
    fn unmap(&self, _: Range) -> Result<(), MemoryError> {
        Ok(())
    }
    fn discard(&self, _: Range) -> Result<(), MemoryError> {
        Ok(())
    }
    fn protect(&self, _: Range, _: Rights) -> Result<(), MemoryError> {
        self.is_cut.store(true, SeqCst);
        while !self.may_go_on.load(SeqCst) {
            std::thread::yield_now();
        }
        Ok(())
    }
    fn remap(&self, _: Range, _: Range) -> Result<(), MemoryError> {
        Ok(())
    }
    fn translate(&self, _: Addr) -> Option<Translation> {
        None
    }
}

/// Remembers the sizes that it was flushed of.
#[derive(Clone, Default)]
struct Tlb {
    asked: Arc<Mutex<Vec<PageSize>>>,
    done: Arc<AtomicU64>,
}

impl DeviceTlb for Tlb {
    fn limits(&self) -> Limits {
        Limits {
            entry_sizes: PageSizes::all(),
            pages_per_command: 512,
            commands_per_batch: 8,
            full_flush_cost: 8,
        }
    }
    fn splits_pages(&self) -> bool {
        false
    }
    fn issue(&self, command: FlushCommand) -> Issue {
        if let Scope::Pages { page_size, .. } = command.scope {
            self.asked.lock().unwrap().push(page_size);
        }
        Issue::Queued
    }
    fn dispatch(&self) -> Ticket {
        Ticket(self.done.fetch_add(1, SeqCst))
    }
    fn poll(&self, _: Ticket) -> Completion {
        Completion::Done
    }
}

/// Lets the first change go on, also when an assertion fails meanwhile.
struct GoOn<'a>(&'a AtomicBool);

impl Drop for GoOn<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

struct Plain;
impl Notifier for Plain {}

/// Remembers the sizes that it was told of.
#[derive(Default)]
struct Told(Mutex<Vec<PageSizes>>);
impl Notifier for Told {
    fn flush<'o>(&self, op: &Op<'o>, gather: Gather<'o>) -> Issued<'o> {
        self.0.lock().unwrap().push(op.page_sizes());
        gather.all()
    }
}

/// Nobody cuts pages here beside the space itself.
#[test]
fn whatever_a_range_holds_is_flushed_in_its_own_sizes() {
    const HUGE: u64 = 2 << 20;
    let arena = Range::new(1u64 << 30, 16 << 20).unwrap();
    let pages = Pages {
        arena,
        is_cut: AtomicBool::new(false),
        may_go_on: AtomicBool::new(true),
    };
    let space = AddressSpace::managed(Arc::new(pages), Deadlines::default());
    let tlb = Tlb::default();
    let asked = tlb.asked.clone();
    let target = Target {
        device: Device::new("a device", tlb),
        tag: 0,
    };
    let handler = Arc::new(Told::default());
    let _registration = space
        .register(Range::ALL, handler.clone(), &[target])
        .unwrap();
    let map = |at: u64, len: u64, size: PageSize| {
        let at = Addr::new(arena.start().get() + at);
        space
            .map(Map::anonymous(len).page_size(size).at(at))
            .unwrap()
    };
    let discard = |at: u64, len: u64| {
        let range = Range::new(arena.start().get() + at, len).unwrap();
        space.discard(range).unwrap();
        let mut sizes = std::mem::take(&mut *asked.lock().unwrap());
        sizes.sort();
        let told = std::mem::take(&mut *handler.0.lock().unwrap());
        let all = sizes.iter().map(|size| PageSizes::from(*size)).collect();
        assert_eq!(told, [all]);
        sizes
    };
    let (small, large) = (PageSize::FourKiB, PageSize::TwoMiB);
    // Large, small, large, two of them.
    map(0, HUGE, large);
    map(HUGE, HUGE, small);
    map(2 * HUGE, 2 * HUGE, large);
    assert_eq!(discard(0, 2 * HUGE), [small, large], "the last is small");
    assert_eq!(discard(HUGE, 2 * HUGE), [small, large], "the first is");
    assert_eq!(discard(HUGE, HUGE), [small]);
    assert_eq!(discard(2 * HUGE, 2 * HUGE), [large]);
    // In the middle of the last page: the one before stays whole.
    assert_eq!(discard(3 * HUGE + 0x5000, 0x1000), [large], "it cuts");
    assert_eq!(discard(3 * HUGE, 0x1000), [small], "before the cut");
    assert_eq!(discard(3 * HUGE + 0x9000, 0x1000), [small], "behind it");
    assert_eq!(discard(2 * HUGE, 0x1000), [large], "of another page");
}

#[test]
fn who_changes_the_other_part_of_a_page_that_is_being_cut_flushes_small_ones_too() {
    let arena = Range::new(1u64 << 30, 4 << 20).unwrap();
    let pages = Arc::new(Pages {
        arena,
        is_cut: AtomicBool::new(false),
        may_go_on: AtomicBool::new(false),
    });
    let space = AddressSpace::managed(pages.clone(), Deadlines::default());
    let tlb = Tlb::default();
    let asked = tlb.asked.clone();
    let take = || std::mem::take(&mut *asked.lock().unwrap());
    let device = Device::new("a device", tlb);
    let target = Target { device, tag: 0 };
    let _registration = space
        .register(Range::ALL, Arc::new(Plain), &[target])
        .unwrap();
    let map = Map::anonymous(2 << 20).page_size(PageSize::TwoMiB);
    let page = space.map(map).unwrap();
    let part = |nth: u64| Range::new(page.start().get() + nth * 4096, 4096).unwrap();
    std::thread::scope(|scope| {
        let first = scope.spawn(|| space.protect(part(0), Rights::READ));
        let go_on = GoOn(&pages.may_go_on);
        while !pages.is_cut.load(SeqCst) {
            std::thread::yield_now();
        }
        assert_eq!(take(), [PageSize::TwoMiB], "nothing of it was small before");
        // A device may have small entries of the rest by now, though the first change is not over.
        space.discard(part(9)).unwrap();
        let mut both = take();
        both.sort();
        assert_eq!(both, [PageSize::FourKiB, PageSize::TwoMiB]);
        drop(go_on);
        first.join().unwrap().unwrap();
    });
    space.discard(part(100)).unwrap();
    assert_eq!(take(), [PageSize::FourKiB], "it is small pages now");
}

#[test]
fn what_others_have_cut_is_flushed_in_small_ones_too() {
    let arena = Range::new(1u64 << 30, 4 << 20).unwrap();
    let space = AddressSpace::managed(
        Arc::new(Pages {
            arena,
            is_cut: AtomicBool::new(false),
            may_go_on: AtomicBool::new(true),
        }),
        Deadlines::default(),
    );
    let tlb = Tlb::default();
    let asked = tlb.asked.clone();
    let device = Device::new("a device", tlb);
    let target = Target { device, tag: 0 };
    let _registration = space
        .register(Range::ALL, Arc::new(Plain), &[target])
        .unwrap();
    let map = Map::anonymous(2 << 20).page_size(PageSize::TwoMiB);
    let page = space.map(map).unwrap();
    let part = Range::new(page.start().get(), 4096).unwrap();
    let change = space.begin_invalidation(part, Cause::Unmap).unwrap();
    change.end(Outcome::Changed).unwrap();
    asked.lock().unwrap().clear();
    space.unmap(page).unwrap();
    let mut both = asked.lock().unwrap().clone();
    both.sort();
    both.dedup();
    assert_eq!(
        both,
        PageSize::ALL,
        "of the rest there may be small entries"
    );
}
