//! A memory that others change: a walk finds at once what they did.

use super::*;

fn open() -> (Bus, Arc<ModelMemory>) {
    let bus = Bus::new(64).unwrap();
    let memory = ModelMemory::open_to_others(&bus, 4 * HUGE * PAGE).unwrap();
    (bus, memory)
}

/// A call of somebody else's.
fn others(nr: libc::c_long, range: Range, [c, d, e, f]: [usize; 4]) {
    let (at, len) = (range.start().get() as usize, range.len() as usize);
    // SAFETY: a range of the test's own arena.
    let said = unsafe { libc::syscall(nr, at, len, c, d, e, f) };
    assert_ne!(said, -1, "{}", std::io::Error::last_os_error());
}

fn munmap(range: Range) {
    others(libc::SYS_munmap, range, [0; 4]);
}

fn rights(memory: &ModelMemory, page: u64) -> Option<Rights> {
    let found = memory.translate(pages(memory, page, 1).start());
    found.map(|found| found.rights)
}

#[test]
fn what_others_unmap_is_not_found_before_the_memory_is_told() {
    let (bus, memory) = open();
    map(&memory, 0, 4);
    munmap(pages(&memory, 1, 2));
    let found = [0, 1, 2, 3].map(|page| rights(&memory, page).is_some());
    assert_eq!(found, [true, false, false, true]);
    memory.unmap(pages(&memory, 0, 4)).unwrap();
    assert_eq!(bus.physical().free_frames(), 64);
    // A memory that is not open to others asks nobody.
    let memory = ModelMemory::new(&bus, HUGE * PAGE).unwrap();
    let range = map(&memory, 0, 1);
    others(libc::SYS_mprotect, range, [0; 4]);
    assert_eq!(rights(&memory, 0), Some(Rights::READ_WRITE));
}

#[test]
fn a_walk_finds_no_more_rights_than_the_kernel_gives() {
    let (_bus, memory) = open();
    map(&memory, 0, 2);
    let page = pages(&memory, 1, 1);
    others(
        libc::SYS_mprotect,
        page,
        [libc::PROT_READ as usize, 0, 0, 0],
    );
    assert_eq!(rights(&memory, 0), Some(Rights::READ_WRITE));
    assert_eq!(rights(&memory, 1), Some(Rights::READ));
    memory.protect(page, Rights::READ).unwrap();
    let both = (libc::PROT_READ | libc::PROT_WRITE) as usize;
    others(libc::SYS_mprotect, page, [both, 0, 0, 0]);
    assert_eq!(rights(&memory, 1), Some(Rights::READ), "not told yet");
}

#[test]
fn other_pages_at_the_address_are_not_those_of_the_table() {
    let (_bus, memory) = open();
    map(&memory, 0, 4);
    let fixed = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as usize;
    let to = pages(&memory, 3, 1).start().get() as usize;
    let from = pages(&memory, 1, 1);
    others(libc::SYS_mremap, from, [PAGE as usize, fixed, to, 0]);
    let found = [0, 1, 2, 3].map(|page| rights(&memory, page).is_some());
    assert_eq!(found, [true, false, true, false]);
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED) as usize;
    let over = pages(&memory, 2, 1);
    others(libc::SYS_mmap, over, [3, flags, usize::MAX, 0]);
    assert_eq!(rights(&memory, 2), None);
}

#[test]
fn a_large_page_that_others_have_cut_is_not_found() {
    let bus = Bus::new(HUGE).unwrap();
    let memory = ModelMemory::open_to_others(&bus, 4 * HUGE * PAGE).unwrap();
    let range = pages(&memory, 0, 16);
    let size = PageSize::SixtyFourKiB;
    memory.map(range, size, Rights::READ_WRITE).unwrap();
    assert_eq!(memory.translate(range.start()).unwrap().page_size, size);
    munmap(pages(&memory, 15, 1));
    assert_eq!(memory.translate(range.start()), None);
    memory.unmap(pages(&memory, 15, 1)).unwrap();
    assert!(memory.translate(range.start()).is_some());
}

#[test]
fn a_hole_in_the_arena_is_nobody_elses_meanwhile() {
    let (_bus, memory) = open();
    map(&memory, 0, 4);
    munmap(pages(&memory, 0, 4));
    // More than the holes between other mappings have room for.
    for _ in 0..8192 {
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping where the kernel likes, which stays.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), 4096, rights, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        assert!(!memory.arena().holds((at as u64).into()));
    }
    memory.unmap(pages(&memory, 0, 4)).unwrap();
}
