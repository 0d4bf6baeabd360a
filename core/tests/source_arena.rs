//! Foreign calls that unmap what lies in an arena: the addresses stay the space's, and nobody else is given them.

#[path = "support/child.rs"]
mod child;
#[path = "support/foreign.rs"]
mod foreign;
mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use child::in_child;
use foreign::*;
use shootdown::*;
use support::short;

#[derive(Default)]
struct Handler(AtomicU64);

impl Notifier for Handler {
    fn needs(&self) -> Needs {
        Needs::TOLERATES_FAULTS
    }

    fn end(&self, _: &Op<'_>, _: Outcome) {
        self.0.fetch_add(1, SeqCst);
    }
}

struct Rig {
    space: AddressSpace,
    arena: Range,
    buffer: Range,
    handler: Arc<Handler>,
    _watched: Watched,
    _registration: Registration,
}

fn rig(source: Arc<dyn Source>) -> Rig {
    let memory = ProcessMemory::reserve(1 << 30).unwrap();
    let arena = shootdown::Memory::arena(&memory);
    let space = AddressSpace::managed(Arc::new(memory), short());
    let _watched = space.watch(source, arena).unwrap();
    let buffer = space.map(Map::anonymous(64 * PAGE)).unwrap();
    touch(buffer);
    let handler = Arc::new(Handler::default());
    let _registration = space.register(buffer, handler.clone(), &[]).unwrap();
    Rig {
        space,
        arena,
        buffer,
        handler,
        _watched,
        _registration,
    }
}

const ANONYMOUS: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;

fn map(at: usize, pages: u64, flags: i32) -> Result<usize, i32> {
    let args = [
        at,
        (pages * PAGE) as usize,
        3,
        (ANONYMOUS | flags) as usize,
        usize::MAX,
        0,
    ];
    raw(libc::SYS_mmap, args)
}

/// Nothing is there, and nobody can have it.
fn is_reserved(range: Range) -> bool {
    let taken = map(
        start(range),
        range.len() as u64 / PAGE,
        libc::MAP_FIXED_NOREPLACE,
    );
    if let Ok(at) = taken {
        raw(libc::SYS_munmap, [at, range.len() as usize, 0, 0, 0, 0]).unwrap();
    }
    !is_mapped(range) && taken == Err(libc::EEXIST)
}

fn mremap(from: Range, len: u64, flags: i32, to: usize) -> Result<usize, i32> {
    let args = [
        start(from),
        from.len() as usize,
        len as usize,
        flags as usize,
        to,
        0,
    ];
    raw(libc::SYS_mremap, args)
}

fn pages(range: Range, first: u64, count: u64) -> Range {
    Range::new(range.start().get() + first * PAGE, count * PAGE).unwrap()
}

#[test]
fn what_a_stranger_unmaps_in_an_arena_stays_reserved() {
    if !in_child("what_a_stranger_unmaps_in_an_arena_stays_reserved") {
        return;
    }
    let rig = rig(Arc::new(Unotify::new()));
    let part = page(rig.buffer, 3);
    assert_eq!(munmap(part), Ok(0));
    assert!(is_reserved(part));
    // For the space it is mapped, until it unmaps it.
    let again = Map::anonymous(PAGE).at(part.start());
    assert!(matches!(
        rig.space.map(again),
        Err(MapError::Occupied { .. })
    ));
    rig.space.unmap(part).unwrap();
    assert_eq!(rig.space.map(again).unwrap(), part);
    touch(part);
}

