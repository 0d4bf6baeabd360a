//! Properties that are the real kernel's as much as the device's: other processes, files.

use std::fs::File;
use std::os::unix::fs::FileExt;

use memmap2::{MmapOptions, MmapRaw};
use shootdown::{Addr, Memory, Range};

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
