//! The tracepoint `kvm:kvm_unmap_hva_range`: its number, and where its record holds what.
//!
//! Tracefs says so. Where it is not mounted it is reached all the same, through a mount that is attached to no folder.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::error::KvmError;

const MOUNTED: &CStr = c"/sys/kernel/tracing";
const EVENT: &str = "events/kvm/kvm_unmap_hva_range";

/// The tracepoint, as this kernel has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Tracepoint {
    pub(crate) id: u64,
    /// Bytes from the start of a record to the first address.
    pub(crate) start: usize,
    /// And to the first address behind the range.
    pub(crate) end: usize,
}

impl Tracepoint {
    /// # Errors
    /// [`KvmError::NoTracepoint`].
    pub(crate) fn find() -> Result<Self, KvmError> {
        let find = || -> io::Result<Option<Self>> {
            let folder = tracefs()?;
            let id = read(&folder, "id")?;
            let format = read(&folder, "format")?;
            let parsed = (
                id.trim().parse().ok(),
                offset(&format, "start"),
                offset(&format, "end"),
            );
            Ok(match parsed {
                (Some(id), Some(start), Some(end)) => Some(Self { id, start, end }),
                _ => None,
            })
        };
        let error = match find() {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => io::Error::from(io::ErrorKind::InvalidData),
            Err(error) => error,
        };
        Err(KvmError::NoTracepoint(error))
    }
}

fn descriptor(said: libc::c_long) -> io::Result<OwnedFd> {
    match said {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: opened just now.
        fd => Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) }),
    }
}

fn open(at: i32, path: &CStr, flags: i32) -> io::Result<OwnedFd> {
    let flags = flags | libc::O_CLOEXEC;
    // SAFETY: a path that ends.
    descriptor(unsafe { libc::openat(at, path.as_ptr(), flags) }.into())
}

/// The root of tracefs, where it is mounted or not.
fn tracefs() -> io::Result<OwnedFd> {
    let path = libc::O_PATH | libc::O_DIRECTORY;
    let folder = open(libc::AT_FDCWD, MOUNTED, path)?;
    if open(folder.as_raw_fd(), c"events", path).is_ok() {
        return Ok(folder);
    }
    const FSCONFIG_CMD_CREATE: libc::c_int = 6;
    let (none, zero) = (std::ptr::null::<libc::c_char>(), 0);
    // SAFETY: a name that ends, and numbers.
    let context =
        descriptor(unsafe { libc::syscall(libc::SYS_fsopen, c"tracefs".as_ptr(), zero) })?;
    let fd = context.as_raw_fd();
    // SAFETY: no key and no value belong to this command.
    let said = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            fd,
            FSCONFIG_CMD_CREATE,
            none,
            none,
            zero,
        )
    };
    if said != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: numbers only.
    descriptor(unsafe { libc::syscall(libc::SYS_fsmount, fd, zero, zero) })
}

fn read(tracefs: &OwnedFd, name: &str) -> io::Result<String> {
    let path = std::ffi::CString::new(format!("{EVENT}/{name}"))?;
    let mut file = File::from(open(tracefs.as_raw_fd(), &path, libc::O_RDONLY)?);
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    Ok(text)
}

/// Where the 64-bit field of this name lies, in a format as tracefs writes it.
fn offset(format: &str, field: &str) -> Option<usize> {
    let line = format.lines().find(|line| {
        let declared = line.split(';').next().unwrap_or_default();
        declared.split_whitespace().next_back() == Some(field)
    })?;
    let value = |key| {
        let part = line
            .split(';')
            .find_map(|part| part.trim().strip_prefix(key))?;
        part.parse().ok()
    };
    let size: usize = value("size:")?;
    value("offset:").filter(|_| size == 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_where_the_format_says() {
        let format = "name: kvm_unmap_hva_range\nID: 27\nformat:\n\
            \tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;\n\n\
            \tfield:unsigned long start;\toffset:8;\tsize:8;\tsigned:0;\n\
            \tfield:unsigned long end;\toffset:16;\tsize:8;\tsigned:0;\n\n\
            print fmt: \"mmu notifier unmap range: %#016lx -- %#016lx\", REC->start, REC->end\n";
        assert_eq!(offset(format, "start"), Some(8));
        assert_eq!(offset(format, "end"), Some(16));
        assert_eq!(offset(format, "common_pid"), None, "it has four bytes");
        assert_eq!(offset(format, "last"), None);
    }
}
