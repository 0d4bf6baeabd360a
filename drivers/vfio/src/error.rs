//! What can go wrong, what the kernel said of it, and the way out. Errno becomes a typed error here and nowhere else.

use std::io;
use std::path::PathBuf;

use shootdown::{DeviceError, Range};
use thiserror::Error;

use crate::caps::ChainError;
use crate::sys::{self, Errno};

/// Why something could not be had from VFIO. Nothing is left half done.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum VfioError {
    /// A path could not be opened.
    #[error("{}: {}: {way_out}", path.display(), said(*errno))]
    Open {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        errno: i32,
        /// What would mend it.
        way_out: &'static str,
    },
    /// An ioctl failed.
    #[error("{call} of {on}: {}: {way_out}", said(*errno))]
    Call {
        /// The call, as the kernel names it.
        call: &'static str,
        /// What it was asked of.
        on: String,
        /// What the kernel said.
        errno: i32,
        /// What would mend it.
        way_out: &'static str,
    },
    /// The kernel speaks another version.
    #[error("VFIO has API version {found}: this driver speaks {expected}")]
    ApiVersion {
        /// The kernel's.
        found: i32,
        /// The one that is spoken here.
        expected: u32,
    },
    /// There is no type1 v2 IOMMU.
    #[error(
        "this kernel's VFIO has no type1 v2 IOMMU: load it (modprobe vfio_iommu_type1), and switch the IOMMU on in firmware and kernel (intel_iommu=on)"
    )]
    NoType1v2,
    /// There is no such PCI device.
    #[error("no PCI device {address}: see /sys/bus/pci/devices; an address reads 0000:03:00.0")]
    NoDevice {
        /// What was asked for.
        address: String,
    },
    /// The device is behind no IOMMU.
    #[error(
        "{address} is in no IOMMU group: no IOMMU translates for it; switch it on in firmware and kernel (intel_iommu=on)"
    )]
    NoGroup {
        /// The device.
        address: String,
    },
    /// Another device of the group belongs to a driver of the kernel.
    #[error(
        "IOMMU group {group} is not viable: each of its devices has to be bound to vfio-pci or to nothing; unbind the others"
    )]
    NotViable {
        /// The group.
        group: u32,
    },
    /// It is a VFIO device, but not on PCI.
    #[error("{address} is not a PCI device (flags {flags:#x}): only those are supported")]
    NotPci {
        /// The device.
        address: String,
        /// What the kernel says it is.
        flags: u32,
    },
    /// The device has no such region.
    #[error("{address} has no region {index}, or one of no bytes")]
    NoRegion {
        /// The device.
        address: String,
        /// What was asked for.
        index: u32,
    },
    /// The device has too few interrupts of a kind, or none.
    #[error("{address} has {available} vectors of {kind}, not {wanted}")]
    NoInterrupts {
        /// The device.
        address: String,
        /// The kind.
        kind: &'static str,
        /// How many there are.
        available: u32,
        /// How many were asked for.
        wanted: u32,
    },
    /// The device cannot be reset by itself.
    #[error(
        "{address} has no reset of its own: a hot reset hits its siblings too (hot_reset names them); else take its bus mastering away"
    )]
    NoReset {
        /// The device.
        address: String,
    },
    /// A write to the command register that would take the device's memory off the bus.
    #[error(
        "command {command:#06x} of {address} would switch its memory off: every access to a mapped BAR would then kill this process"
    )]
    MemoryOff {
        /// The device.
        address: String,
        /// What was to be written.
        command: u16,
    },
    /// The kernel's answer makes no sense.
    #[error("the kernel's answer to {call}: {error}")]
    Chain {
        /// The call.
        call: &'static str,
        /// What is wrong with it.
        error: ChainError,
    },
    /// What every device can run into.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

fn said(errno: Errno) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

