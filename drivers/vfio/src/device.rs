//! A PCI device: its regions, its configuration space, bus mastering and reset.

use std::fs::File;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use shootdown::DeviceError;
use vfio_bindings::bindings::vfio as abi;

use crate::answer::{parse_region, parse_siblings};
use crate::caps::Bytes;
use crate::container::{Container, Group, check_owner};
use crate::error::{self, VfioError};
use crate::irq::{self, Irqs, Kind};
use crate::pci;
use crate::region::{Region, Width};
use crate::sys::{self, Call};

/// The command register of a PCI function, and three of its bits. Source: PCI Local Bus 3.0, 6.2.2.
const COMMAND: u64 = 0x04;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_MASTER: u16 = 1 << 2;

/// The device's file, for all that belongs to the device. Registers are reached by the process that opened it only.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) file: File,
    pub(crate) address: String,
    owner: u32,
    failed: AtomicBool,
    wanted_back: AtomicBool,
    /// Told by the kernel of an error that the device does not recover from.
    pub(crate) error: Option<File>,
    /// Told by the kernel that somebody wants the device back.
    pub(crate) request: Option<File>,
}

impl Handle {
    /// Whether this process may reach the device, and there is one.
    pub(crate) fn check(&self) -> Result<(), DeviceError> {
        check_owner(self.owner)?;
        // Relaxed: whoever learned of the failure tells; an access that overtakes it reads ones, as it would have before.
        if self.failed.load(Ordering::Relaxed) {
            return Err(DeviceError::Gone {
                reason: "it reported an error that it does not recover from: reset it",
            });
        }
        Ok(())
    }

    pub(crate) fn fail(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_wanted_back(&self) -> bool {
        self.wanted_back.load(Ordering::Relaxed)
    }

    pub(crate) fn want_back(&self) {
        self.wanted_back.store(true, Ordering::Relaxed);
    }
}

/// Why a device is about to be lost.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Departure {
    /// It reported an uncorrectable error: its registers are refused from here on, until it is reset.
    Failed,
    /// Its driver is being unbound, or it is unplugged: it works, and has to be given up. The kernel waits for that.
    WantedBack,
}

/// A device that the hot reset of another hits too.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sibling {
    /// Its PCI address.
    pub address: String,
    /// Its IOMMU group.
    pub group: u32,
}

/// A PCI device that belongs to this process.
///
/// Dropping it gives it back: the kernel stops its bus mastering, and resets it if it can.
#[derive(Debug)]
pub struct Device {
    handle: Arc<Handle>,
    flags: u32,
    regions: u32,
    config: u64,
    config_len: u64,
    // After the file: groups and container outlive the devices in them.
    container: Option<Arc<Container>>,
}

/// The device at a PCI address such as `0000:03:00.0`, with its group in a container of its own.
///
/// # Errors
/// [`VfioError`], with what is missing and what would mend it.
pub fn open(address: &str) -> Result<Device, VfioError> {
    let container = Container::open(vec![Group::open(pci::group(address)?)?])?;
    Device::open(&container, address)
}

impl Device {
    /// A device of a group that is in `container`.
    ///
    /// # Errors
    /// [`VfioError`].
    pub fn open(container: &Arc<Container>, address: &str) -> Result<Self, VfioError> {
        let file = container.device_fd(pci::group(address)?, address)?;
        Self::of(file, address, Some(container.clone()))
    }

    /// A device whose descriptor this process was handed. `address` is for messages. Whoever handed it in sees to it that its
    /// group is in a container; with `container` that is kept for as long as the device.
    ///
    /// # Errors
    /// [`VfioError`].
    pub fn from_fd(
        fd: OwnedFd,
        address: &str,
        container: Option<Arc<Container>>,
    ) -> Result<Self, VfioError> {
        sys::close_on_exec(fd.as_fd()).map_err(|errno| error::call("F_SETFD", address, errno))?;
        Self::of(fd.into(), address, container)
    }

