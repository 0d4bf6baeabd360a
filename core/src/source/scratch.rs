//! Doing each operation once, on pages that nobody else has.
//!
//! What prepares and what cleans up goes through the [`gate`]; the operation itself does not. Every address lies in the area, which
//! was reserved for this and is used by one self-test at a time.

use std::ffi::CString;
use std::os::fd::AsRawFd;
use std::sync::OnceLock;

use super::io_uring::{self, Entry};
use super::operation::Operation;
use super::uffd::sys::{self, MODE_MISSING, MODE_WP, UFFDIO_MOVE, UFFDIO_WRITEPROTECT};
use super::{SourceError, gate};
use crate::addr::Range;

pub(super) const PAGE: usize = 4096;
const HUGE: usize = 2 << 20;
/// What an old page holds, and what a new one does that is not zeroed.
pub(super) const OLD: u8 = 0xa5;
const NEW: u8 = 0x5a;

/// Where operations are tried: a huge page, some pages, and as many outside of what is watched.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scratch {
    base: usize,
}

/// A step that could not be made: this machine lacks the operation, or it is not done in a process that lives on.
pub(super) type NotTried = String;

type Args = [usize; 6];

fn must(nr: libc::c_long, call: &str, args: Args) -> Result<usize, NotTried> {
    // SAFETY: every address lies in the scratch area or in this frame.
    unsafe { gate::own_call(nr, args) }
        .map_err(|errno| format!("{call}: {}", std::io::Error::from_raw_os_error(errno)))
}

/// The operation itself, as anybody would make it.
fn foreign(nr: libc::c_long, call: &str, [a, b, c, d, e, f]: Args) -> Result<usize, NotTried> {
    // SAFETY: as in `must`.
    match unsafe { libc::syscall(nr, a, b, c, d, e, f) } {
        -1 => Err(format!("{call}: {}", std::io::Error::last_os_error())),
        result => Ok(result as usize),
    }
}

/// A descriptor that is closed in the end.
struct Fd(usize);

impl Drop for Fd {
    fn drop(&mut self) {
        // SAFETY: opened here, and nobody else's.
        unsafe { libc::close(self.0 as i32) };
    }
}

/// What an attempt tells its caller: the address to look at, before the operation; and that it has returned.
pub(super) trait Attempt {
    /// Told before the operation: the page at `witness` holds [`OLD`] until it has happened, and `visible` says that it will not
    /// afterwards.
    fn armed(&self, witness: usize, visible: bool);
    fn returned(&self);
}

