//! Interrupts, as counters that the kernel adds to (eventfds): the device's own, and the two that tell of its end.

use std::fs::File;
use std::io::Read;
use std::mem::{offset_of, size_of};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use shootdown::{DeviceError, Interrupts};
use vfio_bindings::bindings::vfio as abi;

use crate::device::Handle;
use crate::error::{self, VfioError};
use crate::sys::{self, Call};

/// A kind of interrupt of a PCI device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Kind {
    /// The pin, level-triggered: masked when it fires, unmasked by the next wait.
    Intx = abi::VFIO_PCI_INTX_IRQ_INDEX,
    /// Messages.
    Msi = abi::VFIO_PCI_MSI_IRQ_INDEX,
    /// Messages from a table in a BAR.
    MsiX = abi::VFIO_PCI_MSIX_IRQ_INDEX,
    /// The kernel's word that the device has failed.
    Error = abi::VFIO_PCI_ERR_IRQ_INDEX,
    /// The kernel's word that the device is wanted back.
    Request = abi::VFIO_PCI_REQ_IRQ_INDEX,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Intx => "INTx",
            Self::Msi => "MSI",
            Self::MsiX => "MSI-X",
            Self::Error => "the error interrupt",
            Self::Request => "the request interrupt",
        }
    }
}

/// How many vectors of a kind there are.
pub(crate) fn count(file: &File, address: &str, kind: Kind) -> Result<u32, VfioError> {
    let mut info = [0_u32; size_of::<abi::vfio_irq_info>() / 4];
    info[offset_of!(abi::vfio_irq_info, index) / 4] = kind as u32;
    match sys::ioctl_sized(file.as_fd(), Call::DeviceGetIrqInfo, &mut info) {
        Ok(_) => {
            let flags = info[offset_of!(abi::vfio_irq_info, flags) / 4];
            let eventfd = flags & abi::VFIO_IRQ_INFO_EVENTFD != 0;
            Ok(if eventfd {
                info[offset_of!(abi::vfio_irq_info, count) / 4]
            } else {
                0
            })
        }
        // A kind that the device or the kernel does not know.
        Err(libc::EINVAL) => Ok(0),
        Err(errno) => Err(error::call("VFIO_DEVICE_GET_IRQ_INFO", address, errno)),
    }
}

/// Does `flags` to `count` vectors of a kind, with their eventfds where the flags say so.
fn set(file: &File, kind: Kind, flags: u32, count: u32, events: &[File]) -> Result<(), i32> {
    let mut words = vec![0_u32; size_of::<abi::vfio_irq_set>() / 4];
    words[offset_of!(abi::vfio_irq_set, flags) / 4] = flags;
    words[offset_of!(abi::vfio_irq_set, index) / 4] = kind as u32;
    words[offset_of!(abi::vfio_irq_set, count) / 4] = count;
    words.extend(events.iter().map(|one| one.as_raw_fd().cast_unsigned()));
    sys::ioctl_sized(file.as_fd(), Call::DeviceSetIrqs, &mut words).map(drop)
}

const TRIGGER_EVENTFD: u32 = abi::VFIO_IRQ_SET_DATA_EVENTFD | abi::VFIO_IRQ_SET_ACTION_TRIGGER;

fn failed(address: &str) -> impl Fn(i32) -> VfioError {
    move |errno| error::call("VFIO_DEVICE_SET_IRQS", address, errno)
}

/// The eventfd of a kind with one vector, switched on; `None` where the device has no such kind.
pub(crate) fn event(file: &File, address: &str, kind: Kind) -> Result<Option<File>, VfioError> {
    if count(file, address, kind)? == 0 {
        return Ok(None);
    }
    let event = sys::eventfd().map_err(|errno| error::call("eventfd", address, errno))?;
    let events = [event];
    set(file, kind, TRIGGER_EVENTFD, 1, &events).map_err(failed(address))?;
    let [event] = events;
    Ok(Some(event))
}

/// Takes what an eventfd has counted; 0 if nothing.
fn take(mut event: &File) -> u64 {
    let mut counted = [0; 8];
    match event.read(&mut counted) {
        Ok(8) => u64::from_ne_bytes(counted),
        _ => 0,
    }
}

