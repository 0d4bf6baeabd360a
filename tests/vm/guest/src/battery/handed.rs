//! Descriptors that were handed in: a process that may open nothing uses a device all the same.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use shootdown::{DmaWindow, Rights};
use shootdown_vfio::{Container, Device, Group, VfioError, pci};

use super::child;
use super::rig::{BEFORE, SIZE, unmapping};
use super::transport::range;
use crate::check::{Check, Failure, Outcome, check, demand, demand_eq};
use crate::edu::{CHUNK, Edu};
use crate::memory::{Memory, PAGE};
use crate::pci::{EDU, Function};

pub(crate) const CHECKS: &[Check] = &[
    check("handed:a-container-and-a-group-that-are-not-set-up", fresh),
    check("handed:a-container-and-a-device-that-are", set_up),
];

/// What the child may lock.
const LOCKABLE: u64 = 1 << 20;
const IOVA: u64 = 0x4000_0000;

fn open(path: &str) -> Result<OwnedFd, Failure> {
    Ok(File::options().read(true).write(true).open(path)?.into())
}

fn descriptor_flags(fd: BorrowedFd<'_>) -> i32 {
    // SAFETY: F_GETFD takes nothing.
    unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFD) }
}

/// Without FD_CLOEXEC, as a descriptor is that came through an exec.
fn inherited(fd: OwnedFd) -> Result<OwnedFd, Failure> {
    // SAFETY: F_SETFD takes a number.
    let done = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) };
    demand_eq!(
        (done, descriptor_flags(fd.as_fd())),
        (0, 0),
        "descriptor flags"
    );
    Ok(fd)
}

fn closes_on_exec(fd: BorrowedFd<'_>, what: &str) -> Outcome {
    demand_eq!(
        descriptor_flags(fd),
        libc::FD_CLOEXEC,
        format!("descriptor flags of the {what}")
    );
    Ok(())
}

/// From here on this process can open nothing of VFIO.
fn become_nobody(number: u32) -> Outcome {
    child::become_unprivileged(LOCKABLE)?;
    let group = Group::open(number);
    let refused = matches!(
        group,
        Err(VfioError::Open {
            errno: libc::EACCES,
            ..
        })
    );
    demand!(
        refused,
        "a process without privilege opened a group: {group:?}"
    );
    Ok(())
}

/// A page goes to the device and comes back.
fn round_trip(container: &Arc<Container>, device: &Device) -> Outcome {
    device.set_bus_master(true)?;
    let edu = Edu::new(device.region(0)?)?;
    let memory = Memory::anonymous(PAGE)?;
    let iova = range(IOVA, SIZE);
    memory.fill(BEFORE);
    container.map(iova, memory.range(), Rights::READ_WRITE)?;
    edu.read(IOVA, CHUNK)?;
    memory.fill(0);
    edu.write(IOVA, CHUNK)?;
    unmapping(&[iova], || container.unmap(iova))?;
    demand_eq!(memory.differs(0, CHUNK, BEFORE), None, "what came back");
    Ok(())
}

fn fresh() -> Outcome {
    let address = Function::find(EDU)?.address;
    let number = pci::group(&address)?;
    let (container, group) = (
        open("/dev/vfio/vfio")?,
        open(&format!("/dev/vfio/{number}"))?,
    );
    child::run(|| {
        become_nobody(number)?;
        let group = Group::from_fd(inherited(group)?, number)?;
        closes_on_exec(group.as_fd(), "group")?;
        let container = Container::from_fd(inherited(container)?, vec![group])?;
        closes_on_exec(container.as_fd(), "container")?;
        let device = Device::open(&container, &address)?;
        closes_on_exec(device.as_fd(), "device")?;
        round_trip(&container, &device)
    })
}

fn set_up() -> Outcome {
    let (device, container) = super::transport::open()?;
    let number = pci::group(device.address())?;
    let (container_fd, device_fd) = (
        container.as_fd().try_clone_to_owned()?,
        device.as_fd().try_clone_to_owned()?,
    );
    child::run(|| {
        become_nobody(number)?;
        let container = Container::from_fd(inherited(container_fd)?, Vec::new())?;
        closes_on_exec(container.as_fd(), "container")?;
        let device = Device::from_fd(
            inherited(device_fd)?,
            device.address(),
            Some(container.clone()),
        )?;
        closes_on_exec(device.as_fd(), "device")?;
        round_trip(&container, &device)
    })
}