impl Scratch {
    /// The area of this process.
    pub(super) fn get() -> Result<Self, SourceError> {
        static BASE: OnceLock<usize> = OnceLock::new();
        if let Some(base) = BASE.get() {
            return Ok(Self { base: *base });
        }
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping where the kernel likes.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4 * HUGE,
                libc::PROT_NONE,
                flags,
                -1,
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(SourceError::last("mmap of the scratch area"));
        }
        let base = (at as usize).next_multiple_of(HUGE);
        Ok(Self {
            base: *BASE.get_or_init(|| base),
        })
    }

    /// What a source watches for the self-test.
    pub(super) fn watched(self) -> Range {
        Range::new(self.base as u64, (HUGE + 16 * PAGE) as u64).expect("the area is mapped")
    }

    fn page(self) -> usize {
        self.base + HUGE
    }

    /// Outside of what is watched.
    fn aside(self) -> usize {
        self.base + HUGE + 64 * PAGE
    }

    /// Fresh pages at `at`, filled.
    fn anonymous(at: usize, len: usize, fill: u8, shared: bool) -> Result<(), NotTried> {
        let sharing = if shared {
            libc::MAP_SHARED
        } else {
            libc::MAP_PRIVATE
        };
        let flags = sharing | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
        Self::map(at, len, flags, usize::MAX)?;
        // SAFETY: mapped just now.
        unsafe { std::ptr::write_bytes(at as *mut u8, fill, len) };
        Ok(())
    }

    fn map(at: usize, len: usize, flags: i32, fd: usize) -> Result<(), NotTried> {
        let rights = (libc::PROT_READ | libc::PROT_WRITE) as usize;
        let args = [at, len, rights, flags as usize, fd, 0];
        must(libc::SYS_mmap, "mmap", args).map(|_| ())
    }

    /// Two pages of a new file at `at`, the first old, the second new.
    fn file(at: usize) -> Result<Fd, NotTried> {
        let name = c"shootdown-scratch".as_ptr() as usize;
        let args = [name, libc::MFD_CLOEXEC as usize, 0, 0, 0, 0];
        let fd = Fd(must(libc::SYS_memfd_create, "memfd_create", args)?);
        must(
            libc::SYS_ftruncate,
            "ftruncate",
            [fd.0, 2 * PAGE, 0, 0, 0, 0],
        )?;
        Self::map(at, 2 * PAGE, libc::MAP_SHARED | libc::MAP_FIXED, fd.0)?;
        // SAFETY: mapped just now.
        unsafe {
            std::ptr::write_bytes(at as *mut u8, OLD, PAGE);
            std::ptr::write_bytes((at + PAGE) as *mut u8, NEW, PAGE);
        }
        Ok(fd)
    }

    /// A shared segment of a page, not attached.
    fn segment() -> Result<usize, NotTried> {
        let mode = (libc::IPC_CREAT | 0o600) as usize;
        must(
            libc::SYS_shmget,
            "shmget",
            [libc::IPC_PRIVATE as usize, PAGE, mode, 0, 0, 0],
        )
    }

    fn give_up_segment(id: usize) {
        let args = [id, libc::IPC_RMID as usize, 0, 0, 0, 0];
        let _ = must(libc::SYS_shmctl, "shmctl", args);
    }

    /// As it was: reserved, without access.
    pub(super) fn clean(self) {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let args = [self.base, 2 * HUGE, 0, flags as usize, usize::MAX, 0];
        let _ = must(libc::SYS_mmap, "mmap", args);
    }

    /// Prepares the page, makes the operation, and says when. In a process that lives on `alone` is false: then it does not fork, and
    /// moves nobody's pages.
    pub(super) fn attempt(
        self,
        operation: Operation,
        attempt: &dyn Attempt,
        alone: bool,
    ) -> Result<(), NotTried> {
        let (page, aside, two) = (self.page(), self.aside(), 2 * PAGE);
        let remap = |flags: i32, len: usize| {
            let flags = flags | libc::MREMAP_MAYMOVE;
            let args = [page, two, len, flags as usize, aside, 0];
            foreign(libc::SYS_mremap, "mremap", args)
        };
        let advise = |advice: i32| {
            let args = [page, PAGE, advice as usize, 0, 0, 0];
            foreign(libc::SYS_madvise, "madvise", args)
        };
        let private = || Self::anonymous(page, two, OLD, false);
        let arm = |visible| attempt.armed(page, visible);
        let result = match operation {
            Operation::Munmap => {
                private()?;
                arm(true);
                foreign(libc::SYS_munmap, "munmap", [page, PAGE, 0, 0, 0, 0])
            }
            Operation::MapFixed => {
                private()?;
                arm(true);
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
                let args = [page, PAGE, 1, flags as usize, usize::MAX, 0];
                foreign(libc::SYS_mmap, "mmap", args)
            }
            Operation::MremapMove => {
                private()?;
                arm(true);
                remap(libc::MREMAP_FIXED, two)
            }
            Operation::MremapShrink => {
                private()?;
                attempt.armed(page + PAGE, true);
                remap(0, PAGE)
            }
            Operation::MremapOver => {
                private()?;
                Self::anonymous(aside, PAGE, NEW, false)?;
                arm(true);
                let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as usize;
                foreign(
                    libc::SYS_mremap,
                    "mremap",
                    [aside, PAGE, PAGE, flags, page, 0],
                )
            }
            Operation::MremapDontunmap => {
                private()?;
                arm(true);
                remap(libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP, two)
            }
            Operation::Dontneed => {
                private()?;
                arm(true);
                advise(libc::MADV_DONTNEED)
            }
            Operation::DontneedLocked => {
                private()?;
                arm(true);
                advise(libc::MADV_DONTNEED_LOCKED)
            }
            Operation::Free => {
                private()?;
                arm(false);
                advise(libc::MADV_FREE)
            }
            Operation::Remove => {
                let _file = Self::file(page)?;
                arm(true);
                advise(libc::MADV_REMOVE)
            }
            Operation::Pageout => {
                private()?;
                arm(false);
                advise(libc::MADV_PAGEOUT)
            }
            Operation::Collapse => {
                Self::anonymous(self.base, HUGE, OLD, false)?;
                attempt.armed(self.base, false);
                let args = [self.base, HUGE, libc::MADV_COLLAPSE as usize, 0, 0, 0];
                foreign(libc::SYS_madvise, "madvise", args)
            }
            Operation::GuardInstall => {
                private()?;
                arm(true);
                advise(MADV_GUARD_INSTALL)
            }
            Operation::ProcessMadvise => {
                private()?;
                let process = std::process::id() as usize;
                let fd = must(libc::SYS_pidfd_open, "pidfd_open", [process, 0, 0, 0, 0, 0])?;
                let fd = Fd(fd);
                let vector = libc::iovec {
                    iov_base: page as *mut libc::c_void,
                    iov_len: PAGE,
                };
                arm(true);
                let advice = libc::MADV_DONTNEED as usize;
                let args = [fd.0, &raw const vector as usize, 1, advice, 0, 0];
                foreign(libc::SYS_process_madvise, "process_madvise", args)
            }
            Operation::Mprotect => {
                private()?;
                arm(true);
                foreign(libc::SYS_mprotect, "mprotect", [page, PAGE, 0, 0, 0, 0])
            }
            Operation::PkeyMprotect => {
                private()?;
                arm(true);
                let args = [page, PAGE, 0, usize::MAX, 0, 0];
                foreign(libc::SYS_pkey_mprotect, "pkey_mprotect", args)
            }
            Operation::RemapFilePages => {
                let _file = Self::file(page)?;
                arm(true);
                let args = [page, PAGE, 0, 1, 0, 0];
                foreign(libc::SYS_remap_file_pages, "remap_file_pages", args)
            }
            Operation::Brk => Err("the heap lies outside of the scratch area".to_owned()),
            Operation::Shmdt | Operation::ShmatRemap => {
                let id = Self::segment()?;
                let result = self.shared(operation, id, attempt);
                Self::give_up_segment(id);
                result
            }
            Operation::Fallocate => {
                let file = Self::file(page)?;
                arm(true);
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                let args = [file.0, mode as usize, 0, PAGE, 0, 0];
                foreign(libc::SYS_fallocate, "fallocate", args)
            }
            Operation::Ftruncate => {
                let file = Self::file(page)?;
                arm(true);
                foreign(libc::SYS_ftruncate, "ftruncate", [file.0, 0, 0, 0, 0, 0])
            }
            Operation::Truncate => {
                let file = Self::file(page)?;
                let path = CString::new(format!("/proc/self/fd/{}", file.0)).expect("no nul");
                arm(true);
                let args = [path.as_ptr() as usize, 0, 0, 0, 0, 0];
                foreign(libc::SYS_truncate, "truncate", args)
            }
            Operation::Fork => {
                private()?;
                in_child(alone, || arm(false), None)
            }
            Operation::IoUringMadvise => {
                private()?;
                io_uring::submit(Entry::madvise(page, PAGE, libc::MADV_DONTNEED), || {
                    arm(true)
                })
            }
            Operation::IoUringFallocate => {
                let file = Self::file(page)?;
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                io_uring::submit(Entry::fallocate(file.0, mode, PAGE), || arm(true))
            }
            Operation::IoUringFtruncate => {
                let file = Self::file(page)?;
                io_uring::submit(Entry::ftruncate(file.0, 0), || arm(true))
            }
            Operation::Mbind => {
                private()?;
                arm(false);
                // Where it is already: the kernel looks at each page all the same.
                foreign(
                    libc::SYS_mbind,
                    "mbind",
                    [page, PAGE, 0, 0, 0, MPOL_MF_MOVE],
                )
            }
            Operation::MovePages => {
                private()?;
                arm(false);
                let (pages, nodes, mut status) = ([page], [0i32], [0i32]);
                let [pages, nodes] = [pages.as_ptr() as usize, nodes.as_ptr() as usize];
                let args = [
                    0,
                    1,
                    pages,
                    nodes,
                    status.as_mut_ptr() as usize,
                    MPOL_MF_MOVE,
                ];
                foreign(libc::SYS_move_pages, "move_pages", args)
            }
            Operation::MigratePages if !alone => {
                Err("all memory of a process that lives on is not moved for a test".to_owned())
            }
            Operation::MigratePages => {
                private()?;
                arm(false);
                let node = &raw const FIRST_NODE as usize;
                let args = [0, 64, node, node, 0, 0];
                foreign(libc::SYS_migrate_pages, "migrate_pages", args)
            }
            Operation::UffdMove => {
                private()?;
                let fd = sys::monitor(MODE_MISSING, aside, PAGE, || {
                    Self::anonymous(aside, PAGE, NEW, false)?;
                    let args = [aside, PAGE, libc::MADV_DONTNEED as usize, 0, 0, 0];
                    must(libc::SYS_madvise, "madvise", args)
                })?;
                arm(true);
                let argument = [aside, page, PAGE, 0, 0];
                let argument = argument.as_ptr() as usize;
                let args = [fd.as_raw_fd() as usize, UFFDIO_MOVE, argument, 0, 0, 0];
                foreign(libc::SYS_ioctl, "UFFDIO_MOVE", args)
            }
            Operation::UffdWriteProtect => {
                let fd = sys::monitor(MODE_WP, page, PAGE, private)?;
                arm(false);
                let argument = [page, PAGE, 1];
                let argument = argument.as_ptr() as usize;
                let args = [
                    fd.as_raw_fd() as usize,
                    UFFDIO_WRITEPROTECT,
                    argument,
                    0,
                    0,
                    0,
                ];
                foreign(libc::SYS_ioctl, "UFFDIO_WRITEPROTECT", args)
            }
            Operation::OpenTruncate => {
                let file = Self::file(page)?;
                let path = CString::new(format!("/proc/self/fd/{}", file.0)).expect("no nul");
                arm(true);
                let flags = (libc::O_RDWR | libc::O_TRUNC | libc::O_CLOEXEC) as usize;
                let args = [path.as_ptr() as usize, flags, 0, 0, 0, 0];
                foreign(libc::SYS_open, "open", args)
                    .map(|fd| drop(Fd(fd)))
                    .map(|()| 0)
            }
            Operation::OtherProcess => {
                let file = Self::file(page)?;
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                let args = [file.0, mode as usize, 0, PAGE, 0, 0];
                let punch = || {
                    let _ = foreign(libc::SYS_fallocate, "fallocate", args);
                };
                in_child(alone, || arm(true), Some(&punch))
            }
        };
        attempt.returned();
        result.map(|_| ())
    }

    fn shared(
        self,
        operation: Operation,
        id: usize,
        attempt: &dyn Attempt,
    ) -> Result<usize, NotTried> {
        let page = self.page();
        let remap = [id, page, SHM_REMAP, 0, 0, 0];
        if operation == Operation::ShmatRemap {
            Self::anonymous(page, PAGE, OLD, false)?;
            attempt.armed(page, true);
            return foreign(libc::SYS_shmat, "shmat", remap);
        }
        must(libc::SYS_shmat, "shmat", remap)?;
        // SAFETY: attached just now.
        unsafe { std::ptr::write_bytes(page as *mut u8, OLD, PAGE) };
        attempt.armed(page, true);
        foreign(libc::SYS_shmdt, "shmdt", [page, 0, 0, 0, 0, 0])
    }
}