/// Waits until `vector` has fired, the device is about to be lost, or `timeout` has passed. Remembers the second.
pub(crate) fn observe(
    handle: &Handle,
    vector: Option<&File>,
    timeout: Duration,
) -> Result<(), DeviceError> {
    let files = [vector, handle.error.as_ref(), handle.request.as_ref()];
    sys::wait_readable(files, timeout).map_err(|errno| error::system("poll", errno))?;
    // Each word is taken once: what a reset has mended is not found again.
    if handle.error.as_ref().is_some_and(|event| take(event) > 0) {
        handle.fail();
    }
    if handle.request.as_ref().is_some_and(|event| take(event) > 0) {
        handle.want_back();
    }
    Ok(())
}

/// The interrupt vectors of a device, switched on. As [`Interrupts`] a wait ends, with [`DeviceError::Gone`], also when the
/// device fails or is wanted back, and from then on does not wait any more.
#[derive(Debug)]
pub struct Irqs {
    handle: Arc<Handle>,
    kind: Kind,
    events: Vec<File>,
    /// A pin has fired and was masked by the kernel: it stays so until the next wait, so that its driver can quiet the device first.
    masked: AtomicBool,
}

impl Irqs {
    pub(crate) fn new(handle: Arc<Handle>, kind: Kind, wanted: u32) -> Result<Self, VfioError> {
        handle.check()?;
        let address = &handle.address;
        let available = count(&handle.file, address, kind)?;
        if wanted == 0 || wanted > available {
            return Err(VfioError::NoInterrupts {
                address: address.clone(),
                kind: kind.name(),
                available,
                wanted,
            });
        }
        let events: Result<Vec<File>, i32> = (0..wanted).map(|_| sys::eventfd()).collect();
        let events = events.map_err(|errno| error::call("eventfd", address, errno))?;
        set(&handle.file, kind, TRIGGER_EVENTFD, wanted, &events).map_err(failed(address))?;
        Ok(Self {
            handle,
            kind,
            events,
            masked: AtomicBool::new(false),
        })
    }
}

impl Interrupts for Irqs {
    fn vectors(&self) -> u32 {
        self.events.len() as u32
    }

    fn wait(&self, vector: u32, timeout: Duration) -> Result<u64, DeviceError> {
        let event = self
            .events
            .get(vector as usize)
            .ok_or(DeviceError::NoVector {
                vector,
                vectors: self.vectors(),
            })?;
        self.handle.check()?;
        // Relaxed: whoever takes the mark away unmasks; the kernel orders the rest.
        if self.masked.swap(false, Ordering::Relaxed) {
            let unmask = abi::VFIO_IRQ_SET_DATA_NONE | abi::VFIO_IRQ_SET_ACTION_UNMASK;
            set(&self.handle.file, self.kind, unmask, 1, &[])
                .map_err(|errno| error::system("VFIO_DEVICE_SET_IRQS", errno))?;
        }
        let timeout = if self.handle.is_wanted_back() {
            Duration::ZERO
        } else {
            timeout
        };
        observe(&self.handle, Some(event), timeout)?;
        let fired = take(event);
        if fired > 0 {
            self.masked
                .store(self.kind == Kind::Intx, Ordering::Relaxed);
            return Ok(fired);
        }
        self.handle.check()?;
        if self.handle.is_wanted_back() {
            return Err(DeviceError::Gone {
                reason: "its driver is being unbound, or it is unplugged: stop its work and drop it",
            });
        }
        Ok(0)
    }
}

impl Drop for Irqs {
    fn drop(&mut self) {
        if self.handle.check().is_err() {
            return;
        }
        let none = abi::VFIO_IRQ_SET_DATA_NONE | abi::VFIO_IRQ_SET_ACTION_TRIGGER;
        if let Err(errno) = set(&self.handle.file, self.kind, none, 0, &[]) {
            let address = &self.handle.address;
            tracing::warn!(%address, errno, "interrupts not switched off");
        }
    }
}
