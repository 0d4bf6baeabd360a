//! What has to be there before anything else can be proven.

use std::fs::File;
use std::io::Read;
use std::os::fd::FromRawFd;
use std::path::Path;

use crate::bare::Bare;
use crate::check::{Check, Outcome, check, demand, demand_eq};
use crate::pci::{EDU, Function, NVME, RNG};
use crate::raw::{self, Container};

pub(crate) const CHECKS: &[Check] = &[
    check("devices-are-handed-to-vfio-and-their-groups-appear", groups),
    check("vfio-speaks-api-0-and-type1-v2", version),
    check("a-group-in-use-is-refused-with-ebusy", busy),
    check("edu-registers-are-alive", liveness),
    check("edu-msi-arrives-at-an-eventfd", interrupt),
];

fn groups() -> Outcome {
    for (which, nth) in [(EDU, 0), (NVME, 0), (NVME, 1), (RNG, 0)] {
        let function = Function::nth(which, nth)?;
        function.bind_to_vfio()?;
        let driver = function.driver()?;
        demand!(
            driver.as_deref() == Some("vfio-pci"),
            "{}: driver is {driver:?}",
            function.address
        );
        let group = format!("/dev/vfio/{}", function.group()?);
        demand!(
            Path::new(&group).exists(),
            "{}: no {group}",
            function.address
        );
    }
    Ok(())
}

fn version() -> Outcome {
    demand_eq!(raw::version()?, (0, 1), "API version and type1 v2");
    Ok(())
}

fn busy() -> Outcome {
    let function = Function::find(EDU)?;
    let _holder = Container::of(&function)?;
    let second = Container::of(&function)
        .map(drop)
        .map_err(|error| error.raw_os_error());
    demand_eq!(second, Err(Some(libc::EBUSY)), "a second container");
    Ok(())
}

fn liveness() -> Outcome {
    let bare = Bare::open()?;
    for value in [0, 0x1234_5678, u32::MAX] {
        demand_eq!(bare.edu.liveness(value)?, !value, "liveness");
    }
    Ok(())
}

fn interrupt() -> Outcome {
    const BITS: u32 = 0x10;
    let bare = Bare::open()?;
    let mut eventfd = eventfd()?;
    bare.device.msi(&eventfd)?;
    let mut count = [0; 8];
    let early = eventfd.read(&mut count).map_err(|error| error.kind());
    demand_eq!(
        early,
        Err(std::io::ErrorKind::WouldBlock),
        "the eventfd before the interrupt"
    );
    bare.edu.raise(BITS)?;
    demand!(readable(&eventfd, 2000)?, "no interrupt within 2 s");
    eventfd.read_exact(&mut count)?;
    demand_eq!(u64::from_ne_bytes(count), 1, "interrupts");
    demand_eq!(bare.edu.pending()?, BITS, "pending");
    bare.edu.acknowledge(BITS)?;
    demand_eq!(bare.edu.pending()?, 0, "pending after the acknowledgement");
    Ok(())
}

fn eventfd() -> std::io::Result<File> {
    // SAFETY: takes a number and flags.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if fd < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: made just now, and nobody else knows it.
    Ok(unsafe { File::from_raw_fd(fd) })
}

fn readable(file: &File, milliseconds: i32) -> std::io::Result<bool> {
    use std::os::fd::AsRawFd;
    let mut poll = libc::pollfd {
        fd: file.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one entry, which lives through the call.
    match unsafe { libc::poll(&raw mut poll, 1, milliseconds) } {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(std::io::Error::last_os_error()),
    }
}
