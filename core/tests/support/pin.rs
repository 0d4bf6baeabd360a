//! A device that pins: the buffers that are registered with an io_uring are held by their frames, as DMA holds them.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};

use shootdown::Range;

use crate::foreign::{raw, start};

const OFF_SQES: usize = 0x1000_0000;
const RING: usize = 4096;
const REGISTER_BUFFERS: usize = 0;
const READ_FIXED: u8 = 4;

pub(crate) struct Pinned {
    ring: OwnedFd,
    rings: usize,
    entries: usize,
    /// Of the submissions: tail, array; of the completions: head, entries.
    offsets: [u32; 4],
    buffer: Range,
    file: OwnedFd,
    done: u32,
}

impl Pinned {
    /// Pins the buffer; the errno, if this kernel has no io_uring for us.
    pub(crate) fn new(buffer: Range) -> Result<Self, i32> {
        let mut params = [0u32; 30];
        let args = [2, params.as_mut_ptr() as usize, 0, 0, 0, 0];
        let ring = raw(libc::SYS_io_uring_setup, args)?;
        // SAFETY: made just now.
        let ring = unsafe { OwnedFd::from_raw_fd(ring as i32) };
        let fd = ring.as_raw_fd() as usize;
        let flags = (libc::MAP_SHARED | libc::MAP_POPULATE) as usize;
        let map = |offset| raw(libc::SYS_mmap, [0, RING, 3, flags, fd, offset]);
        let (rings, entries) = (map(0)?, map(OFF_SQES)?);
        let vector = [start(buffer), buffer.len() as usize];
        let args = [fd, REGISTER_BUFFERS, vector.as_ptr() as usize, 1, 0, 0];
        raw(libc::SYS_io_uring_register, args)?;
        // SAFETY: a name; the descriptor is made just now.
        let file = unsafe {
            OwnedFd::from_raw_fd(libc::memfd_create(c"device".as_ptr(), libc::MFD_CLOEXEC))
        };
        Ok(Self {
            ring,
            rings,
            entries,
            // Submissions' offsets are words 10 to 17 (head, tail, mask, entries, flags, dropped, array), completions' 20 to 27
            // (head, tail, mask, entries, overflow, cqes).
            offsets: [params[11], params[16], params[20], params[25]],
            buffer,
            file,
            done: 0,
        })
    }

    fn word(&self, offset: u32) -> &AtomicU32 {
        // SAFETY: the kernel's offset in the page mapped above.
        unsafe { &*((self.rings + offset as usize) as *const AtomicU32) }
    }

    /// The device writes `byte` at the start of the buffer: to the frame that was there when it was pinned.
    pub(crate) fn write(&mut self, byte: u8) {
        let file = self.file.as_raw_fd();
        // SAFETY: one byte of this frame.
        let written = unsafe { libc::pwrite(file, (&raw const byte).cast(), 1, 0) };
        assert_eq!(written, 1);
        let [tail, array, head, entries] = self.offsets;
        let mut entry = [0u64; 8];
        entry[0] = u64::from(READ_FIXED) | (file as u64) << 32;
        entry[2] = self.buffer.start().get();
        entry[3] = 1;
        let slot = self.done % 2;
        // SAFETY: two entries lie in the page mapped above.
        unsafe { ((self.entries + slot as usize * 64) as *mut [u64; 8]).write(entry) };
        self.word(array + 4 * slot).store(slot, Ordering::Relaxed);
        self.word(tail).store(self.done + 1, Ordering::Release);
        let args = [self.ring.as_raw_fd() as usize, 1, 1, 1, 0, 0];
        raw(libc::SYS_io_uring_enter, args).unwrap();
        let slot = self.word(head).load(Ordering::Acquire) % 4;
        // The result is the third word of a completion.
        let result = self.word(entries + 16 * slot + 8).load(Ordering::Acquire);
        assert_eq!(result as i32, 1);
        self.done += 1;
        self.word(head).store(self.done, Ordering::Release);
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        for at in [self.rings, self.entries] {
            raw(libc::SYS_munmap, [at, RING, 0, 0, 0, 0]).unwrap();
        }
    }
}
