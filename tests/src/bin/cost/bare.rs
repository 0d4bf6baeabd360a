//! The bare mechanisms: what the kernel gives, with a handler that does nothing.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use shootdown::Range;

/// What a mechanism is made to do besides: what correctness needs, without a framework.
#[derive(Clone, Copy, Default)]
pub(crate) struct Duties {
    /// unotify: asks whether the caller is a thread of this process, and not a child that has inherited the filter. uffd: looks
    /// whether there is an event before it reads, so that whoever registers can wait for what is about to be read; and watches what
    /// is mapped over what was unmapped.
    pub(crate) asks: bool,
    /// Keeps the addresses of what is unmapped. What is reserved so need not be watched.
    pub(crate) reserves: bool,
}

/// As `munmap`, but the addresses stay taken.
fn reserve(at: usize, len: usize, how: i32) -> isize {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | how;
    // SAFETY: over what a thread of this process wants to be unmapped, or has unmapped.
    let mapped = unsafe { libc::mmap(at as *mut _, len, libc::PROT_NONE, flags, -1, 0) };
    if mapped == libc::MAP_FAILED {
        return -(libc::ENOMEM as isize);
    }
    0
}

/// Whether it is a thread of the process that asks: the first has its number; of the others the clock of processor time is known to those
/// only.
fn is_of(process: u32, thread: u32) -> bool {
    // SAFETY: numbers only.
    thread == process
        || unsafe { libc::syscall(libc::SYS_clock_getres, !(thread as i32) << 3 | 6, 0) == 0 }
}

/// A filter that hands the `munmap` of a page over, and one thread that performs the call and answers.
pub(crate) struct BareUnotify;

/// `munmap` from a place of its own, which the filter knows: the result as the kernel gives it. With a length of 0, which is no
/// call, the address that the kernel sees.
#[unsafe(naked)]
unsafe extern "C" fn perform(at: usize, len: usize) -> isize {
    core::arch::naked_asm!(
        "test rsi, rsi",
        "jz 3f",
        "mov eax, 11",
        "syscall",
        "2:",
        "ret",
        "3:",
        "lea rax, [rip + 2b]",
        "ret",
    )
}

fn check(said: libc::c_long) -> io::Result<i32> {
    match said {
        -1 => Err(io::Error::last_os_error()),
        said => Ok(said as i32),
    }
}

impl BareUnotify {
    /// For a page.
    pub(crate) fn start(range: Range, duties: Duties) -> io::Result<()> {
        // SAFETY: no call is made.
        let place = unsafe { perform(0, 0) } as u64;
        let (first, last) = (range.start().get(), range.last().get());
        assert_eq!(first >> 32, last >> 32, "one page");
        let load = |k| line(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, k, 0, 0);
        let equal = |k: u64, no| line(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, k as u32, 0, no);
        let least = |k: u64, no| line(libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K, k as u32, 0, no);
        let more = |k: u64, yes| {
            line(
                libc::BPF_JMP | libc::BPF_JGT | libc::BPF_K,
                k as u32,
                yes,
                0,
            )
        };
        let back = |k| line(libc::BPF_RET | libc::BPF_K, k, 0, 0);
        let mut program = [
            load(4),
            equal(0xc000_003e, 12),
            load(0),
            equal(libc::SYS_munmap as u64, 10),
            load(20),
            equal(first >> 32, 8),
            load(16),
            least(first & 0xffff_ffff, 6),
            more(last & 0xffff_ffff, 5),
            // Not the supervisor's own.
            load(8),
            equal(place & 0xffff_ffff, 2),
            load(12),
            line(
                libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
                (place >> 32) as u32,
                1,
                0,
            ),
            back(libc::SECCOMP_RET_USER_NOTIF),
            back(libc::SECCOMP_RET_ALLOW),
        ];
        let program = libc::sock_fprog {
            len: program.len() as u16,
            filter: program.as_mut_ptr(),
        };
        let flags =
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER | libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV;
        // Before there is a filter: the supervisor has none.
        let (send, receive) = std::sync::mpsc::channel();
        std::thread::Builder::new().spawn(move || {
            if let Ok(listener) = receive.recv() {
                serve(listener, duties);
            }
        })?;
        // SAFETY: numbers only.
        unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        // SAFETY: the program is as long as it says.
        let listener = check(unsafe {
            let program = &raw const program;
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                flags,
                program,
            )
        })?;
        // SAFETY: takes the flag as a number. Best effort, as in the framework.
        unsafe { libc::ioctl(listener, libc::SECCOMP_IOCTL_NOTIF_SET_FLAGS, 1u64) };
        send.send(listener).map_err(io::Error::other)
    }
}

