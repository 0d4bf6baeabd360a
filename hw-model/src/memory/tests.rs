//! What a memory promises, one property a test. In `refusals`: what cannot be done changes nothing. In `naive`: a
//! comparison with a naive model.

mod naive;
mod others;
mod refusals;

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::oracle::{Access, FindingKind};

const PAGE: u64 = 4096;
const HUGE: u64 = 512;

/// `count` pages from page `page` of the arena on.
fn pages(memory: &ModelMemory, page: u64, count: u64) -> Range {
    Range::new(memory.arena().start().get() + page * PAGE, count * PAGE).unwrap()
}

fn new(frames: u64, arena_pages: u64) -> (Bus, Arc<ModelMemory>) {
    let bus = Bus::new(frames).unwrap();
    let memory =
        ModelMemory::with_budget(&bus, arena_pages * PAGE, VmaBudget::new(10_000)).unwrap();
    (bus, memory)
}

fn map(memory: &ModelMemory, page: u64, count: u64) -> Range {
    let range = pages(memory, page, count);
    memory
        .map(range, PageSize::FourKiB, Rights::READ_WRITE)
        .unwrap();
    range
}

/// What the CPU reads at the start of a page that is mapped for reading.
fn load(memory: &ModelMemory, page: u64) -> u64 {
    let at = pages(memory, page, 1).start().get() as *const u64;
    // SAFETY: the caller has mapped the page; only threads of the test use it.
    unsafe { at.read_volatile() }
}

/// Stores at the start of a page that is mapped for writing.
fn store(memory: &ModelMemory, page: u64, value: u64) {
    let at = pages(memory, page, 1).start().get() as *mut u64;
    // SAFETY: as in `load`.
    unsafe { at.write_volatile(value) }
}

/// Everything that can be seen of a range without changing it.
fn look(memory: &ModelMemory, range: Range) -> Vec<(Option<Translation>, Option<u64>)> {
    (0..range.pages(PageSize::FourKiB))
        .map(|nth| {
            let addr = Addr::new(range.start().get() + nth * PAGE);
            let found = memory.translate(addr);
            let readable = found.is_some_and(|entry| entry.rights.contains(Rights::READ));
            (
                found,
                readable.then(|| load(memory, memory.table.page_of(addr))),
            )
        })
        .collect()
}

/// The access of a device that installs an entry for the page now and uses it later.
fn access(bus: &Bus, memory: &ModelMemory, page: u64, write: bool) -> Access {
    let addr = pages(memory, page, 1).start();
    let entry = memory.translate(addr).unwrap();
    Access {
        device: 1,
        context: 2,
        space: memory.id(),
        addr,
        len: 8,
        write,
        frame: Frame(entry.frame.0 + (addr.get() - entry.page.start().get()) / PAGE),
        stamp: bus.oracle().stamp(memory.id(), addr),
    }
}

#[test]
fn a_stale_write_destroys_what_the_next_owner_of_the_frame_has_there_and_is_found() {
    let (bus, memory) = new(64, HUGE);
    let other = ModelMemory::new(&bus, HUGE * PAGE).unwrap();
    map(&memory, 3, 1);
    let stale = access(&bus, &memory, 3, true);
    bus.write(&stale, &1_u64.to_ne_bytes());
    assert_eq!(bus.oracle().stale_accesses(), 0);

    memory.unmap(pages(&memory, 3, 1)).unwrap();
    map(&other, 7, 1);
    assert_eq!(
        other.translate(pages(&other, 7, 1).start()).unwrap().frame,
        stale.frame
    );
    assert_eq!(load(&other, 7), 0);
    store(&other, 7, 0x600d);
    bus.write(&stale, &0xbad_u64.to_ne_bytes());
    assert_eq!(
        load(&other, 7),
        0xbad,
        "the access was performed on the frame"
    );

    let findings = bus.oracle().findings();
    assert_eq!(findings.len(), 1);
    assert_eq!(
        (findings[0].kind, findings[0].access),
        (FindingKind::StaleBefore, stale)
    );
    assert!(findings[0].to_string().contains("nothing is mapped there"));
}

