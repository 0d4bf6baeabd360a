//! Kinds of memory, and what can be done to them.
#![allow(dead_code, reason = "each test file uses its own part of this module")]

use std::ffi::CString;
use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use shootdown::{AddressSpace, Map, Range};

use crate::foreign::{PAGE, raw, start, touch};

pub(crate) const SMALL: usize = PAGE as usize;
pub(crate) const HUGE: usize = 2 << 20;

/// The frame behind a page; zero if there is none.
pub(crate) fn frame(at: usize) -> u64 {
    static PAGEMAP: OnceLock<File> = OnceLock::new();
    let file = PAGEMAP.get_or_init(|| File::open("/proc/self/pagemap").unwrap());
    let mut entry = [0u8; 8];
    file.read_exact_at(&mut entry, (at / SMALL * 8) as u64)
        .unwrap();
    let entry = u64::from_ne_bytes(entry);
    if entry >> 63 == 1 {
        entry & ((1 << 55) - 1)
    } else {
        0
    }
}

pub(crate) fn name(errno: i32) -> &'static str {
    match errno {
        libc::EACCES => "EACCES",
        libc::EAGAIN => "EAGAIN",
        libc::EBADF => "EBADF",
        libc::EBUSY => "EBUSY",
        libc::EINVAL => "EINVAL",
        libc::ENODEV => "ENODEV",
        libc::ENOMEM => "ENOMEM",
        libc::EOPNOTSUPP => "EOPNOTSUPP",
        libc::EPERM => "EPERM",
        other => panic!("errno {other} has no name here"),
    }
}

/// Huge pages, reserved for as long as this lives.
pub(crate) struct HugePages(String);

const RESERVED: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
const FREE: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

impl HugePages {
    pub(crate) fn reserve(more: u64) -> Option<Self> {
        let before = std::fs::read_to_string(RESERVED).ok()?;
        let count: u64 = before.trim().parse().ok()?;
        std::fs::write(RESERVED, (count + more).to_string()).ok()?;
        Some(Self(before))
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = std::fs::write(RESERVED, &self.0);
    }
}

/// A kind of memory.
pub(crate) struct MemoryKind {
    pub(crate) name: &'static str,
    what: What,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum What {
    Managed,
    Anonymous,
    Thp,
    HugeTlb,
    Memfd,
    Shm,
    Tmpfs,
    Disk,
    PrivateDisk,
}

pub(crate) const KINDS: &[MemoryKind] = &[
    kind("managed", What::Managed),
    kind("anonymous", What::Anonymous),
    kind("THP", What::Thp),
    kind("hugetlb", What::HugeTlb),
    kind("memfd", What::Memfd),
    kind("System V shm", What::Shm),
    kind("file on tmpfs", What::Tmpfs),
    kind("file on disk", What::Disk),
    kind("private file", What::PrivateDisk),
];

const fn kind(name: &'static str, what: What) -> MemoryKind {
    MemoryKind { name, what }
}

/// Memory of a kind, mapped.
pub(crate) struct Mapped<'h> {
    pub(crate) what: What,
    pub(crate) at: usize,
    pub(crate) len: usize,
    pub(crate) file: Option<OwnedFd>,
    pub(crate) helper: Option<&'h Helper>,
}

fn map(at: usize, len: usize, flags: i32, fd: usize) -> Result<(), String> {
    let args = [at, len, 3, (flags | libc::MAP_FIXED) as usize, fd, 0];
    raw(libc::SYS_mmap, args)
        .map(drop)
        .map_err(|errno| format!("mmap: {}", std::io::Error::from_raw_os_error(errno)))
}

/// A new file of some pages there, whose name is gone.
fn unnamed(directory: &Path) -> OwnedFd {
    let path = directory.join(format!("shootdown-kinds-{}", std::process::id()));
    let mut options = File::options();
    let file = options.read(true).write(true).create_new(true).open(&path);
    let file = file.unwrap();
    std::fs::remove_file(path).unwrap();
    file.write_all_at(&[0xa5; 4 * SMALL], 0).unwrap();
    file.into()
}

fn disk() -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
}

fn is_tmpfs(path: &Path) -> bool {
    let path = CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: the kernel fills the structure.
    unsafe {
        let mut about: libc::statfs = std::mem::zeroed();
        libc::statfs(path.as_ptr(), &mut about) == 0 && about.f_type == libc::TMPFS_MAGIC
    }
}

