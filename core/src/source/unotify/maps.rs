//! The mappings of this process, read without allocating.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::addr::Range;

/// Sizes of huge pages, in bytes.
pub(super) const HUGE: usize = 2 << 20;
pub(super) const GIB: usize = 1 << 30;

/// A mapping, as `/proc/self/maps` tells it.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) start: u64,
    /// The first address behind it.
    pub(super) end: u64,
    /// Of its first byte in the file.
    pub(super) offset: u64,
    /// 0 for what has no file, and for the first shared segment of a system.
    pub(super) inode: u64,
    pub(super) shared: bool,
}

impl Mapping {
    pub(super) fn range(self) -> Option<Range> {
        Range::new(self.start, self.end.checked_sub(self.start)?).ok()
    }
}

/// Reads a line byte by byte: `start-end perms offset major:minor inode path`.
#[derive(Default)]
pub(super) struct Line {
    mapping: Mapping,
    /// Of the field that is read now.
    field: usize,
    value: u64,
    /// A path was seen: the rest does not matter.
    done: bool,
}

impl Line {
    /// The mapping, at the end of its line.
    pub(super) fn byte(&mut self, byte: u8) -> Option<Mapping> {
        if byte == b'\n' {
            self.close();
            return Some(std::mem::take(self).mapping);
        }
        if self.done {
            return None;
        }
        match byte {
            b'-' if self.field == 0 => self.close(),
            b' ' => self.close(),
            b's' if self.field == PERMISSIONS => self.mapping.shared = true,
            _ => {
                let base = if self.field == INODE { 10 } else { 16 };
                let digit = (byte as char).to_digit(base).unwrap_or(0);
                self.value = self
                    .value
                    .wrapping_mul(base.into())
                    .wrapping_add(digit.into());
            }
        }
        None
    }

    fn close(&mut self) {
        let value = std::mem::take(&mut self.value);
        match self.field {
            0 => self.mapping.start = value,
            1 => self.mapping.end = value,
            OFFSET => self.mapping.offset = value,
            INODE if !self.done => {
                self.mapping.inode = value;
                self.done = true;
            }
            _ => {}
        }
        self.field += 1;
    }
}

// Start and end are two fields here; the device, which has no name, is between offset and inode.
const PERMISSIONS: usize = 2;
const OFFSET: usize = 3;
const INODE: usize = 5;

/// The file, open: it is read where nothing may be opened that could fail. Each reader has one of its own: the kernel goes on where the
/// last piece of text ended, by address, only for whoever read that piece. For any other it counts bytes from the start, and in a
/// list that has changed meanwhile those end in the middle of a line.
#[derive(Debug)]
pub(super) struct Maps(OwnedFd);

impl Maps {
    pub(super) fn open() -> io::Result<Self> {
        std::fs::File::open("/proc/self/maps").map(|file| Self(file.into()))
    }

    /// Calls `see` with each mapping; false if they could not be read. A mapping that is there throughout is seen.
    pub(super) fn each(&self, mut see: impl FnMut(Mapping)) -> bool {
        let (mut buffer, mut at, mut line) = ([0u8; 4096], 0, Line::default());
        loop {
            let (fd, len) = (self.0.as_raw_fd(), buffer.len());
            // SAFETY: the buffer is as long as said.
            let read = unsafe { libc::pread(fd, buffer.as_mut_ptr().cast(), len, at) };
            match read {
                0 => return true,
                read if read > 0 => {
                    at += read as libc::off_t;
                    for byte in &buffer[..read as usize] {
                        if let Some(mapping) = line.byte(*byte) {
                            see(mapping);
                        }
                    }
                }
                _ => return false,
            }
        }
    }

    /// The mapping that holds this address.
    pub(super) fn at(&self, address: u64) -> Option<Mapping> {
        let mut found = None;
        self.each(|one| {
            if one.start <= address && address < one.end {
                found = Some(one);
            }
        });
        found
    }
}

/// The inode behind a descriptor of this process.
pub(super) fn inode_of_descriptor(fd: usize) -> Option<u64> {
    // SAFETY: integers only.
    let mut about: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the structure.
    let said = unsafe { libc::fstat(fd as i32, &mut about) };
    (said == 0).then_some(about.st_ino)
}

