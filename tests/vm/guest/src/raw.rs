//! VFIO by bare system calls: what the kernel does, without anything in between that could be better or worse.
//!
//! The transport crate has its own; these checks are about the kernel beneath it, so they do not go through it.

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, RawFd};

use vfio_bindings::bindings::vfio as abi;

use crate::memory::Memory;
use crate::pci::Function;

/// The ioctls of VFIO carry neither size nor direction in their numbers.
const fn number(call: u32) -> libc::Ioctl {
    ((abi::VFIO_TYPE as u32) << 8 | (abi::VFIO_BASE + call)) as libc::Ioctl
}

const GET_API_VERSION: libc::Ioctl = number(0);
const CHECK_EXTENSION: libc::Ioctl = number(1);
const SET_IOMMU: libc::Ioctl = number(2);
const GROUP_SET_CONTAINER: libc::Ioctl = number(4);
const GROUP_GET_DEVICE_FD: libc::Ioctl = number(6);
const DEVICE_GET_REGION_INFO: libc::Ioctl = number(8);
const DEVICE_SET_IRQS: libc::Ioctl = number(10);
const IOMMU_GET_INFO: libc::Ioctl = number(12);
const IOMMU_MAP_DMA: libc::Ioctl = number(13);
const IOMMU_UNMAP_DMA: libc::Ioctl = number(14);

/// The kernel's error number.
pub(crate) type Errno = i32;

fn result(returned: libc::c_int) -> Result<libc::c_int, Errno> {
    if returned < 0 {
        return Err(io::Error::last_os_error().raw_os_error().unwrap_or(0));
    }
    Ok(returned)
}

/// What the device may do with mapped memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rights {
    Read = abi::VFIO_DMA_MAP_FLAG_READ as isize,
    ReadWrite = (abi::VFIO_DMA_MAP_FLAG_READ | abi::VFIO_DMA_MAP_FLAG_WRITE) as isize,
}

/// An unmap that failed: the error, and what the kernel left in `size`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Refused {
    pub(crate) errno: Errno,
    pub(crate) size: u64,
}

/// What the kernel tells about a container.
#[derive(Clone, Debug, Default)]
pub(crate) struct Info {
    /// Bit n: pages of 2^n bytes.
    pub(crate) page_sizes: u64,
    /// First and last address of each range that can be mapped.
    pub(crate) ranges: Vec<(u64, u64)>,
    /// How many mappings may still be made.
    pub(crate) dma_avail: Option<u32>,
    /// Identifiers of all capabilities.
    pub(crate) capabilities: Vec<u16>,
}

/// A container of type1 v2 with one group.
#[derive(Debug)]
pub(crate) struct Container {
    // Closed in this order: a group that is still in a container keeps it alive.
    group: File,
    fd: File,
}

fn open(path: &str) -> io::Result<File> {
    File::options().read(true).write(true).open(path)
}

fn os(errno: Errno) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

/// API version, and whether the kernel has type1 v2.
pub(crate) fn version() -> io::Result<(i32, i32)> {
    let fd = open("/dev/vfio/vfio")?;
    let ask = |request, argument: u64| {
        // SAFETY: both requests take a number, not a pointer.
        result(unsafe { libc::ioctl(fd.as_raw_fd(), request, argument) }).map_err(os)
    };
    Ok((
        ask(GET_API_VERSION, 0)?,
        ask(CHECK_EXTENSION, abi::VFIO_TYPE1v2_IOMMU.into())?,
    ))
}

/// Maps in any container, whoever opened it.
pub(crate) fn map(
    fd: BorrowedFd<'_>,
    iova: u64,
    address: u64,
    size: u64,
    rights: Rights,
) -> Result<(), Errno> {
    let map = abi::vfio_iommu_type1_dma_map {
        argsz: size_of::<abi::vfio_iommu_type1_dma_map>() as u32,
        flags: rights as u32,
        vaddr: address,
        iova,
        size,
    };
    // SAFETY: the structure lives through the call and says its own size. The memory it names is touched by devices only, and by
    // this process through volatile accesses (see `View`); an address that is not mapped is refused.
    result(unsafe { libc::ioctl(fd.as_raw_fd(), IOMMU_MAP_DMA, &raw const map) }).map(drop)
}

