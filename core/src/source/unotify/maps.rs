//! The mappings of this process, read without allocating.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::OnceLock;

use crate::addr::Range;

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

static MAPS: OnceLock<OwnedFd> = OnceLock::new();

/// Opens the file, which is read later where nothing may be opened that could fail.
pub(super) fn open() -> std::io::Result<()> {
    if MAPS.get().is_none() {
        let file = std::fs::File::open("/proc/self/maps")?;
        MAPS.get_or_init(|| file.into());
    }
    Ok(())
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

/// Calls `see` with each mapping; false if they could not be read.
pub(super) fn each(mut see: impl FnMut(Mapping)) -> bool {
    let Some(maps) = MAPS.get() else { return false };
    let (mut buffer, mut at, mut line) = ([0u8; 4096], 0, Line::default());
    loop {
        // SAFETY: the buffer is as long as said.
        let read = unsafe {
            libc::pread(
                maps.as_raw_fd(),
                buffer.as_mut_ptr().cast(),
                buffer.len(),
                at,
            )
        };
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

/// Whether one mapping holds all of the range.
pub(super) fn is_one_mapping(range: Range) -> bool {
    let mut one = false;
    let known = each(|mapping| {
        one |= mapping.range().is_some_and(|whole| whole.contains(range));
    });
    known && one
}

/// The inode behind a descriptor of this process.
pub(super) fn inode_of_descriptor(fd: usize) -> Option<u64> {
    // SAFETY: integers only.
    let mut about: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills the structure.
    let said = unsafe { libc::fstat(fd as i32, &mut about) };
    (said == 0).then_some(about.st_ino)
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
        open().unwrap();
        let here = this_process_has_its_own_code_mapped as *const () as u64;
        let mut found = 0;
        assert!(each(
            |one| found += u64::from(one.start <= here && here < one.end)
        ));
        assert_eq!(found, 1);
    }
}