    fn of(file: File, address: &str, container: Option<Arc<Container>>) -> Result<Self, VfioError> {
        let call = "VFIO_DEVICE_GET_INFO";
        let least = size_of::<abi::vfio_device_info>();
        let answer = sys::query(file.as_fd(), Call::DeviceGetInfo, least, |_| ())
            .map_err(|errno| error::call(call, address, errno))?;
        let word = |offset| {
            let word = Bytes(&answer).u32(offset);
            word.map_err(|error| VfioError::Chain { call, error })
        };
        let flags = word(offset_of!(abi::vfio_device_info, flags))?;
        if flags & abi::VFIO_DEVICE_FLAGS_PCI == 0 {
            return Err(VfioError::NotPci {
                address: address.to_owned(),
                flags,
            });
        }
        let event = |kind: Kind| irq::event(&file, address, kind);
        let handle = Handle {
            error: event(Kind::Error)?,
            request: event(Kind::Request)?,
            address: address.to_owned(),
            owner: sys::process(),
            failed: AtomicBool::new(false),
            wanted_back: AtomicBool::new(false),
            file,
        };
        let mut this = Self {
            handle: Arc::new(handle),
            flags,
            regions: word(offset_of!(abi::vfio_device_info, num_regions))?,
            config: 0,
            config_len: 0,
            container,
        };
        let (config, _) = this.region_info(abi::VFIO_PCI_CONFIG_REGION_INDEX)?;
        (this.config, this.config_len) = (config.offset, config.size);
        Ok(this)
    }

    /// The PCI address.
    pub fn address(&self) -> &str {
        &self.handle.address
    }

    /// The container of its group, if this process opened it.
    pub fn container(&self) -> Option<&Arc<Container>> {
        self.container.as_ref()
    }

