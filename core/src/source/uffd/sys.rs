//! The descriptor: its system calls, and what they give.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::addr::Range;
use crate::source::scratch::{NotTried, PAGE};
use crate::source::{SourceError, Uffd, gate};

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

/// `struct uffd_msg`: a number, and three arguments from byte 8 on.
pub(super) type Message = [u8; 32];

const API: u64 = 0xaa;
const NEW: libc::Ioctl = libc::_IO(0xaa, 0x00);
const UFFDIO_API: libc::Ioctl = libc::_IOWR::<Api>(0xaa, 0x3f);
const UFFDIO_REGISTER: libc::Ioctl = libc::_IOWR::<Register>(0xaa, 0x00);
const UFFDIO_UNREGISTER: libc::Ioctl = libc::_IOR::<[u64; 2]>(0xaa, 0x01);
pub(in crate::source) const UFFDIO_WRITEPROTECT: usize =
    libc::_IOWR::<WriteProtect>(0xaa, 0x06) as usize;
pub(in crate::source) const UFFDIO_MOVE: usize = libc::_IOWR::<[u64; 5]>(0xaa, 0x05) as usize;
pub(in crate::source) const MODE_MISSING: u64 = 1;
pub(in crate::source) const MODE_WP: u64 = 2;
const USER_MODE_ONLY: libc::c_int = 1;

const EVENT_FORK: u64 = 1 << 1;
const EVENT_REMAP: u64 = 1 << 2;
const EVENT_REMOVE: u64 = 1 << 3;
const EVENT_UNMAP: u64 = 1 << 6;
const PAGEFAULT_FLAG_WP: u64 = 1;
const WP_UNPOPULATED: u64 = 1 << 13;
const WP_ASYNC: u64 = 1 << 15;
/// Linux 6.8.
const FEATURE_MOVE: u64 = 1 << 16;
const FEATURES: u64 =
    EVENT_REMAP | EVENT_REMOVE | EVENT_UNMAP | PAGEFAULT_FLAG_WP | WP_UNPOPULATED | WP_ASYNC;

/// What the kernel tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The addresses are gone.
    Unmap(Range),
    /// The pages are about to go.
    Remove(Range),
    /// The pages have moved.
    Remap(Range, Option<Range>),
    /// They are copied on write from now on.
    Fork,
    /// Something else, which may be anything (R19).
    Unknown,
}

impl Event {
    /// What a message says, and the descriptor of the child that comes with the news of a fork.
    pub(super) fn parse(message: &Message) -> (Self, Option<i32>) {
        let [a, b, c] = [8, 16, 24].map(|at| {
            let own: [u8; 8] = std::array::from_fn(|nth| message[at + nth]);
            u64::from_ne_bytes(own)
        });
        let range = |start: u64, len: u64| Range::new(start, len).ok();
        let between = |start: u64, end: u64| range(start, end.checked_sub(start)?);
        let event = match message[0] {
            0x13 => return (Self::Fork, Some(a as u32 as i32)),
            0x14 => range(a, c).map(|from| Self::Remap(from, range(b, c))),
            0x15 => between(a, b).map(Self::Remove),
            0x16 => between(a, b).map(Self::Unmap),
            _ => None,
        };
        (event.unwrap_or(Self::Unknown), None)
    }

    /// What an operation of the space itself would have announced.
    pub(super) fn range(self) -> Option<Range> {
        match self {
            Self::Unmap(range) | Self::Remove(range) | Self::Remap(range, _) => Some(range),
            Self::Fork | Self::Unknown => None,
        }
    }
}

/// A descriptor, and a page of its own by which it can be asked whether it is quiet.
#[derive(Debug)]
pub(super) struct Descriptor {
    fd: OwnedFd,
    sentinel: usize,
    /// It is told of forks.
    pub(super) forks: bool,
    /// The event of a fork comes with a descriptor: this one is given up for it where no more can be had.
    spare: Mutex<Option<OwnedFd>>,
}

fn ioctl<T>(fd: &OwnedFd, request: libc::Ioctl, argument: &mut T) -> io::Result<()> {
    let argument = std::ptr::from_mut(argument) as usize;
    let args = [fd.as_raw_fd() as usize, request as usize, argument, 0, 0, 0];
    // SAFETY: each request is given the structure that it is defined with, and pages that are its caller's.
    match unsafe { gate::own_call(libc::SYS_ioctl, args) } {
        Ok(_) => Ok(()),
        Err(errno) => Err(io::Error::from_raw_os_error(errno)),
    }
}

