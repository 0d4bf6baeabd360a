//! Forks with registered memory: the child has no part in what the device does, and the parent's data are right (R30).

#[path = "support/foreign.rs"]
mod foreign;
#[path = "support/pin.rs"]
mod pin;
mod support;

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use foreign::*;
use pin::Pinned;
use shootdown::*;
use support::{Counting, space};

const BY_PARENT: u8 = 0x11;
const BY_DEVICE: u8 = 0xdd;

fn store(range: Range, byte: u8) {
    // SAFETY: the test has mapped it, writable.
    unsafe { std::ptr::write_volatile(start(range) as *mut u8, byte) };
}

/// Runs `work` in a child by fork while `meanwhile` runs here; what the child returns.
fn fork(work: impl FnOnce() -> u8, meanwhile: impl FnOnce()) -> u8 {
    let mut ends = [0; 2];
    // SAFETY: two descriptors are given back; the child makes system calls and plain accesses only.
    unsafe {
        assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
        let child = libc::fork();
        assert!(child >= 0);
        if child == 0 {
            libc::close(ends[1]);
            libc::read(ends[0], (&raw mut ends).cast(), 1);
            libc::_exit(work().into());
        }
        meanwhile();
        libc::close(ends[0]);
        libc::close(ends[1]);
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        assert!(libc::WIFEXITED(status));
        libc::WEXITSTATUS(status) as u8
    }
}

fn pinned(buffer: Range) -> Option<Pinned> {
    match Pinned::new(buffer) {
        Ok(device) => Some(device),
        Err(errno) => {
            let error = std::io::Error::from_raw_os_error(errno);
            eprintln!("SKIPPED: no device that pins: io_uring: {error}");
            None
        }
    }
}

#[test]
fn managed_memory_is_the_parent_s_and_its_device_s_alone() {
    let space = space();
    let buffer = space.map(Map::anonymous(PAGE)).unwrap();
    touch(buffer);
    let handler = Arc::new(Counting::default());
    let _registration = space.register(buffer, handler.clone(), &[]).unwrap();
    let Some(mut device) = pinned(buffer) else {
        return;
    };
    let seen = fork(
        || u8::from(is_mapped(buffer)),
        || {
            // Copied here, if the child had a share in it.
            store(buffer, BY_PARENT);
            device.write(BY_DEVICE);
            assert_eq!(read(buffer), Some(BY_DEVICE));
        },
    );
    assert_eq!(seen, 0, "the child has no page there");
    // After what the space has mapped, discarded, moved: the same.
    space.discard(buffer).unwrap();
    let to = space.map(Map::anonymous(PAGE)).unwrap();
    space.unmap(to).unwrap();
    let moved = space.remap(buffer, to.start()).unwrap();
    touch(moved);
    space.protect(moved, Rights::READ).unwrap();
    assert_eq!(fork(|| u8::from(is_mapped(moved)), || {}), 0);
    assert_eq!(
        handler.starts.load(SeqCst),
        2,
        "a fork is no change: discard, remap"
    );
}

#[test]
fn spawned_programs_take_no_page_from_the_device() {
    let space = space();
    let buffer = space.map(Map::anonymous(PAGE)).unwrap();
    touch(buffer);
    let Some(mut device) = pinned(buffer) else {
        return;
    };
    for nth in 0..4 {
        // By posix_spawn, which is a vfork; by fork and exec, where something is to be done between.
        let mut command = Command::new("true");
        if nth % 2 == 1 {
            // SAFETY: nothing is done.
            unsafe { std::os::unix::process::CommandExt::pre_exec(&mut command, || Ok(())) };
        }
        let mut child = command.spawn().unwrap();
        store(buffer, BY_PARENT);
        device.write(BY_DEVICE + nth);
        assert_eq!(read(buffer), Some(BY_DEVICE + nth));
        assert!(child.wait().unwrap().success());
        store(buffer, BY_PARENT);
        device.write(nth);
        assert_eq!(read(buffer), Some(nth));
    }
}

/// Memory that is not of this crate goes to children. Where the device has it pinned the kernel copies for the child at once (Linux
/// 5.10): the frame stays the parent's.
#[test]
fn what_is_pinned_stays_the_parent_s() {
    let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
    let at = raw(libc::SYS_mmap, [0, PAGE as usize, 3, flags, usize::MAX, 0]).unwrap();
    let buffer = Range::new(at as u64, PAGE).unwrap();
    touch(buffer);
    let Some(mut device) = pinned(buffer) else {
        return;
    };
    let childs = fork(
        || read(buffer).unwrap_or(0),
        || {
            store(buffer, BY_PARENT);
            device.write(BY_DEVICE);
            assert_eq!(read(buffer), Some(BY_DEVICE));
        },
    );
    assert_eq!(childs, 0xa5, "as it was at the fork");
}