    /// What the kernel has told of the device's end, if anything. Does not wait.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn departure(&self) -> Result<Option<Departure>, DeviceError> {
        irq::observe(&self.handle, None, std::time::Duration::ZERO)?;
        let handle = &self.handle;
        Ok(if handle.failed.load(Ordering::Relaxed) {
            Some(Departure::Failed)
        } else if handle.is_wanted_back() {
            Some(Departure::WantedBack)
        } else {
            None
        })
    }

    /// What the kernel says of a region, and what of it can be mapped.
    fn region_info(
        &self,
        index: u32,
    ) -> Result<(abi::vfio_region_info, Vec<(u64, u64)>), VfioError> {
        let call = "VFIO_DEVICE_GET_REGION_INFO";
        let no_region = || VfioError::NoRegion {
            address: self.address().to_owned(),
            index,
        };
        if index >= self.regions {
            return Err(no_region());
        }
        let least = size_of::<abi::vfio_region_info>();
        let prepare =
            |words: &mut [u32]| words[offset_of!(abi::vfio_region_info, index) / 4] = index;
        let answer = sys::query(
            self.handle.file.as_fd(),
            Call::DeviceGetRegionInfo,
            least,
            prepare,
        )
        .map_err(|errno| match errno {
            libc::EINVAL => no_region(),
            errno => error::call(call, self.address(), errno),
        })?;
        parse_region(&answer, index).map_err(|error| VfioError::Chain { call, error })
    }

    /// Region `index`: 0 to 5 are the BARs. What of it can be mapped is mapped, once for each call.
    ///
    /// # Errors
    /// No such region; what the kernel said.
    pub fn region(&self, index: u32) -> Result<Region, VfioError> {
        let (info, mappable) = self.region_info(index)?;
        if info.size == 0 {
            return Err(VfioError::NoRegion {
                address: self.address().to_owned(),
                index,
            });
        }
        Region::new(self.handle.clone(), info, &mappable)
    }

    /// Reads configuration space, which the kernel virtualizes in part.
    ///
    /// # Errors
    /// No such register, or the device is gone.
    pub fn config_get<T: Width + Into<u64> + TryFrom<u64>>(
        &self,
        offset: u64,
    ) -> Result<T, DeviceError> {
        let mut bytes = [0; 8];
        let wanted = self.config_place::<T>(offset)?;
        self.handle.pread(
            &mut bytes[..wanted],
            self.config + offset,
            "pread of configuration space",
        )?;
        T::try_from(u64::from_le_bytes(bytes)).map_err(|_| DeviceError::NoRegister {
            offset,
            width: T::BYTES,
        })
    }

    /// Writes configuration space.
    ///
    /// # Errors
    /// No such register, or the device is gone; [`VfioError::MemoryOff`].
    pub fn config_set<T: Width + Into<u64> + TryFrom<u64>>(
        &self,
        offset: u64,
        value: T,
    ) -> Result<(), VfioError> {
        let wanted = self.config_place::<T>(offset)?;
        let bytes = value.into().to_le_bytes();
        // The bit is in the register's first byte, whatever the width of the access.
        let first = COMMAND.checked_sub(offset).map(|into| into as usize);
        if let Some(low) = first.and_then(|first| bytes[..wanted].get(first))
            && u16::from(*low) & COMMAND_MEMORY == 0
        {
            return Err(VfioError::MemoryOff {
                address: self.address().to_owned(),
                command: (*low).into(),
            });
        }
        self.handle.pwrite(
            &bytes[..wanted],
            self.config + offset,
            "pwrite of configuration space",
        )?;
        Ok(())
    }

    fn config_place<T: Width>(&self, offset: u64) -> Result<usize, DeviceError> {
        let width = T::BYTES;
        let end = offset.checked_add(width.into());
        let inside =
            end.is_some_and(|end| end <= self.config_len) && offset.is_multiple_of(width.into());
        if inside {
            Ok(width.into())
        } else {
            Err(DeviceError::NoRegister { offset, width })
        }
    }

    /// Lets the device make accesses to memory, or not. vfio-pci hands devices over without. Memory space is switched on with
    /// it: a device's registers are there either way.
    ///
    /// # Errors
    /// The device is gone.
    pub fn set_bus_master(&self, on: bool) -> Result<(), VfioError> {
        let command: u16 = self.config_get(COMMAND)?;
        let command = if on {
            command | COMMAND_MASTER
        } else {
            command & !COMMAND_MASTER
        };
        self.config_set(COMMAND, command | COMMAND_MEMORY)
    }

    /// Whether the device may make accesses to memory.
    ///
    /// # Errors
    /// The device is gone.
    pub fn is_bus_master(&self) -> Result<bool, DeviceError> {
        Ok(self.config_get::<u16>(COMMAND)? & COMMAND_MASTER != 0)
    }

    /// How many vectors of `kind` the device has.
    ///
    /// # Errors
    /// What the kernel said.
    pub fn vectors(&self, kind: Kind) -> Result<u32, VfioError> {
        irq::count(&self.handle.file, self.address(), kind)
    }

    /// Switches on `count` vectors of a kind. One kind at a time; dropping the value switches it off.
    ///
    /// # Errors
    /// Too few of them; another kind is on; what the kernel said.
    pub fn interrupts(&self, kind: Kind, count: u32) -> Result<Irqs, VfioError> {
        Irqs::new(self.handle.clone(), kind, count)
    }

    /// Whether the device can be reset without its siblings.
    pub fn has_reset(&self) -> bool {
        self.flags & abi::VFIO_DEVICE_FLAGS_RESET != 0
    }

    /// Resets the function, which stops its DMA and forgets all of its state; what is mapped in the IOMMU stays. Waits for the
    /// device, up to the kernel's own deadline. A device that had failed is reachable again.
    ///
    /// # Errors
    /// [`VfioError::NoReset`]; what the kernel said.
    pub fn reset(&self) -> Result<(), VfioError> {
        if !self.has_reset() {
            return Err(VfioError::NoReset {
                address: self.address().to_owned(),
            });
        }
        check_owner(self.handle.owner)?;
        sys::ioctl_number(self.handle.file.as_fd(), Call::DeviceReset, 0)
            .map_err(|errno| error::call("VFIO_DEVICE_RESET", self.address(), errno))?;
        self.handle.failed.store(false, Ordering::Relaxed);
        Ok(())
    }

    /// Stops all DMA by whatever the device has for it: its reset, else the loss of its bus mastering. Allocates nothing.
    pub(crate) fn stop_for_good(&self) -> bool {
        if check_owner(self.handle.owner).is_err() {
            return false;
        }
        let file = self.handle.file.as_fd();
        if self.has_reset() && sys::ioctl_number(file, Call::DeviceReset, 0).is_ok() {
            self.handle.failed.store(false, Ordering::Relaxed);
            return true;
        }
        self.set_bus_master(false).is_ok() && self.is_bus_master() == Ok(false)
    }

    /// What a hot reset of the device's bus or slot would hit, the device itself included.
    ///
    /// # Errors
    /// There is none for it; what the kernel said.
    pub fn hot_reset(&self) -> Result<HotReset<'_>, VfioError> {
        let call = "VFIO_DEVICE_GET_PCI_HOT_RESET_INFO";
        let least = size_of::<abi::vfio_pci_hot_reset_info>();
        let answer = sys::query(self.handle.file.as_fd(), Call::Get12, least, |_| ())
            .map_err(|errno| error::call(call, self.address(), errno))?;
        Ok(HotReset {
            device: self,
            siblings: parse_siblings(&answer).map_err(|error| VfioError::Chain { call, error })?,
        })
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.handle.file.as_fd()
    }
}

