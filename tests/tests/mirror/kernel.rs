//! Properties that are the real kernel's as much as the device's: other processes, files, touches of the CPU.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use memmap2::{MmapOptions, MmapRaw};
use shootdown::{
    Addr, AddressSpace, Deadlines, ExcludeError, InsertError, Map, Memory, MemoryError,
    NotifierLock, ProcessMemory, Range,
};

use crate::device::{Mirror, User};
use crate::properties::{PAGE, Rig, get, page, rig, seen, set};

/// Where `at` is in the file of all frames.
fn offset(rig: &Rig, at: Addr) -> u64 {
    let found = rig.memory.translate(at).unwrap();
    found.frame.0 * PAGE + (at.get() - found.page.start().get())
}

/// The file of all frames.
fn file(rig: &Rig) -> File {
    rig.bus.physical().fd().try_clone_to_owned().unwrap().into()
}

/// Another shared mapping of the page at `at`, which children inherit.
fn shared(rig: &Rig, own: Range) -> MmapRaw {
    let mut options = MmapOptions::new();
    options.offset(offset(rig, own.start())).len(PAGE as usize);
    options.map_raw(&file(rig)).unwrap()
}

/// Runs `child` in a child process, and waits for its end: whether it says that all is right.
fn in_a_child(child: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child runs `child`, which only reads and writes memory, and ends without running anything else of this process.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
    if pid == 0 {
        let said = child();
        // SAFETY: ends the child, at once.
        unsafe { libc::_exit(if said { 0 } else { 1 }) };
    }
    let mut status = -1;
    // SAFETY: the status is an int of ours.
    let waited = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    waited == pid && status == 0
}

/// A child process has a mapping of the page, and no device: what it writes the device sees, and the other way round.
pub(crate) fn shared_memory_is_seen_by_another_process_and_the_device<M: Mirror>() {
    let rig = rig();
    let device = M::attach(&rig.bus, 0);
    let user = device.open(&rig.space);
    let own = rig.map(1);
    let at = own.start();
    let beside = Addr::new(at.get() + 8);
    let theirs = shared(&rig, own);
    let theirs = Addr::new(theirs.as_mut_ptr() as u64);
    user.fill(own, 7).unwrap();
    assert!(in_a_child(|| {
        let found = get(theirs);
        set(theirs, 8);
        found == 7
    }));
    assert_eq!((seen(&user, at), get(at)), (Ok(8), 8));
    assert_eq!(user.add(at, 1), Ok(8));
    set(beside, 3);
    assert_eq!(seen(&user, beside), Ok(3), "this process's own stores");
    assert!(in_a_child(|| get(theirs) == 9));
    rig.clean();
}

/// The page is one of a file, which others read and write by system calls.
pub(crate) fn a_file_is_read_and_written<M: Mirror>() {
    let rig = rig();
    let device = M::attach(&rig.bus, 0);
    let user = device.open(&rig.space);
    let range = rig.map(4);
    let file = file(&rig);
    for nth in 0..4 {
        let at = page(range, nth).start();
        let word = (1000 + nth).to_le_bytes();
        file.write_all_at(&word, offset(&rig, at)).unwrap();
        assert_eq!(seen(&user, at), Ok(1000 + nth));
        user.fill(page(range, nth), 2000 + nth).unwrap();
        let mut found = [0; PAGE as usize];
        file.read_exact_at(&mut found, offset(&rig, at)).unwrap();
        let (words, _) = found.as_chunks::<8>();
        let all = |word: &[u8; 8]| u64::from_le_bytes(*word) == 2000 + nth;
        assert!(words.iter().all(all));
    }
    rig.clean();
}

/// The CPU reads, and writes, a page that the device has for itself: the device is shot down before the access goes on, and keeps what
/// it has done.
pub(crate) fn exclusive_access_ends_with_a_touch_of_the_cpu<M: Mirror>() {
    let rig = rig();
    let device = M::attach(&rig.bus, 0);
    let user = device.open(&rig.space);
    let range = rig.map(4);
    for touch in [get as fn(Addr) -> u64, |at| {
        set(at, 1000);
        1000
    }] {
        let own = page(range, 1);
        user.fill(own, 40).unwrap();
        let held = user.exclusive(&rig.space, own).unwrap();
        user.add(own.start(), 1).unwrap();
        set(page(range, 0).start(), 5);
        // By now it would be in the CPU's page table, had that been let.
        assert_eq!(user.add(own.start(), 1), Ok(41));
        assert!(held.is_held(), "a page beside it was touched");
        assert_eq!(device.entries(&user, own), [own]);
        let before = rig.space.stats().invalidations;
        let found = touch(own.start());
        assert!(!held.is_held());
        assert_eq!(rig.space.stats().invalidations, before + 1);
        assert_eq!(device.entries(&user, own), []);
        assert!(found == 42 || found == 1000);
        // Not exclusively, both go on.
        assert_eq!(user.add(own.start(), 1), Ok(found));
        assert_eq!(get(own.start()), found + 1);
        assert_eq!(rig.space.stats().invalidations, before + 1, "told once");
    }
    rig.clean();
}

/// Whoever changes the pages, and whoever lets go of them, ends it; nobody waits for a touch then.
pub(crate) fn exclusive_access_ends_with_any_change_of_the_pages<M: Mirror>() {
    let rig = rig();
    let device = M::attach(&rig.bus, 0);
    let user = device.open(&rig.space);
    let range = rig.map(2);
    let own = page(range, 0);
    let held = user.exclusive(&rig.space, own).unwrap();
    let twice = user.exclusive(&rig.space, range);
    assert!(matches!(
        twice,
        Err(ExcludeError::Memory(MemoryError::System { .. }))
    ));
    assert!(held.is_held());
    rig.space.discard(own).unwrap();
    assert!(!held.is_held());
    assert_eq!(get(own.start()), 0);
    drop(held);
    let held = user.exclusive(&rig.space, range).unwrap();
    user.fill(range, 6).unwrap();
    // The CPU waits for nobody once it is given back.
    drop(held);
    let before = rig.space.stats().invalidations;
    assert_eq!(get(page(range, 1).start()), 6);
    assert_eq!(rig.space.stats().invalidations, before);
    rig.space.unmap(range).unwrap();
    let gone = user.exclusive(&rig.space, range);
    assert!(matches!(gone, Err(ExcludeError::Memory(_))));
    assert_eq!(rig.space.registrations(), 1, "the device's own");
    rig.clean();
}

/// Anonymous memory of the process, whose touches nobody sees.
#[test]
fn exclusive_access_is_refused_where_nobody_sees_touches() {
    let memory = Arc::new(ProcessMemory::reserve(1 << 20).unwrap());
    let space = AddressSpace::managed(memory, Deadlines::default());
    let range = space.map(Map::anonymous(PAGE)).unwrap();
    let refused = space.exclude(range, Duration::from_secs(1)).unwrap_err();
    assert!(matches!(
        refused,
        ExcludeError::Memory(MemoryError::TouchNotSeen { range: named, .. }) if named == range
    ));
    let without = AddressSpace::without_memory(Deadlines::default());
    let refused = without.exclude(range, Duration::from_secs(1)).unwrap_err();
    assert!(matches!(refused, ExcludeError::NoMemory));
    let lock = NotifierLock::new(());
    let guard = lock.lock();
    let refused = space.exclude(range, Duration::from_secs(1)).unwrap_err();
    assert!(matches!(
        refused,
        ExcludeError::Insert(InsertError::Refused(_))
    ));
    drop(guard);
    set(range.start(), 1);
    assert_eq!((space.registrations(), get(range.start())), (0, 1));
}