#[test]
fn a_stale_read_returns_the_next_owners_data_and_is_found() {
    let (bus, memory) = new(64, HUGE);
    map(&memory, 0, 1);
    let stale = access(&bus, &memory, 0, false);
    memory.unmap(pages(&memory, 0, 1)).unwrap();
    map(&memory, 9, 1);
    store(&memory, 9, 0x5ec2e7);
    let mut bytes = [0; 8];
    bus.read(&stale, &mut bytes);
    assert_eq!(u64::from_ne_bytes(bytes), 0x5ec2e7);
    assert_eq!(bus.oracle().stale_accesses(), 1);
}

#[test]
fn unmapping_and_mapping_again_with_the_same_frame_does_not_make_an_old_entry_true() {
    let (bus, memory) = new(1, HUGE);
    map(&memory, 0, 1);
    let stale = access(&bus, &memory, 0, true);
    memory.unmap(pages(&memory, 0, 1)).unwrap();
    map(&memory, 0, 1);
    assert_eq!(access(&bus, &memory, 0, true).frame, stale.frame);
    bus.write(&stale, &[0; 8]);
    assert_eq!(bus.oracle().stale_accesses(), 1);
}

#[test]
fn every_change_makes_old_entries_stale_but_not_those_of_other_pages() {
    type Change = fn(&ModelMemory, Range) -> Result<(), MemoryError>;
    let changes: [Change; 3] = [
        |memory, range| memory.unmap(range),
        |memory, range| memory.discard(range),
        |memory, range| memory.remap(range, pages(memory, HUGE, 1)),
    ];
    for change in changes {
        let (bus, memory) = new(64, 2 * HUGE);
        map(&memory, 0, 3);
        let entries: Vec<_> = (0..3)
            .map(|page| access(&bus, &memory, page, true))
            .collect();
        change(&memory, pages(&memory, 1, 1)).unwrap();
        bus.write(&entries[0], &[0; 8]);
        bus.write(&entries[2], &[0; 8]);
        assert_eq!(bus.oracle().stale_accesses(), 0);
        bus.write(&entries[1], &[0; 8]);
        assert_eq!(bus.oracle().stale_accesses(), 1);
    }
}

#[test]
fn one_stamp_serves_all_parts_of_a_large_page() {
    let (bus, memory) = new(2 * HUGE, HUGE);
    map(&memory, 100, 1);
    memory.unmap(pages(&memory, 100, 1)).unwrap();
    memory
        .map(
            pages(&memory, 0, HUGE),
            PageSize::TwoMiB,
            Rights::READ_WRITE,
        )
        .unwrap();
    let stamp = access(&bus, &memory, 0, true).stamp;
    memory.protect(pages(&memory, 7, 1), Rights::READ).unwrap();
    for page in (0..HUGE).filter(|page| *page != 7) {
        bus.write(
            &Access {
                stamp,
                ..access(&bus, &memory, page, true)
            },
            &[1; 8],
        );
    }
    assert_eq!(bus.oracle().stale_accesses(), 0);
}

#[test]
fn a_read_through_an_entry_from_before_a_write_protection_is_fine_and_a_write_is_not() {
    let (bus, memory) = new(64, HUGE);
    let range = map(&memory, 0, 1);
    let write = access(&bus, &memory, 0, true);
    memory.protect(range, Rights::READ).unwrap();
    bus.read(
        &Access {
            write: false,
            ..write
        },
        &mut [0; 8],
    );
    assert_eq!(bus.oracle().stale_accesses(), 0);
    bus.write(&write, &[0; 8]);
    assert_eq!(bus.oracle().findings()[0].kind, FindingKind::Rights);
}