const MADV_GUARD_INSTALL: i32 = 102;
const MPOL_MF_MOVE: usize = 2;
static FIRST_NODE: u64 = 1;
const SHM_REMAP: usize = 0o40000;

/// Whether there is nowhere to move pages to.
pub(super) fn has_one_node() -> bool {
    let nodes = std::fs::read_to_string("/sys/devices/system/node/online");
    nodes.is_ok_and(|nodes| nodes.trim() == "0")
}

/// Forks; the child does `work`, by system calls only, when the parent is `armed`, and is waited for. The fork itself is the
/// operation where there is no work.
fn in_child(alone: bool, armed: impl FnOnce(), work: Option<&dyn Fn()>) -> Result<usize, NotTried> {
    if !alone {
        return Err("a process with threads of others is not forked for a test".to_owned());
    }
    let mut ends = [0; 2];
    // SAFETY: two descriptors are given back.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
        return Err(format!("pipe2: {}", std::io::Error::last_os_error()));
    }
    let [told, tell] = ends.map(|end| Fd(end as usize));
    let mut armed = Some(armed);
    let mut arm = || armed.take().map(|armed| armed());
    if work.is_none() {
        arm();
    }
    let mut byte = 0u8;
    // SAFETY: the child makes system calls only, and ends.
    let child = unsafe { libc::fork() };
    match child {
        0 => {
            if let Some(work) = work {
                // SAFETY: one byte, which the parent writes when it is ready.
                unsafe { libc::read(told.0 as i32, (&raw mut byte).cast(), 1) };
                work();
            }
            // SAFETY: ends the child, without anything that is the parent's.
            unsafe { libc::_exit(0) }
        }
        -1 => Err(format!("fork: {}", std::io::Error::last_os_error())),
        child => {
            arm();
            // SAFETY: one byte to the child, which is then waited for; the status is not wanted.
            unsafe {
                libc::write(tell.0 as i32, (&raw const byte).cast(), 1);
                libc::waitpid(child, std::ptr::null_mut(), 0);
            }
            Ok(0)
        }
    }
}