impl MemoryKind {
    /// Why this machine has none.
    pub(crate) fn missing(&self) -> Option<String> {
        let read = |path| std::fs::read_to_string(path).unwrap_or_default();
        match self.what {
            What::HugeTlb if read(FREE).trim().parse::<u64>().unwrap_or(0) < 2 => {
                Some("no huge pages could be reserved".to_owned())
            }
            What::Tmpfs if !is_tmpfs(Path::new("/dev/shm")) => {
                Some("/dev/shm is no tmpfs".to_owned())
            }
            What::Disk | What::PrivateDisk if is_tmpfs(&disk()) => {
                Some("the build's directory is a tmpfs".to_owned())
            }
            _ => None,
        }
    }

    /// Maps some of it at the start of the buffer, and touches it.
    pub(crate) fn map(
        &self,
        space: &AddressSpace,
        buffer: Range,
    ) -> Result<Mapped<'static>, String> {
        let at = start(buffer);
        let anonymous = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let (mut file, mut len) = (None, 4 * SMALL);
        match self.what {
            What::Managed => {
                let what = Map::anonymous(len as u64).at(buffer.start());
                space.unmap(buffer).map_err(|error| error.to_string())?;
                space.map(what).map_err(|error| error.to_string())?;
            }
            What::Anonymous => map(at, len, anonymous, usize::MAX)?,
            What::Thp => {
                len = HUGE;
                map(at, len, anonymous, usize::MAX)?;
                raw(libc::SYS_madvise, [at, len, 14, 0, 0, 0]).unwrap();
            }
            What::HugeTlb => {
                len = HUGE;
                map(at, len, anonymous | libc::MAP_HUGETLB, usize::MAX)?;
            }
            What::Shm => {
                let id = raw(libc::SYS_shmget, [0, len, 0o1600, 0, 0, 0]).unwrap();
                raw(libc::SYS_shmat, [id, at, 0o40000, 0, 0, 0]).unwrap();
                raw(libc::SYS_shmctl, [id, 0, 0, 0, 0, 0]).unwrap();
            }
            What::Memfd => {
                // SAFETY: a name; the descriptor is made just now.
                let fd = unsafe {
                    OwnedFd::from_raw_fd(libc::memfd_create(c"kinds".as_ptr(), libc::MFD_CLOEXEC))
                };
                File::from(fd.try_clone().unwrap())
                    .set_len(len as u64)
                    .unwrap();
                file = Some(fd);
            }
            What::Tmpfs => file = Some(unnamed(Path::new("/dev/shm"))),
            What::Disk | What::PrivateDisk => file = Some(unnamed(&disk())),
        }
        if let Some(fd) = &file {
            let sharing = match self.what {
                What::PrivateDisk => libc::MAP_PRIVATE,
                _ => libc::MAP_SHARED,
            };
            map(at, len, sharing, fd.as_raw_fd() as usize)?;
        }
        touch(Range::new(at as u64, len as u64).unwrap());
        if self.what == What::PrivateDisk {
            // The first page stays the file's: read, not written.
            map(
                at,
                SMALL,
                libc::MAP_PRIVATE,
                file.as_ref().unwrap().as_raw_fd() as usize,
            )?;
            // SAFETY: mapped just now.
            unsafe { std::ptr::read_volatile(at as *const u8) };
        }
        Ok(Mapped {
            what: self.what,
            at,
            len,
            file,
            helper: None,
        })
    }
}

/// The buffer as the space mapped it.
pub(crate) fn reset(space: &AddressSpace, buffer: Range) {
    let _ = space.unmap(Range::new(start(buffer) as u64, 4 * PAGE).unwrap());
    let _ = space.unmap(buffer);
    let rest = Range::inclusive(start(buffer) as u64 + 4 * PAGE, buffer.last()).unwrap();
    let _ = space.unmap(rest);
    space
        .map(Map::anonymous(buffer.len() as u64).at(buffer.start()))
        .unwrap();
}