#[test]
fn when_all_is_dropped_no_frame_and_no_mapping_is_missing() {
    let bus = Bus::new(4 * HUGE).unwrap();
    let budget = VmaBudget::new(100);
    let first = ModelMemory::with_budget(&bus, 4 * HUGE * PAGE, Arc::clone(&budget)).unwrap();
    let second = ModelMemory::with_budget(&bus, 1, Arc::clone(&budget)).unwrap();
    assert_ne!(first.id(), second.id());
    assert_eq!(second.arena().len(), 2 << 20);
    for memory in [&first, &second] {
        memory
            .map(pages(memory, 0, HUGE), PageSize::TwoMiB, Rights::READ_WRITE)
            .unwrap();
        memory.unmap(pages(memory, 3, 2)).unwrap();
        memory.protect(pages(memory, 9, 2), Rights::READ).unwrap();
    }
    let stale = access(&bus, &first, 0, true);
    drop(first);
    bus.write(&stale, &[0; 8]);
    assert!(!bus.oracle().findings()[0].space_exists);
    drop(second);
    assert_eq!(bus.physical().free_frames(), bus.physical().total());
    assert_eq!(budget.used(), 0);
}

#[test]
fn a_large_range_of_small_pages_is_one_mapping() {
    let (_bus, memory) = new(16 * HUGE, 16 * HUGE);
    map(&memory, 0, 16 * HUGE);
    assert_eq!(memory.table.mappings(), 1);
}

/// Runs `change` on the first half of the arena while another thread waits for `sign`, and sees to it that the oracle does not
/// take the last page for what it was once the sign has been seen.
fn watch_while(
    change: impl Fn(&ModelMemory, Range),
    sign: impl Fn(&ModelMemory, &mut bool) -> bool + Sync,
) {
    const COUNT: u64 = 16 * HUGE;
    for _ in 0..10 {
        let (bus, memory) = new(2 * COUNT, 2 * COUNT);
        let range = map(&memory, 0, COUNT);
        let last = access(&bus, &memory, COUNT - 1, true);
        let start = Barrier::new(2);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                start.wait();
                let mut state = false;
                // Acquire, with the release below: for form's sake, the end of the change only ends the wait.
                while !done.load(Ordering::Acquire) {
                    if sign(&memory, &mut state) {
                        let behind = memory.shadow().at(memory.id(), last.addr);
                        assert!(!behind.agrees(last.frame, last.stamp));
                    }
                }
            });
            start.wait();
            change(&memory, range);
            done.store(true, Ordering::Release);
        });
    }
}

#[test]
fn the_oracle_knows_that_pages_are_unmapped_before_their_frames_are_free() {
    watch_while(
        |memory, range| memory.unmap(range).unwrap(),
        |memory, _| memory.physical().free_frames() > memory.physical().total() / 2,
    );
}

#[test]
fn the_oracle_knows_that_pages_are_discarded_before_their_frames_are_free() {
    watch_while(
        |memory, range| memory.discard(range).unwrap(),
        |memory, all_taken| {
            let free = memory.physical().free_frames();
            *all_taken |= free == 0;
            *all_taken && free > 0
        },
    );
}

#[test]
fn the_oracle_knows_that_pages_have_moved_before_they_are_found_elsewhere() {
    watch_while(
        |memory, range| {
            memory
                .remap(range, pages(memory, 16 * HUGE, 16 * HUGE))
                .unwrap()
        },
        |memory, _| {
            memory
                .translate(pages(memory, 16 * HUGE, 1).start())
                .is_some()
        },
    );
}

