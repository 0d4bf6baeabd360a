//! System calls: the ioctls of VFIO, eventfds, poll, and the advice that keeps memory out of children.
//!
//! With `region` the only unsafe code of this crate. Every function takes what it needs by borrowed descriptors and slices, and
//! returns errno as it is; what it means to a caller is decided in `error`.
//!
//! The numbers of the ioctls are `_IO(';', 100 + n)`: they carry neither direction nor size, the structures begin with their
//! own size (`argsz`) instead. Source: the kernel's `include/uapi/linux/vfio.h`.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use memmap2::MmapMut;
use shootdown::Range;
use vfio_bindings::bindings::vfio as abi;

/// What the kernel said.
pub(crate) type Errno = i32;

/// An ioctl of VFIO.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum Call {
    GetApiVersion = 0,
    CheckExtension = 1,
    SetIommu = 2,
    GroupGetStatus = 3,
    GroupSetContainer = 4,
    GroupGetDeviceFd = 6,
    DeviceGetInfo = 7,
    DeviceGetRegionInfo = 8,
    DeviceGetIrqInfo = 9,
    DeviceSetIrqs = 10,
    DeviceReset = 11,
    /// On a container `VFIO_IOMMU_GET_INFO`, on a PCI device `VFIO_DEVICE_GET_PCI_HOT_RESET_INFO`.
    Get12 = 12,
    /// On a container `VFIO_IOMMU_MAP_DMA`, on a PCI device `VFIO_DEVICE_PCI_HOT_RESET`.
    Do13 = 13,
    UnmapDma = 14,
}

impl Call {
    fn number(self) -> libc::Ioctl {
        ((u32::from(abi::VFIO_TYPE) << 8) | (abi::VFIO_BASE + self as u32)) as libc::Ioctl
    }
}

fn errno() -> Errno {
    io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

fn result(returned: libc::c_int) -> Result<i32, Errno> {
    if returned < 0 {
        Err(errno())
    } else {
        Ok(returned)
    }
}

/// An ioctl whose argument is a number, or nothing.
pub(crate) fn ioctl_number(fd: BorrowedFd<'_>, call: Call, argument: usize) -> Result<i32, Errno> {
    debug_assert!(matches!(
        call,
        Call::GetApiVersion | Call::CheckExtension | Call::SetIommu | Call::DeviceReset
    ));
    // SAFETY: these calls take their argument by value: the kernel accesses no memory of ours.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), call.number(), argument) })
}

/// Attaches a group to a container.
pub(crate) fn set_container(group: BorrowedFd<'_>, container: BorrowedFd<'_>) -> Result<(), Errno> {
    let container: RawFd = container.as_raw_fd();
    // SAFETY: the argument points to an int that lives through the call.
    let returned = unsafe {
        libc::ioctl(
            group.as_raw_fd(),
            Call::GroupSetContainer.number(),
            &raw const container,
        )
    };
    result(returned).map(drop)
}

/// The descriptor of a device of a group. The kernel sets close-on-exec.
pub(crate) fn device_fd(group: BorrowedFd<'_>, name: &std::ffi::CStr) -> Result<OwnedFd, Errno> {
    let call = Call::GroupGetDeviceFd.number();
    // SAFETY: the argument is a string with its terminator that lives through the call.
    let fd = result(unsafe { libc::ioctl(group.as_raw_fd(), call, name.as_ptr()) })?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// An ioctl whose argument is a structure that begins with `argsz`. `argument` holds it, in words of 4 bytes, and all that
/// the kernel may write.
pub(crate) fn ioctl_sized(
    fd: BorrowedFd<'_>,
    call: Call,
    argument: &mut [u32],
) -> Result<i32, Errno> {
    let bytes = size_of_val(argument);
    let Some(argsz) = argument.first_mut() else {
        return Err(libc::EINVAL);
    };
    *argsz = u32::try_from(bytes).map_err(|_| libc::E2BIG)?;
    // SAFETY: the buffer is writable for `argsz` bytes and lives through the call; of these calls' structures the kernel
    // writes at most `argsz` bytes. Alignment: the kernel copies bytes.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), call.number(), argument.as_mut_ptr()) })
}

/// The largest answer that is believed: far above what any kernel gives.
const LARGEST: usize = 1 << 20;

/// Asks for a structure of `least` bytes and whatever follows it: the kernel says in `argsz` how much that is, and is asked again
/// with as much room. `prepare` fills in what the question needs, by words.
pub(crate) fn query(
    fd: BorrowedFd<'_>,
    call: Call,
    least: usize,
    prepare: impl Fn(&mut [u32]),
) -> Result<Vec<u8>, Errno> {
    let mut bytes = least;
    // Twice in general; more often only if what is described grows meanwhile.
    for _ in 0..8 {
        let mut words = vec![0_u32; bytes.div_ceil(4)];
        prepare(&mut words);
        let answer = ioctl_sized(fd, call, &mut words);
        let needed = words[0] as usize;
        match answer {
            Ok(_) if needed <= size_of_val(&words[..]) => {
                return Ok(words.iter().flat_map(|word| word.to_ne_bytes()).collect());
            }
            // The hot-reset call says "no room" where others succeed and name the size.
            Ok(_) => bytes = needed,
            Err(libc::ENOSPC) if call == Call::Get12 => {
                // It tells how many entries there are, not how many bytes.
                let entries = words.get(2).map_or(0, |count| *count as usize);
                bytes = least + entries * size_of::<abi::vfio_pci_dependent_device>();
            }
            Err(errno) => return Err(errno),
        }
        if bytes > LARGEST {
            break;
        }
    }
    Err(libc::E2BIG)
}

/// Maps one range of an IOMMU.
pub(crate) fn map_dma(
    container: BorrowedFd<'_>,
    iova: Range,
    memory: Range,
    flags: u32,
) -> Result<(), Errno> {
    let map = abi::vfio_iommu_type1_dma_map {
        argsz: size_of::<abi::vfio_iommu_type1_dma_map>() as u32,
        flags,
        vaddr: memory.start().get(),
        iova: iova.start().get(),
        size: u64::try_from(iova.len()).map_err(|_| libc::EINVAL)?,
    };
    // SAFETY: the argument is a whole structure of the size that it states, which the kernel only reads. What the kernel does with
    // the memory it names, pinning its pages for a device, is what the caller of `DmaWindow::map` asks for.
    let returned =
        unsafe { libc::ioctl(container.as_raw_fd(), Call::Do13.number(), &raw const map) };
    result(returned).map(drop)
}

/// Unmaps all that lies in one range of an IOMMU: how many bytes that was.
pub(crate) fn unmap_dma(container: BorrowedFd<'_>, iova: Range) -> Result<u64, Errno> {
    // Without the trailing array, which the call with these flags has none of.
    #[repr(C)]
    struct Unmap {
        argsz: u32,
        flags: u32,
        iova: u64,
        size: u64,
    }
    const _: () = assert!(size_of::<Unmap>() == size_of::<abi::vfio_iommu_type1_dma_unmap>());
    let mut unmap = Unmap {
        argsz: size_of::<Unmap>() as u32,
        flags: 0,
        iova: iova.start().get(),
        size: u64::try_from(iova.len()).map_err(|_| libc::EINVAL)?,
    };
    // SAFETY: the argument is a whole structure of the size that it states, writable, and lives through the call.
    let returned = unsafe {
        libc::ioctl(
            container.as_raw_fd(),
            Call::UnmapDma.number(),
            &raw mut unmap,
        )
    };
    // On an error the kernel leaves the size as it was given.
    result(returned).map(|_| unmap.size)
}

/// Sets close-on-exec: a descriptor that was handed in need not have it.
pub(crate) fn close_on_exec(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: F_SETFD takes a number.
    result(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) }).map(drop)
}