/// Something that is done to memory.
pub(crate) struct Deed {
    pub(crate) name: &'static str,
    pub(crate) makes_sense: fn(&Mapped<'_>) -> bool,
    pub(crate) prepare: fn(&Mapped<'_>),
    pub(crate) make: fn(&Mapped<'_>) -> Result<usize, i32>,
    pub(crate) undo: fn(&Mapped<'_>),
    /// It is the second half that changes.
    pub(crate) second_half: bool,
    /// It is the rights that change.
    pub(crate) rights: bool,
    /// The kernel does it or leaves it, by what else it has to do.
    pub(crate) whim: bool,
}

const PLAIN: Deed = Deed {
    name: "",
    makes_sense: |_| true,
    prepare: |_| {},
    make: |_| Ok(0),
    undo: |_| {},
    second_half: false,
    rights: false,
    whim: false,
};

fn advise(memory: &Mapped<'_>, advice: i32) -> Result<usize, i32> {
    let args = [memory.at, memory.len, advice as usize, 0, 0, 0];
    raw(libc::SYS_madvise, args)
}

fn has_file(memory: &Mapped<'_>) -> bool {
    memory.file.is_some()
}

fn fd(memory: &Mapped<'_>) -> usize {
    memory.file.as_ref().unwrap().as_raw_fd() as usize
}

fn path(memory: &Mapped<'_>) -> CString {
    CString::new(format!("/proc/self/fd/{}", fd(memory))).unwrap()
}

fn open(memory: &Mapped<'_>, flags: i32) -> Result<OwnedFd, i32> {
    let path = path(memory);
    let flags = (libc::O_RDWR | libc::O_CLOEXEC | flags) as usize;
    let args = [path.as_ptr() as usize, flags, 0, 0, 0, 0];
    // SAFETY: opened just now.
    raw(libc::SYS_open, args).map(|fd| unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

const PUNCH: usize = (libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE) as usize;

/// Outside of what is watched, and aligned for huge pages.
fn aside() -> usize {
    static ASIDE: OnceLock<usize> = OnceLock::new();
    *ASIDE.get_or_init(|| {
        let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE) as usize;
        let at = raw(libc::SYS_mmap, [0, 3 * HUGE, 0, flags, usize::MAX, 0]).unwrap();
        at.next_multiple_of(HUGE)
    })
}

/// Forks, and lets `work` run in the child, `meanwhile` in the parent while the child is there.
pub(crate) fn fork(work: impl FnOnce(), meanwhile: impl FnOnce()) {
    let mut ends = [0; 2];
    // SAFETY: two descriptors are given back; the child makes system calls and plain accesses only.
    unsafe {
        assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
        let child = libc::fork();
        assert!(child >= 0);
        if child == 0 {
            work();
            libc::close(ends[1]);
            // Until the parent lets go of its end.
            libc::read(ends[0], (&raw mut ends).cast(), 1);
            libc::_exit(0);
        }
        meanwhile();
        libc::close(ends[0]);
        libc::close(ends[1]);
        libc::waitpid(child, std::ptr::null_mut(), 0);
    }
}

fn write(at: usize) {
    // SAFETY: the test has it mapped, writable.
    unsafe { std::ptr::write_volatile(at as *mut u8, 0x77) };
}

const KSM: &str = "/sys/kernel/mm/ksm";

/// Lets the kernel merge equal pages until the first has been.
fn merge(memory: &Mapped<'_>) -> Result<usize, i32> {
    advise(memory, libc::MADV_MERGEABLE)?;
    let old = frame(memory.at);
    let deadline = Instant::now() + Duration::from_secs(10);
    while frame(memory.at) == old && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(0)
}

/// What KSM was told before.
static TOLD: Mutex<Vec<(&str, String)>> = Mutex::new(Vec::new());

fn ksm(run: bool) {
    let path = |name: &str| format!("{KSM}/{name}");
    let mut told = TOLD.lock().unwrap();
    if run {
        for (name, value) in [
            ("pages_to_scan", "5000"),
            ("sleep_millisecs", "1"),
            ("run", "1"),
        ] {
            told.push((name, std::fs::read_to_string(path(name)).unwrap()));
            std::fs::write(path(name), value).unwrap();
        }
    } else {
        for (name, value) in told.drain(..) {
            std::fs::write(path(name), value).unwrap();
        }
    }
}

/// Why what is found here would not be comparable.
pub(crate) fn is_another_machine() -> Option<&'static str> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    // SAFETY: no arguments.
    if unsafe { libc::geteuid() } != 0 {
        Some("only root sees the numbers of frames")
    } else if read("/proc/swaps").lines().count() > 1 {
        Some("with swap private pages go, too")
    } else if read(&format!("{KSM}/run")).is_empty() {
        Some("the kernel has no KSM")
    } else {
        None
    }
}

pub(crate) const DEEDS: &[Deed] = &[
    Deed {
        name: "munmap",
        make: |m| raw(libc::SYS_munmap, [m.at, m.len, 0, 0, 0, 0]),
        ..PLAIN
    },
    Deed {
        name: "munmap of the second half",
        make: |m| raw(libc::SYS_munmap, [m.at + m.len / 2, m.len / 2, 0, 0, 0, 0]),
        second_half: true,
        ..PLAIN
    },
    Deed {
        name: "mremap, moved",
        make: |m| raw(libc::SYS_mremap, [m.at, m.len, m.len, 3, aside(), 0]),
        undo: |m| {
            // Not unmapped: somebody else would be given the addresses.
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
            let args = [aside(), m.len, 0, flags as usize, usize::MAX, 0];
            raw(libc::SYS_mmap, args).unwrap();
        },
        ..PLAIN
    },
    Deed {
        name: "mmap MAP_FIXED over it",
        make: |m| {
            let flags = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED) as usize;
            raw(libc::SYS_mmap, [m.at, m.len, 3, flags, usize::MAX, 0])
        },
        ..PLAIN
    },
    Deed {
        name: "madvise DONTNEED",
        make: |m| advise(m, libc::MADV_DONTNEED),
        ..PLAIN
    },
    Deed {
        name: "madvise FREE",
        make: |m| advise(m, libc::MADV_FREE),
        ..PLAIN
    },
    Deed {
        name: "madvise REMOVE",
        make: |m| advise(m, libc::MADV_REMOVE),
        ..PLAIN
    },
    Deed {
        name: "madvise PAGEOUT",
        make: |m| advise(m, libc::MADV_PAGEOUT),
        whim: true,
        ..PLAIN
    },
    Deed {
        name: "madvise COLLAPSE of small pages",
        makes_sense: |m| m.what == What::Thp,
        prepare: |m| {
            // Small ones first.
            advise(m, libc::MADV_NOHUGEPAGE).unwrap();
            advise(m, libc::MADV_DONTNEED).unwrap();
            touch(Range::new(m.at as u64, m.len as u64).unwrap());
            advise(m, libc::MADV_HUGEPAGE).unwrap();
        },
        make: |m| advise(m, libc::MADV_COLLAPSE),
        ..PLAIN
    },
    Deed {
        name: "mprotect",
        make: |m| raw(libc::SYS_mprotect, [m.at, m.len, 1, 0, 0, 0]),
        rights: true,
        ..PLAIN
    },
    Deed {
        name: "fallocate PUNCH_HOLE",
        makes_sense: has_file,
        make: |m| raw(libc::SYS_fallocate, [fd(m), PUNCH, 0, m.len, 0, 0]),
        ..PLAIN
    },
    Deed {
        name: "ftruncate",
        makes_sense: has_file,
        make: |m| raw(libc::SYS_ftruncate, [fd(m), 0, 0, 0, 0, 0]),
        ..PLAIN
    },
    Deed {
        name: "open O_TRUNC",
        makes_sense: has_file,
        make: |m| open(m, libc::O_TRUNC).map(|_| 0),
        ..PLAIN
    },
    Deed {
        name: "write O_DIRECT",
        makes_sense: has_file,
        make: |m| {
            #[repr(align(4096))]
            struct Aligned([u8; SMALL]);
            let buffer = Box::new(Aligned([0x33; SMALL]));
            let file = open(m, libc::O_DIRECT)?;
            let from = buffer.0.as_ptr() as usize;
            raw(
                libc::SYS_pwrite64,
                [file.as_raw_fd() as usize, from, SMALL, 0, 0, 0],
            )
        },
        ..PLAIN
    },
    Deed {
        name: "punched by another process",
        makes_sense: has_file,
        make: |m| {
            m.helper
                .unwrap()
                .ask(libc::SYS_fallocate, fd(m), [PUNCH, 0, m.len])
        },
        ..PLAIN
    },
    Deed {
        name: "truncated by another process",
        makes_sense: has_file,
        make: |m| m.helper.unwrap().ask(libc::SYS_ftruncate, fd(m), [0; 3]),
        ..PLAIN
    },
    Deed {
        name: "written by another process",
        makes_sense: has_file,
        make: |m| m.helper.unwrap().ask(libc::SYS_pwrite64, fd(m), [0, 1, 0]),
        ..PLAIN
    },
    Deed {
        name: "fork, written by the parent",
        make: |m| {
            fork(|| {}, || write(m.at));
            Ok(0)
        },
        ..PLAIN
    },
    Deed {
        name: "fork, written by the child",
        // What is managed is not in the child.
        makes_sense: |m| m.what != What::Managed,
        make: |m| {
            fork(|| write(m.at), || {});
            Ok(0)
        },
        ..PLAIN
    },
    Deed {
        name: "fork and exec",
        make: |_| {
            let status = std::process::Command::new("true").status();
            Ok(usize::from(!status.unwrap().success()))
        },
        ..PLAIN
    },
    Deed {
        name: "merged by KSM",
        makes_sense: |m| matches!(m.what, What::Managed | What::Anonymous),
        prepare: |_| ksm(true),
        make: merge,
        undo: |_| ksm(false),
        ..PLAIN
    },
    Deed {
        name: "exit of a thread that used it",
        make: |m| {
            let at = m.at;
            std::thread::spawn(move || {
                // SAFETY: the test has it mapped.
                unsafe { std::ptr::read_volatile(at as *const u8) }
            })
            .join()
            .unwrap();
            Ok(0)
        },
        ..PLAIN
    },
];

/// Another process, which changes files when it is asked to.
pub(crate) struct Helper {
    child: i32,
    ask: File,
    answer: File,
}

impl Helper {
    pub(crate) fn start() -> Self {
        let pipe = || {
            let mut ends = [0; 2];
            // SAFETY: two descriptors are given back.
            unsafe {
                assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
                ends.map(|end| File::from_raw_fd(end))
            }
        };
        let ([asked, ask], [answer, answers]) = (pipe(), pipe());
        // SAFETY: the child makes system calls only.
        let child = unsafe { libc::fork() };
        assert!(child >= 0);
        if child == 0 {
            drop((ask, answer));
            Self::serve(&asked, &answers);
            // SAFETY: ends the child.
            unsafe { libc::_exit(0) };
        }
        Self { child, ask, answer }
    }

    fn serve(mut asked: &File, mut answers: &File) {
        use std::io::{Read, Write};
        let mut words = [0u8; 40];
        // SAFETY: no arguments.
        let parent = unsafe { libc::getppid() };
        while asked.read_exact(&mut words).is_ok() {
            let word = |nth: usize| usize::from_ne_bytes(words[nth * 8..][..8].try_into().unwrap());
            let path = CString::new(format!("/proc/{parent}/fd/{}", word(1))).unwrap();
            let open = [path.as_ptr() as usize, libc::O_RDWR as usize, 0, 0, 0, 0];
            let byte = b"w".as_ptr() as usize;
            let result = raw(libc::SYS_open, open).and_then(|fd| {
                let [nr, a, b, c] = [0, 2, 3, 4].map(word);
                let a = if nr as i64 == libc::SYS_pwrite64 {
                    byte
                } else {
                    a
                };
                let result = raw(nr as i64, [fd, a, b, c, 0, 0]);
                // SAFETY: opened here.
                unsafe { libc::close(fd as i32) };
                result
            });
            let errno = result.err().unwrap_or(0);
            answers.write_all(&errno.to_ne_bytes()).unwrap();
        }
    }

    pub(crate) fn ask(&self, nr: i64, fd: usize, [a, b, c]: [usize; 3]) -> Result<usize, i32> {
        use std::io::{Read, Write};
        let words = [nr as usize, fd, a, b, c].map(usize::to_ne_bytes);
        (&self.ask).write_all(words.as_flattened()).unwrap();
        let mut errno = [0; 4];
        (&self.answer).read_exact(&mut errno).unwrap();
        match i32::from_ne_bytes(errno) {
            0 => Ok(0),
            errno => Err(errno),
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // SAFETY: a child of this test.
        unsafe {
            libc::kill(self.child, libc::SIGKILL);
            libc::waitpid(self.child, std::ptr::null_mut(), 0);
        }
    }
}
