//! Touches of the CPU, as the kernel tells of them: minor faults of a userfaultfd.
//!
//! The frames are pages of a memfd. Where they are taken out of this process's page tables (`MADV_DONTNEED` on a shared mapping keeps
//! the data) and the mapping is registered for minor faults, the next access of the CPU waits in the kernel, and the descriptor tells
//! where. A thread reads that, calls who wants to know, and has the kernel put the page back (`UFFDIO_CONTINUE`). Source: the
//! kernel's `Documentation/admin-guide/mm/userfaultfd.rst`; minor faults of shared memory came with Linux 5.14.
//!
//! Without the right to be told of accesses that the kernel makes for the process (CAP_SYS_PTRACE), those fail with EFAULT
//! instead of waiting.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use shootdown::{Addr, Exclusion, MemoryError, PageSize, Range, Touched};
use shootdown_primitive::sync::{Arc, Mutex, MutexGuard, PoisonError};
use shootdown_primitive::thread::{self, JoinHandle};

use super::vma::VmaBudget;

const API: u64 = 0xaa;
const MINOR_SHMEM: u64 = 1 << 10;
const MODE_MINOR: u64 = 4;
const USER_MODE_ONLY: libc::c_int = 1;
const PAGE_FAULT: u8 = 0x12;

/// Three or four words, as the requests take them.
type Words = [u64; 4];

const UFFDIO_API: libc::Ioctl = libc::_IOWR::<[u64; 3]>(0xaa, 0x3f);
const UFFDIO_REGISTER: libc::Ioctl = libc::_IOWR::<Words>(0xaa, 0x00);
const UFFDIO_UNREGISTER: libc::Ioctl = libc::_IOR::<[u64; 2]>(0xaa, 0x01);
const UFFDIO_WAKE: libc::Ioctl = libc::_IOR::<[u64; 2]>(0xaa, 0x02);
const UFFDIO_CONTINUE: libc::Ioctl = libc::_IOWR::<Words>(0xaa, 0x07);

/// `struct uffd_msg`: the event in the first byte, then, for a page fault, flags and address.
type Message = [u64; 4];

/// Pages that somebody wants to be told of.
struct Watched {
    number: u64,
    /// As this process has them.
    view: Range,
    /// As devices do.
    range: Range,
    touched: Touched,
}

struct Shared {
    uffd: OwnedFd,
    stop: OwnedFd,
    watched: Mutex<(u64, Vec<Watched>)>,
}

fn failed(call: &'static str, range: Range) -> MemoryError {
    let errno = io::Error::last_os_error().kind();
    MemoryError::System { call, range, errno }
}

impl Shared {
    fn open() -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: flags in, a descriptor out.
        let open =
            |mode: libc::c_int| unsafe { libc::syscall(libc::SYS_userfaultfd, flags | mode) };
        let mut fds = [0, USER_MODE_ONLY].into_iter().map(open);
        let Some(fd) = fds.find(|fd| *fd >= 0) else {
            return Err(io::Error::last_os_error());
        };
        // SAFETY: opened just now.
        let uffd = unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) };
        // SAFETY: flags in, a descriptor out.
        let stop = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if stop < 0 {
            return Err(io::Error::last_os_error());
        }
        let this = Self {
            uffd,
            // SAFETY: opened just now.
            stop: unsafe { OwnedFd::from_raw_fd(stop) },
            watched: Mutex::default(),
        };
        let mut api = [API, MINOR_SHMEM, 0];
        match this.ioctl(UFFDIO_API, &mut api) {
            0 => Ok(this),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn ioctl<const N: usize>(&self, request: libc::Ioctl, words: &mut [u64; N]) -> libc::c_int {
        // SAFETY: each request of this module is given as many words as it is defined with. It changes those, and what is mapped
        // at pages of a memory's arena, where it puts the frame that was there.
        unsafe { libc::ioctl(self.uffd.as_raw_fd(), request, words.as_mut_ptr()) }
    }

    fn watched(&self) -> MutexGuard<'_, (u64, Vec<Watched>)> {
        // Changed by pushes and removals.
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until it is told to stop.
    fn run(&self) {
        loop {
            let mut fds = [&self.uffd, &self.stop].map(|fd| libc::pollfd {
                fd: fd.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            });
            // SAFETY: two descriptors of ours, and room for what happened to them.
            unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
            if fds[1].revents != 0 {
                return;
            }
            while let Some(at) = self.next_touch() {
                self.tell(at);
            }
        }
    }

    /// Where the CPU waits.
    fn next_touch(&self) -> Option<Addr> {
        let mut message: Message = [0; 4];
        let (fd, len) = (self.uffd.as_raw_fd(), size_of::<Message>());
        // SAFETY: the message is as long as said.
        let read = unsafe { libc::read(fd, message.as_mut_ptr().cast(), len) };
        let is_fault = message[0].to_ne_bytes()[0] == PAGE_FAULT;
        (read == len as isize && is_fault).then_some(Addr::new(message[2]))
    }

    fn tell(&self, at: Addr) {
        let view = Range::page(at, PageSize::FourKiB);
        let of = |one: &&Watched| one.view.holds(at);
        let found = self.watched().1.iter().find(of).map(|one| {
            let into = view.start().get() - one.view.start().get();
            let start = Addr::new(one.range.start().get() + into);
            let page = Range::page(start, PageSize::FourKiB);
            (Arc::clone(&one.touched), page)
        });
        if let Some((touched, page)) = found {
            touched(page);
        }
        let (start, len) = (view.start().get(), view.len() as u64);
        if self.ioctl(UFFDIO_CONTINUE, &mut [start, len, 0, 0]) != 0 {
            // It is there already, or it is gone: the CPU finds out.
            self.ioctl(UFFDIO_WAKE, &mut [start, len]);
        }
    }
}