/// Unmaps in any container, whoever opened it.
pub(crate) fn unmap(fd: BorrowedFd<'_>, iova: u64, size: u64) -> Result<u64, Refused> {
    unmap_with(fd, iova, size, 0)
}

fn unmap_with(fd: BorrowedFd<'_>, iova: u64, size: u64, flags: u32) -> Result<u64, Refused> {
    let mut unmap = abi::vfio_iommu_type1_dma_unmap {
        argsz: size_of::<abi::vfio_iommu_type1_dma_unmap>() as u32,
        flags,
        iova,
        size,
        ..Default::default()
    };
    // SAFETY: the structure lives through the call, is writable and says its own size.
    match result(unsafe { libc::ioctl(fd.as_raw_fd(), IOMMU_UNMAP_DMA, &raw mut unmap) }) {
        Ok(_) => Ok(unmap.size),
        Err(errno) => Err(Refused {
            errno,
            size: unmap.size,
        }),
    }
}

impl Container {
    /// Of the function's group.
    pub(crate) fn of(function: &Function) -> io::Result<Self> {
        let fd = open("/dev/vfio/vfio")?;
        let group = open(&format!("/dev/vfio/{}", function.group()?))?;
        let container: RawFd = fd.as_raw_fd();
        // SAFETY: the argument points to an int that lives through the call.
        result(unsafe {
            libc::ioctl(group.as_raw_fd(), GROUP_SET_CONTAINER, &raw const container)
        })
        .map_err(os)?;
        let kind = u64::from(abi::VFIO_TYPE1v2_IOMMU);
        // SAFETY: the argument is a number.
        result(unsafe { libc::ioctl(fd.as_raw_fd(), SET_IOMMU, kind) }).map_err(os)?;
        Ok(Self { group, fd })
    }

    /// Opens the function, which must be of this container's group.
    pub(crate) fn device(&self, function: &Function) -> io::Result<Device> {
        let name = std::ffi::CString::new(function.address.as_str())?;
        // SAFETY: the argument is a string with its terminator that lives through the call.
        let fd = unsafe { libc::ioctl(self.group.as_raw_fd(), GROUP_GET_DEVICE_FD, name.as_ptr()) };
        let fd = result(fd).map_err(os)?;
        // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
        let fd = unsafe { File::from_raw_fd(fd) };
        Ok(Device { fd })
    }

    /// Maps memory of this process. It stays pinned until it is unmapped, whatever becomes of the address range.
    pub(crate) fn map(&self, iova: u64, memory: &Memory, rights: Rights) -> Result<(), Errno> {
        self.map_at(iova, memory.address(), memory.range().len() as u64, rights)
    }

    /// Maps any addresses: the kernel is to refuse those that are wrong.
    pub(crate) fn map_at(
        &self,
        iova: u64,
        address: u64,
        size: u64,
        rights: Rights,
    ) -> Result<(), Errno> {
        map(self.fd.as_fd(), iova, address, size, rights)
    }

    /// Unmaps whatever lies in the range; gives how much that was.
    pub(crate) fn unmap(&self, iova: u64, size: u64) -> Result<u64, Refused> {
        unmap(self.fd.as_fd(), iova, size)
    }

    /// Unmaps everything.
    pub(crate) fn unmap_all(&self) -> Result<u64, Refused> {
        unmap_with(self.fd.as_fd(), 0, 0, abi::VFIO_DMA_UNMAP_FLAG_ALL)
    }