fn open() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    if let Ok(device) = std::fs::File::open("/dev/userfaultfd") {
        // SAFETY: the request takes flags and gives a descriptor.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), NEW, flags) };
        if fd >= 0 {
            // SAFETY: made just now.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    let mut error = io::Error::from_raw_os_error(libc::ENOSYS);
    for mode in [0, USER_MODE_ONLY] {
        // SAFETY: flags in, a descriptor out.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags | mode) };
        if fd >= 0 {
            // SAFETY: made just now.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) });
        }
        error = io::Error::last_os_error();
    }
    Err(error)
}

/// A userfaultfd that has nothing to do with any source, over `len` bytes at `at`, which `prepare` maps.
pub(in crate::source) fn monitor<T>(
    mode: u64,
    at: usize,
    len: usize,
    prepare: impl FnOnce() -> Result<T, NotTried>,
) -> Result<OwnedFd, NotTried> {
    let said = |call: &'static str| move |error| format!("{call}: {error}");
    let fd = open().map_err(said("userfaultfd"))?;
    let features = if mode == MODE_MISSING {
        FEATURE_MOVE
    } else {
        PAGEFAULT_FLAG_WP
    };
    let mut api = Api {
        api: API,
        features,
        ioctls: 0,
    };
    ioctl(&fd, UFFDIO_API, &mut api).map_err(said("UFFDIO_API"))?;
    prepare()?;
    let mut register = Register {
        start: at as u64,
        len: len as u64,
        mode,
        ioctls: 0,
    };
    ioctl(&fd, UFFDIO_REGISTER, &mut register).map_err(said("UFFDIO_REGISTER"))?;
    Ok(fd)
}

impl Descriptor {
    pub(super) fn new() -> Result<Self, SourceError> {
        let unavailable = |reason: String| SourceError::not_available(Uffd::NAME, reason);
        let fd = open().map_err(|error| unavailable(format!("userfaultfd: {error}")))?;
        let hello = |features| {
            let mut api = Api {
                api: API,
                features,
                ioctls: 0,
            };
            ioctl(&fd, UFFDIO_API, &mut api)
        };
        // Forks are told to privileged users only.
        let forks = hello(FEATURES | EVENT_FORK).is_ok();
        if !forks {
            hello(FEATURES).map_err(|error| {
                unavailable(format!(
                    "the kernel lacks asynchronous write protection or one of the events (Linux 6.7): {error}"
                ))
            })?;
        }
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping where the kernel likes.
        let page = unsafe { libc::mmap(std::ptr::null_mut(), PAGE, rights, flags, -1, 0) };
        if page == libc::MAP_FAILED {
            return Err(SourceError::last("mmap of the sentinel"));
        }
        let spare = fd
            .try_clone()
            .map_err(|error| SourceError::System { call: "dup", error });
        let this = Self {
            fd,
            sentinel: page as usize,
            forks,
            spare: Mutex::new(None),
        };
        *this.spare.lock().unwrap_or_else(PoisonError::into_inner) = Some(spare?);
        // SAFETY: mapped just now. It stays out of children, as its descriptor does.
        unsafe { libc::madvise(page, PAGE, libc::MADV_DONTFORK) };
        let sentinel = Range::new(this.sentinel as u64, PAGE as u64).expect("a page");
        this.register(sentinel)
            .map_err(|error| SourceError::System {
                call: "UFFDIO_REGISTER of the sentinel",
                error,
            })?;
        Ok(this)
    }

    pub(super) fn raw(&self) -> i32 {
        self.fd.as_raw_fd()
    }

    /// Watches a range.
    pub(super) fn register(&self, range: Range) -> io::Result<()> {
        let mut register = Register {
            start: range.start().get(),
            len: range.len() as u64,
            mode: MODE_WP,
            ioctls: 0,
        };
        ioctl(&self.fd, UFFDIO_REGISTER, &mut register)
    }

    pub(super) fn unregister(&self, range: Range) {
        let mut range = [range.start().get(), range.len() as u64];
        // Nothing is lost if there is nothing any more.
        let _ = ioctl(&self.fd, UFFDIO_UNREGISTER, &mut range);
    }

    /// Whether no operation is between its change and the reading of its event: the kernel refuses to touch a page meanwhile.
    pub(super) fn is_quiet(&self) -> bool {
        let mut protect = WriteProtect {
            start: self.sentinel as u64,
            len: PAGE as u64,
            mode: 0,
        };
        let said = ioctl(&self.fd, UFFDIO_WRITEPROTECT as libc::Ioctl, &mut protect);
        !matches!(said, Err(error) if error.raw_os_error() == Some(libc::EAGAIN))
    }

    fn read_message(&self) -> io::Result<Message> {
        let mut message = Message::default();
        let (at, len) = (&raw mut message, message.len());
        // SAFETY: the message is as long as said.
        match unsafe { libc::read(self.raw(), at.cast(), len) } {
            -1 => Err(io::Error::last_os_error()),
            read if read == len as isize => Ok(message),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// The next event, if there is one: whoever caused it goes on.
    pub(super) fn read(&self) -> Option<Event> {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        let none_left =
            |error: &io::Error| matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE));
        let mut message = self.read_message();
        if message.as_ref().is_err_and(none_left) {
            if spare.take().is_none() {
                // Somebody has taken it: until he gives one back, the fork waits.
                std::thread::sleep(Duration::from_millis(1));
            }
            message = self.read_message();
        }
        let (event, child) = Event::parse(&message.ok()?);
        if let Some(child) = child {
            // SAFETY: the child's descriptor, which came with the event: nobody watches the child.
            unsafe { libc::close(child) };
        }
        if spare.is_none() {
            *spare = self.fd.try_clone().ok();
        }
        Some(event)
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        // First: who unmaps a page that is watched waits to be read.
        let page = Range::new(self.sentinel as u64, PAGE as u64).expect("a page");
        self.unregister(page);
        // SAFETY: mapped by `new`, and nobody else's.
        unsafe { libc::munmap(self.sentinel as *mut libc::c_void, PAGE) };
    }
}