fn line(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter {
        code: code as u16,
        jt,
        jf,
        k,
    }
}

fn serve(listener: i32, duties: Duties) {
    // Once: it is a system call.
    let process = std::process::id();
    loop {
        // SAFETY: integers only; the kernel fills it.
        let mut call: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: as above.
        if unsafe { libc::ioctl(listener, libc::SECCOMP_IOCTL_NOTIF_RECV, &raw mut call) } != 0 {
            continue;
        }
        let [at, len, ..] = call.data.args.map(|arg| arg as usize);
        if duties.asks && !is_of(process, call.pid) {
            continue;
        }
        let result = match duties.reserves {
            true => reserve(at, len, libc::MAP_FIXED),
            // SAFETY: what a thread of this process asked for.
            false => unsafe { perform(at, len) },
        };
        let answer = libc::seccomp_notif_resp {
            id: call.id,
            val: 0,
            error: result.min(0) as i32,
            flags: 0,
        };
        // SAFETY: the kernel reads it.
        unsafe { libc::ioctl(listener, libc::SECCOMP_IOCTL_NOTIF_SEND, &raw const answer) };
    }
}

/// A userfaultfd over a range, write-protecting asynchronously, and one thread that reads its events.
pub(crate) struct BareUffd(OwnedFd);

// `include/uapi/linux/userfaultfd.h`.
const API: libc::c_ulong = 0xc018_aa3f;
const REGISTER: libc::c_ulong = 0xc020_aa00;
const DEVICE_NEW: libc::c_ulong = 0xaa00;
/// REMAP, REMOVE, UNMAP, WP_UNPOPULATED, WP_ASYNC.
const FEATURES: u64 = 1 << 2 | 1 << 3 | 1 << 6 | 1 << 13 | 1 << 15;
const MODE_WP: u64 = 2;
const UNMAP: u8 = 0x16;

impl BareUffd {
    pub(crate) fn start(range: Range, duties: Duties) -> io::Result<Self> {
        let device = std::fs::File::open("/dev/userfaultfd")?;
        // SAFETY: numbers only.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), DEVICE_NEW, libc::O_CLOEXEC) };
        let fd = check(fd.into())?;
        // SAFETY: opened just now.
        let this = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        let mut api = [0xaa, FEATURES, 0];
        // SAFETY: as long as the request says.
        check(unsafe { libc::ioctl(fd, API, api.as_mut_ptr()) }.into())?;
        this.register(range)?;
        std::thread::Builder::new().spawn(move || {
            let mut event = [0u64; 4];
            loop {
                if duties.asks {
                    let mut ready = libc::pollfd {
                        fd,
                        events: libc::POLLIN,
                        revents: 0,
                    };
                    // SAFETY: one descriptor, which lives as long as the process.
                    unsafe { libc::poll(&mut ready, 1, -1) };
                }
                // SAFETY: one event has 32 bytes.
                if unsafe { libc::read(fd, event.as_mut_ptr().cast(), 32) } == -1 {
                    return;
                }
                let [what, start, end, _] = event;
                if what as u8 != UNMAP {
                    continue;
                }
                let (at, len) = (start as usize, (end - start) as usize);
                let reserved = duties.reserves && reserve(at, len, libc::MAP_FIXED_NOREPLACE) == 0;
                if duties.asks && !reserved {
                    // Nothing may be there.
                    let _ = register(fd, at, len);
                }
            }
        })?;
        Ok(this)
    }

    pub(crate) fn register(&self, range: Range) -> io::Result<()> {
        let (at, len) = (range.start().get() as usize, range.len() as usize);
        register(self.0.as_raw_fd(), at, len)
    }
}

fn register(fd: i32, at: usize, len: usize) -> io::Result<()> {
    let mut register = [at as u64, len as u64, MODE_WP, 0];
    // SAFETY: as long as the request says.
    let said = unsafe { libc::ioctl(fd, REGISTER, register.as_mut_ptr()) };
    check(said.into()).map(|_| ())
}