#[test]
fn children_inherit_no_page() {
    let (_bus, memory) = new(64, HUGE);
    let range = map(&memory, 0, 16);
    memory.discard(pages(&memory, 3, 2)).unwrap();
    memory
        .remap(pages(&memory, 9, 2), pages(&memory, 30, 2))
        .unwrap();
    let text = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    let mut checked = 0;
    for line in text.lines() {
        if let Some(mapping) = Mapping::parse(line) {
            inside = mapping.shared && memory.arena().holds(Addr::new(mapping.start));
        } else if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| inside) {
            assert!(flags.split_whitespace().any(|flag| flag == "dc"), "{flags}");
            checked += 1;
        }
    }
    assert!(checked >= 3, "{range} was found in smaps {checked} times");
}

#[test]
fn disjoint_calls_in_the_same_large_pages_run_in_parallel() {
    const THREADS: u64 = 4;
    const SLICE: u64 = HUGE / THREADS;
    let (bus, memory) = new(8 * HUGE, 4 * HUGE);
    let start = Barrier::new(THREADS as usize);
    for round in 0..20 {
        memory
            .map(
                pages(&memory, 0, HUGE),
                PageSize::TwoMiB,
                Rights::READ_WRITE,
            )
            .unwrap();
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (memory, start) = (&memory, &start);
                scope.spawn(move || {
                    let first = thread * SLICE;
                    start.wait();
                    (first..first + SLICE).for_each(|page| store(memory, page, page + round));
                    memory
                        .protect(pages(memory, first + 1, 1), Rights::READ)
                        .unwrap();
                    memory.discard(pages(memory, first + 2, 3)).unwrap();
                    memory
                        .remap(pages(memory, first + 8, 8), pages(memory, HUGE + first, 8))
                        .unwrap();
                    memory.unmap(pages(memory, first + 8, 16)).unwrap();
                    assert_eq!(load(memory, first + 1), first + 1 + round);
                    assert_eq!(load(memory, first + 2), 0);
                    assert_eq!(load(memory, first + 5), first + 5 + round);
                    assert_eq!(load(memory, HUGE + first + 7), first + 15 + round);
                    let small = memory.translate(pages(memory, first, 1).start()).unwrap();
                    assert_eq!(small.page_size, PageSize::FourKiB);
                    // A large page in a gap, while the neighbours still split theirs.
                    let gap = pages(memory, first + SLICE - 16, 16);
                    memory.unmap(gap).unwrap();
                    memory
                        .map(gap, PageSize::SixtyFourKiB, Rights::READ)
                        .unwrap();
                    let large = memory.translate(gap.last()).unwrap();
                    assert_eq!((large.page_size, large.page), (PageSize::SixtyFourKiB, gap));
                });
            }
        });
        assert_eq!(
            memory.budget.used(),
            OWN_MAPPINGS - 1 + memory.table.mappings()
        );
        assert_eq!(kernels_view(&memory).len() as u64, memory.table.mappings());
        memory.unmap(memory.arena()).unwrap();
        assert_eq!(bus.physical().free_frames(), bus.physical().total());
    }
}

/// A line of `/proc/self/maps`.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Mapping {
    start: u64,
    /// First address after it.
    end: u64,
    rights: Rights,
    shared: bool,
    offset: u64,
}

impl Mapping {
    fn parse(line: &str) -> Option<Self> {
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let flags = words.next()?;
        let mut rights = Rights::empty();
        rights.set(Rights::READ, flags.starts_with('r'));
        rights.set(Rights::WRITE, flags.get(1..2) == Some("w"));
        Some(Self {
            start: hex(start)?,
            end: hex(end)?,
            rights,
            shared: flags.ends_with('s'),
            offset: hex(words.next()?)?,
        })
    }
}

/// The kernel's mappings in the arena, clipped to it.
fn kernels_view(memory: &ModelMemory) -> Vec<Mapping> {
    let arena = memory.arena();
    let (first, end) = (arena.start().get(), arena.last().get() + 1);
    std::fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .filter_map(Mapping::parse)
        .filter(|mapping| mapping.start < end && mapping.end > first)
        .map(|mapping| Mapping {
            start: mapping.start.max(first),
            end: mapping.end.min(end),
            ..mapping
        })
        .collect()
}