    /// What can be mapped, and how much still.
    pub(crate) fn info(&self) -> io::Result<Info> {
        // Words, so that it is aligned; far more than the kernel has to say.
        let mut answer = [0_u64; 512];
        let bytes = size_of_val(&answer);
        let head = answer.as_mut_ptr().cast::<u32>();
        // SAFETY: the buffer is writable for the size that its first word gives.
        unsafe {
            head.write(bytes as u32);
            result(libc::ioctl(self.fd.as_raw_fd(), IOMMU_GET_INFO, head)).map_err(os)?;
        }
        let bytes: Vec<u8> = answer.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let u16_at = |at: usize| {
            bytes
                .get(at..at + 2)
                .map(|part| u16::from_ne_bytes([part[0], part[1]]))
        };
        let u32_at = |at: usize| Some(u32::from(u16_at(at)?) | u32::from(u16_at(at + 2)?) << 16);
        let u64_at = |at: usize| Some(u64::from(u32_at(at)?) | u64::from(u32_at(at + 4)?) << 32);
        let read = || {
            let mut info = Info {
                page_sizes: u64_at(8)?,
                ..Info::default()
            };
            let mut at = u32_at(16)? as usize;
            while at != 0 {
                let id = u16_at(at)?;
                info.capabilities.push(id);
                match u32::from(id) {
                    abi::VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE => {
                        for range in 0..u32_at(at + 8)? as usize {
                            let range = at + 16 + 16 * range;
                            info.ranges.push((u64_at(range)?, u64_at(range + 8)?));
                        }
                    }
                    abi::VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL => info.dma_avail = u32_at(at + 8),
                    _ => {}
                }
                at = u32_at(at + 4)? as usize;
            }
            Some(info)
        };
        read().ok_or_else(|| io::Error::other("a capability lies outside of the answer"))
    }
}

/// An open device.
#[derive(Debug)]
pub(crate) struct Device {
    fd: File,
}

impl Device {
    /// Where a region lies in the descriptor, and how long it is.
    pub(crate) fn region(&self, index: u32) -> io::Result<(u64, u64)> {
        let mut region = abi::vfio_region_info {
            argsz: size_of::<abi::vfio_region_info>() as u32,
            index,
            ..Default::default()
        };
        // SAFETY: the structure lives through the call, is writable and says its own size.
        result(unsafe {
            libc::ioctl(self.fd.as_raw_fd(), DEVICE_GET_REGION_INFO, &raw mut region)
        })
        .map_err(os)?;
        Ok((region.offset, region.size))
    }

    /// Maps a BAR.
    pub(crate) fn bar(&self, index: u32) -> io::Result<Memory> {
        let (offset, size) = self.region(index)?;
        Memory::file(&self.fd, offset, size as usize, libc::MAP_SHARED)
    }

    /// Lets it answer to its addresses and do DMA: vfio-pci hands devices over with both off.
    pub(crate) fn enable(&self) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        const COMMAND: u64 = 4;
        const MEMORY_AND_MASTER: u8 = 6;
        let (config, _) = self.region(abi::VFIO_PCI_CONFIG_REGION_INDEX)?;
        let mut command = [0_u8; 2];
        self.fd.read_exact_at(&mut command, config + COMMAND)?;
        command[0] |= MEMORY_AND_MASTER;
        self.fd.write_all_at(&command, config + COMMAND)
    }

    /// Has its first MSI write to an eventfd.
    pub(crate) fn msi(&self, eventfd: &File) -> io::Result<()> {
        const HEAD: usize = size_of::<abi::vfio_irq_set>();
        let mut set = [0_u32; HEAD / 4 + 1];
        set[0] = size_of_val(&set) as u32;
        set[1] = abi::VFIO_IRQ_SET_DATA_EVENTFD | abi::VFIO_IRQ_SET_ACTION_TRIGGER;
        set[2] = abi::VFIO_PCI_MSI_IRQ_INDEX;
        set[3] = 0;
        set[4] = 1;
        set[5] = eventfd.as_raw_fd() as u32;
        // SAFETY: the words are those of vfio_irq_set with one descriptor behind it; the first says how many bytes there are.
        result(unsafe { libc::ioctl(self.fd.as_raw_fd(), DEVICE_SET_IRQS, set.as_ptr()) })
            .map(drop)
            .map_err(os)
    }
}