/// An eventfd: a counter that interrupts add to. Reading it never waits.
pub(crate) fn eventfd() -> Result<File, Errno> {
    // SAFETY: takes numbers.
    let fd = result(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
    // SAFETY: the kernel has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

/// Waits until one of `files` can be read or `timeout` has passed: which can. A signal does not end the wait.
pub(crate) fn wait_readable<const N: usize>(
    files: [Option<&File>; N],
    timeout: Duration,
) -> Result<[bool; N], Errno> {
    // A negative descriptor is passed over.
    let mut polled = files.map(|file| libc::pollfd {
        fd: file.map_or(-1, |file| file.as_raw_fd()),
        events: libc::POLLIN,
        revents: 0,
    });
    let begun = Instant::now();
    loop {
        let left = timeout.saturating_sub(begun.elapsed());
        // Rounded up, so that a wait of less than a millisecond is not a spin.
        let milliseconds = left.as_micros().div_ceil(1000);
        let milliseconds = i32::try_from(milliseconds).unwrap_or(i32::MAX);
        // SAFETY: the array is writable for N entries and lives through the call.
        let ready = unsafe { libc::poll(polled.as_mut_ptr(), N as libc::nfds_t, milliseconds) };
        match result(ready) {
            Ok(0) if begun.elapsed() < timeout => {}
            Ok(_) => return Ok(polled.map(|one| one.revents != 0)),
            Err(libc::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// Keeps the pages of `range` out of children that are forked from now on.
pub(crate) fn keep_from_children(range: Range) -> Result<(), Errno> {
    let start = range.start().get() as *mut libc::c_void;
    let len = usize::try_from(range.len()).map_err(|_| libc::EINVAL)?;
    // SAFETY: this advice changes nothing in this process: not the pages, not what is mapped where.
    result(unsafe { libc::madvise(start, len, libc::MADV_DONTFORK) }).map(drop)
}

/// RLIMIT_MEMLOCK in bytes.
pub(crate) fn lock_limit() -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the argument is writable and lives through the call.
    match unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) } {
        0 => limit.rlim_cur,
        _ => 0,
    }
}

/// The number of this process: a load, so that each access to a device can be preceded by it.
///
/// It is kept on a page that the kernel wipes in a child (`MADV_WIPEONFORK`, Linux 4.14), however it is forked; a zero means
/// that this process has not asked yet.
pub(crate) fn process() -> u32 {
    static PAGE: OnceLock<Option<MmapMut>> = OnceLock::new();
    let page = PAGE.get_or_init(|| {
        let page = MmapMut::map_anon(size_of::<AtomicU32>()).ok()?;
        let start = page.as_ptr().cast_mut().cast();
        // SAFETY: the page is ours and holds nothing yet.
        let advised = unsafe { libc::madvise(start, page.len(), libc::MADV_WIPEONFORK) };
        (advised == 0).then_some(page)
    });
    let Some(page) = page else {
        return std::process::id();
    };
    // SAFETY: the mapping is aligned to pages, lives for ever in the static, and is accessed as this atomic only.
    let number = unsafe { AtomicU32::from_ptr(page.as_ptr().cast_mut().cast()) };
    // Relaxed: the number is all there is to it, and every thread that stores one stores the same.
    match number.load(Ordering::Relaxed) {
        0 => {
            let own = std::process::id();
            number.store(own, Ordering::Relaxed);
            own
        }
        own => own,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn numbers_are_those_of_the_kernel_header() {
        assert_eq!(Call::GetApiVersion.number(), 0x3b64);
        assert_eq!(Call::UnmapDma.number(), 0x3b72);
    }

    #[test]
    fn a_wait_tells_which_of_several_can_be_read() {
        let (quiet, mut loud) = (eventfd().unwrap(), eventfd().unwrap());
        loud.write_all(&1_u64.to_ne_bytes()).unwrap();
        let ready = wait_readable([Some(&quiet), None, Some(&loud)], Duration::from_secs(5));
        assert_eq!(ready, Ok([false, false, true]));
    }

    #[test]
    fn a_wait_ends_after_its_time() {
        let quiet = eventfd().unwrap();
        let begun = Instant::now();
        let ready = wait_readable([Some(&quiet)], Duration::from_millis(20));
        assert_eq!(ready, Ok([false]));
        assert!(begun.elapsed() >= Duration::from_millis(20));
    }

    #[test]
    fn memory_is_kept_from_children() {
        let page = MmapMut::map_anon(4096).unwrap();
        let range = Range::new(page.as_ptr() as u64, 4096).unwrap();
        let flags = || {
            let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let start = format!("{:x}-", range.start().get());
            let mut lines = smaps.lines().skip_while(|line| !line.starts_with(&start));
            let flags = lines.find_map(|line| line.strip_prefix("VmFlags:"));
            flags.map(str::to_owned)
        };
        // A mapping that has grown together with a neighbour begins elsewhere.
        assert!(!flags().is_some_and(|flags| flags.contains(" dc")));
        keep_from_children(range).unwrap();
        assert!(flags().unwrap().contains(" dc"), "do not copy");
    }

    /// R21: a signal ends the system call, and not the wait.
    #[test]
    fn a_wait_goes_on_after_a_signal() {
        extern "C" fn nothing(_: libc::c_int) {}
        // SAFETY: a handler that does nothing, without SA_RESTART; no other test uses this signal.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
            assert_eq!(
                libc::sigaction(libc::SIGUSR2, &raw const action, std::ptr::null_mut()),
                0
            );
        }
        let (sender, receiver) = std::sync::mpsc::channel();
        let waiting = std::thread::spawn(move || {
            // SAFETY: names the calling thread.
            sender.send(unsafe { libc::pthread_self() }).unwrap();
            let quiet = eventfd().unwrap();
            let begun = Instant::now();
            let ready = wait_readable([Some(&quiet)], Duration::from_millis(200));
            (ready, begun.elapsed())
        });
        let thread = receiver.recv().unwrap();
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(10));
            // SAFETY: the thread waits for longer than this loop takes, and is joined afterwards.
            assert_eq!(unsafe { libc::pthread_kill(thread, libc::SIGUSR2) }, 0);
        }
        let (ready, waited) = waiting.join().unwrap();
        assert_eq!(ready, Ok([false]));
        assert!(waited >= Duration::from_millis(200));
    }

    #[test]
    fn a_child_knows_that_it_is_not_its_parent() {
        let parent = process();
        assert_eq!(parent, std::process::id());
        // SAFETY: the child calls nothing but the function under test, which takes no lock after its first call, and _exit.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let differs = process() != parent && process() == std::process::id();
            // SAFETY: ends the child without running destructors of the test process.
            unsafe { libc::_exit(i32::from(!differs)) };
        }
        let mut status = -1;
        // SAFETY: the argument is writable and lives through the call.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0);
    }
}