/// A hot reset that has not happened yet: whoever runs it has been told what it hits.
#[derive(Debug)]
pub struct HotReset<'d> {
    device: &'d Device,
    siblings: Vec<Sibling>,
}

impl HotReset<'_> {
    /// Everything that it hits, the device itself included.
    pub fn siblings(&self) -> &[Sibling] {
        &self.siblings
    }

    /// Resets them all. The device's container has to hold the groups of all of them.
    ///
    /// # Errors
    /// A group is missing, or what the kernel said: nothing was reset then.
    pub fn run(self) -> Result<(), VfioError> {
        let call = "VFIO_DEVICE_PCI_HOT_RESET";
        let device = self.device;
        check_owner(device.handle.owner)?;
        let groups = device.container.as_ref().map(|one| one.groups());
        let mut words = vec![0_u32; size_of::<abi::vfio_pci_hot_reset>() / 4];
        for group in groups.iter().flat_map(|groups| groups.iter()) {
            if self.siblings.iter().any(|one| one.group == group.number()) {
                words.push(group.as_fd().as_raw_fd().cast_unsigned());
            }
        }
        let count = words.len() - size_of::<abi::vfio_pci_hot_reset>() / 4;
        words[offset_of!(abi::vfio_pci_hot_reset, count) / 4] = count as u32;
        sys::ioctl_sized(device.handle.file.as_fd(), Call::Do13, &mut words)
            .map_err(|errno| error::call(call, device.address(), errno))?;
        device.handle.failed.store(false, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::{Duration, Instant};

    use super::*;

    /// A device of which there are only the words of its end.
    fn handle() -> (Handle, File, File) {
        let (error, request) = (sys::eventfd().unwrap(), sys::eventfd().unwrap());
        let others = (error.try_clone().unwrap(), request.try_clone().unwrap());
        let handle = Handle {
            file: File::open("/dev/null").unwrap(),
            address: "0000:00:00.0".into(),
            owner: sys::process(),
            failed: AtomicBool::new(false),
            wanted_back: AtomicBool::new(false),
            error: Some(error),
            request: Some(request),
        };
        (handle, others.0, others.1)
    }

    #[test]
    fn a_failure_ends_a_wait_and_refuses_registers_until_a_reset() {
        let (handle, mut error, _request) = handle();
        assert_eq!(handle.check(), Ok(()));
        error.write_all(&1_u64.to_ne_bytes()).unwrap();
        let begun = Instant::now();
        irq::observe(&handle, None, Duration::from_secs(60)).unwrap();
        assert!(begun.elapsed() < Duration::from_secs(30));
        assert!(matches!(handle.check(), Err(DeviceError::Gone { .. })));
        // What `reset` does when it has succeeded.
        handle.failed.store(false, Ordering::Relaxed);
        irq::observe(&handle, None, Duration::ZERO).unwrap();
        assert_eq!(handle.check(), Ok(()), "an old word is not found again");
    }

    #[test]
    fn a_device_that_is_wanted_back_works_until_it_is_given_up() {
        let (handle, _error, mut request) = handle();
        request.write_all(&1_u64.to_ne_bytes()).unwrap();
        irq::observe(&handle, None, Duration::from_secs(60)).unwrap();
        assert!(handle.is_wanted_back());
        assert_eq!(handle.check(), Ok(()));
    }
}