#[test]
fn what_is_moved_away_or_cut_leaves_no_hole() {
    if !in_child("what_is_moved_away_or_cut_leaves_no_hole") {
        return;
    }
    let rig = rig(Arc::new(Unotify::new()));
    let aside = map(0, 64, 0).unwrap();
    let moved = page(rig.buffer, 1);
    assert_eq!(mremap(moved, PAGE, 3, aside), Ok(aside));
    assert!(is_reserved(moved));
    assert_eq!(read(Range::new(aside as u64, PAGE).unwrap()), Some(0xa5));
    // To where the kernel likes, as realloc does.
    let grown = page(rig.buffer, 3);
    let at = mremap(grown, 4 * PAGE, 1, 0).unwrap();
    assert!(!rig.arena.holds((at as u64).into()));
    assert!(is_reserved(grown));
    assert_eq!(read(Range::new(at as u64, PAGE).unwrap()), Some(0xa5));
    let shrunk = pages(rig.buffer, 8, 4);
    assert_eq!(mremap(shrunk, PAGE, 0, 0), Ok(start(shrunk)));
    assert!(is_mapped(page(rig.buffer, 8)));
    assert!(is_reserved(pages(rig.buffer, 9, 3)));
    // A segment.
    let attached = pages(rig.buffer, 16, 2);
    let id = raw(libc::SYS_shmget, [0, 2 * PAGE as usize, 0o1600, 0, 0, 0]).unwrap();
    raw(libc::SYS_shmat, [id, start(attached), 0o40000, 0, 0, 0]).unwrap();
    raw(libc::SYS_shmctl, [id, 0, 0, 0, 0, 0]).unwrap();
    touch(attached);
    assert_eq!(
        raw(libc::SYS_shmdt, [start(attached), 0, 0, 0, 0, 0]),
        Ok(0)
    );
    assert!(is_reserved(attached));
}

#[test]
fn what_lies_beside_an_arena_is_unmapped_as_it_is() {
    if !in_child("what_lies_beside_an_arena_is_unmapped_as_it_is") {
        return;
    }
    let rig = rig(Arc::new(Unotify::new()));
    let behind = pages(rig.arena, rig.arena.len() as u64 / PAGE, 2);
    if map(start(behind), 2, libc::MAP_FIXED_NOREPLACE).is_err() {
        // Somebody lives there; then the last page of the arena is enough.
        assert_eq!(
            munmap(pages(rig.arena, rig.arena.len() as u64 / PAGE - 1, 1)),
            Ok(0)
        );
        return;
    }
    touch(behind);
    let last = pages(rig.arena, rig.arena.len() as u64 / PAGE - 2, 2);
    assert_eq!(munmap(last.hull(behind)), Ok(0));
    assert!(is_reserved(last));
    assert!(!is_mapped(behind));
    let taken = map(start(behind), 2, libc::MAP_FIXED_NOREPLACE);
    assert_eq!(taken, Ok(start(behind)), "that is free");
}

/// How many mappings of others fell into the arena while strangers unmapped there.
fn intruders(rig: &Rig) -> u64 {
    let (stop, fell) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(SeqCst) {
                // Where it would like to be, if that is free.
                let at = map(start(page(rig.buffer, 30)), 1, 0).unwrap();
                let range = Range::new(at as u64, PAGE).unwrap();
                fell.fetch_add(u64::from(rig.arena.contains(range)), SeqCst);
                munmap(range).unwrap();
            }
        });
        for _ in 0..50 {
            for nth in 0..32 {
                munmap(page(rig.buffer, 2 * nth)).unwrap();
            }
            for nth in 0..32 {
                assert!(map_fixed(page(rig.buffer, 2 * nth)));
            }
        }
        stop.store(true, SeqCst);
    });
    fell.load(SeqCst)
}

#[test]
fn nobody_else_s_mapping_falls_into_an_arena() {
    if in_child("nobody_else_s_mapping_falls_into_an_arena") {
        assert_eq!(intruders(&rig(Arc::new(Unotify::new()))), 0);
    }
}

#[test]
fn what_is_told_late_is_reserved_late() {
    if !in_child("what_is_told_late_is_reserved_late") {
        return;
    }
    let rig = rig(Arc::new(Uffd::new()));
    let ends = |nth| {
        let deadline = Instant::now() + Duration::from_secs(10);
        while rig.handler.0.load(SeqCst) < nth {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    let [one, two] = [page(rig.buffer, 3), page(rig.buffer, 5)];
    assert_eq!(munmap(one), Ok(0));
    ends(1);
    // Somebody who was faster stays.
    assert!(map_fixed(two));
    touch(two);
    ends(2);
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_reserved(one) {
        assert!(Instant::now() < deadline);
    }
    assert_eq!(read(two), Some(0xa5));
    // And what is reserved anew is watched.
    rig.space.unmap(one).unwrap();
    rig.space.map(Map::anonymous(PAGE).at(one.start())).unwrap();
    touch(one);
    let before = rig.handler.0.load(SeqCst);
    assert_eq!(munmap(one), Ok(0));
    ends(before + 1);
}