/// A path under /dev/vfio that could not be opened.
pub(crate) fn open(path: PathBuf, error: &io::Error) -> VfioError {
    let container = path.ends_with("vfio/vfio");
    let errno = error.raw_os_error().unwrap_or(0);
    let way_out = match errno {
        libc::ENOENT if container => "there is no VFIO: modprobe vfio-pci",
        libc::ENOENT => {
            "no device of this group is bound to vfio-pci: set its driver_override and bind it"
        }
        libc::EACCES => {
            "no permission: make this user the file's owner (chown), or be handed the descriptor"
        }
        libc::EPERM => "the kernel wants CAP_SYS_RAWIO for a group without an IOMMU",
        libc::EBUSY => "another process has this group: one has it at a time",
        libc::ENODEV | libc::ENXIO => "the module is not loaded: modprobe vfio-pci",
        _ => "this is not a usual failure: see dmesg",
    };
    VfioError::Open {
        path,
        errno,
        way_out,
    }
}

/// An ioctl that failed.
pub(crate) fn call(call: &'static str, on: impl Into<String>, errno: Errno) -> VfioError {
    let way_out = match (call, errno) {
        ("VFIO_DEVICE_PCI_HOT_RESET", libc::ENOTTY) => {
            "its bus cannot be reset: take its bus mastering away instead"
        }
        ("VFIO_DEVICE_GET_PCI_HOT_RESET_INFO", libc::ENODEV) => {
            "neither its bus nor its slot can be reset: take its bus mastering away instead"
        }
        (_, libc::ENOTTY) => "the descriptor is not what it is taken for, or the kernel is too old",
        ("VFIO_SET_IOMMU", libc::EPERM) => {
            "interrupts are not remapped by the IOMMU: switch that on, or load vfio_iommu_type1 with allow_unsafe_interrupts=1 where devices are trusted"
        }
        ("VFIO_SET_IOMMU", libc::EBUSY) => "another user holds the IOMMU of this group",
        ("VFIO_GROUP_SET_CONTAINER", libc::EINVAL | libc::EBUSY) => {
            "the group is in a container already"
        }
        ("VFIO_GROUP_SET_CONTAINER", libc::EPERM) => {
            "the kernel wants CAP_SYS_RAWIO for a group without an IOMMU"
        }
        ("VFIO_GROUP_GET_DEVICE_FD", libc::ENODEV) => {
            "the device is not in this group, or not bound to vfio-pci"
        }
        ("VFIO_GROUP_GET_DEVICE_FD", libc::EBUSY) => "another process has this device",
        ("VFIO_GROUP_GET_DEVICE_FD", libc::EINVAL) => "the group is in no container",
        ("VFIO_DEVICE_RESET", libc::EAGAIN) => "the bus is being reset by somebody else: try again",
        (_, libc::EACCES | libc::EPERM) => "the kernel does not allow it to this process",
        (_, libc::ENODEV | libc::EIO) => "the device is gone",
        (_, libc::ENOMEM) => "the kernel has no memory for it",
        _ => "this is not a usual failure: see dmesg",
    };
    VfioError::Call {
        call,
        on: on.into(),
        errno,
        way_out,
    }
}

/// A DMA mapping that the kernel did not make. Allocates nothing.
pub(crate) fn map(
    errno: Errno,
    iova: Range,
    memory: Range,
    page: u64,
    mappings: u64,
) -> DeviceError {
    match errno {
        libc::EEXIST => DeviceError::Overlap { iova },
        libc::EINVAL => DeviceError::Misaligned { iova, memory, page },
        libc::ENOSPC => DeviceError::OutOfMappings {
            iova,
            limit: mappings,
        },
        libc::EFAULT => DeviceError::Unbacked { iova, memory },
        libc::ENOMEM => match sys::lock_limit() {
            libc::RLIM_INFINITY => system("VFIO_IOMMU_MAP_DMA", errno),
            limit => DeviceError::LockLimit { iova, limit },
        },
        _ => system("VFIO_IOMMU_MAP_DMA", errno),
    }
}

/// A failure that has no name. Allocates nothing.
pub(crate) fn system(call: &'static str, errno: Errno) -> DeviceError {
    match errno {
        libc::ENODEV => DeviceError::Gone {
            reason: "the kernel knows it no more",
        },
        _ => DeviceError::System { call, errno },
    }
}