/// Mappings that come of one that is cut in three.
const CUT: u64 = 2;

/// What sees touches of one memory.
pub(super) struct Touches {
    shared: Arc<Shared>,
    budget: Arc<VmaBudget>,
    thread: Option<JoinHandle<()>>,
}

impl Touches {
    pub(super) fn new(budget: &Arc<VmaBudget>) -> io::Result<Self> {
        let shared = Arc::new(Shared::open()?);
        let seen = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("touches".to_owned())
            .spawn(move || seen.run())?;
        Ok(Self {
            shared,
            budget: Arc::clone(budget),
            thread: Some(thread),
        })
    }

    /// Has `touched` called when the CPU touches a page of `range`, which this process has at `view`; `take` takes them away from the
    /// CPU.
    pub(super) fn watch(
        self: &Arc<Self>,
        (range, view): (Range, Range),
        touched: Touched,
        take: impl FnOnce() -> Result<(), MemoryError>,
    ) -> Result<Taken, MemoryError> {
        let shared = &self.shared;
        let reservation = self.budget.reserve(CUT)?;
        let number = {
            let mut watched = shared.watched();
            let (numbers, all) = &mut *watched;
            if all.iter().any(|one| one.view.overlaps(view)) {
                let (call, errno) = ("UFFDIO_REGISTER", io::ErrorKind::AlreadyExists);
                return Err(MemoryError::System { call, range, errno });
            }
            *numbers += 1;
            all.push(Watched {
                number: *numbers,
                view,
                range,
                touched,
            });
            *numbers
        };
        // From here on dropping it undoes what has been done.
        reservation.settle(CUT as i64);
        let taken = Taken {
            touches: Arc::clone(self),
            number,
            view,
        };
        let (start, len) = (view.start().get(), view.len() as u64);
        if shared.ioctl(UFFDIO_REGISTER, &mut [start, len, MODE_MINOR, 0]) != 0 {
            return Err(failed("UFFDIO_REGISTER", range));
        }
        take()?;
        Ok(taken)
    }
}

impl Drop for Touches {
    fn drop(&mut self) {
        // SAFETY: eight bytes to an eventfd of ours.
        unsafe { libc::write(self.shared.stop.as_raw_fd(), [1_u64].as_ptr().cast(), 8) };
        let thread = self.thread.take();
        // Whoever is told of a touch may be the last owner of all this.
        let own = |thread: &JoinHandle<()>| thread.thread().id() == thread::current().id();
        if let Some(thread) = thread.filter(|thread| !own(thread)) {
            // A panic of it has been printed.
            drop(thread.join());
        }
    }
}

/// What sees touches, from when somebody first wants to be told.
#[derive(Default)]
pub(super) struct Sight(Mutex<Option<Arc<Touches>>>);

impl Sight {
    pub(super) fn get(
        &self,
        budget: &Arc<VmaBudget>,
        range: Range,
    ) -> Result<Arc<Touches>, MemoryError> {
        // A value is there or not.
        let mut made = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(touches) = &*made {
            return Ok(Arc::clone(touches));
        }
        let new = Touches::new(budget).map_err(|_| MemoryError::TouchNotSeen {
            range,
            reason: "this kernel, or this process's rights, lack userfaultfd's minor faults (Linux 5.14)",
        })?;
        Ok(Arc::clone(made.insert(Arc::new(new))))
    }
}

/// Pages that were taken away from the CPU.
pub(super) struct Taken {
    touches: Arc<Touches>,
    number: u64,
    view: Range,
}

impl Exclusion for Taken {}

impl Drop for Taken {
    fn drop(&mut self) {
        let shared = &self.touches.shared;
        // Wakes who waits, and nothing is lost where the mapping is gone.
        let (start, len) = (self.view.start().get(), self.view.len() as u64);
        shared.ioctl(UFFDIO_UNREGISTER, &mut [start, len]);
        let mut watched = shared.watched();
        let at = (watched.1.iter()).position(|one| one.number == self.number);
        let gone = at.map(|at| watched.1.swap_remove(at));
        drop(watched);
        self.touches.budget.give_back(CUT);
        // With no lock held: it may hold the last pin of a space.
        drop(gone);
    }
}