/// The size of the pages of a file that has huge ones.
pub(super) fn huge_page_of_descriptor(fd: usize) -> Option<usize> {
    const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
    // SAFETY: integers only.
    let mut about: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the structure.
    let said = unsafe { libc::fstatfs(fd as i32, &mut about) };
    (said == 0 && about.f_type == HUGETLBFS_MAGIC).then_some(about.f_bsize as usize)
}

/// The inode behind a path, which the kernel reads wherever it lies.
pub(super) fn inode_of_path(path: usize) -> Option<u64> {
    // SAFETY: integers only.
    let mut about: libc::stat = unsafe { std::mem::zeroed() };
    let at = &raw mut about as usize;
    let args = [libc::AT_FDCWD as usize, path, at, 0];
    let [a, b, c, d] = args;
    // SAFETY: the kernel reads the path, which may be anywhere, and fills the structure.
    let said = unsafe { libc::syscall(libc::SYS_newfstatat, a, b, c, d) };
    (said == 0).then_some(about.st_ino)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_the_kernel_writes_them() {
        let text =
            b"7f0e00001000-7f0e00003000 rw-s 00002000 00:01 1234    /memfd:a b-c (deleted)\n\
            ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]\n\
            1000-2000 rw-p 00000000 00:00 0 \n";
        let mut line = Line::default();
        let seen: Vec<Mapping> = text.iter().filter_map(|byte| line.byte(*byte)).collect();
        let mapping = |start, end, offset, inode| Mapping {
            start,
            end,
            offset,
            inode,
            shared: inode != 0,
        };
        assert_eq!(
            seen,
            [
                mapping(0x7f0e_0000_1000, 0x7f0e_0000_3000, 0x2000, 1234),
                mapping(0xffff_ffff_ff60_0000, 0xffff_ffff_ff60_1000, 0, 0),
                mapping(0x1000, 0x2000, 0, 0),
            ]
        );
    }

    #[test]
    fn this_process_has_its_own_code_mapped() {
        let here = this_process_has_its_own_code_mapped as *const () as u64;
        let mut found = 0;
        assert!(
            Maps::open()
                .unwrap()
                .each(|one| found += u64::from(one.start <= here && here < one.end))
        );
        assert_eq!(found, 1);
    }

    /// Two read while a third maps and unmaps; what stays mapped is found, each time.
    #[test]
    fn readers_do_not_disturb_each_other() {
        use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
        const PAGES: usize = 400;
        let rights = libc::PROT_READ;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: new mappings where the kernel likes; every other page is this test's to protect.
        let map = |len| unsafe { libc::mmap(std::ptr::null_mut(), len, rights, flags, -1, 0) };
        let base = map(PAGES * 4096) as u64;
        for nth in (0..PAGES as u64).step_by(2) {
            // SAFETY: as above.
            unsafe { libc::mprotect((base + nth * 4096) as *mut _, 4096, libc::PROT_NONE) };
        }
        let stop = AtomicBool::new(false);
        let readers = [Maps::open().unwrap(), Maps::open().unwrap()];
        let read = |maps: &Maps| {
            for _ in 0..50 {
                let mut found = 0;
                let inside = base..base + (PAGES as u64) * 4096;
                assert!(maps.each(|one| {
                    found += u64::from(inside.contains(&one.start) && one.end - one.start == 4096);
                }));
                if found < PAGES as u64 - 1 {
                    return Err(found);
                }
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Relaxed) {
                    let many: Vec<_> = [1, 3, 5, 7].map(|len| map(len * 4096)).into();
                    for (at, len) in many.into_iter().zip([1, 3, 5, 7]) {
                        // SAFETY: mapped just now.
                        unsafe { libc::munmap(at, len * 4096) };
                    }
                }
            });
            let threads = [&readers[0], &readers[1]].map(|maps| scope.spawn(move || read(maps)));
            let found = threads.map(|thread| thread.join().unwrap());
            stop.store(true, Relaxed);
            assert_eq!(found, [Ok(()), Ok(())]);
        });
    }
}
